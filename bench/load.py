"""The load generator as an object: see load.c for what it does and counts."""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.processes import BenchError, Process, compiled

# What browsers offer. The answer decides whether contexts are kept.
OFFER_DEFLATE = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """What was counted since the last reset. Latencies in milliseconds."""

    open: int
    failed: int
    deflated: int
    deliveries: int
    bytes: int
    answers: int
    errors: int
    seconds: float
    samples: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    confirmed_p50_ms: float
    confirmed_p99_ms: float
    closes: dict[str, int]


class Load:
    """Connections to one server."""

    def __init__(
        self,
        port: int,
        path: str,
        *,
        headers: Sequence[str] = (),
        first_message: str | None = None,
        setup_frames: int = 0,
        marker: str | None = None,
        sample_every: int = 50,
        receive_buffer_bytes: int = 0,
        modulus: int = 0,
        confirmation: str | None = None,
        tokens: Path | None = None,
    ) -> None:
        command: list[str | Path] = [_program(), "-f", str(setup_frames), "-k", str(sample_every)]
        for header in headers:
            command += ["-H", header]
        if first_message is not None:
            command += ["-s", first_message]
        if marker is not None:
            command += ["-m", marker]
        if receive_buffer_bytes:
            command += ["-r", str(receive_buffer_bytes)]
        if modulus:
            command += ["-n", str(modulus)]
        if tokens is not None:
            command += ["-t", tokens]
        if confirmation is not None:
            command += ["-c", confirmation]
        self._process = Process([*command, str(port), path], stdout=subprocess.PIPE)

    def _do(self, command: str, timeout_s: float = 150.0) -> Counted:
        self._process.write_line(command)
        answer: Any = self._process.read_json(timeout_s)
        return Counted(**answer)

    def connect(self, count: int, at_once: int = 100) -> Counted:
        """Open connections and wait for all.

        Raises:
            BenchError: some could not be opened.
        """
        before = self.stats().open
        counted = self._do(f"connect {count} {at_once}")
        if counted.open - before != count:
            raise BenchError(f"{counted.failed} of {count} connections failed")
        return counted

    def storm(self, at_once: int) -> Counted:
        """Reset all connections and open as many again."""
        return self._do(f"storm {at_once}")

    def await_deliveries(self, total: int, timeout_s: float) -> Counted:
        """Wait until `total` deliveries were counted since the last reset."""
        return self._do(f"await {total} {timeout_s}", timeout_s + 5)

    def drain(self, timeout_s: float = 5.0) -> Counted:
        """Wait until nothing more comes."""
        return self._do(f"drain {timeout_s}", timeout_s + 5)

    def forward(self, seconds: float, text: str) -> Counted:
        """Let each connection send `text` and await the confirmation, again and again."""
        return self._do(f"forward {seconds} {text}", seconds + 30)

    def trickle(self, connections: int, period_s: float, text: str = "") -> Counted:
        """From now on, let so many connections send `text` every `period_s` seconds; 0 ends it."""
        return self._do(f"trickle {connections} {period_s} {text}")

    def stall(self, count: int) -> Counted:
        """Stop reading on `count` connections."""
        return self._do(f"stall {count}")

    def resume(self) -> Counted:
        """Read on all connections again."""
        return self._do("resume")

    def reset(self) -> Counted:
        """Forget what was counted."""
        return self._do("reset")

    def stats(self) -> Counted:
        """What was counted so far."""
        return self._do("stats")

    def cpu_s(self) -> float:
        """The generator's own CPU time, to see whether it was the limit."""
        return self._process.cpu_s()

    def close(self) -> None:
        """End it, and with it the connections."""
        self._process.stop()


def _program() -> Path:
    source = Path(__file__).parent / "load.c"
    try:
        return compiled(source, "-lz")
    except BenchError:
        return compiled(source)  # without zlib: no latencies of deflated messages
