"""The PowerShell scripts, on their syntax trees; and by PowerShell itself where there is one.

What the language would only find out while it runs is looked up in the trees before: names of
variables, functions, parameters and template outputs, the AWS CLI's operations and options, and
the exit code of every program. ``tests/powershell`` holds the tests that need ``pwsh``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from tree_sitter import Node
from websockets.exceptions import ConnectionClosedError
from websockets.sync.server import Server, ServerConnection, serve

from tests import template
from tests.scripts import (
    COMMON,
    CONNECTION,
    DEPLOY,
    PARSER,
    Command,
    Function,
    Script,
    array,
    assigned_literals,
    aws_calls,
    bare,
    command_of,
    enclosing,
    find,
    in_function,
    literal,
    position,
    text,
    variable_name,
    walk,
)
from tests.talking import client_at

ROOT = template.PATH.parent
TEMPLATE = template.load()

MAX_TEMPLATE_BYTES = 51_200
"""What CloudFormation takes by --template-body; anything longer would have to lie in a bucket."""


APPROVED_VERBS = re.compile(
    "Add|Assert|ConvertTo|Get|Invoke|New|Publish|Receive|Repair|Resolve|Select|Set|Show|Test|Wait"
    "|Write"
)
"""Those of Get-Verb that the scripts use."""

COMMON_PARAMETERS = frozenset({"verbose", "whatif", "erroraction"})

CMDLETS = {
    "ConvertFrom-Json": "InputObject",
    "ConvertTo-Json": "InputObject Compress",
    "ForEach-Object": "Process",
    "Get-Command": "Name ErrorAction",
    "Get-FileHash": "LiteralPath InputStream Algorithm",
    "Invoke-WebRequest": "Uri UseBasicParsing TimeoutSec",
    "Join-Path": "Path ChildPath",
    "Select-Object": "First Last Unique",
    "Set-StrictMode": "Version",
    "Sort-Object": "Property Descending",
    "Start-Sleep": "Seconds",
    "Test-Path": "LiteralPath",
    "Where-Object": "FilterScript",
    "Write-Information": "MessageData InformationAction",
    "Write-Verbose": "Message",
}
"""Cmdlets and parameters the scripts may use: those that Windows PowerShell 5.1 has as well."""

AUTOMATIC_VARIABLES = {
    *("_", "true", "false", "null", "host", "lastexitcode", "myinvocation", "psscriptroot"),
    *("psboundparameters", "pscmdlet", "whatifpreference"),
}

NEWER_SYNTAX = frozenset({"&&", "||", "??", "??=", "?", "?.", "?[", "ternary_expression"})
"""Syntax of PowerShell 7 alone."""

GLOBAL_CLI_OPTIONS = frozenset({"region", "profile", "output", "query", "max-items"})


EDITIONS = ("pwsh", "powershell")
"""PowerShell 7, and on Windows also Windows PowerShell 5.1."""


SCRIPTS = [DEPLOY, CONNECTION]
PESTER = sorted((ROOT / "tests" / "powershell").glob("*.Tests.ps1"))

each_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.path.name)
each_source = pytest.mark.parametrize(
    "script", [*SCRIPTS, COMMON], ids=lambda script: script.path.name
)
each_file = pytest.mark.parametrize(
    "script", [*SCRIPTS, COMMON, *map(Script, PESTER)], ids=lambda script: script.path.name
)


# --- Syntax and form ------------------------------------------------------------------------------


class TestSyntax:
    @each_file
    def test_parses(self, script: Script) -> None:
        """The file is PowerShell, without an error node in its tree."""
        faults = [
            position(node) for node in walk(script.root) if node.type == "ERROR" or node.is_missing
        ]
        assert not faults

    @each_file
    def test_ascii(self, script: Script) -> None:
        """Windows PowerShell reads a file without a byte order mark as ANSI, so it is ASCII."""
        assert script.source.isascii()
        assert not script.source.startswith(b"\xef\xbb\xbf")

    @each_file
    def test_no_backticks(self, script: Script) -> None:
        """No line is continued by a backtick, which a space after it would break unseen."""
        assert not re.search(rb"`\s", script.source)

    @each_file
    def test_windows_powershell(self, script: Script) -> None:
        """Nothing is written in the syntax of PowerShell 7 alone."""
        newer = [position(node) for node in walk(script.root) if node.type in NEWER_SYNTAX]
        assert not newer
        assert not find(
            script.root, "class_statement", "enum_statement"
        )  # 5.0, and no Pester mocks

    @each_script
    def test_no_trailing_space(self, script: Script) -> None:
        assert not re.search(rb"[ \t]+\n|\t|\r", script.source)
        assert script.source.endswith(b"}\n")

    def test_sees_what_is_wrong(self) -> None:
        """The checks above fail on what they are there for."""
        broken = PARSER.parse(b"if ($x { 'y' }").root_node
        assert any(node.type == "ERROR" or node.is_missing for node in walk(broken))
        newer = PARSER.parse(b"aws a && aws b").root_node
        assert any(node.type in NEWER_SYNTAX or node.type == "ERROR" for node in walk(newer))


OVERRIDE = re.compile(r"(?<=[{;] )(\w+) = '([^']*)'")
"""A parameter of the template, and its value, in an example's hash table."""


def examples_in(script: Script) -> list[str]:
    return re.findall(r"^\.EXAMPLE\n(.+)\n", script.main.help, re.MULTILINE)


class TestHelp:
    @each_script
    def test_script(self, script: Script) -> None:
        """The help has a synopsis, a description and three examples or more."""
        assert script.main.help.startswith("<#\n.SYNOPSIS\n")
        assert "\n.DESCRIPTION\n" in script.main.help
        assert script.main.help.count("\n.EXAMPLE\n") >= 3

    @each_script
    def test_parameters(self, script: Script) -> None:
        """Every parameter is described by the comment above it, where Get-Help finds it."""
        lines = script.source.decode("ascii").splitlines()
        for each in find(find(script.root, "param_block")[0], "script_parameter"):
            above = lines[each.start_point.row - 1]
            assert re.fullmatch(r"    # .+\.", above), position(each)

    @each_script
    @pytest.mark.parametrize("edition", EDITIONS)
    def test_shown(self, edition: str, script: Script) -> None:
        """Get-Help shows a description of every parameter."""
        command = (
            f"(Get-Help ./{script.path.name} -Full).parameters.parameter | ForEach-Object"
            " { if ($_.PSObject.Properties['description']) { $_.name } }"
        )
        shown = powershell(edition, command).stdout.split()
        assert shown == [each.name for each in script.main.parameters.values()]

    @each_script
    def test_examples(self, script: Script) -> None:
        """The examples call the script with parameters it has, and parse."""
        for example in examples_in(script):
            # The grammar does not know that a command may begin with a dot.
            root = PARSER.parse(example.removeprefix("./").encode()).root_node
            assert not root.has_error, example
            command = command_of(find(root, "command")[0])
            assert example.startswith("./")
            assert command.name == script.path.name
            unknown = set(command.arguments) - set(script.main.parameters) - COMMON_PARAMETERS
            assert not unknown, example

    def test_examples_pass_the_rules(self) -> None:
        """What an example sets of the template's parameters, the template's rules let through."""
        overrides = [dict(OVERRIDE.findall(example)) for example in examples_in(DEPLOY)]
        assert sum("AuthJwksUrl" in override for override in overrides) >= 1
        for override in overrides:
            assert override.keys() <= TEMPLATE["Parameters"].keys()
            assert template.rules_hold(template.Stack(**override)), override

    @each_source
    def test_binding(self, script: Script) -> None:
        """Scripts and functions are advanced ones, so that a mistyped parameter is an error."""
        for function in script.functions.values():
            assert b"[CmdletBinding(" in (function.node.text or b""), function.name
        for each in SCRIPTS:
            assert re.search(rb"\n\[CmdletBinding\([^\n]*\)\]\nparam\(", each.source)
        assert b"[CmdletBinding(SupportsShouldProcess = $true)]\nparam(" in DEPLOY.source

    def test_length(self) -> None:
        """All three together stay short enough to be read before they are trusted."""
        lines = sum(script.source.count(b"\n") for script in (*SCRIPTS, COMMON))
        assert lines <= 1_700

    def test_strict_mode(self) -> None:
        """They hold the strictest mode themselves, so that no caller's can surprise them."""
        assert b"\nSet-StrictMode -Version 3.0\n" in COMMON.source
        for script in SCRIPTS:
            line = b"\n. (Join-Path -Path $PSScriptRoot -ChildPath 'ecs-common.ps1')\n"
            assert line in script.source


# --- Names ----------------------------------------------------------------------------------------


class TestNames:
    @each_script
    def test_functions(self, script: Script) -> None:
        """Functions are named Verb-Noun, with an approved verb and only once."""
        names = [text(each) for each in find(script.root, "function_name")]
        assert len(names) == len(set(names))
        for name in names:
            verb, _, noun = name.partition("-")
            assert APPROVED_VERBS.fullmatch(verb), name
            assert re.fullmatch(r"([A-Z][A-Za-z]*)", noun), name

    def test_functions_are_used(self) -> None:
        """What is defined is called, and defined once."""
        called = {command.name for script in (*SCRIPTS, COMMON) for command in script.commands}
        for script in SCRIPTS:
            assert script.functions.keys() <= called
            assert not script.functions.keys() & COMMON.functions.keys()
            assert COMMON.functions.keys() <= called

    @each_source
    def test_calls(self, script: Script) -> None:
        """Every command is defined here or in the common file, or a known cmdlet."""
        for command in script.commands:
            if command.by_ampersand or command.by_dot:
                continue
            where = position(command.node)
            if command.name in CMDLETS:
                known = set(CMDLETS[command.name].lower().split())
                assert set(command.arguments) <= known, where
                continue
            function = known_function(script, command)
            assert function, where
            assert not command.positional, where
            assert set(command.arguments) <= set(function.parameters) | COMMON_PARAMETERS, where

    @each_script
    def test_switches(self, script: Script) -> None:
        """Only switches stand without a value."""
        for command in script.commands:
            function = script.functions.get(command.name)
            for name, value in command.arguments.items() if function else []:
                assert function
                parameter = function.parameters.get(name)
                is_switch = parameter is None or parameter.kind == "switch"
                assert value is not None or is_switch, position(command.node)

    def test_splat_of_the_other_script(self) -> None:
        """What deploy-ecs.ps1 hands to test-connection.ps1 are parameters of that."""
        keys = all_keys(DEPLOY.functions["Test-Deployment"].node, "test")
        assert {"stackname", "awsregion", "awsprofile", "check", "waitseconds"} <= keys
        assert keys <= set(CONNECTION.main.parameters)

    @each_script
    def test_variables(self, script: Script) -> None:
        """Every variable that is read was assigned in the same function, or is a parameter.

        The script's own parameters can be read everywhere, and so can what its end assigns.
        """
        own = set(script.main.parameters)
        own |= {"calledwith", "runfolder", "servicename", "templatebody"}
        for function in [script.main, *script.functions.values()]:
            known = own | assigned(function) | set(function.parameters) | AUTOMATIC_VARIABLES
            for node in find(function.node, "variable"):
                if function.name == "" and in_function(node):
                    continue
                name = variable_name(node)
                assert name in known or name.startswith("env:"), (
                    f"{function.name}, {position(node)}"
                )

    @each_script
    def test_parameters_are_used(self, script: Script) -> None:
        """No parameter is declared and then ignored."""
        for function in [script.main, *script.functions.values()]:
            names = [variable_name(node) for node in find(function.node, "variable")]
            if function.name == "":  # the common file reads them as well
                names += [variable_name(node) for node in find(COMMON.root, "variable")]
            for key, parameter in function.parameters.items():
                # Read as a variable, or out of $PSBoundParameters by its name.
                by_name = function.name == "" and f"'{parameter.name}'" in text(function.node)
                assert names.count(key) > 1 or by_name, f"{function.name} -{parameter.name}"


def known_function(script: Script, command: Command) -> Function | None:
    return script.functions.get(command.name) or COMMON.functions.get(command.name)


def hashtable_keys(body: Node, variable: str) -> set[str]:
    """The keys of the hashtable literal that a function assigns to a variable, in lower case."""
    keys = set()
    for assignment in find(body, "assignment_expression"):
        target = bare(assignment.children[0])
        tables = find(assignment.children[-1], "hash_literal_expression")
        if target.type == "variable" and variable_name(target) == variable and tables:
            bodies = [each for each in tables[0].children if each.type == "hash_literal_body"]
            for entry in bodies[0].children if bodies else []:
                if entry.type == "hash_entry":
                    keys.add(text(entry.children[0]).lower())
    return keys


def assigned(function: Function) -> set[str]:
    """The variables a function assigns: by ``=``, or as the variable of a ``foreach``."""
    names = set()
    for assignment in find(function.node, "assignment_expression"):
        target = bare(assignment.children[0])
        if target.type == "variable":
            names.add(variable_name(target))
    for loop in find(function.node, "foreach_statement"):
        names.add(variable_name(next(each for each in loop.children if each.type == "variable")))
    return names


# --- Programs -------------------------------------------------------------------------------------


class TestPrograms:
    @each_source
    def test_only_one_place_runs_programs(self, script: Script) -> None:
        """aws, docker and git are run by Invoke-Native alone, which copes with stderr on 5.1."""
        for command in script.commands:
            assert command.name.lower() not in {"aws", "docker", "git", "start-process"}
            if command.by_ampersand and "test-connection.ps1" not in text(command.node):
                function = enclosing(command.node, "function_statement")
                assert function
                assert "Invoke-Native" in text(function)[:30], position(command.node)

    @each_source
    def test_exit_code_is_read(self, script: Script) -> None:
        """The statement after each program looks at $LASTEXITCODE."""
        for command in script.commands:
            if command.by_ampersand:
                following = next_statement(command.node)
                assert following, position(command.node)
                assert "$LASTEXITCODE" in text(following), position(command.node)

    @each_source
    def test_result_is_looked_at(self, script: Script) -> None:
        """Every call of Invoke-Native keeps the result and decides by its ExitCode."""
        for command in script.calls("Invoke-Native"):
            assignment = enclosing(command.node, "assignment_expression")
            assert assignment, position(command.node)
            result = text(bare(assignment.children[0]))
            function = enclosing(command.node, "function_statement")
            assert function
            conditions = [
                text(statement.children[2])
                for statement in find(function, "if_statement")
                if statement.start_byte > command.node.start_byte
            ]
            decided = any(f"{result}.ExitCode" in condition for condition in conditions)
            assert decided, position(command.node)

    @each_source
    def test_no_quotes_in_arguments(self, script: Script) -> None:
        """No argument holds a double quote, which Windows PowerShell would lose, or is empty."""
        for words in [*aws_calls(script), *program_arguments(script)]:
            for word in words:
                value = literal(word)
                assert value != ""
                assert '"' not in text(bare(word))[1:-1], position(word)

    @each_script
    def test_aws_calls(self, script: Script) -> None:
        """Every operation and option is one of the AWS CLI's, by the API's own model."""
        session = botocore.session.get_session()
        calls = aws_calls(script)
        assert len(calls) >= 2
        for words in calls:
            values = [literal(word) for word in words]
            if values[1] is None:  # one of several, which the function has chosen
                function = enclosing(words[0], "function_statement")
                assert function
                chosen = assigned_literals(function, variable_name(bare(words[1])))
                models = session.get_service_model(str(values[0])).operation_names
                assert chosen
                assert chosen <= {xform_name(each, "-") for each in models}
                continue
            service, operation = str(values[0]), str(values[1])
            if (service, operation) == ("ecr", "get-login-password"):
                continue  # the CLI's own
            model = session.get_service_model(service)
            names = {xform_name(each, "-"): each for each in model.operation_names}
            assert operation in names, position(words[0])
            shape = model.operation_model(names[operation]).input_shape
            members = {xform_name(each, "-") for each in shape.members} if shape else set()
            options = [value[2:] for value in values if value and value.startswith("--")]
            assert set(options) <= members | GLOBAL_CLI_OPTIONS, position(words[0])
            required = (
                {xform_name(each, "-") for each in shape.required_members} if shape else set()
            )
            assert required <= set(options), position(words[0])

    def test_image_inputs(self) -> None:
        """The tag's hash covers every file the Dockerfile copies from here."""
        function = text(DEPLOY.functions["Get-ImageTag"].node)
        names = re.search(r"\$names = (.*)\n", function)
        assert names
        inputs = set(re.findall(r"'([^']+)'", names[1]))
        copies = re.findall(
            r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE
        )
        assert copies
        assert {"Dockerfile", *(name for copy in copies for name in copy.split())} <= inputs
        assert all((ROOT / name).exists() for name in inputs - {".dockerignore"})


def next_statement(node: Node) -> Node | None:
    """The statement that runs after the one a command is in, also when that ends an ``if``."""
    while node.parent:
        if node.parent.type == "statement_list" and node.next_named_sibling:
            return node.next_named_sibling
        node = node.parent
    return None


def program_arguments(script: Script) -> list[list[Node]]:
    commands = script.calls("Invoke-Native", "Invoke-Docker", "Invoke-AwsCli")
    values = [command.arguments.get("argumentlist") for command in commands]
    return [array(value) for value in values if value]


# --- The template ---------------------------------------------------------------------------------


class TestTemplate:
    def test_fits(self) -> None:
        """CloudFormation takes what is sent, without a bucket to put it in."""
        sent = template.without_comments(template.PATH.read_text("utf-8"))
        assert len(sent.encode()) <= MAX_TEMPLATE_BYTES
        # The script takes off what the tests do.
        assert rb"'(?m)^\s*#.*\n|  +# .*$|^\n'" in DEPLOY.source

    @each_script
    def test_outputs(self, script: Script) -> None:
        """Every output that is read is one the template has."""
        names = index_keys(script, "outputs", "output", "state['Output']")
        assert len(names) >= 3
        assert names <= TEMPLATE["Outputs"].keys()

    @each_script
    def test_parameters(self, script: Script) -> None:
        """Every stack parameter that is read or set is one the template has."""
        names = index_keys(
            script, "parameters", "previous", "given", "withoutImage", "state['Parameter']"
        )
        assert names
        assert names <= TEMPLATE["Parameters"].keys()

    def test_given_parameters(self) -> None:
        """What the deployment finds out goes into parameters the template has."""
        names = set()
        for function in ("Select-Subnet", "Get-NetworkParameter"):
            body = DEPLOY.functions[function].node
            names |= {key for key in all_keys(body, "network") if key != "vpcid"}
        select = DEPLOY.functions["Select-Subnet"].node
        tables = find(select, "hash_literal_expression")
        names |= {text(entry.children[0]).lower() for entry in find(tables[-1], "hash_entry")}
        known = {name.lower() for name in TEMPLATE["Parameters"]}
        assert {"loadbalancersubnetids", "tasksubnetids", "assignpublicip"} <= names <= known

    def test_main_stack(self) -> None:
        """What has no default and is not the network comes from the main stack, all of it."""
        body = text(DEPLOY.functions["Get-MainStackOutput"].node)
        line = re.search(r"\$required = (.*)\n", body)
        assert line
        required = set(re.findall(r"'(\w+)'", line[1]))
        without = {name for name, each in TEMPLATE["Parameters"].items() if "Default" not in each}
        assert required == without - {"VpcId", "LoadBalancerSubnetIds", "TaskSubnetIds"}

    def test_own_parameters(self) -> None:
        """The script's parameters of the template's names accept no more than the template."""
        names = all_keys(DEPLOY.functions["Resolve-Parameter"].node, "own")
        assert names == {"certificatearn", "domainname", "hostedzoneid", "cpuarchitecture"}
        own = {each.name for each in DEPLOY.main.parameters.values()}
        assert names <= {name.lower() for name in TEMPLATE["Parameters"].keys() & own}
        architectures = TEMPLATE["Parameters"]["CpuArchitecture"]["AllowedValues"]
        assert set(architectures) == {"X86_64", "ARM64"}
        assert b"[ValidateSet('X86_64', 'ARM64')]\n    [string]$CpuArchitecture" in DEPLOY.source
        pattern = TEMPLATE["Parameters"]["Environment"]["AllowedPattern"]
        assert f"[ValidatePattern('(?-i){pattern}')]".encode() in DEPLOY.source

    def test_resource_names(self) -> None:
        """Service and log group are called what the scripts call them."""
        resources = TEMPLATE["Resources"].values()
        names = {
            kind: [each["Properties"] for each in resources if each["Type"] == kind]
            for kind in ("AWS::ECS::Service", "AWS::Logs::LogGroup")
        }
        service = names["AWS::ECS::Service"][0]["ServiceName"]["Fn::Sub"]
        group = names["AWS::Logs::LogGroup"][0]["LogGroupName"]["Fn::Sub"]
        assert service == "agenticai-websocket-${Environment}"
        assert group == "/ecs/agenticai-websocket-${Environment}"
        assert b'$ServiceName = "agenticai-websocket-$Environment"' in DEPLOY.source
        assert b'"/ecs/$ServiceName"' in DEPLOY.source
        (container,) = TEMPLATE["Resources"]["TaskDefinition"]["Properties"]["ContainerDefinitions"]
        prefix = container["LogConfiguration"]["Options"]["awslogs-stream-prefix"]
        assert f'"{prefix}/{container["Name"]}/$id"'.encode() in DEPLOY.source
        assert b"\"agenticai-websocket-$($parameters['Environment'])\"" in CONNECTION.source
        assert b'"/ecs/$service"' in CONNECTION.source


def index_keys(script: Script, *holders: str) -> set[str]:
    """The literal keys in ``$holder['Key']``, and those of ``ContainsKey('Key')``."""
    keys = set()
    for node in find(script.root, "element_access"):
        holder = text(node.children[0]).lstrip("$").lower()
        if holder in {each.lower() for each in holders}:
            keys.add(literal(node.children[2]))
    wanted = "|".join(map(re.escape, holders))
    keys |= set(re.findall(rf"\$(?:{wanted})\.ContainsKey\('(\w+)'\)", script.source.decode()))
    return {key for key in keys if key}


def all_keys(body: Node, variable: str) -> set[str]:
    """The keys a hashtable variable gets, by its literals and by ``$variable['Key'] =``."""
    keys = hashtable_keys(body, variable)
    for target in find(body, "left_assignment_expression"):
        node = bare(target)
        if node.type == "element_access" and text(node.children[0]).lower() == f"${variable}":
            keys.add(str(literal(node.children[2])).lower())
    return keys


# --- By PowerShell itself -------------------------------------------------------------------------


def powershell(edition: str, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script text from the project's folder; skip the test where the edition is missing."""
    program = shutil.which(edition)
    if not program:
        pytest.skip(f"there is no {edition} here: the scripts were parsed, not run")
    command = [program, "-NoLogo", "-NoProfile", "-NonInteractive", "-Command", script]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def need_module(edition: str, name: str, version: str) -> None:
    """Skip the test unless the edition has the module, in this version or a newer one."""
    query = f"Get-Module -ListAvailable {name} | ForEach-Object {{ $_.Version.ToString() }}"
    found = [
        tuple(map(int, line.split(".")[:2])) for line in powershell(edition, query).stdout.split()
    ]
    if not any(each >= tuple(map(int, version.split("."))) for each in found):
        pytest.skip(f"{edition} has no {name} {version}: Install-Module {name} -Scope CurrentUser")


@pytest.fixture
def gateway() -> Iterator[str]:
    """The address of a gateway that greets, answers pings, and wants a token on ``/closed``."""

    def greet(connection: ServerConnection) -> None:
        if connection.request and connection.request.path == "/closed":
            connection.close(4401, "no token")
            return
        connection.send(json.dumps({"type": "connected", "timestamp": "2025-11-24T12:00:00Z"}))
        for message in connection:
            if json.loads(message) == {"action": "ping"}:
                connection.send(json.dumps({"type": "event", "data": "x" * 100_000}))
                connection.send(json.dumps({"type": "pong"}))

    with serve(greet, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{port(server)}"
        server.shutdown()
        thread.join()


def port(server: Server) -> int:
    address: Any = server.socket.getsockname()
    return int(address[1])


class TestPowerShell:
    @each_script
    def test_analyzer(self, script: Script) -> None:
        """PSScriptAnalyzer has no errors and no warnings."""
        need_module("pwsh", "PSScriptAnalyzer", "1.21")
        settings = ROOT / "tests" / "powershell" / "PSScriptAnalyzerSettings.psd1"
        result = powershell(
            "pwsh",
            f"$found = @(Invoke-ScriptAnalyzer -Path '{script.path}' -Settings '{settings}');"
            " $found | Format-List -Property RuleName, Severity, Line, Message;"
            " exit $found.Count",
        )
        assert result.returncode == 0, result.stdout + result.stderr

    @pytest.mark.parametrize("edition", EDITIONS)
    def test_pester(self, edition: str, gateway: str) -> None:
        """The Pester tests pass; they talk to a gateway of this test for the round trip."""
        need_module(edition, "Pester", "5.3")
        result = powershell(
            edition,
            "Import-Module Pester -MinimumVersion 5.3; $c = New-PesterConfiguration;"
            " $c.Run.Path = 'tests/powershell'; $c.Run.Exit = $true;"
            " $c.Output.Verbosity = 'Detailed'; Invoke-Pester -Configuration $c",
            TEST_GATEWAY=gateway,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert re.search(r"Tests Passed: [1-9]", result.stdout), result.stdout

    def test_gateway(self, gateway: str) -> None:
        """The gateway the Pester tests talk to does what they expect of one."""
        with client_at(gateway) as client:
            client.send(action="ping")
            assert [client.receive()["type"] for _ in range(2)] == ["event", "pong"]
        with (
            pytest.raises(ConnectionClosedError, match="4401"),
            client_at(f"{gateway}/closed"),
        ):
            pass

    def test_there_are_pester_tests(self) -> None:
        """Each script has its file of Pester tests, and each file dot-sources its script."""
        assert [path.name for path in PESTER] == [
            "deploy-ecs.Tests.ps1",
            "test-connection.Tests.ps1",
        ]
        for path in PESTER:
            assert path.name.replace(".Tests", "") in path.read_text("ascii")
