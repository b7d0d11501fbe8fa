"""Run Autobahn's fuzzing client against the gateway's connections, and judge what it says."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "conformance"
PACKAGES = BUILD / "packages"
REQUIREMENTS = Path(__file__).with_name("requirements.txt")
CASES = (
    *("1.*", "2.*", "3.*", "4.*", "5.*", "6.*", "7.*", "10.*"),
    *(f"12.{number}.*" for number in range(1, 6)),
    *(f"13.{number}.*" for number in range(1, 8)),
)
"""All but 9 (limits of size, which here are a setting); those of compression take the longest."""

AT_ONCE = 6  # the suite waits for each echo before it sends the next
AGENT = "server.py"

GOOD = {"OK", "INFORMATIONAL"}

NON_STRICT = {
    *("3.2", "3.3", "3.4", "4.1.3", "4.1.4", "4.1.5", "4.2.3", "4.2.4", "4.2.5", "5.15"),
    *("6.4.1", "6.4.2", "6.4.3", "6.4.4"),
}
FAILED = {"7.1.5"}
"""What the library that parses the frames documents of itself.

Source: websockets, compliance/README.rst, "Conformance notes". NON-STRICT: an error is noticed
before the message before it was echoed, or invalid UTF-8 at a message's end instead of in its
middle. 7.1.5 fails: a close frame in the middle of a fragmented message is a protocol error, 1002.
3.4, 4.1.5 and 4.2.5 are 3.3, 4.1.4 and 4.2.4 an octet at a time: the same, when a busy machine
reads the octets together.
"""

WSTEST = (
    "import site; site.addsitedir({packages!r}); from autobahntestsuite import wstest; wstest.run()"
)


class Unavailable(Exception):
    """There is nothing to run the suite with; the message says why."""


def python27() -> str:
    """A Python 2.7 that works.

    Raises:
        Unavailable: there is none.
    """
    installed = sorted(Path.home().glob(".pyenv/versions/2.7.*/bin/python"))
    for candidate in (os.environ.get("PYTHON27"), shutil.which("python2.7"), *map(str, installed)):
        if candidate:
            command = [candidate, "-c", "import sys, pip; print(sys.version_info[:2] == (2, 7))"]
            with contextlib.suppress(OSError):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.stdout.strip() == "True":
                    return candidate
    raise Unavailable("there is no Python 2.7 with pip here (PYTHON27=/path/to/python names one)")


def install(python: str) -> None:
    """Put Autobahn's suite into the build directory, unless it is there.

    Raises:
        Unavailable: it cannot be had.
    """
    wanted = REQUIREMENTS.read_bytes()
    installed = PACKAGES / "installed.txt"
    if installed.exists() and installed.read_bytes() == wanted:
        return
    shutil.rmtree(PACKAGES, ignore_errors=True)
    command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    command += ["--require-hashes", "--target", str(PACKAGES), "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"Autobahn's suite cannot be installed: {done.stderr.strip()[-500:]}")
    installed.write_bytes(wanted)


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """The port of an echo server that runs as long as it is needed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.conformance.echo"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.communicate()  # the end of its stdin is its end


def run_suite(python: str, port: int, cases: str) -> Mapping[str, Mapping[str, Any]]:
    """What the fuzzing client says about each of these cases.

    Raises:
        Unavailable: it does not work here.
    """
    work = BUILD / "reports" / cases.strip(".*")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    spec = {
        "outdir": str(work),
        "servers": [{"agent": AGENT, "url": f"ws://127.0.0.1:{port}/ws"}],
        "cases": [cases],
        "exclude-cases": [],
        "exclude-agent-cases": {},
    }
    spec_file = work / "fuzzingclient.json"
    spec_file.write_text(json.dumps(spec), "utf-8")
    program = WSTEST.format(packages=str(PACKAGES))
    command = [python, "-c", program, "--mode", "fuzzingclient", "--spec", str(spec_file)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    index = work / "index.json"
    if not index.exists():
        raise Unavailable(f"Autobahn's suite does not run: {done.stderr.strip()[-500:]}")
    found: dict[str, dict[str, Any]] = json.loads(index.read_text("utf-8"))[AGENT]
    return found


def run_all(python: str, port: int, groups: Sequence[str]) -> dict[str, Mapping[str, Any]]:
    """The same for several groups of cases, a few of them at once."""
    found: dict[str, Mapping[str, Any]] = {}
    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        for group in pool.map(lambda cases: run_suite(python, port, cases), groups):
            found |= group
    return found


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One case: how the connection behaved, and how it ended."""

    case: str
    behavior: str
    closing: str

    @property
    def good(self) -> bool:
        return self.behavior in GOOD and self.closing in GOOD

    @property
    def documented(self) -> bool:
        """Whether the library says of itself that it does so."""
        if self.case in FAILED:
            return True
        return self.case in NON_STRICT and {self.behavior, self.closing} <= GOOD | {"NON-STRICT"}


def verdicts(found: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """In the order of the cases' numbers."""
    ordered = sorted(found, key=lambda case: [int(part) for part in re.findall(r"\d+", case)])
    return [
        Verdict(case, found[case]["behavior"], found[case]["behaviorClose"]) for case in ordered
    ]


def report(judged: Sequence[Verdict]) -> str:
    counts = Counter(verdict.behavior for verdict in judged)
    lines = [
        f"{len(judged)} cases: " + ", ".join(f"{n} {name}" for name, n in sorted(counts.items()))
    ]
    for verdict in judged:
        if not verdict.good:
            why = "as websockets documents" if verdict.documented else "NOT DOCUMENTED"
            lines.append(f"  {verdict.case:9}{verdict.behavior}, closing {verdict.closing}: {why}")
    return "\n".join(lines)


def main() -> int:
    """Exit code 1 if a case is neither good nor documented; 0 also where it cannot be run."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("cases", nargs="*", default=CASES, help="such as 1.* or 7.1.5")
    arguments = parser.parse_args()
    try:
        python = python27()
        install(python)
        with echo_server() as port:
            judged = verdicts(run_all(python, port, arguments.cases))
    except Unavailable as exc:
        print(f"Skipped: {exc}.")
        return 0
    print(report(judged))
    print(f"In detail: {BUILD / 'reports'}")
    return int(not judged or any(not (each.good or each.documented) for each in judged))


if __name__ == "__main__":
    sys.exit(main())
