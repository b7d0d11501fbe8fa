"""What tests wait for, and what they look at meanwhile."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

DEADLINE_S = 20.0  # for what takes milliseconds, on a machine with better things to do


async def eventually(condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Return what ``condition`` returns as soon as that is true.

    Raises:
        TimeoutError: it was not true in time.
    """
    async with asyncio.timeout(deadline_s):
        while not (result := condition()):
            await asyncio.sleep(0.002)
    return result


def wait_until(condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Do the same outside an event loop."""
    deadline = time.monotonic() + deadline_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)
    return result


def alive(pid: int) -> bool:
    """Return whether a process runs; one that waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def free_port() -> int:
    """A port of 127.0.0.1 at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
