"""In which order tests run that run side by side, and whose coverage is measured then.

A plugin of pytest. `python -m tests` has tests handed out by classes, and by files where they are
in none, so that what a class or a file shares is started once.
"""

from __future__ import annotations

import pytest

LONGEST_FIRST = (
    *("tests/test_deployment.py", "tests/test_client_js.py", "tests/test_chaos.py"),
    *("tests/test_client_pages.py", "tests/test_streams.py", "tests/test_browser.py::TestLooks"),
    *("tests/test_browser.py", "tests/test_bench.py", "tests/test_local.py"),
    *("tests/test_image.py", "tests/test_powershell.py", "tests/test_clients.py"),
    *("tests/test_task_role.py", "tests/test_packaging.py", "tests/test_contract.py"),
    *("tests/test_client_growth.py", "tests/test_flakes.py", "tests/test_ag_ui.py"),
    "tests/test_template.py",
    *("tests/server/test_event_log.py", "tests/server/test_round_trip.py"),
    *("tests/server/test_forwarder.py", "tests/server/test_resume.py"),
)
"""What would keep one worker busy in the end while the others have nothing left to do."""

IN_THIS_PROCESS = (
    *("test_server.py", "tests/server/", "tests/test_access.py", "tests/test_contract.py"),
    *("tests/test_fuzz.py", "tests/test_agent.py"),
)
"""What runs server.py in the tests' own process. Measured Python takes twice as long, all of it."""


def rank(item: pytest.Item) -> int:
    """The place of a test's class or file in `LONGEST_FIRST`; behind it if it has none."""
    for place, name in enumerate(LONGEST_FIRST):
        if item.nodeid.startswith(name):
            return place
    return len(LONGEST_FIRST)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not hasattr(config, "workerinput"):  # it is not a worker of pytest-xdist's
        return
    items.sort(key=rank)
    for item in items:
        if not item.nodeid.startswith(IN_THIS_PROCESS):
            item.add_marker("no_cover")
