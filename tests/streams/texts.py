"""What the agents write: the same for a seed, an order and an attempt, and in no two attempts."""

from __future__ import annotations

import dataclasses
import random

ATTEMPTS = 20
"""So often may one order be received: killed agents, and answers of AWS that are lost."""
PROJECTS = 10

PARTS = (
    *("word ", "a", "naïve ", "Größe ", "数据 ", "שלום ", "\n", "\t", "  "),
    *("😀", "👩\u200d💻", "🇩🇪", "e\u0301", "o\u0308\u0323", "\u200f"),
    *("\ud83d", "\ude00", "\ud83d\ude00"),  # an emoji in halves, and halves that belong to nothing
    *('print("it\'s")\n', '{"a": [1, "\\n"]}', "`${x}`", "</script>", "\\u0041", "\\"),
    *("\x00", "\x7f", "\ufffe", "\uffff", "\u2028"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Script:
    """How an attempt at an order goes, unless it is stopped.

    Attributes:
        parts: what it writes, each after a pause in seconds.
        fails_at: the part at which it raises instead; only first attempts do.
    """

    parts: tuple[tuple[float, str], ...]
    fails_at: int | None

    @property
    def text(self) -> str:
        return "".join(part for _, part in self.parts)


def script_of(seed: int, message_id: str, attempt: int) -> Script:
    """Return what an agent does with an order when it gets it for the `attempt`-th time."""
    dice = random.Random(f"text/{seed}/{message_id}/{attempt}")
    count = dice.randrange(3, 120)
    pause_s = dice.choice([0.0, 0.005, 0.03, 3.0 / count])
    parts = (f"{attempt}:", *dice.choices(PARTS, k=count))
    return Script(
        parts=tuple((dice.uniform(0, 2 * pause_s), part) for part in parts),
        fails_at=count // 2 if attempt == 1 and dice.random() < 0.05 else None,
    )


def message_ids(streams: int) -> list[str]:
    return [f"m{number}" for number in range(streams)]
