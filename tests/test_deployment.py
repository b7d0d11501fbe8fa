"""Whole deployments: both scripts by the real shell and AWS CLI, from every state of the stack.

A rerun without arguments must end well with the same security, or stop with the command to run.
``tests/deployment/every_case.py`` holds the cases that take longer; `make deployments` runs both.
"""

from __future__ import annotations

import json

import pytest

from tests import issuer
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
from tests.deployment.cloud import Cloud
from tests.deployment.person import Person, Run

__all__ = ["aws", "cli", "cloud", "home", "person", "pytestmark"]


class TestDeployment:
    def test_first_and_again(self, cloud: Cloud, person: Person) -> None:
        """A new gateway from nothing, closed as told, tested with a token; then nothing to do."""
        wanted = {k: v for k, v in SECURITY.items() if k not in ("CertificateArn", "DomainName")}
        token = issuer.token_of()
        run = person.deploy(typed(wanted), AGENTICAI_TOKEN=token)
        assert run.code == 0, run.text
        assert parameters_of(cloud, wanted) == wanted
        for number in range(1, 8):
            run.line(rf"^{number} of 7  \w")
        assert "as arn:aws:iam::123456789012:user/deployer" in run.line("account 123456789012")
        assert "on, tokens of https://issuer.example" in run.line("authentication")
        assert "OFF" in run.line("TLS")
        run.line(r"AuthJwksUrl = https://idp.example.com/it's.json  \(from: given\)")
        run.line(r"VpcId = vpc-\w+  \(from: found\)")
        run.line(r'^  ok    Health     http://\S+/health answered 200 {"status": "ok"')
        run.line(r"^  ok    WebSocket  ws://\S+ greeted and answered a ping in [\d.]+ ms$")
        run.line(r"^Endpoint +ws://")
        assert token not in run.text
        tags = [
            tag for image in cloud.repositories["agenticai-websocket-prod"] for tag in image.tags
        ]
        assert tags[1] == f"deployed-{tags[0]}"

        cloud.calls.clear()
        run = person.deploy(AGENTICAI_TOKEN=token)
        assert run.code == 0, run.text
        run.line("nothing to change")
        run.line(r"-amd64 was pushed before and is used again")
        changing = [call.operation for call in cloud.calls if call.changes]
        assert changing == ["CreateChangeSet", "DeleteChangeSet"]
        assert parameters_of(cloud, wanted) == wanted

    @pytest.mark.parametrize("status", ["ROLLBACK_COMPLETE", "ROLLBACK_FAILED", "CREATE_FAILED"])
    def test_a_stack_that_never_stood(self, cloud: Cloud, person: Person, status: str) -> None:
        """It is made anew with what the first deployment was given, each value shown."""
        failed = cloud.leave(status, **SECURITY)
        run = person.deploy()
        assert_closed(cloud, run)
        for name, value in SECURITY.items():
            line = run.line(rf"^  {name} = ")
            assert value in line
            assert f"the stack whose creation failed ({status})" in line
        assert failed.status == "DELETE_COMPLETE"
        assert "ContainerImage =" not in run.text

    @pytest.mark.parametrize(
        "status",
        ["UPDATE_ROLLBACK_FAILED", "UPDATE_FAILED", "UPDATE_ROLLBACK_COMPLETE"],
    )
    def test_an_update_that_failed(self, cloud: Cloud, person: Person, status: str) -> None:
        stack = cloud.leave(status, **SECURITY)
        run = person.deploy()
        assert_closed(cloud, run)
        assert stack.status == "UPDATE_COMPLETE"

    def test_made_anew_and_failed_again(self, cloud: Cloud, person: Person) -> None:
        """What this script deleted to make it anew still tells what it was given."""
        failed = cloud.leave("ROLLBACK_COMPLETE", **SECURITY)
        cloud.deny("CreateChangeSet")
        assert person.deploy().code == 1
        assert failed.deleted_at
        run = person.deploy()
        assert_closed(cloud, run)
        assert "deleted to make it anew" in run.line("AuthJwksUrl = ")

    def test_deleted_by_a_person(self, cloud: Cloud, person: Person) -> None:
        """Whoever deletes a stack wants it gone: nothing of it is taken, and it says so."""
        cloud.delete(cloud.leave("ROLLBACK_COMPLETE", **SECURITY), None)
        run = person.deploy()
        assert run.code == 0, run.text
        assert parameters_of(cloud, SECURITY) == dict.fromkeys(SECURITY, "")
        before = run.text.partition("4 of 7")[0]
        assert before.count("OFF: ") == 3

    def test_never_executed(self, cloud: Cloud, person: Person) -> None:
        """Anybody may have left it: its values are shown, and the commands, and nothing is done."""
        cloud.leave("REVIEW_IN_PROGRESS", **SECURITY)
        cloud.calls.clear()
        run = person.deploy()
        assert run.code == 1
        assert not [call for call in cloud.calls if call.changes]
        run.line(r"^    AuthJwksUrl = https://idp.example.com/it's.json$")
        run.line("aws cloudformation delete-stack --stack-name agenticai-websocket-stack")
        command = run.line(r"^    ./deploy-ecs.ps1 -ParameterOverride").strip()
        for name in SECURITY:
            assert f"{name} = '" in command
        assert "it may be anybody's" in run.text

    def test_review_without_a_change_set(self, cloud: Cloud, person: Person) -> None:
        cloud.leave("REVIEW_IN_PROGRESS", **SECURITY).change_sets.clear()
        run = person.deploy(typed(SECURITY))
        assert_closed(cloud, run)

    def test_operation_under_way(self, cloud: Cloud, person: Person) -> None:
        """Another's deployment is waited for."""
        stack = cloud.leave("UPDATE_IN_PROGRESS", **SECURITY)
        process = person.start("./deploy-ecs.ps1; exit $LASTEXITCODE")
        lines = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "waiting for its end" in line:
                cloud.event(stack, "another", stack.name, "UPDATE_COMPLETE")
        assert_closed(cloud, Run(process.wait(), "".join(lines)))
        assert any("another operation is under way (UPDATE_IN_PROGRESS)" in each for each in lines)

    def test_deletion_that_failed(self, cloud: Cloud, person: Person) -> None:
        cloud.leave("DELETE_FAILED", **SECURITY)
        cloud.calls.clear()
        run = person.deploy()
        assert run.code == 1
        assert "aws cloudformation delete-stack --stack-name" in run.text
        assert not [call for call in cloud.calls if call.changes]

    def test_failed_rollout(self, cloud: Cloud, person: Person) -> None:
        """Its reason, exit code and last log lines are shown; the old image runs on."""
        stack = cloud.leave("UPDATE_COMPLETE", **SECURITY)
        old = cloud.services["agenticai-websocket-prod"].image
        source = person.project / "server.py"
        source.write_text("raise SystemExit('SQS_QUEUE_URL_PM is not an address')\n")
        run = person.deploy("-ParameterOverride", "@{ LogLevel = 'DEBUG' }")
        assert run.code == 1
        run.line("ECS: .*deployment failed")
        run.line("container websocket: exit code 1")
        run.line("log: SQS_QUEUE_URL_PM is not an address")
        run.line(r"repeat it.*: ./deploy-ecs.ps1 -ParameterOverride @{ LogLevel = 'DEBUG' }$")
        assert stack.status == "UPDATE_ROLLBACK_COMPLETE"
        assert cloud.services["agenticai-websocket-prod"].image == old
        assert [task.health() for task in cloud.services["agenticai-websocket-prod"].tasks] == [200]


class TestConnection:
    def test_checks(self, cloud: Cloud, person: Person) -> None:
        """One whole line a check, or one object; 401 where a token is wanted is a pass."""
        wanted = {k: v for k, v in SECURITY.items() if k not in ("CertificateArn", "DomainName")}
        cloud.leave("UPDATE_COMPLETE", **wanted)
        run = person.check()
        assert run.code == 0, run.text
        lines = [line for line in run.text.splitlines() if line.startswith("  ok  ")]
        assert [line.split()[1] for line in lines] == [
            "Health",
            "Service",
            "Targets",
            "Logs",
            "WebSocket",
        ]
        run.line("Refused for want of a token")
        for task in cloud.services["agenticai-websocket-prod"].tasks:
            task.process.kill()
            task.process.wait()
        run = person.shell(
            "./test-connection.ps1 -Check Targets, Health -PassThru | ConvertTo-Json"
        )
        targets, health = json.loads(run.text)
        assert not targets["Passed"]
        assert "127.0.0.1 is unhealthy" in targets["Detail"]
        assert not health["Passed"]
        assert "503" in health["Detail"]
        run = person.check("-Check Targets")
        assert run.code == 1
        run.line("^  FAIL  Targets    0 of 1 targets healthy; 127.0.0.1 is unhealthy")
        run.line("^        next: A new task needs")
