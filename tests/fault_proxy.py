"""An HTTP proxy between ``server.py`` and AWS that fails the way AWS fails.

The servers get the proxy's address as ``AWS_ENDPOINT_URL``; the proxy passes their calls on to an
embedded AWS, which does not check signatures. What it does to a call follows from the seed, the
operation and how many calls of that operation came before, so that the same seed treats the same
call alike however the calls of different operations interleave.

* A call is throttled, fails with a server error, is cut off before it arrives, or after it took
  effect, or in the middle of its answer, or is late.
* A batch call fails for some of its entries, on HTTP 200.
* A read answers with a page shorter than asked for.
* A fan-out message, on its way out of a task's own queue, is dropped, doubled, or overtaken by
  later ones.

Long polls are never made late: a receive that gets through gets through in its own time.

The proxy also knows every call that was made, which is what a task role has to allow.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Self

import aiohttp
from aiohttp import web

import aws_standin
from aws_standin import Fault
from aws_standin.model import NO_FAULT, REGION
from aws_standin.wire import error_answer, read_call

MAX_MESSAGES_PER_RECEIVE = 10

# What a proxy has to say itself about the message it passes on, or may not say about a body it
# changed.
_HOP_BY_HOP = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "content-length",
    "te",
    "upgrade",
    "x-amz-crc32",
}

_TASK_QUEUE = re.compile(r"-task-[^/]*$")

_BATCH_ENTRIES_FAIL = {"SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"}


@dataclasses.dataclass(frozen=True, slots=True)
class FaultRates:
    """How often each fault strikes: shares between 0 and 1.

    ``partial`` is a share of the batch calls, ``short_page`` of the reads of several items,
    ``dropped``, ``doubled`` and ``overtaken`` of the fan-out messages; the others are shares of
    all calls. A slow call is held for up to ``slow_seconds``.
    """

    throttled: float = 0.0
    failed: float = 0.0
    cut_before: float = 0.0
    cut_after: float = 0.0
    cut_answer: float = 0.0
    slow: float = 0.0
    partial: float = 0.0
    short_page: float = 0.0
    dropped: float = 0.0
    doubled: float = 0.0
    overtaken: float = 0.0
    slow_seconds: float = 0.5


NO_FAULTS = FaultRates()

# About one call in eight goes wrong, and one fan-out message in six: far more than AWS does on its
# worst day, little enough for the work to get done in seconds.
ROUGH_DAY = FaultRates(
    throttled=0.03,
    failed=0.03,
    cut_before=0.015,
    cut_after=0.03,
    cut_answer=0.01,
    slow=0.03,
    partial=0.1,
    short_page=0.2,
    dropped=0.05,
    doubled=0.05,
    overtaken=0.08,
)


@dataclasses.dataclass(frozen=True, slots=True, order=True)
class Call:
    """One call as an access policy sees it.

    ``resource`` is an ARN, or ``*`` where the call names none.
    """

    service: str
    operation: str
    resource: str

    @classmethod
    def of(cls, made: aws_standin.Call) -> Call:
        request, resource = made.request, "*"
        match made.service:
            case "sns":
                resource = request.get("TopicArn") or request.get("SubscriptionArn") or "*"
            case "sqs":
                resource = _queue_arn(request)
            case "dynamodb":
                resource = _table_arn(request)
        service = "elasticloadbalancing" if made.service == "elb" else made.service
        return cls(service, made.operation, resource)


def _queue_arn(request: Mapping[str, Any]) -> str:
    if url := request.get("QueueUrl"):
        account, name = url.split("/")[-2:]
        return f"arn:aws:sqs:{REGION}:{account}:{name}"
    if name := request.get("QueueName"):
        return f"arn:aws:sqs:{REGION}:123456789012:{name}"
    return "*"


def _table_arn(request: Mapping[str, Any]) -> str:
    """The table of a DynamoDB call; of several the first (``server.py`` makes no such call)."""
    name = request.get("TableName")
    if name is None and "RequestItems" in request:
        name = next(iter(request["RequestItems"]))
    if name is None and "TransactItems" in request:
        (action,) = request["TransactItems"][0].values()
        name = action["TableName"]
    return f"arn:aws:dynamodb:{REGION}:123456789012:table/{name}" if name else "*"


class FaultPlan:
    """Decides what happens to which call, from a seed alone."""

    def __init__(self, seed: int, rates: FaultRates) -> None:
        self.rates = rates
        self._seed = seed
        self._calls_so_far: Counter[str] = Counter()

    def dice_for(self, operation: str) -> random.Random:
        """The dice for the next call of an operation: its n-th rolls the same in every run."""
        self._calls_so_far[operation] += 1
        return random.Random(f"{self._seed}/{operation}/{self._calls_so_far[operation]}")

    def kind(self, operation: str, dice: random.Random) -> str:
        """Which of the rates strikes this call as a whole, if any."""
        kinds = ["throttled", "failed", "cut_before", "cut_after", "cut_answer"]
        if operation != "ReceiveMessage":
            kinds.append("slow")
        if operation in _BATCH_ENTRIES_FAIL:
            kinds.append("partial")
        if operation in ("Query", "BatchGetItem"):
            kinds.append("short_page")
        return self._struck(kinds, dice)

    def message_kind(self, dice: random.Random) -> str:
        """Which of the rates strikes a fan-out message, if any."""
        return self._struck(["dropped", "doubled", "overtaken"], dice)

    def _struck(self, kinds: Collection[str], dice: random.Random) -> str:
        roll = dice.random()
        for kind in kinds:
            share = getattr(self.rates, kind)
            if roll < share:
                return kind
            roll -= share
        return ""

    def fault(self, kind: str, call: aws_standin.Call, dice: random.Random) -> Fault:
        """What a rate that strikes a call does to it."""
        match kind:
            case "throttled":
                return throttled(call, dice)
            case "failed":
                own = {"sqs": "InternalFailure", "dynamodb": "InternalServerError"}
                if dice.random() < 0.5:
                    return Fault(status=503, code="ServiceUnavailable")
                return Fault(status=500, code=own.get(call.service, "InternalError"))
            case "cut_before":
                return Fault(cut=True)
            case "cut_after":
                return Fault(cut=True, after_effect=True)
            case "cut_answer":
                return Fault(cut=True, after_effect=True, halfway=True)
            case "slow":
                return Fault(delay_s=dice.uniform(0, self.rates.slow_seconds))
            case "partial":
                places = range(len(call.request["Entries"]))
                unlucky = [place for place in places if dice.random() < 0.5] or [0]
                return Fault(failed=dict.fromkeys(unlucky, False))
            case "short_page" if call.operation == "BatchGetItem":
                [wanted] = call.request["RequestItems"].values()
                return Fault(failed=dict.fromkeys(range(1, len(wanted["Keys"])), False))
            case "short_page":
                return Fault(page=3)
        return NO_FAULT


def throttled(call: aws_standin.Call, dice: random.Random) -> Fault:
    """What the service says when it is asked too often."""
    if call.service in ("sns", "elb"):
        status, code = dice.choice([(429, "Throttled"), (400, "Throttling")])
        return Fault(status=status, code=code)
    if call.service == "sqs":
        return Fault(status=400, code=dice.choice(["RequestThrottled", "ThrottlingException"]))
    if call.operation == "TransactWriteItems" and dice.random() < 0.5:
        reason = dice.choice(["TransactionConflict", "ThrottlingError"])
        reasons = [{"Code": reason, "Message": "Please retry."}, {"Code": "None"}]
        fields = {"CancellationReasons": reasons}
        return Fault(status=400, code="TransactionCanceledException", fields=fields)
    codes = [
        "ThrottlingException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
    ]
    return Fault(status=400, code=dice.choice(codes))


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of_error(cls, call: aws_standin.Call, fault: Fault) -> Answer:
        content_type, body, headers = error_answer(call.service, fault.error)
        return cls(fault.status, {"Content-Type": content_type, **headers}, body)

    def with_members(self, members: Mapping[str, Any]) -> Answer:
        """The same answer with another JSON body."""
        return dataclasses.replace(self, body=json.dumps(members).encode())


class FaultProxy:
    """The proxy, listening on a free port of 127.0.0.1 while entered.

    Attributes:
        plan: what goes wrong; its ``rates`` may be changed at any time.
        calls: every call that came in, counted.
        injected: every fault that struck, counted by (operation, rate).
        endpoint_url: the address for the SDK.
    """

    def __init__(self, upstream_url: str, plan: FaultPlan) -> None:
        self.plan = plan
        self.calls: Counter[Call] = Counter()
        self.injected: Counter[tuple[str, str]] = Counter()
        self.endpoint_url = ""
        self._upstream_url = upstream_url.rstrip("/")
        self._held_back: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    async def __aenter__(self) -> Self:
        # A connection a call: one that AWS closed between two calls would be a fault that nobody
        # planned.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._upstream = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
            skip_auto_headers=["User-Agent", "Accept", "Accept-Encoding"],
        )
        # A server that is killed takes its long polls with it; they must not go on to swallow
        # messages.
        self._runner = web.AppRunner(
            _application(self._handle),
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=0.1,
        )
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        port = self._runner.addresses[0][1]
        self.endpoint_url = f"http://127.0.0.1:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()
        await self._upstream.close()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        made = read_call({name.lower(): value for name, value in request.headers.items()}, body)
        self.calls[Call.of(made)] += 1
        dice = self.plan.dice_for(made.operation)
        kind = self.plan.kind(made.operation, dice)
        if kind:
            self.injected[made.operation, kind] += 1
        try:
            return await self._answer(request, body, made, self.plan.fault(kind, made, dice), dice)
        except aiohttp.ClientError:
            # moto hung up: the caller sees just that.
            return _hang_up(request)

    async def _answer(
        self,
        request: web.Request,
        body: bytes,
        call: aws_standin.Call,
        fault: Fault,
        dice: random.Random,
    ) -> web.StreamResponse:
        await asyncio.sleep(fault.delay_s)
        if fault.answers and not fault.after_effect:
            return _hang_up(request) if fault.cut else _response(Answer.of_error(call, fault))
        if fault.failed:
            in_part = self._leave_out if call.operation == "BatchGetItem" else self._fail_in_part
            return _response(await in_part(request, call.request, fault.failed))
        if fault.page:
            body = json.dumps(fault.paged(call)).encode()
        answer = await self._pass_on(request, body)
        if fault.cut:
            return await _half_answer(request, answer) if fault.halfway else _hang_up(request)
        url = call.request.get("QueueUrl", "")
        if call.operation == "ReceiveMessage" and _TASK_QUEUE.search(url) and answer.status == 200:
            answer = await self._disturb(request, url, answer, dice)
        return _response(answer)

    async def _pass_on(
        self, request: web.Request, body: bytes, operation: str | None = None
    ) -> Answer:
        """Make the call, or another SQS call in its name, and read the whole answer."""
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        if operation is not None:
            headers["X-Amz-Target"] = f"AmazonSQS.{operation}"
        url = self._upstream_url + request.path_qs
        async with self._upstream.request(
            request.method, url, headers=headers, data=body
        ) as answer:
            kept = {k: v for k, v in answer.headers.items() if k.lower() not in _HOP_BY_HOP}
            return Answer(answer.status, kept, await answer.read())

    async def _fail_in_part(
        self, request: web.Request, members: Mapping[str, Any], failed: Collection[int]
    ) -> Answer:
        """Pass on some entries of a batch and report the others as failed, on HTTP 200."""
        entries = members["Entries"]
        kept = [entry for place, entry in enumerate(entries) if place not in failed]
        answer = Answer(200, {"Content-Type": "application/x-amz-json-1.0"}, b"{}")
        if kept:
            answer = await self._pass_on(request, json.dumps({**members, "Entries": kept}).encode())
            if answer.status != 200:
                return answer
        answered = json.loads(answer.body)
        failure = {"SenderFault": False, "Code": "InternalError", "Message": "Please try again."}
        failures = [{"Id": entries[place]["Id"], **failure} for place in failed]
        return answer.with_members(
            {
                "Successful": answered.get("Successful", []),
                "Failed": [*answered.get("Failed", []), *failures],
            }
        )

    async def _leave_out(
        self, request: web.Request, members: Mapping[str, Any], failed: Collection[int]
    ) -> Answer:
        """Leave keys of a BatchGetItem of one table unprocessed."""
        [(table, wanted)] = members["RequestItems"].items()
        kept = [key for place, key in enumerate(wanted["Keys"]) if place not in failed]
        rest = [wanted["Keys"][place] for place in failed]
        passed_on = {**members, "RequestItems": {table: {**wanted, "Keys": kept}}}
        answer = await self._pass_on(request, json.dumps(passed_on).encode())
        if answer.status != 200:
            return answer
        left_out = {table: {**wanted, "Keys": rest}}
        return answer.with_members({**json.loads(answer.body), "UnprocessedKeys": left_out})

    async def _disturb(
        self, request: web.Request, queue: str, answer: Answer, dice: random.Random
    ) -> Answer:
        """Drop, double and hold back messages in an answer out of a task's own queue."""
        members = json.loads(answer.body)
        late = self._held_back.pop(queue, [])
        through: list[dict[str, Any]] = []
        for message in members.get("Messages") or []:
            handle = message["ReceiptHandle"]
            kind = self.plan.message_kind(dice)
            if kind:
                self.injected["ReceiveMessage", kind] += 1
            if kind == "dropped":
                # Deleted too: one that merely stayed away would come again after its visibility
                # timeout.
                deletion = {"QueueUrl": queue, "ReceiptHandle": handle}
                await self._pass_on(request, json.dumps(deletion).encode(), "DeleteMessage")
            elif kind == "overtaken":
                self._held_back[queue].append(message)
            else:
                through.append(message)
            if kind == "doubled":
                # Every receive of a message has a handle of its own.
                self._held_back[queue].append({**message, "ReceiptHandle": handle + "again"})
        room = MAX_MESSAGES_PER_RECEIVE - len(through)
        self._held_back[queue] += late[room:]
        return answer.with_members({**members, "Messages": through + late[:room]})


def _application(handler: Any) -> web.Application:
    application = web.Application(client_max_size=16 * 1024 * 1024)
    application.router.add_route("*", "/{path:.*}", handler)
    return application


def _response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


def _hang_up(request: web.Request) -> web.Response:
    """Cut the caller's connection; the answer, which aiohttp insists on, reaches nobody."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _half_answer(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_length = len(answer.body) + 1
    await response.prepare(request)
    await response.write(answer.body[: len(answer.body) // 2])
    if request.transport is not None:
        request.transport.close()
    return response
