"""The tests of server.py: a class a section, in its order, over real sockets on free ports.

AWS comes in two kinds. ``stand_in`` (aws_standin) runs in the test's own event loop, is fast and
fails on command: it serves where calls go wrong. ``moto_aws`` (tests/moto_aws.py) is moto in a
process of its own, somebody else's reading of the documentation: it serves where AWS's own
behaviour matters. Nothing waits for a fixed time: ``eventually`` waits for a condition.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import functools
import hashlib
import hmac
import ipaddress
import itertools
import json
import logging
import math
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
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast
from unittest.mock import AsyncMock, Mock
from urllib.parse import urlencode

import jwt
import msgspec
import pytest
import pytest_asyncio
from aiobotocore.session import AioSession
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    NoCredentialsError,
    ParamValidationError,
    ReadTimeoutError,
)
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as connect_websocket
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri
from websockets.utils import apply_mask

import aws_standin
import server
import tests.moto_aws
from aws_standin import Call, Fault, StandIn, Table, without_aws
from server import (
    EVERYONE,
    AgentMessage,
    Aws,
    BadMessage,
    Channel,
    Chunk,
    Connection,
    ErrorCode,
    Event,
    EventLog,
    EventMessage,
    FanOut,
    Feed,
    Forward,
    Forwarder,
    Gateway,
    Ledger,
    Metrics,
    NotAuthenticated,
    PendingEvent,
    Placement,
    Progress,
    ProjectAppend,
    Receiver,
    Registry,
    Relay,
    RelayedBatch,
    RelayedEvent,
    Sample,
    Settings,
    SettingsError,
    Subscribe,
    UnknownKey,
    UnreadableUpdate,
    Update,
    UpstreamLost,
    decode_message,
    decode_update,
    deflate,
)
from tests.issuer import key_set, public_jwk, running_issuer, token_of
from tests.moto_aws import MotoAws

T = TypeVar("T")
Json = dict[str, Any]
Platform = aws_standin.Platform | tests.moto_aws.Platform

DEADLINE_S = 20.0  # for what takes milliseconds, on a machine with better things to do
hypothesis_settings.register_profile("busy machine", deadline=None)
hypothesis_settings.load_profile("busy machine")


# --- AWS ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def moto_aws() -> Iterator[MotoAws]:
    """The AWS that moto plays, for the whole run."""
    with MotoAws.start() as aws:
        yield aws


@pytest.fixture
async def stand_in() -> AsyncIterator[StandIn]:
    """An AWS of the test's own, whose ``fault`` decides what goes wrong."""
    stand_in = await StandIn().start()
    yield stand_in
    await stand_in.stop()


@pytest.fixture
def platform(stand_in: StandIn) -> aws_standin.Platform:
    """The queues, the topic and the tables that a gateway expects, in the stand-in."""
    return stand_in.create_platform()


prefixes = (f"server{number}" for number in itertools.count(1))


@pytest.fixture(params=["stand-in", "moto"])
def either_platform(request: pytest.FixtureRequest) -> Platform:
    """A platform in the stand-in, and once more one in moto."""
    if request.param == "stand-in":
        return cast("aws_standin.Platform", request.getfixturevalue("platform"))
    aws: MotoAws = request.getfixturevalue("moto_aws")
    return aws.create_platform(prefix=next(prefixes))


@functools.cache
def sdk() -> AioSession:
    """One session for all tests: to read the services' models takes longer than most of them."""
    return AioSession()


@contextlib.asynccontextmanager
async def aws_clients(platform: Platform) -> AsyncIterator[Aws]:
    """server.py's own clients, of ``platform``."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in platform.environment().items():
            patch.setenv(name, value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("no_proxy", "127.0.0.1")
        patch.setattr(server, "AioSession", sdk)
        async with server.connect("us-east-1") as aws:
            yield aws


@pytest.fixture
async def aws(platform: aws_standin.Platform) -> AsyncIterator[Aws]:
    """The clients of the stand-in's platform."""
    async with aws_clients(platform) as clients:
        yield clients


def faults(operation: str, *in_order: Fault) -> Callable[[Call], Fault | None]:
    """One of ``in_order`` for each call of ``operation``, while there are any."""
    left = deque(in_order)
    return lambda call: left.popleft() if left and call.operation == operation else None


def always(operation: str, fault: Fault) -> Callable[[Call], Fault | None]:
    """``fault`` for every call of ``operation``."""
    return lambda call: fault if call.operation == operation else None


CUT_BEFORE = Fault(cut=True)
CUT_AFTER = Fault(cut=True, after_effect=True)
SILENT_AFTER = Fault(silent=True, after_effect=True)
SERVER_ERROR = Fault(status=500)
THROTTLED = Fault(status=400, code="ThrottlingException")
GARBAGE = Fault(garbage=b"<html>not what you asked for</html>")
PASSING_FAULTS = {
    "500": SERVER_ERROR,
    "503": Fault(status=503, code="ServiceUnavailable"),
    "throttled": THROTTLED,
    "cut before": CUT_BEFORE,
    "cut after": CUT_AFTER,
    "garbage": GARBAGE,
}
each_passing_fault = pytest.mark.parametrize("fault", PASSING_FAULTS.values(), ids=PASSING_FAULTS)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come almost at once, and a call that is not answered is given up soon."""
    monkeypatch.setattr(server, "full_jitter_s", lambda _attempt, **_bounds: 0.01)
    monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)


# --- A gateway and its clients --------------------------------------------------------------

REQUIRED = {
    **{
        f"SQS_QUEUE_URL_{agent}": f"https://sqs.us-east-1.amazonaws.com/123456789012/{agent}"
        for agent in ("PM", "DEV", "QA", "OPS")
    },
    "DYNAMODB_TABLE_NAME": "platform-data",
}
"""The settings without which nothing starts, as an environment has them."""

AUTHENTICATION = {
    "AUTH_JWKS_URL": "https://issuer.example/keys",
    "AUTH_ISSUER": "https://issuer.example",
    "AUTH_AUDIENCE": "gateway",
}
"""The settings without which no tokens are looked at."""


def settings(
    platform: Platform | None = None, *, topic: bool = False, **overrides: Any
) -> Settings:
    """Settings for ``platform``, alone or with a topic; ``overrides`` are fields of `Settings`."""
    environment = platform.environment(topic=topic) if platform else REQUIRED
    return dataclasses.replace(Settings.from_mapping(environment), **overrides)


class TestIsOver(Exception):
    """Ends what a test has left running."""

    __test__ = False


@contextlib.asynccontextmanager
async def task_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that does not wait for loops without an end."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
            raise TestIsOver
    except* TestIsOver:
        pass


async def how_it_ends(running: contextlib.AbstractAsyncContextManager[T]) -> str:
    """Wait until something ends by itself; return the sentence with which it does."""
    with pytest.raises(ExceptionGroup) as caught:
        async with running, asyncio.timeout(DEADLINE_S):
            await asyncio.Event().wait()
    first = server.first_of(caught.value)
    assert isinstance(first, UpstreamLost)
    return str(first)


@contextlib.asynccontextmanager
async def running_gateway(
    platform: Platform, task_id: str = "task-1", *, topic: bool = False, **overrides: Any
) -> AsyncIterator[Gateway]:
    """A gateway that is ready, in this event loop; drained at the end, at once or in haste."""
    async with aws_clients(platform) as aws, task_group() as tasks:
        overrides = {"drain_seconds": 0.0, **overrides}
        gateway = Gateway(settings(platform, topic=topic, **overrides), tasks, aws, task_id)
        running = tasks.create_task(gateway.run())
        async with asyncio.timeout(DEADLINE_S):
            await gateway.ready.wait()
        yield gateway
        gateway.drain.wanted.set()
        await asyncio.wait({running}, timeout=0.5)  # it does not wait for its long poll
        gateway.drain.hurry.set()
        await running


class Client:
    """A WebSocket client that speaks JSON.

    Attributes:
        greeting: the `connected` message.
    """

    def __init__(self, socket: ClientConnection, greeting: Json) -> None:
        self.socket = socket
        self.greeting = greeting

    async def send(self, **message: Any) -> None:
        await self.socket.send(json.dumps(message))

    async def receive(self) -> Json:
        async with asyncio.timeout(DEADLINE_S):
            return cast("Json", json.loads(await self.socket.recv()))

    async def ask(self, **message: Any) -> Json:
        """Send a message and return the next one that comes."""
        await self.send(**message)
        return await self.receive()

    async def receive_many(self, count: int) -> list[Json]:
        return [await self.receive() for _ in range(count)]

    async def has_nothing_more(self) -> bool:
        """Whether everything was received: the answer to a ping is the next message."""
        answer = await self.ask(action="ping")
        return answer == {"type": "pong", "timestamp": answer.get("timestamp")}


class Listening(Protocol):
    """Whatever clients can connect to: a gateway here, or one in a process of its own."""

    address: tuple[str, int]


@contextlib.asynccontextmanager
async def client_of(gateway: Listening, path: str = "/ws", **query: Any) -> AsyncIterator[Client]:
    """A client of ``gateway``; ``query`` becomes the URL's, with lists repeated."""
    host, port = gateway.address
    url = f"ws://{host}:{port}{path}" + ("?" + urlencode(query, doseq=True) if query else "")
    async with connect_websocket(url, proxy=None, max_size=None) as socket:
        async with asyncio.timeout(DEADLINE_S):
            greeting = json.loads(await socket.recv())
        yield Client(socket, greeting)


async def eventually(condition: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """Return what ``condition`` returns as soon as that is true.

    Raises:
        TimeoutError: it was not true in time.
    """
    async with asyncio.timeout(deadline_s):
        while not (result := condition()):
            await asyncio.sleep(0.002)
    return result


# --- Without sockets ------------------------------------------------------------------------


class Sink(asyncio.Transport):
    """A transport that keeps what is written, a piece a write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.buffered = 0

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return self.buffered

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass


class Listener(Connection):
    """A connection that is open, and whose socket is a `Sink`."""

    transport: Sink

    def __init__(self, name: str = "listener", *, deflates: bool = False) -> None:
        self.id = name
        self.transport = Sink()
        self.progress = Progress.OPEN
        self.subscriptions: set[str] = set()
        self.catching_up: dict[str, asyncio.Task[None]] = {}
        self.catch_up_turn: asyncio.Lock | None = None
        self.deflates = deflates
        self.choked = False
        self.backlog_bytes = 0
        self.account = server.Account(name, share=0, window_s=0)
        self.closed_with: int | None = None
        self.reads = asyncio.Event()
        self.reads.set()
        self._read = 0
        self._peer = client_protocol(deflates=deflates)
        self._messages: deque[Json] = deque()

    def send(self, payload: bytes) -> None:
        if self.progress is Progress.OPEN:
            self.transport.write(server.frame(payload))

    def recount(self) -> None:
        pass

    def replay(self, chunk: Chunk) -> None:
        if self.progress is Progress.OPEN:
            self.transport.write(chunk.frames(deflated=self.deflates))

    async def drained(self) -> None:
        await self.reads.wait()

    def fail(self, exc: Exception) -> None:
        self.close(CloseCode.INTERNAL_ERROR, type(exc).__name__)

    def close(self, code: int, reason: str = "") -> None:
        assert len(reason.encode()) <= 123  # RFC 6455, section 5.5
        self.progress = Progress.CLOSING
        self.closed_with = code

    @property
    def messages(self) -> deque[Json]:
        """What the client has received; a test takes out what it has looked at."""
        writes, self._read = self.transport.writes[self._read :], len(self.transport.writes)
        self._messages += [json.loads(data) for data in texts(b"".join(writes), self._peer)]
        return self._messages

    def received(self) -> list[Json]:
        """What the client has received since the last call."""
        messages = list(self.messages)
        self._messages.clear()
        return messages

    def seqs(self) -> list[int]:
        """The seqs of what the client has received since the last call: events of the log."""
        return [message["seq"] for message in self.received()]


def client_protocol(*, deflates: bool = False) -> ClientProtocol:
    """The other side of a connection, by the library's own reading of the RFCs."""
    peer = ClientProtocol(parse_uri("ws://localhost/"), state=State.OPEN, max_size=None)
    if deflates:
        peer.extensions = [PerMessageDeflate(True, True, 15, 15)]
    return peer


def texts(data: bytes, peer: ClientProtocol) -> list[bytes]:
    """The text messages that ``peer`` finds in ``data``, which must have nothing else."""
    peer.receive_data(data)
    assert peer.parser_exc is None
    received = [cast("Frame", event) for event in peer.events_received()]
    assert all(each.opcode is Opcode.TEXT and each.fin for each in received)
    return [bytes(each.data) for each in received]


def update(number: int = 0, **fields: Any) -> Update:
    return Update(**{"type": "project_updated", "data": msgspec.Raw(b"%d" % number), **fields})


def event(seq: int | None, project_id: str = "p", size: int = 0) -> Event:
    data = msgspec.Raw(json.dumps("x" * size if size else seq).encode())
    return Event.of(EventMessage("project_updated", project_id, data, seq, "2025-11-24T12:00:00Z"))


def new_metrics() -> Metrics:
    return Metrics("test", Registry())


def new_ledger(metrics: Metrics, budget_bytes: int = 10**9) -> Ledger:
    return Ledger(Registry(), metrics, budget_bytes)


def deny(code: str, status: int = 400, **fields: Any) -> ClientError:
    """An error as the SDK raises it when AWS has answered."""
    metadata = {"HTTPStatusCode": status}
    response: Any = {"Error": {"Code": code}, "ResponseMetadata": metadata, **fields}
    return ClientError(response, "Operation")


# --- Vocabulary -----------------------------------------------------------------------------


class TestVocabulary:
    def test_aliases(self) -> None:
        """Every agent has the aliases that the protocol promises."""
        aliases: dict[str, list[str]] = {}
        for alias, agent in server.QUEUE_OF_TYPE.items():
            aliases.setdefault(agent, []).append(alias)
        assert aliases == {
            "pm": ["pm", "plan", "planning"],
            "dev": ["dev", "code", "develop"],
            "qa": ["qa", "test", "quality"],
            "ops": ["ops", "deploy", "operations"],
        }

    def test_reserved_types(self) -> None:
        """What the server says itself is reserved, so that no agent can say it."""
        own = {
            struct.__struct_config__.tag
            for struct in vars(server).values()
            if isinstance(struct, type)
            and issubclass(struct, msgspec.Struct)
            and struct.__struct_config__.tag_field == "type"
        }
        assert {"connected", "error", "pong", "reconnect"} <= own
        assert own - {"busy"} <= server.RESERVED_TYPES  # which has no project, so tells itself

    def test_a_visibility_timeout_outlasts_its_renewals(self) -> None:
        """An update in hand is held on to more often than its visibility timeout needs."""
        assert server.CALL_TIMEOUT_S + server.Intake.VISIBILITY_S / 4 < server.Intake.VISIBILITY_S

    def test_long_poll_fits_its_timeout(self) -> None:
        """A long poll that returns nothing is no failure."""
        assert server.RECEIVE_TIMEOUT_S > server.LONG_POLL_S


# --- Errors ---------------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize(
        "error",
        [
            deny("ThrottlingException"),
            deny("RequestThrottled"),
            deny("Whatever", status=500),
            deny("Whatever", status=503),
            deny("Whatever", status=429),
            deny("ExpiredToken", status=403),
            ConnectTimeoutError(endpoint_url="http://localhost"),
            ReadTimeoutError(endpoint_url="http://localhost"),
            EndpointConnectionError(endpoint_url="http://localhost"),
            CredentialRetrievalError(provider="test", error_msg="not now"),
            ConnectionResetError(),
            TimeoutError(),
        ],
        ids=repr,
    )
    def test_passing(self, error: Exception) -> None:
        """What AWS calls retryable is retried, and so is silence."""
        assert server.passes(error)
        assert isinstance(error, server.AWS_ERRORS)

    @pytest.mark.parametrize(
        "error",
        [
            deny("AccessDeniedException"),
            deny("ResourceNotFoundException"),
            deny("AWS.SimpleQueueService.NonExistentQueue"),
            deny("ValidationException"),
            ParamValidationError(report="unknown parameter"),
        ],
        ids=repr,
    )
    def test_lasting(self, error: Exception) -> None:
        """What waiting does not change is not retried."""
        assert not server.passes(error)

    def test_error_code(self) -> None:
        """An error is named by AWS's code, and by its class where AWS did not answer."""
        assert server.error_code(deny("SlowDown")) == "SlowDown"
        assert server.error_code(ClientError({}, "Operation")) == "Unknown"
        assert server.error_code(TimeoutError()) == "TimeoutError"

    @given(attempt=st.integers(0, 10_000), base_s=st.floats(0.001, 1), cap_s=st.floats(0.001, 60))
    def test_jitter_bounds(self, attempt: int, base_s: float, cap_s: float) -> None:
        """A retry waits no longer than the doubling bound, and never longer than the cap."""
        wait_s = server.full_jitter_s(attempt, base_s=base_s, cap_s=cap_s)
        assert 0 <= wait_s <= min(cap_s, base_s * 2 ** min(attempt, 30))


# --- Settings -------------------------------------------------------------------------------


class TestSettings:
    def test_defaults(self) -> None:
        """Five settings are enough, and the others have the defaults that are documented."""
        found = Settings.from_mapping(REQUIRED)
        assert found.queue_urls == {
            agent: REQUIRED[f"SQS_QUEUE_URL_{agent.upper()}"]
            for agent in ("pm", "dev", "qa", "ops")
        }
        assert found.log_table == "platform-data"
        assert (found.aws_region, found.websocket_host) == ("us-east-1", "0.0.0.0")
        assert (found.websocket_port, found.max_message_bytes) == (8080, 262_144)
        assert (found.ping_interval_seconds, found.drain_seconds) == (25, 30)
        assert (found.sqs_queue_url_updates, found.updates_topic_arn) == (None, None)
        assert found.compression is True

    def test_all_values(self) -> None:
        """Every setting is read from the variable of its name in capitals."""
        values = {
            **REQUIRED,
            "SQS_QUEUE_URL_UPDATES": "http://127.0.0.1:4100/000000000000/updates.fifo",
            "UPDATES_TOPIC_ARN": "arn:aws:sns:us-east-1:123456789012:events",
            "EVENTS_TABLE_NAME": "events",
            "WEBSOCKET_PORT": "0",
            "COMPRESSION": "Off",
            "LOG_LEVEL": "debug",
            "PING_INTERVAL_SECONDS": "0.5",
            "MAX_MESSAGE_BYTES": " 1024 ",
        }
        found = Settings.from_mapping(values)
        assert found.sqs_queue_url_updates == values["SQS_QUEUE_URL_UPDATES"]
        assert found.updates_topic_arn == values["UPDATES_TOPIC_ARN"]
        assert found.log_table == "events"
        assert (found.websocket_port, found.compression, found.log_level) == (0, False, "DEBUG")
        assert (found.ping_interval_seconds, found.max_message_bytes) == (0.5, 1024)

    def test_faults_come_together(self) -> None:
        """Everything that is missing or wrong is named at once, with its value."""
        values = {**REQUIRED, "WEBSOCKET_PORT": "eighty", "LOG_LEVEL": "LOUD"}
        del values["SQS_QUEUE_URL_QA"]
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping(values)
        missing, port, log_level = caught.value.faults
        assert missing == "SQS_QUEUE_URL_QA is missing: URL of the QA agent's queue, likewise"
        assert port == "WEBSOCKET_PORT must be a whole number from 0 to 65535, not 'eighty'"
        assert log_level == "LOG_LEVEL must be DEBUG, INFO, WARNING or ERROR, not 'LOUD'"

    @pytest.mark.parametrize("name", REQUIRED)
    @pytest.mark.parametrize("blank", ["", "  \n"])
    def test_blank_is_missing(self, name: str, blank: str) -> None:
        """A required setting that is blank is missing."""
        with pytest.raises(SettingsError, match=f"^{name} is missing"):
            Settings.from_mapping({**REQUIRED, name: blank})

    def test_blank_is_the_default(self) -> None:
        """An optional setting that is blank has its default: so templates leave parameters out."""
        values = {**REQUIRED, "UPDATES_TOPIC_ARN": "", "WEBSOCKET_PORT": " "}
        assert Settings.from_mapping(values) == Settings.from_mapping(REQUIRED)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("SQS_QUEUE_URL_PM", "pm-queue"),
            ("SQS_QUEUE_URL_PM", "ftp://sqs/1/pm"),
            ("SQS_QUEUE_URL_PM", "https://"),
            ("SQS_QUEUE_URL_PM", "https://sqs.us-east-1.amazonaws.com/"),
            ("SQS_QUEUE_URL_PM", "http://[::1/queue"),
            ("UPDATES_TOPIC_ARN", "events"),
            ("UPDATES_TOPIC_ARN", "arn:aws:sqs:us-east-1:123456789012:events"),
            ("UPDATES_TOPIC_ARN", "arn:aws:sns:us-east-1:123456789012:events:subscription"),
            ("WEBSOCKET_PORT", "-1"),
            ("WEBSOCKET_PORT", "65536"),
            ("WEBSOCKET_PORT", "1e3"),
            ("MAX_MESSAGE_BYTES", "1023"),
            ("EVENT_RETENTION_HOURS", "9" * 30),
            ("COMPRESSION", "yes"),
            ("PING_INTERVAL_SECONDS", "0"),
            ("PING_INTERVAL_SECONDS", "nan"),
            ("PING_INTERVAL_SECONDS", "inf"),
            ("DRAIN_SECONDS", "120"),
            ("DRAIN_SECONDS", "-0"),
            ("LOG_LEVEL", "TRACE"),
            ("ALLOWED_ORIGINS", "app.example"),
            ("ALLOWED_ORIGINS", "https://app.example/"),
            ("ALLOWED_ORIGINS", "https://app.example, *"),
            ("ALLOWED_ORIGINS", ","),
            ("AUTH_ALGORITHMS", "HS256"),
            ("AUTH_ALGORITHMS", "RS256,none"),
            ("AUTH_ALGORITHMS", ","),
        ],
    )
    def test_wrong_value(self, name: str, value: str) -> None:
        """A value that cannot be is refused by the name of its setting."""
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping({**REQUIRED, **AUTHENTICATION, name: value})
        [fault] = caught.value.faults
        assert fault.startswith(f"{name} ")

    def test_authentication(self) -> None:
        """Who names an issuer's keys has to say for whom its tokens are, too."""
        keys = {**REQUIRED, "AUTH_JWKS_URL": "https://issuer.example/keys"}
        with pytest.raises(SettingsError) as caught:
            Settings.from_mapping(keys)
        assert caught.value.faults == (
            "AUTH_ISSUER is missing: `iss` of the tokens; needed with keys",
            "AUTH_AUDIENCE is missing: whom the tokens are for; needed with keys",
        )
        values = {
            **keys,
            "AUTH_ISSUER": "https://issuer.example",
            "AUTH_AUDIENCE": "gateway",
            "AUTH_ALGORITHMS": "RS256, ES256",
            "ALLOWED_ORIGINS": "https://app.example,http://localhost:3000 ,http://[::1]:8000",
        }
        found = Settings.from_mapping(values)
        assert found.auth_algorithms == ("RS256", "ES256")
        assert found.allowed_origins == (
            "https://app.example",
            "http://localhost:3000",
            "http://[::1]:8000",
        )

    @pytest.mark.parametrize(
        ("url", "allowed"),
        [
            ("https://issuer.example/keys", True),
            ("http://127.0.0.1:4100/keys", True),
            ("http://localhost/keys", True),
            ("http://issuer.example/keys", False),
            ("https://", False),
            ("file:///etc/keys", False),
            ("http://localhost.evil.example/keys", False),
        ],
    )
    def test_keys_url(self, url: str, allowed: bool) -> None:
        """Keys are read over TLS, or from this machine."""
        values = {
            **REQUIRED,
            "AUTH_ISSUER": "https://issuer.example",
            "AUTH_AUDIENCE": "gateway",
            "AUTH_JWKS_URL": url,
        }
        expectation = (
            contextlib.nullcontext() if allowed else pytest.raises(SettingsError, match="https")
        )
        with expectation:
            Settings.from_mapping(values)

    def test_frozen(self) -> None:
        """Settings do not change while the server runs."""
        with pytest.raises(dataclasses.FrozenInstanceError):
            Settings.from_mapping(REQUIRED).websocket_port = 1  # type: ignore[misc]

    def test_every_setting_is_explained(self) -> None:
        """Every setting has a parser and a sentence, from which the documentation is made."""
        for field in dataclasses.fields(Settings):
            assert callable(field.metadata["parse"])
            assert field.metadata["doc"]


# --- Wire -----------------------------------------------------------------------------------

any_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
nearly_a_message = st.fixed_dictionaries(
    {"action": st.sampled_from(["subscribe", "unsubscribe", "forward", "ping"]) | any_json},
    optional={
        name: st.text(max_size=300) | any_json
        for name in ("type", "project_id", "message_id", "since", "epoch", "snapshot", "data")
    },
)
json_space = st.text(" \t\r\n", max_size=3)
SIZES_AT_LIMITS = [0, 1, 124, 125, 126, 127, 65_534, 65_535, 65_536, 65_537, 300_000]


def outcome(payload: bytes) -> server.ClientMessage | BadMessage:
    """What ``payload`` is, or why it is no client message."""
    try:
        return decode_message(payload)
    except BadMessage as exc:
        return exc


def refusal(payload: bytes) -> BadMessage:
    """Why ``payload`` is no client message."""
    exc = outcome(payload)
    assert isinstance(exc, BadMessage)
    return exc


class TestWire:
    @given(payload=st.binary(max_size=400))
    @example(payload=b'{"action":"\xff"}')
    @example(payload=b'{"action":"x","y":"\\ud800"}')
    @example(payload=b'{"action":"x","y":' + b"9" * 5_000 + b"}")
    @example(payload=b"[" * 100_000)
    @example(payload=b'{"action":"forward","type":"pm","data":' + b"[" * 100_000)
    def test_any_bytes(self, payload: bytes) -> None:
        """Whatever bytes come, they are a message or refused with a sentence."""
        assert isinstance(outcome(payload), server.ClientMessage | BadMessage)

    @given(content=any_json | nearly_a_message)
    def test_any_json(self, content: Any) -> None:
        """Whatever JSON comes, it is a message or refused in words for its author."""
        message = outcome(json.dumps(content).encode())
        if isinstance(message, BadMessage):
            assert str(message).endswith(".")
            assert "`" not in str(message)
            assert set(message.context) <= {"action", "message_id", "project_id"}
            assert all(len(value) <= 256 for value in message.context.values())
        else:
            assert message.__struct_config__.tag == content["action"]

    @given(content=any_json, before=json_space, after=json_space, ascii_only=st.booleans())
    def test_forward_keeps_data(
        self, content: Any, before: str, after: str, ascii_only: bool
    ) -> None:
        """The data of a forward come to the agent byte for byte as the client wrote them."""
        data = json.dumps(content, ensure_ascii=ascii_only, indent=len(before))
        sent = f'{{"type":"dev","data":{before}{data}{after},"action":"forward"}}'
        message = decode_message(sent.encode())
        assert isinstance(message, Forward)
        body = AgentMessage("dev", "m1", None, message.data, "c1", "c1", None, "now")
        assert f'"data":{data},'.encode() in msgspec.json.encode(body)

    @pytest.mark.parametrize(
        ("payload", "code", "context"),
        [
            (b"", "invalid_json", {}),
            (b"hello", "invalid_json", {}),
            (b'{"action":"ping","data":NaN}', "invalid_json", {"action": "ping"}),
            (b'{"action":"ping"', "invalid_json", {"action": "ping"}),
            (b'{"action":"ping"} {}', "invalid_json", {"action": "ping"}),
            (b"[]", "invalid_message", {}),
            (b"null", "invalid_message", {}),
            (b"{}", "invalid_message", {}),
            (b'{"project_id":"p"}', "invalid_message", {"project_id": "p"}),
            (b'{"action":"dance"}', "unknown_action", {"action": "dance"}),
            (b'{"action":7,"message_id":"m"}', "unknown_action", {"message_id": "m"}),
            (b'{"action":"subscribe"}', "invalid_field", {"action": "subscribe"}),
            (b'{"action":"subscribe","project_id":""}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":5}', "invalid_field", {"action": "subscribe"}),
            (b'{"action":"subscribe","project_id":"p","since":-1}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":"p","since":1.5}', "invalid_field", None),
            (b'{"action":"subscribe","project_id":"p","since":"1"}', "invalid_field", None),
            (
                b'{"action":"subscribe","project_id":"p","since":9007199254740992}',
                "invalid_field",
                None,
            ),
            (b'{"action":"subscribe","project_id":"p","snapshot":1}', "invalid_field", None),
            (b'{"action":"unsubscribe"}', "invalid_field", None),
            (b'{"action":"forward"}', "invalid_field", None),
            (b'{"action":"forward","type":null}', "invalid_field", None),
            (b'{"action":"forward","type":"pm","message_id":""}', "invalid_field", None),
        ],
    )
    def test_refusals(self, payload: bytes, code: str, context: Json | None) -> None:
        """A message that is wrong is refused with its own code and what it names."""
        exc = refusal(payload)
        assert exc.code == code
        if context is not None:
            assert exc.context == context

    def test_long_ids(self) -> None:
        """An id has at most 256 characters, and a longer one is not echoed."""
        message = {"action": "subscribe", "project_id": "\u00e9" * 256}
        assert isinstance(decode_message(msgspec.json.encode(message)), Subscribe)
        exc = refusal(msgspec.json.encode({"action": "subscribe", "project_id": "x" * 257}))
        assert exc.code is ErrorCode.INVALID_FIELD
        assert exc.context == {"action": "subscribe"}
        assert "project_id" in str(exc)

    def test_unknown_fields(self) -> None:
        """Fields that are not known are ignored."""
        message = decode_message(b'{"action":"subscribe","project_id":"p","colour":[{}]}')
        assert message == Subscribe("p")

    def test_optional_fields_may_be_null(self) -> None:
        """An optional field that is null counts as left out."""
        message = decode_message(b'{"action":"subscribe","project_id":"p","since":null}')
        assert message == Subscribe("p")

    @pytest.mark.parametrize(("alias", "agent"), server.QUEUE_OF_TYPE.items())
    def test_queue_of(self, alias: str, agent: str) -> None:
        """A forward's type names its agent, in capitals too."""
        assert server.queue_of(Forward(alias)) == agent
        assert server.queue_of(Forward(alias.upper())) == agent

    @pytest.mark.parametrize("unknown", ["", "devs", " dev", "design", "\u0130"])
    def test_queue_of_nobody(self, unknown: str) -> None:
        """A forward's type that names no agent is refused, with those that do."""
        with pytest.raises(BadMessage, match="pm, plan, planning, dev") as caught:
            server.queue_of(Forward(unknown))
        assert caught.value.code is ErrorCode.UNKNOWN_TYPE

    @given(payload=st.binary(max_size=200) | st.sampled_from(SIZES_AT_LIMITS).map(bytes))
    @hypothesis_settings(max_examples=60)
    def test_frame(self, payload: bytes) -> None:
        """A frame is what the library reads as one text message."""
        assert texts(server.frame(payload), client_protocol()) == [payload]

    @given(
        payload=st.binary(max_size=200)
        | st.sampled_from(SIZES_AT_LIMITS).map(lambda size: b"ab" * (size // 2) + b"c" * (size % 2))
        | st.sampled_from(SIZES_AT_LIMITS).map(lambda size: random.Random(size).randbytes(size))
    )
    @hypothesis_settings(max_examples=60)
    def test_deflate(self, payload: bytes) -> None:
        """A deflated frame is what the library inflates to the same message, twice over."""
        data = server.frame(server.deflate(payload), 0xC1)
        assert texts(data + data, client_protocol(deflates=True)) == [payload, payload]

    def test_frames_in_a_row(self) -> None:
        """Frames that are joined come apart again."""
        payloads = [bytes(size) for size in SIZES_AT_LIMITS]
        data = b"".join(map(server.frame, payloads))
        assert texts(data, client_protocol()) == payloads

    def test_event_is_deflated_where_that_pays(self) -> None:
        """An event is deflated once, if that makes it smaller."""
        long, short = event(1, size=5_000), event(1)
        noise = Event("p", 1, random.Random(1).randbytes(5_000))
        assert len(long.deflated) < 200
        assert long.deflated is long.deflated
        assert short.deflated is short.frame
        assert noise.deflated is noise.frame

    def test_event_message(self) -> None:
        """Clients get an event's type, project, data, seq and time, and nothing else."""
        assert json.loads(event(7).payload) == {
            "type": "project_updated",
            "project_id": "p",
            "data": 7,
            "seq": 7,
            "timestamp": "2025-11-24T12:00:00Z",
        }
        assert "seq" not in json.loads(event(None).payload)

    def test_timestamp(self) -> None:
        """A timestamp is UTC in ISO 8601, with milliseconds."""
        assert server.timestamp(1_763_985_600) == "2025-11-24T12:00:00.000Z"
        assert server.timestamp(1_763_985_600.0426) == "2025-11-24T12:00:00.042Z"
        assert abs(server.unix_s(server.timestamp()) - time.time()) < 60

    def test_snapshot_numbers_and_sets(self) -> None:
        """DynamoDB's numbers and sets are numbers and arrays in a snapshot."""
        state = {"cost": Decimal("1.50"), "tags": {"b", "a"}, "none": None, "raw": b"\x00"}
        encoded = server.Encoders.snapshot.encode(server.ProjectSnapshot("p", state))
        assert json.loads(encoded)["data"] == {
            "cost": 1.5,
            "tags": ["a", "b"],
            "none": None,
            "raw": "AA==",
        }
        with pytest.raises(TypeError, match="Event"):
            server.Encoders.snapshot.encode(server.ProjectSnapshot("p", event(1)))

    def test_update_defaults(self) -> None:
        """An update needs only a type; without a project it is for everyone."""
        found = decode_update('{"type":"news"}')
        assert (found.project_id, found.event_id, found.connection_id) == (None, None, None)
        assert bytes(found.data) == b"null"
        assert not found.ephemeral

    @given(content=any_json)
    def test_update_keeps_data(self, content: Any) -> None:
        """The data of an update are kept byte for byte as the agent wrote them."""
        data = json.dumps(content)
        assert bytes(decode_update(f'{{"type":"t","data": {data} }}').data) == data.encode()

    @pytest.mark.parametrize(
        "body",
        [
            "",
            "hello",
            "[]",
            "{}",
            '{"type":""}',
            '{"type":5}',
            '{"type":"t","project_id":""}',
            '{"type":"t","project_id":"' + "x" * 257 + '"}',
            '{"type":"t","ephemeral":"yes"}',
            '{"type":"t","event_id":""}',
            '{"type":"t","data":' + "[" * 100_000,
            '{"type":"\ud800"}',
            '{"type":"error"}',
            '{"type":"project_snapshot"}',
            '{"type":"t","data":"' + "x" * server.EVENT_MAX_BYTES + '"}',
        ],
        ids=lambda body: body[:40].encode("ascii", "replace").decode(),
    )
    def test_unreadable_update(self, body: str) -> None:
        """An update that clients could not get is refused."""
        with pytest.raises(UnreadableUpdate):
            decode_update(body)

    def test_largest_update_fits_the_topic(self) -> None:
        """The largest update, under the ids that take most room, is one message of the topic."""
        widest = "\x01" * server.ID_MAX_CHARS  # six bytes each in JSON
        data = '"' + "x" * (server.EVENT_MAX_BYTES - 2) + '"'
        body = {"type": widest, "project_id": widest, "connection_id": widest}
        found = decode_update(json.dumps(body)[:-1] + f',"data":{data}}}')
        message = EventMessage(found.type, widest, found.data, server.SEQ_MAX, server.timestamp())
        payload = msgspec.Raw(Event.of(message).payload)
        carried = RelayedEvent(widest, server.SEQ_MAX, found.connection_id, time.time(), payload)
        carrier = msgspec.json.encode(RelayedBatch("t" * 80, [carried]))
        assert len(carrier) <= server.SNS_MESSAGE_BYTES


# --- Access ---------------------------------------------------------------------------------


def bearer(token: str) -> str:
    """A token as browsers send it: as a subprotocol, in unpadded base64url."""
    return "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


class TestAccess:
    @pytest.mark.parametrize(
        ("forwarded_for", "hops", "address"),
        [
            ([], 1, "10.0.0.1"),
            (["203.0.113.7"], 0, "10.0.0.1"),
            (["203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6, 203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6", "203.0.113.7"], 1, "203.0.113.7"),
            (["6.6.6.6, 203.0.113.7, 198.51.100.1"], 2, "203.0.113.7"),
            (["203.0.113.7"], 5, "203.0.113.7"),
            (["203.0.113.7:4711"], 1, "203.0.113.7"),
            (["2001:db8:1:2:3:4:5:6"], 1, "2001:db8:1:2::/64"),
            (["[2001:db8:1:2::9]:4711"], 1, "2001:db8:1:2::/64"),
            (["[2001:db8:1:2::9]"], 1, "2001:db8:1:2::/64"),
            (["::ffff:203.0.113.7"], 1, "203.0.113.7"),
            (["unknown"], 1, "10.0.0.1"),
            ([""], 1, "10.0.0.1"),
            (["203.0.113.7, "], 1, "10.0.0.1"),
        ],
    )
    def test_client_address(self, forwarded_for: list[str], hops: int, address: str) -> None:
        """Limits apply to the last address that no client can have written."""
        assert server.client_address("10.0.0.1", forwarded_for, hops) == address

    @given(octets=st.lists(st.sampled_from(["0", "00", "7", "10", "99", "249", "256", "", "1\n"])))
    @example(octets=["255", "250", "199", "0"])
    def test_plain_addresses(self, octets: list[str]) -> None:
        """What is taken as an IPv4 address without being parsed is one, in its only spelling."""
        claimed = ".".join(octets)
        try:
            expected = str(ipaddress.IPv4Address(claimed.strip()))
        except ValueError:
            expected = "10.0.0.1"
        assert server.client_address("10.0.0.1", [claimed], 1) == expected

    def test_client_address_of_an_odd_socket(self) -> None:
        """A peer without an address of its own still has limits."""
        assert server.client_address("", [], 1) == ""

    def test_admission_by_address(self) -> None:
        """One address has so many connections, and others are not affected."""
        admission = server.Admission(settings(max_connections_per_ip=2))
        for _ in range(2):
            assert admission.refusal("a", 0.0) is None
            admission.entered("a")
        assert admission.refusal("a", 0.0) == (429, "Too many connections from this address.")
        assert admission.refusal("b", 0.0) is None
        admission.left("a")
        assert admission.refusal("a", 0.0) is None
        admission.left("a")
        assert admission.crowded("a") is None

    def test_admission_in_all(self) -> None:
        """All addresses together have so many connections."""
        admission = server.Admission(settings(max_connections=2))
        for address in "ab":
            admission.entered(address)
        assert admission.refusal("c", 0.0) == (503, "This server is full.")

    def test_admission_rates(self) -> None:
        """Handshakes have a rate, for each address and for all together."""
        limits = settings(max_handshakes_per_second_per_ip=1, max_handshakes_per_second=2)
        admission = server.Admission(limits)
        answers = [admission.refusal("a", 0.0) for _ in range(3)]
        assert answers == [None, None, (429, "Too many connections from this address at once.")]
        answers = [admission.refusal(address, 0.0) for address in "bcd"]
        assert answers == [None, None, (503, "This server is busy.")]
        admission.forget(10.0)
        assert admission.refusal("a", 10.0) is None

    def test_admission_after_failures(self) -> None:
        """An address that fails to authenticate too often has to wait."""
        admission = server.Admission(settings(max_failed_authentications_per_ip=3))
        for _ in range(3):
            assert admission.refusal("a", 0.0) is None
            admission.failed("a", 0.0)
        assert admission.refusal("a", 0.0) == (429, "Too many failed authentications.")
        assert admission.refusal("b", 0.0) is None
        assert admission.refusal("a", 20.1) is None

    @pytest.mark.parametrize(
        ("projects", "project_id", "allowed"),
        [
            (None, "p", True),
            (frozenset("p"), "p", True),
            (frozenset("p"), "q", False),
            (frozenset(), EVERYONE, True),
        ],
    )
    def test_rights(self, projects: frozenset[str] | None, project_id: str, allowed: bool) -> None:
        """A client may use the projects of its token, and hear what is for everyone."""
        principal = server.Principal("me", projects, 0.0)
        assert principal.may_use(project_id) is allowed

    def test_rights_to_speak(self) -> None:
        """Only who may use all projects may have an agent answer everyone."""
        assert server.Principal("me", None, 0.0).may_use(EVERYONE, strictly=True)
        assert not server.Principal("me", frozenset("p"), 0.0).may_use(EVERYONE, strictly=True)

    @pytest.mark.parametrize(
        ("claims", "projects"),
        [
            ({}, set()),
            ({"projects": []}, set()),
            ({"projects": ["p", "q", 5, None]}, {"p", "q"}),
            ({"projects": "p q"}, {"p", "q"}),
            ({"projects": "*"}, None),
            ({"projects": ["p", "*"]}, None),
            ({"projects": {"p": 1}}, set()),
            ({"projects": True}, set()),
        ],
        ids=str,
    )
    def test_projects_in(self, claims: Json, projects: set[str] | None) -> None:
        """A claim grants the projects it lists, in whichever form, and nothing by accident."""
        granted = server.projects_in(claims, "projects")
        assert granted == (None if projects is None else frozenset(projects))

    def test_projects_in_nested_claim(self) -> None:
        """A claim may be nested, or have dots in its name."""
        url = "https://x.example/projects"
        assert server.projects_in({"a": {"b": ["p"]}}, "a.b") == frozenset("p")
        assert server.projects_in({url: ["p"]}, url) == frozenset("p")
        assert server.projects_in({"a": "b"}, "a.b") == frozenset()

    @pytest.mark.parametrize(
        ("headers", "token"),
        [
            ([], None),
            ([("Authorization", "Bearer abc")], "abc"),
            ([("Authorization", "bearer  abc ")], "abc"),
            ([("Authorization", "Basic abc")], None),
            ([("Sec-WebSocket-Protocol", "agenticai.v1")], None),
            ([("Sec-WebSocket-Protocol", f"agenticai.v1, {bearer('a.b.c')}")], "a.b.c"),
            ([("Sec-WebSocket-Protocol", "x"), ("Sec-WebSocket-Protocol", bearer("abcd"))], "abcd"),
            ([("Sec-WebSocket-Protocol", "bearer.!")], ""),
            ([("Sec-WebSocket-Protocol", "bearer.a")], ""),
            ([("Sec-WebSocket-Protocol", "bearer._w")], ""),
        ],
    )
    def test_bearer_token(self, headers: list[tuple[str, str]], token: str | None) -> None:
        """A handshake brings its token in a header or, from browsers, in a subprotocol."""
        assert server.bearer_token(Headers(headers)) == token


class Issuer:
    """Signs tokens, and publishes the keys for them.

    Attributes:
        document: what is read as the key set; an exception is raised.
    """

    def __init__(self, **keys: Any) -> None:
        self.keys = keys
        self.reads = 0
        self.document: bytes | Exception = json.dumps({
            "keys": [
                {**jwt.get_algorithm_by_name(alg(key)).to_jwk(key.public_key(), as_dict=True),
                 "kid": key_id, "alg": alg(key)}
                for key_id, key in keys.items()
            ]
        }).encode()  # fmt: skip

    async def fetch(self) -> bytes:
        self.reads += 1
        await asyncio.sleep(0)
        if isinstance(self.document, Exception):
            raise self.document
        return self.document

    def token(self, key_id: str = "rsa", header: Json | None = None, **changes: Any) -> str:
        """A good token, but for ``changes``; a claim that is ``None`` is left out."""
        claims = {
            "sub": "ada",
            "iss": "https://issuer.example",
            "aud": "gateway",
            "exp": int(time.time()) + 600,
            "projects": ["p"],
            **changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        key = self.keys[key_id]
        return jwt.encode(claims, key, alg(key), headers={"kid": key_id, **(header or {})})


def alg(key: Any) -> str:
    """The algorithm that a private key is for."""
    if isinstance(key, rsa.RSAPrivateKey):
        return "RS256"
    return "ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "EdDSA"


@functools.cache
def rsa_key(number: int) -> rsa.RSAPrivateKey:
    """Keys are dear: tests share them."""
    return rsa.generate_private_key(65_537, 2_048 + 8 * number)


class TestTokens:
    @pytest.fixture
    def issuer(self) -> Issuer:
        return Issuer(rsa=rsa_key(0))

    @pytest.fixture
    def auth(self) -> Settings:
        return settings(
            auth_jwks_url="https://issuer.example/keys",
            auth_issuer="https://issuer.example",
            auth_audience="gateway",
        )

    @pytest.fixture
    async def verifier(self, issuer: Issuer, auth: Settings) -> server.Verifier:
        keys = server.Keys(issuer.fetch, auth.auth_algorithms)
        await keys.read(0.0)
        return server.Verifier(auth, keys)

    async def test_good(self, verifier: server.Verifier, issuer: Issuer) -> None:
        """A good token says whose it is, what it allows, and until when."""
        exp = int(time.time()) + 60
        principal = verifier.verify(issuer.token(exp=exp))
        assert principal.subject == "ada"
        assert principal.projects == frozenset("p")
        assert principal.expires_at == exp + server.TOKEN_LEEWAY_S

    @pytest.mark.parametrize(
        "changes",
        [
            {"exp": 1},
            {"exp": None},
            {"exp": "soon"},
            {"exp": 1e400},
            {"nbf": 2**40},
            {"iss": "https://other.example"},
            {"iss": None},
            {"aud": "other"},
            {"aud": None},
            {"sub": None},
            {"sub": 5},
        ],
        ids=str,
    )
    async def test_bad_claims(
        self, verifier: server.Verifier, issuer: Issuer, changes: Json
    ) -> None:
        """A token that has expired, or is for or from somebody else, is refused."""
        token = issuer.token(**changes)
        with pytest.raises(NotAuthenticated) as caught:
            verifier.verify(token)
        assert not any(part in str(caught.value) for part in token.split("."))

    async def test_forgeries(self, verifier: server.Verifier, issuer: Issuer) -> None:
        """A token that says itself how it is to be checked gets nowhere."""
        good = issuer.token()
        head, body, signature = good.split(".")
        public = issuer.keys["rsa"].public_key()
        pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        none = base64.urlsafe_b64encode(b'{"alg":"none","kid":"rsa"}').decode().rstrip("=")
        as_secret = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"rsa"}').decode().rstrip("=")
        mac = hmac.digest(pem, f"{as_secret}.{body}".encode(), "sha256")
        forged = [
            "",
            "a.b.c",
            f"{none}.{body}.",
            f"{none}.{body}.{signature}",
            f"{head}.{body}.",
            f"{head}.{body}x.{signature}",
            f"{as_secret}.{body}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}",
            Issuer(rsa=rsa_key(1)).token(),
            "\u00e9" * 50,
            "[" * 10_000,
        ]
        for token in forged:
            with pytest.raises(NotAuthenticated):
                verifier.verify(token)
        assert verifier.verify(good).subject == "ada"

    async def test_other_algorithm(self, issuer: Issuer, auth: Settings) -> None:
        """Only the algorithms of the settings count, whatever keys the issuer has."""
        issuer = Issuer(rsa=rsa_key(0), ec=ec.generate_private_key(ec.SECP256R1()))
        keys = server.Keys(issuer.fetch, auth.auth_algorithms)
        await keys.read(0.0)
        with pytest.raises(NotAuthenticated, match="algorithm"):
            server.Verifier(auth, keys).verify(issuer.token("ec"))
        both = dataclasses.replace(auth, auth_algorithms=("RS256", "ES256", "EdDSA"))
        keys = server.Keys(issuer.fetch, both.auth_algorithms)
        await keys.read(0.0)
        assert server.Verifier(both, keys).verify(issuer.token("ec")).subject == "ada"

    async def test_other_audience_claim(
        self, verifier: server.Verifier, issuer: Issuer, auth: Settings
    ) -> None:
        """The audience may be in another claim, as in Cognito's access tokens."""
        auth = dataclasses.replace(auth, auth_audience_claim="client_id")
        cognito = server.Verifier(auth, verifier.keys)
        assert cognito.verify(issuer.token(aud=None, client_id="gateway")).subject == "ada"
        for changes in ({"client_id": "other"}, {"client_id": None}, {"client_id": ["gateway"]}):
            with pytest.raises(NotAuthenticated):
                cognito.verify(issuer.token(**changes))

    async def test_unknown_key(self, verifier: server.Verifier) -> None:
        """A key that is not known is another matter than a bad token: it may be new."""
        with pytest.raises(UnknownKey):
            verifier.verify(Issuer(new=rsa_key(1)).token("new"))

    async def test_no_key_id(self, verifier: server.Verifier, issuer: Issuer) -> None:
        """A token that names no key is checked with the only one there is."""
        claims = jwt.decode(issuer.token(), options={"verify_signature": False})
        assert verifier.verify(jwt.encode(claims, issuer.keys["rsa"], "RS256")).subject == "ada"

    async def test_keys_are_read_once_for_all(self, issuer: Issuer) -> None:
        """Those who ask for the keys at the same time wait for one answer."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        assert not keys
        await asyncio.gather(*(keys.read(0.0) for _ in range(10)))
        assert keys
        assert issuer.reads == 1
        assert not keys.may_read_again(server.Keys.REFRESH_S - 1)
        assert keys.may_read_again(server.Keys.REFRESH_S)

    @pytest.mark.parametrize(
        "document",
        [
            b"",
            b"<html>",
            b"[]",
            b"{}",
            b'{"keys":5}',
            b'{"keys":[]}',
            b'{"keys":[5]}',
            b'{"keys":[{"kty":"RSA","kid":"rsa","n":"AQAB","e":"!"}]}',
            b'{"keys":[{"kty":"oct","kid":"rsa","k":"c2VjcmV0"}]}',
            OSError("unreachable"),
            TimeoutError(),
        ],
        ids=str,
    )
    async def test_last_good_keys_stay(
        self, issuer: Issuer, document: bytes | Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An issuer that answers nonsense, or not at all, does not lock everybody out."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        await keys.read(0.0)
        issuer.document = document
        await keys.read(60.0)
        assert [key.key_id for key in keys.find("rsa", "RS256")] == ["rsa"]
        assert "the issuer's keys could not be read" in caplog.text

    async def test_withdrawn_key(self, issuer: Issuer) -> None:
        """A key that the issuer no longer publishes is honoured no longer."""
        keys = server.Keys(issuer.fetch, ["RS256"])
        await keys.read(0.0)
        issuer.document = Issuer(new=rsa_key(1)).document
        await keys.read(60.0)
        assert [key.key_id for key in keys.find("new", "RS256")] == ["new"]
        with pytest.raises(UnknownKey):
            keys.find("rsa", "RS256")


# --- Registry -------------------------------------------------------------------------------


class TestRegistry:
    def test_unknown_cursor(self) -> None:
        """Before the log was asked, every event is ahead, and the highest is remembered."""
        channel = Channel("p")
        assert channel.place(event(5)) is Placement.GAP
        assert channel.place(event(3)) is Placement.GAP
        assert (channel.cursor, channel.wanted, channel.floor) == (None, 5, 0)

    def test_placement(self) -> None:
        """The next event moves the cursor; an earlier or a later one does not."""
        channel = Channel("p")
        channel.jump(4)
        assert channel.place(event(5)) is Placement.NEXT
        assert channel.place(event(5)) is Placement.DUPLICATE
        assert channel.place(event(1)) is Placement.DUPLICATE
        assert channel.place(event(7)) is Placement.GAP
        assert (channel.cursor, channel.wanted, channel.floor) == (5, 7, 4)

    @given(seqs=st.lists(st.integers(1, 30), max_size=100), sizes=st.randoms(use_true_random=False))
    def test_recent_has_no_hole(self, seqs: list[int], sizes: random.Random) -> None:
        """Whatever comes, the recent events are those up to the cursor, within their bounds."""
        channel = Channel("p")
        channel.jump(0)
        for seq in seqs:
            channel.place(event(seq, size=sizes.choice([10, 1_000, 40_000])))
            recent = [each.seq for each in channel.recent]
            assert recent == list(range(channel.floor + 1, (channel.cursor or 0) + 1))
            assert sum(len(each.payload) for each in channel.recent) <= server.Channel.RECENT_BYTES

    def test_recent_is_bounded(self) -> None:
        """A channel remembers only so many events."""
        channel = Channel("p")
        channel.jump(0)
        for seq in range(1, 1_001):
            assert channel.place(event(seq)) is Placement.NEXT
        assert len(channel.recent) == server.Channel.RECENT_EVENTS
        assert channel.floor == 1_000 - server.Channel.RECENT_EVENTS

    def test_jump_forgets(self) -> None:
        """After a jump, what came before it cannot be had from memory."""
        channel = Channel("p")
        channel.jump(0)
        channel.place(event(1))
        channel.jump(10)
        assert (channel.cursor, channel.floor, list(channel.recent)) == (10, 10, [])
        assert channel.place(event(11)) is Placement.NEXT

    def test_join_and_leave(self) -> None:
        """Listeners with and without compression are kept apart, and each can leave."""
        registry = Registry()
        plain, deflating = Listener("a"), Listener("b", deflates=True)
        channel = registry.channel("p")
        registry.join(plain, channel)
        registry.join(deflating, channel)
        assert (channel.plain, channel.deflating) == ({plain}, {deflating})
        assert list(channel.listeners()) == [plain, deflating]
        assert registry.subscriptions == 2
        registry.leave(plain, "p")
        registry.leave(plain, "p")
        registry.leave(plain, "unheard of")
        assert list(channel.listeners()) == [deflating]
        assert registry.channel("p") is channel

    def test_empty_channels_are_forgotten(self) -> None:
        """The last listener takes the channel along, unless somebody is still catching up."""
        registry = Registry()
        listener = Listener()
        registry.join(listener, registry.channel("p"))
        registry.channel("p").visitors = 1
        registry.leave(listener, "p")
        assert "p" in registry.channels
        registry.channel("p").visitors = 0
        registry.release(registry.channel("p"))
        assert "p" not in registry.channels

    def test_everyones_channel_stays(self) -> None:
        """Everyone's channel outlives its listeners, and is no subscription."""
        registry = Registry()
        listener = Listener()
        registry.join(listener, registry.channel(EVERYONE))
        assert registry.subscriptions == 0
        registry.leave(listener, EVERYONE)
        assert EVERYONE in registry.channels

    def test_drop(self) -> None:
        """A connection that is gone listens to nothing."""
        registry = Registry()
        listener = Listener("a")
        registry.connections["a"] = listener
        for project_id in ("p", "q"):
            registry.join(listener, registry.channel(project_id))
        registry.drop(listener)
        registry.drop(listener)
        assert (registry.connections, registry.channels) == ({}, {})
        assert listener.subscriptions == set()


# --- Fan-out --------------------------------------------------------------------------------


class TestFanOut:
    @pytest.fixture
    def metrics(self) -> Metrics:
        return new_metrics()

    @pytest.fixture
    def fan_out(self, metrics: Metrics) -> FanOut:
        return FanOut(1_000, metrics, new_ledger(metrics))

    @pytest.fixture
    def channel(self) -> Channel:
        return Channel("p")

    async def test_lone_event(self, fan_out: FanOut, channel: Channel) -> None:
        """A lone event is written within the same turn of the loop, not before and not later."""
        listener = Listener()
        channel.plain.add(listener)
        fan_out.push(channel, event(1))
        assert listener.received() == []
        await asyncio.sleep(0)
        assert listener.seqs() == [1]

    async def test_burst(self, fan_out: FanOut, channel: Channel, metrics: Metrics) -> None:
        """What comes in one turn is one write a listener, in order, of the same bytes."""
        listeners = [Listener(), Listener(), Listener("c", deflates=True)]
        channel.plain |= set(listeners[:2])
        channel.deflating.add(listeners[2])
        for seq in range(1, 21):
            fan_out.push(channel, event(seq, size=500))
        await asyncio.sleep(0)
        assert [len(listener.transport.writes) for listener in listeners] == [1, 1, 1]
        assert listeners[0].transport.writes[0] is listeners[1].transport.writes[0]
        assert len(listeners[2].transport.writes[0]) < len(listeners[0].transport.writes[0])
        for listener in listeners:
            assert listener.seqs() == list(range(1, 21))
        assert metrics.events_delivered == 60

    async def test_channels(self, fan_out: FanOut, channel: Channel) -> None:
        """Channels do not mix, and each keeps its own order."""
        other, listeners = Channel("q"), [Listener(), Listener()]
        channel.plain.add(listeners[0])
        other.plain.add(listeners[1])
        for seq in (1, 2, 3):
            fan_out.push(channel, event(seq))
            fan_out.push(other, event(seq, "q"))
        await asyncio.sleep(0)
        for listener, name in zip(listeners, "pq", strict=True):
            received = listener.received()
            assert [(each["project_id"], each["seq"]) for each in received] == [
                (name, seq) for seq in (1, 2, 3)
            ]

    async def test_early_flush(self, fan_out: FanOut, channel: Channel) -> None:
        """What was written before a newcomer joined does not reach it, and nobody else twice."""
        listener, newcomer = Listener(), Listener()
        channel.plain.add(listener)
        fan_out.push(channel, event(1))
        fan_out.flush_channel(channel)
        channel.plain.add(newcomer)
        fan_out.push(channel, event(2))
        await asyncio.sleep(0)
        assert listener.seqs() == [1, 2]
        assert newcomer.seqs() == [2]

    async def test_nobody_listens(
        self, fan_out: FanOut, channel: Channel, metrics: Metrics
    ) -> None:
        """Events of a channel without listeners cost nothing and count as nothing."""
        fan_out.push(channel, event(1))
        await asyncio.sleep(0)
        assert (channel.pending, metrics.events_delivered) == ([], 0)

    @pytest.mark.parametrize(("buffered", "closed"), [(1_000, False), (1_001, True)])
    async def test_slow_reader(
        self, fan_out: FanOut, channel: Channel, metrics: Metrics, buffered: int, closed: bool
    ) -> None:
        """Who has left more unread than the bound is closed with 1013, and the others are not."""
        slow, fast = Listener("slow"), Listener("fast")
        slow.choked, slow.transport.buffered = True, buffered
        channel.plain |= {slow, fast}
        fan_out.push(channel, event(1, size=5_000))
        await asyncio.sleep(0)
        assert slow.closed_with == (CloseCode.TRY_AGAIN_LATER if closed else None)
        assert slow.seqs() == ([] if closed else [1])
        assert (fast.closed_with, fast.seqs()) == (None, [1])
        assert metrics.slow_consumers_closed == closed

    async def test_broken_transport(self, fan_out: FanOut, channel: Channel) -> None:
        """What is wrong with one listener does not keep an event from the others."""

        class Broken(Sink):
            def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
                raise RuntimeError(len(data))

        listeners = [Listener(str(number)) for number in range(5)]
        listeners[2].transport = Broken()
        channel.plain |= set(listeners)
        fan_out.push(channel, event(1))
        await asyncio.sleep(0)
        assert listeners.pop(2).closed_with is not None
        assert [listener.seqs() for listener in listeners] == [[1]] * 4

    async def test_closed_once(self, fan_out: FanOut, metrics: Metrics) -> None:
        """A slow reader that is being closed already is not closed again."""
        slow = Listener()
        for _ in range(2):
            fan_out.give_up(slow)
        assert metrics.slow_consumers_closed == 1

    async def test_latency(self, fan_out: FanOut, channel: Channel, metrics: Metrics) -> None:
        """The latency of an event counts from when its agent sent it, if that is known."""
        channel.plain.add(Listener())
        fan_out.push(channel, Event("p", 1, b"{}", sent_at=time.time() - 1))
        fan_out.push(channel, Event("p", 2, b"{}"))
        await asyncio.sleep(0)
        [latency_ms] = metrics.event_latency.take()
        assert 1_000 <= latency_ms < 10_000


# --- Clients --------------------------------------------------------------------------------


class TestClients:
    async def test_without_credentials(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there are none, the SDK says so."""
        monkeypatch.setattr(AioSession, "get_credentials", AsyncMock(return_value=None))
        async with aws_clients(platform) as aws:
            with pytest.raises(NoCredentialsError):
                await aws.sqs.list_queues()

    @pytest.mark.parametrize("body", [b"[]", b"<html>", b'{"Messages": [', b"\xff{}", b'"{}"'])
    async def test_not_an_answer(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, body: bytes
    ) -> None:
        """An answer that is none of AWS's is an error that passes, and not taken for a success."""
        stand_in.fault = always("TransactWriteItems", Fault(garbage=body))
        item = {"PK": {"S": "a"}, "SK": {"S": "b"}}
        put: Any = {"Put": {"TableName": platform.table_name, "Item": item}}
        with pytest.raises(server.AWS_ERRORS) as caught:
            await aws.dynamodb.transact_write_items(TransactItems=[put])
        assert server.passes(caught.value)

    async def test_errors_are_the_sdks(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """What AWS refuses is raised with all that it says of it."""
        key = {"PK": {"S": "a"}, "SK": {"S": "b"}}
        with pytest.raises(ClientError) as caught:
            await aws.dynamodb.transact_write_items(
                TransactItems=[
                    {
                        "Put": {
                            "TableName": platform.table_name,
                            "Item": key,
                            "ConditionExpression": "attribute_exists(PK)",
                        }
                    }
                ]
            )
        reasons = cast("Any", caught.value.response)["CancellationReasons"]
        assert [reason["Code"] for reason in reasons] == ["ConditionalCheckFailed"]
        with pytest.raises(aws.sqs.exceptions.QueueDoesNotExist):
            await aws.sqs.receive_message(QueueUrl=platform.queue_urls["dev"] + "-not")

    @each_passing_fault
    async def test_one_attempt(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """The SDK asks nobody whether to retry, and does not."""
        stand_in.fault = always("ReceiveMessage", fault)
        with pytest.raises(server.AWS_ERRORS):
            await aws.sqs.receive_message(QueueUrl=platform.queue_urls["dev"])
        assert stand_in.calls["sqs", "ReceiveMessage"] == 1
        for client, service in ((aws.sqs, "sqs"), (aws.sns, "sns"), (aws.dynamodb, "dynamodb")):
            assert await cast("Any", client).meta.events.emit(f"needs-retry.{service}.Any") == []


# --- Forwarder ------------------------------------------------------------------------------


class Desk:
    """Submits forwards and keeps what becomes of each, by message id."""

    def __init__(self, tasks: asyncio.TaskGroup, aws: Aws, timeout_s: float, **urls: str) -> None:
        self.metrics = new_metrics()
        self.forwarder = Forwarder(tasks, aws.sqs, urls, timeout_s, self.metrics)
        self.outcomes: dict[str, list[str | BadMessage]] = {}

    def submit(
        self,
        message_id: str,
        queue: str = "dev",
        data: bytes = b"1",
        project_id: str | None = "p",
        user: str | None = None,
        client_id: str = "c1",
    ) -> None:
        raw, now = msgspec.Raw(data), server.timestamp()
        message = AgentMessage(queue, message_id, project_id, raw, "c1", client_id, user, now)
        settled = self.outcomes[message_id] = []

        def done(sqs_message_id: str | None, error: BadMessage | None) -> None:
            settled.append(error or sqs_message_id or "neither an id nor an error")

        self.forwarder.submit(queue, message, done)

    def submit_many(self, count: int, **fields: Any) -> list[str]:
        message_ids = [f"m{number:03}" for number in range(count)]
        for message_id in message_ids:
            self.submit(message_id, **fields)
        return message_ids

    async def settled(self) -> dict[str, str | BadMessage]:
        """What became of every forward, each of which is settled once."""
        async with asyncio.timeout(DEADLINE_S):
            await self.forwarder.idle()
        assert {len(settled) for settled in self.outcomes.values()} <= {1}
        return {message_id: settled[0] for message_id, settled in self.outcomes.items()}

    async def codes(self) -> dict[str, str]:
        """The error code of every forward that failed."""
        settled = await self.settled()
        return {key: str(exc.code) for key, exc in settled.items() if isinstance(exc, BadMessage)}


@contextlib.asynccontextmanager
async def desk_of(platform: Platform, aws: Aws, timeout_s: float = 10.0) -> AsyncIterator[Desk]:
    """A desk for the queues of ``platform``."""
    async with task_group() as tasks:
        yield Desk(tasks, aws, timeout_s, **platform.queue_urls)


def sent_ids(stand_in: StandIn, queue: str = "agenticai-dev-queue") -> list[str]:
    """The message ids in an agent's queue, in order of sending."""
    return [json.loads(body)["message_id"] for body in stand_in.queues[queue].bodies]


class TestBatcher:
    async def test_full_batches_do_not_linger(self) -> None:
        """A backlog of more than all calls can hold goes out as fast as they return."""
        sent: list[int] = []

        async def send(batch: list[int]) -> None:
            await asyncio.sleep(0)
            sent.extend(batch)

        async with task_group() as tasks:
            batcher = server.Batcher(tasks, send, linger_s=3_600.0)
            for number in range(500):
                batcher.add(number)
            async with asyncio.timeout(DEADLINE_S):
                await batcher.idle()
        assert sorted(sent) == list(range(500))

    async def test_lingering_begins_anew(self) -> None:
        """Who comes after a full batch lingers for as long as anybody, and goes in the end."""
        sent: list[list[int]] = []

        async def send(batch: list[int]) -> None:
            sent.append(batch)

        async with task_group() as tasks:
            batcher = server.Batcher(tasks, send, linger_s=0.2)
            began_at = time.monotonic()
            for number in range(10):
                batcher.add(number)
            await asyncio.sleep(0.1)
            batcher.add(10)
            await batcher.idle()
            assert time.monotonic() - began_at >= 0.1 + 0.2 - 0.02
        assert sent == [list(range(10)), [10]]


class TestForwarder:
    async def test_confirmed(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A forward is confirmed with the id that SQS gave the message in the queue."""
        async with desk_of(platform, aws) as desk:
            desk.submit("m1", data=b'{ "spaced" :1.0}')
            settled = await desk.settled()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert settled == {"m1": message.message_id}
        assert message.body.startswith('{"action":"forward","type":"dev","message_id":"m1",')
        sent = '"data":{ "spaced" :1.0},"connection_id":"c1","client_id":"c1","user":null,'
        assert sent in message.body
        assert message.attributes["MessageType"]["StringValue"] == "dev"
        sent_at = json.loads(message.body)["timestamp"]
        assert message.attributes["Timestamp"]["StringValue"] == sent_at
        assert (desk.metrics.messages_forwarded, desk.metrics.forward_errors) == (1, 0)

    async def test_on_moto(self, moto_aws: MotoAws) -> None:
        """A batch arrives whole in a queue of somebody else's making."""
        platform = moto_aws.create_platform(prefix=next(prefixes))
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(11, data='{"caf\u00e9":[1.50]}'.encode())
            settled = await desk.settled()
        received: dict[str, str] = {}
        while len(received) < 11:
            answer = await asyncio.to_thread(
                platform.client("sqs").receive_message,
                QueueUrl=platform.queue_urls["dev"],
                MaxNumberOfMessages=10,
                MessageAttributeNames=["All"],
            )
            for message in answer["Messages"]:
                assert '"data":{"caf\u00e9":[1.50]},' in message["Body"]
                assert set(message["MessageAttributes"]) == {"MessageType", "Timestamp"}
                received[json.loads(message["Body"])["message_id"]] = message["MessageId"]
        assert received == settled
        assert set(received) == set(message_ids)

    async def test_batches(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A lone forward goes at once, and what comes while a call is under way goes together."""
        stand_in.fault = always("SendMessageBatch", Fault(delay_s=0.05))
        async with desk_of(platform, aws) as desk:
            desk.submit("first")
            await eventually(lambda: stand_in.calls["sqs", "SendMessageBatch"])
            message_ids = desk.submit_many(25)
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == ["first", *message_ids]
        assert stand_in.calls["sqs", "SendMessageBatch"] == 4  # 1 + 10 + 10 + 5

    async def test_batch_bytes(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A batch never exceeds SQS's megabyte."""
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(12, data=b'"%s"' % (b"x" * 400_000))
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == message_ids

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_passing_fault(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """A call that fails in passing is made again, and every forward confirmed."""
        stand_in.fault = faults("SendMessageBatch", fault, fault, fault)
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(15)
            assert await desk.codes() == {}
        assert set(sent_ids(stand_in)) == set(message_ids)

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"null",
            b"[]",
            b"{}",
            b'{"Successful":5}',
            b'{"Successful":[{"Id":"0"}]}',
            b'{"Successful":[{"MessageId":"x"}]}',
            b'{"Successful":[null]}',
            b'{"Failed":[{"Code":"x"}]}',
            b'{"Failed":["0"]}',
            b'{"Successful":[{"Id":"0","MessageId":""}]}',
            b'{"Successful":[{"Id":"99","MessageId":"x"}]}',
            b"\xff\xfe",
        ],
    )
    @pytest.mark.usefixtures("impatient")
    async def test_answer_of_no_use(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, answer: bytes
    ) -> None:
        """An answer that does not say what became of a message confirms nothing."""
        stand_in.fault = faults("SendMessageBatch", Fault(garbage=answer))
        async with desk_of(platform, aws) as desk:
            desk.submit("m1")
            settled = await desk.settled()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert settled == {"m1": message.message_id}

    @pytest.mark.usefixtures("impatient")
    async def test_partial_failure(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """Of a batch, what SQS could not take is retried and what it would not take refused."""
        stand_in.fault = faults(
            "SendMessageBatch", Fault(failed={0: True, 3: False, 4: True, 9: False})
        )
        async with desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(11)
            codes = await desk.codes()
        assert codes == {"m000": "rejected", "m004": "rejected"}
        assert sorted(sent_ids(stand_in)) == [each for each in message_ids if each not in codes]
        assert (desk.metrics.messages_forwarded, desk.metrics.forward_errors) == (9, 2)

    @pytest.mark.usefixtures("impatient")
    async def test_one_bad_entry(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """One message that makes SQS refuse the whole batch does not take the others along."""

        def fault(call: Call) -> Fault | None:
            if "poison" in str(call.request.get("Entries")):
                return Fault(status=400, code="InvalidMessageContents")
            return None

        stand_in.fault = fault
        async with desk_of(platform, aws) as desk:
            for number in range(21):
                desk.submit(f"m{number:03}", data=b'"poison"' if number == 13 else b"1")
            settled = await desk.settled()
        error = settled.pop("m013")
        assert isinstance(error, BadMessage)
        assert (error.code, error.context) == (ErrorCode.REJECTED, {"retryable": False})
        assert sorted(sent_ids(stand_in)) == sorted(settled)
        assert not any(isinstance(each, BadMessage) for each in settled.values())

    async def test_no_answer(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A queue that never answers is an error within the deadline.

        It is another one for messages that may have arrived than for those that waited in vain.
        """
        stand_in.fault = always("SendMessageBatch", SILENT_AFTER)
        async with desk_of(platform, aws, timeout_s=0.5) as desk:
            started_at = time.monotonic()
            desk.submit_many(29)
            codes = await desk.codes()
            took_s = time.monotonic() - started_at
        assert Counter(codes.values()) == {"timeout": 20, "unavailable": 9}
        assert took_s < 5

    @pytest.mark.parametrize(
        "fault", [THROTTLED, Fault(status=429, code="Slow")], ids=["throttled", "429"]
    )
    async def test_throttled_to_the_end(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn, fault: Fault
    ) -> None:
        """A queue that takes nothing is an error within the deadline, and worth another try."""
        stand_in.fault = always("SendMessageBatch", fault)
        async with desk_of(platform, aws, timeout_s=0.3) as desk:
            desk.submit_many(11)
            settled = await desk.settled()
        assert sent_ids(stand_in) == []
        for error in settled.values():
            assert isinstance(error, BadMessage)
            assert error.code in (ErrorCode.UNAVAILABLE, ErrorCode.TIMEOUT)
            assert error.context == {"retryable": True}

    async def test_unreachable(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """An SQS that cannot be reached is an error within the deadline."""
        await stand_in.stop()
        async with desk_of(platform, aws, timeout_s=0.3) as desk:
            desk.submit_many(11)
            codes = await desk.codes()
        assert len(codes) == 11
        assert set(codes.values()) <= {"unavailable", "timeout"}
        assert desk.metrics.forward_errors == 11

    async def test_back_in_time(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """An outage shorter than the deadline costs nothing but time."""
        port = int(stand_in.endpoint_url.rpartition(":")[2])
        await stand_in.stop()
        async with desk_of(platform, aws, timeout_s=DEADLINE_S) as desk:
            message_ids = desk.submit_many(25)
            await asyncio.sleep(0)
            await stand_in.start(port)
            assert await desk.codes() == {}
        assert sorted(sent_ids(stand_in)) == message_ids

    async def test_queues_do_not_share_troubles(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A queue that is down, and one that is gone, leave the others alone."""

        def fault(call: Call) -> Fault | None:
            return SERVER_ERROR if "pm" in call.request.get("QueueUrl", "") else None

        stand_in.fault = fault
        del stand_in.queues["agenticai-qa-queue"]
        async with desk_of(platform, aws, timeout_s=2.0) as desk:
            for number in range(12):
                for agent in ("pm", "dev", "qa", "ops"):
                    desk.submit(f"{agent}{number}", queue=agent)
            codes = await desk.codes()
        assert Counter(key.rstrip("0123456789") for key in codes) == {"pm": 12, "qa": 12}
        assert {code for key, code in codes.items() if "qa" in key} == {"rejected"}

    async def test_overloaded(
        self,
        platform: aws_standin.Platform,
        aws: Aws,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Beyond the bound a forward is refused at once, until there is room again."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING", 20)
        stand_in.fault = always("SendMessageBatch", Fault(delay_s=0.05))
        async with desk_of(platform, aws) as desk:
            desk.submit_many(20)
            with pytest.raises(BadMessage, match="Too many") as caught:
                desk.submit("one too many")
            assert caught.value.code is ErrorCode.OVERLOADED
            assert caught.value.context == {"retryable": True}
            assert desk.outcomes.pop("one too many") == []
            assert await desk.codes() == {}
            desk.submit("in time")
            assert await desk.codes() == {}
        assert len(sent_ids(stand_in)) == 21

    async def test_overloaded_bytes(
        self, platform: aws_standin.Platform, aws: Aws, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What waits is bounded in bytes as well."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING_BYTES", 10_000)
        async with desk_of(platform, aws) as desk:
            desk.submit("m1", data=b'"%s"' % (b"x" * 9_000))
            with pytest.raises(BadMessage, match="Too many"):
                desk.submit("m2", data=b'"%s"' % (b"x" * 1_000))
            del desk.outcomes["m2"]
            desk.submit("m3")
            assert await desk.codes() == {}

    async def test_too_large(
        self, platform: aws_standin.Platform, aws: Aws, stand_in: StandIn
    ) -> None:
        """A message that is too large for SQS is refused; one byte less is taken."""
        async with desk_of(platform, aws) as desk:
            desk.submit("m1")
            await desk.settled()
            [message] = stand_in.queues["agenticai-dev-queue"].messages
            attributes = aws_standin.model.attributes_bytes(message.attributes)
            room = 1_048_576 - (len(message.body) - 1) - attributes
            with pytest.raises(BadMessage, match="1048576 bytes") as caught:
                desk.submit("m2", data=b'"%s"' % (b"x" * (room - 1)))
            assert caught.value.code is ErrorCode.TOO_LARGE
            del desk.outcomes["m2"]
            desk.submit("m2", data=b'"%s"' % (b"x" * (room - 2)))
            assert await desk.codes() == {}

    @pytest.mark.parametrize("character", ["\uffff", "\ufffe"])
    async def test_character(
        self, platform: aws_standin.Platform, aws: Aws, character: str
    ) -> None:
        """A character that SQS refuses is named; one beside it passes."""
        async with desk_of(platform, aws) as desk:
            with pytest.raises(BadMessage, match=f"U\\+{ord(character):04X}") as caught:
                desk.submit("m1", data=f'"{character}"'.encode())
            assert caught.value.code is ErrorCode.INVALID_CHARACTER
            del desk.outcomes["m1"]
            desk.submit("m2", data='"\t\ufffd\ud7ff\ue000\U0010ffff\x7f"'.encode())
            assert await desk.codes() == {}

    async def test_process_is_ending(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """A forward that comes while the process ends for another reason does not hide that."""

        async def ending() -> None:
            async with asyncio.TaskGroup() as tasks:
                desk = Desk(tasks, aws, 10.0, **platform.queue_urls)
                asyncio.get_running_loop().call_soon(desk.submit, "m1")
                raise UpstreamLost("event log: gone")

        with pytest.RaisesGroup(UpstreamLost):
            await ending()
        await asyncio.sleep(0)

    async def test_idle_when_nothing_waits(self, platform: aws_standin.Platform, aws: Aws) -> None:
        """A forwarder without work is idle."""
        async with desk_of(platform, aws) as desk:
            assert await desk.settled() == {}

    async def test_fifo_groups(self, stand_in: StandIn) -> None:
        """A FIFO queue keeps a project's messages in order, or else a connection's."""
        platform = fifo_platform(stand_in)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            desk.submit("m1", project_id="p")
            desk.submit("m2", project_id=None)
            desk.submit("m 3", project_id="caf\u00e9 " * 40)  # as SQS would not take it
            assert await desk.codes() == {}
        groups = [message.group for message in stand_in.queues["dev.fifo"].messages]
        hashed = hashlib.sha256(("caf\u00e9 " * 40).encode()).hexdigest()
        assert groups == ["p", "c1", hashed]

    async def test_fifo_duplicates(self, stand_in: StandIn) -> None:
        """A message sent again is one message; two clients who count alike have two."""
        platform = fifo_platform(stand_in)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            for user, project_id in (("ada", "p"), ("ada", "p"), ("bob", "p"), ("ada", "q")):
                desk.submit("m1", user=user, project_id=project_id)
                assert await desk.codes() == {}
        assert sent_ids(stand_in, "dev.fifo") == ["m1"] * 3

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_fifo_keeps_order(self, stand_in: StandIn, fault: Fault) -> None:
        """Whatever passing fault a call meets, a FIFO queue has every message once, in order."""
        platform = fifo_platform(stand_in)
        slow = Fault(delay_s=0.01)
        stand_in.fault = faults("SendMessageBatch", slow, fault, slow, fault, fault)
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(60)
            assert await desk.codes() == {}
        assert sent_ids(stand_in, "dev.fifo") == message_ids

    @pytest.mark.usefixtures("impatient")
    async def test_fifo_takes_a_part(self, stand_in: StandIn) -> None:
        """What a FIFO queue could not take is retried before anything that came later is sent."""
        platform = fifo_platform(stand_in)
        stand_in.fault = faults("SendMessageBatch", Fault(failed={0: False, 4: False}))
        async with aws_clients(platform) as aws, desk_of(platform, aws) as desk:
            message_ids = desk.submit_many(20)
            assert await desk.codes() == {}
        sent = sent_ids(stand_in, "dev.fifo")
        assert (sorted(sent[:10]), sent[10:]) == (message_ids[:10], message_ids[10:])

    async def test_ten_thousand(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Of 10,000 forwards through a faulty SQS none is lost in silence.

        Every one that is confirmed is in its queue, every other one is answered with an error.
        """
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 1.0)
        caplog.set_level("ERROR", "gateway")
        chance = random.Random(10_000)
        stand_in.fault = lambda call: (
            random_fault(chance) if call.operation == "SendMessageBatch" else None
        )
        answers: dict[str, list[Json]] = {}
        async with (
            running_gateway(platform, forward_timeout_seconds=8.0, compression=False) as gateway,
            asyncio.timeout(60),
            asyncio.TaskGroup() as clients,
        ):
            for number in range(50):
                clients.create_task(forward_many(gateway, f"c{number}", 200, answers))
        queued = {
            json.loads(body)["message_id"]: json.loads(body)["data"]
            for agent in ("pm", "dev", "qa", "ops")
            for body in stand_in.queues[f"agenticai-{agent}-queue"].bodies
        }
        assert len(answers) == 10_000
        confirmed = 0
        for message_id, (answer,) in answers.items():
            if answer["type"] == "forward_confirmed":
                confirmed += 1
                assert queued[message_id] == data_of(message_id)
            else:
                assert answer["code"] in ("timeout", "unavailable", "rejected", "overloaded")
        assert 5_000 < confirmed < 10_000  # faults are met, and are not all that is met


def fifo_platform(stand_in: StandIn) -> aws_standin.Platform:
    """A platform whose queue of the Dev agent is a FIFO queue."""
    platform = stand_in.create_platform()
    stand_in.sqs.create("dev.fifo", {"FifoQueue": "true"})
    names = {**platform.queue_names, "dev": "dev.fifo"}
    return dataclasses.replace(platform, queue_names=names)


def random_fault(chance: random.Random) -> Fault:
    """What a bad day of SQS has for one SendMessageBatch."""
    delay_s = chance.random() ** 4 / 4
    failed = {index: chance.random() < 0.3 for index in range(10) if chance.random() < 0.1}
    match chance.randrange(10):
        case 0:
            return Fault(delay_s=delay_s, status=500, after_effect=chance.random() < 0.5)
        case 1:
            return Fault(delay_s=delay_s, cut=True, after_effect=chance.random() < 0.5)
        case 2 | 3:
            return Fault(delay_s=delay_s, failed=failed)
        case 4 if chance.random() < 0.02:
            return Fault(silent=True)
    return Fault(delay_s=delay_s)


def data_of(message_id: str) -> str:
    """Up to 20 kB that depend on nothing but the message id."""
    return message_id * int(20_000 / len(message_id) * random.Random(message_id).random() ** 12)


async def forward_many(
    gateway: Gateway, name: str, count: int, answers: dict[str, list[Json]]
) -> None:
    """Forward messages over one connection, with 80 at a time unanswered; collect the answers."""
    message_ids = [f"{name}-{number}" for number in range(count)]
    answers.update((message_id, []) for message_id in message_ids)
    room = asyncio.Semaphore(80)
    async with client_of(gateway) as client:

        async def send() -> None:
            for message_id in message_ids:
                await room.acquire()
                agent = random.Random(message_id).choice(("pm", "dev", "qa", "ops"))
                await client.send(
                    action="forward", type=agent, message_id=message_id, data=data_of(message_id)
                )

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            for _ in range(count):
                answer = await client.receive()
                answers[answer["message_id"]].append(answer)
                room.release()
        assert await client.has_nothing_more()


# --- Event log ------------------------------------------------------------------------------


def entry(
    number: int,
    event_id: str = "",
    look_back_to: float = math.inf,
    size: int = 0,
    project_id: str = "p",
) -> PendingEvent:
    """An update that carries ``number``, or ``size`` bytes, and has never been here before."""
    data = msgspec.Raw(b'"%s"' % (b"x" * size)) if size else msgspec.Raw(b"%d" % number)
    found = Update("project_updated", project_id, data)
    return PendingEvent(found, event_id or f"id{number}", look_back_to, 0.0)


def entries(*numbers: int, **fields: Any) -> list[PendingEvent]:
    return [entry(number, **fields) for number in numbers]


def seqs(events: Sequence[Event]) -> list[int | None]:
    return [event.seq for event in events]


def places(appended: Sequence[PendingEvent]) -> list[int | None]:
    """The seqs that entries have in the log."""
    return seqs([event for each in appended if (event := each.event)])


async def whole_log(log: EventLog, project_id: str = "p", after: int = 0) -> list[tuple[int, Any]]:
    """Seq and data of everything in a project's log, read page by page."""
    found: list[tuple[int, Any]] = []
    while page := await log.read(project_id, found[-1][0] if found else after):
        found += [(cast("int", each.seq), json.loads(each.payload)["data"]) for each in page]
    return found


async def append(log: EventLog, project_id: str, pending: Sequence[PendingEvent]) -> list[Event]:
    """Append to one project's log, as often as it takes; return what was met on the way."""
    append = ProjectAppend(project_id, pending)
    groups = [[append]]
    while groups:
        groups = [left for group in groups for left in await log.append(group)]
    return append.others


async def append_all(log: EventLog, batches: Sequence[Sequence[PendingEvent]]) -> list[Event]:
    """Append batch after batch; return what was met on the way."""
    return [event for batch in batches for event in await append(log, "p", batch)]


class LogKit:
    """Makes event logs of one table: another one is what another task, or a new one, has."""

    def __init__(self, aws: Aws, platform: Platform) -> None:
        self._aws = aws
        self.table = platform.events_table_name
        self.metrics = Metrics("test", Registry())

    def log(self, retention_s: int = 3_600) -> EventLog:
        return EventLog(self._aws.dynamodb, self.table, retention_s, self.metrics)


class TestEventLog:
    @pytest.fixture
    async def either(self, either_platform: Platform) -> AsyncIterator[LogKit]:
        """A table in the stand-in, and once more one in moto."""
        async with aws_clients(either_platform) as aws:
            yield LogKit(aws, either_platform)

    @pytest.fixture
    def kit(self, aws: Aws, platform: aws_standin.Platform) -> LogKit:
        """A table in the stand-in."""
        return LogKit(aws, platform)

    @pytest.fixture
    def log(self, kit: LogKit) -> EventLog:
        return kit.log()

    async def test_append_and_read(self, either: LogKit) -> None:
        """What is appended has the next numbers, and is read back as clients get it."""
        log = either.log()
        assert (await log.head("p"), await log.read("p", 0)) == (0, [])
        first, second = entries(1, 2), entries(3)
        assert await append_all(log, [first, second]) == []
        assert (places(first), places(second)) == ([1, 2], [3])
        found = await log.read("p", 0)
        assert seqs(found) == [1, 2, 3]
        assert [each.payload for each in found] == [
            each.event.payload for each in (*first, *second) if each.event
        ]
        assert seqs(await log.read("p", 2)) == [3]
        assert (await log.head("p"), await log.read("p", 3)) == (3, [])
        assert await log.head("other") == 0

    async def test_data_come_back_as_sent(self, log: EventLog) -> None:
        """Data are kept byte for byte."""
        data = '{ "caf\u00e9": [1.50, 1e2], "\\u00e9":"\U0001f600\\n" }'.encode()
        found = Update("t", "p", msgspec.Raw(data))
        await append(log, "p", [PendingEvent(found, "e", math.inf, 0.0)])
        [read] = await log.read("p", 0)
        assert b'"data":' + data + b"," in read.payload

    async def test_projects_are_apart(self, log: EventLog) -> None:
        """Every project has numbers of its own, also one that is the start of another's name."""
        for project_id in ("p", "p1", "*", "caf\u00e9 #|"):
            appended = entries(1)
            await append(log, project_id, appended)
            assert places(appended) == [1]
            assert await whole_log(log, project_id) == [(1, 1)]

    async def test_heads(self, either: LogKit) -> None:
        """The heads of many projects are read a hundred a call; an empty log has none."""
        log = either.log()
        for number in (1, 2, 3):
            await append(log, f"p{number}", entries(*range(number)))
        heads = await log.heads([f"p{number}" for number in range(150)])
        assert heads == {"p1": 1, "p2": 2, "p3": 3}
        assert await log.heads([]) == {}

    async def test_heads_left_out(self, log: EventLog, stand_in: StandIn) -> None:
        """Heads that DynamoDB has left out of its answer are asked for again."""
        names = [f"p{number}" for number in range(5)]
        for name in names:
            await append(log, name, entries(1))
        stand_in.fault = faults("BatchGetItem", Fault(failed={0: True, 3: True, 4: True}))
        assert await log.heads(names) == dict.fromkeys(names, 1)

    async def test_two_tasks_race(self, either: LogKit) -> None:
        """Two tasks that append at once have every number once, without a hole.

        Each meets what the other has written in between.
        """
        logs = [either.log(), either.log()]
        batches = [
            [entries(*range(start, start + 3)) for start in range(base, base + 30, 3)]
            for base in (0, 100)
        ]
        met = await asyncio.gather(*map(append_all, logs, batches))
        found = await whole_log(logs[0])
        assert [seq for seq, _ in found] == list(range(1, 61))
        for own, others in zip(batches, met, strict=True):
            own_seqs = [seq for batch in own for seq in places(batch)]
            assert own_seqs == sorted(cast("list[int]", own_seqs))
            assert [data for seq, data in found if seq in own_seqs] == [
                int(bytes(each.update.data)) for batch in own for each in batch
            ]
            assert not set(seqs(others)) & set(own_seqs)
            assert seqs(others) == sorted(cast("list[int]", seqs(others)))

    async def test_meets_what_others_wrote(self, kit: LogKit) -> None:
        """An append that finds the log longer than it knew returns what came in between."""
        one, other = kit.log(), kit.log()
        await append(one, "p", entries(1))
        await append(other, "p", entries(2, 3))
        appended = entries(4)
        assert seqs(await append(one, "p", appended)) == [2, 3]
        assert places(appended) == [4]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        ("operation", "fault"),
        [
            pytest.param(operation, fault, id=f"{operation} {name}")
            for operation in ("TransactWriteItems", "PutItem", "GetItem", "Query", "BatchGetItem")
            for name, fault in PASSING_FAULTS.items()
            if name != "garbage" or operation in ("Query", "BatchGetItem")
        ],
    )
    async def test_passing_fault(
        self, kit: LogKit, stand_in: StandIn, operation: str, fault: Fault
    ) -> None:
        """Whatever passing fault a call meets, every event is in the log once, in order."""
        stand_in.fault = faults(operation, fault, fault)
        log = kit.log()
        await log.open()
        appended = entries(1, 2), entries(3)
        await append_all(log, appended)
        assert [places(batch) for batch in appended] == [[1, 2], [3]]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 3)]
        assert await log.heads(["p"]) == {"p": 3}

    @pytest.mark.usefixtures("impatient")
    async def test_no_answer(self, kit: LogKit, stand_in: StandIn) -> None:
        """A transaction that took effect without an answer is found in the log."""
        stand_in.fault = faults("TransactWriteItems", SILENT_AFTER, SILENT_AFTER)
        log, appended = kit.log(), [entries(1, 2), entries(3)]
        assert await append_all(log, appended) == []
        assert [places(batch) for batch in appended] == [[1, 2], [3]]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 3)]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("moment", ["Query", "GetItem", "TransactWriteItems"])
    async def test_late_effect(self, kit: LogKit, stand_in: StandIn, moment: str) -> None:
        """A transaction that was given up and takes effect late leaves its events in the log once.

        Late is while it is looked for, or just before it is tried again.
        """
        late: list[Call] = []
        log = kit.log()
        await append(log, "p", entries(0))

        def fault(call: Call) -> Fault | None:
            if call.operation == "TransactWriteItems" and not late:
                late.append(call)
                return CUT_BEFORE
            if call.operation == moment and len(late) == 1:
                stand_in.perform(late[0])
                late.append(late[0])
            return None

        stand_in.fault = fault
        appended = entries(1, 2)
        assert await append(log, "p", appended) == []
        assert places(appended) == [2, 3]
        assert await whole_log(log) == [(1, 0), (2, 1), (3, 2)]

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "code", ["TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"]
    )
    async def test_transaction_cancelled(self, log: EventLog, stand_in: StandIn, code: str) -> None:
        """A transaction that DynamoDB cancels for a reason that passes is tried again."""
        reasons = {"CancellationReasons": [{"Code": "None"}, {"Code": code, "Message": "later"}]}
        cancelled = Fault(status=400, code="TransactionCanceledException", fields=reasons)
        stand_in.fault = faults("TransactWriteItems", cancelled, cancelled)
        appended = entries(1)
        await append(log, "p", appended)
        assert places(appended) == [1]

    @pytest.mark.parametrize("restarted", [False, True])
    async def test_redelivery(self, either: LogKit, restarted: bool) -> None:
        """An update that SQS delivers again is recognised, by this task and by another one."""
        log = either.log()
        first = entries(1, 2, 3)
        await append(log, "p", first)
        if restarted:
            log = either.log()
        again = entries(2, 3, 4, look_back_to=time.time() - 60)
        assert await append(log, "p", again) == []
        assert places(again) == [2, 3, 4]
        assert again[0].event is not None
        assert first[1].event is not None
        assert again[0].event.payload == first[1].event.payload
        assert len(await whole_log(log)) == 4

    async def test_same_event_id(self, kit: LogKit) -> None:
        """An agent that sends an event id again, in one batch or in the next, says nothing new."""
        log = kit.log()
        batch = [entry(1, "a"), entry(2, "b"), entry(3, "a"), entry(4, "a")]
        await append(log, "p", batch)
        assert places(batch) == [1, 2, 1, 1]
        window = time.time() - server.EVENT_ID_WINDOW_S
        for other in (log, kit.log()):
            batch = [entry(5, "b", window), entry(6, "c", window)]
            await append(other, "p", batch)
            assert places(batch) == [2, 3]
            assert [json.loads(each.event.payload)["data"] for each in batch if each.event] == [
                2,
                6,
            ]
        assert await whole_log(log) == [(1, 1), (2, 2), (3, 6)]

    async def test_look_back_over_pages(self, kit: LogKit) -> None:
        """An event is recognised however many have come after it."""
        await append(kit.log(), "p", entries(*range(450)))
        log = kit.log()
        again = [entry(number, look_back_to=time.time() - 60) for number in (0, 449, 225, 450)]
        await append(log, "p", again)
        assert places(again) == [1, 450, 226, 451]
        assert await log.head("p") == 451

    async def test_look_back_is_bounded(self, kit: LogKit, stand_in: StandIn) -> None:
        """The log is looked through only as far back as the update can be in it, and once."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "timestamp", lambda _at=None: "2025-11-24T12:00:00.000Z")
            await append(kit.log(), "p", entries(*range(950)))
        for dated in (True, False):  # a task of an earlier version does not date its appends
            if not dated:
                head = stand_in.tables[kit.table].get(("PROJECT#p", "EVENTLOG"))
                assert head
                del head["newest"]
            log = kit.log()
            stand_in.calls.clear()
            for number in (1_000, 1_001):
                again = entry(number, f"{number}{dated}", look_back_to=time.time() - 60)
                await append(log, "p", [again])
            assert stand_in.calls["dynamodb", "Query"] == (0 if dated else 1)

    async def test_first_delivery_is_not_looked_for(self, kit: LogKit, stand_in: StandIn) -> None:
        """A project's second append costs one call, as nothing can have been missed since."""
        log = kit.log()
        await append(log, "p", entries(1, look_back_to=time.time() - 60))
        stand_in.calls.clear()
        await append(log, "p", entries(2, look_back_to=time.time() - 50))
        assert stand_in.calls == {("dynamodb", "TransactWriteItems"): 1}

    async def test_forgetful(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task that cannot keep all event ids in mind recognises an update all the same."""
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 5)
        log = kit.log()
        await append_all(log, [entries(*range(start, start + 2)) for start in range(0, 20, 2)])
        for other in (log, kit.log()):
            again = entries(0, 5, 19, look_back_to=time.time() - 60)
            await append(other, "p", again)
            assert places(again) == [1, 6, 20]
        assert await log.head("p") == 20

    async def test_forgetful_in_a_batch(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """What was looked up for a batch is kept in mind until all of the batch is in the log."""
        await append(kit.log(), "p", entries(*range(10)))
        monkeypatch.setattr(server.RecentIds, "REMEMBERED", 6)
        batch = entries(0, 10, 1, 11, 12, look_back_to=time.time() - 60)
        async with asyncio.timeout(DEADLINE_S):
            await append(kit.log(), "p", batch)
        assert places(batch) == [1, 11, 2, 12, 13]

    async def test_many_projects(self, kit: LogKit, monkeypatch: pytest.MonkeyPatch) -> None:
        """A task keeps the heads of so many projects in mind, and reads the others again."""
        monkeypatch.setattr(server.EventLog, "HEADS_REMEMBERED", 2)
        log = kit.log()
        for number in range(3):
            for name in "abcd":
                appended = entries(number)
                await append(log, name, appended)
                assert places(appended) == [number + 1]

    async def test_large_batch(self, either: LogKit) -> None:
        """A batch that one transaction cannot take goes in several, in order."""
        log, appended = either.log(), entries(*range(250))
        await append(log, "p", appended)
        assert places(appended) == list(range(1, 251))
        assert await whole_log(log) == [(number + 1, number) for number in range(250)]

    async def test_large_updates(self, either: LogKit) -> None:
        """Updates of the largest size go as many a transaction as DynamoDB takes."""
        log = either.log()
        appended = [entry(number, size=server.EVENT_MAX_BYTES - 2) for number in range(20)]
        await append(log, "p", appended)
        assert places(appended) == list(range(1, 21))
        assert len(await whole_log(log)) == 20

    async def test_expiry(self, kit: LogKit) -> None:
        """An expired event is not read any more, though DynamoDB deletes it days later."""
        await append(kit.log(retention_s=-10), "p", entries(*range(1, 302)))
        log = kit.log()
        await append(log, "p", entries(302, 303))
        assert await whole_log(log) == [(302, 302), (303, 303)]
        assert seqs(await log.read("p", 302)) == [303]
        assert await log.head("p") == 303

    async def test_all_expired(self, kit: LogKit) -> None:
        """A log whose events have all expired is empty, and goes on where it was."""
        await append(kit.log(retention_s=-10), "p", entries(1, 2))
        log, appended = kit.log(), entries(3)
        assert (await log.read("p", 0), await log.head("p")) == ([], 2)
        await append(log, "p", appended)
        assert places(appended) == [3]

    async def test_deleted_events(self, kit: LogKit, stand_in: StandIn) -> None:
        """A task that has slept while others' events came and were deleted goes on after them."""
        log = kit.log()
        await append(log, "p", entries(1))
        await append(kit.log(), "p", entries(2, 3))
        for seq in (1, 2, 3):
            stand_in.tables[kit.table].delete(("PROJECT#p", server.event_key(seq)))
        appended = entries(4)
        assert await append(log, "p", appended) == []
        assert places(appended) == [4]

    async def test_platforms_own_items(self, kit: LogKit, stand_in: StandIn) -> None:
        """The platform's items of the same project are no events."""
        table = stand_in.tables[kit.table]
        for key in ("METADATA", "EVENT", "EVENTS#1", "AGENT#1"):
            table.put(("PROJECT#p", key), {"PK": {"S": "PROJECT#p"}, "SK": {"S": key}})
        log = kit.log()
        await append(log, "p", entries(1))
        again = entries(1, 2, look_back_to=0.0)
        await append(kit.log(), "p", again)
        assert places(again) == [1, 2]
        assert await whole_log(log) == [(1, 1), (2, 2)]

    async def test_epoch(self, either: LogKit) -> None:
        """All tasks of a table have one epoch, also those that start at once."""
        logs = [either.log() for _ in range(4)]
        await asyncio.gather(*(log.open() for log in logs))
        later = either.log()
        await later.open()
        assert len({log.epoch for log in (*logs, later)}) == 1
        assert later.epoch

    async def test_epoch_of_a_wiped_table(self, kit: LogKit, stand_in: StandIn) -> None:
        """A table that was wiped cannot pass for the old one."""
        before, after = kit.log(), kit.log()
        await before.open()
        stand_in.tables[kit.table] = Table(kit.table)
        await after.open()
        assert after.epoch != before.epoch

    async def test_wiped_table(self, log: EventLog, kit: LogKit, stand_in: StandIn) -> None:
        """A log that went back ends the process, so that it starts with the new epoch."""
        await append(log, "p", entries(1, 2))
        stand_in.tables[kit.table] = Table(kit.table)
        with pytest.raises(UpstreamLost, match=r"went back from seq 2 to 0; the table was wiped"):
            await append(log, "p", entries(3))

    async def test_lost_table(self, log: EventLog, kit: LogKit, stand_in: StandIn) -> None:
        """A table that is missing ends the process, whatever is asked of it."""
        await append(log, "p", entries(1))
        del stand_in.tables[kit.table]
        calls: list[Callable[[], Awaitable[Any]]] = [
            log.open,
            lambda: append(log, "other", entries(1)),
            lambda: log.read("p", 0),
            lambda: log.head("p"),
            lambda: log.heads(["p"]),
        ]
        for call in calls:
            with pytest.raises(UpstreamLost, match=r"^event log: .*ResourceNotFoundException"):
                await call()

    async def test_closed_table(self, log: EventLog, stand_in: StandIn) -> None:
        """A table that this task may not write to ends the process when it starts."""
        stand_in.fault = always("PutItem", Fault(status=400, code="AccessDeniedException"))
        with pytest.raises(UpstreamLost, match=r"^event log: PutItem .*AccessDeniedException"):
            await log.open()


# --- Backplane ------------------------------------------------------------------------------


class MemoryLog(EventLog):
    """An event log in memory; when ``held``, its calls take effect and return step by step.

    Attributes:
        events: by project, from seq 1.
        gone: by project, the seqs that cannot be read any more.
        steps: what held calls are waiting for.
    """

    def __init__(self, *, held: bool = False, page: int = 100) -> None:
        self.epoch = "epoch-1"
        self.events: dict[str, list[Event]] = {}
        self.gone: dict[str, set[int]] = {}
        self.steps: list[asyncio.Future[None]] = []
        self.reads = 0
        self._held = held
        self._page = page

    def add(self, count: int = 1, project_id: str = "p", size: int = 0) -> list[Event]:
        """Append events as another task would; the last ``count`` ones."""
        log = self.events.setdefault(project_id, [])
        log += [event(len(log) + number, project_id, size) for number in range(1, count + 1)]
        return log[-count:]

    def expire(self, *expired: int, project_id: str = "p") -> None:
        self.gone.setdefault(project_id, set()).update(expired)

    def size(self, project_id: str) -> int:
        return len(self.events.get(project_id, ()))

    async def _step(self) -> None:
        if self._held:
            step = asyncio.get_running_loop().create_future()
            self.steps.append(step)
            await step

    async def go_on(self) -> None:
        """Let all held calls take their next step."""
        for step in [self.steps.pop() for _ in self.steps[:]]:
            finish(step)
        await settle()

    async def head(self, project_id: str) -> int:
        return (await self.heads([project_id]))[project_id]

    async def heads(
        self,
        project_ids: Sequence[str],
        *,
        consistent: bool = False,  # noqa: ARG002
    ) -> dict[str, int]:
        await self._step()
        found = {project_id: self.size(project_id) for project_id in project_ids}
        await self._step()
        return found

    async def read(self, project_id: str, after: int, known: int = 0) -> list[Event]:  # noqa: ARG002
        self.reads += 1
        await self._step()
        gone = self.gone.get(project_id, set())
        left = [each for each in self.events.get(project_id, [])[after:] if each.seq not in gone]
        await self._step()
        return left[: self._page]


class Office:
    """A feed with everything around it, but no sockets and no AWS."""

    def __init__(self, tasks: asyncio.TaskGroup, log: MemoryLog) -> None:
        self.log = log
        self.registry = Registry()
        self.metrics = Metrics("test", self.registry)
        self.state: Any = None
        self.feed = Feed(
            tasks,
            log,
            self.registry,
            FanOut(1_000_000, self.metrics, Ledger(self.registry, self.metrics, 10**9)),
            self.metrics,
            self._read_state,
        )

    async def _read_state(self, project_id: str) -> Any:
        return {"project": project_id, "state": self.state} if self.state else None

    def accept(self, events: Sequence[Event]) -> None:
        for each in events:
            self.feed.accept(each)

    async def subscribe(self, listener: Listener, **fields: Any) -> Json:
        """Subscribe to project p; return the confirmation."""
        self.feed.subscribe(listener, Subscribe("p", **fields))
        await eventually(lambda: "p" in listener.subscriptions)
        confirmation = listener.messages.popleft()
        assert confirmation["type"] == "subscription_confirmed"
        assert (confirmation["project_id"], confirmation["epoch"]) == ("p", self.log.epoch)
        return confirmation


@contextlib.asynccontextmanager
async def office_of(log: MemoryLog) -> AsyncIterator[Office]:
    async with task_group() as tasks:
        yield Office(tasks, log)


async def settle() -> None:
    """Let everything run that does not wait for anything."""
    for _ in range(10):
        await asyncio.sleep(0)


class TestFeed:
    @pytest.fixture
    def log(self) -> MemoryLog:
        return MemoryLog()

    async def test_live(self, log: MemoryLog) -> None:
        """A subscriber is told where the log is and gets what comes after it, in order."""
        log.add(3)
        listener = Listener()
        async with office_of(log) as office:
            confirmation = await office.subscribe(listener)
            assert confirmation["seq"] == 3
            assert "recovered" not in confirmation
            office.accept(log.add(2))
            await settle()
        assert listener.seqs() == [4, 5]

    async def test_resume(self, log: MemoryLog) -> None:
        """A subscriber that knows the last seq it saw gets what it missed, then live events."""
        log.add(500)
        listener = Listener()
        async with office_of(log) as office:
            confirmation = await office.subscribe(listener, since=17, epoch=log.epoch)
            assert (confirmation["seq"], confirmation["recovered"]) == (500, True)
            office.accept(log.add(2))
            await settle()
        assert listener.seqs() == list(range(18, 503))

    @pytest.mark.parametrize("warm", [False, True])
    async def test_resume_at_the_end(self, log: MemoryLog, warm: bool) -> None:
        """A subscriber that missed nothing has recovered, in an empty log too."""
        async with office_of(log) as office:
            if warm:
                await office.subscribe(Listener())
            confirmation = await office.subscribe(Listener(), since=0)
            assert (confirmation["seq"], confirmation["recovered"]) == (0, True)

    @pytest.mark.parametrize(
        "fields",
        [
            {"since": 31},
            {"since": 30, "epoch": "epoch-0"},
            {"since": 0, "epoch": ""},
            {"since": 2**53 - 1},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("warm", [False, True])
    async def test_no_resume(self, log: MemoryLog, warm: bool, fields: Json) -> None:
        """A subscriber from the future, or of another log, is told so."""
        log.add(30)
        listener = Listener()
        async with office_of(log) as office:
            if warm:
                await office.subscribe(Listener())
            confirmation = await office.subscribe(listener, **fields)
            assert (confirmation["seq"], confirmation["recovered"]) == (30, False)
            office.accept(log.add())
            await settle()
        assert listener.seqs() == [31]

    async def test_long_resume(self, log: MemoryLog) -> None:
        """Retention bounds what can be missed, not a count: an hour of an answer's pieces too."""
        log.add(4_000)
        listener = Listener()
        async with office_of(log) as office:
            assert (await office.subscribe(listener, since=10))["recovered"] is True
        assert listener.seqs() == list(range(11, 4_001))

    async def test_expired(self, log: MemoryLog) -> None:
        """A subscriber whose next event has expired is told so."""
        log.add(200)
        log.expire(*range(1, 60))
        early, late = Listener(), Listener()
        async with office_of(log) as office:
            assert (await office.subscribe(early, since=58))["recovered"] is False
            assert (await office.subscribe(late, since=59))["recovered"] is True
        assert early.seqs() == []
        assert late.seqs() == list(range(60, 201))

    async def test_hole_in_the_log(self) -> None:
        """A subscriber is told where events are missing, also in the middle of a page.

        Events expire out of order when the retention was changed.
        """
        log, listener = MemoryLog(page=8), Listener()
        log.add(300)
        log.expire(50, 51, 52)
        async with office_of(log) as office:
            await office.subscribe(listener, since=45)
        assert check_story(list(listener.messages), after=45) == 300

    async def test_ahead(self, log: MemoryLog) -> None:
        """A subscriber from a task that is ahead of this one does not count as from the future."""
        log.add(10)
        first, second = Listener(), Listener()
        async with office_of(log) as office:
            await office.subscribe(first)
            log.add(5)
            confirmation = await office.subscribe(second, since=13)
            assert (confirmation["seq"], confirmation["recovered"]) == (15, True)
        assert first.seqs() == [11, 12, 13, 14, 15]
        assert second.seqs() == [14, 15]

    async def test_different_positions(self, log: MemoryLog) -> None:
        """Subscribers at different positions, some with compression, each get their own part."""
        log.add(400)
        positions = [0, 1, 150, 271, 272, 273, 399, 400]
        listeners = [
            Listener(str(since), deflates=bool(number % 2))
            for number, since in enumerate(positions)
        ]
        async with office_of(log) as office:
            await office.subscribe(Listener())
            for listener, since in zip(listeners, positions, strict=True):
                office.feed.subscribe(listener, Subscribe("p", since))
            for _ in range(20):
                office.accept(log.add())
                await asyncio.sleep(0)
            await eventually(lambda: office.registry.subscriptions == 9)
        for listener, since in zip(listeners, positions, strict=True):
            assert listener.messages.popleft()["recovered"] is True
            assert listener.seqs() == list(range(since + 1, 421))

    async def test_returning_crowd(self, log: MemoryLog) -> None:
        """Clients that come back together for the same few events cost one read of the log."""
        log.add(60)
        async with office_of(log) as office:
            await office.subscribe(Listener())
            office.accept(log.add(40))
            listeners = [Listener(str(number)) for number in range(200)]
            for listener in listeners:
                office.feed.subscribe(listener, Subscribe("p", 50))
            await eventually(lambda: office.registry.subscriptions == 201)
        assert all(listener.seqs()[1:] == list(range(51, 101)) for listener in listeners)
        assert log.reads == 1

    async def test_gap(self, log: MemoryLog) -> None:
        """What is missing before an event is read from the log and delivered first."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            office.accept(log.add(5)[4:])
            office.accept(log.add(2))
            await settle()
            assert office.metrics.gaps_filled == 1
        assert listener.seqs() == [1, 2, 3, 4, 5, 6, 7]

    async def test_duplicates(self, log: MemoryLog) -> None:
        """An event that comes again, also later, is delivered once."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            events = log.add(3)
            office.accept([*events, *events, events[0]])
            await settle()
            office.accept(events)
            await settle()
        assert listener.seqs() == [1, 2, 3]

    async def test_expired_gap(self, log: MemoryLog, caplog: pytest.LogCaptureFixture) -> None:
        """Listeners are told when what was missing has expired, and go on after it."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            log.add(9)
            log.expire(1, 2, 3, 7, 8)
            office.accept(log.add())
            await eventually(lambda: len(listener.messages) == 7)
        assert check_story(list(listener.messages), after=0) == 10
        told = [message for message in caplog.messages if "hole" in message]
        assert told == [f"the log of 'p' has a hole up to {seq}" for seq in (3, 8)]

    async def test_all_of_the_gap_expired(self, log: MemoryLog) -> None:
        """Listeners are told when nothing of what was missing is left."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            late = log.add(9)[8:]
            log.expire(*range(1, 10))
            office.accept(late)
            await eventually(lambda: listener.messages)
            office.accept(log.add())
            await settle()
        [told, last] = listener.messages
        assert (told["seq"], told["recovered"], last["seq"]) == (9, False, 10)

    async def test_hole_that_closes(self, log: MemoryLog) -> None:
        """What a read has not seen yet is not taken for expired."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            late = log.add(3)[2:]
            log.expire(2)
            office.accept(late)
            await eventually(lambda: listener.messages)
            log.gone.clear()
            await eventually(lambda: len(listener.messages) == 3)
        assert listener.seqs() == [1, 2, 3]

    async def test_quiet_channel(self, log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a channel keeps for those who come back is let go when nothing happens there."""
        monkeypatch.setattr(server.Feed, "RECENT_FOR_S", -1.0)
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            office.accept(log.add(3))
            channel = office.registry.channel("p")
            assert channel.floor == 0
            auditing = asyncio.ensure_future(office.feed.audit(0.01))
            await eventually(lambda: channel.floor == 3)
            auditing.cancel()
            office.accept(log.add())
            await settle()
        assert listener.seqs() == [1, 2, 3, 4]

    async def test_events_while_opening(self) -> None:
        """Events that come while a project's log is looked up are not lost."""
        log, listener = MemoryLog(held=True), Listener()
        log.add(3)
        async with office_of(log) as office:
            office.feed.subscribe(listener, Subscribe("p", 1))
            await settle()
            log.steps.pop().set_result(None)  # the head is read: 3
            await settle()
            office.accept(log.add(2))
            while "p" not in listener.subscriptions or log.steps:
                await log.go_on()
        confirmation = listener.messages.popleft()
        assert confirmation["recovered"] is True
        assert listener.seqs() == [2, 3, 4, 5]

    async def test_gap_while_filling(self) -> None:
        """What is heard of while the log's end is read counts as missing only when read anew."""
        log, listener = MemoryLog(held=True), Listener()
        async with office_of(log) as office:
            office.feed.subscribe(listener, Subscribe("p"))
            while "p" not in listener.subscriptions:
                await log.go_on()
            log.add(2)
            office.accept(log.add())
            for _ in range(4):  # the gap is read, and the log's end after it
                await log.go_on()
            log.add()
            office.accept(log.add())  # before that end is known here
            while log.steps:
                await log.go_on()
        assert listener.messages.popleft()["seq"] == 0
        assert check_story(list(listener.messages), after=0) == 5
        assert listener.seqs() == [1, 2, 3, 4, 5]

    async def test_ephemeral(self, log: MemoryLog) -> None:
        """An event without a seq reaches who listens now, and moves no cursor."""
        listener = Listener()
        async with office_of(log) as office:
            await office.subscribe(listener)
            office.accept([event(None), *log.add(), event(None), event(None, "nobody's")])
            await settle()
        assert [each.get("seq") for each in listener.messages] == [None, 1, None]

    async def test_nobody_listens(self, log: MemoryLog) -> None:
        """Events of projects that nobody here listens to leave no trace."""
        async with office_of(log) as office:
            office.accept(log.add(5))
            await settle()
            assert office.registry.channels == {}
        assert log.reads == 0

    @pytest.mark.parametrize("state", [None, [1, {"a": 2}]])
    async def test_snapshot(self, log: MemoryLog, state: Any) -> None:
        """A snapshot comes after the confirmation and before the events that were missed."""
        log.add(3)
        listener = Listener()
        async with office_of(log) as office:
            office.state = state
            await office.subscribe(listener, snapshot=True, since=1)
        snapshot = listener.messages.popleft()
        data = {"project": "p", "state": state} if state else None
        assert snapshot == {"type": "project_snapshot", "project_id": "p", "data": data}
        assert listener.seqs() == [2, 3]

    async def test_subscribe_again(self, log: MemoryLog) -> None:
        """Who subscribes again starts anew, at the new position."""
        log.add(10)
        listener = Listener()
        async with office_of(log) as office:
            for since in (8, 5, 9):
                await office.subscribe(listener, since=since)
                assert listener.seqs() == list(range(since + 1, 11))
            office.accept(log.add())
            await settle()
            assert listener.seqs() == [11]
            assert office.registry.subscriptions == 1

    async def test_changed_mind(self, log: MemoryLog) -> None:
        """Who unsubscribes while catching up gets nothing more, and leaves nothing behind."""
        log.add(10)
        listener = Listener()
        async with office_of(log) as office:
            for turns in range(10):
                for since in (None, 3):
                    office.feed.subscribe(listener, Subscribe("p", since))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                office.feed.unsubscribe(listener, "p")
                listener.messages.clear()
                await settle()
                assert list(listener.messages) == []
                assert office.registry.channels == {}
                assert listener.catching_up == {}

    async def test_catch_up_waits_for_its_reader(self) -> None:
        """A catch-up is written no faster than the client reads, and goes on when it does."""
        log, listener = MemoryLog(page=20), Listener()
        log.add(200, size=10_000)
        async with office_of(log) as office:
            listener.reads.clear()
            office.feed.subscribe(listener, Subscribe("p", 0))
            await eventually(lambda: listener.transport.writes[1:])
            await settle()
            written = sum(map(len, listener.transport.writes))
            assert written <= server.CATCHUP_CHUNK_BYTES + 1_000
            office.accept(log.add(3))
            listener.reads.set()
            await eventually(lambda: "p" in listener.subscriptions)
        listener.messages.popleft()
        assert listener.seqs() == list(range(1, 204))

    async def test_catch_up_that_fails(self, log: MemoryLog) -> None:
        """A fault of ours in a catch-up costs one connection, and nothing else."""

        class Faulty(Listener):
            async def drained(self) -> None:
                raise KeyError("a fault of ours")

        log.add(300)
        faulty, other = Faulty("faulty"), Listener()
        async with office_of(log) as office:
            office.feed.subscribe(faulty, Subscribe("p", 0))
            await eventually(lambda: faulty.closed_with)
            assert faulty.closed_with == CloseCode.INTERNAL_ERROR
            await office.subscribe(other, since=0)
        assert other.seqs() == list(range(1, 301))

    async def test_closed_while_catching_up(self, log: MemoryLog) -> None:
        """Who was closed while it caught up does not go live."""

        class Leaving(Listener):
            def send(self, payload: bytes) -> None:
                super().send(payload)
                self.close(CloseCode.GOING_AWAY)

        leaving = Leaving()
        async with office_of(log) as office:
            for _ in range(2):
                leaving.progress = Progress.OPEN
                office.feed.subscribe(leaving, Subscribe("p"))
                await settle()
                assert office.registry.subscriptions == 0
        assert "p" not in leaving.subscriptions

    async def test_log_is_lost(self) -> None:
        """A log that is lost while somebody catches up ends the process, not the connection."""

        class LostLog(MemoryLog):
            async def read(self, project_id: str, after: int, known: int = 0) -> list[Event]:
                del known
                raise UpstreamLost(f"event log: {project_id} after {after}")

        log, listener = LostLog(), Listener()
        log.add(3)

        @contextlib.asynccontextmanager
        async def subscribed() -> AsyncIterator[None]:
            async with office_of(log) as office:
                office.feed.subscribe(listener, Subscribe("p", 0))
                yield

        assert await how_it_ends(subscribed()) == "event log: p after 0"
        assert listener.closed_with is None

    async def test_audit(self, log: MemoryLog) -> None:
        """An event that never came, with no other after it, is found by looking."""
        listener = Listener()
        async with task_group() as tasks:
            office = Office(tasks, log)
            await office.subscribe(listener)
            audit = tasks.create_task(office.feed.audit(0.01))
            log.add(3)
            await eventually(lambda: len(listener.messages) == 3)
            audit.cancel()
        assert listener.seqs() == [1, 2, 3]

    async def test_crowd_shares_pages(self) -> None:
        """What many have missed is read once for all of them, however slowly each one reads."""
        log = MemoryLog(page=20)
        log.add(200, size=10_000)
        crowd = [Listener(f"listener-{number}") for number in range(50)]
        async with office_of(log) as office:
            for listener in crowd:
                listener.reads.clear()
                office.feed.subscribe(listener, Subscribe("p", 0))
            for listener in crowd:
                listener.reads.set()
                await settle()
            await eventually(lambda: all("p" in listener.subscriptions for listener in crowd))
        for listener in crowd:
            assert listener.messages.popleft()["recovered"] is True
            assert listener.seqs() == list(range(1, 201))
        assert log.reads <= 200 / 20

    async def test_pages_are_not_kept_for_long(self) -> None:
        """Pages that were read are bounded in number, and forgotten with the next audit."""
        log = MemoryLog(page=1)
        log.add(100, size=10_000)
        async with task_group() as tasks:
            office = Office(tasks, log)
            await office.subscribe(Listener(), since=0)
            assert len(office.feed._pages) == server.Feed.PAGES
            audit = tasks.create_task(office.feed.audit(0.01))
            await eventually(lambda: not len(office.feed._pages))
            audit.cancel()

    async def test_page_of_an_earlier_channel(self, log: MemoryLog) -> None:
        """A page that somebody who left had asked for is no business of who comes then."""
        log = MemoryLog(held=True)
        log.add(200)
        first, second, other = Listener("first"), Listener("second"), Listener("other")
        async with office_of(log) as office:
            office.feed.subscribe(first, Subscribe("p", 0))
            for _ in range(2):
                await log.go_on()  # its head is known, and the page asked for
            office.feed.unsubscribe(first, "p")
            await settle()
            office.feed.subscribe(other, Subscribe("p"))
            office.feed.subscribe(second, Subscribe("p", 0))
            for turn in range(20):
                if turn == 3:
                    missed = log.add(3)
                if turn == 9:
                    office.accept(missed)
                await log.go_on()
            await eventually(lambda: "p" in second.subscriptions)
        second.messages.popleft()
        assert second.seqs() == list(range(1, 204))

    async def test_replaced_catch_up(self) -> None:
        """Who subscribes anew, again and again, gets the page that was asked for the first time."""
        log = MemoryLog(held=True)
        log.add(200)
        async with office_of(log) as office:
            listener = Listener()
            office.feed.subscribe(listener, Subscribe("p", 0))
            for _ in range(2):
                await log.go_on()  # its head is known, and the page asked for
            for _ in range(20):
                office.feed.subscribe(listener, Subscribe("p", 0))
                await settle()
            while "p" not in listener.subscriptions:
                await log.go_on()
        assert log.reads == 2  # pages
        assert listener.messages.popleft()["recovered"] is True
        assert listener.seqs() == list(range(1, 201))

    async def test_page_is_overtaken(self, log: MemoryLog) -> None:
        """Where nothing was to be read, there may be something a moment later."""
        log.add(3)
        listener, other = Listener(), Listener()
        async with office_of(log) as office:
            await office.subscribe(other)
            reading, read = asyncio.Event(), asyncio.Event()

            async def read_state(_project_id: str) -> None:
                reading.set()
                await read.wait()

            office.feed._read_state = read_state
            office.feed.subscribe(listener, Subscribe("p", 3, snapshot=True))
            await reading.wait()
            office.accept(
                log.add(server.Channel.RECENT_EVENTS + 10)
            )  # more than the channel remembers
            read.set()
            await eventually(lambda: "p" in listener.subscriptions)
        assert [message.get("seq") for message in listener.received()] == [
            3,
            None,
            *range(4, server.Channel.RECENT_EVENTS + 14),
        ]

    async def test_fault_in_a_shared_page(
        self, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A fault of ours ends the connections that wait for the page, and nothing else."""
        log.add(200)
        listeners = [Listener(f"listener-{number}") for number in range(3)]
        async with office_of(log) as office:
            with monkeypatch.context() as patch:
                patch.setattr(log, "read", AsyncMock(side_effect=RuntimeError))
                for listener in listeners:
                    office.feed.subscribe(listener, Subscribe("p", 0))
                await eventually(lambda: all(listener.closed_with for listener in listeners))
            await office.subscribe(again := Listener(), since=0)
            assert again.seqs() == list(range(1, 201))
        assert {listener.closed_with for listener in listeners} == {CloseCode.INTERNAL_ERROR}

    async def test_fault_is_told_in_full_to_each(self, log: MemoryLog) -> None:
        """The story of a fault in a shared page does not grow with those who tell it."""
        stories: list[str] = []

        class Teller(Listener):
            def fail(self, exc: Exception) -> None:
                stories.append("".join(traceback.format_exception(exc)))

        log.add(200)
        log.read = AsyncMock(side_effect=RuntimeError("malformed"))  # type: ignore[method-assign]
        async with office_of(log) as office:
            for number in range(50):
                office.feed.subscribe(Teller(f"teller-{number}"), Subscribe("p", 0))
            await eventually(lambda: len(stories) == 50)
        assert len(set(stories)) == 1
        assert "malformed" in stories[0]

    @given(sizes=st.lists(st.sampled_from([0, 100, 40_000, 65_536, 200_000]), max_size=20))
    def test_chunks(self, sizes: list[int]) -> None:
        """A catch-up is cut into chunks that lose nothing and are no larger than they have to."""
        events = [event(number, size=size) for number, size in enumerate(sizes)]
        cut = list(server.chunks(events))
        assert [each for chunk in cut for each in chunk] == events
        assert all(cut)
        for chunk in cut:
            size = sum(len(each.frame) for each in chunk)
            assert size <= server.CATCHUP_CHUNK_BYTES or len(chunk) == 1


def check_story(messages: Sequence[Json], after: int) -> int:
    """Check that events follow ``after`` without an unannounced hole; return the last seq."""
    for message in messages:
        if message["type"] == "subscription_confirmed":
            assert message["recovered"] is False
            after = message["seq"]
        else:
            assert message["seq"] == after + 1, messages
            after = message["seq"]
    return after


# The promise itself: whatever happens in whatever order, what a client has seen of a project has
# no hole that it was not told of, nothing twice, and in the end nothing is missing.


@dataclasses.dataclass
class Subscription:
    """What the model knows of one subscription.

    Attributes:
        since, epoch: as they were asked for.
        next_seq: of the event that has to come next; ``None`` while none may come.
    """

    since: int | None
    epoch: str | None
    next_seq: int | None = None
    confirmed: bool = False


class Seat:
    """A client that comes back when it was cut off, and remembers the last seq it saw."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.last: dict[str, int] = {}
        self.visits = 0
        self.sit_down()

    def sit_down(self) -> None:
        self.visits += 1
        self.listener = Listener(f"{self.name}-{self.visits}", deflates=self.visits % 2 == 0)
        self.subscriptions: dict[str, Subscription] = {}


projects = st.sampled_from("ppq")
seats = st.sampled_from("ab")
more = st.booleans()


class ResumeMachine(RuleBasedStateMachine):
    """Log, cursor and resume of one task, beside a model that only knows the promise.

    The log's calls take effect and return when a rule says so, in any order; so do the messages
    of the topic, which may also come twice or never.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(server.Channel, "RECENT_EVENTS", 3)
        self.loop = asyncio.new_event_loop()
        self.log = MemoryLog(held=True, page=2)
        self.wire: list[Event] = []
        self.seats = {name: Seat(name) for name in "ab"}
        self.due: list[Callable[[], None]] = []
        self.end = asyncio.Event()
        self.running = self.loop.create_task(self.run())
        self.act(lambda: None)

    async def run(self) -> None:
        async with office_of(self.log) as self.office:
            auditing = asyncio.ensure_future(self.office.feed.audit(0.0))
            await self.end.wait()
            auditing.cancel()

    def act(self, action: Callable[[], None], more: bool = False) -> None:
        """Do something inside the loop; with ``more`` in the same turn as what comes next."""
        self.due.append(action)
        if not more:
            self.loop.run_until_complete(self.act_on_all())
            assert not self.running.done(), self.running

    async def act_on_all(self) -> None:
        due, self.due = self.due, []
        for action in due:
            action()
            self.look()
        await settle()
        self.look()

    def look(self) -> None:
        """Compare what clients have received with the model."""
        for seat in self.seats.values():
            for message in seat.listener.received():
                self.check(seat, message)

    def check(self, seat: Seat, message: Json) -> None:
        project_id = message["project_id"]
        subscription = seat.subscriptions[project_id]
        if message["type"] == "subscription_confirmed":
            subscription.next_seq = self.after(subscription, project_id, message)
            subscription.confirmed = True
        elif "seq" not in message:
            assert subscription.next_seq is not None
        else:
            assert message["seq"] == subscription.next_seq
            assert message["data"] == message["seq"]
            subscription.next_seq = seat.last[project_id] = message["seq"]
            subscription.next_seq += 1

    def after(self, subscription: Subscription, project_id: str, message: Json) -> int:
        """The event that has to follow a confirmation."""
        head = self.log.size(project_id)
        assert 0 <= message["seq"] <= head
        assert message["epoch"] == self.log.epoch
        first = not subscription.confirmed
        if first and subscription.since is None:
            assert "recovered" not in message
            return cast("int", message["seq"]) + 1
        since = cast("int", subscription.since) if first else cast("int", subscription.next_seq) - 1
        other_log = subscription.epoch not in (None, self.log.epoch)
        expired = max(self.log.gone.get(project_id) or {0})
        if message["recovered"]:
            assert first
            assert not other_log
            assert since <= message["seq"]
            return since + 1
        too_far = first and (since > head or other_log)
        assert too_far or expired > since
        return cast("int", message["seq"]) + 1

    @initialize(count=st.integers(0, 8), since=st.none() | st.integers(0, 8))
    def a_client_is_there(self, count: int, since: int | None) -> None:
        self.log.add(count, "p")
        self.client_subscribes("a", "p", since, None, more=False)
        self.all_calls_go_on(4)

    @rule(project_id=projects, count=st.integers(1, 4))
    def another_task_appends(self, project_id: str, count: int) -> None:
        self.wire += self.log.add(count, project_id)

    @rule(project_id=projects, count=st.integers(1, 4), more=more)
    def this_task_appends(self, project_id: str, count: int, more: bool) -> None:
        self.act(lambda: self.office.accept(self.log.add(count, project_id)), more)

    @rule(project_id=projects, more=more)
    def ephemeral_event_comes(self, project_id: str, more: bool) -> None:
        self.act(lambda: self.office.accept([event(None, project_id)]), more)

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), again=st.booleans(), more=more)
    def event_comes(self, data: st.DataObject, again: bool, more: bool) -> None:
        place = data.draw(st.integers(0, len(self.wire) - 1))
        coming = self.wire[place] if again else self.wire.pop(place)
        self.act(lambda: self.office.accept([coming]), more)

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def event_is_lost(self, data: st.DataObject) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

    @precondition(lambda self: self.log.steps)
    @rule(data=st.data(), more=more)
    def one_call_goes_on(self, data: st.DataObject, more: bool) -> None:
        step = self.log.steps.pop(data.draw(st.integers(0, len(self.log.steps) - 1)))
        self.act(functools.partial(finish, step), more)

    @precondition(lambda self: self.log.steps)
    @rule(times=st.integers(1, 4))
    def all_calls_go_on(self, times: int) -> None:
        for _ in range(times):
            for step in [self.log.steps.pop() for _ in self.log.steps[:]]:
                self.act(functools.partial(finish, step))

    @rule(
        name=seats,
        project_id=projects,
        since=st.none() | st.just("last") | st.integers(0, 20),
        epoch=st.sampled_from([None, None, "epoch-1", "epoch-1", "epoch-0"]),
        more=more,
    )
    def client_subscribes(
        self,
        name: str,
        project_id: str,
        since: int | str | None,
        epoch: str | None,
        more: bool,
    ) -> None:
        seat = self.seats[name]

        def subscribe() -> None:
            position = seat.last.get(project_id) if isinstance(since, str) else since
            before = seat.subscriptions.get(project_id)
            subscription = Subscription(position, epoch, before.next_seq if before else None)
            seat.subscriptions[project_id] = subscription
            self.office.feed.subscribe(seat.listener, Subscribe(project_id, position, epoch))
            self.look()  # what the subscription before was still owed comes first
            if not subscription.confirmed:
                subscription.next_seq = None

        self.act(subscribe, more)

    @rule(name=seats, project_id=projects, more=more)
    def client_unsubscribes(self, name: str, project_id: str, more: bool) -> None:
        seat = self.seats[name]

        def unsubscribe() -> None:
            seat.subscriptions.pop(project_id, None)
            self.office.feed.unsubscribe(seat.listener, project_id)

        self.act(unsubscribe, more)

    @rule(name=seats, more=more)
    def client_is_cut_off(self, name: str, more: bool) -> None:
        seat = self.seats[name]

        def cut() -> None:
            gone = seat.listener
            seat.sit_down()
            gone.progress = Progress.LOST
            for task in tuple(gone.catching_up.values()):
                task.cancel()
            self.office.registry.drop(gone)

        self.act(cut, more)

    @rule(name=seats, reads=st.booleans())
    def client_reads(self, name: str, reads: bool) -> None:
        event = self.seats[name].listener.reads
        self.act(event.set if reads else event.clear)

    @rule(project_id=projects, keep=st.integers(0, 2))
    def events_expire(self, project_id: str, keep: int) -> None:
        self.log.expire(*range(1, self.log.size(project_id) + 1 - keep), project_id=project_id)

    @invariant()
    def only_channels_in_use_are_kept(self) -> None:
        if hasattr(self, "office"):
            assert self.office.registry.channels.keys() <= set("pq")

    def teardown(self) -> None:
        """Lose what is under way, let everything run: the audit has to find what is missing."""
        try:
            for seat in self.seats.values():
                self.act(seat.listener.reads.set)
            for _ in range(300):
                if self.all_have_everything():
                    break
                self.all_calls_go_on(1)
            assert self.all_have_everything()
            for name, seat in self.seats.items():
                for project_id in tuple(seat.subscriptions):
                    self.client_unsubscribes(name, project_id, more=False)
            assert self.office.registry.channels == {}
        finally:
            self.end.set()
            with contextlib.suppress(BaseException):
                self.loop.run_until_complete(self.running)
            self.loop.close()
            self.patch.undo()

    def all_have_everything(self) -> bool:
        return all(
            subscription.next_seq == self.log.size(project_id) + 1
            for seat in self.seats.values()
            for project_id, subscription in seat.subscriptions.items()
        )


def finish(step: asyncio.Future[None]) -> None:
    """Let a held call go on, if nobody has cancelled it."""
    if not step.done():
        step.set_result(None)


TestResumeMachine = ResumeMachine.TestCase
TestResumeMachine.settings = hypothesis_settings(
    max_examples=150, stateful_step_count=30, suppress_health_check=list(HealthCheck)
)


def push(stand_in: StandIn, *bodies: str | Json, queue: str = "agenticai-updates") -> None:
    """Put messages into a queue as agents do."""
    target = stand_in.queues[queue]
    for body in bodies:
        target.push(body if isinstance(body, str) else json.dumps(body), group="g")
    target.wake()


def news(*numbers: int, project_id: str | None = "p", **fields: Any) -> list[Json]:
    """Updates that carry ``numbers``."""
    return [
        {"type": "project_updated", "project_id": project_id, "data": number, **fields}
        for number in numbers
    ]


def bodies(stand_in: StandIn, queue: str) -> list[str]:
    return stand_in.queues[queue].bodies


async def received_in_order(client: Client, *numbers: int) -> list[Json]:
    """The events that carry ``numbers``: the next ones, with seqs without a hole."""
    events = await client.receive_many(len(numbers))
    assert [each["data"] for each in events] == list(numbers)
    first = events[0]["seq"]
    assert [each["seq"] for each in events] == list(range(first, first + len(numbers)))
    return events


@contextlib.asynccontextmanager
async def receiver_of(platform: aws_standin.Platform, aws: Aws) -> AsyncIterator[Receiver]:
    """A receiver for the updates queue, whose polls end with the test."""
    async with task_group() as tasks:
        url = platform.queue_urls["updates"]
        yield Receiver(tasks, aws.sqs, url, server.Dependency("updates queue"))


def numbers(messages: list[Json]) -> list[int]:
    """What `news` put into messages."""
    return [json.loads(each["Body"])["data"] for each in messages]


class TestReceiver:
    @pytest.mark.usefixtures("patient")
    @pytest.mark.parametrize("count", [1, 9, 10, 25])
    async def test_takes_what_is_there(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, count: int
    ) -> None:
        """What is in a queue comes in one piece, in order."""
        push(stand_in, *news(*range(count)))
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == list(range(count))

    @pytest.mark.usefixtures("patient")
    async def test_takes_no_more_than_it_can_hold(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A long queue is taken in pieces."""
        push(stand_in, *news(*range(250)))
        async with receiver_of(platform, aws) as receiver:
            sizes = [len(await receiver.messages()) for _ in range(3)]
        assert max(sizes) < server.Receiver.RECEIVED_AT_ONCE + 10 * server.Receiver.POLLS_AT_ONCE
        assert sum(sizes) > 200

    async def test_waits(self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws) -> None:
        """An empty queue is waited for, and a message taken as soon as it is there."""
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"])
            assert not receiving.done()
            push(stand_in, *news(1))
            async with asyncio.timeout(DEADLINE_S):
                assert numbers(await receiving) == [1]

    @pytest.fixture
    def patient(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Polls are given time even on a machine that has none."""
        monkeypatch.setattr(server.Receiver, "GATHER_S", 0.5)

    @pytest.mark.usefixtures("patient")
    async def test_no_call_for_nothing(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A burst is taken by as many calls as it fills; the poll behind it waits for the next."""
        async with receiver_of(platform, aws) as receiver:
            for burst in range(5):
                push(stand_in, *news(*range(20)))
                assert numbers(await receiver.messages()) == list(range(20))
                await eventually(lambda: receiver.polling)
                assert stand_in.calls["sqs", "ReceiveMessage"] == 2 * (burst + 1) + 1

    async def test_patience_ends(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Burst after burst in the same rhythm is not waited for until all have come."""
        stand_in.fault = always("ReceiveMessage", Fault(delay_s=0.02))
        push(stand_in, *news(*range(90)))
        async with receiver_of(platform, aws) as receiver:
            assert len(await receiver.messages()) < 60

    async def test_backlog(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Where much waits, several polls go side by side; it comes once and in order."""
        stand_in.fault = always("ReceiveMessage", Fault(delay_s=0.005))
        push(stand_in, *news(*range(600)))
        received: list[int] = []
        polls = 0
        async with receiver_of(platform, aws) as receiver:
            while len(received) < 600:
                received += numbers(await receiver.messages())
                polls = max(polls, len(receiver._polls))
        assert sorted(received) == list(range(600))
        assert 1 < polls <= server.Receiver.POLLS_AT_ONCE

    async def test_cancelled(
        self,
        stand_in: StandIn,
        platform: aws_standin.Platform,
        aws: Aws,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Who is cancelled while waiting for the rest of a burst leaves no poll behind."""
        monkeypatch.setattr(server.Receiver, "GATHER_S", DEADLINE_S)
        push(stand_in, *news(*range(10)))
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"] == 2)
            [poll] = receiver._polls
            receiving.cancel()
            await asyncio.wait({receiving, poll}, timeout=DEADLINE_S)
            assert poll.cancelled()

    async def test_late_answer(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """What was received keeps nobody waiting for a call that hangs, whose answer counts too."""
        push(stand_in, *news(*range(15)))
        stand_in.fault = faults("ReceiveMessage", Fault(), Fault(delay_s=0.5))
        async with receiver_of(platform, aws) as receiver:
            began_at = time.monotonic()
            assert numbers(await receiver.messages()) == list(range(10))
            assert time.monotonic() - began_at < 0.5
            assert numbers(await receiver.messages()) == list(range(10, 15))

    @each_passing_fault
    @pytest.mark.usefixtures("impatient")
    async def test_passing_fault(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, fault: Fault
    ) -> None:
        """A call that fails in passing is made again, and loses nothing."""
        for queue in stand_in.queues.values():
            queue.attributes["VisibilityTimeout"] = "1"
        stand_in.fault = faults("ReceiveMessage", fault, fault)
        push(stand_in, *news(1))
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == [1]

    async def test_error_with_messages_in_hand(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """What was received is not kept waiting by an error of the next call."""
        push(stand_in, *news(*range(10)))
        stand_in.fault = faults("ReceiveMessage", Fault(), SERVER_ERROR)
        async with receiver_of(platform, aws) as receiver:
            assert numbers(await receiver.messages()) == list(range(10))

    async def test_does_not_spin(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Answers that come at once and say nothing are not asked for without pause."""
        stand_in.fault = always("ReceiveMessage", GARBAGE)
        async with receiver_of(platform, aws) as receiver:
            receiving = asyncio.ensure_future(receiver.messages())
            await eventually(lambda: stand_in.calls["sqs", "ReceiveMessage"] >= 3)
            await asyncio.wait([receiving], timeout=0.5)
            receiving.cancel()
        assert stand_in.calls["sqs", "ReceiveMessage"] < 50

    async def test_stopping(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """Nothing more is asked for when the task is to end, and what came is not lost."""
        async with receiver_of(platform, aws) as receiver:
            assert await receiver.messages(lambda: True) == []
            push(stand_in, *news(*range(25)))
            answers = iter([False, True])
            assert numbers(await receiver.messages(lambda: next(answers))) == list(range(10))
            assert not receiver.polling

    async def test_stopping_during_a_poll(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws
    ) -> None:
        """A poll that is under way when the task is to end is seen through."""
        async with receiver_of(platform, aws) as receiver:
            push(stand_in, *news(*range(10)))
            assert numbers(await receiver.messages()) == list(range(10))
            assert receiver.polling
            push(stand_in, *news(11))
            assert numbers(await receiver.messages(lambda: True)) == [11]
            assert not receiver.polling

    @pytest.mark.parametrize("in_hand", [0, 10])
    async def test_lost_queue(
        self, stand_in: StandIn, platform: aws_standin.Platform, aws: Aws, in_hand: int
    ) -> None:
        """A queue that is gone ends the process, whoever waits for it."""
        push(stand_in, *news(*range(in_hand)))

        def fault(_call: Call) -> Fault | None:
            if not in_hand or stand_in.calls["sqs", "ReceiveMessage"] > 1:
                stand_in.queues.pop("agenticai-updates", None)
            return None

        stand_in.fault = fault
        sentence = r"^updates queue: ReceiveMessage .*NonExistent"
        with pytest.RaisesGroup(pytest.RaisesExc(UpstreamLost, match=sentence)):
            async with receiver_of(platform, aws) as receiver:
                await receiver.messages()
                await asyncio.sleep(DEADLINE_S)


class TestRelay:
    @pytest.fixture
    def relay_of(
        self, aws: Aws, platform: aws_standin.Platform
    ) -> Callable[[asyncio.TaskGroup, str], Relay]:
        def relay_of(tasks: asyncio.TaskGroup, task_id: str) -> Relay:
            return Relay(tasks, aws.sqs, aws.sns, platform.topic_arn, task_id, 0.2)

        return relay_of

    async def test_own_queue(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task's queue has its policy, retention and sign of life from the start.

        It is subscribed raw, and at the end both are gone.
        """
        before = set(stand_in.queues)
        async with running_gateway(platform, "abc/123", topic=True):
            [name] = set(stand_in.queues) - before
            queue = stand_in.queues[name]
            [subscription] = stand_in.sns.subscriptions.values()
        assert name == "agenticai-updates-task-abc-123"
        assert queue.attributes["MessageRetentionPeriod"] == "60"
        [statement] = json.loads(queue.attributes["Policy"])["Statement"]
        assert statement == {
            "Sid": "TopicMaySend",
            "Effect": "Allow",
            "Principal": {"Service": "sns.amazonaws.com"},
            "Action": "sqs:SendMessage",
            "Resource": queue.arn,
            "Condition": {"ArnEquals": {"aws:SourceArn": platform.topic_arn}},
        }
        assert abs(float(queue.tags["heartbeat"]) - time.time()) < 60
        assert subscription.endpoint == queue.arn
        assert subscription.attributes["RawMessageDelivery"] == "true"
        policy = json.loads(subscription.attributes["FilterPolicy"])
        assert policy == {"origin": [{"anything-but": [name]}]}
        assert set(stand_in.queues) == before
        assert stand_in.sns.subscriptions == {}

    async def test_long_names(self, stand_in: StandIn, aws: Aws) -> None:
        """However long a topic and a task are called, the queue's name is one SQS takes."""
        topic_arn = stand_in.sns.create("t" * 200)
        async with task_group() as tasks:
            relay = Relay(tasks, aws.sqs, aws.sns, topic_arn, "host.example_" * 20, 60)
            await relay.start()
            [name] = [each for each in stand_in.queues if "-task-" in each]
            assert len(name) == 80
            await relay.close()

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "operation", ["CreateQueue", "Subscribe", "Publish", "ReceiveMessage", "DeleteMessageBatch"]
    )
    async def test_passing_faults(
        self, stand_in: StandIn, platform: aws_standin.Platform, operation: str
    ) -> None:
        """Whatever call fails in passing, events come across once, in order."""
        passing = [fault for fault in PASSING_FAULTS.values() if fault is not GARBAGE]
        stand_in.fault = faults(operation, *passing)
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        audits = {"audit_interval_seconds": 0.5}
        async with (
            running_gateway(platform, "task-1", topic=True, **audits) as one,
            running_gateway(platform, "task-2", topic=True, **audits) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                assert (await client.receive())["seq"] == 0
            for number in range(6):
                push(stand_in, *news(number))
                for client in (here, there):
                    await received_in_order(client, number)
            for client in (here, there):
                assert await client.has_nothing_more()
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_on_moto(self, moto_aws: MotoAws) -> None:
        """Two tasks see each other's events through queues and a topic of somebody else's."""
        for fifo in (False, True):
            platform = moto_aws.create_platform(prefix=next(prefixes), fifo_updates=fifo)
            send = functools.partial(
                platform.client("sqs").send_message, QueueUrl=platform.queue_urls["updates"]
            )
            group = {"MessageGroupId": "p"} if fifo else {}
            async with (
                running_gateway(platform, "task-1", topic=True) as one,
                running_gateway(platform, "task-2", topic=True) as other,
                client_of(one, project_id="p") as here,
                client_of(other, project_id="p") as there,
            ):
                for client in (here, there):
                    assert (await client.receive())["seq"] == 0
                for [update] in (news(number) for number in range(4)):
                    body = json.dumps(update)
                    await asyncio.to_thread(send, MessageBody=body, **group)
                for client in (here, there):
                    events = await client.receive_many(4)
                    assert {each["data"] for each in events} == {0, 1, 2, 3}
                    assert [each["seq"] for each in events] == [1, 2, 3, 4]
            queues = await asyncio.to_thread(
                platform.client("sqs").list_queues,
                QueueNamePrefix=platform.topic_arn.rpartition(":")[2],
            )
            assert "QueueUrls" not in queues

    async def test_everything_crosses(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """Events, broadcasts, ephemeral ones and those for one client reach the other task."""
        async with (
            running_gateway(platform, "task-1", topic=True) as one,
            running_gateway(platform, "task-2", topic=True) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            sent = [
                *news(1),
                *news(2, project_id=None),
                *news(3, project_id="*"),
                *news(4, ephemeral=True),
                *news(5, project_id=None, ephemeral=True),
            ]
            for update in sent:
                push(stand_in, update)
                for client in (here, there):
                    got = await client.receive()
                    assert got["data"] == update["data"]
                    assert got["project_id"] == (update["project_id"] or "*")
                    assert ("seq" in got) == (not update.get("ephemeral"))
            for client, other_client in ((here, there), (there, here)):
                for number in range(3):
                    push(stand_in, *news(number, connection_id=client.greeting["connection_id"]))
                    got = await client.receive()
                    assert (got["data"], "seq" in got) == (number, False)
                assert await other_client.has_nothing_more()
            push(stand_in, *news(9, connection_id="nobody's"))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await here.has_nothing_more()

    async def test_topic_misbehaves(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What the topic doubles, reorders and drops comes to clients once, in order."""
        chance = random.Random(7)
        stand_in.fault = always(
            "Publish",
            Fault(
                deliveries=lambda _queue: [
                    chance.random() / 20 for _ in range(chance.choice([0, 1, 1, 2]))
                ]
            ),
        )
        async with (
            running_gateway(platform, "task-1", topic=True, audit_interval_seconds=0.2) as one,
            running_gateway(platform, "task-2", topic=True, audit_interval_seconds=0.2) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            for number in range(60):
                push(stand_in, *news(number))
                await asyncio.sleep(0)
            for client in (here, there):
                events = await client.receive_many(60)
                assert [each["seq"] for each in events] == list(range(1, 61))
                assert {each["data"] for each in events} == set(range(60))
            for client in (here, there):
                assert await client.has_nothing_more()

    async def test_large_updates(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Updates of the largest size fit the topic, however many come at once."""
        size = server.EVENT_MAX_BYTES - 2
        async with (
            running_gateway(platform, "task-1", topic=True, max_backlog_bytes=2**30) as one,
            running_gateway(platform, "task-2", topic=True, max_backlog_bytes=2**30) as other,
            client_of(one, project_id="p") as here,
            client_of(other, project_id="p") as there,
        ):
            for client in (here, there):
                await client.receive()
            push(stand_in, *({**each, "data": "x" * size} for each in news(*range(12))))
            for client in (here, there):
                events = await client.receive_many(12)
                assert [each["seq"] for each in events] == list(range(1, 13))

    async def test_unreadable_carrier(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A message of the topic that cannot be read is logged; the next one comes."""
        queue = "agenticai-updates-task-task-1"
        own = RelayedBatch(queue, [RelayedEvent("p", None, None, 0.0, msgspec.Raw(b'{"own":1}'))])
        good = RelayedBatch(
            "other", [RelayedEvent("p", None, None, 0.0, msgspec.Raw(b'{"good":1}'))]
        )
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, "hello", "{}", "[" * 5_000, queue=queue)
            push(
                stand_in, *(msgspec.json.encode(each).decode() for each in (own, good)), queue=queue
            )
            assert await client.receive() == {"good": 1}
        unreadable = [each for each in caplog.messages if "cannot be read" in each]
        assert len(unreadable) == 3

    async def test_reaping(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """What killed tasks have left is removed; what is alive, or somebody else's, is not."""
        now, prefix = int(time.time()), "agenticai-updates-task-"
        old, young = {"heartbeat": str(now - 10_000)}, {"heartbeat": str(now + 10_000)}
        made = {
            f"{prefix}dead": old,
            f"{prefix}without-a-sign": {},
            f"{prefix}still-alive": young,
            "agenticai-updates-other": old,
        }
        for name, tags in made.items():
            stand_in.sqs.create(name, tags=tags)
        endpoints = [*made, f"{prefix}without-a-queue"]
        for name in endpoints:
            request = {
                "TopicArn": platform.topic_arn,
                "Protocol": "sqs",
                "Endpoint": f"arn:aws:sqs:us-east-1:000000000000:{name}",
            }
            stand_in.perform(Call("sns", "Subscribe", request))
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            kept = {f"{prefix}still-alive", "agenticai-updates-other", f"{prefix}task-1"}
            await eventually(
                lambda: (
                    {each.endpoint.rpartition(":")[2] for each in subscriptions(stand_in)} == kept
                )
            )
            await eventually(
                lambda: not {f"{prefix}dead", f"{prefix}without-a-sign"} & set(stand_in.queues)
            )
            assert kept <= set(stand_in.queues)
            rounds = stand_in.calls["sns", "ListSubscriptionsByTopic"]
            await eventually(lambda: stand_in.calls["sns", "ListSubscriptionsByTopic"] > rounds + 2)
            assert kept <= set(stand_in.queues)
            assert len(subscriptions(stand_in)) == 3

    async def test_two_reap_at_once(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What another task has removed in the meantime is no error, and neither is a throttle."""
        name = "agenticai-updates-task-dead"
        stand_in.sqs.create(name, tags={"heartbeat": "1"})
        gone = Fault(status=400, code="QueueDoesNotExist")
        stand_in.fault = faults("DeleteQueue", THROTTLED, gone)
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2) as gateway:
            await eventually(lambda: name not in stand_in.queues)
            assert gateway.health() == {"status": "ok"}

    async def test_heartbeat(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task shows that it lives, again and again."""
        async with running_gateway(platform, topic=True, task_heartbeat_seconds=0.2):
            tags = stand_in.queues["agenticai-updates-task-task-1"].tags
            tags["heartbeat"] = "0"
            await eventually(lambda: float(tags["heartbeat"]) > time.time() - 60)

    @pytest.mark.parametrize("lost", ["queue", "subscription", "topic"])
    async def test_lost(self, stand_in: StandIn, platform: aws_standin.Platform, lost: str) -> None:
        """Without its queue, its subscription or the topic a task would miss events: it ends."""

        def lose(call: Call) -> None:
            if call.operation != "TagQueue":
                return
            if lost == "queue":
                stand_in.queues.pop("agenticai-updates-task-task-1", None)
            elif lost == "subscription":
                stand_in.sns.subscriptions.clear()
            elif stand_in.sns.topics:
                stand_in.sns.topics.clear()
                push(stand_in, *news(1))

        stand_in.fault = lose
        gateway = running_gateway(platform, topic=True, task_heartbeat_seconds=0.2)
        assert (await how_it_ends(gateway)).startswith("fan-out: ")

    async def test_not_ready_before_the_subscription(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A task that does not get events yet says that it is starting."""
        stand_in.fault = always("Subscribe", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(
                settings(platform, topic=True, drain_seconds=0.0), tasks, aws, "task-1"
            )
            running = tasks.create_task(gateway.run())
            await eventually(lambda: stand_in.calls["sns", "Subscribe"] > 1)
            assert gateway.health() == {"status": "starting"}
            assert gateway.relay is not None
            relay = gateway.relay
            readiness = [relay.ready]
            stand_in.fault = None
            await eventually(lambda: gateway.health() == {"status": "ok"})
            assert [*readiness, relay.ready] == [False, True]
            gateway.drain.wanted.set()
            gateway.drain.hurry.set()
            await running

    async def test_close_fails(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A queue that cannot be removed at the end is left for others, with a warning."""
        async with running_gateway(platform, topic=True):
            stand_in.fault = always("Unsubscribe", SERVER_ERROR)
        assert "fan-out: the queue stays behind: InternalError" in caplog.messages

    async def test_close_before_start(self, relay_of: Callable[..., Relay]) -> None:
        """A relay that never started has nothing to remove."""
        async with task_group() as tasks:
            relay = relay_of(tasks, "task-1")
            await relay.close()
            await eventually(lambda: not relay.bytes_in_hand)


def subscriptions(stand_in: StandIn) -> list[aws_standin.sns.Subscription]:
    return list(stand_in.sns.subscriptions.values())


UNREADABLE = [
    "hello",
    '{"project_id":"p"}',
    '{"type":"error","project_id":"p"}',
    json.dumps({"type": "t", "project_id": "p", "data": "x" * server.EVENT_MAX_BYTES}),
]


class TestIntake:
    async def test_order(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Updates of many projects come in order, with a seq each, and leave the queue."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id=["p", "q"]) as client,
        ):
            await client.receive_many(2)
            push(
                stand_in,
                *(each for n in range(50) for name in "pq" for each in news(n, project_id=name)),
            )
            events = await client.receive_many(100)
            for name in "pq":
                own = [each for each in events if each["project_id"] == name]
                assert [(each["seq"], each["data"]) for each in own] == [
                    (number + 1, number) for number in range(50)
                ]
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await gateway.log.head("p") == 50

    @pytest.mark.parametrize("fifo", [False, True])
    async def test_unreadable(self, stand_in: StandIn, fifo: bool) -> None:
        """Updates that cannot be read are in the dead-letter queue at once.

        The rest of their batch comes in order.
        """
        platform = stand_in.create_platform(fifo_updates=fifo)
        queue, dead_letters = (platform.queue_names[each] for each in ("updates", "updates_dlq"))
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            good = iter(news(*range(len(UNREADABLE))))
            push(stand_in, *(each for bad in UNREADABLE for each in (bad, next(good))), queue=queue)
            await received_in_order(client, *range(len(UNREADABLE)))
            await eventually(lambda: sorted(bodies(stand_in, dead_letters)) == sorted(UNREADABLE))
            await eventually(lambda: not bodies(stand_in, queue))
            push(stand_in, *news(9), queue=queue)
            await received_in_order(client, 9)

    async def test_unreadable_without_dead_letter_queue(
        self, stand_in: StandIn, platform: aws_standin.Platform, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Without a dead-letter queue an unreadable update is logged whole and deleted.

        That is at its fifth receive, and an error.
        """
        del stand_in.queues["agenticai-updates"].attributes["RedrivePolicy"]
        async with running_gateway(platform):
            push(stand_in, "no JSON at all")
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        told = [each for each in caplog.records if "unusable" in each.message]
        assert [(each.levelname, "no JSON at all" in each.message) for each in told] == [
            ("ERROR", True)
        ]
        assert stand_in.calls["sqs", "ChangeMessageVisibility"] == 4

    async def test_unreadable_cannot_be_given_back(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """An unreadable update that cannot be given back comes again by itself."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        stand_in.fault = faults("ChangeMessageVisibility", SERVER_ERROR)
        async with running_gateway(platform):
            push(stand_in, "hello")
            await eventually(lambda: bodies(stand_in, "agenticai-updates-dlq") == ["hello"])

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize("fifo", [False, True])
    async def test_crash_before_delete(self, stand_in: StandIn, fifo: bool) -> None:
        """What a task has delivered but not deleted when it dies repeats nothing to clients."""
        platform = stand_in.create_platform(fifo_updates=fifo)
        queue = stand_in.queues[platform.queue_names["updates"]]
        queue.attributes["VisibilityTimeout"] = "1"
        stand_in.fault = always("DeleteMessageBatch", SERVER_ERROR)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            epoch = (await client.receive())["epoch"]
            push(stand_in, *news(1, 2, 3), queue=queue.name)
            await received_in_order(client, 1, 2, 3)
        assert len(queue.bodies) == 3
        stand_in.fault = None
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p", since=1, epoch=epoch) as client,
        ):
            assert (await client.receive())["recovered"] is True
            await received_in_order(client, 2, 3)
            await eventually(lambda: not queue.bodies)
            push(stand_in, *news(4), queue=queue.name)
            [last] = await received_in_order(client, 4)
            assert last["seq"] == 4

    @pytest.mark.usefixtures("impatient")
    @pytest.mark.parametrize(
        "operation",
        [
            "ReceiveMessage",
            "GetQueueAttributes",
            "TransactWriteItems",
            "Query",
            "DeleteMessageBatch",
        ],
    )
    async def test_passing_faults(
        self, stand_in: StandIn, platform: aws_standin.Platform, operation: str
    ) -> None:
        """Whatever call fails in passing, every update comes once, in order."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        passing = [each for each in PASSING_FAULTS.values() if each is not GARBAGE]
        stand_in.fault = faults(operation, *passing)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in range(6):
                push(stand_in, *news(number))
                await received_in_order(client, number)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await client.has_nothing_more()

    async def test_publish_comes_before_delete(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """An update stays in the queue until the topic has it."""
        stand_in.fault = always("Publish", SERVER_ERROR)
        async with (
            running_gateway(platform, topic=True) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *news(1))
            await received_in_order(client, 1)
            await eventually(lambda: stand_in.calls["sns", "Publish"] >= 2)
            assert len(bodies(stand_in, "agenticai-updates")) == 1
            assert stand_in.calls["sqs", "DeleteMessageBatch"] == 0
            stand_in.fault = None
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))

    async def test_delete_fails_in_part(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """What SQS could not delete is deleted by the next call."""
        stand_in.fault = faults("DeleteMessageBatch", Fault(failed={0: False}))
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 2

    async def test_deletes_wait_for_company(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Updates that come one by one are deleted together, ten at once, and all by the end."""
        monkeypatch.setattr(server.Intake, "DELETES_LINGER_S", 3_600.0)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in range(10):
                assert len(bodies(stand_in, "agenticai-updates")) == number
                push(stand_in, *news(number))
                await received_in_order(client, number)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 1

    async def test_lingering_ends(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """An update without company is deleted all the same."""
        async with running_gateway(platform):
            push(stand_in, *news(1))
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert stand_in.calls["sqs", "DeleteMessageBatch"] == 1

    async def test_fifo_does_not_linger(
        self, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A FIFO queue holds the rest of a group back until what came was deleted."""
        monkeypatch.setattr(server.Intake, "DELETES_LINGER_S", 3_600.0)
        platform = stand_in.create_platform(fifo_updates=True)
        queue = platform.queue_names["updates"]
        async with running_gateway(platform):
            push(stand_in, *news(1), queue=queue)
            await eventually(lambda: not bodies(stand_in, queue))

    async def test_same_event_id(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """An agent that sends an update twice under one event id is heard once."""
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in (1, 2, 3):
                push(stand_in, *news(number, number, event_id=f"e{number // 2}"))
            push(stand_in, *news(4))
            events = await client.receive_many(3)
            assert [(each["data"], each["seq"]) for each in events] == [(1, 1), (2, 2), (4, 3)]

    async def test_old_ids_are_forgotten(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An event id that comes again after its window is another update's."""
        for window in ("EVENT_ID_WINDOW_S", "CLOCK_SKEW_S"):
            monkeypatch.setattr(server, window, -1_000)  # over before it begins
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            for number in (1, 2):
                push(stand_in, *news(number, event_id="e"))
                await received_in_order(client, number)

    async def test_projects_do_not_wait_for_each_other(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """A project whose log is held up holds up no other, and is not given back meanwhile."""
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        blocked = True

        def fault(call: Call) -> Fault | None:
            slow = (
                blocked and call.operation == "TransactWriteItems" and "#slow" in str(call.request)
            )
            return THROTTLED if slow else None

        stand_in.fault = fault
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server.Intake, "VISIBILITY_S", 1)
            async with (
                running_gateway(platform) as gateway,
                client_of(gateway, project_id=["slow", "fast"]) as client,
            ):
                await client.receive_many(2)
                push(stand_in, *news(*range(12), project_id="slow"), *news(1, project_id="fast"))
                [event] = await received_in_order(client, 1)
                assert event["project_id"] == "fast"
                renewals = ("sqs", "ChangeMessageVisibilityBatch")
                await eventually(lambda: stand_in.calls[renewals] >= 10)
                blocked = False
                await received_in_order(client, *range(12))
                await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
        assert not bodies(stand_in, "agenticai-updates-dlq")

    async def test_renewal_fails(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An update whose visibility could not be renewed comes again, and is recognised."""
        monkeypatch.setattr(server.Intake, "VISIBILITY_S", 1)
        stand_in.queues["agenticai-updates"].attributes["VisibilityTimeout"] = "1"
        blocked = True

        def fault(call: Call) -> Fault | None:
            if call.operation == "ChangeMessageVisibilityBatch":
                return SERVER_ERROR
            return THROTTLED if blocked and call.operation == "TransactWriteItems" else None

        stand_in.fault = fault
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            push(stand_in, *news(1))
            [message] = stand_in.queues["agenticai-updates"].messages
            await eventually(lambda: message.receive_count >= 3)
            blocked = False
            await received_in_order(client, 1)
            await eventually(lambda: not bodies(stand_in, "agenticai-updates"))
            assert await client.has_nothing_more()

    async def test_room(
        self, stand_in: StandIn, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task takes no more updates in hand than it has room for, and then goes on."""
        monkeypatch.setattr(server.Intake, "UPDATES_IN_HAND", 20)
        stand_in.fault = always("TransactWriteItems", THROTTLED)
        async with (
            running_gateway(platform) as gateway,
            client_of(gateway, project_id="p") as client,
        ):
            await client.receive()
            queue = stand_in.queues["agenticai-updates"]
            push(stand_in, *news(*range(300)))
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"] >= 4)
            in_one_piece = server.Receiver.RECEIVED_AT_ONCE + 10 * server.Receiver.POLLS_AT_ONCE
            assert 20 <= queue.in_flight <= 20 + in_one_piece
            stand_in.fault = None
            await received_in_order(client, *range(300))
            await eventually(lambda: not queue.bodies)

    @pytest.mark.parametrize("lost", ["queue", "table"])
    async def test_lost(self, stand_in: StandIn, platform: aws_standin.Platform, lost: str) -> None:
        """A queue or a table that is gone ends the process, with a sentence that names it."""
        push(stand_in, *news(1))

        def lose(call: Call) -> None:
            if call.operation == "ReceiveMessage" and lost == "queue":
                stand_in.queues.pop("agenticai-updates", None)
            elif call.operation == "ReceiveMessage":
                stand_in.tables.pop(platform.events_table_name, None)

        stand_in.fault = lose
        sentence = await how_it_ends(running_gateway(platform))
        assert sentence.startswith({"queue": "updates queue: ", "table": "event log: "}[lost])

    async def test_delete_refused(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A task that may not delete updates would repeat them for ever: it ends."""
        stand_in.fault = always("DeleteMessageBatch", Fault(status=403, code="AccessDenied"))
        push(stand_in, *news(1))
        sentence = await how_it_ends(running_gateway(platform))
        assert sentence.startswith("updates queue: DeleteMessageBatch failed for good")

    async def test_drain_finishes_what_is_in_hand(
        self, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """Updates in hand at the end are brought through, and no others taken."""
        stand_in.fault = always("TransactWriteItems", Fault(delay_s=0.2))
        async with running_gateway(platform) as gateway:
            push(stand_in, *news(1, 2))
            await eventually(lambda: stand_in.calls["dynamodb", "TransactWriteItems"])
        assert bodies(stand_in, "agenticai-updates") == []
        async with aws_clients(platform) as aws:
            log = LogKit(aws, platform).log()
            assert await log.head("p") == 2
        assert gateway.health() == {"status": "draining"}

    async def test_snapshot(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """A snapshot is the platform's own item of the project, without its keys, as JSON."""
        item: Json = {
            "PK": {"S": "PROJECT#p"},
            "SK": {"S": "METADATA"},
            "name": {"S": "caf\u00e9"},
            "cost": {"N": "1.50"},
            "tags": {"SS": ["b", "a"]},
            "sizes": {"NS": ["2", "1"]},
            "plan": {"M": {"steps": {"L": [{"BOOL": True}, {"NULL": True}]}}},
            "raw": {"B": "AAE="},
        }
        stand_in.tables[platform.table_name].put(("PROJECT#p", "METADATA"), item)
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            assert await client.receive() == {
                "type": "project_snapshot",
                "project_id": "p",
                "data": {
                    "name": "caf\u00e9",
                    "cost": 1.5,
                    "tags": ["a", "b"],
                    "sizes": [1, 2],
                    "plan": {"steps": [True, None]},
                    "raw": "AAE=",
                },
            }
            await client.send(action="subscribe", project_id="q", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            assert (await client.receive())["data"] is None

    async def test_no_snapshot(self, stand_in: StandIn, platform: aws_standin.Platform) -> None:
        """Without the platform's table there are no snapshots, but events all the same."""
        del stand_in.tables[platform.table_name]
        async with running_gateway(platform) as gateway, client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            error = await client.receive()
            assert (error["type"], error["code"]) == ("error", "unavailable")
            assert (error["action"], error["project_id"]) == ("subscribe", "p")
            push(stand_in, *news(1))
            await received_in_order(client, 1)


# --- Metrics --------------------------------------------------------------------------------


class TestMetrics:
    @pytest.fixture
    def registry(self) -> Registry:
        return Registry()

    @pytest.fixture
    def metrics(self, registry: Registry) -> Metrics:
        return Metrics("prod", registry)

    def test_sample(self) -> None:
        """A sample keeps a hundred values, of which each has had the same chance."""
        sample = Sample()
        for value in range(10_000):
            sample.add(value)
        values = sample.take()
        assert len(set(values)) == 100
        assert set(values) <= set(range(10_000))
        assert 2_500 < sum(values) / 100 < 7_500
        assert sample.take() == []

    def test_small_sample(self) -> None:
        """Up to a hundred values are all kept."""
        sample = Sample()
        for value in range(100):
            sample.add(value + 0.12345)
        assert sample.take() == [pytest.approx(value + 0.123) for value in range(100)]

    def test_line(self, metrics: Metrics, registry: Registry) -> None:
        """A line is one object in CloudWatch's Embedded Metric Format, and names every value."""
        registry.connections["a"] = listener = Listener("a")
        registry.join(listener, registry.channel("p"))
        registry.join(listener, registry.channel(EVERYONE))
        metrics.forwarded(0.25)
        metrics.delivered([Event("p", 1, b"{}", time.time() - 2)], 1)
        metrics.connection_duration.add(12.0)
        line = json.loads(json.dumps(metrics.line()))
        [definition] = line["_aws"]["CloudWatchMetrics"]
        assert abs(line["_aws"]["Timestamp"] / 1000 - time.time()) < 60
        assert definition["Namespace"] == "AgenticAI/WebSocket"
        assert definition["Dimensions"] == [["Environment", "Service"]]
        assert (line["Environment"], line["Service"]) == ("prod", "websocket-gateway")
        assert {each["Name"]: each["Unit"] for each in definition["Metrics"]} == {
            name: str(unit)
            for name, (unit, _) in server.Metrics.described().items()
            if name in line  # a gauge that has no owner here is missing
        }
        assert (line["ActiveConnections"], line["Subscriptions"]) == (1, 1)
        assert (line["MessagesForwarded"], line["EventsDelivered"]) == (1, 1)
        assert (line["ForwardLatency"], line["ConnectionDuration"]) == ([250.0], [12.0])
        assert line["EventLatency"] == [pytest.approx(2_000, rel=0.5)]

    def test_line_counts_since_the_last(self, metrics: Metrics) -> None:
        """A line has what happened since the one before, and leaves out samples without values."""
        metrics.forwarded(0.1)
        metrics.forward_errors += 3
        first, second = metrics.line(), metrics.line()
        assert (first["MessagesForwarded"], first["ForwardErrors"]) == (1, 3)
        assert (second["MessagesForwarded"], second["ForwardErrors"]) == (0, 0)
        assert "ForwardLatency" not in second
        names = {each["Name"] for each in second["_aws"]["CloudWatchMetrics"][0]["Metrics"]}
        assert names == set(second) - {"_aws", "Environment", "Service"}

    def test_stats(self, metrics: Metrics) -> None:
        """The figures for people count from the start, and a line does not reset them."""
        for took_s in (0.1, 0.2, 0.3):
            metrics.forwarded(took_s)
        stats = metrics.stats()
        assert stats["MessagesForwarded"] == 3
        assert stats["ForwardLatency"] == {"p50": 200.0, "max": 300.0}
        assert "EventLatency" not in stats
        metrics.line()
        assert metrics.stats()["MessagesForwarded"] == 3
        assert set(metrics.stats()) <= set(server.Metrics.described())


# --- Connection ----------------------------------------------------------------------------


def request(path: str = "/ws", method: str = "GET", **headers: str) -> bytes:
    """An HTTP request; `X_Name="value"` becomes a header."""
    fields = {"Host": "gateway", **{name.replace("_", "-"): v for name, v in headers.items()}}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode()


def upgrade(path: str = "/ws", **headers: str) -> bytes:
    """The opening handshake of RFC 6455, section 1.2."""
    opening = {
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec_WebSocket_Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec_WebSocket_Version": "13",
    }
    return request(path, **{**opening, **headers})


def masked(payload: bytes, opcode: int = Opcode.TEXT, *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame (RFC 6455, section 5.2), of any kind, also of those that are forbidden."""
    first, size = fin << 7 | rsv << 4 | opcode, len(payload)
    if size < 126:
        head = struct.pack("!BB", first, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", first, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", first, 0x80 | 127, size)
    return head + MASK + apply_mask(payload, MASK)


MASK = b"\x12\x34\x56\x78"
DEFLATED = 0b100  # RSV1, of a message's first frame (RFC 7692, section 6)


class Peer:
    """The other end of a socket, down to its bytes: it sends nothing by itself.

    Attributes:
        received_bytes: how many bytes of frames were read.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, deflates: bool
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._protocol = client_protocol(deflates=deflates)
        self._frames: deque[Frame] = deque()
        self.received_bytes = 0

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def send_frame(
        self, payload: bytes, opcode: int = Opcode.TEXT, *, fin: bool = True, rsv: int = 0
    ) -> None:
        self.write(masked(payload, opcode, fin=fin, rsv=rsv))

    def send(self, **message: Any) -> None:
        self.send_frame(json.dumps(message).encode())

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """An HTTP response: status, headers with their names in small letters, body."""
        async with asyncio.timeout(DEADLINE_S):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = dict(line.split(": ", 1) for line in head[1:-2])
            headers = {name.lower(): value for name, value in headers.items()}
            body = await self._reader.readexactly(int(headers.get("content-length", "0")))
        return int(head[0].split()[1]), headers, body

    async def next_frame(self) -> Frame | None:
        """The next frame; ``None`` once the gateway has closed the socket."""
        async with asyncio.timeout(DEADLINE_S):
            while not self._frames:
                try:
                    data = await self._reader.read(65_536)
                except ConnectionError:
                    return None
                if not data:
                    return None
                self.received_bytes += len(data)
                self._protocol.receive_data(data)
                assert self._protocol.parser_exc is None
                self._frames += cast("list[Frame]", self._protocol.events_received())
        return self._frames.popleft()

    async def receive(self) -> Json:
        """The next message; the connection must not end before it."""
        frame = await self.next_frame()
        assert frame is not None
        assert frame.opcode is Opcode.TEXT
        return cast("Json", json.loads(bytes(frame.data)))

    async def ask(self, **message: Any) -> Json:
        self.send(**message)
        return await self.receive()

    async def rest(self) -> list[Frame]:
        """Every frame until the gateway closes the socket."""
        return [frame async for frame in self._until_closed()]

    async def _until_closed(self) -> AsyncIterator[Frame]:
        while frame := await self.next_frame():
            yield frame

    async def close_code(self) -> int | None:
        """The code with which the gateway closes; ``None`` if it just cuts the connection."""
        while frame := await self.next_frame():
            if frame.opcode is Opcode.CLOSE:
                return int.from_bytes(frame.data[:2], "big")
        return None

    async def everything(self) -> bytes:
        """All bytes until the gateway closes the socket."""
        async with asyncio.timeout(DEADLINE_S):
            return await self._reader.read()

    async def answer_close(self) -> None:
        """See the closing handshake through, after `close_code`."""
        self.send_frame(b"", Opcode.CLOSE)
        assert await self.rest() == []
        self.end()

    async def is_answered(self) -> bool:
        """Whether the connection still works, and nothing else has come before."""
        answer = await self.ask(action="ping")
        return bool(answer["type"] == "pong")

    def end(self) -> None:
        """Send no more, as a client does whose process is ended in order."""
        self._writer.write_eof()

    def reset(self) -> None:
        """Vanish, as a client does whose process was killed with data still unread."""
        raw = cast("socket.socket", self._writer.get_extra_info("socket"))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@contextlib.asynccontextmanager
async def dialled(gateway: Gateway, *, deflates: bool = False) -> AsyncIterator[Peer]:
    """A peer that is connected, and has said nothing yet."""
    reader, writer = await asyncio.open_connection(*gateway.address)
    try:
        yield Peer(reader, writer, deflates=deflates)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def peer_of(
    gateway: Gateway, opening: bytes = upgrade(), *, deflates: bool = False
) -> AsyncIterator[Peer]:
    """A peer whose connection is open and greeted."""
    if deflates:
        opening = upgrade(Sec_WebSocket_Extensions="permessage-deflate")
    async with dialled(gateway, deflates=deflates) as peer:
        peer.write(opening)
        status, _, _ = await peer.response()
        assert status == 101
        assert (await peer.receive())["type"] == "connected"
        yield peer


async def fetch(
    gateway: Gateway, path: str = "/health", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """The response to one HTTP request, after which the gateway closes the connection."""
    async with dialled(gateway) as peer:
        peer.write(request(path, method, **headers))
        response = await peer.response()
        assert await peer.rest() == []
    return response


NO_LIMITS: dict[str, Any] = {"max_handshakes_per_second_per_ip": 0}
"""All clients of a test have one address."""


@contextlib.asynccontextmanager
async def gateway_in_a_task(platform: Platform) -> AsyncIterator[Gateway]:
    """A gateway that a fixture can start and end, though it does so in two tasks."""
    started = asyncio.Event()
    over = asyncio.Event()
    gateways: list[Gateway] = []

    async def hold() -> None:
        try:
            async with running_gateway(platform, **NO_LIMITS) as gateway:
                gateways.append(gateway)
                started.set()
                await over.wait()
        finally:
            started.set()

    holding = asyncio.create_task(hold())
    await started.wait()
    if gateways:
        yield gateways[0]
    over.set()
    await holding


@pytest.fixture
async def gateway(platform: aws_standin.Platform) -> AsyncIterator[Gateway]:
    """A gateway without limits of rate, and with the stand-in for AWS."""
    async with gateway_in_a_task(platform) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def standing() -> AsyncIterator[Gateway]:
    """The same for tests that leave nothing behind: to start one takes longer than they do."""
    stand_in = await StandIn().start()
    async with gateway_in_a_task(stand_in.create_platform()) as gateway:
        yield gateway
    await stand_in.stop()


standing_loop = pytest.mark.asyncio(loop_scope="module")
"""Marks the tests that use `standing`: they run in its event loop."""


def hold_back(stand_in: StandIn) -> asyncio.Event:
    """Have SQS not answer a forward before the event that is returned is set."""
    go_on = asyncio.Event()

    def fault(call: Call) -> Fault | None:
        held = call.operation == "SendMessageBatch" and not go_on.is_set()
        return Fault(silent=True) if held else None

    stand_in.fault = fault
    return go_on


def narrow(gateway: Gateway) -> None:
    """Have the kernel keep little of what clients do not read, so that backlogs soon show."""
    for connection in gateway.registry.connections.values():
        raw = connection.transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR]


over_one_gateway = hypothesis_settings(
    max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
"""For examples of which each has a connection of its own, to the one gateway of the test."""


class TestConnection:
    @standing_loop
    @over_one_gateway
    @given(
        text=st.text(min_size=1, max_size=256),
        cuts=st.lists(st.integers(0, 1_100), max_size=8),
        pings=st.lists(st.tuples(st.integers(0, 8), st.binary(max_size=125)), max_size=4),
        deflated=st.booleans(),
    )
    async def test_fragments(
        self,
        standing: Gateway,
        text: str,
        cuts: list[int],
        pings: list[tuple[int, bytes]],
        deflated: bool,
    ) -> None:
        """Server puts any text in any fragments together, with control frames between them."""
        message = {"action": "unsubscribe", "project_id": text}
        payload = json.dumps(message, ensure_ascii=False).encode()
        data = deflate(payload) if deflated else payload
        bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        fragments = [data[start:end] for start, end in itertools.pairwise(bounds)]
        async with peer_of(standing, deflates=True) as peer:
            for i, fragment in enumerate(fragments):
                opcode = Opcode.CONT if i else Opcode.TEXT
                fin = i == len(fragments) - 1
                rsv = DEFLATED if deflated and not i else 0
                peer.send_frame(fragment, opcode, fin=fin, rsv=rsv)
                for place, content in pings:
                    if place == i and not fin:
                        peer.send_frame(content, Opcode.PING)
            peer.send_frame(b"", Opcode.CLOSE)
            answers = [(each.opcode, bytes(each.data)) for each in await peer.rest()]
        [answer] = [content for opcode, content in answers if opcode is Opcode.TEXT]
        assert json.loads(answer) == {"type": "unsubscription_confirmed", "project_id": text}
        pongs = [content for opcode, content in answers if opcode is Opcode.PONG]
        ordered = sorted(pings, key=lambda ping: ping[0])
        assert pongs == [content for place, content in ordered if place < len(fragments) - 1]

    @standing_loop
    @over_one_gateway
    @given(
        data=st.binary(min_size=1, max_size=300),
        opcode=st.integers(0, 15) | st.none(),
        fin=st.booleans(),
    )
    async def test_any_bytes(
        self, standing: Gateway, data: bytes, opcode: int | None, fin: bool
    ) -> None:
        """No bytes after the handshake disturb any other connection."""
        async with peer_of(standing) as other:
            async with peer_of(standing) as peer:
                peer.write(masked(data, opcode, fin=fin) if opcode is not None else data)
                peer.end()
                await peer.rest()
            assert await other.is_answered()

    @standing_loop
    async def test_pieces_of_bytes(self, standing: Gateway) -> None:
        """A frame may come a byte at a time."""
        async with peer_of(standing) as peer:
            whole = masked(b'{"action":"ping"}', Opcode.TEXT)
            for byte in whole:
                peer.write(bytes((byte,)))
                await asyncio.sleep(0)
            assert (await peer.receive())["type"] == "pong"

    @pytest.mark.parametrize("fragments", [1, 2, 5])
    async def test_largest_message(self, platform: aws_standin.Platform, fragments: int) -> None:
        """A message of exactly `MAX_MESSAGE_BYTES` is taken, in however many fragments."""
        message = json.dumps({"action": "ping"}).encode().ljust(2_000)
        size = len(message) // fragments
        async with (
            running_gateway(platform, max_message_bytes=2_000) as gateway,
            peer_of(gateway) as peer,
        ):
            for start in range(0, 2_000, size):
                peer.send_frame(
                    message[start : start + size],
                    Opcode.CONT if start else Opcode.TEXT,
                    fin=start + size == 2_000,
                )
            assert (await peer.receive())["type"] == "pong"

    @pytest.mark.parametrize("sizes", [[2_001], [1_000, 1_001], [0, 500, 500, 500, 501]])
    async def test_too_large(self, platform: aws_standin.Platform, sizes: list[int]) -> None:
        """Server closes with 1009 what exceeds the bound, be it over many fragments."""
        async with (
            running_gateway(platform, max_message_bytes=2_000) as gateway,
            peer_of(gateway) as peer,
        ):
            for i, size in enumerate(sizes):
                opcode = Opcode.CONT if i else Opcode.TEXT
                peer.send_frame(b" " * size, opcode, fin=False)
            assert await peer.close_code() == CloseCode.MESSAGE_TOO_BIG

    @standing_loop
    async def test_endless_empty_fragments(self, standing: Gateway) -> None:
        """Empty fragments may go on for ever: they cost nothing and hold nobody up."""
        async with peer_of(standing) as peer, peer_of(standing) as other:
            peer.send_frame(b'{"action":', fin=False)
            empty = masked(b"", Opcode.CONT, fin=False)
            for _ in range(100):
                peer.write(empty * 200)
                assert await other.is_answered()
            peer.send_frame(b'"ping"}', Opcode.CONT)
            assert (await peer.receive())["type"] == "pong"

    @standing_loop
    @pytest.mark.parametrize(
        "fragments",
        [[b"\xff"], [b'"\xc3', b'"'], [b"\xed\xa0\x80"], [b"\xf0\x9f", b"\x92"], [b"\xc0\x80"]],
        ids=repr,
    )
    async def test_invalid_utf8(self, standing: Gateway, fragments: list[bytes]) -> None:
        """Server closes with 1007 a text that is not UTF-8."""
        async with peer_of(standing) as peer:
            for i, fragment in enumerate(fragments):
                opcode, fin = (Opcode.CONT if i else Opcode.TEXT), fragment is fragments[-1]
                peer.send_frame(fragment, opcode, fin=fin)
            assert await peer.close_code() == CloseCode.INVALID_DATA

    @standing_loop
    @pytest.mark.parametrize(
        "frames",
        {
            "not masked": [server.frame(b"{}")],
            "RSV1": [masked(b"{}", rsv=0b100)],
            "RSV2": [masked(b"{}", rsv=0b010)],
            "RSV3": [masked(b"{}", rsv=0b001)],
            "unknown opcode": [masked(b"", 0x3)],
            "unknown control opcode": [masked(b"", 0xB)],
            "fragmented ping": [masked(b"", Opcode.PING, fin=False)],
            "ping of 126 bytes": [masked(bytes(126), Opcode.PING)],
            "length over 63 bits": [b"\x81\xff\xff" + bytes(7)],
            "nothing to continue": [masked(b"{}", Opcode.CONT)],
            "text within a text": [masked(b"", Opcode.TEXT, fin=False)] * 2,
            "close of one byte": [masked(b"\x03", Opcode.CLOSE)],
            "close with 1005": [masked(b"\x03\xed", Opcode.CLOSE)],
            "close with 999": [masked(b"\x03\xe7", Opcode.CLOSE)],
        }.items(),
        ids=lambda item: item[0],
    )
    async def test_protocol_violation(
        self, standing: Gateway, frames: tuple[str, list[bytes]]
    ) -> None:
        """Server closes with 1002 what RFC 6455 forbids."""
        async with peer_of(standing) as peer:
            peer.write(b"".join(frames[1]))
            assert await peer.close_code() in (CloseCode.PROTOCOL_ERROR, CloseCode.MESSAGE_TOO_BIG)

    @standing_loop
    async def test_ping(self, standing: Gateway) -> None:
        """Server answers a ping frame with its content, and takes an unasked pong in silence."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"anybody?", Opcode.PONG)
            peer.send_frame(b"anybody?", Opcode.PING)
            pong = await peer.next_frame()
            assert pong is not None
            assert (pong.opcode, bytes(pong.data)) == (Opcode.PONG, b"anybody?")

    # The opening handshake.

    @standing_loop
    @pytest.mark.parametrize("path", ["/", "/ws", "/ws?token=x"])
    async def test_opening_handshake(self, standing: Gateway, path: str) -> None:
        """Server completes the handshake of RFC 6455's own example."""
        async with dialled(standing) as peer:
            peer.write(upgrade(path))
            status, headers, _ = await peer.response()
            assert status == 101
            assert headers["sec-websocket-accept"] == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
            assert "sec-websocket-extensions" not in headers
            assert (await peer.receive())["type"] == "connected"

    @standing_loop
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
    async def test_handshake_in_pieces(self, standing: Gateway, size: int) -> None:
        """The request may come in pieces of any size."""
        opening = upgrade()
        async with dialled(standing) as peer:
            for start in range(0, len(opening), size):
                peer.write(opening[start : start + size])
                await asyncio.sleep(0.001)  # so that most pieces are received one by one
            assert (await peer.response())[0] == 101
            assert (await peer.receive())["type"] == "connected"

    @standing_loop
    @pytest.mark.parametrize(
        "early",
        [masked(b'{"action":"ping"}'), b"\x81", b"GET /live HTTP/1.1\r\n"],
        ids=["a frame", "half a frame", "half a request"],
    )
    async def test_data_before_the_handshake_ends(self, standing: Gateway, early: bytes) -> None:
        """What is sent along with the opening request is refused, not mistaken for messages."""
        received = standing.metrics.messages_received
        async with dialled(standing) as peer:
            peer.write(upgrade() + early)
            assert (await peer.response())[0] == 400
            assert await peer.rest() == []
        assert standing.metrics.messages_received == received

    @standing_loop
    @pytest.mark.parametrize(
        ("garbage", "status"),
        [
            (b"\x16\x03\x01\x02\0 a TLS client\r\n\r\n", 400),
            (b"\r\n", 400),
            (b"GET\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (request("/ws", "POST", Content_Length="3") + b"abc", 400),
            (request("/ws", "POST", Transfer_Encoding="chunked"), 400),
            (request("/ws", "POST"), 405),
            (upgrade().replace(b"GET", b"PUT"), 405),
            (upgrade(Sec_WebSocket_Version="12"), 400),
            (upgrade(Sec_WebSocket_Key="short"), 400),
            (request("/ws"), 426),
            (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
            (request(**{f"X_{i}": "x" for i in range(200)}), 431),
            (request(X_Long="x" * 20_000), 431),
            (b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 8_000) * 3, 431),
            (request("/nowhere"), 404),
        ],
        ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else None,
    )
    async def test_bad_request(self, standing: Gateway, garbage: bytes, status: int) -> None:
        """Server answers a request it cannot serve with its status, and hangs up."""
        opened = standing.metrics.connections_opened
        async with dialled(standing) as peer:
            peer.write(garbage)
            assert (await peer.response())[0] == status
            assert await peer.rest() == []
            peer.end()
        await eventually(lambda: not standing.registry.pending)
        assert standing.metrics.connections_opened == opened

    async def test_header_flood(self, gateway: Gateway) -> None:
        """Headers without an end are cut off long before they fill the memory."""
        async with dialled(gateway) as peer:
            sent = 0
            with contextlib.suppress(ConnectionError):
                peer.write(b"GET /ws HTTP/1.1\r\n")
                while gateway.registry.pending or not sent:
                    peer.write(b"X: %s\r\n" % (b"x" * 8_000))
                    sent += 8_000
                    await asyncio.sleep(0)
                    if sent > 1_000_000:
                        peer.end()
                        assert (await peer.response())[0] == 431
                        break
        await eventually(lambda: not gateway.registry.pending)

    @pytest.mark.parametrize("begun", [b"", b"GET /ws HTTP/1.1\r\nHost: a"], ids=["mute", "slow"])
    async def test_slow_handshake(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch, begun: bytes
    ) -> None:
        """A peer that does not finish its request is dropped."""
        monkeypatch.setattr(server.Connection, "HANDSHAKE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with running_gateway(platform) as gateway, dialled(gateway) as peer:
            peer.write(begun)
            assert await peer.rest() == []
            assert not gateway.registry.pending

    async def test_vanishes_in_the_handshake(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A peer that leaves in the middle of its request leaves no trace."""
        for leave in (Peer.reset, Peer.end):
            async with dialled(gateway) as peer:
                peer.write(b"GET /ws HTTP/1.1\r\n")
                await eventually(lambda: gateway.registry.pending)
                leave(peer)
                await eventually(lambda: not gateway.registry.pending)
        assert "connection closed" not in caplog.messages

    # The closing handshake.

    @standing_loop
    @pytest.mark.parametrize("content", [b"", b"\x03\xe8", b"\x03\xe9bye", b"\x0f\xa0"], ids=repr)
    async def test_client_closes(self, standing: Gateway, content: bytes) -> None:
        """Server returns the close frame and then closes the socket; what follows is ignored."""
        async with peer_of(standing) as peer:
            peer.send_frame(content, Opcode.CLOSE)
            peer.send(action="ping")
            [close] = await peer.rest()
            assert (close.opcode, bytes(close.data)) == (Opcode.CLOSE, content)
            peer.end()
            await eventually(
                lambda: not standing.registry.pending and not standing.registry.connections
            )

    @standing_loop
    async def test_close_within_a_message(self, standing: Gateway) -> None:
        """A close between fragments ends the connection all the same."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"{", fin=False)
            peer.send_frame(b"\x03\xe8", Opcode.CLOSE)
            assert await peer.close_code() in (CloseCode.NORMAL_CLOSURE, CloseCode.PROTOCOL_ERROR)

    async def test_server_closes(self, gateway: Gateway) -> None:
        """Server sends one close frame, and hears nothing that comes after it but the answer."""
        async with peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.close(CloseCode.GOING_AWAY, "enough")
            connection.close(CloseCode.NORMAL_CLOSURE, "once more")
            assert not gateway.registry.connections
            received = gateway.metrics.messages_received
            peer.send(action="ping")
            close = await peer.next_frame()
            assert close is not None
            assert bytes(close.data) == b"\x03\xe9enough"
            peer.send_frame(b"\x03\xe9", Opcode.CLOSE)
            assert await peer.rest() == []
            assert gateway.metrics.messages_received == received
            peer.end()
            await eventually(lambda: not gateway.registry.pending)

    async def test_close_is_not_answered(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A peer that does not answer a close frame is cut off after a while."""
        monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with running_gateway(platform) as gateway, peer_of(gateway) as peer:
            [connection] = gateway.registry.connections.values()
            connection.close(CloseCode.GOING_AWAY)
            assert await peer.close_code() == CloseCode.GOING_AWAY
            await eventually(lambda: not gateway.registry.pending)

    async def test_closed_in_the_handshake(self, gateway: Gateway) -> None:
        """To close a connection before it is open cuts it."""
        async with dialled(gateway) as peer:
            await eventually(lambda: gateway.registry.pending)
            [connection] = gateway.registry.pending
            connection.close(CloseCode.GOING_AWAY)
            assert await peer.rest() == []

    @pytest.mark.parametrize("leave", [Peer.end, Peer.reset], ids=["EOF", "RST"])
    async def test_client_vanishes(
        self, gateway: Gateway, caplog: pytest.LogCaptureFixture, leave: Any
    ) -> None:
        """A client that is gone without a word is forgotten, with code 1006 and no traceback."""
        caplog.set_level(logging.INFO, "gateway")
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            await peer.ask(action="subscribe", project_id="p")
            leave(peer)
            await eventually(lambda: len(gateway.registry.connections) == 1)
            assert "p" not in gateway.registry.channels
            await eventually(lambda: not gateway.registry.pending)
            assert await other.is_answered()
        closed = next(each for each in caplog.records if each.message == "connection closed")
        assert closed.__dict__["code"] == CloseCode.ABNORMAL_CLOSURE
        assert not errors_logged(caplog)

    async def test_mistake_of_ours(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception while a message is handled costs its connection only, with 1011."""
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            with monkeypatch.context() as patch:
                patch.setattr(gateway.messages, "handle", lambda *_: 1 / 0)
                peer.send(action="ping")
                assert await peer.close_code() == CloseCode.INTERNAL_ERROR
            assert await other.is_answered()
        assert errors_logged(caplog) == ["connection failed"]

    @pytest.mark.usefixtures("impatient")
    async def test_mistake_after_a_pause(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """The same for a message that had to wait for the forwards before it."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(server.Connection.FORWARDS_IN_FLIGHT + 1):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            in_flight = server.Connection.FORWARDS_IN_FLIGHT
            await eventually(lambda: gateway.metrics.messages_received == in_flight)
            with monkeypatch.context() as patch:
                patch.setattr(gateway.messages, "handle", lambda *_: 1 / 0)
                go_on.set()
                assert await peer.close_code() == CloseCode.INTERNAL_ERROR
        assert errors_logged(caplog) == ["connection failed"]

    async def test_mistake_in_the_handshake(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An exception while a request is answered cuts its connection only."""
        with monkeypatch.context() as patch:
            patch.setattr(gateway.door, "answer", lambda *_: 1 / 0)
            async with dialled(gateway) as peer:
                peer.write(upgrade())
                assert await peer.rest() == []
        assert (await fetch(gateway))[0] == 200
        assert errors_logged(caplog) == ["connection failed"]

    # Compression.

    @standing_loop
    @pytest.mark.parametrize(
        ("offer", "answer"),
        [
            ("permessage-deflate", ""),
            ("permessage-deflate; server_no_context_takeover; client_no_context_takeover", ""),
            ("permessage-deflate; client_max_window_bits", ""),
            ("x-unknown, permessage-deflate", ""),
            ("permessage-deflate; server_max_window_bits=10", "; server_max_window_bits=10"),
        ],
    )
    async def test_negotiation(self, standing: Gateway, offer: str, answer: str) -> None:
        """Server takes permessage-deflate only without context takeover on either side."""
        async with dialled(standing) as peer:
            peer.write(upgrade(Sec_WebSocket_Extensions=offer))
            status, headers, _ = await peer.response()
        both = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        assert (status, headers["sec-websocket-extensions"]) == (101, both + answer)

    @standing_loop
    @pytest.mark.parametrize("offer", ["x-unknown", "permessage-deflate; server_max_window_bits=8"])
    async def test_nothing_negotiated(self, standing: Gateway, offer: str) -> None:
        """An offer that cannot be taken leaves a connection that works without."""
        opening = upgrade(Sec_WebSocket_Extensions=offer)
        async with peer_of(standing, opening) as peer:
            assert await peer.is_answered()

    async def test_compression_off(self, platform: aws_standin.Platform) -> None:
        """With `COMPRESSION=off` nothing is negotiated."""
        async with (
            running_gateway(platform, compression=False) as gateway,
            dialled(gateway) as peer,
        ):
            peer.write(upgrade(Sec_WebSocket_Extensions="permessage-deflate"))
            assert "sec-websocket-extensions" not in (await peer.response())[1]

    async def test_deflated_event(self, gateway: Gateway) -> None:
        """All who negotiated it read the one deflated frame, and nobody else gets it."""
        narrow = upgrade(Sec_WebSocket_Extensions="permessage-deflate; server_max_window_bits=10")
        async with (
            peer_of(gateway, deflates=True) as one,
            peer_of(gateway, deflates=True) as two,
            peer_of(gateway) as plain,
            peer_of(gateway, narrow) as small_window,
        ):
            peers = (one, two, plain, small_window)
            for peer in peers:
                await peer.ask(action="subscribe", project_id="p")
                peer.received_bytes = 0
            gateway.feed.accept(event(None, size=20_000), None)
            gateway.feed.accept(event(None, size=10), None)
            for peer in peers:
                assert [(await peer.receive())["data"] for _ in range(2)] == [
                    "x" * 20_000,
                    "x" * 10,
                ]
        assert one.received_bytes == two.received_bytes < 2_000
        assert plain.received_bytes == small_window.received_bytes > 20_000

    @standing_loop
    @pytest.mark.parametrize("count", [1, 10])
    async def test_bomb(self, standing: Gateway, count: int) -> None:
        """What grows too large as it is inflated closes with 1009, fragmented or not."""
        bomb = deflate(bytes(20_000_000))
        assert len(bomb) < 50_000
        size = len(bomb) // count + 1
        async with peer_of(standing, deflates=True) as peer:
            for i in range(count):
                part, opcode = bomb[i * size : (i + 1) * size], Opcode.CONT if i else Opcode.TEXT
                peer.send_frame(part, opcode, fin=i == count - 1, rsv=0 if i else DEFLATED)
            assert await peer.close_code() == CloseCode.MESSAGE_TOO_BIG

    async def test_little_is_held(self, gateway: Gateway, stand_in: StandIn) -> None:
        """Of what could inflate, a connection holds little, however much it may not act on yet."""
        forward = masked(b'{"action":"forward","type":"dev"}')
        bomb = masked(deflate(b" " * 262_000), rsv=DEFLATED)
        assert len(bomb) < 400
        go_on = hold_back(stand_in)
        async with peer_of(gateway, deflates=True) as peer:
            peer.write(forward * server.Connection.FORWARDS_IN_FLIGHT + bomb * 10)
            [connection] = gateway.registry.connections.values()
            await eventually(lambda: not connection.transport.is_reading())
            assert connection.in_flight == server.Connection.FORWARDS_IN_FLIGHT
            assert connection.inbox.held_bytes <= 2 * 262_144
            go_on.set()
            answers = [
                await peer.receive() for _ in range(server.Connection.FORWARDS_IN_FLIGHT + 10)
            ]
        kinds = Counter(each.get("code", each["type"]) for each in answers)
        assert kinds == {
            "forward_confirmed": server.Connection.FORWARDS_IN_FLIGHT,
            "invalid_json": 10,
        }

    @pytest.mark.parametrize("cut", [False, True], ids=["fragment", "cut frame"])
    async def test_unfinished_for_too_long(
        self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, cut: bool
    ) -> None:
        """A message that is begun has to end some time, whatever else is sent meanwhile."""
        monkeypatch.setattr(server.Sweep, "MESSAGE_TIMEOUT_S", 0.1)
        async with peer_of(gateway) as peer, peer_of(gateway) as other:
            if cut:
                peer.write(masked(b"x" * 1_000)[:500])
            else:
                peer.send_frame(b"{", fin=False)
                peer.send_frame(b"", Opcode.PONG)
            assert await peer.close_code() == CloseCode.POLICY_VIOLATION
            assert await other.is_answered()

    @standing_loop
    async def test_not_deflated(self, standing: Gateway) -> None:
        """What claims to be deflated and is not closes with 1002."""
        async with peer_of(standing, deflates=True) as peer:
            peer.send_frame(b"\xff\xff\xff\xff", rsv=DEFLATED)
            assert await peer.close_code() == CloseCode.PROTOCOL_ERROR

    async def test_forward_deflated(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A client may deflate what it sends, with a small window too."""
        message = b'{"action":"forward","type":"dev","message_id":"m1","data":"%s"}' % (
            b"x" * 9_000
        )
        deflater = zlib.compressobj(wbits=-9)
        data = deflater.compress(message) + deflater.flush(zlib.Z_SYNC_FLUSH)
        async with peer_of(gateway, deflates=True) as peer:
            peer.send_frame(data[:-4], rsv=DEFLATED)
            assert (await peer.receive())["type"] == "forward_confirmed"
        assert sent_ids(stand_in) == ["m1"]

    # Back-pressure.

    async def test_slow_reader(self, platform: aws_standin.Platform) -> None:
        """Who reads too slowly is closed with 1013, and costs the others nothing."""
        async with (
            running_gateway(platform, max_backlog_bytes=200_000) as gateway,
            peer_of(gateway) as slow,
            client_of(gateway) as quick,
        ):
            narrow(gateway)
            await slow.ask(action="subscribe", project_id="p")
            await quick.ask(action="subscribe", project_id="p")
            while gateway.registry.subscriptions == 2:
                gateway.feed.accept(event(None, size=50_000), None)
                assert len((await quick.receive())["data"]) == 50_000
            assert gateway.metrics.slow_consumers_closed == 1
            assert await slow.close_code() == CloseCode.TRY_AGAIN_LATER
            assert await quick.has_nothing_more()

    async def test_slow_reader_never_reads(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slow reader that does not even read its close frame is cut off."""
        monkeypatch.setattr(server, "CLOSE_TIMEOUT_S", 0.1)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        async with (
            running_gateway(platform, max_backlog_bytes=65_536) as gateway,
            peer_of(gateway),
        ):
            narrow(gateway)
            while gateway.registry.connections:
                gateway.feed.accept(event(None, EVERYONE, size=50_000), None)
                await asyncio.sleep(0)
            await eventually(lambda: not gateway.registry.pending)

    @pytest.mark.parametrize(
        "question",
        [
            masked(b'{"action":"unsubscribe","project_id":"%s"}' % (b"x" * 256)),
            masked(b"x" * 125, Opcode.PING),
        ],
        ids=["messages", "ping frames"],
    )
    async def test_asks_and_never_listens(
        self, platform: aws_standin.Platform, question: bytes
    ) -> None:
        """Answers that are not read count as any backlog."""
        async with (
            running_gateway(platform, max_backlog_bytes=65_536, **NO_LIMITS) as gateway,
            peer_of(gateway) as peer,
        ):
            narrow(gateway)
            while gateway.registry.connections:
                peer.write(question * 100)
                await asyncio.sleep(0)
            assert gateway.metrics.slow_consumers_closed == 1
            assert await peer.close_code() == CloseCode.TRY_AGAIN_LATER

    @pytest.mark.usefixtures("impatient")
    async def test_reading_pauses_for_forwards(self, gateway: Gateway, stand_in: StandIn) -> None:
        """While many forwards wait for SQS no more are read, and in the end all are confirmed."""
        go_on = hold_back(stand_in)
        data = "x" * 20_000
        count = 300  # more than is read before the pause, and kept by the kernel
        async with peer_of(gateway) as peer:
            for number in range(count):
                peer.send(action="forward", type="dev", message_id=f"m{number}", data=data)
            await eventually(
                lambda: gateway.metrics.messages_received >= server.Connection.FORWARDS_IN_FLIGHT
            )
            async with peer_of(gateway) as other:
                for _ in range(20):  # many turns of the loop, in which more could be read
                    assert await other.is_answered()
            assert gateway.metrics.messages_received < count / 2
            go_on.set()
            received = [await peer.receive() for _ in range(count)]
        assert {each["type"] for each in received} == {"forward_confirmed"}
        assert {each["message_id"] for each in received} == {f"m{i}" for i in range(count)}
        assert set(sent_ids(stand_in)) == {f"m{i}" for i in range(count)}

    @pytest.mark.usefixtures("impatient")
    async def test_violation_after_a_pause(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A violation behind many forwards closes the connection once it is reached."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(server.Connection.FORWARDS_IN_FLIGHT):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            peer.send_frame(b"\xff")
            in_flight = server.Connection.FORWARDS_IN_FLIGHT
            await eventually(lambda: gateway.metrics.messages_received == in_flight)
            go_on.set()
            assert await peer.close_code() == CloseCode.INVALID_DATA
            peer.end()
            await eventually(lambda: not gateway.registry.pending)
        assert len(set(sent_ids(stand_in))) == server.Connection.FORWARDS_IN_FLIGHT

    @pytest.mark.usefixtures("impatient")
    async def test_forward_of_one_who_left(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A forward whose client has left reaches its agent, and its answer nobody."""
        go_on = hold_back(stand_in)
        async with peer_of(gateway) as peer:
            for number in range(20):
                peer.send(action="forward", type="dev", message_id=f"m{number}")
            await eventually(lambda: gateway.metrics.messages_received == 20)
            peer.reset()
            go_on.set()
            await eventually(lambda: gateway.metrics.messages_forwarded == 20)
        assert len(set(sent_ids(stand_in))) == 20
        await eventually(lambda: not gateway.registry.pending and not gateway.registry.connections)
        assert not errors_logged(caplog)


# --- Gateway --------------------------------------------------------------------------------


def agents_say(stand_in: StandIn, *updates: Json) -> None:
    """Put updates into their queue, as agents do."""
    queue = stand_in.queues["agenticai-updates"]
    for each in updates:
        queue.push(json.dumps({"type": "project_updated", **each}))
    queue.wake()


async def fill_log(gateway: Gateway, count: int, size: int = 0, project_id: str = "p") -> None:
    """Append events behind the back of the gateway's channels, as another task does."""
    for start in range(0, count, 50):
        numbers = range(start + 1, min(start + 50, count) + 1)
        await append(gateway.log, project_id, [entry(number, size=size) for number in numbers])


async def seqs_until(peer: Peer, last: int) -> list[int]:
    """The seqs of the events that come, up to ``last``."""
    found: list[int] = []
    while not found or found[-1] < last:
        found.append((await peer.receive())["seq"])
    return found


TOO_LONG = "x" * 257

BAD_MESSAGES: dict[str, tuple[str, str]] = {
    "nothing": ("", "invalid_json"),
    "no JSON": ("{", "invalid_json"),
    "two values": ('{"action":"ping"} {}', "invalid_json"),
    "a lone quote": ('{"action":"', "invalid_json"),
    "NaN": ('{"action":NaN}', "invalid_json"),
    "deep": ('{"action":"ping","data":' + "[" * 100_000, "invalid_message"),
    "an array": ("[]", "invalid_message"),
    "a string": ('"ping"', "invalid_message"),
    "null": ("null", "invalid_message"),
    "no action": ('{"project_id":"p"}', "invalid_message"),
    "unknown action": ('{"action":"fly"}', "unknown_action"),
    "action of another case": ('{"action":"Ping"}', "unknown_action"),
    "action that is no string": ('{"action":1}', "unknown_action"),
    "no project": ('{"action":"subscribe"}', "invalid_field"),
    "empty project": ('{"action":"subscribe","project_id":""}', "invalid_field"),
    "long project": (f'{{"action":"subscribe","project_id":"{TOO_LONG}"}}', "invalid_field"),
    "project that is a number": ('{"action":"subscribe","project_id":1}', "invalid_field"),
    "nothing to unsubscribe": ('{"action":"unsubscribe"}', "invalid_field"),
    "since that is a string": (
        '{"action":"subscribe","project_id":"p","since":"1"}',
        "invalid_field",
    ),
    "negative since": ('{"action":"subscribe","project_id":"p","since":-1}', "invalid_field"),
    "huge since": (
        '{"action":"subscribe","project_id":"p","since":9007199254740992}',
        "invalid_field",
    ),
    "snapshot that is no boolean": (
        '{"action":"subscribe","project_id":"p","snapshot":"yes"}',
        "invalid_field",
    ),
    "no type": ('{"action":"forward","data":{}}', "invalid_field"),
    "unknown type": ('{"action":"forward","type":"marketing"}', "unknown_type"),
    "empty type": ('{"action":"forward","type":""}', "unknown_type"),
    "type that is a number": ('{"action":"forward","type":1}', "invalid_field"),
    "empty message_id": ('{"action":"forward","type":"dev","message_id":""}', "invalid_field"),
    "long message_id": (
        f'{{"action":"forward","type":"dev","message_id":"{TOO_LONG}"}}',
        "invalid_field",
    ),
    "character that SQS refuses": (
        b'{"action":"forward","type":"dev","data":"\\uffff"}'.decode("unicode_escape"),
        "invalid_character",
    ),
}


class ClockOf:
    """The module ``time`` with another monotonic clock."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self.monotonic = monotonic

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


class TestGateway:
    @standing_loop
    @pytest.mark.parametrize(("text", "code"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
    async def test_bad_message(self, standing: Gateway, text: str, code: str) -> None:
        """Server answers a bad message with a code and a sentence; the connection stays."""
        errors = standing.metrics.protocol_errors
        async with peer_of(standing) as peer:
            peer.send_frame(text.encode())
            error = await peer.receive()
            assert error["type"] == "error"
            assert error["code"] == code
            assert error["message"].endswith(".")
            assert error["message"][0].isupper()
            assert await peer.is_answered()
        assert standing.metrics.protocol_errors == errors + 1

    @standing_loop
    @pytest.mark.parametrize("fragments", [1, 2])
    async def test_binary_frame(self, standing: Gateway, fragments: int) -> None:
        """Server answers a binary frame with an error; the connection stays."""
        async with peer_of(standing) as peer:
            peer.send_frame(b"\xff\xfe", Opcode.BINARY, fin=fragments == 1)
            if fragments == 2:
                peer.send_frame(b"\xff", Opcode.CONT)
            assert (await peer.receive())["code"] == "binary_frame"
            assert await peer.is_answered()

    @standing_loop
    async def test_error_names_its_message(self, standing: Gateway) -> None:
        """An error says which message it answers, as far as that one can be told."""
        async with client_of(standing) as client:
            error = await client.ask(action="forward", type="none", message_id="m1", project_id="p")
            assert (error["action"], error["message_id"], error["project_id"]) == (
                "forward",
                "m1",
                "p",
            )
            error = await client.ask(action="subscribe", project_id="p", since=-1)
            assert (error["action"], error["project_id"]) == ("subscribe", "p")
            error = await client.ask(action=TOO_LONG)
            assert "action" not in error
            assert TOO_LONG not in error["message"]

    @standing_loop
    async def test_unknown_fields(self, standing: Gateway) -> None:
        """Fields that nobody knows are ignored."""
        async with client_of(standing) as client:
            assert (await client.ask(action="ping", colour="blue"))["type"] == "pong"

    @standing_loop
    async def test_greeting(self, standing: Gateway) -> None:
        """Every client is greeted first, with an id of its own."""
        async with client_of(standing) as one, client_of(standing, "/") as two:
            stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
            for client in (one, two):
                announced = {"ref", "max_message_bytes"}
                plain = {"type", "message", "timestamp", "connection_id"}
                assert client.greeting.keys() == plain | announced
                assert client.greeting["message"] == "WebSocket connection established"
                assert re.fullmatch(stamp, client.greeting["timestamp"])
            assert one.greeting["connection_id"] != two.greeting["connection_id"]

    # Forwards.

    async def test_forward(self, gateway: Gateway, stand_in: StandIn) -> None:
        """What lands in the agent's queue is what the protocol promises, `data` byte for byte."""
        data = r'{ "a":1.00, "b" :[1e5,"\u00e9\n"],"a":2 }'
        async with peer_of(gateway) as peer:
            peer.send_frame(
                b'{"data":%s,"action":"forward","message_id":"m1","type":"Code","project_id":"p"}'
                % data.encode()
            )
            answer = await peer.receive()
        [message] = stand_in.queues["agenticai-dev-queue"].messages
        assert answer == {
            "type": "forward_confirmed",
            "message_id": "m1",
            "sqs_message_id": message.message_id,
            "project_id": "p",
        }
        body = json.loads(message.body)
        assert list(body) == [
            "action", "type", "message_id", "project_id", "data", "connection_id", "client_id",
            "user", "timestamp",
        ]  # fmt: skip
        assert f'"data":{data},' in message.body
        assert (body["action"], body["type"], body["user"]) == ("forward", "Code", None)
        assert message.attributes["MessageType"]["StringValue"] == "Code"
        assert message.attributes["Timestamp"]["StringValue"] == body["timestamp"]

    @pytest.mark.parametrize("agent", ["pm", "dev", "qa", "ops"])
    async def test_forward_to_each(self, gateway: Gateway, stand_in: StandIn, agent: str) -> None:
        """Every alias, in any case, leads to its agent; a missing message id is made up."""
        aliases = [alias for alias, name in server.QUEUE_OF_TYPE.items() if name == agent]
        async with client_of(gateway) as client:
            answers = [
                await client.ask(action="forward", type=kind)
                for alias in aliases
                for kind in (alias, alias.upper())
            ]
        message_ids = [uuid.UUID(each["message_id"]) for each in answers]
        assert len(set(message_ids)) == len(answers)
        assert sent_ids(stand_in, f"agenticai-{agent}-queue") == [str(each) for each in message_ids]

    async def test_forward_too_large_for_sqs(self, platform: aws_standin.Platform) -> None:
        """What SQS would refuse is an error that names the limit."""
        limit = server.SQS_BATCH_BYTES
        async with (
            running_gateway(platform, max_message_bytes=limit) as gateway,
            client_of(gateway) as client,
        ):
            error = await client.ask(action="forward", type="dev", data="x" * (limit - 100))
            assert error["code"] == "too_large"
            assert str(limit) in error["message"]
            assert await client.has_nothing_more()

    @pytest.mark.usefixtures("impatient")
    async def test_overloaded(
        self,
        gateway: Gateway,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Beyond the bound of what may wait, the answer is an error at once."""
        monkeypatch.setattr(server.Forwarder, "MAX_WAITING", 2)
        go_on = hold_back(stand_in)
        async with client_of(gateway) as client:
            for number in range(3):
                await client.send(action="forward", type="dev", message_id=f"m{number}")
            error = await client.receive()
            assert (error["code"], error["message_id"]) == ("overloaded", "m2")
            assert error["retryable"] is True
            go_on.set()
            confirmed = await client.receive_many(2)
            assert {each["message_id"] for each in confirmed} == {"m0", "m1"}

    async def test_forward_times_out(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A forward that SQS does not take in time is an error that says so."""
        stand_in.fault = always("SendMessageBatch", Fault(silent=True))
        async with (
            running_gateway(platform, forward_timeout_seconds=0.2) as gateway,
            client_of(gateway) as client,
        ):
            error = await client.ask(action="forward", type="dev", message_id="m1")
            assert (error["code"], error["message_id"], error["action"]) == (
                "timeout",
                "m1",
                "forward",
            )
            assert await client.has_nothing_more()

    async def test_others_have_their_turn(self, gateway: Gateway) -> None:
        """Much that comes at once is taken in turns with what others send."""
        async with peer_of(gateway) as greedy, peer_of(gateway) as modest:
            greedy.write(masked(b'{"action":"ping"}') * 5_000)
            await greedy.receive()
            assert await modest.is_answered()
            assert gateway.metrics.messages_received < 5_000
            for _ in range(4_999):
                assert (await greedy.receive())["type"] == "pong"

    # HTTP.

    async def test_health(self, gateway: Gateway) -> None:
        """A task that can do its job says so, to HEAD without a body."""
        status, headers, body = await fetch(gateway, "/health")
        assert (status, json.loads(body)) == (200, {"status": "ok"})
        assert headers["content-type"] == "application/json"
        assert headers["cache-control"] == "no-store"
        assert headers["connection"] == "close"
        async with dialled(gateway) as peer:
            peer.write(request("/health", "HEAD"))
            peer.end()
            assert (await peer.everything()).endswith(b"\r\n\r\n")
        for method in ("POST", "PUT", "OPTIONS"):
            status, headers, _ = await fetch(gateway, "/health", method)
            assert (status, headers["allow"]) == (405, "GET, HEAD")

    @pytest.mark.usefixtures("impatient")
    async def test_health_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Until the log can be read a task is alive, not healthy, and lets nobody in."""
        stand_in.fault = always("GetItem", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(lambda: gateway.address[1])
            status, _, body = await fetch(gateway, "/health")
            assert (status, json.loads(body)) == (503, {"status": "starting"})
            assert (await fetch(gateway, "/live"))[0] == 200
            async with dialled(gateway) as peer:
                peer.write(upgrade())
                status, headers, _ = await peer.response()
            assert status == 503
            assert 1 <= int(headers["retry-after"]) <= 5
            stand_in.fault = None
            await eventually(gateway.ready.is_set)
            assert (await fetch(gateway, "/health"))[0] == 200
            gateway.drain.wanted.set()
            await running

    @pytest.mark.usefixtures("impatient")
    async def test_drained_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A task that is told to end before it was ready ends."""
        stand_in.fault = always("GetItem", THROTTLED)
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, topic=True), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(lambda: gateway.address[1])
            gateway.drain.wanted.set()
            async with asyncio.timeout(DEADLINE_S):
                await running

    @standing_loop
    async def test_live(self, standing: Gateway) -> None:
        """The container's own check is answered while the loop turns."""
        assert (await fetch(standing, "/live"))[0] == 200

    @standing_loop
    @pytest.mark.parametrize("path", ["/nowhere", "/ws/", "//", "/health/", "/stats/x", "/healthz"])
    async def test_not_found(self, standing: Gateway, path: str) -> None:
        """Every other path is 404, for upgrades too."""
        assert (await fetch(standing, path))[0] == 404
        async with dialled(standing) as peer:
            peer.write(upgrade(path))
            assert (await peer.response())[0] == 404

    async def test_stats(self, gateway: Gateway) -> None:
        """The figures are there for who asks on the machine itself."""
        async with client_of(gateway) as client:
            await client.ask(action="subscribe", project_id="p")
            await client.ask(action="forward", type="dev")
            status, _, body = await fetch(gateway, "/stats")
        stats = json.loads(body)
        assert status == 200
        assert stats["ActiveConnections"] == stats["Subscriptions"] == 1
        assert stats["MessagesReceived"] == 2
        assert stats["MessagesForwarded"] == 1
        assert stats["ForwardLatency"]["max"] > 0

    @standing_loop
    async def test_stats_not_through_a_proxy(self, standing: Gateway) -> None:
        """A request that was passed on gets no figures, whatever it claims."""
        for claimed in ("203.0.113.7", "127.0.0.1", ""):
            assert (await fetch(standing, "/stats", X_Forwarded_For=claimed))[0] == 404

    async def test_stats_not_from_elsewhere(self, gateway: Gateway) -> None:
        """A request from another machine gets no figures."""

        class Elsewhere(Sink):
            def get_extra_info(self, name: str, default: Any = None) -> Any:
                return ("203.0.113.7", 50_000) if name == "peername" else default

            def is_closing(self) -> bool:
                return False

            def can_write_eof(self) -> bool:
                return False

        connection, elsewhere = Connection(gateway), Elsewhere()
        connection.connection_made(elsewhere)
        connection.data_received(request("/stats"))
        assert elsewhere.writes[0].startswith(b"HTTP/1.1 404 ")
        connection.connection_lost(None)

    # Admission.

    async def test_max_connections(self, platform: aws_standin.Platform) -> None:
        """Beyond `MAX_CONNECTIONS` it is 503 with a time to come back, until somebody leaves."""
        async with running_gateway(platform, max_connections=2) as gateway:
            async with client_of(gateway), client_of(gateway), dialled(gateway) as peer:
                peer.write(upgrade())
                status, headers, _ = await peer.response()
                assert status == 503
                assert 1 <= int(headers["retry-after"]) <= 5
            await eventually(
                lambda: not gateway.registry.connections and not gateway.registry.pending
            )
            async with client_of(gateway):
                pass

    async def test_max_connections_per_ip(self, platform: aws_standin.Platform) -> None:
        """Beyond `MAX_CONNECTIONS_PER_IP` it is 429 for that address, and for no other."""
        async with (
            running_gateway(platform, max_connections_per_ip=1) as gateway,
            peer_of(gateway, upgrade(X_Forwarded_For="203.0.113.7")),
            dialled(gateway) as second,
            peer_of(gateway, upgrade(X_Forwarded_For="203.0.113.7, 203.0.113.8")),
        ):
            second.write(upgrade(X_Forwarded_For="198.51.100.1, 203.0.113.7"))
            status, headers, _ = await second.response()
            assert (status, "retry-after" in headers) == (429, True)

    @pytest.mark.parametrize(
        ("limit", "refused"),
        [("max_handshakes_per_second", 503), ("max_handshakes_per_second_per_ip", 429)],
    )
    async def test_max_handshakes(
        self, platform: aws_standin.Platform, limit: str, refused: int
    ) -> None:
        """Beyond so many handshakes a second clients are told when to come back."""
        statuses = Counter[int]()
        options: Json = {limit: 1}
        async with running_gateway(platform, **options) as gateway:
            while not statuses[refused]:
                async with dialled(gateway) as peer:
                    peer.write(upgrade())
                    status, headers, _ = await peer.response()
                    statuses[status] += 1
                    assert ("retry-after" in headers) == (status != 101)
            assert statuses.keys() == {101, refused}
            assert (await fetch(gateway, "/health"))[0] == 200  # not counted

    @pytest.mark.parametrize(
        ("origin", "status"),
        [("https://app.example", 101), ("https://evil.example", 403), ("null", 403), (None, 101)],
    )
    async def test_origin(
        self, platform: aws_standin.Platform, origin: str | None, status: int
    ) -> None:
        """Pages of other origins may not connect; programs without an origin may."""
        headers = {"Origin": origin} if origin else {}
        async with (
            running_gateway(platform, allowed_origins=("https://app.example",)) as gateway,
            dialled(gateway) as peer,
        ):
            peer.write(upgrade(**headers))
            assert (await peer.response())[0] == status

    # Subscriptions.

    async def test_subscribe(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A subscriber gets its projects' events, and of no others."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            confirmed = await client.ask(action="subscribe", project_id="p")
            assert confirmed == {
                "type": "subscription_confirmed",
                "project_id": "p",
                "seq": 0,
                "epoch": gateway.log.epoch,
            }
            agents_say(stand_in, {"project_id": "q"}, {"project_id": "p", "data": {"step": 1}})
            received = await client.receive()
            stamp = received.pop("timestamp")
            assert received == {
                "type": "project_updated",
                "project_id": "p",
                "data": {"step": 1},
                "seq": 1,
            }
            assert stamp.endswith("Z")
            assert await other.has_nothing_more()
            ended = await client.ask(action="unsubscribe", project_id="p")
            assert ended == {"type": "unsubscription_confirmed", "project_id": "p"}
            agents_say(stand_in, {"project_id": "p"})
            await eventually(lambda: not stand_in.queues["agenticai-updates"].messages)
            assert await client.has_nothing_more()

    async def test_url(self, gateway: Gateway) -> None:
        """`?project_id=` subscribes, as often as it is given."""
        async with client_of(gateway, project_id=["p", "q r", "é"]) as client:
            confirmed = await client.receive_many(3)
            assert [each["project_id"] for each in confirmed] == ["p", "q r", "é"]
            assert {each["type"] for each in confirmed} == {"subscription_confirmed"}
            assert await client.has_nothing_more()

    async def test_url_resumes(self, gateway: Gateway) -> None:
        """`&since=` and `&epoch=` go with a single project."""
        await fill_log(gateway, 3)
        epoch = gateway.log.epoch
        async with client_of(gateway, project_id="p", since=1, epoch=epoch) as client:
            assert (await client.receive())["recovered"] is True
            assert [each["seq"] for each in await client.receive_many(2)] == [2, 3]
        async with client_of(gateway, project_id="p", since=1, epoch="another") as client:
            confirmed = await client.receive()
            assert (confirmed["recovered"], confirmed["seq"]) == (False, 3)
            assert await client.has_nothing_more()

    @standing_loop
    @pytest.mark.parametrize(
        "query",
        [
            {"project_id": ["p", "q"], "since": 1},
            {"since": 1},
            {"epoch": "e"},
            {"project_id": "p", "since": "soon"},
            {"project_id": "p", "since": "-1"},
            {"project_id": ""},
            {"project_id": TOO_LONG},
        ],
        ids=str,
    )
    async def test_bad_url(self, standing: Gateway, query: Json) -> None:
        """What cannot be done with a URL's query is an error; the connection stays."""
        async with client_of(standing, **query) as client:
            assert (await client.receive())["code"] == "invalid_field"
            assert await client.has_nothing_more()

    async def test_subscription_limit(self, platform: aws_standin.Platform) -> None:
        """A connection may have so many subscriptions; the same again is no further one."""
        async with (
            running_gateway(platform, max_subscriptions_per_connection=2) as gateway,
            client_of(gateway, project_id=["p", "q"]) as client,
        ):
            await client.receive_many(2)
            error = await client.ask(action="subscribe", project_id="r")
            assert (error["code"], error["project_id"]) == ("too_many_subscriptions", "r")
            for project_id in ("p", "*"):
                confirmed = await client.ask(action="subscribe", project_id=project_id)
                assert confirmed["type"] == "subscription_confirmed"
            await client.ask(action="unsubscribe", project_id="q")
            confirmed = await client.ask(action="subscribe", project_id="r")
            assert confirmed["type"] == "subscription_confirmed"

    async def test_broadcast(self, gateway: Gateway, stand_in: StandIn) -> None:
        """What is for everyone reaches everyone, subscribed or not, also after an unsubscribe."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            answer = await client.ask(action="unsubscribe", project_id="*")
            assert answer == {"type": "unsubscription_confirmed", "project_id": "*"}
            agents_say(stand_in, {"data": 1}, {"project_id": "*", "data": 2})
            for each in (client, other):
                received = await each.receive_many(2)
                assert {(x["project_id"], x["data"]) for x in received} == {("*", 1), ("*", 2)}
                assert [x["seq"] for x in received] == [1, 2]
        async with client_of(gateway, project_id="*", since=0) as late:
            assert (await late.receive())["recovered"] is True
            assert [each["seq"] for each in await late.receive_many(2)] == [1, 2]
            assert await late.has_nothing_more()

    async def test_for_one_client(self, gateway: Gateway, stand_in: StandIn) -> None:
        """An update with a `connection_id` reaches that client alone, without a seq."""
        async with client_of(gateway) as client, client_of(gateway) as other:
            for connection_id in ("nobody", client.greeting["connection_id"]):
                agents_say(stand_in, {"connection_id": connection_id, "data": connection_id})
            received = await client.receive()
            assert received["data"] == client.greeting["connection_id"]
            assert "seq" not in received
            assert await other.has_nothing_more()
        await eventually(lambda: not stand_in.queues["agenticai-updates"].messages)

    async def test_snapshot(
        self, gateway: Gateway, stand_in: StandIn, platform: aws_standin.Platform
    ) -> None:
        """The platform's own state of a project comes as JSON: numbers, sets and all."""
        key = ("PROJECT#p", "METADATA")
        item: Json = {
            "PK": {"S": key[0]},
            "SK": {"S": key[1]},
            "name": {"S": "é"},
            "count": {"N": "12345678901234567890"},
            "share": {"N": "0.1"},
            "tags": {"SS": ["b", "a"]},
            "sizes": {"NS": ["1", "2.5"]},
            "nested": {"M": {"list": {"L": [{"BOOL": True}, {"NULL": True}]}}},
            "bytes": {"B": "AAE="},
        }
        stand_in.tables[platform.table_name].put(key, item)
        async with client_of(gateway) as client:
            await client.send(action="subscribe", project_id="p", snapshot=True)
            assert (await client.receive())["type"] == "subscription_confirmed"
            snapshot = await client.receive()
            data = snapshot.pop("data")
            assert snapshot == {"type": "project_snapshot", "project_id": "p"}
            assert (data["name"], data["count"], data["share"]) == ("é", 12345678901234567890, 0.1)
            assert (sorted(data["tags"]), sorted(data["sizes"])) == (["a", "b"], [1, 2.5])
            assert data["nested"] == {"list": [True, None]}
            assert data.keys().isdisjoint({"PK", "SK"})
            await client.send(action="subscribe", project_id="empty", snapshot=True)
            await client.receive()
            assert (await client.receive())["data"] is None

    async def test_several_tasks(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """Clients of every task get what agents say, whichever task received it."""
        async with (
            running_gateway(platform, "task-1", topic=True) as one,
            running_gateway(platform, "task-2", topic=True) as two,
            client_of(one, project_id="p") as first,
            client_of(two, project_id="p") as second,
        ):
            for client in (first, second):
                assert (await client.receive())["type"] == "subscription_confirmed"
            for number in range(1, 6):
                agents_say(stand_in, {"project_id": "p"}, {"project_id": "elsewhere"})
                for client in (first, second):
                    assert (await client.receive())["seq"] == number
            for client in (first, second):
                agents_say(stand_in, {"connection_id": client.greeting["connection_id"]})
                assert "seq" not in await client.receive()
            for client in (first, second):
                assert await client.has_nothing_more()

    async def test_without_updates(self, platform: aws_standin.Platform) -> None:
        """Without an updates queue a task forwards and serves what is in the log."""
        async with running_gateway(platform, sqs_queue_url_updates=None) as gateway:
            await fill_log(gateway, 1)
            async with client_of(gateway, project_id="p", since=0) as client:
                assert [each.get("seq") for each in await client.receive_many(2)] == [1, 1]
                answer = await client.ask(action="forward", type="dev")
                assert answer["type"] == "forward_confirmed"

    # Tokens.

    async def test_token(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A token in the handshake says who the client is and what it may use."""
        async with running_issuer() as issuer:
            token = token_of("alice", projects=["p"])
            async with (
                running_gateway(platform, **issuer.settings) as gateway,
                peer_of(gateway, upgrade(Authorization=f"Bearer {token}")) as peer,
            ):
                assert (await peer.ask(action="subscribe", project_id="q"))["code"] == "forbidden"
                confirmed = await peer.ask(action="subscribe", project_id="p")
                assert confirmed["type"] == "subscription_confirmed"
                await peer.ask(action="forward", type="dev", project_id="p")
                [body] = stand_in.queues["agenticai-dev-queue"].bodies
                assert json.loads(body)["user"] == "alice"
                for opening in (upgrade(), upgrade(Authorization="Bearer x.y.z")):
                    async with dialled(gateway) as stranger:
                        stranger.write(opening)
                        status, headers, _ = await stranger.response()
                        assert (status, headers["www-authenticate"]) == (401, "Bearer")

    async def test_too_many_wrong_tokens(self, platform: aws_standin.Platform) -> None:
        """An address that keeps trying tokens is told to wait."""
        async with (
            running_issuer() as issuer,
            running_gateway(
                platform, max_failed_authentications_per_ip=2, **issuer.settings
            ) as gateway,
        ):
            statuses = []
            for _ in range(3):
                async with dialled(gateway) as peer:
                    peer.write(upgrade(Authorization="Bearer x.y.z"))
                    statuses.append((await peer.response())[0])
        assert statuses == [401, 401, 429]

    async def test_token_as_first_message(self, platform: aws_standin.Platform) -> None:
        """Where it is allowed, a token may come as a message, before which nothing is answered."""
        async with (
            running_issuer() as issuer,
            running_gateway(platform, auth_first_message=True, **issuer.settings) as gateway,
            peer_of(gateway) as peer,
            peer_of(gateway) as wrong,
        ):
            assert (await peer.ask(action="ping"))["code"] == "unauthenticated"
            gateway.feed.accept(event(None, EVERYONE), None)
            answer = await peer.ask(action="authenticate", token=token_of(projects=["p"]))
            assert answer["type"] == "authenticated"
            assert 0 < answer["expires_in_seconds"] <= 630
            await peer.ask(action="subscribe", project_id="p")
            peer.send(action="authenticate", token=token_of(projects=["q"]))
            assert (await peer.receive())["type"] == "authenticated"
            assert await peer.receive() == {"type": "unsubscription_confirmed", "project_id": "p"}
            peer.send(action="authenticate", token=token_of("somebody else"))
            assert await peer.close_code() == server.CLOSE_UNAUTHENTICATED
            wrong.send(action="authenticate", token="x.y.z")
            assert await wrong.close_code() == server.CLOSE_UNAUTHENTICATED

    async def test_no_token_in_time(self, platform: aws_standin.Platform) -> None:
        """Who does not say who it is in time is closed with 4401."""
        options: Json = {"auth_first_message": True, "auth_deadline_seconds": 0.1}
        async with (
            running_issuer() as issuer,
            running_gateway(
                platform, ping_interval_seconds=0.4, **options, **issuer.settings
            ) as gateway,
            peer_of(gateway) as peer,
        ):
            assert await peer.close_code() == server.CLOSE_UNAUTHENTICATED

    async def test_token_ends(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token's end is announced, and is the session's end unless a fresh one came."""
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.02)
        monkeypatch.setattr(server, "TOKEN_LEEWAY_S", 0)
        opening = upgrade(Authorization=f"Bearer {token_of(valid_s=2)}")
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
            peer_of(gateway, opening) as peer,
            peer_of(gateway, opening) as careless,
        ):
            for each in (peer, careless):
                warning = await each.receive()
                assert warning == {"type": "token_expiring", "in_seconds": warning["in_seconds"]}
                assert warning["in_seconds"] <= 2
            assert (await peer.ask(action="authenticate", token=token_of()))["type"] == (
                "authenticated"
            )
            assert await careless.close_code() == server.CLOSE_UNAUTHENTICATED
            assert await peer.is_answered()

    async def test_new_key(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A token signed with a new key is good once the keys were read again."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, auth_first_message=True, **issuer.settings) as gateway,
        ):
            issuer.answer = key_set(public_jwk("key-2"))
            token = token_of(key_id="key-2")
            async with peer_of(gateway, upgrade(Authorization=f"Bearer {token}")):
                assert issuer.reads == 2
            issuer.answer = key_set(public_jwk("key-3"))
            async with peer_of(gateway) as peer:
                answer = await peer.ask(action="authenticate", token=token_of(key_id="key-3"))
                assert answer["type"] == "authenticated"

    @pytest.mark.parametrize("leaves", [False, True], ids=["talks", "leaves"])
    async def test_does_not_wait_for_its_answer(
        self,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        leaves: bool,
    ) -> None:
        """A peer that goes on, or away, while the keys are read for it is forgotten."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
            dialled(gateway) as peer,
        ):
            issuer.answer = None
            token = token_of(key_id="key-2")
            peer.write(upgrade(Authorization=f"Bearer {token}"))
            await eventually(lambda: issuer.reads == 2)
            if leaves:
                peer.reset()
            else:
                peer.write(masked(b"{}"))
                assert await peer.rest() == []
            await eventually(lambda: not gateway.registry.pending)
            await eventually(lambda: "the issuer's keys could not be read" in caplog.text)
            assert (await fetch(gateway))[0] == 200
        assert not errors_logged(caplog)

    async def test_drained_before_its_token_is_checked(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nobody comes in for whom keys were still read when the drain began."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        monkeypatch.setattr(server, "CALL_TIMEOUT_S", 0.5)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
            dialled(gateway) as peer,
        ):
            issuer.answer = None
            peer.write(upgrade(Authorization=f"Bearer {token_of(key_id='key-2')}"))
            await eventually(lambda: issuer.reads == 2)
            gateway.drain.wanted.set()
            assert (await peer.response())[0] == 503

    async def test_keys_not_there_at_first(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A task is not ready before it has keys, and reads them again every so often."""
        monkeypatch.setattr(server, "full_jitter_s", lambda *_: 0.01)
        monkeypatch.setattr(server.Keys, "LIFETIME_S", 0.05)
        async with running_issuer() as issuer:
            issuer.answer = b"{}"
            options = settings(platform, **issuer.settings)
            async with aws_clients(platform) as aws, task_group() as tasks:
                gateway = Gateway(options, tasks, aws, "task-1")
                running = tasks.create_task(gateway.run())
                await eventually(lambda: issuer.reads > 2)
                assert gateway.health() == {"status": "starting"}
                issuer.answer = key_set(public_jwk("key-1"))
                await eventually(gateway.ready.is_set)
                reads = issuer.reads
                await eventually(lambda: issuer.reads > reads)
                gateway.drain.wanted.set()
                await running

    async def test_key_set_without_end(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A key set larger than any is not read to its end; the keys from before stay."""
        monkeypatch.setattr(server.Keys, "REFRESH_S", 0)
        async with (
            running_issuer() as issuer,
            running_gateway(platform, **issuer.settings) as gateway,
        ):
            issuer.answer = b" " * 2_000_000
            async with dialled(gateway) as peer:
                peer.write(upgrade(Authorization=f"Bearer {token_of(key_id='key-2')}"))
                assert (await peer.response())[0] == 401
            async with peer_of(gateway, upgrade(Authorization=f"Bearer {token_of()}")):
                pass

    async def test_authenticate_without_tokens(self, gateway: Gateway) -> None:
        """Where nobody needs a token, one is taken all the same."""
        async with client_of(gateway) as client:
            answer = await client.ask(action="authenticate", token="anything")
            assert answer["type"] == "authenticated"

    # Catching up.

    async def test_resume_after_slow_reading(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Who was closed with 1013 gets by `since` what was missed; the others miss nothing."""
        count = 40
        async with (
            running_gateway(platform, max_backlog_bytes=100_000) as gateway,
            peer_of(gateway) as slow,
            peer_of(gateway) as quick,
        ):
            narrow(gateway)
            await slow.ask(action="subscribe", project_id="p")
            await quick.ask(action="subscribe", project_id="p")
            for number in range(count):
                agents_say(stand_in, {"project_id": "p", "data": str(number) + "x" * 40_000})
                assert (await quick.receive())["seq"] == number + 1
            assert gateway.metrics.slow_consumers_closed == 1
            seen = []
            while (frame := await slow.next_frame()) and frame.opcode is Opcode.TEXT:
                seen.append(json.loads(bytes(frame.data))["seq"])
            assert frame is not None
            assert int.from_bytes(frame.data[:2], "big") == CloseCode.TRY_AGAIN_LATER
            async with peer_of(gateway, upgrade(f"/ws?project_id=p&since={seen[-1]}")) as again:
                assert (await again.receive())["recovered"] is True
                missed = await seqs_until(again, count)
            assert seen + missed == list(range(1, count + 1))

    async def test_long_catch_up(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A catch-up of many pages and more than a backlog goes at the client's own pace."""
        count, size = 230, 20_000
        backlog = 65_536
        async with running_gateway(platform, max_backlog_bytes=backlog) as gateway:
            await fill_log(gateway, count, size)
            async with peer_of(gateway) as peer, client_of(gateway) as other:
                narrow(gateway)
                connections = list(gateway.registry.connections.values())
                peer.send(action="subscribe", project_id="p", since=0)
                assert (await peer.receive())["recovered"] is True
                assert (await peer.receive())["seq"] == 1
                await eventually(lambda: any(each.choked for each in connections))
                for _ in range(20):
                    assert await other.has_nothing_more()
                held = max(each.transport.get_write_buffer_size() for each in connections)
                assert held < server.CHOKED_AT_BYTES + 2 * server.CATCHUP_CHUNK_BYTES
                agents_say(stand_in, {"project_id": "p", "data": "live"})
                await eventually(
                    lambda: (
                        gateway.registry.channels["p"].wanted > count
                        or gateway.registry.channels["p"].cursor == count + 1
                    )
                )
                assert await seqs_until(peer, count + 1) == list(range(2, count + 2))
                assert await peer.is_answered()
            assert gateway.metrics.slow_consumers_closed == 0

    async def test_stalled_catch_up(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A client that stops reading in its catch-up is ended, with what was written to it."""
        monkeypatch.setattr(server, "STALLED_AFTER_S", 0.1)
        async with running_gateway(platform) as gateway:
            await fill_log(gateway, 100, 20_000)
            async with peer_of(gateway) as peer:
                narrow(gateway)
                peer.send(action="subscribe", project_id="p", since=0)
                await eventually(lambda: gateway.metrics.slow_consumers_closed)
                assert not gateway.registry.connections
            await eventually(lambda: "p" not in gateway.registry.channels)

    @pytest.mark.parametrize("leave", ["unsubscribe", "reset", "close"])
    async def test_leaves_in_the_catch_up(self, gateway: Gateway, leave: str) -> None:
        """A catch-up ends with its subscription."""
        await fill_log(gateway, 100, 20_000)
        async with peer_of(gateway) as peer:
            narrow(gateway)
            [connection] = gateway.registry.connections.values()
            peer.send(action="subscribe", project_id="p", since=0)
            await eventually(lambda: connection.choked)
            if leave == "unsubscribe":
                peer.send(action="unsubscribe", project_id="p")
            elif leave == "reset":
                peer.reset()
            else:
                connection.close(CloseCode.GOING_AWAY)
            await eventually(lambda: "p" not in gateway.registry.channels)
            assert not connection.catching_up

    async def test_many_resume_at_once(self, gateway: Gateway, stand_in: StandIn) -> None:
        """A returning crowd costs few reads of the log, and each of it gets everything."""
        await fill_log(gateway, 20)
        stand_in.calls.clear()
        async with contextlib.AsyncExitStack() as stack:
            opening = upgrade("/ws?project_id=p&since=5")
            crowd = await asyncio.gather(
                *[stack.enter_async_context(peer_of(gateway, opening)) for _ in range(100)]
            )
            for peer in crowd:
                assert (await peer.receive())["recovered"] is True
                assert await seqs_until(peer, 20) == list(range(6, 21))
        heads = [stand_in.calls["dynamodb", name] for name in ("GetItem", "BatchGetItem")]
        assert sum(heads) == 1
        assert stand_in.calls["dynamodb", "Query"] == 1

    async def test_log_is_shorter_than_since(self, gateway: Gateway) -> None:
        """A client that is ahead of the log has another log's number."""
        async with client_of(gateway, project_id="p", since=7) as client:
            confirmed = await client.receive()
            assert (confirmed["recovered"], confirmed["seq"]) == (False, 0)
            assert await client.has_nothing_more()

    # Time.

    async def test_silent_peer(self, platform: aws_standin.Platform) -> None:
        """Who says nothing is pinged; who does not answer that is dropped, who does stays."""
        async with (
            running_gateway(platform, ping_interval_seconds=0.1) as gateway,
            peer_of(gateway) as silent,
            peer_of(gateway) as quiet,
        ):
            for _ in range(3):
                ping = await quiet.next_frame()
                assert ping is not None
                assert ping.opcode is Opcode.PING
                quiet.send_frame(bytes(ping.data), Opcode.PONG)
            frames = await silent.rest()
            assert [frame.opcode for frame in frames] == [Opcode.PING]
            assert len(gateway.registry.connections) == 1

    async def test_many_silent_peers(
        self, platform: aws_standin.Platform, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sweep over many lets the loop turn in between."""
        monkeypatch.setattr(server, "SWEPT_PER_TURN", 2)
        async with (
            running_gateway(platform, ping_interval_seconds=0.1) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(5)]
            for peer in peers:
                assert [frame.opcode for frame in await peer.rest()] == [Opcode.PING]

    async def test_many_half_open(self, gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
        """Thousands that never finish their handshake are not all cut in one turn of the loop."""
        monkeypatch.setattr(server, "SWEPT_PER_TURN", 2)
        left: list[int] = []

        async def watch() -> None:
            while True:
                left.append(len(gateway.registry.pending))
                await asyncio.sleep(0)

        async with contextlib.AsyncExitStack() as stack:
            for _ in range(10):
                await stack.enter_async_context(dialled(gateway))
            await eventually(lambda: len(gateway.registry.pending) == 10)
            for connection in gateway.registry.pending:
                connection.deadline = 0.0
            watching = asyncio.ensure_future(watch())
            await eventually(lambda: not gateway.registry.pending)
            watching.cancel()
        assert max(before - after for before, after in itertools.pairwise(left)) <= 2

    @pytest.mark.usefixtures("impatient")
    async def test_paused_peer_is_not_silent(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """Who cannot be heard, because of forwards that wait for SQS, is not dropped for it."""
        go_on = hold_back(stand_in)
        count = server.Connection.FORWARDS_IN_FLIGHT + 8
        async with (
            running_gateway(platform, ping_interval_seconds=0.2) as gateway,
            peer_of(gateway) as busy,
        ):
            for number in range(count):
                busy.send(action="forward", type="dev", message_id=f"m{number}")
            async with peer_of(gateway) as silent:
                await silent.rest()  # two intervals and more
            go_on.set()
            confirmed: set[str] = set()
            while len(confirmed) < count:
                frame = await busy.next_frame()
                assert frame is not None
                if frame.opcode is Opcode.PING:
                    busy.send_frame(bytes(frame.data), Opcode.PONG)
                else:
                    confirmed.add(json.loads(bytes(frame.data))["message_id"])

    async def test_metrics_line(
        self,
        platform: aws_standin.Platform,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Every minute the figures are logged, in a line of their own."""
        minutes = itertools.count(0.0, 61.0)
        monkeypatch.setattr(server.Sweep, "INTERVAL_S", 0.01)
        caplog.set_level(logging.INFO, "gateway.metrics")
        async with running_gateway(platform) as gateway, client_of(gateway):
            with monkeypatch.context() as patch:
                patch.setattr(server, "time", ClockOf(lambda: next(minutes)))
                lines = await eventually(
                    lambda: [x.__dict__ for x in caplog.records if x.name == "gateway.metrics"]
                )
        assert lines[0]["Service"] == "websocket-gateway"

    # Draining.

    async def test_drain(
        self, platform: aws_standin.Platform, stand_in: StandIn, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A drain sends each client away with a delay of its own and 1012; no new ones come in."""
        async with (
            running_gateway(platform, topic=True, drain_seconds=1.0) as gateway,
            contextlib.AsyncExitStack() as stack,
        ):
            [fan_out_queue] = [name for name in stand_in.queues if "-task-" in name]
            peers = [await stack.enter_async_context(peer_of(gateway)) for _ in range(8)]
            begun = time.monotonic()
            gateway.drain.wanted.set()
            status, _, body = await fetch(gateway, "/health")
            assert (status, json.loads(body)) == (503, {"status": "draining"})
            async with dialled(gateway) as late:
                late.write(upgrade())
                assert (await late.response())[0] == 503
            closed_at = []
            delays = set()

            async def see_off(peer: Peer) -> None:
                message = await peer.receive()
                assert message["type"] == "reconnect"
                delays.add(message["after_ms"])
                assert await peer.close_code() == CloseCode.SERVICE_RESTART
                closed_at.append(time.monotonic() - begun)
                await peer.answer_close()

            await asyncio.gather(*map(see_off, peers))
            assert len(delays) > 1
            assert all(0 <= delay <= 60_000 for delay in delays)
            assert max(closed_at) - min(closed_at) > 0.4
            await eventually(lambda: fan_out_queue not in stand_in.queues)
        assert not errors_logged(caplog)

    async def test_drain_in_a_hurry(self, platform: aws_standin.Platform) -> None:
        """A drain that is hurried does not wait for the spread, nor for who does not answer."""
        async with aws_clients(platform) as aws, task_group() as tasks:
            gateway = Gateway(settings(platform, drain_seconds=100), tasks, aws, "task-1")
            running = tasks.create_task(gateway.run())
            await eventually(gateway.ready.is_set)
            async with peer_of(gateway) as one, peer_of(gateway) as two:
                gateway.drain.wanted.set()
                await eventually(lambda: len(gateway.registry.connections) == 1)
                gateway.drain.hurry.set()
                async with asyncio.timeout(DEADLINE_S):
                    await running
                for peer in (one, two):
                    assert (await peer.receive())["type"] == "reconnect"
                    assert await peer.close_code() == CloseCode.SERVICE_RESTART
                    assert await peer.rest() == []

    @pytest.mark.parametrize("taken", [True, False])
    @pytest.mark.usefixtures("impatient")
    async def test_drain_answers_forwards(
        self, platform: aws_standin.Platform, stand_in: StandIn, taken: bool
    ) -> None:
        """A forward that is in flight when a drain begins is confirmed, or answered by an error."""
        go_on = hold_back(stand_in)
        async with (
            running_gateway(platform, forward_timeout_seconds=2.0) as gateway,
            peer_of(gateway) as peer,
        ):
            peer.send(action="forward", type="dev", message_id="m1")
            await eventually(lambda: stand_in.calls["sqs", "SendMessageBatch"])
            gateway.drain.wanted.set()
            if taken:
                go_on.set()
            types = []
            while (frame := await peer.next_frame()) and frame.opcode is Opcode.TEXT:
                types.append(json.loads(bytes(frame.data))["type"])
            await peer.answer_close()
            assert sorted(types) == sorted(["reconnect", "forward_confirmed" if taken else "error"])
        assert ("m1" in sent_ids(stand_in)) == taken

    @pytest.mark.usefixtures("impatient")
    async def test_drain_flushes_forwards(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """What was taken before a drain reaches the queue, also of a client that left."""
        go_on = hold_back(stand_in)
        async with running_gateway(platform) as gateway:
            async with peer_of(gateway) as peer:
                for number in range(20):
                    peer.send(action="forward", type="dev", message_id=f"m{number}")
                await eventually(lambda: gateway.metrics.messages_received == 20)
            gateway.drain.wanted.set()
            await eventually(lambda: not gateway.registry.connections)
            go_on.set()
            await eventually(lambda: gateway.metrics.messages_forwarded == 20)
        assert set(sent_ids(stand_in)) == {f"m{number}" for number in range(20)}


# --- Main -----------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither signals nor ptys")
SERVER = Path(server.__file__)


class Process:
    """`python server.py` as whoever deploys it sees it.

    Attributes:
        address: where it listens, after `listening`.
        log: the lines read so far.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.address = ("", 0)
        self.log: list[Json] = []

    async def logged(self, message: str) -> Json:
        """The next line with ``message``."""
        assert self.process.stdout is not None
        async with asyncio.timeout(DEADLINE_S):
            async for line in self.process.stdout:
                self.log.append(json.loads(line))
                if self.log[-1].get("message") == message:
                    return self.log[-1]
        raise AssertionError(f"{message!r} was not logged, but {self.log}")

    async def listening(self) -> None:
        line = await self.logged("listening")
        self.address = (line["host"], line["port"])
        await self.logged("ready")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ends(self) -> tuple[int | None, str]:
        """The exit code and what was written to stderr; ``log`` is complete then."""
        async with asyncio.timeout(DEADLINE_S):
            stdout, stderr = await self.process.communicate()
        self.log += map(json.loads, stdout.splitlines())
        return self.process.returncode, stderr.decode()


def clean_environment() -> dict[str, str]:
    """The environment of the tests without any setting of a gateway."""
    own = {field.name.upper() for field in dataclasses.fields(Settings)}
    kept = {name: v for name, v in without_aws(os.environ).items() if name not in own}
    return {**kept, "no_proxy": "127.0.0.1"}


@contextlib.asynccontextmanager
async def process_of(environment: Mapping[str, str], **more: str) -> AsyncIterator[Process]:
    """A server with ``environment``, which is ended with the test."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SERVER),
        env={**clean_environment(), **environment, **more},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@contextlib.asynccontextmanager
async def task_metadata(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """The endpoint that tells ECS tasks who they are, and the request lines it got."""
    asked: list[bytes] = []

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0])
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(answer), answer))
        writer.close()

    listener = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with listener:
        port = listener.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/v4/abc", asked


def record(message: str, **extra: Any) -> logging.LogRecord:
    fields = {"msg": message, "levelname": "INFO", "levelno": logging.INFO, "created": 1.5, **extra}
    return logging.makeLogRecord(fields)


class TestMain:
    @posix
    @pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
    async def test_from_start_to_end(
        self, platform: aws_standin.Platform, stand_in: StandIn, tmp_path: Path, loop: str
    ) -> None:
        """A task serves, is told to end, sends its clients away and exits with 0, on any loop."""
        environment = platform.environment() | {"DRAIN_SECONDS": "0"}
        if loop == "asyncio":
            (tmp_path / "uvloop.py").write_text("raise ImportError")
            environment["PYTHONPATH"] = str(tmp_path)
        async with process_of(environment) as process:
            await process.listening()
            [queue] = [name for name in stand_in.queues if "-task-" in name]
            async with client_of(process, project_id="p") as client:
                await client.receive()
                answer = await client.ask(action="forward", type="dev", message_id="m1")
                assert answer["type"] == "forward_confirmed"
                agents_say(stand_in, {"project_id": "p"})
                assert (await client.receive())["seq"] == 1
                process.signal(signal.SIGTERM if loop == "uvloop" else signal.SIGINT)
                assert (await client.receive())["type"] == "reconnect"
                with pytest.raises(ConnectionClosed):
                    await client.receive()
                assert client.socket.close_code == CloseCode.SERVICE_RESTART
            assert await process.ends() == (0, "")
        assert queue not in stand_in.queues
        assert process.log[-1]["message"] == "drained"
        assert all({"time", "level", "message"} <= line.keys() for line in process.log)

    @posix
    async def test_second_signal(self, platform: aws_standin.Platform, stand_in: StandIn) -> None:
        """A second signal ends a drain that would take long."""
        async with process_of(platform.environment(), DRAIN_SECONDS="100") as process:
            await process.listening()
            async with client_of(process), client_of(process):
                process.signal(signal.SIGTERM)
                await process.logged("draining")
                process.signal(signal.SIGINT)
                assert await process.ends() == (0, "")
        assert not [name for name in stand_in.queues if "-task-" in name]

    @posix
    async def test_signal_while_starting(
        self, platform: aws_standin.Platform, stand_in: StandIn
    ) -> None:
        """A task that still waits for AWS ends as well."""
        stand_in.fault = always("GetItem", THROTTLED)
        async with process_of(platform.environment()) as process:
            await process.logged("listening")
            process.signal(signal.SIGTERM)
            assert await process.ends() == (0, "")

    async def test_wrong_settings(self) -> None:
        """Every fault of the settings is named at once; exit code 2, and no traceback."""
        environment = {
            "SQS_QUEUE_URL_DEV": "no url",
            "WEBSOCKET_PORT": "many",
            "DYNAMODB_TABLE_NAME": "t",
        }
        async with process_of(environment) as process:
            code, stderr = await process.ends()
        assert (code, process.log) == (2, [])
        for name in ("DEV", "PM", "QA", "OPS"):
            assert f"  SQS_QUEUE_URL_{name} " in stderr
        assert "  WEBSOCKET_PORT " in stderr
        assert "DYNAMODB_TABLE_NAME" not in stderr
        assert "Traceback" not in stderr

    @pytest.mark.parametrize("when", ["at the start", "later"])
    async def test_lost_table(
        self, platform: aws_standin.Platform, stand_in: StandIn, when: str
    ) -> None:
        """A table that is not there ends the process: exit code 1, one sentence that names it."""
        if when == "at the start":
            del stand_in.tables[platform.events_table_name]
        async with process_of(platform.environment()) as process:
            if when == "later":
                await process.listening()
                del stand_in.tables[platform.events_table_name]
                agents_say(stand_in, {"project_id": "p"})
            code, stderr = await process.ends()
        assert (code, stderr) == (1, "")
        assert process.log[-1]["level"] == "CRITICAL"
        assert process.log[-1]["message"].startswith("event log: ")
        assert "ResourceNotFoundException" in process.log[-1]["message"]
        assert "exception" not in process.log[-1]

    async def test_port_in_use(self, platform: aws_standin.Platform) -> None:
        """A port that is taken is said in one sentence, with exit code 1."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            async with process_of(platform.environment(port)) as process:
                code, stderr = await process.ends()
        assert (code, stderr) == (1, "")
        assert process.log[-1]["level"] == "CRITICAL"
        assert str(port) in process.log[-1]["message"]

    @pytest.mark.parametrize("answer", [b"", b"{", b"[]", b'{"Family":"x"}'], ids=repr)
    async def test_metadata_of_no_use(
        self, answer: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A task that cannot learn its id warns of it and makes one up."""
        async with task_metadata(answer) as (address, asked):
            own_id, own_address = await asyncio.to_thread(server.own_id_and_address, address)
        assert own_id
        assert own_address == ""
        assert len(asked) == 1
        [warning] = caplog.messages
        assert warning.startswith("the task's metadata cannot be read: ")

    def test_no_metadata(self, caplog: pytest.LogCaptureFixture) -> None:
        """The same if nobody answers."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        assert all(server.own_id_and_address(f"http://127.0.0.1:{port}/v4/abc")) is False
        assert len(caplog.messages) == 1

    @posix
    async def test_terminal(self, platform: aws_standin.Platform) -> None:
        """On a terminal the lines are for people."""
        import pty

        ours, theirs = pty.openpty()
        environment = {**clean_environment(), **platform.environment()}
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(SERVER), env=environment, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown = b""
        while b"ready" not in shown:
            shown += await asyncio.to_thread(os.read, ours, 4_096)
        process.terminate()
        async with asyncio.timeout(DEADLINE_S):
            assert await process.wait() == 0
        os.close(ours)
        line = next(line for line in shown.decode().splitlines() if "listening" in line)
        assert re.fullmatch(
            r"\x1b\[2m\d\d:\d\d:\d\d INFO   \x1b\[0m +listening host='127\.0\.0\.1' port=\d+", line
        )

    @posix
    async def test_ecs(
        self,
        platform: aws_standin.Platform,
        stand_in: StandIn,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In ECS a task's queue is named after the task, and goes with it."""
        for name, value in platform.environment().items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        arn = b'{"TaskARN":"arn:aws:ecs:us-east-1:123456789012:task/cluster/0123abc"}'
        loop = asyncio.get_running_loop()
        async with task_metadata(arn) as (address, asked):
            options = settings(platform, topic=True, ecs_container_metadata_uri_v4=address)
            serving = asyncio.create_task(server.serve(options))
            try:
                await eventually(lambda: "agenticai-updates-task-0123abc" in stand_in.queues)
                os.kill(os.getpid(), signal.SIGTERM)
                async with asyncio.timeout(DEADLINE_S):
                    await serving
            finally:
                for number in (signal.SIGTERM, signal.SIGINT):
                    loop.remove_signal_handler(number)
        assert asked == [b"GET /v4/abc/task HTTP/1.1"]
        assert not [name for name in stand_in.queues if "-task-" in name]

    def test_id_elsewhere(self) -> None:
        """Outside ECS every task has an id of its own too."""
        assert server.own_id_and_address(None)[0] != server.own_id_and_address(None)[0]

    def test_help(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """``--help`` names every setting with its default."""
        monkeypatch.setattr(sys, "argv", ["server.py", "--help"])
        with pytest.raises(SystemExit) as exit_:
            server.main()
        assert exit_.value.code == 0
        shown = capsys.readouterr().out
        for field in dataclasses.fields(Settings):
            assert f"  {field.name.upper()} " in shown
        assert "[required]" in shown

    @pytest.fixture
    def main(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
        """`main` with something else to serve, and pytest's own logging left alone."""

        def run(outcome: BaseException | None, environment: Mapping[str, str] = REQUIRED) -> int:
            async def serve(_: Settings) -> None:
                if outcome is not None:
                    raise outcome

            monkeypatch.setattr(sys, "argv", ["server.py"])
            for name in (field.name.upper() for field in dataclasses.fields(Settings)):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setattr(server, "set_up_logging", lambda _: None)
            monkeypatch.setattr(server, "serve", serve)
            return server.main()

        return run

    def test_exit_codes(self, main: Callable[..., int], caplog: pytest.LogCaptureFixture) -> None:
        """0 is a drain, 1 is something lost, with the first sentence about it."""
        assert main(None) == 0
        inner = ExceptionGroup("inner", [UpstreamLost("the table is gone"), OSError("later")])
        assert main(ExceptionGroup("outer", [inner])) == 1
        assert [each.message for each in caplog.records if each.levelname == "CRITICAL"] == [
            "the table is gone"
        ]

    def test_exit_code_of_wrong_settings(
        self, main: Callable[..., int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        """2 is wrong settings, and says where all of them are listed."""
        assert main(None, {}) == 2
        assert "--help" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "faults", [[ValueError("ours")], [UpstreamLost("theirs"), ValueError("ours")]], ids=len
    )
    def test_mistake_of_ours(self, main: Callable[..., int], faults: list[Exception]) -> None:
        """A fault of the program is not hidden in a sentence: its traceback is wanted."""
        with pytest.raises(ExceptionGroup):
            main(ExceptionGroup("", faults))

    def test_loops(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Server takes uvloop where there is one, and asyncio's own loop elsewhere."""
        uvloop = pytest.importorskip("uvloop")
        assert server.fastest_loop() is uvloop.new_event_loop
        monkeypatch.setitem(sys.modules, "uvloop", None)
        assert server.fastest_loop() is None

    async def test_signals_on_windows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where loops know no signals, the signal's handler wakes the loop."""
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[..., None]] = {}
        monkeypatch.setattr(loop, "add_signal_handler", Mock(side_effect=NotImplementedError))
        monkeypatch.setattr(signal, "signal", handlers.__setitem__)
        told = asyncio.Event()
        server.on_signals(loop, told.set)
        assert handlers.keys() == {signal.SIGTERM, signal.SIGINT}
        handlers[signal.SIGINT](signal.SIGINT, None)
        async with asyncio.timeout(DEADLINE_S):
            await told.wait()

    @pytest.fixture
    def logging_restored(self) -> Iterator[None]:
        """Whatever the test does to logging is undone."""
        loggers = [logging.getLogger(name) for name in (None, *LOGGERS)]
        before = [(each, each.level, each.handlers, each.propagate) for each in loggers]
        for each in loggers:
            each.handlers = []
        yield
        for each, level, handlers, propagate in before:
            each.setLevel(level)
            each.handlers, each.propagate = handlers, propagate

    @pytest.mark.usefixtures("logging_restored")
    def test_logging(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Logs go to stdout from `LOG_LEVEL` on; metrics do so at every level."""
        server.set_up_logging("WARNING")
        logging.getLogger("gateway").info("too much")
        logging.getLogger("gateway").warning("just right")
        logging.getLogger("asyncio").warning("socket.send() raised exception")
        logging.getLogger("gateway.metrics").info("metrics", extra={"_aws": {}})
        log, metrics = map(json.loads, capsys.readouterr().out.splitlines())
        assert (log["level"], log["message"]) == ("WARNING", "just right")
        assert (metrics["level"], metrics["message"], metrics["_aws"]) == ("INFO", "metrics", {})

    def test_json_lines(self) -> None:
        """A log line is one JSON object, with what was passed along and any exception in it."""
        line = server.JsonLines().format(
            record("%s\n", args=("hello",), port=1, what={1, 2}, exc_info=FAULT)
        )
        assert "\n" not in line
        fields = json.loads(line)
        assert fields.pop("exception").endswith("ValueError: a fault")
        assert fields == {
            "time": "1970-01-01T00:00:01.500Z",
            "level": "INFO",
            "message": "hello\n",
            "port": 1,
            "what": "{1, 2}",
        }

    def test_pretty_lines(self) -> None:
        """A line for people has no control characters but its own colours."""
        formatter = server.PrettyLines()
        line = formatter.format(record("a\x1b[2Jb\nc\x9b", name_="x\x1b\n", levelname="ERROR"))
        assert line.count("\x1b") == 2
        assert "a?[2Jb?c?" in line
        assert r"'x\x1b\n'" in line
        assert formatter.format(record("m", exc_info=FAULT)).endswith("\nValueError: a fault")


LOGGERS = ("gateway", "gateway.metrics", "asyncio")
FAULT = (ValueError, ValueError("a fault"), None)
