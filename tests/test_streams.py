"""Texts that grow while everything breaks: a small run, and the checks that the runs rely on."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.streams.checker import logged_text, unfinished
from tests.streams.run import run
from tests.streams.texts import script_of

ROOT = Path(__file__).resolve().parent.parent
NO_PREFIX = ["no prefix of what the agent writes"]
BEGUN_ELSEWHERE = ["it has begun elsewhere"]
TEXT = script_of(1, "m0", 2).text
UNITS = len(TEXT.encode("utf-16-le", "surrogatepass")) // 2

WATCH = """
import { Watch } from './tests/streams/watch.js';
const found = [];
for (const looks of JSON.parse(process.argv[1])) {
  const faults = [];
  const watch = new Watch('w', { m: ['one', 'two words'] }, ({ fault }) => faults.push(fault));
  for (const [id, text, state, from] of looks) {
    if (from !== undefined) watch.late = true;
    watch.take({ id, messageId: 'm', text, state, from });
  }
  const logged = { 's.2': { text: 'two words', states: ['done'] } };
  found.push([faults.map((fault) => fault.split(': ')[1]), [...watch.missing(logged)].length]);
}
console.log(JSON.stringify(found));
"""


def node() -> str:
    """Where Node is; skip without it, or without the packages of the client."""
    command = shutil.which("node")
    if command is None:
        pytest.skip("node is not installed")
    if not (ROOT / "client" / "node_modules" / "ws").exists():
        pytest.skip("the package ws is not installed: run `npm ci` in client/")
    return command


def logged(*pieces: tuple[int, str, str | None]) -> tuple[dict[str, Any], list[str]]:
    """What is found of these pieces of `TEXT`."""
    of_stream = [
        {"at": at, "text": text, **({"state": state} if state else {})}
        for at, text, state in pieces
    ]
    return logged_text(1, "m0", "s.2", of_stream)


class TestChecks:
    """They find what is wrong, and nothing else."""

    def test_what_a_page_is_given(self) -> None:
        """No prefix, a change, a text after its end or of nobody, a hole at the end."""
        cases: list[tuple[list[list[str | int | None]], list[str], int]] = [
            ([["s.2", "two"], ["s.2", "two words", "done"]], [], 0),
            ([["s.1", "on"], ["s.1", "on", "superseded"], ["s.2", "two words", "done"]], [], 0),
            ([["s.2", "two w"]], [], 1),
            ([["s.2", "two o"]], NO_PREFIX, 1),
            ([["s.2", "two w"], ["s.2", "two"]], ["what was shown before has changed"], 1),
            ([["s.2", "two", "done"]], ["it is done, and not whole"], 1),
            ([["s.2", "two", "failed"], ["s.2", "two words"]], ["it had ended"], 1),
            ([["s.3", "two"]], ["nobody writes this"], 1),
            ([["s.2", "words", None, 4], ["s.2", "words", "done", 4]], [], 0),
            ([["s.2", "two words", None, 0], ["s.2", "words", "done", 4]], BEGUN_ELSEWHERE, 0),
            ([["s.2", "wo", None, 4], ["s.2", "words", "done", 3]], NO_PREFIX, 1),
        ]
        command = [node(), "--input-type=module", "-e", WATCH]
        looks = json.dumps([case[0] for case in cases])
        done = subprocess.run(
            [*command, looks], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [[faults, missing] for _, faults, missing in cases]

    def test_what_is_logged(self) -> None:
        """Pieces are the whole text exactly once, whatever order they were logged in."""
        assert logged((1, TEXT[1:], "done"), (0, TEXT[:1], None))[1] == []
        assert logged((0, TEXT[:1], None), (0, "", "superseded"))[1] == []
        assert len(logged((0, TEXT[:1], "done"))[1]) == 1
        assert len(logged((0, TEXT, None), (1, TEXT[1:], "done"))[1]) == 2
        assert len(logged((0, TEXT[:1], None), (2, TEXT[2:], None))[1]) == 2
        assert logged((0, TEXT, None), (UNITS, "", "done"))[1] == []

    def test_what_did_not_end(self) -> None:
        """Each stream ends, and the last attempt's by its own hand, unless it was stopped."""
        streams = {"s.1": {"states": ["superseded"]}, "s.2": {"states": ["done"]}}
        assert list(unfinished({"m": streams}, {"m": {"done"}})) == []
        streams["s.3"] = {"states": []}
        assert len(list(unfinished({"m": streams}, {"m": {"done"}}))) == 2
        failed = {"s.1": {"states": ["failed"]}}
        assert len(list(unfinished({"m": failed}, {"m": {"done"}}))) == 1
        assert list(unfinished({"m": failed}, {"m": {"cancelled"}})) == []


@pytest.mark.skipif(sys.platform == "win32", reason="kills processes by POSIX signals")
class TestStreams:
    async def test_small(self) -> None:
        """Tasks and agents are killed, pages cut, moved and reloaded; no text is ever wrong."""
        node()
        outcome = await run(1, 20, order_visibility_s=10)
        assert outcome.streams["done"] >= 19
        assert outcome.seen > 200
        assert outcome.agents_killed >= 2
        assert outcome.faults > 50
