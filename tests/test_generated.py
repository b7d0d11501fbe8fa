"""Documents that quote the code say what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.generated import PARTS, ROOT, regenerated


@pytest.mark.parametrize("path", PARTS, ids=lambda path: path.name)
def test_generated_parts(path: Path) -> None:
    """Every generated part is up to date; if not: python -m tests.generated."""
    assert path.read_text(encoding="utf-8") == regenerated(path)


def test_readme_length() -> None:
    """The README stays short enough to be read."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_specification_length() -> None:
    """What shows how the gateway behaves stays short enough to be read."""
    assert len((ROOT / "test_server.py").read_text(encoding="utf-8").splitlines()) <= 2_500
