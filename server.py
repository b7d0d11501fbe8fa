"""The WebSocket gateway of an AI software-development platform.

    browser --ws--> server.py --SendMessageBatch--> SQS pm | dev | qa | ops --> agent (Lambda)
    browser <--ws-- server.py <--ReceiveMessage---- SQS updates <- SendMessage - agent
                       | 1 append (conditional write)
                       v
                    DynamoDB event log, one ordered log a project
                       | 2 publish
                       v
                    SNS topic --> one SQS queue a task --> every other server.py task

The promise, kept over any number of tasks, crashes, redeliveries and reconnects: a client that
remembers the last ``seq`` it saw gets every project event once, in order, and a
``forward_confirmed`` means SQS has the message.

Read from the top: words and rules come first, then what acts on them, ``main`` last. Every
reference points upward, and each section says at its head what it may not know.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import bisect
import contextlib
import dataclasses
import difflib
import errno
import hashlib
import heapq
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import signal
import socket
import struct
import sys
import time
import traceback
import uuid
import zlib
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import UTC, datetime
from enum import Enum, StrEnum
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Generic,
    NoReturn,
    ParamSpec,
    TypeVar,
    cast,
    get_args,
)
from urllib.parse import parse_qsl, urlsplit
from urllib.request import urlopen

try:
    import jwt
    import msgspec
    from aiobotocore.config import AioConfig
    from aiobotocore.session import AioSession
    from aiohttp import ClientError as HttpError
    from aiohttp import ClientSession, ClientTimeout
    from boto3.dynamodb.types import TypeDeserializer
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        HTTPClientError,
        MetadataRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
    )
    from botocore.exceptions import ConnectionError as SdkConnectionError
    from botocore.parsers import ResponseParserError
    from jwt import InvalidKeyError, InvalidSignatureError, PyJWK, PyJWKSetError, PyJWTError
    from msgspec import UNSET, Meta, Raw, Struct, UnsetType, ValidationError
    from websockets import http11
    from websockets.datastructures import Headers
    from websockets.exceptions import InvalidMessage
    from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
    from websockets.frames import CloseCode, Frame, Opcode
    from websockets.http11 import Request, Response
    from websockets.protocol import State
    from websockets.server import ServerProtocol
    from websockets.typing import Subprotocol
except ModuleNotFoundError as missing:
    sys.exit(
        f"{sys.executable} lacks the package {missing.name}. Install what the gateway needs with: "
        "python -m pip install -r requirements.txt; or try it on this machine with: make run"
    )

if TYPE_CHECKING:
    from botocore.hooks import BaseEventHooks
    from types_aiobotocore_dynamodb import DynamoDBClient
    from types_aiobotocore_sns import SNSClient
    from types_aiobotocore_sqs import SQSClient

    P = ParamSpec("P")  # of a client's method

T = TypeVar("T")
logger = logging.getLogger("gateway")
metrics_logger = logging.getLogger("gateway.metrics")


# --- Vocabulary -----------------------------------------------------------------------------
# The words of the protocol, and the limits that several sections share. Nothing mutable.
#
# There are two clocks. Durations and deadlines of this process are seconds of the monotonic clock
# (`time.monotonic`; the event loop's own time is the same clock, read once a turn). Whatever others
# read too, as tokens, the log and heartbeats, is in unix seconds (`time.time`). A figure of one
# clock is never compared with one of the other.

EVERYONE = "*"
"""The project whose events reach every connection."""

QUEUE_OF_TYPE = {
    "pm": "pm", "plan": "pm", "planning": "pm",
    "dev": "dev", "code": "dev", "develop": "dev",
    "qa": "qa", "test": "qa", "quality": "qa",
    "ops": "ops", "deploy": "ops", "operations": "ops",
}  # fmt: skip
"""The agent queue that a forward's ``type``, in lower case, names."""

RESERVED_TYPES = frozenset({
    "connected", "subscription_confirmed", "unsubscription_confirmed", "forward_confirmed",
    "pong", "error", "reconnect", "project_snapshot", "token_expiring", "authenticated",
    "stop_confirmed", "stop_requested",
})  # fmt: skip
"""What only the server itself may say: an agent's update may not use these as its ``type``."""


class ErrorCode(StrEnum):
    """What went wrong, for programs; the sentence beside it is for people."""

    INVALID_JSON = "invalid_json"
    INVALID_MESSAGE = "invalid_message"
    INVALID_FIELD = "invalid_field"
    UNKNOWN_ACTION = "unknown_action"
    UNKNOWN_TYPE = "unknown_type"
    BINARY_FRAME = "binary_frame"
    TOO_LARGE = "too_large"
    INVALID_CHARACTER = "invalid_character"
    TOO_MANY_SUBSCRIPTIONS = "too_many_subscriptions"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    REJECTED = "rejected"
    TIMEOUT = "timeout"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"


class Progress(Enum):
    """How far a connection has come."""

    HANDSHAKE = 1
    OPEN = 2
    CLOSING = 3
    LOST = 4


# Protocol.
SUBPROTOCOL = "agenticai.v1"
BEARER_PREFIX = "bearer."  # of a subprotocol that carries a token, for browsers have no headers
CLOSE_UNAUTHENTICATED = 4401  # from the range for applications (RFC 6455, section 7.4.2)
ID_MAX_CHARS = 256
TRACE_MAX_CHARS = 128  # of a traceparent: 55 today, "higher versions" may be longer (W3C)
SEQ_MAX = 2**53 - 1  # what JavaScript's numbers hold exactly
MAX_NESTING = 100  # of arrays and objects, the message's own included; parsers stop at a thousand
REF_MAX_CHARS = 64
REF_MAX_BYTES = 12 * REF_MAX_CHARS + 2  # with an escaped surrogate pair for each character
EXPLAINED_BYTES = 1_024  # of a refused message, in which its ids are looked for

# Access.
TOKEN_LEEWAY_S = 30.0
SESSION_WITHOUT_END_S = 2**31 - 1
TOKEN_MAX_CHARS = 16_384

# Connections.
HANDSHAKE_MAX_BYTES = 16_384  # the load balancer's own limit for headers

# AWS.
SQS_BATCH_ENTRIES = 10
SQS_BATCH_BYTES = 1_048_576
SNS_MESSAGE_BYTES = 262_144
EVENT_MAX_BYTES = SNS_MESSAGE_BYTES - 10_240  # one event and its envelope fit one SNS message
LONG_POLL_S = 20
CALL_TIMEOUT_S = 5.0
RECEIVE_TIMEOUT_S = LONG_POLL_S + 10.0
EVENT_ID_WINDOW_S = 300.0  # an agent's event_id is an idempotency key; SQS FIFO's own window
CLOCK_SKEW_S = 60.0

UNSENDABLE = {"\ufffe": rb"\ufffe", "\uffff": rb"\uffff"}
"""What SQS and SNS refuse of what JSON may hold unescaped (SendMessage API), and its escapes."""


# --- Errors ---------------------------------------------------------------------------------
# Sorted by who must act. Nothing here knows a socket or a queue.
#
# SettingsError     the operator: named on stderr, exit code 2
# BadMessage        the client: answered with an `error` message; or the agent: its update goes to
#                   the dead-letter queue
# NotAuthenticated  the client: answered with 401 or close code 4401
# +-- UnknownKey    nobody yet: the issuer may have a new key
# +-- Expired       the client: it fetches a fresh token
# Drained           nobody: the orderly end
# UpstreamLost      AWS, for good: the process ends with exit code 1 and is restarted


class SettingsError(Exception):
    """Settings are missing or wrong; ``faults`` has a sentence for each."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("; ".join(faults))
        self.faults = tuple(faults)


class BadMessage(Exception):
    """What was sent cannot be used: ``code`` for the client's program, the text for its author."""

    def __init__(self, code: ErrorCode, sentence: str, **context: Any) -> None:
        super().__init__(sentence)
        self.code = code
        self.context = context


class NotAuthenticated(Exception):
    """A token is missing, forged, expired or somebody else's; the text never has any of it."""


class UnknownKey(NotAuthenticated):
    """A token is signed with a key that was not known when the keys were last read.

    When the issuer has changed its keys, a whole office of honest clients has such tokens.
    """


class Expired(NotAuthenticated):
    """A token that was good, and whose time is over: no sign of somebody who guesses."""


class Drained(Exception):
    """Nobody's fault: the way in which a drained gateway ends what still runs."""


class UpstreamLost(Exception):
    """AWS refuses in a way that waiting will not mend: a table, a queue or a right is missing."""


UNSENT_ERRORS = (
    CredentialRetrievalError,
    MetadataRetrievalError,
    SdkConnectionError,  # no connection, or none in time; proxy and TLS errors too
)
"""What the SDK raises before it has sent anything, though it may do so later."""

PASSING_ERRORS = (
    *UNSENT_ERRORS,
    HTTPClientError,
    HttpError,
    OSError,  # a timeout too
    # The SDK's parsers raise these for answers that are not of AWS's making.
    KeyError,
    ResponseParserError,
    UnicodeDecodeError,
)

AWS_ERRORS = (ClientError, BotoCoreError, *PASSING_ERRORS)
"""What a call through the SDK raises. Anything else is a fault of this program."""

PASSING_CODES = frozenset({
    "BandwidthLimitExceeded", "ExpiredToken", "LimitExceeded", "OverLimit",
    "PriorRequestNotComplete", "ProvisionedThroughputExceeded", "RequestLimitExceeded",
    "RequestTimeout", "SlowDown", "TooManyRequests", "TransactionConflict",
    "TransactionInProgress",
})  # fmt: skip
"""What a later attempt may not meet, beside throttling (AWS SDKs' standard retry mode, and SQS)."""


def error_code(exc: BaseException) -> str:
    """The AWS error code of ``exc``, or its class name where AWS did not answer."""
    if isinstance(exc, ClientError):
        return str(exc.response.get("Error", {}).get("Code", "Unknown"))
    return type(exc).__name__


def cancellation_codes(exc: BaseException) -> list[str]:
    """Why a transaction was cancelled, an entry for each of its items: empty for the innocent."""
    reasons: Any = exc.response.get("CancellationReasons") if isinstance(exc, ClientError) else ()
    codes = [str(reason.get("Code") or "None") for reason in reasons or ()]
    return ["" if code == "None" else code for code in codes]


def code_passes(code: str) -> bool:
    """Whether an AWS error code, or the reason of a cancellation, is one of the moment."""
    return "hrottl" in code or code.removesuffix("Exception") in PASSING_CODES


def passes(exc: BaseException) -> bool:
    """Whether a later attempt may succeed where ``exc`` was raised."""
    if not isinstance(exc, ClientError):
        return isinstance(exc, PASSING_ERRORS)
    if reasons := set(cancellation_codes(exc)) - {""}:
        return all(map(code_passes, reasons))
    status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return status >= 500 or status == 429 or code_passes(error_code(exc))


def may_have_effect(exc: BaseException) -> bool:
    """Whether AWS may have done what a call that failed with ``exc`` asked for."""
    unsent = isinstance(exc, UNSENT_ERRORS) or code_passes(error_code(exc))
    return passes(exc) and not unsent


def full_jitter_s(attempt: int, *, base_s: float = 0.1) -> float:
    """Seconds to wait before attempt ``attempt + 1``: uniform below a bound that doubles up to 5.

    Source: AWS Architecture Blog, "Exponential Backoff and Jitter".
    """
    return random.uniform(0, min(5.0, base_s * 2 ** min(attempt, 16)))  # noqa: S311


CALL_TIMEOUTS_S = {"ReceiveMessage": RECEIVE_TIMEOUT_S}
"""How long an answer is waited for; that of any other operation for ``CALL_TIMEOUT_S``."""

ANSWER_MEMBERS = {
    "BatchGetItem": "Responses",
    "CreateQueue": "QueueUrl",
    "DescribeTargetHealth": "TargetHealthDescriptions",
    "Query": "Items",
    "Subscribe": "SubscriptionArn",
    "TransactGetItems": "Responses",
    "UpdateItem": "Attributes",
}
"""What an answer must have; one without it is not of AWS's making."""


async def answer_to(method: Callable[P, Awaitable[T]], *args: P.args, **params: P.kwargs) -> T:
    """The answer to a call of the SDK.

    Raises:
        ResponseParserError: the SDK's parser does not expect such an answer of AWS. The same
            errors for a parameter are faults of this program, and stay what they are.
    """
    try:
        return await method(*args, **params)
    except (AttributeError, TypeError) as exc:
        frames = traceback.walk_tb(exc.__traceback__)
        if any(each.f_globals["__name__"].endswith("botocore.parsers") for each, _ in frames):
            raise ResponseParserError(f"the answer is not of AWS's making: {exc}") from exc
        raise


REFUSALS_ARE_HANDLED = {"DescribeTargetHealth", "SendMessageBatch", "TransactWriteItems"}
"""Operations of which a refusal for good is for the caller to see; of others it ends the task."""


class Dependency:
    """A part of AWS that this task depends on, as ``/health`` sees it: each operation by itself.

    An operation counts as failing only after ``FAILING_AFTER_S`` of nothing but errors: a task
    that is taken out of service for one throttled call would turn a hiccup of AWS into a reconnect
    storm. It counts as failing until it works again, or until nobody has called it for
    ``FORGOTTEN_AFTER_S``, which is longer than the time between two attempts of any retried call.
    """

    FAILING_AFTER_S = 15.0
    FORGOTTEN_AFTER_S = 60.0

    def __init__(self, name: str) -> None:
        self.name = name
        self._failures: dict[str, tuple[float, float]] = {}  # operation to first and last failure
        self._logged_at: dict[str, float] = {}

    def worked(self, operation: str) -> None:
        first, _ = self._failures.pop(operation, (math.inf, 0.0))
        if self._logged_at.get(operation, 0.0) >= first:
            logger.info("%s: %s works again", self.name, operation)

    def failed(self, exc: BaseException, operation: str) -> None:
        """Note a failure; of those of an operation one a minute is logged."""
        now = time.monotonic()
        first, last = self._failures.get(operation, (now, now))
        self._failures[operation] = (now if now - last > self.FORGOTTEN_AFTER_S else first, now)
        if now - self._logged_at.get(operation, -math.inf) > self.FORGOTTEN_AFTER_S:
            self._logged_at[operation] = now
            logger.warning("%s: %s failed with %s, retrying", self.name, operation, error_code(exc))

    @property
    def failing_operation(self) -> str | None:
        """The operation that has been failing for longest, by AWS's name; ``None`` if none is."""
        recent = time.monotonic() - self.FORGOTTEN_AFTER_S
        for operation, (first, last) in self._failures.items():
            if last - first > self.FAILING_AFTER_S and last >= recent:
                return operation
        return None

    async def call(self, method: Callable[P, Awaitable[T]], *args: P.args, **params: P.kwargs) -> T:
        """The answer to one call of a client's method; notes whether it worked.

        Raises:
            UpstreamLost: AWS's answer is one that waiting does not change, and the operation is
                none of ``REFUSALS_ARE_HANDLED``.
            Exception: any other of ``AWS_ERRORS``. Those that pass are noted, but for transactions
                that were cancelled, of which the caller sees why.
        """
        operation = str(cast("Any", method).__name__).title().replace("_", "")
        member = ANSWER_MEMBERS.get(operation)
        try:
            async with asyncio.timeout(CALL_TIMEOUTS_S.get(operation, CALL_TIMEOUT_S)):
                answer = await answer_to(method, *args, **params)
            if member is not None and member not in cast("Any", answer):
                raise KeyError(member)
        except AWS_ERRORS as exc:
            handled = operation in REFUSALS_ARE_HANDLED
            if passes(exc) and not (handled and cancellation_codes(exc)):
                self.failed(exc, operation)
            elif not handled:
                code = error_code(exc)
                sentence = f"{self.name}: {operation} failed for good with {code}: {exc}"
                raise UpstreamLost(sentence) from exc
            raise
        self.worked(operation)
        return answer

    async def retry(
        self, method: Callable[P, Awaitable[T]], *args: P.args, **params: P.kwargs
    ) -> T:
        """The answer to the first call that works, with full jitter between the attempts.

        Raises:
            UpstreamLost: AWS's answer is one that waiting does not change.
        """
        attempt = 0
        while True:
            with contextlib.suppress(*AWS_ERRORS):
                return await self.call(method, *args, **params)
            await asyncio.sleep(full_jitter_s(attempt))
            attempt += 1


# --- Settings -------------------------------------------------------------------------------
# One frozen object out of a mapping, all faults at once. Knows no os.environ.


def shaped(pattern: str, like: str) -> Callable[[str], str]:
    """A parser of values that match a pattern; ``like`` says in words what they must be."""

    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value, re.ASCII):
            raise ValueError(f"must be {like}")
        return value

    return parse


def number(low: T, high: T) -> Callable[[str], T]:
    """A parser of numbers from ``low`` to ``high``: of whole ones, unless these are fractions."""
    kind: Any = type(low)
    word, pattern = "number", r"[0-9]{1,9}(\.[0-9]{1,6})?"
    if kind is int:
        word, pattern = "whole number", "[0-9]{1,18}"

    def parse(value: str) -> T:
        if not re.fullmatch(pattern, value) or not low <= kind(value) <= high:
            raise ValueError(f"must be a {word} from {low} to {high}")
        return cast("T", kind(value))

    return parse


def listed(parse_one: Callable[[str], str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated lists."""

    def parse(value: str) -> tuple[str, ...]:
        found = tuple(parse_one(each.strip()) for each in value.split(",") if each.strip())
        if not found:
            raise ValueError("must be a comma-separated list")
        return found

    return parse


def url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.netloc or len(parts.path) < 2:
        raise ValueError("must be a URL like https://sqs.us-east-1.amazonaws.com/123456789012/name")
    return value


def keys_url(value: str) -> str:
    parts = urlsplit(value)
    local = parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")
    if not parts.netloc or not (parts.scheme == "https" or local):
        raise ValueError("must be an https:// URL")
    return value


def origin(value: str) -> str:
    """An origin as browsers write it: lower case, without the default port (RFC 6454, 6.2)."""
    if not value.isascii():  # Python's own IDNA would make another domain of some
        raise ValueError("must have hosts in ASCII: write the xn-- form that browsers send")
    found = re.fullmatch(
        r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[\w.-]+)(?::(\d{1,5}))?", value.lower()
    )
    if not found or int(found[3] or 0) > 65_535:
        raise ValueError("must be a comma-separated list of origins like https://app.example")
    scheme, host, port = found[1], found[2], int(found[3] or 0)
    if host[0] == "[":
        host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
    default = {"http": 80, "https": 443}.get(scheme)
    return f"{scheme}://{host}" if port in (0, default) else f"{scheme}://{host}:{port}"


def switch(value: str) -> bool:
    if value.lower() not in ("on", "off"):
        raise ValueError("must be on or off")
    return value.lower() == "on"


def level(value: str) -> str:
    return shaped("DEBUG|INFO|WARNING|ERROR", "DEBUG, INFO, WARNING or ERROR")(value.upper())


def setting(
    parse: Callable[[str], Any], doc: str, default: Any = dataclasses.MISSING, needs: str = ""
) -> Any:  # a dataclass field, whatever the checker should take it for
    """A setting; ``needs`` is the field of another, without which it has no effect."""
    metadata = {"parse": parse, "doc": doc, "needs": needs}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What the operator decides; each field is the environment variable of its name in capitals."""

    REGION: ClassVar[str] = (
        r"(?:arn:[^:]+:\w+:|https?://(?:[^/]+\.)?)([a-z]{2,4}(?:-[a-z]+)+-[0-9]{1,2})[.:]"
    )
    MISSPELT_ABOVE: ClassVar = 0.9  # likeness, as `difflib` has it: of 11 letters, one is wrong

    sqs_queue_url_pm: str = setting(url, "URL of the PM agent's queue; it may be a FIFO queue")
    sqs_queue_url_dev: str = setting(url, "URL of the Dev agent's queue, likewise")
    sqs_queue_url_qa: str = setting(url, "URL of the QA agent's queue, likewise")
    sqs_queue_url_ops: str = setting(url, "URL of the Ops agent's queue, likewise")
    dynamodb_table_name: str = setting(str, "name of the platform's table, with projects' state")
    sqs_queue_url_updates: str | None = setting(url, "URL of the queue of agents' updates", None)
    updates_topic_arn: str | None = setting(
        shaped(r"arn:[\w-]+:sns:[\w-]+:\d{12}:[\w-]{1,256}", "the ARN of an SNS topic"),
        "ARN of the topic that connects the tasks; without it, run one task only",
        None,
    )
    events_table_name: str | None = setting(
        str, "name of the event log's table; the default is `DYNAMODB_TABLE_NAME`", None
    )
    aws_region: str = setting(str, "region of the queues, the topic and the tables", "us-east-1")
    websocket_host: str = setting(str, "address to listen on", "0.0.0.0")  # noqa: S104
    websocket_port: int = setting(number(0, 65_535), "port to listen on; 0 takes a free one", 8080)
    event_retention_hours: int = setting(
        number(1, 8_760), "how long missed events can be had", 24, "sqs_queue_url_updates"
    )
    max_message_bytes: int = setting(
        number(1_024, 1_048_576), "largest message of a client; close code 1009 above it", 262_144
    )
    max_backlog_bytes: int = setting(
        number(65_536, 2**30),
        "unread bytes above which a client that reads no more a second is closed with 1013",
        1_048_576,
    )
    max_connections: int = setting(number(0, 1_000_000), "beyond it 503; 0 is no limit", 20_000)
    max_subscriptions_per_connection: int = setting(number(0, 10_000), "0 is no limit", 100)
    memory_budget_mb: int | None = setting(
        number(16, 1_000_000),
        "megabytes that clients may hold in all; by default two fifths of the container's limit, "
        "or 512 where it has none",
        None,
    )
    max_connections_per_ip: int = setting(
        number(0, 1_000_000), "beyond it 429; 0 is no limit", 1_000
    )
    trusted_proxy_hops: int = setting(
        number(0, 10), "proxies whose `X-Forwarded-For` entries are believed", 1
    )
    allowed_origins: tuple[str, ...] = setting(
        listed(origin), "comma-separated; other pages get 403. Without any, all may connect", ()
    )
    auth_jwks_url: str | None = setting(
        keys_url, "keys of the tokens' issuer. Without it, everybody may do everything", None
    )
    auth_issuer: str | None = setting(str, "`iss` of the tokens; needed with keys", None)
    auth_audience: str | None = setting(str, "whom the tokens are for; needed with keys", None)
    auth_audience_claim: str = setting(
        str, "claim with the audience; `client_id` for Cognito's access tokens", "aud"
    )
    auth_algorithms: tuple[str, ...] = setting(  # never one with a shared secret
        listed(shaped("RS256|ES256|EdDSA", "a comma-separated list of RS256, ES256 and EdDSA")),
        "comma-separated, of RS256, ES256 and EdDSA",
        ("RS256",),
    )
    auth_projects_claim: str = setting(
        str, "claim with the projects a client may use, `*` for all; `a.b` is nested", "projects"
    )
    auth_first_message: bool = setting(
        switch, "let clients connect without a token and send it as the first message", False
    )
    auth_deadline_seconds: float = setting(
        number(0.1, 300.0), "how long such a client may take", 5.0, "auth_first_message"
    )
    compression: bool = setting(
        switch, "offer `permessage-deflate`; an event is deflated once", True
    )
    forward_timeout_seconds: float = setting(
        number(0.1, 300.0), "seconds in which SQS must accept a forward, else it is an error", 10.0
    )
    ping_interval_seconds: float = setting(
        number(0.1, 3_600.0), "silence before a ping, and again before a connection is cut", 25.0
    )
    drain_seconds: float = setting(
        number(0.0, 110.0), "seconds over which a shutdown spreads the closing of connections", 30.0
    )
    target_group_arn: str | None = setting(
        shaped(
            r"arn:[\w-]+:elasticloadbalancing:[\w-]+:\d{12}:targetgroup/[\w-]{1,32}/[0-9a-f]{16}",
            "the ARN of a target group",
        ),
        "ARN of the target group to which this task belongs; the task drains as soon as the load "
        "balancer drains its target. Without it, a drain begins at SIGTERM",
        None,
    )
    task_heartbeat_seconds: float = setting(
        number(0.2, 3_600.0),
        "seconds between two signs of life on the task's own queue; other tasks remove the queue "
        "after five that are missing",
        60.0,
        "updates_topic_arn",
    )
    audit_interval_seconds: float = setting(
        number(0.2, 3_600.0), "seconds between comparisons of what was delivered with the log", 30.0
    )
    environment: str = setting(str, "value of the metrics' dimension `Environment`", "local")
    log_level: str = setting(level, "lowest that is logged: DEBUG, INFO, WARNING or ERROR", "INFO")
    ecs_container_metadata_uri_v4: str | None = setting(
        url, "ECS sets it; the task reads its own id and address there", None
    )

    @classmethod
    def from_mapping(cls, values: Mapping[str, str]) -> Settings:
        """Read the settings out of ``values``, the environment or a test's own mapping.

        An empty value counts as none: that is how templates pass parameters left blank.

        Raises:
            SettingsError: with every fault, not just the first.
        """
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        given = {name: value.strip() for name, value in values.items() if value.strip()}
        needed = ["AUTH_ISSUER", "AUTH_AUDIENCE"] if "AUTH_JWKS_URL" in given else []
        found: dict[str, Any] = {}
        faults: list[str] = []
        for name, field in fields.items():
            if name not in given:
                if field.default is dataclasses.MISSING or name in needed:
                    faults.append(f"{name} is missing: {field.metadata['doc']}")
                continue
            try:
                found[field.name] = field.metadata["parse"](given[name])
            except ValueError as exc:
                faults.append(f"{name} {exc}, not {given[name][:80]!r}")
        faults += [sentence for sentence, opens in cls._in_vain(given, found) if opens]
        region = found.get("aws_region", cls.aws_region)
        for name in fields:
            if name.endswith("_ARN") or name.startswith("SQS_"):
                shown = re.match(cls.REGION, found.get(name.lower(), ""))
                if shown and shown[1] != region:
                    faults.append(f"AWS_REGION is {region}, but {name} is in {shown[1]}")
        if faults:
            raise SettingsError(faults)
        return cls(**found)

    def doubts(self, values: Mapping[str, str]) -> list[str]:
        """What in the environment has no effect, though somebody may think it has."""
        return [sentence for sentence, opens in self._in_vain(values, vars(self)) if not opens]

    @classmethod
    def _in_vain(
        cls, values: Mapping[str, str], found: Mapping[str, Any]
    ) -> Iterator[tuple[str, bool]]:
        """What has no effect, and whether that opens doors that somebody means to have shut."""
        fields = {field.name.upper(): field for field in dataclasses.fields(cls)}
        for name in (each for each, value in values.items() if value.strip()):
            if field := fields.get(name):
                needs = field.metadata["needs"]
                if name.startswith("AUTH_") and not values.get("AUTH_JWKS_URL", "").strip():
                    yield f"{name} has no effect without AUTH_JWKS_URL", True
                elif needs and found.get(field.name) != field.default and not found.get(needs):
                    yield f"{name} has no effect without {needs.upper()}", False
                continue
            near = difflib.get_close_matches(name.upper(), fields, n=1, cutoff=cls.MISSPELT_ABOVE)
            meant = near[0] if near else ""
            if meant or name.startswith(("AUTH_", "MAX_")):
                hint = f", unlike {meant}" if meant else ""
                opens = meant.startswith("AUTH_") and name[0] in "Aa"  # OAUTH_ISSUER is another's
                yield f"{name} is no setting of this server{hint}", opens

    @property
    def queue_urls(self) -> dict[str, str]:
        """Agent to queue URL."""
        agents = ("pm", "dev", "qa", "ops")
        return {agent: getattr(self, f"sqs_queue_url_{agent}") for agent in agents}

    @property
    def log_table(self) -> str:
        return self.events_table_name or self.dynamodb_table_name


# --- Wire -----------------------------------------------------------------------------------
# Messages to bytes and back. Pure: knows no asyncio, no sockets, no AWS.


class Asking(Struct, kw_only=True):
    """What every message of a client may carry, and every answer to it repeats."""

    ref: Raw = Raw(b"0")

    def __post_init__(self) -> None:
        """Keep the ``ref`` alone: what is found in a message is a view, and holds all of it."""
        is_short = memoryview(self.ref).nbytes <= REF_MAX_BYTES
        self.ref = self.ref.copy() if is_short else Raw(b"0")


class Answer(Struct, kw_only=True):
    ref: str | UnsetType = UNSET


class Subscribe(Asking, tag_field="action", tag="subscribe"):
    """Asks for a project's events; with ``since``, first for those missed after it."""

    project_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)]
    since: Annotated[int, Meta(ge=0, le=SEQ_MAX)] | None = None
    epoch: Annotated[str, Meta(max_length=ID_MAX_CHARS)] | None = None
    snapshot: bool = False


class Unsubscribe(Asking, tag_field="action", tag="unsubscribe"):
    """Ends a subscription; of one that is not there too."""

    project_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)]


class Forward(Asking, tag_field="action", tag="forward"):
    """Passes ``data``, unread, to the agent that ``type`` names."""

    type: str
    message_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    project_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    data: Raw = Raw(b"null")
    client_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    traceparent: Annotated[str, Meta(max_length=TRACE_MAX_CHARS)] | None = None


class Stop(Asking, tag_field="action", tag="stop"):
    """Asks agents to end their work on a forward, come or yet to come."""

    message_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)]
    project_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None


class Ping(Asking, tag_field="action", tag="ping"):
    """Asks whether anybody is there, for clients that cannot send ping frames."""


class Authenticate(Asking, tag_field="action", tag="authenticate"):
    """Brings a token: the first where the handshake had none, or a fresh one in time."""

    token: Annotated[str, Meta(min_length=1, max_length=TOKEN_MAX_CHARS)]


ClientMessage = Subscribe | Unsubscribe | Forward | Stop | Ping | Authenticate


class Connected(Struct, tag="connected", kw_only=True):
    message: str = "WebSocket connection established"
    timestamp: str
    connection_id: str
    ref: bool = True  # that answers repeat it
    max_message_bytes: int


class SubscriptionConfirmed(Answer, tag="subscription_confirmed"):
    project_id: str
    seq: int
    epoch: str
    recovered: bool | UnsetType = UNSET


class UnsubscriptionConfirmed(Answer, tag="unsubscription_confirmed"):
    project_id: str


class ProjectSnapshot(Answer, tag="project_snapshot"):
    project_id: str
    data: Any


class ForwardConfirmed(Answer, tag="forward_confirmed"):
    """``seq`` is where the project's log was, or before: all answers come after it."""

    message_id: str
    sqs_message_id: str
    project_id: str | UnsetType = UNSET
    seq: int | UnsetType = UNSET
    epoch: str | UnsetType = UNSET


class StopConfirmed(Answer, tag="stop_confirmed"):
    message_id: str
    project_id: str | UnsetType = UNSET


class Pong(Answer, tag="pong"):
    timestamp: str


class Authenticated(Answer, tag="authenticated"):
    expires_in_seconds: int


class TokenExpiring(Struct, tag="token_expiring"):
    in_seconds: int


class Busy(Struct, tag="busy"):
    """A sign of life while nothing is read from a client that asked for it by ``busy=1``."""


class Reconnect(Struct, tag="reconnect"):
    after_ms: int


class ErrorMessage(Answer, tag="error"):
    message: str
    code: ErrorCode
    action: str | UnsetType = UNSET
    message_id: str | UnsetType = UNSET
    project_id: str | UnsetType = UNSET
    retryable: bool | UnsetType = UNSET


class EventMessage(Struct, omit_defaults=True):
    """An event as clients see it; ``type`` is the agent's own word."""

    type: str
    project_id: str
    data: Raw
    seq: int | None = None
    timestamp: str = ""
    in_reply_to: str | None = None
    traceparent: str | None = None


class AgentMessage(Struct, tag_field="action", tag="forward"):
    """The body of a message in an agent's queue."""

    type: str
    message_id: str
    project_id: str | None
    data: Raw
    connection_id: str
    client_id: str
    user: str | None
    timestamp: str
    traceparent: str | UnsetType = UNSET


class Update(Struct):
    """The body of a message in the updates queue, as agents write it."""

    type: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)]
    project_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    data: Raw = Raw(b"null")
    event_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    ephemeral: bool = False
    connection_id: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    in_reply_to: Annotated[str, Meta(min_length=1, max_length=ID_MAX_CHARS)] | None = None
    traceparent: Annotated[str, Meta(max_length=TRACE_MAX_CHARS)] | None = None

    def event(self, seq: int | None, stamp: str) -> EventMessage:
        """What clients get of it."""
        return EventMessage(
            self.type, self.project_id or EVERYONE, self.data, seq, stamp,
            self.in_reply_to, self.traceparent,
        )  # fmt: skip


class RelayedEvent(Struct, array_like=True):
    """An event on its way to the other tasks; ``payload`` is the text that their clients get.

    New members come last and have a default: tasks of two versions read each other's.
    """

    project_id: str
    seq: int | None
    connection_id: str | None
    sent_at: float
    payload: Raw
    event_id: str | None = None


class RelayedBatch(Struct):
    """The body of a message of the topic.

    Attributes:
        origin: the task that sends it.
        sizes: the length of each event in bytes, by which it can be decoded by itself; none from
            a task of an earlier version.
    """

    origin: str
    events: list[RelayedEvent]
    sizes: list[int] = []


def unread(names: Iterable[str], *, array_like: bool = False) -> msgspec.json.Decoder[Any]:
    """A decoder of an object's members, or an array's, that finds each and reads none."""
    fields = [(name, Raw | UnsetType, UNSET) for name in dict.fromkeys(names)]
    return msgspec.json.Decoder(msgspec.defstruct("Unread", fields, array_like=array_like))


class Decoders:
    """Made once: building one costs more than using it."""

    client_message = msgspec.json.Decoder(ClientMessage)
    authenticate = msgspec.json.Decoder(Authenticate)
    update = msgspec.json.Decoder(Update)
    relayed_batch = msgspec.json.Decoder(RelayedBatch)
    relayed_event = msgspec.json.Decoder(RelayedEvent)
    members = unread(
        name
        for message in (*get_args(ClientMessage), Update)
        for name in ("action", *message.__struct_fields__)
    )
    relayed_members = unread(RelayedEvent.__struct_fields__, array_like=True)


class Encoders:
    """DynamoDB's numbers and sets as JSON numbers and arrays, its binaries as base64."""

    snapshot = msgspec.json.Encoder(decimal_format="number", order="deterministic", enc_hook=bytes)


encode = msgspec.json.encode

UNREADABLE_JSON = (msgspec.DecodeError, RecursionError, UnicodeDecodeError)


def ref_of(message: Asking) -> str | UnsetType:
    """The ``ref`` of a message; what is no text of at most ``REF_MAX_CHARS`` is none."""
    if bytes(message.ref).startswith(b'"'):
        with contextlib.suppress(*UNREADABLE_JSON):
            if len(text := msgspec.json.decode(message.ref, type=str)) <= REF_MAX_CHARS:
                return text
    return UNSET


def sendable(encoded: bytes) -> bytes:
    """JSON that was encoded here, with what SQS and SNS refuse as escapes; all else as it was."""
    if not encoded.isascii():  # else there is nothing to look for
        for character, escape in UNSENDABLE.items():
            encoded = encoded.replace(character.encode(), escape)
    return encoded


def frame(payload: bytes, first_byte: int = 0x81) -> bytes:
    """One unmasked, final text frame (RFC 6455, section 5.2); 0xC1 for deflated text (RFC 7692).

    Server frames carry no mask, so that all clients of an event share these bytes. Written out
    because it is a tenth of the cost of the library's frame object.
    """
    size = len(payload)
    if size < 126:
        return bytes((first_byte, size)) + payload
    if size < 65_536:
        return struct.pack("!BBH", first_byte, 126, size) + payload
    return struct.pack("!BBQ", first_byte, 127, size) + payload


def deflate(payload: bytes) -> bytes:
    """``payload`` as one permessage-deflate message without context (RFC 7692, section 7.2.1)."""
    deflater = zlib.compressobj(level=6, wbits=-15)
    return (deflater.compress(payload) + deflater.flush(zlib.Z_SYNC_FLUSH))[:-4]


def timestamp(moment_s: float | None = None) -> str:
    """UTC with milliseconds: ``2025-11-24T12:00:00.000Z``."""
    moment = datetime.fromtimestamp(time.time() if moment_s is None else moment_s, UTC)
    return moment.isoformat(timespec="milliseconds")[:-6] + "Z"


class Event:
    """Something that happened in a project: encoded once, framed once, deflated once.

    Attributes:
        seq: place in the project's log, from 1; ``None`` if it is ephemeral.
        payload: the JSON text that clients get.
        sent_at: when the agent sent it, unix seconds; 0 if that is not known.
    """

    DEFLATE_FROM_BYTES = 256  # below it, the saved bytes cost more than the CPU

    __slots__ = ("_deflated", "_header", "frame", "project_id", "sent_at", "seq")

    def __init__(
        self, project_id: str, seq: int | None, payload: bytes, sent_at: float = 0.0
    ) -> None:
        self.project_id = project_id
        self.seq = seq
        self.sent_at = sent_at
        self.frame = frame(payload)
        self._header = len(self.frame) - len(payload)
        self._deflated: bytes | None = None

    @classmethod
    def of(cls, message: EventMessage, sent_at: float = 0.0) -> Event:
        return cls(message.project_id, message.seq, sendable(encode(message)), sent_at)

    @property
    def payload(self) -> bytes:
        return self.frame[self._header :]

    @property
    def deflated(self) -> bytes:
        """The frame for clients with permessage-deflate; plain where deflating does not pay."""
        if self._deflated is None:
            self._deflated = self.frame
            payload = self.payload
            if len(payload) >= self.DEFLATE_FROM_BYTES:
                smaller = deflate(payload)
                if len(smaller) < len(payload):
                    self._deflated = frame(smaller, 0xC1)
        return self._deflated


FIELDS = {
    "action": "subscribe, unsubscribe, forward, stop, ping or authenticate",
    "since": f"a whole number from 0 to {SEQ_MAX}",
    "epoch": f"a string of at most {ID_MAX_CHARS} characters",
    "traceparent": f"a string of at most {TRACE_MAX_CHARS} characters",
    "token": f"a string of 1 to {TOKEN_MAX_CHARS} characters",
    "snapshot": "true or false",
    "ephemeral": "true or false",
}
"""What a field must be, in words. All others have 1 to ``ID_MAX_CHARS`` characters."""


def explain(exc: Exception) -> BadMessage:
    """Why a parser refuses a message, in words for its author instead of types and paths."""
    complaint = str(exc).removeprefix("JSON is malformed: ")
    if found := re.search(r" field `(\w+)`| at `\$\.(\w+)`", complaint):
        name = found[1] or found[2]
        code = ErrorCode.INVALID_FIELD
        if name == "action":
            code = ErrorCode.INVALID_MESSAGE if found[1] else ErrorCode.UNKNOWN_ACTION
        what = FIELDS.get(name, f"a string of 1 to {ID_MAX_CHARS} characters")
        return BadMessage(code, f'The field "{name}" must be {what}.')
    if isinstance(exc, ValidationError):
        return BadMessage(ErrorCode.INVALID_MESSAGE, "The message must be a JSON object.")
    return BadMessage(ErrorCode.INVALID_JSON, f"The message is not valid JSON: {complaint}.")


def context_of(payload: bytes | bytearray | memoryview) -> dict[str, str]:
    """The ``action``, ``message_id``, ``project_id`` and ``ref`` of a message that is refused.

    Looks at its first ``EXPLAINED_BYTES`` only, whether they are JSON or not: to refuse a message
    must cost no more than to act on it.
    """
    limits = {b'"ref"': REF_MAX_CHARS}
    limits |= dict.fromkeys((b'"action"', b'"message_id"', b'"project_id"'), ID_MAX_CHARS)
    tokens: list[bytes] = []  # of the outermost object
    depth = 0
    pattern = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}:,"]|[^][{}:,"\s]+'
    for token in re.findall(pattern, bytes(payload[:EXPLAINED_BYTES])):
        if token == b'"':  # a string that goes on beyond what is looked at
            break
        depth -= token in b"]}"
        if depth == 1:
            tokens.append(token)
        depth += token in b"[{"
    context = {}
    for name, colon, value in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if colon == b":" and name in limits:
            with contextlib.suppress(*UNREADABLE_JSON):
                if len(text := msgspec.json.decode(value, type=str)) <= limits[name]:
                    context[name[1:-1].decode()] = text
    return context


def too_deep(text: bytes) -> bool:
    """Whether a JSON text nests arrays and objects deeper than ``MAX_NESTING``; builds no objects.

    What is passed on unread is parsed by others, here and elsewhere, and each of them gives up at
    a depth of its own.
    """
    if text.count(b"[") + text.count(b"{") <= MAX_NESTING:
        return False
    if b"\\" in text:  # what is escaped ends no string
        text = text.replace(b"\\\\", b"--").replace(b'\\"', b"--")
    others = bytes(range(256)).translate(None, b'[]{}"')
    steps = bytes.maketrans(b"[]{}", b"\x01\xff\x01\xff")  # up and down, as signed bytes
    steps = text.translate(steps, others).replace(b'""', b"")
    outside_strings = b"".join(steps.split(b'"')[::2]).replace(b"\x01\xff", b"")
    depths = itertools.accumulate(memoryview(outside_strings).cast("b"))
    return max(depths, default=0) >= MAX_NESTING  # without the innermost, which are taken out


def members_of(decoder: msgspec.json.Decoder[Any], text: bytes) -> dict[str, bytes]:
    """The members of a JSON text as they are written, with halves of surrogate pairs or without.

    A half may stand in JSON as an escape (RFC 8259, section 8.2): it is what becomes of text that
    was cut inside an emoji. The parser takes none. So it reads a copy of the same length, in which
    no escape begins like one. What it finds there are views, over which the text itself is laid.

    Args:
        decoder: one made by ``unread``.
    """
    copy = bytearray(text.replace(rb"\ud", rb"\uc").replace(rb"\uD", rb"\uc"))
    members = msgspec.structs.asdict(decoder.decode(copy))
    copy[:] = text
    return {name: bytes(value) for name, value in members.items() if value is not UNSET}


def decode_halves(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    """Decode a message with half a surrogate pair somewhere; ``data`` keep it, byte for byte.

    Raises:
        BadMessage: it is in a field that this program reads itself.
        msgspec.DecodeError: that was not what is wrong with the message.
    """
    members = members_of(Decoders.members, payload)
    data = members.pop("data", b"null")
    halved: list[str] = []
    for name, value in members.items():
        try:
            msgspec.json.decode(value, type=Raw)
        except msgspec.DecodeError:
            halved.append(name)
            members[name] = b"{}"  # which is refused where a field is read, and else ignored
    rest = b",".join(b'"%b":%b' % (name.encode(), value) for name, value in members.items())
    try:
        message: Any = decoder.decode(b"{%b}" % rest)
    except ValidationError as exc:
        for name in halved:
            if f"`$.{name}`" in str(exc):
                sentence = f'"{name}" has half a surrogate pair.'
                raise BadMessage(ErrorCode.INVALID_FIELD, sentence) from None
        raise
    if hasattr(message, "data"):
        message.data = Raw(data)
    return cast("T", message)


def decode_relayed(encoded: bytes) -> RelayedEvent:
    """An event that another task has published, whatever its payload.

    Raises:
        msgspec.DecodeError, RecursionError: it is none.
    """
    with contextlib.suppress(msgspec.DecodeError):
        return Decoders.relayed_event.decode(encoded)
    members = members_of(Decoders.relayed_members, encoded)
    payload = members.get("payload", b"")
    members["payload"] = b"null"
    event = Decoders.relayed_event.decode(b"[%b]" % b",".join(members.values()))
    event.payload = Raw(payload)
    return event


def decode(decoder: msgspec.json.Decoder[T], payload: bytes) -> T:
    """Decode what a client or an agent has written, whatever its ``data`` are.

    Raises:
        BadMessage: it is no JSON, no such message, nests too deep, or a field other than ``data``
            has half a surrogate pair.
    """
    payload = payload.removeprefix(b"\xef\xbb\xbf")  # a byte order mark (RFC 8259, section 8.1)
    if too_deep(payload):
        sentence = f"The message nests arrays and objects more than {MAX_NESTING} deep."
        raise BadMessage(ErrorCode.INVALID_MESSAGE, sentence)
    try:
        try:
            return decoder.decode(payload)
        except ValidationError:
            raise
        except msgspec.DecodeError:
            return decode_halves(decoder, payload)
    except UNREADABLE_JSON as exc:
        raise explain(exc) from None


def decode_message(payload: bytes) -> ClientMessage:
    """A client's message.

    Raises:
        BadMessage: with the context (``action``, ``message_id``, ``project_id``) that it begins
            with, if any.
    """
    try:
        return cast("ClientMessage", decode(Decoders.client_message, payload))
    except BadMessage as exc:
        exc.context = context_of(payload)
        raise


def split_target(target: str) -> tuple[str, str]:
    """Path and query of a request's target, also where that is a whole URL (RFC 9112, 3.2.2)."""
    path, _, query = re.sub(r"(?i)^(?:http|ws)s?://[^/?]+", "", target).partition("?")
    return path or "/", query


def subscriptions_in(query: str) -> list[dict[str, Any]]:
    """The subscribe messages that a URL stands for.

    Raises:
        BadMessage: it cannot stand for any.
    """
    found = parse_qsl(query, keep_blank_values=True, errors="surrogateescape")
    named = [each for each in found if each[0] in ("project_id", "since", "epoch")]
    for name, value in named:
        if re.search("[\udc80-\udcff]", value):
            raise BadMessage(ErrorCode.INVALID_FIELD, f'"{name}" in the URL is not UTF-8.')
    project_ids = [value for name, value in named if name == "project_id"]
    resume: dict[str, Any] = {name: value for name, value in named if name != "project_id"}
    if resume and len(project_ids) != 1:
        sentence = "since and epoch go with exactly one project_id in the URL."
        raise BadMessage(ErrorCode.INVALID_FIELD, sentence)
    if re.fullmatch("[0-9]{1,16}", resume.get("since", "")):
        resume["since"] = int(resume["since"])
    return [{"action": "subscribe", "project_id": p, **resume} for p in project_ids]


def decode_first_message(payload: bytes) -> Authenticate:
    """The only message that a client without a principal may send; nothing else is decoded.

    Raises:
        BadMessage: it is another one, or none.
    """
    if len(payload) <= TOKEN_MAX_CHARS + 1_024:
        with contextlib.suppress(BadMessage):
            return decode(Decoders.authenticate, payload)
    raise BadMessage(ErrorCode.UNAUTHENTICATED, "Authenticate first.")


def queue_of(message: Forward) -> str:
    """The agent, ``pm``, ``dev``, ``qa`` or ``ops``, that a forward goes to.

    Raises:
        BadMessage: ``type`` names none.
    """
    queue = QUEUE_OF_TYPE.get(message.type.lower())
    if queue is None:
        known = ", ".join(QUEUE_OF_TYPE)
        raise BadMessage(ErrorCode.UNKNOWN_TYPE, f'This "type" names no agent; use one of {known}.')
    return queue


def decode_update(body: str) -> Update:
    """An agent's update.

    Raises:
        BadMessage: whatever keeps clients from being able to get it.
    """
    try:
        update = decode(Decoders.update, body.encode())
    except UnicodeEncodeError as exc:
        raise BadMessage(ErrorCode.INVALID_JSON, str(exc)) from None
    if update.type in RESERVED_TYPES:
        sentence = f"The type {update.type!r} is reserved for the server."
        raise BadMessage(ErrorCode.INVALID_FIELD, sentence)
    if memoryview(update.data).nbytes > EVENT_MAX_BYTES:
        sentence = f"Its data are larger than {EVENT_MAX_BYTES} bytes."
        raise BadMessage(ErrorCode.TOO_LARGE, sentence)
    return update


# --- Access ---------------------------------------------------------------------------------
# Who may do what, and how much of it. Knows no sockets, no AWS.


def client_address(peer: str, forwarded_for: Sequence[str], hops: int) -> str:
    """Whose limits apply: an IPv4 address, or the /64 that one IPv6 customer has.

    Every trusted proxy appends the address it was called from, so that with ``hops`` of them the
    entry at that place from the right is the last that no client can have written.
    """
    entries = [entry.strip() for value in forwarded_for for entry in value.split(",")]
    claimed = entries[-min(hops, len(entries))] if hops and entries else peer
    with_port = re.fullmatch(r"(?a)\[(.+)\](?::\d+)?|([\d.]+):\d+", claimed)
    bare = (with_port[1] or with_port[2]) if with_port else claimed
    for candidate in (bare, peer):
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(candidate)
            if ipv4 := getattr(address, "ipv4_mapped", address):
                return str(ipv4)
            return str(ipaddress.IPv6Network((int(address), 64), strict=False))  # no zone id
    return peer


class Admission:
    """Who may come in now, by address and in all.

    Attributes:
        inside: how many have come in, or wait for it.
    """

    SITE_ADDRESSES = 16  # what all of an IPv6 /48 may do, in addresses: it has 65,536 of them

    def __init__(self, settings: Settings) -> None:
        self._max_connections = settings.max_connections or math.inf
        self._max_per_address = settings.max_connections_per_ip or math.inf
        self.inside = 0
        self._inside_by_scope: Counter[str] = Counter()

    @classmethod
    def scopes_of(cls, address: str) -> Iterator[tuple[str, int]]:
        """What an address counts for, and how many addresses' worth that may have.

        Its own; and of IPv6 the /48 that its /64 lies in, which a single customer may have whole.
        """
        yield address, 1
        if ":" in address:
            with contextlib.suppress(ValueError):
                site = ipaddress.IPv6Network(address).supernet(new_prefix=48)
                yield str(site), cls.SITE_ADDRESSES

    def refusal(self, address: str) -> tuple[int, str] | None:
        """HTTP status and sentence for who may not come in."""
        scopes, most = self.scopes_of(address), self._max_per_address
        if any(self._inside_by_scope[name] >= worth * most for name, worth in scopes):
            return 429, "Too many connections from this address."
        if self.inside >= self._max_connections:
            return 503, "This server is full."
        return None

    def count(self, address: str, change: int) -> None:
        """Count a connection that has come in, +1, or gone, -1."""
        self.inside += change
        for name, _ in self.scopes_of(address):
            self._inside_by_scope[name] += change
            if not self._inside_by_scope[name]:
                del self._inside_by_scope[name]


@dataclasses.dataclass(frozen=True, slots=True)
class Principal:
    """Who a connection belongs to.

    Attributes:
        projects: those it may use; ``None`` for all.
        expires_at: unix seconds, leeway included.
    """

    subject: str | None
    projects: frozenset[str] | None
    expires_at: float

    def may_use(self, project_id: str | None, *, strictly: bool = False) -> bool:
        """Whether it may use a project; everyone's own is open to all, unless ``strictly``.

        Without a project there is nothing to compare: it takes a right to any.
        """
        if self.projects is None or (project_id == EVERYONE and not strictly):
            return True
        return project_id in self.projects if project_id is not None else bool(self.projects)


def usable_key(member: Any, algorithms: Sequence[str]) -> PyJWK | None:
    """A member of a key set, if it is a key for one of the algorithms, and for signatures.

    Others belong to somebody else, and are no reason to do without the rest (RFC 7517, section 5).
    """
    try:
        key = PyJWK(member)
    except Exception:  # the member is a stranger's, and its parser raises all sorts
        return None
    usable = key.algorithm_name in algorithms and key.public_key_use in (None, "sig")
    return key if usable and isinstance(key.key_id, str | None) else None


class Keys:
    """The issuer's public keys, by key id; the last good ones while its endpoint is down.

    Attributes:
        document: the key set as it was read; empty before there was a good one.
    """

    MAX_BYTES = 1_048_576
    REFRESH_S = 60.0  # at most so often for a key that is not known
    LIFETIME_S = 300.0  # a key withdrawn by the issuer is honoured no longer, if it answers

    def __init__(self, fetch: Callable[[], Awaitable[bytes]], algorithms: Sequence[str]) -> None:
        self._fetch = fetch
        self._algorithms = algorithms
        self.document = b""
        self._keys: list[PyJWK] = []
        self._read_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None

    def find(self, key_id: str | None, algorithm: str) -> list[PyJWK]:
        """The keys that a token may be signed with: those of its id, else those without one.

        Several may share an id, or have none (RFC 7517, section 4.5); a token without an id may be
        of any key.

        Raises:
            UnknownKey: there is none.
            NotAuthenticated: there can be none.
        """
        if algorithm not in self._algorithms:
            raise NotAuthenticated("its algorithm is not allowed")
        fitting = [key for key in self._keys if key.algorithm_name == algorithm]
        named = [key for key in fitting if key_id is None or key.key_id == key_id]
        found = named or [key for key in fitting if key.key_id is None]
        if not found:
            raise UnknownKey("it is signed with an unknown key")
        return found

    def may_read_again(self, now: float) -> bool:
        return now - self._read_at >= self.REFRESH_S or self._reading is not None

    def read(self, now: float) -> asyncio.Task[None]:
        """Read the keys anew; those who ask meanwhile wait for the same answer."""
        if self._reading is None:
            self._read_at = now
            self._reading = asyncio.ensure_future(self._read())
        return self._reading

    async def _read(self) -> None:
        try:
            document = await self._fetch()
            members = json.loads(document)["keys"]
            keys = [key for member in members if (key := usable_key(member, self._algorithms))]
            if not keys:
                raise PyJWKSetError("no key is for an algorithm in AUTH_ALGORITHMS")
            if document != self.document:
                self.document, self._keys = document, keys
        except Exception as exc:  # the document is a stranger's, and its parser raises all sorts
            logger.warning("the issuer's keys could not be read: %s", type(exc).__name__)
        finally:
            self._reading = None


def projects_in(claims: Mapping[str, Any], name: str) -> frozenset[str] | None:
    """The projects that a claim grants: a list, or a string with spaces; ``None`` for all."""
    value: Any = claims.get(name)
    if value is None:
        value = claims
        for step in name.split("."):
            value = value.get(step) if isinstance(value, dict) else None
    granted = value.split() if isinstance(value, str) else value
    found = frozenset(p for p in granted if isinstance(p, str)) if isinstance(granted, list) else ()
    return None if "*" in found else frozenset(found)


class Dates(Struct):
    """Claims that are NumericDates, unix seconds (RFC 7519, section 2): finite, never strings."""

    exp: Annotated[float, Meta(ge=0, le=sys.float_info.max)]
    nbf: Annotated[float, Meta(ge=0, le=sys.float_info.max)] = 0.0


class Verifier:
    """Whose tokens are (RFC 7519). The algorithm is the settings' choice, never the token's.

    A token is looked at once, and remembered until it ends or the issuer's keys change.

    Attributes:
        keys: the issuer's, to be read now and then.
    """

    REMEMBERED = 10_000

    def __init__(self, settings: Settings, keys: Keys) -> None:
        self.keys = keys
        self._settings = settings
        self._by_aud = settings.auth_audience_claim == "aud"
        self._known: dict[bytes, Principal] = {}  # by SHA-256: what is kept is no token
        self._known_by = b""  # the key set

    def check(
        self,
        token: str,
        answer: Callable[[Principal | NotAuthenticated], None],
        reading: asyncio.Task[None] | None = None,
    ) -> None:
        """Have ``answer`` called with whose token it is, or why it is nobody's.

        At once, unless the issuer's keys have to be read anew to tell.

        Args:
            reading: what was waited for, if the keys were read for this token.
        """
        now = asyncio.get_running_loop().time()
        found: Principal | NotAuthenticated
        try:
            found = self.verify(token)
        except UnknownKey as exc:
            if reading is None and self.keys.may_read_again(now):
                self.keys.read(now).add_done_callback(partial(self.check, token, answer))
                return
            found = NotAuthenticated(str(exc)) if reading else exc
        except NotAuthenticated as exc:
            found = exc
        answer(found)

    def verify(self, token: str) -> Principal:
        """Whose token it is.

        Raises:
            UnknownKey: the issuer's keys have to be read again to tell.
            NotAuthenticated: nobody's.
        """
        if self._known_by is not self.keys.document:
            self._known, self._known_by = {}, self.keys.document
        digest = hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()
        principal = self._known.get(digest)
        if principal is None or principal.expires_at <= time.time():
            principal = self._principal_of(token)
            while len(self._known) >= self.REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[digest] = principal
        return principal

    def _principal_of(self, token: str) -> Principal:
        settings = self._settings
        try:
            header = jwt.get_unverified_header(token)
            key_id = header.get("kid")
            keys = self.keys.find(key_id, header.get("alg", ""))
            claims = self._claims(token, keys)
            if claims is None and key_id is not None and keys[0].key_id == key_id:
                raise NotAuthenticated("its signature is wrong")
            if claims is None:
                raise UnknownKey("it is signed with none of the keys that it may be signed with")
            claims["sub"].encode()  # half a surrogate pair would fail later, at each forward
            expires_at = msgspec.convert(claims, Dates).exp + TOKEN_LEEWAY_S
        except (PyJWTError, ValidationError, ValueError, TypeError, ArithmeticError) as exc:
            raise NotAuthenticated(type(exc).__name__) from None
        if not self._by_aud and claims.get(settings.auth_audience_claim) != settings.auth_audience:
            raise NotAuthenticated("it is for another audience")
        if expires_at <= time.time():
            raise Expired("it has expired")
        projects = projects_in(claims, settings.auth_projects_claim)
        return Principal(claims["sub"], projects, expires_at)

    def _claims(self, token: str, keys: Sequence[PyJWK]) -> dict[str, Any] | None:
        """What a token claims, its expiry unchecked; ``None`` if none of the keys has signed it."""
        for key in keys:
            with contextlib.suppress(InvalidSignatureError, InvalidKeyError):
                return jwt.decode(
                    token,
                    key,
                    algorithms=[key.algorithm_name],
                    issuer=self._settings.auth_issuer,
                    audience=self._settings.auth_audience if self._by_aud else None,
                    leeway=TOKEN_LEEWAY_S,
                    options={
                        "require": ["exp", "iss", "sub"],
                        "verify_exp": False,
                        "verify_aud": self._by_aud,
                        "enforce_minimum_key_length": True,
                    },
                )
        return None

    async def first_keys(self) -> None:
        """Read the issuer's keys: without any, nobody could come in."""
        for attempt in itertools.count():
            await self.keys.read(asyncio.get_running_loop().time())
            if self.keys.document:
                return
            await asyncio.sleep(full_jitter_s(attempt))

    async def keep_keys(self) -> NoReturn:
        while True:
            await asyncio.sleep(Keys.LIFETIME_S)
            await self.keys.read(asyncio.get_running_loop().time())


def bearer_token(headers: Headers) -> str | None:
    """The token of a handshake, out of a header or, for browsers, out of the subprotocols.

    Never out of the query string: URLs end up in logs, histories and Referer headers.
    """
    for value in headers.get_all("Authorization"):
        scheme, _, token = value.partition(" ")
        if scheme.lower() == "bearer":
            return token.strip()
    for value in headers.get_all("Sec-WebSocket-Protocol"):
        for offer in value.split(","):
            if offer.strip().startswith(BEARER_PREFIX):
                encoded = offer.strip().removeprefix(BEARER_PREFIX)
                try:
                    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode()
                except ValueError:
                    return ""
    return None


def choose_subprotocol(_: ServerProtocol, offers: Sequence[Subprotocol]) -> Subprotocol | None:
    """Ours if it was offered: browsers give up when none of theirs is confirmed."""
    return Subprotocol(SUBPROTOCOL) if SUBPROTOCOL in offers else None


# --- Registry -------------------------------------------------------------------------------
# Who is connected, who listens to what, what they were told last, and which events are remembered
# for those who come back. Never awaits, never logs.


class Chunk:
    """Events that a client gets in one piece, joined once for all who get them.

    Slow readers share what they have not read, too.

    Attributes:
        joined: the frames in one piece, by whether they are deflated.
        size_bytes: of the frames of events that were taken.

    Args:
        registry: counts what is held for it until nobody has it any more.
    """

    MAX_BYTES = 131_072  # of one write to a client that catches up; a larger event is alone
    CHUNK_BYTES = 1_300  # held for a chunk, and for its channel once that is gone
    EVENT_BYTES = 300  # held for an event beside its frame
    FRAMES_HELD = 4  # of an event at most: plain and deflated, each by itself and joined

    __slots__ = ("_registry", "events", "joined", "size_bytes")

    def __init__(self, events: list[Event], registry: Registry | None = None) -> None:
        self.events = events
        self.size_bytes = 0
        self.joined: dict[bool, bytes] = {}
        self._registry = registry

    def __del__(self) -> None:
        if self._registry is not None:
            self._registry.events_bytes -= self.held_bytes

    def frames(self, deflated: bool) -> bytes:
        joined = self.joined.get(deflated)
        if joined is None:
            frames = [event.deflated if deflated else event.frame for event in self.events]
            # A copy even of a single one, which its event keeps: the ledger counts references.
            joined = self.joined[deflated] = b"".join([b"", *frames])
        return joined

    @property
    def held_bytes(self) -> int:
        """What is held for it at most."""
        frames = self.FRAMES_HELD * self.size_bytes
        return self.CHUNK_BYTES + len(self.events) * self.EVENT_BYTES + frames

    # Of those whose events are consecutive ones of a log.

    @property
    def first(self) -> int:
        return self.events[0].seq or 0

    @property
    def last(self) -> int:
        return self.events[-1].seq or 0

    def after(self, position: int) -> Chunk:
        """The events after ``position``: all of them are this chunk itself."""
        return Chunk(self.events[position + 1 - self.first :]) if position >= self.first else self

    def take(self, event: Event) -> bool:
        """Add the next event, if it is one and there is room; whether it was."""
        size_bytes = self.size_bytes + len(event.frame)
        if self.events and (event.seq != self.last + 1 or size_bytes > self.MAX_BYTES):
            return False
        self.events.append(event)
        self.size_bytes = size_bytes
        self.joined.clear()
        return True


class Channel:
    """One project on this task: its listeners and its cursor.

    Attributes:
        listeners: those who are sent plain frames, and those who are sent deflated ones.
        cursor: ``seq`` of the last event delivered here; ``None`` until the log was asked.
        wanted: highest ``seq`` heard of; above ``cursor`` it means a gap.
        chunks: what is remembered of the events up to ``cursor``, in order and without overlaps.
        pending: events to be written at the end of this turn of the loop.
        visitors: clients still catching up, for whom the channel must stay.
    """

    __slots__ = (
        "chunks", "cursor", "filling", "listeners", "opening", "pending", "project_id",
        "visitors", "wanted",
    )  # fmt: skip

    def __init__(self, project_id: str) -> None:
        self.project_id = project_id
        self.listeners: tuple[set[Connection], set[Connection]] = (set(), set())
        self.pending: list[Event] = []
        self.cursor: int | None = None
        self.wanted = 0
        self.chunks: list[Chunk] = []
        self.opening: asyncio.Future[None] | None = None
        self.filling: asyncio.Task[None] | None = None
        self.visitors = 0

    @property
    def floor(self) -> int:
        """Everything after this ``seq`` is in the chunk that ends at the cursor."""
        cursor = self.cursor or 0
        chunk = self.chunk_with(cursor)
        return chunk.first - 1 if chunk else cursor

    def chunk_with(self, seq: int) -> Chunk | None:
        place = bisect.bisect_right(self.chunks, seq, key=operator.attrgetter("first")) - 1
        return self.chunks[place] if place >= 0 and seq <= self.chunks[place].last else None

    @property
    def audience(self) -> int:
        """How many listeners there are."""
        plain, deflating = self.listeners
        return len(plain) + len(deflating)

    @property
    def idle(self) -> bool:
        return not (self.audience or self.visitors)

    def place(self, event: Event) -> bool:
        """Move the cursor over ``event``, if it is the next one; whether it was."""
        seq = cast("int", event.seq)
        if self.cursor is None or seq != self.cursor + 1:
            self.wanted = max(self.wanted, seq)
            return False
        self.cursor = seq
        return True


class Registry:
    """The connections by id and the channels by project.

    Attributes:
        sockets: all connections from their first byte to their last.
        connections: those of them that are open, by id.
        events_bytes: a bound of what is held for the events in all chunks of logs, also in those
            that are forgotten and that some client is still to be sent.
        remembered_bytes: the same for those that are remembered.
    """

    REMEMBERED_BYTES = 33_554_432  # held for events of all channels at most

    def __init__(self) -> None:
        self.sockets: set[Connection] = set()
        self.connections: dict[str, Connection] = {}
        self.channels: dict[str, Channel] = {}
        self._chunks: deque[tuple[Channel, Chunk]] = deque()  # the oldest first
        self.events_bytes = self.remembered_bytes = 0

    def channel(self, project_id: str) -> Channel:
        channel = self.channels.get(project_id)
        if channel is None:
            channel = self.channels[project_id] = Channel(project_id)
        return channel

    def join(self, connection: Connection, channel: Channel) -> None:
        channel.listeners[connection.deflates].add(connection)
        connection.subscriptions.add(channel.project_id)
        connection.recount()

    def leave(self, connection: Connection, *project_ids: str) -> None:
        """Take ``connection`` off the live lists; also where it is not on one."""
        for project_id in project_ids:
            connection.subscriptions.discard(project_id)
            channel = self.channels.get(project_id)
            if channel is not None:
                channel.listeners[connection.deflates].discard(connection)
                self.release(channel)
        connection.recount()

    def release(self, channel: Channel) -> None:
        """Forget a channel nobody listens to; everyone's own stays."""
        if channel.idle and channel.project_id != EVERYONE:
            self.channels.pop(channel.project_id, None)

    def remember(self, channel: Channel, event: Event, chunk: Chunk | None) -> Chunk:
        """Keep an event up to the cursor for clients that come back, and forget the oldest chunks.

        When a task is replaced, thousands come back at once that have missed the same. It is kept
        in ``chunk``, if that ends before it and has room; returns the chunk that it is in.
        """
        held_bytes = Chunk.EVENT_BYTES + Chunk.FRAMES_HELD * len(event.frame)
        if chunk is None or not chunk.take(event):
            chunk = Chunk([], self)
            chunk.take(event)
            bisect.insort(channel.chunks, chunk, key=operator.attrgetter("first"))
            self._chunks.append((channel, chunk))
            held_bytes += Chunk.CHUNK_BYTES
        self.events_bytes += held_bytes
        self.remembered_bytes += held_bytes
        while self.remembered_bytes > self.REMEMBERED_BYTES:
            forgetful, oldest = self._chunks.popleft()
            forgetful.chunks.remove(oldest)
            self.remembered_bytes -= oldest.held_bytes
        return chunk

    def joined(self) -> Iterator[bytes]:
        """What is remembered in one piece, whether anybody is sent it or not."""
        for _, chunk in self._chunks:
            yield from chunk.joined.values()

    def drop(self, connection: Connection) -> None:
        """Send a connection nothing more, whatever it is subscribed to or catches up with."""
        for task in tuple(connection.catching_up.values()):
            task.cancel()
        connection.page = []
        self.connections.pop(connection.id, None)
        self.leave(connection, *connection.subscriptions)

    @property
    def subscriptions(self) -> int:
        return sum(
            channel.audience for channel in self.channels.values() if channel.project_id != EVERYONE
        )


# --- Work and memory ------------------------------------------------------------------------
# What clients cost: an account of work for each principal, one ledger of memory for the process.
# Knows no messages and no AWS.

PAGE_PRICE_S = 0.002
"""The work that a page read from the log stands for, beside what is replayed of it, or a stop."""

SOCKET_BUFFER_BYTES = 32_768  # asked of the kernel, each way; Linux makes it twice as much
CHOKED_AT_BYTES = 16_384  # a connection with more unread than this is looked at with each write
MEMORY_BUDGET_SHARE = 0.4  # of the container's limit; the rest is Python's and the kernel's


@dataclasses.dataclass(slots=True, eq=False)
class Account:
    """What somebody has used up lately, kept as the moment at which all of it is paid.

    At most ``WINDOW_S`` seconds of its share are saved up, and at most as many are owed (the
    generic cell rate algorithm, ITU-T I.371).

    Attributes:
        share: seconds of work that are paid a second.
        paid_at: when nothing is owed any more, by the loop's clock.
        users: open connections that are charged to it; it is not forgotten while there are any.
    """

    WINDOW_S: ClassVar[float] = 10.0

    share: float
    paid_at: float = -math.inf
    users: int = 0
    _gate: asyncio.Lock | None = None  # only for those who ever need it

    def charge(self, amount: float, now: float) -> None:
        """Have something that was used paid from ``now`` on."""
        started_at = max(self.paid_at, now - self.WINDOW_S)
        self.paid_at = min(started_at + amount / self.share, now + self.WINDOW_S)

    def owed(self, now: float) -> float:
        return max(0.0, self.paid_at - now) * self.share

    def unused(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting this account."""
        return not self.users and self.paid_at <= now - self.WINDOW_S

    async def afford(self, amount: float) -> None:
        """Wait until nothing is owed, one after the other, and charge for something."""
        now = asyncio.get_running_loop().time
        self._gate = self._gate or asyncio.Lock()
        async with self._gate:
            while self.paid_at > now():
                await asyncio.sleep(self.paid_at - now())
            self.charge(amount, now())


class Accounts:
    """An account for each key; those that are unused are forgotten."""

    REMEMBERED = 65_536
    FORGOTTEN_AT_ONCE = 4_096  # accounts looked at, each second

    def __init__(self, share: float) -> None:
        self._share = share
        self._accounts: dict[str, Account] = {}

    def of(self, key: str) -> Account:
        account = self._accounts.get(key)
        if account is None:
            while len(self._accounts) >= self.REMEMBERED:
                del self._accounts[next(iter(self._accounts))]
            account = self._accounts[key] = Account(self._share)
        return account

    def owed(self, now: float) -> float:
        """What is owed on all accounts together."""
        return sum(account.owed(now) for account in self._accounts.values())

    def forget(self, now: float) -> None:
        """Look at the oldest; those that are in use come last, and have their turn again."""
        for key in list(itertools.islice(self._accounts, self.FORGOTTEN_AT_ONCE)):
            account = self._accounts.pop(key)
            if not account.unused(now):
                self._accounts[key] = account


class Turns:
    """Whose input is acted on next, and how much of the loop's time input may take.

    The account that has used least comes first. Who is in debt waits until it is paid. Whoever
    waits keeps the place in time that was due then, and a newcomer's is at most an account's window
    in the past, so that who has waited that long comes before all newcomers. The connections of
    one account take turns.

    All input together gets a slice of CPU time in a turn of the loop, and beyond it as much as the
    rest of the loop's work has taken since: at most half while anything else is due.
    """

    TURN_S = 0.001  # of CPU time, for one connection's input, before the others get their turn
    INPUT_SLICE_S = 0.005  # of CPU time, for all input, before the rest of the loop's work
    NOTHING_DUE_S = 0.0005  # if everything else took less since the last slice, nothing was due

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[Account, OrderedDict[Connection, None]] = {}
        self._order: list[tuple[float, int, Account]] = []  # a heap, of those in `_waiting`
        self._arrivals = itertools.count()
        self._left_s = self.INPUT_SLICE_S
        self._counted_s = time.thread_time()  # up to the last slice, and of input since
        self._next: asyncio.Handle | None = None
        self._next_at = math.inf

    def give(self, connection: Connection) -> None:
        """Have a connection act on its input: now if nobody's turn is due, else in its own."""
        now = self._loop.time()
        idle = self._left_s > 0 and not (self._order and self._order[0][0] <= now)
        if idle and connection.account.paid_at <= now:
            self._run(connection)
        else:
            self.queue(connection)

    def queue(self, connection: Connection) -> None:
        """Have a connection act on its input in its turn; until then nothing is read from it."""
        if connection.queued or connection.is_over:
            return
        connection.queued = account = connection.account
        connection.pause_reading()
        if account in self._waiting:
            self._waiting[account][connection] = None
        else:
            self._waiting[account] = OrderedDict({connection: None})
            self._place(account)
            self._slice_at(0.0)

    def leave(self, connection: Connection) -> None:
        """Have no turn come for a connection; its account keeps the place until that is due."""
        if connection.queued:
            del self._waiting[connection.queued][connection]
            connection.queued = None

    def _place(self, account: Account) -> None:
        place = max(account.paid_at, self._loop.time() - Account.WINDOW_S)
        heapq.heappush(self._order, (place, next(self._arrivals), account))

    def _run(self, connection: Connection) -> None:
        """Give one connection its turn, and charge it to whomever it belongs to by then."""
        started_s = time.thread_time()
        more = connection.take_turn(until_s=started_s + self.TURN_S)
        spent_s = time.thread_time() - started_s
        now = self._loop.time()
        connection.account.charge(spent_s, now)
        self._left_s -= spent_s
        self._counted_s += spent_s
        if more or connection.account.paid_at > now:
            self.queue(connection)

    def _slice_at(self, at: float) -> None:
        """Have the next slice then, or at once if that has passed; an earlier one stays."""
        if at < self._next_at:
            if self._next is not None:
                self._next.cancel()
            self._next_at, self._next = at, self._loop.call_at(at, self._slice)

    def _slice(self) -> None:
        """Let those act whose turn it is, for as long as input may take now."""
        self._next_at, self._next = math.inf, None
        now_s = time.thread_time()
        others_s, self._counted_s = now_s - self._counted_s, now_s
        earned_s = self.INPUT_SLICE_S if others_s < self.NOTHING_DUE_S else self._left_s + others_s
        self._left_s = min(earned_s, self.INPUT_SLICE_S)
        while self._order and self._left_s > 0:
            place, _, account = self._order[0]
            if place > self._loop.time():
                self._slice_at(place)  # when the first debt is paid
                return
            heapq.heappop(self._order)
            waiting = self._waiting[account]
            if waiting:  # else all of them have left
                connection, _ = waiting.popitem(last=False)
                connection.queued = None
                self._run(connection)
            if waiting:
                self._place(account)
            else:
                del self._waiting[account]
        if self._order:
            self._slice_at(0.0)


class Ledger:
    """Every byte held for clients or because of them, by connection and in all.

    Events that are remembered have a bound of their own (``Registry``). Of those that are not, what
    clients that catch up have found and not been sent yet counts once for all of them.

    Over the budget, the account that holds most loses the connection that has stalled longest, at
    once. What agents cause counts too, but stops the intake of updates and never a client.

    Attributes:
        agents_bytes: says what is held for agents.
    """

    CHANNEL_BYTES = 2_000  # an open channel without events
    ROOM_BELOW = 0.9  # of the budget; above it nobody comes in, and relief goes down to it
    ENDED_AT_ONCE = 50  # connections with a backlog, before what is held is counted anew

    def __init__(self, registry: Registry, metrics: Metrics, budget_bytes: int) -> None:
        self._registry = registry
        self._metrics = metrics
        self._budget_bytes = budget_bytes
        self._held_bytes = 0
        self._shared: dict[int, bytes] = {}  # by identity
        self._shared_bytes = 0
        self._relief_is_due = False
        self.agents_bytes: Callable[[], int] = lambda: 0

    @property
    def clients_bytes(self) -> int:
        registry = self._registry
        channels = len(registry.channels) * self.CHANNEL_BYTES
        forgotten = registry.events_bytes - registry.remembered_bytes
        return self._held_bytes + self._shared_bytes + channels + forgotten

    @property
    def has_room(self) -> bool:
        """Whether there is room for another connection."""
        return self.clients_bytes <= self._budget_bytes * self.ROOM_BELOW

    def may_receive(self) -> bool:
        """Whether there is room for more of what agents send."""
        return self.clients_bytes + self.agents_bytes() <= self._budget_bytes

    def update(self, connection: Connection) -> None:
        """Charge a connection with what it holds now."""
        self.add(connection, sum(connection.held().values()) - connection.charged_bytes)

    def add(self, connection: Connection, change_bytes: int) -> None:
        """Charge a connection with so much more, or less; one that is gone was forgotten."""
        if connection.progress is not Progress.LOST:
            connection.charged_bytes += change_bytes
            self._held_bytes += change_bytes
            if change_bytes > 0:
                self.check()

    def forget(self, connection: Connection) -> None:
        self._held_bytes -= connection.charged_bytes
        connection.charged_bytes = 0

    def share(self, data: bytes) -> None:
        """Count what is written to many and not read by all of them, once for all of them."""
        if id(data) not in self._shared:
            self._shared[id(data)] = data
            self._shared_bytes += len(data)
            self.check()

    def let_go(self) -> None:
        """Stop counting shared bytes that no transport refers to any more."""
        kept = set(map(id, self._registry.joined())) if self._shared else ()
        for key, data in tuple(self._shared.items()):
            # Here: the dict, the tuple, `data` and the argument; and where it is remembered.
            if sys.getrefcount(data) <= 4 + (key in kept):
                del self._shared[key]
                self._shared_bytes -= len(data)

    def figures(self) -> dict[str, int]:
        """What is held, by kind, in bytes."""
        kinds = Counter(unread=self._shared_bytes)
        for connection in self._registry.sockets:
            kinds.update(connection.held())
        kinds["channels"] = len(self._registry.channels) * self.CHANNEL_BYTES
        kinds["events"] = self._registry.events_bytes
        kinds["agents"] = self.agents_bytes()
        return kinds

    def check(self) -> None:
        """Have connections ended, if what is held is over the budget."""
        if self.clients_bytes > self._budget_bytes and not self._relief_is_due:
            self._relief_is_due = True
            asyncio.get_running_loop().call_soon(self._relieve)

    def _relieve(self) -> None:
        """End connections until enough is free, of whoever holds most at each step.

        What many share is free only when the last of them is gone, and a transport lets go of its
        buffer a moment after it was ended. So of those with a backlog a few are ended at a time.
        """
        self._relief_is_due = False
        self.let_go()
        by_account: defaultdict[Account, list[Connection]] = defaultdict(list)
        held_bytes: defaultdict[Account, int] = defaultdict(int)
        for connection in sorted(self._registry.sockets, key=lambda each: -each.stalled_since):
            if not connection.transport.is_closing():
                by_account[connection.account].append(connection)
                held_bytes[connection.account] += connection.held_bytes()
        most = [(-size, number, each) for number, (each, size) in enumerate(held_bytes.items())]
        heapq.heapify(most)
        with_backlog = 0
        while most and not self.has_room and with_backlog < self.ENDED_AT_ONCE:
            minus_bytes, number, account = heapq.heappop(most)
            victim = by_account[account].pop()
            freed_bytes = victim.held_bytes()
            with_backlog += victim.choked
            self._end(victim, freed_bytes, -minus_bytes)
            if by_account[account]:
                heapq.heappush(most, (minus_bytes + freed_bytes, number, account))
        if most:  # else nobody is left to end
            self.check()

    def _end(self, connection: Connection, held_bytes: int, account_bytes: int) -> None:
        self._metrics.memory_closed += 1
        logger.warning(
            "connection ended: the memory budget is used up",
            extra={
                "connection_id": connection.id,
                "address": connection.address,
                "held_bytes": held_bytes,
                "account_bytes": account_bytes,
                "budget_bytes": self._budget_bytes,
            },
        )
        unread = connection.transport.get_write_buffer_size()
        connection.close(CloseCode.TRY_AGAIN_LATER, "this server is short of memory; reconnect")
        if unread:
            connection.transport.abort()  # the close frame would have to wait for it
        else:
            connection.transport.close()
        self.forget(connection)


# --- Fan-out --------------------------------------------------------------------------------
# Events to listeners: one write a listener and turn of the loop. Knows no AWS.


class FanOut:
    """Gathers what happens in one turn of the loop and writes it in one piece.

    What makes it fast: an event is encoded, framed and deflated once, whoever listens; frames
    that pile up within a turn are joined into one write. There is no timer, so that a lone event
    goes out in the turn it came in.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._dirty: list[Channel] = []

    def push(self, channel: Channel, event: Event) -> None:
        """Have ``event`` written to the channel's listeners at the end of this turn."""
        if not channel.pending:
            if not self._dirty:
                asyncio.get_running_loop().call_soon(self._flush_all)
            self._dirty.append(channel)
        channel.pending.append(event)

    def _flush_all(self) -> None:
        channels, self._dirty = self._dirty, []
        self.flush(*channels)

    def flush(self, *channels: Channel) -> None:
        """Write what is pending, to each listener in one piece, as before a new one joins."""
        due: dict[Connection, list[bytes]] = {}
        for channel in channels:
            if not channel.pending:
                continue
            chunk, channel.pending = Chunk(channel.pending), []
            for deflated in (False, True):
                listeners = channel.listeners[deflated]
                frames = chunk.frames(deflated) if listeners else b""
                if len(channels) == 1:
                    self._write(tuple(listeners), frames)
                    continue
                for connection in listeners:
                    due.setdefault(connection, []).append(frames)
            self._metrics.delivered(chunk.events, channel.audience)
        for connection, pieces in due.items():
            self._write((connection,), b"".join(pieces))  # a single one stays as it is

    def _write(self, listeners: Iterable[Connection], frames: bytes) -> None:
        is_large = len(frames) > CHOKED_AT_BYTES
        for connection in listeners:
            try:
                if is_large or connection.choked:
                    connection.write_shared(frames)
                else:  # which comes to this, for nearly all
                    connection.transport.write(frames)
            except Exception as exc:  # what is wrong with one must not keep it from the others
                connection.fail(exc)


# --- Clients --------------------------------------------------------------------------------
# The SDK's clients. Knows no connections, and no queue, topic or table.


@dataclasses.dataclass(frozen=True)
class Aws:
    """One client a service for the whole process."""

    sqs: SQSClient
    sns: SNSClient
    dynamodb: DynamoDBClient
    elbv2: Any  # Elastic Load Balancing, version 2


def require_json_object(response_dict: dict[str, Any], **_: Any) -> None:
    """Refuse a successful answer that is not a JSON object, such as the page of a proxy.

    The SDK would take it for an answer without members, and a transaction for written.
    """
    body = response_dict["body"].strip()
    is_object = body[:1] + body[-1:] in (b"", b"{}")
    if response_dict["status_code"] < HTTPStatus.MULTIPLE_CHOICES and not is_object:
        raise ResponseParserError("the answer is not a JSON object")


@contextlib.asynccontextmanager
async def connect(region: str) -> AsyncIterator[Aws]:
    """Yield the clients, which make each call once.

    This program makes the retries: the SDK's know neither deadlines nor what is idempotent.
    """
    config = AioConfig(
        connect_timeout=3,
        read_timeout=RECEIVE_TIMEOUT_S,
        max_pool_connections=100,
        retries={"total_max_attempts": 1},
        tcp_keepalive=True,
        # The SDK composes its own user agent anew for every call, at a seventh of the call's CPU.
        user_agent="agenticai-websocket-gateway",
        parameter_validation=False,  # of parameters that are all made in this file
    )
    session = AioSession()
    async with contextlib.AsyncExitStack() as stack:
        clients = {}
        for service in ("sqs", "sns", "dynamodb", "elbv2"):
            client: Any = await stack.enter_async_context(
                session.create_client(service, region_name=region, config=config)
            )
            events: BaseEventHooks = client.meta.events
            # It would decide about retries, and check DynamoDB's CRC32, which TLS makes needless.
            events.unregister(f"needs-retry.{service}", unique_id=f"retry-config-{service}")
            if client.meta.service_model.resolved_protocol == "json":
                events.register(f"before-parse.{service}", require_json_object)
            clients[service] = client
        yield Aws(**clients)


# --- Forwarder ------------------------------------------------------------------------------
# Clients' messages to the agents' queues. Knows no connections.


def runs(
    things: Iterable[T], size_of: Callable[[T], float], most: float, count: float = math.inf
) -> Iterator[list[T]]:
    """Lists of consecutive things, each of at most ``count``; ``most`` bounds their sizes' sum.

    A thing that is larger is alone.
    """
    run: list[T] = []
    total = 0.0
    for thing in things:
        size = size_of(thing)
        if run and (total + size > most or len(run) >= count):
            yield run
            run, total = [], 0.0
        run.append(thing)
        total += size
    if run:
        yield run


class Batcher(Generic[T]):
    """Sends items in batches whose size follows the load.

    A full batch is sent at once. What does not fill one is sent when no call is under way, and
    when this turn of the event loop has ended, or ``linger_s`` has passed. So an idle system adds
    no wait, and a busy one makes few calls.

    Args:
        send: makes one call; what it raises ends the process.
        entries, size_bytes: bounds of one batch, inclusive. A larger item is sent alone.
        calls: how many may be under way at once.
    """

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        send: Callable[[list[T]], Awaitable[None]],
        *,
        entries: int = SQS_BATCH_ENTRIES,
        size_bytes: int = SQS_BATCH_BYTES,
        calls: int = 16,
        linger_s: float = 0.0,
    ) -> None:
        self._tasks = tasks
        self._send = send
        self._linger_s = linger_s
        self._entries = entries
        self._size_bytes = size_bytes
        self._max_calls = calls
        self._calls = 0
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: deque[tuple[T, int]] = deque()
        self._waiting_bytes = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, item: T, size_bytes: int = 0) -> None:
        self._waiting.append((item, size_bytes))
        self._waiting_bytes += size_bytes
        self._idle.clear()
        self._pump()

    async def idle(self) -> None:
        """Return once nothing waits and nothing is under way."""
        await self._idle.wait()

    def _pump(self, *, due: bool = False) -> None:
        """Begin as many calls as there are full batches; if it is due, send what is left too."""
        while self._waiting and self._calls < self._max_calls:
            full = len(self._waiting) >= self._entries or self._waiting_bytes >= self._size_bytes
            if not full and not (due and not self._calls):
                break
            self._calls += 1
            call = self._call(self._take())
            try:
                self._tasks.create_task(call)
            except RuntimeError:  # The task group is ending for another reason, which is reported.
                call.close()
                return
        if self._timer is not None and (due or self._calls):
            self._timer.cancel()
            self._timer = None
        if self._timer is None and self._waiting and not self._calls:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._linger_s, partial(self._pump, due=True))

    def _take(self) -> list[T]:
        size_of = operator.itemgetter(1)
        batch = next(runs(self._waiting, size_of, self._size_bytes, self._entries))
        for _, size in batch:
            self._waiting.popleft()
            self._waiting_bytes -= size
        return [item for item, _ in batch]

    async def _call(self, batch: list[T]) -> None:
        await self._send(batch)
        self._calls -= 1
        self._pump()
        if not self._waiting and not self._calls:
            self._idle.set()


Confirm = Callable[[str | BadMessage], None]
"""Called once for each forward, with SQS's message id or with the error that its client gets."""


@dataclasses.dataclass(slots=True, eq=False)
class PendingForward:
    """A message that waits until an agent's queue accepts it.

    Attributes:
        entry: its SendMessageBatchRequestEntry without the ``Id``; empty once it is settled.
        size_bytes: the size of body and attributes, as SQS counts them.
        submitted_at: seconds of the monotonic clock.
        unanswered_calls: the number of calls that contained it, were not answered, and may have
            taken effect.
    """

    entry: dict[str, Any]
    size_bytes: int
    submitted_at: float
    confirm: Confirm
    unanswered_calls: int = 0
    deadline: asyncio.TimerHandle = dataclasses.field(init=False)


class AgentQueue:
    """The queue of one agent, and what is on its way there."""

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        name: str,
        url: str,
        send: Callable[[AgentQueue, list[PendingForward]], Awaitable[None]],
    ) -> None:
        self.url = url
        self.fifo = url.endswith(".fifo")
        # For the log alone: where a queue fails, it fails for every task, and events still flow.
        self.dependency = Dependency(f"{name} queue")
        # Two calls at once may overtake each other, which a queue that promises order must not see.
        # (Entries of one call that SQS itself throttles are still sent after those it accepted.)
        self.batcher = Batcher(tasks, partial(send, self), calls=1 if self.fifo else 16)


def fifo_id(value: str) -> str:
    """``value`` as a MessageGroupId, hashed where SQS would refuse it."""
    if re.fullmatch("[!-~]{1,128}", value):
        return value
    return hashlib.sha256(value.encode()).hexdigest()


def deduplication_id(message: AgentMessage) -> str:
    """What makes two messages of a FIFO queue the same one.

    More than the client's own ``message_id``: where two clients both count from 1, as two tabs of
    one user do, SQS would confirm the second one's message and drop it.
    """
    of_whom = (message.user, message.client_id, message.project_id)
    parts = (*of_whom, message.type.lower(), message.message_id)
    return hashlib.sha256(encode(parts)).hexdigest()


class Forwarder:
    """Takes forwards for all agents, as many as its bounds on count and bytes allow.

    It promises that ``confirm`` is called exactly once for every forward it has taken: with SQS's
    message id after SQS has accepted the forward, or with an error, at the latest ``timeout_s``
    seconds after ``submit``.
    """

    MAX_WAITING = 5_000
    MAX_WAITING_BYTES = 33_554_432

    def __init__(
        self,
        tasks: asyncio.TaskGroup,
        sqs: SQSClient,
        queue_urls: Mapping[str, str],
        timeout_s: float,
        metrics: Metrics,
    ) -> None:
        self._sqs = sqs
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._waiting: set[PendingForward] = set()
        self._waiting_bytes = 0
        self._queues = {
            name: AgentQueue(tasks, name, url, self._send) for name, url in queue_urls.items()
        }

    def submit(self, queue: str, message: AgentMessage, confirm: Confirm) -> None:
        """Have ``message`` sent to ``queue``.

        Raises:
            BadMessage: it cannot be sent at all, or too much is waiting; ``confirm`` is not called.
        """
        body = sendable(encode(message))
        named = len("MessageType" + "String" + "Timestamp" + "String")
        size = len(body) + named + len(message.type) + len(message.timestamp)
        self._check(bytes(message.data), size)
        to = self._queues[queue]
        entry: dict[str, Any] = {
            "MessageBody": body.decode(),
            "MessageAttributes": {
                "MessageType": {"DataType": "String", "StringValue": message.type},
                "Timestamp": {"DataType": "String", "StringValue": message.timestamp},
            },
        }
        if to.fifo:
            entry["MessageGroupId"] = fifo_id(message.project_id or message.client_id)
            entry["MessageDeduplicationId"] = deduplication_id(message)
        forward = PendingForward(entry, size, time.monotonic(), confirm)
        loop = asyncio.get_running_loop()
        forward.deadline = loop.call_later(self._timeout_s, self._too_late, forward)
        self._waiting.add(forward)
        self._waiting_bytes += size
        to.batcher.add(forward, size)

    def _check(self, data: bytes, size: int) -> None:
        """Refuse a message that SQS would not accept, or for which there is no room here."""
        for character in () if data.isascii() else UNSENDABLE:  # they go out as they came
            if character.encode() in data:
                sentence = (
                    f"SQS takes no U+{ord(character):04X} in data; write it as a JSON escape."
                )
                raise BadMessage(ErrorCode.INVALID_CHARACTER, sentence)
        if size > SQS_BATCH_BYTES:
            sentence = f"With its envelope the message exceeds SQS's {SQS_BATCH_BYTES} bytes."
            raise BadMessage(ErrorCode.TOO_LARGE, sentence)
        over_bytes = self._waiting_bytes + size > self.MAX_WAITING_BYTES
        if len(self._waiting) >= self.MAX_WAITING or over_bytes:
            self._metrics.forward_errors += 1
            sentence = "Too many messages are waiting; send it again later."
            raise BadMessage(ErrorCode.OVERLOADED, sentence, retryable=True)

    async def _send(self, to: AgentQueue, batch: list[PendingForward]) -> None:
        """Send until every forward is confirmed, refused or past its deadline."""
        try:
            async with asyncio.timeout_at(max(forward.deadline.when() for forward in batch)):
                for attempt in itertools.count():
                    batch = [forward for forward in batch if forward in self._waiting]
                    if not batch or not (batch := await self._attempt(to, batch)):
                        return
                    await asyncio.sleep(full_jitter_s(attempt))
        except TimeoutError as exc:
            to.dependency.failed(exc, "SendMessageBatch")

    async def _attempt(self, to: AgentQueue, batch: list[PendingForward]) -> list[PendingForward]:
        """Make one call, settle the forwards it decides, and return those to be tried again.

        A call that SQS refuses, perhaps for one of its entries, is made again for each alone.
        """
        for forward in batch:
            forward.unanswered_calls += 1
        entries: Any = [{"Id": str(i), **forward.entry} for i, forward in enumerate(batch)]
        confirmed, failed, refused = dict[str, str](), dict[str, Any](), False
        try:
            answer = await to.dependency.call(
                self._sqs.send_message_batch, QueueUrl=to.url, Entries=entries
            )
            confirmed, failed = self._outcomes(answer)
        except AWS_ERRORS as exc:
            refused = isinstance(exc, ClientError) and not passes(exc)
            if not refused:
                to.dependency.failed(exc, "SendMessageBatch")
            elif len(batch) == 1:
                logger.error("%s: a message was refused with %s", to.dependency.name, exc)
            if not may_have_effect(exc):
                of_each = {"Code": error_code(exc), "SenderFault": refused and len(batch) == 1}
                failed = {entry["Id"]: of_each for entry in entries}
        again = []
        for i, forward in enumerate(batch):
            failure = failed.get(str(i), {})
            forward.unanswered_calls -= bool(failure)
            if sqs_message_id := confirmed.get(str(i)):
                self._settle(forward, sqs_message_id)
            elif failure.get("SenderFault"):
                self._refuse(forward, str(failure.get("Code")))
            else:
                again.append(forward)
        while refused and again:
            await self._send(to, [again.pop(0)])
        return again

    def _outcomes(self, answer: Any) -> tuple[dict[str, str], dict[str, Any]]:
        """Of what was sent, by its ``Id``: SQS's message id of each accepted, and the others."""
        try:
            confirmed = {entry["Id"]: entry["MessageId"] for entry in answer.get("Successful", ())}
            return confirmed, {entry["Id"]: entry for entry in answer.get("Failed", ())}
        except (AttributeError, TypeError) as exc:
            raise ResponseParserError("the answer is not SQS's") from exc

    def _refuse(self, forward: PendingForward, code: str) -> None:
        sentence = f"The agent's queue refused the message ({code})."
        self._settle(forward, BadMessage(ErrorCode.REJECTED, sentence, retryable=False))

    def _too_late(self, forward: PendingForward) -> None:
        code = ErrorCode.UNAVAILABLE
        sentence = "The agent's queue did not accept the message in time; send it again later."
        if forward.unanswered_calls:
            code = ErrorCode.TIMEOUT
            sentence = (
                "The agent's queue did not answer in time. The message may have arrived; "
                "send it again with the same message_id."
            )
        self._settle(forward, BadMessage(code, sentence, retryable=True))

    def _settle(self, forward: PendingForward, outcome: str | BadMessage) -> None:
        """Tell the client what became of its forward, unless it was told so at the deadline."""
        if forward not in self._waiting:
            return
        self._waiting.remove(forward)
        self._waiting_bytes -= forward.size_bytes
        forward.deadline.cancel()
        forward.entry = {}  # A batcher may hold an expired forward until a call has returned.
        if isinstance(outcome, BadMessage):
            self._metrics.forward_errors += 1
        else:
            self._metrics.forwarded(time.monotonic() - forward.submitted_at)
        forward.confirm(outcome)

    async def idle(self) -> None:
        """Return once every forward is settled and no call is under way."""
        for queue in self._queues.values():
            await queue.batcher.idle()


# --- Event log ------------------------------------------------------------------------------
# One ordered log a project, in DynamoDB. Knows no connections and no SQS.
#
#   PK=EVENTLOG      SK=EPOCH             epoch: one random id a table
#   PK=PROJECT#<id>  SK=EVENTLOG          the head; seq: of the last event; never expires;
#                                         newest: "<seq> <timestamp>", of the event it was set with
#   PK=PROJECT#<id>  SK=EVENT#<seq>       type, data, event_id, timestamp, expires_at, and where
#                                         the update had them, in_reply_to and traceparent
#   PK=STOP#<hash>   SK=STOP              stopped_at, expires_at, of one order (see `stop_key`)
#   PK=PROJECT#<id>  SK=METADATA          the platform's own state of the project
#
# An append is one transaction over as many projects as it can hold. Of each project it moves the
# head from the seq that this task knows to the new end of the log, and puts the events in between.
# A transaction that fails, fails for all its projects, and is split: where DynamoDB says for whom,
# into those and the others, else into halves. So it comes down to one project, which is read
# again, as another task may have moved its head, and where a refusal is for good, to one event. A
# call without an answer is repeated with the same token, by which DynamoDB recognises for ten
# minutes what it has done; after that, it finds the head moved. To fail less often, a task learns
# the numbers and ids of the events that other tasks publish.
#
# An update can come again: SQS repeats what was not deleted, and agents repeat their event_id. So
# this task remembers the ids of all events of the last minutes, of every project whose head it
# remembers. An update that may be older than what is remembered is looked for in the log. One item
# an event id, in the same transaction, would remember for us, and cost half as much again.
#
# One conditional write an event (put EVENT#<n+1> if it is not there) would cost half of head and
# event. It is not done: a task of an earlier version, beside this one in every deployment, puts
# events on condition of the head alone, and would overwrite those that did not move it; a log
# that has expired would begin again with 1; and the audit, which now reads a hundred heads a
# call, would need a query a project.


ALREADY_STOPPED = "ConditionalCheckFailed"
"""The refusal of a stop that another one, a moment before, has made unnecessary."""


def event_key(seq: int) -> str:
    return f"EVENT#{seq:016d}"


def seq_of(item: Mapping[str, Any]) -> int | None:
    """The ``seq`` of an item of the log; ``None`` if it is no event."""
    key = item["SK"]["S"]
    return int(key.removeprefix("EVENT#")) if key.startswith("EVENT#") else None


def unix_s(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def event_message(project_id: str, item: Mapping[str, Any]) -> EventMessage:
    """An item of the log as clients get it."""
    return EventMessage(
        type=item["type"]["S"],
        project_id=project_id,
        data=Raw(item["data"]["S"].encode()),
        seq=seq_of(item),
        timestamp=item["timestamp"]["S"],
        **{name: item[name]["S"] for name in ("in_reply_to", "traceparent") if name in item},
    )


def stop_key(stop: Stop, user: str | None) -> dict[str, Any]:
    """Where agents look for a stop: hashed, as ids hold any character and keys 2,048 bytes.

    Whoever may use a project may stop its orders. One without a project is its user's alone.
    """
    of_whom = (
        (stop.project_id, stop.message_id) if stop.project_id else (None, stop.message_id, user)
    )
    return {"PK": {"S": f"STOP#{hashlib.sha256(encode(of_whom)).hexdigest()}"}, "SK": {"S": "STOP"}}


@dataclasses.dataclass(slots=True, eq=False)
class PendingUpdate:
    """An agent's update, or a client's stop, on its way to the log and to clients.

    Attributes:
        event_id: what it is recognised by when it comes again.
        look_back_to: unix seconds since when it may already be in the log.
        sent_at: when the agent sent it, unix seconds.
        event: what clients get, once it is in the log.
        refusal: DynamoDB's code, if it does not take this event.
        stop: the key of the stop that is written with it, unless that is there already.
        done: told ``None`` once all tasks have been sent it, or the refusal.
    """

    update: Update
    event_id: str
    look_back_to: float
    sent_at: float
    event: Event | None = None
    refusal: str | None = None
    stop: dict[str, Any] | None = None
    done: Callable[[str | None], None] = lambda _: None

    BYTES_PER_ITEM = 35_000  # of a transaction's four megabytes, with room for what is not counted

    @property
    def project_id(self) -> str:
        return self.update.project_id or EVERYONE

    @property
    def waiting(self) -> bool:
        """Whether it is still to be logged."""
        logged = not self.update.ephemeral and self.update.connection_id is None
        return logged and self.event is None and self.refusal is None

    @property
    def items(self) -> int:
        """How many items it is in the log."""
        return 2 if self.stop else 1

    @property
    def share(self) -> float:
        """A bound of what it takes of a transaction, in items: their number, or else their size."""
        size = memoryview(self.update.data).nbytes + 1_024
        return max(self.items, size / self.BYTES_PER_ITEM)


class RecentIds:
    """The event ids of the last minutes, of all projects.

    Kept in generations that are forgotten whole, so that remembering costs the same however many
    there are: some 130 bytes an id, whatever its length.
    """

    REMEMBERED = 400_000  # 800 events a second for the window and the clocks' skew

    def __init__(self) -> None:
        # The newest comes last, each with the time of its beginning.
        self._generations: deque[tuple[float, dict[bytes, int]]] = deque([(0.0, {})])

    @property
    def since(self) -> float:
        """Unix seconds; every id that was added later is here."""
        return self._generations[0][0]

    @staticmethod
    def _key(project_id: str, event_id: str) -> bytes:
        name = f"{len(project_id)}:{project_id}{event_id}".encode()
        return hashlib.blake2b(name, digest_size=16).digest()

    def add(self, project_id: str, event_id: str, seq: int) -> None:
        self._generations[-1][1][self._key(project_id, event_id)] = seq

    def find(self, project_id: str, event_id: str) -> int | None:
        """The ``seq`` of the event with this id, if it is remembered."""
        key = self._key(project_id, event_id)
        for _, ids in self._generations:
            if key in ids:
                return ids[key]
        return None

    def forget(self) -> None:
        """Forget what is older than the window, and the oldest of what is too much."""
        now, generations = time.time(), self._generations
        began_at, newest = generations[-1]
        if len(newest) > self.REMEMBERED // 8 or now - began_at > EVENT_ID_WINDOW_S / 5:
            generations.append((now, {}))
        long_ago = now - EVENT_ID_WINDOW_S - 2 * CLOCK_SKEW_S
        while len(generations) > 1 and (
            generations[1][0] < long_ago or len(self) > self.REMEMBERED
        ):
            generations.popleft()

    def __len__(self) -> int:
        return sum(len(ids) for _, ids in self._generations)


@dataclasses.dataclass(slots=True, eq=False)
class Head:
    """What this task knows of the end of one project's log.

    Attributes:
        seq: of the last event that is known.
        known_since: unix seconds; the ids of all events from then on up to ``seq`` are remembered,
            if those are that were remembered at ``read_at``.
        stale: whether there may be an event after ``seq``.
    """

    seq: int
    known_since: float
    read_at: float = dataclasses.field(default_factory=time.time)
    stale: bool = False


@dataclasses.dataclass(eq=False)
class ProjectAppend:
    """What is to be appended to one project's log, and what has come of it.

    Attributes:
        pending: in order; in the end each that is to be logged has its event or its refusal.
        head: set by each attempt.
        chosen: what this attempt is to write, with the messages of the events.
        found: the ``seq`` of each that is in the log, by id, however much is forgotten meanwhile.
        one_by_one: whether a transaction was refused for one of its events, nobody knows which.
        failures: of its transactions since the last success.
    """

    TRANSACTION_ITEMS: ClassVar[int] = 100

    project_id: str
    pending: Sequence[PendingUpdate]
    head: Head = dataclasses.field(init=False)
    chosen: list[tuple[PendingUpdate, EventMessage]] = dataclasses.field(default_factory=list)
    found: dict[str, int | None] = dataclasses.field(init=False)
    one_by_one: bool = False
    failures: int = 0

    def __post_init__(self) -> None:
        self.found = dict.fromkeys(each.event_id for each in self.pending)

    @property
    def waiting(self) -> list[PendingUpdate]:
        return [each for each in self.pending if each.waiting]

    @property
    def share(self) -> float:
        return 1 + sum(each.share for each in self.waiting)  # and the head

    @property
    def look_back_to(self) -> float:
        return min((each.look_back_to for each in self.waiting), default=math.inf)

    @property
    def owners(self) -> list[PendingUpdate | None]:
        """Whose each item of its transaction is; the first is the head, which is nobody's."""
        return [None, *(each for each, _ in self.chosen for _ in range(each.items))]

    def choose(self, ids: RecentIds) -> dict[PendingUpdate, int]:
        """Give as much of what waits as one transaction takes the next numbers.

        In the same step it is looked for among the ids: what this task learns later is beyond
        these numbers, and makes the transaction fail. Of what would be one item of the log, an
        event or a stop, the first is taken. Returns what is in the log, by its ``seq``.
        """
        known: dict[PendingUpdate, int] = {}
        by_id: dict[str, PendingUpdate] = {}
        for each in self.waiting:
            seq = self.found[each.event_id] or ids.find(self.project_id, each.event_id)
            if seq is None:
                by_id.setdefault(each.stop["PK"]["S"] if each.stop else each.event_id, each)
            else:
                known[each] = seq
        room = 0 if self.one_by_one else self.TRANSACTION_ITEMS - 1
        next_ones = next(runs(by_id.values(), lambda each: each.share, room), [])
        stamp = timestamp()
        self.chosen = [
            (each, each.update.event(seq, stamp))
            for seq, each in enumerate(next_ones, self.head.seq + 1)
        ]
        return known


def transactions(appends: Iterable[ProjectAppend]) -> Iterator[list[ProjectAppend]]:
    """Appends in groups that one transaction takes each; one that is larger is alone."""
    return runs(appends, lambda append: append.share, ProjectAppend.TRANSACTION_ITEMS)


class EventLog:
    """Append, read, head."""

    UNANSWERED_CALLS = 4  # of one transaction, before its log is read
    HEADS_REMEMBERED = 20_000  # projects, at some 300 bytes each
    ITEMS_AT_ONCE = 16  # of the largest, what one call reads: four megabytes
    HEAD_KEY = "EVENTLOG"  # sorts after all events
    REFUSAL_CODES = (
        "IdempotentParameterMismatchException",
        "SerializationException",
        "ValidationException",
    )
    STOP_SKEW_S = 5.0  # a stop is also for orders that a clock so far ahead has dated
    STOP_KEPT_S = 1_209_600  # an order lies in its queue no longer (SQS)

    def __init__(
        self, dynamodb: DynamoDBClient, table: str, retention_s: int, metrics: Metrics
    ) -> None:
        self._dynamodb = dynamodb
        self._table = table
        self._retention_s = retention_s
        self._metrics = metrics
        self._heads: dict[str, Head] = {}  # the latest used comes last
        self._recent_ids = RecentIds()
        self.dependency = Dependency("event log")
        self.epoch = ""

    async def open(self) -> None:
        """Read the table's epoch, or be the first to write it.

        Raises:
            UpstreamLost: the table is missing, or closed to this task.
        """
        answer = await self.dependency.retry(
            self._dynamodb.update_item,
            TableName=self._table,
            Key={"PK": {"S": "EVENTLOG"}, "SK": {"S": "EPOCH"}},
            UpdateExpression="SET epoch = if_not_exists(epoch, :new)",
            ExpressionAttributeValues={":new": {"S": uuid.uuid4().hex}},
            ReturnValues="ALL_NEW",
        )
        self.epoch = answer["Attributes"]["epoch"]["S"]

    # Reading.

    async def heads(
        self, project_ids: Sequence[str], *, consistent: bool = False
    ) -> dict[str, int]:
        """The ``seq`` of each project's last event, a hundred a call; of empty logs none.

        Unless ``consistent``, at half the price, they may lag by a moment.
        """
        found: dict[str, Any] = {}
        left: list[Any] = [self._key(project_id, self.HEAD_KEY) for project_id in project_ids]
        while left:
            request: Any = {self._table: {"Keys": left[:100], "ConsistentRead": consistent}}
            left = left[100:]
            answer = await self.dependency.retry(
                self._dynamodb.batch_get_item, RequestItems=request
            )
            for item in answer["Responses"].get(self._table, []):
                found[str(item["PK"]["S"]).removeprefix("PROJECT#")] = item
            if unprocessed := answer.get("UnprocessedKeys", {}).get(self._table):
                left += unprocessed["Keys"]
                await asyncio.sleep(full_jitter_s(1))
        if consistent:  # who opens a project will see it appended to
            while len(self._heads) > self.HEADS_REMEMBERED:
                del self._heads[next(iter(self._heads))]
            for project_id in project_ids:
                self._heads.setdefault(project_id, self._head_of(found.get(project_id)))
        return {project_id: int(item["seq"]["N"]) for project_id, item in found.items()}

    async def read(
        self, project_id: str, after: int, known: int = 0, *, over_holes: bool = True
    ) -> list[Event]:
        """The next events after ``after`` that have not expired: up to a page, at most 1 MB.

        An empty list means the end of the log. A first ``seq`` other than ``after + 1``, and an
        empty list where ``known`` is the ``seq`` of a later event, mean that what is left out has
        expired: a query may see a part of a transaction, and so it is looked at again.

        Unless ``over_holes``, it is not looked for beyond a page that has expired: DynamoDB
        deletes such items days later, and a busy log may have a thousand pages of them.
        """
        while True:
            events: list[Event] = []
            async for page in self._pages(project_id, event_key(after + 1), event_key(SEQ_MAX)):
                now = time.time()
                events = [
                    Event.of(event_message(project_id, item))
                    for item in page
                    if int(item["expires_at"]["N"]) > now
                ]
                if events or not over_holes:
                    break
            first = cast("int", events[0].seq) if events else known + 1
            if first <= after + 1:
                return events
            missing = await self._items_at(project_id, [after + 1])
            if not missing or int(missing[0]["expires_at"]["N"]) <= time.time():
                return events

    def _key(self, project_id: str, sort_key: str) -> dict[str, Any]:
        return {"PK": {"S": f"PROJECT#{project_id}"}, "SK": {"S": sort_key}}

    async def _pages(
        self, project_id: str, low: str, high: str, **options: Any
    ) -> AsyncIterator[list[dict[str, Any]]]:
        """The items between two sort keys, page by page; bounded, for METADATA comes after."""
        while True:
            answer = await self.dependency.retry(
                self._dynamodb.query,
                TableName=self._table,
                KeyConditionExpression="PK = :project AND SK BETWEEN :low AND :high",
                ExpressionAttributeValues={
                    ":project": {"S": f"PROJECT#{project_id}"},
                    ":low": {"S": low},
                    ":high": {"S": high},
                },
                ConsistentRead=True,
                Limit=100,
                **options,
            )
            yield cast("list[dict[str, Any]]", answer["Items"])
            if "LastEvaluatedKey" not in answer:
                return
            options["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    async def _items_at(self, project_id: str, seqs: Sequence[int]) -> list[dict[str, Any]]:
        """The events with these numbers, of one moment: all of a transaction or none.

        There are at most ``ITEMS_AT_ONCE`` numbers. Whatever is not among the events does not
        exist, or no more.
        """
        gets: Any = [
            {"Get": {"TableName": self._table, "Key": self._key(project_id, event_key(seq))}}
            for seq in seqs
        ]
        answer = await self.dependency.retry(self._dynamodb.transact_get_items, TransactItems=gets)
        return [cast("dict[str, Any]", each["Item"]) for each in answer["Responses"] if each]

    # Appending.

    def learn(self, project_id: str, seq: int, event_id: str | None) -> None:
        """Note an event that another task has appended, if an append here needs to know of it."""
        head = self._heads.get(project_id)
        if head is None or seq <= head.seq:
            return
        if seq == head.seq + 1 and event_id is not None:
            head.seq = seq
            self._recent_ids.add(project_id, event_id, seq)
        else:
            head.stale = True

    def known_seq(self, project_id: str) -> int | None:
        """A ``seq`` that the project's log has reached, if this task knows one."""
        head = self._heads.get(project_id)
        return None if head is None else head.seq

    async def append(self, group: Sequence[ProjectAppend]) -> list[list[ProjectAppend]]:
        """Make one attempt to write what waits in each of the group, in one transaction for all.

        A group is what ``transactions`` puts together, and a project in one group at a time.
        Returns whose turn it is again, in groups that need not wait for each other. An append that
        is in none of them is done.

        Raises:
            UpstreamLost: the table is gone, or a log in it went back.
        """
        if failures := max(append.failures for append in group):
            await asyncio.sleep(full_jitter_s(failures - 1, base_s=0.01))
        await self._look_up(group)
        known = [(append.project_id, append.choose(self._recent_ids)) for append in group]
        await asyncio.gather(*(self._recognise(*each) for each in known if each[1]))
        written = [append for append in group if append.chosen]
        if not written:
            return []
        items = [item for append in written for item in self._items(append)]
        try:
            await self._transact(items)
        except AWS_ERRORS as exc:
            return self._after_error(written, exc)
        for append in written:
            append.failures = 0
            for pending, message in append.chosen:
                pending.event = Event.of(message, pending.sent_at)
                seq = cast("int", message.seq)
                append.head.seq = max(append.head.seq, seq)
                self._recent_ids.add(append.project_id, pending.event_id, seq)
        left = [append for append in written if append.waiting]
        return [left] if left else []

    async def _look_up(self, group: Sequence[ProjectAppend]) -> None:
        """Know the ends of a group's logs, and the ids in them that may be waiting here."""
        self._recent_ids.forget()
        known = {append.project_id: self._heads.get(append.project_id) for append in group}
        await self.heads([name for name, head in known.items() if head is None], consistent=True)
        for append in group:  # of those known before, some may have been forgotten meanwhile
            name = append.project_id
            head = self._heads.pop(name, known[name])
            append.head = self._heads[name] = cast("Head", head)
        unknown = [
            append for append in group if append.head.stale or self._may_have_forgotten(append)
        ]
        looked_back = set[ProjectAppend]()
        while unknown:
            looked_back.update(filter(self._may_have_forgotten, unknown))
            await asyncio.gather(*map(self._read_up, unknown))
            # If that took minutes, ids of the others may have been forgotten meanwhile. Once each:
            # of a log with more events than are remembered, that would never end.
            missed = filter(self._may_have_forgotten, group)
            unknown = [append for append in missed if append not in looked_back]

    def _head_of(self, item: dict[str, Any] | None) -> Head:
        """A head as it was just read: if the last event is old, then there are no newer ids."""
        if item is None:
            return Head(0, 0.0)
        newest_seq, _, stamp = item.get("newest", {}).get("S", "").partition(" ")
        says_when = newest_seq == item["seq"]["N"]  # else a task that does not write it came after
        return Head(int(item["seq"]["N"]), unix_s(stamp) + 0.001 if says_when else time.time())

    def _may_have_forgotten(self, append: ProjectAppend) -> bool:
        """Whether something that waits may be in the log without being among the ids."""
        head, forgotten = append.head, self._recent_ids.since
        knows_since = head.known_since
        if head.read_at < forgotten:
            knows_since = max(knows_since, forgotten)
        return append.look_back_to < knows_since

    async def _read_up(self, append: ProjectAppend) -> None:
        """Learn the log's end: down to what is known of it, or to where an update may be in it."""
        project_id, head, now = append.project_id, append.head, time.time()
        bound, before = append.look_back_to, head.seq  # more may be learned on the way
        looks_back = self._may_have_forgotten(append)
        first = 1 if looks_back else before + 1
        seq, met, head.stale = 0, set[int](), False
        async for page in self._pages(
            project_id,
            event_key(first),
            self.HEAD_KEY,
            ScanIndexForward=False,
            ProjectionExpression="SK, seq, event_id, #timestamp",
            ExpressionAttributeNames={"#timestamp": "timestamp"},  # a reserved word
        ):
            for item in page:
                if "event_id" in item:
                    met.add(self._remember(append, item))
                elif item["SK"]["S"] == self.HEAD_KEY:
                    seq = int(item["seq"]["N"])
            last = page[-1] if page else {}
            if looks_back and "timestamp" in last and unix_s(last["timestamp"]["S"]) < bound:
                first = min(met)
                break
        if seq < before:
            raise UpstreamLost(
                f"event log: {project_id!r} went back from seq {before} to {seq}; "
                "the table was wiped or restored"
            )
        # From the newest on; where so many are missing indeed, all that is older has expired.
        missing = (place for place in range(seq, first - 1, -1) if place not in met)
        while seqs := list(itertools.islice(missing, self.ITEMS_AT_ONCE)):
            held_back = await self._items_at(project_id, seqs)
            if not held_back:
                break
            for item in held_back:
                self._remember(append, item)
        head.seq = max(head.seq, seq)
        if looks_back:
            head.known_since, head.read_at = bound, now

    def _remember(self, append: ProjectAppend, item: Mapping[str, Any]) -> int:
        seq, event_id = cast("int", seq_of(item)), item["event_id"]["S"]
        self._recent_ids.add(append.project_id, event_id, seq)
        if event_id in append.found:
            append.found[event_id] = seq
        return seq

    async def _recognise(self, project_id: str, known: Mapping[PendingUpdate, int]) -> None:
        """Settle what is in the log already: what it says there is what happened."""
        stored: dict[int | None, dict[str, Any]] = {}
        for seqs in runs(set(known.values()), lambda _: 1, self.ITEMS_AT_ONCE):
            stored |= {seq_of(item): item for item in await self._items_at(project_id, seqs)}
        for pending, seq in known.items():
            as_sent = pending.update.event(seq, timestamp())
            message = event_message(project_id, stored[seq]) if seq in stored else as_sent
            pending.event = Event.of(message, pending.sent_at)

    def _items(self, append: ProjectAppend) -> list[Any]:
        """A project's part in a transaction: the head, then the events with their stops."""
        before = cast("int", append.chosen[0][1].seq) - 1
        after, stamp = before + len(append.chosen), append.chosen[-1][1].timestamp
        head = {
            "TableName": self._table,
            "Key": self._key(append.project_id, self.HEAD_KEY),
            "UpdateExpression": "SET seq = :after, newest = :newest",
            "ConditionExpression": "seq = :before" if before else "attribute_not_exists(PK)",
            "ExpressionAttributeValues": {
                ":after": {"N": str(after)},
                ":newest": {"S": f"{after} {stamp}"},
                **({":before": {"N": str(before)}} if before else {}),
            },
        }
        expires_at = {"N": str(int(time.time()) + self._retention_s)}
        items: list[Any] = [{"Update": head}]
        for pending, message in append.chosen:
            texts = {
                "type": message.type,
                "data": bytes(message.data).decode(),
                "event_id": pending.event_id,
                "timestamp": message.timestamp,
                "in_reply_to": message.in_reply_to,
                "traceparent": message.traceparent,
            }
            item = {
                **self._key(append.project_id, event_key(cast("int", message.seq))),
                **{name: {"S": text} for name, text in texts.items() if text is not None},
                "expires_at": expires_at,
            }
            items.append({"Put": {"TableName": self._table, "Item": item}})
            if pending.stop is not None:
                items.append({"Put": {"TableName": self._table, **self._stop(pending.stop)}})
        return items

    def _stop(self, key: dict[str, Any]) -> dict[str, Any]:
        """The request to write a stop; of those within ``STOP_SKEW_S`` the first is for all."""
        now = time.time()
        expires_at = {"N": str(int(now) + self.STOP_KEPT_S)}
        return {
            "Item": {**key, "stopped_at": {"N": f"{now:.3f}"}, "expires_at": expires_at},
            "ConditionExpression": "attribute_not_exists(PK) OR stopped_at < :recently",
            "ExpressionAttributeValues": {":recently": {"N": f"{now - self.STOP_SKEW_S:.3f}"}},
        }

    async def stop(self, key: dict[str, Any]) -> None:
        """Write the stop of an order that has no project, and so no log to tell of it."""
        item = self._stop(key)["Item"]
        await self.dependency.retry(self._dynamodb.put_item, TableName=self._table, Item=item)

    async def _transact(self, items: list[Any]) -> None:
        """Repeat a transaction until DynamoDB says what became of it, or has often not answered.

        While it throttles, for however long, no smaller ones are tried: they would be more calls.

        Raises:
            ClientError: it was refused; nothing was written.
            Exception: any other of ``AWS_ERRORS``; what became of it is not known.
        """
        token = uuid.uuid4().hex
        unanswered_calls = 0
        for attempt in itertools.count(1):
            try:
                await self.dependency.call(
                    self._dynamodb.transact_write_items,
                    TransactItems=items,
                    ClientRequestToken=token,
                )
                return
            except AWS_ERRORS as exc:
                answered = any(cancellation_codes(exc)) or not passes(exc)
                unanswered_calls += may_have_effect(exc)
                if answered or unanswered_calls == self.UNANSWERED_CALLS:
                    raise
            await asyncio.sleep(full_jitter_s(attempt))

    def _after_error(self, group: list[ProjectAppend], exc: Exception) -> list[list[ProjectAppend]]:
        """Who is to be written anew: those the answer is about, and the others; or two halves."""
        codes = cancellation_codes(exc)
        named = any(codes)
        others, blamed = list[ProjectAppend](), list[ProjectAppend]()
        for append in group:
            count = len(append.owners)
            own, codes = codes[:count], codes[count:]
            if named and not any(own):
                others.append(append)
                continue
            blamed.append(append)
            append.failures += 1
            append.head.stale |= not named or own[0] != ""
            if named or len(group) == 1:
                self._blame(append, own if named else [], exc)
        half = 0 if others else len(blamed) // 2
        return [part for part in (others, blamed[:half], blamed[half:]) if part]

    def _blame(self, append: ProjectAppend, codes: Sequence[str], exc: Exception) -> None:
        """Note what a failed transaction says of a project: ``codes`` of its items, or nothing."""
        for pending, code in zip(append.owners, codes, strict=False):
            if pending is not None and code and not code_passes(code):
                self._refuse(pending, code)
        of_head = codes[0] if codes else error_code(exc)
        if of_head in ("ConditionalCheckFailed", "TransactionConflict"):
            self._metrics.append_conflicts += 1
        elif not of_head or code_passes(of_head) or not (codes or of_head in self.REFUSAL_CODES):
            if of_head or any(map(code_passes, codes)):
                self.dependency.failed(exc, "TransactWriteItems")
        elif len(append.chosen) > 1:
            append.one_by_one = True
        else:
            self._refuse(append.chosen[0][0], of_head)

    def _refuse(self, pending: PendingUpdate, code: str) -> None:
        pending.refusal = code
        if code != ALREADY_STOPPED:
            logger.error("event log: %r: an event was refused: %s", pending.project_id, code)


# --- Backplane ------------------------------------------------------------------------------
# Agents' updates in, events out to this task's channels and to the other tasks. Knows no sockets.


@dataclasses.dataclass(eq=False)
class Feed:
    """Keeps every channel of this task equal to its log, and brings newcomers up to it.

    A channel's cursor moves only by one: lower is a duplicate, higher is a gap, and what is in a
    gap is read from the log before anything else is delivered.
    """

    READS = 32  # at once, of pages of up to 1 MB
    WRITES = 32  # of chunks, in one turn of the loop
    AUDITED_AT_ONCE = 1_000  # channels, at half a read unit each

    _tasks: asyncio.TaskGroup
    _log: EventLog
    _registry: Registry
    _fan_out: FanOut
    _metrics: Metrics
    _read_state: Callable[[str], Awaitable[Any]]

    def __post_init__(self) -> None:
        self._may_read = asyncio.Semaphore(self.READS)
        self._may_write = asyncio.Semaphore(self.WRITES)
        self._reads: dict[tuple[Channel, int], asyncio.Future[list[Chunk] | None]] = {}
        self._to_open = Batcher(self._tasks, self._open, entries=100)

    def accept(self, event: Event, connection_id: str | None = None) -> bool:
        """Deliver ``event`` to its channel, if it is the next there; see that gaps are filled.

        With ``connection_id`` it is for that client alone, if it has a right to the project.
        Returns whether that one is here.
        """
        if connection_id is not None:
            connection = self._registry.connections.get(connection_id)
            principal = connection and connection.principal
            if connection and principal and principal.may_use(event.project_id):  # at this moment
                connection.send(event.payload)
            return connection is not None
        channel = self._registry.channels.get(event.project_id)
        if channel is None:
            return False
        if event.seq is None:
            self._fan_out.push(channel, event)
        elif not self._place(channel, event):
            self._fill_if_behind(channel)
        return False

    def _place(self, channel: Channel, event: Event) -> bool:
        """Deliver an event of the log, if it is the next one; whether it was."""
        if placed := channel.place(event):
            latest = channel.chunks[-1] if channel.chunks else None
            self._registry.remember(channel, event, latest)
            self._fan_out.push(channel, event)
        return placed

    def accept_relayed(self, relayed: RelayedEvent) -> None:
        """Take an event from another task; most are for projects that nobody here listens to."""
        if relayed.seq is not None:
            self._log.learn(relayed.project_id, relayed.seq, relayed.event_id)
        if relayed.connection_id is not None or relayed.project_id in self._registry.channels:
            payload = bytes(relayed.payload)
            event = Event(relayed.project_id, relayed.seq, payload, relayed.sent_at)
            self.accept(event, relayed.connection_id)

    def subscribe(self, connection: Connection, request: Subscribe) -> None:
        """Confirm, send what was missed, go live; at once where the channel remembers enough."""
        channel = self._registry.channel(request.project_id)
        self._fan_out.flush(channel)  # whoever subscribes again gets all before it
        channel.visitors += 1
        self.unsubscribe(connection, request.project_id)
        channel.visitors -= 1
        ahead = (request.since or 0) > (channel.cursor or 0)
        if channel.cursor is not None and not request.snapshot and not ahead:
            position, recovered = self._resume_at(channel, request)
            if position >= channel.floor:
                self._confirm(connection, channel, recovered, ref_of(request))
                self._go_live(connection, channel, position)
                return
        channel.visitors += 1
        task = self._tasks.create_task(self._catch_up(connection, channel, request))
        connection.catching_up[request.project_id] = task
        task.add_done_callback(partial(self._caught_up, connection, channel))

    def _caught_up(
        self, connection: Connection, channel: Channel, task: asyncio.Task[None]
    ) -> None:
        """Clean up; a callback, because a task cancelled early never reaches its ``finally``."""
        if connection.catching_up.get(channel.project_id) is task:
            del connection.catching_up[channel.project_id]
        channel.visitors -= 1
        self._registry.release(channel)
        connection.recount()

    def unsubscribe(self, connection: Connection, project_id: str) -> None:
        """Stop a subscription wherever it stands."""
        if task := connection.catching_up.pop(project_id, None):
            task.cancel()
        self._registry.leave(connection, project_id)

    def _resume_at(self, channel: Channel, request: Subscribe) -> tuple[int, bool | UnsetType]:
        """The last ``seq`` the client has, and whether what follows can be had."""
        cursor = channel.cursor or 0
        if request.since is None:
            return cursor, UNSET
        other_log = request.epoch is not None and request.epoch != self._log.epoch
        if other_log or request.since > cursor:
            return cursor, False
        return request.since, True

    def _confirm(
        self,
        connection: Connection,
        channel: Channel,
        recovered: bool | UnsetType,
        ref: str | UnsetType = UNSET,
    ) -> None:
        message = SubscriptionConfirmed(
            channel.project_id, channel.cursor or 0, self._log.epoch, recovered, ref=ref
        )
        connection.send(encode(message))

    def _go_live(self, connection: Connection, channel: Channel, position: int) -> None:
        """Put the connection on the live list, with no event between ``position`` and live lost.

        All in one step of the loop: what is pending for others is written first, so that nothing
        reaches the newcomer twice.
        """
        if connection.progress is not Progress.OPEN:
            return  # closed meanwhile, perhaps by what was sent to confirm
        self._fan_out.flush(channel)
        if missed := channel.chunk_with(position + 1):
            connection.replay(missed.after(position))
        self._registry.join(connection, channel)

    async def _catch_up(self, connection: Connection, channel: Channel, request: Subscribe) -> None:
        """Catch up, one project at a time a connection: each may hold a page of the log."""
        connection.catch_up_turn = connection.catch_up_turn or asyncio.Lock()
        async with connection.catch_up_turn:
            with connection.failing_alone():
                try:
                    await self._send_missed(connection, channel, request)
                finally:
                    connection.page = []

    async def _send_missed(
        self, connection: Connection, channel: Channel, request: Subscribe
    ) -> None:
        """Send one client what it missed, as fast as it reads and can pay, and have it go live."""
        await connection.account.afford(PAGE_PRICE_S)  # for head, gap and snapshot
        await self.open(channel)
        for _ in range(2):  # a filling that had begun before may end without what it has seen
            if (request.since or 0) > (channel.cursor or 0):  # it comes from a task that is ahead
                await asyncio.shield(self._filling(channel))
        position, recovered = self._resume_at(channel, request)
        found = await self._find(connection, channel, position)
        if found is None:
            position, recovered, found = channel.cursor or 0, False, []
        self._confirm(connection, channel, recovered, ref_of(request))
        if request.snapshot:
            await self._send_snapshot(connection, request.project_id, ref_of(request))
        while position < channel.floor:
            connection.take_page(found)
            found = []  # so that it ends with the connection
            while connection.page:
                chunk = connection.page.pop(0)
                async with self._may_write:  # a crowd that gets the same at once stops nobody else
                    connection.replay(chunk.after(position))
                    position = chunk.last
                    await asyncio.sleep(0)
                await connection.drained()
            found = await self._find(connection, channel, position)
            if found is None:
                position, found = channel.cursor or 0, []
                self._confirm(connection, channel, False)
        self._go_live(connection, channel, position)

    async def _find(
        self, connection: Connection, channel: Channel, position: int
    ) -> list[Chunk] | None:
        """Some of what follows ``position``; ``None`` if the log no longer reaches back so far.

        It is read once for all who wait for it, even if the first of them has gone. No task group
        has the read: a fault of ours is to end the connections that wait, not the process. Whoever
        has found it keeps it until it is sent, though the channel may forget it meanwhile.
        """
        if position >= channel.floor:
            return []
        if chunk := channel.chunk_with(position + 1):
            return [chunk]
        await connection.account.afford(PAGE_PRICE_S)
        place = (channel, position)
        if place not in self._reads:
            self._reads[place] = asyncio.ensure_future(self._read_back(channel, position))
            self._reads[place].add_done_callback(partial(self._reads.pop, place))
        return await asyncio.shield(self._reads[place])

    async def _read_back(self, channel: Channel, position: int) -> list[Chunk] | None:
        """Read what follows ``position`` for clients that come back: at most a page of the log."""
        async with self._may_read:
            last = position + 1
            if not channel.chunk_with(last):  # else somebody else's read has brought it back by now
                self._metrics.catch_ups += 1
                known = channel.cursor or 0
                events = await self._read(channel, position, known, over_holes=False)
                if not events or events[0].seq != position + 1:
                    return None
                last = cast("int", events[-1].seq)
        found: list[Chunk] = []
        while position < last and (chunk := channel.chunk_with(position + 1)):
            found.append(chunk)
            position = chunk.last
        return found

    async def _read(
        self, channel: Channel, after: int, known: int, *, over_holes: bool = True
    ) -> list[Event]:
        """A page of the log, remembered; what in it is news to the channel is delivered."""
        events = await self._log.read(channel.project_id, after, known, over_holes=over_holes)
        chunk: Chunk | None = None
        for event in events:
            seq = cast("int", event.seq)
            delivered = self._place(channel, event)
            if not delivered and seq <= (channel.cursor or 0) and not channel.chunk_with(seq):
                chunk = self._registry.remember(channel, event, chunk)
        return events

    async def _send_snapshot(
        self, connection: Connection, project_id: str, ref: str | UnsetType
    ) -> None:
        try:
            async with self._may_read:
                state = await self._read_state(project_id)
        except UpstreamLost as exc:  # the platform's table is not what this task lives by
            logger.error("no snapshot of %r: %s", project_id, exc)
            sentence = "The project's state cannot be read; its events follow all the same."
            error = ErrorMessage(
                sentence, ErrorCode.UNAVAILABLE, "subscribe", project_id=project_id, ref=ref
            )
            connection.send(encode(error))
            return
        snapshot = Encoders.snapshot.encode(ProjectSnapshot(project_id, state, ref=ref))
        connection.charge_replay(len(snapshot))  # to read it costs the more, the larger it is
        connection.send(snapshot)

    async def open(self, channel: Channel) -> None:
        """Have the channel's cursor where its log ends; of many channels in one call."""
        if channel.cursor is None:
            if channel.opening is None:
                channel.opening = asyncio.get_running_loop().create_future()
                self._to_open.add(channel)
            await asyncio.shield(channel.opening)

    async def _open(self, channels: list[Channel]) -> None:
        names = {channel.project_id: None for channel in channels}
        heads = await self._log.heads(list(names), consistent=True)
        for channel in channels:
            channel.cursor = heads.get(channel.project_id, 0)
            if channel.opening is not None:
                channel.opening.set_result(None)
                channel.opening = None
            self._fill_if_behind(channel)

    def _fill_if_behind(self, channel: Channel) -> None:
        behind = channel.cursor is not None and channel.wanted > channel.cursor
        if behind and (channel.filling is None or channel.filling.done()):
            self._metrics.gaps_filled += 1
            self._filling(channel)

    def _filling(self, channel: Channel) -> asyncio.Task[None]:
        """The task that has the channel catch up with its log: one for all who wait for that."""
        if channel.filling is None or channel.filling.done():
            channel.filling = self._tasks.create_task(self._fill(channel))
        return channel.filling

    async def _fill(self, channel: Channel) -> None:
        """Deliver everything the log has beyond the cursor."""
        while True:
            after, wanted = channel.cursor or 0, channel.wanted
            events = await self._read(channel, after, wanted)
            if (channel.cursor or 0) > after:
                continue
            if events:
                self._skip(channel, cast("int", events[0].seq) - 1)
            elif channel.wanted <= after:
                return
            elif channel.wanted == wanted:  # else it may have come after the log was read
                self._skip(channel, wanted)

    def _skip(self, channel: Channel, seq: int) -> None:
        """Go on after events that have expired; the listeners are told to refetch their state."""
        logger.warning("the log of %r has a hole up to %d", channel.project_id, seq)
        self._fan_out.flush(channel)
        channel.cursor = seq
        for connection in list(itertools.chain(*channel.listeners)):
            self._confirm(connection, channel, False)

    async def audit(self, interval_s: float) -> NoReturn:
        """Compare cursors with their logs now and then: of ``AUDITED_AT_ONCE`` channels a time.

        Those that were looked at longest ago come first. A lost message has no successor to give it
        away while its project is quiet.
        """
        while True:
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.2))  # noqa: S311
            channels = self._registry.channels
            names = list(itertools.islice(channels, self.AUDITED_AT_ONCE))
            for name in names:
                channels[name] = channels.pop(name)
            heads = await self._log.heads(names)
            await asyncio.sleep(min(1.0, interval_s))  # what is on its way may arrive
            for name, head in heads.items():
                if channel := channels.get(name):
                    channel.wanted = max(channel.wanted, head)
                    self._fill_if_behind(channel)


@dataclasses.dataclass(eq=False)
class Receiver:
    """Takes messages out of one queue: as many in one piece as are there.

    What comes in one piece becomes one append and one write to each client. So after a full answer
    the next is waited for too, each for ``GATHER_S``. A poll that has not been answered by then
    goes on as the long poll that is due anyway; a short one would be a call for nothing after
    every burst. Where that brings ``BACKLOG`` messages, several polls go side by side: one alone
    takes no more than ten messages a round trip.

    Its polls end with the group of tasks that it is given.
    """

    RECEIVED_AT_ONCE = 90
    SHORT_POLL_S = 1.0
    GATHER_S = 0.015  # a round trip to SQS takes 5 to 10 ms
    BACKLOG = 30  # messages in one piece
    POLLS_AT_ONCE = 4

    _tasks: asyncio.TaskGroup
    _sqs: SQSClient
    _url: str
    _dependency: Dependency

    def __post_init__(self) -> None:
        self._polls: list[asyncio.Task[list[dict[str, Any]]]] = []
        self._empty_answers = 0

    @property
    def polling(self) -> bool:
        """Whether a poll is under way, or its answer not taken yet."""
        return bool(self._polls)

    async def messages(self, stopping: Callable[[], bool] = lambda: False) -> list[dict[str, Any]]:
        """The next messages: waits for the first, then takes what else is there.

        Once ``stopping`` says so, no poll is begun, but those under way are seen through.
        """
        messages: list[dict[str, Any]] = []
        patience_s = None
        while len(messages) < self.RECEIVED_AT_ONCE:
            polls = self.POLLS_AT_ONCE if len(messages) >= self.BACKLOG else 1
            while len(self._polls) < polls and not stopping():
                self._polls.append(self._tasks.create_task(self._receive()))
            if not self._polls:
                break
            done, _ = await asyncio.wait(
                self._polls, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
            )
            answers = [poll.result() for poll in self._polls if poll in done]
            self._polls = [poll for poll in self._polls if poll not in done]
            messages += itertools.chain.from_iterable(answers)
            if messages and all(len(answer) < SQS_BATCH_ENTRIES for answer in answers):
                break
            patience_s = self.GATHER_S if messages else None
        return messages

    async def _receive(self) -> list[dict[str, Any]]:
        """One long poll; nothing, after a pause, where it failed.

        Raises:
            UpstreamLost: the queue is gone, or closed to this task.
        """
        began_at = time.monotonic()
        batch: list[dict[str, Any]] = []
        with contextlib.suppress(*AWS_ERRORS):
            answer = await self._dependency.call(
                self._sqs.receive_message,
                QueueUrl=self._url,
                MaxNumberOfMessages=SQS_BATCH_ENTRIES,
                WaitTimeSeconds=LONG_POLL_S,
                MessageSystemAttributeNames=[
                    "ApproximateReceiveCount",
                    "ApproximateFirstReceiveTimestamp",
                    "SentTimestamp",
                ],
            )
            batch = cast("list[dict[str, Any]]", answer.get("Messages", []))
        if batch:
            self._empty_answers = 0
        # An error, or nothing although nobody waited for it: either would spin.
        elif time.monotonic() - began_at < self.SHORT_POLL_S:
            await asyncio.sleep(full_jitter_s(self._empty_answers))
            self._empty_answers += 1
        return batch


@dataclasses.dataclass(eq=False)
class Relay:
    """The way to the other tasks: the topic, and this task's own queue subscribed to it."""

    EVENTS_BEGIN: ClassVar[bytes] = b'"events":['  # nothing before it in a message is others'
    RETENTION_S: ClassVar[int] = 60
    STALE_AFTER_HEARTBEATS: ClassVar[int] = 5
    GONE_CODES: ClassVar = ("AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist")

    _tasks: asyncio.TaskGroup
    _sqs: SQSClient
    _sns: SNSClient
    _topic_arn: str
    task_id: dataclasses.InitVar[str]
    _heartbeat_s: float

    def __post_init__(self, task_id: str) -> None:
        where, _, topic = self._topic_arn.rpartition(":")
        self._prefix = f"{topic[:40]}-task-"
        self._name = self._prefix + re.sub(r"(?a)[^\w-]", "-", task_id)[: 80 - len(self._prefix)]
        self._queue_arn = f"{where}:{self._name}".replace(":sns:", ":sqs:", 1)
        self._queue_url = ""
        self._subscription_arn = ""
        self._suspects: set[str] = set()
        size_bytes = SNS_MESSAGE_BYTES - 1_024
        self._unpublished = Batcher(
            self._tasks, self._publish, entries=1_000, size_bytes=size_bytes, calls=1
        )
        self.bytes_in_hand = 0
        self.dependency = Dependency("fan-out")

    async def start(self) -> None:
        """Create this task's queue and subscribe it.

        The policy goes into CreateQueue: a later attribute change takes up to 60 s, in which
        every event would be lost.
        """
        statement = {
            "Sid": "TopicMaySend",
            "Effect": "Allow",
            "Principal": {"Service": "sns.amazonaws.com"},
            "Action": "sqs:SendMessage",
            "Resource": self._queue_arn,
            "Condition": {"ArnEquals": {"aws:SourceArn": self._topic_arn}},
        }
        queue = await self.dependency.retry(
            self._sqs.create_queue,
            QueueName=self._name,
            Attributes={
                "MessageRetentionPeriod": str(self.RETENTION_S),
                # Nothing comes twice before it expires, so that nothing need be deleted. SQS
                # holds 120,000 messages in this way: 2,000 a second.
                "VisibilityTimeout": str(2 * self.RETENTION_S),
                "Policy": json.dumps({"Version": "2012-10-17", "Statement": [statement]}),
            },
            tags={"heartbeat": str(int(time.time()))},
        )
        self._queue_url = queue["QueueUrl"]
        # Own events need not come back. The filter may take 15 minutes to be in force: until then
        # they do, and `events_of` sees whose they are.
        others = json.dumps({"origin": [{"anything-but": [self._name]}]})
        subscription = await self.dependency.retry(
            self._sns.subscribe,
            TopicArn=self._topic_arn,
            Protocol="sqs",
            Endpoint=self._queue_arn,
            Attributes={"RawMessageDelivery": "true", "FilterPolicy": others},
            ReturnSubscriptionArn=True,
        )
        self._subscription_arn = subscription["SubscriptionArn"]
        logger.info("fan-out queue ready", extra={"queue": self._name})

    def publish(self, event: RelayedEvent, done: Callable[[], None]) -> None:
        """Have an event brought to the other tasks; ``done`` is called when the topic has it."""
        encoded = sendable(encode(event))
        self.bytes_in_hand += len(encoded)
        self._unpublished.add((encoded, done), len(encoded) + 8)

    async def _publish(self, batch: list[tuple[bytes, Callable[[], None]]]) -> None:
        head = {"origin": self._name, "sizes": [len(encoded) for encoded, _ in batch]}
        events = b",".join(encoded for encoded, _ in batch)
        body = b"%b,%b%b]}" % (encode(head)[:-1], self.EVENTS_BEGIN, events)
        origin: Any = {"origin": {"DataType": "String", "StringValue": self._name}}
        await self.dependency.retry(
            self._sns.publish,
            TopicArn=self._topic_arn,
            Message=body.decode(),
            MessageAttributes=origin,
        )
        for encoded, done in batch:
            self.bytes_in_hand -= len(encoded)
            done()

    async def idle(self) -> None:
        """Return once the topic has all that was published."""
        await self._unpublished.idle()

    def events_of(self, body: bytes) -> Iterator[RelayedEvent]:
        """The events that a message of the topic brings from another task.

        What cannot be read is logged and left out: the events around it are other projects'.
        """
        head, begin, events = body.partition(self.EVENTS_BEGIN)
        try:
            batch = Decoders.relayed_batch.decode(b"%b%b]}" % (head, begin) if begin else body)
            if begin and not batch.sizes:
                batch = Decoders.relayed_batch.decode(body)
        except UNREADABLE_JSON as exc:
            logger.error("fan-out: a message cannot be read: %s", exc)
            return
        if batch.origin == self._name:
            return
        yield from batch.events
        place = 0
        for size in batch.sizes:
            try:
                yield decode_relayed(events[place : place + size])
            except UNREADABLE_JSON as exc:
                logger.error("fan-out: an event cannot be read: %s", exc)
            place += size + 1

    async def run(self, accept: Callable[[RelayedEvent], None]) -> NoReturn:
        """Hand what the other tasks publish to ``accept``."""
        async with asyncio.TaskGroup() as polls:
            receiver = Receiver(polls, self._sqs, self._queue_url, self.dependency)
            while True:
                for message in await receiver.messages():
                    for event in self.events_of(message["Body"].encode("utf-8", "surrogatepass")):
                        accept(event)

    async def heartbeat(self) -> NoReturn:
        """Show signs of life, whatever else fails: without five of them others end this task."""
        while True:
            await asyncio.sleep(self._heartbeat_s * random.uniform(0.8, 1.0))  # noqa: S311
            tags = {"heartbeat": str(int(time.time()))}
            await self.dependency.retry(self._sqs.tag_queue, QueueUrl=self._queue_url, Tags=tags)

    async def look_after(self) -> NoReturn:
        """Make sure that events still arrive, and see who lives no more."""
        while True:
            await asyncio.sleep(self._heartbeat_s * random.uniform(0.8, 1.0))  # noqa: S311
            await self.dependency.retry(
                self._sns.get_subscription_attributes, SubscriptionArn=self._subscription_arn
            )
            try:
                await self._reap()
            except AWS_ERRORS as exc:  # it is tried again in a while, here or by another task
                logger.warning("fan-out: reaping stopped with %s", error_code(exc))

    async def _reap(self) -> None:
        """Remove queues whose heartbeat has stopped, and subscriptions whose queue is gone.

        Each task looks at those that follow it by name, up to one that lives: so all are looked
        at, each by one task. Subscriptions are listed before queues are looked at: a task creates
        its queue first, so that a subscription whose queue cannot be found has none.
        """
        subscriptions = await self._subscriptions()
        queues: dict[str, str] = {}
        pages = self._sqs.get_paginator("list_queues")
        async for page in pages.paginate(QueueNamePrefix=self._prefix):
            queues |= {url.rsplit("/", 1)[-1]: url for url in page.get("QueueUrls", ())}
        stale_before = time.time() - self.STALE_AFTER_HEARTBEATS * self._heartbeat_s
        others = (queues.keys() | subscriptions.keys()) - {self._name}
        dead = set[str]()
        for name in sorted(others, key=lambda name: (name < self._name, name)):
            if await self._heartbeat_of(name) >= stale_before:
                break
            dead.add(name)
        # Twice in a row: of a queue made a moment ago, SQS may not know yet.
        confirmed, self._suspects = dead & self._suspects, dead
        for name in confirmed:
            logger.warning("removing what a dead task has left", extra={"queue": name})
            with contextlib.suppress(*AWS_ERRORS):  # else it is tried again, or already gone
                if name in subscriptions:
                    await self._sns.unsubscribe(SubscriptionArn=subscriptions[name])
            with contextlib.suppress(*AWS_ERRORS):
                if name in queues:
                    await self._sqs.delete_queue(QueueUrl=queues[name])

    async def _heartbeat_of(self, name: str) -> float:
        """When a task last showed a sign of life, unix seconds; 0 if its queue is gone.

        SQS is asked for each by name: its list may lack what is new, and have what is gone.
        """
        try:
            queue = await self._sqs.get_queue_url(QueueName=name)
            answer = await self._sqs.list_queue_tags(QueueUrl=queue["QueueUrl"])
        except ClientError as exc:
            if error_code(exc) in self.GONE_CODES:
                return 0.0
            raise
        return float(answer.get("Tags", {}).get("heartbeat", "0"))

    async def _subscriptions(self) -> dict[str, str]:
        """Queue name to subscription ARN, of the topic's subscriptions that tasks have made."""
        found = {}
        pages = self._sns.get_paginator("list_subscriptions_by_topic")
        async for page in pages.paginate(TopicArn=self._topic_arn):
            for subscription in page["Subscriptions"]:
                name = subscription["Endpoint"].rsplit(":", 1)[-1]
                arn = subscription["SubscriptionArn"]
                if name.startswith(self._prefix) and arn.startswith("arn:"):  # not "Deleted"
                    found[name] = arn
        return found

    async def close(self) -> None:
        """Unsubscribe, then delete the queue; what fails is left for others to reap."""
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                if self._subscription_arn:
                    await self._sns.unsubscribe(SubscriptionArn=self._subscription_arn)
                if self._queue_url:
                    await self._sqs.delete_queue(QueueUrl=self._queue_url)
        except AWS_ERRORS as exc:
            logger.warning("fan-out: the queue stays behind: %s", error_code(exc))


@dataclasses.dataclass(eq=False)
class Intake:
    """Takes agents' updates from their queue to the log, to this task's clients and to the topic.

    The order of work for an update: append, deliver here, publish, delete. A crash in between
    repeats it, and a repeat is recognised, so that no step needs to be undone. What is received
    together is appended together, over all projects, and what comes meanwhile is received when that
    is answered. Per project one append at a time is under way, in the order of receipt; a project
    that is held up holds up no other.

    Attributes:
        stopping: whether it is to receive no more, once the calls under way have returned.
    """

    ANSWERED_S = 0.1  # a call that takes longer keeps nothing else waiting
    DELETES_LINGER_S = 0.1  # of the visibility timeout's ten seconds
    ROOM_ASKED_FOR_S = 0.01
    UPDATES_IN_HAND = 500
    VISIBILITY_S = 10
    RECEIVES = 5

    _tasks: asyncio.TaskGroup
    _sqs: SQSClient
    _url: str
    _log: EventLog
    _feed: Feed
    _relay: Relay | None
    _may_receive: Callable[[], bool] = lambda: True
    _has_dead_letter_queue: bool = False
    stopping: bool = False

    def __post_init__(self) -> None:
        self._waiting: dict[str, list[PendingUpdate]] = {}  # by project
        self._under_way: set[str] = set()
        # By receipt: when it came, by the monotonic clock, and the size of its body.
        self._held: dict[str, tuple[float, int]] = {}
        # Of a FIFO queue's group nothing more comes before what came was deleted.
        linger_s = 0.0 if self._url.endswith(".fifo") else self.DELETES_LINGER_S
        self._to_delete = Batcher(self._tasks, self._delete, linger_s=linger_s)
        self.dependency = Dependency("updates queue")

    @property
    def bytes_in_hand(self) -> int:
        """Of the bodies of updates that were received and not yet deleted."""
        return sum([size for _, size in self._held.values()])

    async def run(self) -> None:
        """Receive until ``stopping``, whenever there is room for more."""
        attributes = await self.dependency.retry(
            self._sqs.get_queue_attributes, QueueUrl=self._url, AttributeNames=["RedrivePolicy"]
        )
        self._has_dead_letter_queue = "RedrivePolicy" in attributes.get("Attributes", {})
        async with asyncio.TaskGroup() as polls:
            receiver = Receiver(polls, self._sqs, self._url, self.dependency)
            while not self.stopping or receiver.polling:
                messages = await receiver.messages(lambda: self.stopping or self._crowded)
                if not messages:
                    await asyncio.sleep(self.ROOM_ASKED_FOR_S)
                for message in messages:
                    self._take(message)
                appends = self._append_waiting(tuple(self._waiting))
                if len(messages) < receiver.BACKLOG:
                    await self._answered(appends)

    async def _answered(self, appends: Sequence[asyncio.Task[None]]) -> None:
        """Wait until DynamoDB and the topic have answered for what was received.

        What comes meanwhile is then received, appended and published together, so that a busy task
        makes fuller calls rather than more (Nagle's rule, RFC 896), and an idle one never waits.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.ANSWERED_S):
                if appends:
                    await asyncio.wait(appends)
                if self._relay is not None:
                    await self._relay.idle()

    @property
    def _crowded(self) -> bool:
        return len(self._held) >= self.UPDATES_IN_HAND or not self._may_receive()

    def _take(self, message: dict[str, Any]) -> None:
        attributes = message.get("Attributes", {})
        self._held[message["ReceiptHandle"]] = (time.monotonic(), len(message["Body"]))
        try:
            update = decode_update(message["Body"])
        except BadMessage as exc:
            self._settle(message, str(exc))
            return
        # Also what is received for the first time may be in the log before we append it: if this
        # task is held up, another one has it after the visibility timeout.
        now = time.time()
        sent_at = int(attributes.get("SentTimestamp", 0)) / 1000 or now
        look_back_to = int(attributes.get("ApproximateFirstReceiveTimestamp", 0)) / 1000 or now
        if update.event_id is not None:  # the agent may have sent it before
            look_back_to = min(look_back_to, sent_at - EVENT_ID_WINDOW_S)
        look_back_to = min(look_back_to, now) - CLOCK_SKEW_S
        event_id = update.event_id or message["MessageId"]
        done = partial(self._settle, message)
        pending = PendingUpdate(update, event_id, look_back_to, sent_at, done=done)
        self._waiting.setdefault(pending.project_id, []).append(pending)

    def add(self, pending: PendingUpdate) -> None:
        """Have an update logged, delivered and published, in its turn."""
        self._waiting.setdefault(pending.project_id, []).append(pending)
        self._append_waiting([pending.project_id])

    def _append_waiting(self, project_ids: Iterable[str]) -> list[asyncio.Task[None]]:
        """Have what waits appended, of each of these projects that has nothing under way."""
        appends = []
        for project_id in project_ids:
            if project_id in self._under_way or project_id not in self._waiting:
                continue
            append = ProjectAppend(project_id, self._waiting.pop(project_id))
            self._under_way.add(project_id)
            if append.waiting:
                appends.append(append)
            else:
                self._appended(append)
        return [self._tasks.create_task(self._append(group)) for group in transactions(appends)]

    def _appended(self, append: ProjectAppend) -> None:
        self._under_way.remove(append.project_id)
        for update in append.pending:
            self._deliver(update)

    async def _append(self, group: list[ProjectAppend]) -> None:
        again = await self._log.append(group)
        for groups in again:
            self._tasks.create_task(self._append(groups))
        done = set(group).difference(*again)
        for append in done:
            self._appended(append)
        self._append_waiting(append.project_id for append in done)

    def _deliver(self, pending: PendingUpdate) -> None:
        """Deliver an update here, then publish it, then say that it is done."""
        done = partial(pending.done, pending.refusal)
        if pending.refusal is not None:
            done()
            return
        update, sent_at = pending.update, pending.sent_at
        event = pending.event or Event.of(update.event(None, timestamp()), sent_at)
        if self._feed.accept(event, update.connection_id) or self._relay is None:
            done()
            return
        event_id = pending.event_id if event.seq is not None else None
        payload = Raw(event.payload)
        self._relay.publish(
            RelayedEvent(
                pending.project_id, event.seq, update.connection_id, sent_at, payload, event_id
            ),
            done,
        )

    def _settle(self, message: dict[str, Any], fault: str | None) -> None:
        """Delete a message whose update is done, or make one that cannot be used visible at once.

        So its dead-letter queue gets it within milliseconds, and nothing of its FIFO group has
        to wait for a visibility timeout.
        """
        receives = int(message.get("Attributes", {}).get("ApproximateReceiveCount", "1"))
        if fault is None:
            self._to_delete.add(message["ReceiptHandle"])
        elif receives >= self.RECEIVES and not self._has_dead_letter_queue:
            logger.error("update deleted, unusable: %s: %s", fault, message["Body"])
            self._to_delete.add(message["ReceiptHandle"])
        else:
            logger.warning("update %s cannot be used: %s", message["MessageId"], fault)
            receipt = message["ReceiptHandle"]
            del self._held[receipt]
            self._tasks.create_task(self._give_back(receipt))

    async def _give_back(self, receipt: str) -> None:
        try:
            await self._show_after(0, [receipt])
        except UpstreamLost as exc:  # its visibility timeout does the same, later
            logger.warning("%s", exc)

    async def _delete(self, receipts: list[str], attempt: int = 0) -> None:
        """Delete what is done. What stays is held until it can be deleted."""
        entries: Any = [{"Id": str(i), "ReceiptHandle": each} for i, each in enumerate(receipts)]
        answer = await self.dependency.retry(
            self._sqs.delete_message_batch, QueueUrl=self._url, Entries=entries
        )
        failed = answer.get("Failed", ())
        left = {each.get("Id") for each in failed if not each.get("SenderFault")}
        for i, receipt in enumerate(receipts):
            if str(i) not in left:
                del self._held[receipt]
        if again := [receipt for i, receipt in enumerate(receipts) if str(i) in left]:
            # By itself: a batch that is not full waits until no call of the batcher is under way.
            self._tasks.create_task(self._delete_again(again, attempt))

    async def _delete_again(self, receipts: list[str], attempt: int) -> None:
        await asyncio.sleep(full_jitter_s(attempt))
        await self._delete(receipts, attempt + 1)

    async def keep(self) -> NoReturn:
        """Hold on to updates that take long, as while DynamoDB throttles.

        Given back, they would be received until the dead-letter queue takes them.
        """
        while True:
            await asyncio.sleep(self.VISIBILITY_S / 4)
            long_ago = time.monotonic() - self.VISIBILITY_S / 4
            held = [receipt for receipt, (since, _) in self._held.items() if since < long_ago]
            for batch in runs(held, lambda _: 1, SQS_BATCH_ENTRIES):
                # Side by side: while one call hangs, the others' time may run out.
                self._tasks.create_task(self._show_after(self.VISIBILITY_S, batch))

    async def _show_after(self, visibility_s: int, receipts: Sequence[str]) -> None:
        """Have SQS hand out what was received again in so many seconds, if the call works."""
        entries: Any = [
            {"Id": str(i), "ReceiptHandle": receipt, "VisibilityTimeout": visibility_s}
            for i, receipt in enumerate(receipts)
        ]
        with contextlib.suppress(*AWS_ERRORS):
            await self.dependency.call(
                self._sqs.change_message_visibility_batch, QueueUrl=self._url, Entries=entries
            )

    async def idle(self) -> None:
        """Return once nothing is in hand, a client's stop neither; meant for after ``run``."""
        while self._held or self._under_way:
            await asyncio.sleep(self.ROOM_ASKED_FOR_S)


# --- Metrics --------------------------------------------------------------------------------
# What is counted, one line a minute for CloudWatch and JSON for GET /stats. Knows no connections.


Gauge = Callable[[], float | Mapping[str, float]]
"""Reads what is there now: one figure, or figures by kind, whose sum is the metric."""


class Sample:
    """At most ``SIZE`` values, each of those seen with the same chance (reservoir sampling)."""

    SIZE = 100  # the number of values an array may have in the Embedded Metric Format

    def __init__(self) -> None:
        self.values: list[float] = []
        self._seen = 0

    def add(self, value: float) -> None:
        self._seen += 1
        if len(self.values) < self.SIZE:
            self.values.append(value)
        elif (place := random.randrange(self._seen)) < self.SIZE:  # noqa: S311
            self.values[place] = value

    def take(self) -> list[float]:
        """The values since the last call."""
        values, self.values, self._seen = self.values, [], 0
        return [round(value, 3) for value in values]

    def summary(self) -> dict[str, float]:
        """The median and the highest of the values since ``take``; nothing, if there are none."""
        values = sorted(self.values)
        return {"p50": values[len(values) // 2], "max": values[-1]} if values else {}


def counter(meaning: str) -> Any:
    """A number that its owner adds to: ``metrics.gaps_filled += 1``."""
    return dataclasses.field(default=0, metadata={"unit": "Count", "meaning": meaning})


def gauge(unit: str, meaning: str) -> Any:
    """A `Gauge` that its owner sets; until then the metric is missing."""
    return dataclasses.field(default=None, metadata={"unit": unit, "meaning": meaning})


def sample(unit: str, meaning: str) -> Any:
    """Values of which each is told apart: ``metrics.event_latency.add(1.5)``."""
    return dataclasses.field(default_factory=Sample, metadata={"unit": unit, "meaning": meaning})


@dataclasses.dataclass(eq=False)
class Metrics:
    """What is measured; each field with a meaning is the metric of its name in camel case.

    Counters are since the start, samples since the last line.
    """

    environment: str
    registry: dataclasses.InitVar[Registry]
    active_connections: Gauge = gauge("Count", "connections open now")
    connections_opened: int = counter("handshakes completed")
    connection_duration: Sample = sample("Seconds", "how long closed connections had lasted")
    subscriptions: Gauge = gauge("Count", "live subscriptions now")
    messages_received: int = counter("messages from clients, of every kind")
    messages_forwarded: int = counter("forwards that SQS has accepted")
    forward_errors: int = counter("forwards taken and then answered with an error")
    forward_latency: Sample = sample("Milliseconds", "from a forward to SQS's confirmation")
    events_delivered: int = counter("events written, counted once a listener")
    event_latency: Sample = sample(
        "Milliseconds", "from the agent's send to the write to the sockets"
    )
    slow_consumers_closed: int = counter("clients closed because they read too slowly")
    memory_closed: int = counter("connections ended because the memory budget was used up")
    bytes_held: Gauge = gauge("Bytes", "bytes held for clients and agents, by kind")
    work_owed: Gauge = gauge(
        "Seconds",
        "work that clients owe, and are not read from until it is paid, by kind",
    )
    catch_ups: int = counter("reads of the log for clients that came back")
    gaps_filled: int = counter("times that events had to be read from the log after all")
    target_health_errors: int = counter(
        "DescribeTargetHealth calls that failed; without any that works, a drain begins at SIGTERM"
    )
    append_conflicts: int = counter("appends tried again as another task had come first")
    protocol_errors: int = counter("messages answered with an error, and protocol violations")

    def __post_init__(self, registry: Registry) -> None:
        self._reported: dict[str, int] = {}
        self.active_connections = lambda: len(registry.connections)
        self.subscriptions = lambda: registry.subscriptions

    def forwarded(self, took_s: float) -> None:
        self.messages_forwarded += 1
        self.forward_latency.add(took_s * 1000)

    def delivered(self, events: Iterable[Event], listeners: int) -> None:
        now = time.time()
        for event in events:
            self.events_delivered += listeners
            if event.sent_at and listeners:
                self.event_latency.add((now - event.sent_at) * 1000)

    @classmethod
    def _fields(cls) -> dict[str, dataclasses.Field[Any]]:
        """Every metric's field, by its name for CloudWatch."""
        fields = (field for field in dataclasses.fields(cls) if field.metadata)
        return {field.name.title().replace("_", ""): field for field in fields}

    @classmethod
    def described(cls) -> dict[str, tuple[str, str]]:
        """Every metric's unit and meaning, by name; ``docs/METRICS.md`` is made from it."""
        return {
            name: (field.metadata["unit"], field.metadata["meaning"])
            for name, field in cls._fields().items()
        }

    def stats(self) -> dict[str, Any]:
        """For ``GET /stats``: counters since the start, latencies of the running minute.

        Every metric that has a value; one with kinds has them under ``<name>ByKind`` too.
        """
        found: dict[str, Any] = {}
        for name, field in self._fields().items():
            value = getattr(self, field.name)
            if isinstance(value, Sample):
                value = value.summary() or None
            elif callable(value):
                value = value()
                if isinstance(value, Mapping):
                    found[f"{name}ByKind"] = dict(value)
                    value = sum(value.values())
            if value is not None:
                found[name] = value
        return found

    def line(self) -> dict[str, Any]:
        """One object in CloudWatch's Embedded Metric Format, of what happened since the last.

        What is no metric, as figures by kind, is in the log only, where it costs nothing.
        """
        values = self.stats()
        metrics = [(name, field) for name, field in self._fields().items() if name in values]
        for name, field in metrics:
            value = getattr(self, field.name)
            if isinstance(value, Sample):
                values[name] = value.take()
            elif isinstance(value, int):
                values[name] -= self._reported.get(name, 0)
                self._reported[name] = value
        definition = {
            "Namespace": "AgenticAI/WebSocket",
            "Dimensions": [["Environment", "Service"]],
            "Metrics": [{"Name": name, "Unit": field.metadata["unit"]} for name, field in metrics],
        }
        return {
            "_aws": {"Timestamp": int(time.time() * 1000), "CloudWatchMetrics": [definition]},
            "Environment": self.environment,
            "Service": "websocket-gateway",
            **values,
        }


# --- Connection -----------------------------------------------------------------------------
# One socket, from its first byte to its last. Knows no AWS.

http11.MAX_LINE_LENGTH = HANDSHAKE_MAX_BYTES  # of websockets: a token alone may take more


class Inbox:
    """A connection's way from bytes to messages (RFC 6455, section 5.4): what was read so far.

    Attributes:
        protocol: websockets' Sans-I/O protocol, which parses frames and answers control frames.
        unread: bytes that were received and not parsed yet.
        unfinished_since: when the message began of which the end is still to come, by the loop's
            clock; 0 if there is none.
    """

    PIECE_BYTES = 4_096  # of input that is parsed at once
    INFLATED_PIECE_BYTES = 256  # the same where input may inflate: it becomes a message or two

    __slots__ = ("_fragments", "_frames", "_is_text", "protocol", "unfinished_since", "unread")

    def __init__(self, protocol: ServerProtocol) -> None:
        self.protocol = protocol
        self.unread = b""
        self.unfinished_since = 0.0
        self._frames: list[Frame] = []
        self._fragments: bytearray | None = None
        self._is_text = True

    @property
    def held_bytes(self) -> int:
        frames = sum([len(frame.data) for frame in self._frames])
        partial_frame = len(self.protocol.reader.buffer)
        return len(self.unread) + partial_frame + frames + len(self._fragments or b"")

    @property
    def has_frames(self) -> bool:
        """Whether frames were parsed and not acted on."""
        return bool(self._frames)

    def parse(self) -> None:
        """Parse a piece: of what may inflate a small one, so that little is held unasked."""
        size = self.INFLATED_PIECE_BYTES if self.protocol.extensions else self.PIECE_BYTES
        piece, self.unread = self.unread[:size], self.unread[size:]
        self.protocol.receive_data(piece)
        self._frames += cast("list[Frame]", self.protocol.events_received())

    def next(self, now: float) -> tuple[bytes, bool] | None:
        """The next complete message and whether it is text; control frames were answered."""
        while self._frames:
            received = self._frames.pop(0)
            data, received.data = received.data, b""  # or the parser holds it until the next frame
            if received.opcode in (Opcode.TEXT, Opcode.BINARY):
                self._is_text = received.opcode is Opcode.TEXT
                self._fragments = bytearray()
            elif received.opcode is not Opcode.CONT or self._fragments is None:
                continue
            self._fragments += data
            if received.fin:
                payload, self._fragments = bytes(self._fragments), None
                self.unfinished_since = 0.0
                return payload, self._is_text
        unfinished = self._fragments is not None or self.protocol.reader.buffer
        self.unfinished_since = (self.unfinished_since or now) if unfinished else 0.0
        return None

    def clear(self) -> None:
        """Let go of everything that was read and not acted on, and inflate nothing more.

        The library's protocol and its parser refer to each other and so may live on for a while,
        and with them what a hostile client had them inflate.
        """
        for received in self._frames:
            received.data = b""
        self.protocol.extensions = []
        self._frames.clear()
        self._fragments = None
        self.unread = b""
        self.unfinished_since = 0.0


class Connection(asyncio.Protocol):
    """A client: an ``asyncio.Protocol`` around websockets' Sans-I/O ``ServerProtocol``.

    While it is idle it owns no task, timer or lock, and after the handshake no trace of the
    request: it costs about 5 KB then. What needs time (pings, deadlines) is done by the gateway's
    one sweep.

    Attributes:
        account: which its work is charged to: first its socket's peer, then its principal.
        backlog_bytes: what the transport would hold if nothing had moved since the last look.
        behind: at the last look it had more unread than a client may have.
        charged_bytes: what the ledger has it down for.
        choked: the transport holds more than ``CHOKED_AT_BYTES`` that the client did not read.
        deadline: when handshake, authentication or close must be over, by the loop's clock.
        in_flight, in_flight_bytes: forwards that are not settled yet, and what else holds it up.
        moved_at: when the client last read something, or had nothing left to read.
        page: what of a log is kept until the client has been sent it.
        principal: who it belongs to; ``None`` until that is known.
        queued: the account with which it waits for its turn to act on its input.
        said_busy_at: when it was last told that it is not read from; infinite if it did not ask.
        warned: whether the client was told that its token is about to expire.
    """

    # What each is charged with, in round figures above what was seen of RSS; the formula for the
    # whole process is in docs/PERFORMANCE.md.
    CONNECTION_BYTES = 5_000  # one that is idle
    HANDSHAKE_BYTES = 36_000  # one that is not open yet
    SUBSCRIPTION_BYTES = 250
    CATCH_UP_BYTES = 5_000
    LARGEST_CHUNK_BYTES = 524_288  # of a catch-up: an item of the log has 400 KB at most
    REPLAY_PRICE_S_PER_BYTE = 5e-8  # the work it stands for: a megabyte a second for a principal
    CLOSE_TIMEOUT_S = 10.0
    HANDSHAKE_TIMEOUT_S = 10.0
    STALLED_AFTER_S = 30.0  # without a byte of its backlog moving, a connection is closed
    FORWARDS_IN_FLIGHT = 32  # per connection; beyond it, reading is paused

    __slots__ = (
        "_asked", "_drained", "_gateway", "_paused_at", "_private_bytes", "_request",
        "_request_bytes", "account", "address", "backlog_bytes", "behind", "catch_up_turn",
        "catching_up", "charged_bytes", "choked", "deadline", "deflates", "heard_at", "id",
        "in_flight", "in_flight_bytes", "inbox", "moved_at", "opened_at", "page", "pinged_at",
        "principal", "progress", "queued", "said_busy_at", "subscriptions", "transport", "warned",
    )  # fmt: skip

    account: Account
    transport: asyncio.Transport

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.inbox = Inbox(gateway.door.new_protocol())
        self.id = ""
        self.progress = Progress.HANDSHAKE
        self.subscriptions: set[str] = set()
        self.catching_up: dict[str, asyncio.Task[None]] = {}
        self.catch_up_turn: asyncio.Lock | None = None  # only for those who ever need it
        self.page: list[Chunk] = []
        self.deflates = False
        self.behind = self.choked = False
        self.queued: Account | None = None
        self.in_flight = self.in_flight_bytes = 0
        self.opened_at = self.heard_at = self.pinged_at = self.moved_at = 0.0
        self.deadline = 0.0
        self.address = ""
        self.principal: Principal | None = None
        self.warned = False
        self.said_busy_at = math.inf
        self.charged_bytes = self.backlog_bytes = self._private_bytes = 0
        self._asked = False
        self._request: Request | None = None
        self._drained: asyncio.Future[None] | None = None
        self._paused_at = 0.0
        self._request_bytes = 0

    # asyncio calls these.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=CHOKED_AT_BYTES)
        self.heard_at = self.moved_at = self._gateway.now()
        self.deadline = self.heard_at + self.HANDSHAKE_TIMEOUT_S
        self._gateway.door.arrived(self)

    def data_received(self, data: bytes) -> None:
        self.heard_at = self._gateway.now()
        if self._awaits_answer:
            self.transport.abort()  # it goes on before it has an answer
        elif self.progress is not Progress.CLOSING:  # else only the peer's end matters
            self.inbox.unread += data
            self._gateway.turns.give(self)

    def eof_received(self) -> bool:
        if self.progress is not Progress.HANDSHAKE:  # of thousands half open, all may go at once
            self.inbox.protocol.receive_eof()
            self._write_out()
        return False  # asyncio closes the transport, after what is still to be written

    def pause_writing(self) -> None:
        self.choked = True
        self._private_bytes = 0
        self.recount()

    def resume_writing(self) -> None:
        self.choked = self.behind = False
        self.moved_at = self._gateway.now()
        self.recount()
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)

    def connection_lost(self, _exc: Exception | None) -> None:
        self.progress = Progress.LOST
        self.inbox.clear()
        self._waiting_request()
        self._gateway.forget(self)

    # What it holds and what it costs.

    def held(self) -> dict[str, int]:
        """Bytes held for this client, by kind, without unread ones that others are sent as well."""
        unread = self.transport.get_write_buffer_size()
        if self.choked:
            unread = min(unread, self._private_bytes) + 2 * SOCKET_BUFFER_BYTES
        place = self.HANDSHAKE_BYTES
        if self.id:
            place = self.CONNECTION_BYTES + len(self.subscriptions) * self.SUBSCRIPTION_BYTES
            place += len(self.catching_up) * self.CATCH_UP_BYTES
        return {
            "unread": unread,
            "input": self.inbox.held_bytes,
            "forwards": self.in_flight_bytes,
            "connections": place,
        }

    def held_bytes(self) -> int:
        """Bytes held for this client, with all that it has not read or is still to be sent."""
        unread = self.transport.get_write_buffer_size()
        page = sum(chunk.held_bytes for chunk in self.page)
        return sum((self.held() | {"unread": unread, "page": page}).values())

    @property
    def stalled_since(self) -> float:
        """Since when nothing of what it holds has moved, by the loop's clock."""
        if self.choked:
            return self.moved_at
        if self.progress is Progress.OPEN:
            return self.inbox.unfinished_since or math.inf
        return self.deadline - self.HANDSHAKE_TIMEOUT_S

    def recount(self) -> None:
        """Have the ledger know what it holds now."""
        self._gateway.ledger.update(self)

    def charge_to(self, account: Account) -> None:
        """Belong to another account from now on; one that is gone has left its own."""
        if self.progress is not Progress.LOST:
            self.account.users -= 1
            account.users += 1
            self.account = account

    def look(self, now: float, max_backlog_bytes: int) -> bool:
        """See what the client has read since the last look; whether it reads too slowly.

        It does if it has read nothing of what it has unread for ``STALLED_AFTER_S``, or if it had
        more unread than the bound at both looks and has not read as much between them: keeping
        what it missed is then the log's work, not memory's. However much comes at once closes
        nobody, and who catches up does so at its own pace, a chunk at a time.
        """
        size = self.transport.get_write_buffer_size()
        read_bytes = self.backlog_bytes - size
        if not size or read_bytes > 0:
            self.moved_at = now
        chunk_bytes = self.LARGEST_CHUNK_BYTES if self.catching_up else 0
        was_behind, self.behind = self.behind, size > max_backlog_bytes + chunk_bytes
        if size != self.backlog_bytes:
            self.backlog_bytes = size
            self.recount()
        lags = was_behind and self.behind and read_bytes < max_backlog_bytes
        return lags or now - self.moved_at > self.STALLED_AFTER_S

    # The gateway calls these.

    def send(self, payload: bytes) -> None:
        """Write one text message; nothing if the connection is no longer open."""
        if self.progress is Progress.OPEN:
            self._write(frame(payload))

    def replay(self, chunk: Chunk) -> None:
        """Write events in one piece, to a client that catches up at its own pace and cost."""
        if self.progress is Progress.OPEN:
            frames = chunk.frames(self.deflates)
            self.charge_replay(len(frames))
            self.write_shared(frames)

    def charge_replay(self, size_bytes: int) -> None:
        """Have its account pay for what is sent it from the log, or of a project's state."""
        self.account.charge(size_bytes * self.REPLAY_PRICE_S_PER_BYTE, self._gateway.now())

    def take_page(self, page: Iterable[Chunk]) -> None:
        """Keep a page of a log that others may have too, until this client has been sent it."""
        self.page = list(page)
        self._gateway.ledger.check()

    def write_shared(self, frames: bytes) -> None:
        """Write what others are sent too: what is not read of it counts once for all of them."""
        if self.choked or len(frames) > CHOKED_AT_BYTES:
            self._gateway.ledger.share(frames)
        if self.choked:
            self.backlog_bytes += len(frames)
        self.transport.write(frames)

    async def drained(self) -> None:
        """Return once the client has read most of what was written, to the one who waits for it.

        The sweep closes who reads nothing, and then whoever waits is cancelled.
        """
        if self.choked:
            self._drained = asyncio.get_running_loop().create_future()
            await self._drained

    def ping(self) -> None:
        self.pinged_at = self._gateway.now()
        if self.progress is Progress.OPEN:
            self.inbox.protocol.send_ping(b"")
            self._write_out()

    def hold(self, change: int, size_bytes: int = 0) -> None:
        """Count forwards under way, of ``size_bytes`` each; beyond the bound act on nothing more.

        Whatever has to end before anything else is acted on counts for as many as there may be.
        """
        could_act = self._may_act
        self.in_flight += change
        self.in_flight_bytes += size_bytes * change
        self._gateway.ledger.add(self, size_bytes * change)
        if self._may_act and not could_act:
            self._gateway.turns.queue(self)

    def pause_reading(self) -> None:
        """Read no more for now; what an open one must send may come later by as long as that.

        Who has nothing more to send is always heard, in whatever debt: else its end would not be
        seen, of a connection that is closing, or of a request that waits for its answer.
        """
        if not self._paused_at and not self.is_over:
            self._paused_at = self._gateway.now()
            if not self._awaits_answer:
                self.transport.pause_reading()
            self.recount()  # with what was read before its turn

    def resume_reading(self) -> None:
        if self._paused_at:
            now = self._gateway.now()
            paused_s = now - self._paused_at
            self._paused_at = 0.0
            if self.progress is Progress.OPEN:
                self.deadline += paused_s
            if self.inbox.unfinished_since:
                self.inbox.unfinished_since += paused_s
            self.heard_at = now  # its silence was ours
            if not self.transport.is_closing():
                self.transport.resume_reading()

    @property
    def is_over(self) -> bool:
        """Whether nothing of what the client sends is acted on any more."""
        return self.progress in (Progress.CLOSING, Progress.LOST) or self.transport.is_closing()

    @property
    def is_read(self) -> bool:
        """Whether what it sends is acted on now; else an open one's deadlines stand still."""
        return not self._paused_at

    def close(self, code: int, reason: str = "") -> None:
        """Start the closing handshake (RFC 6455, section 7.1.2); nothing if it has begun."""
        protocol = self.inbox.protocol
        if self.progress is Progress.OPEN and protocol.state is State.OPEN:
            # And with it ends what is sent: so nobody waits for an answer to what still comes, and
            # it is discarded unparsed. To parse it would be work that is charged to nobody.
            protocol.fail(code, reason)
            self._write_out()
        elif self.progress is Progress.OPEN:  # the peer's close frame came, behind what is left
            self.inbox.clear()
            self._write_out()
        elif self.progress is Progress.HANDSHAKE:
            self.transport.abort()

    def fail(self, exc: Exception) -> None:
        logger.error("connection failed", exc_info=exc, extra={"connection_id": self.id})
        self.inbox.clear()
        self.close(CloseCode.INTERNAL_ERROR, "internal error")

    @contextlib.contextmanager
    def failing_alone(self) -> Iterator[None]:
        """Have a fault of ours cost this connection, not the process."""
        try:
            yield
        except UpstreamLost:
            raise
        except Exception as exc:
            self.fail(exc)

    def take_turn(self, until_s: float) -> bool:
        """Act on what was read until the thread's CPU time is ``until_s``; whether more is left."""
        opens = self.progress is Progress.HANDSHAKE
        was_held = opens or not self.is_read or self.inbox.unfinished_since
        try:
            if self.is_over:
                return False
            if opens:
                self._handshake()
            else:
                self._act(until_s)
        except Exception as exc:  # as in ``failing_alone``, at less cost
            self.fail(exc)
        if self.is_over:
            return False
        left = self.inbox.has_frames or bool(self.inbox.unread or self._request)
        if left or self.queued or not self._may_act:
            self.pause_reading()
        else:
            self.resume_reading()
        if was_held or left or self.inbox.unfinished_since:  # else it holds as much as before
            self.recount()
        return left and self._may_act

    # Inside.

    @property
    def _may_act(self) -> bool:
        return self.in_flight < self.FORWARDS_IN_FLIGHT

    @property
    def _awaits_answer(self) -> bool:
        """Whether its request is complete: only its end may come before the answer."""
        return self._asked and self.progress is Progress.HANDSHAKE

    def _act(self, until_s: float) -> None:
        """Act on messages, and parse a piece more where there is no complete one."""
        now = self._gateway.now()
        while self._may_act and self.progress is Progress.OPEN:
            if message := self.inbox.next(now):
                self._message(*message)
            elif self.inbox.unread:
                self.inbox.parse()
                if not self.inbox.protocol.close_rcvd:
                    self._write_out()  # pongs, before answers to what came behind their pings
            else:
                break
            if time.thread_time() > until_s:
                break
        if self.inbox.protocol.state is State.OPEN or not self.inbox.has_frames:
            self._write_out()  # what came before the peer's own close frame still counts

    def _handshake(self) -> None:
        """Read the request, however slowly it comes, and answer it."""
        if self._asked:
            if request := self._waiting_request():
                self._gateway.door.answer(self, request)
            return
        data, self.inbox.unread = self.inbox.unread, b""
        protocol = self.inbox.protocol
        self._request_bytes += len(data)
        protocol.receive_data(data)
        events = protocol.events_received()
        if protocol.close_expected():
            # Not a request, or not only one; the library itself answers those that are too long.
            if events or isinstance(protocol.handshake_exc, InvalidMessage):
                self.transport.write(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
        elif events and (len(events) > 1 or protocol.reader.buffer):
            protocol.send_response(protocol.reject(400, "Data before the end of the handshake.\n"))
        elif events:
            self._asked = True
            request = cast("Request", events[0])
            door = self._gateway.door
            door.identify(self, request)
            in_debt = self.account.paid_at > self._gateway.now()
            if in_debt and not door.admission.refusal(self.address):
                self._request = request  # it is answered in its turn, and counts until then
                door.admission.count(self.address, +1)
                self.resume_reading()  # its end is to be seen, though it waited for its peer's turn
            else:
                door.answer(self, request)
            return
        elif self._request_bytes > HANDSHAKE_MAX_BYTES:
            protocol.send_response(protocol.reject(431, "The request is too large.\n"))
        self._write_out()

    def _waiting_request(self) -> Request | None:
        """The request that has waited for its turn, if any; it waits no longer."""
        request, self._request = self._request, None
        if request is not None:
            self._gateway.door.admission.count(self.address, -1)
        return request

    def respond(self, request: Request, response: Response) -> None:
        """Answer the handshake, at once or when it is known who the client is."""
        if self.progress is not Progress.HANDSHAKE or self.transport.is_closing():
            return
        handshake = self.inbox.protocol
        handshake.send_response(response)
        self._write_out()
        if response.status_code != HTTPStatus.SWITCHING_PROTOCOLS:
            return
        self.id = str(handshake.id)
        # A lean protocol takes the place of the handshake's, which keeps the request alive.
        self.inbox.protocol = self._gateway.door.new_protocol(State.OPEN)
        self.inbox.protocol.extensions = handshake.extensions
        # A smaller window than the shared frames are made with cannot read them: such a client
        # negotiated compression and gets plain frames all the same (RFC 7692, section 6).
        extensions: Sequence[Any] = handshake.extensions
        self.deflates = any(each.local_max_window_bits == 15 for each in extensions)
        self.progress = Progress.OPEN
        self.opened_at = self.heard_at
        self.deadline = math.inf
        self._gateway.messages.welcome(self, request)

    def _message(self, payload: bytes, is_text: bool) -> None:
        if not is_text:
            sentence = "Send text frames; binary ones are not read."
            self._gateway.messages.refuse(
                self, BadMessage(ErrorCode.BINARY_FRAME, sentence, **context_of(payload))
            )
            return
        try:
            payload.decode()
        except UnicodeDecodeError:
            self.close(CloseCode.INVALID_DATA, "text must be UTF-8")
            return
        self._gateway.messages.handle(self, payload)

    def _write(self, data: bytes) -> None:
        """Write what only this client is sent."""
        self.transport.write(data)
        if self.choked:
            self._private_bytes += len(data)
            self.backlog_bytes += len(data)
            self.recount()

    def _write_out(self) -> None:
        """Write what the protocol has to say, and follow it into the closing handshake."""
        protocol = self.inbox.protocol
        parts = protocol.data_to_send()
        if data := b"".join(parts):
            self._write(data)
        if parts and not parts[-1] and self.transport.can_write_eof():
            with contextlib.suppress(OSError):  # the peer may have reset the connection already
                self.transport.write_eof()
        closes = protocol.close_sent or protocol.eof_sent
        if closes and self.progress in (Progress.HANDSHAKE, Progress.OPEN):
            # Read on, whatever paused it, or the peer's end is not seen; and discard what comes.
            self.progress = Progress.CLOSING
            self.inbox.clear()
            self.resume_reading()
            self.deadline = self._gateway.now() + self.CLOSE_TIMEOUT_S
            self._gateway.registry.drop(self)


# --- Drain ----------------------------------------------------------------------------------
# The orderly end of a task: what begins it, and when clients are sent away. Knows no requests.


@dataclasses.dataclass(eq=False)
class TargetHealth:
    """The state of this task's own target in the load balancer.

    ECS deregisters a target long before its task gets SIGTERM, and at the end of the deregistration
    delay the load balancer cuts the connections that are left. So the drain begins with the former.
    The deregistration delay must be longer than ``EVERY_S`` and the drain together.

    Source: Elastic Load Balancing API, DescribeTargetHealth.
    """

    EVERY_S = 10.0

    elbv2: Any
    target_group_arn: str
    target: Mapping[str, Any]
    metrics: Metrics
    dependency: Dependency = dataclasses.field(default_factory=partial(Dependency, "load balancer"))

    async def begin(self, drain: asyncio.Event) -> None:
        """Set ``drain`` once the target's state becomes ``draining``.

        Only as a change from another state: the address may have been that of a crashed task, whose
        target is still draining.
        """
        before: str | None = None
        warned = False
        while True:
            state = await self._state()
            if state == "draining" and before not in (None, "draining"):
                logger.info("the load balancer drains this task's target")
                drain.set()
                return
            before = state or before
            if not before and not warned:
                logger.warning("until the load balancer answers, a drain begins at SIGTERM only")
                warned = True
            await asyncio.sleep(self.EVERY_S * random.uniform(0.8, 1.2))  # noqa: S311

    async def _state(self) -> str | None:
        """The target's state now; ``None`` where the call fails, which changes nothing."""
        try:
            answer = await self.dependency.call(
                self.elbv2.describe_target_health,
                TargetGroupArn=self.target_group_arn,
                Targets=[self.target],
            )
            return str(answer["TargetHealthDescriptions"][0]["TargetHealth"]["State"])
        except (*AWS_ERRORS, IndexError) as exc:
            self.metrics.target_health_errors += 1
            self.dependency.failed(exc, "DescribeTargetHealth")
            return None


@dataclasses.dataclass(eq=False)
class Drain:
    """Ends a task in order, in ``BUDGET_S``.

    Attributes:
        spread_s: seconds over which clients are sent away.
        wanted: set once the task is to end; it then takes nobody in any more.
        hurry: set once it is to wait no more than a second.
        receiving: the task that receives updates, which is seen through and not cut.
    """

    BUDGET_S = 110.0  # of the 120 s after which the platform kills the task
    RECONNECT_SPREAD_MS = 1_000

    spread_s: float
    registry: Registry
    forwarder: Forwarder
    intake: Intake | None
    relay: Relay | None
    receiving: asyncio.Task[None] | None = None
    wanted: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    hurry: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    signalled: bool = False

    def signal(self) -> None:
        """Begin, or hurry if a signal has come before."""
        (self.hurry if self.signalled else self.wanted).set()
        self.signalled = True

    async def run(self, tasks: asyncio.TaskGroup, working: asyncio.Task[None]) -> None:
        """Send everybody away, finish what is in hand, then end ``working``."""
        logger.info("draining", extra={"connections": len(self.registry.connections)})
        finishing = tasks.create_task(self._finish())
        hurry = tasks.create_task(self.hurry.wait())
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({finishing, hurry}, timeout=self.BUDGET_S, return_when=first)
        await asyncio.wait({finishing}, timeout=1.0 if hurry.done() else 0.0)
        # 4. End all work, and take the own queue away.
        ending = (finishing, hurry, working)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)
        if self.relay:
            await self.relay.close()
        # 5. Cut who is still there.
        for connection in tuple(self.registry.sockets):
            connection.transport.abort()

    async def _finish(self) -> None:
        # 1. No more sockets (the door sees to that) and no more updates. A long poll under way is
        #    seen through, if that takes no longer than the drain: what SQS hands to a call that
        #    was cut is invisible to everybody for ten seconds.
        receiving_until = time.monotonic() + self.spread_s
        if self.intake:
            self.intake.stopping = True
        # 2. Send the clients away, spread out so that the others can take them in.
        await self._close_all()
        if self.receiving:
            left_s = max(0.0, receiving_until - time.monotonic())
            await asyncio.wait({self.receiving}, timeout=left_s)
        # 3. Finish the forwards and updates in hand, and see the closing handshakes through.
        await self.forwarder.idle()
        if self.intake:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.intake.idle(), CALL_TIMEOUT_S)
        leaving = set(self.registry.sockets)  # and nobody who comes now
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(Connection.CLOSE_TIMEOUT_S):
                while leaving & self.registry.sockets:
                    await asyncio.sleep(0.05)

    async def _close_all(self) -> None:
        began_at = time.monotonic()
        spread_s = min(self.spread_s, self.BUDGET_S / 2)
        connections = list(self.registry.connections.values())
        random.shuffle(connections)
        busy = []
        for i, connection in enumerate(connections):
            left_s = began_at + spread_s * i / len(connections) - time.monotonic()
            if left_s > 0 and not self.hurry.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.hurry.wait(), left_s)
            if connection.in_flight:
                connection.hold(+Connection.FORWARDS_IN_FLIGHT)
                busy.append(connection)
            else:
                self._send_away(connection)
        if busy:  # who waits for confirmations gets them first
            await self.forwarder.idle()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CALL_TIMEOUT_S):  # stops have no deadline
                    while any(each.in_flight > Connection.FORWARDS_IN_FLIGHT for each in busy):
                        await asyncio.sleep(0.05)
        for connection in busy:
            self._send_away(connection)

    def _send_away(self, connection: Connection) -> None:
        after_ms = random.randint(0, self.RECONNECT_SPREAD_MS)  # noqa: S311
        connection.send(encode(Reconnect(after_ms)))
        connection.close(CloseCode.SERVICE_RESTART, "this server is being replaced; reconnect")


# --- Gateway --------------------------------------------------------------------------------
# All of it together: HTTP answers, messages, the sweep. Knows no os.environ, no signals.


def peer_of(connection: Connection) -> str:
    """Who the socket says it is from; nothing once the peer has gone."""
    peer = connection.transport.get_extra_info("peername")
    return str(peer[0]) if peer else ""


async def fetch_keys(address: str) -> bytes:
    """The JSON Web Key Set at an address (RFC 7517); whatever does not end is cut off."""
    timeout = ClientTimeout(total=CALL_TIMEOUT_S)
    async with (
        ClientSession(timeout=timeout, raise_for_status=True) as session,
        session.get(address, allow_redirects=False) as answer,
    ):
        if answer.status != HTTPStatus.OK:  # a redirect is no error, and no key set either
            raise ValueError("not a key set")
        document = b""
        async for chunk in answer.content.iter_any():
            document += chunk
            if len(document) > Keys.MAX_BYTES:
                raise ValueError("a key set of more than a megabyte")
        return document


def seconds_left(principal: Principal) -> int:
    return int(min(principal.expires_at - time.time(), SESSION_WITHOUT_END_S))


class Door:
    """Answers HTTP requests, and lets WebSocket clients in."""

    WORK_SHARE = 0.05  # of the loop's CPU time, for all connections of one principal
    ADDRESS_WORK_SHARE = 0.5  # for those without a principal, ten times as much: for offices
    SOCKET_PRICE_S = 0.0001  # the work of accepting and closing a socket, charged at its end
    FAILED_AUTHENTICATION_PRICE_S = 1.0  # so that an address tries 30 tokens a minute
    PATHS = ("/", "/ws")

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._settings = settings
        self.tokens: Verifier | None = None
        if address := settings.auth_jwks_url:
            keys = Keys(partial(fetch_keys, address), settings.auth_algorithms)
            self.tokens = Verifier(settings, keys)
        self.admission = Admission(settings)
        self.work_by_address = Accounts(self.ADDRESS_WORK_SHARE)
        self.work_by_subject = Accounts(self.WORK_SHARE)
        self._anybody = Principal(None, None, math.inf)
        self._extensions = (
            [ServerPerMessageDeflateFactory(True, True)] if settings.compression else None
        )

    def work_owed(self) -> dict[str, float]:
        """Seconds of work that clients owe, by what their accounts are kept for."""
        now = self._gateway.now()
        return {
            "subjects": round(self.work_by_subject.owed(now), 3),
            "addresses": round(self.work_by_address.owed(now), 3),
        }

    def new_protocol(self, state: State = State.CONNECTING) -> ServerProtocol:
        return ServerProtocol(
            state=state,
            extensions=self._extensions,
            max_size=self._settings.max_message_bytes,
            select_subprotocol=choose_subprotocol if state is State.CONNECTING else None,
        )

    def arrived(self, connection: Connection) -> None:
        """A socket was accepted; until it says who it is, its work is its peer's."""
        connection.account = self.work_by_address.of(client_address(peer_of(connection), (), 0))
        connection.account.users += 1
        self._gateway.registry.sockets.add(connection)
        self._gateway.ledger.update(connection)

    def identify(self, connection: Connection, request: Request) -> None:
        """Charge what follows to the address that a request is from, and not to the balancer."""
        forwarded_for = request.headers.get_all("X-Forwarded-For")
        hops = self._settings.trusted_proxy_hops
        connection.address = client_address(peer_of(connection), forwarded_for, hops)
        connection.charge_to(self.work_by_address.of(connection.address))

    def answer(self, connection: Connection, request: Request) -> None:
        """Have a request answered: at once, unless the issuer's keys must be read for it."""
        path, _ = split_target(request.path)
        if path in self.PATHS:
            self._admit(connection, request)
        elif request.method not in ("GET", "HEAD"):
            self._say(connection, request, 405, "Only GET and HEAD.")
        elif path == "/health":
            health = self._gateway.health()
            self._say(connection, request, 200 if health["status"] == "ok" else 503, health)
        elif path == "/live":
            self._say(connection, request, 200, {"status": "ok"})
        elif path == "/stats" and self._is_local(connection, request):
            self._say(connection, request, 200, self._gateway.metrics.stats())
        else:
            self._say(connection, request, 404, "Not found. Connect a WebSocket to / or /ws.")

    def _is_local(self, connection: Connection, request: Request) -> bool:
        forwarded = "X-Forwarded-For" in request.headers
        return not forwarded and peer_of(connection) in ("127.0.0.1", "::1")

    def _say(
        self, connection: Connection, request: Request, status: int, content: str | dict[str, Any]
    ) -> None:
        """Answer with a sentence or, as JSON, an object.

        A browser does not tell a page why its WebSocket failed. The page may ask by ``fetch``, and
        read the same refusal: it holds nothing that depends on who asks.
        """
        protocol = connection.inbox.protocol
        if isinstance(content, str):
            response = protocol.reject(status, f"{content}\n")
        else:
            response = protocol.reject(status, json.dumps(content) + "\n")
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "application/json"
            response.headers["Cache-Control"] = "no-store"
        if status == HTTPStatus.UNAUTHORIZED:
            response.headers["WWW-Authenticate"] = "Bearer"
        elif status == HTTPStatus.METHOD_NOT_ALLOWED:
            response.headers["Allow"] = "GET, HEAD"
        elif status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            response.headers["Retry-After"] = str(random.randint(1, 5))  # noqa: S311
        if not request.path.startswith("/stats"):  # which no page on this machine may read
            response.headers["Access-Control-Allow-Origin"] = "*"
        if request.method == "HEAD":
            response.body = b""
        connection.respond(request, response)

    def _admit(self, connection: Connection, request: Request) -> None:
        """Let a client in, by origin, limits and token, in this order: the cheapest comes first."""
        settings, headers = self._settings, request.headers
        foreign = set(headers.get_all("Origin")) - set(settings.allowed_origins)
        token = bearer_token(headers)
        if settings.allowed_origins and foreign:
            self._say(connection, request, 403, "Pages of this origin may not connect.")
        elif refusal := self._closed_to(connection.address):
            self._say(connection, request, *refusal)
        elif self.tokens and token is not None:
            self.tokens.check(token, partial(self._identified, connection, request))
        elif self.tokens and not settings.auth_first_message:
            self._say(connection, request, 401, "A valid token is needed.")
        else:
            connection.principal = None if self.tokens else self._anybody
            connection.respond(request, connection.inbox.protocol.accept(request))

    def _closed_to(self, address: str) -> tuple[int, str] | None:
        """HTTP status and sentence, if nobody may come in now, or nobody from there."""
        status = self._gateway.health()["status"]
        if status in ("starting", "draining"):
            return 503, f"This server is {status}."
        if not self._gateway.ledger.has_room:
            return 503, "This server is full."
        return self.admission.refusal(address)

    def _identified(
        self, connection: Connection, request: Request, found: Principal | NotAuthenticated
    ) -> None:
        with connection.failing_alone():
            # The answer may have come later, and much may have happened since.
            if refusal := self._closed_to(connection.address):
                self._say(connection, request, *refusal)
            elif isinstance(found, NotAuthenticated):
                self.charge_failure(connection, found)
                self._say(connection, request, 401, "A valid token is needed.")
            else:
                self.know(connection, found)
                connection.respond(request, connection.inbox.protocol.accept(request))

    def know(self, connection: Connection, principal: Principal) -> None:
        """A connection's principal is known: its work is charged to that from now on."""
        connection.principal = principal
        connection.charge_to(self.work_by_subject.of(str(principal.subject)))

    def charge_failure(self, connection: Connection, exc: NotAuthenticated) -> None:
        """Have its address pay for a refused token, if that may be a guess.

        Not its subject, whose fresh token it may be: guesses would cost another account each.
        """
        if not isinstance(exc, UnknownKey | Expired):
            account = self.work_by_address.of(connection.address)
            account.charge(self.FAILED_AUTHENTICATION_PRICE_S, self._gateway.now())
        whose = {"connection_id": connection.id, "address": connection.address}
        logger.info("token refused: %s", exc, extra=whose)

    def forget_the_quiet(self, now: float) -> None:
        """Let go of addresses and principals that have been quiet."""
        self.work_by_address.forget(now)
        self.work_by_subject.forget(now)


class Messages:
    """What a client's messages do."""

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._settings = settings

    def welcome(self, connection: Connection, request: Request) -> None:
        """A handshake is complete: register, greet, and subscribe to what the URL asks for."""
        gateway = self._gateway
        gateway.registry.connections[connection.id] = connection
        gateway.door.admission.count(connection.address, +1)
        gateway.metrics.connections_opened += 1
        logger.info("connection opened", extra={"connection_id": connection.id})
        greeting = Connected(
            timestamp=timestamp(),
            connection_id=connection.id,
            max_message_bytes=self._settings.max_message_bytes,
        )
        connection.send(encode(greeting))
        if connection.principal is None:
            connection.deadline = gateway.now() + self._settings.auth_deadline_seconds
        else:
            gateway.registry.join(connection, gateway.registry.channel(EVERYONE))
        query = split_target(request.path)[1]
        if "busy=1" in query.split("&"):
            connection.said_busy_at = -math.inf
        limit = self._settings.max_subscriptions_per_connection
        try:
            subscriptions = subscriptions_in(query)
            if subscriptions and connection.principal is None:
                sentence = (
                    "Authenticate first, and subscribe then: the URL's project_id is ignored."
                )
                raise BadMessage(ErrorCode.UNAUTHENTICATED, sentence)
            if limit and len(subscriptions) > limit:  # one answer for all of them
                sentence = f"A connection may have {limit} subscriptions; the URL asks for more."
                raise BadMessage(ErrorCode.TOO_MANY_SUBSCRIPTIONS, sentence)
            for subscription in subscriptions:
                self.handle(connection, encode(subscription))
        except BadMessage as exc:
            self.refuse(connection, exc)

    def handle(self, connection: Connection, payload: bytes) -> None:
        """Answer a message at once or, a forward, when SQS has answered."""
        self._gateway.metrics.messages_received += 1
        message: ClientMessage | None = None
        try:
            if connection.principal is None:
                message = decode_first_message(payload)
            else:
                message = decode_message(payload)
            self._act(connection, message)
        except BadMessage as exc:
            self.refuse(connection, exc, message)

    def _act(self, connection: Connection, message: ClientMessage) -> None:
        project_id = getattr(message, "project_id", None)
        # An agent answers where it was asked: a forward for everyone comes back to everyone.
        strictly = isinstance(message, Forward | Stop)
        principal = connection.principal
        allowed = principal is not None and principal.may_use(project_id, strictly=strictly)
        if not allowed and not isinstance(message, Authenticate | Ping):
            raise BadMessage(ErrorCode.FORBIDDEN, "Your token does not allow this project.")
        match message:
            case Forward():
                self._forward(connection, message)
            case Stop():
                self._stop(connection, message)
            case Subscribe():
                self._subscribe(connection, message)
            case Unsubscribe():
                if project_id != EVERYONE:  # whose events reach everyone, asked for or not
                    self._gateway.feed.unsubscribe(connection, message.project_id)
                self._answer(connection, message, UnsubscriptionConfirmed(message.project_id))
            case Ping():
                self._answer(connection, message, Pong(timestamp()))
            case Authenticate():
                self._authenticate(connection, message)

    def _answer(
        self, connection: Connection, message: ClientMessage, answer: Answer | BadMessage
    ) -> None:
        """Send the answer to a message, with the ``ref`` that it came with."""
        if isinstance(answer, BadMessage):
            self.refuse(connection, answer, message)
        else:
            answer.ref = ref_of(message)
            connection.send(encode(answer))

    def _subscribe(self, connection: Connection, message: Subscribe) -> None:
        limit = self._settings.max_subscriptions_per_connection
        current = (connection.subscriptions | connection.catching_up.keys()) - {EVERYONE}
        counts = limit and message.project_id != EVERYONE
        if counts and len(current - {message.project_id}) >= limit:
            sentence = f"A connection may have {limit} subscriptions; end another one first."
            raise BadMessage(ErrorCode.TOO_MANY_SUBSCRIPTIONS, sentence)
        self._gateway.feed.subscribe(connection, message)

    def _authenticate(self, connection: Connection, message: Authenticate) -> None:
        """Take a token as the first message, or a fresh one of the same subject."""
        tokens = self._gateway.door.tokens
        if tokens is None:
            self._answer(connection, message, Authenticated(SESSION_WITHOUT_END_S))
        else:
            connection.hold(+Connection.FORWARDS_IN_FLIGHT)
            tokens.check(message.token, partial(self._authenticated, connection, message))

    def _authenticated(
        self, connection: Connection, message: Authenticate, found: Principal | NotAuthenticated
    ) -> None:
        with connection.failing_alone():
            before = connection.principal
            if isinstance(found, Principal) and before and before.subject != found.subject:
                found = NotAuthenticated("the fresh token is another subject's")
            if connection.progress is not Progress.OPEN:
                pass
            elif isinstance(found, NotAuthenticated):
                self._gateway.door.charge_failure(connection, found)
                connection.close(CLOSE_UNAUTHENTICATED, "the token was refused")
            else:
                self._use(connection, message, found)
            connection.hold(-Connection.FORWARDS_IN_FLIGHT)

    def _use(self, connection: Connection, message: Authenticate, principal: Principal) -> None:
        """Go on with a principal; what it may not use any more ends."""
        gateway = self._gateway
        if connection.principal is None:
            gateway.registry.join(connection, gateway.registry.channel(EVERYONE))
        gateway.door.know(connection, principal)
        connection.warned = False
        connection.deadline = math.inf
        self._answer(connection, message, Authenticated(seconds_left(principal)))
        for project_id in tuple(connection.subscriptions | connection.catching_up.keys()):
            if not principal.may_use(project_id):
                gateway.feed.unsubscribe(connection, project_id)
                connection.send(encode(UnsubscriptionConfirmed(project_id)))

    def _forward(self, connection: Connection, message: Forward) -> None:
        queue = queue_of(message)
        message.message_id = message_id = message.message_id or str(uuid.uuid4())
        position = self._position(message.project_id)
        size_bytes = memoryview(message.data).nbytes

        def done(outcome: str | Answer | BadMessage) -> None:
            connection.hold(-1, size_bytes)
            if isinstance(outcome, str):
                outcome = ForwardConfirmed(message_id, outcome, **position)
            self._answer(connection, message, outcome)

        body = AgentMessage(
            type=message.type,
            message_id=message_id,
            project_id=message.project_id,
            data=message.data,
            connection_id=connection.id,
            client_id=message.client_id or connection.id,
            user=connection.principal.subject if connection.principal else None,
            timestamp=timestamp(),
            traceparent=message.traceparent or UNSET,
        )
        self._gateway.forwarder.submit(queue, body, done)
        message.data = Raw(b"null")  # the rest of the message is held no longer
        connection.hold(+1, size_bytes)

    def _position(self, project_id: str | None) -> dict[str, Any]:
        """Where to read a project's log from, for what comes after this moment; no call is made."""
        if project_id is None:
            return {}
        channel = self._gateway.registry.channels.get(project_id)
        cursor = channel.cursor if channel else None
        seq = self._gateway.log.known_seq(project_id) if cursor is None else cursor
        place = {} if seq is None else {"seq": seq, "epoch": self._gateway.log.epoch}
        return {"project_id": project_id, **place}

    def _stop(self, connection: Connection, message: Stop) -> None:
        principal = cast("Principal", connection.principal)
        key = stop_key(message, principal.subject)
        intake, tasks = self._gateway.intake, self._gateway.tasks
        if intake is None:
            raise BadMessage(ErrorCode.UNAVAILABLE, "This gateway takes no answers from agents.")

        def done(refusal: str | None = None) -> None:
            connection.hold(-1)
            answer: Any = StopConfirmed(message.message_id, message.project_id or UNSET)
            if refusal not in (None, ALREADY_STOPPED):
                sentence = f"The stop cannot be written ({refusal})."
                answer = BadMessage(ErrorCode.REJECTED, sentence, retryable=False)
            self._answer(connection, message, answer)

        connection.account.charge(PAGE_PRICE_S, self._gateway.now())
        connection.hold(+1)
        if message.project_id:
            event = Update("stop_requested", message.project_id, in_reply_to=message.message_id)
            now = time.time()
            intake.add(PendingUpdate(event, uuid.uuid4().hex, now, now, stop=key, done=done))
        else:
            tasks.create_task(self._stop_without_project(key, done))

    async def _stop_without_project(self, key: dict[str, Any], done: Callable[[], None]) -> None:
        await self._gateway.log.stop(key)
        done()

    def refuse(
        self, connection: Connection, exc: BadMessage, message: ClientMessage | None = None
    ) -> None:
        """Tell a client what is wrong, and with which of its messages."""
        self._gateway.metrics.protocol_errors += 1
        context = dict(exc.context)
        if message is not None:
            context["action"] = message.__struct_config__.tag
            context["ref"] = ref_of(message)
            for name in ("message_id", "project_id"):
                if value := getattr(message, name, None):
                    context[name] = value
        connection.send(encode(ErrorMessage(str(exc), exc.code, **context)))


class Sweep:
    """Does for all connections what each would need a timer for."""

    TOKEN_WARNING_S = 60.0
    INTERVAL_S = 1.0
    BUSY_EVERY_S = 1.9  # two seconds, less what a sweep may come early
    MESSAGE_TIMEOUT_S = 30.0  # from a message's first byte to its last
    CONNECTIONS_A_TURN = 200  # then everything else has its turn
    PENDING_ERROR = (socket.SOL_SOCKET, socket.SO_ERROR)
    CUT_BY = (errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT)  # other errors of a network may pass

    def __init__(self, gateway: Gateway, settings: Settings) -> None:
        self._gateway = gateway
        self._ping_interval_s = settings.ping_interval_seconds
        self._max_backlog_bytes = settings.max_backlog_bytes

    async def run(self) -> NoReturn:
        gateway, interval_s = self._gateway, min(self.INTERVAL_S, self._ping_interval_s / 4)
        next_line = time.monotonic() + 60
        while True:
            await asyncio.sleep(interval_s)
            for i, connection in enumerate(tuple(gateway.registry.sockets)):
                if i % self.CONNECTIONS_A_TURN == 0:
                    await asyncio.sleep(0)
                self._look_at(connection)
            gateway.ledger.let_go()
            gateway.door.forget_the_quiet(gateway.now())
            if time.monotonic() >= next_line:
                next_line += 60
                metrics_logger.info("metrics", extra=gateway.metrics.line())

    def _look_at(self, connection: Connection) -> None:
        """End a connection that is over, and ping one that is quiet."""
        now = self._gateway.now()
        if connection.progress is not Progress.OPEN:
            # A request waits for its turn no longer than any debt takes.
            may_wait_s = 0.0 if connection.is_read else Account.WINDOW_S
            if connection.deadline + may_wait_s <= now:
                connection.transport.abort()
            return
        late = connection.is_read and connection.deadline <= now
        slow = connection.look(now, self._max_backlog_bytes)
        self._end_session(connection)
        if late:
            connection.close(CLOSE_UNAUTHENTICATED, "no token came in time")
        elif slow:
            self._gateway.metrics.slow_consumers_closed += 1
            connection.close(CloseCode.TRY_AGAIN_LATER, "reading too slowly; resume with since")
        elif connection.is_read:
            self._listen_to(connection, now)
        elif self._pending_error(connection) in self.CUT_BY:
            connection.transport.abort()  # the peer has cut it, unheard as it is not read from
        elif now - connection.said_busy_at >= self.BUSY_EVERY_S and not connection.backlog_bytes:
            # Show that somebody is here, unless it shows by what waits to be written.
            connection.said_busy_at = now
            connection.send(encode(Busy()))

    def _pending_error(self, connection: Connection) -> int:
        raw = connection.transport.get_extra_info("socket")
        return int(raw.getsockopt(*self.PENDING_ERROR))

    def _listen_to(self, connection: Connection, now: float) -> None:
        """Close who does not finish a message, ping who is quiet, drop who does not answer."""
        since = connection.inbox.unfinished_since
        if since and now - since > self.MESSAGE_TIMEOUT_S:
            connection.close(CloseCode.POLICY_VIOLATION, "a message was not finished in time")
        elif now - connection.heard_at < self._ping_interval_s:
            return
        elif connection.pinged_at <= connection.heard_at:
            connection.ping()
        elif connection.backlog_bytes:
            connection.pinged_at = now  # behind all that: whether it moves is what counts
        elif now - connection.pinged_at >= self._ping_interval_s:
            connection.transport.abort()

    def _end_session(self, connection: Connection) -> None:
        """Warn who has a token that is about to expire, and close who has one that did."""
        if connection.principal is None or connection.principal.expires_at == math.inf:
            return
        left_s = connection.principal.expires_at - time.time()
        if left_s <= 0:
            connection.close(CLOSE_UNAUTHENTICATED, "the token has expired")
        elif left_s <= self.TOKEN_WARNING_S + TOKEN_LEEWAY_S and not connection.warned:
            connection.warned = True
            connection.send(encode(TokenExpiring(max(0, int(left_s - TOKEN_LEEWAY_S)))))


class Gateway:
    """One task: its parts, and what they do for one another."""

    MEMORY_BUDGET_MB = 512  # where neither the settings nor the container have a limit

    def __init__(
        self, settings: Settings, tasks: asyncio.TaskGroup, aws: Aws, task_id: str
    ) -> None:
        self._settings = settings
        self.tasks = tasks
        self._aws = aws
        self.now = asyncio.get_running_loop().time
        self.registry = Registry()
        self.metrics = Metrics(settings.environment, self.registry)
        self.turns = Turns()
        budget_mb = settings.memory_budget_mb or self.MEMORY_BUDGET_MB
        self.ledger = Ledger(self.registry, self.metrics, budget_mb * 1_048_576)
        self.metrics.bytes_held = self.ledger.figures
        self.door = Door(self, settings)
        self.metrics.work_owed = self.door.work_owed
        self.messages = Messages(self, settings)
        self.sweep = Sweep(self, settings)
        fan_out = FanOut(self.metrics)
        timeout_s = settings.forward_timeout_seconds
        self.forwarder = Forwarder(tasks, aws.sqs, settings.queue_urls, timeout_s, self.metrics)
        retention_s = settings.event_retention_hours * 3600
        self.log = EventLog(aws.dynamodb, settings.log_table, retention_s, self.metrics)
        self.feed = Feed(tasks, self.log, self.registry, fan_out, self.metrics, self._read_state)
        self.relay = self.intake = None
        if topic_arn := settings.updates_topic_arn:
            heartbeat_s = settings.task_heartbeat_seconds
            self.relay = Relay(tasks, aws.sqs, aws.sns, topic_arn, task_id, heartbeat_s)
        if queue_url := settings.sqs_queue_url_updates:
            may_receive = self.ledger.may_receive
            self.intake = Intake(
                tasks, aws.sqs, queue_url, self.log, self.feed, self.relay, may_receive
            )
        self.ledger.agents_bytes = lambda: sum(
            part.bytes_in_hand for part in (self.intake, self.relay) if part
        )
        self.address: tuple[str, int] = ("", 0)
        self.ready = asyncio.Event()
        spread_s = settings.drain_seconds
        self.drain = Drain(spread_s, self.registry, self.forwarder, self.intake, self.relay)

    async def run(self, own_address: str = "") -> None:
        """Serve until a drain is wanted, and drain.

        Args:
            own_address: by which the load balancer knows this task; ``""`` where there is none.

        Raises:
            UpstreamLost: AWS took away what this task cannot do without.
        """
        where = self._settings.websocket_host, self._settings.websocket_port
        version_6 = ":" in self._settings.websocket_host
        family = socket.AF_INET6 if version_6 else socket.AF_INET
        sock = socket.create_server(where, family=family, dualstack_ipv6=version_6)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):  # the container's memory too
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)  # for all connections
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self),
            sock=sock,
            backlog=4_096,  # a deployment sends everybody back at once
        )
        host, port, *_ = server.sockets[0].getsockname()
        self.address = (host, port)
        logger.info("listening", extra={"host": host, "port": port})
        if self.door.tokens is None:
            logger.warning("AUTH_JWKS_URL is not set: everybody may use every project")
        if not self._settings.allowed_origins:
            logger.warning("ALLOWED_ORIGINS is not set: pages of every origin may connect")
        working = self.tasks.create_task(self._work(own_address))
        await self.drain.wanted.wait()
        await self.drain.run(self.tasks, working)
        metrics_logger.info("metrics", extra=self.metrics.line())
        logger.info("drained")
        server.close()

    async def _work(self, own_address: str) -> None:
        """Open the log, then the fan-out, and only then the doors; go on until it is cancelled."""
        settings, relay, intake = self._settings, self.relay, self.intake
        async with asyncio.TaskGroup() as loops:
            loops.create_task(self.sweep.run())
            if arn := settings.target_group_arn:
                target = {"Id": own_address, "Port": self.address[1]}
                health = TargetHealth(self._aws.elbv2, arn, target, self.metrics)
                loops.create_task(health.begin(self.drain.wanted))
            if tokens := self.door.tokens:
                await tokens.first_keys()
                loops.create_task(tokens.keep_keys())
            await self.log.open()
            await self.feed.open(self.registry.channel(EVERYONE))
            loops.create_task(self.feed.audit(settings.audit_interval_seconds))
            if relay:
                await relay.start()
                loops.create_task(relay.run(self.feed.accept_relayed))
                loops.create_task(relay.heartbeat())
                loops.create_task(relay.look_after())
            if intake:
                self.drain.receiving = loops.create_task(intake.run())
                loops.create_task(intake.keep())
            self.ready.set()
            logger.info("ready", extra={"epoch": self.log.epoch})

    async def _read_state(self, project_id: str) -> Any:
        """The platform's own item of a project as JSON has it; ``None`` if there is none."""
        answer = await self.log.dependency.retry(
            self._aws.dynamodb.get_item,
            TableName=self._settings.dynamodb_table_name,
            Key={"PK": {"S": f"PROJECT#{project_id}"}, "SK": {"S": "METADATA"}},
            ConsistentRead=True,
        )
        plain = TypeDeserializer().deserialize
        item = answer.get("Item")
        return item and {
            name: plain(value) for name, value in item.items() if name not in ("PK", "SK")
        }

    def health(self) -> dict[str, str]:
        """``status`` is ``ok``, or says why the load balancer should send nobody here.

        It is ``starting``, ``draining``, or the part of AWS that fails this task, and then
        ``operation`` is the call that fails.
        """
        if self.drain.wanted.is_set():
            return {"status": "draining"}
        if not self.ready.is_set():
            return {"status": "starting"}
        for part in (self.log, self.relay, self.intake):
            if part and (operation := part.dependency.failing_operation):
                return {"status": part.dependency.name, "operation": operation}
        return {"status": "ok"}

    def forget(self, connection: Connection) -> None:
        """The socket is gone."""
        self.registry.drop(connection)
        self.registry.sockets.discard(connection)
        self.turns.leave(connection)
        self.ledger.forget(connection)
        connection.account.charge(Door.SOCKET_PRICE_S, self.now())
        connection.account.users -= 1
        if connection.opened_at:
            self.door.admission.count(connection.address, -1)
            duration_s = self.now() - connection.opened_at
            close = connection.inbox.protocol.close_sent
            self.metrics.connection_duration.add(duration_s)
            logger.info(
                "connection closed",
                extra={
                    "connection_id": connection.id,
                    "code": close.code if close else CloseCode.ABNORMAL_CLOSURE,
                    "seconds": round(duration_s, 1),
                },
            )


# --- Main -----------------------------------------------------------------------------------
# Environment, logging, signals and exit codes. Knows no rules.


class JsonLines(logging.Formatter):
    """One JSON object a line; what was passed as ``extra`` becomes its fields."""

    ordinary = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
    encode = json.JSONEncoder(default=str).encode  # ASCII: no line steers a terminal

    def fields(self, record: logging.LogRecord) -> dict[str, Any]:
        return {name: value for name, value in record.__dict__.items() if name not in self.ordinary}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": timestamp(record.created),
            "level": record.levelname,
            "message": record.getMessage(),
            **self.fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return self.encode(line)


class PrettyLines(JsonLines):
    """The same for a person at a terminal, whose terminal nobody else may steer."""

    controls = dict.fromkeys({*range(32), *range(127, 160)} - {ord("\n")}, "?")

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value!r}" for name, value in self.fields(record).items())
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        colour = "\x1b[2m" if record.levelno < logging.WARNING else "\x1b[31m"
        text = (record.getMessage() + fields).replace("\n", "?")
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{colour}{clock} {record.levelname:7}\x1b[0m {text.translate(self.controls)}"


def set_up_logging(log_level: str) -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(PrettyLines() if sys.stdout.isatty() else JsonLines())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    # No line says where it was logged; not to look costs less ("Optimization" in logging's docs).
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logger.setLevel(log_level)
    # Metrics are printed whatever the level is, for CloudWatch; people at a terminal need none.
    metrics_logger.setLevel(logging.CRITICAL if sys.stdout.isatty() else logging.INFO)
    # A peer that vanishes in the middle of a write is no news; asyncio warns of each.
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def on_signals(loop: asyncio.AbstractEventLoop, act: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call ``act`` in the loop, on Windows too."""
    names = ("SIGTERM", "SIGINT", "SIGBREAK")  # the last is Windows's
    for number in [getattr(signal, name) for name in names if hasattr(signal, name)]:
        try:
            loop.add_signal_handler(number, act)
        except NotImplementedError:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(act))


def own_id_and_address(metadata_uri: str | None) -> tuple[str, str]:
    """The ECS task's id, or host name and a random part; and its IPv4 address, or ``""``.

    Source: Amazon ECS task metadata endpoint version 4, path ``/task``.
    """
    own_id, address = f"{socket.gethostname()[:20]}-{uuid.uuid4().hex[:8]}", ""
    if metadata_uri:
        try:
            with urlopen(f"{metadata_uri}/task", timeout=5) as answer:  # noqa: S310
                task = json.load(answer)
            own_id = str(task["TaskARN"]).rsplit("/", 1)[-1]
            # In the network mode awsvpc, all containers of a task have its one address.
            address = str(task["Containers"][0]["Networks"][0]["IPv4Addresses"][0])
        except (OSError, ValueError, LookupError, TypeError) as exc:
            logger.warning("the task's metadata cannot be read: %r", exc)
    return own_id, address


def container_limit_mb() -> int | None:
    """The memory limit of the container's cgroup in MiB; ``None`` if there is none.

    Source: the kernel's cgroup-v2.rst (memory.max) and cgroup-v1/memory.rst.
    """
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            limit = int(Path(path).read_text(encoding="ascii"))
            if limit < 2**48:  # where there is none, the file has a larger number, or `max`
                return limit // 1_048_576
    return None


async def serve(settings: Settings) -> None:
    """Run one task until it is told to end."""
    limit_mb = container_limit_mb()
    if settings.memory_budget_mb is None and limit_mb is not None:
        budget_mb = int(limit_mb * MEMORY_BUDGET_SHARE)
        settings = dataclasses.replace(settings, memory_budget_mb=budget_mb)
    metadata_uri = settings.ecs_container_metadata_uri_v4
    task_id, address = await asyncio.to_thread(own_id_and_address, metadata_uri)
    try:
        async with connect(settings.aws_region) as aws, asyncio.TaskGroup() as tasks:
            gateway = Gateway(settings, tasks, aws, task_id)
            on_signals(asyncio.get_running_loop(), gateway.drain.signal)
            await gateway.run(address)
            raise Drained  # and with it ends whatever still waits for AWS
    except* Drained:
        pass


def fastest_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Take uvloop where there is one: connections cost less memory. Windows has none."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


def as_written(default: Any) -> str:
    """A setting's default as an operator would write it; empty where there is none."""
    if default is dataclasses.MISSING:
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return ",".join(default)
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def usage() -> str:
    lines = ["Settings, from the environment:", ""]
    for field in dataclasses.fields(Settings):
        default = as_written(field.default)
        line = f"  {field.name.upper():34} {field.metadata['doc']}"
        lines.append(f"{line} [{default}]" if default else line)
    return "\n".join(lines)


def first_of(exc: BaseException) -> BaseException:
    """What went wrong first, out of the task groups' nested exceptions."""
    while isinstance(exc, BaseExceptionGroup):
        exc = exc.exceptions[0]
    return exc


def sentence_of(exc: BaseException, settings: Settings) -> str:
    """The fault that ends the process, in a sentence that says what to do about it."""
    if isinstance(exc.__cause__ or exc, (NoCredentialsError, PartialCredentialsError)):
        return (
            "There are no AWS credentials. On AWS the task's role gives them; elsewhere log in "
            "with the AWS CLI, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. "
            "To try it without AWS: make run"
        )
    if isinstance(exc, OSError) and exc.errno in (errno.EADDRINUSE, errno.EACCES):
        port = settings.websocket_port
        reason = "in use" if exc.errno == errno.EADDRINUSE else "not for this user to listen on"
        return f"Port {port} is {reason}: end what listens there, or set WEBSOCKET_PORT to another"
    return str(exc)


def main() -> int:
    """Exit codes: 0 drained, 1 something it cannot do without is lost, 2 wrong settings."""
    parser = argparse.ArgumentParser(
        description="The WebSocket gateway of an AI software-development platform.",
        epilog=usage(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args()
    try:
        settings = Settings.from_mapping(os.environ)
    except SettingsError as exc:
        print("The gateway cannot start:", *exc.faults, sep="\n  ", file=sys.stderr)
        print("All settings: python server.py --help", file=sys.stderr)
        return 2
    set_up_logging(settings.log_level)
    for doubt in settings.doubts(os.environ):
        logger.warning("%s", doubt)
    exit_code = 0
    try:
        with asyncio.Runner(loop_factory=fastest_loop()) as runner:
            runner.run(serve(settings))
    # The last are of the SDK's own settings, such as a profile that is not there.
    except* (UpstreamLost, OSError, BotoCoreError) as lost:
        logger.critical("%s", sentence_of(first_of(lost), settings))
        exit_code = 1
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
