"""Texts grow while everything breaks; at no moment may a reader see what the agent did not write.

    python -m tests.streams --seeds 30 --streams 200    # thirty runs
    python -m tests.streams --seed 17                   # one run again

One run is two ``server.py`` processes on the stand-in for AWS, behind a proxy that fails as AWS
fails, two agents on ``agenticai_agent.py``, each a process with many orders under way, and pages on
the real JavaScript client. The pages order texts: random ones with emoji, halves of surrogate
pairs, combining marks and code, written at random speeds. Meanwhile, by a schedule that follows
from the seed, tasks and agents are killed (-9), pages are cut off, reloaded with nothing left but
what an order's confirmation said, and moved to the other task; some orders are stopped, and some
fail once. An agent that works on an order again writes another text.

Every text that a page is given must at every moment be a prefix of what that attempt wrote; a page
watches each project twice, from its log's beginning and, as one that comes in the middle of texts,
from now on: then a prefix of the rest of it, from where that text says that it begins. At the
end the log must hold each text exactly once, and every page, one that comes only then included,
must have the log's texts to the last code unit, with their ends.
"""
