"""The gateway in rare states: starting, draining, reading keys, and with thousands of peers."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from websockets.frames import CloseCode, Opcode

import aws_standin
import server
from aws_standin import StandIn
from server import EVERYONE, Connection, Gateway
from tests.issuer import Issuer, key_set, public_jwk, running_issuer, token_of
from tests.server.aws import THROTTLED, agents_say, always, aws_clients, hold_back, sent_ids
from tests.server.gateways import (
    client_of,
    errors_logged,
    fill_log,
    narrow,
    running_gateway,
    settings,
    standing_loop,
    task_group,
    unsettled,
)
from tests.server.listeners import Sink, event
from tests.server.messages import TOO_LONG
from tests.server.peers import Peer, dialled, fetch, masked, peer_of, request, seqs_until, upgrade
from tests.waiting import DEADLINE_S, eventually

BAD_MESSAGES: dict[str, tuple[str, str]] = {
    "nothing": ("", "invalid_json"),
    "no JSON": ("{", "invalid_json"),
    "two values": ('{"action":"ping"} {}', "invalid_json"),
    "a lone quote": ('{"action":"', "invalid_json"),
    "NaN": ('{"action":NaN}', "invalid_json"),
    "deep": ('{"action":"ping","data":' + "[" * 100_000, "invalid_message"),
    "an array": ("[]", "invalid_message"),
    "a string": ('"ping"', "invalid_message"),
    "null": ("null", "invalid_message"),
    "no action": ('{"project_id":"p"}', "invalid_message"),
    "unknown action": ('{"action":"fly"}', "unknown_action"),
    "action of another case": ('{"action":"Ping"}', "unknown_action"),
    "action that is no string": ('{"action":1}', "unknown_action"),
    "no project": ('{"action":"subscribe"}', "invalid_field"),
    "empty project": ('{"action":"subscribe","project_id":""}', "invalid_field"),
    "long project": (f'{{"action":"subscribe","project_id":"{TOO_LONG}"}}', "invalid_field"),
    "project that is a number": ('{"action":"subscribe","project_id":1}', "invalid_field"),
    "nothing to unsubscribe": ('{"action":"unsubscribe"}', "invalid_field"),
    "since that is a string": (
        '{"action":"subscribe","project_id":"p","since":"1"}',
        "invalid_field",
    ),
    "negative since": ('{"action":"subscribe","project_id":"p","since":-1}', "invalid_field"),
    "huge since": (
        '{"action":"subscribe","project_id":"p","since":9007199254740992}',
        "invalid_field",
    ),
    "snapshot that is no boolean": (
        '{"action":"subscribe","project_id":"p","snapshot":"yes"}',
        "invalid_field",
    ),
    "no type": ('{"action":"forward","data":{}}', "invalid_field"),
    "unknown type": ('{"action":"forward","type":"marketing"}', "unknown_type"),
    "empty type": ('{"action":"forward","type":""}', "unknown_type"),
    "type that is a number": ('{"action":"forward","type":1}', "invalid_field"),
    "empty message_id": ('{"action":"forward","type":"dev","message_id":""}', "invalid_field"),
    "long message_id": (
        f'{{"action":"forward","type":"dev","message_id":"{TOO_LONG}"}}',
        "invalid_field",
    ),
    "character that SQS refuses": (
        b'{"action":"forward","type":"dev","data":"\\uffff"}'.decode("unicode_escape"),
        "invalid_character",
    ),
}


class ClockOf:
    """The module ``time`` with another monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@contextlib.asynccontextmanager
async def late_keys(
    platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Gateway, Issuer]]:
    """A gateway and its issuer, who has a new key, and does not answer before it is released."""
    monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
    async with (
        running_issuer() as issuer,
        running_gateway(platform, **issuer.settings) as gateway,
    ):
        issuer.answer = key_set(public_jwk("key-1"), public_jwk("key-2"))
        issuer.released.clear()
        yield gateway, issuer


def late_key() -> bytes:
    """The handshake of a client whose token is signed with the new key."""
    return upgrade(Authorization=f"Bearer {token_of(key_id='key-2')}")


async def wait_for_late_keys(peer: Peer, issuer: Issuer) -> None:
    """Have a client come for whom the issuer's keys are being read when this returns."""
    peer.write(late_key())
    await eventually(lambda: issuer.reads == 2)


class TestGateway:
    @standing_loop
    @pytest.mark.parametrize(("text", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
    async def test_bad_message(self, standing: Gateway, text: str, code: str) -> None:
        """Server answers a bad message with a code and a sentence; the connection stays."""
        errors = standing.metrics.protocol_errors
        async with peer_of(standing) as peer:
            peer.send_frame(text.encode())
            error = await peer.receive()
            assert error["type"] == "error"
            assert error["code"] == code
            assert error["message"].endswith(".")
            assert error["message"][0].isupper()
            assert await peer.is_answered()
        assert standing.metrics.protocol_errors == errors + 1

    @standing_loop
    async def test_error_names_its_message(self, standing: Gateway) -> None:
        """An error says which message it answers, as far as that one can be told."""
        async with client_of(standing) as client:
            error = await client.ask(action="forward", type="none", message_id="m1", project_id="p")
            assert (error["action"], error["message_id"], error["project_id"]) == (
                "forward",
                "m1",
                "p",
            )
            error = await client.ask(action="subscribe", project_id="p", since=-1)
            assert (error["action"], error["project_id"]) == ("subscribe", "p")
            error = await client.ask(action=TOO_LONG)
            assert "action" not in error
            assert TOO_LONG not in error["message"]

    async def test_forward_too_large_for_sqs(self, platform: aws_standin.Platform) -> None:
        """What SQS would refuse is an error that names the limit."""
        limit = server.SQS_BATCH_BYTES
        async with (
            running_gateway(platform, max_message_bytes=limit) as gateway,
            client_of(gateway) as client,
        ):
            error = await client.ask(action="forward", type="dev", data="x" * (limit - 100))
            assert error["code"] == "too_large"
            assert str(limit) in error["message"]
            assert await client.has_nothing_more()

    @pytest.mark.usefixtures("impatient")
    async def test_overloaded(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Beyond the bound of what may wait, the answer is an error at once."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING", 2)
        go_on = hold_back(stand_in)
        async with client_of(gateway) as client:
            for number in range(3):
                await client.send(action="forward", type="dev", message_id=f"m{number}")
            error = await client.receive()
            assert (error["code"], error["message_id"]) == ("overloaded", "m2")
            assert error["retryable"] is True
            go_on.set()
            confirmed = await client.receive_many(2)
            assert {each["message_id"] for each in confirmed} == {"m0", "m1"}

    async def test_others_have_their_turn(self, gateway: Gateway) -> None:
        """Much that comes at once is taken in turns with what others send."""
        async with peer_of(gateway) as greedy, peer_of(gateway) as modest:
            greedy.write(masked(b'{"action":"ping"}') * 5_000)
            await greedy.receive()
            assert await modest.is_answered()
            assert gateway.metrics.messages_received < 5_000
            for _ in range(4_999):
                assert (await greedy.receive())["type"] == "pong"

    @pytest.mark.usefixtures("impatient")
    async def test_drained_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A task that is told to end before it was ready ends."""
        stand_in.fault = always("UpdateItem", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, topic=True), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(lambda: gateway.address[1])
            gateway.drain.wanted.set()
            async with asyncio.timeout(DEADLINE_S):
                await running

    @standing_loop
    async def test_live(self, standing: Gateway) -> None:
        """The container's own check is answered while the loop turns."""
        assert (await fetch(standing, "/live"))[0] == 200

    @standing_loop
    async def test_stats_not_through_a_proxy(self, standing: Gateway) -> None:
        """A request that was passed on gets no figures, whatever it claims."""
        for claimed in ("203.0.113.7", "127.0.0.1", ""):
            assert (await fetch(standing, "/stats", X_Forwarded_For=claimed))[0] == 404

    async def test_stats_not_from_elsewhere(self, gateway: Gateway) -> None:
        """A request from another machine gets no figures."""

        class Elsewhere(Sink):
            def get_extra_info(self, name: str, default: Any = None) -> Any:
                return ("203.0.113.7", 50_000) if name == "peername" else default

            def is_closing(self) -> bool:
                return False

            def can_write_eof(self) -> bool:
                return False

        connection, elsewhere = Connection(gateway), Elsewhere()
        connection.connection_made(elsewhere)
        connection.data_received(request("/stats"))
        assert elsewhere.writes[0].startswith(b"HTTP/1.1 404 ")
        connection.connection_lost(None)

    async def test_without_updates(self, platform: aws_standin.Platform) -> None:
        """Without an updates queue a task forwards and serves what is in the log."""
        async with running_gateway(platform, sqs_queue_url_updates=None) as gateway:
            await fill_log(gateway, 1)
            async with client_of(gateway, project_id="p", since=0) as client:
                assert [each.get("seq") for each in await client.receive_many(2)] == [1, 1]
                answer = await client.ask(action="forward", type="dev")
                assert answer["type"] == "forward_confirmed"

    async def test_wrong_tokens(self, platform: aws_standin.Platform) -> None:
        """An address that keeps trying tokens owes for it."""
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
        ):
            account = gateway.door.work_by_address.of("127.0.0.1")
            while account.paid_at <= gateway.now():
                async with dialled(gateway) as peer:
                    peer.write(upgrade(Authorization="Bearer x.y.z"))
                    assert (await peer.response())[0] == 401

    async def test_new_key(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token signed with a new key is good once the keys were read again."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, auth_first_message=True, **issuer.settings) as gateway,
        ):
            issuer.answer = key_set(public_jwk("key-2"))
            token = token_of(key_id="key-2")
            async with peer_of(gateway, upgrade(Authorization=f"Bearer {token}")):
                assert issuer.reads == 2
            issuer.answer = key_set(public_jwk("key-3"))
            async with peer_of(gateway) as peer:
                answer = await peer.ask(action="authenticate", token=token_of(key_id="key-3"))
                assert answer["type"] == "authenticated"

    @pytest.mark.parametrize("leaves", [False, True], ids=["talks", "leaves"])
    async def test_does_not_wait_for_its_answer(
        self,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        leaves: bool,
    ) -> None:
        """A peer that goes on, or away, while the keys are read for it is forgotten."""
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)
        async with late_keys(platform, monkeypatch) as (gateway, issuer), dialled(gateway) as peer:
            await wait_for_late_keys(peer, issuer)
            if leaves:
                peer.reset()
            else:
                peer.write(masked(b"{}"))
                assert await peer.rest() == []
            await eventually(lambda: not unsettled(gateway))
            await eventually(lambda: "the issuer's keys could not be read" in caplog.text)
            assert (await fetch(gateway))[0] == 200
        assert not errors_logged(caplog)

    async def test_waits_for_keys_in_debt(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who waits for the keys is answered, though its turn comes again in the meantime."""
        # Any handshake is in debt then, for as long as this.
        monkeypatch.setattr(server.Door, "ADDRESS_WORK_SHARE", 1e-4)
        monkeypatch.setattr(server.Account, "WINDOW_S", 0.2)
        async with late_keys(platform, monkeypatch) as (gateway, issuer), dialled(gateway) as peer:
            await wait_for_late_keys(peer, issuer)
            [connection] = gateway.registry.sockets
            debt = connection.account.paid_at
            await eventually(lambda: connection.account.paid_at != debt)  # its turn came
            issuer.released.set()
            assert (await peer.response())[0] == 101

    async def test_gone_before_its_token_is_checked(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who has gone while the issuer's keys were read is no user of an account any more."""
        async with late_keys(platform, monkeypatch) as (gateway, issuer):
            async with dialled(gateway) as peer:
                await wait_for_late_keys(peer, issuer)
                [connection] = gateway.registry.sockets
            await eventually(lambda: not gateway.registry.sockets)
            account = connection.account
            async with dialled(gateway) as next_in_line:
                next_in_line.write(late_key())
                await eventually(lambda: gateway.registry.sockets)
                issuer.released.set()
                assert (await next_in_line.response())[0] == 101
            await eventually(lambda: not gateway.registry.sockets)
            assert (account.users, connection.account) == (0, account)

    async def test_drained_before_its_token_is_checked(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody comes in for whom keys were still read when the drain began."""
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)
        async with late_keys(platform, monkeypatch) as (gateway, issuer), dialled(gateway) as peer:
            await wait_for_late_keys(peer, issuer)
            gateway.drain.wanted.set()
            assert (await peer.response())[0] == 503

    async def test_keys_not_there_at_first(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task is not ready before it has keys, and reads them again every so often."""
        monkeypatch.setattr(server, "full_jitter_s", lambda *_: 0.01)
        monkeypatch.setattr(server.Keys, "LIFETIME_S", 0.05)
        async with running_issuer() as issuer:
            issuer.answer = b"{}"
            options = settings(platform, **issuer.settings)
            async with aws_clients(platform) as aws, task_group() as tasks:
                gateway = Gateway(options, tasks, aws, "task-1")
                running = tasks.create_task(gateway.run())
                await eventually(lambda: issuer.reads > 2)
                assert gateway.health() == {"status": "starting"}
                issuer.answer = key_set(public_jwk("key-1"))
                await eventually(gateway.ready.is_set)
                reads = issuer.reads
                await eventually(lambda: issuer.reads > reads)
                gateway.drain.wanted.set()
                await running

    async def test_key_set_without_end(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key set larger than any is not read to its end; the keys from before stay."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
        ):
            issuer.answer = b" " * 2_000_000
            async with dialled(gateway) as peer:
                peer.write(upgrade(Authorization=f"Bearer {token_of(key_id='key-2')}"))
                assert (await peer.response())[0] == 401
            async with peer_of(gateway, upgrade(Authorization=f"Bearer {token_of()}")):
                pass

    async def test_authenticate_without_tokens(self, gateway: Gateway) -> None:
        """Where nobody needs a token, one is taken all the same."""
        async with client_of(gateway) as client:
            answer = await client.ask(action="authenticate", token="anything")
            assert answer["type"] == "authenticated"

    async def test_long_catch_up(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A catch-up of many pages and more than a backlog goes at the client's own pace."""
        count, size = 230, 20_000
        backlog = 65_536
        async with running_gateway(platform, max_backlog_bytes=backlog) as gateway:
            await fill_log(gateway, count, size)
            async with peer_of(gateway) as peer, client_of(gateway) as other:
                narrow(gateway)
                connections = list(gateway.registry.connections.values())
                peer.send(action="subscribe", project_id="p", since=0)
                assert (await peer.receive())["recovered"] is True
                assert (await peer.receive())["seq"] == 1
                await eventually(lambda: any(each.choked for each in connections))
                for _ in range(20):
                    assert await other.has_nothing_more()
                held = max(each.transport.get_write_buffer_size() for each in connections)
                assert held < server.CHOKED_AT_BYTES + 2 * server.Chunk.MAX_BYTES
                agents_say(stand_in, {"project_id": "p", "data": "live"})
                await eventually(
                    lambda: (
                        gateway.registry.channels["p"].wanted > count
                        or gateway.registry.channels["p"].cursor == count + 1
                    )
                )
                assert await seqs_until(peer, count + 1) == list(range(2, count + 2))
                assert await peer.is_answered()
            assert gateway.metrics.slow_consumers_closed == 0

    async def test_catches_up_slowly_and_listens(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who catches up with one project is no slow reader of it, but may be of another."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.05)
        backlog = 65_536
        async with running_gateway(platform, max_backlog_bytes=backlog) as gateway:
            await fill_log(gateway, 100, 20_000)
            async with peer_of(gateway) as peer:
                narrow(gateway)
                [connection] = gateway.registry.connections.values()
                peer.send(action="subscribe", project_id="p", since=0)
                await eventually(lambda: connection.choked)
                written = 0
                while gateway.registry.connections:
                    assert written < 100 * backlog
                    gateway.feed.accept(event(None, EVERYONE, size=50_000), None)
                    written += 50_000
                    await asyncio.sleep(0.005)
                assert gateway.metrics.slow_consumers_closed == 1

    @pytest.mark.parametrize("unread", [0, 40_000])
    async def test_much_at_once(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch, unread: int
    ) -> None:
        """Who was slow, but within the bound, has from one look to the next to read much."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 3_600)
        backlog = 65_536
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            narrow(gateway)
            peer.narrow()
            [connection] = gateway.registry.connections.values()
            began_at = gateway.now()
            while unread and connection.transport.get_write_buffer_size() < unread:
                gateway.feed.accept(event(None, EVERYONE, size=10_000), None)
                await asyncio.sleep(0.01)
            assert not connection.look(began_at + 1, backlog)
            assert not connection.look(began_at + 6, backlog)
            for _ in range(10):
                gateway.feed.accept(event(None, EVERYONE, size=50_000), None)
            await asyncio.sleep(0.01)
            assert not connection.look(began_at + 7.1, backlog)
            assert connection.look(began_at + 8.2, backlog)

    async def test_stalled_catch_up(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A client that stops reading in its catch-up is closed, and its catch-up ends."""
        monkeypatch.setattr(server.Connection, "STALLED_AFTER_S", 0.1)
        async with running_gateway(platform) as gateway:
            await fill_log(gateway, 100, 20_000)
            async with peer_of(gateway) as peer:
                narrow(gateway)
                peer.send(action="subscribe", project_id="p", since=0)
                await eventually(lambda: gateway.metrics.slow_consumers_closed)
                assert not gateway.registry.connections
            await eventually(lambda: "p" not in gateway.registry.channels)

    @pytest.mark.parametrize("leave", ["unsubscribe", "reset", "close"])
    async def test_leaves_in_the_catch_up(self, gateway: Gateway, leave: str) -> None:
        """A catch-up ends with its subscription."""
        await fill_log(gateway, 100, 20_000)
        async with peer_of(gateway) as peer:
            narrow(gateway)
            [connection] = gateway.registry.connections.values()
            peer.send(action="subscribe", project_id="p", since=0)
            await eventually(lambda: connection.choked)
            if leave == "unsubscribe":
                peer.send(action="unsubscribe", project_id="p")
            elif leave == "reset":
                peer.reset()
            else:
                connection.close(CloseCode.GOING_AWAY)
            await eventually(lambda: "p" not in gateway.registry.channels)
            assert not connection.catching_up

    async def test_many_resume_at_once(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A returning crowd costs few reads of the log, and each of it gets everything."""
        await fill_log(gateway, 20)
        stand_in.calls.clear()
        async with contextlib.AsyncExitStack() as stack:
            opening = upgrade("/ws?project_id=p&since=5")
            crowd = await asyncio.gather(
                *[stack.enter_async_context(peer_of(gateway, opening)) for _ in range(100)]
            )
            for peer in crowd:
                assert (await peer.receive())["recovered"] is True
                assert await seqs_until(peer, 20) == list(range(6, 21))
        heads = [stand_in.calls["dynamodb", name] for name in ("GetItem", "BatchGetItem")]
        assert sum(heads) == 1
        assert stand_in.calls["dynamodb", "Query"] == 1

    async def test_log_is_shorter_than_since(self, gateway: Gateway) -> None:
        """A client that is ahead of the log has another log's number."""
        async with client_of(gateway, project_id="p", since=7) as client:
            confirmed = await client.receive()
            assert (confirmed["recovered"], confirmed["seq"]) == (False, 0)
            assert await client.has_nothing_more()

    async def test_many_silent_peers(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sweep over many lets the loop turn in between."""
        monkeypatch.setattr(server.Sweep, "CONNECTIONS_A_TURN", 2)
        async with (
            running_gateway(platform, ping_interval_seconds=0.1) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(5)]
            for peer in peers:
                assert [frame.opcode for frame in await peer.rest()] == [Opcode.PING]

    async def test_many_half_open(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        """Thousands that never finish their handshake are not all cut in one turn of the loop."""
        monkeypatch.setattr(server.Sweep, "CONNECTIONS_A_TURN", 2)
        left: list[int] = []

        async def watch() -> None:
            while True:
                left.append(len(unsettled(gateway)))
                await asyncio.sleep(0)

        async with contextlib.AsyncExitStack() as stack:
            for _ in range(10):
                await stack.enter_async_context(dialled(gateway))
            await eventually(lambda: len(unsettled(gateway)) == 10)
            for connection in unsettled(gateway):
                connection.deadline = 0.0
            watching = asyncio.ensure_future(watch())
            await eventually(lambda: not unsettled(gateway))
            watching.cancel()
        assert max(before - after for before, after in itertools.pairwise(left)) <= 2

    @pytest.mark.usefixtures("impatient")
    async def test_paused_peer_is_not_silent(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Who cannot be heard, because of forwards that wait for SQS, is not dropped for it."""
        go_on = hold_back(stand_in)
        count = server.Connection.FORWARDS_IN_FLIGHT + 8
        async with (
            running_gateway(platform, ping_interval_seconds=0.2) as gateway,
            peer_of(gateway) as busy,
        ):
            for number in range(count):
                busy.send(action="forward", type="dev", message_id=f"m{number}")
            async with peer_of(gateway) as silent:
                await silent.rest()  # two intervals and more
            go_on.set()
            confirmed: set[str] = set()
            while len(confirmed) < count:
                frame = await busy.next_frame()
                assert frame is not None
                if frame.opcode is Opcode.PING:
                    busy.send_frame(bytes(frame.data), Opcode.PONG)
                else:
                    confirmed.add(json.loads(bytes(frame.data))["message_id"])

    async def test_metrics_line(
        self,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Every minute the figures are logged, in a line of their own."""
        minutes = itertools.count(0.0, 61.0)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.01)
        caplog.set_level(logging.INFO, "gateway.metrics")
        async with running_gateway(platform) as gateway, client_of(gateway):
            with monkeypatch.context() as patch:
                patch.setattr(server, "time", ClockOf(lambda: next(minutes)))
                lines = await eventually(
                    lambda: [x.__dict__ for x in caplog.records if x.name == "gateway.metrics"]
                )
        assert lines[0]["Service"] == "websocket-gateway"

    async def test_drain_in_a_hurry(self, platform: aws_standin.Platform) -> None:
        """A drain that is hurried does not wait for the spread, nor for who does not answer."""
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, drain_seconds=100), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(gateway.ready.is_set)
            async with peer_of(gateway) as one, peer_of(gateway) as two:
                gateway.drain.wanted.set()
                await eventually(lambda: len(gateway.registry.connections) == 1)
                gateway.drain.hurry.set()
                async with asyncio.timeout(DEADLINE_S):
                    await running
                for peer in (one, two):
                    assert (await peer.receive())["type"] == "reconnect"
                    assert await peer.close_code() == CloseCode.SERVICE_RESTART
                    assert await peer.rest() == []

    @pytest.mark.usefixtures("impatient")
    async def test_drain_flushes_forwards(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """What was taken before a drain reaches the queue, also of a client that left."""
        go_on = hold_back(stand_in)
        async with running_gateway(platform) as gateway:
            async with peer_of(gateway) as peer:
                for number in range(20):
                    peer.send(action="forward", type="dev", message_id=f"m{number}")
                await eventually(lambda: gateway.metrics.messages_received == 20)
            gateway.drain.wanted.set()
            await eventually(lambda: not gateway.registry.connections)
            go_on.set()
            await eventually(lambda: gateway.metrics.messages_forwarded == 20)
        assert set(sent_ids(stand_in)) == {f"m{number}" for number in range(20)}
