"""What documents say of the code, written from the code.

``python -m tests.generated`` rewrites the parts; ``tests/test_generated.py`` finds stale ones.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import server

ROOT = Path(__file__).resolve().parent.parent


def settings_table() -> str:
    """The settings of ``server.py`` as a Markdown table."""
    lines = ["| variable | default | |", "|---|---|---|"]
    for field in dataclasses.fields(server.Settings):
        name = field.name.upper()
        lines.append(f"| `{name}` | {shown(field.default)} | {field.metadata['doc']} |")
    return "\n".join(lines)


def shown(default: Any) -> str:
    """A default as an operator would write it."""
    written = server.as_written(default)
    if default is dataclasses.MISSING:
        return f"**{written}**"
    return f"`{written}`" if written else ""


def metrics_table() -> str:
    """The metrics of ``server.py`` as a Markdown table."""
    lines = ["| metric | unit | what it says |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {unit} | {doc} |" for name, (unit, doc) in server.Metrics.described().items()
    ]
    return "\n".join(lines)


PARTS = {
    ROOT / "README.md": {"settings": settings_table},
    ROOT / "docs" / "METRICS.md": {"metrics": metrics_table},
}
"""Document to the parts between its ``<!-- name: ... -->`` and ``<!-- /name -->``."""


def regenerated(path: Path) -> str:
    """The document with every part as it should be."""
    text = path.read_text(encoding="utf-8")
    for name, render in PARTS[path].items():
        part = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not part.search(text):
            raise LookupError(f"{path.name} has no part named {name}")
        body = render()
        text = part.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)  # type: ignore[misc]
    return text


def main() -> int:
    for path in PARTS:
        path.write_text(regenerated(path), encoding="utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
