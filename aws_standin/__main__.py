"""The stand-in as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import sys

from aws_standin import StandIn


async def _serve_forever(
    port: int, prefix: str, fifo_updates: bool, latency_s: tuple[float, float]
) -> None:
    stand_in = StandIn()
    stand_in.latency_s = latency_s
    await stand_in.start(port)
    platform = stand_in.create_platform(fifo_updates=fifo_updates, prefix=prefix)
    print(stand_in.endpoint_url, flush=True)
    print(json.dumps(platform.environment()), flush=True)
    with contextlib.suppress(OSError, ValueError):  # /dev/null and files cannot be waited on
        asyncio.get_running_loop().add_reader(0, _tell_usage, stand_in)
    await asyncio.Event().wait()


def _tell_usage(stand_in: StandIn) -> None:
    """Answer a line on standard input with what AWS would bill so far."""
    if os.read(0, 4096):
        print(json.dumps(stand_in.usage.as_json()), flush=True)
    else:
        asyncio.get_running_loop().remove_reader(0)


def _latency_s(text: str) -> tuple[float, float]:
    """Milliseconds, ``5-10`` or ``5``, as seconds."""
    if not (match := re.fullmatch(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?", text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds, or two: 5-10")
    return float(match[1]) / 1e3, float(match[2] or match[1]) / 1e3


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)


def main() -> None:
    """Run until interrupted; the first line printed is the endpoint, the second an environment.

    Each line on standard input is answered with what AWS would bill so far, as JSON.
    """
    parser = argparse.ArgumentParser(
        prog="python -m aws_standin",
        description=main.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--port", type=_port, default=0, help="0 picks a free one")
    parser.add_argument("--prefix", default="agenticai", help="of the names of queues and tables")
    parser.add_argument("--fifo-updates", action="store_true", help="a FIFO updates queue")
    parser.add_argument(
        "--latency-ms",
        type=_latency_s,
        default=(0.0, 0.0),
        metavar="5-10",
        help="what every call takes, half of it before it takes effect",
    )
    arguments = parser.parse_args()
    serving = _serve_forever(
        arguments.port, arguments.prefix, arguments.fifo_updates, arguments.latency_ms
    )
    try:
        asyncio.run(serving)
    except KeyboardInterrupt:
        pass
    except OSError as error:
        reason = os.strerror(error.errno or 0).lower()
        sys.exit(f"Port {arguments.port} cannot be used ({reason}): choose another, or 0 for any.")


if __name__ == "__main__":
    main()
