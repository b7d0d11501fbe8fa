"""The gateway under load: a ratio that catches regressions, and clients that stop reading.

The clients are the benchmark's load generator, compiled here; AWS is its stand-in.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator

import pytest

from bench.load import Load
from bench.scenarios import connected, measure_bursts
from bench.servers import GATEWAY, WEBSOCKETS, Running, Server, gateway

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the load generator needs Linux and a C compiler (cc)",
)


def deliveries_per_cpu_s(server: Server) -> float:
    """In bursts to 2,000 subscribers; for the gateway from the updates queue to the sockets."""
    with server.start(False) as running, connected(running, 2000) as (load, _):
        values = measure_bursts(running, load, 2000, burst=20, size=200, cpu_s=0.3)
    return values["deliveries_per_cpu_s"]


def test_fan_out_beside_websockets_broadcast() -> None:
    """Bursts cost a fraction of what ``websockets.broadcast()`` takes for them.

    The benchmark measures more than ten times the deliveries per CPU second; four leaves room for
    a machine that is busy with something else.
    """
    own, other = deliveries_per_cpu_s(GATEWAY), deliveries_per_cpu_s(WEBSOCKETS)
    assert own > 4 * other, f"{own:,.0f} deliveries per CPU second against {other:,.0f}"


class TestSlowReaders:
    """200 of 2,000 clients stop reading while events flow."""

    SLOW, QUICK = 200, 1800
    BURST = 5
    EVENT_BYTES = 32_768  # large: the kernel, too, buffers megabytes for each of them
    BACKLOG_BYTES = 262_144

    @pytest.fixture
    def running(self) -> Iterator[Running]:
        with gateway(False, {"MAX_BACKLOG_BYTES": str(self.BACKLOG_BYTES)}) as running:
            yield running

    @pytest.fixture
    def stalled(self, running: Running) -> Iterator[Load]:
        with contextlib.closing(running.load(receive_buffer_bytes=8192)) as load:
            load.connect(self.SLOW)
            load.stall(self.SLOW)
            yield load

    def slow_consumers_closed(self, running: Running) -> int:
        url = f"http://127.0.0.1:{running.port}/stats"
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(json.load(response)["SlowConsumersClosed"])

    def test_cost_the_others_nothing(self, running: Running, stalled: Load) -> None:
        """Memory stays bounded, the others get all, the slow are closed with 1013 and resume."""
        with connected(running, self.QUICK) as (readers, _):
            idle = peak = running.process.rss_bytes()
            events, deadline = 0, time.monotonic() + 60
            while self.slow_consumers_closed(running) < self.SLOW:
                assert time.monotonic() < deadline, "the slow are still connected"
                running.feed.publish(self.BURST, self.EVENT_BYTES)
                events += self.BURST
                expected = events * self.QUICK
                assert readers.await_deliveries(expected, 20).deliveries == expected
                peak = max(peak, running.process.rss_bytes())
            bound = self.SLOW * (self.BACKLOG_BYTES + self.BURST * self.EVENT_BYTES)
            assert peak - idle < 1.5 * bound, f"{(peak - idle) >> 20} MiB more than idle"
            assert readers.stats().open == self.QUICK
        stalled.resume()
        assert stalled.drain(10).closes == {"1013": self.SLOW}
        with contextlib.closing(running.load(path=f"{running.path}&since=0")) as resumed:
            resumed.connect(self.SLOW)
            expected = events * self.SLOW
            assert resumed.await_deliveries(expected, 20).deliveries == expected
