#!/usr/bin/env python3
"""Check the whole protocol of a running gateway from outside, here or on AWS: a line a check.

    python integration_test.py ws://127.0.0.1:8080
    python integration_test.py wss://gateway.example.com --no-forward -k violation

Exits 0 when no check failed, 1 when one did or the gateway is out of reach, 2 on a wrong command
line. What a server does not offer (an event log, an agent that answers) is skipped, and said.

Needs Python 3.11 and the `websockets` package; runs on Linux, macOS and Windows. Sockets are plain
and frames are written by hand, because half of the checks send what no client library would.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import secrets
import socket
import ssl
import sys
import time
import uuid
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit

from local import lacking

try:
    from websockets.client import ClientProtocol
    from websockets.exceptions import InvalidHandshake, InvalidStatus
    from websockets.extensions.base import ClientExtensionFactory
    from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
    from websockets.frames import Frame, Opcode
    from websockets.protocol import State
    from websockets.uri import parse_uri

    from local.terminal import (
        CONNECT_ERRORS,
        TOKEN_VARIABLE,
        escape,
        explain,
        parse_endpoint,
        parse_positive,
        parse_token,
    )
except ModuleNotFoundError as missing:
    sys.exit(lacking(missing))

__test__ = False  # a program, not a module of tests: pytest collects nothing from it

# --- Vocabulary ----------------------------------------------------------------------------------

Message = dict[str, Any]

AGENT_TYPES: Final = (
    *("pm", "plan", "planning"),
    *("dev", "code", "develop"),
    *("qa", "test", "quality"),
    *("ops", "deploy", "operations"),
)
ID_MAX_CHARACTERS: Final = 256
OVER_LONG_ID: Final = "x" * (ID_MAX_CHARACTERS + 1)
TIMESTAMP: Final = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"

NORMAL_CLOSURE: Final = 1000
PROTOCOL_ERROR: Final = 1002
INVALID_DATA: Final = 1007
MESSAGE_TOO_BIG: Final = 1009

# What may arrive at any time and answers nothing: notices, and the events of agents at work.
ANSWER_TYPES: Final = frozenset({
    "connected", "error", "forward_confirmed", "pong", "project_snapshot",
    "subscription_confirmed", "unsubscription_confirmed",
})  # fmt: skip
NOTICE_TYPES: Final = frozenset({"authenticated", "reconnect", "token_expiring"})

# Every one of these is answered with an `error`, and the connection goes on.
REFUSED_MESSAGES: Final[Mapping[str, str]] = {
    "no JSON at all": "hello",
    "truncated JSON": '{"action":"ping"',
    "two JSON values": '{"action":"ping"} {"action":"ping"}',
    "an empty message": "",
    "NaN": '{"action":"forward","type":NaN}',
    "JSON nested 100,000 deep": "[" * 100_000,
    "an array": '[{"action":"ping"}]',
    "a string": '"ping"',
    "a number": "42",
    "null": "null",
    "an object without action": "{}",
    "an unknown action": '{"action":"dance"}',
    "an action in capitals": '{"action":"PING"}',
    "an action that is a number": '{"action":1}',
    "an action that is null": '{"action":null}',
    "subscribe without project_id": '{"action":"subscribe"}',
    "subscribe with an empty project_id": '{"action":"subscribe","project_id":""}',
    "subscribe with project_id null": '{"action":"subscribe","project_id":null}',
    "subscribe with a number as project_id": '{"action":"subscribe","project_id":7}',
    "subscribe with an array as project_id": '{"action":"subscribe","project_id":["a"]}',
    "subscribe with an over-long project_id": (
        f'{{"action":"subscribe","project_id":"{OVER_LONG_ID}"}}'
    ),
    "unsubscribe without project_id": '{"action":"unsubscribe"}',
    "unsubscribe with an empty project_id": '{"action":"unsubscribe","project_id":""}',
    "unsubscribe with an object as project_id": '{"action":"unsubscribe","project_id":{}}',
    "forward without type": '{"action":"forward"}',
    "forward with an empty type": '{"action":"forward","type":""}',
    "forward with an unknown type": '{"action":"forward","type":"chef"}',
    "forward with a number as type": '{"action":"forward","type":1}',
    "forward with a number as message_id": '{"action":"forward","type":"dev","message_id":5}',
    "forward with an object as project_id": '{"action":"forward","type":"dev","project_id":{}}',
    "forward with an over-long message_id": (
        f'{{"action":"forward","type":"dev","message_id":"{OVER_LONG_ID}"}}'
    ),
    "forward with an over-long project_id": (
        f'{{"action":"forward","type":"dev","project_id":"{OVER_LONG_ID}"}}'
    ),
}

# --- Errors --------------------------------------------------------------------------------------


class CheckError(Exception):
    """The gateway did something else than it should; the text says what."""


class SkipCheck(Exception):
    """This gateway does not offer what the check is about; the text says what is missing."""


def require(condition: object, complaint: str) -> None:
    """Raise CheckError with `complaint` unless the condition holds."""
    if not condition:
        raise CheckError(complaint)


# --- Options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    url: str
    projects: tuple[str, str]
    forward: bool
    agent: str
    max_message_bytes: int
    timeout_s: float
    agent_timeout_s: float
    token: str
    pattern: str
    json_lines: bool


def parse_gateway(text: str) -> str:
    """The WebSocket URL that is meant by an address, without a query."""
    return parse_endpoint(text)[0].partition("?")[0]


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Read the command line, or exit 2 and say what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="integration_test.py",
        description="Check a running gateway's whole protocol from outside, a line a check.",
        epilog="Forwards go to real agents: on a system in use, think of --no-forward.",
    )
    add = parser.add_argument
    add("endpoint", type=parse_gateway, metavar="ENDPOINT",
        help="ws://, wss://, http:// or https:// address, or host:port")  # fmt: skip
    add("-k", metavar="TEXT", default="", help="only checks with TEXT in their names")
    add("--no-forward", action="store_true", help="send nothing to the agents")
    add("--agent", default="dev", metavar="TYPE",
        help="the agent whose updates are waited for (default: dev)")  # fmt: skip
    add("--project", action="append", default=[], metavar="ID",
        help="project to use, given twice, where a token allows only some")  # fmt: skip
    add("--max-message-bytes", type=parse_positive, default=262144, metavar="N",
        help="the server's MAX_MESSAGE_BYTES (default: 262144)")  # fmt: skip
    add("--timeout", type=parse_positive, default=10.0, metavar="SECONDS",
        help="the longest wait for an answer (default: 10)")  # fmt: skip
    add("--agent-timeout", type=parse_positive, default=5.0, metavar="SECONDS",
        help="the longest wait for an agent's update (default: 5)")  # fmt: skip
    add("--token", type=parse_token, default=environment.get(TOKEN_VARIABLE, ""),
        help=f"send 'Authorization: Bearer TOKEN' (default: ${TOKEN_VARIABLE})")  # fmt: skip
    add("--json", action="store_true", help="print a JSON object a check")
    given = parser.parse_args(arguments)
    if len(given.project) not in (0, 2):
        parser.error("--project: give none, or two different ones")
    run = secrets.token_hex(4)
    first, second = given.project or (f"integration-{run}-a", f"integration-{run}-b")
    return Options(
        url=given.endpoint,
        projects=(first, second),
        forward=not given.no_forward,
        agent=given.agent,
        max_message_bytes=int(given.max_message_bytes),
        timeout_s=given.timeout,
        agent_timeout_s=given.agent_timeout,
        token=given.token,
        pattern=given.k.lower(),
        json_lines=given.json,
    )


# --- Frames --------------------------------------------------------------------------------------


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, reserved: int = 0, masked: bool = True
) -> bytes:
    """A WebSocket frame as RFC 6455 lays it out, lawful or not. The mask is four zero bytes."""
    first = (0x80 if fin else 0) | reserved << 4 | opcode
    flag = 0x80 if masked else 0
    if len(payload) < 126:
        head = bytes([first, flag | len(payload)])
    elif len(payload) < 65536:
        head = bytes([first, flag | 126]) + len(payload).to_bytes(2)
    else:
        head = bytes([first, flag | 127]) + len(payload).to_bytes(8)
    return head + (bytes(4) if masked else b"") + payload


def deflate(payload: bytes) -> bytes:
    """`payload` as permessage-deflate puts it on the wire (RFC 7692, section 7.2.1)."""
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


PING_MESSAGE: Final = b'{"action":"ping"}'


def violations() -> dict[str, tuple[int, bytes]]:
    """What ends a connection: the close code it is to be answered with, and the bytes."""
    ping, cut_short = frame(Opcode.TEXT, PING_MESSAGE), frame(Opcode.TEXT, b'{"a', fin=False)
    deflated = frame(Opcode.TEXT, deflate(PING_MESSAGE), reserved=4)
    unsendable_code = (1005).to_bytes(2)
    bad_reason = NORMAL_CLOSURE.to_bytes(2) + b"\xff"
    endless = bytes([0x81, 0xFF]) + (1 << 62).to_bytes(8) + bytes(4)
    return {
        "an unmasked frame": (PROTOCOL_ERROR, frame(Opcode.TEXT, PING_MESSAGE, masked=False)),
        "a reserved bit": (PROTOCOL_ERROR, frame(Opcode.TEXT, PING_MESSAGE, reserved=2)),
        "compression that was not agreed on": (PROTOCOL_ERROR, deflated),
        "an unknown data opcode": (PROTOCOL_ERROR, frame(0x3, b"x")),
        "an unknown control opcode": (PROTOCOL_ERROR, frame(0xB, b"x")),
        "a ping of more than 125 bytes": (PROTOCOL_ERROR, frame(Opcode.PING, bytes(126))),
        "a fragmented ping": (PROTOCOL_ERROR, frame(Opcode.PING, b"x", fin=False)),
        "a continuation of nothing": (PROTOCOL_ERROR, frame(Opcode.CONT, PING_MESSAGE)),
        "a new message amid a fragmented one": (PROTOCOL_ERROR, cut_short + ping),
        "a close frame of one byte": (PROTOCOL_ERROR, frame(Opcode.CLOSE, b"\x03")),
        "a close code that may not be sent": (PROTOCOL_ERROR, frame(Opcode.CLOSE, unsendable_code)),
        "invalid UTF-8": (INVALID_DATA, frame(Opcode.TEXT, b'{"action":"p\xffng"}')),
        "UTF-8 that ends too early": (INVALID_DATA, frame(Opcode.TEXT, b'"\xe2\x82')),
        "UTF-8 of a surrogate": (INVALID_DATA, frame(Opcode.TEXT, b'"\xed\xa0\x80"')),
        "invalid UTF-8 in a fragment": (INVALID_DATA, cut_short + frame(Opcode.CONT, b'\xff":1}')),
        "a close reason of invalid UTF-8": (INVALID_DATA, frame(Opcode.CLOSE, bad_reason)),
        "a frame that promises 2^62 bytes": (MESSAGE_TOO_BIG, endless),
    }


# --- Connection ----------------------------------------------------------------------------------


class Peer:
    """One WebSocket connection: blocking, with a time limit on every wait.

    Frames are read by the library's Sans-I/O protocol, so that lawful answers are told from
    unlawful ones; what is sent may be anything.
    """

    def __init__(
        self,
        sock: socket.socket,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        extensions: Sequence[ClientExtensionFactory] = (),
    ) -> None:
        """Shake hands over `sock`. Raises InvalidHandshake, TimeoutError or OSError."""
        self.sock = sock
        self.timeout_s = timeout_s
        self.frames: deque[Frame] = deque()
        self.protocol = ClientProtocol(parse_uri(url), extensions=extensions or None)
        request = self.protocol.connect()
        request.headers.update(headers)
        self.protocol.send_request(request)
        self._flush()
        deadline = time.monotonic() + timeout_s
        while self.protocol.state is State.CONNECTING and self.protocol.handshake_exc is None:
            self._read(deadline)
        if self.protocol.handshake_exc is not None:
            raise self.protocol.handshake_exc

    def write(self, data: bytes) -> None:
        """Send raw bytes. A server that hung up meanwhile shows in its close frame, not here."""
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            self.sock.settimeout(self.timeout_s)
            self.sock.sendall(data)

    def send(self, message: Message | str) -> None:
        """Send one text message."""
        text = message if isinstance(message, str) else json.dumps(message, ensure_ascii=False)
        self.write(frame(Opcode.TEXT, text.encode()))

    def ask(self, message: Message | str) -> Message:
        """Send one text message and return its answer."""
        self.send(message)
        return self.answer()

    def answer(self) -> Message:
        """The server's next message that is neither a notice nor an agent's event."""
        deadline = time.monotonic() + self.timeout_s
        while True:
            message = self.next_message(deadline)
            if message.get("type") in ANSWER_TYPES:
                return message

    def event(self, project: str, timeout_s: float) -> Message | None:
        """The next event of `project`; None when none comes in time."""
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(TimeoutError):
            while True:
                message = self.next_message(deadline)
                known = message.get("type") in ANSWER_TYPES | NOTICE_TYPES
                if not known and message.get("project_id") == project:
                    return message
        return None

    def next_message(self, deadline: float) -> Message:
        """The next message, whatever its type. Raises TimeoutError, or CheckError on nonsense."""
        data, complete = b"", False
        while not complete:
            received = self.next_frame(deadline)
            if received.opcode is Opcode.CLOSE:
                require(False, f"the connection was closed with {self._close_code()}")
            require(received.opcode is not Opcode.BINARY, "the server sent a binary frame")
            if received.opcode in (Opcode.TEXT, Opcode.CONT):
                data, complete = data + bytes(received.data), received.fin
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise CheckError(f"the server sent something else than a JSON object: {data[:200]!r}")
        return message

    def next_frame(self, deadline: float) -> Frame:
        """The next frame of any kind. Raises TimeoutError, or CheckError at the end of it all."""
        while not self.frames:
            require(not self._ended(), "the connection was cut without a close frame")
            self._read(deadline)
        return self.frames.popleft()

    def closed_with(self) -> int:
        """The server's close code, once it has also ended the TCP connection."""
        deadline = time.monotonic() + self.timeout_s
        try:
            while not self._ended():
                self._read(deadline)
        except TimeoutError:
            require(self.protocol.close_rcvd, "the server did not close the connection")
            raise CheckError("a close frame came, but TCP was left open") from None
        require(self.protocol.close_rcvd, "the connection was cut without a close frame")
        return self._close_code()

    def close(self) -> None:
        """Hang up, without ceremony."""
        self.sock.close()

    def _close_code(self) -> int:
        received = self.protocol.close_rcvd
        return int(received.code) if received else 1006

    def _ended(self) -> bool:
        return self.protocol.state is State.CLOSED

    def _read(self, deadline: float) -> None:
        """Wait for bytes, or for the end, and let the protocol make frames of them."""
        self.sock.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self.sock.recv(65536)
        except (ConnectionError, ssl.SSLEOFError):
            data = b""  # a reset ends the connection as well; what was read before it counts
        if data:
            self.protocol.receive_data(data)
        else:
            self.protocol.receive_eof()
        self.frames.extend(e for e in self.protocol.events_received() if isinstance(e, Frame))
        self._flush()

    def _flush(self) -> None:
        """Send what the protocol has to say by itself: the handshake, pongs, close frames."""
        for data in self.protocol.data_to_send():
            if data:
                self.write(data)


class Gateway:
    """The server under test, and what was learned about it on the way."""

    def __init__(self, options: Options) -> None:
        self.options = options
        parts = urlsplit(options.url)
        self.secure = parts.scheme == "wss"
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if self.secure else 80)
        self.place = parts.netloc.rpartition("@")[2]
        self.agents_are_silent = False

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every handshake."""
        token = self.options.token
        return {"Authorization": f"Bearer {token}"} if token else {}

    @contextlib.contextmanager
    def connect(
        self,
        query: Sequence[tuple[str, str]] = (),
        *,
        path: str | None = None,
        extensions: Sequence[ClientExtensionFactory] = (),
    ) -> Iterator[Peer]:
        """A new WebSocket connection, `connected` not yet read."""
        url = self.options.url
        if path is not None:
            url = f"{'wss' if self.secure else 'ws'}://{self.place}{path}"
        if query:
            url = f"{url}?{urlencode(query, quote_via=quote)}"
        with self._open_socket() as sock:
            yield Peer(sock, url, self.headers, self.options.timeout_s, extensions)

    @contextlib.contextmanager
    def welcome(
        self,
        query: Sequence[tuple[str, str]] = (),
        *,
        extensions: Sequence[ClientExtensionFactory] = (),
    ) -> Iterator[Peer]:
        """A new WebSocket connection, `connected` read."""
        with self.connect(query, extensions=extensions) as peer:
            first = peer.answer()
            require(first.get("type") == "connected", f"expected `connected`, not {first}")
            yield peer

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, bytes]:
        """The status and body of an HTTP GET."""
        timeout_s = self.options.timeout_s
        connection = (
            http.client.HTTPSConnection(self.host, self.port, timeout=timeout_s)
            if self.secure
            else http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        )
        with contextlib.closing(connection):
            connection.request("GET", path, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read(65536)

    def _open_socket(self) -> socket.socket:
        sock = socket.create_connection((self.host, self.port), timeout=self.options.timeout_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not self.secure:
            return sock
        return ssl.create_default_context().wrap_socket(sock, server_hostname=self.host)


# --- Steps that several checks share -------------------------------------------------------------


def require_type(message: Message, kind: str) -> None:
    """Raise CheckError unless the message is of this type."""
    require(message.get("type") == kind, f"expected `{kind}`, not {message}")


def require_timestamp(message: Message) -> str:
    """The message's timestamp, in UTC as 2025-11-24T12:00:00Z."""
    value = message.get("timestamp")
    require(isinstance(value, str) and re.fullmatch(TIMESTAMP, value), f"no timestamp: {message}")
    return str(value)


def require_error(message: Message, **echoed: str) -> None:
    """Raise CheckError unless this is an error a person and a program can act on."""
    require_type(message, "error")
    for name in ("message", "code"):
        value = message.get(name)
        require(isinstance(value, str) and value, f"an error without `{name}`: {message}")
    for name, value in echoed.items():
        require(message.get(name) == value, f"the error does not name its {name}: {message}")


def require_alive(peer: Peer) -> None:
    """Raise CheckError unless the connection still answers."""
    require_type(peer.ask({"action": "ping"}), "pong")


def subscribe(peer: Peer, project: str, **fields: Any) -> Message:
    """Subscribe and return the confirmation."""
    confirmed = peer.ask({"action": "subscribe", "project_id": project, **fields})
    require_type(confirmed, "subscription_confirmed")
    require(confirmed.get("project_id") == project, f"another project: {confirmed}")
    return confirmed


def position(confirmed: Message) -> tuple[int, str]:
    """The `seq` and `epoch` of a confirmation. Raises SkipCheck where there is no event log."""
    seq, epoch = confirmed.get("seq"), confirmed.get("epoch")
    if "seq" not in confirmed and "epoch" not in confirmed:
        raise SkipCheck("this server has no event log")
    require(type(seq) is int and seq >= 0, f"`seq` is no position: {confirmed}")
    require(isinstance(epoch, str) and epoch, f"`epoch` is missing: {confirmed}")
    return int(seq or 0), str(epoch)


def require_forwarding(gateway: Gateway) -> None:
    """Raise SkipCheck when nothing may be sent to the agents."""
    if not gateway.options.forward:
        raise SkipCheck("--no-forward")


def forward(peer: Peer, kind: str, **fields: Any) -> Message:
    """Forward a task and return the confirmation."""
    data = {"task": "integration test"}
    confirmed = peer.ask({"action": "forward", "type": kind, "data": data, **fields})
    require_type(confirmed, "forward_confirmed")
    for name in ("message_id", "sqs_message_id"):
        value = confirmed.get(name)
        require(isinstance(value, str) and value, f"no `{name}`: {confirmed}")
    return confirmed


def forward_and_await(gateway: Gateway, peer: Peer, project: str) -> Message:
    """Give an agent work and return its first event, which `peer` is subscribed to.

    Raises SkipCheck where no agent answers.
    """
    require_forwarding(gateway)
    if gateway.agents_are_silent:
        raise SkipCheck("no agent answers")
    forward(peer, gateway.options.agent, project_id=project)
    event = peer.event(project, gateway.options.agent_timeout_s)
    if event is None:
        gateway.agents_are_silent = True
        raise SkipCheck(f"no agent answered within {gateway.options.agent_timeout_s:g} s")
    return event


# --- Checks: connecting --------------------------------------------------------------------------


def connected_comes_first(gateway: Gateway) -> None:
    """`connected` is the first message, with an id and a time."""
    with gateway.connect() as peer:
        first = peer.next_message(time.monotonic() + gateway.options.timeout_s)
    require_type(first, "connected")
    greeting = "WebSocket connection established"
    require(first.get("message") == greeting, f"another greeting: {first}")
    require(isinstance(first.get("connection_id"), str), f"no connection_id: {first}")
    require_timestamp(first)


def connections_have_ids_of_their_own(gateway: Gateway) -> None:
    """Two connections have two ids."""
    with gateway.connect() as one, gateway.connect() as other:
        ids = {str(peer.answer().get("connection_id")) for peer in (one, other)}
    require(len(ids) == 2, f"both are {ids}")


def path_is_upgraded(path: str, gateway: Gateway) -> None:
    """A WebSocket opens at this path."""
    with gateway.connect(path=path) as peer:
        require_type(peer.answer(), "connected")


def close_is_answered(gateway: Gateway) -> None:
    """A close frame is echoed and the TCP connection ends."""
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.CLOSE, NORMAL_CLOSURE.to_bytes(2) + b"done"))
        code = peer.closed_with()
    require(code == NORMAL_CLOSURE, f"the close code was {code}")


def url_subscribes(gateway: Gateway) -> None:
    """`?project_id=` subscribes, and may be repeated."""
    wanted = set(gateway.options.projects)
    with gateway.welcome([("project_id", project) for project in gateway.options.projects]) as peer:
        answers = [peer.answer(), peer.answer()]
        for answer in answers:
            require_type(answer, "subscription_confirmed")
        require({a.get("project_id") for a in answers} == wanted, f"other projects: {answers}")
        require_alive(peer)


def url_with_over_long_project(gateway: Gateway) -> None:
    """An over-long `?project_id=` is an error, the connection goes on."""
    with gateway.welcome([("project_id", OVER_LONG_ID)]) as peer:
        require_error(peer.answer())
        require_alive(peer)


# --- Checks: messages ----------------------------------------------------------------------------


def ping_is_answered(gateway: Gateway) -> None:
    """`ping` is answered by `pong` with the time, which does not go backwards."""
    with gateway.welcome() as peer:
        times = []
        for _ in range(2):
            pong = peer.ask({"action": "ping"})
            require_type(pong, "pong")
            times.append(require_timestamp(pong))
    require(times[0] <= times[1], f"time went backwards: {times}")


def unknown_fields_are_ignored(gateway: Gateway) -> None:
    """Unknown fields are ignored."""
    with gateway.welcome() as peer:
        require_type(peer.ask({"action": "ping", "colour": "blue", "x": [{}]}), "pong")


def subscribing(gateway: Gateway) -> None:
    """`subscribe` is confirmed, a second time too."""
    with gateway.welcome() as peer:
        for _ in range(2):
            confirmed = subscribe(peer, gateway.options.projects[0])
            require("recovered" not in confirmed, f"`recovered` without `since`: {confirmed}")


def unsubscribing(gateway: Gateway) -> None:
    """`unsubscribe` is confirmed, also for what was not subscribed."""
    project, other = gateway.options.projects
    with gateway.welcome() as peer:
        subscribe(peer, project)
        for each in (project, other):
            confirmed = peer.ask({"action": "unsubscribe", "project_id": each})
            require_type(confirmed, "unsubscription_confirmed")
            require(confirmed.get("project_id") == each, f"another project: {confirmed}")


def longest_project_id(gateway: Gateway) -> None:
    """A project_id of 256 characters, not all of them ASCII, is taken."""
    if not gateway.options.projects[0].startswith("integration-"):
        raise SkipCheck("--project says which ids may be used")
    with gateway.welcome() as peer:
        subscribe(peer, ("größe-" + secrets.token_hex(8)).ljust(ID_MAX_CHARACTERS, "x"))


def message_is_refused(text: str, gateway: Gateway) -> None:
    """This message is answered with an error, and the connection goes on."""
    with gateway.welcome() as peer:
        require_error(peer.ask(text))
        require_alive(peer)


def unknown_action_is_named(gateway: Gateway) -> None:
    """The error to an unknown action has the code `unknown_action` and names the action."""
    with gateway.welcome() as peer:
        error = peer.ask({"action": "dance"})
    require_error(error, action="dance", code="unknown_action")


def refused_forward_is_named(gateway: Gateway) -> None:
    """The error to a forward names its message_id."""
    message_id = str(uuid.uuid4())
    with gateway.welcome() as peer:
        error = peer.ask({"action": "forward", "type": "chef", "message_id": message_id})
    require_error(error, message_id=message_id)


def binary_is_refused(gateway: Gateway) -> None:
    """A binary message is answered with an error, and the connection goes on."""
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.BINARY, PING_MESSAGE))
        require_error(peer.answer())
        require_alive(peer)


# --- Checks: forwarding --------------------------------------------------------------------------


def type_is_forwarded(kind: str, gateway: Gateway) -> None:
    """A forward of this type is confirmed under the client's own message_id."""
    require_forwarding(gateway)
    message_id = str(uuid.uuid4())
    with gateway.welcome() as peer:
        confirmed = forward(
            peer, kind, message_id=message_id, project_id=gateway.options.projects[1]
        )
    require(confirmed["message_id"] == message_id, f"another message_id: {confirmed}")


def message_id_is_filled_in(gateway: Gateway) -> None:
    """A forward without message_id gets one, a UUID, and it is returned."""
    require_forwarding(gateway)
    with gateway.welcome() as peer:
        confirmed = forward(peer, gateway.options.agent, project_id=gateway.options.projects[1])
    try:
        uuid.UUID(confirmed["message_id"])
    except ValueError:
        raise CheckError(f"the message_id is no UUID: {confirmed}") from None


def forwards_overlap(gateway: Gateway) -> None:
    """Twenty forwards sent at once are confirmed, each under its own message_id."""
    require_forwarding(gateway)
    ids = {str(uuid.uuid4()) for _ in range(20)}
    with gateway.welcome() as peer:
        for message_id in ids:
            peer.send({
                "action": "forward", "type": gateway.options.agent, "message_id": message_id,
                "project_id": gateway.options.projects[1], "data": {"task": "integration test"},
            })  # fmt: skip
        answers = [peer.answer() for _ in ids]
    for answer in answers:
        require_type(answer, "forward_confirmed")
    require({a.get("message_id") for a in answers} == ids, "the message_ids are others")
    require(len({a.get("sqs_message_id") for a in answers}) == len(ids), "sqs_message_ids repeat")


def unsendable_character_is_refused(gateway: Gateway) -> None:
    """A character that SQS refuses, raw U+FFFF, is an error to this forward alone."""
    require_forwarding(gateway)
    message_id = str(uuid.uuid4())
    with gateway.welcome() as peer:
        error = peer.ask({
            "action": "forward", "type": gateway.options.agent, "message_id": message_id,
            "data": "\uffff",
        })  # fmt: skip
        require_error(error, message_id=message_id)
        require_alive(peer)


# --- Checks: events and resuming -----------------------------------------------------------------


def events_arrive(gateway: Gateway) -> None:
    """An agent's events reach who subscribed, and not who unsubscribed."""
    project = gateway.options.projects[0]
    with gateway.welcome() as peer, gateway.welcome() as other:
        subscribe(peer, project)
        subscribe(other, project)
        other.ask({"action": "unsubscribe", "project_id": project})
        event = forward_and_await(gateway, peer, project)
        require(isinstance(event.get("type"), str) and "data" in event, f"no event: {event}")
        require(other.event(project, 0.2) is None, "an event after `unsubscription_confirmed`")


def missed_events_arrive(gateway: Gateway) -> None:
    """Who comes back with `since` and `epoch` gets what was missed, once and in order."""
    project = gateway.options.projects[0]
    with gateway.welcome() as peer:
        seq, epoch = position(subscribe(peer, project))
        event = forward_and_await(gateway, peer, project)
        while event.get("seq") is None:  # ephemeral ones are in no log
            event = peer.event(project, gateway.options.agent_timeout_s) or {"seq": seq}
    if event["seq"] == seq:
        raise SkipCheck("the agent's events are all ephemeral")
    with gateway.welcome() as peer:
        confirmed = subscribe(peer, project, since=seq, epoch=epoch)
        require(confirmed.get("recovered") is True, f"not recovered: {confirmed}")
        for expected in range(seq + 1, int(event["seq"]) + 1):
            missed = peer.event(project, gateway.options.timeout_s) or {}
            require(missed.get("seq") == expected, f"expected seq {expected}, got {missed}")
    require(missed == event, f"seq {expected} was {event}, now it is {missed}")


def resuming_at_the_end(gateway: Gateway) -> None:
    """Who missed nothing is told so: `recovered` is true."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        seq, epoch = position(subscribe(peer, project))
        confirmed = subscribe(peer, project, since=seq, epoch=epoch)
    require(confirmed.get("recovered") is True, f"not recovered: {confirmed}")
    require(position(confirmed)[1] == epoch, f"the epoch changed: {confirmed}")


def resuming_by_url(gateway: Gateway) -> None:
    """`?project_id=&since=&epoch=` resumes as well."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        seq, epoch = position(subscribe(peer, project))
    query = [("project_id", project), ("since", str(seq)), ("epoch", epoch)]
    with gateway.welcome(query) as peer:
        confirmed = peer.answer()
    require_type(confirmed, "subscription_confirmed")
    require(confirmed.get("recovered") is True, f"not recovered: {confirmed}")


def resuming_elsewhere(fields: Mapping[str, Any], gateway: Gateway) -> None:
    """A position that is not in this log is an error or `recovered: false`, never silence."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        seq, epoch = position(subscribe(peer, project))
        request = {"since": seq + fields.get("ahead", 0), "epoch": fields.get("epoch", epoch)}
        answer = peer.ask({"action": "subscribe", "project_id": project, **request})
        if answer.get("type") == "error":
            require_error(answer)
        else:
            require_type(answer, "subscription_confirmed")
            require(answer.get("recovered") is False, f"not `recovered: false`: {answer}")
        require_alive(peer)


def since_is_refused(since: Any, gateway: Gateway) -> None:
    """A `since` that is no position is an error, and the connection goes on."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        position(subscribe(peer, project))
        require_error(peer.ask({"action": "subscribe", "project_id": project, "since": since}))
        require_alive(peer)


def since_in_url_is_refused(gateway: Gateway) -> None:
    """A `&since=` that is no number is an error or `recovered: false`, never silence."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        position(subscribe(peer, project))
    with gateway.welcome([("project_id", project), ("since", "soon")]) as peer:
        answer = peer.answer()
        if answer.get("type") != "error":
            require(answer.get("recovered") is False, f"neither error nor warning: {answer}")
        require_alive(peer)


def snapshot_is_sent(gateway: Gateway) -> None:
    """`"snapshot": true` brings the project's state, null where there is none."""
    project = gateway.options.projects[1]
    with gateway.welcome() as peer:
        position(subscribe(peer, project))
        subscribe(peer, project, snapshot=True)
        snapshot = peer.answer()
    require_type(snapshot, "project_snapshot")
    require(snapshot.get("project_id") == project, f"another project: {snapshot}")
    require("data" in snapshot, f"no data: {snapshot}")


# --- Checks: frames ------------------------------------------------------------------------------


def control_ping_is_answered(gateway: Gateway) -> None:
    """A ping frame is answered by a pong frame with the same bytes."""
    payload = secrets.token_bytes(125)
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.PING, payload))
        deadline = time.monotonic() + gateway.options.timeout_s
        while (received := peer.next_frame(deadline)).opcode is not Opcode.PONG:
            pass
    require(bytes(received.data) == payload, "the pong carries other bytes")


def stray_pong_is_ignored(gateway: Gateway) -> None:
    """A pong that nobody asked for is ignored."""
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.PONG, b"stray"))
        require_alive(peer)


def fragments_are_joined(gateway: Gateway) -> None:
    """A message in fragments of one byte, with a ping between them, is one message."""
    message = '{"action":"ping","note":"größer"}'.encode()  # cuts through characters, too
    pieces = [frame(Opcode.TEXT, message[:1], fin=False), frame(Opcode.PING, b"between")]
    pieces += [frame(Opcode.CONT, message[i : i + 1], fin=False) for i in range(1, len(message))]
    with gateway.welcome() as peer:
        peer.write(b"".join(pieces) + frame(Opcode.CONT))
        require_type(peer.answer(), "pong")


def bytes_may_trickle(gateway: Gateway) -> None:
    """A frame that arrives a few bytes at a time is a frame."""
    data = frame(Opcode.TEXT, PING_MESSAGE)
    with gateway.welcome() as peer:
        for start in range(0, len(data), 3):
            peer.write(data[start : start + 3])
            time.sleep(0.002)  # a packet of its own; nothing depends on it
        require_type(peer.answer(), "pong")


def padded_ping(size_bytes: int) -> bytes:
    """A `ping` message of exactly this size."""
    head, tail = b'{"action":"ping","padding":"', b'"}'
    return head + b"x" * (size_bytes - len(head) - len(tail)) + tail


def largest_message_is_taken(gateway: Gateway) -> None:
    """A message of exactly MAX_MESSAGE_BYTES is taken."""
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.TEXT, padded_ping(gateway.options.max_message_bytes)))
        require_type(peer.answer(), "pong")


def larger_message_is_refused(gateway: Gateway) -> None:
    """One byte over MAX_MESSAGE_BYTES closes with 1009."""
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.TEXT, padded_ping(gateway.options.max_message_bytes + 1)))
        code = peer.closed_with()
    require(code == MESSAGE_TOO_BIG, f"the close code was {code}")


def larger_fragments_are_refused(gateway: Gateway) -> None:
    """Fragments that together exceed MAX_MESSAGE_BYTES close with 1009."""
    message = padded_ping(gateway.options.max_message_bytes + 1)
    half = len(message) // 2
    with gateway.welcome() as peer:
        peer.write(frame(Opcode.TEXT, message[:half], fin=False))
        peer.write(frame(Opcode.CONT, message[half:]))
        code = peer.closed_with()
    require(code == MESSAGE_TOO_BIG, f"the close code was {code}")


def violation_is_closed(code: int, data: bytes, gateway: Gateway) -> None:
    """These bytes are answered with a close frame of this code."""
    with gateway.welcome() as peer:
        peer.write(data)
        received = peer.closed_with()
    require(received == code, f"the close code was {received}, not {code}")


@contextlib.contextmanager
def compressing(gateway: Gateway) -> Iterator[Peer]:
    """A connection with permessage-deflate. Raises SkipCheck where the server does not offer it."""
    offer = ClientPerMessageDeflateFactory(
        server_no_context_takeover=True, client_no_context_takeover=True
    )
    with gateway.welcome(extensions=[offer]) as peer:
        if not peer.protocol.extensions:
            raise SkipCheck("this server does not compress")
        yield peer


def compression_works(gateway: Gateway) -> None:
    """With permessage-deflate, a compressed message is understood."""
    with compressing(gateway) as peer:
        peer.write(frame(Opcode.TEXT, deflate(PING_MESSAGE), reserved=4))
        require_type(peer.answer(), "pong")
        require_alive(peer)


def compression_bomb_is_refused(gateway: Gateway) -> None:
    """A small frame that inflates beyond MAX_MESSAGE_BYTES closes with 1009."""
    bomb = deflate(padded_ping(gateway.options.max_message_bytes * 8))
    with compressing(gateway) as peer:
        peer.write(frame(Opcode.TEXT, bomb, reserved=4))
        code = peer.closed_with()
    require(code == MESSAGE_TOO_BIG, f"the close code was {code}")


# --- Checks: HTTP --------------------------------------------------------------------------------


def health_is_ok(gateway: Gateway) -> None:
    """/health is 200 and says `{"status": "ok"}`."""
    status, body = gateway.get("/health")
    require(status == 200, f"HTTP {status}: {body[:200]!r}")
    require(json.loads(body).get("status") == "ok", f"it says {body[:200]!r}")


def path_has_status(path: str, expected: int, gateway: Gateway) -> None:
    """A GET of this path has this status."""
    status, _ = gateway.get(path)
    require(status == expected, f"HTTP {status}")


def no_upgrade_is_refused(gateway: Gateway) -> None:
    """A GET of the WebSocket's path without an upgrade is a 4xx."""
    status, _ = gateway.get(urlsplit(gateway.options.url).path, gateway.headers)
    require(400 <= status < 500, f"HTTP {status}")


def upgrade_elsewhere_is_refused(gateway: Gateway) -> None:
    """A WebSocket at any other path is a 404."""
    try:
        with gateway.connect(path="/no-such-path"):
            raise CheckError("the connection was upgraded")
    except InvalidStatus as error:
        status = error.response.status_code
        require(status == 404, f"HTTP {status}")


def half_an_upgrade_is_refused(gateway: Gateway) -> None:
    """An upgrade without a key is a 4xx."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13"}
    status, _ = gateway.get(urlsplit(gateway.options.url).path, gateway.headers | upgrade)
    require(400 <= status < 500, f"HTTP {status}")


# --- The list ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A check under the name it is printed and chosen by."""

    name: str
    run: Callable[[Gateway], None]


def named(section: str, *functions: Callable[[Gateway], None]) -> list[Check]:
    """Checks that are called what their docstrings say."""
    sentences = [(str(f.__doc__).strip().rstrip("."), f) for f in functions]
    return [Check(f"{section}: {text[0].lower()}{text[1:]}", f) for text, f in sentences]


def all_checks() -> list[Check]:
    """Every check, in the order of the protocol's description."""
    return [
        *named("http", health_is_ok),
        Check("http: /live is 200", partial(path_has_status, "/live", 200)),
        Check("http: another path is 404", partial(path_has_status, "/no-such-path", 404)),
        *named("http", no_upgrade_is_refused, half_an_upgrade_is_refused),
        *named("http", upgrade_elsewhere_is_refused),
        *(
            Check(f"connection: {path} is upgraded", partial(path_is_upgraded, path))
            for path in ("/", "/ws")
        ),
        *named("connection", connected_comes_first, connections_have_ids_of_their_own),
        *named("connection", close_is_answered, url_subscribes, url_with_over_long_project),
        *named("message", ping_is_answered, unknown_fields_are_ignored),
        *named("message", subscribing, unsubscribing, longest_project_id),
        *(
            Check(f"error: {name}", partial(message_is_refused, text))
            for name, text in REFUSED_MESSAGES.items()
        ),
        *named("error", unknown_action_is_named, refused_forward_is_named, binary_is_refused),
        # Before the many forwards: an agent that takes one at a time would answer too late.
        *named("events", events_arrive, missed_events_arrive),
        *named("resume", resuming_at_the_end, resuming_by_url),
        Check("resume: from the future", partial(resuming_elsewhere, {"ahead": 1000})),
        Check("resume: from another epoch", partial(resuming_elsewhere, {"epoch": "elsewhere"})),
        *(
            Check(f"resume: since {json.dumps(since)}", partial(since_is_refused, since))
            for since in (-1, 1.5, "1", True, [1])
        ),
        *named("resume", since_in_url_is_refused, snapshot_is_sent),
        *(
            Check(f"forward: to {kind!r}", partial(type_is_forwarded, kind))
            for kind in (*AGENT_TYPES, "Dev", "OPERATIONS")
        ),
        *named("forward", message_id_is_filled_in, forwards_overlap),
        *named("forward", unsendable_character_is_refused),
        *named("frames", control_ping_is_answered, stray_pong_is_ignored, fragments_are_joined),
        *named("frames", bytes_may_trickle, largest_message_is_taken),
        *named("frames", larger_message_is_refused, larger_fragments_are_refused),
        *named("frames", compression_works, compression_bomb_is_refused),
        *(
            Check(f"violation: {name}, {code}", partial(violation_is_closed, code, data))
            for name, (code, data) in violations().items()
        ),
    ]


# --- Running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How a check went: `ok`, `FAIL` or `skip`, and why."""

    name: str
    verdict: str
    duration_s: float
    detail: str

    def line(self) -> str:
        """The line a person reads."""
        detail = f": {self.detail}" if self.detail else ""
        return escape(f"{self.verdict:<4} {self.duration_s * 1000:7.1f} ms  {self.name}{detail}")

    def json_line(self) -> str:
        """The line a program reads."""
        return json.dumps({
            "check": self.name, "result": self.verdict.lower(),
            "duration_ms": round(self.duration_s * 1000, 1), "detail": self.detail,
        })  # fmt: skip


def run_check(check: Check, gateway: Gateway) -> Result:
    """Run one check. Whatever goes wrong with the gateway is its result, never an exception."""
    verdict, detail = "ok", ""
    started_at = time.monotonic()
    try:
        check.run(gateway)
    except SkipCheck as reason:
        verdict, detail = "skip", str(reason)
    except CheckError as complaint:
        verdict, detail = "FAIL", str(complaint)
    except TimeoutError:
        verdict, detail = "FAIL", f"nothing within {gateway.options.timeout_s:g} s"
    except (OSError, InvalidHandshake, http.client.HTTPException, ValueError) as error:
        verdict, detail = "FAIL", f"{type(error).__name__}: {error}"
    return Result(check.name, verdict, time.monotonic() - started_at, detail[:500])


def unreachable(gateway: Gateway) -> str:
    """Why there is no point in checking anything and what to do, or "" when the gateway answers."""
    try:
        with gateway.connect():
            return ""
    except CONNECT_ERRORS as error:
        trouble = explain(error, gateway.options.url)
        return f"{trouble}\nnext:  {trouble.advice}"


def report(results: Sequence[Result], duration_s: float, *, json_lines: bool) -> None:
    """Print the sum of it all."""
    count = {
        verdict: sum(r.verdict == verdict for r in results) for verdict in ("ok", "FAIL", "skip")
    }
    if json_lines:
        print(json.dumps({
            "summary": {"ok": count["ok"], "failed": count["FAIL"], "skipped": count["skip"]},
            "duration_ms": round(duration_s * 1000, 1),
        }))  # fmt: skip
        return
    print(
        f"{len(results)} checks in {duration_s:.1f} s: "
        f"{count['ok']} ok, {count['FAIL']} failed, {count['skip']} skipped"
    )


def main() -> int:
    """Run the program; the exit code."""
    options = parse_options(sys.argv[1:], os.environ)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the console's encoding lacks becomes an escape
            stream.reconfigure(errors="backslashreplace")
    checks = [check for check in all_checks() if options.pattern in check.name.lower()]
    if not checks:
        print(f"error: no check has {options.pattern!r} in its name", file=sys.stderr)
        return 2
    gateway = Gateway(options)
    if trouble := unreachable(gateway):
        print(f"error: {trouble}", file=sys.stderr)
        return 1
    started_at = time.monotonic()
    results: list[Result] = []
    try:
        for check in checks:
            results.append(run_check(check, gateway))
            print(results[-1].json_line() if options.json_lines else results[-1].line(), flush=True)
    except KeyboardInterrupt:
        return 130
    report(results, time.monotonic() - started_at, json_lines=options.json_lines)
    return 1 if any(result.verdict == "FAIL" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
