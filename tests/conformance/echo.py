"""The gateway as an echo server, on the AWS stand-in: ``python -m tests.conformance.echo``.

This mode exists here only. What differs from server.py: messages go back to where they came from,
binary ones too, nobody is greeted, and nothing is limited but the size of a message.
"""

from __future__ import annotations

import asyncio
import os
import sys
from unittest import mock

from websockets.http11 import Request

import server
from bench.servers import stand_in
from server import Connection, Event, Gateway, Messages, Progress, Settings, deflate, frame

BINARY = 0x82
BINARY_DEFLATED = 0xC2


class EchoConnection(Connection):
    """A connection that does not refuse binary messages."""

    __slots__ = ()

    def _message(self, payload: bytes, is_text: bool) -> None:
        if is_text or self.progress is not Progress.OPEN:
            super()._message(payload, is_text)
        elif self.deflates:
            self.transport.write(frame(deflate(payload), BINARY_DEFLATED))
        else:
            self.transport.write(frame(payload, BINARY))


class EchoMessages(Messages):
    """What comes is sent back."""

    def welcome(self, connection: Connection, request: Request) -> None:  # noqa: ARG002
        self._gateway.registry.connections[connection.id] = connection
        self._gateway.door.admission.count(connection.address, +1)

    def handle(self, connection: Connection, payload: bytes) -> None:
        event = Event("echo", 0, payload)
        connection.transport.write(event.deflated if connection.deflates else event.frame)


READY_S = 30.0
UNLIMITED = {
    "MAX_MESSAGE_BYTES": "1048576",
    "MAX_BACKLOG_BYTES": "1073741824",
    "DRAIN_SECONDS": "0",
    "LOG_LEVEL": "ERROR",
}


async def serve(settings: Settings) -> None:
    """Print the port, and echo until stdin ends."""
    async with server.connect(settings.aws_region) as aws, asyncio.TaskGroup() as tasks:
        gateway = Gateway(settings, tasks, aws, "echo")
        gateway.messages = EchoMessages(gateway, settings)
        running = tasks.create_task(gateway.run())
        async with asyncio.timeout(READY_S):
            await gateway.ready.wait()
        print(gateway.address[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
        gateway.drain.wanted.set()
        gateway.drain.hurry.set()
        await running
        raise server.Drained


def main() -> None:
    with stand_in() as aws, mock.patch.object(server, "Connection", EchoConnection):
        environment = aws.environment
        del environment["UPDATES_TOPIC_ARN"]
        environment |= UNLIMITED
        os.environ.update(environment)
        with asyncio.Runner(loop_factory=server.fastest_loop()) as runner:
            try:
                runner.run(serve(Settings.from_mapping(environment)))
            except* server.Drained:
                pass


if __name__ == "__main__":
    main()
