"""The gateway under load: a ratio that catches regressions, and clients that stop reading.

The clients are the benchmark's load generator, compiled here; AWS is its stand-in.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from bench.load import Load
from bench.scenarios import connected, measure_bursts
from bench.servers import GATEWAY, WEBSOCKETS, Running, Server, gateway
from tests.talking import Client, client_at

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the load generator needs Linux and a C compiler (cc)",
)


def deliveries_per_cpu_s(server: Server) -> float:
    """In bursts to 2,000 subscribers; for the gateway from the updates queue to the sockets."""
    with server.start(False) as running, connected(running, 2000) as (load, _):
        values = measure_bursts(running, load, 2000, burst=20, size=200, cpu_s=0.3)
    return values["deliveries_per_cpu_s"]


@pytest.mark.measures
def test_fan_out_beside_websockets_broadcast() -> None:
    """Bursts cost a fraction of what ``websockets.broadcast()`` takes for them.

    The benchmark measures more than ten times the deliveries per CPU second; four leaves room for
    a machine that is busy with something else.
    """
    own, other = deliveries_per_cpu_s(GATEWAY), deliveries_per_cpu_s(WEBSOCKETS)
    assert own > 4 * other, f"{own:,.0f} deliveries per CPU second against {other:,.0f}"


def documented_bytes(row: str) -> int:
    """The figure with which a row of the table of bounds in docs/PERFORMANCE.md begins."""
    document = Path(__file__).parent.parent / "docs" / "PERFORMANCE.md"
    section = document.read_text("utf-8").partition("\n## How much memory it can take\n")[2]
    found = re.search(rf"^\| {row} \| ([\d,.]+) (KB|MB)\b", section, re.MULTILINE)
    assert found, f"docs/PERFORMANCE.md has no bound for {row!r}"
    return int(float(found[1].replace(",", "")) * {"KB": 1 << 10, "MB": 1 << 20}[found[2]])


class StallingClient:
    """A WebSocket client that remembers what it saw, stops reading, and comes back for the rest."""

    RECEIVE_BUFFER_BYTES = 8192

    def __init__(self, running: Running) -> None:
        self._port, self._path = running.port, running.path
        self._sockets = contextlib.ExitStack()
        self._epoch = ""
        self.seqs: list[int] = []
        self.recovered: bool | None = None
        self._client = self._connected(self._path)
        self.read_until(0)

    def _connected(self, path: str) -> Client:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.RECEIVE_BUFFER_BYTES)
        sock.connect(("127.0.0.1", self._port))
        url = f"ws://127.0.0.1:{self._port}{path}"
        return self._sockets.enter_context(client_at(url, sock=sock, compression=None, max_queue=1))

    def read_until(self, seq: int) -> None:
        """Read up to an event; for 0, up to the confirmation of the subscription."""
        while not self._epoch or (self.seqs or [0])[-1] < seq:
            self._read()

    def read_to_the_end(self) -> int | None:
        """Read what is still there, and return the close code."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self._read()
        return self._client.close_code()

    def _read(self) -> None:
        message = self._client.receive()
        if message["type"] == "subscription_confirmed":
            self._epoch, self.recovered = message["epoch"], message.get("recovered")
        elif message["type"] == "project_updated":
            self.seqs.append(message["seq"])

    def resume(self, last: int) -> None:
        """Come back with the seq it saw last, and read up to the event `last`."""
        self._client = self._connected(f"{self._path}&since={self.seqs[-1]}&epoch={self._epoch}")
        self.read_until(last)

    def close(self) -> None:
        self._sockets.close()


@pytest.mark.measures
class TestSlowReaders:
    """200 of 2,000 clients stop reading while events flow."""

    SLOW, QUICK = 200, 1800
    SAMPLE = 10  # of the slow, that remember what they saw
    BURST = 5
    EVENT_BYTES = 32_768  # large: the kernel, too, buffers megabytes for each of them
    BACKLOG_BYTES = 262_144
    UNREAD_BYTES = SLOW * (
        BACKLOG_BYTES + BURST * EVENT_BYTES
    )  # a backlog, and what comes meanwhile

    @pytest.fixture
    def running(self) -> Iterator[Running]:
        with gateway(False, {"MAX_BACKLOG_BYTES": str(self.BACKLOG_BYTES)}) as running:
            yield running

    @pytest.fixture
    def stalled(self, running: Running) -> Iterator[Load]:
        with contextlib.closing(running.load(receive_buffer_bytes=8192)) as load:
            load.connect(self.SLOW - self.SAMPLE)
            load.stall(self.SLOW - self.SAMPLE)
            yield load

    @pytest.fixture
    def sample(self, running: Running) -> Iterator[list[StallingClient]]:
        with contextlib.ExitStack() as stack:
            yield [
                stack.enter_context(contextlib.closing(StallingClient(running)))
                for _ in range(self.SAMPLE)
            ]

    def slow_consumers_closed(self, running: Running) -> int:
        url = f"http://127.0.0.1:{running.port}/stats"
        with urllib.request.urlopen(url, timeout=10) as response:
            return int(json.load(response)["SlowConsumersClosed"])

    def memory_bound(self) -> int:
        """What docs/PERFORMANCE.md allows here: the terms of its sum that this test can reach.

        Nobody sends messages, forwards or catches up, and one project has listeners.
        """
        return (
            documented_bytes("the process itself")
            + (self.SLOW + self.QUICK) * documented_bytes("a connection")
            + self.UNREAD_BYTES
            + documented_bytes("events that were delivered or read, for clients that come back")
            + self.BURST * self.EVENT_BYTES  # updates in hand
        )

    def test_cost_the_others_nothing(
        self, running: Running, stalled: Load, sample: list[StallingClient]
    ) -> None:
        """Memory stays bounded, the others get all, the slow are closed with 1013 and resume."""
        with connected(running, self.QUICK) as (readers, _):
            idle = peak = running.process.rss_bytes()
            events = 0
            deadline = time.monotonic() + 60
            while self.slow_consumers_closed(running) < self.SLOW:
                assert time.monotonic() < deadline, "the slow are still connected"
                running.feed.publish(self.BURST, self.EVENT_BYTES)
                events += self.BURST
                expected = events * self.QUICK
                assert readers.await_deliveries(expected, 20).deliveries == expected
                peak = max(peak, running.process.rss_bytes())
                for client in sample[events // self.BURST :]:  # one more stops at each burst
                    client.read_until(events)
            running.feed.publish(self.BURST, self.EVENT_BYTES)  # which those who were closed miss
            events += self.BURST
            expected = events * self.QUICK
            assert readers.await_deliveries(expected, 20).deliveries == expected
            bound = self.memory_bound()
            assert peak < bound, f"{peak >> 20} MiB, where {bound >> 20} are documented"
            assert peak - idle < self.UNREAD_BYTES / 4, "what is unread is not shared"
            assert readers.stats().open == self.QUICK
        stalled.resume()
        assert stalled.drain(10).closes == {"1013": self.SLOW - self.SAMPLE}
        self.resume_where_they_were(sample, events)
        with contextlib.closing(running.load(path=f"{running.path}&since=0")) as resumed:
            resumed.connect(self.SLOW - self.SAMPLE)
            expected = events * (self.SLOW - self.SAMPLE)
            assert resumed.await_deliveries(expected, 20).deliveries == expected

    def resume_where_they_were(self, sample: list[StallingClient], events: int) -> None:
        """Each is closed with 1013, and gets the rest once and in order."""
        assert {client.read_to_the_end() for client in sample} == {1013}
        for client in sample:
            assert client.seqs[-1] < events
            client.resume(events)
            assert client.recovered is True
            assert client.seqs == list(range(1, events + 1))
