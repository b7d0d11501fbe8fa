"""Answers say which message they answer, where that had a `ref`."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import aws_standin
import server
from aws_standin import StandIn
from server import Connection, Gateway
from tests.server.aws import hold_back
from tests.server.gateways import client_of, running_gateway
from tests.waiting import eventually

MESSAGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"action": "ping"}, ["pong"]),
    ({"action": "subscribe", "project_id": "p"}, ["subscription_confirmed"]),
    ({"action": "subscribe", "project_id": "p", "since": 0}, ["subscription_confirmed"]),
    (
        {"action": "subscribe", "project_id": "q", "snapshot": True},
        ["subscription_confirmed", "project_snapshot"],
    ),
    ({"action": "unsubscribe", "project_id": "p"}, ["unsubscription_confirmed"]),
    ({"action": "forward", "type": "dev", "data": 1}, ["forward_confirmed"]),
    ({"action": "forward", "type": "nobody"}, ["error"]),
    ({"action": "subscribe", "project_id": "x" * 257}, ["error"]),
    ({"action": "dance"}, ["error"]),
    ({"action": "authenticate", "token": "t"}, ["authenticated"]),
]


class TestRef:
    async def test_every_answer(self, platform: aws_standin.Platform) -> None:
        """Every answer carries the `ref` of its message, whatever comes of that."""
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            for n, (message, answers) in enumerate(MESSAGES):
                await client.send(ref=f"r{n}", **message)
                for expected in answers:
                    answer = await client.receive()
                    assert (answer["type"], answer["ref"]) == (expected, f"r{n}")

    @pytest.mark.parametrize("ref", [None, 7, True, "", "x" * 64, "x" * 65, ["a"], {"ref": "a"}])
    async def test_what_is_no_ref(self, platform: aws_standin.Platform, ref: Any) -> None:
        """Anything but a text of at most 64 characters is ignored, like an unknown field."""
        expected = {"ref": ref} if isinstance(ref, str) and len(ref) <= 64 else {}
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            for action in ("ping", "dance"):
                answer = await client.ask(ref=ref, action=action)
                assert {name: answer[name] for name in ("ref",) if name in answer} == expected

    async def test_too_far_behind(self, platform: aws_standin.Platform) -> None:
        """In a message that is refused, it is looked for in the bounded part."""
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            padding = "x" * server.EXPLAINED_BYTES
            answer = await client.ask(action="dance", padding=padding, ref="late")
            assert answer["code"] == "unknown_action"
            assert "ref" not in answer
            assert (await client.ask(action="ping", padding=padding, ref="late"))["ref"] == "late"

    @pytest.mark.parametrize("ref", [b'""', b'"\\ud83d\\ude00"', b'"%b"' % (b"x" * 50_000), b"[1]"])
    def test_holds_no_more(self, ref: bytes) -> None:
        """A message that waits for its answer holds nothing of what else its text had."""
        text = b'{"action":"subscribe","project_id":"p","ref":%b,"x":"%b"}' % (ref, b"x" * 50_000)
        message = server.decode_message(text)
        assert sys.getrefcount(text) == 2
        assert memoryview(message.ref).nbytes < 1_000

    @pytest.mark.usefixtures("impatient")
    async def test_forward_holds_no_more(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A forward under way does not, either, beside what is to be sent of it."""
        texts: list[bytes] = []
        handle = gateway.messages.handle
        go_on = hold_back(stand_in)

        def noted(connection: Connection, payload: bytes) -> None:
            texts.append(payload)
            handle(connection, payload)

        gateway.messages.handle = noted  # type: ignore[method-assign]
        async with client_of(gateway) as client:
            await client.send(action="forward", type="dev", data="d", ref="r", x="x" * 50_000)
            await eventually(lambda: texts)
            references = sys.getrefcount(texts[0])
            assert references == 2
            go_on.set()
            assert (await client.receive())["ref"] == "r"

    async def test_not_asked_for(self, platform: aws_standin.Platform) -> None:
        """What a URL asks for is answered without."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            answer = await client.receive()
            assert answer["type"] == "subscription_confirmed"
            assert "ref" not in answer

    async def test_announced(self, platform: aws_standin.Platform) -> None:
        """The greeting says that answers carry it, and how large a message may be."""
        async with (
            running_gateway(platform, max_message_bytes=4_096) as gateway,
            client_of(gateway) as client,
        ):
            assert client.greeting["ref"] is True
            assert client.greeting["max_message_bytes"] == 4_096
