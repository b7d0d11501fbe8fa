"""Who gets in, what they may do, how much of it, and what nobody gets to see.

Rules first, without a socket; then a gateway in the test's own event loop; then the process, with
everything it writes. The issuer of tokens (tests/issuer.py) is real, and fails on command.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import math
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.asyncio.client import connect as connect_websocket
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed, InvalidStatus

import aws_standin
import server
from aws_standin import StandIn
from server import (
    EVERYONE,
    Connection,
    Gateway,
    Keys,
    NotAuthenticated,
    Principal,
    UnknownKey,
    Verifier,
    bearer_token,
    client_address,
    projects_in,
)
from tests.hostile import CLOSE, frame
from tests.issuer import (
    AUDIENCE,
    ISSUER,
    Issuer,
    base64url,
    forged_tokens,
    key_set,
    private_key,
    public_jwk,
    token_of,
)
from tests.server.aws import Json, push
from tests.server.fixtures import platform
from tests.server.gateways import running_gateway, settings, unsettled, url_of
from tests.server.guarded import (
    admission_with,
    authorization,
    client_of,
    closed_with,
    guarded,
    refusal_of,
    starting,
    status_of,
)
from tests.server.peers import answer_to, dialled, request, upgrade
from tests.waiting import DEADLINE_S, eventually

__all__ = ["platform"]

FORGED = forged_tokens()
each_forged_token = pytest.mark.parametrize("token", FORGED.values(), ids=FORGED)

# --- Clients --------------------------------------------------------------------------------


RECEIVING = {"ReceiveMessage", "DeleteMessageBatch"}
"""The calls that a gateway makes whatever clients do."""


class Clock:
    """The module ``time``, whose wall clock can be put forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The gateway's wall clock, looked at often."""
    clock = Clock()
    monkeypatch.setattr(server, "time", clock)
    monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
    return clock


# --- Rules ----------------------------------------------------------------------------------


class TestClientAddress:
    @pytest.mark.parametrize(
        ("forwarded_for", "hops", "address"),
        [
            ([], 1, "192.0.2.1"),
            ([""], 1, "192.0.2.1"),
            (["203.0.113.7"], 1, "203.0.113.7"),
            (["203.0.113.7"], 0, "192.0.2.1"),
            (["10.0.0.1, 203.0.113.7"], 1, "203.0.113.7"),
            (["10.0.0.1", "203.0.113.7"], 1, "203.0.113.7"),
            (["10.0.0.1,203.0.113.7 ,  198.51.100.9"], 2, "203.0.113.7"),
            (["203.0.113.7"], 2, "203.0.113.7"),
            (["203.0.113.7:51234"], 1, "203.0.113.7"),
            (["[2001:db8:1:2:3:4:5:6]:443"], 1, "2001:db8:1:2::/64"),
            (["[2001:db8:1:2:3:4:5:6]"], 1, "2001:db8:1:2::/64"),
            (["2001:db8:1:2:3:4:5:6"], 1, "2001:db8:1:2::/64"),
            (["2001:DB8:1:2::"], 1, "2001:db8:1:2::/64"),
            (["::ffff:203.0.113.7"], 1, "203.0.113.7"),
            (["203.0.113.7, unknown"], 1, "192.0.2.1"),
            (["203.0.113.7, 010.1.2.3"], 1, "192.0.2.1"),
            (["203.0.113.7,"], 1, "192.0.2.1"),
        ],
    )
    def test_parsing(self, forwarded_for: list[str], hops: int, address: str) -> None:
        """The entry that the outermost trusted proxy wrote counts; without one, the peer."""
        assert client_address("192.0.2.1", forwarded_for, hops) == address

    def test_one_customer(self) -> None:
        """The addresses of one IPv6 customer are one, those of two are two."""
        found = {
            client_address(f"2001:db8:0:{net}::{host}", [], 0) for net in "12" for host in "ab"
        }
        assert len(found) == 2

    @given(st.lists(st.text(max_size=40), max_size=3), st.ip_addresses(), st.integers(1, 3))
    def test_spoofed(self, spoofed: list[str], truth: Any, hops: int) -> None:
        """Whatever a client writes to the left of what the proxies append changes nothing."""
        appended = ", ".join([str(truth)] + ["192.0.2.9"] * (hops - 1))
        alone = client_address("192.0.2.1", [appended], hops)
        assert client_address("192.0.2.1", [*spoofed, appended], hops) == alone

    @given(st.lists(st.text(max_size=60), max_size=4), st.integers(0, 3))
    def test_any_text(self, forwarded_for: list[str], hops: int) -> None:
        """Nothing that a header may hold is an error, or makes a long address."""
        assert len(client_address("192.0.2.1", forwarded_for, hops)) <= 43


class TestAdmission:
    def test_off(self) -> None:
        """Limits of 0 refuse nobody."""
        admission = admission_with()
        for _ in range(1_000):
            assert admission.refusal("a") is None
            admission.count("a", +1)

    def test_connections_per_address(self) -> None:
        """An address has so many connections; when one ends, there is room for another."""
        admission = admission_with(max_connections_per_ip=2)
        admission.count("a", +1)
        admission.count("a", +1)
        refusal = admission.refusal("a")
        assert refusal is not None
        assert refusal[0] == 429
        assert admission.refusal("b") is None
        admission.count("a", -1)
        assert admission.refusal("a") is None

    def test_connections_in_all(self) -> None:
        """A full task refuses every address, as something that another task may not."""
        admission = admission_with(max_connections=2)
        admission.count("a", +1)
        admission.count("b", +1)
        refusal = admission.refusal("c")
        assert refusal is not None
        assert refusal[0] == 503

    @given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=60))
    def test_connections_are_counted(self, moves: list[tuple[str, bool]]) -> None:
        """However they come and go, an address is refused exactly while it has two."""
        admission = admission_with(max_connections_per_ip=2)
        inside = dict.fromkeys("abc", 0)
        for address, comes in moves:
            assert (admission.refusal(address) is None) == (inside[address] < 2)
            if comes and inside[address] < 2:
                admission.count(address, +1)
                inside[address] += 1
            elif not comes and inside[address]:
                admission.count(address, -1)
                inside[address] -= 1


class TestProjectsClaim:
    @pytest.mark.parametrize(
        ("claims", "name", "projects"),
        [
            ({"projects": ["p1", "p2"]}, "projects", {"p1", "p2"}),
            ({"projects": "p1 p2"}, "projects", {"p1", "p2"}),
            ({"projects": []}, "projects", set()),
            ({"projects": ""}, "projects", set()),
            ({}, "projects", set()),
            ({"projects": None}, "projects", set()),
            ({"projects": ["*"]}, "projects", None),
            ({"projects": "*"}, "projects", None),
            ({"projects": "p1 *"}, "projects", None),
            ({"projects": "p*"}, "projects", {"p*"}),
            ({"projects": {"*": True}}, "projects", set()),
            ({"projects": True}, "projects", set()),
            ({"projects": 7}, "projects", set()),
            ({"projects": ["p1", 7, None, ["*"]]}, "projects", {"p1"}),
            ({"app": {"projects": ["p1"]}}, "app.projects", {"p1"}),
            ({"app": {"grants": {"projects": "p1 p2"}}}, "app.grants.projects", {"p1", "p2"}),
            ({"app": ["projects"]}, "app.projects", set()),
            ({"app": "projects"}, "app.projects", set()),
            ({"https://app.example/projects": ["p1"]}, "https://app.example/projects", {"p1"}),
        ],
    )
    def test_forms(self, claims: Json, name: str, projects: set[str] | None) -> None:
        """A list or words, nested or not; whatever else it is grants nothing."""
        assert projects_in(claims, name) == projects

    def test_rights(self) -> None:
        """A principal may use what it was granted, and hear what is for everyone."""
        some = Principal("alice", frozenset({"p1"}), math.inf)
        assert [some.may_use(p) for p in ("p1", "p2", "P1", "", EVERYONE)] == [
            True, False, False, False, True,
        ]  # fmt: skip
        assert Principal("root", None, math.inf).may_use("anything")


class TestBearerToken:
    @pytest.mark.parametrize(
        ("fields", "token"),
        [
            ([], None),
            ([("Authorization", "Bearer abc")], "abc"),
            ([("authorization", "bearer  abc ")], "abc"),
            ([("Authorization", "Basic abc")], None),
            ([("Authorization", "Bearer")], ""),
            ([("Sec-WebSocket-Protocol", "agenticai.v1")], None),
            ([("Sec-WebSocket-Protocol", "agenticai.v1, bearer.YS5iLmM")], "a.b.c"),
            ([("Sec-WebSocket-Protocol", "bearer.YS5iLmM,agenticai.v1")], "a.b.c"),
            ([("Sec-WebSocket-Protocol", "bearer.YS5iLmM=")], "a.b.c"),
            ([("Sec-WebSocket-Protocol", "bearer.")], ""),
            ([("Sec-WebSocket-Protocol", "bearer.A")], ""),
            ([("Sec-WebSocket-Protocol", "bearer._-8")], ""),
        ],
    )
    def test_places(self, fields: list[tuple[str, str]], token: str | None) -> None:
        """A token is in the header, or in base64url among the subprotocols; "" is a bad one."""
        assert bearer_token(Headers(fields)) == token


class TestVerifier:
    @pytest.fixture
    def keys(self) -> Keys:
        async def fetch() -> bytes:
            return key_set(
                public_jwk("key-1"), public_jwk("ec", "ES256"), public_jwk("ed", "EdDSA")
            )

        return Keys(fetch, ("RS256",))

    async def verifier(self, keys: Keys, **overrides: Any) -> Verifier:
        await keys.read(0.0)
        fields = {"auth_issuer": ISSUER, "auth_audience": AUDIENCE, **overrides}
        return Verifier(settings(**fields), keys)

    async def test_good(self, keys: Keys) -> None:
        """A good token tells whose it is, what for, and until when."""
        verifier = await self.verifier(keys)
        principal = verifier.verify(token_of("alice", 600, projects=["p1"]))
        assert principal.subject == "alice"
        assert principal.projects == frozenset({"p1"})
        assert principal.expires_at == pytest.approx(time.time() + 600 + 30, abs=5)

    @each_forged_token
    async def test_bad(self, keys: Keys, token: str) -> None:
        """No other token is anybody's, and the reason has nothing of it."""
        verifier = await self.verifier(keys)
        with pytest.raises(NotAuthenticated) as refused:
            verifier.verify(token)
        assert len(str(refused.value)) < 60
        assert not any(part in str(refused.value) for part in token.split(".") if len(part) > 3)

    async def test_leeway(self, keys: Keys) -> None:
        """Clocks may differ by half a minute, and no more."""
        verifier = await self.verifier(keys)
        assert verifier.verify(token_of(valid_s=-20)).subject == "alice"
        assert verifier.verify(token_of(nbf=int(time.time()) + 20)).subject == "alice"
        with pytest.raises(NotAuthenticated):
            verifier.verify(token_of(valid_s=-40))

    @pytest.mark.parametrize(("algorithm", "key_id"), [("ES256", "ec"), ("EdDSA", "ed")])
    async def test_algorithms(self, algorithm: str, key_id: str) -> None:
        """What the settings name is believed, and nothing else."""

        async def fetch() -> bytes:
            return key_set(public_jwk("key-1"), public_jwk(key_id, algorithm))

        verifier = await self.verifier(Keys(fetch, (algorithm,)), auth_algorithms=(algorithm,))
        token = token_of(key_id=key_id, algorithm=algorithm)
        assert verifier.verify(token).subject == "alice"
        with pytest.raises(NotAuthenticated):
            verifier.verify(token_of())
        only_rsa = await self.verifier(Keys(fetch, ("RS256",)))
        with pytest.raises(NotAuthenticated):
            only_rsa.verify(token)

    async def test_audience_claim(self, keys: Keys) -> None:
        """Cognito's access tokens name their client where others have an audience."""
        verifier = await self.verifier(keys, auth_audience_claim="client_id")
        assert verifier.verify(token_of(aud=None, client_id=AUDIENCE)).subject == "alice"
        assert verifier.verify(token_of(client_id=AUDIENCE)).subject == "alice"
        others: list[Json] = [{}, {"client_id": "other"}, {"client_id": [AUDIENCE]}]
        for claims in others:
            with pytest.raises(NotAuthenticated):
                verifier.verify(token_of(**{"aud": AUDIENCE, **claims}))

    async def test_audiences(self, keys: Keys) -> None:
        """A token for several is for each of them."""
        verifier = await self.verifier(keys)
        assert verifier.verify(token_of(aud=["x", AUDIENCE])).subject == "alice"
        with pytest.raises(NotAuthenticated):
            verifier.verify(token_of(aud=["x", "y"]))

    async def test_no_key_id(self, keys: Keys) -> None:
        """A token without a key id may be signed with any key that fits."""
        verifier = await self.verifier(keys)
        assert verifier.verify(token_of(key_id=None)).subject == "alice"

        async def fetch() -> bytes:
            return key_set(public_jwk("key-2"), public_jwk("key-1"))

        several = await self.verifier(Keys(fetch, ("RS256",)))
        assert several.verify(token_of(key_id=None)).subject == "alice"
        with pytest.raises(UnknownKey):  # the issuer may have changed its keys
            several.verify(token_of(key_id=None, key=private_key("key-3")))

    @pytest.mark.parametrize(
        "members", [{"use": "enc"}, {"alg": "RS512"}, {"alg": "HS256"}], ids=str
    )
    async def test_keys_for_something_else(self, members: Json) -> None:
        """A key for encryption, or for another algorithm, verifies nothing."""

        async def fetch() -> bytes:
            return key_set(public_jwk("key-1", **members), public_jwk("key-2"))

        verifier = await self.verifier(Keys(fetch, ("RS256",)))
        with pytest.raises(UnknownKey):
            verifier.verify(token_of())
        assert verifier.verify(token_of(key_id="key-2")).subject == "alice"

    @given(st.text(max_size=200) | st.from_regex(r"[\w-]{0,80}\.[\w-]{0,80}\.[\w-]{0,80}"))
    def test_any_text(self, token: str) -> None:
        """No text is an error other than the one that is expected."""

        async def fetch() -> bytes:
            return b""

        fields: Json = {"auth_issuer": ISSUER, "auth_audience": AUDIENCE}
        with pytest.raises(NotAuthenticated):
            Verifier(settings(**fields), Keys(fetch, ("RS256",))).verify(token)


# --- Authentication -------------------------------------------------------------------------


class TestHandshake:
    async def test_header(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A good token in the header lets a client in."""
        async with guarded(platform, issuer) as gateway, client_of(gateway, token_of()) as client:
            assert await client.has_nothing_more()

    async def test_subprotocol(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A browser sends it as a subprotocol, and is echoed only the protocol's name."""
        offers = ["agenticai.v1", "bearer." + base64url(token_of().encode())]
        async with guarded(platform, issuer) as gateway:
            async with client_of(gateway, offers=offers) as client:
                assert client.socket.subprotocol == "agenticai.v1"
                response = client.socket.response
                assert response is not None
                assert response.headers.get_all("Sec-WebSocket-Protocol") == ["agenticai.v1"]
                assert await client.has_nothing_more()
            assert await status_of(gateway, offers=["agenticai.v1", "bearer.bm8"]) == 401

    async def test_none(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """Without a token there is no upgrade."""
        async with guarded(platform, issuer) as gateway:
            status, headers, body = await refusal_of(gateway)
            assert (status, headers["WWW-Authenticate"]) == (401, "Bearer")
            assert body == "A valid token is needed.\n"
            assert not gateway.registry.connections

    @pytest.mark.parametrize("name", ["token", "access_token", "bearer", "authorization", "jwt"])
    async def test_query_string(
        self, platform: aws_standin.Platform, issuer: Issuer, name: str
    ) -> None:
        """A token in the URL is no token."""
        async with guarded(platform, issuer) as gateway:
            path = f"/ws?{name}={token_of()}"
            assert (await refusal_of(gateway, path=path))[0] == 401

    async def test_forged(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """No forged token lets anybody in, nor does the answer say what was wrong with it."""
        async with guarded(platform, issuer) as gateway:
            answers = set()
            for number, (name, token) in enumerate(FORGED.items()):
                here = f"198.51.100.{number}"  # where nobody has tried a token yet
                status, _, body = await refusal_of(gateway, token, X_Forwarded_For=here)
                answers.add((status, body))
                assert status == 401, name
            assert answers == {(401, "A valid token is needed.\n")}
            assert await status_of(gateway, token_of()) == 101

    async def test_header_of_no_encoding(
        self, platform: aws_standin.Platform, issuer: Issuer
    ) -> None:
        """Bytes that are no text are a bad token."""
        async with guarded(platform, issuer) as gateway:
            response = await answer_to(
                gateway.address, upgrade(Authorization="Bearer \u00e9\u20ac.x.y")
            )
            assert response.startswith(b"HTTP/1.1 401 ")

    async def test_user_reaches_the_agent(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """An agent learns whose message it has: the token's subject, not what the client says."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of("alice")) as client,
        ):
            confirmed = await client.ask(action="forward", type="dev", user="root", data=1)
            assert confirmed["type"] == "forward_confirmed"
            [message] = stand_in.queues["agenticai-dev-queue"].messages
            assert json.loads(message.body)["user"] == "alice"

    async def test_off(
        self, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture, stand_in: StandIn
    ) -> None:
        """Without keys everybody may do everything, and one warning at start-up says so."""
        caplog.set_level(logging.WARNING, "gateway")
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            answer = await client.ask(action="authenticate", token="anything")
            assert answer["type"] == "authenticated"
            answer = await client.ask(action="forward", type="dev", project_id="p")
            assert answer["type"] == "forward_confirmed"
            [message] = stand_in.queues["agenticai-dev-queue"].messages
            assert json.loads(message.body)["user"] is None
        warnings = [record.getMessage() for record in caplog.records]
        assert sum("AUTH_JWKS_URL is not set" in text for text in warnings) == 1
        assert sum("ALLOWED_ORIGINS is not set" in text for text in warnings) == 1


class TestFirstMessage:
    def gateway(
        self, platform: aws_standin.Platform, issuer: Issuer, **overrides: Any
    ) -> contextlib.AbstractAsyncContextManager[Gateway]:
        return guarded(platform, issuer, auth_first_message=True, **overrides)

    async def test_token(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A token as the first message opens what was closed before."""
        async with self.gateway(platform, issuer) as gateway, client_of(gateway) as client:
            answer = await client.ask(action="authenticate", token=token_of())
            assert answer["type"] == "authenticated"
            assert answer["expires_in_seconds"] == pytest.approx(630, abs=35)
            answer = await client.ask(action="subscribe", project_id="p")
            assert answer["type"] == "subscription_confirmed"

    async def test_only_where_it_is_on(
        self, platform: aws_standin.Platform, issuer: Issuer
    ) -> None:
        """A bad token in the handshake is refused there, also in this mode."""
        async with self.gateway(platform, issuer) as gateway:
            assert await status_of(gateway, "not-a-token") == 401
            assert await status_of(gateway) == 101

    @pytest.mark.parametrize(
        "fields",
        [
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer "},
            {"Sec_WebSocket_Protocol": "agenticai.v1, bearer."},
            {"Sec_WebSocket_Protocol": "agenticai.v1, bearer.A"},
            {"Sec_WebSocket_Protocol": "bearer._-8"},
        ],
        ids=str,
    )
    async def test_empty_token(
        self, platform: aws_standin.Platform, issuer: Issuer, fields: dict[str, str]
    ) -> None:
        """A token of which nothing can be read is a bad one, not none."""
        async with self.gateway(platform, issuer) as gateway:
            response = await answer_to(gateway.address, upgrade(**fields))
            assert response.startswith(b"HTTP/1.1 401 ")

    async def test_nothing_before(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """Before its token a client can do nothing, whatever it asks for."""
        asked: tuple[Json, ...] = (
            {"action": "subscribe", "project_id": "p"},
            {"action": "subscribe", "project_id": "*", "since": 0, "snapshot": True},
            {"action": "unsubscribe", "project_id": "p"},
            {"action": "forward", "type": "dev", "data": 1},
            {"action": "ping"},
        )
        async with (
            self.gateway(platform, issuer) as gateway,
            client_of(gateway, path="/ws?project_id=p&since=0") as client,
        ):
            assert (await client.receive())["code"] == "unauthenticated"  # what the URL asks for
            calls = stand_in.calls.copy()
            for message in asked:
                assert (await client.ask(**message))["code"] == "unauthenticated"
            assert {name for _, name in stand_in.calls - calls} <= RECEIVING
            assert not stand_in.queues["agenticai-dev-queue"].messages
            assert not gateway.registry.subscriptions

    async def test_no_broadcasts_before(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """What is for everyone is for everyone who has a token."""
        everyone = [json.dumps({"type": "notice", "data": number}) for number in (1, 2)]
        async with (
            self.gateway(platform, issuer) as gateway,
            client_of(gateway, token_of()) as inside,
            client_of(gateway) as outside,
        ):
            push(stand_in, everyone[0])
            assert (await inside.receive())["data"] == 1
            answer = await outside.ask(action="authenticate", token=token_of())
            assert answer["type"] == "authenticated"
            push(stand_in, everyone[1])
            assert (await outside.receive())["data"] == 2

    async def test_deadline(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who sends no token in time is closed with 4401; messages do not gain time."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            self.gateway(platform, issuer, auth_deadline_seconds=0.3) as gateway,
            client_of(gateway, token_of()) as inside,
            client_of(gateway) as outside,
        ):
            started = time.monotonic()

            async def chatter() -> None:
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        await outside.send(action="ping")
                        await asyncio.sleep(0.05)

            chattering = asyncio.create_task(chatter())
            assert await closed_with(outside) == (4401, "no token came in time")
            assert time.monotonic() - started > 0.25
            await chattering
            assert await inside.has_nothing_more()

    @each_forged_token
    async def test_bad_token(
        self, platform: aws_standin.Platform, issuer: Issuer, token: str
    ) -> None:
        """A forged token as a message ends the connection."""
        async with self.gateway(platform, issuer) as gateway, client_of(gateway) as client:
            await client.send(action="authenticate", token=token)
            assert await closed_with(client) == (4401, "the token was refused")
            assert not gateway.metrics.messages_forwarded

    async def test_pipelined(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What a client sends right behind its token is done after it, also with a new key."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)
        async with self.gateway(platform, issuer) as gateway, client_of(gateway) as client:
            issuer.answer = key_set(public_jwk("key-2"))
            await client.send(action="authenticate", token=token_of(key_id="key-2"))
            await client.send(action="subscribe", project_id="p")
            answers = [answer["type"] for answer in await client.receive_many(2)]
            assert answers == ["authenticated", "subscription_confirmed"]


class TestSession:
    async def test_ends_with_the_token(
        self, platform: aws_standin.Platform, issuer: Issuer, clock: Clock
    ) -> None:
        """A client is warned a minute before its token's end, and closed half a minute after."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(valid_s=600)) as client,
        ):
            clock.ahead_s = 535
            assert await client.has_nothing_more()
            clock.ahead_s = 545
            warning = await client.receive()
            assert warning["type"] == "token_expiring"
            assert 30 < warning["in_seconds"] <= 60
            clock.ahead_s = 620
            assert await client.has_nothing_more()
            clock.ahead_s = 640
            assert await closed_with(client) == (4401, "the token has expired")

    async def test_fresh_token(
        self, platform: aws_standin.Platform, issuer: Issuer, clock: Clock
    ) -> None:
        """A fresh token of the same subject goes on with the session, and is warned of again."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(valid_s=600)) as client,
            client_of(gateway, token_of(valid_s=600)) as idle,
        ):
            clock.ahead_s = 545
            assert (await client.receive())["type"] == "token_expiring"
            answer = await client.ask(action="authenticate", token=token_of(valid_s=3_600))
            assert answer["type"] == "authenticated"
            clock.ahead_s = 640
            assert (await closed_with(idle))[0] == 4401
            assert await client.has_nothing_more()
            clock.ahead_s = 3_545
            assert (await client.receive())["type"] == "token_expiring"
            clock.ahead_s = 3_640
            assert (await closed_with(client))[0] == 4401

    async def test_shorter_token(
        self, platform: aws_standin.Platform, issuer: Issuer, clock: Clock
    ) -> None:
        """The last token counts, also if it ends sooner."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(valid_s=3_600)) as client,
        ):
            await client.ask(action="authenticate", token=token_of(valid_s=600))
            clock.ahead_s = 640
            assert (await closed_with(client))[0] == 4401

    async def test_other_subject(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """Another subject's token ends the session: two people do not share one."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of("alice")) as client,
        ):
            await client.send(action="authenticate", token=token_of("bob"))
            assert (await closed_with(client))[0] == 4401

    @pytest.mark.parametrize("first", ["session", "message"])
    @pytest.mark.parametrize("last", ["close", "nothing"])
    async def test_nothing_behind_a_refused_token(
        self,
        platform: aws_standin.Platform,
        issuer: Issuer,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
        first: str,
        last: str,
    ) -> None:
        """What comes in one piece with a token that is refused is dropped, a close frame or not."""
        monkeypatch.setattr(server.Connection, "CLOSE_TIMEOUT_S", 0.5)
        token = token_of("bob") if first == "session" else FORGED["another's key"]
        piece = frame(json.dumps({"action": "authenticate", "token": token}).encode())
        piece += frame(b'{"action":"forward","type":"dev","data":1}') * 3
        if last == "close":
            piece += frame(b"\x03\xe8", CLOSE)
        opening = authorization(token_of("alice") if first == "session" else None)
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            reader, writer = await asyncio.open_connection(*gateway.address)
            writer.write(upgrade(**opening))
            async with asyncio.timeout(DEADLINE_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
                writer.write(piece)
                answers = await reader.read()
            writer.close()
            assert b"forward_confirmed" not in answers
            assert not stand_in.queues["agenticai-dev-queue"].messages
            assert not gateway.metrics.messages_forwarded
            async with client_of(gateway, token_of("alice")) as client:
                answer = await client.ask(action="forward", type="dev", data=2)
                assert answer["type"] == "forward_confirmed"
            [message] = stand_in.queues["agenticai-dev-queue"].messages
            assert json.loads(message.body)["data"] == 2

    async def test_rights_shrink(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """What a fresh token no longer grants is unsubscribed; the rest stays."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(projects=["p1", "p2"])) as client,
        ):
            for project_id in ("p1", "p2"):
                await client.ask(action="subscribe", project_id=project_id)
            await client.send(action="authenticate", token=token_of(projects=["p2"]))
            assert (await client.receive())["type"] == "authenticated"
            ended = await client.receive()
            assert ended == {"type": "unsubscription_confirmed", "project_id": "p1"}
            push(
                stand_in,
                '{"type":"x","project_id":"p1"}',
                '{"type":"x","project_id":"p2"}',
                '{"type":"x"}',
            )
            heard = {event["project_id"] for event in await client.receive_many(2)}
            assert heard == {"p2", EVERYONE}
            answer = await client.ask(action="subscribe", project_id="p1")
            assert answer["code"] == "forbidden"

    async def test_rights_shrink_in_the_middle_of_a_catch_up(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """A subscription that is still being served ends as well."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(projects=["p1"])) as client,
        ):
            await client.send(action="subscribe", project_id="p1", since=0)
            await client.send(action="authenticate", token=token_of(projects=[]))
            answers = await client.receive_many(2)
            while answers[-1]["type"] != "unsubscription_confirmed":
                answers.append(await client.receive())
            push(stand_in, '{"type":"x","project_id":"p1"}', '{"type":"x"}')
            assert (await client.receive())["project_id"] == EVERYONE

    async def test_rights_grow(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """What a fresh token grants can be used at once."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(projects=[])) as client,
        ):
            refused = await client.ask(action="subscribe", project_id="p1")
            assert refused["code"] == "forbidden"
            await client.ask(action="authenticate", token=token_of(projects=["p1"]))
            answer = await client.ask(action="subscribe", project_id="p1")
            assert answer["type"] == "subscription_confirmed"


# --- The issuer's endpoint ------------------------------------------------------------------

DEEP = b'{"keys":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
JUNK: dict[str, bytes] = {
    "nothing": b"",
    "HTML": b"<html>Service unavailable</html>",
    "no text": b"\xff\xfe\x00",
    "a list": b"[]",
    "an empty object": b"{}",
    "no keys": b'{"keys":[]}',
    "keys of no kind": b'{"keys":7}',
    "a key of no kind": b'{"keys":["x",null,7]}',
    "a key without members": b'{"keys":[{}]}',
    "members of no kind": b'{"keys":[{"kty":"RSA","n":7,"e":"AQAB","kid":"key-1"}]}',
    "a tiny key": b'{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB","kid":"key-1"}]}',
    "an algorithm of no kind": key_set(public_jwk("key-1", alg=["RS256"])),
    "a key id of no kind": key_set(public_jwk("key-1", kid=["key-1"])),
    "a shared secret": b'{"keys":[{"kty":"oct","k":"c2VjcmV0","alg":"HS256","kid":"key-1"}]}',
    "deep": DEEP,
    "large": b" " * 2_000_000 + key_set(public_jwk("key-1")),
}
each_junk = pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)

HEADS = {
    "an error": b"HTTP/1.1 500 Internal Server Error\r\n",
    "not found": b"HTTP/1.1 404 Not Found\r\n",
    "a redirect": b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n",
    "no HTTP": b"hello\r\n",
    "an encoding that is none": b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n",
}
each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)

StartsAfter = Callable[[Callable[[], Any]], Awaitable[None]]


@pytest.mark.usefixtures("impatient")
class TestKeys:
    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keys are read again whenever there is a reason to."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)

    @pytest.fixture
    def starts_after(
        self, platform: aws_standin.Platform, issuer: Issuer, caplog: pytest.LogCaptureFixture
    ) -> StartsAfter:
        """It says that it is starting, for two attempts and more, until it was mended."""

        async def starts_after(mend: Callable[[], Any]) -> None:
            async with starting(platform, issuer) as gateway:
                await eventually(lambda: caplog.text.count("keys could not be read") >= 2)
                assert b'"starting"' in await answer_to(gateway.address, request("/health"))
                assert await status_of(gateway, token_of()) == 503
                waited = mend()
                if waited is not None:
                    await waited
                await eventually(gateway.ready.is_set)
                assert await status_of(gateway, token_of()) == 101

        return starts_after

    @each_junk
    async def test_junk_at_the_start(
        self, issuer: Issuer, starts_after: StartsAfter, junk: bytes
    ) -> None:
        """A gateway without a key lets nobody in, and starts as soon as it has one."""
        good, issuer.answer = issuer.answer, junk
        await starts_after(lambda: setattr(issuer, "answer", good))

    @each_head
    async def test_errors_at_the_start(
        self, issuer: Issuer, starts_after: StartsAfter, head: bytes
    ) -> None:
        """So it does where the endpoint has nothing but errors."""
        good, issuer.head = issuer.head, head
        await starts_after(lambda: setattr(issuer, "head", good))

    async def test_down_at_the_start(self, issuer: Issuer, starts_after: StartsAfter) -> None:
        """So it does where there is no endpoint."""
        await issuer.stop()
        await starts_after(issuer.start)

    async def test_silent_at_the_start(self, issuer: Issuer, starts_after: StartsAfter) -> None:
        """So it does where the endpoint never answers."""
        good, issuer.answer = issuer.answer, None
        await starts_after(lambda: setattr(issuer, "answer", good))

    async def still_works(self, gateway: Gateway) -> None:
        """A token with an unknown key is refused, one with a known key is not."""
        assert await status_of(gateway, token_of(key_id="key-9")) == 401
        assert await status_of(gateway, token_of()) == 101

    @each_junk
    async def test_junk_later(
        self, platform: aws_standin.Platform, issuer: Issuer, junk: bytes
    ) -> None:
        """The last good keys are kept where the endpoint has none that can be used."""
        async with guarded(platform, issuer) as gateway:
            issuer.answer = junk
            await self.still_works(gateway)
            assert issuer.reads >= 2

    @each_head
    async def test_errors_later(
        self, platform: aws_standin.Platform, issuer: Issuer, head: bytes
    ) -> None:
        """They are kept while the endpoint has nothing but errors."""
        async with guarded(platform, issuer) as gateway:
            issuer.head = head
            await self.still_works(gateway)
            assert issuer.reads >= 2

    async def test_down_later(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """They are kept while the endpoint is down, and the new ones taken when it is back."""
        async with guarded(platform, issuer) as gateway:
            await issuer.stop()
            await self.still_works(gateway)
            issuer.answer = key_set(public_jwk("key-2"))
            await issuer.start()
            assert await status_of(gateway, token_of(key_id="key-2")) == 101

    async def test_silent_later(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """While the endpoint does not answer, nobody waits for it but who needs it."""
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            issuer.answer = None
            waiting = asyncio.create_task(status_of(gateway, token_of(key_id="key-9")))
            await eventually(lambda: issuer.reads == 2)
            async with client_of(gateway, token_of()) as client:
                assert await client.has_nothing_more()
            assert not waiting.done()
            assert await waiting == 401
            assert await status_of(gateway, token_of()) == 101

    async def test_gone_while_waiting(
        self, platform: aws_standin.Platform, issuer: Issuer, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A client that leaves while keys are read for it leaves nothing behind."""
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            issuer.answer = None
            waiting = asyncio.create_task(status_of(gateway, token_of(key_id="key-9")))
            await eventually(lambda: issuer.reads == 2)
            waiting.cancel()
            async with client_of(gateway) as client:
                await client.send(action="authenticate", token=token_of(key_id="key-9"))
                await (await client.socket.ping())
            await eventually(lambda: not gateway.registry.sockets)
            assert await status_of(gateway, token_of()) == 101
        assert not [record for record in caplog.records if record.exc_info]

    async def test_rotation(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A token with a key that is new gets in at once, in every way to bring one."""
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            for number, way in enumerate(("header", "message", "session"), 2):
                key_id = f"key-{number}"
                token = token_of(key_id=key_id)
                issuer.answer = key_set(public_jwk("key-1"), public_jwk(key_id))
                if way == "header":
                    assert await status_of(gateway, token) == 101
                    continue
                first = token_of() if way == "session" else None
                async with client_of(gateway, first) as client:
                    answer = await client.ask(action="authenticate", token=token)
                    assert answer["type"] == "authenticated"
            assert issuer.reads == 4

    async def test_withdrawn(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key that the issuer has withdrawn is believed no longer than its lifetime."""
        monkeypatch.setattr(server.Keys, "LIFETIME_S", 0.1)
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, token_of()) == 101
            issuer.answer = key_set(public_jwk("key-2"))
            reads = issuer.reads
            await eventually(lambda: issuer.reads >= reads + 2)
            assert await status_of(gateway, token_of()) == 401

    async def test_read_at_most_once_a_minute(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whoever invents key ids does not have the endpoint read for each."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 60.0)
        async with guarded(platform, issuer) as gateway:
            issuer.answer = key_set(public_jwk("key-2"))
            for number in range(5):
                assert await status_of(gateway, token_of(key_id=f"key-{number}x")) == 401
            assert issuer.reads == 1
            monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)
            assert await status_of(gateway, token_of(key_id="key-2")) == 101

    async def test_read_once_for_many(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Fifty who come at once with a new key all get in, by one read."""
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", DEADLINE_S)
        async with guarded(platform, issuer) as gateway:
            issuer.answer = key_set(public_jwk("key-2"))
            issuer.released.clear()
            token = token_of(key_id="key-2")
            coming = [asyncio.create_task(status_of(gateway, token)) for _ in range(50)]
            await eventually(lambda: len(unsettled(gateway)) == 50)
            issuer.released.set()
            assert await asyncio.gather(*coming) == [101] * 50
            assert issuer.reads == 2

    async def test_authenticating_again_and_again(
        self, platform: aws_standin.Platform, issuer: Issuer
    ) -> None:
        """A client cannot pile up tokens in memory while the endpoint hangs."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of()) as client,
        ):
            issuer.answer = None
            before = len(asyncio.all_tasks())
            for _ in range(200):
                await client.send(action="authenticate", token=token_of(key_id="key-9"))
            await eventually(lambda: issuer.reads == 2)
            assert len(asyncio.all_tasks()) < before + 20
            assert (await closed_with(client))[0] in (1008, 4401)


# --- Authorisation --------------------------------------------------------------------------


class TestProjects:
    async def test_forbidden(
        self, platform: aws_standin.Platform, issuer: Issuer, stand_in: StandIn
    ) -> None:
        """What the token does not grant is refused, without a look at what there is."""
        asked: tuple[Json, ...] = (
            {"action": "subscribe"},
            {"action": "subscribe", "since": 0, "epoch": "e"},
            {"action": "subscribe", "snapshot": True},
            {"action": "unsubscribe"},
            {"action": "forward", "type": "dev", "message_id": "m"},
        )
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(projects=["mine"])) as client,
            client_of(gateway, token_of(projects="*")) as other,
        ):
            item = {"PK": {"S": "PROJECT#theirs"}, "SK": {"S": "METADATA"}, "name": {"S": "x"}}
            clients = platform.client("dynamodb")
            await asyncio.to_thread(clients.put_item, TableName=platform.table_name, Item=item)
            await other.ask(action="subscribe", project_id="theirs")
            push(stand_in, '{"type":"x","project_id":"theirs"}')
            assert (await other.receive())["seq"] == 1
            calls = stand_in.calls.copy()
            for message in asked:
                answers = []
                for project_id in ("theirs", "nobodys"):
                    answer = await client.ask(**message, project_id=project_id)
                    assert answer["project_id"] == project_id
                    answers.append({**answer, "project_id": ""})
                assert answers[0]["code"] == "forbidden"
                assert answers[0] == answers[1]
            assert {name for _, name in stand_in.calls - calls} <= RECEIVING
            assert not stand_in.queues["agenticai-dev-queue"].messages
            push(stand_in, '{"type":"x","project_id":"theirs"}')
            assert (await other.receive())["seq"] == 2
            assert await client.has_nothing_more()

    async def test_in_the_url(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A project in the URL is asked for like any other."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(
                gateway, token_of(projects="mine"), "/ws?project_id=theirs&project_id=mine"
            ) as client,
        ):
            answers = {answer["type"]: answer for answer in await client.receive_many(2)}
            assert answers["error"]["code"] == "forbidden"
            assert answers["subscription_confirmed"]["project_id"] == "mine"

    @pytest.mark.parametrize(
        ("claims", "settings_"),
        [
            ({"projects": ["mine", "other"]}, {}),
            ({"projects": "other mine"}, {}),
            ({"projects": "*"}, {}),
            ({"projects": None, "app": {"may": ["mine"]}}, {"auth_projects_claim": "app.may"}),
        ],
    )
    async def test_granted(
        self, platform: aws_standin.Platform, issuer: Issuer, claims: Json, settings_: Json
    ) -> None:
        """What the token grants, in whatever form, can be used."""
        async with (
            guarded(platform, issuer, **settings_) as gateway,
            client_of(gateway, token_of(**claims)) as client,
        ):
            answer = await client.ask(action="subscribe", project_id="mine", snapshot=True)
            assert answer["type"] == "subscription_confirmed"
            assert (await client.receive())["type"] == "project_snapshot"
            answer = await client.ask(action="forward", type="dev", project_id="mine")
            assert answer["type"] == "forward_confirmed"

    async def test_everyones_project(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """All may hear what is for everyone; only who may use all projects may have it said."""
        async with guarded(platform, issuer) as gateway:
            for projects, allowed in ((["mine"], False), ("*", True)):
                async with client_of(gateway, token_of(projects=projects)) as client:
                    answer = await client.ask(action="subscribe", project_id=EVERYONE)
                    assert answer["type"] == "subscription_confirmed"
                    answer = await client.ask(action="forward", type="dev", project_id=EVERYONE)
                    assert answer.get("code") == (None if allowed else "forbidden")

    @pytest.mark.parametrize(
        ("projects", "allowed"), [("", False), ([], False), (None, False), ("p", True), ("*", True)]
    )
    async def test_forward_about_no_project(
        self,
        platform: aws_standin.Platform,
        issuer: Issuer,
        stand_in: StandIn,
        projects: Any,
        allowed: bool,
    ) -> None:
        """A forward about no project takes a token that grants one at least, whichever."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of(projects=projects)) as client,
        ):
            answer = await client.ask(action="forward", type="dev", message_id="m", data=1)
            assert answer["message_id"] == "m"
            assert answer.get("code") == (None if allowed else "forbidden")
            assert len(stand_in.queues["agenticai-dev-queue"].messages) == allowed


class TestOrigins:
    ALLOWED = ("https://app.example", "http://localhost:3000")

    @pytest.mark.parametrize(
        ("origin", "status"),
        [
            ("https://app.example", 101),
            ("http://localhost:3000", 101),
            ("https://evil.example", 403),
            ("http://app.example", 403),
            ("https://app.example:8443", 403),
            ("https://app.example.evil.example", 403),
            ("https://evil.example/https://app.example", 403),
            ("null", 403),
            ("", 403),
        ],
    )
    async def test_exact(self, platform: aws_standin.Platform, origin: str, status: int) -> None:
        """A page's origin is on the list, letter for letter, or the page stays outside."""
        async with running_gateway(platform, allowed_origins=self.ALLOWED) as gateway:
            assert await status_of(gateway, Origin=origin) == status

    async def test_programs(self, platform: aws_standin.Platform) -> None:
        """Who is no browser has no origin, and needs none."""
        async with running_gateway(platform, allowed_origins=self.ALLOWED) as gateway:
            assert await status_of(gateway) == 101

    async def test_two(self, platform: aws_standin.Platform) -> None:
        """A second origin does not come in with the first."""
        async with running_gateway(platform, allowed_origins=self.ALLOWED) as gateway:
            headers = [("Origin", "https://app.example"), ("Origin", "https://evil.example")]
            with pytest.raises(InvalidStatus) as refused:
                async with connect_websocket(
                    url_of(gateway.address), proxy=None, additional_headers=headers
                ):
                    pass
            assert refused.value.response.status_code == 403

    async def test_before_the_token(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A good token does not help a page from elsewhere."""
        async with guarded(platform, issuer, allowed_origins=self.ALLOWED) as gateway:
            assert await status_of(gateway, token_of(), Origin="https://evil.example") == 403


# --- Limits ---------------------------------------------------------------------------------


class TestLimits:
    async def test_connections_per_address(self, platform: aws_standin.Platform) -> None:
        """An address has its connections, behind a proxy too; one more is told when to come."""
        async with running_gateway(platform, max_connections_per_ip=2) as gateway:
            here = {"X_Forwarded_For": "10.0.0.1, 203.0.113.1"}
            async with client_of(gateway, **here), client_of(gateway, **here) as second:
                status, headers, _ = await refusal_of(
                    gateway, X_Forwarded_For="198.51.100.1, 203.0.113.1"
                )
                assert status == 429
                assert 1 <= int(headers["Retry-After"]) <= 5
                assert await status_of(gateway, X_Forwarded_For="203.0.113.1, 203.0.113.2") == 101
                await second.socket.close()
                await eventually(lambda: len(gateway.registry.connections) == 1)
                assert await status_of(gateway, **here) == 101

    async def test_connections_per_ipv6_customer(self, platform: aws_standin.Platform) -> None:
        """The addresses of one /64 count as one."""
        async with (
            running_gateway(platform, max_connections_per_ip=1) as gateway,
            client_of(gateway, X_Forwarded_For="2001:db8::1"),
        ):
            assert await status_of(gateway, X_Forwarded_For="2001:db8::2") == 429
            assert await status_of(gateway, X_Forwarded_For="2001:db8:0:1::2") == 101

    async def test_connections_in_all(self, platform: aws_standin.Platform) -> None:
        """A full task says so, and has room again when somebody leaves."""
        async with running_gateway(platform, max_connections=1) as gateway:
            async with client_of(gateway):
                status, headers, _ = await refusal_of(gateway, X_Forwarded_For="203.0.113.2")
                assert status == 503
                assert "Retry-After" in headers
            await eventually(lambda: not gateway.registry.connections)
            assert await status_of(gateway) == 101

    async def test_connections_that_wait_for_keys(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who had to wait for a new key does not get in over the limit."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)
        async with guarded(platform, issuer, max_connections_per_ip=3) as gateway:
            issuer.released.clear()
            issuer.answer = key_set(public_jwk("key-2"))
            async with contextlib.AsyncExitStack() as stack:

                async def enter() -> int:
                    coming = client_of(gateway, token_of(key_id="key-2"))
                    try:
                        await stack.enter_async_context(coming)
                    except InvalidStatus as exc:
                        return exc.response.status_code
                    return 101

                coming = [asyncio.create_task(enter()) for _ in range(10)]
                await eventually(lambda: len(unsettled(gateway)) == 10)
                issuer.released.set()
                assert sorted(await asyncio.gather(*coming)) == [101] * 3 + [429] * 7
                assert len(gateway.registry.connections) == 3

    async def test_subscriptions(self, platform: aws_standin.Platform) -> None:
        """A connection has so many subscriptions; everyone's own and repeated ones are free."""
        async with (
            running_gateway(platform, max_subscriptions_per_connection=2) as gateway,
            client_of(gateway) as client,
        ):
            for project_id in ("p1", "p2", "p2", EVERYONE):
                answer = await client.ask(action="subscribe", project_id=project_id)
                assert answer["type"] == "subscription_confirmed"
            answer = await client.ask(action="subscribe", project_id="p3")
            assert answer["code"] == "too_many_subscriptions"
            await client.ask(action="unsubscribe", project_id="p1")
            answer = await client.ask(action="subscribe", project_id="p3")
            assert answer["type"] == "subscription_confirmed"

    async def test_off(self, platform: aws_standin.Platform) -> None:
        """Each limit is off at 0."""
        names = ("max_connections", "max_connections_per_ip", "max_subscriptions_per_connection")
        off: dict[str, Any] = dict.fromkeys(names, 0)
        async with (
            running_gateway(platform, **off) as gateway,
            client_of(gateway) as client,
        ):
            for number in range(300):
                await client.send(action="subscribe", project_id=f"p{number}")
            for _ in range(300):
                await client.send(action="ping")
            answers = await client.receive_many(600)
            assert {answer["type"] for answer in answers} == {"pong", "subscription_confirmed"}


GUESSER = "203.0.113.1"


def in_debt(gateway: Gateway, address: str = GUESSER) -> bool:
    """Whether an address owes work, and is answered when it is paid."""
    return gateway.door.work_by_address.of(address).paid_at > gateway.now()


def waiting(gateway: Gateway) -> list[Connection]:
    """The connections that wait for their turn."""
    return [each for each in gateway.registry.sockets if not each.is_read]


def held_by(gateway: Gateway) -> list[Connection]:
    """The gateway's connections that something still refers to."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) is Connection]
    return [each for each in alive if each._gateway is gateway]


async def first_message(gateway: Gateway, token: str) -> int | None:
    """The code with which a connection from the guesser ends, whose first message has the token."""
    async with client_of(gateway, X_Forwarded_For=GUESSER) as client:
        await client.send(action="authenticate", token=token)
        return (await closed_with(client))[0]


class TestFailedAuthentications:
    """A wrong token has a price on its address's account of work."""

    @pytest.fixture
    def expensive(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """One failure takes more than is saved up, and is owed for a whole window."""
        monkeypatch.setattr(server.Door, "FAILED_AUTHENTICATION_PRICE_S", 10.0)

    @pytest.mark.parametrize("token", ["good", "bad"])
    async def test_next_is_answered_late(
        self,
        platform: aws_standin.Platform,
        issuer: Issuer,
        monkeypatch: pytest.MonkeyPatch,
        token: str,
    ) -> None:
        """Whoever comes next from the address is answered when that is paid; others, at once."""
        monkeypatch.setattr(server.Account, "WINDOW_S", 1.0)
        here = {"X_Forwarded_For": GUESSER}
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, "bad", **here) == 401
            due = gateway.door.work_by_address.of(GUESSER).paid_at
            assert due > gateway.now()
            wants = token_of() if token == "good" else "bad"
            late = asyncio.create_task(status_of(gateway, wants, **here))
            assert await status_of(gateway, token_of(), X_Forwarded_For="203.0.113.2") == 101
            assert not late.done()
            assert await late == (101 if token == "good" else 401)
            assert gateway.now() >= due

    async def test_honest_among_guessers(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who has a good token waits for those who came before it from its address, and no more."""
        monkeypatch.setattr(server.Account, "WINDOW_S", 0.3)
        order: list[int] = []

        async def come(token: str) -> None:
            order.append(await status_of(gateway, token, X_Forwarded_For=GUESSER))

        async with guarded(platform, issuer) as gateway:
            began_at = gateway.now()
            await come("bad")
            async with asyncio.TaskGroup() as coming:
                tasks = []
                for token in ("bad", "bad", token_of()):
                    tasks.append(coming.create_task(come(token)))
                    await eventually(lambda: len(waiting(gateway)) + len(order) == 1 + len(tasks))
            assert gateway.now() - began_at >= 3 * 0.3
        assert order == [401, 401, 401, 101]

    async def test_many_at_once(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """However many connections guess, they get the answers that one address can pay.

        Those that wait are in the memory budget.
        """
        price_s = 0.2 / server.Door.ADDRESS_WORK_SHARE
        monkeypatch.setattr(server.Door, "FAILED_AUTHENTICATION_PRICE_S", 0.2)
        opening = upgrade(Authorization="Bearer bad", X_Forwarded_For=GUESSER)
        count = 100
        async with (
            guarded(platform, issuer) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            began_at = gateway.now()
            peers = [await stack.enter_async_context(dialled(gateway)) for _ in range(count)]
            for peer in peers:
                peer.write(opening)
            answers = [asyncio.create_task(peer.response()) for peer in peers]
            for number, answer in enumerate(asyncio.as_completed(answers)):
                assert (await answer)[0] == 401
                least_s = number * price_s - server.Account.WINDOW_S
                assert gateway.now() - began_at >= least_s
                if least_s > 4 * price_s:
                    break
            left = len(waiting(gateway))
            assert left > count / 2
            held_bytes = gateway.ledger.clients_bytes
            assert held_bytes >= left * server.Connection.HANDSHAKE_BYTES
            for answer in answers:
                answer.cancel()

    @pytest.mark.usefixtures("expensive")
    @pytest.mark.parametrize("goes_on", [False, True], ids=["leaves", "talks"])
    async def test_gives_up_waiting(
        self, platform: aws_standin.Platform, issuer: Issuer, goes_on: bool
    ) -> None:
        """Who leaves, or talks, while its request waits is forgotten at once, and pays nothing.

        So those who come with good tokens wait only for others who are still there.
        """
        opening = upgrade(Authorization="Bearer bad", X_Forwarded_For=GUESSER)
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, "bad", X_Forwarded_For=GUESSER) == 401
            account = gateway.door.work_by_address.of(GUESSER)
            due = account.paid_at
            async with dialled(gateway) as peer:
                peer.write(opening)
                await eventually(lambda: waiting(gateway))
                if goes_on:
                    peer.write(b"x")
                    await eventually(lambda: not gateway.registry.sockets)
            await eventually(lambda: not gateway.registry.sockets)
            await eventually(lambda: not held_by(gateway))
            assert in_debt(gateway)  # it has not had its turn
            assert account.paid_at <= due + 1.0

    @pytest.mark.usefixtures("expensive")
    @pytest.mark.parametrize("way", ["header", "message"])
    async def test_keys_that_are_not_read_yet(
        self, platform: aws_standin.Platform, issuer: Issuer, way: str
    ) -> None:
        """Tokens with a new key, while keys may not be read, cost their address nothing."""
        token = token_of(key_id="key-2")
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            assert issuer.reads == 1
            for _ in range(40):
                if way == "header":
                    assert await status_of(gateway, token, X_Forwarded_For=GUESSER) == 401
                else:
                    assert await first_message(gateway, token) == 4401
            assert issuer.reads == 1
            assert not in_debt(gateway)

    @pytest.mark.usefixtures("expensive")
    async def test_keys_that_are_read_in_vain(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key that is not among those read for it is a failure like any other."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)
        token = token_of(key_id="key-2")
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, token, X_Forwarded_For=GUESSER) == 401
            assert issuer.reads == 2
            assert in_debt(gateway)

    @pytest.mark.usefixtures("expensive")
    @pytest.mark.parametrize("way", ["header", "message"])
    async def test_expired(self, platform: aws_standin.Platform, issuer: Issuer, way: str) -> None:
        """A stale page that goes on with an expired token costs its office nothing."""
        expired = token_of(valid_s=-60)
        async with guarded(platform, issuer, auth_first_message=True) as gateway:
            for _ in range(6):
                if way == "header":
                    assert await status_of(gateway, expired, X_Forwarded_For=GUESSER) == 401
                else:
                    assert await first_message(gateway, expired) == 4401
            assert not in_debt(gateway)
            forged = token_of(key=private_key("key-2"))
            assert await status_of(gateway, forged, X_Forwarded_For=GUESSER) == 401
            assert in_debt(gateway)

    async def test_first_messages(
        self, platform: aws_standin.Platform, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Wrong tokens in messages cost like those in handshakes, on many connections too."""
        monkeypatch.setattr(server.Account, "WINDOW_S", 1.0)
        async with (
            guarded(platform, issuer, auth_first_message=True) as gateway,
            client_of(gateway, X_Forwarded_For=GUESSER) as early,
            client_of(gateway, X_Forwarded_For=GUESSER) as late,
        ):
            await early.send(action="authenticate", token="bad")
            assert (await closed_with(early))[0] == 4401
            due = gateway.door.work_by_address.of(GUESSER).paid_at
            assert due > gateway.now()
            await late.send(action="authenticate", token="bad")
            assert (await closed_with(late))[0] == 4401
            assert gateway.now() >= due
            assert gateway.door.work_by_address.of(GUESSER).paid_at >= due + 1.0

    @pytest.mark.usefixtures("expensive")
    async def test_fresh_token(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A wrong fresh token is its address's to pay, and not its subject's."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of("ada"), X_Forwarded_For=GUESSER) as client,
        ):
            await client.send(action="authenticate", token="bad")
            assert (await closed_with(client))[0] == 4401
            assert in_debt(gateway)
            assert gateway.door.work_by_subject.of("ada").paid_at <= gateway.now()
            assert await status_of(gateway, token_of("ada")) == 101


# --- Nothing leaks --------------------------------------------------------------------------

SERVER = Path(server.__file__)


@contextlib.asynccontextmanager
async def process_of(environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """server.py in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SERVER),
        env={**inherited, "no_proxy": "127.0.0.1", "AWS_CONFIG_FILE": os.devnull, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


VERSION = re.compile(rb"(?im)python|websockets/|uvloop|aiohttp|^server:.*\d")


class TestNothingLeaks:
    MARK = "Zq7-marked-secret"
    NASTY = 'Zq7\n{"level":"CRITICAL"}\r\x1b[2J\x1b]0;owned\x07\u2028\u009b31m'

    async def logged_lines(
        self, process: asyncio.subprocess.Process, log: list[str], message: str
    ) -> Json:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            async for line in process.stdout:
                log.append(line.decode())
                if f'"message": "{message}"' in log[-1]:
                    return cast("Json", json.loads(log[-1]))
        raise AssertionError(f"{message!r} was not logged")

    async def be_indiscreet(self, address: tuple[str, int], stand_in: StandIn) -> list[str]:
        """Send secrets and nasty text everywhere they can be sent; the tokens among them."""
        good = token_of(self.MARK, nickname=self.MARK)
        tokens = [good, token_of(self.MARK, -60), *FORGED.values()]
        nasty_headers = {"User-Agent": self.MARK, "X-Forwarded-For": self.MARK}
        for number, token in enumerate(tokens[1:]):
            here = {"X-Forwarded-For": f"{self.MARK}, 198.51.100.{number}"}
            with contextlib.suppress(InvalidStatus):
                await connect_websocket(
                    url_of(address, f"/ws?token={token}"),
                    proxy=None,
                    additional_headers={**authorization(token), **nasty_headers, **here},
                )
        async with connect_websocket(
            url_of(address, f"/ws?project_id={self.MARK}&token={good}"),
            proxy=None,
            additional_headers={**authorization(good), **nasty_headers},
        ) as socket:
            for message in (
                {"action": "forward", "type": "dev", "data": self.MARK, "message_id": self.MARK},
                {"action": "forward", "type": self.MARK, "data": self.MARK},
                {"action": self.NASTY, "project_id": self.NASTY},
                {"action": "subscribe", "project_id": self.NASTY, "snapshot": True},
                {"action": "subscribe", "project_id": "p", "since": 2**52, "epoch": self.NASTY},
            ):
                await socket.send(json.dumps(message))
            await socket.send(self.MARK)
            await socket.send(self.MARK.encode())
            push(
                stand_in,
                json.dumps({"type": "x", "project_id": self.NASTY, "data": self.MARK}),
                json.dumps({"type": "x", "data": self.MARK}),
                json.dumps({"type": "connected", "project_id": self.NASTY, "data": self.MARK}),
                self.MARK,
            )
            async with asyncio.timeout(DEADLINE_S):
                while json.loads(await socket.recv()).get("project_id") != EVERYONE:
                    pass
            await socket.send(json.dumps({"action": "authenticate", "token": tokens[1]}))
            with contextlib.suppress(ConnectionClosed):
                async with asyncio.timeout(DEADLINE_S):
                    while True:
                        await socket.recv()
        for text in (
            f"GET /{self.MARK} HTTP/1.1\r\nHost: x\r\n\r\n",
            f"GET /ws HTTP/1.1\r\nHost: x\r\nX: {self.MARK}\x1b[2J\r\n\r\n",
            f"{self.MARK}\x1b[2J\r\n\r\n",
        ):
            assert self.MARK.encode() not in await answer_to(address, text.encode())
        return tokens

    @pytest.mark.skipif(sys.platform == "win32", reason="needs SIGTERM")
    @pytest.mark.parametrize("log_level", ["INFO", "DEBUG"])
    async def test_logs(
        self, platform: aws_standin.Platform, stand_in: StandIn, issuer: Issuer, log_level: str
    ) -> None:
        """No token, payload or data is in what the process writes, and nobody writes lines."""
        environment = {
            **platform.environment(),
            **issuer.environment,
            "DRAIN_SECONDS": "0",
            "LOG_LEVEL": log_level,
        }
        log: list[str] = []
        async with process_of(environment) as process:
            listening = await self.logged_lines(process, log, "listening")
            await self.logged_lines(process, log, "ready")
            tokens = await self.be_indiscreet((listening["host"], listening["port"]), stand_in)
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(DEADLINE_S):
                out, err = await process.communicate()
        assert process.returncode == 0
        log += out.decode().splitlines(keepends=True)
        everything = "".join(log) + err.decode()
        assert err == b""
        assert self.MARK not in everything
        for token in tokens:
            assert not any(part in everything for part in token.split(".") if len(part) > 8)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028]", everything)
        assert not [line for line in log if json.loads(line)["level"] in ("ERROR", "CRITICAL")]

    async def test_pretty_lines(self) -> None:
        """At a terminal, neither a message nor a field nor a traceback brings escapes."""
        try:
            raise ValueError(self.NASTY)
        except ValueError:
            record = logging.getLogger("gateway").makeRecord(
                "gateway", logging.ERROR, "x.py", 1, "m %s", (self.NASTY,), sys.exc_info(),
                extra={"field": self.NASTY},
            )  # fmt: skip
        shown = server.PrettyLines().format(record)
        dressed = re.sub(r"^\x1b\[\d+m|\x1b\[0m", "", shown, count=2)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", dressed)

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 200),
            ({"X_Forwarded_For": "203.0.113.1"}, 404),
            ({"X_Forwarded_For": "127.0.0.1"}, 404),
            ({"X_Forwarded_For": ""}, 404),
            ({"x_forwarded_for": "::1"}, 404),
        ],
    )
    async def test_stats(self, platform: aws_standin.Platform, headers: Json, status: int) -> None:
        """Figures are for who is on the machine, not for who comes through the balancer."""
        async with running_gateway(platform) as gateway:
            response = await answer_to(gateway.address, request("/stats", **headers))
            assert response.startswith(f"HTTP/1.1 {status} ".encode())
            assert (b"ActiveConnections" in response) == (status == 200)

    async def test_stats_and_gone(
        self, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Who asks for figures and vanishes is no traceback."""
        async with running_gateway(platform) as gateway:
            for _ in range(20):
                _, writer = await asyncio.open_connection(*gateway.address)
                writer.write(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n")
                writer.transport.abort()
            assert await status_of(gateway) == 101
            await eventually(lambda: not unsettled(gateway))
        assert not [record for record in caplog.records if record.exc_info]

    async def test_no_versions(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """No answer says what it was made with."""
        async with guarded(platform, issuer) as gateway:
            answers = [
                await answer_to(gateway.address, request(path))
                for path in ("/", "/ws", "/health", "/live", "/stats", "/none", "/ws?x")
            ]
            async with client_of(gateway, token_of()) as client:
                assert client.socket.response is not None
                answers.append(str(client.socket.response.headers).encode())
            for answer in answers:
                assert not VERSION.search(answer)

    def test_version(self) -> None:
        """A version is noticed where one can be: among headers, of any case."""
        head = b"HTTP/1.1 404 Not Found\r\n%s\r\n\r\n"
        assert VERSION.search(head % b"Server: gateway/1.2")
        assert VERSION.search(head % b"Date: x\r\nserver: nginx 1")
        assert not VERSION.search(head % b"Content-Length: 12\r\nX-Server: 7")

    async def test_errors_name_no_internals(self, platform: aws_standin.Platform) -> None:
        """An error is a sentence about the message, not about the machine."""
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            for message in ("{", "[]", '{"action":"forward"}', '{"action":"subscribe"}', "x" * 99):
                await client.socket.send(message)
                error = await client.receive()
                assert not re.search(
                    r"(?i)traceback|msgspec|python|\.py|queue\.amazonaws|127\.0\.0\.1|0x",
                    str(error),
                )

    async def test_tokens_are_not_kept(
        self, platform: aws_standin.Platform, issuer: Issuer
    ) -> None:
        """After the handshake there is no token in memory that a dump could show."""
        token = token_of(nickname="remember me")
        async with guarded(platform, issuer) as gateway:
            reader, writer = await asyncio.open_connection(*gateway.address)
            writer.write(upgrade(**authorization(token)))
            async with asyncio.timeout(DEADLINE_S):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101")
            [connection] = gateway.registry.connections.values()
            assert token not in everything_in(connection, besides=gateway)
            writer.close()

    @pytest.mark.parametrize("compression", ["deflate", None])
    async def test_messages_are_not_kept(
        self, platform: aws_standin.Platform, compression: str | None
    ) -> None:
        """What a client has sent is not in memory for as long as it then stays quiet."""
        async with (
            running_gateway(platform) as gateway,
            connect_websocket(
                url_of(gateway.address), proxy=None, compression=compression
            ) as socket,
        ):
            await socket.recv()
            [connection] = gateway.registry.connections.values()
            for message in (
                {"action": "forward", "type": "dev", "data": self.MARK * 1_000},
                {"action": "ping", "unknown": self.MARK * 1_000},
                {"action": self.MARK * 1_000},
            ):
                await socket.send(json.dumps(message))
                async with asyncio.timeout(DEADLINE_S):
                    await socket.recv()
                await eventually(lambda: not connection.in_flight)
                assert self.MARK not in everything_in(connection, besides=gateway)


def everything_in(root: object, besides: object) -> str:
    """The text of all strings that can be reached from ``root``, not by way of ``besides``."""
    found: list[str] = []
    seen = {id(besides), id(asyncio.get_running_loop())}
    waiting: list[object] = [root]
    while waiting:
        each = waiting.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType, FunctionType)):
            continue
        seen.add(id(each))
        if isinstance(each, (str, bytes, bytearray)):
            found.append(str(each))
        else:
            waiting += gc.get_referents(each)
    return " ".join(found)
