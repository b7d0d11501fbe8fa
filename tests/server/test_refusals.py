"""What a page may read by `fetch` of a gateway that refused its WebSocket."""

from __future__ import annotations

import aws_standin
from tests.issuer import Issuer
from tests.server.gateways import running_gateway
from tests.server.guarded import guarded
from tests.server.peers import fetch

EVERYBODY = {"access-control-allow-origin": "*"}
FROM_ELSEWHERE = {"Origin": "https://elsewhere.example"}


async def test_why_a_page_was_refused(platform: aws_standin.Platform) -> None:
    """A page of any origin can tell a wrong path, a foreign origin and a well gateway apart."""
    async with running_gateway(platform, allowed_origins=("https://app.example",)) as gateway:
        for path, expected in (("/health", 200), ("/elsewhere", 404), ("/ws", 403)):
            status, headers, _ = await fetch(gateway, path, **FROM_ELSEWHERE)
            assert (status, EVERYBODY.items() <= headers.items()) == (expected, True)


async def test_that_a_token_is_needed(platform: aws_standin.Platform, issuer: Issuer) -> None:
    """And that it lacks a token."""
    async with guarded(platform, issuer) as gateway:
        status, headers, _ = await fetch(gateway, "/ws", **FROM_ELSEWHERE)
        assert (status, EVERYBODY.items() <= headers.items()) == (401, True)


async def test_figures_are_for_no_page(platform: aws_standin.Platform) -> None:
    """A page that is open on the machine of the gateway must not read its figures."""
    async with running_gateway(platform) as gateway:
        status, headers, _ = await fetch(gateway, "/stats", **FROM_ELSEWHERE)
        assert status == 200
        assert "access-control-allow-origin" not in headers
