"""Measure the gateway beside its peers: ``python -m bench [--quick] [--only TEXT]``.

Everything is started here, on loopback, and ended again. A full run writes
``bench/results/full.json``, docs/PERFORMANCE.md's tables and docs/images; a quick one writes
``bench/results/quick.json`` and prints its tables.
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
from pathlib import Path

from bench import report
from bench.processes import ROOT, BenchError
from bench.scenarios import FULL, QUICK, Effort, run
from bench.servers import GATEWAYS, PEER_SERVERS, present

# The tables that are not called like the scenario they show.
SCENARIO_OF = {
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


def measure(effort: Effort, only: str) -> report.Run:
    """Take all turns; what does not exist here is listed as absent, with the reason."""
    versions, absent = present([*GATEWAYS, *PEER_SERVERS])
    for name, reason in absent.items():
        print(f"absent: {name}: {reason}", file=sys.stderr)
    when = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    records = list(run(effort, only, absent))
    return report.Run(when, dataclasses.asdict(effort), machine(), versions, absent, records)


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
    parser.add_argument("--report", action="store_true", help="only rewrite the tables and plots")
    arguments = parser.parse_args()
    path = report.RESULTS / ("quick.json" if arguments.quick else "full.json")
    if arguments.report:
        finished = report.Run.load(path)
    else:
        if not sys.platform.startswith("linux"):
            print("the benchmark reads /proc and uses epoll: Linux only", file=sys.stderr)
            return 1
        effort = QUICK if arguments.quick else FULL
        if arguments.rounds:
            effort = dataclasses.replace(effort, rounds=arguments.rounds)
        try:
            finished = measure(effort, arguments.only)
        except BenchError as error:
            print(f"cannot measure: {error}", file=sys.stderr)
            return 1
        if not arguments.only:
            finished.save(path)
    show(finished)
    if not arguments.quick and not arguments.only:
        report.write_document(finished)
        print(f"\nwritten: {path}, {report.DOCUMENT}, {report.IMAGES}/*.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
