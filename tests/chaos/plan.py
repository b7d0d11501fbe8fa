"""What happens in a run: everything here follows from the seed.

This module knows no processes, no sockets and no AWS.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

# As a project's name: everyone.
EVERYONE = "*"


class Deed(enum.Enum):
    """What is done to a process or a client."""

    KILL = "kill -9"
    STOP = "stop"
    FREEZE = "freeze"
    CUT_RST = "reset"
    CUT_FIN = "hang up"
    CUT_CLOSE = "close"
    CUT_HALF_OPEN = "vanish"
    RESUBSCRIBE = "resubscribe"


TO_CLIENTS = (Deed.CUT_RST, Deed.CUT_FIN, Deed.CUT_CLOSE, Deed.CUT_HALF_OPEN, Deed.RESUBSCRIBE)


@dataclasses.dataclass(frozen=True, slots=True)
class Action:
    """One deed, due once ``after`` updates were sent.

    ``target`` is a task's slot or a client's number; ``seconds`` the time until a process is
    started again or thawed, or a client comes back.
    """

    after: int
    deed: Deed
    target: int
    seconds: float

    def __str__(self) -> str:
        whom = "client" if self.deed in TO_CLIENTS else "task"
        return (
            f"after {self.after}: {self.deed.value} {whom} {self.target} for {self.seconds:.2f} s"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Update:
    """What the agent sends; an ephemeral one is not numbered among those that must be logged."""

    number: int
    project: str
    ephemeral: bool

    def body(self, seed: int) -> str:
        """The message's text: optional members come and go with the number."""
        update: dict[str, Any] = {
            "type": "project_updated" if self.number % 3 else "task_completed",
            "data": {"n": self.number, "ephemeral": self.ephemeral, "text": "déjà vu " * 3},
        }
        if self.project != EVERYONE or self.number % 2:
            update["project_id"] = self.project
        if self.ephemeral:
            update["ephemeral"] = True
        elif self.number % 4 == 0:
            update["event_id"] = f"run-{seed}-update-{self.number}"
        return json.dumps(update)


@dataclasses.dataclass(frozen=True, slots=True)
class Burst:
    """Updates sent by one call, and the pause after it."""

    updates: tuple[Update, ...]
    pause_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class Scale:
    """How much of everything, and of which versions: a task runs one of the scripts."""

    tasks: int = 3
    clients: int = 30
    projects: int = 5
    updates: int = 500
    seconds: float = 6.0
    visibility_timeout_seconds: int = 2
    scripts: tuple[str, ...] = ("server.py",)


STANDARD = Scale()


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """One run: what is sent and what is done, and in which order."""

    seed: int
    faults: bool
    scale: Scale
    fifo: bool
    bursts: tuple[Burst, ...]
    actions: tuple[Action, ...]
    late_clients: frozenset[int]

    @property
    def logged(self) -> list[Update]:
        """The updates that must be in the log."""
        return [u for burst in self.bursts for u in burst.updates if not u.ephemeral]

    @property
    def command(self) -> str:
        """What runs it again."""
        options = f"--seed {self.seed}" + (" --faults" if self.faults else "")
        if self.scale.updates != STANDARD.updates:
            options += f" --updates {self.scale.updates}"
        return f"python -m tests.chaos {options}"


def project_names(scale: Scale) -> list[str]:
    return [f"proj_{number}" for number in range(1, scale.projects + 1)]


def make_plan(seed: int, *, faults: bool, scale: Scale = STANDARD) -> Plan:
    """Roll the dice for a run. The same arguments give the same plan."""
    dice = random.Random(f"plan/{seed}")
    bursts = tuple(_bursts(dice, scale))
    deeds = [Deed.KILL, Deed.KILL, Deed.KILL, Deed.STOP] + ([Deed.FREEZE] if faults else [])
    actions = [
        Action(
            after=dice.randrange(scale.updates // 20, scale.updates * 9 // 10),
            deed=deed,
            target=dice.randrange(scale.tasks),
            # A frozen task outlives the visibility timeout of what it holds, but not its heartbeat.
            seconds=dice.uniform(1.5, 3.0) if deed is Deed.FREEZE else dice.uniform(0.1, 1.5),
        )
        for deed in deeds
    ]
    actions += [
        Action(
            after=dice.randrange(1, scale.updates),
            deed=dice.choice(TO_CLIENTS),
            target=dice.randrange(scale.clients),
            seconds=dice.choice([0.0, dice.uniform(0, 0.5), dice.uniform(0, 3)]),
        )
        for _ in range(2 * scale.clients)
    ]
    return Plan(
        seed=seed,
        faults=faults,
        scale=scale,
        fifo=seed % 2 == 0,
        bursts=bursts,
        actions=tuple(sorted(actions, key=lambda action: action.after)),
        late_clients=frozenset(dice.sample(range(scale.clients), scale.clients // 6)),
    )


def _bursts(dice: random.Random, scale: Scale) -> Iterable[Burst]:
    """Numbered updates in calls of one to nine, most of them of one project: agents work so.

    Now and then there is an ephemeral one among them.
    """
    ephemeral_numbers = itertools.count(1_000_001)
    projects = project_names(scale)
    number = 1
    while number <= scale.updates:
        size = min(dice.choice([1, 2, 5, 9, 9, 9]), scale.updates - number + 1)
        updates = []
        own = dice.choice(projects)
        for _ in range(size):
            project = own if dice.random() < 0.7 else dice.choice([*projects, EVERYONE])
            updates.append(Update(number, project, ephemeral=False))
            number += 1
        if dice.random() < 0.05:
            updates.append(Update(next(ephemeral_numbers), dice.choice(projects), ephemeral=True))
        mean_pause = scale.seconds * size / scale.updates
        yield Burst(tuple(updates), dice.uniform(0, 2 * mean_pause))
