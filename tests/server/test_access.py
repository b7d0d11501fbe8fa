"""Key sets, tokens, origins, request targets and networks, as honest programs have them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hmac
import ipaddress
import json
import pickle
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import example, given
from hypothesis import strategies as st

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
from tests.issuer import AUDIENCE, ISSUER, Issuer, key_set, private_key, public_jwk, token_of
from tests.server.aws import Json
from tests.server.gateways import REQUIRED, running_gateway, settings
from tests.server.guarded import admission_with, client_of, guarded, status_of
from tests.server.peers import dialled, fetch, peer_of, upgrade


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
    @pytest.mark.parametrize(
        "value", ["9999999999", True, float("nan"), float("inf"), float("-inf"), [], {}]
    )
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

    async def test_date_without_end(self, platform: aws_standin.Platform, issuer: Issuer) -> None:
        """Issuers write "never" as the largest number that they know."""
        async with guarded(platform, issuer) as gateway:
            assert await status_of(gateway, token_of(exp=2**63 - 1)) == 101

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
        inside = self.customers(2 * server.Admission.SITE_ADDRESSES)
        for address in inside:
            assert admission.refusal(address) is None
            admission.count(address, +1)
        [one_more, *_] = self.customers(1, "2001:db8:1:ffff")
        assert admission.refusal(self.customers(99)[-1]) is not None
        assert admission.refusal(one_more) is not None
        assert admission.refusal(self.customers(1, "2001:db8:2")[0]) is None
        for address in inside:
            admission.count(address, -1)
        assert admission.refusal(one_more) is None
        assert b"2001:db8" not in pickle.dumps(admission)

    def test_ipv4(self) -> None:
        """An IPv4 address is nobody's but its own."""
        assert list(server.Admission.scopes_of("203.0.113.1")) == [("203.0.113.1", 1)]
        assert list(server.Admission.scopes_of("no address: at all")) == [("no address: at all", 1)]

    async def test_through_a_proxy(self, platform: aws_standin.Platform) -> None:
        most = server.Admission.SITE_ADDRESSES
        async with (
            running_gateway(platform, max_connections_per_ip=1) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            for number in range(most):
                opening = upgrade(X_Forwarded_For=f"2001:db8:7:{number:x}::1")
                await stack.enter_async_context(peer_of(gateway, opening))
            assert await status_of(gateway, X_Forwarded_For="2001:db8:7:ffff::1") == 429
            assert await status_of(gateway, X_Forwarded_For="2001:db8:8::1") == 101


class TestAccess:
    @given(octets=st.lists(st.sampled_from(["0", "00", "7", "10", "99", "249", "256", "", "1\n"])))
    @example(octets=["255", "250", "199", "0"])
    def test_plain_addresses(self, octets: list[str]) -> None:
        """What is taken as an IPv4 address without being parsed is one, in its only spelling."""
        claimed = ".".join(octets)
        try:
            expected = str(ipaddress.IPv4Address(claimed.strip()))
        except ValueError:
            expected = "10.0.0.1"
        assert server.client_address("10.0.0.1", [claimed], 1) == expected

    def test_client_address_of_an_odd_socket(self) -> None:
        """A peer without an address of its own still has limits."""
        assert server.client_address("", [], 1) == ""

    def test_projects_in_nested_claim(self) -> None:
        """A claim may be nested, or have dots in its name."""
        url = "https://x.example/projects"
        assert server.projects_in({"a": {"b": ["p"]}}, "a.b") == frozenset("p")
        assert server.projects_in({url: ["p"]}, url) == frozenset("p")
        assert server.projects_in({"a": "b"}, "a.b") == frozenset()


class Signer:
    """Signs tokens, and publishes the keys for them.

    Attributes:
        document: what is read as the key set; an exception is raised.
    """

    def __init__(self, **keys: Any) -> None:
        self.keys = keys
        self.reads = 0
        self.document: bytes | Exception = json.dumps({
            "keys": [
                {**jwt.get_algorithm_by_name(alg(key)).to_jwk(key.public_key(), as_dict=True),
                 "kid": key_id, "alg": alg(key)}
                for key_id, key in keys.items()
            ]
        }).encode()  # fmt: skip

    async def fetch(self) -> bytes:
        self.reads += 1
        await asyncio.sleep(0)
        if isinstance(self.document, Exception):
            raise self.document
        return self.document

    def token(self, key_id: str = "rsa", header: Json | None = None, **changes: Any) -> str:
        """A good token, but for ``changes``; a claim that is ``None`` is left out."""
        claims = {
            "sub": "ada",
            "iss": "https://issuer.example",
            "aud": "gateway",
            "exp": int(time.time()) + 600,
            "projects": ["p"],
            **changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        key = self.keys[key_id]
        return jwt.encode(claims, key, alg(key), headers={"kid": key_id, **(header or {})})


def alg(key: Any) -> str:
    """The algorithm that a private key is for."""
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256"
    return "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "EdDSA"


@functools.cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    """Keys are dear: tests share them."""
    return rsa.generate_private_key(65_537, 2_048 + 8 * number)


class TestVerifier:
    @pytest.fixture
    def issuer(self) -> Signer:
        return Signer(rsa=rsa_key(0))

    @pytest.fixture
    def auth(self) -> Settings:
        return settings(
            auth_jwks_url="https://issuer.example/keys",
            auth_issuer="https://issuer.example",
            auth_audience="gateway",
        )

    @pytest.fixture
    async def verifier(self, issuer: Signer, auth: Settings) -> server.Verifier:
        keys = server.Keys(issuer.fetch, auth.auth_algorithms)
        await keys.read(0.0)
        return server.Verifier(auth, keys)

    async def test_good(self, verifier: server.Verifier, issuer: Signer) -> None:
        """A good token says whose it is, what it allows, and until when."""
        exp = int(time.time()) + 60
        principal = verifier.verify(issuer.token(exp=exp))
        assert principal.subject == "ada"
        assert principal.projects == frozenset("p")
        assert principal.expires_at == exp + server.TOKEN_LEEWAY_S

    @pytest.mark.parametrize(
        "changes",
        [
            {"exp": 1},
            {"exp": None},
            {"exp": "soon"},
            {"exp": 1e400},
            {"nbf": 2**40},
            {"iss": "https://other.example"},
            {"iss": None},
            {"aud": "other"},
            {"aud": None},
            {"sub": None},
            {"sub": 5},
        ],
        ids=str,
    )
    async def test_bad_claims(
        self, verifier: server.Verifier, issuer: Signer, changes: Json
    ) -> None:
        """A token that has expired, or is for or from somebody else, is refused."""
        token = issuer.token(**changes)
        with pytest.raises(NotAuthenticated) as caught:
            verifier.verify(token)
        assert not any(part in str(caught.value) for part in token.split("."))

    async def test_forgeries(self, verifier: server.Verifier, issuer: Signer) -> None:
        """A token that says itself how it is to be checked gets nowhere."""
        good = issuer.token()
        head, body, signature = good.split(".")
        public = issuer.keys["rsa"].public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"rsa"}').decode().rstrip("=")
        as_secret = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"rsa"}').decode().rstrip("=")
        mac = hmac.digest(pem, f"{as_secret}.{body}".encode(), "sha256")
        forged = [
            "",
            "a.b.c",
            f"{none}.{body}.",
            f"{none}.{body}.{signature}",
            f"{head}.{body}.",
            f"{head}.{body}x.{signature}",
            f"{as_secret}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}",
            Signer(rsa=rsa_key(1)).token(),
            "\u00e9" * 50,
            "[" * 10_000,
        ]
        for token in forged:
            with pytest.raises(NotAuthenticated):
                verifier.verify(token)
        assert verifier.verify(good).subject == "ada"

    async def test_other_algorithm(self, issuer: Signer, auth: Settings) -> None:
        """Only the algorithms of the settings count, whatever keys the issuer has."""
        issuer = Signer(rsa=rsa_key(0), ec=ec.generate_private_key(ec.SECP256R1()))
        keys = server.Keys(issuer.fetch, auth.auth_algorithms)
        await keys.read(0.0)
        with pytest.raises(NotAuthenticated, match="algorithm"):
            server.Verifier(auth, keys).verify(issuer.token("ec"))
        both = dataclasses.replace(auth, auth_algorithms=("RS256", "ES256", "EdDSA"))
        keys = server.Keys(issuer.fetch, both.auth_algorithms)
        await keys.read(0.0)
        assert server.Verifier(both, keys).verify(issuer.token("ec")).subject == "ada"

    async def test_other_audience_claim(
        self, verifier: server.Verifier, issuer: Signer, auth: Settings
    ) -> None:
        """The audience may be in another claim, as in Cognito's access tokens."""
        auth = dataclasses.replace(auth, auth_audience_claim="client_id")
        cognito = server.Verifier(auth, verifier.keys)
        assert cognito.verify(issuer.token(aud=None, client_id="gateway")).subject == "ada"
        for changes in ({"client_id": "other"}, {"client_id": None}, {"client_id": ["gateway"]}):
            with pytest.raises(NotAuthenticated):
                cognito.verify(issuer.token(**changes))

    async def test_unknown_key(self, verifier: server.Verifier) -> None:
        """A key that is not known is another matter than a bad token: it may be new."""
        with pytest.raises(UnknownKey):
            verifier.verify(Signer(new=rsa_key(1)).token("new"))

    async def test_no_key_id(self, verifier: server.Verifier, issuer: Signer) -> None:
        """A token that names no key is checked with the only one there is."""
        claims = jwt.decode(issuer.token(), options={"verify_signature": False})
        assert verifier.verify(jwt.encode(claims, issuer.keys["rsa"], "RS256")).subject == "ada"

    async def test_keys_are_read_once_for_all(self, issuer: Signer) -> None:
        """Those who ask for the keys at the same time wait for one answer."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        assert keys.document == b""
        await asyncio.gather(*(keys.read(0.0) for _ in range(10)))
        assert keys.document
        assert issuer.reads == 1
        assert not keys.may_read_again(server.Keys.REFRESH_S - 1)
        assert keys.may_read_again(server.Keys.REFRESH_S)

    @pytest.mark.parametrize(
        "document",
        [
            b"",
            b"<html>",
            b"[]",
            b"{}",
            b'{"keys":5}',
            b'{"keys":[]}',
            b'{"keys":[5]}',
            b'{"keys":[{"kty":"RSA","kid":"rsa","n":"AQAB","e":"!"}]}',
            b'{"keys":[{"kty":"oct","kid":"rsa","k":"c2VjcmV0"}]}',
            OSError("unreachable"),
            TimeoutError(),
        ],
        ids=str,
    )
    async def test_last_good_keys_stay(
        self, issuer: Signer, document: bytes | Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An issuer that answers nonsense, or not at all, does not lock everybody out."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        await keys.read(0.0)
        issuer.document = document
        await keys.read(60.0)
        assert [key.key_id for key in keys.find("rsa", "RS256")] == ["rsa"]
        assert "the issuer's keys could not be read" in caplog.text

    async def test_withdrawn_key(self, issuer: Signer) -> None:
        """A key that the issuer no longer publishes is honoured no longer."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        await keys.read(0.0)
        issuer.document = Signer(new=rsa_key(1)).document
        await keys.read(60.0)
        assert [key.key_id for key in keys.find("new", "RS256")] == ["new"]
        with pytest.raises(UnknownKey):
            keys.find("rsa", "RS256")
