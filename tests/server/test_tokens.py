"""Whose tokens are: remembered, and forgotten when they end or the issuer's keys change."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
from typing import Any

import jwt
import pytest

import server
from server import Keys, NotAuthenticated, Principal, Verifier
from tests.issuer import AUDIENCE, ISSUER, key_set, private_key, public_jwk, token_of
from tests.server.gateways import settings
from tests.waiting import eventually


class Desk:
    """Where whose tokens are is asked for.

    Attributes:
        looks: how often a token was looked at.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.document = key_set(public_jwk("key-1"))
        auth = settings(auth_jwks_url="http://localhost/k", auth_issuer=ISSUER)
        auth = dataclasses.replace(auth, auth_audience=AUDIENCE)
        self.tokens = Verifier(auth, Keys(self._fetch, ("RS256",)))
        self.answers: list[Principal | NotAuthenticated] = []
        self.looks = 0
        header_of = jwt.get_unverified_header

        def counted(token: str) -> dict[str, Any]:
            self.looks += 1
            return header_of(token)

        monkeypatch.setattr(jwt, "get_unverified_header", counted)

    async def _fetch(self) -> bytes:
        return self.document

    def ask(self, token: str) -> Principal | NotAuthenticated | None:
        """The answer, if it comes at once."""
        before = len(self.answers)
        self.tokens.check(token, self.answers.append)
        return self.answers[-1] if len(self.answers) > before else None


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    found = Desk(monkeypatch)
    await found.tokens.first_keys()
    return found


class TestTokens:
    async def test_verified_once(self, desk: Desk) -> None:
        """A client that returns is not verified again."""
        token = token_of("ada")
        first, again = desk.ask(token), desk.ask(token)
        assert isinstance(first, Principal)
        assert again is first
        assert desk.looks == 1

    async def test_ends(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token that was remembered ends when it says."""
        token = token_of("ada", valid_s=10)
        assert isinstance(desk.ask(token), Principal)
        later = time.time() + 10 + server.TOKEN_LEEWAY_S + 1
        monkeypatch.setattr(time, "time", lambda: later)
        assert isinstance(desk.ask(token), server.Expired)

    async def test_keys_change(self, desk: Desk) -> None:
        """When the issuer withdraws a key, its tokens are nobody's, remembered or not."""
        token = token_of("ada")
        assert isinstance(desk.ask(token), Principal)
        await desk.tokens.keys.read(asyncio.get_running_loop().time())  # the same keys
        assert isinstance(desk.ask(token), Principal)
        assert desk.looks == 1
        desk.document = key_set(public_jwk("key-2"))
        await desk.tokens.keys.read(asyncio.get_running_loop().time())
        assert isinstance(desk.ask(token), NotAuthenticated)

    async def test_refusals_are_not_remembered(self, desk: Desk) -> None:
        """A token that is refused costs no memory, and may be good when the keys are read anew."""
        for looks in (1, 2):
            refused = desk.ask("nonsense")
            assert type(refused) is NotAuthenticated  # which counts
            assert desk.looks == looks

    async def test_new_key(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """A token with a key that is not known waits for the keys; then its failure counts."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0.0)
        token = token_of("ada", key_id="key-2", key=private_key("key-2"))
        assert desk.ask(token) is None
        await eventually(lambda: desk.answers)
        refused = desk.answers.pop()
        assert type(refused) is NotAuthenticated
        desk.document = key_set(public_jwk("key-1"), public_jwk("key-2"))
        assert desk.ask(token) is None
        await eventually(lambda: desk.answers)
        assert isinstance(desk.answers[-1], Principal)

    async def test_keys_may_not_be_read(self, desk: Desk) -> None:
        """While the keys may not be read anew, an unknown one is held against nobody."""
        token = token_of("ada", key_id="key-2", key=private_key("key-2"))
        assert isinstance(desk.ask(token), server.UnknownKey)

    async def test_memory_is_bounded(self, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only so many are remembered, the newest, and never the tokens themselves."""
        monkeypatch.setattr(server.Verifier, "REMEMBERED", 3)
        tokens = [token_of(str(number)) for number in range(5)]
        for token in tokens:
            desk.ask(token)
        for token in tokens[2:]:
            desk.ask(token)
        assert desk.looks == 5
        desk.ask(tokens[1])
        assert desk.looks == 6
        kept = [each for each in gc.get_objects() if type(each) is dict]
        assert not any(token in each for each in kept for token in tokens)
