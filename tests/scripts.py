"""The PowerShell scripts as syntax trees."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import botocore.session
import tree_sitter_powershell
from tree_sitter import Language, Node, Parser

from tests import template

PARSER = Parser(Language(tree_sitter_powershell.language()))


def walk(node: Node) -> Iterator[Node]:
    """The node and everything below it, in the order of the text."""
    yield node
    for child in node.children:
        yield from walk(child)


def text(node: Node) -> str:
    return (node.text or b"").decode("ascii")


def find(node: Node, *types: str) -> list[Node]:
    return [each for each in walk(node) if each.type in types]


def position(node: Node) -> str:
    return f"line {node.start_point[0] + 1}: {text(node)[:80]}"


def bare(node: Node) -> Node:
    """What is left when the expression nodes around a single value are taken off."""
    while len(node.children) == 1 and node.type != "string_literal":
        node = node.children[0]
    return node


def literal(node: Node) -> str | None:
    """The value of a string or word that holds no variable; None for anything else."""
    node = bare(node)
    match node.type:
        case "string_literal" if not find(node, "variable", "sub_expression"):
            return text(node)[1:-1]
        case "generic_token" | "simple_name" | "command_name":
            return text(node)
        case _:
            return None


def array(node: Node) -> list[Node]:
    """The elements of a comma list (also in ``@(...)`` and ``(@(...) + ...)``), else the node."""
    lists = [each for each in find(node, "array_literal_expression") if len(each.children) > 1]
    return [each for each in lists[0].children if each.type != ","] if lists else [node]


def variable_name(node: Node) -> str:
    """A variable's name in lower case, as PowerShell compares them: ``$Name``, ``@Name``."""
    return text(node).lstrip("$@").lower()


def enclosing(node: Node, *types: str) -> Node | None:
    parent = node.parent
    while parent and parent.type not in types:
        parent = parent.parent
    return parent


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: str


@dataclass(frozen=True)
class Function:
    """A function, or the whole script with the name ''."""

    name: str
    node: Node
    parameters: dict[str, Parameter]
    """By name in lower case."""

    @property
    def help(self) -> str:
        comments = find(self.node, "comment")
        return text(comments[0]) if comments and text(comments[0]).startswith("<#") else ""


@dataclass(frozen=True)
class Command:
    """A call of a function, a cmdlet, or (with ``&``) whatever a variable names."""

    name: str
    node: Node
    arguments: dict[str, Node | None]
    """By name in lower case; None for a switch."""
    positional: list[Node]
    splatted: list[str]

    @property
    def by_ampersand(self) -> bool:
        return any(text(each) == "&" for each in find(self.node, "command_invokation_operator"))

    @property
    def by_dot(self) -> bool:
        return any(text(each) == "." for each in find(self.node, "command_invokation_operator"))


@dataclass(frozen=True)
class Script:
    path: Path

    @cached_property
    def source(self) -> bytes:
        return self.path.read_bytes()

    @cached_property
    def root(self) -> Node:
        return PARSER.parse(self.source).root_node

    @cached_property
    def functions(self) -> dict[str, Function]:
        functions = {}
        for node in find(self.root, "function_statement"):
            name = text(next(each for each in node.children if each.type == "function_name"))
            functions[name] = Function(name, node, parameters_of(node))
        return functions

    @cached_property
    def main(self) -> Function:
        return Function("", self.root, parameters_of(self.root))

    @cached_property
    def commands(self) -> list[Command]:
        return [command_of(node) for node in find(self.root, "command")]

    def calls(self, *names: str) -> list[Command]:
        return [command for command in self.commands if command.name in names]


def parameters_of(node: Node) -> dict[str, Parameter]:
    """The parameters of the first ``param`` block that is the node's own."""
    blocks = find(node, "param_block")
    own = [block for block in blocks if node.type != "program" or not in_function(block)]
    parameters = {}
    for each in find(own[0], "script_parameter") if own else []:
        variable = next(child for child in each.children if child.type == "variable")
        attributes = "".join(text(child) for child in each.children if child != variable)
        kinds = re.findall(r"\[([A-Za-z.\[\]]+)\](?=\s*$)", attributes)
        parameter = Parameter(
            name=text(variable).lstrip("$"),
            kind=kinds[0].lower() if kinds else "object",
        )
        parameters[parameter.name.lower()] = parameter
    return parameters


def in_function(node: Node) -> bool:
    return enclosing(node, "function_statement") is not None


def command_of(node: Node) -> Command:
    name = next((text(each) for each in node.children if each.type == "command_name"), "")
    arguments: dict[str, Node | None] = {}
    positional, splatted, waiting = [], [], ""
    elements = [each for each in node.children if each.type == "command_elements"]
    for each in elements[0].children if elements else []:
        value = bare(each)
        if each.type == "command_parameter":
            waiting = text(each).lstrip("-").lower()
            arguments[waiting] = None
        elif each.type in ("command_argument_sep", "redirection"):
            continue
        elif value.type == "variable" and text(value).startswith("@"):
            splatted.append(variable_name(value))
        elif waiting and arguments[waiting] is None:
            arguments[waiting] = each
            waiting = ""
        else:
            positional.append(each)
    return Command(name, node, arguments, positional, splatted)


DEPLOY = Script(template.PATH.parent / "deploy-ecs.ps1")


CONNECTION = Script(template.PATH.parent / "test-connection.ps1")


COMMON = Script(template.PATH.parent / "ecs-common.ps1")


def aws_calls(script: Script) -> list[list[Node]]:
    """The words of every AWS CLI call: lists that begin with a service and an operation."""
    services = set(botocore.session.get_session().get_available_services())
    calls = []
    for node in find(script.root, "array_literal_expression"):
        words = [each for each in node.children if each.type != ","]
        if len(words) > 1 and literal(words[0]) in services:
            calls.append(words)
    return calls


def assigned_literals(function: Node, variable: str) -> set[str]:
    """The words that a function assigns to a variable."""
    assignments = find(function, "assignment_expression")
    mine = [each for each in assignments if variable_name(bare(each.children[0])) == variable]
    return {str(literal(each.children[-1])) for each in mine}
