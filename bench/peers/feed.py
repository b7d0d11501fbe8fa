"""What the Python peers have in common: events come in as lines, and are broadcast one by one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable


async def serve_feed(port: int, broadcast: Callable[[str], Awaitable[None] | None]) -> None:
    """Announce the WebSocket port, then call `broadcast` with each line that comes in."""

    async def on_feed(reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            waiting = broadcast(line.decode().rstrip("\n"))
            if waiting is not None:
                await waiting

    server = await asyncio.start_server(on_feed, "127.0.0.1", 0, limit=1 << 20)
    feed = server.sockets[0].getsockname()[1]
    print(json.dumps({"port": port, "feed": feed}), flush=True)
    async with server:
        await server.serve_forever()
