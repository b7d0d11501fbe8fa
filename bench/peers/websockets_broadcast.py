"""websockets: ``serve()`` and ``broadcast()``, as in its documentation on broadcasting.

On asyncio's own event loop, or with ``--uvloop`` on that.
"""

from __future__ import annotations

import asyncio
import sys

from websockets.asyncio.server import ServerConnection, broadcast, serve

from bench.peers.feed import serve_feed

CLIENTS: set[ServerConnection] = set()


async def handler(websocket: ServerConnection) -> None:
    CLIENTS.add(websocket)
    try:
        await websocket.wait_closed()
    finally:
        CLIENTS.remove(websocket)


async def main() -> None:
    async with serve(handler, "127.0.0.1", 0, backlog=4096) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        await serve_feed(port, lambda message: broadcast(CLIENTS, message))


if __name__ == "__main__":
    if "--uvloop" in sys.argv:
        import uvloop

        uvloop.run(main())
    else:
        asyncio.run(main())
