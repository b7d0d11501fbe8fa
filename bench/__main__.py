"""Measure the gateway beside its peers: ``python -m bench [--quick] [--only TEXT]``.

Everything is started here, on loopback, and ended again. A full run writes
``bench/results/full.json``, docs/PERFORMANCE.md's tables and docs/images; a quick one writes
``bench/results/quick.json`` and prints its tables.

``--against REVISION`` measures the gateway beside itself, as it was at a git revision: the two take
turns, and what is printed is the ratio of each figure, round by round.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from bench import report
from bench.processes import ROOT, BenchError
from bench.programme import FULL, QUICK, Effort, run, run_paired
from bench.scenarios import Record
from bench.servers import (
    GATEWAYS,
    JETSTREAM,
    PEER_SERVERS,
    TOKENS_GATEWAY,
    Server,
    gateway_of,
    present,
)

# The tables that are not called like the scenario they show.
SCENARIO_OF = {
    "real-shape": "real shape",
    "small-targets": "real shape",
    "cluster": "unwanted",
    "handshakes": "handshake",
    "connections": "fan-out",
    "latency": "fan-out",
    "sizes": "deflated",
    "projects": "idle projects",
}


def machine() -> dict[str, str]:
    """What the figures depend on."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{model[1] if model else platform.machine()}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GB",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "revision": _revision(),
    }


def _revision() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def measure(effort: Effort, only: str, partial: Path | None) -> report.Run:
    """Take all turns; what does not exist here is listed as absent, with the reason.

    What there is so far is in `partial` after each measurement.
    """
    versions, absent = present([*GATEWAYS, *PEER_SERVERS, JETSTREAM])
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}", file=sys.stderr)
    return collect(effort, versions, absent, run(effort, only, absent), partial)


def measure_pair(effort: Effort, only: str, other: Server) -> report.Run:
    """Take all turns that can be compared with another revision."""
    versions, absent = present([TOKENS_GATEWAY, other])
    finished = collect(effort, versions, absent, run_paired(effort, only, absent, other))
    for label, reason in absent.items():
        print(f"failed: {label}: {reason}", file=sys.stderr)
    return finished


def collect(
    effort: Effort,
    versions: dict[str, str],
    absent: dict[str, str],
    records: Iterator[Record],
    partial: Path | None = None,
) -> report.Run:
    """Take all records; whoever cuts a long run off finds those that were taken in `partial`."""
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    taken = report.Run(when, dataclasses.asdict(effort), machine(), versions, absent, [])
    for record in records:
        taken.records.append(record)
        if partial:
            taken.save(partial)
    return taken


def show(finished: report.Run) -> None:
    """Print the tables that have anything in them."""
    scenarios = {r.scenario for r in finished.records}
    for name, make in report.TABLES.items():
        if SCENARIO_OF.get(name, name) in scenarios or name == "targets":
            print(f"\n{name}\n{make(finished)}")


def main() -> int:
    """Exit codes: 0 measured, 1 nothing could be measured here."""
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="two short rounds with fewer clients")
    parser.add_argument("--only", default="", metavar="TEXT", help="turns whose label holds TEXT")
    parser.add_argument("--rounds", type=int, help="instead of the usual number")
    parser.add_argument(
        "--seconds",
        type=float,
        help="of events at each rate; a tenth of it of CPU time elsewhere",
    )
    parser.add_argument("--against", metavar="REVISION", help="only compare with this git revision")
    parser.add_argument(
        "--report",
        action="store_true",
        help="only rewrite the tables and plots, of the last run, even if it was cut off",
    )
    arguments = parser.parse_args()
    path = report.RESULTS / ("quick.json" if arguments.quick else "full.json")
    partial = path.with_suffix(".partial.json")
    if arguments.report:
        finished = report.Run.load(partial if partial.exists() else path)
    else:
        if not sys.platform.startswith("linux"):
            print("the benchmark reads /proc and uses epoll: Linux only", file=sys.stderr)
            return 1
        effort = QUICK if arguments.quick else FULL
        if arguments.rounds:
            effort = dataclasses.replace(effort, rounds=arguments.rounds)
        if arguments.seconds:
            seconds = arguments.seconds
            effort = dataclasses.replace(effort, seconds=seconds, cpu_s=seconds / 10)
        try:
            if arguments.against:
                other = gateway_of(arguments.against)
                finished = measure_pair(effort, arguments.only, other)
                print(report.pairs(finished, TOKENS_GATEWAY.name, other.name))
                return 0
            finished = measure(effort, arguments.only, None if arguments.only else partial)
        except BenchError as error:
            print(f"cannot measure: {error}", file=sys.stderr)
            return 1
        if not arguments.only:
            finished.save(path)
            partial.unlink(missing_ok=True)
    show(finished)
    if not arguments.quick and not arguments.only:
        report.write_document(finished)
        print(f"\nwritten: {path}, {report.DOCUMENT}, {report.IMAGES}/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
