"""The task role against the calls that tasks really make, each on the resource it is made on.

One run has tasks killed and clients cut off, so that whatever tasks do for each other is done too;
the other has a client use what the first does not: forwards, a snapshot, an unreadable update.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

from aws_standin import StandIn
from aws_standin.elb import TARGET_GROUP_ARN
from tests.chaos.fleet import Fleet, server_environment, task_metadata
from tests.chaos.plan import Scale, make_plan
from tests.chaos.run import run_on_stand_in
from tests.fault_proxy import NO_FAULTS, Call, FaultPlan, FaultProxy
from tests.server.gateways import client_at
from tests.template import Stack, iam_actions

SCALE = Scale(tasks=3, clients=9, projects=3, updates=60, seconds=1.0)


def statement_of(call: Call) -> str:
    """The Sid of the role's statement that has to allow a call, told by what it is made on."""
    name = call.resource.split(":", 5)[-1]
    if call.service == "dynamodb":
        return "ReadProjects" if name.endswith("-data") else "KeepEventLog"
    if call.service == "elasticloadbalancing":
        return "OwnTargetHealth"
    if call.service == "sns":
        if call.operation == "Subscribe":
            return "SubscribeOwnQueue"
        return "EndSubscriptions" if ":" in name else "FanOut"
    if name == "*":
        return "FindQueuesOfKilledTasks"
    if "-task-" in name:
        return "OwnQueue"
    return "ReceiveUpdates" if "-updates" in name else "ForwardToAgents"


def needed(calls: Iterable[Call]) -> dict[str, set[str]]:
    """Statement to the actions it has to allow."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for call in calls:
        found[statement_of(call)] |= iam_actions(call.service, call.operation)
    return dict(found)


def granted() -> dict[str, set[str]]:
    """Statement to the actions it allows."""
    found = {}
    for sid, statement in (
        Stack(ContainerImage="repository@sha256:0").statements("TaskRole").items()
    ):
        actions = statement["Action"]
        found[sid] = {actions} if isinstance(actions, str) else set(actions)
    return found


async def calls_for_a_client() -> Counter[Call]:
    """What one task calls for a client that uses everything, and for an agent's mistake."""
    stand_in = await StandIn().start()
    platform = stand_in.create_platform()
    plan = FaultPlan(1, NO_FAULTS)
    try:
        async with FaultProxy(platform.endpoint_url, plan) as proxy, task_metadata() as metadata:
            environment = server_environment(platform, proxy.endpoint_url)
            environment["TARGET_GROUP_ARN"] = TARGET_GROUP_ARN
            fleet = Fleet(1, environment, metadata, seed=1)
            try:
                await fleet.start(0)
                task = await fleet.any_healthy(random.Random(1))
                async with client_at(f"ws://127.0.0.1:{task.port}") as client:
                    await client.send(action="subscribe", project_id="p", snapshot=True)
                    for agent in ("pm", "dev", "qa", "ops"):
                        await client.send(action="forward", type=agent)
                    awaited = Counter({"project_snapshot": 1, "forward_confirmed": 4})
                    while awaited.total():
                        awaited[(await client.receive())["type"]] -= 1
                        awaited = +awaited
                sqs = platform.client("sqs")
                await asyncio.to_thread(
                    sqs.send_message,
                    QueueUrl=platform.queue_urls["updates"],
                    MessageBody="not an update",
                )
                last = {"ChangeMessageVisibilityBatch", "DescribeTargetHealth"}
                while not last <= {call.operation for call in proxy.calls}:
                    await asyncio.sleep(0.05)
                return proxy.calls
            finally:
                await fleet.close()
    finally:
        await stand_in.stop()


async def test_task_role_allows_what_tasks_do_and_nothing_else() -> None:
    """Statement by statement, the actions are those that were called; none is left over.

    But for two: tasks of the version before, beside these in a deployment, delete from their own
    queue, and would say ephemeral events twice if they could not; and items are read one by one
    (TransactGetItems) only where an update comes again, which not every run brings about.
    """
    outcome = await run_on_stand_in(make_plan(2, faults=False, scale=SCALE))
    async with asyncio.timeout(60):
        calls = await calls_for_a_client()
    allowed = granted()
    allowed["OwnQueue"].remove("sqs:DeleteMessage")
    found = needed(outcome.calls | calls)
    found["KeepEventLog"].add("dynamodb:GetItem")
    assert found == allowed


@pytest.mark.parametrize(
    ("call", "sid"),
    [
        (Call("sqs", "SendMessageBatch", "arn:aws:sqs:r:a:agenticai-pm-queue"), "ForwardToAgents"),
        (Call("sqs", "ReceiveMessage", "arn:aws:sqs:r:a:agenticai-updates.fifo"), "ReceiveUpdates"),
        (Call("sqs", "ReceiveMessage", "arn:aws:sqs:r:a:agenticai-updates-task-1"), "OwnQueue"),
        (Call("sns", "Unsubscribe", "arn:aws:sns:r:a:agenticai-updates:1-2-3"), "EndSubscriptions"),
        (Call("sns", "Publish", "arn:aws:sns:r:a:agenticai-updates"), "FanOut"),
        (Call("dynamodb", "GetItem", "arn:aws:dynamodb:r:a:table/agenticai-data"), "ReadProjects"),
    ],
)
def test_statements_are_told_apart(call: Call, sid: str) -> None:
    assert statement_of(call) == sid
