"""Server processes of a measurement: started on loopback, measured through /proc, ended again."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "bench"
START_S = 30.0
STOP_S = 5.0

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class BenchError(Exception):
    """A measurement that cannot be had; the message says why."""


class Process:
    """One process and its children. Standard error goes to a file, shown when it fails."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        *,
        stdout: int | IO[bytes] = subprocess.PIPE,
    ) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=self.errors,
            bufsize=0,  # or `select` would not see a line that was read ahead
            start_new_session=True,  # ctrl-C is for the harness, which ends the others
        )

    def write_line(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()

    def read_line(self, timeout_s: float = START_S) -> str:
        """The next line of standard output.

        Raises:
            BenchError: nothing came in time, or the process has ended.
        """
        assert self.process.stdout is not None
        readable, _, _ = select.select([self.process.stdout], [], [], timeout_s)
        line = self.process.stdout.readline().decode() if readable else ""
        if not line:
            raise BenchError(f"{self.process.args!r} says nothing: {self.complaint()}")
        return line

    def read_json(self, timeout_s: float = START_S) -> Any:
        return json.loads(self.read_line(timeout_s))

    def complaint(self) -> str:
        """The end of what it wrote to standard error."""
        self.errors.seek(0)
        return self.errors.read().decode(errors="replace")[-2000:].strip() or "no message"

    def cpu_s(self) -> float:
        """User and system time of the process and its living children, in seconds."""
        seconds = 0.0
        for pid in _family(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                seconds += _cpu_s(pid)
        return seconds

    def rss_bytes(self) -> int:
        """Resident memory of the process and its living children."""
        pages = 0
        for pid in _family(self.process.pid):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * _PAGE_BYTES

    def stop(self) -> None:
        """End it, by force if it does not want to."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
        self.errors.close()


def _cpu_s(pid: int) -> float:
    """To the nanosecond by the living threads; in ticks where ended ones took more along."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticked = (int(fields[11]) + int(fields[12])) * _TICK_S
    exact = 0
    for thread in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            exact += int(thread.read_text().split()[0])
    return exact / 1e9 if exact / 1e9 > ticked - _TICK_S else ticked


def _family(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for child in thread.read_text().split():
                yield from _family(int(child))


def compiled(source: Path, *libraries: str) -> Path:
    """Compile a C program unless that was done since it changed; the path of the executable.

    Raises:
        BenchError: there is no compiler, or it complains.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / source.stem
    if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
        return program
    command = ["cc", "-O2", "-o", str(program), str(source), *libraries]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise BenchError("no C compiler (cc)") from None
    if done.returncode:
        raise BenchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return program


def wait_until(what: str, condition: Any, timeout_s: float = START_S) -> None:
    """Poll `condition` until it is true.

    Raises:
        BenchError: `what` did not happen in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise BenchError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.02)
