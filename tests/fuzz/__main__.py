"""Fuzz each target for its share of the time, each in a process of its own."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS, Target

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).with_name("corpus")
BUILD = ROOT / "build" / "fuzz"
MAX_INPUT_BYTES = 8_192
GRACE_S = 120  # to instrument, to read the corpus, to finish the last input


def keep(name: str, data: bytes) -> Path:
    """Put what a target failed on among the inputs that tests/test_fuzz.py replays."""
    path = CORPUS / name / f"found-{hashlib.sha256(data).hexdigest()[:16]}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


# --- In a target's own process --------------------------------------------------------------


def fuzz_by_coverage(name: str, seconds: int) -> None:
    """Until the time is over, or an input fails: libFuzzer ends the process itself."""
    import atheris  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with atheris.instrument_imports(include=["server", "websockets"]):
        for module in [each for each in sys.modules if re.match(r"server$|websockets|tests", each)]:
            del sys.modules[module]
        from tests.fuzz import targets

    target = targets.TARGETS[name]

    def test_one(data: bytes) -> None:
        try:
            target(data)
        except BaseException:
            print(f"Kept: {keep(name, data)}", file=sys.stderr)
            raise

    work = BUILD / name  # what the corpus grows to; the one in tests/ is only read
    work.mkdir(parents=True, exist_ok=True)
    directories = [str(work), str(CORPUS / name)]
    options = [f"-max_total_time={seconds}", f"-max_len={MAX_INPUT_BYTES}", "-timeout=30"]
    options += [f"-artifact_prefix={BUILD}/", "-print_final_stats=1", "-verbosity=0"]
    atheris.Setup([sys.argv[0], *options, *directories], test_one)
    atheris.Fuzz()


def fuzz_blindly(name: str, target: Target, seconds: int) -> None:
    """The same with bytes that hypothesis invents: corpus inputs with parts of others in them."""
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st

    corpus = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    pieces = st.binary(max_size=64) | st.sampled_from(corpus)
    until = time.monotonic() + seconds
    executions = 0

    @settings(
        max_examples=1_000,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.lists(pieces, max_size=6).map(b"".join))
    def test_some(data: bytes) -> None:
        nonlocal executions
        executions += 1
        if time.monotonic() < until:
            try:
                target(data[:MAX_INPUT_BYTES])
            except BaseException:
                keep(name, data[:MAX_INPUT_BYTES])
                raise

    while time.monotonic() < until:
        test_some()
    print(f"stat::number_of_executed_units: {executions}", file=sys.stderr)


def fuzz(name: str, seconds: int) -> None:
    if importlib.util.find_spec("atheris"):
        fuzz_by_coverage(name, seconds)
    else:
        fuzz_blindly(name, TARGETS[name], seconds)


# --- All of them ----------------------------------------------------------------------------


def executions_in(log: str) -> int:
    counts = re.findall(r"stat::number_of_executed_units:\s+(\d+)", log)
    return int(counts[-1]) if counts else 0


def run(name: str, seconds: int) -> bool:
    """Fuzz one target, and say how it went; whether nothing was found."""
    command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--seconds", str(seconds)]
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            code = process.wait(seconds + GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        output.seek(0)
        log = output.read().decode(errors="replace")
    print(
        f"{name:12}{executions_in(log):12,} executions, {'nothing found' if not code else 'FAILED'}"
    )
    if code:
        print(log[-4_000:])
    return code == 0


def main() -> int:
    """Exit code 1 if an input was found that a target fails on."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="in all, or for the one target")
    parser.add_argument("--target", choices=TARGETS, help="this one alone, in this process")
    arguments = parser.parse_args()
    if arguments.target:
        logging.disable(logging.NOTSET)
        fuzz(arguments.target, arguments.seconds)
        return 0
    guided = importlib.util.find_spec("atheris") is not None
    share_s = max(1, arguments.seconds // len(TARGETS))
    each = datetime.timedelta(seconds=share_s)
    print(f"{each} a target, {'guided by coverage (atheris)' if guided else 'with hypothesis'}:")
    os.environ["PYTHONPATH"] = str(ROOT)
    outcomes = [run(name, share_s) for name in TARGETS]
    return int(not all(outcomes))


if __name__ == "__main__":
    sys.exit(main())
