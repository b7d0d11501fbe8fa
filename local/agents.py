"""The sample agents, as one would deploy them on AWS Lambda behind the four agent queues.

Each order from a queue is worked through in a few steps, and each step is reported to the updates
queue, from where it reaches the browsers. Dev streams the code that it writes. What they need is
said in `agent/agenticai_agent.py`, which would lie beside this file.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterator
from typing import Any

from agent.agenticai_agent import Order, dynamodb_client, orders, sqs_client

logger = logging.getLogger(__name__)

STEPS = {
    "pm": ["Reading the request", "Breaking it into tasks", "Estimating", "The plan is ready"],
    "dev": ["Reading the task", "Writing the code", "Running the tests", "The code is ready"],
    "qa": ["Reading the change", "Testing by hand", "Trying odd input", "The tests have passed"],
    "ops": ["Building the image", "Rolling it out", "Watching the metrics", "It is deployed"],
}

CODE = '''\
def login(form):
    """Let somebody in, or say why not. \N{KEY}"""
    user = users.get(form["name"])
    if user is None or not user.password.matches(form["password"]):
        return page("login", error="Name or password is wrong.")
    session = sessions.begin(user)
    return redirect("/", cookie=session.cookie(secure=True, same_site="lax"))
'''


def lambda_handler(event: dict[str, Any], context: object) -> dict[str, Any]:  # noqa: ARG001
    """Work on a batch of orders; name those that failed, so that SQS offers them again."""
    batch = orders(event)
    agents = {each["messageId"]: agent_of(each["eventSourceARN"]) for each in event["Records"]}
    for order in batch:
        with order:
            work_on(agents[order.sqs_message_id], order)
    return batch.failures()


def work_on(agent: str, order: Order) -> None:
    """Do what an order says, and report each step, until it is done or stopped."""
    logger.info("%s works on %s", agent, order.message_id)
    steps = STEPS[agent]
    for number, step in enumerate(steps, start=1):
        if agent == "dev" and number == 2:
            write_code(order)
        if works_for(step_seconds(), order):
            return
        said = {"agent": agent, "step": number, "of": len(steps), "message": step}
        if number < len(steps):
            order.step(number, said)
        else:
            order.done(said)


def works_for(seconds: float, order: Order) -> bool:
    """Do the work, as long as it takes; whether it was stopped meanwhile."""
    until = time.monotonic() + seconds
    while (left_s := until - time.monotonic()) > 0 and not order.stopped():
        time.sleep(min(left_s, 0.2))
    return order.stopped()


def write_code(order: Order) -> None:
    """Write as a model does: a few characters at a time."""
    with order.stream() as stream:
        for token in tokens(CODE):
            if order.stopped():
                return
            stream.write(token)
            time.sleep(step_seconds() / 10)


def tokens(text: str) -> Iterator[str]:
    yield from re.findall(r"\s*\w{1,4}|\s*\W", text)


def step_seconds() -> float:
    return float(os.environ.get("AGENT_STEP_SECONDS", "0.5"))


def agent_of(queue_arn: str) -> str:
    """Return whose queue it is: its name has the agent as one of its words."""
    name = queue_arn.rpartition(":")[2].removesuffix(".fifo")
    return next(word for word in re.split("[-_]", name.lower()) if word in STEPS)


def make_clients() -> None:
    """Make what threads share before there are any: boto3 makes clients in one at a time."""
    sqs_client()
    dynamodb_client()
