"""What fuzzing has found stays found; and each target gets some bytes that nobody has tried."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import CHUNKS, STATES, TARGETS

CORPUS = Path(__file__).parent / "fuzz" / "corpus"
INPUTS = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def corpus(name: str) -> list[bytes]:
    return [path.read_bytes() for path in INPUTS if path.parent.name == name]


@pytest.mark.parametrize("path", INPUTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_corpus(path: Path) -> None:
    """No input of the corpus makes its target fail."""
    TARGETS[path.parent.name](path.read_bytes())


def test_corpus_reaches_every_state() -> None:
    """The corpus has inputs for every target, and for connections in every state."""
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
    assert {data[0] for data in corpus("connection")} == set(range(len(STATES)))


quickly = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@quickly
@given(
    st.sampled_from(range(len(STATES))),
    st.sampled_from(range(len(CHUNKS))),
    st.lists(
        st.binary(max_size=40) | st.sampled_from([data[2:] for data in corpus("connection")]),
        max_size=4,
    ),
)
def test_connection(state: int, chunks: int, parts: list[bytes]) -> None:
    """No bytes, in whatever pieces, bring a connection in any state into disorder."""
    TARGETS["connection"](bytes((state, chunks)) + b"".join(parts))


@quickly
@given(st.binary(max_size=200) | st.lists(st.sampled_from(corpus("wire"))).map(b"".join))
def test_wire(data: bytes) -> None:
    """No bytes are an error other than those that are expected."""
    TARGETS["wire"](data)


@quickly
@given(st.lists(st.binary(max_size=40) | st.sampled_from(corpus("backplane"))).map(b"".join))
def test_backplane(data: bytes) -> None:
    """No update, and nothing another task sends, stops the others."""
    TARGETS["backplane"](data)
