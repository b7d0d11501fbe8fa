"""The contract with clients and agents, as data; and the documents that are written from it.

Here is what the code cannot say of itself: what each field is for, an example of every message,
what a client should do about an error, which test shows which promise. The rest comes from the
message types of ``server.py``. ``python -m tests.contract`` writes ``docs/asyncapi.yaml`` and the
marked parts of ``docs/PROTOCOL.md``; ``tests/test_contract.py`` fails when one of them is stale,
and sends or receives every example for real.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import msgspec
import yaml
from msgspec import NODEFAULT, Raw, Struct

import server
from server import ErrorCode
from tests import inputs

Json = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
ASYNCAPI = ROOT / "docs" / "asyncapi.yaml"
PROTOCOL = ROOT / "docs" / "PROTOCOL.md"

NOW = "2025-11-24T12:00:00.000Z"
EPOCH = "0b0c7e3f4d1f4a0e9a4a6f0f3a5f1c11"
CONNECTION = "496d1037-b792-4b81-b0b2-0f42ebf668a5"
MESSAGE = "5a83bd37-232f-4bd5-8ca7-e9c2baffffc9"
SQS_MESSAGE = "d2d17f14-2b3d-4a1c-9d8b-1f7f0a6f3c55"
TOKEN = "eyJhbGciOiJSUzI1NiIsImtpZCI6ImtleS0xIn0.eyJzdWIiOiJhbGljZSJ9.c2lnbmF0dXJl"

VARYING = {
    "timestamp", "connection_id", "epoch", "sqs_message_id", "token", "user",
    "client_id", "expires_in_seconds", "in_seconds", "after_ms",
}  # fmt: skip
"""Fields whose values in the examples stand for others of their kind."""


# --- Messages -------------------------------------------------------------------------------


class StopRequested(Struct, tag="stop_requested"):
    """The event that tells of a stop, which the server makes like an agent's."""

    project_id: str
    data: None
    seq: int
    timestamp: str
    in_reply_to: str


@dataclasses.dataclass(frozen=True)
class Message:
    """One kind of message.

    Attributes:
        name: what the documents call it; its ``action`` or ``type`` where it has one of its own.
        fields: what each field of ``struct`` is for.
        examples: title to message.
        answers: for a client's message, the names of what may answer it, beside ``error``.
    """

    name: str
    struct: type[Struct]
    summary: str
    fields: Mapping[str, str]
    examples: Mapping[str, Json]
    answers: tuple[str, ...] = ()


ASKING = {
    "ref": f"text of at most {server.REF_MAX_CHARS} characters, by which you know the answers to "
    "this message: each carries the same. Write it first: of a message that is refused only the "
    f"first {server.EXPLAINED_BYTES:,} bytes are looked at. Anything else is ignored"
}
ANSWER = {"ref": "the `ref` of the message it answers, if that had one"}

CLIENT_MESSAGES = (
    Message(
        "subscribe",
        server.Subscribe,
        "Asks for a project's events; with `since`, first for those missed after it.",
        {
            "project_id": "the project; `*` for the events that go to everyone",
            "since": "`seq` of the last event you have of this project",
            "epoch": "the `epoch` that came with it, so that a log made anew is not taken for "
            "the old one",
            "snapshot": "whether to send the platform's own record of the project first",
            **ASKING,
        },
        {
            "subscribe": {"action": "subscribe", "project_id": "proj_123"},
            "resume": {"action": "subscribe", "project_id": "proj_123", "since": 1, "epoch": EPOCH},
            "subscribe with snapshot": {
                "action": "subscribe",
                "project_id": "proj_123",
                "snapshot": True,
            },
        },
        ("subscription_confirmed", "project_snapshot"),
    ),
    Message(
        "unsubscribe",
        server.Unsubscribe,
        "Ends a subscription. To end one that is not there is no error.",
        {"project_id": "the project", **ASKING},
        {"unsubscribe": {"action": "unsubscribe", "project_id": "proj_123"}},
        ("unsubscription_confirmed",),
    ),
    Message(
        "forward",
        server.Forward,
        "Passes `data` to the agent that `type` names, through its queue.",
        {
            "type": "which agent, in any case: "
            + "; ".join(
                f"{', '.join(f'`{t}`' for t, to in server.QUEUE_OF_TYPE.items() if to == agent)}"
                for agent in dict.fromkeys(server.QUEUE_OF_TYPE.values())
            ),
            "message_id": "your id for it, returned in the answer; a UUID is made where it is "
            "missing. Send the same one when you send the message again",
            "project_id": "the project it is about; `*` takes a token for all projects",
            "data": "what the agent gets, byte for byte",
            "client_id": "your own id, made at random once and kept over reconnects, so that a "
            "FIFO queue knows your repetition from another client's message of the same "
            "`message_id`. Without it, the connection's id stands for it",
            "traceparent": "W3C Trace Context; the agent gets it with the order",
            **ASKING,
        },
        {
            "forward": {
                "action": "forward",
                "type": "dev",
                "message_id": MESSAGE,
                "project_id": "proj_123",
                "data": {"task": "A login page"},
            }
        },
        ("forward_confirmed",),
    ),
    Message(
        "stop",
        server.Stop,
        "Asks the agents to end their work on a forward, begun or not. It takes the right that the "
        "forward took; a forward without a project is stopped by its own user only. It is for "
        "whatever the gateway has taken under this id before it: the same id may be used again. "
        "With a project, all its subscribers get an event of the type `stop_requested`, whose "
        "`in_reply_to` is the `message_id`; a repetition within five seconds adds none.",
        {
            "message_id": "that of the forward; it may not have arrived yet",
            "project_id": "the forward's project, if it has one",
            **ASKING,
        },
        {"stop": {"action": "stop", "message_id": MESSAGE, "project_id": "proj_123"}},
        ("stop_confirmed",),
    ),
    Message(
        "ping",
        server.Ping,
        "Asks whether anybody is there, for programs that cannot send ping frames.",
        ASKING,
        {"ping": {"action": "ping"}, "ping with ref": {"ref": "7", "action": "ping"}},
        ("pong",),
    ),
    Message(
        "authenticate",
        server.Authenticate,
        "Brings a token: the first where the handshake had none, or a fresh one of the same "
        "subject before the last one expires.",
        {"token": "a JSON Web Token", **ASKING},
        {"authenticate": {"action": "authenticate", "token": TOKEN}},
        ("authenticated", "unsubscription_confirmed"),
    ),
)

SERVER_MESSAGES = (
    Message(
        "connected",
        server.Connected,
        "Always the first.",
        {
            "message": "a greeting",
            "timestamp": "the server's time",
            "connection_id": "this connection, by which an agent can answer it alone",
            "ref": "`true`: answers carry the `ref` of the message they answer",
            "max_message_bytes": "the largest message that you may send",
        },
        {
            "connected": {
                "type": "connected",
                "message": "WebSocket connection established",
                "timestamp": NOW,
                "connection_id": CONNECTION,
                "ref": True,
                "max_message_bytes": 262_144,
            }
        },
    ),
    Message(
        "subscription_confirmed",
        server.SubscriptionConfirmed,
        "A subscription stands. Unasked for, with `recovered` false: events of it were lost, and "
        "it goes on after `seq`.",
        {
            "project_id": "the project",
            "seq": "`seq` of the last event in the log, 0 if there is none",
            "epoch": "the log's id, to be kept with `seq`",
            "recovered": "only where `since` was sent: `true`, all events after `since` follow; "
            "`false`, they cannot be had, so fetch the project's state and go on after `seq`",
            **ANSWER,
        },
        {
            "subscription confirmed": {
                "type": "subscription_confirmed",
                "project_id": "proj_123",
                "seq": 2,
                "epoch": EPOCH,
            },
            "recovered": {
                "type": "subscription_confirmed",
                "project_id": "proj_123",
                "seq": 2,
                "epoch": EPOCH,
                "recovered": True,
            },
            "not recovered": {
                "type": "subscription_confirmed",
                "project_id": "proj_123",
                "seq": 2,
                "epoch": EPOCH,
                "recovered": False,
            },
        },
    ),
    Message(
        "project_snapshot",
        server.ProjectSnapshot,
        "The platform's own record of a project, after the confirmation and before its events. "
        "It may have the effects of the first of them already.",
        {
            "project_id": "the project",
            "data": "the record without its keys; `null` if the platform does not know the project",
            **ANSWER,
        },
        {
            "project snapshot": {
                "type": "project_snapshot",
                "project_id": "proj_123",
                "data": {"name": "Shop", "progress": 40},
            }
        },
    ),
    Message(
        "unsubscription_confirmed",
        server.UnsubscriptionConfirmed,
        "A subscription has ended: because you asked, or because a fresh token does not allow it.",
        {"project_id": "the project", **ANSWER},
        {
            "unsubscription confirmed": {
                "type": "unsubscription_confirmed",
                "project_id": "proj_123",
            }
        },
    ),
    Message(
        "event",
        server.EventMessage,
        "Something happened in a project. Its `type` is the agent's own word.",
        {
            "type": "the agent's word for it; never one of the server's own",
            "project_id": "the project; `*` for everyone",
            "data": "what the agent says",
            "seq": "its place in the project's log, from 1 without a hole; missing in an "
            "ephemeral event, which is not kept",
            "timestamp": "when it was logged, or delivered if it is ephemeral",
            "in_reply_to": "the `message_id` of the forward that it answers",
            "traceparent": "W3C Trace Context, as the agent sent it",
        },
        {
            "event": {
                "type": "project_updated",
                "project_id": "proj_123",
                "data": {"status": "working", "step": 1, "of": 4},
                "seq": 2,
                "timestamp": NOW,
            },
            "ephemeral event": {
                "type": "token",
                "project_id": "proj_123",
                "data": "def login(",
                "timestamp": NOW,
            },
            "event for everyone": {
                "type": "maintenance",
                "project_id": "*",
                "data": {"at": "2025-11-24T22:00:00Z"},
                "seq": 1,
                "timestamp": NOW,
            },
        },
    ),
    Message(
        "forward_confirmed",
        server.ForwardConfirmed,
        "SQS has the message.",
        {
            "message_id": "yours, or the one made for it",
            "sqs_message_id": "SQS's own",
            "project_id": "the forward's, if it has one",
            "seq": "where the project's log was before the forward went out: all answers come "
            "after it. Missing where this task has nothing to do with the project yet",
            "epoch": "the log's id; with `seq`",
            **ANSWER,
        },
        {
            "forward confirmed": {
                "type": "forward_confirmed",
                "message_id": MESSAGE,
                "sqs_message_id": SQS_MESSAGE,
                "project_id": "proj_123",
            },
            "forward confirmed with its place": {
                "type": "forward_confirmed",
                "message_id": MESSAGE,
                "sqs_message_id": SQS_MESSAGE,
                "project_id": "proj_123",
                "seq": 0,
                "epoch": EPOCH,
            },
        },
    ),
    Message(
        "stop_requested",
        StopRequested,
        "An event of the server's own: somebody wants the agents to stop their work on a forward.",
        {
            "project_id": "the project",
            "data": "always `null`",
            "seq": "its place in the project's log",
            "timestamp": "when it was logged",
            "in_reply_to": "the `message_id` of the forward",
        },
        {
            "stop requested": {
                "type": "stop_requested",
                "project_id": "proj_123",
                "data": None,
                "seq": 1,
                "timestamp": NOW,
                "in_reply_to": MESSAGE,
            }
        },
    ),
    Message(
        "stop_confirmed",
        server.StopConfirmed,
        "The stop is written: agents find it, and it is in the project's log.",
        {"message_id": "the forward's", "project_id": "its project, if it has one", **ANSWER},
        {
            "stop confirmed": {
                "type": "stop_confirmed",
                "message_id": MESSAGE,
                "project_id": "proj_123",
            }
        },
    ),
    Message(
        "pong",
        server.Pong,
        "Somebody is there.",
        {"timestamp": "the server's time", **ANSWER},
        {
            "pong": {"type": "pong", "timestamp": NOW},
            "pong with ref": {"type": "pong", "timestamp": NOW, "ref": "7"},
        },
    ),
    Message(
        "authenticated",
        server.Authenticated,
        "A token was accepted.",
        {
            "expires_in_seconds": "how long the connection may stay without a fresh one; "
            f"{server.SESSION_WITHOUT_END_S} where no tokens are in use",
            **ANSWER,
        },
        {"authenticated": {"type": "authenticated", "expires_in_seconds": 630}},
    ),
    Message(
        "token_expiring",
        server.TokenExpiring,
        "Time to `authenticate` with a fresh token.",
        {
            "in_seconds": "until the token expires; the connection is closed "
            f"{server.TOKEN_LEEWAY_S:g} seconds later"
        },
        {"token expiring": {"type": "token_expiring", "in_seconds": 60}},
    ),
    Message(
        "reconnect",
        server.Reconnect,
        "This server is being replaced and closes the connection with 1012.",
        {"after_ms": "how long to wait before you connect again: each client gets its own delay"},
        {"reconnect": {"type": "reconnect", "after_ms": 420}},
    ),
    Message(
        "busy",
        server.Busy,
        "Nothing is read from you at the moment; said every two seconds to who asked for it with "
        "`?busy=1`. It has no `project_id`, and the word stays free for agents.",
        {},
        {"busy": {"type": "busy"}},
    ),
    Message(
        "error",
        server.ErrorMessage,
        "A message of yours was not acted upon.",
        {
            "message": "a sentence for people",
            "code": "a word for programs",
            "action": "of the message it answers",
            "message_id": "of the message it answers",
            "project_id": "of the message it answers",
            "retryable": "of a forward: whether the same may work later",
            **ANSWER,
        },
        {},  # see ERRORS
    ),
)

AGENT_MESSAGES = (
    Message(
        "order",
        server.AgentMessage,
        "What lands in an agent's queue for a `forward`. The message attributes `MessageType` and "
        "`Timestamp` repeat `type` and `timestamp`.",
        {
            "type": "the word the client used",
            "message_id": "the client's id for it; the same if it is sent again",
            "project_id": "the project, or null",
            "data": "what the client sent, byte for byte; not checked by anybody yet",
            "connection_id": "the connection it came from",
            "client_id": "the client's own id over all its connections, where it sent one; else "
            "the same as `connection_id`. With `message_id` it tells a repetition from another "
            "client's message",
            "user": "the `sub` of the client's token; null where no tokens are in use",
            "timestamp": "when the gateway received it",
            "traceparent": "W3C Trace Context, where the client sent it",
        },
        {
            "order": {
                "action": "forward",
                "type": "dev",
                "message_id": MESSAGE,
                "project_id": "proj_123",
                "data": {"task": "A login page"},
                "connection_id": CONNECTION,
                "client_id": CONNECTION,
                "user": None,
                "timestamp": NOW,
            }
        },
    ),
    Message(
        "update",
        server.Update,
        "What an agent sends to the updates queue, to have it seen.",
        {
            "type": "the agent's own word; the server's are reserved",
            "project_id": "whose subscribers get it; left out or `*`: everyone",
            "data": f"what they get, up to {server.EVENT_MAX_BYTES} bytes",
            "event_id": "idempotency key: a second update of the project with the same one within "
            f"{server.EVENT_ID_WINDOW_S / 60:g} minutes is not logged again",
            "ephemeral": "delivered to who is there, not logged, not repeated: for token streams",
            "connection_id": "only to this connection; always ephemeral",
            "in_reply_to": "the `message_id` of the order that it answers",
            "traceparent": "W3C Trace Context, as it came with the order",
        },
        {
            "update": {
                "project_id": "proj_123",
                "type": "project_updated",
                "data": {"status": "working", "step": 1, "of": 4},
            },
            "ephemeral update": {
                "project_id": "proj_123",
                "type": "token",
                "data": "def login(",
                "ephemeral": True,
            },
            "update for one client": {
                "project_id": "proj_123",
                "type": "token",
                "data": "def login(",
                "connection_id": CONNECTION,
            },
            "update for everyone": {"type": "maintenance", "data": {"at": "2025-11-24T22:00:00Z"}},
        },
    ),
)

MESSAGES = (*CLIENT_MESSAGES, *SERVER_MESSAGES, *AGENT_MESSAGES)

INTERNAL = {
    server.Asking,
    server.Answer,
    server.Dates,
    server.RelayedBatch,
    server.RelayedEvent,
}
"""What message types have in common, those that only the gateway's own tasks see, and claims."""


# --- Errors and closes ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Fault:
    """An error code: when it comes, what a client should do, and the whole message."""

    when: str
    do: str
    example: Json


def error(message: str, code: ErrorCode, **context: Any) -> Json:
    content = {"message": message, "code": str(code), **context}
    fields = [name for name in server.ErrorMessage.__struct_fields__ if name in content]
    return {"type": "error", **{name: content[name] for name in fields}}


FORWARD = {"action": "forward", "message_id": MESSAGE, "project_id": "proj_123"}

ERRORS = {
    ErrorCode.INVALID_JSON: Fault(
        "the text is not JSON",
        "mend the client",
        error(
            "The message is not valid JSON: Input data was truncated.",
            ErrorCode.INVALID_JSON,
            action="ping",
        ),
    ),
    ErrorCode.INVALID_MESSAGE: Fault(
        "no JSON object, one without an `action`, or one nested too deep",
        "mend the client",
        error("The message must be a JSON object.", ErrorCode.INVALID_MESSAGE),
    ),
    ErrorCode.INVALID_FIELD: Fault(
        "a field is missing, or is not of its kind",
        "mend the client",
        error(
            'The field "since" must be a whole number from 0 to 9007199254740991.',
            ErrorCode.INVALID_FIELD,
            action="subscribe",
            project_id="proj_123",
        ),
    ),
    ErrorCode.UNKNOWN_ACTION: Fault(
        "the `action` is none of these",
        "mend the client",
        error(
            'The field "action" must be subscribe, unsubscribe, forward, stop, ping or '
            "authenticate.",
            ErrorCode.UNKNOWN_ACTION,
            action="publish",
            project_id="proj_123",
        ),
    ),
    ErrorCode.UNKNOWN_TYPE: Fault(
        "the `type` of a forward names no agent",
        "mend the client",
        error(
            'This "type" names no agent; use one of ' + ", ".join(server.QUEUE_OF_TYPE) + ".",
            ErrorCode.UNKNOWN_TYPE,
            **FORWARD,
        ),
    ),
    ErrorCode.BINARY_FRAME: Fault(
        "a binary frame",
        "send text frames",
        error("Send text frames; binary ones are not read.", ErrorCode.BINARY_FRAME),
    ),
    ErrorCode.TOO_LARGE: Fault(
        "a forward that fits the limit for messages, but with its envelope not into SQS",
        "keep the content elsewhere and send a link",
        error(
            f"With its envelope the message exceeds SQS's {server.SQS_BATCH_BYTES} bytes.",
            ErrorCode.TOO_LARGE,
            **FORWARD,
        ),
    ),
    ErrorCode.INVALID_CHARACTER: Fault(
        "a forward with U+FFFE or U+FFFF, unescaped, in its `data`: SQS refuses them",
        "write it as a JSON escape, or leave it out",
        error(
            "SQS takes no U+FFFF in data; write it as a JSON escape.",
            ErrorCode.INVALID_CHARACTER,
            **FORWARD,
        ),
    ),
    ErrorCode.TOO_MANY_SUBSCRIPTIONS: Fault(
        "the connection has as many subscriptions as it may",
        "unsubscribe from another project first",
        error(
            "A connection may have 100 subscriptions; end another one first.",
            ErrorCode.TOO_MANY_SUBSCRIPTIONS,
            action="subscribe",
            project_id="proj_123",
        ),
    ),
    ErrorCode.OVERLOADED: Fault(
        "more forwards wait for SQS than the gateway keeps; this one was not sent",
        "send it again with back-off",
        error(
            "Too many messages are waiting; send it again later.",
            ErrorCode.OVERLOADED,
            retryable=True,
            **FORWARD,
        ),
    ),
    ErrorCode.UNAVAILABLE: Fault(
        "SQS did not take the forward in time; it was not sent",
        "send it again with back-off",
        error(
            "The agent's queue did not accept the message in time; send it again later.",
            ErrorCode.UNAVAILABLE,
            retryable=True,
            **FORWARD,
        ),
    ),
    ErrorCode.REJECTED: Fault(
        "SQS refuses the forward, now and later",
        "tell the operator; do not repeat it",
        error(
            "The agent's queue refused the message (AWS.SimpleQueueService.NonExistentQueue).",
            ErrorCode.REJECTED,
            retryable=False,
            **FORWARD,
        ),
    ),
    ErrorCode.TIMEOUT: Fault(
        "SQS did not answer in time; the forward may have arrived",
        "send it again with the same `message_id`, by which agents know a repetition",
        error(
            "The agent's queue did not answer in time. The message may have arrived; "
            "send it again with the same message_id.",
            ErrorCode.TIMEOUT,
            retryable=True,
            **FORWARD,
        ),
    ),
    ErrorCode.UNAUTHENTICATED: Fault(
        "a message before `authenticate`, on a connection opened without a token",
        "authenticate first",
        error("Authenticate first.", ErrorCode.UNAUTHENTICATED),
    ),
    ErrorCode.FORBIDDEN: Fault(
        "the token does not allow this project",
        "ask for a token that does; do not repeat the message",
        error(
            "Your token does not allow this project.",
            ErrorCode.FORBIDDEN,
            action="subscribe",
            project_id="proj_999",
        ),
    ),
}

CLOSES = {
    1000: ("you closed the connection", "nothing"),
    1002: ("what you sent is no WebSocket protocol (RFC 6455)", "mend the client or the proxy"),
    1006: (
        "never sent, but seen: the connection was lost",
        "connect again with back-off, and resume",
    ),
    1007: ("a text frame was not UTF-8", "mend the client; do not send that message again"),
    1008: (
        "a message was begun, and not finished in time",
        "do not connect again by itself",
    ),
    1009: ("a message was too large", "connect again and resume; do not send that message again"),
    1011: ("a fault of the gateway", "connect again with back-off, and resume"),
    1012: (
        "this server is being replaced",
        "connect again after the `after_ms` of the `reconnect` message before it, and resume",
    ),
    1013: (
        "you read too slowly, or the server is short of memory",
        "connect again with back-off, and resume",
    ),
    server.CLOSE_UNAUTHENTICATED: (
        "the token was refused or has expired, or none came in time",
        "connect again with a fresh token, and resume; after a second refusal, ask the user",
    ),
}
"""Close code to why it comes and what a client should do."""


def error_examples() -> dict[str, Json]:
    return {str(code): fault.example for code, fault in ERRORS.items()}


def examples() -> dict[str, Json]:
    """Title to message, of all examples there are; an error's title is its code."""
    found: dict[str, Json] = {}
    for message in MESSAGES:
        found |= message.examples
    return found | error_examples()


LIMITS: tuple[tuple[str, str | int, str], ...] = (
    ("a message from a client, bytes after inflating", "max_message_bytes", "close 1009"),
    (
        "time from a message's first byte to its last, seconds",
        int(server.Sweep.MESSAGE_TIMEOUT_S),
        "close 1008",
    ),
    (
        "subscriptions of a connection",
        "max_subscriptions_per_connection",
        "`too_many_subscriptions`; `*` does not count",
    ),
    (
        "forwards of a connection that wait for SQS",
        server.Connection.FORWARDS_IN_FLIGHT,
        "nothing is read from it until one of them is settled",
    ),
    ("forwards of all clients that wait for SQS", server.Forwarder.MAX_WAITING, "`overloaded`"),
    ("the same, bytes", server.Forwarder.MAX_WAITING_BYTES, "`overloaded`"),
    ("a forward with its envelope, bytes", server.SQS_BATCH_BYTES, "`too_large`"),
    (
        "time for SQS to take a forward, seconds",
        "forward_timeout_seconds",
        "`timeout` or `unavailable`",
    ),
    ("`data` of an agent's update, bytes", server.EVENT_MAX_BYTES, "dead-letter queue"),
    (
        "arrays and objects inside one another, the message's own included",
        server.MAX_NESTING,
        "`invalid_message`; of an agent's update, dead-letter queue",
    ),
    ("how long events are kept, hours", "event_retention_hours", "`recovered` is false"),
    (
        "bytes sent to a client that it neither has read nor reads in a second",
        "max_backlog_bytes",
        "close 1013",
    ),
    ("ids and project names, characters", server.ID_MAX_CHARS, "`invalid_field`"),
    ("a token in `authenticate`, characters", server.TOKEN_MAX_CHARS, "`invalid_field`"),
    ("the opening handshake, bytes", server.HANDSHAKE_MAX_BYTES, "431"),
    ("connections of a task", "max_connections", "503"),
    ("connections of an IP address", "max_connections_per_ip", "429"),
    (
        "bad tokens from an IP address, a minute; expired ones do not count",
        int(60 * server.Door.ADDRESS_WORK_SHARE / server.Door.FAILED_AUTHENTICATION_PRICE_S),
        "handshakes and first messages from there are answered later",
    ),
    (
        "silence, seconds",
        "ping_interval_seconds",
        "a ping frame; after as much again the connection is cut",
    ),
)
"""What is bounded, by how much - a setting or a number -, and what happens beyond."""


# --- Promises -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Promise:
    """What is promised, what may go wrong meanwhile, and the tests that show it."""

    promise: str
    failures: str
    tests: tuple[str, ...]


PROMISES = (
    Promise(
        "A client that remembers its last `seq` gets every logged event of a project once, in "
        "order.",
        "tasks killed, replaced or frozen; connections cut; updates delivered twice; messages "
        "between tasks lost, doubled or late; throttling, errors and silence of AWS",
        (
            "TestChaos.test_tasks_and_clients",
            "TestChaos.test_faults_of_aws",
            "TestConsole.test_tasks_killed_under_it",
        ),
    ),
    Promise(
        "What cannot be had any more is said: `recovered` is false, never wrongly true.",
        "events expired, table wiped or restored",
        (
            "TestFeed.test_no_resume",
            "TestFeed.test_expired",
            "TestFeed.test_hole_in_the_log",
            "TestFeed.test_expired_gap",
            "TestEventLog.test_epoch_of_a_wiped_table",
        ),
    ),
    Promise(
        "Nothing is lost or doubled between catching up and live events.",
        "events while a client catches up, for clients at different positions, for slow readers",
        (
            "TestFeed.test_different_positions",
            "TestFeed.test_catch_up_waits_for_its_reader",
            "TestGateway.test_long_catch_up",
            "TestGateway.test_resume_after_slow_reading",
        ),
    ),
    Promise(
        "An event that one task did not hear of is found and delivered in order.",
        "messages between tasks lost, also the last one of a project",
        ("TestFeed.test_gap", "TestFeed.test_audit", "TestRelay.test_topic_misbehaves"),
    ),
    Promise(
        "An agent's update is logged once.",
        "delivered again by SQS, sent again with its `event_id`, taken by two tasks, an answer "
        "of DynamoDB lost",
        (
            "TestEventLog.test_redelivery",
            "TestIntake.test_crash_before_delete",
            "TestEventLog.test_same_event_id",
            "TestEventLog.test_two_tasks_race",
            "TestEventLog.test_late_effect",
        ),
    ),
    Promise(
        "`data` arrive as they were sent.",
        "any JSON",
        (
            "TestWire.test_forward_keeps_data",
            "TestWire.test_update_keeps_data",
            "TestEventLog.test_data_come_back_as_sent",
            "TestRoundTrip.test_any_json",
        ),
    ),
    Promise(
        "`forward_confirmed` means that SQS has the message; every forward gets one answer.",
        "SQS refuses some of a batch, throttles, fails, does not answer; shutdown",
        (
            "TestForwarder.test_passing_fault",
            "TestForwarder.test_partial_failure",
            "TestForwarder.test_no_answer",
            "TestForwarder.test_ten_thousand",
            "TestGateway.test_drain_answers_forwards",
        ),
    ),
    Promise(
        "Forwards of a project keep their order on the way to an agent's FIFO queue.",
        "the same",
        ("TestForwarder.test_fifo_keeps_order",),
    ),
    Promise(
        "No client holds up the others.",
        "clients that do not read, flood, never finish a message or never answer a ping",
        (
            "TestConnection.test_slow_reader",
            "TestConnection.test_asks_and_never_listens",
            "TestConnection.test_endless_empty_fragments",
            "TestConnection.test_reading_pauses_for_forwards",
            "TestGateway.test_silent_peer",
            "TestTurns.test_flood_of_any_kind",
        ),
    ),
    Promise(
        "Nobody gets what their token does not allow, from the moment it does not.",
        "forged, expired and foreign tokens, rights that shrink in the middle of a catch-up",
        (
            "TestVerifier.test_bad",
            "TestHandshake.test_forged",
            "TestProjects.test_forbidden",
            "TestSession.test_ends_with_the_token",
            "TestSession.test_rights_shrink",
            "TestSession.test_rights_shrink_in_the_middle_of_a_catch_up",
        ),
    ),
    Promise(
        "An update that nobody can read holds up no other.",
        "junk in the updates queue, standard or FIFO, with a dead-letter queue or without",
        ("TestIntake.test_unreadable", "TestIntake.test_unreadable_without_dead_letter_queue"),
    ),
    Promise(
        "A planned end is announced: `reconnect`, then 1012, spread over time.",
        "deployments, scaling in",
        ("TestGateway.test_drain", "TestTargetHealth.test_draining"),
    ),
    Promise(
        "These documents say what the server does.",
        "changes of the code",
        ("TestDocuments.test_up_to_date", "TestExamples.test_all_are_shown"),
    ),
)


# --- Schemas --------------------------------------------------------------------------------


def describable(struct: type[Struct]) -> type[Struct]:
    """``struct``, with any JSON where it keeps bytes unread: msgspec has no schema for those."""
    fields = msgspec.structs.fields(struct)
    if all(field.type is not Raw for field in fields):
        return struct
    config = struct.__struct_config__
    replaced: list[Any] = [
        (
            field.name,
            Any if field.type is Raw else field.type,
            None if isinstance(field.default, Raw) else field.default,
        )
        for field in fields
    ]
    return msgspec.defstruct(
        struct.__name__,
        [field if field[2] is not NODEFAULT else field[:2] for field in replaced],
        namespace={"__doc__": struct.__doc__},
        tag_field=config.tag_field,
        tag=config.tag,
        kw_only=True,
    )


def schemas() -> dict[str, Json]:
    """The JSON Schema of every message, and of what they refer to, by the type's name."""
    _, components = msgspec.json.schema_components(
        [describable(message.struct) for message in MESSAGES],
        ref_template="#/components/schemas/{name}",
    )
    components = {name: dict(schema) for name, schema in components.items()}
    for message in MESSAGES:
        schema = components[message.struct.__name__]
        schema["description"] = message.summary
        for name, text in message.fields.items():
            found = schema["properties"][name]
            # What stands beside a reference is not looked at (JSON Schema, draft 7).
            found = {"allOf": [found]} if "$ref" in found else found
            schema["properties"][name] = {**found, "description": text}
    for struct in (server.EventMessage, server.Update):
        kind = components[struct.__name__]["properties"]["type"]
        kind["not"] = {"enum": sorted(server.RESERVED_TYPES)}
    return components


def schema_of(message: Message) -> Json:
    """One message's JSON Schema, complete in itself."""
    components = json.loads(json.dumps(schemas()).replace("#/components/schemas/", "#/$defs/"))
    return {"$ref": f"#/$defs/{message.struct.__name__}", "$defs": components}


def message_of(title: str) -> Message:
    """The kind of message that an example is of."""
    if title in error_examples():
        return next(message for message in MESSAGES if message.name == "error")
    return next(message for message in MESSAGES if title in message.examples)


# --- AsyncAPI -------------------------------------------------------------------------------


def asyncapi_message(message: Message) -> Json:
    shown = error_examples() if message.name == "error" else message.examples
    described: Json = {
        "name": message.name,
        "title": message.struct.__name__,
        "summary": message.summary,
        "payload": {"$ref": f"#/components/schemas/{message.struct.__name__}"},
        "examples": [{"name": title, "payload": payload} for title, payload in shown.items()],
    }
    if message.name == "order":
        attributes = {name: {"type": "string"} for name in ("MessageType", "Timestamp")}
        described["headers"] = {"type": "object", "properties": attributes}
        described["examples"] = [
            {
                **example,
                "headers": {
                    "MessageType": example["payload"]["type"],
                    "Timestamp": example["payload"]["timestamp"],
                },
            }
            for example in described["examples"]
        ]
    return described


def asyncapi() -> Json:
    """The whole contract as an AsyncAPI 3 document."""

    def references(channel: str, *names: str) -> list[Json]:
        return [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names]

    def holds(*messages: Message) -> Json:
        return {m.name: {"$ref": f"#/components/messages/{m.name}"} for m in messages}

    def operation(action: str, channel: str, message: Message) -> Json:
        return {
            "action": action,
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": message.summary,
            "messages": references(channel, message.name),
        }

    operations: Json = {}
    for message in CLIENT_MESSAGES:
        operations[message.name] = {
            **operation("receive", "gateway", message),
            "reply": {
                "channel": {"$ref": "#/channels/gateway"},
                "messages": references("gateway", *message.answers, "error"),
            },
        }
    answers = {name for message in CLIENT_MESSAGES for name in message.answers} | {"error"}
    for message in SERVER_MESSAGES:
        if message.name not in answers:
            operations[message.name] = operation("send", "gateway", message)
    order, update = AGENT_MESSAGES
    operations["order"] = operation("send", "agents", order)
    operations["update"] = operation("receive", "updates", update)
    project_id = schemas()["Subscribe"]["properties"]["project_id"]
    document: Json = {
        "asyncapi": "3.0.0",
        "info": {
            "title": "AgenticAI WebSocket gateway",
            "version": server.SUBPROTOCOL.rpartition(".v")[2] + ".0.0",
            "description": "Browsers on one side, queue-fed agents on the other. The rules that "
            "schemas cannot express, such as how a client resumes, are in PROTOCOL.md. "
            "Written by `python -m tests.contract` from the code.",
        },
        "defaultContentType": "application/json",
        "servers": {
            "deployed": {
                "host": "{host}",
                "protocol": "wss",
                "variables": {"host": {"description": "the load balancer's or your domain's name"}},
                "security": [{"$ref": "#/components/securitySchemes/token"}],
            },
            "local": {"host": "127.0.0.1:8080", "protocol": "ws"},
            "sqs": {
                "host": "sqs.{region}.amazonaws.com",
                "protocol": "sqs",
                "variables": {"region": {"default": "us-east-1"}},
            },
        },
        "channels": {
            "gateway": {
                "address": "/ws",
                "title": "One client's connection",
                "servers": [{"$ref": "#/servers/deployed"}, {"$ref": "#/servers/local"}],
                "messages": holds(*CLIENT_MESSAGES, *SERVER_MESSAGES),
                "bindings": {
                    "ws": {
                        "method": "GET",
                        "query": {
                            "type": "object",
                            "description": "Subscribes at once. since and epoch go with exactly "
                            "one project_id.",
                            "properties": {
                                "project_id": {"type": "array", "items": project_id},
                                "since": {"type": "integer", "minimum": 0},
                                "epoch": {"type": "string"},
                            },
                        },
                        "bindingVersion": "0.1.0",
                    }
                },
            },
            "agents": {
                "address": "{agent}",
                "title": "The agents' queues",
                "servers": [{"$ref": "#/servers/sqs"}],
                "parameters": {
                    "agent": {
                        "description": "Which agent; the setting SQS_QUEUE_URL_ and its name in "
                        "capitals has the queue's URL.",
                        "enum": list(dict.fromkeys(server.QUEUE_OF_TYPE.values())),
                    }
                },
                "messages": holds(order),
            },
            "updates": {
                "address": None,
                "title": "The queue in which agents answer",
                "description": "The setting SQS_QUEUE_URL_UPDATES has its URL.",
                "servers": [{"$ref": "#/servers/sqs"}],
                "messages": holds(update),
            },
        },
        "operations": operations,
        "components": {
            "messages": {message.name: asyncapi_message(message) for message in MESSAGES},
            "schemas": schemas(),
            "securitySchemes": {
                "token": {
                    "type": "http",
                    "scheme": "bearer",
                    "bearerFormat": "JWT",
                    "description": "In the header Authorization; from browsers as the subprotocol "
                    f"{server.BEARER_PREFIX}BASE64URL-OF-THE-TOKEN beside {server.SUBPROTOCOL}; "
                    "or, where the gateway allows it, in the first message.",
                }
            },
        },
    }
    return cast("Json", json.loads(json.dumps(document)))  # nothing in it is shared


def asyncapi_yaml() -> str:
    text = yaml.safe_dump(asyncapi(), sort_keys=False, allow_unicode=True, width=100)
    return f"# Written by `python -m tests.contract`; tests/test_contract.py compares.\n{text}"


# --- Markdown -------------------------------------------------------------------------------


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def kind(schema: Json) -> str:
    """A JSON Schema in a few words."""
    if "allOf" in schema:
        return kind(schema["allOf"][0])
    if "anyOf" in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return "string"
    words = str(schema.get("type", "any JSON"))
    if "maxLength" in schema:
        low = schema.get("minLength", 0)
        words += f", {low} to {schema['maxLength']:,} characters"
    if "minimum" in schema:
        words += f" from {schema['minimum']}"
    return words


def block(payload: Any) -> str:
    return f"```json\n{json.dumps(payload, ensure_ascii=False)}\n```"


def message_part(message: Message) -> str:
    """One message: what it is, its fields, its examples."""
    schema = schemas()[message.struct.__name__]
    parts = [f"### {message.name}", message.summary]
    if message.fields:
        required = set(schema.get("required", ()))
        rows = (
            (
                f"`{name}`" + ("" if name in required else ", optional"),
                kind(schema["properties"][name]),
                text,
            )
            for name, text in message.fields.items()
        )
        parts.append(table(("field", "kind", "what it is"), rows))
    parts += [block(payload) for payload in message.examples.values()]
    return "\n\n".join(parts)


def messages_part(*messages: Message) -> str:
    return "\n\n".join(message_part(message) for message in messages) + "\n"


def errors_part() -> str:
    rows = ((f"`{code}`", fault.when, fault.do) for code, fault in ERRORS.items())
    lines = ",\n  ".join(json.dumps(fault.example) for fault in ERRORS.values())
    return (
        table(("code", "when", "what to do"), rows)
        + f"\n\nEach of them, whole:\n\n```json\n[\n  {lines}\n]\n```"
    )


def inputs_part() -> str:
    return table(("what is sent", "from a client", "from an agent"), inputs.rows())


def closes_part() -> str:
    rows = ((str(code), when, do) for code, (when, do) in CLOSES.items())
    return table(("close code", "why", "what to do"), rows)


def limits_part() -> str:
    """The limits; a setting stands for its default."""
    default = {field.name: field.default for field in dataclasses.fields(server.Settings)}
    rows = (
        (
            what,
            f"{default[limit]:,.10g} (`{limit.upper()}`)"
            if isinstance(limit, str)
            else f"{limit:,}",
            beyond,
        )
        for what, limit, beyond in LIMITS
    )
    return table(("what", "limit", "beyond it"), rows)


def promises_part() -> str:
    rows = (
        (each.promise, each.failures, ", ".join(f"`{test}`" for test in each.tests))
        for each in PROMISES
    )
    return table(("promise", "through", "shown by"), rows)


PARTS: dict[str, Callable[[], str]] = {
    "client": lambda: messages_part(*CLIENT_MESSAGES),
    "server": lambda: messages_part(*SERVER_MESSAGES),
    "agents": lambda: messages_part(*AGENT_MESSAGES),
    "inputs": inputs_part,
    "errors": errors_part,
    "closes": closes_part,
    "limits": limits_part,
    "promises": promises_part,
}
"""The parts of PROTOCOL.md between ``<!-- name: ... -->`` and ``<!-- /name -->``."""


def protocol(text: str) -> str:
    """PROTOCOL.md with every part as it should be."""
    for name, render in PARTS.items():
        part = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not part.search(text):
            raise LookupError(f"{PROTOCOL.name} has no part named {name}")
        body = render()
        text = part.sub(lambda found, body=body: f"{found[1]}\n{body}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    ASYNCAPI.write_text(asyncapi_yaml(), encoding="utf-8")
    PROTOCOL.write_text(protocol(PROTOCOL.read_text(encoding="utf-8")), encoding="utf-8")
    for path in (ASYNCAPI, PROTOCOL):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
