"""The orderly end of a task: what begins it."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from websockets.frames import Opcode

import aws_standin
import server
from aws_standin import Fault, StandIn
from server import Connection, Gateway
from tests.server.aws import SERVER_ERROR, always, aws_clients, hold_back
from tests.server.gateways import (
    ADDRESS,
    asked_again,
    balanced_gateway,
    register,
    settings,
    task_group,
)
from tests.server.peers import dialled, fetch, masked, peer_of
from tests.server.processes import task_metadata
from tests.waiting import DEADLINE_S, eventually

DENIED = Fault(status=403, code="AccessDenied")


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the target is asked for again and again."""
    monkeypatch.setattr(server.TargetHealth, "EVERY_S", 0.01)


class TestTargetHealth:
    @pytest.mark.parametrize("before", ["unused", "initial", "healthy", "unhealthy"])
    async def test_draining(
        self, platform: aws_standin.Platform, stand_in: StandIn, before: str
    ) -> None:
        """The drain begins when the target of this very task changes to draining."""
        async with balanced_gateway(platform) as gateway, peer_of(gateway) as peer:
            await asked_again(stand_in)  # it is not registered yet
            register(stand_in, gateway, before)
            await asked_again(stand_in)
            stand_in.elb.states["10.0.0.8", gateway.address[1]] = "draining"
            stand_in.elb.states[ADDRESS, gateway.address[1] + 1] = "draining"
            await asked_again(stand_in)
            assert (await fetch(gateway, "/health"))[0] == 200
            register(stand_in, gateway, "draining")
            assert (await peer.receive())["type"] == "reconnect"
            assert gateway.health() == {"status": "draining"}
            gateway.drain.signal()  # ECS sends SIGTERM at the end of the deregistration delay
            assert not gateway.drain.hurry.is_set()

    async def test_draining_from_the_start(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """The target that a crashed task with this address has left may drain; this one serves."""
        stand_in.fault = always("DescribeTargetHealth", SERVER_ERROR)
        async with balanced_gateway(platform) as gateway, peer_of(gateway) as peer:
            register(stand_in, gateway, "draining")
            stand_in.fault = None
            await asked_again(stand_in)
            assert not gateway.drain.wanted.is_set()
            register(stand_in, gateway, "healthy")
            await asked_again(stand_in)
            register(stand_in, gateway, "draining")
            assert (await peer.receive())["type"] == "reconnect"

    @pytest.mark.parametrize(
        "fault",
        [
            SERVER_ERROR,
            DENIED,
            Fault(cut=True),
            Fault(garbage=b"<html>"),
            Fault(garbage=b"<a/>"),
            Fault(garbage=b"{}"),
        ],
        ids=["500", "denied", "cut", "html", "xml", "json"],
    )
    async def test_failing_call(
        self,
        platform: aws_standin.Platform,
        stand_in: StandIn,
        caplog: pytest.LogCaptureFixture,
        fault: Fault,
    ) -> None:
        """A call that fails changes nothing; it is logged and counted, and health does not care."""
        stand_in.fault = always("DescribeTargetHealth", fault)
        with caplog.at_level("INFO", "gateway"):
            async with balanced_gateway(platform) as gateway, peer_of(gateway) as peer:
                await asked_again(stand_in)
                assert gateway.metrics.target_health_errors >= 3
                register(stand_in, gateway, "healthy")
                stand_in.fault = None
                await asked_again(stand_in)
                stand_in.fault = always("DescribeTargetHealth", fault)
                await asked_again(stand_in)
                assert gateway.health() == {"status": "ok"}
                register(stand_in, gateway, "draining")
                stand_in.fault = None
                assert (await peer.receive())["type"] == "reconnect"
        blind = "until the load balancer answers, a drain begins at SIGTERM only"
        assert caplog.messages.count(blind) == 1
        failed = [m for m in caplog.messages if "DescribeTargetHealth failed with" in m]
        assert len(failed) == 1
        assert caplog.messages.count("load balancer: DescribeTargetHealth works again") == 1

    async def test_without_a_target_group(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A task that stands behind no load balancer asks none."""
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, drain_seconds=0.0), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run(ADDRESS))
            await eventually(gateway.ready.is_set)
            gateway.drain.signal()
            gateway.drain.signal()
            await running
        assert not stand_in.calls["elb", "DescribeTargetHealth"]


class TestDrain:
    async def test_newcomers(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A drain does not wait for those who come after it has begun, one after the other."""
        monkeypatch.setattr(Connection, "HANDSHAKE_TIMEOUT_S", 1.0)
        monkeypatch.setattr(Connection, "CLOSE_TIMEOUT_S", 10 * DEADLINE_S)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, drain_seconds=0.0), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(gateway.ready.is_set)
            gateway.drain.signal()
            async with asyncio.timeout(DEADLINE_S), contextlib.AsyncExitStack() as newcomers:
                while not running.done():
                    with contextlib.suppress(ConnectionError):  # it listens no more
                        await newcomers.enter_async_context(dialled(gateway))
                    await asyncio.sleep(0.2)

    @pytest.mark.usefixtures("impatient")
    async def test_peer_closes_behind_forwards(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Who has said that it closes, behind more forwards than are taken, is answered."""
        hold_back(stand_in)
        async with aws_clients(platform) as aws, task_group() as tasks:
            options = settings(platform, drain_seconds=0.0, forward_timeout_seconds=1.0)
            gateway = Gateway(options, tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(gateway.ready.is_set)
            async with peer_of(gateway) as peer:
                forward = masked(b'{"action":"forward","type":"dev"}')
                close = masked(b"", Opcode.CLOSE)
                peer.write(forward * (Connection.FORWARDS_IN_FLIGHT + 1) + close)
                [connection] = gateway.registry.connections.values()
                await eventually(lambda: connection.in_flight == Connection.FORWARDS_IN_FLIGHT)
                gateway.drain.signal()
                assert await peer.close_code() is not None
                peer.end()
                await asyncio.wait({running}, timeout=DEADLINE_S)
                assert running.done()


class TestOwnAddress:
    async def test_metadata(self) -> None:
        """ECS tells a task its id and the address by which the load balancer knows it."""
        answer = (
            b'{"TaskARN":"arn:aws:ecs:us-east-1:123456789012:task/cluster/0123abc","Containers":'
            b'[{"Networks":[{"NetworkMode":"awsvpc","IPv4Addresses":["10.0.2.106"]}]}]}'
        )
        async with task_metadata(answer) as (address, _):
            found = await asyncio.to_thread(server.own_id_and_address, address)
        assert found == ("0123abc", "10.0.2.106")
