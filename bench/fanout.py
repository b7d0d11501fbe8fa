"""The gateway beside ``websockets.broadcast()``, in a minute: ``python -m bench.fanout``.

Memory of an idle connection, handshakes, and fan-out of bursts, each per CPU second of the server
process. ``python -m bench`` measures more, and more carefully.
"""

from __future__ import annotations

import argparse
import sys

from bench.processes import BenchError
from bench.report import number, table
from bench.scenarios import connected, measure_bursts
from bench.servers import GATEWAY, WEBSOCKETS, Server

BURSTS = (1, 20)
EVENT_BYTES = 200


def measure(server: Server, connections: int, cpu_s: float) -> dict[str, float]:
    """One turn: connect all, look at memory, then send bursts."""
    with server.start(False) as running, connected(running, connections) as (load, opened):
        rows = {
            f"KB of memory, idle connection of {connections:,}": opened["idle_kb"],
            "CPU ms, handshake": opened["handshake_cpu_ms"],
        }
        for burst in BURSTS:
            values = measure_bursts(running, load, connections, burst, EVENT_BYTES, cpu_s)
            label = "one at a time" if burst == 1 else f"bursts of {burst}"
            rows[f"deliveries per CPU second, {label}"] = values["deliveries_per_cpu_s"]
        return rows


def main() -> int:
    """Exit codes: 0 measured, 1 it cannot be measured here."""
    parser = argparse.ArgumentParser(prog="python -m bench.fanout", description=__doc__)
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--cpu-seconds", type=float, default=1.0, help="of each measurement")
    arguments = parser.parse_args()
    try:
        own, other = (
            measure(server, arguments.connections, arguments.cpu_seconds)
            for server in (GATEWAY, WEBSOCKETS)
        )
    except BenchError as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 1
    rows = [(k, number(own[k]), number(other[k]), f"{own[k] / other[k]:.2f}x") for k in own]
    print(table(("", "gateway", "websockets.broadcast()", "ratio"), rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
