"""`python server.py` in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from coverage import Coverage

import server
from aws_standin import without_aws
from server import Settings
from tests.server.aws import Json
from tests.waiting import DEADLINE_S

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither signals nor ptys")


SERVER = Path(server.__file__)

MEASURED = {"COVERAGE_PROCESS_START": str(SERVER.with_name("pyproject.toml"))}
"""With it a Python measures its own coverage from its start on, and leaves it for pytest-cov."""


class Process:
    """`python server.py` as whoever deploys it sees it.

    Attributes:
        address: where it listens, after `listening`.
        log: the lines read so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ("", 0)
        self.log: list[Json] = []

    async def logged(self, message: str) -> Json:
        """The next line with ``message``."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            async for line in self.process.stdout:
                self.log.append(json.loads(line))
                if self.log[-1].get("message") == message:
                    return self.log[-1]
        raise AssertionError(f"{message!r} was not logged, but {self.log}")

    async def listening(self) -> None:
        line = await self.logged("listening")
        self.address = (line["host"], line["port"])
        await self.logged("ready")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ends(self) -> tuple[int | None, str]:
        """The exit code and what was written to stderr; ``log`` is complete then."""
        async with asyncio.timeout(DEADLINE_S):
            stdout, stderr = await self.process.communicate()
        self.log += map(json.loads, stdout.splitlines())
        return self.process.returncode, stderr.decode()


def clean_environment() -> dict[str, str]:
    """The environment of the tests without any setting of a gateway.

    What runs in it is measured if the tests are: the beginning and the end of ``main`` run there.
    """
    own = {field.name.upper() for field in dataclasses.fields(Settings)}
    kept = {name: v for name, v in without_aws(os.environ).items() if name not in own}
    return {**kept, "no_proxy": "127.0.0.1", **(MEASURED if Coverage.current() else {})}


@contextlib.asynccontextmanager
async def process_of(environment: Mapping[str, str], **more: str) -> AsyncIterator[Process]:
    """A server with ``environment``, which is ended with the test."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SERVER),
        env={**clean_environment(), **environment, **more},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def task_metadata(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """The endpoint that tells ECS tasks who they are, and the request lines it got."""
    asked: list[bytes] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        writer.close()

    listener = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v4/abc", asked
