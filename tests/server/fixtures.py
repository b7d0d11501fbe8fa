"""A stand-in for AWS of each test's own, and what runs on it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest
import pytest_asyncio

import aws_standin
import server
from aws_standin import StandIn
from server import Aws, Gateway
from tests.issuer import Issuer, running_issuer
from tests.moto_aws import MotoAws
from tests.server.aws import Platform, aws_clients, prefixes
from tests.server.gateways import gateway_in_a_task


@pytest.fixture(scope="session")
def moto_aws() -> Iterator[MotoAws]:
    """The AWS that moto plays, for the whole run."""
    with MotoAws.start() as aws:
        yield aws


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    """An AWS of the test's own, whose ``fault`` decides what goes wrong."""
    stand_in = await StandIn().start()
    yield stand_in
    await stand_in.stop()


@pytest.fixture
def platform(stand_in: StandIn) -> aws_standin.Platform:
    """The queues, the topic and the tables that a gateway expects, in the stand-in."""
    return stand_in.create_platform()


@pytest.fixture(params=["stand-in", "moto"])
def either_platform(request: pytest.FixtureRequest) -> Platform:
    """A platform in the stand-in, and once more one in moto."""
    if request.param == "stand-in":
        return cast("aws_standin.Platform", request.getfixturevalue("platform"))
    aws: MotoAws = request.getfixturevalue("moto_aws")
    return aws.create_platform(prefix=next(prefixes))


@pytest.fixture
async def aws(platform: aws_standin.Platform) -> AsyncIterator[Aws]:
    """The clients of the stand-in's platform."""
    async with aws_clients(platform) as clients:
        yield clients


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come almost at once, and a call that is not answered is given up soon."""
    monkeypatch.setattr(server, "full_jitter_s", lambda _attempt, **_bounds: 0.01)
    monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)


@pytest.fixture
async def gateway(platform: aws_standin.Platform) -> AsyncIterator[Gateway]:
    """A gateway without limits of rate, and with the stand-in for AWS."""
    async with gateway_in_a_task(platform) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Gateway]:
    """The same for tests that leave nothing behind: to start one takes longer than they do."""
    stand_in = await StandIn().start()
    async with gateway_in_a_task(stand_in.create_platform()) as gateway:
        yield gateway
    await stand_in.stop()


@pytest.fixture
async def issuer() -> AsyncIterator[Issuer]:
    async with running_issuer() as issuer:
        yield issuer
