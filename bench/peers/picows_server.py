"""picows: listeners and ``transport.send()``, on uvloop as it recommends."""

# mypy: allow-subclassing-any

from __future__ import annotations

import uvloop
from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

from bench.peers.feed import serve_feed

CLIENTS: set[WSTransport] = set()


class Client(WSListener):
    def on_ws_connected(self, transport: WSTransport) -> None:
        CLIENTS.add(transport)

    def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
        if frame.msg_type == WSMsgType.CLOSE:
            transport.send_close(frame.get_close_code())
            transport.disconnect()

    def on_ws_disconnected(self, transport: WSTransport) -> None:
        CLIENTS.discard(transport)


def factory(_request: WSUpgradeRequest) -> WSListener:
    return Client()


def broadcast(message: str) -> None:
    payload = message.encode()
    for transport in CLIENTS:
        transport.send(WSMsgType.TEXT, payload)


async def main() -> None:
    server = await ws_create_server(factory, "127.0.0.1", 0, backlog=4096)
    await serve_feed(server.sockets[0].getsockname()[1], broadcast)


if __name__ == "__main__":
    uvloop.run(main())
