"""Tasks die, clients are cut off, AWS misbehaves; nobody may miss or repeat an event.

    python -m tests.chaos --seeds 100             # one hundred runs
    python -m tests.chaos --seed 17 --faults      # one run again, with faults from AWS

One run is three ``server.py`` processes on moto, thirty clients on five projects spread
over them, and an agent that sends numbered updates. Meanwhile, by a schedule that follows from the
seed, processes are killed, stopped, frozen and started, and clients are cut off in every way that a
network knows. Each client resumes where it was, at any task that is healthy, as a browser would.

At the end the log must hold every update exactly once, and every client must have got exactly what
the log holds, in its order. No queue or subscription of a dead task may be left, and none of a
living one be gone. A process that is told to stop ends with exit code 0 and leaves nothing behind;
a process that ends for any other reason is a failure of the run.
"""
