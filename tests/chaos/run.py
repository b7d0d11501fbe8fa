"""One run, from an empty AWS to the verdict."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

from aws_standin import StandIn
from tests.chaos.checker import Event, first_divergence, log_faults
from tests.chaos.clients import Client
from tests.chaos.fleet import ROOT, Fleet, Platform, server_environment, task_metadata
from tests.chaos.plan import EVERYONE, TO_CLIENTS, Action, Burst, Deed, Plan, project_names
from tests.fault_proxy import NO_FAULTS, ROUGH_DAY, Call, FaultPlan, FaultProxy
from tests.moto_aws import MotoAws

# Where the full logs of a run that failed are put.
REPORTS = ROOT / "build" / "chaos"

# A standard updates queue counts a receive each time a task dies with the message in its hands; a
# run kills more often than production's five receives allow for.
MAX_RECEIVES = 100


class ChaosError(Exception):
    """A promise was broken, or something did not happen in time. The text is the whole report."""


def read_log(dynamodb: Any, table: str, project: str) -> list[Event]:
    """Read a project's events in the order of their keys."""
    pages = dynamodb.get_paginator("query").paginate(
        TableName=table,
        KeyConditionExpression="PK = :project AND begins_with(SK, :event)",
        ExpressionAttributeValues={
            ":project": {"S": f"PROJECT#{project}"},
            ":event": {"S": "EVENT#"},
        },
        ConsistentRead=True,
    )
    return [_logged_event(item) for page in pages for item in page["Items"]]


def read_heads(dynamodb: Any, table: str, projects: Iterable[str]) -> dict[str, int]:
    """Read the seq of each project's last event; 0 where nothing was logged yet."""
    keys = [{"PK": {"S": f"PROJECT#{p}"}, "SK": {"S": "EVENTLOG"}} for p in projects]
    answer = dynamodb.batch_get_item(RequestItems={table: {"Keys": keys, "ConsistentRead": True}})
    heads = dict.fromkeys(projects, 0)
    for item in answer["Responses"][table]:
        heads[item["PK"]["S"].removeprefix("PROJECT#")] = int(item["seq"]["N"])
    return heads


def messages_in(sqs: Any, queue_url: str) -> int:
    """How many messages a queue has, those included that somebody works on."""
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    answer = sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=names)
    return sum(map(int, answer["Attributes"].values()))


def _logged_event(item: dict[str, Any]) -> Event:
    data = json.loads(item["data"]["S"])
    return Event(
        seq=int(item["SK"]["S"].removeprefix("EVENT#")),
        number=data["n"],
        type=item["type"]["S"],
        timestamp=item["timestamp"]["S"],
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a run that went well did."""

    plan: Plan
    seconds: float
    logged: int
    delivered: int
    connections: int
    tasks: int
    faults: int
    calls: Counter[Call]

    def __str__(self) -> str:
        return (
            f"seed {self.plan.seed:<4} {'fifo' if self.plan.fifo else 'standard':<8} ok "
            f"{self.seconds:5.1f} s: {self.logged} logged, {self.delivered} delivered over "
            f"{self.connections} connections, {self.tasks} processes, {self.faults} faults"
        )


class Run:
    """One seed, from an empty AWS to the verdict."""

    LOGGED_SECONDS = 60.0
    RECEIVED_SECONDS = 30.0
    REAPED_SECONDS = 40.0

    def __init__(self, plan: Plan, platform: Platform, proxy: FaultProxy, fleet: Fleet) -> None:
        self.plan = plan
        self.platform = platform
        self.proxy = proxy
        self.sqs = platform.client("sqs")
        self.sns = platform.client("sns")
        self.dynamodb = platform.client("dynamodb")
        self.fleet = fleet
        self.clients = [
            Client(number, projects, fleet, plan.seed)
            for number, projects in enumerate(_interests(plan))
        ]
        self.findings: list[str] = []
        self.logs: dict[str, list[Event]] = {}
        self.stage = "start"
        self._jobs: list[asyncio.Task[None]] = []

    async def play(self) -> None:
        """Do it all. Raises ChaosError; what was found out before that is in ``findings``."""
        await asyncio.gather(*(self.fleet.start(slot) for slot in range(self.plan.scale.tasks)))
        await self._until("every task is healthy", self._all_healthy, Fleet.START_SECONDS)
        for client in self.clients:
            if client.number not in self.plan.late_clients:
                self._spawn(client.run())
        await self._until("the clients are subscribed", self._settled, self.RECEIVED_SECONDS)
        try:
            await self._send_and_disturb()
            await self._come_to_rest()
        except ChaosError:
            await self.fleet.close()  # so that the log and the feeds stay as they are
            raise
        finally:
            await self._compare()
        await self._check_fan_out()
        await self._stop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        job: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._jobs.append(job)
        return job

    async def _until(
        self, what: str, condition: Callable[[], Awaitable[bool]], seconds: float
    ) -> None:
        """Wait for a condition. Raises ChaosError when time is up, or a process failed."""
        self.stage = what
        deadline = time.monotonic() + seconds
        while not await condition():
            if self.fleet.failures:
                raise ChaosError(f"a process failed while waiting until {what}")
            if time.monotonic() > deadline:
                raise ChaosError(f"in {seconds:.0f} s it did not come about that {what}")
            await asyncio.sleep(0.2)

    async def _all_healthy(self) -> bool:
        return self.fleet.all_healthy

    async def _settled(self) -> bool:
        """Whether every client but the late ones is subscribed."""
        late = self.plan.late_clients
        return all(client.settled for client in self.clients if client.number not in late)

    async def _send_and_disturb(self) -> None:
        """Send the updates, and do each deed once the updates before it were sent."""
        self.stage = "the updates are sent"
        due = deque(self.plan.actions)
        latecomers = deque(sorted(self.plan.late_clients))
        deeds: list[asyncio.Task[None]] = []
        sent = 0
        for burst in self.plan.bursts:
            await asyncio.to_thread(self._send, burst)
            sent += sum(not update.ephemeral for update in burst.updates)
            while due and due[0].after <= sent:
                deeds.append(self._spawn(self._do(due.popleft())))
            if latecomers and sent > self.plan.scale.updates // 2:
                latecomer = self.clients[latecomers.popleft()]
                latecomer.begin_from_the_first_event()
                self._spawn(latecomer.run())
            await asyncio.sleep(burst.pause_seconds)
        self.stage = "the last deed is done"
        await asyncio.gather(*deeds)

    def _send(self, burst: Burst) -> None:
        """Send as an agent would: straight to SQS, which for an agent works."""
        entries = []
        for update in burst.updates:
            entry = {"Id": str(update.number), "MessageBody": update.body(self.plan.seed)}
            if self.plan.fifo:
                entry["MessageGroupId"] = update.project.replace(EVERYONE, "everyone")
                entry["MessageDeduplicationId"] = str(update.number)
            entries.append(entry)
        queue = self.platform.queue_urls["updates"]
        answer = self.sqs.send_message_batch(QueueUrl=queue, Entries=entries)
        assert not answer.get("Failed"), answer

    async def _do(self, action: Action) -> None:
        if action.deed in TO_CLIENTS:
            self.clients[action.target].suffer(action.deed, action.seconds)
        elif action.deed is Deed.FREEZE:
            await self.fleet.freeze(action.target, action.seconds)
        else:
            await self.fleet.replace(action.target, action.deed, action.seconds)

    async def _come_to_rest(self) -> None:
        """Wait until everything sent is logged, and everything logged received."""
        await self._until("every task is healthy again", self._all_healthy, Fleet.START_SECONDS)
        await self._until("every update is logged", self._all_logged, self.LOGGED_SECONDS)
        await self._until("the updates queue is empty", self._queue_empty, self.LOGGED_SECONDS)
        self._heads = await asyncio.to_thread(self._read_heads)
        await self._until(
            "every client reached the head of its logs", self._all_received, self.RECEIVED_SECONDS
        )
        self.stage = "every client was answered once more"
        async with asyncio.timeout(self.RECEIVED_SECONDS):
            await asyncio.gather(*(client.ping() for client in self.clients))

    async def _all_logged(self) -> bool:
        heads = await asyncio.to_thread(self._read_heads)
        return sum(heads.values()) >= len(self.plan.logged)

    def _read_heads(self) -> dict[str, int]:
        return read_heads(self.dynamodb, self.platform.events_table_name, _all_projects(self.plan))

    async def _queue_empty(self) -> bool:
        return (
            await asyncio.to_thread(messages_in, self.sqs, self.platform.queue_urls["updates"]) == 0
        )

    async def _all_received(self) -> bool:
        return all(
            client.settled
            and all((feed.cursor or 0) >= self._heads[p] for p, feed in client.feeds.items())
            for client in self.clients
        )

    async def _compare(self) -> None:
        """The verdict on log and clients; whatever is wrong is added to the findings."""
        heads = await asyncio.to_thread(self._read_heads)
        table = self.platform.events_table_name
        for project, head in heads.items():
            log = await asyncio.to_thread(read_log, self.dynamodb, table, project)
            sent = [update.number for update in self.plan.logged if update.project == project]
            self.findings += log_faults(project, log, head, sent, in_order=self.plan.fifo)
            self.logs[project] = log
        unfinished: list[str] = []
        for client in self.clients:
            self.findings += [f"client {client.number}: {text}" for text in client.problems[:3]]
            for project, feed in client.feeds.items():
                due = self.logs[project][feed.start :]
                divergence = first_divergence(feed.events, due)
                if divergence is not None:
                    so_far = divergence.index == len(feed.events)
                    findings = unfinished if so_far else self.findings
                    findings.append(f"client {client.number}, {project}: {divergence}")
        self.findings += unfinished  # last, as these may just be a run that was broken off
        if dead := await asyncio.to_thread(
            messages_in, self.sqs, self.platform.queue_urls["updates_dlq"]
        ):
            self.findings.append(f"{dead} updates are in the dead-letter queue")

    async def _check_fan_out(self) -> None:
        """Wait until the queues and subscriptions are exactly those of the living."""
        await self._until_owned("every living task has a queue, and no other", self._queue_owners)
        await self._until_owned("every living task is subscribed, and no other", self._subscribers)

    async def _until_owned(self, what: str, list_owners: Callable[[], list[str]]) -> None:
        living = sorted(task.id for task in self.fleet.alive)
        owners: list[str] = []

        async def as_it_should_be() -> bool:
            nonlocal owners
            owners = sorted(await asyncio.to_thread(list_owners))
            return owners == living

        try:
            await self._until(what, as_it_should_be, self.REAPED_SECONDS)
        except ChaosError:
            self.findings.append(f"living: {self._names(living)}, found: {self._names(owners)}")
            raise

    def _names(self, identifiers: Iterable[str]) -> list[str]:
        names = {task.id: task.name for task in self.fleet.tasks}
        return sorted(names.get(identifier, identifier) for identifier in identifiers)

    def _queue_owners(self) -> list[str]:
        """The tasks whose queue exists."""
        prefix = self.platform.topic_arn.rpartition(":")[2] + "-task-"
        pages = self.sqs.get_paginator("list_queues")
        urls = [
            url
            for page in pages.paginate(QueueNamePrefix=prefix)
            for url in page.get("QueueUrls", [])
        ]
        return [url.rpartition("-task-")[2] for url in urls]

    def _subscribers(self) -> list[str]:
        """The tasks whose queue is subscribed, once for each subscription."""
        pages = self.sns.get_paginator("list_subscriptions_by_topic")
        endpoints = [
            subscription["Endpoint"]
            for page in pages.paginate(TopicArn=self.platform.topic_arn)
            for subscription in page["Subscriptions"]
        ]
        return [endpoint.rpartition("-task-")[2] for endpoint in endpoints]

    async def _stop(self) -> None:
        """Stop the tasks, AWS behaving: with nobody left to clean up after them, they must."""
        self.stage = "the tasks have stopped"
        self.proxy.plan.rates = NO_FAULTS
        for client in self.clients:
            client.let_go()  # else the tasks would wait for answers to their closing handshakes
        await self.fleet.stop()
        if left := await asyncio.to_thread(lambda: self._queue_owners() + self._subscribers()):
            self.findings.append(f"stopped tasks left a queue or subscription: {self._names(left)}")

    async def close(self) -> None:
        """End everything that runs, however the run went."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, return_exceptions=True)
        await self.fleet.close()

    def verdict(self, reason: str | None) -> str | None:
        """The report of what is wrong, None if nothing is."""
        alarms = [
            f"task {task.name} printed: {line[:300]}"
            for task in self.fleet.tasks
            for line in task.alarms[:3]
        ]
        findings = [*([reason] if reason else []), *self.fleet.failures, *alarms, *self.findings]
        return "\n".join(self._report(findings)) if findings else None

    def _report(self, findings: list[str]) -> Iterable[str]:
        """The lines of a report: what is wrong, and what it takes to find out why."""
        queue = "FIFO" if self.plan.fifo else "standard"
        faults = "with" if self.plan.faults else "without"
        yield f"seed {self.plan.seed} failed ({queue} updates queue, {faults} faults of AWS)"
        yield from (f"  ! {finding}" for finding in findings[:40])
        if len(findings) > 40:
            yield f"  ... and {len(findings) - 40} more"
        yield "  schedule of the processes:"
        yield from (f"    {a}" for a in self.plan.actions if a.deed not in TO_CLIENTS)
        yield "  faults of AWS:"
        injected = ((op, fault, times) for (op, fault), times in self.proxy.injected.items())
        yield from (f"    {op}: {fault}, {times} times" for op, fault, times in sorted(injected))
        yield f"  the ends of the servers' logs (whole in {self._write_report()}):"
        for task in self.fleet.tasks:
            yield from (f"    {task.name} | {line[:400]}" for line in list(task.lines)[-8:])
        yield f"  again: {self.plan.command}"

    def _write_report(self) -> Path:
        """Put the servers' logs and the projects' into a folder of this run's own."""
        folder = REPORTS / f"seed-{self.plan.seed}{'-faults' if self.plan.faults else ''}"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for task in self.fleet.tasks:
            (folder / f"task-{task.name.replace('/', '-')}.log").write_text("\n".join(task.lines))
        for project, events in self.logs.items():
            name = f"project-{project.replace(EVERYONE, 'everyone')}.txt"
            lines = [f"{e.seq} {e.timestamp} update {e.number} {e.type}" for e in events]
            (folder / name).write_text("\n".join(lines))
        return folder


def _interests(plan: Plan) -> Iterable[list[str]]:
    """The projects of each client: one to three of them, and for some the broadcasts."""
    dice = random.Random(f"interests/{plan.seed}")
    projects = project_names(plan.scale)
    for number in range(plan.scale.clients):
        first = projects[number % len(projects)]
        others = [project for project in projects if project != first]
        chosen = [first, *dice.sample(others, min(dice.choice([0, 0, 1, 2]), len(others)))]
        yield [*chosen, EVERYONE] if dice.random() < 0.25 else chosen


def _all_projects(plan: Plan) -> list[str]:
    return [*project_names(plan.scale), EVERYONE]


def quicken(platform: Platform, visibility_timeout_seconds: int) -> None:
    """Make the updates queue give back what a killed task held, soon and however often it takes."""
    sqs = platform.client("sqs")
    queue = platform.queue_urls["updates"]
    attributes = sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=["RedrivePolicy"])
    redrive = json.loads(attributes["Attributes"]["RedrivePolicy"])
    sqs.set_queue_attributes(
        QueueUrl=queue,
        Attributes={
            "VisibilityTimeout": str(visibility_timeout_seconds),
            "RedrivePolicy": json.dumps({**redrive, "maxReceiveCount": MAX_RECEIVES}),
        },
    )


async def run_on_moto(plan: Plan, aws: MotoAws) -> Outcome:
    """Run a plan on moto, which is emptied first. Raises ChaosError."""
    await asyncio.to_thread(aws.reset)
    return await run(plan, await asyncio.to_thread(aws.create_platform, fifo_updates=plan.fifo))


async def run_on_stand_in(plan: Plan) -> Outcome:
    """Run a plan on a stand-in of its own, in this very process. Raises ChaosError."""
    stand_in = await StandIn().start()
    try:
        return await run(plan, stand_in.create_platform(fifo_updates=plan.fifo))
    finally:
        await stand_in.stop()


async def run(plan: Plan, platform: Platform) -> Outcome:
    """Run a plan on an empty platform. Raises ChaosError with the whole report."""
    started = time.monotonic()
    await asyncio.to_thread(quicken, platform, plan.scale.visibility_timeout_seconds)
    faults = FaultPlan(plan.seed, ROUGH_DAY if plan.faults else NO_FAULTS)
    async with FaultProxy(platform.endpoint_url, faults) as proxy, task_metadata() as metadata_url:
        environment = server_environment(platform, proxy.endpoint_url)
        scale = plan.scale
        fleet = Fleet(scale.tasks, environment, metadata_url, plan.seed, scale.scripts)
        this_run = Run(plan, platform, proxy, fleet)
        reason = None
        try:
            await this_run.play()
        except (ChaosError, TimeoutError) as failure:
            reason = f"{failure}" if str(failure) else f"time was up before {this_run.stage}"
        finally:
            await this_run.close()
    if report := this_run.verdict(reason):
        raise ChaosError(report)
    return Outcome(
        plan=plan,
        seconds=time.monotonic() - started,
        logged=len(plan.logged),
        delivered=sum(len(f.events) for c in this_run.clients for f in c.feeds.values()),
        connections=sum(client.connections for client in this_run.clients),
        tasks=len(fleet.tasks),
        faults=proxy.injected.total(),
        calls=proxy.calls,
    )
