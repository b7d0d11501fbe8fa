"""The faults that `python -m tests.mutations` puts into server.py."""

from __future__ import annotations

from tests.mutations import MUTATIONS, ROOT


def test_none_is_stale() -> None:
    """Each fault's text is in server.py once, or the tests of its section are no longer tried."""
    text = (ROOT / "server.py").read_text(encoding="utf-8")
    assert {each.section: text.count(each.old) for each in MUTATIONS} == {
        each.section: 1 for each in MUTATIONS
    }
