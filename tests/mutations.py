"""Faults put into server.py, one a section, each of which a test of that section has to find.

    python -m tests.mutations           # all of them
    python -m tests.mutations Drain     # those of one section

It works on a copy. A fault whose text is gone from server.py has to be replaced by another one.
"""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True, slots=True)
class Mutation:
    """A fault: ``old``, which is in server.py exactly once, becomes ``new``.

    Attributes:
        tests: pytest's arguments for the tests of the section, some of which have to fail.
    """

    section: str
    old: str
    new: str
    tests: str


MUTATIONS = [
    Mutation(
        "Errors",
        "return status >= 500 or status == 429",
        "return status > 500 or status == 429",
        "tests/server/test_errors.py",
    ),
    Mutation(
        "Settings",
        "raise SettingsError(faults)",
        "raise SettingsError(faults[:1])",
        "test_server.py tests/server/test_settings.py -k TestSettings",
    ),
    Mutation(
        "Wire",
        "        message.data = Raw(data)\n",
        "        pass\n",
        "tests/server/test_wire.py",
    ),
    Mutation(
        "Access",
        "return project_id in self.projects if project_id is not None else bool(self.projects)",
        "return project_id in self.projects if project_id is not None else True",
        "test_server.py tests/test_access.py -k TestAccess or TestProjects",
    ),
    Mutation(
        "Registry",
        "self.cursor is None or seq != self.cursor + 1:",
        "self.cursor is None or seq > self.cursor + 1:",
        "tests/server/test_registry.py",
    ),
    Mutation(
        "Work and memory",
        "min(started_at + amount / self.share, now + self.WINDOW_S)",
        "started_at + amount / self.share",
        "tests/server/test_work_and_memory.py -k TestAccount",
    ),
    Mutation(
        "Fan-out",
        "                connection.fail(exc)\n\n\n# --- Clients",
        "                pass\n\n\n# --- Clients",
        "tests/server/test_fan_out.py",
    ),
    Mutation(
        "Clients",
        'is_object = body[:1] + body[-1:] in (b"", b"{}")',
        "is_object = True",
        "tests/server/test_clients.py",
    ),
    Mutation(
        "Forwarder",
        "if len(self._waiting) >= self.MAX_WAITING or over_bytes:",
        "if over_bytes:",
        "tests/server/test_forwarder.py -k overloaded",
    ),
    Mutation(
        "Event log",
        '"seq = :before" if before else',
        '"seq >= :before" if before else',
        "test_server.py -k TestEventLog",
    ),
    Mutation(
        "Backplane",
        "position, recovered, found = channel.cursor or 0, False, []",
        "position, recovered, found = channel.cursor or 0, True, []",
        "test_server.py -k TestFeed",
    ),
    Mutation(
        "Metrics",
        '"p50": values[len(values) // 2]',
        '"p50": values[0]',
        "tests/server/test_metrics.py",
    ),
    Mutation(
        "Connection",
        'self.close(CloseCode.INVALID_DATA, "text must be UTF-8")',
        'self.close(CloseCode.PROTOCOL_ERROR, "text must be UTF-8")',
        "test_server.py -k TestConnection",
    ),
    Mutation(
        "Drain",
        "began_at + spread_s * i / len(connections)",
        "began_at + 0 * i / len(connections)",
        "test_server.py -k test_drain",
    ),
    Mutation(
        "Gateway",
        'connection.close(CLOSE_UNAUTHENTICATED, "the token has expired")',
        "connection.warned = True",
        "test_server.py tests/test_access.py -k TestGateway or TestSession",
    ),
    Mutation(
        "Main",
        'python server.py --help", file=sys.stderr)\n        return 2\n',
        'python server.py --help", file=sys.stderr)\n        return 1\n',
        "test_server.py -k TestMain",
    ),
]


def copy_of_the_project(folder: Path) -> None:
    """Copy what git knows."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def is_found(mutation: Mutation, folder: Path) -> bool:
    """Whether a test fails on the fault; print which."""
    source = (ROOT / "server.py").read_text("utf-8")
    if source.count(mutation.old) != 1:
        print(f"{mutation.section}: stale, its text is {source.count(mutation.old)} times there")
        return False
    (folder / "server.py").write_text(source.replace(mutation.old, mutation.new), "utf-8")
    paths, _, names = mutation.tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "--no-cov", "-q", "-x", *paths.split()]
    command += ["-k", names] if names else []
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    print(
        f"{mutation.section}: {found[0] if found else f'NOT FOUND by {mutation.tests}'}", flush=True
    )
    return bool(found)


def main() -> int:
    wanted = sys.argv[1:] or [mutation.section for mutation in MUTATIONS]
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_project(Path(folder))
        found = [is_found(each, Path(folder)) for each in MUTATIONS if each.section in wanted]
    print(f"{sum(found)} of {len(found)} faults found")
    return 0 if found and all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
