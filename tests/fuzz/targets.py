"""What is fuzzed: each target takes any bytes, and raises if something is not as promised."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import msgspec
from botocore.exceptions import ClientError
from websockets.client import ClientProtocol
from websockets.datastructures import Headers
from websockets.exceptions import InvalidHeader
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

import server
from aws_standin import AwsError, StandIn
from server import (
    AgentMessage,
    Aws,
    BadMessage,
    Connection,
    ErrorMessage,
    EventMessage,
    Forward,
    Gateway,
    NotAuthenticated,
    Principal,
    Progress,
    Settings,
    Subscribe,
    Unsubscribe,
    bearer_token,
    client_address,
    decode_message,
    decode_update,
    projects_in,
)
from tests.issuer import AUDIENCE, ISSUER, key_set, public_jwk, token_of

Target = Callable[[bytes], None]
Json = dict[str, Any]

SETTLED_S = 20.0
MAX_OUTPUT_BYTES = 16 * 1024 * 1024


# --- AWS without a wire ---------------------------------------------------------------------


class FakeDynamoDb:
    """The stand-in's tables, called directly."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def __getattr__(self, name: str) -> Callable[..., Any]:
        operation = "".join(word.capitalize() for word in name.split("_"))

        async def call(**request: Any) -> Json:
            try:
                return self._stand_in.dynamodb.perform(operation, request, {})
            except AwsError as exc:
                response: Any = {
                    "Error": {"Code": exc.code, "Message": exc.message},
                    "ResponseMetadata": {"HTTPStatusCode": exc.status},
                    **exc.fields,
                }
                raise ClientError(response, operation) from None

        return call


class FakeQueues:
    """SQS and SNS that take everything; what is received is in ``inbox``."""

    def __init__(self) -> None:
        self.inbox: list[Json] = []
        self.deleted: list[str] = []
        self.given_back: list[str] = []
        self.forwarded: list[str] = []

    async def send_message_batch(self, **request: Any) -> Json:
        self.forwarded += [entry["MessageBody"] for entry in request["Entries"]]
        return {"Successful": [{"Id": e["Id"], "MessageId": "id"} for e in request["Entries"]]}

    async def receive_message(self, **_: Any) -> Json:
        if not self.inbox:
            await asyncio.Event().wait()
        messages, self.inbox = self.inbox, []
        return {"Messages": messages}

    async def delete_message_batch(self, **request: Any) -> Json:
        self.deleted += [entry["ReceiptHandle"] for entry in request["Entries"]]
        return {"Successful": [{"Id": entry["Id"]} for entry in request["Entries"]]}

    async def change_message_visibility(self, **request: Any) -> Json:
        self.given_back.append(request["ReceiptHandle"])
        return {}

    async def change_message_visibility_batch(self, **request: Any) -> Json:
        self.given_back += [entry["ReceiptHandle"] for entry in request["Entries"]]
        return {"Successful": [{"Id": entry["Id"]} for entry in request["Entries"]]}

    async def get_queue_attributes(self, **_: Any) -> Json:
        return {"Attributes": {"RedrivePolicy": "{}"}}

    async def create_queue(self, **_: Any) -> Json:
        return {"QueueUrl": "http://127.0.0.1/000000000000/own"}

    async def subscribe(self, **_: Any) -> Json:
        return {"SubscriptionArn": "arn:aws:sns:us-east-1:000000000000:updates:1"}

    async def publish(self, **_: Any) -> Json:
        return {"MessageId": "sns-id"}


# --- A gateway for one input ----------------------------------------------------------------


class Complaints(logging.Handler):
    """Makes an error in the log a failure: nothing a client sends may be one."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @contextlib.contextmanager
    def none(self, but: str = "") -> Iterator[None]:
        """Raise what was logged as an error, unless its text begins with ``but``."""
        self.records.clear()
        yield
        for record in self.records:
            if not but or not record.getMessage().startswith(but):
                cause = record.exc_info[1] if record.exc_info else None
                raise AssertionError(record.getMessage()) from cause


class Pipe(asyncio.Transport):
    """A transport that ends in a list of bytes."""

    def __init__(self, protocol: Connection) -> None:
        super().__init__()
        self.protocol = protocol
        self.written = bytearray()
        self.reading = True
        self.ended = False
        self.closed = False

    def write(self, data: bytes | bytearray | memoryview[Any]) -> None:
        assert not self.ended, "written after the end"
        self.written += data
        assert len(self.written) < MAX_OUTPUT_BYTES

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        if not self.closed:
            self.closed = True
            asyncio.get_running_loop().call_soon(self.protocol.connection_lost, None)

    def is_reading(self) -> bool:
        return self.reading

    def pause_reading(self) -> None:
        assert not self.closed
        self.reading = False

    def resume_reading(self) -> None:
        assert not self.closed
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 50_000) if name == "peername" else default


def stand_in() -> StandIn:
    """One that is not started, but has an address all the same."""
    found = StandIn()
    found.sqs.base_url = "http://127.0.0.1:1"
    return found


@functools.cache
def settings() -> Settings:
    environment = stand_in().create_platform().environment()
    environment |= {
        "AUTH_JWKS_URL": "http://127.0.0.1/keys",
        "AUTH_ISSUER": ISSUER,
        "AUTH_AUDIENCE": AUDIENCE,
        "AUTH_FIRST_MESSAGE": "on",
        "MAX_MESSAGE_BYTES": "4096",
    }
    return Settings.from_mapping(environment)


@functools.cache
def complaints() -> Complaints:
    handler = Complaints()
    for name in ("gateway", "asyncio", "websockets"):
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.CRITICAL)
        logging.getLogger(name).propagate = False
    logging.getLogger("gateway").setLevel(logging.ERROR)
    return handler


@functools.cache
def loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


class Stage:
    """A gateway that is ready, on an AWS without a wire."""

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        tables = stand_in()
        tables.create_platform()
        self.queues = FakeQueues()
        queues, dynamodb = cast("Any", self.queues), cast("Any", FakeDynamoDb(tables))
        fakes = Aws(queues, queues, dynamodb, elbv2=None)
        self.gateway = Gateway(settings(), tasks, fakes, "fuzz")
        self.gateway.ready.set()

    async def open(self) -> None:
        await self.gateway.log.open()
        await self.gateway.feed.open(self.gateway.registry.channel(server.EVERYONE))

    def connection(self) -> tuple[Connection, Pipe]:
        connection = Connection(self.gateway)
        pipe = Pipe(connection)
        connection.connection_made(pipe)
        return connection, pipe

    def opened(self, *, deflates: bool = False, known: bool = True) -> tuple[Connection, Pipe]:
        """A connection behind its handshake; what was written until then is forgotten."""
        connection, pipe = self.connection()
        connection.data_received(opening(deflates=deflates))
        assert connection.progress is Progress.OPEN
        if known:
            connection.principal = Principal("fuzz", None, time.time() + 3_600)
        pipe.written.clear()
        return connection, pipe


def opening(*, deflates: bool = False) -> bytes:
    extension = "Sec-WebSocket-Extensions: permessage-deflate\r\n" if deflates else ""
    return (
        "GET /ws HTTP/1.1\r\nHost: gateway\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        f"{extension}\r\n"
    ).encode()


async def a_few_turns() -> None:
    """Let everything be done that needs no waiting."""
    for _ in range(20):
        await asyncio.sleep(0)


# --- Bytes into a connection ----------------------------------------------------------------

STATES = ("handshake", "open", "deflating", "nameless", "closing", "failed", "on hold", "half")
CHUNKS = (1, 2, 7, 64, 1_000, 1 << 20)
MAY_BE_ANSWERED = {101, 200, 400, 401, 403, 404, 405, 414, 426, 429, 431, 503, 505}
MAY_BE_SENT = {1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 4401}


def connection(data: bytes) -> None:
    """Byte 0 is the connection's state, byte 1 how the rest is cut into reads."""
    if len(data) >= 2:
        loop().run_until_complete(_connection(data))


async def _connection(data: bytes) -> None:
    state, size, stream = STATES[data[0] % 8], CHUNKS[data[1] % 6], data[2:]
    with complaints().none():
        async with asyncio.timeout(SETTLED_S), asyncio.TaskGroup() as tasks:
            stage = Stage(tasks)
            await stage.open()
            if state == "handshake":
                connection, pipe = stage.connection()
            else:
                connection, pipe = stage.opened(
                    deflates=state == "deflating", known=state != "nameless"
                )
            _bring_into(state, connection)
            for start in range(0, len(stream), size):
                if pipe.closed:
                    break
                connection.data_received(stream[start : start + size])
                if not pipe.reading:
                    await a_few_turns()
            await a_few_turns()
            if state == "on hold" and not pipe.closed:
                connection.hold(-Connection.FORWARDS_IN_FLIGHT)
                await a_few_turns()
            if not pipe.closed and not connection.eof_received():
                pipe.abort()
            await a_few_turns()
            for task in tuple(connection.catching_up.values()):
                task.cancel()
    assert connection.progress is Progress.LOST
    assert not stage.gateway.registry.connections
    assert not stage.gateway.registry.sockets
    assert not stage.gateway.registry.subscriptions
    for body in stage.queues.forwarded:
        assert json.loads(body)["connection_id"] == connection.id
    _check_output(state, bytes(pipe.written))


def _bring_into(state: str, connection: Connection) -> None:
    if state == "closing":
        connection.close(CloseCode.SERVICE_RESTART, "restart")
    elif state == "failed":
        connection.data_received(b"\xff\xff")
    elif state == "on hold":
        connection.hold(+Connection.FORWARDS_IN_FLIGHT)
    elif state == "half":
        connection.data_received(b"\x01\x83\x00\x00\x00\x00\xf0\x9f\x8e")


def _check_output(state: str, written: bytes) -> None:
    """What is written is HTTP, or frames with JSON in them, and then nothing but one close."""
    if state == "handshake":
        head, _, written = written.partition(b"\r\n\r\n")
        if not head:
            return
        assert head.startswith(b"HTTP/1.1 "), head
        status = int(head.split(b" ", 2)[1])
        assert status in MAY_BE_ANSWERED, head
        if status != 101:
            return
        deflates = b"permessage-deflate" in head
    else:
        deflates = state == "deflating"
    peer = ClientProtocol(parse_uri("ws://gateway/"), state=State.OPEN, max_size=None)
    if deflates:
        peer.extensions = [PerMessageDeflate(True, True, 15, 15)]
    peer.receive_data(written)
    assert peer.parser_exc is None, peer.parser_exc
    frames = [cast("Frame", event) for event in peer.events_received()]
    assert all(frame.opcode in (Opcode.TEXT, Opcode.PONG, Opcode.CLOSE) for frame in frames)
    assert not [frame for frame in frames[:-1] if frame.opcode is Opcode.CLOSE]
    for frame in frames:
        if frame.opcode is Opcode.TEXT:
            assert isinstance(json.loads(bytes(frame.data))["type"], str)
        elif frame.opcode is Opcode.CLOSE and frame.data:
            code = int.from_bytes(frame.data[:2], "big")
            assert code in MAY_BE_SENT or 3000 <= code < 5000


# --- JSON into the wire layer ---------------------------------------------------------------


@functools.cache
def verifier() -> server.Verifier:
    async def fetch() -> bytes:
        return key_set(public_jwk("key-1"))

    found = server.Verifier(settings(), server.Keys(fetch, ("RS256",)))
    loop().run_until_complete(found.first_keys())
    return found


@functools.cache
def good_token() -> str:
    return token_of(valid_s=86_400)


def wire(data: bytes) -> None:
    """Any bytes as a client's message, an agent's update, a token, and headers."""
    _as_message(data)
    text = data.decode("utf-8", "surrogateescape")
    _as_update(text)
    _as_token(text)
    _as_headers(text)


def _as_message(data: bytes) -> None:
    try:
        message = decode_message(data)
    except BadMessage as exc:
        said = json.loads(server.encode(ErrorMessage(str(exc), exc.code, **exc.context)))
        assert len(said["message"]) < 500
        return
    try:
        content = json.loads(data.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError:
        return  # a connection closes with 1007 before
    if isinstance(message, Subscribe | Unsubscribe):
        assert message.project_id == content["project_id"]
    if isinstance(message, Forward):
        body = AgentMessage(
            type=message.type,
            message_id=message.message_id or "",
            project_id=message.project_id,
            data=message.data,
            connection_id="c",
            client_id=message.client_id or "c",
            user=None,
            timestamp=server.timestamp(),
        )
        sent = json.loads(msgspec.json.encode(body))
        assert sent["type"] == content["type"]
        assert str(sent["data"]) == str(content.get("data"))
        with contextlib.suppress(BadMessage):
            assert server.queue_of(message) in ("pm", "dev", "qa", "ops")


def _as_update(text: str) -> None:
    try:
        update = decode_update(text)
    except BadMessage:
        return
    project_id = update.project_id or server.EVERYONE
    message = EventMessage(update.type, project_id, update.data, 1, server.timestamp())
    event = server.Event.of(message)
    assert json.loads(event.payload)["type"] == json.loads(text.removeprefix("\ufeff"))["type"]
    peer = ClientProtocol(parse_uri("ws://gateway/"), state=State.OPEN, max_size=None)
    peer.extensions = [PerMessageDeflate(True, True, 15, 15)]
    peer.receive_data(event.deflated + event.frame)
    assert [cast("Frame", each).data for each in peer.events_received()] == [event.payload] * 2


def _as_token(text: str) -> None:
    head, _, signature = good_token().partition(".")
    for token in (text, f"{head}.{text}", f"{head}.{text}.{signature.partition('.')[2]}"):
        if token != good_token():
            with contextlib.suppress(NotAuthenticated):
                verifier().verify(token)
                raise AssertionError("a token nobody has signed")


def _as_headers(text: str) -> None:
    fields = text.split("\n")
    assert len(client_address("192.0.2.1", fields, len(text) % 4)) <= 64
    for name in ("Authorization", "Sec-WebSocket-Protocol"):
        with contextlib.suppress(InvalidHeader):  # the library's own, at the handshake
            headers = Headers([(name, field) for field in fields])
            assert isinstance(bearer_token(headers), str | None)
    with contextlib.suppress(ValueError, RecursionError):
        claims = json.loads(text)
        granted = projects_in(claims, "a.b") if isinstance(claims, dict) else frozenset()
        assert granted is None or all(isinstance(each, str) for each in granted)


# --- Updates into the backplane -------------------------------------------------------------


def backplane(data: bytes) -> None:
    """Byte 0: from agents or from another task. The rest: messages, cut at each 0."""
    if data:
        loop().run_until_complete(_backplane(data[0] % 2 == 1, data[1:].split(b"\0")[:9]))


async def _backplane(from_task: bool, bodies: list[bytes]) -> None:
    with complaints().none(but="fan-out: a message cannot be read"):
        async with asyncio.timeout(SETTLED_S), asyncio.TaskGroup() as tasks:
            stage = Stage(tasks)
            await stage.open()
            _, everyone = stage.opened()
            listener, pipe = stage.opened(deflates=True)
            for project_id in ("p", server.EVERYONE):
                await stage.gateway.feed.open(stage.gateway.registry.channel(project_id))
                stage.gateway.feed.subscribe(listener, Subscribe(project_id))
            stage.queues.inbox = [received(n, body) for n, body in enumerate(bodies)]
            await _take_in(stage, from_task, tasks)
            settled = stage.queues.deleted + stage.queues.given_back
            wanted = [] if from_task else [f"receipt-{n}" for n in range(len(bodies))]
            assert sorted(settled) == sorted(wanted)
    if not from_task:  # another task's word is taken: it would have been refused there
        _check_events(bytes(pipe.written), deflates=True)
        _check_events(bytes(everyone.written), deflates=False)


def received(number: int, body: bytes) -> Json:
    now = str(int(time.time() * 1000))
    return {
        "MessageId": f"message-{number}",
        "ReceiptHandle": f"receipt-{number}",
        "Body": body.decode("utf-8", "replace"),
        "Attributes": {
            "ApproximateReceiveCount": "1",
            "ApproximateFirstReceiveTimestamp": now,
            "SentTimestamp": now,
        },
    }


async def _take_in(stage: Stage, from_task: bool, tasks: asyncio.TaskGroup) -> None:
    """Have the messages received, and everything done that follows."""
    intake, relay = stage.gateway.intake, stage.gateway.relay
    assert intake is not None
    assert relay is not None
    wanted = len(stage.queues.inbox)
    await relay.start()
    work = relay.run(stage.gateway.feed.accept_relayed) if from_task else intake.run()
    running: asyncio.Task[None] = tasks.create_task(work)
    while len(stage.queues.deleted) + len(stage.queues.given_back) < wanted:
        await asyncio.sleep(0)
        if from_task and not stage.queues.inbox:  # nothing of a task's own queue is deleted
            break
    await a_few_turns()
    running.cancel()


def _check_events(written: bytes, *, deflates: bool) -> None:
    """Events are JSON, and those with a ``seq`` come in order, without a hole."""
    peer = ClientProtocol(parse_uri("ws://gateway/"), state=State.OPEN, max_size=None)
    if deflates:
        peer.extensions = [PerMessageDeflate(True, True, 15, 15)]
    peer.receive_data(written)
    assert peer.parser_exc is None, peer.parser_exc
    seqs: dict[str, int] = {}
    for event in peer.events_received():
        message = json.loads(bytes(cast("Frame", event).data))
        if message["type"] == "subscription_confirmed":
            seqs[message["project_id"]] = message["seq"]
        elif (seq := message.get("seq")) and message["project_id"] in seqs:
            assert seq == seqs[message["project_id"]] + 1
            seqs[message["project_id"]] = seq


TARGETS: dict[str, Target] = {"connection": connection, "wire": wire, "backplane": backplane}
