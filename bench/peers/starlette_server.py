"""Starlette on ``uvicorn[standard]``: an endpoint a client, ``send_text()`` to each."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from bench.peers.feed import serve_feed

CLIENTS: set[WebSocket] = set()


async def endpoint(websocket: WebSocket) -> None:
    await websocket.accept()
    CLIENTS.add(websocket)
    try:
        while True:
            await websocket.receive_text()
    except WebSocketDisconnect:
        CLIENTS.discard(websocket)


async def broadcast(message: str) -> None:
    for websocket in set(CLIENTS):
        await websocket.send_text(message)


async def main() -> None:
    app = Starlette(routes=[WebSocketRoute("/ws", endpoint)])
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    await serve_feed(listening.getsockname()[1], broadcast)
    await serving


if __name__ == "__main__":
    # uvicorn's own choice: uvloop where it is installed, which [standard] sees to.
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:
        runner.run(main())
