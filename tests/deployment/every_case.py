"""The deployments that `make test` has no time for: each step fails once, or is interrupted.

make deployments ARGS="-k interrupted"
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import documents, issuer
from tests.deployment.cases import (  # the fixtures are found by their names
    SECURITY,
    assert_closed,
    aws,
    cli,
    cloud,
    home,
    parameters_of,
    person,
    pytestmark,
    typed,
)
from tests.deployment.cloud import CERTIFICATE, GATEWAY_STACK, SUBNETS, Cloud
from tests.deployment.person import Person, aws_cli_2

__all__ = ["aws", "cli", "cloud", "home", "person", "pytestmark"]


class TestFailures:
    @pytest.mark.parametrize(
        "operation",
        [
            "GetTemplateSummary",
            "DescribeVpcs",
            "CreateChangeSet",
            "DescribeImages",
            "GetAuthorizationToken",
            "PutImage",
            "DescribeServices",
            "DescribeTargetHealth",
        ],
    )
    def test_denied_once(self, cloud: Cloud, person: Person, operation: str) -> None:
        """A rerun ends well with the same security: without arguments once AWS has them."""
        cloud.deny(operation)
        run = person.deploy(typed(SECURITY))
        if run.code == 0:  # the checks at the end repeat what fails
            assert operation in ("DescribeTargetHealth", "DescribeServices")
        else:
            assert "AccessDenied" in run.text
            command = run.line("To repeat it with the same arguments: ").partition(": ")[2]
            stored = cloud.stack(GATEWAY_STACK) is not None
            arguments = "" if stored else command.removeprefix("./deploy-ecs.ps1")
            run = person.deploy(arguments)
        assert_closed(cloud, run)

    def test_execution_denied(self, cloud: Cloud, person: Person) -> None:
        """The change set stays, with its values; the printed commands lead to the same gateway."""
        cloud.deny("ExecuteChangeSet")
        assert person.deploy(typed(SECURITY)).code == 1
        run = person.deploy()
        assert run.code == 1
        delete = run.line("aws cloudformation delete-stack").strip()
        deploy = run.line("    ./deploy-ecs.ps1").strip()
        assert person.shell(f"{delete}; exit $LASTEXITCODE").code == 0
        assert_closed(cloud, person.shell(f"{deploy}; exit $LASTEXITCODE"))

    @pytest.mark.parametrize("command", ["build", "login", "push"])
    def test_docker_fails_once(self, cloud: Cloud, person: Person, command: str) -> None:
        person.docker_fails(command)
        run = person.deploy(typed(SECURITY))
        assert run.code == 1
        run.line(f"docker {command} failed .*as it was told to")
        assert_closed(cloud, person.deploy())

    @pytest.mark.parametrize("resource", ["EventsTable", "Cluster"])
    def test_creation_fails(self, cloud: Cloud, person: Person, resource: str) -> None:
        """The whole way: it rolls back, and the rerun makes it anew as it was told first."""
        cloud.failing[resource] = "Limit exceeded"
        run = person.deploy(typed(SECURITY))
        assert run.code == 1
        run.line(f"CREATE_FAILED {resource} Limit exceeded")
        cloud.let_time_pass(120)
        assert_closed(cloud, person.deploy())

    def test_queue_names_rest(self, cloud: Cloud, person: Person) -> None:
        """A queue's name cannot be used again for a minute: it waits for what is left of it."""
        cloud.failing["Cluster"] = "Limit exceeded"
        assert person.deploy(typed(SECURITY)).code == 1
        cloud.let_time_pass(45)
        run = person.deploy()
        run.line(r"waiting \d+ seconds: the name of a queue")
        assert_closed(cloud, run)

    def test_service_fails_at_first(self, cloud: Cloud, person: Person) -> None:
        """The first rollout fails; the rest of the stack stands, and so does what it was given."""
        good = (person.project / "server.py").read_bytes()
        (person.project / "server.py").write_text("raise SystemExit(2)\n")
        assert person.deploy(typed(SECURITY)).code == 1
        (person.project / "server.py").write_bytes(good)
        assert_closed(cloud, person.deploy())

    def test_early_validation(self, cloud: Cloud, person: Person) -> None:
        """Its reasons are asked for and shown."""
        cloud.validation = ["UpdatesQueue: Queue agenticai-updates-prod.fifo already exists"]
        run = person.deploy(typed(SECURITY))
        assert run.code == 1
        run.line("deploy-ecs: .*UpdatesQueue: Queue agenticai-updates-prod.fifo already exists")

    @pytest.mark.parametrize("operation", ["delete", "rollback"])
    def test_repair_fails(self, cloud: Cloud, person: Person, operation: str) -> None:
        status = {"delete": "ROLLBACK_COMPLETE", "rollback": "UPDATE_ROLLBACK_FAILED"}[operation]
        cloud.leave(status, **SECURITY)
        cloud.stuck.add(operation)
        run = person.deploy()
        assert run.code == 1
        run.line("deploy-ecs: The stack .* is (DELETE|UPDATE_ROLLBACK)_FAILED: .*(in use|undo)")


class TestInterrupted:
    """Ctrl-C, and a rerun without arguments, or with those that are printed."""

    @pytest.mark.parametrize(
        ("operation", "latency_s"),
        [
            ("GetCallerIdentity", 2),
            ("DescribeVpcs", 2),
            ("ExecuteChangeSet", 2),
            ("DescribeStackEvents", 2),
            ("GetAuthorizationToken", 2),
            ("DescribeServices", 2),
            ("DescribeTargetHealth", 2),
        ],
    )
    def test_in_a_call(
        self, cloud: Cloud, person: Person, operation: str, latency_s: float
    ) -> None:
        cloud.latency_s[operation] = latency_s
        cloud.resource_s = 0.05
        run = person.interrupt(
            f"./deploy-ecs.ps1 {typed(SECURITY)}", lambda: bool(cloud.called(operation))
        )
        assert run.code != 0 or "7 of 7" in run.text
        cloud.latency_s.clear()
        again = person.deploy()
        if again.code:
            assert "may be anybody's" in again.text
            delete = again.line("aws cloudformation delete-stack").strip()
            assert person.shell(f"{delete}; exit $LASTEXITCODE").code == 0
            again = person.shell(again.line("    ./deploy-ecs.ps1").strip())
        elif cloud.stack(GATEWAY_STACK) is None or operation in (
            "GetCallerIdentity",
            "DescribeVpcs",
        ):
            # Nothing had been stored, nothing was claimed: it says that it is open.
            assert "OFF: everybody" in again.text.partition("4 of 7")[0]
            return
        assert_closed(cloud, again)

    def test_while_building(self, cloud: Cloud, person: Person) -> None:
        def building() -> bool:
            calls = person.images / "calls"
            return calls.exists() and '"build"' in calls.read_text()

        person.interrupt(f"./deploy-ecs.ps1 {typed(SECURITY)}", building, DOCKER_BUILD_SECONDS="5")
        assert_closed(cloud, person.deploy())

    def test_while_asking_what_if(self, cloud: Cloud, person: Person) -> None:
        """The change set is deleted all the same."""
        stack = cloud.leave("UPDATE_COMPLETE", **SECURITY)
        cloud.latency_s["DescribeChangeSet"] = 2
        person.interrupt(
            "./deploy-ecs.ps1 -WhatIf -ParameterOverride @{ MaxTasks = 8 }",
            lambda: bool(cloud.called("DescribeChangeSet")),
        )
        assert not stack.change_sets


class TestWhatIf:
    def test_update(self, cloud: Cloud, person: Person) -> None:
        """What changes, what is replaced; nothing is left behind, and Docker is not needed."""
        stack = cloud.leave("UPDATE_COMPLETE", **SECURITY)
        (person.bin / "docker").unlink()
        before = dict(stack.parameters)
        run = person.deploy("-WhatIf -ParameterOverride @{ MaxTasks = 8; LogLevel = 'DEBUG' }")
        assert run.code == 0, run.text
        run.line("will Modify ScalableTarget")
        run.line("will REPLACE TaskDefinition")
        run.line("would build and push .*-amd64$")
        run.line("^Nothing was changed.$")
        assert not stack.change_sets
        assert stack.parameters == before
        (created,) = cloud.called("CreateChangeSet")
        assert created["ChangeSetName"].startswith("whatif-")

    def test_first(self, cloud: Cloud, person: Person) -> None:
        """A change set would make a stack: the template's resources are listed instead."""
        run = person.deploy("-WhatIf", typed(SECURITY))
        assert run.code == 0, run.text
        run.line(r"would create EventsTable \(AWS::DynamoDB::Table\)$")
        run.line(r"would create HttpsListener \(\S+\) if HasCertificate$")
        assert "authentication  on" in run.text
        assert not [call for call in cloud.calls if call.changes]
        assert cloud.stack(GATEWAY_STACK) is None


class TestImages:
    def test_rebuild(self, cloud: Cloud, person: Person) -> None:
        """The same revision anew, under a tag of its own; later runs take the newest."""
        cloud.leave("UPDATE_COMPLETE", **SECURITY)
        assert_closed(cloud, person.deploy())
        assert_closed(cloud, person.deploy("-Rebuild"))
        images = cloud.repositories["agenticai-websocket-prod"]
        rebuilt = images[-1]
        assert re.fullmatch(r"[0-9a-f]{12}-amd64-rebuilt-\d{14}", rebuilt.tags[0])
        assert '"--pull", "--no-cache"' in (person.images / "calls").read_text()
        count = len(images)
        assert_closed(cloud, person.deploy())
        assert len(images) == count
        image = cloud.services["agenticai-websocket-prod"].image
        assert image.endswith(rebuilt.digest)
        assert any(tag.startswith("deployed-") for tag in rebuilt.tags)

    def test_new_code(self, cloud: Cloud, person: Person) -> None:
        cloud.leave("UPDATE_COMPLETE", **SECURITY)
        source = person.project / "server.py"
        source.write_bytes(source.read_bytes() + b"# more\n")
        run = person.deploy()
        assert_closed(cloud, run)
        run.line("the work tree differs from its revision")
        person.commit()
        run = person.deploy()
        assert_closed(cloud, run)


class TestCaller:
    def test_profile_wins_over_the_environment(self, cloud: Cloud, person: Person) -> None:
        run = person.deploy("-WhatIf -AwsProfile other")
        assert run.code == 0, run.text
        assert {call.access_key for call in cloud.calls} == {"AKIAOTHERPROFILE"}

    def test_profile_that_is_not_there(self, person: Person) -> None:
        run = person.deploy("-WhatIf -AwsProfile nobody")
        assert run.code == 1
        run.line("deploy-ecs: Sign in with 'aws configure'.*nobody")

    def test_strict_mode_of_the_caller(self, cloud: Cloud, person: Person) -> None:
        cloud.leave("UPDATE_COMPLETE", **SECURITY)
        run = person.shell("Set-StrictMode -Version Latest; ./deploy-ecs.ps1; exit $LASTEXITCODE")
        assert_closed(cloud, run)
        run = person.shell("Set-StrictMode -Version Latest; ./test-connection.ps1 -Check Logs")
        assert run.code == 0, run.text

    def test_settings_that_others_have(self, person: Person) -> None:
        """Automatic prompts, a pager, another region and output format change nothing."""
        run = person.deploy("-WhatIf", AWS_CLI_AUTO_PROMPT="on", AWS_DEFAULT_OUTPUT="yaml")
        assert run.code == 0, run.text

    def test_environment_is_left_as_it_was(self, person: Person) -> None:
        run = person.shell(
            "$before = Get-ChildItem Env: | Out-String; ./deploy-ecs.ps1 -WhatIf | Out-Null;"
            " if ($before -ne (Get-ChildItem Env: | Out-String)) { exit 9 }; exit $LASTEXITCODE"
        )
        assert run.code == 0, run.text

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            ("-MainStackName none", "main stack 'none' does not exist"),
            ("-ParameterOverride @{ Nonsense = 1 }", "no parameter Nonsense"),
            ("-ParameterOverride @{ AuthJwksUrl = 'https://a.example/k' }", "give AuthIssuer"),
            (
                "-ParameterOverride @{ AuthJwksUrl = 'https://a.example:8443/k'; AuthIssuer = 'i';"
                " AuthAudience = 'a' }",
                "port 443",
            ),
            ("-CertificateArn arn:aws:acm:eu-west-1:123456789012:certificate/1", "eu-west-1"),
            ("-StackName agenticai-stack", "a stack of its own"),
        ],
    )
    def test_what_is_refused(
        self, cloud: Cloud, person: Person, arguments: str, sentence: str
    ) -> None:
        """A clear sentence, exit code 1, and nothing changed."""
        run = person.deploy(arguments)
        assert run.code == 1
        assert sentence in run.line("^deploy-ecs: ")
        assert cloud.stack(GATEWAY_STACK) is None

    def test_two_networks(self, cloud: Cloud, person: Person) -> None:
        cloud.vpcs = [
            {"VpcId": f"vpc-{number}", "IsDefault": False, "CidrBlock": f"10.{number}.0.0/16"}
            for number in (1, 2)
        ]
        run = person.deploy()
        assert run.code == 1
        run.line(r"-VpcId: vpc-1 \(10.1.0.0/16\), vpc-2")

    def test_pending_certificate(self, cloud: Cloud, person: Person) -> None:
        cloud.certificate["Status"] = "PENDING_VALIDATION"
        run = person.deploy(typed(SECURITY))
        assert run.code == 1
        run.line("PENDING_VALIDATION, not ISSUED")

    def test_other_stacks(self, cloud: Cloud, person: Person) -> None:
        cloud.leave("UPDATE_COMPLETE", Environment="staging")
        run = person.deploy()
        assert run.code == 1
        run.line("-Environment staging to update it")
        cloud.stacks[-1].parameters = {"Something": "else"}
        run = person.deploy()
        assert run.code == 1
        run.line("not made from ecs-template.yaml")

    def test_two_at_once(self, cloud: Cloud, person: Person) -> None:
        """The second waits, or is refused by CloudFormation; the stack ends well, and closed."""
        cloud.leave("UPDATE_COMPLETE", **SECURITY)
        cloud.resource_s = 0.5
        first = person.start("./deploy-ecs.ps1 -ParameterOverride @{ LogLevel = 'DEBUG' }")
        second = person.deploy("-ParameterOverride @{ LogLevel = 'WARNING' }")
        text, _ = first.communicate(timeout=150)
        assert first.returncode == 0 or second.code == 0, text + second.text
        assert parameters_of(cloud, SECURITY) == SECURITY
        assert_closed(cloud, person.deploy())


class TestVersion2:
    """The other version of the AWS CLI, which has a pager, prompts and an order of its own."""

    def test_first_and_update(self, cloud: Cloud, tmp_path: Path, home: Path) -> None:
        path = aws_cli_2()
        if path is None:
            pytest.skip("no version 2 of the AWS CLI is on the path: apt-get install awscli")
        person = Person(cloud, tmp_path / "version 2", home, f'exec "{path}"')
        run = person.deploy(typed(SECURITY), AWS_CLI_AUTO_PROMPT="on", AWS_PAGER="cat >&2")
        assert_closed(cloud, run)
        run = person.deploy("-ParameterOverride", "@{ LogLevel = 'DEBUG' }")
        assert_closed(cloud, run)
        assert parameters_of(cloud, {"LogLevel": ""}) == {"LogLevel": "DEBUG"}


class TestConnection:
    @pytest.mark.parametrize("arguments", ["", "-Check Health, WebSocket"])
    def test_dead_gateway(self, cloud: Cloud, person: Person, arguments: str) -> None:
        cloud.leave("UPDATE_COMPLETE")
        for task in cloud.services["agenticai-websocket-prod"].tasks:
            task.process.kill()
            task.process.wait()
        run = person.check(arguments)
        assert run.code == 1
        run.line("^  FAIL  Health ")
        run.line("^        next: ")
        assert all(len(line.split()) for line in run.text.splitlines())

    def test_no_stack(self, person: Person) -> None:
        run = person.check()
        assert run.code == 1
        run.line("test-connection: The stack 'agenticai-websocket-stack' does not exist")

    def test_token(self, cloud: Cloud, person: Person) -> None:
        wanted = {k: v for k, v in SECURITY.items() if k not in ("CertificateArn", "DomainName")}
        cloud.leave("UPDATE_COMPLETE", **wanted)
        run = person.check("-Check WebSocket", AGENTICAI_TOKEN=issuer.token_of())
        assert run.code == 0, run.text
        run.line("greeted and answered a ping")
        run = person.check("-Check WebSocket -AccessToken forged")
        assert run.code == 1
        run.line("FAIL  WebSocket .*401")


STAND_INS = {
    " -HostedZoneId Z0123456789ABC": "",  # no name server here knows the record it would make
    "subnet-0aaaaaaaaaaaaaaaa": SUBNETS[0],
    "subnet-0bbbbbbbbbbbbbbbb": SUBNETS[1],
    "QUEUE-URL": "https://sqs.us-east-1.amazonaws.com/123456789012/agenticai-updates-prod-task-1",
    "YOUR-BUCKET": "a-bucket",
    "1234abcd": "1234abcd",
}
"""What a reader puts in place of what stands for their own."""

BLOCKS = [
    block
    for block in documents.in_language("bash", "powershell")
    if re.search(r"(?m)^(\w+=\$\()?(aws |\./(deploy-ecs|test-connection))", block.text)
    and "YOUR-AGENT" not in block.text  # a function of the reader's own
]


class TestDocuments:
    """Every command of the documentation that touches AWS, as it stands there."""

    @pytest.mark.parametrize("block", BLOCKS, ids=str)
    def test_runs(self, cloud: Cloud, person: Person, block: documents.Block) -> None:
        text = block.text
        for name, value in STAND_INS.items():
            text = text.replace(name, value)
        # By hand, the guide begins with nothing; everything else is for a gateway that stands.
        by_hand = "sed " in text or "docker push" in text or "ContainerImage=" in text
        if not by_hand:
            # A name that does not resolve here is one that checks would fail for.
            closed = {"CertificateArn": CERTIFICATE, "DomainName": "ws.example.com"}
            cloud.leave("UPDATE_COMPLETE", **({} if "test-connection" in text else closed))
        if "agenticai-updates-prod-task-1" in text:
            cloud.aws.client("sqs").create_queue(QueueName="agenticai-updates-prod-task-1")
        if block.language == "powershell":
            lines = [line for line in text.splitlines() if line.startswith("./")]
            # The bucket and other environments are the reader's own; the rest is deployed.
            for line in lines:
                what_if = " -WhatIf" if "staging" in line and "-WhatIf" not in line else ""
                run = person.shell(f"{line}{what_if}; exit $LASTEXITCODE")
                assert run.code == 0, f"{line}\n{run.text}"
            return
        if by_hand:
            text = by_hand_until(block)
        text = without_what_is_missing(text, person)
        run = person.bash(text)
        assert run.code == 0, run.text
        if not by_hand:
            cloud.calls.clear()  # the policy is for whoever deploys, these are for whoever operates
        if "--output table" in text:
            run.line(r"^\|.*\|$|^[-+]+$")


def by_hand_until(block: documents.Block) -> str:
    """The blocks of the same section up to this one: each goes on from those before it."""
    section = [
        each
        for each in documents.in_language("bash")
        if each.path == block.path and each.line <= block.line and "python " not in each.text
    ]
    return "".join(each.text for each in section)


def without_what_is_missing(text: str, person: Person) -> str:
    """Without what the CLI here does not know, and without lines that are not for AWS."""
    lines = text.replace("\\\n", " ").splitlines()
    version_1 = person.shell("aws --version").text.startswith("aws-cli/1")
    if version_1:
        lines = [line for line in lines if not line.startswith("aws logs tail")]
    kept = [line for line in lines if not line.startswith(("python ", "git switch"))]
    # A task's id is the reader's own; without one the list is empty.
    kept = [line for line in kept if "TASK-ID" not in line]
    # moto, which stands for SQS here, has no such operation.
    kept = [line for line in kept if "start-message-move-task" not in line]
    return "\n".join(kept)
