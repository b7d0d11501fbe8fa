"""A rolling deployment, rehearsed: a task is replaced behind a real proxy, and nobody notices.

    python -m tests.rehearsal                                 # the full one: a minute and a half
    python -m tests.rehearsal --clients 50 --events 100 --drain-seconds 5 --trigger sigterm

Two ``server.py`` processes on moto stand behind haproxy or nginx as they stand behind
the load balancer in production: new connections go to the task with the fewest, each task's
``/health`` is asked again and again by ``ELB-HealthChecker/2.0``. While an agent publishes numbered
events, the new task is registered and the old one deregistered: it gets no new connections, but
keeps the clients it has. Once DescribeTargetHealth, which is answered from what the proxy says of
its servers, tells it so - or it got SIGTERM - it drains: it sends its clients away one by one, and
ends. A client comes back after the delay it was told, to the proxy, and resumes from the last event
it saw.

At the end the log must hold every event exactly once and every client must have got exactly what
the log holds, in its order; each client must have been told to leave and have moved once, within
the window and not all at the same time; and the old task must have ended in time with exit code 0.
Otherwise the exit code is 1, and what went wrong is printed below the timeline.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import dataclasses
import datetime
import enum
import itertools
import json
import math
import random
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from aws_standin import StandIn
from aws_standin.elb import TARGET_GROUP_ARN, Elb
from tests.chaos.checker import Event, first_divergence, log_faults
from tests.chaos.clients import Client
from tests.chaos.fleet import Fleet, Platform, Task, server_environment, task_metadata
from tests.chaos.plan import Deed, Update
from tests.chaos.run import read_heads, read_log
from tests.moto_aws import MotoAws

HEALTH_CHECKER = "ELB-HealthChecker/2.0"
NOTICED_SECONDS = 12.0  # a task asks for the state of its target every 10 s, give or take a fifth
STOP_TIMEOUT_SECONDS = 120.0  # the task definition's: then the platform kills
SPREAD_RATIO = 4.0  # the busiest second may bring back so many times its share of the clients
OLD, NEW = "old", "new"


class RehearsalError(Exception):
    """The rehearsal could not be held, or stood still; the message says where."""


class Trigger(enum.Enum):
    """What makes the old task drain."""

    TARGET = "target"  # is deregistered, as in every deployment
    SIGTERM = "sigterm"  # as when a deregistration delay of no length has passed


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """How much of everything."""

    clients: int = 500
    events: int = 1_000
    projects: int = 5
    drain_seconds: float = 30.0
    trigger: Trigger = Trigger.TARGET
    before_seconds: float = 5.0  # of publishing, until the deployment begins
    after_seconds: float = 5.0  # of publishing, once the old task should be gone

    @property
    def project_names(self) -> list[str]:
        return [f"proj_{number}" for number in range(1, self.projects + 1)]

    @property
    def publishing_seconds(self) -> float:
        """The events are spread over the whole deployment, evenly."""
        waiting = NOTICED_SECONDS if self.trigger is Trigger.TARGET else 0.0
        return self.before_seconds + waiting + self.drain_seconds + self.after_seconds

    @property
    def events_per_second(self) -> float:
        return self.events / self.publishing_seconds

    def interests(self, number: int) -> list[str]:
        """The projects of a client: one to three neighbours of all."""
        names = self.project_names
        count = min(1 + number // len(names) % 3, len(names))
        return [names[(number + i) % len(names)] for i in range(count)]


async def until(
    what: str, condition: Callable[[], Awaitable[bool]], seconds: float, fleet: Fleet
) -> None:
    """Wait for a condition. Raises RehearsalError when time is up, or a process failed."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if fleet.failures:
            raise RehearsalError(f"{fleet.failures[0]}, while waiting until {what}")
        if time.monotonic() > deadline:
            raise RehearsalError(f"in {seconds:.0f} s it did not come about that {what}")
        await asyncio.sleep(0.05)


# --- Balancers ------------------------------------------------------------------------------


class Balancer:
    """A proxy in front of the tasks. One name, one task: ``old`` or ``new``."""

    name = ""
    START_SECONDS = 10.0

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ports: dict[str, int] = {}
        self.port = 0
        self.version = ""
        self._process: asyncio.subprocess.Process | None = None

    @property
    def process(self) -> asyncio.subprocess.Process:
        assert self._process is not None
        return self._process

    @classmethod
    def executable(cls) -> str | None:
        """Where it is installed; Debian puts proxies where only root looks."""
        return shutil.which(cls.name) or shutil.which(cls.name, path="/usr/sbin:/usr/local/sbin")

    async def start(self, old_port: int) -> None:
        """Stand in front of the old task, on a free port of the loopback interface."""
        raise NotImplementedError

    async def register(self, port: int) -> None:
        """Take the new task in."""
        raise NotImplementedError

    async def deregister(self) -> None:
        """Send nobody new to the old task; leave it whom it has."""
        raise NotImplementedError

    async def state(self, name: str) -> str:
        """A task's state as DescribeTargetHealth would name it."""
        raise NotImplementedError

    async def healthy(self, name: str) -> bool:
        """Whether the last health check of a task went well."""
        return await self.state(name) == "healthy"

    async def close(self) -> None:
        """End it, with all connections that it carries."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.terminate()
            try:
                async with asyncio.timeout(5.0):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()

    async def _ask_version(self) -> str:
        process = await asyncio.create_subprocess_exec(
            self.executable() or self.name,
            "-v",
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        answer, _ = await process.communicate()
        words = answer.decode(errors="replace").split("\n")[0].replace("/", " ").split()
        number = next((word for word in words if word[0].isdigit()), "")
        return f"{self.name} {number}".rstrip()


class Haproxy(Balancer):
    """haproxy: health checks of its own, and registration through its runtime socket."""

    name = "haproxy"
    CONFIGURATION = """\
global
    stats socket {folder}/admin.sock mode 600 level admin
    maxconn 4000
defaults
    mode http
    option forwardfor
    timeout connect 5s
    timeout client 4000s
    timeout server 4000s
    timeout tunnel 4000s
frontend clients
    bind fd@{fd}
    default_backend tasks
backend tasks
    balance leastconn
    option httpchk
    http-check send meth GET uri /health ver HTTP/1.1 hdr Host tasks hdr User-Agent {checker}
    http-check expect status 200
    default-server check inter 1s fall 2 rise 1
    server old 127.0.0.1:{old_port}
    server new 127.0.0.1:{old_port} disabled
"""

    async def start(self, old_port: int) -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
            self.port = listener.getsockname()[1]
            configuration = self.CONFIGURATION.format(
                folder=self._folder,
                fd=listener.fileno(),
                checker=HEALTH_CHECKER,
                old_port=old_port,
            )
            path = self._folder / "haproxy.cfg"
            path.write_text(configuration)
            self.version = await self._ask_version()
            self._process = await asyncio.create_subprocess_exec(
                self.executable() or self.name,
                *("-q", "-db", "-f", str(path)),
                pass_fds=[listener.fileno()],
            )
        deadline = time.monotonic() + self.START_SECONDS
        while not (self._folder / "admin.sock").exists():
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise RehearsalError("haproxy did not start; what it says is above")
            await asyncio.sleep(0.05)

    async def register(self, port: int) -> None:
        await self._command(f"set server tasks/new addr 127.0.0.1 port {port}")
        await self._command("set server tasks/new state ready", answer="")

    async def deregister(self) -> None:
        await self._command("set server tasks/old state drain", answer="")

    async def state(self, name: str) -> str:
        table = (await self._command("show stat")).removeprefix("# ").splitlines()
        row = next(row for row in csv.DictReader(table) if row["svname"] == name)
        if row["status"] == "UP" and row["check_status"] == "L7OK":
            return "healthy"
        states = {"DRAIN": "draining", "MAINT": "unused", "DOWN": "unhealthy"}
        return states.get(row["status"], "initial")

    async def _command(self, command: str, *, answer: str | None = None) -> str:
        """Have a command carried out; ``answer`` is what haproxy says when that went well."""
        reader, writer = await asyncio.open_unix_connection(self._folder / "admin.sock")
        writer.write(f"{command}\n".encode())
        text = (await reader.read()).decode().strip()
        writer.close()
        if answer is not None and text != answer:
            raise RehearsalError(f"haproxy, told to `{command}`, said: {text}")
        return text


class Nginx(Balancer):
    """nginx: registration by reloading. It knows no health checks, so they are made here."""

    name = "nginx"
    CONFIGURATION = """\
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log stderr error;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    upstream tasks {{ least_conn; server 127.0.0.1:{task_port} max_fails=0; }}
    server {{
        listen 127.0.0.1:{port} backlog=1024;
        location = /there {{ return 204; }}
        location / {{
            proxy_pass http://tasks;
            proxy_http_version 1.1;
            proxy_set_header Host $host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $http_connection;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_read_timeout 4000s;
            proxy_send_timeout 4000s;
        }}
    }}
}}
"""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._states: dict[str, str] = {}
        self._session = aiohttp.ClientSession(
            headers={"User-Agent": HEALTH_CHECKER}, timeout=aiohttp.ClientTimeout(total=2)
        )

    async def start(self, old_port: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._configure(old_port)
        self.version = await self._ask_version()
        self._process = await asyncio.create_subprocess_exec(
            self.executable() or self.name,
            *("-p", str(self._folder), "-e", "stderr", "-c", str(self._folder / "nginx.conf")),
        )
        await self._until_there()
        self._check(OLD, old_port)

    async def register(self, port: int) -> None:
        """Check the new task; its port is taken into the configuration by `deregister`."""
        self._ports[NEW] = port
        self._check(NEW, port)

    async def deregister(self) -> None:
        reader, writer = await self._idle_connection()
        self._configure(self._ports[NEW])
        self.process.send_signal(signal.SIGHUP)
        # A worker that is to go stops listening first, and then closes idle connections.
        try:
            async with asyncio.timeout(self.START_SECONDS):
                await reader.read()
        except TimeoutError:
            raise RehearsalError("nginx did not reload; what it says is above") from None
        finally:
            writer.close()
        self._checks[OLD].cancel()
        self._states[OLD] = "draining"

    async def state(self, name: str) -> str:
        return self._states.get(name, "unused")

    async def close(self) -> None:
        for check in self._checks.values():
            check.cancel()
        await asyncio.gather(*self._checks.values(), return_exceptions=True)
        await self._session.close()
        await super().close()

    def _configure(self, task_port: int) -> None:
        configuration = self.CONFIGURATION.format(
            folder=self._folder, port=self.port, task_port=task_port
        )
        (self._folder / "nginx.conf").write_text(configuration)

    async def _until_there(self) -> None:
        deadline = time.monotonic() + self.START_SECONDS
        while True:
            with contextlib.suppress(OSError):
                _, writer = await self._idle_connection()
                writer.close()
                return
            if self.process.returncode is not None or time.monotonic() > deadline:
                raise RehearsalError("nginx did not start; what it says is above")
            await asyncio.sleep(0.05)

    async def _idle_connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection that its worker has taken, and that waits for another request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /there HTTP/1.1\r\nHost: tasks\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        return reader, writer

    def _check(self, name: str, port: int) -> None:
        self._checks[name] = asyncio.get_running_loop().create_task(self._keep_checking(name, port))

    async def _keep_checking(self, name: str, port: int) -> None:
        url = f"http://127.0.0.1:{port}/health"
        while True:
            try:
                async with self._session.get(url, headers={"Connection": "close"}) as answer:
                    self._states[name] = "healthy" if answer.status == 200 else "unhealthy"
            except (aiohttp.ClientError, TimeoutError):
                self._states[name] = "unhealthy"
            await asyncio.sleep(1.0)


BALANCERS: dict[str, type[Balancer]] = {kind.name: kind for kind in (Haproxy, Nginx)}


def installed_balancers() -> list[str]:
    """The proxies that are installed here, the best first."""
    if sys.platform == "win32":
        return []  # neither haproxy nor what is asked of nginx here is to be had
    return [name for name, kind in BALANCERS.items() if kind.executable()]


@contextlib.asynccontextmanager
async def start_balancer(name: str, old_port: int) -> AsyncIterator[Balancer]:
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        balancer = BALANCERS[name](Path(folder))
        try:
            await balancer.start(old_port)
            yield balancer
        finally:
            await balancer.close()


# --- Clients --------------------------------------------------------------------------------


class Door(Task):
    """What clients see: to them, the balancer is the only task there is."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__(0, balancer.name, balancer.process)
        self.port = balancer.port
        self.healthy.set()


class FleetBehindBalancer(Fleet):
    """Tasks that clients do not choose from."""

    door: Door

    async def any_healthy(self, _dice: random.Random) -> Task:
        return self.door


@dataclasses.dataclass(slots=True)
class Move:
    """One client's way from one task to another, in seconds of the monotonic clock."""

    told_at: float
    back_at: float = math.nan


class Mover(Client):
    """A client that leaves when it is told to, and notes when what came.

    Attributes:
        arrivals: when each event came, in seconds of the monotonic clock.
        moves: one for each time it was told to reconnect.
    """

    PATIENCE_SECONDS = 30.0

    def __init__(self, number: int, projects: Sequence[str], fleet: Fleet, seed: int = 0) -> None:
        super().__init__(number, projects, fleet, seed)
        self.arrivals: list[float] = []
        self.moves: list[Move] = []

    @property
    def cut_offs(self) -> int:
        """How often it was turned away, or lost its connection without having been told to."""
        return self.connections - 1 - len(self.moves)

    def on_message(self, text: str) -> None:
        super().on_message(text)
        if '"reconnect"' in text:
            message = json.loads(text)
            if message["type"] == "reconnect":
                self.away_seconds = message["after_ms"] / 1000
                self.moves.append(Move(told_at=time.monotonic()))

    def on_confirmed(self, message: dict[str, Any]) -> None:
        super().on_confirmed(message)
        if self.moves and self.settled:
            self.moves[-1].back_at = time.monotonic()

    def on_event(self, message: dict[str, Any]) -> None:
        super().on_event(message)
        self.arrivals.append(time.monotonic())


# --- The verdict ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Gap:
    """The longest time in which a client got nothing.

    ``usual_seconds`` is the mean time between two events that are for this client, as published.
    """

    seconds: float
    usual_seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:.2f} s, {self.seconds / self.usual_seconds:.1f} times the usual"


def longest_gap(feeds: Sequence[tuple[Sequence[float], float]]) -> Gap | None:
    """The longest gap among several clients' arrivals, each with its usual time between two."""
    gaps = [
        Gap(later - earlier, usual)
        for arrivals, usual in feeds
        for earlier, later in itertools.pairwise(arrivals)
    ]
    return max(gaps, key=lambda gap: gap.seconds, default=None)


def missed_and_doubled(received: Sequence[Event], due: Sequence[Event]) -> tuple[int, int]:
    """How many events never came, and how many came again."""
    times = Counter(event.seq for event in received)
    missed = sum(event.seq not in times for event in due)
    return missed, sum(count - 1 for count in times.values())


def crowding(per_second: Mapping[int, int], window_seconds: float) -> float:
    """The busiest second's number, in times of what each second of the window should bring."""
    share = sum(per_second.values()) / max(window_seconds, 1.0)
    return max(per_second.values(), default=0) / share if share else 0.0


@dataclasses.dataclass(slots=True)
class Report:
    """What happened. All times are seconds since publishing began.

    Attributes:
        findings: what was wrong, a sentence each; a good rehearsal has none.
        lag_seconds: for how long the rehearsal itself got no turn: gaps of so long say nothing.
    """

    scenario: Scenario
    where: str
    milestones: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    findings: list[str] = dataclasses.field(default_factory=list)
    reconnects: Counter[int] = dataclasses.field(default_factory=Counter)
    drain_began: float = math.nan
    drain_ended: float = math.nan
    exit_code: int | None = None
    delivered: int = 0
    missed: int = 0
    doubled: int = 0
    cut_offs: int = 0
    moves_seconds: list[float] = dataclasses.field(default_factory=list)
    gap_before: Gap | None = None
    gap: Gap | None = None
    lag_seconds: float = 0.0

    @property
    def drain_seconds(self) -> float:
        return self.drain_ended - self.drain_began

    def judge(self) -> None:
        """Add to the findings what the figures say."""
        scenario = self.scenario
        if self.exit_code != 0:
            self.findings.append(f"the old task ended with exit code {self.exit_code}")
        if not self.drain_seconds <= min(
            STOP_TIMEOUT_SECONDS, scenario.drain_seconds + Fleet.STOP_SECONDS
        ):
            self.findings.append(f"the old task drained for {self.drain_seconds:.1f} s")
        if self.missed or self.doubled:
            self.findings.append(f"{self.missed} events were missed, {self.doubled} doubled")
        if self.cut_offs:
            self.findings.append(
                f"{self.cut_offs} connections were lost or refused without a `reconnect`"
            )
        if self.reconnects.total() != scenario.clients:
            self.findings.append(
                f"{self.reconnects.total()} moves were made by {scenario.clients} clients"
            )
        elif crowding(self.reconnects, scenario.drain_seconds) > SPREAD_RATIO:
            self.findings.append(
                f"{max(self.reconnects.values())} clients came back in one second, more than "
                f"{SPREAD_RATIO:.0f} times their share"
            )

    def lines(self) -> Iterator[str]:
        scenario = self.scenario
        yield (
            f"Rolling deployment behind {self.where}: {scenario.clients} clients, "
            f"{scenario.events} events on {scenario.projects} projects, "
            f"{scenario.events_per_second:.1f} a second"
        )
        for at, text in sorted(self.milestones):
            yield f"{at:7.1f} s  {text}"
        if self.reconnects:
            yield "   second  reconnects"
            step = max(1, math.ceil(max(self.reconnects.values()) / 50))
            for second in range(min(self.reconnects), max(self.reconnects) + 1):
                count = self.reconnects[second]
                yield f"{second:7d} s  {count:4d}  {'#' * math.ceil(count / step)}"
        rows = {
            "reconnects": (
                f"{self.reconnects.total()}, busiest second "
                f"{max(self.reconnects.values(), default=0)}, "
                f"share {scenario.clients / max(scenario.drain_seconds, 1.0):.1f}"
            ),
            "absence": (
                f"median {statistics.median(self.moves_seconds):.2f} s, "
                f"longest {max(self.moves_seconds):.2f} s, from `reconnect` to subscribed again"
                if self.moves_seconds
                else "none"
            ),
            "longest gap": f"{self.gap} (before the deployment {self.gap_before})",
            "longest lag": f"{self.lag_seconds:.2f} s, of this process: how busy the machine was",
            "events delivered": f"{self.delivered}",
            "events missed": f"{self.missed}",
            "events doubled": f"{self.doubled}",
            "connections cut": f"{self.cut_offs}",
            "drain": f"{self.drain_seconds:.1f} s, exit code {self.exit_code}",
        }
        for name, value in rows.items():
            yield f"{name + ' ':.<18} {value}"
        for finding in self.findings[:40]:
            yield f"  ! {finding}"
        yield "FAILED" if self.findings else "ok"

    def __str__(self) -> str:
        return "\n".join(self.lines())


# --- The rehearsal --------------------------------------------------------------------------


class Rehearsal:
    """One deployment, from an empty platform to the report."""

    RECEIVED_SECONDS = 60.0

    def __init__(
        self,
        scenario: Scenario,
        platform: Platform,
        fleet: FleetBehindBalancer,
        report: Report,
        elb: Elb,
        say: Callable[[str], None],
    ) -> None:
        self._scenario = scenario
        self._elb = elb
        self._platform = platform
        self._fleet = fleet
        self._report = report
        self._say = say
        self._sqs = platform.client("sqs")
        self._dynamodb = platform.client("dynamodb")
        self._clients = [
            Mover(number, scenario.interests(number), fleet) for number in range(scenario.clients)
        ]
        self._jobs: list[asyncio.Task[None]] = []
        self._started = time.monotonic()
        self._started_utc = time.time()
        self._deployed = math.nan

    async def __call__(self, balancer_name: str) -> None:
        """Hold it. Raises RehearsalError when it stands still."""
        old, new = await self._start_tasks()
        async with start_balancer(balancer_name, old.port) as balancer:
            self._report.where = f"{balancer.version}, {self._report.where}"
            self._fleet.door = Door(balancer)
            try:
                # 1. Everybody is on the old task.
                watch = self._watch_targets(balancer, {OLD: old.port, NEW: new.port})
                self._jobs = [asyncio.create_task(watch)]
                await self._until("the old task passed a health check", balancer, OLD)
                self._jobs += [asyncio.create_task(client.run()) for client in self._clients]
                await until("the clients are subscribed", self._settled, 60.0, self._fleet)
                # 2. An agent begins to work.
                self._started, self._started_utc = time.monotonic(), time.time()
                agent = asyncio.create_task(self._publish())
                self._jobs += [agent, asyncio.create_task(self._watch_lag())]
                self._milestone(f"{len(self._clients)} clients on the old task; publishing begins")
                await asyncio.sleep(self._scenario.before_seconds)
                # 3. A new task takes the old one's place.
                await self._replace(old, new, balancer)
                # 4. What is under way comes to rest.
                await agent
                self._milestone("the last event was sent")
                await self._come_to_rest()
                self._milestone("every client has reached the end of its logs")
            finally:
                await self._compare()
                for job in self._jobs:
                    job.cancel()
                await asyncio.gather(*self._jobs, return_exceptions=True)
        # 5. With nobody left to send away, the new task ends at once.
        await self._fleet.stop()

    async def _start_tasks(self) -> tuple[Task, Task]:
        """Start both, the new one to be registered later: how long that takes is not the point."""
        await asyncio.gather(*(self._fleet.start(slot) for slot in range(2)))

        async def all_healthy() -> bool:
            return self._fleet.all_healthy

        await until("both tasks are healthy", all_healthy, Fleet.START_SECONDS, self._fleet)
        old, new = self._fleet.tasks
        return old, new

    async def _watch_targets(self, balancer: Balancer, ports: Mapping[str, int]) -> None:
        """Have DescribeTargetHealth answered with what the proxy says of its servers."""
        while True:
            for name, port in ports.items():
                self._elb.states["127.0.0.1", port] = await balancer.state(name)
            await asyncio.sleep(0.1)

    async def _until(self, what: str, balancer: Balancer, name: str) -> None:
        await until(what, lambda: balancer.healthy(name), 20.0, self._fleet)

    async def _settled(self) -> bool:
        return all(client.settled for client in self._clients)

    def _milestone(self, text: str) -> None:
        at = time.monotonic() - self._started
        self._report.milestones.append((at, text))
        self._say(f"{at:7.1f} s  {text}")

    async def _replace(self, old: Task, new: Task, balancer: Balancer) -> None:
        await balancer.register(new.port)
        await self._until("the new task passed a health check", balancer, NEW)
        self._milestone("the new task is registered and healthy")
        old.told_to = Deed.STOP  # from now on it may end, with exit code 0
        await balancer.deregister()
        self._deployed = time.monotonic()
        self._milestone("the old task is deregistered: no new clients")
        if self._scenario.trigger is Trigger.SIGTERM:
            old.end(Deed.STOP)
            self._milestone("the old task gets SIGTERM")
        patience = NOTICED_SECONDS + STOP_TIMEOUT_SECONDS
        try:
            async with asyncio.timeout(patience):
                self._report.exit_code = await old.process.wait()
        except TimeoutError:
            raise RehearsalError(f"the old task did not end in {patience:.0f} s") from None
        self._report.drain_ended = time.monotonic() - self._started
        self._milestone(f"the old task has ended with exit code {self._report.exit_code}")
        self._report.drain_began = self._log_time(old, "draining")

    def _log_time(self, task: Task, message: str) -> float:
        """When a task logged something first, in seconds since publishing began; else nan."""
        for line in task.lines:
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if entry.get("message") == message:
                    moment = datetime.datetime.fromisoformat(entry["time"])
                    at = moment.timestamp() - self._started_utc
                    why = "SIGTERM" if self._scenario.trigger is Trigger.SIGTERM else "target"
                    self._report.milestones.append((at, f"the old task begins to drain ({why})"))
                    return at
        return math.nan

    async def _watch_lag(self) -> None:
        turn = 0.02
        while True:
            before = time.monotonic()
            await asyncio.sleep(turn)
            lag = time.monotonic() - before - turn
            self._report.lag_seconds = max(self._report.lag_seconds, lag)

    async def _publish(self) -> None:
        """Send as an agent would, at a steady pace; what fell behind goes out together."""
        numbers = range(1, self._scenario.events + 1)
        pace = self._scenario.events_per_second
        sent = 0
        while sent < len(numbers):
            due = int((time.monotonic() - self._started) * pace) + 1
            batch = numbers[sent : min(due, sent + 10)]
            if batch:
                await asyncio.to_thread(self._send, batch)
                sent += len(batch)
            wait = self._started + sent / pace - time.monotonic()
            await asyncio.sleep(max(0.0, wait))

    def _project_of(self, number: int) -> str:
        names = self._scenario.project_names
        return names[number % len(names)]

    def _send(self, numbers: Sequence[int]) -> None:
        entries = []
        for number in numbers:
            project = self._project_of(number)
            entries.append(
                {
                    "Id": str(number),
                    "MessageBody": Update(number, project, ephemeral=False).body(0),
                    "MessageGroupId": project,
                    "MessageDeduplicationId": str(number),
                }
            )
        answer = self._sqs.send_message_batch(
            QueueUrl=self._platform.queue_urls["updates"], Entries=entries
        )
        assert not answer.get("Failed"), answer

    async def _come_to_rest(self) -> None:
        """Wait until everything sent is logged, and everything logged received."""
        heads: dict[str, int] = {}

        async def all_logged() -> bool:
            heads.update(await asyncio.to_thread(self._read_heads))
            return sum(heads.values()) >= self._scenario.events

        async def all_received() -> bool:
            return await self._settled() and all(
                (feed.cursor or 0) >= heads[project]
                for client in self._clients
                for project, feed in client.feeds.items()
            )

        await until("every event is logged", all_logged, self.RECEIVED_SECONDS, self._fleet)
        await until(
            "every client reached the end of its logs",
            all_received,
            self.RECEIVED_SECONDS,
            self._fleet,
        )
        async with asyncio.timeout(self.RECEIVED_SECONDS):
            await asyncio.gather(*(client.ping() for client in self._clients))

    def _read_heads(self) -> dict[str, int]:
        table = self._platform.events_table_name
        return read_heads(self._dynamodb, table, self._scenario.project_names)

    async def _compare(self) -> None:
        """Compare the log with what was sent, and what came with the log."""
        report, scenario = self._report, self._scenario
        heads = await asyncio.to_thread(self._read_heads)
        table = self._platform.events_table_name
        logs: dict[str, list[Event]] = {}
        for project, head in heads.items():
            logs[project] = await asyncio.to_thread(read_log, self._dynamodb, table, project)
            sent = [n for n in range(1, scenario.events + 1) if self._project_of(n) == project]
            report.findings += log_faults(project, logs[project], head, sent, in_order=True)
        for client in self._clients:
            report.findings += [f"client {client.number}: {text}" for text in client.problems[:3]]
            for project, feed in client.feeds.items():
                due = logs[project][feed.start :]
                report.delivered += len(feed.events)
                missed, doubled = missed_and_doubled(feed.events, due)
                report.missed += missed
                report.doubled += doubled
                divergence = first_divergence(feed.events, due)
                if divergence is not None:
                    report.findings.append(f"client {client.number}, {project}: {divergence}")
        self._measure()

    def _measure(self) -> None:
        report, scenario = self._report, self._scenario
        before, after = [], []
        for client in self._clients:
            usual = scenario.projects / len(client.feeds) / scenario.events_per_second
            quiet = [at for at in client.arrivals if at < self._deployed]
            before.append((quiet, usual))
            after.append((client.arrivals[max(0, len(quiet) - 1) :], usual))
            report.cut_offs += client.cut_offs
            for move in client.moves:
                if not math.isnan(move.back_at):
                    report.moves_seconds.append(move.back_at - move.told_at)
                    report.reconnects[int(move.back_at - self._started)] += 1
        report.gap_before = longest_gap(before)
        report.gap = longest_gap(after)


@contextlib.asynccontextmanager
async def running_elb() -> AsyncIterator[tuple[Elb, str]]:
    """A load balancer's API, whatever plays the rest of AWS; yields it and its address."""
    stand_in = await StandIn().start()
    try:
        yield stand_in.elb, stand_in.endpoint_url
    finally:
        await stand_in.stop()


async def rehearse(
    scenario: Scenario,
    platform: Platform,
    balancer: str,
    *,
    aws: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """Hold one rehearsal on an empty platform; what went wrong is in the report's findings."""
    report = Report(scenario, where=aws)
    async with task_metadata() as metadata_url, running_elb() as (elb, elb_url):
        environment = {
            **server_environment(platform, platform.endpoint_url),
            "AWS_ENDPOINT_URL_ELASTIC_LOAD_BALANCING_V2": elb_url,
            "TARGET_GROUP_ARN": TARGET_GROUP_ARN,
            "DRAIN_SECONDS": str(scenario.drain_seconds),
            "MAX_CONNECTIONS_PER_IP": "0",  # all clients have one address here
            # Those of production, not the quick ones of the chaos runs.
            "TASK_HEARTBEAT_SECONDS": "60",
            "AUDIT_INTERVAL_SECONDS": "30",
            "PING_INTERVAL_SECONDS": "25",
        }
        fleet = FleetBehindBalancer(2, environment, metadata_url, seed=0)
        try:
            await Rehearsal(scenario, platform, fleet, report, elb, say)(balancer)
        except (RehearsalError, TimeoutError) as failure:
            report.findings.insert(0, str(failure) or "time was up")
        finally:
            await fleet.close()
    report.findings += fleet.failures
    report.findings += [
        f"task {task.name} printed: {line[:300]}"
        for task in fleet.tasks
        for line in task.alarms[:3]
    ]
    report.judge()
    return report


async def rehearse_on_moto(
    scenario: Scenario, balancer: str, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Hold one rehearsal on a moto of its own."""
    with await asyncio.to_thread(MotoAws.start) as aws:
        platform = await asyncio.to_thread(aws.create_platform, fifo_updates=True)
        return await rehearse(scenario, platform, balancer, aws="on moto", say=say)


async def rehearse_on_stand_in(
    scenario: Scenario, balancer: str, say: Callable[[str], None] = lambda _: None
) -> Report:
    """Hold one rehearsal on a stand-in in this very process."""
    stand_in = await StandIn().start()
    try:
        platform = stand_in.create_platform(fifo_updates=True)
        return await rehearse(scenario, platform, balancer, aws="on the stand-in", say=say)
    finally:
        await stand_in.stop()


def main() -> int:
    defaults = Scenario()
    parser = argparse.ArgumentParser(
        prog="python -m tests.rehearsal",
        description="Replace a task behind a real proxy; see that no client misses an event.",
    )
    parser.add_argument("--clients", type=int, default=defaults.clients, metavar="N")
    parser.add_argument("--events", type=int, default=defaults.events, metavar="N")
    parser.add_argument("--projects", type=int, default=defaults.projects, metavar="N")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=defaults.drain_seconds,
        metavar="S",
        help="over which the old task sends its clients away (%(default)s)",
    )
    parser.add_argument(
        "--trigger",
        default=defaults.trigger.value,
        choices=[trigger.value for trigger in Trigger],
        help="what makes it drain: its target is deregistered (the default), or SIGTERM",
    )
    parser.add_argument("--proxy", choices=list(BALANCERS), help="default: the first installed")
    parser.add_argument(
        "--aws",
        default="moto",
        choices=["moto", "standin"],
        help="moto (the default), or the fast stand-in",
    )
    options = parser.parse_args()
    balancer = options.proxy or next(iter(installed_balancers()), None)
    if balancer not in installed_balancers():
        missing = f"{balancer} is not" if balancer else "Neither haproxy nor nginx is"
        print(
            f"{missing} installed. On Debian or Ubuntu: apt-get install {balancer or 'haproxy'}",
            file=sys.stderr,
        )
        return 2
    scenario = Scenario(
        clients=options.clients,
        events=options.events,
        projects=options.projects,
        drain_seconds=options.drain_seconds,
        trigger=Trigger(options.trigger),
    )
    # However it is told to end, it takes its processes with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    hold = rehearse_on_moto if options.aws == "moto" else rehearse_on_stand_in

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        report = asyncio.run(hold(scenario, balancer, say))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
