"""What is passed through, made regular or refused of what clients and agents send, as data.

``tests/contract.py`` makes the table of ``docs/PROTOCOL.md`` of it, and
``tests/server/test_inputs.py`` sends every line.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import server

DEAD_LETTER = "dead-letter queue"
CLOSED = "close 1007"


@dataclasses.dataclass(frozen=True)
class Case:
    """What becomes of it on one side.

    Attributes:
        says: what the table says.
        sent: messages, each an example of it; bytes are sent as they are, and a text that begins
            with ``?`` is the query of a client's URL.
        arrives: a part of what the other side gets, raw; with several messages, of each.
        refused: the error code, or where else it ends.
    """

    says: str
    sent: tuple[str | bytes, ...]
    arrives: str = ""
    refused: str = ""


@dataclasses.dataclass(frozen=True)
class Input:
    """One line of the table; ``None`` for a side on which it cannot happen, with the reason."""

    what: str
    client: Case | None
    agent: Case | None
    why_not: str = ""


def forward(data: str = "1", **fields: str) -> str:
    """A forward with fields as JSON texts."""
    return members({"action": '"forward"', "type": '"dev"', **fields, "data": data})


def update(data: str = "1", **fields: str) -> str:
    return members({"type": '"t"', "project_id": '"p"', **fields, "data": data})


def members(fields: dict[str, str]) -> str:
    return "{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}"


def passed(what: str, data: str) -> Input:
    """``data`` that arrive byte for byte, on both sides."""
    arrives = f'"data":{data},'
    says = "passed through"
    return Input(what, Case(says, (forward(data),), arrives), Case(says, (update(data),), arrives))


def refused(what: str, code: str, clients: tuple[str, ...], agents: tuple[str, ...]) -> Input:
    client = Case(f"refused: `{code}`", clients, refused=code)
    return Input(what, client, Case(f"refused: {DEAD_LETTER}", agents, refused=DEAD_LETTER))


def in_ids(value: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """A value in each field of the message that the gateway reads itself, of clients and agents."""
    clients = [forward(**{name: value}) for name in ("message_id", "project_id", "client_id")]
    clients.append(members({"action": '"subscribe"', "project_id": value}))
    names = ("type", "project_id", "event_id", "connection_id")
    return tuple(clients), tuple(update(**{name: value}) for name in names)


def no_json() -> tuple[tuple[str, ...], tuple[str, ...]]:
    wrong = ("NaN", "Infinity", "01", "1.", "'a'", "[1,]", "/**/1", '"\t"', r'"\x41"', r'"\ud8"')
    return tuple(map(forward, wrong)), tuple(map(update, wrong))


DEEPEST, DEEPER = (
    "[" * depth + "]" * depth for depth in (server.MAX_NESTING - 1, server.MAX_NESTING)
)
TOO_LONG = json.dumps("x" * (server.ID_MAX_CHARS + 1))
NORMALISED = "made regular: "

INPUTS = (
    passed("numbers of any size and form, names that come twice, space inside of `data`",
           '{ "a":-0, "a" : 1.50E+400 ,"b":[12345678901234567890123]}'),
    passed("characters and escapes in `data`, in any way JSON allows to write them",
           r'"\u00e9é😀\ud83d\ude00\/\u0000\\ud83d"'),
    passed("half a surrogate pair, as an escape, in `data`", r'["caf\ud83d",{"\uDE00":"\ud83dx"}]'),
    passed("U+FFFE and U+FFFF, as escapes, in `data`", r'"\ufffe\uFFFF"'),
    Input(
        "U+FFFE and U+FFFF, unescaped, in `data`",
        Case("refused: `invalid_character`", (forward('"\uffff"'), forward('"\ufffe"')),
             refused="invalid_character"),
        None,
        "SQS refuses it",
    ),
    Input(
        "U+FFFE and U+FFFF in ids and types",
        Case(NORMALISED + "sent on as escapes",
             (forward(message_id=r'"a\uffff"'), forward(message_id='"a\uffff"')),
             r'"message_id":"a\uffff",'),
        Case(NORMALISED + "sent on as escapes", (update(type=r'"a\uffff"'),),
             r'"type":"a\uffff",'),
    ),
    Input(
        "other escapes in ids and types",
        Case(NORMALISED + "sent on as JSON writes them shortest",
             (forward(message_id=r'"\u0061\u00e9\/\ud83d\ude00"'),), '"message_id":"aé/😀",'),
        Case(NORMALISED + "delivered as JSON writes them shortest",
             (update(type=r'"\u0061\u00e9\/\ud83d\ude00"'),), '"type":"aé/😀",'),
    ),
    refused("half a surrogate pair in ids and types", "invalid_field", *in_ids(r'"a\ud83d"')),
    refused("an id that is empty", "invalid_field", *in_ids('""')),
    refused(f"an id of more than {server.ID_MAX_CHARS} characters", "invalid_field",
            *in_ids(TOO_LONG)),
    refused("an id that is a number, an array or an object", "invalid_field",
            *(tuple(a + b + c) for a, b, c in zip(in_ids("5"), in_ids("[]"), in_ids("{}"),
                                                 strict=True))),
    Input(
        "`null` for an optional field",
        Case("like the field left out",
             (forward(message_id="null", project_id="null", client_id="null"),), '"data":1,'),
        Case("like the field left out",
             (update(event_id="null", connection_id="null"),), '"data":1,'),
    ),
    Input(
        "no `data`",
        Case("`null`", (members({"action": '"forward"', "type": '"dev"'}),), '"data":null,'),
        Case("`null`", (members({"type": '"t"', "project_id": '"p"'}),), '"data":null,'),
    ),
    Input(
        "fields that are not known, whatever is in them",
        Case("ignored", (forward(x=r'["\ud83d",{}]'), forward(x='"\uffff"')), '"data":1,'),
        Case("ignored", (update(x=r'["\ud83d",{}]'),), '"data":1,'),
    ),
    Input(
        "a field that comes twice",
        Case("the last one counts", (forward('2,"data":1'),), '"data":1,'),
        Case("the last one counts", (update('2,"data":1'),), '"data":1,'),
    ),
    Input(
        "space around the message and its values, a byte order mark before it",
        Case(NORMALISED + "dropped", ("\ufeff" + forward(" 1\t"), f" \r\n{forward()} "),
             '"data":1,'),
        Case(NORMALISED + "dropped", ("\ufeff" + update(" 1\t"), f" \r\n{update()} "),
             '"data":1,'),
    ),
    Input(
        "`type` in capitals",
        Case("passed through; names the same agent", (forward(type='"DEV"'),), '"type":"DEV",'),
        Case("passed through; another word", (update(type='"Pong"'),), '"type":"Pong",'),
    ),
    refused(
        "a `type` that is not possible", "unknown_type",
        (forward(type='"sales"'), forward(type='""'), forward(type='" dev"')),
        tuple(update(type=f'"{word}"') for word in sorted(server.RESERVED_TYPES)),
    ),
    passed(f"arrays and objects inside one another, {server.MAX_NESTING} with the message's own",
           DEEPEST),
    refused("the same, deeper", "invalid_message", (forward(DEEPER), forward("[" * 50_000)),
            (update(DEEPER), update("[" * 50_000))),
    refused("JSON that is no object", "invalid_message", ("[]", '"a"', "1", "null"),
            ("[]", '"a"', "1", "null")),
    refused(
        "no JSON: `NaN`, comments, a comma too many, control characters, wrong escapes",
        "invalid_json", *no_json(),
    ),
    Input(
        "bytes that are not UTF-8",
        Case("close 1007", (forward('"é"').encode("latin-1"), forward('"\ud83d"').encode(
            "utf-8", "surrogatepass")), refused=CLOSED),
        None,
        "SQS refuses it",
    ),
    Input(
        "`project_id`, `since` or `epoch` in the URL that are not UTF-8; `since` in other digits",
        Case("refused: `invalid_field`",
             ("?project_id=%ff", "?project_id=p&since=0&epoch=%ED%A0%BD",
              "?project_id=p&since=%D9%A3"), refused="invalid_field"),
        None,
        "there is no URL",
    ),
)  # fmt: skip


def rows() -> Iterator[tuple[str, str, str]]:
    """The lines of the table."""
    for each in INPUTS:
        client, agent = (
            side.says if side else f"({each.why_not})" for side in (each.client, each.agent)
        )
        yield each.what, client, agent
