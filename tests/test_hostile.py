"""A hundred honest clients while others do their worst, each kind for a moment.

``python -m tests.hostile`` does the same for longer, and prints what it measured.
"""

from __future__ import annotations

import asyncio
import sys

import pytest

from tests.hostile import ATTACKS, HONEST, Report, run

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc"
)

P99_MS = 250
BUSY_FACTOR = 8  # a machine that is busy with something else is slow for the honest anyway
GROWTH_MB = 64  # half of it are 2,000 sockets at once


@pytest.fixture(scope="module")
def report() -> Report:
    return asyncio.run(run(1.0, half_open=2_000))


def test_honest_clients_stay(report: Report) -> None:
    """Nobody who is honest loses the connection, or an event."""
    assert [row.name for row in report.rows] == list(ATTACKS)
    assert {row.name: (row.lost, row.gaps) for row in report.rows} == dict.fromkeys(ATTACKS, (0, 0))
    assert all(row.count > HONEST for row in report.rows)


def test_attacks_happen(report: Report) -> None:
    """Every attack is really made."""
    assert not [row.name for row in report.rows if ATTACKS[row.name][0] and not row.acts]


def test_honest_clients_are_answered(report: Report) -> None:
    """The honest hardly notice: 99 of 100 answers come within a quarter of a second."""
    calm = next(row for row in report.rows if row.name == "nobody attacks")
    bound_ms = max(P99_MS, BUSY_FACTOR * calm.p99_ms)
    assert {row.name: row.p99_ms for row in report.rows if row.p99_ms > bound_ms} == {}


def test_memory_is_bounded(report: Report) -> None:
    """No attack makes the gateway take much memory, nor keep it."""
    assert report.peak_mb < report.before_mb + GROWTH_MB
    assert report.after_mb < report.before_mb + GROWTH_MB


def test_nothing_is_an_error(report: Report) -> None:
    """What clients do is no error of the gateway's."""
    assert report.errors == []
