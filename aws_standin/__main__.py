"""The stand-in as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json

from aws_standin import StandIn


async def _serve_forever(port: int, prefix: str, fifo_updates: bool) -> None:
    stand_in = await StandIn().start(port)
    platform = stand_in.create_platform(fifo_updates=fifo_updates, prefix=prefix)
    print(stand_in.endpoint_url, flush=True)
    print(json.dumps(platform.environment()), flush=True)
    await asyncio.Event().wait()


def main() -> None:
    """Run until interrupted; the first line printed is the endpoint, the second an environment."""
    parser = argparse.ArgumentParser(prog="python -m aws_standin", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--prefix", default="agenticai", help="of the names of queues and tables")
    parser.add_argument("--fifo-updates", action="store_true", help="a FIFO updates queue")
    arguments = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve_forever(arguments.port, arguments.prefix, arguments.fifo_updates))


if __name__ == "__main__":
    main()
