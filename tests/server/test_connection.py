"""Sockets that do what RFC 6455 does not foresee; see `test_server.py` for what it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import zlib
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import CloseCode, Opcode

import aws_standin
import server
from aws_standin import StandIn
from server import EVERYONE, Gateway, deflate
from tests.server.aws import hold_back, sent_ids
from tests.server.gateways import (
    errors_logged,
    narrow,
    over_one_gateway,
    running_gateway,
    standing_loop,
    unsettled,
)
from tests.server.listeners import event
from tests.server.peers import DEFLATED, Peer, dialled, fetch, masked, peer_of, upgrade
from tests.waiting import eventually


class TestConnection:
    @standing_loop
    @over_one_gateway
    @given(
        data=st.binary(min_size=1, max_size=300),
        opcode=st.integers(0, 15) | st.none(),
        fin=st.booleans(),
    )
    async def test_any_bytes(
        self, standing: Gateway, data: bytes, opcode: int | None, fin: bool
    ) -> None:
        """No bytes after the handshake disturb any other connection."""
        async with peer_of(standing) as other:
            async with peer_of(standing) as peer:
                peer.write(masked(data, opcode, fin=fin) if opcode is not None else data)
                peer.end()
                await peer.rest()
            assert await other.is_answered()

    @standing_loop
    async def test_pieces_of_bytes(self, standing: Gateway) -> None:
        """A frame may come a byte at a time."""
        async with peer_of(standing) as peer:
            whole = masked(b'{"action":"ping"}', Opcode.TEXT)
            for byte in whole:
                peer.write(bytes((byte,)))
                await asyncio.sleep(0)
            assert (await peer.receive())["type"] == "pong"

    @pytest.mark.parametrize("fragments", [1, 2, 5])
    async def test_largest_message(self, platform: aws_standin.Platform, fragments: int) -> None:
        """A message of exactly `MAX_MESSAGE_BYTES` is taken, in however many fragments."""
        message = json.dumps({"action": "ping"}).encode().ljust(2_000)
        size = len(message) // fragments
        async with (
            running_gateway(platform, max_message_bytes=2_000) as gateway,
            peer_of(gateway) as peer,
        ):
            for start in range(0, 2_000, size):
                peer.send_frame(
                    message[start : start + size],
                    Opcode.CONT if start else Opcode.TEXT,
                    fin=start + size == 2_000,
                )
            assert (await peer.receive())["type"] == "pong"

    @standing_loop
    async def test_endless_empty_fragments(self, standing: Gateway) -> None:
        """Empty fragments may go on for ever: they cost nothing and hold nobody up."""
        async with peer_of(standing) as peer, peer_of(standing) as other:
            peer.send_frame(b'{"action":', fin=False)
            empty = masked(b"", Opcode.CONT, fin=False)
            for _ in range(100):
                peer.write(empty * 200)
                assert await other.is_answered()
            peer.send_frame(b'"ping"}', Opcode.CONT)
            assert (await peer.receive())["type"] == "pong"

    @standing_loop
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
    async def test_handshake_in_pieces(self, standing: Gateway, size: int) -> None:
        """The request may come in pieces of any size."""
        opening = upgrade()
        async with dialled(standing) as peer:
            for start in range(0, len(opening), size):
                peer.write(opening[start : start + size])
                await asyncio.sleep(0.001)  # so that most pieces are received one by one
            assert (await peer.response())[0] == 101
            assert (await peer.receive())["type"] == "connected"

    @standing_loop
    @pytest.mark.parametrize(
        "early",
        [masked(b'{"action":"ping"}'), b"\x81", b"GET /live HTTP/1.1\r\n"],
        ids=["a frame", "half a frame", "half a request"],
    )
    async def test_data_before_the_handshake_ends(self, standing: Gateway, early: bytes) -> None:
        """What is sent along with the opening request is refused, not mistaken for messages."""
        received = standing.metrics.messages_received
        async with dialled(standing) as peer:
            peer.write(upgrade() + early)
            assert (await peer.response())[0] == 400
            assert await peer.rest() == []
        assert standing.metrics.messages_received == received

    async def test_header_flood(self, gateway: Gateway) -> None:
        """Headers without an end are cut off long before they fill the memory."""
        async with dialled(gateway) as peer:
            sent = 0
            with contextlib.suppress(ConnectionError):
                peer.write(b"GET /ws HTTP/1.1\r\n")
                while unsettled(gateway) or not sent:
                    peer.write(b"X: %s\r\n" % (b"x" * 8_000))
                    sent += 8_000
                    await asyncio.sleep(0)
                    if sent > 1_000_000:
                        peer.end()
                        assert (await peer.response())[0] == 431
                        break
        await eventually(lambda: not unsettled(gateway))

    async def test_vanishes_in_the_handshake(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A peer that leaves in the middle of its request leaves no trace."""
        for leave in (Peer.reset, Peer.end):
            async with dialled(gateway) as peer:
                peer.write(b"GET /ws HTTP/1.1\r\n")
                await eventually(lambda: unsettled(gateway))
                leave(peer)
                await eventually(lambda: not unsettled(gateway))
        assert "connection closed" not in caplog.messages

    @standing_loop
    async def test_close_within_a_message(self, standing: Gateway) -> None:
        """A close between fragments ends the connection all the same."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"{", fin=False)
            peer.send_frame(b"\x03\xe8", Opcode.CLOSE)
            assert await peer.close_code() in (CloseCode.NORMAL_CLOSURE, CloseCode.PROTOCOL_ERROR)

    async def test_closed_in_the_handshake(self, gateway: Gateway) -> None:
        """To close a connection before it is open cuts it."""
        async with dialled(gateway) as peer:
            await eventually(lambda: unsettled(gateway))
            [connection] = unsettled(gateway)
            connection.close(CloseCode.GOING_AWAY)
            assert await peer.rest() == []

    @pytest.mark.parametrize("leave", [Peer.end, Peer.reset], ids=["EOF", "RST"])
    async def test_client_vanishes(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture, leave: Any
    ) -> None:
        """A client that is gone without a word is forgotten, with code 1006 and no traceback."""
        caplog.set_level(logging.INFO, "gateway")
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            await peer.ask(action="subscribe", project_id="p")
            leave(peer)
            await eventually(lambda: len(gateway.registry.connections) == 1)
            assert "p" not in gateway.registry.channels
            await eventually(lambda: not unsettled(gateway))
            assert await other.is_answered()
        closed = next(each for each in caplog.records if each.message == "connection closed")
        assert closed.__dict__["code"] == CloseCode.ABNORMAL_CLOSURE
        assert not errors_logged(caplog)

    async def test_mistake_of_ours(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception while a message is handled costs its connection only, with 1011."""
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            with monkeypatch.context() as patch:
                patch.setattr(gateway.messages, "handle", lambda *_: 1 / 0)
                peer.send(action="ping")
                assert await peer.close_code() == CloseCode.INTERNAL_ERROR
            assert await other.is_answered()
        assert errors_logged(caplog) == ["connection failed"]

    @pytest.mark.usefixtures("impatient")
    async def test_mistake_after_a_pause(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The same for a message that had to wait for the forwards before it."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(server.Connection.FORWARDS_IN_FLIGHT + 1):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            in_flight = server.Connection.FORWARDS_IN_FLIGHT
            await eventually(lambda: gateway.metrics.messages_received == in_flight)
            with monkeypatch.context() as patch:
                patch.setattr(gateway.messages, "handle", lambda *_: 1 / 0)
                go_on.set()
                assert await peer.close_code() == CloseCode.INTERNAL_ERROR
        assert errors_logged(caplog) == ["connection failed"]

    async def test_mistake_in_the_handshake(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception while a request is answered cuts its connection only."""
        with monkeypatch.context() as patch:
            patch.setattr(gateway.door, "answer", lambda *_: 1 / 0)
            async with dialled(gateway) as peer:
                peer.write(upgrade())
                assert await peer.rest() == []
        assert (await fetch(gateway))[0] == 200
        assert errors_logged(caplog) == ["connection failed"]

    @standing_loop
    @pytest.mark.parametrize("offer", ["x-unknown", "permessage-deflate; server_max_window_bits=8"])
    async def test_nothing_negotiated(self, standing: Gateway, offer: str) -> None:
        """An offer that cannot be taken leaves a connection that works without."""
        opening = upgrade(Sec_WebSocket_Extensions=offer)
        async with peer_of(standing, opening) as peer:
            assert await peer.is_answered()

    async def test_little_is_held(self, gateway: Gateway, stand_in: StandIn) -> None:
        """Of what could inflate, a connection holds little, however much it may not act on yet."""
        forward = masked(b'{"action":"forward","type":"dev"}')
        bomb = masked(deflate(b" " * 262_000), rsv=DEFLATED)
        assert len(bomb) < 400
        go_on = hold_back(stand_in)
        async with peer_of(gateway, deflates=True) as peer:
            peer.write(forward * server.Connection.FORWARDS_IN_FLIGHT + bomb * 10)
            [connection] = gateway.registry.connections.values()
            await eventually(lambda: not connection.transport.is_reading())
            assert connection.in_flight == server.Connection.FORWARDS_IN_FLIGHT
            assert connection.inbox.held_bytes <= 2 * 262_144
            go_on.set()
            answers = [
                await peer.receive() for _ in range(server.Connection.FORWARDS_IN_FLIGHT + 10)
            ]
        kinds = Counter(each.get("code", each["type"]) for each in answers)
        assert kinds == {
            "forward_confirmed": server.Connection.FORWARDS_IN_FLIGHT,
            "invalid_json": 10,
        }

    @pytest.mark.parametrize("cut", [False, True], ids=["fragment", "cut frame"])
    async def test_unfinished_for_too_long(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, cut: bool
    ) -> None:
        """A message that is begun has to end some time, whatever else is sent meanwhile."""
        monkeypatch.setattr(server.Sweep, "MESSAGE_TIMEOUT_S", 0.1)
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            if cut:
                peer.write(masked(b"x" * 1_000)[:500])
            else:
                peer.send_frame(b"{", fin=False)
                peer.send_frame(b"", Opcode.PONG)
            assert await peer.close_code() == CloseCode.POLICY_VIOLATION
            assert await other.is_answered()

    @standing_loop
    async def test_not_deflated(self, standing: Gateway) -> None:
        """What claims to be deflated and is not closes with 1002."""
        async with peer_of(standing, deflates=True) as peer:
            peer.send_frame(b"\xff\xff\xff\xff", rsv=DEFLATED)
            assert await peer.close_code() == CloseCode.PROTOCOL_ERROR

    async def test_forward_deflated(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A client may deflate what it sends, with a small window too."""
        message = b'{"action":"forward","type":"dev","message_id":"m1","data":"%s"}' % (
            b"x" * 9_000
        )
        deflater = zlib.compressobj(wbits=-9)
        data = deflater.compress(message) + deflater.flush(zlib.Z_SYNC_FLUSH)
        async with peer_of(gateway, deflates=True) as peer:
            peer.send_frame(data[:-4], rsv=DEFLATED)
            assert (await peer.receive())["type"] == "forward_confirmed"
        assert sent_ids(stand_in) == ["m1"]

    async def test_slow_reader_never_reads(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slow reader that does not even read its close frame is cut off."""
        monkeypatch.setattr(server.Connection, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            running_gateway(platform, max_backlog_bytes=65_536) as gateway,
            peer_of(gateway),
        ):
            narrow(gateway)
            while gateway.registry.connections:
                gateway.feed.accept(event(None, EVERYONE, size=50_000), None)
                await asyncio.sleep(0)
            await eventually(lambda: not unsettled(gateway))

    @pytest.mark.parametrize(
        "question",
        [
            masked(b'{"action":"unsubscribe","project_id":"%s"}' % (b"x" * 256)),
            masked(b"x" * 125, Opcode.PING),
        ],
        ids=["messages", "ping frames"],
    )
    async def test_asks_and_never_listens(
        self, platform: aws_standin.Platform, question: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Answers that are not read count as any backlog."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            running_gateway(platform, max_backlog_bytes=65_536) as gateway,
            peer_of(gateway) as peer,
        ):
            narrow(gateway)
            while gateway.registry.connections:
                peer.write(question * 100)
                await asyncio.sleep(0)
            assert gateway.metrics.slow_consumers_closed == 1
            assert await peer.close_code() == CloseCode.TRY_AGAIN_LATER

    @pytest.mark.usefixtures("impatient")
    async def test_violation_after_a_pause(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A violation behind many forwards closes the connection once it is reached."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(server.Connection.FORWARDS_IN_FLIGHT):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            peer.send_frame(b"\xff")
            in_flight = server.Connection.FORWARDS_IN_FLIGHT
            await eventually(lambda: gateway.metrics.messages_received == in_flight)
            go_on.set()
            assert await peer.close_code() == CloseCode.INVALID_DATA
            peer.end()
            await eventually(lambda: not unsettled(gateway))
        await eventually(lambda: len(set(sent_ids(stand_in))) == in_flight)

    @pytest.mark.usefixtures("impatient")
    async def test_forward_of_one_who_left(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A forward whose client has left reaches its agent, and its answer nobody."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(20):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            await eventually(lambda: gateway.metrics.messages_received == 20)
            peer.reset()
            go_on.set()
            await eventually(lambda: gateway.metrics.messages_forwarded == 20)
        assert len(set(sent_ids(stand_in))) == 20
        await eventually(lambda: not gateway.registry.sockets)
        assert not errors_logged(caplog)
