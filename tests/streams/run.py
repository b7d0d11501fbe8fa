"""One run, from an empty AWS to the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from aws_standin import Platform, StandIn
from tests.chaos import plan
from tests.chaos.fleet import ROOT, Fleet, server_environment, task_metadata
from tests.chaos.run import messages_in, quicken
from tests.fault_proxy import ROUGH_DAY, FaultPlan, FaultProxy
from tests.streams.checker import Json, logged_text, unfinished
from tests.streams.texts import ATTEMPTS, PROJECTS, message_ids, script_of

TASKS = 2
AGENTS = 2
PAGES = 8
PROJECTS_WATCHED = 3  # by each page, beside its own orders
ORDERS_PER_SECOND = 10
ORDER_VISIBILITY_S = 20
UPDATE_VISIBILITY_S = 2
SETTLE_S = 180.0  # for what is slow on a machine that has other things to do, too
LATE_PAGE = PAGES
# Where the full logs of a run that failed are put.
REPORTS = ROOT / "build" / "streams"


class StreamsError(Exception):
    """A text was not what an agent wrote, or something did not come about. The whole report."""


@dataclasses.dataclass(frozen=True, slots=True)
class Deed:
    """What happens, how many seconds after the first order, and to which one."""

    at_s: float
    deed: str
    target: int


def deeds(seed: int, seconds: float) -> list[Deed]:
    """What a run suffers, in order: as often, however many orders there are."""
    dice = random.Random(f"deeds/{seed}")
    often = {"kill task": (3, TASKS), "kill agent": (4, AGENTS)}
    often |= dict.fromkeys(("cut", "reload", "move"), (2 * PAGES, PAGES))
    found = [
        Deed(dice.uniform(0.5, seconds + 3.0), deed, dice.randrange(targets))
        for deed, (times, targets) in often.items()
        for _ in range(times)
    ]
    return sorted(found, key=lambda deed: deed.at_s)


class Pages:
    """The Node process with all pages, and what it says."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.faults: list[str] = []
        self.confirmed: set[str] = set()
        self.finished: Json | None = None
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def start(cls, texts: Path, seed: int) -> Pages:
        process = await asyncio.create_subprocess_exec(
            "node",
            str(Path(__file__).with_name("pages.js")),
            str(texts),
            str(seed),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=1024 * 1024,
        )
        return cls(process)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            try:
                said = json.loads(line)
            except ValueError:  # the trace of an error that nobody caught
                said = {"fault": f"the pages printed: {line.decode().rstrip()}"}
            match said:
                case {"fault": fault}:
                    self.faults.append(fault)
                case {"confirmed": message_id}:
                    self.confirmed.add(message_id)
                case {"finished": counts}:
                    self.finished = counts
        if self.finished is None:
            self.faults.append("the pages ended on their own")

    def tell(self, command: str, value: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({command: value}).encode() + b"\n")

    async def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        await self._reading


class Agents:
    """The agents' processes, with a successor for each that is killed."""

    def __init__(self, seed: int, environment: dict[str, str]) -> None:
        self.killed = 0
        self._seed = seed
        self._environment = environment
        self._processes: dict[int, asyncio.subprocess.Process] = {}

    async def start(self, number: int) -> None:
        arguments = ("-m", "tests.streams.agent", str(self._seed))
        self._processes[number] = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            cwd=ROOT,
            env=self._environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )

    async def replace(self, number: int) -> None:
        if (process := self._processes.pop(number, None)) is None:
            return  # another deed has it in hand
        self.killed += 1
        process.kill()
        await process.wait()
        await self.start(number)

    async def close(self) -> None:
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run that went well did."""

    seed: int
    seconds: float
    orders: int
    streams: dict[str, int]
    seen: int
    middle: int
    connections: int
    tasks: int
    agents_killed: int
    faults: int

    def __str__(self) -> str:
        states = ", ".join(f"{count} {state}" for state, count in sorted(self.streams.items()))
        return (
            f"seed {self.seed:<3} {queue_kind(self.seed):<8} ok {self.seconds:5.1f} s: "
            f"{self.orders} orders, streams {states}; {self.seen} looks, {self.middle} "
            f"of them from the middle of a text on, over {self.connections} connections, "
            f"{self.tasks} tasks, {self.agents_killed} agents killed, {self.faults} faults of AWS"
        )


def queue_kind(seed: int) -> str:
    return "standard" if seed % 2 else "fifo"


class Run:
    """One seed, from tasks and agents that have started to the verdict."""

    def __init__(
        self,
        seed: int,
        streams: int,
        platform: Platform,
        fleet: Fleet,
        agents: Agents,
        pages: Pages,
    ) -> None:
        self.seed = seed
        self.order_ids = message_ids(streams)
        self.dice = random.Random(f"run/{seed}")
        self.platform = platform
        self.dynamodb = platform.client("dynamodb")
        self.sqs = platform.client("sqs")
        self.fleet = fleet
        self.agents = agents
        self.pages = pages
        self.findings: list[str] = []
        self.states: Counter[str] = Counter()

    async def play(self) -> None:
        """Do it all. Raises StreamsError where something does not come about."""
        await asyncio.gather(
            *(self.fleet.start(slot) for slot in range(TASKS)),
            *(self.agents.start(number) for number in range(AGENTS)),
        )
        await self._until("every task is healthy", lambda: self.fleet.all_healthy)
        async with asyncio.TaskGroup() as group:
            balancer = group.create_task(self._tell_ports())
            for number in range(PAGES):
                watched = self.dice.sample(range(PROJECTS), PROJECTS_WATCHED)
                self._open_page(number, watched)
            suffering = group.create_task(self._suffer())
            await self._order()
            await suffering
            await self._until(
                "every order is confirmed",
                lambda: len(self.pages.confirmed) == len(self.order_ids),
            )
            await self._until_empty("dev")
            await self._until_empty("updates")
            self._open_page(LATE_PAGE, range(PROJECTS))
            logs = await asyncio.to_thread(self._read_logs)
            self.pages.tell("finish", {"logs": logs, "seconds": SETTLE_S})
            await self._until("the pages are finished", lambda: bool(self.pages.finished), 200.0)
            balancer.cancel()

    def _open_page(self, number: int, projects: Sequence[int]) -> None:
        names = [f"p{project}" for project in projects]
        self.pages.tell("page", {"number": number, "projects": names})

    async def _tell_ports(self) -> None:
        """Do for the pages what a load balancer does: say which tasks are healthy."""
        told: list[int] = []
        while True:
            ports = [task.port for task in self.fleet.alive if task.healthy.is_set()]
            if ports != told:
                self.pages.tell("ports", ports)
                told = ports
            await asyncio.sleep(0.05)

    async def _order(self) -> None:
        for message_id in self.order_ids:
            order = {
                "page": self.dice.randrange(PAGES),
                "messageId": message_id,
                "project": f"p{self.dice.randrange(PROJECTS)}",
                "stops": self.dice.random() < 0.05,
            }
            self.pages.tell("order", order)
            await asyncio.sleep(self.dice.uniform(0, 2 / ORDERS_PER_SECOND))

    async def _suffer(self) -> None:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for each in deeds(self.seed, len(self.order_ids) / ORDERS_PER_SECOND):
                await asyncio.sleep(max(0.0, started + each.at_s - time.monotonic()))
                if each.deed == "kill task":
                    group.create_task(self.fleet.replace(each.target, plan.Deed.KILL, 0.2))
                elif each.deed == "kill agent":
                    group.create_task(self.agents.replace(each.target))
                else:
                    self.pages.tell(each.deed, each.target)

    async def _until(
        self, what: str, condition: Callable[[], bool], seconds: float = SETTLE_S
    ) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if self.fleet.failures or self.pages.process.returncode is not None:
                raise StreamsError(f"a process failed while waiting until {what}")
            if time.monotonic() > deadline:
                raise StreamsError(f"in {seconds:.0f} s it did not come about that {what}")
            await asyncio.sleep(0.1)

    async def _until_empty(self, queue: str) -> None:
        left = 1

        async def count() -> None:
            nonlocal left
            while left:
                left = await asyncio.to_thread(
                    messages_in, self.sqs, self.platform.queue_urls[queue]
                )
                await asyncio.sleep(0.2)

        counting = asyncio.get_running_loop().create_task(count())
        try:
            await self._until(f"the queue {queue} is empty", counting.done)
        finally:
            counting.cancel()

    def _read_logs(self) -> Json:
        """The texts in the logs, by project, order and stream; faults of theirs are noted."""
        logs: Json = {}
        ends: dict[str, set[str]] = {message_id: set() for message_id in self.order_ids}
        for number in range(PROJECTS):
            streams: dict[str, Json] = logs.setdefault(f"p{number}", {})
            pieces: dict[tuple[str, str], list[Json]] = defaultdict(list)
            for item in self._events(f"p{number}"):
                data = json.loads(item["data"]["S"])
                message_id = item.get("in_reply_to", {}).get("S")
                if item["type"]["S"] == "stream":
                    data["seq"] = int(item["SK"]["S"].removeprefix("EVENT#"))
                    pieces[message_id, data["stream"]].append(data)
                elif data and data.get("status") in ("done", "cancelled"):
                    ends[message_id].add(data["status"])
            for (message_id, stream), of_stream in pieces.items():
                text, faults = logged_text(self.seed, message_id, stream, of_stream)
                self.findings += faults
                self.states.update(text["states"])
                streams.setdefault(message_id, {})[stream] = text
            self.findings += unfinished(streams, ends)
        self.findings += [f"{each} was not answered" for each, how in ends.items() if not how]
        return logs

    def _events(self, project: str) -> Iterator[Json]:
        pages = self.dynamodb.get_paginator("query").paginate(
            TableName=self.platform.events_table_name,
            KeyConditionExpression="PK = :project AND begins_with(SK, :event)",
            ExpressionAttributeValues={
                ":project": {"S": f"PROJECT#{project}"},
                ":event": {"S": "EVENT#"},
            },
        )
        for page in pages:
            yield from page["Items"]

    def report(self, reason: str | None) -> str | None:
        """What is wrong, None if nothing is."""
        alarms = [f"task {t.name}: {line[:300]}" for t in self.fleet.tasks for line in t.alarms[:3]]
        found = [*([reason] if reason else []), *self.fleet.failures, *alarms, *self.findings]
        found += self.pages.faults
        if not found:
            return None
        lines = [f"seed {self.seed} failed ({queue_kind(self.seed)} updates queue)"]
        lines += [f"  ! {each[:1500]}" for each in found[:20]]
        lines += [f"  ... and {len(found) - 20} more"] * (len(found) > 20)
        lines += [f"  the servers' logs are in {self._write_report()}"]
        again = f"python -m tests.streams --seed {self.seed} --streams {len(self.order_ids)}"
        return "\n".join([*lines, f"  again: {again}"])

    def _write_report(self) -> Path:
        """Put the servers' logs, and what the projects' logs hold, into a folder of this run's."""
        folder = REPORTS / f"seed-{self.seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for task in self.fleet.tasks:
            (folder / f"task-{task.name.replace('/', '-')}.log").write_text("\n".join(task.lines))
        for number in range(PROJECTS):
            lines = [json.dumps(item) for item in self._events(f"p{number}")]
            (folder / f"project-p{number}.txt").write_text("\n".join(lines))
        return folder


async def run(seed: int, streams: int, order_visibility_s: int = ORDER_VISIBILITY_S) -> Outcome:
    """Run a seed. Raises StreamsError with the whole report.

    A killed agent holds its orders for ``order_visibility_s``, which is longer than an attempt.
    """
    started = time.monotonic()
    stand_in = await StandIn().start()
    try:
        platform = stand_in.create_platform(fifo_updates=queue_kind(seed) == "fifo")
        await asyncio.to_thread(quicken, platform, UPDATE_VISIBILITY_S)
        stand_in.queues[platform.queue_names["dev"]].attributes["VisibilityTimeout"] = str(
            order_visibility_s
        )
        with tempfile.TemporaryDirectory() as folder:
            texts = _write_texts(Path(folder), seed, streams)
            outcome = await _run(seed, streams, platform, texts)
    finally:
        await stand_in.stop()
    return dataclasses.replace(outcome, seconds=time.monotonic() - started)


def _write_texts(folder: Path, seed: int, streams: int) -> Path:
    """Write down for the pages what each attempt at each order writes."""
    attempts = range(1, ATTEMPTS + 1)
    texts = {
        message_id: [script_of(seed, message_id, attempt).text for attempt in attempts]
        for message_id in message_ids(streams)
    }
    path = folder / "texts.json"
    path.write_text(json.dumps(texts))
    return path


async def _run(seed: int, streams: int, platform: Platform, texts: Path) -> Outcome:
    faults = FaultPlan(seed, ROUGH_DAY)
    async with FaultProxy(platform.endpoint_url, faults) as proxy, task_metadata() as metadata_url:
        environment = server_environment(platform, proxy.endpoint_url)
        fleet = Fleet(TASKS, environment, metadata_url, seed)
        agents = Agents(seed, environment)
        pages = await Pages.start(texts, seed)
        this_run = Run(seed, streams, platform, fleet, agents, pages)
        reason = None
        try:
            await this_run.play()
        except* StreamsError as failures:
            reason = "; ".join(map(str, failures.exceptions))
        finally:
            await pages.close()
            await agents.close()
            await fleet.close()
    if report := await asyncio.to_thread(this_run.report, reason):
        raise StreamsError(report)
    assert pages.finished is not None
    return Outcome(
        seed=seed,
        seconds=0.0,
        orders=streams,
        streams=dict(this_run.states),
        seen=pages.finished["seen"],
        middle=pages.finished["middle"],
        connections=pages.finished["connections"],
        tasks=len(fleet.tasks),
        agents_killed=agents.killed,
        faults=proxy.injected.total(),
    )
