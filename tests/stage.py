"""Two tasks behind a balancer, for browsers and clients to be seen at work with."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import socket
import socketserver
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import pytest

from aws_standin import Platform, without_aws
from local.child import Child
from local.console import console_link

ROOT = Path(__file__).resolve().parent.parent


PROJECT = "proj_123"


HOST = "127.0.0.1"


START_S = 30.0


CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Task:
    """A `server.py` on a free port."""

    def __init__(self, name: str, platform: Platform, **settings: str) -> None:
        lines: SimpleQueue[tuple[Child, str | None]] = SimpleQueue()
        environment = without_aws(os.environ) | platform.environment() | settings
        self.child = Child(name, ["server.py"], environment, lines)
        self.port = self._await_port(lines)
        self._await_health()

    def _await_port(self, lines: SimpleQueue[tuple[Child, str | None]]) -> int:
        deadline = time.monotonic() + START_S
        output = []
        with contextlib.suppress(Empty):
            while line := lines.get(timeout=max(0.0, deadline - time.monotonic()))[1]:
                output.append(line)
                with contextlib.suppress(ValueError):
                    record = json.loads(line)
                    if record.get("message") == "listening":
                        return int(record["port"])
        self.child.kill()
        pytest.fail("server.py does not listen:\n" + "\n".join(output))

    def _await_health(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"http://{HOST}:{self.port}/health", timeout=5).close()
            except urllib.error.HTTPError:
                time.sleep(0.05)
            else:
                return
        self.child.kill()
        pytest.fail("server.py does not become healthy")


class Balancer:
    """What a load balancer does for the page: one address, and a living task behind it."""

    def __init__(self) -> None:
        self.backends: list[Task] = []
        self.last: Task | None = None
        """The task that got the newest connection."""
        self.silent_since: float | None = None
        balancer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                balancer._carry(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server((HOST, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.port: int = self._server.server_address[1]
        self.url = f"ws://{HOST}:{self.port}/ws"

    def _carry(self, client: socket.socket) -> None:
        began = time.monotonic()
        for task in sorted(
            self.backends, key=lambda task: task is self.last
        ):  # the other one first
            try:
                backend = socket.create_connection((HOST, task.port), timeout=2)
            except OSError:
                continue
            self.last = task
            with backend, contextlib.suppress(OSError):
                while True:
                    for source in select.select([client, backend], [], [], 0.5)[0]:
                        data = source.recv(65_536)
                        if not data:
                            return
                        if self.silent_since is None or began > self.silent_since:
                            (backend if source is client else client).sendall(data)
            return

    def fall_silent(self) -> None:
        """Swallow, from now on, all that goes over the connections there are; new ones work."""
        self.silent_since = time.monotonic()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Stage:
    """Two tasks behind a balancer, the sample agents, and the console's address."""

    def __init__(self, platform: Platform, console: str, step_s: float = 0.1) -> None:
        self.platform = platform
        self.console = console
        self.balancer = Balancer()
        environment = without_aws(os.environ) | platform.environment()
        environment["AGENT_STEP_SECONDS"] = str(step_s)
        self.agents = Child("agents", ["-m", "local.event_source"], environment, SimpleQueue())
        self.tasks = [Task("task-1", platform), Task("task-2", platform)]
        self.balancer.backends = self.tasks
        self.sqs = platform.client("sqs")
        self.sent = 0

    def link(self, *projects: str) -> str:
        return console_link(self.console, self.balancer.url, *projects)

    def kill_current_task(self) -> None:
        """Kill, as by SIGKILL, the task of the newest connection; another takes its place."""
        task = self.balancer.last
        assert task is not None
        task.child.kill()
        self.tasks[self.tasks.index(task)] = Task(task.child.name, self.platform)

    def send(self, count: int, project: str = PROJECT) -> None:
        """Send numbered updates as an agent does."""
        for _ in range(count):
            self.sent += 1
            update = {
                "project_id": project,
                "type": "counted",
                "event_id": f"counted-{self.sent}",
                "data": {"text": f"number {self.sent}."},
            }
            self.sqs.send_message(
                QueueUrl=self.platform.queue_urls["updates"], MessageBody=json.dumps(update)
            )

    def update(self, kind: str, data: Any, **more: Any) -> None:
        """Send an update as an agent does."""
        update = {"project_id": PROJECT, "type": kind, "data": data} | more
        self.sqs.send_message(
            QueueUrl=self.platform.queue_urls["updates"], MessageBody=json.dumps(update)
        )

    def close(self) -> None:
        for child in (*(task.child for task in self.tasks), self.agents):
            child.kill()
        self.balancer.close()


def chromium() -> str:
    """The program; the test is skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    return program
