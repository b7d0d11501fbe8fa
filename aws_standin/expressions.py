"""DynamoDB's expressions: read once, evaluated on items in wire form."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import msgspec

from aws_standin.model import AwsError, Json

# Of DynamoDB's 573 reserved words, those that a table of projects and events comes near.
RESERVED_WORDS: Final = frozenset(
    re.findall(
        r"\w+",
        """
    ACTION ADD AGENT ALL AND ANY AS ASC ATTRIBUTE BATCH BETWEEN BINARY BLOB BY CONNECTION COUNT
    COUNTER CURRENT CURSOR DATA DATE DAY DELETE DESC DURATION END ERROR EXISTS FIELDS FILTER
    FORMAT GROUP HASH HOUR IN INDEX INT ITEM ITEMS KEY KEYS LAST LENGTH LEVEL LIMIT LIST
    LOCATION LOG LONG MAP MAX MIN MONTH NAME NAMES NEXT NO NOT NULL NUMBER OBJECT OF OFFSET
    OR ORDER OUTPUT OWNER PARTITION PATH PROJECT RANGE REGION ROLE ROW SCAN SEQUENCE SET
    SIZE SOURCE START STATE STATUS STREAM STRING TABLE TEXT TIME TIMESTAMP TOKEN TOTAL TTL
    TYPE UNKNOWN UPDATE URL USER USERS UUID VALUE VALUES VIEW YEAR ZONE
    """,
    )
)

Item = dict[str, dict[str, Any]]
Node = tuple[Any, ...]

_TOKEN = re.compile(
    r"\s*(?:(?P<word>[#:]?[A-Za-z_][\w-]*)|(?P<operator><>|<=|>=|[=<>(),.+\-\[\]])|(?P<digits>\d+))"
)
COMPARATORS: Final = frozenset({"=", "<>", "<", "<=", ">", ">="})
_FUNCTIONS: Final = frozenset(
    {"attribute_exists", "attribute_not_exists", "attribute_type", "begins_with", "contains"}
)


def invalid(message: str) -> AwsError:
    return AwsError("ValidationException", message)


class Parser:
    """Reads one expression into nested tuples; names and values stay placeholders."""

    def __init__(self, text: str) -> None:
        self._tokens: list[str] = []
        position, text = 0, text.rstrip()
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise invalid(f"Invalid expression: Syntax error; token: {text[position]!r}")
            self._tokens.append(match[0].strip())
            position = match.end()
        self._tokens.append("")
        self._at = 0

    def _peek(self) -> str:
        return self._tokens[self._at]

    def _next(self) -> str:
        self._at += 1
        return self._tokens[self._at - 1]

    def _word(self, word: str) -> bool:
        """Skip a keyword if it comes next."""
        if self._peek().upper() != word:
            return False
        self._at += 1
        return True

    def _expect(self, token: str) -> None:
        if self._peek().upper() != token:
            raise invalid(f"Invalid expression: Syntax error; token: {self._peek()!r}")
        self._at += 1

    def _end(self) -> None:
        if self._peek():
            raise invalid(f"Invalid expression: Syntax error; token: {self._peek()!r}")

    def condition(self) -> Node:
        """``ConditionExpression``, ``FilterExpression`` or ``KeyConditionExpression``."""
        node = self._or()
        self._end()
        return node

    def _or(self) -> Node:
        node = self._and()
        while self._word("OR"):
            node = ("or", node, self._and())
        return node

    def _and(self) -> Node:
        node = self._not()
        while self._word("AND"):
            node = ("and", node, self._not())
        return node

    def _not(self) -> Node:
        return ("not", self._not()) if self._word("NOT") else self._primary()

    def _primary(self) -> Node:
        if self._peek() == "(":
            self._next()
            node = self._or()
            self._expect(")")
            return node
        if self._peek() in _FUNCTIONS:
            return (self._next(), *self._arguments())
        left = self._operand()
        if self._word("BETWEEN"):
            low = self._operand()
            self._expect("AND")
            return ("between", left, low, self._operand())
        if self._word("IN"):
            return ("in", left, self._arguments())
        if self._peek() in COMPARATORS:
            return (self._next(), left, self._operand())
        raise invalid(f"Invalid expression: Syntax error; token: {self._peek()!r}")

    def _arguments(self) -> tuple[Node, ...]:
        self._expect("(")
        arguments = [self._operand()]
        while self._word(","):
            arguments.append(self._operand())
        self._expect(")")
        return tuple(arguments)

    def _operand(self) -> Node:
        if self._peek() in ("size", "if_not_exists") and self._tokens[self._at + 1] == "(":
            return (self._next(), *self._arguments())
        if self._peek().startswith(":"):
            return ("value", self._next())
        return self.path()

    def path(self) -> Node:
        """A document path: names, and numbers for list indexes."""
        parts: list[str | int] = []
        while True:
            name = self._next()
            if not re.match(r"[#A-Za-z_]", name):
                raise invalid(f"Invalid expression: Syntax error; token: {name!r}")
            if name.upper() in RESERVED_WORDS:
                raise invalid(
                    "Invalid expression: Attribute name is a reserved keyword; "
                    f"reserved keyword: {name}"
                )
            parts.append(name)
            while self._word("["):
                parts.append(int(self._next()))
                self._expect("]")
            if not self._word("."):
                return ("path", *parts)

    def projection(self) -> tuple[Node, ...]:
        """``ProjectionExpression``."""
        paths = [self.path()]
        while self._word(","):
            paths.append(self.path())
        self._end()
        return tuple(paths)

    def update(self) -> tuple[Node, ...]:
        """``UpdateExpression``: its actions, in order."""
        actions: list[Node] = []
        while self._peek():
            clause = self._next().upper()
            if clause not in ("SET", "REMOVE", "ADD"):
                raise invalid(f"Invalid UpdateExpression: Syntax error; token: {clause!r}")
            actions.append(self._action(clause))
            while self._word(","):
                actions.append(self._action(clause))
        return tuple(actions)

    def _action(self, clause: str) -> Node:
        path = self.path()
        if clause == "REMOVE":
            return (clause, path)
        if clause == "ADD":
            return (clause, path, self._operand())
        self._expect("=")
        value = self._operand()
        if self._peek() in ("+", "-"):
            value = (self._next(), value, self._operand())
        return (clause, path, value)


@functools.lru_cache(maxsize=4096)
def read_condition(text: str) -> Node:
    return Parser(text).condition()


@functools.lru_cache(maxsize=4096)
def read_projection(text: str) -> tuple[Node, ...]:
    return Parser(text).projection()


@functools.lru_cache(maxsize=4096)
def read_update(text: str) -> tuple[Node, ...]:
    return Parser(text).update()


def _placeholders(node: Any) -> Iterator[str]:
    """All ``#names`` and ``:values`` in a tree."""
    if isinstance(node, tuple):
        for child in node:
            yield from _placeholders(child)
    elif isinstance(node, str) and node[:1] in ("#", ":"):
        yield node


class Expressions:
    """One request's expressions, with what their placeholders stand for."""

    def __init__(self, request: Json) -> None:
        self.names: dict[str, str] = request.get("ExpressionAttributeNames") or {}
        self.values: dict[str, Json] = request.get("ExpressionAttributeValues") or {}
        trees: list[Any] = []
        for field, parse in (
            ("ConditionExpression", read_condition),
            ("KeyConditionExpression", read_condition),
            ("FilterExpression", read_condition),
            ("ProjectionExpression", read_projection),
            ("UpdateExpression", read_update),
        ):
            if request.get(field):
                trees.append(parse(request[field]))
        used = set(_placeholders(tuple(trees)))
        for kind, given in (
            ("ExpressionAttributeNames", set(self.names)),
            ("ExpressionAttributeValues", set(self.values)),
        ):
            if given - used:
                raise invalid(
                    f"Value provided in {kind} unused in expressions: "
                    f"keys: {{{', '.join(sorted(given - used))}}}"
                )
        if missing := used - set(self.names) - set(self.values):
            raise invalid(
                "An expression attribute name or value used in expression is not defined; "
                f"{min(missing)}"
            )

    def path(self, node: Node) -> list[str | int]:
        """A path's parts with names filled in."""
        return [self.names[p] if isinstance(p, str) and p.startswith("#") else p for p in node[1:]]

    def get(self, node: Node, item: Item) -> Json | None:
        """What an operand stands for, as an attribute value; None if the item has it not."""
        match node[0]:
            case "value":
                return self.values[node[1]]
            case "size":
                value = self.get(node[1], item)
                return None if value is None else {"N": str(len(next(iter(value.values()))))}
            case "if_not_exists":
                value = self.get(node[1], item)
                return self.get(node[2], item) if value is None else value
            case "+" | "-":
                return self._sum(node, item)
        value = {"M": item}
        for part in self.path(node):
            try:
                value = value["L"][part] if isinstance(part, int) else value["M"][part]
            except (KeyError, IndexError):
                return None
        return value

    def _sum(self, node: Node, item: Item) -> Json:
        left, right = self.get(node[1], item), self.get(node[2], item)
        if left is None or right is None:
            raise invalid(
                "The provided expression refers to an attribute that does not exist in the item"
            )
        a, b = _number(left), _number(right)
        return {"N": str(a + b if node[0] == "+" else a - b)}

    def holds(self, node: Node, item: Item) -> bool:
        """Whether a condition is true of an item (``{}`` for one that does not exist)."""
        match node[0]:
            case "and":
                return self.holds(node[1], item) and self.holds(node[2], item)
            case "or":
                return self.holds(node[1], item) or self.holds(node[2], item)
            case "not":
                return not self.holds(node[1], item)
            case "attribute_exists":
                return self.get(node[1], item) is not None
            case "attribute_not_exists":
                return self.get(node[1], item) is None
            case "in":
                left = self.get(node[1], item)
                return any(_compare("=", left, self.get(n, item)) for n in node[2])
            case "between":
                value = self.get(node[1], item)
                return _compare(">=", value, self.get(node[2], item)) and _compare(
                    "<=", value, self.get(node[3], item)
                )
        left, right = self.get(node[1], item), self.get(node[2], item)
        if node[0] not in _FUNCTIONS:
            return _compare(node[0], left, right)
        if left is None or right is None:
            return False
        (kind, value), (_, wanted) = next(iter(left.items())), next(iter(right.items()))
        match node[0]:
            case "attribute_type":
                return bool(kind == wanted)
            case "begins_with":
                return kind in ("S", "B") and str(value).startswith(wanted)
            case _:
                return right in value if kind == "L" else wanted in value

    def update(self, request: Json, item: Item) -> Item:
        """The item after ``UpdateExpression``. Operands see the item as it was."""
        result: Item = msgspec.json.decode(msgspec.json.encode(item))
        for action in (
            read_update(request["UpdateExpression"]) if "UpdateExpression" in request else ()
        ):
            *way, last = self.path(action[1])
            target: Any = result
            for part in way:
                target = target[part]["L" if isinstance(part, int) else "M"]
            match action[0]:
                case "SET":
                    value = self.get(action[2], item)
                    if value is None:
                        raise invalid(
                            "The provided expression refers to an attribute that does not "
                            "exist in the item"
                        )
                    target[last] = value
                case "REMOVE":
                    target.pop(last, None)
                case "ADD":
                    value = self.get(action[2], item) or {}
                    target[last] = _added(self.get(action[1], item), value)
        return result


def _added(old: Json | None, value: Json) -> Json:
    """``ADD``: a number to a number, or members to a set."""
    kind = next(iter(value))
    if kind == "N":
        return {"N": str((_number(old) if old else Decimal(0)) + _number(value))}
    return {kind: sorted({*(old or {kind: []})[kind], *value[kind]})}


def _number(value: Json) -> Decimal:
    try:
        return Decimal(value["N"])
    except (KeyError, InvalidOperation):
        raise invalid("An operand in the update expression has an incorrect data type") from None


def _compare(operator: str, left: Json | None, right: Json | None) -> bool:
    """Compare attribute values. Different types are unequal and in no order."""
    if left is None or right is None:
        return operator == "<>" and left is not right
    (kind, a), (other, b) = next(iter(left.items())), next(iter(right.items()))
    if kind != other:
        return operator == "<>"
    if kind == "N":
        a, b = Decimal(a), Decimal(b)
    match operator:
        case "=":
            return bool(a == b)
        case "<>":
            return bool(a != b)
        case "<":
            return bool(a < b)
        case "<=":
            return bool(a <= b)
        case ">":
            return bool(a > b)
        case _:
            return bool(a >= b)
