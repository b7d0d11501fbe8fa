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
import enum
import json
import random
import re
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, Self

import aiohttp
from aiohttp import web

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

IN_XML = ("sns", "elasticloadbalancing")  # services that speak the query protocol
_CREDENTIAL = re.compile(r"Credential=[^/]+/\d+/(?P<region>[^/]+)/(?P<service>[^/]+)/aws4_request")

_TASK_QUEUE = re.compile(r"-task-[^/]*$")

_BATCH_ENTRIES_FAIL = {"SendMessageBatch", "DeleteMessageBatch", "ChangeMessageVisibilityBatch"}


class Fault(enum.Enum):
    """What happens to one call."""

    THROTTLED = "throttled"
    FAILED = "failed"
    CUT_BEFORE = "cut before it arrived"
    CUT_AFTER = "cut after it took effect"
    CUT_ANSWER = "cut in its answer"
    SLOW = "slow"
    PARTIAL = "failed in part"
    SHORT_PAGE = "short page"
    DROPPED = "message dropped"
    DOUBLED = "message doubled"
    OVERTAKEN = "message overtaken"


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
    def parse(cls, headers: Mapping[str, str], body: bytes) -> Call:
        """Read the call out of a signed request.

        Raises ValueError for what is no SQS, SNS, DynamoDB or load balancing call.
        """
        credential = _CREDENTIAL.search(headers.get("Authorization", ""))
        if credential is None:
            raise ValueError("the request carries no AWS signature")
        service, region = credential["service"], credential["region"]
        if service in IN_XML:
            form = dict(urllib.parse.parse_qsl(body.decode()))
            resource = form.get("TopicArn") or form.get("SubscriptionArn") or "*"
            return cls(service, form["Action"], resource)
        operation = headers["X-Amz-Target"].partition(".")[2]
        members = json.loads(body)
        if service == "sqs":
            return cls(service, operation, _queue_arn(region, members))
        if service == "dynamodb":
            return cls(service, operation, _table_arn(region, members))
        raise ValueError(f"server.py has no business with {service}")


def _queue_arn(region: str, members: Mapping[str, Any]) -> str:
    if url := members.get("QueueUrl"):
        account, name = url.split("/")[-2:]
        return f"arn:aws:sqs:{region}:{account}:{name}"
    if name := members.get("QueueName"):
        return f"arn:aws:sqs:{region}:123456789012:{name}"
    return "*"


def _table_arn(region: str, members: Mapping[str, Any]) -> str:
    """The table of a DynamoDB call; of several the first (``server.py`` makes no such call)."""
    name = members.get("TableName")
    if name is None and "RequestItems" in members:
        name = next(iter(members["RequestItems"]))
    if name is None and "TransactItems" in members:
        (action,) = members["TransactItems"][0].values()
        name = action["TableName"]
    return f"arn:aws:dynamodb:{region}:123456789012:table/{name}" if name else "*"


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

    def fault(self, call: Call, dice: random.Random) -> Fault | None:
        """The fault that strikes this call as a whole, if any."""
        rates = self.rates
        shares = {
            Fault.THROTTLED: rates.throttled,
            Fault.FAILED: rates.failed,
            Fault.CUT_BEFORE: rates.cut_before,
            Fault.CUT_AFTER: rates.cut_after,
            Fault.CUT_ANSWER: rates.cut_answer,
            Fault.SLOW: 0.0 if call.operation == "ReceiveMessage" else rates.slow,
            Fault.PARTIAL: rates.partial if call.operation in _BATCH_ENTRIES_FAIL else 0.0,
            Fault.SHORT_PAGE: rates.short_page
            if call.operation in ("Query", "BatchGetItem")
            else 0.0,
        }
        roll = dice.random()
        for fault, share in shares.items():
            if roll < share:
                return fault
            roll -= share
        return None


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """One HTTP answer, read whole."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of_json(
        cls, status: int, members: Mapping[str, Any], headers: Mapping[str, str] = {}
    ) -> Answer:
        return cls(
            status,
            {
                "Content-Type": "application/x-amz-json-1.0",
                "x-amzn-RequestId": "00000000-0000-0000",
                **headers,
            },
            json.dumps(members).encode(),
        )

    def with_members(self, members: Mapping[str, Any]) -> Answer:
        """The same answer with another JSON body."""
        return dataclasses.replace(self, body=json.dumps(members).encode())


def throttled(call: Call, dice: random.Random) -> Answer:
    """What the service says when it is asked too often, in its own protocol."""
    if call.service in IN_XML:
        return _sns_error(*dice.choice([(429, "Throttled"), (400, "Throttling")]), "Rate exceeded")
    if call.service == "sqs":
        code = dice.choice(["RequestThrottled", "ThrottlingException"])
        return _sqs_error(400, code, "Sender", "Rate exceeded")
    if call.operation == "TransactWriteItems" and dice.random() < 0.5:
        return _transaction_cancelled(dice.choice(["TransactionConflict", "ThrottlingError"]))
    code = dice.choice(
        ["ThrottlingException", "ProvisionedThroughputExceededException", "RequestLimitExceeded"]
    )
    return _dynamodb_error(400, code, "Rate of requests exceeds the allowed throughput.")


def failed(call: Call, dice: random.Random) -> Answer:
    """What the service says when it has a fault of its own."""
    unavailable = dice.random() < 0.5
    if call.service in IN_XML:
        code = (503, "ServiceUnavailable") if unavailable else (500, "InternalError")
        return _sns_error(*code, "We encountered an internal error. Please try again.")
    if call.service == "sqs":
        status, name = (503, "ServiceUnavailable") if unavailable else (500, "InternalFailure")
        return _sqs_error(
            status, name, "Receiver", "We encountered an internal error. Please try again."
        )
    status, name = (503, "ServiceUnavailable") if unavailable else (500, "InternalServerError")
    return _dynamodb_error(status, name, "Internal server error")


def _sns_error(status: int, code: str, message: str) -> Answer:
    kind = "Sender" if status < 500 else "Receiver"
    body = (
        '<ErrorResponse xmlns="http://sns.amazonaws.com/doc/2010-03-31/">'
        f"<Error><Type>{kind}</Type><Code>{code}</Code><Message>{message}</Message></Error>"
        "<RequestId>00000000-0000-0000</RequestId></ErrorResponse>"
    )
    return Answer(status, {"Content-Type": "text/xml"}, body.encode())


def _sqs_error(status: int, code: str, kind: str, message: str) -> Answer:
    return Answer.of_json(
        status,
        {"__type": f"com.amazonaws.sqs#{code}", "message": message},
        {"x-amzn-query-error": f"{code};{kind}"},
    )


def _dynamodb_error(status: int, code: str, message: str) -> Answer:
    namespace = (
        "com.amazon.coral.service"
        if code == "ThrottlingException"
        else "com.amazonaws.dynamodb.v20120810"
    )
    return Answer.of_json(status, {"__type": f"{namespace}#{code}", "message": message})


def _transaction_cancelled(reason: str) -> Answer:
    message = (
        "Transaction cancelled, please refer cancellation reasons for specific reasons "
        f"[{reason}, None]"
    )
    return Answer.of_json(
        400,
        {
            "__type": "com.amazonaws.dynamodb.v20120810#TransactionCanceledException",
            "Message": message,
            "CancellationReasons": [{"Code": reason, "Message": "Please retry."}, {"Code": "None"}],
        },
    )


class FaultProxy:
    """The proxy, listening on a free port of 127.0.0.1 while entered.

    Attributes:
        plan: what goes wrong; its ``rates`` may be changed at any time.
        calls: every call that came in, counted.
        injected: every fault that struck, counted by (operation, fault).
        endpoint_url: the address for the SDK.
    """

    def __init__(self, upstream_url: str, plan: FaultPlan) -> None:
        self.plan = plan
        self.calls: Counter[Call] = Counter()
        self.injected: Counter[tuple[str, Fault]] = Counter()
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
        call = Call.parse(request.headers, body)
        self.calls[call] += 1
        dice = self.plan.dice_for(call.operation)
        fault = self.plan.fault(call, dice)
        if fault is not None:
            self.injected[call.operation, fault] += 1
        try:
            return await self._answer(request, body, call, fault, dice)
        except aiohttp.ClientError:
            # moto hung up: the caller sees just that.
            return _hang_up(request)

    async def _answer(
        self,
        request: web.Request,
        body: bytes,
        call: Call,
        fault: Fault | None,
        dice: random.Random,
    ) -> web.StreamResponse:
        match fault:
            case Fault.THROTTLED:
                return _response(throttled(call, dice))
            case Fault.FAILED:
                return _response(failed(call, dice))
            case Fault.CUT_BEFORE:
                return _hang_up(request)
            case Fault.CUT_AFTER:
                await self._pass_on(request, body)
                return _hang_up(request)
            case Fault.CUT_ANSWER:
                return await _half_answer(request, await self._pass_on(request, body))
            case Fault.PARTIAL:
                return _response(await self._fail_in_part(request, body, dice))
            case Fault.SHORT_PAGE:
                return _response(await self._shorten_page(request, body, call))
            case Fault.SLOW:
                await asyncio.sleep(dice.uniform(0, self.plan.rates.slow_seconds))
        answer = await self._pass_on(request, body)
        if call.operation == "ReceiveMessage" and _TASK_QUEUE.search(call.resource):
            answer = await self._disturb(request, body, call.resource, answer, dice)
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

    async def _fail_in_part(self, request: web.Request, body: bytes, dice: random.Random) -> Answer:
        """Pass on some entries of a batch and report the others as failed, on HTTP 200."""
        members = json.loads(body)
        entries = members["Entries"]
        unlucky = {entry["Id"] for entry in entries if dice.random() < 0.5} or {entries[0]["Id"]}
        members["Entries"] = [entry for entry in entries if entry["Id"] not in unlucky]
        answered: dict[str, Any] = {}
        if members["Entries"]:
            answer = await self._pass_on(request, json.dumps(members).encode())
            if answer.status != 200:
                return answer
            answered = json.loads(answer.body)
        failures = [
            {
                "Id": entry["Id"],
                "SenderFault": False,
                "Code": "InternalError",
                "Message": "Please try again.",
            }
            for entry in entries
            if entry["Id"] in unlucky
        ]
        answered.setdefault("Successful", [])
        answered["Failed"] = [*answered.get("Failed", []), *failures]
        return Answer.of_json(200, answered)

    async def _shorten_page(self, request: web.Request, body: bytes, call: Call) -> Answer:
        """Make a Query stop early, as at 1 MB, or a BatchGetItem leave keys unprocessed."""
        members = json.loads(body)
        if call.operation == "Query":
            members["Limit"] = min(members.get("Limit", 3), 3)
            return await self._pass_on(request, json.dumps(members).encode())
        left_out: dict[str, Any] = {}
        for table, wanted in members["RequestItems"].items():
            kept, rest = wanted["Keys"][:1], wanted["Keys"][1:]
            if rest:
                left_out[table] = {**wanted, "Keys": rest}
            wanted["Keys"] = kept
        answer = await self._pass_on(request, json.dumps(members).encode())
        if answer.status != 200:
            return answer
        return answer.with_members({**json.loads(answer.body), "UnprocessedKeys": left_out})

    async def _disturb(
        self, request: web.Request, body: bytes, queue: str, answer: Answer, dice: random.Random
    ) -> Answer:
        """Drop, double and hold back messages in an answer out of a task's own queue."""
        if answer.status != 200:
            return answer
        members = json.loads(answer.body)
        late = self._held_back.pop(queue, [])
        through: list[dict[str, Any]] = []
        for message in members.get("Messages") or []:
            match self._message_fault(dice):
                case Fault.DROPPED:
                    # Deleted too: one that merely stayed away would come again after its visibility
                    # timeout.
                    deletion = {
                        "QueueUrl": json.loads(body)["QueueUrl"],
                        "ReceiptHandle": message["ReceiptHandle"],
                    }
                    await self._pass_on(request, json.dumps(deletion).encode(), "DeleteMessage")
                case Fault.OVERTAKEN:
                    self._held_back[queue].append(message)
                case Fault.DOUBLED:
                    through.append(message)
                    # Every receive of a message has a handle of its own.
                    again = {**message, "ReceiptHandle": message["ReceiptHandle"] + "again"}
                    self._held_back[queue].append(again)
                case _:
                    through.append(message)
        room = MAX_MESSAGES_PER_RECEIVE - len(through)
        self._held_back[queue] += late[room:]
        return answer.with_members({**members, "Messages": through + late[:room]})

    def _message_fault(self, dice: random.Random) -> Fault | None:
        rates = self.plan.rates
        roll = dice.random()
        for fault, share in (
            (Fault.DROPPED, rates.dropped),
            (Fault.DOUBLED, rates.doubled),
            (Fault.OVERTAKEN, rates.overtaken),
        ):
            if roll < share:
                self.injected["ReceiveMessage", fault] += 1
                return fault
            roll -= share
        return None


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
