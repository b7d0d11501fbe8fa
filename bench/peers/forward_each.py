"""Forwarding the plain way: one ``send_message`` a message, awaited, then the confirmation."""

from __future__ import annotations

import asyncio
import json
import os

from aiobotocore.session import get_session
from websockets.asyncio.server import ServerConnection, serve

from bench.peers.feed import serve_feed


async def main() -> None:
    queue_url = os.environ["SQS_QUEUE_URL_DEV"]
    async with get_session().create_client("sqs") as sqs:

        async def handler(websocket: ServerConnection) -> None:
            async for text in websocket:
                message = json.loads(text)
                sent = await sqs.send_message(QueueUrl=queue_url, MessageBody=json.dumps(message))
                answer = {"type": "forward_confirmed", "sqs_message_id": sent["MessageId"]}
                await websocket.send(json.dumps(answer))

        async with serve(handler, "127.0.0.1", 0, backlog=4096) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            await serve_feed(port, lambda _message: None)


if __name__ == "__main__":
    asyncio.run(main())
