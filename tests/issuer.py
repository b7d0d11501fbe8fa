"""An issuer of tokens: its keys, the endpoint where the public ones are read, and forgers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, cast

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

Json = dict[str, Any]
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey

ISSUER = "https://issuer.example"
AUDIENCE = "agenticai"


def private_key(key_id: str, algorithm: str = "RS256") -> PrivateKey:
    """The key of that id, the same each time: to make an RSA key takes a while."""
    return _made(key_id, algorithm)


@functools.cache
def _made(key_id: str, algorithm: str) -> PrivateKey:  # noqa: ARG001
    if algorithm == "RS256":
        return rsa.generate_private_key(65_537, 2_048)
    if algorithm == "ES256":
        return ec.generate_private_key(ec.SECP256R1())
    return ed25519.Ed25519PrivateKey.generate()


def public_pem(key: PrivateKey) -> bytes:
    """What everybody knows of a key, as a forger takes it for a shared secret."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def public_jwk(key_id: str, algorithm: str = "RS256", **members: Any) -> Json:
    """A key of the key set (RFC 7517, section 4)."""
    public = private_key(key_id, algorithm).public_key()
    jwk: Json
    if isinstance(public, rsa.RSAPublicKey):
        jwk = RSAAlgorithm.to_jwk(public, as_dict=True)
    elif isinstance(public, ec.EllipticCurvePublicKey):
        jwk = ECAlgorithm.to_jwk(public, as_dict=True)
    else:
        jwk = OKPAlgorithm.to_jwk(public, as_dict=True)
    return {**jwk, "kid": key_id, "alg": algorithm, "use": "sig", **members}


def key_set(*keys: Json) -> bytes:
    return json.dumps({"keys": keys}).encode()


def claims_of(subject: str = "alice", valid_s: float = 600, **claims: Any) -> Json:
    """The claims of a good token; a claim that is ``None`` is left out."""
    now = int(time.time())
    found = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": subject,
        "iat": now,
        "exp": now + int(valid_s),
        "projects": "*",
        **claims,
    }
    return {name: value for name, value in found.items() if value is not None}


def token_of(
    subject: str = "alice",
    valid_s: float = 600,
    *,
    key_id: str | None = "key-1",
    key: PrivateKey | None = None,
    algorithm: str = "RS256",
    **claims: Any,
) -> str:
    """A token, good but for what the arguments say: another ``key``, other claims, no key id."""
    headers = {} if key_id is None else {"kid": key_id}
    key = key or private_key(key_id or "key-1", algorithm)
    return jwt.encode(claims_of(subject, valid_s, **claims), key, algorithm, headers)


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def unsigned_token(header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
    """A token's first two parts, without the point after them."""
    return ".".join(base64url(json.dumps(part).encode()) for part in (header, claims))


def forged_tokens() -> dict[str, str]:
    """Tokens nobody may believe, by what is wrong with them."""
    signed = token_of()
    head, body, signature = signed.split(".")
    raised = base64url(json.dumps(claims_of("mallory")).encode())
    none = {"alg": "none", "typ": "JWT", "kid": "key-1"}
    confused = unsigned_token({"alg": "HS256", "typ": "JWT", "kid": "key-1"}, claims_of())
    pem = public_pem(private_key("key-1"))
    stranger = private_key("stranger")
    embedded = {"alg": "RS256", "kid": "key-1", "jwk": public_jwk("stranger")}
    return {
        "another's key": token_of(key=stranger),
        "other claims": f"{head}.{raised}.{signature}",
        "no signature": f"{head}.{body}.",
        "half a signature": signed[: -len(signature) // 2],
        "alg none": unsigned_token(none, claims_of()) + ".",
        "alg None": unsigned_token({**none, "alg": "None"}, claims_of()) + ".",
        "alg none, signed": unsigned_token(none, claims_of()) + "." + signature,
        "no alg": unsigned_token({"kid": "key-1"}, claims_of()) + "." + signature,
        "public key as secret": confused
        + "."
        + base64url(hmac.digest(pem, confused.encode(), hashlib.sha256)),
        "key in the token": jwt.encode(claims_of(), stranger, "RS256", embedded),
        "algorithm not allowed": jwt.encode(
            claims_of(), private_key("key-1"), "RS512", {"kid": "key-1"}
        ),
        "unknown critical header": jwt.encode(
            claims_of(), private_key("key-1"), "RS256", {"kid": "key-1", "crit": ["x"], "x": 1}
        ),
        "expired": token_of(valid_s=-60),
        "not yet valid": token_of(valid_s=86_400, nbf=int(time.time()) + 43_200),
        "without end": token_of(exp=None),
        "endless": token_of(exp=10**400),
        "end of no kind": token_of(exp="tomorrow"),
        "wrong issuer": token_of(iss="https://evil.example"),
        "issuer with a suffix": token_of(iss=ISSUER + "/"),
        "no issuer": token_of(iss=None),
        "wrong audience": token_of(aud="somebody-else"),
        "no audience": token_of(aud=None),
        "no subject": token_of(sub=None),
        "subject of no kind": jwt.encode(
            {**claims_of(), "sub": 5}, private_key("key-1"), "RS256", {"kid": "key-1"}
        ),
        "key id of no kind": unsigned_token({"alg": "RS256", "kid": ["key-1"]}, claims_of())
        + "."
        + signature,
        "unknown key": token_of(key_id="key-404"),
        "no token": "not-a-token",
        "points": "..",
        "deep": base64url(b"[" * 3_000) + "." + body + "." + signature,
        "large": "x" * 6_000,
    }


class Issuer:
    """The endpoint with the public keys.

    Attributes:
        answer: the body it answers with; ``None``: it takes requests and never answers.
        released: while it is not set, answers wait.
        head: what comes before the body's length; changed, it can be no HTTP at all.
        reads: how many requests came.
        url: where it is, also after it was stopped.
    """

    def __init__(self) -> None:
        self.answer: bytes | None = key_set(public_jwk("key-1"))
        self.head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        self.reads = 0
        self.released = asyncio.Event()
        self.released.set()
        self.url = ""
        self._port = 0
        self._server: asyncio.Server | None = None
        self._answering: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._respond, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/.well-known/jwks.json"

    async def stop(self) -> None:
        """Be down: who calls is refused, who waits is cut off."""
        if self._server is not None:
            self._server.close()
            answering = dict(self._answering)
            for task, writer in answering.items():
                writer.transport.abort()
                task.cancel()
            await asyncio.gather(*answering)
            await self._server.wait_closed()
            self._server = None

    async def _respond(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = cast("asyncio.Task[None]", asyncio.current_task())
        self._answering[task] = writer
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.reads += 1
            await self.released.wait()
            if self.answer is None:
                await reader.read()  # until the other side gives up
            else:
                size = b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(self.answer)
                writer.write(self.head + size + self.answer)
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            del self._answering[task]
            writer.close()

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of `server.Settings` for a gateway that believes this issuer."""
        return {"auth_jwks_url": self.url, "auth_issuer": ISSUER, "auth_audience": AUDIENCE}

    @property
    def environment(self) -> dict[str, str]:
        """The same for a gateway in a process of its own."""
        return {name.upper(): value for name, value in self.settings.items()}


@contextlib.asynccontextmanager
async def running_issuer() -> AsyncIterator[Issuer]:
    issuer = Issuer()
    await issuer.start()
    try:
        yield issuer
    finally:
        await issuer.stop()
