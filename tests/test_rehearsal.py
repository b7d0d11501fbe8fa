"""A rolling deployment behind a real proxy, in small; `make rehearsal` holds the full one."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import server
from tests.chaos.checker import Event
from tests.moto_aws import Platform
from tests.rehearsal import (
    BALANCERS,
    HEALTH_CHECKER,
    NOTICED_SECONDS,
    STOP_TIMEOUT_SECONDS,
    FleetBehindBalancer,
    Gap,
    Mover,
    Report,
    Scenario,
    Trigger,
    crowding,
    installed_balancers,
    longest_gap,
    main,
    missed_and_doubled,
    rehearse,
    start_balancer,
)

NOT_INSTALLED = "neither haproxy nor nginx is installed (Debian: apt-get install haproxy)"
SMALL = Scenario(
    clients=60,
    events=120,
    drain_seconds=4.0,
    trigger=Trigger.TARGET,
    before_seconds=0.5,
    after_seconds=1.5,
)


def events(*seqs: int) -> list[Event]:
    return [Event(seq, 100 + seq, "project_updated", "2025-11-24T12:00:00Z") for seq in seqs]


class TestFigures:
    """The figures say what happened."""

    def test_longest_gap(self) -> None:
        """The longest gap is that of one client, set against what is usual for it."""
        feeds = [([0.0, 1.0, 2.5], 0.5), ([0.0, 0.5, 3.5], 2.0), ([7.0], 1.0), ([], 1.0)]
        assert longest_gap(feeds) == Gap(3.0, 2.0)
        assert str(Gap(3.0, 2.0)) == "3.00 s, 1.5 times the usual"
        assert longest_gap([([7.0], 1.0)]) is None

    @pytest.mark.parametrize(
        ("received", "missed", "doubled"),
        [((1, 2, 3), 0, 0), ((1, 3), 1, 0), ((1, 2, 2, 3, 3, 3), 0, 3), ((), 3, 0), ((1, 1), 2, 1)],
    )
    def test_missed_and_doubled(self, received: tuple[int, ...], missed: int, doubled: int) -> None:
        """What never came and what came again are counted apart."""
        assert missed_and_doubled(events(*received), events(1, 2, 3)) == (missed, doubled)

    def test_crowding(self) -> None:
        """An even return is no crowd, everybody in one second is as many as there are seconds."""
        assert crowding(dict.fromkeys(range(10), 5), 10.0) == 1.0
        assert crowding({3: 50}, 10.0) == 10.0
        assert crowding({}, 10.0) == 0.0


class TestScenario:
    """The constants are those of what is rehearsed."""

    def test_server(self) -> None:
        """The server has noticed by then that its target is deregistered."""
        assert pytest.approx(1.2 * server.TargetHealth.EVERY_S) == NOTICED_SECONDS

    def test_stop_timeout(self) -> None:
        """A drain has as long as the task definition gives it."""
        root = Path(server.__file__).parent
        assert (
            f"StopTimeout: {STOP_TIMEOUT_SECONDS:.0f}" in (root / "ecs-template.yaml").read_text()
        )

    def test_interests(self) -> None:
        """Every project has clients, and every client one to three of them."""
        interests = [SMALL.interests(number) for number in range(SMALL.clients)]
        assert {len(set(projects)) for projects in interests} == {1, 2, 3}
        assert set(itertools.chain(*interests)) == set(SMALL.project_names)
        assert dataclasses.replace(SMALL, projects=1).interests(7) == ["proj_1"]


class TestReport:
    """A rehearsal fails for anything that a client, or an operator, would notice."""

    @pytest.fixture
    def report(self) -> Report:
        report = Report(Scenario(clients=60, drain_seconds=6.0), "a proxy")
        report.reconnects = Counter(dict.fromkeys(range(5, 11), 10))
        report.drain_began, report.drain_ended, report.exit_code = 5.0, 11.5, 0
        return report

    def test_good(self, report: Report) -> None:
        """A good one has no findings, and says so."""
        report.judge()
        assert report.findings == []
        assert str(report).splitlines()[-1] == "ok"
        assert "events missed .... 0" in str(report)

    @pytest.mark.parametrize(
        ("change", "finding"),
        [
            ({"exit_code": 1}, "ended with exit code 1"),
            ({"exit_code": None}, "ended with exit code None"),
            ({"drain_ended": 130.0}, "drained for 125.0 s"),
            ({"drain_began": float("nan")}, "drained for nan s"),
            ({"missed": 1}, "1 events were missed, 0 doubled"),
            ({"doubled": 2}, "0 events were missed, 2 doubled"),
            ({"cut_offs": 3}, "3 connections were lost or refused"),
            ({"reconnects": Counter({5: 59})}, "59 moves were made by 60 clients"),
            ({"reconnects": Counter({5: 50, 6: 10})}, "50 clients came back in one second"),
        ],
    )
    def test_bad(self, report: Report, change: dict[str, Any], finding: str) -> None:
        """Each thing that may go wrong is a finding."""
        for name, value in change.items():
            setattr(report, name, value)
        report.judge()
        assert len(report.findings) == 1
        assert finding in report.findings[0]
        assert str(report).splitlines()[-1] == "FAILED"


class TestMover:
    """A client leaves when it is told to, after the time that it is told."""

    @pytest.fixture
    async def mover(self) -> Mover:
        fleet = FleetBehindBalancer(0, {}, "", 0)
        await fleet.close()
        return Mover(0, ["p"], fleet)

    async def test_told(self, mover: Mover) -> None:
        """Who was told to reconnect has not been cut off."""
        mover.connections = 2
        assert mover.cut_offs == 1
        mover.on_message(json.dumps({"type": "reconnect", "after_ms": 250}))
        assert mover.cut_offs == 0
        assert mover.away_seconds == 0.25


@pytest.mark.skipif(not installed_balancers(), reason=NOT_INSTALLED)
class TestRehearsal:
    """Nobody notices a deployment."""

    @pytest.mark.measures
    async def test_task_is_replaced(self, fifo_platform: Platform) -> None:
        """Clients move to the new task, spread, and none misses an event or gets one twice."""
        report = await rehearse(SMALL, fifo_platform, installed_balancers()[0])
        assert not report.findings, f"\n{report}"
        assert report.delivered > SMALL.events

    @pytest.mark.parametrize("name", list(BALANCERS))
    async def test_checks_and_registration(self, name: str) -> None:
        """The proxy checks who is registered, as the load balancer would, and nobody else."""
        if name not in installed_balancers():
            pytest.skip(f"{name} is not installed")
        checks: Counter[str] = Counter()
        old, old_port = await answer_checks("old", checks)
        new, new_port = await answer_checks("new", checks)
        async with asyncio.timeout(20), old, new, start_balancer(name, old_port) as balancer:
            while not await balancer.healthy("old"):
                await asyncio.sleep(0.05)
            assert await visit(balancer.port) == "old"
            assert set(checks) == {"old"}
            await balancer.register(new_port)
            while not await balancer.healthy("new"):
                await asyncio.sleep(0.05)
            await balancer.deregister()
            assert await balancer.state("old") == "draining"
            assert await visit(balancer.port) == "new"


def test_nothing_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rehearsal says what to install."""
    monkeypatch.setattr("tests.rehearsal.installed_balancers", list)
    monkeypatch.setattr("sys.argv", ["rehearsal"])
    assert main() == 2
    assert "apt-get install haproxy" in capsys.readouterr().err


async def answer_checks(name: str, checks: Counter[str]) -> tuple[asyncio.Server, int]:
    """Serve HTTP: count the balancer's health checks, tell anybody else the server's name."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        if request.startswith("GET /health ") and HEALTH_CHECKER in request:
            checks[name] += 1
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(name)}\r\nConnection: close\r\n\r\n"
        writer.write(f"{head}{name}".encode())
        writer.close()

    listening = await asyncio.start_server(answer, "127.0.0.1", 0)
    return listening, listening.sockets[0].getsockname()[1]


async def visit(port: int) -> str:
    """Who answers a new connection to the balancer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: tasks\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    return answer.decode().rpartition("\r\n\r\n")[2]
