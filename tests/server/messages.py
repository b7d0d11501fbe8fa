"""What clients may send, good and bad, and what the gateway reads in it."""

from __future__ import annotations

from hypothesis import strategies as st

import server
from server import BadMessage, decode_message

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


TOO_LONG = "x" * 257
