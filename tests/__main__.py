"""All tests: those that only check side by side, then alone those that measure.

    python -m tests                         # as `make test` does
    python -m tests --again                 # as continuous integration does
    python -m tests --again tests/server    # only these, side by side, without coverage

With ``--again`` each test that failed is run twice more, alone. One that passes both times was
disturbed by the machine: it is a flake, and reported in a line of its own. One that fails again,
if only once, has failed; so has everything if more than `FLAKES_AT_MOST` tests failed at first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAST_FAILED = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"

TESTS = ROOT / "tests"
MEASURES = "@pytest.mark.measures"  # to look for it is quicker than to have pytest read all files

COVERAGE_PERCENT = 99
FLAKES_AT_MOST = 5


def pytest(seed: int, *arguments: str) -> int:
    """Run pytest; return its exit code: 0 if all passed, 1 if some failed, or coverage did.

    Sets have the same order in all workers, as some name their tests by them.
    """
    command = [sys.executable, "-m", "pytest", f"--hypothesis-seed={seed}", *arguments]
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def last_failed() -> list[str]:
    """The ids of the tests that have failed since `LAST_FAILED` was removed."""
    return list(json.loads(LAST_FAILED.read_text("utf-8"))) if LAST_FAILED.exists() else []


def run_all(seed: int, workers: str, paths: Sequence[str]) -> int:
    """Run all tests, or those of some paths; return the highest exit code."""
    by_scope = [
        "--dist",
        "loadscope",
        "--no-loadscope-reorder",
    ]  # in the order of tests/schedule.py
    side_by_side = ["-n", workers, *by_scope, "--durations=10"]
    if paths:
        return pytest(seed, "--no-cov", *side_by_side, *paths)
    enough = f"--cov-fail-under={COVERAGE_PERCENT}"
    checked = pytest(seed, *side_by_side, "-m", "not measures", "--cov=server", enough)
    files = [str(path) for path in TESTS.glob("test_*.py") if MEASURES in path.read_text("utf-8")]
    measured = pytest(seed, "--no-cov", "--durations=10", "-m", "measures", *sorted(files))
    return max(checked, measured)


def only_flakes(failed: list[str], seed: int) -> bool:
    """Run each test twice more; print and return whether none of them fails again."""
    if not 0 < len(failed) <= FLAKES_AT_MOST:
        print(f"{len(failed)} tests failed; up to {FLAKES_AT_MOST} may be flakes.")
        return False
    print(f"Twice more, alone: {len(failed)} that failed.", flush=True)
    options = ["--no-cov", "--quiet", "--no-header"]
    lasting = [test for test in failed if any(pytest(seed, *options, test) for _ in range(2))]
    for test in failed:
        outcome = "failed again" if test in lasting else "flake, passed twice more"
        print(f"{outcome}: {test} (--seed {seed})")
    return not lasting


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests", description="Run all tests.")
    parser.add_argument("paths", nargs="*", help="test files and folders (all)")
    parser.add_argument("--again", action="store_true", help="tell flakes from failures")
    parser.add_argument("--workers", default="4", help="tests side by side (4)")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**32), help="of Hypothesis, and of hashes"
    )
    options = parser.parse_args()
    print(f"The same once more: python -m tests --seed {options.seed}", flush=True)
    LAST_FAILED.unlink(missing_ok=True)
    code = run_all(options.seed, options.workers, options.paths)
    if code == 1 and options.again and only_flakes(last_failed(), options.seed):
        code = 0
    return code


if __name__ == "__main__":
    sys.exit(main())
