"""What the logs must hold of the texts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Set
from typing import Any

from tests.streams.texts import script_of

Json = dict[str, Any]


def logged_text(
    seed: int, message_id: str, stream: str, pieces: list[Json]
) -> tuple[Json, list[str]]:
    """Put a text together of its logged pieces, which must fit without a hole or an overlap.

    Returns the text and the states it ended with, as ``{"text", "states"}``, and what is wrong.
    """
    faults = []
    text = ""
    of_text = [piece for piece in pieces if piece.get("state") != "superseded"]
    for piece in sorted(of_text, key=lambda piece: (piece["at"], "state" in piece)):
        if piece["at"] != len(text.encode("utf-16-le", "surrogatepass")) // 2:
            faults.append(f"{message_id}, stream {stream}: a piece does not fit: {piece}")
        text = _pairs_joined(text + piece["text"])
    states = sorted({piece["state"] for piece in pieces if "state" in piece})
    whole = _pairs_joined(script_of(seed, message_id, int(stream.rpartition(".")[2])).text)
    if text != whole if "done" in states else not whole.startswith(text):
        faults.append(f"{message_id}, stream {stream}: {text!r} of {whole!r}")
    return {"text": text, "states": states}, faults


def _pairs_joined(text: str) -> str:
    """A text with the halves of its surrogate pairs together, as JavaScript has it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def unfinished(
    orders: Mapping[str, Mapping[str, Json]], ends: Mapping[str, Set[str]]
) -> Iterator[str]:
    """Texts that did not end: the last attempt's in earnest, those before it somehow.

    An attempt that finds its order stopped writes nothing any more. An order that the gateway has
    handed to SQS twice has a text of each.

    Args:
        orders: by order and stream, what ``logged_text`` returns.
        ends: how each order was answered at last.
    """
    for message_id, streams in orders.items():
        attempts = defaultdict(list)
        for stream, text in streams.items():
            if not text["states"]:
                yield f"{message_id}, stream {stream}: has no end"
            of_message, _, attempt = stream.rpartition(".")
            attempts[of_message].append(int(attempt))
        for of_message, numbers in attempts.items():
            states = {*streams[f"{of_message}.{max(numbers)}"]["states"]}
            if not {"done", "cancelled"} & states and "cancelled" not in ends[message_id]:
                yield f"{message_id}: the last attempt, {max(numbers)}, is {sorted(states)}"
