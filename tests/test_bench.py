"""The benchmark's report: figures, tables, and what is written into docs/PERFORMANCE.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench import report
from bench.feeds import event, update
from bench.processes import BenchError
from bench.report import Run, Target
from bench.scenarios import Record
from bench.servers import Server, present


def record(server: str, round_: int, rate: float, burst: int = 20) -> Record:
    parameters = {"subscribers": 2000, "size": 200, "deflate": False, "burst": burst}
    values = {"deliveries_per_cpu_s": rate, "p50_ms": 1.0, "p99_ms": 2.0, "generator_share": 0.1}
    return Record("fan-out", server, round_, parameters, values)


@pytest.fixture
def run() -> Run:
    """Three rounds, the second on a machine half as fast."""
    records = [
        record(server, round_, rate / (2 if round_ == 2 else 1))
        for round_ in (1, 2, 3)
        for server, rate in (("gateway", 1_500_000), ("websockets", 100_000))
    ]
    effort = {"rounds": 3, "cpu_s": 0.5}
    return Run("2025-11-24", effort, {"processor": "x"}, {"gateway": "1"}, {"nchan": "no"}, records)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.28, "0.28"), (5.236, "5.24"), (123.4, "123"), (1234.0, "1,230"), (1_634_567, "1,630,000")],
)
def test_number_has_three_digits(value: float, text: str) -> None:
    """Figures are as precise as they were measured."""
    assert report.number(value) == text


def test_ratios_are_taken_within_a_round(run: Run) -> None:
    """A slow round slows both, and changes no ratio."""
    own = run.by_round("fan-out", "gateway", report.RATE, burst=20)
    other = run.by_round("fan-out", "websockets", report.RATE, burst=20)
    assert own[1] == 2 * own[2]
    assert report.ratios(own, other) == [15.0, 15.0, 15.0]


def test_fit_finds_the_line() -> None:
    """Fixed price and price a subscriber come out of a straight line."""
    intercept, slope, r2 = report.fit([(x, 700 + 0.5 * x) for x in (100, 1000, 5000)])
    assert (round(intercept), round(slope, 3), round(r2, 6)) == (700, 0.5, 1)


@pytest.mark.parametrize("at_most", [False, True])
def test_target_met_at_its_limit(run: Run, at_most: bool) -> None:
    """A goal is met by the median, the limit itself included."""
    target = Target("x", 15, lambda _run: [14.0, 15.0, 16.0], at_most=at_most)
    assert target.row(run)[-1] == "yes"


@pytest.mark.parametrize(("goal", "at_most"), [(15.1, False), (14.9, True)])
def test_target_missed(run: Run, goal: float, at_most: bool) -> None:
    """A missed goal is said to be missed."""
    target = Target("x", goal, lambda _run: [14.0, 15.0, 16.0], at_most=at_most)
    assert target.row(run)[-1] == "**no**"


def test_saved_run_is_the_same_run(run: Run, tmp_path: Path) -> None:
    """What is written to bench/results is read back equal."""
    run.save(tmp_path / "results" / "run.json")
    assert Run.load(tmp_path / "results" / "run.json") == run


def test_document_is_filled_and_filled_again(run: Run) -> None:
    """Only what stands between the markers is replaced."""
    text = "before\n<!-- bench:fan-out -->\nold\n<!-- /bench -->\nafter\n"
    filled = report.fill(text, run)
    assert filled.startswith("before\n<!-- bench:fan-out -->\n|")
    assert filled.endswith("<!-- /bench -->\nafter\n")
    assert "| gateway | 1,500,000 (750,000-1,500,000) |" in filled
    assert "old" not in filled
    assert report.fill(filled, run) == filled


def test_document_names_every_table() -> None:
    """docs/PERFORMANCE.md has a place for each table, and for no other."""
    found = re.findall(r"<!-- bench:([\w-]+) -->", report.DOCUMENT.read_text(encoding="utf-8"))
    assert sorted(found) == sorted(report.TABLES)


@pytest.mark.parametrize("size", [200, 1000, 4096])
def test_events_have_the_size_they_say(size: int) -> None:
    """Peers and gateway send events of the same size."""
    assert len(event(size)) == size
    assert size - 70 < len(update(size)) < size  # the server adds seq and timestamp


def test_absent_peers_are_named() -> None:
    """What is not installed is listed with the reason, and does not stop the rest."""

    def missing() -> str:
        raise BenchError("not installed here")

    here = Server("here", lambda _deflate: pytest.fail("not started"), lambda: "1.0")
    gone = Server("gone", lambda _deflate: pytest.fail("not started"), missing)
    assert present([here, gone]) == ({"here": "1.0"}, {"gone": "not installed here"})
