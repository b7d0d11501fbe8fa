"""A WebSocket client that speaks JSON, for tests without an event loop.

`tests.server.gateways.Client` is the same for those that have one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.waiting import DEADLINE_S

Json = dict[str, Any]


class Client:
    """One end of a connection to whatever speaks the gateway's protocol.

    What waits raises TimeoutError when nothing comes within ``patience_s``, and ConnectionClosed.
    """

    def __init__(self, socket: ClientConnection, patience_s: float) -> None:
        self._socket = socket
        self._patience_s = patience_s

    def send(self, **message: Any) -> None:
        self._socket.send(json.dumps(message))

    def receive(self) -> Json:
        message: Json = json.loads(self._socket.recv(self._patience_s))
        return message

    def receive_until(self, **expected: Any) -> list[Json]:
        """All messages up to the first that has the ``expected`` fields."""
        received: list[Json] = []
        while not received or not expected.items() <= received[-1].items():
            received.append(self.receive())
        return received

    def close_code(self) -> int | None:
        """The code with which the other side closes, whatever it sends before; None if it cuts."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.receive()
        return self._socket.close_code if self._socket.close_code != 1006 else None


@contextlib.contextmanager
def client_at(url: str, patience_s: float = DEADLINE_S, **options: Any) -> Iterator[Client]:
    """A client that was greeted, and sends no pings; ``options`` are those of `connect`."""
    with connect(url, proxy=None, max_size=None, ping_interval=None, **options) as socket:
        client = Client(socket, patience_s)
        assert client.receive()["type"] == "connected"
        yield client
