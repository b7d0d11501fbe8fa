"""What all deployments in tests begin with, and how those that go well end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import issuer
from tests.deployment import policy
from tests.deployment.cloud import CERTIFICATE, GATEWAY_STACK, Cloud, running
from tests.deployment.person import Person, Run, WarmCli, lacking
from tests.moto_aws import MotoAws

pytestmark = [
    pytest.mark.skipif(bool(lacking()), reason=f"not installed: {lacking()}"),
    pytest.mark.timeout(240),
]


SECURITY = {
    "AuthJwksUrl": "https://idp.example.com/it's.json",
    "AuthIssuer": issuer.ISSUER,
    "AuthAudience": issuer.AUDIENCE,
    "AllowedOrigins": "https://app.example.com",
    "CertificateArn": CERTIFICATE,
    "DomainName": "ws.example.com",
}
"""Parameters that close a gateway, with an apostrophe where one may stand."""


ON = ("authentication  on", "TLS             on, as ws.example.com", "origin check    on")


@pytest.fixture(scope="module")
def aws() -> Iterator[MotoAws]:
    with MotoAws.start() as aws:
        yield aws


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def cloud(aws: MotoAws, tmp_path: Path) -> Iterator[Cloud]:
    aws.reset()
    folder = tmp_path / "cloud"
    folder.mkdir()
    with running(aws, folder, "agenticai") as cloud:
        yield cloud
        asked = {call.action for call in cloud.calls}
        assert asked <= policy.actions(called_via=None), "docs/deployer-policy.json lacks a right"


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmCli]:
    with WarmCli(tmp_path_factory.mktemp("cli")) as cli:
        yield cli


@pytest.fixture
def person(cloud: Cloud, tmp_path: Path, home: Path, cli: WarmCli) -> Person:
    folder = tmp_path / "it's [here], \u00e4\u00f6\u00fc \u6c34"
    return Person(cloud, folder, home, cli.command(warm=True))


def typed(parameters: dict[str, str]) -> str:
    """Parameters as an operator types them."""
    entries = "; ".join(f"{k} = '{v.replace(chr(39), chr(39) * 2)}'" for k, v in parameters.items())
    return f"-ParameterOverride @{{ {entries} }}"


def parameters_of(cloud: Cloud, wanted: dict[str, str]) -> dict[str, str]:
    """What the gateway's stack has of some parameters."""
    stack = cloud.stack(GATEWAY_STACK)
    assert stack is not None
    return {name: stack.parameters[name] for name in wanted}


def assert_closed(cloud: Cloud, run: Run) -> None:
    """It ended well, with the same security, and said so before it changed anything."""
    assert run.code == 0, run.text
    assert parameters_of(cloud, SECURITY) == SECURITY
    before, _, after = run.text.partition("4 of 7")
    for line in ON:
        assert line in before, run.text
        assert line in after, run.text
    service = cloud.services["agenticai-websocket-prod"]
    assert service.rollout == "COMPLETED"
    assert [task.health() for task in service.tasks] == [200]
