"""The benchmark's report: figures, tables, and what is written into docs/PERFORMANCE.md."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import answer, prices, report, virtual_time
from bench.__main__ import collect
from bench.agents import HeavyTail
from bench.bill import dollars_per_million, per_event
from bench.cluster import PUBLISH_S, PUBLISHING, ceiling, line, unwanted_turn
from bench.feeds import event, update
from bench.processes import ROOT, BenchError, Process
from bench.programme import FULL, QUICK, Effort, paired_programme, programme
from bench.report import Run, Target
from bench.scenarios import Record
from bench.servers import GATEWAY, JETSTREAM, Server, Used, generous_limits, limits, present
from bench.small_projects import real_shape_turn
from server import Settings

FULL_RUN = report.RESULTS / "full.json"
LEAST_ROUNDS = 5


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
    target = Target("x", 15, lambda _run, _own: [14.0, 15.0, 16.0], at_most=at_most)
    assert target.row(run)[3::2] == ["yes", "yes"]


@pytest.mark.parametrize(("goal", "at_most"), [(15.1, False), (14.9, True)])
def test_target_missed(run: Run, goal: float, at_most: bool) -> None:
    """A missed goal is said to be missed."""
    target = Target("x", goal, lambda _run, _own: [14.0, 15.0, 16.0], at_most=at_most)
    assert target.row(run)[3::2] == ["**no**", "**no**"]


def test_target_is_judged_without_and_with_tokens(run: Run) -> None:
    """Each of the two has its own figure and its own verdict."""
    figures = {"gateway": [16.0], "gateway with tokens": [14.0]}
    target = Target("x", 15, lambda _run, own: figures[own])
    assert target.row(run)[2:] == ["16x (16-16)", "yes", "14x (14-14)", "**no**"]
    figures["gateway with tokens"] = []
    assert target.row(run)[4:] == ["not measured", "-"]


def cost_record(scenario: str, server: str, subscribers: int, cost: float) -> Record:
    parameters = {"subscribers": subscribers, "burst": 1}
    return Record(scenario, server, 1, parameters, {"cpu_us_per_event": cost})


def test_fixed_cost_is_measured_and_taken_off() -> None:
    """Deliveries alone are what is left when the cost of an event to one client is taken off."""
    records = [
        cost_record("subscribers", "gateway", 1, 3000),
        cost_record("subscribers", "gateway", 5000, 43_000),
        cost_record("subscribers", "websockets", 5000, 60_000),
        cost_record("fan-out", "gateway", 2000, 11_000),
        cost_record("fan-out", "C floor", 2000, 6000),
    ]
    run = Run("2025-11-24", {"many": 5000}, {}, {}, {}, records)
    rows = {t.label: t.measured(run, "gateway") for t in report.TARGETS if t.goal in (1.2, 0.7)}
    assert rows["the same with {many:,} subscribers, without the calls to AWS"] == [1.5]
    assert rows["the same without the calls to AWS"] == [0.75]


def test_idle_projects_are_compared_with_none() -> None:
    """The ratio, and the memory beyond that of as many connections to one project."""
    parameters = {"subscribers": 1000}
    records = [
        Record("idle projects", "gateway", 1, {"idle_projects": idle, **parameters}, values)
        for idle, values in (
            (0, {"cpu_us_per_event": 500.0}),
            (5000, {"cpu_us_per_event": 550.0, "idle_kb": 4.0}),
        )
    ]
    records.append(
        Record("subscribers", "gateway", 1, {"subscribers": 5000, "burst": 0}, {"idle_kb": 3.0})
    )
    last = report.projects(Run("2025-11-24", {}, {}, {}, {}, records)).splitlines()[-1]
    assert last.endswith("| 1,000 | 550 (550-550) | 1.1x (1.1-1.1) | 1 (1-1) |")


def test_saved_run_is_the_same_run(run: Run, tmp_path: Path) -> None:
    """What is written to bench/results is read back equal."""
    run.save(tmp_path / "results" / "run.json")
    assert Run.load(tmp_path / "results" / "run.json") == run


def test_run_that_is_cut_off(run: Run, tmp_path: Path) -> None:
    """What was measured until somebody stopped a run is there."""

    def records() -> Iterator[Record]:
        yield from run.records[:2]
        raise KeyboardInterrupt

    partial = tmp_path / "full.partial.json"
    with pytest.raises(KeyboardInterrupt):
        collect(QUICK, run.versions, run.absent, records(), partial)
    found = Run.load(partial)
    assert (found.records, found.versions) == (run.records[:2], run.versions)
    assert found.effort == dataclasses.asdict(QUICK) | {"rates": list(QUICK.rates)}


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


def test_document_shows_the_full_run() -> None:
    """What stands in the tables of docs/PERFORMANCE.md is what bench/results/full.json says."""
    text = report.DOCUMENT.read_text(encoding="utf-8")
    filled = report.fill(text, Run.load(FULL_RUN))
    assert filled == text, "docs/PERFORMANCE.md is out of date: `python -m bench --report`"


def test_full_run_has_enough_rounds() -> None:
    """A median with its spread needs several rounds, and the documented run has had them."""
    run = Run.load(FULL_RUN)
    rounds = {record.round for record in run.records}
    assert len(rounds) == run.effort["rounds"] >= LEAST_ROUNDS, (
        f"bench/results/full.json is a run of {len(rounds)}, not of {LEAST_ROUNDS}: `make bench`"
    )


def test_full_run_has_every_turn() -> None:
    """What the programme asks for now was measured, but for servers that were absent."""
    run = Run.load(FULL_RUN)
    measured = {(record.scenario, record.server) for record in run.records}
    asked = {tuple(label.partition(",")[0].split(": ")) for label, _ in programme(FULL)}
    servers = {*run.versions, "send_message each"}
    missing = {
        turn
        for turn in asked - measured
        if turn[1] in servers and ": ".join(turn) not in run.absent
    }
    assert not missing, f"bench/results/full.json lacks {sorted(missing)}: `make bench`"


@pytest.mark.parametrize("effort", [FULL, QUICK], ids=["full", "quick"])
def test_programme_measures_both_for_each_target(effort: Effort) -> None:
    """Whatever is compared without tokens is compared with them."""
    labels = {label for label, _ in programme(effort)}
    for scenario in ("fan-out", "deflated", "plain 1 KB", "subscribers"):
        assert {f"{scenario}: gateway", f"{scenario}: gateway with tokens"} <= labels
    assert "forwards: gateway with tokens, 100 clients" in labels


def test_every_limit_is_on() -> None:
    """The measured gateway has each limit on that can be off, and starts with it."""
    found = limits(ROOT / "server.py")
    assert "MAX_CONNECTIONS" in found
    chosen = generous_limits(ROOT / "server.py")
    assert chosen.keys() == found
    names = ("PM", "DEV", "QA", "OPS")
    needed = {f"SQS_QUEUE_URL_{name}": "http://127.0.0.1/1/q" for name in names}
    Settings.from_mapping({**needed, "DYNAMODB_TABLE_NAME": "table", **chosen})
    assert all(int(value) > 0 for value in chosen.values())


def test_bill_is_what_was_counted_times_its_price() -> None:
    """Everything but the agents' own requests is paid for, at the price of its kind."""
    requests = Counter(
        {"sqs ReceiveMessage updates": 20, "sqs SendMessage updates": 10, "sns Publish topic": 5}
    )
    values = per_event(Used(requests, requests, read_units=4, write_units=40), 10)
    assert values["calls"] == 2.5
    assert values["agents_requests"] == 1
    dollars = 4 * prices.WRITE_UNITS + 0.4 * prices.READ_UNITS
    dollars += 2 * prices.SQS_REQUESTS + 0.5 * prices.SNS_REQUESTS
    assert dollars_per_million(values) == pytest.approx(dollars)
    nothing = Used(Counter(), Counter(), read_units=0, write_units=0)
    with pytest.raises(BenchError, match="no event was sent"):
        per_event(nothing, 10)


def test_ceiling_is_where_the_budget_is_spent() -> None:
    """With messages that gather, and with one for each event: the cost of all is four fifths."""
    event_s, message_s = line({1: 110.0, 2: 60.0, 100: 11.0})
    assert (round(event_s * 1e6), round(message_s * 1e6)) == (10, 100)
    for tasks in PUBLISHING:
        events, fill = ceiling(event_s, message_s, tasks)
        messages = events / fill
        assert events * event_s + messages * message_s == pytest.approx(0.25 * 0.8)
        assert messages == pytest.approx(min(events, tasks / PUBLISH_S))


def test_heavy_tail_is_as_described() -> None:
    """The first of 2,000 projects has an eighth of the events, the last thousand a twelfth."""
    chosen = Counter(HeavyTail(2000).choose(100_000))
    assert chosen["p0"] / 100_000 == pytest.approx(1 / 8, rel=0.05)
    last = sum(chosen[f"p{n}"] for n in range(1000, 2000))
    assert last / 100_000 == pytest.approx(1 / 12, rel=0.05)
    assert HeavyTail(2000).choose(50) == HeavyTail(2000).choose(50)
    assert HeavyTail(2000, seed=2).choose(50) != HeavyTail(2000).choose(50)


def test_small_projects_come_to_their_figures() -> None:
    """A short turn on a real gateway and two, with everything counted that was offered."""
    turn = real_shape_turn(GATEWAY, 2, (50,), projects=200, seconds=1.5)
    idle, busy = turn(1)
    assert idle.parameters["rate"] == 0
    assert "cpu_us_per_event" not in idle.values
    assert busy.values["forwards_per_s"] > 0
    assert busy.values["aws_calls_per_event"] > 1
    assert 5 < busy.values["p50_ms"] <= busy.values["p99_ms"]


@pytest.mark.skipif(not shutil.which("nats-server"), reason="nats-server is not installed")
def test_jetstream_keeps_events_and_forwards() -> None:
    """Viewers of a project get its events, in files or not, and confirmations of forwards."""
    turn = real_shape_turn(JETSTREAM, 1, (50,), projects=200, seconds=1.5)
    _, busy = turn(1)
    assert busy.values["forwards_per_s"] > 0
    assert busy.values["p99_ms"] > 0


def test_what_nobody_wants_is_measured() -> None:
    """Messages between tasks are captured and sent again, as full as asked for."""
    fills = [record.values["events_per_message"] for record in unwanted_turn(GATEWAY)(1)]
    assert fills[:3] == [1, 2, 10]
    assert fills[3] > 100


def test_pairs_are_the_same_turns() -> None:
    """What two revisions are compared in has the same label but for the server's name."""
    other = dataclasses.replace(GATEWAY, name="other")
    pairs = paired_programme(QUICK, other)
    assert [now for (now, _), _ in pairs] == [
        then.replace("other", "gateway with tokens") for _, (then, _) in pairs
    ]


def test_pairs_are_compared_within_a_round(run: Run) -> None:
    """Each figure of both revisions is shown, with the ratio of new to old."""
    run.records[:] = [
        Record("spread", server, round_, {"tasks": 1}, {"cpu_us_per_event": cost * round_})
        for round_ in (1, 2)
        for server, cost in (("new", 150.0), ("old", 300.0))
    ]
    last = report.pairs(run, "new", "old").splitlines()[-1]
    assert "| spread: tasks 1 | cpu_us_per_event | 450 (300-600) | 225 (150-300) |" in last
    assert "0.5x (0.5-0.5)" in last


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="there is no schedstat")
class TestCpuTime:
    """A process's CPU time, as read from outside, is what the process itself says."""

    SPIN = "import sys, threading, time\ndef spin(s):\n while time.process_time() < s: pass\n"
    TELL = "print(time.process_time(), flush=True)\nsys.stdin.read()\n"

    @pytest.mark.parametrize(
        ("work", "error_s"),
        [
            ("spin(0.3)\n", 0.006),
            ("t = threading.Thread(target=spin, args=(0.3,)); t.start(); t.join()\n", 0.025),
        ],
        ids=["living threads", "a thread that has ended"],
    )
    def test_is_what_it_says(self, work: str, error_s: float) -> None:
        process = Process([sys.executable, "-c", self.SPIN + work + self.TELL])
        try:
            said = float(process.read_line())
            assert said > 0.3
            assert process.cpu_s() == pytest.approx(said, abs=error_s)
        finally:
            process.stop()


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


class TestAnswer:
    """What an answer that streams costs."""

    def test_calls_and_dollars(self) -> None:
        """By kind, whatever the queues are called; at the prices of their kinds of queue."""
        calls = {
            "sqs SendMessage agenticai-updates.fifo": 1_000_000,
            "sqs ReceiveMessage agenticai-updates.fifo": 2,
            "sqs ReceiveMessage agenticai-updates-task-7f": 1_000_000,
            "sns Publish agenticai-updates": 1_000_000,
            "dynamodb TransactWriteItems": 4,
        }
        requests = {name: count for name, count in calls.items() if count > 4}
        used = Used(Counter(calls), Counter(requests), 0.0, 1e6)
        found, dollars = answer.calls_and_dollars(used)
        assert [found[kind] for kind in answer.CALLS.values()] == [
            1_000_000,
            0,
            2,
            1_000_000,
            1_000_000,
            0,
            4,
        ]
        assert dollars == pytest.approx(
            prices.SQS_FIFO_REQUESTS
            + prices.SQS_REQUESTS
            + prices.SNS_REQUESTS
            + prices.WRITE_UNITS
        )

    def test_counted(self) -> None:
        """A second of it: pieces are far fewer than tokens, whatever else the machine does."""
        calls, dollars = answer.answer(1.0, 0.04)
        assert 20 <= calls["sqs SendMessage"] <= 25  # 40 ms and a call each, and what is logged
        assert calls["dynamodb TransactWriteItems"] >= 1
        assert 0 < dollars < 0.001
        busy = [sys.executable, "-c", "while True: pass"]
        others = [subprocess.Popen(busy) for _ in range(os.cpu_count() or 1)]
        try:
            assert answer.answer(1.0, 0.04) == (calls, dollars)
        finally:
            for other in others:
                other.kill()
                other.wait()

    def test_page_says_what_was_counted(self) -> None:
        """The table in the guide is the programme's, with a row for each kind of call."""
        page = answer.PAGE.read_text("utf-8")
        part = answer.PART.search(page)
        assert part is not None
        rows = [row.split(" | ")[0].removeprefix("| ") for row in part[0].splitlines()]
        assert list(answer.CALLS) == [row for row in rows if row in answer.CALLS]


class TestVirtualTime:
    """Time that no machine decides."""

    def test_passes_when_nothing_is_left_to_do(self) -> None:
        """An hour takes no time; what threads compute takes none of it."""

        async def hour() -> list[float]:
            threads = virtual_time.Threads()
            times = [time.monotonic()]
            await asyncio.sleep(3600)
            times.append(time.monotonic())
            await asyncio.to_thread(wall_clock_sleep, 0.2)
            times.append(time.monotonic())
            await threads.call(lambda: wall_clock_sleep(0.2))
            times.append(time.monotonic())
            await threads.call(lambda: threads.sleep(60))
            return [*times, time.monotonic()]

        wall_clock_sleep = time.sleep
        began_at = time.monotonic()
        assert virtual_time.run(hour()) == [0, 3600, 3600, 3600, 3660]
        assert time.monotonic() - began_at < 60

    def test_threads(self) -> None:
        """They wait for each other as real ones do; what one raises, its caller gets."""

        async def relay() -> list[float]:
            threads = virtual_time.Threads()
            changed, given, taken = threads.Condition(), list[int](), list[float]()

            def take() -> None:
                with changed:
                    assert not changed.wait_for(lambda: given, 0.5)
                    taken.append(threads.monotonic())
                    assert changed.wait_for(lambda: given) == [1]
                    taken.append(threads.monotonic())

            def give() -> None:
                taker = threads.Thread(target=take)
                taker.start()
                threads.sleep(2)
                with changed:
                    given.append(1)
                    changed.notify()
                taker.join()

            await threads.call(give)
            with pytest.raises(ZeroDivisionError):
                await threads.call(lambda: 1 // 0)
            return taken

        assert virtual_time.run(relay()) == [0.5, 2.0]

    def test_waits_for_what_is_under_way(self) -> None:
        """A byte between two sockets arrives before any timer is due."""

        async def echo() -> list[bytes]:
            async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                while line := await reader.readline():
                    writer.write(line)

            async with await asyncio.start_server(answer, "127.0.0.1", 0) as listener:
                address = listener.sockets[0].getsockname()
                reader, writer = await asyncio.open_connection(*address)
                found = []
                for number in range(100):
                    writer.write(b"%d\n" % number)
                    async with asyncio.timeout(0.001):
                        found.append(await reader.readline())
                writer.close()
                return found

        assert virtual_time.run(echo()) == [b"%d\n" % number for number in range(100)]
