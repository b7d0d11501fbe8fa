"""Key sets, tokens, origins, request targets and networks, as honest programs have them."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

import aws_standin
import server
from server import (
    BadMessage,
    Expired,
    Gateway,
    Keys,
    NotAuthenticated,
    Settings,
    SettingsError,
    UnknownKey,
    Verifier,
)
from test_server import REQUIRED, dialled, fetch, peer_of, running_gateway, settings, upgrade
from tests.issuer import AUDIENCE, ISSUER, Issuer, key_set, private_key, public_jwk, token_of
from tests.test_access import admission_with, client_of, closed_with, guarded, issuer, status_of

__all__ = ["issuer"]


async def verifier_of(*members: Any, algorithms: tuple[str, ...] = ("RS256",)) -> Verifier:
    """A verifier with a key set of these members."""

    async def document() -> bytes:
        return key_set(*members)

    keys = Keys(document, algorithms)
    await keys.read(0.0)
    auth: dict[str, Any] = {
        "auth_issuer": ISSUER,
        "auth_audience": AUDIENCE,
        "auth_algorithms": algorithms,
    }
    return Verifier(settings(**auth), keys)


GOOD = public_jwk("key-1")

ODD_MEMBERS: dict[str, Any] = {
    "alg none": {**GOOD, "alg": "none"},
    "alg of another kind": {**GOOD, "alg": ["RS256"]},
    "kid no string": {**GOOD, "kid": ["key-1"]},
    "kid a number": {**GOOD, "kid": 1},
    "kty unknown": {"kty": "LWE", "kid": "new"},
    "kty no string": {"kty": {}, "kid": "new"},
    "encryption": {**GOOD, "use": "enc", "alg": "RSA-OAEP"},
    "use no string": {**GOOD, "use": ["sig"]},
    "half a surrogate pair": {"kty": "RSA", "kid": "\ud83d"},
    "modulus no base64": {**GOOD, "n": "\u00e9"},
    "modulus missing": {"kty": "RSA", "kid": "x", "e": "AQAB"},
    "no object": "key",
    "null": None,
}


class TestKeySets:
    @pytest.mark.parametrize("odd", ODD_MEMBERS.values(), ids=ODD_MEMBERS)
    async def test_odd_member(self, odd: Any) -> None:
        """One odd key is skipped; the others count, before it and after it."""
        verifier = await verifier_of(public_jwk("key-2"), odd, GOOD)
        assert verifier.verify(token_of()).subject == "alice"
        assert verifier.verify(token_of(key_id="key-2")).subject == "alice"

    async def test_two_types_under_one_id(self) -> None:
        """Equivalent keys of different type may share an id (RFC 7517, section 4.5)."""
        for order in (1, -1):
            members = [public_jwk("key-1"), public_jwk("key-1", "ES256")][::order]
            verifier = await verifier_of(*members, algorithms=("RS256", "ES256"))
            assert verifier.verify(token_of()).subject == "alice"
            assert verifier.verify(token_of(algorithm="ES256")).subject == "alice"

    async def test_two_keys_under_one_id(self) -> None:
        """Old and new key under one id: a token may be signed with either."""
        new = {**public_jwk("key-2"), "kid": "key-1"}
        verifier = await verifier_of(new, GOOD)
        assert verifier.verify(token_of()).subject == "alice"
        assert verifier.verify(token_of(key=private_key("key-2"))).subject == "alice"
        with pytest.raises(NotAuthenticated, match="signature") as refused:
            verifier.verify(token_of(key=private_key("key-3")))
        assert type(refused.value) is NotAuthenticated

    @pytest.mark.parametrize("key_id", [None, "key-1"])
    async def test_keys_without_id(self, key_id: str | None) -> None:
        """Several keys without an id are all tried, whether the token names one or not."""
        members = [public_jwk(name) for name in ("key-2", "key-1")]
        for member in members:
            del member["kid"]
        verifier = await verifier_of(*members, public_jwk("other", "ES256"))
        token = token_of(key_id=key_id, key=private_key("key-1"))
        assert verifier.verify(token).subject == "alice"
        with pytest.raises(UnknownKey):  # the issuer may have a new one
            verifier.verify(token_of(key_id=key_id, key=private_key("key-3")))

    async def test_key_too_short_beside_a_good_one(self) -> None:
        """A key that is too weak to be believed is passed over."""
        short = {**GOOD, "n": GOOD["n"][:100]}
        verifier = await verifier_of(short, GOOD)
        assert verifier.verify(token_of()).subject == "alice"

    async def test_a_set_of_odd_members_only(self, caplog: pytest.LogCaptureFixture) -> None:
        """A set without any key that can be used does not replace the last good one."""
        documents = [key_set(GOOD), key_set(*ODD_MEMBERS.values())]

        async def document() -> bytes:
            return documents.pop(0)

        keys = Keys(document, ("RS256",))
        await keys.read(0.0)
        await keys.read(60.0)
        assert not documents
        assert keys.find("key-1", "RS256")
        assert "could not be read" in caplog.text


class TestTokens:
    @pytest.mark.parametrize("claim", ["exp", "nbf"])
    @pytest.mark.parametrize("value", ["9999999999", True, float("nan"), float("inf"), [], {}])
    async def test_dates_that_are_none(self, claim: str, value: Any) -> None:
        """A date is a number (RFC 7519, section 2), not a string that looks like one."""
        verifier = await verifier_of(GOOD)
        with pytest.raises(NotAuthenticated) as refused:
            verifier.verify(token_of(**{claim: value}))
        assert not isinstance(refused.value, Expired)

    async def test_date_with_a_fraction(self) -> None:
        verifier = await verifier_of(GOOD)
        expires = time.time() + 600.5
        found = verifier.verify(token_of(exp=expires))
        assert found.expires_at == pytest.approx(expires + server.TOKEN_LEEWAY_S)

    async def test_half_a_surrogate_pair(
        self, platform: aws_standin.Platform, issuer: Issuer
    ) -> None:
        """A subject that no message can carry is refused at the handshake, not at each forward."""
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, token_of("\ud83d")) == 401

    async def test_subject_with_u_ffff(
        self,
        platform: aws_standin.Platform,
        issuer: Issuer,
        stand_in: aws_standin.StandIn,
    ) -> None:
        """A subject that SQS would not take as it is reaches the agent as an escape."""
        async with (
            guarded(platform, issuer) as gateway,
            client_of(gateway, token_of("a\uffff")) as client,
        ):
            answer = await client.ask(action="forward", type="dev", data=1)
            assert answer["type"] == "forward_confirmed"
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert json.loads(message.body)["user"] == "a\uffff"

    async def test_expired_only(self) -> None:
        """A token that only ended is told from one that was never good."""
        verifier = await verifier_of(GOOD)
        with pytest.raises(Expired):
            verifier.verify(token_of(valid_s=-60))
        never: dict[str, Any] = {
            "another's key": {"key": private_key("key-2")},
            "another audience": {"aud": "other"},
            "another issuer": {"iss": "https://other.example"},
        }
        for wrong, fields in never.items():
            with pytest.raises(NotAuthenticated) as refused:
                verifier.verify(token_of(valid_s=-60, **fields))
            assert not isinstance(refused.value, Expired), wrong

    @pytest.mark.parametrize("way", ["header", "message"])
    async def test_expired_token_locks_nobody_out(
        self, platform: aws_standin.Platform, issuer: Issuer, way: str
    ) -> None:
        """A stale page that goes on with an expired token costs its office nothing."""
        limits = {"max_failed_authentications_per_ip": 2, "auth_first_message": True}
        expired = token_of(valid_s=-60)
        async with guarded(platform, issuer, **limits) as gateway:
            for _ in range(6):
                if way == "header":
                    assert await status_of(gateway, expired) == 401
                    continue
                async with client_of(gateway) as client:
                    await client.send(action="authenticate", token=expired)
                    assert (await closed_with(client))[0] == 4401
            assert await status_of(gateway, token_of()) == 101
            for _ in range(2):
                assert await status_of(gateway, token_of(key=private_key("key-2"))) == 401
            assert await status_of(gateway, token_of()) == 429


class TestOrigins:
    @pytest.mark.parametrize(
        ("written", "sent"),
        [
            ("https://app.example:443", "https://app.example"),
            ("http://app.example:80", "http://app.example"),
            ("https://app.example:80", "https://app.example:80"),
            ("https://Shop.Example", "https://shop.example"),
            ("HTTPS://Shop.Example:8443", "https://shop.example:8443"),
            ("https://app.example:0443", "https://app.example"),
            ("http://[2001:DB8:0::1]:80", "http://[2001:db8::1]"),
            ("https://xn--strae-oqa.example", "https://xn--strae-oqa.example"),
            ("capacitor://localhost", "capacitor://localhost"),
            ("chrome-extension://abcdefghijklmnop", "chrome-extension://abcdefghijklmnop"),
        ],
    )
    async def test_as_browsers_write_them(
        self, platform: aws_standin.Platform, written: str, sent: str
    ) -> None:
        """What an operator may write lets in the page whose browser writes it in its own way."""
        allowed = Settings.from_mapping({**REQUIRED, "ALLOWED_ORIGINS": written}).allowed_origins
        async with running_gateway(platform, allowed_origins=allowed) as gateway:
            assert await status_of(gateway, Origin=sent) == 101
            assert await status_of(gateway, Origin="https://evil.example") == 403

    @pytest.mark.parametrize("written", ["https://stra\u00dfe.example", "https://app.ex\u0430mple"])
    def test_not_ascii(self, written: str) -> None:
        """A host in other letters is refused: nobody here knows which domain is meant."""
        with pytest.raises(SettingsError, match=r"ALLOWED_ORIGINS .*xn--"):
            Settings.from_mapping({**REQUIRED, "ALLOWED_ORIGINS": written})

    @pytest.mark.parametrize(
        "written",
        [
            "null",
            "app.example",
            "https://",
            "https://app.example/",
            "https://app.example:99999",
            "https://app.example:\u0664\u0664\u0663",
            "https://user@app.example",
            "https://[1::2::3]",
            "https://*.app.example",
        ],
    )
    def test_none(self, written: str) -> None:
        """What no browser sends is refused at start."""
        with pytest.raises(SettingsError, match="ALLOWED_ORIGINS"):
            Settings.from_mapping({**REQUIRED, "ALLOWED_ORIGINS": written})


class TestTargets:
    @pytest.mark.parametrize(
        "start", ["http://gateway.example", "HTTPS://h:8080", "http://[::1]:1"]
    )
    async def test_absolute_form(self, gateway: Gateway, start: str) -> None:
        """A server must take a whole URL as a request's target (RFC 9112, section 3.2.2)."""
        assert (await fetch(gateway, f"{start}/health"))[0] == 200
        assert (await fetch(gateway, f"{start}/nothing"))[0] == 404
        assert (await fetch(gateway, f"{start}"))[0] != 404
        async with peer_of(gateway, upgrade(f"{start}/ws?project_id=p")) as peer:
            assert (await peer.receive())["project_id"] == "p"

    @pytest.mark.parametrize(
        ("target", "parts"),
        [
            ("/ws?a=b?c", ("/ws", "a=b?c")),
            ("ws://h/ws", ("/ws", "")),
            ("wss://h?x", ("/", "x")),
            ("http://h", ("/", "")),
            ("/http://h/ws", ("/http://h/ws", "")),
            ("ftp://h/ws", ("ftp://h/ws", "")),
            ("http:///ws", ("http:///ws", "")),
        ],
    )
    def test_split(self, target: str, parts: tuple[str, str]) -> None:
        assert server.split_target(target) == parts


class TestQueryStrings:
    @pytest.mark.parametrize(
        ("query", "name"),
        [
            ("project_id=%ff", "project_id"),
            ("project_id=a%fe&project_id=b", "project_id"),
            ("project_id=%ED%A0%BD", "project_id"),
            ("project_id=p&since=0&epoch=%80", "epoch"),
        ],
    )
    async def test_no_utf8(self, gateway: Gateway, query: str, name: str) -> None:
        """Two ids that are no UTF-8 would meet in one project: neither is subscribed to."""
        async with peer_of(gateway, upgrade(f"/ws?{query}")) as peer:
            answer = await peer.receive()
            assert (answer["code"], answer["message"]) == (
                "invalid_field",
                f'"{name}" in the URL is not UTF-8.',
            )
            assert (await peer.ask(action="ping"))["type"] == "pong"
            assert list(gateway.registry.channels) == ["*"]

    async def test_what_is_not_ours(self, gateway: Gateway) -> None:
        """What other programs put into a URL is no concern of the gateway's."""
        async with peer_of(gateway, upgrade("/ws?utm=%ff&%fe=1&project_id=%EF%BF%BD")) as peer:
            assert (await peer.receive())["project_id"] == "\ufffd"

    @pytest.mark.parametrize(
        "since", ["\u0663", "\uff13", "1_0", "+1", " 1", "1.0", "", "-1", "0x1"]
    )
    def test_since(self, since: str) -> None:
        """A number is digits, ASCII's alone; the rest is left for the refusal of the field."""
        [message] = server.subscriptions_in(f"project_id=p&since={since.replace('+', '%2B')}")
        assert message["since"] == since
        with pytest.raises(BadMessage):
            server.decode_message(server.encode(message))


class TestHeaderLines:
    async def test_long_token(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """A header line may be as long as the page promises for the whole handshake."""
        token = token_of(groups="g" * 8_000)
        assert 10_000 < len(token) < server.HANDSHAKE_MAX_BYTES - 1_000
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, token) == 101

    async def test_too_long(self, gateway: Gateway) -> None:
        async with dialled(gateway) as peer:
            peer.write(upgrade(X_Long="x" * (server.HANDSHAKE_MAX_BYTES + 10)))
            assert (await peer.response())[0] == 431


class TestNetworks:
    """One customer may have all of an IPv6 /48, which has 65,536 /64s."""

    @staticmethod
    def customers(count: int, site: str = "2001:db8:1") -> list[str]:
        return [server.client_address("", [f"{site}:{number:x}::1"], 1) for number in range(count)]

    def test_connections(self) -> None:
        """Many /64s of one /48 have together what some addresses have; others are not concerned."""
        admission = admission_with(max_connections_per_ip=2)
        inside = self.customers(2 * server.SITE_ADDRESSES)
        for address in inside:
            assert admission.refusal(address, 0.0) is None
            admission.entered(address)
        [one_more, *_] = self.customers(1, "2001:db8:1:ffff")
        assert admission.refusal(self.customers(99)[-1], 0.0) is not None
        assert admission.refusal(one_more, 0.0) is not None
        assert admission.refusal(self.customers(1, "2001:db8:2")[0], 0.0) is None
        for address in inside:
            admission.left(address)
        assert admission.refusal(one_more, 0.0) is None
        assert not admission._inside_by_address

    def test_handshakes(self) -> None:
        admission = admission_with(max_handshakes_per_second_per_ip=1)
        answers = [admission.refusal(address, 0.0) for address in self.customers(64)]
        assert answers.count(None) == 2 * server.SITE_ADDRESSES
        assert admission.refusal(self.customers(1, "2001:db8:2")[0], 0.0) is None

    def test_failed_authentications(self) -> None:
        admission = admission_with(max_failed_authentications_per_ip=1)
        for address in self.customers(server.SITE_ADDRESSES):
            assert admission.refusal(address, 0.0) is None
            admission.failed(address, 0.0)
        assert admission.refusal(self.customers(99)[-1], 0.0) is not None
        assert admission.refusal(self.customers(99)[-1], 60.0) is None

    def test_ipv4(self) -> None:
        """An IPv4 address is nobody's but its own."""
        assert list(server.scopes_of("203.0.113.1")) == [("203.0.113.1", 1)]
        assert list(server.scopes_of("no address: at all")) == [("no address: at all", 1)]

    async def test_through_a_proxy(self, platform: aws_standin.Platform) -> None:
        async with running_gateway(platform, max_handshakes_per_second_per_ip=1) as gateway:
            statuses = [
                await status_of(gateway, X_Forwarded_For=f"2001:db8:7:{number:x}::1")
                for number in range(4 * server.SITE_ADDRESSES)
            ]
        assert statuses.count(101) >= 2 * server.SITE_ADDRESSES
        assert 429 in statuses
