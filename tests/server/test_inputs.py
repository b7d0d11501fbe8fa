"""The table of `docs/PROTOCOL.md` that says what is passed through, made regular or refused."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.exceptions import ConnectionClosed

import aws_standin
from aws_standin import StandIn
from server import Gateway
from tests.inputs import CLOSED, DEAD_LETTER, INPUTS, Case, Input
from tests.server.aws import bodies, push
from tests.server.gateways import client_of, running_gateway
from tests.server.peers import peer_of, upgrade
from tests.waiting import DEADLINE_S, eventually

FROM_CLIENTS = [each for each in INPUTS if each.client is not None]
FROM_AGENTS = [each for each in INPUTS if each.agent is not None]


def case_of(side: Case | None) -> Case:
    assert side is not None
    return side


class TestFromClients:
    @pytest.mark.parametrize("line", FROM_CLIENTS, ids=lambda line: line.what)
    async def test_line(self, gateway: Gateway, stand_in: StandIn, line: Input) -> None:
        """What the table says of clients happens, and the next message is answered as ever."""
        case = case_of(line.client)
        for sent in case.sent:
            if isinstance(sent, str) and sent.startswith("?"):
                async with peer_of(gateway, upgrade(f"/ws{sent}")) as peer:
                    assert (await peer.receive())["code"] == case.refused
            elif case.refused == CLOSED:
                await self.is_closed(gateway, sent)
            else:
                await self.is_answered(gateway, stand_in, case, sent)

    async def is_answered(
        self, gateway: Gateway, stand_in: StandIn, case: Case, sent: str | bytes
    ) -> None:
        queue = stand_in.queues["agenticai-dev-queue"]
        before = len(queue.bodies)
        async with client_of(gateway) as client:
            await client.socket.send(sent)
            answer = await client.receive()
            if case.refused:
                assert (answer["type"], answer.get("code")) == ("error", case.refused)
                assert len(queue.bodies) == before
            else:
                assert answer["type"] == "forward_confirmed", answer
                [body] = queue.bodies[before:]
                assert case.arrives in body
            assert await client.has_nothing_more()

    async def is_closed(self, gateway: Gateway, sent: str | bytes) -> None:
        assert isinstance(sent, bytes)
        async with client_of(gateway) as client:
            await client.socket.send(sent, text=True)
            with pytest.raises(ConnectionClosed):
                await client.receive()
            assert client.socket.close_code == 1007


class TestFromAgents:
    @pytest.mark.parametrize("line", FROM_AGENTS, ids=lambda line: line.what)
    async def test_line(
        self, platform: aws_standin.Platform, stand_in: StandIn, line: Input
    ) -> None:
        """What the table says of agents happens, and the next update is delivered as ever."""
        case = case_of(line.agent)
        sent = [each for each in case.sent if isinstance(each, str)]
        assert len(sent) == len(case.sent) > 0
        async with (
            running_gateway(platform, topic=True, sqs_queue_url_updates=None) as gateway,
            running_gateway(platform, "task-2", topic=True),
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for each in sent:
                push(stand_in, each)
                if not case.refused:
                    assert case.arrives in await self.next_text(client.socket)
            if case.refused:
                assert case.refused == DEAD_LETTER
                dead = "agenticai-updates-dlq"
                await eventually(lambda: len(bodies(stand_in, dead)) == len(sent))
                assert sorted(bodies(stand_in, dead)) == sorted(sent)
            push(stand_in, {"type": "last", "project_id": "p"})
            assert json.loads(await self.next_text(client.socket))["type"] == "last"

    async def next_text(self, socket: object) -> str:
        async with asyncio.timeout(DEADLINE_S):
            return str(await socket.recv())  # type: ignore[attr-defined]


def test_both_sides_are_there() -> None:
    """Every line is about somebody, and says why it is not about the other."""
    assert len(INPUTS) > 20
    for each in INPUTS:
        assert each.client or each.agent
        assert bool(each.why_not) == (each.client is None or each.agent is None)
        for case in (each.client, each.agent):
            assert case is None or bool(case.arrives) != bool(case.refused)
