"""aiohttp: ``WebSocketResponse`` and ``send_str()`` to each, as in its examples."""

from __future__ import annotations

import asyncio

from aiohttp import web

from bench.peers.feed import serve_feed

CLIENTS: set[web.WebSocketResponse] = set()


async def handler(request: web.Request) -> web.WebSocketResponse:
    websocket = web.WebSocketResponse()
    await websocket.prepare(request)
    CLIENTS.add(websocket)
    try:
        async for _message in websocket:
            pass
    finally:
        CLIENTS.discard(websocket)
    return websocket


async def broadcast(message: str) -> None:
    for websocket in set(CLIENTS):
        await websocket.send_str(message)


async def main() -> None:
    app = web.Application()
    app.add_routes([web.get("/ws", handler)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=4096)
    await site.start()
    await serve_feed(runner.addresses[0][1], broadcast)


if __name__ == "__main__":
    asyncio.run(main())
