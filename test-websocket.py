#!/usr/bin/env python3
"""Talk to the gateway from a terminal: watch both directions, type messages, survive restarts.

A lost connection is resumed by itself: the last `seq` and `epoch` of every project are remembered
and sent along, so that nothing is missed and nothing comes twice. `--once` is for scripts: it makes
one round trip, prints a line a step and exits 0 or 1. `publish` does what an agent does.

Needs Python 3.11 and the `websockets` package; runs on Linux, macOS and Windows. Where
`prompt_toolkit` is installed, a typed line can be edited while messages arrive, and has a history.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import importlib
import json
import os
import random
import re
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import RawIOBase
from typing import Any, Final, NoReturn, TextIO

from local import lacking

try:
    from websockets.asyncio.client import ClientConnection, connect
    from websockets.exceptions import ConnectionClosed

    from local.publish import publish
    from local.terminal import (
        CONNECT_ERRORS,
        STATUS_ADVICE,
        TOKEN_VARIABLE,
        FatalError,
        escape,
        explain,
        is_loopback,
        parse_endpoint,
        parse_positive,
        parse_token,
        retry_after_s,
    )
except ModuleNotFoundError as missing:
    sys.exit(lacking(missing))

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
  python test-websocket.py publish proj_123 "hello, browser" --queue URL

A project that was named is the one `forward` uses unless told otherwise. JSON may go on over
several lines. At the end of piped input the answers are awaited, then the client leaves."""


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

# Each answer, with the request it belongs to and the field that both share.
ANSWERS: Final[Mapping[str, tuple[str, str]]] = {
    "subscription_confirmed": ("subscribe", "project_id"),
    "unsubscription_confirmed": ("unsubscribe", "project_id"),
    "forward_confirmed": ("forward", "message_id"),
    "stop_confirmed": ("stop", "message_id"),
    "pong": ("ping", ""),
}
# What only the server says; any other type is an agent's event.
SERVER_TYPES: Final = frozenset({
    "authenticated", "connected", "error", "forward_confirmed", "pong", "project_snapshot",
    "reconnect", "stop_confirmed", "subscription_confirmed", "token_expiring",
    "unsubscription_confirmed",
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


# --- Options -------------------------------------------------------------------------------------


class Options(argparse.Namespace):
    """The command line, checked; `endpoint` is a URL and the projects that its query names."""

    endpoint: tuple[str, list[str]]
    project: list[str]
    once: bool
    agent: str
    expect_updates: bool
    timeout: float
    json: bool
    listen: bool
    token: str

    @property
    def projects(self) -> list[str]:
        """All that were named, once each."""
        return list(dict.fromkeys([*self.endpoint[1], *self.project]))


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
        help="the agent that --once forwards to (default: dev)")  # fmt: skip
    add("--no-expect-updates", action="store_false", dest="expect_updates",
        help="let --once wait for no update from the agent")  # fmt: skip
    add("--timeout", type=parse_positive, default=15.0, metavar="SECONDS",
        help="the longest that one step may take (default: 15)")  # fmt: skip
    add("--listen", action="store_true", help="read no input; show what arrives until Ctrl-C")
    add("--json", action="store_true",
        help="only what the server sends, one raw line a message; the rest to stderr")  # fmt: skip
    add("--token", type=parse_token, default=environment.get(TOKEN_VARIABLE, ""),
        help=f"send 'Authorization: Bearer TOKEN' (default: ${TOKEN_VARIABLE}, "
        "which keeps it out of the process list)")  # fmt: skip
    return parser.parse_args(arguments, Options())


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


class Screen:
    """The only writer to the terminal. All text is escaped here, so no peer can drive it."""

    def __init__(self, *, json_lines: bool, environment: Mapping[str, str]) -> None:
        self.json_lines = json_lines
        # What a console's encoding lacks is printed as an escape.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        if json_lines and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")  # JSON is, whatever the console thinks
        plain = environment.get("NO_COLOR") or environment.get("TERM") == "dumb"  # no-color.org
        self.colour = self.talk.isatty() and not plain
        if self.colour and sys.platform == "win32":
            os.system("")  # switches the console's escape sequences on

    @property
    def talk(self) -> TextIO:
        """With --json, standard output belongs to the server's messages alone."""
        return sys.stderr if self.json_lines else sys.stdout

    def sent(self, text: str) -> None:
        """Show a message on its way to the server."""
        self._show("->", "action", text, {}, BLUE)

    def received(self, text: str, remark: str = "", elapsed_s: float | None = None) -> None:
        """Show a message from the server, with what there is to say about it."""
        if self.json_lines:
            # JSON stays the same JSON: a line break can only be space between tokens.
            print(escape(re.sub(r"[\t\r\n]", " ", text)), flush=True)
            if remark:
                self.notice(remark)
            return
        duration = [f"{elapsed_s * 1000:.1f} ms"] if elapsed_s is not None else []
        remark = ", ".join(duration + [remark] * bool(remark))
        self._show("<-", "type", text, TYPE_COLOURS, CYAN, remark)

    def notice(self, text: str) -> None:
        """Say something about the connection or a typed line."""
        self.write(f"{self._clock()} {self._paint(f'-- {escape(text)}', YELLOW)}")

    def step(self, name: str, elapsed_s: float, detail: str = "") -> None:
        """One line of --once that went well."""
        duration = f"{elapsed_s * 1000:7.1f} ms"
        verdict = self._paint("ok  ", GREEN)
        self.write(f"{verdict} {name:<12} {duration}  {escape(detail)}".rstrip())

    def failed_step(self, name: str, failure: FatalError) -> None:
        """The line of --once that did not."""
        advice = f" Next: {failure.advice}." if failure.advice else ""
        self.write(f"{self._paint('FAIL', RED)} {name:<12} {escape(f'{failure}.{advice}')}")

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
        self.write(f"{self._clock()} {heading} {shown}{comment}".rstrip())

    def _clock(self) -> str:
        """Local time with milliseconds."""
        return datetime.now(UTC).astimezone().strftime("%H:%M:%S.%f")[:-3]

    def _paint(self, text: str, colour: int) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour else text

    def write(self, text: str) -> None:
        print(text, file=self.talk, flush=True)


# --- Commands ------------------------------------------------------------------------------------


def is_unfinished(line: str) -> bool:
    """Whether JSON has begun in a typed line and may go on in the next one."""
    text = re.sub(r"^forward\s+\S+\s+(?=[\[{])", "", line, flags=re.IGNORECASE)
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return text[:1] in ("{", "[") and error.pos >= len(text.rstrip())
    except RecursionError:
        pass
    return False


async def whole_commands(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    """The typed lines, those together that one JSON value goes over."""
    begun = ""
    async for line in lines:
        begun = f"{begun}\n{line}".strip()
        if not is_unfinished(begun):
            yield begun
            begun = ""
    if begun:
        yield begun


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


def forward_text(rest: str, project: str) -> str:
    """From `AGENT [JSON] [PROJECT]`; the data goes out exactly as typed."""
    agent, _, tail = rest.partition(" ")
    tail, data = tail.strip(), ""
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
            if len(rest.split()) != 1:
                raise CommandError("expected: unsubscribe PROJECT")
            return write_message({"action": "unsubscribe", "project_id": rest})
        case "forward":
            return forward_text(rest, project)
        case "ping":
            return write_message({"action": "ping"})
        case "raw":
            return rest
    raise CommandError(f"unknown command {verb[:40]!r}; type help to see them all")


# --- Memory: what outlives a connection ----------------------------------------------------------


class Memory:
    """The subscribed projects, each with the fields that ask for what follows its last event."""

    def __init__(self, projects: Iterable[str]) -> None:
        self.positions: dict[str, Message] = {project: {} for project in projects}

    def requests(self) -> list[Message]:
        """The messages that take a new connection to where the last one ended."""
        return [
            {"action": "subscribe", "project_id": project, **position}
            for project, position in self.positions.items()
        ]

    def sent(self, message: Message) -> None:
        """Note a subscription as it leaves, so that it is repeated if the connection breaks."""
        project = word(message, "project_id")
        if project and message.get("action") == "subscribe":
            asked = {k: v for k, v in message.items() if k in {"since", "epoch"}}
            self.positions.setdefault(project, {}).update(asked)
        elif message.get("action") == "unsubscribe":
            self.positions.pop(project, None)

    def received(self, message: Message) -> str:
        """Note what the server says; return a remark for the person where there is one to make."""
        kind, project = word(message, "type"), word(message, "project_id")
        if kind == "subscription_confirmed" and project:
            return self._confirmed(project, message)
        position = self.positions.get(project)
        if position is None:
            return ""
        if kind == "error" and message.get("action") == "subscribe" and not position:
            del self.positions[project]  # it was never confirmed
        last, seq = number(position, "since"), number(message, "seq")
        if kind in SERVER_TYPES or seq is None:  # without `seq`, it has no place in the log
            return ""
        if last is not None and seq <= last:
            return f"seen before, the last was {last}"
        position["since"] = seq
        gap = last is not None and seq > last + 1
        return f"gap: {(last or 0) + 1} to {seq - 1} did not arrive" if gap else ""

    def _confirmed(self, project: str, message: Message) -> str:
        before, recovered = self.positions.get(project, {}), message.get("recovered")
        asked, head = number(before, "since"), number(message, "seq")
        epoch = word(message, "epoch") or None
        resumed = recovered is True and asked is not None and head is not None
        position = {"since": asked if resumed else head, "epoch": epoch}
        self.positions[project] = {k: v for k, v in position.items() if v is not None}
        ahead = (asked or 0) - (head or 0)
        if resumed:
            missed = max(0, -ahead)
            return f"resumed after {asked}, {missed} missed event{'s' * (missed != 1)} to come"
        if recovered is not False:
            return ""
        replaced = before.get("epoch", epoch) != epoch or ahead > 0
        why = "was replaced by another one" if replaced else "does not reach back that far"
        return f"the log {why}: fetch the project's state anew"


@dataclass(frozen=True)
class Request:
    """A message that waits for its answer."""

    action: str
    ident: str
    sent_at: float


class Unanswered:
    """The requests in flight; `settled` is set while there are none."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.settled = asyncio.Event()
        self.settled.set()

    def sent(self, message: Message) -> None:
        """Expect an answer; to what is no message, too: that is an error."""
        action = word(message, "action")
        ident = word(message, "message_id" if action == "forward" else "project_id")
        subscribing = {"subscribe", "unsubscribe"}
        if action in subscribing:  # it overtakes earlier ones of the same project
            self.requests = [
                r for r in self.requests if r.action not in subscribing or r.ident != ident
            ]
        self.requests.append(Request(action, ident, time.monotonic()))
        self.settled.clear()

    def received(self, message: Message) -> float | None:
        """The seconds since the request that `message` answers; None when it answers none."""
        kind = word(message, "type")
        action, field_name = ANSWERS.get(kind, ("", ""))
        # One that was sent without an id matches any: the server filled it in.
        idents = {word(message, field_name), ""}
        matching = [r for r in self.requests if r.action == action and r.ident in idents]
        if kind == "error":
            matching = self._refused(message)
        if not matching:
            return None
        self.requests.remove(matching[0])
        if not self.requests:
            self.settled.set()
        return time.monotonic() - matching[0].sent_at

    def _refused(self, error: Message) -> list[Request]:
        """What an error may answer, likeliest first, by the ids and the action that it has."""
        idents = {word(error, "message_id"), word(error, "project_id")} - {""}
        action = word(error, "action")
        named = [r for r in self.requests if r.ident in idents and action in {"", r.action}]
        return named + [r for r in self.requests if r.action == action] + self.requests

    def abandon(self) -> list[str]:
        """Forget all of them with their connection; return the ids of unconfirmed forwards."""
        forwards = [r.ident for r in self.requests if r.action == "forward" and r.ident]
        self.requests.clear()
        self.settled.set()
        return forwards


# --- Session -------------------------------------------------------------------------------------


def open_connection(options: Options) -> connect:
    """The connection about to be made, as an asynchronous context manager."""
    url = options.endpoint[0]
    return connect(
        url,
        additional_headers={"Authorization": f"Bearer {options.token}"} if options.token else {},
        proxy=None if is_loopback(url) else True,
        open_timeout=options.timeout,
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


@dataclass
class Session:
    """One person's conversation, over as many connections as it takes."""

    options: Options
    screen: Screen
    memory: Memory
    unanswered: Unanswered = field(default_factory=Unanswered)
    online: asyncio.Event = field(default_factory=asyncio.Event)
    websocket: ClientConnection | None = None
    return_at: float = 0.0  # by time.monotonic(), as the server asks
    failures: int = 0  # in a row, of connections that did not come about or did not last

    async def keep_connected(self) -> NoReturn:
        """Connect, and come back after every loss, until cancelled.

        Raises FatalError when the first attempt fails, which is for the person to solve, and
        whenever another attempt cannot help.
        """
        first = True
        while True:
            try:
                await self._converse()
            except CONNECT_ERRORS as error:
                failure = explain(error, self.options.endpoint[0])
                if first or not failure.passing:
                    raise failure from error
                self.screen.notice(str(failure))
                self.return_at = time.monotonic() + retry_after_s(error)
            first = False
            delay_s = self.return_at - time.monotonic()
            if delay_s <= 0:  # full jitter: clients that lost the same server return one by one
                ceiling_s = min(LONGEST_DELAY_S, FIRST_DELAY_S * 2 ** min(self.failures, 16))
                delay_s = random.uniform(0, ceiling_s)
            self.failures += 1
            self.screen.notice(f"connecting again in {delay_s:.1f} s")
            await asyncio.sleep(delay_s)

    async def _converse(self) -> None:
        """Hold one connection from its handshake to its loss.

        Raises one of CONNECT_ERRORS when there is none, FatalError when the server refuses us.
        """
        async with open_connection(self.options) as websocket:
            self.websocket, opened_at = websocket, time.monotonic()
            try:
                self._show(await websocket.recv())  # `connected` comes first, whatever we want
                for request in self.memory.requests():
                    await self._send(write_message(request))
                self.online.set()
                while True:
                    self._show(await websocket.recv())
            except ConnectionClosed as closed:
                self._lost(closed)
            except asyncio.CancelledError:
                await websocket.close()  # in order; what leaves this block in between says 1011
                raise
            finally:
                self.online.clear()
                if time.monotonic() - opened_at >= LASTING_CONNECTION_S:
                    self.failures = 0

    async def obey(self, commands: AsyncIterator[str]) -> None:
        """Carry out commands, each before the next is read, until one asks to leave.

        Raises FatalError when the answers to the last of them do not come within the time limit.
        """
        async for line in commands:
            if line.lower() in {"quit", "exit"}:
                return
            if line.lower() in {"help", "?"}:
                self.screen.write(re.sub("^", "  ", HELP, flags=re.MULTILINE))
            elif line:
                projects = list(self.memory.positions)
                try:
                    text = text_to_send(line, projects[0] if len(projects) == 1 else "")
                    await self._send_when_online(text)
                except CommandError as error:
                    self.screen.notice(str(error))
        limit_s = self.options.timeout
        try:
            async with asyncio.timeout(limit_s):
                await self.online.wait()
                await self.unanswered.settled.wait()
        except TimeoutError:
            sentence = f"not answered within {limit_s:g} s: {len(self.unanswered.requests)}"
            raise FatalError(f"{sentence} of the messages", "look at the server's log") from None

    async def _send_when_online(self, text: str) -> None:
        if self.failures and not self.online.is_set():
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
        message = read_message(text) or {}
        self.unanswered.sent(message)
        self.memory.sent(message)
        self.screen.sent(text)
        await self.websocket.send(text)

    def _show(self, data: str | bytes) -> None:
        """Take note of a message, then print it with its remarks."""
        if isinstance(data, bytes):
            self.screen.notice(f"a binary message of {len(data)} bytes: {data[:32].hex(' ')}")
            return
        message = read_message(data) or {}
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
        if code == UNAUTHENTICATED:
            raise FatalError(f"connection closed ({sentence})", STATUS_ADVICE[401])
        if code == POLICY_VIOLATION or 4400 <= code < 4500:
            advice = "send less, or ask the operator why"
            raise FatalError(f"connection closed ({sentence})", advice)

    def _abandon(self) -> None:
        """Expect no more answers to what the lost connection carried."""
        for ident in self.unanswered.abandon():
            self.screen.notice(f"forward {ident} was not confirmed: it may not have arrived")


# --- Input ---------------------------------------------------------------------------------------


async def typed_lines(editor: Any) -> AsyncIterator[str]:
    """The lines a person types, up to Ctrl-D, while what is printed appears above them.

    Args:
        editor: the module `prompt_toolkit`.
    """
    from prompt_toolkit.patch_stdout import patch_stdout

    prompt = editor.PromptSession()
    with patch_stdout(raw=True):
        while True:
            try:
                pasted = await prompt.prompt_async("> ")
            except EOFError:
                pasted = "quit"
            for line in pasted.split("\n"):
                yield line


async def plain_lines(stream: RawIOBase) -> AsyncIterator[str]:
    """The lines of a pipe, a file or a terminal, each as soon as it is complete.

    They are read in threads, because no event loop can wait for all of these everywhere, and not
    through sys.stdin, whose lock would keep the interpreter from ending.
    """
    loop = asyncio.get_running_loop()

    def read(chunk: asyncio.Future[bytes]) -> None:
        data = stream.read(65536) or b""
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(settle, chunk, data)

    def settle(chunk: asyncio.Future[bytes], data: bytes) -> None:
        if not chunk.done():
            chunk.set_result(data)

    decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")  # PowerShell adds a BOM
    rest = ""
    while True:
        chunk: asyncio.Future[bytes] = loop.create_future()
        threading.Thread(target=read, args=(chunk,), name="input", daemon=True).start()
        if not (data := await chunk):
            break
        *complete, rest = (rest + decoder.decode(data)).split("\n")
        for line in complete:
            yield line
    if rest:
        yield rest


def input_lines(screen: Screen) -> AsyncIterator[str]:
    """Standard input: a terminal's with editing and history where that is installed."""
    if not screen.json_lines and sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            return typed_lines(importlib.import_module("prompt_toolkit"))
    return plain_lines(open(0, "rb", buffering=0, closefd=False))


async def talk(options: Options, screen: Screen) -> None:
    """Hold the conversation until the input ends, or for ever with --listen.

    Raises FatalError when there is no connection and no point in another attempt.
    """
    session = Session(options, screen, Memory(options.projects))
    tasks: list[asyncio.Task[None]] = [asyncio.create_task(session.keep_connected())]
    if not options.listen and sys.stdin is not None:
        commands = whole_commands(input_lines(screen))
        tasks.append(asyncio.create_task(session.obey(commands)))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --- Once: the scripted check --------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One step of the check: what is sent, which answer is wanted, which field of it is shown."""

    name: str
    message: Message | None
    wanted: Message
    shown: str
    advice: str = "look at the server's log"

    def is_answer(self, message: Message) -> bool:
        """Without a type, any event is wanted that the other fields fit."""
        is_event = word(message, "type") not in {*SERVER_TYPES, ""}
        return ("type" in self.wanted or is_event) and self.wanted.items() <= message.items()


def steps_of(options: Options) -> list[Step]:
    """One browser's part, from the first word of the server to the last one of the agent."""
    projects = options.projects or [f"check-{uuid.uuid4().hex[:8]}"]
    ids = {"message_id": str(uuid.uuid4())}
    order = {"action": "forward", "type": options.agent, **ids, "project_id": projects[0],
             "data": {"task": "connection check"}}  # fmt: skip
    steps = [Step("connected", None, {"type": "connected"}, "connection_id", "is it the gateway?")]
    for project in projects:
        named = {"project_id": project}
        answer = {"type": "subscription_confirmed", **named}
        steps.append(Step("subscribed", {"action": "subscribe", **named}, answer, "project_id"))
    answer = {"type": "forward_confirmed", **ids}
    advice = "look at the server's log: does SQS take its messages?"
    steps.append(Step("forwarded", order, answer, "sqs_message_id", advice))
    advice = (
        f"is a {options.agent} agent running, and does it answer through the updates queue? "
        "Without agents: --no-expect-updates"
    )
    updated = Step("updated", None, {"project_id": projects[0]}, "type", advice)
    return [*steps, updated] if options.expect_updates else steps


async def answer_to(
    step: Step, websocket: ClientConnection, unread: list[Message], options: Options, screen: Screen
) -> Message:
    """Take a step; what else arrives is left in `unread`: an update may overtake an answer.

    Raises FatalError when the answer does not come, or is an error.
    """
    try:
        async with asyncio.timeout(options.timeout):
            if step.message:
                await websocket.send(write_message(step.message))
            for message in filter(step.is_answer, unread):
                return message
            while True:
                data = await websocket.recv(decode=True)
                if screen.json_lines:
                    screen.received(data)
                message = read_message(data) or {}
                if step.is_answer(message):
                    return message
                if word(message, "type") == "error":
                    code, sentence = word(message, "code"), word(message, "message")
                    raise FatalError(f"the server answered {code or 'an error'}: {sentence}")
                unread.append(message)
    except TimeoutError:
        raise FatalError(f"nothing within {options.timeout:g} s", step.advice) from None
    except ConnectionClosed as closed:
        raise FatalError(f"connection lost: {describe_close(closed)[1]}", step.advice) from None


async def check_once(options: Options, screen: Screen) -> bool:
    """The scripted check, a line a step; whether all of them went well."""
    steps, unread = steps_of(options), list[Message]()
    step, began_at = steps[0], time.monotonic()
    started_at = began_at
    try:
        async with open_connection(options) as websocket:
            for step in steps:
                answer = await answer_to(step, websocket, unread, options, screen)
                elapsed_s, began_at = time.monotonic() - began_at, time.monotonic()
                screen.step(step.name, elapsed_s, word(answer, step.shown))
    except CONNECT_ERRORS as error:
        screen.failed_step(step.name, explain(error, options.endpoint[0]))
    except FatalError as failure:
        screen.failed_step(step.name, failure)
    else:
        screen.step("all well", time.monotonic() - started_at)
        return True
    return False


# --- Main ----------------------------------------------------------------------------------------


def run() -> int:
    """Do what the command line says; the exit code. Raises FatalError."""
    if sys.argv[1:2] == ["publish"]:
        print(f"sent: {publish(sys.argv[2:], os.environ)}")
        return 0
    options = parse_options(sys.argv[1:], os.environ)
    screen = Screen(json_lines=options.json, environment=os.environ)
    if options.once:
        return 0 if asyncio.run(check_once(options, screen)) else 1
    asyncio.run(talk(options, screen))
    return 0


def main() -> int:
    """Run the program; the exit code."""
    try:
        return run()
    except FatalError as failure:
        print(f"error: {escape(str(failure))}", file=sys.stderr)
        if failure.advice:
            print(f"next:  {failure.advice}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `| head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    sys.exit(main())
