"""``ecs-template.yaml`` as the tests see it: parsed with its short forms, and evaluated.

CloudFormation's own evaluation is not at hand, and the stand-in's leaves out what it does not
know. What is here knows the functions that the template uses, and refuses any other.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

PATH = Path(__file__).parent.parent / "ecs-template.yaml"

PSEUDO_PARAMETERS = {
    "AWS::AccountId": "123456789012",
    "AWS::Partition": "aws",
    "AWS::Region": "us-east-1",
    "AWS::URLSuffix": "amazonaws.com",
    "AWS::StackName": "agenticai-websocket-stack",
}

REQUIRED_PARAMETERS = {
    "VpcId": "vpc-1",
    "LoadBalancerSubnetIds": "subnet-1,subnet-2",
    "TaskSubnetIds": "subnet-1,subnet-2",
    "DataTableName": "agenticai-data",
    **{
        f"{agent}QueueUrl": f"https://sqs.us-east-1.amazonaws.com/123456789012/agenticai-{agent}"
        for agent in ("PM", "Dev", "QA", "Ops")
    },
}
"""What has no default, as the main stack and the network give it."""

NO_VALUE = object()
"""What ``AWS::NoValue`` evaluates to: the property it stands in is left out."""


class _Loader(yaml.SafeLoader):
    """YAML as CloudFormation takes it: ``!Sub x`` for ``Fn::Sub: x``, and no aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"CloudFormation takes no alias:\n{self.get_mark()}")
        node: yaml.Node | None = super().compose_node(parent, index)
        return node

    def short_form(self, suffix: str, node: yaml.Node) -> dict[str, Any]:
        value: Any
        match node:
            case yaml.ScalarNode():
                value = self.construct_scalar(node)
            case yaml.SequenceNode():
                value = self.construct_sequence(node, deep=True)
            case yaml.MappingNode():
                value = self.construct_mapping(node, deep=True)
        if suffix == "GetAtt" and isinstance(value, str):
            value = value.split(".", 1)
        return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _Loader.short_form)


@functools.lru_cache(8)
def parse(text: str) -> dict[str, Any]:
    """A template's text, short forms written out. Not to be changed: it is shared."""
    template: dict[str, Any] = yaml.load(text, _Loader)
    return template


def load() -> dict[str, Any]:
    """The whole template of this checkout."""
    return parse(PATH.read_text("utf-8"))


def without_comments(text: str) -> str:
    """A template as ``deploy-ecs.ps1`` sends it: comments and empty lines taken off."""
    return re.sub(r"(?m)^\s*#.*\n|  +# .*$|^\n", "", text)


class Stack:
    """The template with parameters put in.

    A reference to a resource evaluates to ``<LogicalId>``; an attribute to the property of the
    same name where the template gives it (``QueueName``), else to ``<LogicalId.Attribute>``.
    """

    def __init__(self, document: Mapping[str, Any] | None = None, /, **parameters: str) -> None:
        template = load() if document is None else document
        defaults = {
            name: str(parameter["Default"])
            for name, parameter in template["Parameters"].items()
            if "Default" in parameter
        }
        self.parameters = {**defaults, **REQUIRED_PARAMETERS, **parameters}
        unknown = self.parameters.keys() - template["Parameters"].keys()
        if unknown:
            raise ValueError(f"the template has no parameter {', '.join(sorted(unknown))}")
        self._template = template
        self.conditions = {
            name: bool(self(value)) for name, value in template["Conditions"].items()
        }

    @functools.cached_property
    def resources(self) -> dict[str, Any]:
        """Properties of each resource that exists."""
        return {
            name: self(resource.get("Properties", {}))
            for name, resource in self._template["Resources"].items()
            if self._exists(resource)
        }

    @functools.cached_property
    def outputs(self) -> dict[str, str]:
        """Value of each output that exists."""
        return {
            name: self(output["Value"])
            for name, output in self._template["Outputs"].items()
            if self._exists(output)
        }

    def statements(self, role: str) -> dict[str, Any]:
        """The policy statements of a role, by their Sid."""
        return {
            statement["Sid"]: statement
            for policy in self.resources[role]["Policies"]
            for statement in policy["PolicyDocument"]["Statement"]
        }

    def container_environment(self) -> dict[str, str]:
        (container,) = self.resources["TaskDefinition"]["ContainerDefinitions"]
        return {variable["Name"]: variable["Value"] for variable in container["Environment"]}

    def _exists(self, item: Mapping[str, Any]) -> bool:
        return "Condition" not in item or self.conditions[item["Condition"]]

    def __call__(self, value: Any) -> Any:
        """Evaluate a value of the template."""
        if isinstance(value, list):
            return [item for item in map(self, value) if item is not NO_VALUE]
        if not isinstance(value, dict):
            return value
        if len(value) == 1:
            ((name, argument),) = value.items()
            if name in ("Ref", "Condition") or name.startswith("Fn::"):
                return self._function(name, argument)
        evaluated = {key: self(item) for key, item in value.items()}
        return {key: item for key, item in evaluated.items() if item is not NO_VALUE}

    def _function(self, name: str, argument: Any) -> Any:
        match name:
            case "Ref":
                return self._ref(argument)
            case "Condition":
                return bool(self(self._template["Conditions"][argument]))
            case "Fn::GetAtt":
                return self._attribute(*argument)
            case "Fn::Sub":
                return self._substitute(argument)
            case "Fn::If":
                condition, then, otherwise = argument
                return self(then if self.conditions[condition] else otherwise)
            case "Fn::Equals":
                left, right = map(self, argument)
                return left == right
            case "Fn::Not":
                return not self(argument[0])
            case "Fn::And":
                return all(map(self, argument))
            case "Fn::Contains":
                members, member = map(self, argument)
                return member in members
            case "Fn::Join":
                return self(argument[0]).join(self(argument[1]))
            case "Fn::Select":
                return self(argument[1])[int(argument[0])]
            case "Fn::Split":
                return self(argument[1]).split(argument[0])
            case "Fn::FindInMap":
                mapping, top, second = argument
                return self._template["Mappings"][mapping][self(top)][self(second)]
        raise ValueError(f"{name} is new here")

    def _ref(self, name: str) -> Any:
        if name == "AWS::NoValue":
            return NO_VALUE
        if name in PSEUDO_PARAMETERS:
            return PSEUDO_PARAMETERS[name]
        if name in self._template["Parameters"]:
            value = self.parameters[name]
            kind = self._template["Parameters"][name]["Type"]
            is_list = kind.startswith("List<") or kind == "CommaDelimitedList"
            return value.split(",") if is_list else value
        if not self._exists(self._template["Resources"][name]):
            raise ValueError(f"{name} is referred to where it does not exist")
        return f"<{name}>"

    def _attribute(self, name: str, attribute: str) -> str:
        resource = self._template["Resources"][name]
        if not self._exists(resource):
            raise ValueError(f"{name} is referred to where it does not exist")
        if attribute in resource["Properties"]:
            return str(self(resource["Properties"][attribute]))
        return f"<{name}.{attribute}>"

    def _substitute(self, argument: Any) -> str:
        text, local = argument if isinstance(argument, list) else (argument, {})

        def replaced(match: re.Match[str]) -> str:
            name = match[1]
            if name in local:
                return str(self(local[name]))
            if "." in name:
                return self._attribute(*name.split(".", 1))
            return str(self._ref(name))

        return re.sub(r"\$\{([^!}]+)\}", replaced, text)


def iam_actions(service: str, operation: str) -> set[str]:
    """The IAM actions that allow a call of ``server.py``.

    A batch is allowed by the action of the single call, a transaction by those of what it holds:
    the event log's are ``Update``, ``Put`` and ``Get``.
    """
    if operation == "TransactWriteItems":
        return {"dynamodb:PutItem", "dynamodb:UpdateItem"}
    if service == "elbv2":
        service = "elasticloadbalancing"
    if operation == "TransactGetItems":
        return {"dynamodb:GetItem"}
    if service in ("sqs", "sns"):
        operation = operation.removesuffix("Batch")
    return {f"{service}:{operation}"}


def rules_hold(stack: Stack) -> bool:
    """Whether the template's rules let the stack's parameters through."""
    return all(
        stack(assertion["Assert"])
        for rule in load()["Rules"].values()
        if stack(rule.get("RuleCondition", True))
        for assertion in rule["Assertions"]
    )
