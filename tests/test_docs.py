"""The documents say what is so: links lead somewhere, commands exist, tables equal the template.

General, so that a new document is covered from its first line: every Markdown file in the
project's root and in ``docs/`` is read.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore import xform_name
from moto import mock_aws

import server
from aws_standin import StandIn
from tests import template
from tests.documents import (
    DOCUMENTS,
    Block,
    blocks,
    code,
    code_spans,
    columns_of,
    in_language,
    prose,
    slugs,
)
from tests.template import Stack

ROOT = template.PATH.parent
IMAGE = "repository@sha256:0"


# --- Links and names --------------------------------------------------------------------------


class TestLinks:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_lead_to_a_file_and_a_heading(self, path: Path) -> None:
        broken = []
        for target in re.findall(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)", prose(path)):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            if not file.exists() or (anchor and anchor not in slugs(file)):
                broken.append(target)
        assert broken == []

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_images_are_there(self, path: Path) -> None:
        images = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", prose(path))
        assert [i for i in images if ":" not in i and not (path.parent / i).exists()] == []


OUTSIDE_WORDS = {
    # of AWS
    "CannotPullContainerError",
    "ROLLBACK_COMPLETE",
    "SendMessage",
    "ReportBatchItemFailures",
    "UnHealthyHostCount",
    # of this project's documents, standing for the reader's own
    "YOUR-AGENT",
}
"""What documents may name although no file of this project does."""


@functools.cache
def project_text() -> str:
    """Everything that documents may take names from: source files, and the template's names."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    texts = [
        (ROOT / name).read_text("utf-8", errors="replace")
        for name in names
        if (ROOT / name).is_file()
        and name != "tests/test_docs.py"
        and Path(name).suffix not in {".md", ".png", ".lock"}
        and not Path(name).name.startswith("requirements")
    ]
    stack = Stack(ContainerImage=IMAGE, NotificationEmail="oncall@example.com")
    texts += [json.dumps([stack.resources, stack.outputs])]
    texts += [field.upper() for field in server.Settings.__dataclass_fields__]
    texts += server.Metrics.described()
    return "\n".join(texts)


class TestNames:
    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_settings_and_identifiers_exist(self, path: Path) -> None:
        """A NAME_LIKE_THIS, NameLikeThis or agenticai-name in the text is in some file."""
        pattern = (
            r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)+|([A-Z][a-z0-9]+){2,}|/?(ecs/)?agenticai-[a-z][\w.-]*"
        )
        named = {span for span in code_spans(path) if re.fullmatch(pattern, span)}
        unknown = {
            name
            for name in named - OUTSIDE_WORDS
            if name.removesuffix("-TASKID") not in project_text()
        }
        assert unknown - {"agenticai-stack"} == set()

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_files_exist(self, path: Path) -> None:
        """What looks like a file of this project is one."""
        suffixes = r"\.(py|ps1|yaml|yml|md|txt|toml|js|html|json|png)"
        named = {span for span in code_spans(path) if re.fullmatch(r"\.?[\w./-]+" + suffixes, span)}
        outside = {"index.mjs", "config.json"}
        missing = [
            name
            for name in sorted(named - outside)
            if not (ROOT / name).exists() and not (path.parent / name).exists()
        ]
        assert missing == []


# --- Code blocks ------------------------------------------------------------------------------


LANGUAGES = {"bash", "powershell", "python", "javascript", "json", "yaml", "text", "html"}


class TestBlocks:
    def test_languages_are_known(self) -> None:
        """A block without a language, or with an unknown one, would escape every check below."""
        assert [str(block) for block in blocks() if block.language not in LANGUAGES] == []

    @pytest.mark.parametrize("block", in_language("bash"), ids=str)
    def test_bash_parses(self, block: Block) -> None:
        bash = shutil.which("bash")
        if bash is None or sys.platform == "win32":
            pytest.skip("no bash here")
        done = subprocess.run(
            [bash, "-n"], input=block.text, text=True, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("block", in_language("powershell"), ids=str)
    def test_powershell_parses(self, block: Block) -> None:
        tree_sitter = pytest.importorskip("tree_sitter")
        grammar = pytest.importorskip("tree_sitter_powershell")
        parser = tree_sitter.Parser(tree_sitter.Language(grammar.language()))
        # PowerShell takes `./` for `.\\` everywhere; the grammar does not know that.
        text = re.sub(r"^\./", r".\\", block.text, flags=re.MULTILINE)
        assert not parser.parse(text.encode()).root_node.has_error
        assert block.text.isascii()

    @pytest.mark.parametrize("block", in_language("python", "json", "yaml"), ids=str)
    def test_python_and_data_parse(self, block: Block) -> None:
        match block.language:
            case "python":
                ast.parse(block.text)
            case "json":
                json.loads(block.text)
            case "yaml":
                yaml.safe_load(block.text)

    @pytest.mark.parametrize("block", in_language("javascript"), ids=str)
    def test_javascript_parses(self, block: Block, tmp_path: Path) -> None:
        node = shutil.which("node")
        if node is None:
            pytest.skip("no node here")
        program = tmp_path / "block.mjs"
        program.write_text(block.text, "utf-8")
        done = subprocess.run(
            [node, "--check", program], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


# --- Commands ---------------------------------------------------------------------------------


FOREIGN_COMMANDS = {
    "docker",
    "podman",
    "git",
    "cd",
    "export",
    "source",
    "npx",
    "wscat",
    "curl",
    "echo",
    "sed",
    "Set-ExecutionPolicy",
    "Unblock-File",
}
"""Commands of others, whose arguments are not looked into."""

AWS_GLOBAL_OPTIONS = {
    "--region",
    "--profile",
    "--output",
    "--query",
    "--endpoint-url",
    "--max-items",
}
AWS_CUSTOM_COMMANDS = {
    # Commands the AWS CLI adds to what the services' models have.
    ("cloudformation", "deploy"): {
        "--template-file",
        "--stack-name",
        "--capabilities",
        "--parameter-overrides",
    },
    ("ecr", "get-login-password"): set(),
    ("logs", "tail"): {"--follow", "--since", "--filter-pattern"},
}


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in a bash block, also of those in ``name=$(...)``."""
    text = text.replace("\\\n", " ").replace("\n  ", " ")
    for line in text.splitlines():
        inner = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line.strip())
        lexer = shlex.shlex(inner, posix=True, punctuation_chars="|;&")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|;&"):
                while command and re.match(r"[A-Z_]+=", command[0]):
                    del command[0]  # a variable for this command alone
                if command:
                    yield command
                command = []
            else:
                command.append(word)


def powershell_commands(text: str) -> Iterator[list[str]]:
    """The words of each line, with quoted text emptied and ``@{ ... }`` as one word."""
    for line in text.splitlines():
        emptied = re.sub(r"'[^']*'", "''", line.split(" #")[0])
        words = re.findall(r"@\{[^}]*\}|[^\s,]+", emptied)
        if words:
            yield words


def fault(command: Sequence[str]) -> str:
    """What is wrong with a command, or nothing."""
    program, *arguments = command
    name = program.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".exe")
    match name:
        case "aws":
            return aws_fault(arguments)
        case "make":
            return make_fault(arguments)
        case "python" | "python3":
            return python_fault(arguments)
        case "pip" | "pytest":
            return missing_file(arguments)
        case _ if name.endswith(".ps1"):
            return script_fault(name, arguments)
        case _:
            return "" if name in FOREIGN_COMMANDS else f"what is {program}?"


def aws_fault(arguments: Sequence[str]) -> str:
    service, operation, *rest = arguments
    options = {word.split("=")[0] for word in rest if word.startswith("--")} - AWS_GLOBAL_OPTIONS
    known = AWS_CUSTOM_COMMANDS.get((service, operation))
    if known is None:
        session = botocore.session.get_session()
        if service not in session.get_available_services():
            return f"AWS has no service {service}"
        model = session.get_service_model(service)
        names = {xform_name(name, "-"): name for name in model.operation_names}
        if operation == "wait":
            waiters = session.get_waiter_model(service)
            waiter_names = {xform_name(name, "-"): name for name in waiters.waiter_names}
            if rest[0] not in waiter_names:
                return f"aws {service} cannot wait for {rest[0]}"
            api_name = waiters.get_waiter(waiter_names[rest[0]]).operation
        elif operation in names:
            api_name = names[operation]
        else:
            return f"aws {service} has no {operation}"
        shape = model.operation_model(api_name).input_shape
        members = dict(shape.members) if shape is not None else {}
        known = {f"--{xform_name(member, '-')}" for member in members}
        known |= {
            f"--no-{xform_name(name, '-')}"
            for name, s in members.items()
            if s.type_name == "boolean"
        }
        required = {f"--{xform_name(m, '-')}" for m in (shape.required_members if shape else ())}
        if required - options:
            return f"aws {service} {operation} needs {', '.join(sorted(required - options))}"
    unknown = options - known
    return f"aws {service} {operation} has no {', '.join(sorted(unknown))}" if unknown else ""


def make_fault(arguments: Sequence[str]) -> str:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for word in arguments:
        variable, given, _ = word.partition("=")
        if given and not re.search(rf"\b{variable}\b", makefile):
            return f"the Makefile has no {variable}"
        if not given and not re.search(rf"^{word}:", makefile, re.MULTILINE):
            return f"make has no target {word}"
    return ""


def python_fault(arguments: Sequence[str]) -> str:
    match arguments:
        case ["-m", "venv" | "pip" | "pytest", *rest]:
            return missing_file(rest)
        case ["-m", module, *rest]:
            if importlib.util.find_spec(module) is None:
                return f"there is no module {module}"
            return option_fault(("-m", module), rest)
        case [program, *rest]:
            if not (ROOT / program).is_file():
                return f"there is no {program}"
            return option_fault((program,), rest)
    return "python without arguments"


def option_fault(program: tuple[str, ...], arguments: Sequence[str]) -> str:
    options = [word for word in arguments if word.startswith("--")]
    if not options:
        return ""
    described = help_of(program)
    unknown = [option for option in options if not re.search(rf"{option}\b", described)]
    return f"{' '.join(program)} has no {', '.join(unknown)}" if unknown else ""


@functools.cache
def help_of(program: tuple[str, ...]) -> str:
    done = subprocess.run(
        [sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def missing_file(arguments: Sequence[str]) -> str:
    files = [word for word in arguments if re.search(r"\.(py|txt)$", word)]
    missing = [name for name in files if not (ROOT / name).is_file()]
    return f"there is no {', '.join(missing)}" if missing else ""


def script_fault(name: str, arguments: Sequence[str]) -> str:
    script = ROOT / name
    if not script.is_file():
        return f"there is no {name}"
    header = script.read_text("utf-8").partition("$ErrorActionPreference")[0]
    known = {found.lower() for found in re.findall(r"^    \[.*\]\$(\w+)", header, re.MULTILINE)}
    known |= {"whatif", "verbose", "confirm"}
    for word in arguments:
        if word.startswith("-") and word[1:].lower() not in known:
            return f"{name} has no {word}"
        if word.startswith("@{"):
            keys = set(re.findall(r"(\w+) *=", word))
            if unknown := keys - template.load()["Parameters"].keys():
                return f"the template has no {', '.join(unknown)}"
    return ""


class TestCommands:
    @pytest.mark.parametrize("block", in_language("bash"), ids=str)
    def test_bash_commands_exist(self, block: Block) -> None:
        """Programs, their options, make's targets and AWS's operations are those there are."""
        faults = [(" ".join(c), found) for c in shell_commands(block.text) if (found := fault(c))]
        assert faults == []

    @pytest.mark.parametrize("block", in_language("powershell"), ids=str)
    def test_powershell_commands_exist(self, block: Block) -> None:
        """The scripts have these parameters, and the template the ones that are overridden."""
        faults = [
            (" ".join(c), found) for c in powershell_commands(block.text) if (found := fault(c))
        ]
        assert faults == []

    @pytest.mark.parametrize("block", in_language("bash"), ids=str)
    def test_template_parameters_by_hand_exist(self, block: Block) -> None:
        overrides = re.findall(r"--parameter-overrides((?:\s+\"?\w+=\S+|\s+\\\n)+)", block.text)
        given = {name for text in overrides for name in re.findall(r"(\w+)=", text)}
        assert given <= template.load()["Parameters"].keys()

    @pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
    def test_commands_in_the_text_exist(self, path: Path) -> None:
        """`make run` and its like, as they stand within a sentence."""
        pattern = r"(make|python|\./\w[\w-]*\.ps1) .+"
        faults = [
            (span, found)
            for span in sorted(code_spans(path))
            if re.fullmatch(pattern, span) and (found := fault(span.split()))
        ]
        assert faults == []

    @pytest.mark.parametrize(
        "command",
        [
            "aws sqs send-massage --queue-url x --message-body y",
            "aws sqs send-message --queue-url x",
            "aws sqs send-message --queue-url x --message-body y --colour red",
            "aws ecs wait services-happy --cluster x",
            "aws cloudformation deploy --stackname x",
            "make cake",
            "make run PROT=8080",
            "python no-such-file.py",
            "python test-websocket.py ws://127.0.0.1 --never",
            "pip install -r no-such-file.txt",
            "./deploy-ecs.ps1 -Colour red",
            "frobnicate",
        ],
    )
    def test_check_finds(self, command: str) -> None:
        """The checks above can fail."""
        assert fault(command.split())


# --- Tables -----------------------------------------------------------------------------------


class TestTables:
    def test_every_parameter_with_its_default(self) -> None:
        parameters = template.load()["Parameters"]
        rows = [row for _, row in columns_of("Parameter")]
        assert [code(row["Parameter"]) for row in rows] == list(parameters)
        for row in rows:
            parameter = parameters[code(row["Parameter"])]
            default = str(parameter.get("Default", "required"))
            assert code(row["Default"]) or row["Default"] == default
            assert row["Default"] in (default, f"`{default}`")

    def test_every_output(self) -> None:
        outputs = [code(row["Output"]) for _, row in columns_of("Output")]
        assert outputs == list(template.load()["Outputs"])

    def test_every_alarm_with_its_threshold(self) -> None:
        stack = Stack(ContainerImage=IMAGE)
        expected = {}
        for name, resource in template.load()["Resources"].items():
            if resource["Type"] == "AWS::CloudWatch::Alarm":
                alarm = stack.resources[name]
                minutes = alarm["Period"] * alarm["EvaluationPeriods"] // 60
                expected[alarm["AlarmName"]] = (
                    f"`{alarm['MetricName']}` > {alarm['Threshold']} for {minutes}"
                    f" minute{'s' if minutes > 1 else ''}"
                )
        rows = {code(row["Alarm"]): row["Goes off when"] for _, row in columns_of("Alarm")}
        assert rows.keys() == expected.keys()
        for name, condition in expected.items():
            assert rows[name].startswith(condition)

    def test_resources_are_in_the_template(self) -> None:
        stack = json.dumps(
            Stack(ContainerImage=IMAGE, NotificationEmail="oncall@example.com").resources
        )
        names = [code(row["Name"]) for _, row in columns_of("Resource")]
        assert any(names)
        assert [n for n in names if n and n.removesuffix("TASKID") not in stack] == []

    def test_settings_exist(self) -> None:
        settings = {name.upper() for name in server.Settings.__dataclass_fields__}
        sdk = {"AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"}
        for header in ("Setting", "Variable"):
            for _, row in columns_of(header):
                named = set(re.findall(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+", row[header]))
                assert named <= settings | sdk

    def test_costs_add_up(self) -> None:
        """Each bold figure is the sum of the rows above it."""
        total = 0.0
        bold = 0
        for _, row in columns_of("Item"):
            figure = row["USD a month"]
            if figure.startswith("**"):
                assert float(figure.strip("*")) == pytest.approx(total)
                bold += 1
            else:
                total += float(figure)
        assert bold == 2

    def test_costs_count_what_there_is(self) -> None:
        items = {row["Item"] for _, row in columns_of("Item")}
        alarms = [
            r
            for r in template.load()["Resources"].values()
            if r["Type"] == "AWS::CloudWatch::Alarm"
        ]
        policies = [
            r
            for r in template.load()["Resources"].values()
            if r["Type"] == "AWS::ApplicationAutoScaling::ScalingPolicy"
        ]
        metrics = len(server.Metrics.described())
        assert f"{metrics} metrics" in items
        assert f"{len(alarms)} alarms" in items
        # One to scale out and one to scale in each, which CloudWatch bills like any other.
        assert f"{2 * len(policies)} alarms that the scaling policies make" in items

    def test_reserved_types_are_listed(self) -> None:
        """The guide for agents lists the words that only the gateway says."""
        text = prose(ROOT / "docs" / "WRITING_AGENTS.md")
        (sentence,) = re.findall(r"are reserved as `type`: (.*?)\.\n", text, re.DOTALL)
        assert set(re.findall(r"`(\w+)`", sentence)) == server.RESERVED_TYPES


# --- The example agents -----------------------------------------------------------------------


AGENTS = ROOT / "docs" / "WRITING_AGENTS.md"


def example(language: str, containing: str) -> str:
    (block,) = (b for b in in_language(language) if b.path == AGENTS and containing in b.text)
    return block.text


def order_of(message_id: str, project_id: str | None = "proj_123") -> dict[str, Any]:
    """The order of the guide's own example, with another id and project."""
    (block,) = (b for b in in_language("json") if b.path == AGENTS and '"action"' in b.text)
    order: dict[str, Any] = json.loads(block.text)
    return {**order, "message_id": message_id, "project_id": project_id}


def lambda_event(*bodies: str) -> dict[str, Any]:
    return {"Records": [{"messageId": f"m{n}", "body": body} for n, body in enumerate(bodies)]}


class TestOrderExample:
    def test_is_what_the_gateway_sends(self) -> None:
        """The example order has the fields of the gateway's message, and no others."""
        fields = server.AgentMessage.__struct_fields__
        assert order_of("1").keys() == {"action", *fields}

    def test_update_fields_are_those_the_gateway_reads(self) -> None:
        rows = [row for path, row in columns_of("Field") if path == AGENTS]
        described = {code(row["Field"]) for row in rows}
        assert set(server.Update.__struct_fields__) <= described


class TestPythonAgent:
    @pytest.fixture
    def agent(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
        """The guide's Python example as a module, on an AWS inside this process."""
        monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("EVENTS_TABLE_NAME", "events")
        monkeypatch.syspath_prepend(ROOT / "agent")  # the helper lies beside it
        with mock_aws():
            queue = boto3.client("sqs").create_queue(
                QueueName="updates.fifo", Attributes={"FifoQueue": "true"}
            )
            boto3.client("dynamodb").create_table(
                TableName="events",
                BillingMode="PAY_PER_REQUEST",
                AttributeDefinitions=[
                    {"AttributeName": "PK", "AttributeType": "S"},
                    {"AttributeName": "SK", "AttributeType": "S"},
                ],
                KeySchema=[
                    {"AttributeName": "PK", "KeyType": "HASH"},
                    {"AttributeName": "SK", "KeyType": "RANGE"},
                ],
            )
            monkeypatch.setenv("SQS_QUEUE_URL_UPDATES", queue["QueueUrl"])
            module = types.ModuleType("agent")
            exec(example("python", "lambda_handler"), module.__dict__)
            yield module
        sys.modules.pop("agenticai_agent", None)

    def updates(self) -> list[server.Update]:
        """What the agent has sent, as the gateway reads it."""
        sqs, url = boto3.client("sqs"), os.environ["SQS_QUEUE_URL_UPDATES"]
        found: list[server.Update] = []
        while messages := sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=10).get("Messages"):
            for message in messages:
                found.append(server.decode_update(message["Body"]))
                sqs.delete_message(QueueUrl=url, ReceiptHandle=message["ReceiptHandle"])
        return found

    def test_answers(self, agent: types.ModuleType) -> None:
        done = agent.lambda_handler(lambda_event(json.dumps(order_of("a"))), None)
        assert done == {"batchItemFailures": []}
        updates = self.updates()
        assert {(u.project_id, u.in_reply_to) for u in updates} == {("proj_123", "a")}
        logged = [json.loads(bytes(u.data)) for u in updates if not u.ephemeral]
        statuses = [data.get("status") or data["state"] for data in logged]
        assert statuses == ["working", "done", "done"]
        assert "".join(data.get("text", "") for data in logged) == "# A login page\n"

    def test_order_without_a_project_is_answered_to_its_sender(
        self, agent: types.ModuleType
    ) -> None:
        order = order_of("a", None)
        agent.lambda_handler(lambda_event(json.dumps(order)), None)
        assert {u.connection_id for u in self.updates()} == {order["connection_id"]}

    def test_stopped_order_is_not_begun(self, agent: types.ModuleType) -> None:
        """The item that the guide describes stops it, and an answer says so."""
        order = order_of("a")
        key = hashlib.sha256(b'["proj_123","a"]').hexdigest()
        item: Any = {
            "PK": {"S": f"STOP#{key}"},
            "SK": {"S": "STOP"},
            "stopped_at": {"N": str(datetime.fromisoformat(order["timestamp"]).timestamp())},
        }
        boto3.client("dynamodb").put_item(TableName="events", Item=item)
        done = agent.lambda_handler(lambda_event(json.dumps(order)), None)
        assert done == {"batchItemFailures": []}
        assert [json.loads(bytes(u.data)) for u in self.updates()] == [{"status": "cancelled"}]

    def test_bad_order_fails_alone(self, agent: types.ModuleType) -> None:
        bodies = (json.dumps(order_of("a")), "no JSON", json.dumps(order_of("b")))
        done = agent.lambda_handler(lambda_event(*bodies), None)
        assert done == {"batchItemFailures": [{"itemIdentifier": "m1"}]}
        assert {u.in_reply_to for u in self.updates()} == {"a", "b"}

    def test_ids_of_any_text_are_taken_by_fifo(self, agent: types.ModuleType) -> None:
        order = order_of("a b\u00fc" * 80, "project with spaces \u2713")
        done = agent.lambda_handler(lambda_event(json.dumps(order)), None)
        assert done == {"batchItemFailures": []}


class TestNodeAgent:
    SDK = """
        export class SQSClient {
          async send(command) { console.log(JSON.stringify(command.input)); }
        }
        export class SendMessageCommand { constructor(input) { this.input = input; } }
    """
    """In the SDK's place: prints what would be sent. Lambda's runtime brings the real one."""

    def run(self, folder: Path, *bodies: str) -> tuple[list[dict[str, Any]], Any]:
        """Run the guide's example: the sent messages, and what the handler returned."""
        node = shutil.which("node")
        if node is None:
            pytest.skip("no node here")
        package = folder / "node_modules" / "@aws-sdk" / "client-sqs"
        package.mkdir(parents=True)
        (package / "package.json").write_text('{"type": "module", "exports": "./index.js"}')
        (package / "index.js").write_text(self.SDK)
        (folder / "index.mjs").write_text(example("javascript", "handler"), "utf-8")
        (folder / "run.mjs").write_text(
            'import { handler } from "./index.mjs";\n'
            f"console.log(JSON.stringify(await handler({json.dumps(lambda_event(*bodies))})));\n"
        )
        done = subprocess.run(
            [node, folder / "run.mjs"],
            env={"SQS_QUEUE_URL_UPDATES": "https://sqs.example.com/1/updates.fifo"},
            capture_output=True,
            text=True,
            check=True,
        )
        *sent, returned = (json.loads(line) for line in done.stdout.splitlines())
        return sent, returned

    def test_reports_its_steps(self, tmp_path: Path) -> None:
        sent, returned = self.run(tmp_path, json.dumps(order_of("a")))
        assert returned == {"batchItemFailures": []}
        updates = [server.decode_update(message["MessageBody"]) for message in sent]
        assert len({update.event_id for update in updates}) == 3
        assert {(u.project_id, u.in_reply_to) for u in updates} == {("proj_123", "a")}
        assert len({message["MessageGroupId"] for message in sent}) == 1
        assert len({message["MessageDeduplicationId"] for message in sent}) == 3

    def test_says_once_what_it_does_twice(self, tmp_path: Path) -> None:
        """The same order again gives the same ids, that of another client other ones."""
        order = order_of("a")
        orders = (order, order, order | {"client_id": "another"})
        sent, _ = self.run(tmp_path, *map(json.dumps, orders))
        ids = [json.loads(message["MessageBody"])["event_id"] for message in sent]
        assert ids[:3] == ids[3:6]
        assert not {*ids[:3]} & {*ids[6:]}

    def test_bad_order_fails_alone(self, tmp_path: Path) -> None:
        bodies = ("no JSON", json.dumps(order_of("b", None)))
        sent, returned = self.run(tmp_path, *bodies)
        assert returned == {"batchItemFailures": [{"itemIdentifier": "m0"}]}
        assert all("connection_id" in json.loads(m["MessageBody"]) for m in sent)


# --- The map of the code ----------------------------------------------------------------------

ARCHITECTURE = ROOT / "docs" / "ARCHITECTURE.md"


class TestArchitecture:
    def test_every_section_in_its_order(self) -> None:
        """The map has the sections of ``server.py``, and no others."""
        source = Path(server.__file__).read_text("utf-8")
        sections = re.findall(r"^# --- (.+?) -+$", source, re.MULTILINE)
        rows = [row["section"] for path, row in columns_of("section") if path == ARCHITECTURE]
        assert rows == sections

    def test_names_exist(self) -> None:
        """A class or method that the map names is there."""
        unknown = []
        for span in set(re.findall(r"`([A-Z]\w+(?:\.\w+)?)`", ARCHITECTURE.read_text("utf-8"))):
            owner: Any = StandIn if span.startswith("StandIn") else server
            for name in span.removeprefix("StandIn.").split("."):
                owner = getattr(owner, name, None)
            if owner is None:
                unknown.append(span)
        assert unknown == []
