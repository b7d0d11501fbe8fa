"""What clients may cost: work by account, memory by ledger."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import math
import time
import weakref
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import CloseCode, Opcode
from websockets.http11 import Request

import aws_standin
import server
from aws_standin import StandIn
from server import Account, Accounts, Connection, Gateway, Turns, deflate
from tests.issuer import Issuer, private_key, token_of
from tests.server.aws import Json, hold_back
from tests.server.gateways import (
    client_of,
    fill_log,
    narrow,
    running_gateway,
    skip_ahead,
    unsettled,
)
from tests.server.guarded import guarded
from tests.server.listeners import event
from tests.server.peers import (
    DEFLATED,
    Peer,
    dialled,
    masked,
    peer_of,
    request,
    seqs_until,
    upgrade,
)
from tests.waiting import eventually


def take(account: Account, now: float) -> bool:
    """Charge for something unless there is a debt; whether there was none."""
    may = account.paid_at <= now
    if may:
        account.charge(1, now)
    return may


class TestAccount:
    def test_burst(self) -> None:
        """What is saved up may be used at once, and once more on credit; then the share."""
        account = Account(1)
        assert [take(account, 100.0) for _ in range(13)] == [True] * 11 + [False] * 2
        assert [take(account, 105.0) for _ in range(7)] == [True] * 5 + [False] * 2
        assert [take(account, 1e5) for _ in range(13)] == [True] * 11 + [False] * 2

    @given(share=st.integers(1, 1_000), steps=st.lists(st.floats(0, 10), min_size=1, max_size=200))
    def test_rate(self, share: int, steps: list[float]) -> None:
        """However takes are spread over time, one goes beyond the share and one window at most."""
        account, now, taken = Account(share), 0.0, 0
        for step in steps:
            now += step
            taken += take(account, now)
        assert taken <= share * (Account.WINDOW_S + now) + 1 + 1e-6

    @given(st.lists(st.floats(0, 1e6), max_size=50))
    def test_debt_is_capped(self, charges: list[float]) -> None:
        """However much is charged, it is paid within the window."""
        account = Account(0.05)
        for amount in charges:
            account.charge(amount, 100.0)
        assert account.paid_at <= 100.0 + Account.WINDOW_S

    async def test_afford(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Those who want more than is saved up get it one after the other, as it is paid."""
        monkeypatch.setattr(Account, "WINDOW_S", 0.2)
        now = asyncio.get_running_loop().time
        account = Account(1.0)
        started_at = now()
        await asyncio.gather(*(account.afford(0.1) for _ in range(6)))
        assert (
            now() - started_at >= 0.28
        )  # three were saved up, one may be owed, two were waited for

    def test_forgotten(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who has been quiet costs no memory; who has a connection open is not forgotten."""
        monkeypatch.setattr(server.Accounts, "FORGOTTEN_AT_ONCE", 10)
        accounts = Accounts(1)
        for number in range(95):
            accounts.of(str(number)).charge(11 if number % 2 else 1, 0.0)
        held = accounts.of("0")
        held.users = 1
        for _ in range(10):
            accounts.forget(Account.WINDOW_S + 0.5)
        assert accounts.of("0") is held
        left = [number for number in range(95) if accounts.of(str(number)).paid_at > 0]
        assert left == [number for number in range(95) if number % 2]

    def test_bookkeeping_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A million addresses are not remembered, and the last ones are."""
        monkeypatch.setattr(server.Accounts, "REMEMBERED", 3)
        accounts = Accounts(1)
        first = accounts.of("0")
        found = [accounts.of(str(number)) for number in range(1, 5)]
        assert accounts.of("4") is found[-1]
        assert accounts.of("0") is not first


class Toiler(Connection):
    """A connection whose input costs so much CPU time."""

    def __init__(
        self, account: Account, costs_s: list[float], diary: list[str], name: str = "a"
    ) -> None:
        self.account = account
        self.queued = None
        self.paused = False
        self._costs_s = costs_s
        self._diary = diary
        self._name = name

    @property
    def is_over(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.paused = True

    def take_turn(self, until_s: float) -> bool:  # noqa: ARG002
        self.paused = False
        if self._costs_s:
            burn(self._costs_s.pop(0))
            self._diary.append(self._name)
        return bool(self._costs_s)


def queries_of(stand_in: StandIn) -> int:
    return sum(count for (_, operation), count in stand_in.calls.items() if operation == "Query")


def burn(cpu_s: float) -> None:
    until_s = time.thread_time() + cpu_s
    while time.thread_time() < until_s:
        pass


class TestTurns:
    async def test_at_once(self) -> None:
        """Where nobody waits, input is acted on as it comes."""
        diary: list[str] = []
        toiler = Toiler(Account(0.05), [0.0], diary)
        Turns().give(toiler)
        assert diary == ["a"]
        assert not toiler.paused

    async def test_connections_take_turns(self) -> None:
        """Connections of one account have a turn each before one has its second."""
        diary: list[str] = []
        turns, account = Turns(), Account(math.inf)
        toilers = [Toiler(account, [0.006] * 3, diary) for _ in range(3)]
        order: list[int] = []
        for number, toiler in enumerate(toilers):
            take_turn = toiler.take_turn

            def noted(until_s: float, number: int = number, take: Any = take_turn) -> bool:
                order.append(number)
                return bool(take(until_s))

            toiler.take_turn = noted  # type: ignore[method-assign]
            turns.queue(toiler)
        await eventually(lambda: len(diary) == 9)
        assert order == [0, 1, 2] * 3

    async def test_least_used_first(self) -> None:
        """Who has used least comes first, however many connections somebody else has."""
        diary: list[str] = []
        turns = Turns()
        greedy, modest = Account(0.5), Account(0.5)
        greedy.charge(1.0, asyncio.get_running_loop().time())
        for _ in range(50):
            turns.queue(Toiler(greedy, [0.002] * 2, diary, "greedy"))
        turns.queue(Toiler(modest, [0.002] * 2, diary, "modest"))
        await eventually(lambda: len(diary) == 102)
        assert diary.index("modest") < 3
        assert diary[:4].count("modest") >= 1

    async def test_debt_is_paid_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who owes is not acted on, nor read from, until it is paid, and then without a call."""
        diary: list[str] = []
        monkeypatch.setattr(Account, "WINDOW_S", 0.2)
        turns, account = Turns(), Account(1.0)
        now = asyncio.get_running_loop().time
        account.charge(0.35, now())
        due = account.paid_at
        toiler = Toiler(account, [0.0], diary)
        turns.give(toiler)
        assert toiler.paused
        await eventually(lambda: diary)
        assert now() >= due - 0.002
        assert not toiler.paused

    async def test_debtors_hold_up_nobody(self) -> None:
        """While only those wait who are in debt, others' input is acted on as it comes."""
        diary: list[str] = []
        turns, debtor = Turns(), Account(0.5)
        debtor.charge(6.0, asyncio.get_running_loop().time())
        turns.give(Toiler(debtor, [0.0], diary, "debtor"))
        turns.give(Toiler(Account(0.5), [0.0], diary, "other"))
        assert diary == ["other"]

    async def test_half_of_the_loop(self) -> None:
        """While anything else is due, input takes at most half of the loop's time."""
        diary: list[str] = []
        turns, began_s = Turns(), time.thread_time()
        for _ in range(4):
            turns.queue(Toiler(Account(math.inf), [0.002] * 40, diary))
        for _ in range(60):
            burn(0.003)
            await asyncio.sleep(0)
            spent_s = len(diary) * 0.002
            other_s = time.thread_time() - began_s - spent_s  # with what the loop itself takes
            assert spent_s <= other_s + server.Turns.INPUT_SLICE_S + 0.012
        assert diary

    async def test_long_waiting_come_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who has waited for the window comes before all newcomers, whatever they have used."""
        turns, diary = Turns(), [""]
        diary.clear()
        now = asyncio.get_running_loop().time
        old, fresh = Account(0.05), Account(0.05)
        old.paid_at = now() - 0.001  # it has just paid its debt
        turns.queue(Toiler(old, [0.0], diary, "old"))
        skip_ahead(monkeypatch, Account.WINDOW_S + 0.1)
        turns.queue(Toiler(fresh, [0.0], diary, "fresh"))
        await eventually(lambda: len(diary) == 2)
        assert diary == ["old", "fresh"]

    @pytest.mark.parametrize(
        "frames",
        [
            masked(b'{"action":"ping"}') * 3_000,
            masked(b"", Opcode.PING) * 10_000,
            masked(b"", Opcode.PONG) * 30_000,
            masked(b'{"action":"x","a":[%s]}' % (b"[]," * 20_000 + b"[]")) * 20,
            masked(b"{", fin=False) + masked(b"", Opcode.CONT, fin=False) * 20_000,
        ],
        ids=["messages", "pings", "pongs", "no messages", "fragments"],
    )
    async def test_flood_of_any_kind(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch, frames: bytes
    ) -> None:
        """Whatever a flood is made of, it is charged, not read on, and closes nothing."""
        monkeypatch.setattr(server.Door, "ADDRESS_WORK_SHARE", 0.001)
        # In the end, who is not read from does not answer the closing handshake either.
        monkeypatch.setattr(server.Connection, "CLOSE_TIMEOUT_S", 0.1)
        async with (
            running_gateway(platform) as gateway,
            peer_of(gateway) as flood,
            client_of(gateway) as other,
        ):
            [account] = {c.account for c in gateway.registry.connections.values()}
            flood.write(frames)
            await eventually(lambda: account.paid_at > gateway.now())
            queued = [c for c in gateway.registry.connections.values() if not c.is_read]
            assert len(queued) >= 1
            gateway.feed.accept(event(None, server.EVERYONE))  # live events go on
            assert (await other.receive())["project_id"] == server.EVERYONE
            assert len(gateway.registry.connections) == 2

    async def test_sockets_are_charged(self, platform: aws_standin.Platform) -> None:
        """What a socket costs is its peer's to pay, if it never says a word."""
        async with running_gateway(platform) as gateway:
            account = gateway.door.work_by_address.of("127.0.0.1")
            before, count = gateway.now(), 50
            for _ in range(count):
                async with dialled(gateway):
                    await eventually(lambda: gateway.registry.sockets)
                await eventually(lambda: not gateway.registry.sockets)
            saved_from = before - Account.WINDOW_S
            paid_s = (account.paid_at - saved_from) * server.Door.ADDRESS_WORK_SHARE
            assert paid_s >= count * server.Door.SOCKET_PRICE_S

    @pytest.mark.parametrize("line", ["GET /nothing", "POST /health", "GET /health", "GET /ws"])
    async def test_requests_are_charged(self, platform: aws_standin.Platform, line: str) -> None:
        """Whatever a request asks for, it is its sender's to pay, and not the balancer's."""
        async with running_gateway(platform) as gateway:
            head = "Host: x\r\nX-Forwarded-For: 203.0.113.9\r\n\r\n"
            async with dialled(gateway) as peer:
                peer.write(f"{line} HTTP/1.1\r\n{head}".encode())
                await peer.response()
            await eventually(lambda: not gateway.registry.sockets)
            accounts = [gateway.door.work_by_address.of(a) for a in ("203.0.113.9", "127.0.0.1")]
            assert [account.paid_at > 0 for account in accounts] == [True, False]

    @pytest.mark.parametrize("target", ["/nothing", "/ws"])
    async def test_requests_wait_in_debt(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch, target: str
    ) -> None:
        """Who is in debt is answered when it is paid, and others at once, behind one balancer."""
        monkeypatch.setattr(Account, "WINDOW_S", 1.0)
        async with running_gateway(platform) as gateway:
            account = gateway.door.work_by_address.of("203.0.113.9")
            account.charge(10.0, gateway.now())
            paid_at = account.paid_at
            answered_at = {}
            async with dialled(gateway) as debtor, dialled(gateway) as other:
                for peer, address in ((debtor, "203.0.113.9"), (other, "203.0.113.10")):
                    head = f"Host: x\r\nX-Forwarded-For: {address}\r\n\r\n"
                    peer.write(f"GET {target} HTTP/1.1\r\n{head}".encode())
                for peer in (other, debtor):
                    await peer.response()
                    answered_at[peer] = gateway.now()
            assert answered_at[other] < paid_at <= answered_at[debtor]

    async def test_waiting_requests_count(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """No more requests of an address wait than it may have connections."""
        monkeypatch.setattr(Account, "WINDOW_S", 2.0)
        asks = upgrade(X_Forwarded_For="203.0.113.9")
        async with running_gateway(platform, max_connections_per_ip=2) as gateway:
            gateway.door.work_by_address.of("203.0.113.9").charge(10.0, gateway.now())
            async with dialled(gateway) as gone:
                gone.write(asks)
                await eventually(lambda: gateway.door.admission.inside)
                [connection] = gateway.registry.sockets
                connection.transport.abort()
                await eventually(lambda: not gateway.door.admission.inside)
            async with dialled(gateway) as first, dialled(gateway) as second:
                for peer in (first, second):
                    peer.write(asks)
                await eventually(lambda: gateway.door.admission.inside == 2)
                async with dialled(gateway) as one_more:
                    one_more.write(asks)
                    assert (await one_more.response())[0] == 429
                assert not gateway.registry.connections
                for peer in (first, second):
                    assert (await peer.response())[0] == 101
            await eventually(lambda: not gateway.registry.sockets)
            assert not gateway.door.admission.inside

    async def test_leaver_of_two_debts(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whose request waits is heard to leave, though it was unread in its peer's debt before."""
        monkeypatch.setattr(Account, "WINDOW_S", 60.0)
        monkeypatch.setattr(Connection, "HANDSHAKE_TIMEOUT_S", 60.0)
        async with running_gateway(platform) as gateway:
            debtor = gateway.door.work_by_address.of("203.0.113.9")
            debtor.paid_at = gateway.now() + 50.0
            gateway.door.work_by_address.of("127.0.0.1").paid_at = gateway.now() + 0.3
            async with dialled(gateway) as peer:
                peer.write(upgrade(X_Forwarded_For="203.0.113.9"))
                await eventually(lambda: gateway.door.admission.inside)
            await eventually(lambda: not gateway.registry.sockets)
            assert debtor.paid_at > gateway.now()
            assert not gateway.door.admission.inside

    async def test_one_account_of_a_mapped_address(self, platform: aws_standin.Platform) -> None:
        """A peer is charged to one account, before its request is read and after."""
        async with running_gateway(platform, websocket_host="::") as gateway:
            account = gateway.door.work_by_address.of("127.0.0.1")
            _, writer = await asyncio.open_connection("127.0.0.1", gateway.address[1])
            await eventually(lambda: gateway.registry.sockets)
            [connection] = gateway.registry.sockets
            assert connection.account is account
            writer.close()
            await writer.wait_closed()

    async def test_no_longer_than_any_debt(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A request waits for its own address's debt, not for each bad token that came before."""
        monkeypatch.setattr(Account, "WINDOW_S", 0.5)
        monkeypatch.setattr(Connection, "HANDSHAKE_TIMEOUT_S", 0.2)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        bad = f"Bearer {token_of(key=private_key('key-2'))}"
        async with guarded(platform, issuer) as gateway, contextlib.AsyncExitStack() as stack:
            gateway.door.work_by_address.of("203.0.113.9").charge(10.0, gateway.now())
            peers = [await stack.enter_async_context(dialled(gateway)) for _ in range(5)]
            for peer in peers:
                peer.write(upgrade(X_Forwarded_For="203.0.113.9", Authorization=bad))
            assert await peers[-1].everything() == b""

    async def test_debt_paid_within_the_turn(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A request that waits is answered, though its debt is paid before its turn has ended."""
        resume_reading = Connection.resume_reading

        def preempted(connection: Connection) -> None:
            time.sleep(0.01)
            resume_reading(connection)

        async with running_gateway(platform) as gateway, dialled(gateway) as peer:
            identify = gateway.door.identify

            def in_debt(connection: Connection, asked: Request) -> None:
                identify(connection, asked)
                connection.account.paid_at = gateway.now() + 0.005
                monkeypatch.setattr(Connection, "resume_reading", preempted)

            monkeypatch.setattr(gateway.door, "identify", in_debt)
            peer.write(request("/live", X_Forwarded_For="203.0.113.9"))
            assert (await peer.response())[0] == 200

    async def test_lost_have_no_turn(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who is gone before its debt is paid is not kept until then."""
        monkeypatch.setattr(Account, "WINDOW_S", 1.0)
        async with running_gateway(platform) as gateway:
            account = gateway.door.work_by_address.of("127.0.0.1")
            account.charge(1e3, gateway.now())
            async with dialled(gateway) as peer, dialled(gateway) as other:
                for each in (peer, other):
                    each.write(b"GET")
                await eventually(
                    lambda: [c.queued for c in gateway.registry.sockets] == [account] * 2
                )
                gone = weakref.ref(next(iter(gateway.registry.sockets)).inbox.protocol)
                for connection in gateway.registry.sockets:
                    connection.transport.abort()
            await eventually(lambda: not gateway.registry.sockets)
            await eventually(lambda: gc.collect() and gone() is None)
            async with client_of(gateway) as client:
                assert await client.has_nothing_more()

    async def test_closing_is_not_parsed(self, gateway: Gateway) -> None:
        """What comes after the close frame is neither parsed nor kept nor answered."""
        async with peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.close(CloseCode.TRY_AGAIN_LATER, "enough")
            heard_at = connection.heard_at
            assert await peer.close_code() == CloseCode.TRY_AGAIN_LATER
            peer.send_frame(b"", Opcode.PING)
            peer.write(masked(b"x" * 10_000)[:-1])
            await eventually(lambda: connection.heard_at > heard_at)
            assert not connection.inbox.held_bytes
            peer.end()
            assert await peer.rest() == []

    async def test_accounts_survive(self, platform: aws_standin.Platform) -> None:
        """A reconnect starts no new account."""
        async with running_gateway(platform) as gateway:
            async with client_of(gateway):
                [first] = {c.account for c in gateway.registry.connections.values()}
                first.charge(1.0, gateway.now())
            await eventually(lambda: not gateway.registry.connections)
            gateway.door.forget_the_quiet(gateway.now())
            async with client_of(gateway):
                [again] = {c.account for c in gateway.registry.connections.values()}
            assert again is first

    async def test_subscribe_again_and_again(
        self, platform: aws_standin.Platform, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Catch-ups that replace each other cost the log what their account can pay."""
        monkeypatch.setattr(server.Door, "ADDRESS_WORK_SHARE", 0.01)
        monkeypatch.setattr(Account, "WINDOW_S", 1.0)
        async with running_gateway(platform) as gateway:
            await fill_log(gateway, 200, 5_000)
            async with peer_of(gateway) as peer:
                before = queries_of(stand_in)
                for number in range(200):
                    peer.send(action="subscribe", project_id="p", since=number % 50)
                    await asyncio.sleep(0.002)
                queries = queries_of(stand_in) - before
        assert queries < 40  # 200 before; the account has 10 ms saved up, a page costs 2

    async def test_replays_are_charged(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A replay from memory costs by the byte."""
        monkeypatch.setattr(server.Door, "ADDRESS_WORK_SHARE", 0.01)
        async with (
            running_gateway(platform, compression=False) as gateway,
            client_of(gateway) as client,
        ):
            await client.ask(action="subscribe", project_id="p")
            for seq in range(1, 12):
                gateway.feed.accept(event(seq, size=5_000))
            await client.receive_many(11)
            [connection] = gateway.registry.connections.values()
            before = connection.account.paid_at
            await client.ask(action="subscribe", project_id="p", since=0)
            await client.receive_many(11)
            price_s = 55_000 * server.Connection.REPLAY_PRICE_S_PER_BYTE / 0.01
            assert connection.account.paid_at - max(before, gateway.now() - 10) >= price_s * 0.9

    async def test_snapshots_are_charged(
        self, platform: aws_standin.Platform, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A project's state costs by the byte, too."""
        monkeypatch.setattr(server.Door, "ADDRESS_WORK_SHARE", 0.01)
        key = ("PROJECT#p", "METADATA")
        item = {"PK": {"S": key[0]}, "SK": {"S": key[1]}, "name": {"S": "x" * 350_000}}
        stand_in.tables[platform.table_name].put(key, item)
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            [connection] = gateway.registry.connections.values()
            await client.ask(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "project_snapshot"
            price_s = 350_000 * Connection.REPLAY_PRICE_S_PER_BYTE / 0.01
            assert connection.account.paid_at > gateway.now() - Account.WINDOW_S + price_s

    async def test_subscriptions_in_a_url(self, platform: aws_standin.Platform) -> None:
        """More subscriptions in a URL than a connection may have get one answer."""
        many = [f"p{number}" for number in range(101)]
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id=many) as client,
        ):
            assert (await client.receive())["code"] == "too_many_subscriptions"
            assert await client.has_nothing_more()
            assert not gateway.registry.subscriptions


def held(gateway: Gateway) -> int:
    return gateway.ledger.clients_bytes


async def stop_reading(gateway: Gateway, peer: Peer, project_id: str) -> None:
    """Have a client catch up and read nothing of it."""
    narrow(gateway)
    peer.narrow()
    connection = list(gateway.registry.connections.values())[-1]
    await peer.ask(action="subscribe", project_id=project_id, since=0)
    await eventually(lambda: connection.choked)


def budget(size: float) -> dict[str, Any]:
    """The setting for so many bytes."""
    return {"memory_budget_mb": size / 1_048_576}


class TestLedger:
    async def test_adds_up(self, platform: aws_standin.Platform) -> None:
        """What the ledger has in all is what its connections hold; nothing is left at the end."""
        async with running_gateway(platform) as gateway:
            empty = held(gateway)
            async with client_of(gateway) as client, peer_of(gateway) as peer:
                await client.ask(action="subscribe", project_id="p")
                peer.send_frame(b" " * 10_000, fin=False)
                await eventually(
                    lambda: any(
                        c.inbox.held_bytes >= 10_000 for c in gateway.registry.connections.values()
                    )
                )
                each = sum(c.held_bytes() for c in gateway.registry.connections.values())
                channels = len(gateway.registry.channels) * server.Ledger.CHANNEL_BYTES
                assert held(gateway) == each + channels
                figures = gateway.ledger.figures()
                assert figures["input"] >= 10_000
                assert sum(figures.values()) == held(gateway)
            await eventually(lambda: held(gateway) == empty)

    async def test_lost_in_the_middle(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """What comes to an end after its connection has gone leaves nothing behind."""
        go_on = hold_back(stand_in)
        async with running_gateway(platform) as gateway:
            empty = held(gateway)
            async with peer_of(gateway) as peer:
                for number in range(5):
                    peer.send(action="forward", type="dev", data="x" * 1_000)
                    peer.send(action="subscribe", project_id=f"p{number}", since=0)
                [connection] = gateway.registry.connections.values()
                await eventually(lambda: connection.in_flight == 5)
                peer.reset()
                await eventually(lambda: not gateway.registry.connections)
            go_on.set()
            await eventually(lambda: not connection.in_flight and not connection.catching_up)
            await eventually(lambda: held(gateway) == empty)
            assert connection.charged_bytes == 0

    async def test_never_reads(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over the budget the connection that holds most ends, at once; others notice nothing."""
        monkeypatch.setattr(server, "SOCKET_BUFFER_BYTES", 4_096)
        async with (
            running_gateway(platform, max_backlog_bytes=10**9, memory_budget_mb=1) as gateway,
            client_of(gateway) as other,
            peer_of(gateway) as greedy,
        ):
            await other.ask(action="subscribe", project_id="p")
            narrow(gateway)
            connection = next(
                c for c in gateway.registry.connections.values()
                if c.id != other.greeting["connection_id"]
            )  # fmt: skip
            while connection.id in gateway.registry.connections:
                connection.send(b'"' + b"x" * 50_000 + b'"')
                await asyncio.sleep(0)
            assert gateway.metrics.memory_closed == 1
            sent = connection.inbox.protocol.close_sent
            assert sent is not None
            assert sent.code == CloseCode.TRY_AGAIN_LATER
            await eventually(lambda: connection.progress is server.Progress.LOST)
            assert greedy is not None
            assert await other.has_nothing_more()

    async def test_stalled_first(self, platform: aws_standin.Platform) -> None:
        """Of the account that holds most, the connection that has stalled longest ends."""
        async with (
            running_gateway(platform, **budget(115_000)) as gateway,
            peer_of(gateway, deflates=True) as first,
            peer_of(gateway) as second,
            peer_of(gateway) as third,
        ):
            first.send_frame(deflate(b" " * 60_000), fin=False, rsv=DEFLATED)
            await eventually(lambda: gateway.ledger.figures()["input"] > 50_000)  # inflated
            second.send_frame(b" " * 30_000, fin=False)
            await eventually(lambda: gateway.ledger.figures()["input"] > 89_000)
            third.send_frame(b" " * 20_000, fin=False)
            assert await first.close_code() == CloseCode.TRY_AGAIN_LATER
            third.send_frame(b'{"action":"ping"}', Opcode.CONT)
            assert (await third.receive())["type"] == "pong"
            await eventually(lambda: gateway.ledger.figures()["input"] < 40_000)

    async def test_slow_request_counts(self, gateway: Gateway) -> None:
        """What has come of a request counts, for the budget and in the figures."""
        async with dialled(gateway) as peer:
            await eventually(lambda: gateway.registry.sockets)
            before = held(gateway)
            peer.write(b"GET /ws HTTP/1.1\r\nX-Long: " + b"x" * 10_000)
            await eventually(lambda: gateway.ledger.figures()["input"] > 10_000)
            assert held(gateway) - before == gateway.ledger.figures()["input"]

    async def test_read_counts_no_more(self, gateway: Gateway) -> None:
        """What is remembered for others does not count as unread once everybody has read it."""
        await fill_log(gateway, 20, 20_000)
        async with peer_of(gateway) as peer:
            await peer.ask(action="subscribe", project_id="p", since=0)
            assert await seqs_until(peer, 20) == list(range(1, 21))
            gateway.feed.accept(event(21, size=20_000))
            assert (await peer.receive())["seq"] == 21
            await eventually(lambda: not gateway.registry.channels["p"].visitors)
            gateway.ledger.let_go()
            assert gateway.ledger.figures()["unread"] == 0

    async def test_shared_counts_once(self, platform: aws_standin.Platform) -> None:
        """An event that many have not read yet is counted once."""
        async with running_gateway(platform) as gateway, contextlib.AsyncExitStack() as stack:
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(10)]
            for peer in peers:
                await peer.ask(action="subscribe", project_id="p")
            narrow(gateway)
            for connection in gateway.registry.connections.values():
                connection.transport.set_write_buffer_limits(high=1_000)
            before = held(gateway)
            for _ in range(4):
                gateway.feed.accept(event(None, size=200_000))
                await asyncio.sleep(0)
            assert sum(c.choked for c in gateway.registry.connections.values()) == 10
            grown = held(gateway) - before - 10 * 2 * server.SOCKET_BUFFER_BYTES
            assert 600_000 < grown < 1_600_000  # not ten times as much
        await eventually(lambda: not gateway.registry.connections)
        gateway.ledger.let_go()
        assert held(gateway) <= before

    async def test_pages_of_slow_readers(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What slow clients are still to be sent counts once for all, when it is forgotten."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 5_000_000)
        page_bytes = 40 * 25_000 * server.Chunk.FRAMES_HELD
        async with running_gateway(platform) as gateway, contextlib.AsyncExitStack() as stack:
            for project_id in ("p", "q"):
                await fill_log(gateway, 40, 25_000, project_id)
            for _ in range(5):
                await stop_reading(gateway, await stack.enter_async_context(peer_of(gateway)), "p")
            slow = list(gateway.registry.connections.values())
            before = held(gateway)
            async with peer_of(gateway) as another:
                await another.ask(action="subscribe", project_id="q", since=0)
                assert await seqs_until(another, 40) == list(range(1, 41))
                grown = held(gateway) - before
            assert page_bytes / 2 < grown < 2 * page_bytes  # not five times as much
            assert slow[0].held_bytes() > page_bytes / 2  # it has read the page
            assert gateway.ledger.figures()["events"] > server.Registry.REMEMBERED_BYTES
            stack.pop_all()
            for connection in slow:
                connection.transport.abort()
            await eventually(lambda: not gateway.registry.connections)
            await eventually(lambda: held(gateway) < before)
            assert gateway.ledger.figures()["events"] <= server.Registry.REMEMBERED_BYTES

    async def test_too_many_pages(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of slow clients with a page each, one ends when their pages are over the budget."""
        monkeypatch.setattr(server.Registry, "REMEMBERED_BYTES", 5_000_000)
        async with (
            running_gateway(platform, **budget(6_000_000)) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            for project_id in ("p", "q", "r"):
                await fill_log(gateway, 40, 25_000, project_id)
                peer = await stack.enter_async_context(peer_of(gateway))
                await stop_reading(gateway, peer, project_id)
            await eventually(lambda: gateway.metrics.memory_closed == 1)
            await eventually(lambda: held(gateway) < 6_000_000)

    async def test_nobody_is_left_to_end(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Over the budget without a client, nobody is looked for at each turn of the loop."""
        async with running_gateway(platform, **budget(100_000)) as gateway:
            looks = list[int]()
            let_go = gateway.ledger.let_go

            def look() -> None:
                looks.append(1)
                let_go()

            monkeypatch.setattr(gateway.ledger, "let_go", look)
            data = bytes(200_000)
            gateway.ledger.share(data)
            for _ in range(20):
                await asyncio.sleep(0)
            assert len(data) < held(gateway)
            assert len(looks) == 1

    async def test_long_names(self, platform: aws_standin.Platform) -> None:
        """Subscriptions and channels are charged, so that their sum has a bound too."""
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            before = held(gateway)
            for number in range(100):
                await client.ask(action="subscribe", project_id=f"{number:0256}")
            assert held(gateway) - before >= 100 * server.Ledger.CHANNEL_BYTES

    async def test_unread_in_debt(self, gateway: Gateway) -> None:
        """What was received before its turn is charged while it waits."""
        async with peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.account.charge(1e3, gateway.now())
            before = held(gateway)
            peer.write(masked(b"x" * 10_000))
            await eventually(lambda: connection.inbox.unread)
            assert held(gateway) - before == len(connection.inbox.unread)

    async def test_half_open(self, platform: aws_standin.Platform) -> None:
        """Sockets that say nothing are charged: the one that has waited longest ends."""
        room = budget(server.Connection.HANDSHAKE_BYTES * 5 // 2)
        async with running_gateway(platform, **room) as gateway, dialled(gateway) as first:
            await eventually(lambda: unsettled(gateway))
            async with dialled(gateway) as second:
                await eventually(lambda: len(unsettled(gateway)) == 2)
                async with dialled(gateway) as third:
                    assert await first.rest() == []
                    for peer in (second, third):
                        assert peer is not None

    async def test_room_is_made_at_once(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All are looked at once for as many sockets as make room, not again for each few."""
        monkeypatch.setattr(server.Ledger, "ENDED_AT_ONCE", 1)
        room = budget(Connection.HANDSHAKE_BYTES * 20.5)
        async with (
            running_gateway(platform, **room) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            for _ in range(21):
                await stack.enter_async_context(dialled(gateway))
            await eventually(lambda: gateway.metrics.memory_closed)
            assert gateway.metrics.memory_closed == 3
            assert gateway.ledger.has_room

    async def test_full(self, platform: aws_standin.Platform) -> None:
        """Close to the budget, who comes gets 503; who is here stays."""
        here = Connection.CONNECTION_BYTES + Connection.SUBSCRIPTION_BYTES  # to "*"
        with_one_more = server.Ledger.CHANNEL_BYTES + here + Connection.HANDSHAKE_BYTES
        room = budget(with_one_more * 1.05)
        async with running_gateway(platform, **room) as gateway, peer_of(gateway) as inside:
            async with dialled(gateway) as peer:
                peer.write(upgrade())
                assert (await peer.response())[0] == 503
            assert await inside.is_answered()

    async def test_agents_stop_the_intake(self, platform: aws_standin.Platform) -> None:
        """What agents cause stops the intake of updates and ends no client."""
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            gateway.ledger.agents_bytes = lambda: 10**12
            assert not gateway.ledger.may_receive()
            await client.ask(action="subscribe", project_id="p")  # more is held than before
            assert await client.has_nothing_more()

    async def test_stalls_and_pongs(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who reads nothing is ended after a while, whatever it goes on sending."""
        monkeypatch.setattr(server.Connection, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Connection, "STALLED_AFTER_S", 0.3)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.05)
        async with (
            running_gateway(platform, max_backlog_bytes=10**9) as gateway,
            peer_of(gateway) as peer,
        ):
            narrow(gateway)
            [connection] = gateway.registry.connections.values()
            for _ in range(60):  # more than the two kernels take
                connection.send(b'"' + b"x" * 50_000 + b'"')
            for _ in itertools.count():
                if not gateway.registry.connections:
                    break
                peer.send_frame(b"", Opcode.PONG)
                await asyncio.sleep(0.02)
            assert gateway.metrics.slow_consumers_closed == 1
            await eventually(lambda: connection.progress is server.Progress.LOST)

    async def test_slow_but_moving(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who reads slowly and steadily stays, though its backlog grows."""
        monkeypatch.setattr(server.Connection, "STALLED_AFTER_S", 0.4)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.05)
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            narrow(gateway)
            [connection] = gateway.registry.connections.values()
            started_at = gateway.now()
            received = 0
            while gateway.now() - started_at < 1.2:
                connection.send(b'{"type":"x","data":"' + b"x" * 40_000 + b'"}')
                message: Json = await peer.receive()
                received += len(message["data"])
                await asyncio.sleep(0.02)
            assert gateway.metrics.slow_consumers_closed == 0
            assert gateway.registry.connections


class TestHolds:
    async def test_two_owners(self, platform: aws_standin.Platform) -> None:
        """The end of one reason to act on nothing does not end another."""
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)  # a token is looked up
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)  # the drain waits for forwards
            received = gateway.metrics.messages_received
            peer.send(action="ping")
            connection.hold(-Connection.FORWARDS_IN_FLIGHT)
            await eventually(lambda: not connection.is_read)
            await asyncio.sleep(0)
            assert gateway.metrics.messages_received == received
            connection.hold(-Connection.FORWARDS_IN_FLIGHT)
            assert (await peer.receive())["type"] == "pong"

    @pytest.mark.parametrize("opening", [b"", upgrade()], ids=["refused", "open"])
    async def test_closing_is_read(self, platform: aws_standin.Platform, opening: bytes) -> None:
        """Who is closed is read from, in whatever debt, so that its end is seen."""
        async with running_gateway(platform) as gateway, dialled(gateway) as peer:
            await eventually(lambda: gateway.registry.sockets)
            [connection] = gateway.registry.sockets
            if opening:
                peer.write(opening)
                assert (await peer.response())[0] == 101
                assert (await peer.receive())["type"] == "connected"
            # Whatever it does next puts it in debt.
            connection.account.share = 1e-6
            if opening:
                peer.send_frame(b"\xff")
                assert await peer.close_code() == CloseCode.INVALID_DATA
            else:
                peer.write(request("/elsewhere"))
                assert (await peer.response())[0] == 404
            assert connection.account.paid_at > gateway.now()
            peer.end()
            await eventually(lambda: not gateway.registry.sockets)

    async def test_authenticated_in_debt(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whose token is of somebody in debt is not read from until that is paid."""
        monkeypatch.setattr(Account, "WINDOW_S", 2.0)
        async with (
            guarded(platform, issuer, auth_first_message=True) as gateway,
            peer_of(gateway) as peer,
        ):
            [connection] = gateway.registry.connections.values()
            gateway.door.work_by_subject.of("alice").charge(1e3, gateway.now())
            answer = await peer.ask(action="authenticate", token=token_of("alice"))
            assert answer["type"] == "authenticated"
            assert not connection.is_read
            for _ in range(2):
                assert await peer.is_answered()

    async def test_reset_is_noticed(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who is not read from and cuts the connection is gone with the next sweep."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)
            peer.send_frame(b"", Opcode.PONG)
            await eventually(lambda: not connection.is_read)
            await asyncio.sleep(0.1)
            assert gateway.registry.sockets  # who is only not read from stays
            peer.reset()
            await eventually(lambda: not gateway.registry.sockets)

    async def test_deadlines_stand_still(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While a client is not read from, what it has to send may come later."""
        monkeypatch.setattr(server.Sweep, "MESSAGE_TIMEOUT_S", 0.2)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            running_gateway(platform, ping_interval_seconds=0.3) as gateway,
            peer_of(gateway) as peer,
        ):
            [connection] = gateway.registry.connections.values()
            peer.send_frame(b'{"action":', fin=False)
            await eventually(lambda: connection.inbox.unfinished_since)
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)
            peer.send_frame(b"", Opcode.PONG)
            await eventually(lambda: not connection.is_read)
            async with peer_of(gateway) as unfinished, peer_of(gateway) as silent:
                unfinished.send_frame(b'{"action":', fin=False)
                assert await unfinished.close_code() == CloseCode.POLICY_VIOLATION
                await silent.rest()  # its pings were not answered
            connection.hold(-Connection.FORWARDS_IN_FLIGHT)
            peer.send_frame(b'"ping"}', Opcode.CONT)
            assert (await peer.receive())["type"] == "pong"


class TestFirstMessage:
    @pytest.mark.parametrize(
        "payload",
        [b'{"action":"ping"}', b'{"action":"x","a":[%s[]]}' % (b"[]," * 50_000), b"["],
        ids=["another", "expensive", "broken"],
    )
    def test_nothing_else_is_decoded(self, payload: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a principal, whatever is not `authenticate` gets the same short answer."""
        monkeypatch.setattr(server, "decode_message", None)
        with pytest.raises(server.BadMessage) as caught:
            server.decode_first_message(payload)
        assert caught.value.code == "unauthenticated"


class TestBusy:
    async def test_said_to_who_asked(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who asked for it is told every two seconds that it is not read from; nobody else is."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        monkeypatch.setattr(server.Sweep, "BUSY_EVERY_S", 0.1)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, busy=1) as asked,
            client_of(gateway) as other,
        ):
            for connection in gateway.registry.connections.values():
                connection.hold(+Connection.FORWARDS_IN_FLIGHT)
            await asked.send(action="ping")
            await other.send(action="ping")
            for _ in range(3):
                assert await asked.receive() == {"type": "busy"}
            for connection in gateway.registry.connections.values():
                connection.hold(-Connection.FORWARDS_IN_FLIGHT)
            while (answer := await asked.receive()) == {"type": "busy"}:
                pass
            assert answer["type"] == "pong"
            assert (await other.receive())["type"] == "pong"
            assert await other.has_nothing_more()

    async def test_not_behind_a_backlog(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is not said while anything waits to be written, nor to a client that is closing."""
        monkeypatch.setattr(server.Sweep, "BUSY_EVERY_S", 0.0)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.01)
        asks = upgrade("/ws?busy=1")
        async with (
            running_gateway(platform, max_backlog_bytes=10**9) as gateway,
            peer_of(gateway, asks) as peer,
        ):
            narrow(gateway)
            [connection] = gateway.registry.connections.values()
            for _ in range(60):  # more than the two kernels take
                connection.send(b'{"type":"x","data":"' + b"x" * 50_000 + b'"}')
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)
            peer.send_frame(b"", Opcode.PONG)
            async with peer_of(gateway, asks) as other:
                for held in gateway.registry.connections.values():
                    if held is not connection:
                        held.hold(+Connection.FORWARDS_IN_FLIGHT)
                other.send_frame(b"", Opcode.PONG)
                for _ in range(3):
                    assert await other.receive() == {"type": "busy"}
            connection.send(b'{"type":"last"}')
            kinds = [(await peer.receive())["type"] for _ in range(62)]
            assert kinds == ["x"] * 60 + ["last", "busy"]
