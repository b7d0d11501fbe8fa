"""The command line: ``python -m tests.chaos --help``."""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import dataclasses
import functools
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from tests.chaos.fleet import ROOT
from tests.chaos.plan import STANDARD, Plan, Scale, make_plan
from tests.chaos.run import ChaosError, Outcome, run_on_moto, run_on_stand_in
from tests.fault_proxy import Call
from tests.moto_aws import MotoAws


def record(calls: Counter[Call], path: Path) -> None:
    """Write every call that was made, one JSON object a line, sorted, as a policy would name it.

    The queues of all tasks are one resource, and so are the subscriptions of a topic.
    """
    named: Counter[Call] = Counter()
    for call, count in calls.items():
        resource = re.sub(r"-task-[^:/]*$", "-task-*", call.resource)
        resource = re.sub(r":[0-9a-f]{8}-[0-9a-f-]{27}$", ":*", resource)
        named[dataclasses.replace(call, resource=resource)] += count
    lines = [
        json.dumps({**dataclasses.asdict(call), "count": count})
        for call, count in sorted(named.items())
    ]
    path.write_text("".join(f"{line}\n" for line in lines))


def script_of(revision: str) -> Path:
    """The server as it was at a revision, in a file that is gone when this process ends."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    path = Path(folder.name) / "server.py"
    command = ["git", "show", f"{revision}:server.py"]
    path.write_bytes(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return path


def run_seeds(options: argparse.Namespace) -> bool:
    """Run the seeds asked for, one line each; return whether all went well."""
    seeds = [options.seed] if options.seed is not None else range(1, options.seeds + 1)
    scale = Scale(
        clients=options.clients,
        projects=options.projects,
        updates=options.updates,
        seconds=STANDARD.seconds * options.updates / STANDARD.updates,
        visibility_timeout_seconds=options.visibility_timeout,
        scripts=("server.py", *([str(script_of(options.beside))] if options.beside else [])),
    )
    run: Callable[[Plan], Coroutine[Any, Any, Outcome]]
    calls: Counter[Call] = Counter()
    passed: list[int] = []
    failed: list[int] = []
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        if options.aws == "moto":
            aws = stack.enter_context(MotoAws.start())
            run = functools.partial(run_on_moto, aws=aws)
        else:
            run = run_on_stand_in
        for seed in seeds:
            faults = seed % 4 >= 2 if options.faults == "mixed" else options.faults == "on"
            try:
                outcome = asyncio.run(run(make_plan(seed, faults=faults, scale=scale)))
            except ChaosError as failure:
                failed.append(seed)
                print(failure, flush=True)
            except KeyboardInterrupt:
                print(f"seed {seed} interrupted")
                break
            else:
                passed.append(seed)
                calls += outcome.calls
                print(outcome, flush=True)
    if options.record is not None:
        record(calls, options.record)
    minutes = (time.monotonic() - started) / 60
    print(
        f"{len(passed)} of {len(seeds)} seeds ok in {minutes:.1f} min"
        + (f"; failed: {', '.join(map(str, failed))}" if failed else "")
    )
    return len(passed) == len(seeds)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill tasks, cut clients off, disturb AWS; see that no event is lost, doubled "
        "or out of order.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (3)")
    parser.add_argument("--seed", type=int, metavar="N", help="this seed alone")
    parser.add_argument(
        "--faults",
        nargs="?",
        const="on",
        default="off",
        choices=["on", "off", "mixed"],
        help="faults from AWS: on, off (the default), or for every other pair of seeds",
    )
    parser.add_argument(
        "--beside",
        metavar="REVISION",
        help="every other task runs the server of this revision, as in a deployment or a rollback",
    )
    parser.add_argument("--clients", type=int, default=STANDARD.clients, metavar="N")
    parser.add_argument("--projects", type=int, default=STANDARD.projects, metavar="N")
    parser.add_argument("--updates", type=int, default=500, metavar="N", help="updates sent (500)")
    parser.add_argument(
        "--visibility-timeout",
        type=int,
        default=2,
        metavar="S",
        help="of the updates queue: how long a killed task holds an update (2)",
    )
    parser.add_argument(
        "--aws",
        default="moto",
        choices=["moto", "standin"],
        help="moto (the default), or the fast stand-in",
    )
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the AWS calls made")
    options = parser.parse_args()
    # However it is told to end, it takes its processes with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    return 0 if run_seeds(options) else 1


if __name__ == "__main__":
    sys.exit(main())
