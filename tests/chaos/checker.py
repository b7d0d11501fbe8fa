"""What was received against what was logged, and what was logged against what was sent.

This module knows no processes, no sockets and no AWS.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
from collections import Counter
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event, as logged or as received. ``where`` says over which connection it came."""

    seq: int
    number: int
    type: str
    timestamp: str
    where: str = dataclasses.field(default="", compare=False)


class Kind(enum.Enum):
    """How a feed first departs from the log."""

    MISSING = "missing"
    DOUBLED = "doubled"
    SWAPPED = "out of order"
    ALTERED = "altered"
    UNKNOWN = "not in the log"


@dataclasses.dataclass(frozen=True, slots=True)
class Divergence:
    """The first place where a feed departs from the log."""

    kind: Kind
    index: int
    text: str

    def __str__(self) -> str:
        return f"{self.kind.value} at event {self.index}: {self.text}"


def first_divergence(received: Sequence[Event], logged: Sequence[Event]) -> Divergence | None:
    """Compare a feed with the part of the log it should be; None when they are the same."""
    for index, (got, due) in enumerate(itertools.zip_longest(received, logged)):
        if got == due:
            continue
        if got is None:
            assert due is not None
            rest = len(logged) - index
            return Divergence(
                Kind.MISSING, index, f"seq {due.seq} and all after it ({rest}) never came"
            )
        before = next((i for i, e in enumerate(received[:index]) if e.seq == got.seq), None)
        if before is not None:
            first = received[before]
            return Divergence(
                Kind.DOUBLED,
                index,
                f"seq {got.seq} came {_via(got)} after it had come {_via(first)}",
            )
        if due is None:
            return Divergence(
                Kind.UNKNOWN, index, f"seq {got.seq} (update {got.number}) came {_via(got)}"
            )
        if got.seq == due.seq:
            return Divergence(Kind.ALTERED, index, f"logged {due}, but came {got}")
        later = next((i for i, e in enumerate(received) if i > index and e.seq == due.seq), None)
        if later is not None:
            return Divergence(
                Kind.SWAPPED,
                index,
                f"seq {got.seq} came {_via(got)} where seq {due.seq} was due, "
                f"which came {_via(received[later])}, {later - index} later",
            )
        return Divergence(
            Kind.MISSING,
            index,
            f"seq {due.seq} (update {due.number}) never came; "
            f"seq {got.seq} came {_via(got)} in its place",
        )
    return None


def _via(event: Event) -> str:
    return f"by {event.where}" if event.where else "once"


def log_faults(
    project: str, logged: Sequence[Event], head: int, sent: Sequence[int], *, in_order: bool
) -> list[str]:
    """What is wrong with one project's log, one sentence each.

    ``head`` is the log's own count, ``sent`` the numbers of the updates in the order they were
    sent; ``in_order`` says whether the log has to keep that order.
    """
    faults = []
    seqs = [event.seq for event in logged]
    if seqs != list(range(1, len(seqs) + 1)):
        at = next(i for i, seq in enumerate(seqs, 1) if seq != i)
        faults.append(f"log of {project}: place {at} holds seq {seqs[at - 1]}")
    if head != len(logged):
        faults.append(f"log of {project}: the head says {head}, {len(logged)} events are there")
    times_logged = Counter(event.number for event in logged)
    for number, times in times_logged.items():
        if times > 1:
            places = [event.seq for event in logged if event.number == number]
            faults.append(f"log of {project}: update {number} is in it {times} times: {places}")
    if missing := sorted(set(sent) - set(times_logged)):
        faults.append(f"log of {project}: updates {_some(missing)} are not in it")
    if unknown := sorted(set(times_logged) - set(sent)):
        faults.append(f"log of {project}: updates {_some(unknown)} do not belong there")
    if in_order and not faults and [event.number for event in logged] != list(sent):
        pairs = zip(logged, sent, strict=True)
        event, due = next((event, due) for event, due in pairs if event.number != due)
        faults.append(
            f"log of {project}: seq {event.seq} is update {event.number} where {due} was due"
        )
    return faults


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:10]))
    return f"{shown} and {len(numbers) - 10} more" if len(numbers) > 10 else shown
