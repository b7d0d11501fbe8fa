"""A frontend on AG-UI's own client, over real tasks and the sample agents."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import pytest

from aws_standin.thread import ThreadedStandIn
from local.agents import CODE
from tests.stage import ROOT, Stage

MODULES = ROOT / "client" / "node_modules"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What a page found: a run, two that were reloaded in their middle, one that was stopped."""
    node = shutil.which("node")
    if node is None or not (MODULES / "@ag-ui").exists():
        pytest.skip("node or @ag-ui/client is not installed: run `npm ci` in client/")
    with ThreadedStandIn() as aws:
        stage = Stage(aws.call(lambda: aws.stand_in.create_platform(prefix="ag-ui")), "", 0.3)
        try:
            done = subprocess.run(
                [node, "client/test/ag-ui.real.js", stage.balancer.url],
                cwd=ROOT,
                capture_output=True,
                encoding="utf-8",
                timeout=150,
                check=False,
            )
        finally:
            stage.close()
    assert done.returncode == 0, done.stderr + done.stdout
    result: dict[str, Any] = json.loads(done.stdout)
    return result


class TestAgUi:
    def test_run(self, found: dict[str, Any]) -> None:
        """An order is a run: its steps, its text and its result are AG-UI's."""
        assert found["failures"] == []
        assert found["whole"] == [["user", "A login page"], ["assistant", CODE]]
        assert found["result"]["status"] == "done"
        types = found["wholeTypes"]
        assert (types[0], types[-1]) == ("RUN_STARTED", "RUN_FINISHED")
        assert types.count("STEP_STARTED") == types.count("STEP_FINISHED") == 3
        assert types.count("TEXT_MESSAGE_CONTENT") > 3

    def test_reload(self, found: dict[str, Any]) -> None:
        """In the middle of a text, with the page's messages kept or not: it is whole, once."""
        assert found["reloaded"] == [[["user", "A login page"], ["assistant", CODE]]] * 2

    def test_stop(self, found: dict[str, Any]) -> None:
        """A run that is aborted ends as cancelled, with what the agent has written."""
        assert found["outcome"] == "cancelled"
        [_, [role, text]] = found["stopped"]
        assert role == "assistant"
        assert len(text) > 40
        assert CODE.startswith(text)
