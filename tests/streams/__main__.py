"""Command line of the streams test."""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import time

from tests.streams.run import StreamsError, run


def run_seeds(seeds: list[int], streams: int) -> bool:
    """Run the seeds, one line each; return whether all went well."""
    failed: list[int] = []
    started = time.monotonic()
    for number, seed in enumerate(seeds, start=1):
        try:
            outcome = asyncio.run(run(seed, streams))
            print(outcome, flush=True)
            if not outcome.middle:  # of a few orders it depends on the machine
                raise StreamsError(f"seed {seed}: no page came in the middle of a text")
        except StreamsError as failure:
            failed.append(seed)
            print(failure, flush=True)
        except KeyboardInterrupt:
            print(f"seed {seed} interrupted")
            seeds = seeds[: number - 1]
            break
    minutes = (time.monotonic() - started) / 60
    print(
        f"{len(seeds) - len(failed)} of {len(seeds)} seeds ok in {minutes:.1f} min"
        + (f"; failed: {', '.join(map(str, failed))}" if failed else "")
    )
    return not failed


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.streams",
        description="Kill tasks and agents, cut and reload pages, disturb AWS; see that every "
        "text is at every moment a prefix of what its agent wrote, and whole at the end.",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (3)")
    parser.add_argument("--first", type=int, default=1, metavar="N", help="begin with this one (1)")
    parser.add_argument("--seed", type=int, metavar="N", help="this seed alone")
    parser.add_argument("--streams", type=int, default=200, metavar="N", help="orders (200)")
    options = parser.parse_args()
    seeds = (
        list(range(options.first, options.seeds + 1)) if options.seed is None else [options.seed]
    )
    # However it is told to end, it takes its processes with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    return 0 if run_seeds(seeds, options.streams) else 1


if __name__ == "__main__":
    sys.exit(main())
