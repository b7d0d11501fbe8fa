#!/usr/bin/env python3
"""Talk to the gateway from a terminal: watch both directions, type messages, survive restarts.

A lost connection is resumed by itself: the last `seq` and `epoch` of every project are remembered
and sent along, so that nothing is missed and nothing comes twice. `--once` is for scripts: it makes
one round trip, prints a line a step and exits 0 or 1.

Needs Python 3.11 and the `websockets` package; runs on Linux, macOS and Windows.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import concurrent.futures
import contextlib
import hashlib
import importlib
import json
import os
import random
import re
import socket
import ssl
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any, Final, NoReturn, TextIO
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import (
    ConnectionClosed,
    InvalidHandshake,
    InvalidMessage,
    InvalidProxy,
    InvalidStatus,
    InvalidURI,
)

# --- Vocabulary ----------------------------------------------------------------------------------

HELP: Final = """\
subscribe PROJECT [since N [epoch E]]   receive a project's events, those after N first
unsubscribe PROJECT                     receive them no more
forward AGENT [JSON] [PROJECT]          give work to an agent: pm, dev, qa or ops
ping                                    measure the round trip
{"action": ...}                         any message of your own, sent as typed
raw TEXT                                any text at all, to see what the server answers
help, quit"""

EXAMPLES: Final = """\
examples:
  python test-websocket.py ws://127.0.0.1:8080 --project proj_123
  python test-websocket.py wss://gateway.example.com/ws --once
  echo ping | python test-websocket.py 127.0.0.1:8080
  python test-websocket.py 127.0.0.1:8080 --project proj_123 --listen --json | jq .data

A project that was named is the one `forward` uses unless told otherwise. At the end of piped input
the answers are awaited, then the client leaves."""

TOKEN_VARIABLE: Final = "WEBSOCKET_TOKEN"
QUEUE_VARIABLE: Final = "SQS_QUEUE_URL_UPDATES"
PROMPT: Final = "> "

FIRST_DELAY_S: Final = 0.5
LONGEST_DELAY_S: Final = 20.0
LONGEST_PLANNED_DELAY_S: Final = 300.0
# A connection that lasted this long was a good one: the next loss starts with a short delay again.
LASTING_CONNECTION_S: Final = 10.0
CLOSE_TIMEOUT_S: Final = 2.0

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
MAX_SHOWN_CHARACTERS: Final = 4000

ABNORMAL_CLOSURE: Final = 1006
POLICY_VIOLATION: Final = 1008
UNAUTHENTICATED: Final = 4401
CLOSE_MEANINGS: Final[Mapping[int, str]] = {
    1000: "closed normally",
    1001: "the server went away",
    1002: "the server saw a protocol violation",
    1006: "lost without a goodbye",
    1007: "a message was not valid UTF-8",
    1008: "refused by the server's policy",
    1009: "a message was larger than the server accepts",
    1011: "the server failed on this connection",
    1012: "the server restarts",
    1013: "this client reads too slowly",
    4401: "the token is missing, refused or expired",
}

STATUS_ADVICE: Final[Mapping[int, str]] = {
    400: "if the server expects TLS, use wss://",
    401: f"pass a valid token with --token or in {TOKEN_VARIABLE}",
    403: "the origin or the token is not allowed here; look at the server's log",
    404: "the gateway answers at / and at /ws; check the path",
    426: "this is an HTTP address; the gateway answers at / and at /ws",
    429: "too many connections or failed attempts from here; wait a minute",
    502: "the load balancer has no answer from a task; look at the service's tasks and their log",
    503: "the server is starting, draining or full, or no target is healthy; try again shortly",
    504: "the load balancer waited in vain for a task; check the tasks' security group",
}

# Each answer, with the request it belongs to and the field that both share.
ANSWERS: Final[Mapping[str, tuple[str, str]]] = {
    "subscription_confirmed": ("subscribe", "project_id"),
    "unsubscription_confirmed": ("unsubscribe", "project_id"),
    "forward_confirmed": ("forward", "message_id"),
    "pong": ("ping", ""),
}
# What only the server says; any other type is an agent's event.
SERVER_TYPES: Final = frozenset({
    "authenticated", "connected", "error", "forward_confirmed", "pong", "project_snapshot",
    "reconnect", "subscription_confirmed", "token_expiring", "unsubscription_confirmed",
})  # fmt: skip

# The numbers of ANSI colours.
RED, GREEN, YELLOW, BLUE, CYAN = 31, 32, 33, 34, 36
TYPE_COLOURS: Final[Mapping[str, int]] = {
    **dict.fromkeys(SERVER_TYPES, GREEN),
    "error": RED,
    "reconnect": YELLOW,
    "token_expiring": YELLOW,
}

Message = dict[str, Any]

# --- Errors --------------------------------------------------------------------------------------


class CommandError(Exception):
    """A typed line that means nothing; the text says what would."""


class FatalError(Exception):
    """What ends the program with exit code 1, and what the person can do about it."""

    def __init__(self, problem: str, advice: str = "") -> None:
        super().__init__(problem)
        self.advice = advice


# What connect() raises when no connection comes about.
CONNECT_ERRORS: Final = (OSError, InvalidHandshake, InvalidURI, InvalidProxy)


def is_passing(error: Exception) -> bool:
    """Whether the same attempt may succeed later, as while a server restarts."""
    if isinstance(error, InvalidStatus):
        status: int = error.response.status_code
        return status >= 500 or status == 429
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, (OSError, InvalidMessage))


def explain_status(error: InvalidStatus) -> FatalError:
    """An HTTP answer other than the upgrade, with the body's first words."""
    status = error.response.status_code
    body = bytes(error.response.body or b"")[:200].decode(errors="replace").strip()
    advice = STATUS_ADVICE.get(status, "check host, port and path: is it the gateway's address?")
    return FatalError(f"the server answered HTTP {status}" + (f": {body}" if body else ""), advice)


def explain(error: Exception, url: str) -> FatalError:
    """The failed connection attempt `error` in a sentence, with the step to take next."""
    parts = urlsplit(url)
    place = parts.netloc.rpartition("@")[2]
    if isinstance(error, InvalidStatus):
        return explain_status(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        return FatalError(
            f"the certificate of {place} is not trusted: {error.verify_message}",
            "use the host name in the certificate, or name its issuer in SSL_CERT_FILE",
        )
    if parts.scheme == "wss" and isinstance(error, (ssl.SSLError, ConnectionResetError)):
        return FatalError(f"{place} does not answer in TLS", "try ws:// instead of wss://")
    if isinstance(error, InvalidMessage):
        advice = "if it expects TLS, use wss://; otherwise check the port"
        return FatalError(f"{place} does not answer in HTTP/1.1", advice)
    if isinstance(error, ConnectionRefusedError):
        return FatalError(
            f"connection refused: nothing listens at {place}",
            "start the server (make run), or check host and port",
        )
    if isinstance(error, socket.gaierror):
        return FatalError(
            f"the host name in {place} is unknown", "check its spelling, and your DNS"
        )
    if isinstance(error, TimeoutError):
        advice = "check host and port, and that firewalls and security groups let you through"
        return FatalError(f"no answer from {place} in time", advice)
    if isinstance(error, OSError):
        advice = "check host, port and your network"
        return FatalError(f"cannot reach {place}: {error.strerror or error}", advice)
    return FatalError(
        f"no WebSocket connection with {place}: {error}", "is it the gateway's address?"
    )


# --- Options -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """Where to connect, and the projects its query string named."""

    url: str
    projects: tuple[str, ...]
    loopback: bool


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    endpoint: Endpoint
    projects: tuple[str, ...]
    once: bool
    agent: str
    expect_updates: bool
    timeout_s: float
    json_lines: bool
    listen: bool
    token: str


def is_loopback(host: str) -> bool:
    """Whether `host` is this machine: no proxy stands between, whatever the environment says."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def parse_endpoint(text: str) -> Endpoint:
    """The WebSocket URL a person means by `text`: ws, wss, http, https or just host:port.

    Projects are taken out of the query: they are subscribed to by message, because only that can
    be repeated with a position after a lost connection.
    """
    scheme, found, rest = text.strip().partition("://")
    if not found:
        scheme, rest = "ws", text.strip()
    secure = {"ws": False, "http": False, "wss": True, "https": True}.get(scheme.lower())
    if secure is None:
        raise argparse.ArgumentTypeError(f"{scheme}:// is not one of ws, wss, http, https")
    try:
        parts = urlsplit(f"{'wss' if secure else 'ws'}://{rest}")
        host, _port = parts.hostname, parts.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not an address: {error}") from None
    if not host or re.search(r"[\s\x00-\x1f]", rest):
        raise argparse.ArgumentTypeError("not an address: expected something like ws://host:8080")
    query = parse_qsl(parts.query, keep_blank_values=True)
    projects = tuple(value for name, value in query if name == "project_id" and value)
    kept = [(name, value) for name, value in query if name not in {"project_id", "since", "epoch"}]
    url = urlunsplit((parts.scheme, parts.netloc, parts.path or "/", urlencode(kept), ""))
    return Endpoint(url, projects, is_loopback(host))


def parse_token(text: str) -> str:
    """A bearer token that fits in one HTTP header."""
    if not re.fullmatch(r"[\x21-\x7e]*", text.strip()):
        raise argparse.ArgumentTypeError("a token is one word of ASCII characters")
    return text.strip()


def parse_seconds(text: str) -> float:
    """A time limit."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Read the command line, or exit 2 and say what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="test-websocket.py",
        description="Talk to the gateway: both directions on screen, typed messages, resuming.",
        epilog=f"typed lines:\n{HELP}".replace("\n", "\n  ") + f"\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("endpoint", type=parse_endpoint, metavar="ENDPOINT",
        help="ws://, wss://, http:// or https:// address, or host:port")  # fmt: skip
    add("--project", action="append", default=[], metavar="ID",
        help="subscribe to this project; may be repeated")  # fmt: skip
    add("--once", action="store_true",
        help="check one round trip, print a line a step, exit 0 or 1")  # fmt: skip
    add("--agent", default="dev", metavar="TYPE",
        help="the agent that --once forwards to (default: %(default)s)")  # fmt: skip
    add("--expect-updates", action=argparse.BooleanOptionalAction, default=True,
        help="--once waits for an update from the agent (default: yes)")  # fmt: skip
    add("--timeout", type=parse_seconds, default=15.0, metavar="SECONDS",
        help="the longest that one step may take (default: %(default)g)")  # fmt: skip
    add("--listen", action="store_true", help="read no input; show what arrives until Ctrl-C")
    add("--json", action="store_true",
        help="only what the server sends, one raw line a message; the rest to stderr")  # fmt: skip
    add("--token", type=parse_token, default=environment.get(TOKEN_VARIABLE, ""),
        help=f"send 'Authorization: Bearer TOKEN' (default: ${TOKEN_VARIABLE}, "
        "which keeps it out of the process list)")  # fmt: skip
    given = parser.parse_args(arguments)
    return Options(
        endpoint=given.endpoint,
        projects=tuple(dict.fromkeys([*given.endpoint.projects, *given.project])),
        once=given.once,
        agent=given.agent,
        expect_updates=given.expect_updates,
        timeout_s=given.timeout,
        json_lines=given.json,
        listen=given.listen,
        token=given.token,
    )


# --- Messages ------------------------------------------------------------------------------------


def read_message(text: str) -> Message | None:
    """The JSON object in `text`, or None: whatever a peer sends, this does not raise."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def write_message(message: Mapping[str, Any]) -> str:
    """Compact JSON, readable in any language."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":"))


def word(message: Message, name: str) -> str:
    """The string field `name`, or "" when it is missing or of another type."""
    value = message.get(name)
    return value if isinstance(value, str) else ""


def number(message: Message, name: str) -> int | None:
    """The integer field `name`, or None when it is missing or of another type."""
    value = message.get(name)
    return value if type(value) is int else None  # True is an int by inheritance only


# --- Screen --------------------------------------------------------------------------------------


def escape(text: str) -> str:
    r"""One line without a character that could drive a terminal or deceive a reader.

    Control characters, bidirectional overrides, zero-width and lone surrogates become \uXXXX.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def escape_json(text: str) -> str:
    """As `escape`, and JSON stays the same JSON: a line break can only be space between tokens."""
    return escape(re.sub(r"[\t\r\n]", " ", text))


def line_editor() -> Any:
    """The readline module where there is one; on Windows the console edits and remembers lines."""
    try:
        return importlib.import_module("readline")
    except ImportError:
        return None


class Screen:
    """The only writer to the terminal. All text is escaped here, so no peer can drive it."""

    def __init__(self, *, json_lines: bool, colour: bool) -> None:
        self.json_lines = json_lines
        self.colour = colour
        self.typing = False
        # With --json, standard output belongs to the server's messages alone.
        self.talk: TextIO = sys.stderr if json_lines else sys.stdout

    def sent(self, text: str) -> None:
        """Show a message on its way to the server."""
        self._show("->", "action", text, {}, BLUE)

    def received(self, text: str, remark: str = "", elapsed_s: float | None = None) -> None:
        """Show a message from the server, with what there is to say about it."""
        if self.json_lines:
            print(escape_json(text), flush=True)
            if remark:
                self.notice(remark)
            return
        duration = [f"{elapsed_s * 1000:.1f} ms"] if elapsed_s is not None else []
        remark = ", ".join(duration + [remark] * bool(remark))
        self._show("<-", "type", text, TYPE_COLOURS, CYAN, remark)

    def notice(self, text: str, colour: int = YELLOW) -> None:
        """Say something about the connection or a typed line."""
        self._write(f"{self._clock()} {self._paint(f'-- {escape(text)}', colour)}")

    def step(self, name: str, elapsed_s: float, detail: str = "") -> None:
        """One line of --once that went well."""
        duration = f"{elapsed_s * 1000:7.1f} ms"
        verdict = self._paint("ok  ", GREEN)
        self._write(f"{verdict} {name:<12} {duration}  {escape(detail)}".rstrip())

    def failed_step(self, name: str, failure: FatalError) -> None:
        """The line of --once that did not."""
        advice = f" Next: {failure.advice}." if failure.advice else ""
        self._write(f"{self._paint('FAIL', RED)} {name:<12} {escape(f'{failure}.{advice}')}")

    def stop_typing(self) -> None:
        """Leave a line that is being typed to itself; what follows starts on the next."""
        if self.typing:
            self.typing = False
            print(file=self.talk)

    def help(self) -> None:
        """List the typed commands."""
        for line in HELP.splitlines():
            self._write(f"  {line}")

    def _show(
        self, arrow: str, title_field: str, text: str, colours: Mapping[str, int], colour: int,
        remark: str = "",
    ) -> None:  # fmt: skip
        """One line: time, direction, the kind of message, its other fields, a remark."""
        message = read_message(text) or {}
        title = word(message, title_field)
        if title:
            rest = {name: value for name, value in message.items() if name != title_field}
            # What was just within the depth that can be read may be just beyond it here.
            with contextlib.suppress(RecursionError):
                text = write_message(rest) if rest else ""
        shown = escape(text[:MAX_SHOWN_CHARACTERS])
        if len(text) > MAX_SHOWN_CHARACTERS:
            shown += f" ... ({len(text):,} characters, --json shows all)"
        heading = f"{arrow} {escape(title[:100])}".rstrip()
        heading = self._paint(heading, colours.get(title, colour))
        comment = self._paint(f" ({escape(remark)})", YELLOW) if remark else ""
        self._write(f"{self._clock()} {heading} {shown}{comment}".rstrip())

    def _clock(self) -> str:
        """Local time with milliseconds."""
        return datetime.now(UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]

    def _paint(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text

    def _write(self, line: str) -> None:
        """Print a line; where a person types, above the line being typed."""
        if self.typing:
            editor = line_editor()
            typed = editor.get_line_buffer() if editor else ""
            line, end = f"\r\x1b[K{line}", f"\n{PROMPT}{typed}"
        else:
            end = "\n"
        print(line, end=end, file=self.talk, flush=True)


# --- Commands ------------------------------------------------------------------------------------


def subscribe_text(rest: str) -> str:
    """From `PROJECT [since N [epoch E]]`."""
    match = re.fullmatch(r"(\S+)(?:\s+since\s+(\d{1,18})(?:\s+epoch\s+(\S+))?)?", rest)
    if match is None:
        raise CommandError("expected: subscribe PROJECT [since N [epoch E]]")
    project, since, epoch = match.groups()
    message: Message = {"action": "subscribe", "project_id": project}
    if since is not None:
        message["since"] = int(since)
    if epoch is not None:
        message["epoch"] = epoch
    return write_message(message)


def unsubscribe_text(rest: str) -> str:
    """From `PROJECT`."""
    if len(rest.split()) != 1:
        raise CommandError("expected: unsubscribe PROJECT")
    return write_message({"action": "unsubscribe", "project_id": rest})


def forward_text(rest: str, project: str) -> str:
    """From `AGENT [JSON] [PROJECT]`; the data goes out exactly as typed."""
    agent, _, tail = rest.partition(" ")
    tail = tail.strip()
    data = ""
    if tail.startswith(("{", "[", '"')):
        try:
            _, end = json.JSONDecoder().raw_decode(tail)
        except (ValueError, RecursionError) as error:
            raise CommandError(f"the data is not valid JSON: {error}") from None
        data, tail = tail[:end], tail[end:].strip()
    if not agent or len(tail.split()) > 1:
        raise CommandError('expected: forward AGENT [JSON] [PROJECT], as in forward dev {"a": 1}')
    message = {"action": "forward", "type": agent, "message_id": str(uuid.uuid4())}
    if tail or project:
        message["project_id"] = tail or project
    text = write_message(message)
    return f'{text[:-1]},"data":{data}}}' if data else text


def text_to_send(line: str, project: str) -> str:
    """The message a typed line stands for; `project` is where `forward` goes unless it says so.

    Raises CommandError when the line stands for none.
    """
    if line.startswith("{"):
        if read_message(line) is None:
            raise CommandError("not valid JSON; to send it all the same: raw TEXT")
        return line
    verb, _, rest = line.partition(" ")
    rest = rest.strip()
    match verb.lower():
        case "subscribe":
            return subscribe_text(rest)
        case "unsubscribe":
            return unsubscribe_text(rest)
        case "forward":
            return forward_text(rest, project)
        case "ping":
            return write_message({"action": "ping"})
        case "raw":
            return rest
    raise CommandError(f"unknown command {verb[:40]!r}; type help to see them all")


# --- Memory: what outlives a connection ----------------------------------------------------------


@dataclass
class Position:
    """How far one project's log was read; `seq` and `epoch` are None until the server tells."""

    seq: int | None = None
    epoch: str | None = None
    confirmed: bool = False


class Memory:
    """The subscribed projects and the position in each, learned from what passes by."""

    def __init__(self, projects: Iterable[str]) -> None:
        self.positions = {project: Position() for project in projects}

    def requests(self) -> list[Message]:
        """The messages that take a new connection to where the last one ended."""
        requests = []
        for project, position in self.positions.items():
            request: Message = {"action": "subscribe", "project_id": project}
            if position.seq is not None:
                request["since"] = position.seq
            if position.epoch is not None and position.seq is not None:
                request["epoch"] = position.epoch
            requests.append(request)
        return requests

    def sent(self, message: Message) -> None:
        """Note a subscription as it leaves, so that it is repeated if the connection breaks."""
        project = word(message, "project_id")
        if project and message.get("action") == "subscribe":
            position = self.positions.setdefault(project, Position())
            position.seq = number(message, "since") if "since" in message else position.seq
            position.epoch = word(message, "epoch") or position.epoch
        elif message.get("action") == "unsubscribe":
            self.positions.pop(project, None)

    def received(self, message: Message) -> str:
        """Note what the server says; return a remark for the person where there is one to make."""
        kind, project = word(message, "type"), word(message, "project_id")
        if kind == "subscription_confirmed" and project:
            return self._confirmed(self.positions.setdefault(project, Position()), message)
        position = self.positions.get(project)
        if position is None:
            return ""
        if kind == "error" and message.get("action") == "subscribe" and not position.confirmed:
            del self.positions[project]
        if kind in SERVER_TYPES:
            return ""
        return self._event(position, number(message, "seq"))

    def _confirmed(self, position: Position, message: Message) -> str:
        asked, head = position.seq, number(message, "seq")
        epoch = word(message, "epoch") or None
        replaced = position.epoch is not None and epoch != position.epoch
        position.confirmed, position.epoch = True, epoch
        if message.get("recovered") is True and asked is not None and head is not None:
            missed = max(0, head - asked)
            return f"resumed after {asked}, {missed} missed event{'s' * (missed != 1)} to come"
        position.seq = head
        if message.get("recovered") is False:
            if replaced or (asked is not None and head is not None and asked > head):
                return "the log was replaced by another one: fetch the project's state anew"
            return "the log does not reach back that far: fetch the project's state anew"
        return ""

    def _event(self, position: Position, seq: int | None) -> str:
        """An event without `seq` is ephemeral: it has no place in the log."""
        last = position.seq
        if seq is None:
            return ""
        if last is not None and seq <= last:
            return f"seen before, the last was {last}"
        position.seq = seq
        if last is not None and seq > last + 1:
            return f"gap: {last + 1} to {seq - 1} did not arrive"
        return ""


@dataclass(frozen=True)
class Request:
    """A message that waits for its answer."""

    action: str
    ident: str
    sent_at: float


def overtakes(later: Request, earlier: Request) -> bool:
    """Whether both are about the same subscription: only the later one counts."""
    subscribing = {"subscribe", "unsubscribe"}
    return {later.action, earlier.action} <= subscribing and later.ident == earlier.ident


class Unanswered:
    """The requests in flight.

    Each has one answer, but for those that a later one overtakes: of two about the subscription to
    the same project, sent before the server answered, the first may go unanswered.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.settled = asyncio.Event()
        self.settled.set()

    def sent(self, message: Message | None) -> None:
        """Expect an answer; to what is no object, too: that is an error."""
        action = word(message, "action") if message else ""
        field_name = "message_id" if action == "forward" else "project_id"
        ident = word(message, field_name) if message else ""
        self.requests.append(Request(action, ident, time.monotonic()))
        self.settled.clear()

    def received(self, message: Message) -> float | None:
        """The seconds since the request that `message` answers; None when it answers none."""
        kind = word(message, "type")
        if kind == "error":
            match = self._refused(message)
        elif kind in ANSWERS:
            action, field_name = ANSWERS[kind]
            match = self._find(action, word(message, field_name))
        else:
            match = None
        if match is None:
            return None
        sent = self.requests.index(match)
        self.requests = [
            request
            for place, request in enumerate(self.requests)
            if place > sent or (place < sent and not overtakes(match, request))
        ]
        if not self.requests:
            self.settled.set()
        return time.monotonic() - match.sent_at

    def abandon(self) -> list[str]:
        """Forget all of them with their connection; return the ids of unconfirmed forwards."""
        forwards = [r.ident for r in self.requests if r.action == "forward" and r.ident]
        self.requests.clear()
        self.settled.set()
        return forwards

    def _find(self, action: str, ident: str) -> Request | None:
        """The oldest such request; one sent without an id matches any, the server filled it in."""
        return next(
            (r for r in self.requests if r.action == action and r.ident in {ident, ""}), None
        )

    def _refused(self, error: Message) -> Request | None:
        """What an error answers: by its ids as far as it has them, else the oldest request."""
        idents = {word(error, "message_id"), word(error, "project_id")} - {""}
        action = word(error, "action")
        for request in self.requests:
            if request.ident in idents and action in {"", request.action}:
                return request
        for request in self.requests:
            if action and action == request.action:
                return request
        return self.requests[0] if self.requests else None


class Backoff:
    """Full jitter: a uniform delay under a doubling ceiling, so clients do not return in step."""

    def __init__(self) -> None:
        self.failures = 0

    def delay_s(self) -> float:
        """Seconds to wait before the next attempt."""
        ceiling = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(self.failures, 16))
        self.failures += 1
        return random.uniform(0, ceiling)

    def connection_ended(self, lasted_s: float) -> None:
        """Start over, but only after a connection that lasted: one cut at once is a failure too."""
        if lasted_s >= LASTING_CONNECTION_S:
            self.failures = 0


# --- Session -------------------------------------------------------------------------------------


def open_connection(options: Options) -> connect:
    """The connection about to be made, as an asynchronous context manager."""
    headers = {"Authorization": f"Bearer {options.token}"} if options.token else {}
    return connect(
        options.endpoint.url,
        additional_headers=headers,
        proxy=None if options.endpoint.loopback else True,
        open_timeout=options.timeout_s,
        close_timeout=CLOSE_TIMEOUT_S,
        max_size=MAX_MESSAGE_BYTES,
    )


def describe_close(closed: ConnectionClosed) -> tuple[int, str]:
    """The server's close code, and a sentence with its meaning and reason."""
    if closed.rcvd is None:
        code, reason = ABNORMAL_CLOSURE, closed.sent.reason if closed.sent else ""
    else:
        code, reason = closed.rcvd.code, closed.rcvd.reason
    meaning = CLOSE_MEANINGS.get(code, "a code of the server's own")
    return code, f"{code}, {meaning}" + (f": {reason}" if reason else "")


def refusal(code: int, sentence: str) -> FatalError | None:
    """Why coming back cannot help after this close code, or None when it can."""
    if code == UNAUTHENTICATED:
        return FatalError(f"connection closed ({sentence})", STATUS_ADVICE[401])
    if code == POLICY_VIOLATION or 4400 <= code < 4500:
        return FatalError(f"connection closed ({sentence})", "send less, or ask the operator why")
    return None


def retry_after_s(error: Exception) -> float:
    """The wait an HTTP refusal asks for with `Retry-After`, else 0."""
    value = ""
    if isinstance(error, InvalidStatus):
        value = error.response.headers.get("Retry-After", "")
    return min(float(value), LONGEST_PLANNED_DELAY_S) if re.fullmatch(r"\d{1,6}", value) else 0.0


@dataclass
class Session:
    """One person's conversation, over as many connections as it takes."""

    options: Options
    screen: Screen
    backoff: Backoff = field(default_factory=Backoff)
    unanswered: Unanswered = field(default_factory=Unanswered)
    online: asyncio.Event = field(default_factory=asyncio.Event)
    websocket: ClientConnection | None = None
    return_at: float = 0.0  # by time.monotonic(), as the server's `reconnect` asks

    def __post_init__(self) -> None:
        self.memory = Memory(self.options.projects)

    async def keep_connected(self) -> NoReturn:
        """Connect, and come back after every loss, until cancelled.

        Raises FatalError when the first attempt fails, which is for the person to solve, and
        whenever another attempt cannot help.
        """
        try:
            await self._converse()
        except CONNECT_ERRORS as error:
            raise explain(error, self.options.endpoint.url) from error
        asked_s = 0.0
        while True:
            planned_s = max(asked_s, self.return_at - time.monotonic())
            delay_s = planned_s if planned_s > 0 else self.backoff.delay_s()
            self.screen.notice(f"connecting again in {delay_s:.1f} s")
            await asyncio.sleep(delay_s)
            asked_s = self.return_at = 0.0
            try:
                await self._converse()
            except CONNECT_ERRORS as error:
                failure = explain(error, self.options.endpoint.url)
                if not is_passing(error):
                    raise failure from error
                self.screen.notice(str(failure))
                asked_s = retry_after_s(error)

    async def _converse(self) -> None:
        """Hold one connection from its handshake to its loss.

        Raises one of CONNECT_ERRORS when there is none, FatalError when the server refuses us.
        """
        async with open_connection(self.options) as websocket:
            self.websocket, opened_at = websocket, time.monotonic()
            try:
                for request in self.memory.requests():
                    await self._send(write_message(request))
                self.online.set()
                while True:
                    self._show(await websocket.recv())
            except ConnectionClosed as closed:
                self._lost(closed)
            finally:
                self.online.clear()
                self.backoff.connection_ended(time.monotonic() - opened_at)

    async def obey(self, line: str) -> bool:
        """Carry out one typed line; False when it asks to leave."""
        line = line.strip()
        if line.lower() in {"quit", "exit"}:
            return False
        if line.lower() in {"help", "?"}:
            self.screen.help()
        elif line:
            projects = list(self.memory.positions)
            try:
                text = text_to_send(line, projects[0] if len(projects) == 1 else "")
            except CommandError as error:
                self.screen.notice(str(error))
            else:
                await self._send_when_online(text)
        return True

    async def finish(self) -> None:
        """At the end of the input: wait for the answers to what it sent, within the time limit."""
        try:
            async with asyncio.timeout(self.options.timeout_s):
                await self.online.wait()
                await self.unanswered.settled.wait()
        except TimeoutError:
            count = len(self.unanswered.requests)
            sentence = f"not answered within {self.options.timeout_s:g} s: {count} of the messages"
            raise FatalError(sentence, "look at the server's log") from None

    async def _send_when_online(self, text: str) -> None:
        if self.websocket is not None and not self.online.is_set():
            self.screen.notice("not connected: this line waits for the connection; Ctrl-C leaves")
        await self.online.wait()
        try:
            await self._send(text)
        except ConnectionClosed:
            # Not repeated by itself: it may have been written before the connection broke.
            self._abandon()
            self.screen.notice("the connection broke while this was sent; it may not have arrived")

    async def _send(self, text: str) -> None:
        """Send a message, noted before it leaves: its answer may come while this still waits."""
        assert self.websocket is not None
        message = read_message(text)
        self.unanswered.sent(message)
        if message is not None:
            self.memory.sent(message)
        self.screen.sent(text)
        await self.websocket.send(text)

    def _show(self, data: str | bytes) -> None:
        """Take note of a message, then print it with its remarks."""
        if isinstance(data, bytes):
            self.screen.notice(f"a binary message of {len(data)} bytes: {data[:32].hex(' ')}")
            return
        message = read_message(data)
        remark, elapsed_s = "", None
        if message is not None:
            elapsed_s = self.unanswered.received(message)
            remark = self.memory.received(message)
            if message.get("type") == "reconnect":
                after_s = (number(message, "after_ms") or 0) / 1000
                self.return_at = time.monotonic() + min(after_s, LONGEST_PLANNED_DELAY_S)
        self.screen.received(data, remark, elapsed_s)

    def _lost(self, closed: ConnectionClosed) -> None:
        """Say what was lost with the connection. Raises FatalError when coming back is in vain."""
        code, sentence = describe_close(closed)
        self.screen.notice(f"connection lost: {sentence}")
        self._abandon()
        if failure := refusal(code, sentence):
            raise failure

    def _abandon(self) -> None:
        """Expect no more answers to what the lost connection carried."""
        for ident in self.unanswered.abandon():
            self.screen.notice(f"forward {ident} was not confirmed: it may not have arrived")


# --- Input ---------------------------------------------------------------------------------------


def typed_lines(screen: Screen) -> Iterator[str]:
    """The lines a person types, with editing and history, up to Ctrl-D (Windows: Ctrl-Z)."""
    if editor := line_editor():
        # Completion would offer file names here, and pasted JSON may hold tabs.
        editor.parse_and_bind("tab: self-insert")
    while True:
        screen.typing = True
        try:
            line = input(PROMPT)
        except EOFError:
            line = "quit"
        screen.typing = False
        yield line


def piped_lines(descriptor: int) -> Iterator[str]:
    """The lines of a pipe or file, each as soon as it is complete.

    Not through sys.stdin: a thread waiting in it holds its lock, and the interpreter cannot exit.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")  # PowerShell adds a BOM
    rest = ""
    while chunk := os.read(descriptor, 65536):
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from lines
    if rest:
        yield rest


@contextlib.contextmanager
def terminal_restored() -> Iterator[None]:
    """Leave the terminal as it was found: the thread waiting for a line cannot tidy up at exit."""
    if sys.platform == "win32" or sys.stdin is None or not sys.stdin.isatty():
        yield
    else:
        import termios

        attributes = termios.tcgetattr(sys.stdin)
        try:
            yield
        finally:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)


async def follow_input(session: Session, lines: Iterable[str]) -> None:
    """Carry out `lines`, each before the next is read, until one asks to leave or none is left.

    They are read in a thread, because no event loop can wait for a Windows console.

    Raises FatalError when the answers to the last of them do not come.
    """
    loop = asyncio.get_running_loop()
    exhausted: asyncio.Future[bool] = loop.create_future()

    def carry_out(line: str) -> bool:
        return asyncio.run_coroutine_threadsafe(session.obey(line), loop).result()

    def settle(result: bool) -> None:
        if not exhausted.done():
            exhausted.set_result(result)

    def read() -> None:
        # The errors of a loop that has ended meanwhile: nobody waits for this thread any more.
        with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):
            loop.call_soon_threadsafe(settle, all(map(carry_out, lines)))

    threading.Thread(target=read, name="input", daemon=True).start()
    if await exhausted:
        await session.finish()


def input_lines(screen: Screen) -> Iterator[str]:
    """Standard input: a terminal's with editing and history, anything else's as it comes."""
    if sys.stdin is None:
        return iter(())
    if not screen.json_lines and sys.stdin.isatty() and sys.stdout.isatty():
        return typed_lines(screen)
    return piped_lines(sys.stdin.fileno())


async def talk(options: Options, screen: Screen) -> None:
    """Hold the conversation until the input ends, or for ever with --listen.

    Raises FatalError when there is no connection and no point in another attempt.
    """
    session = Session(options, screen)
    tasks: list[asyncio.Task[None]] = [asyncio.create_task(session.keep_connected())]
    if not options.listen:
        tasks.append(asyncio.create_task(follow_input(session, input_lines(screen))))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        screen.stop_typing()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- Once: the scripted check --------------------------------------------------------------------


@dataclass
class RoundTrip:
    """One browser's part, step by step, with a line for each; FatalError at the first fault."""

    websocket: ClientConnection
    options: Options
    screen: Screen
    began_at: float  # by time.monotonic(): when the step now under way began
    step: str = "connected"
    unread: list[Message] = field(default_factory=list)  # an update may overtake a confirmation

    async def send(self, message: Message) -> None:
        """Send `message`; a lost connection shows in the step that waits for the answer."""
        with contextlib.suppress(ConnectionClosed):
            await self.websocket.send(write_message(message))

    async def expect(
        self, step: str, wanted: Callable[[Message], bool], shown: str, advice: str
    ) -> None:
        """Wait for the message that `wanted` accepts, and print the step with its field `shown`."""
        self.step = step
        try:
            async with asyncio.timeout(self.options.timeout_s):
                message = await self._find(wanted)
        except TimeoutError:
            raise FatalError(f"nothing within {self.options.timeout_s:g} s", advice) from None
        except ConnectionClosed as closed:
            raise FatalError(f"connection lost: {describe_close(closed)[1]}", advice) from None
        now = time.monotonic()
        self.screen.step(step, now - self.began_at, word(message, shown))
        self.began_at = now

    async def _find(self, wanted: Callable[[Message], bool]) -> Message:
        for message in self.unread:
            if wanted(message):
                self.unread.remove(message)
                return message
        while True:
            data = await self.websocket.recv()
            if isinstance(data, bytes):
                raise FatalError("the server sent a binary message", "is it the gateway?")
            if self.screen.json_lines:
                self.screen.received(data)
            message = read_message(data) or {}
            if wanted(message):
                return message
            if word(message, "type") == "error":
                code, sentence = word(message, "code"), word(message, "message")
                raise FatalError(f"the server answered {code or 'an error'}: {sentence}")
            self.unread.append(message)

    async def run(self) -> None:
        """Connect, subscribe, forward, and wait for what the agent has to say."""
        projects = self.options.projects or (f"check-{uuid.uuid4().hex[:8]}",)
        project, message_id = projects[0], str(uuid.uuid4())

        def is_answer(kind: str, name: str = "", ident: str = "") -> Callable[[Message], bool]:
            return lambda m: m.get("type") == kind and (not name or m.get(name) == ident)

        def is_update(message: Message) -> bool:
            kind = word(message, "type")
            return bool(kind) and kind not in SERVER_TYPES and message.get("project_id") == project

        connected = is_answer("connected")
        await self.expect("connected", connected, "connection_id", "is it the gateway?")
        for each in projects:
            await self.send({"action": "subscribe", "project_id": each})
            confirmed = is_answer("subscription_confirmed", "project_id", each)
            await self.expect("subscribed", confirmed, "project_id", "look at the server's log")
        await self.send({
            "action": "forward", "type": self.options.agent, "message_id": message_id,
            "project_id": project, "data": {"task": "connection check"},
        })  # fmt: skip
        confirmed = is_answer("forward_confirmed", "message_id", message_id)
        advice = "look at the server's log: does SQS take its messages?"
        await self.expect("forwarded", confirmed, "sqs_message_id", advice)
        if self.options.expect_updates:
            advice = (
                f"is a {self.options.agent} agent running, and does it answer through the updates "
                "queue? Without agents: --no-expect-updates"
            )
            await self.expect("updated", is_update, "type", advice)


async def check_once(options: Options, screen: Screen) -> bool:
    """The scripted check; whether all of its steps went well."""
    started_at = time.monotonic()
    step = "connected"
    try:
        async with open_connection(options) as websocket:
            trip = RoundTrip(websocket, options, screen, started_at)
            try:
                await trip.run()
            finally:
                step = trip.step
    except FatalError as failure:
        screen.failed_step(step, failure)
        return False
    except CONNECT_ERRORS as error:
        screen.failed_step(step, explain(error, options.endpoint.url))
        return False
    screen.step("all well", time.monotonic() - started_at)
    return True


# --- Publish: an agent's part ---------------------------------------------------------------------


def parse_publish(arguments: Sequence[str], environment: Mapping[str, str]) -> argparse.Namespace:
    """Read the command line after `publish`, or exit 2 and say what is wrong with it."""
    parser = argparse.ArgumentParser(
        prog="test-websocket.py publish",
        description="Put an update into the updates queue, as an agent does. Needs boto3.",
        epilog="AWS settings and credentials are taken from the environment, as by the AWS CLI.",
    )
    add = parser.add_argument
    add("project", metavar="PROJECT", help="the project whose subscribers get it; '*' for all")
    add("data", metavar="DATA", help='JSON; anything else becomes {"message": DATA}')
    add("--type", default="project_updated", help="the event's type (default: project_updated)")
    add("--ephemeral", action="store_true", help="deliver it, and do not keep it in the log")
    queue = environment.get(QUEUE_VARIABLE)
    add("--queue", default=queue, required=not queue, metavar="URL",
        help=f"the updates queue (default: ${QUEUE_VARIABLE})")  # fmt: skip
    return parser.parse_args(arguments)


def update_of(given: argparse.Namespace) -> Message:
    """The update that a command line describes."""
    try:
        data = json.loads(given.data)
    except (ValueError, RecursionError):
        data = {"message": given.data}
    update = {"project_id": given.project, "type": given.type, "data": data}
    return {**update, "ephemeral": True} if given.ephemeral else update


def publish(given: argparse.Namespace) -> str:
    """Send the update; the id that SQS gave it. Raises FatalError."""
    try:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError
    except ModuleNotFoundError:
        raise FatalError("publish needs boto3", "python -m pip install boto3") from None
    parts = urlsplit(given.queue)
    own: dict[str, Any] = {}
    if not (parts.hostname or "").endswith(("amazonaws.com", "amazonaws.com.cn")):
        # A stand-in for AWS, as `make run` brings along: it is where its queues are, and a
        # person's own AWS profile and proxy are not for it.
        for name in [name for name in os.environ if name.upper().startswith("AWS_")]:
            del os.environ[name]
        os.environ["no_proxy"] = parts.hostname or ""
        own = {"endpoint_url": f"{parts.scheme}://{parts.netloc}", "region_name": "us-east-1"}
        own |= {"aws_access_key_id": "local", "aws_secret_access_key": "local"}
    elif match := re.match(r"sqs\.([a-z0-9-]+)\.", parts.hostname or ""):
        own = {"region_name": match[1]}
    fields: dict[str, str] = {}
    if given.queue.endswith(".fifo"):
        group = hashlib.sha256(given.project.encode()).hexdigest()
        fields = {"MessageGroupId": group, "MessageDeduplicationId": uuid.uuid4().hex}
    try:
        answer = boto3.client("sqs", **own).send_message(
            QueueUrl=given.queue, MessageBody=write_message(update_of(given)), **fields
        )
    except (BotoCoreError, ClientError, ValueError) as error:
        raise FatalError(f"SQS did not take the update: {error}", "check --queue") from None
    return str(answer["MessageId"])


# --- Main ----------------------------------------------------------------------------------------


def prepare_output(json_lines: bool) -> None:
    """Make printing safe on any console: what its encoding lacks is printed as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if json_lines and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # JSON is UTF-8, whatever the console thinks


def wants_colour(stream: TextIO, environment: Mapping[str, str]) -> bool:
    """Whether `stream` is a terminal that shows colours, and nobody objects (no-color.org)."""
    if not stream.isatty() or environment.get("NO_COLOR") or environment.get("TERM") == "dumb":
        return False
    if sys.platform == "win32":
        os.system("")  # switches the console's escape sequences on
    return True


def main() -> int:
    """Run the program; the exit code."""
    if sys.argv[1:2] == ["publish"]:
        given = parse_publish(sys.argv[2:], os.environ)
        try:
            print(f"sent: {publish(given)}")
        except FatalError as failure:
            print(f"error: {escape(str(failure))}\nnext:  {failure.advice}", file=sys.stderr)
            return 1
        return 0
    options = parse_options(sys.argv[1:], os.environ)
    prepare_output(options.json_lines)
    colour = wants_colour(sys.stderr if options.json_lines else sys.stdout, os.environ)
    screen = Screen(json_lines=options.json_lines, colour=colour)
    try:
        if options.once:
            return 0 if asyncio.run(check_once(options, screen)) else 1
        with terminal_restored():
            asyncio.run(talk(options, screen))
    except FatalError as failure:
        print(f"error: {escape(str(failure))}", file=sys.stderr)
        if failure.advice:
            print(f"next:  {failure.advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
