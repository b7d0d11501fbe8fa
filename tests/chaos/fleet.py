"""The ``server.py`` processes of a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from aiohttp import web

from tests.chaos.plan import Deed

ROOT = Path(__file__).resolve().parent.parent.parent


class Platform(Protocol):
    """What ``aws_standin`` and ``tests.moto_aws`` call a platform: queues, topic and tables."""

    @property
    def endpoint_url(self) -> str: ...

    @property
    def queue_urls(self) -> dict[str, str]: ...

    @property
    def topic_arn(self) -> str: ...

    @property
    def events_table_name(self) -> str: ...

    def environment(self) -> dict[str, str]: ...

    def client(self, service: str) -> Any: ...


class Task:
    """One ``server.py`` process.

    Attributes:
        id: the task's id as ECS would give it.
        name: slot and a part of the id, for people.
        port: 0 until it listens.
        healthy: set while a load balancer would send clients to it.
        told_to: how it was made to end; None while it should run.
        alarms: what it printed that is no line of its log, or an error.
    """

    LINES_KEPT = 20_000

    def __init__(self, slot: int, identifier: str, process: asyncio.subprocess.Process) -> None:
        self.id = identifier
        self.name = f"{slot}/{identifier[:6]}"
        self.process = process
        self.port = 0
        self.healthy = asyncio.Event()
        self.told_to: Deed | None = None
        self.lines: deque[str] = deque(maxlen=self.LINES_KEPT)
        self.alarms: list[str] = []

    async def read_log(self) -> None:
        """Keep what it prints, and learn its port, until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            text = line.decode(errors="replace").rstrip()
            self.lines.append(text)
            try:
                entry = json.loads(text)
            except ValueError:
                if line.endswith(b"\n"):  # else it was killed in the middle of it
                    self.alarms.append(text)
                continue
            if entry.get("level") in ("ERROR", "CRITICAL"):
                self.alarms.append(text)
            if entry.get("message") == "listening":
                self.port = entry["port"]

    def end(self, deed: Deed) -> None:
        """Kill it, or tell it to stop; from now on it is expected to end."""
        self.told_to = deed
        self.healthy.clear()
        with contextlib.suppress(ProcessLookupError):
            if deed is Deed.KILL:
                self.process.kill()
            else:
                self.process.terminate()


class Fleet:
    """The tasks of one run, each in a slot, with a successor for each that ends."""

    START_SECONDS = 40.0
    STOP_SECONDS = 35.0  # the sum of what a drain may wait for

    def __init__(
        self,
        slots: int,
        environment: dict[str, str],
        metadata_url: str,
        seed: int,
        scripts: Sequence[str] = ("server.py",),
    ) -> None:
        self.tasks: list[Task] = []
        self.failures: list[str] = []
        self._slots: list[Task | None] = [None] * slots
        self._environment = environment
        self._scripts = scripts
        self._metadata_url = metadata_url
        self._dice = random.Random(f"fleet/{seed}")
        self._background: set[asyncio.Task[None]] = set()
        self._session = aiohttp.ClientSession()
        self._closing = False

    @property
    def alive(self) -> list[Task]:
        """Those that are meant to run."""
        return [task for task in self._slots if task is not None and task.told_to is None]

    @property
    def all_healthy(self) -> bool:
        """Whether every slot has a task that is healthy."""
        return len(self.alive) == len(self._slots) and all(t.healthy.is_set() for t in self.alive)

    async def any_healthy(self, dice: random.Random) -> Task:
        """A task as a load balancer would pick one; waits while there is none."""
        while True:
            if healthy := [task for task in self.alive if task.healthy.is_set()]:
                return dice.choice(healthy)
            await asyncio.sleep(0.05)

    async def start(self, slot: int) -> None:
        """Start a task in a slot that has none; return when the process exists."""
        identifier = f"{self._dice.getrandbits(128):032x}"
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            self._scripts[len(self.tasks) % len(self._scripts)],
            cwd=ROOT,
            env={
                **self._environment,
                "ECS_CONTAINER_METADATA_URI_V4": f"{self._metadata_url}/{identifier}",
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1024 * 1024,
        )
        task = Task(slot, identifier, process)
        self._slots[slot] = task
        self.tasks.append(task)
        self._spawn(self._watch(task))
        self._spawn(self._check_health(task))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        job = asyncio.get_running_loop().create_task(work)
        self._background.add(job)
        job.add_done_callback(self._background.discard)

    async def _watch(self, task: Task) -> None:
        await task.read_log()
        code = await task.process.wait()
        task.healthy.clear()
        if task.told_to is None and not self._closing:
            self.failures.append(f"task {task.name} ended on its own, with exit code {code}")
        elif task.told_to is Deed.STOP and code != 0 and not self._too_early(task, code):
            self.failures.append(f"task {task.name}, told to stop, ended with exit code {code}")

    @staticmethod
    def _too_early(task: Task, code: int) -> bool:
        """Whether it was told to stop before it could know how, which a signal then ends."""
        return not task.port and code == -signal.SIGTERM

    async def _check_health(self, task: Task) -> None:
        deadline = time.monotonic() + self.START_SECONDS
        while task.told_to is None and task.process.returncode is None:
            if await self._is_healthy(task):
                task.healthy.set()
                return
            if time.monotonic() > deadline:
                self.failures.append(f"task {task.name} was not healthy in {self.START_SECONDS} s")
                return
            await asyncio.sleep(0.1)

    async def _is_healthy(self, task: Task) -> bool:
        if not task.port:
            return False
        url = f"http://127.0.0.1:{task.port}/health"
        try:
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=2)) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def replace(self, slot: int, deed: Deed, seconds: float) -> None:
        """End the slot's task, and start its successor some seconds after it ended."""
        task = self._slots[slot]
        if task is None or task.told_to is not None:
            return  # another deed has it in hand
        task.end(deed)
        await self._ended(task)
        await asyncio.sleep(seconds)
        await self.start(slot)

    async def freeze(self, slot: int, seconds: float) -> None:
        """Stop the slot's task from doing anything for some seconds, as a starved host does."""
        task = self._slots[slot]
        if task is None or task.told_to is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            task.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            task.process.send_signal(signal.SIGCONT)

    async def stop(self) -> None:
        """Tell all tasks to stop, and wait until they did."""
        stopped = self.alive
        for task in stopped:
            task.end(Deed.STOP)
        await asyncio.gather(*(self._ended(task) for task in stopped))

    async def _ended(self, task: Task) -> None:
        try:
            async with asyncio.timeout(self.STOP_SECONDS):
                await task.process.wait()
        except TimeoutError:
            self.failures.append(f"task {task.name} did not end in {self.STOP_SECONDS} s")
            task.process.kill()
            await task.process.wait()

    async def close(self) -> None:
        """Kill whatever still runs."""
        self._closing = True
        for task in self.tasks:
            with contextlib.suppress(ProcessLookupError):
                task.process.kill()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._session.close()


@contextlib.asynccontextmanager
async def task_metadata() -> AsyncIterator[str]:
    """The endpoint that tells a container on ECS which task it is; yields its URL."""

    async def describe(request: web.Request) -> web.Response:
        identifier = request.match_info["id"]
        arn = f"arn:aws:ecs:us-east-1:123456789012:task/chaos/{identifier}"
        networks = [{"NetworkMode": "awsvpc", "IPv4Addresses": ["127.0.0.1"]}]
        containers = [{"Name": "websocket-gateway", "Networks": networks}]
        return web.json_response({"Cluster": "chaos", "TaskARN": arn, "Containers": containers})

    application = web.Application()
    application.router.add_get("/{id}/task", describe)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def server_environment(platform: Platform, endpoint_url: str) -> dict[str, str]:
    """What a server gets: this process's environment without its AWS, and quick reactions."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "ECS_"))}
    return {
        **inherited,
        **platform.environment(),
        "AWS_ENDPOINT_URL": endpoint_url,
        "TASK_HEARTBEAT_SECONDS": "1",
        "AUDIT_INTERVAL_SECONDS": "1",
        "DRAIN_SECONDS": "1",
        "PING_INTERVAL_SECONDS": "5",
        "LOG_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }
