"""Pages with the client in a Chromium that nothing steers but its own protocol.

Playwright keeps every page visible; here a tab goes behind another one, and Chromium slows its
timers down as it does for a person.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from websockets.sync.client import ClientConnection, connect

from aws_standin.thread import ThreadedStandIn
from tests.stage import CHROMIUM, HOST, ROOT, Stage
from tests.stage import chromium as stage_chromium
from tests.waiting import wait_until

NOTICED_WITHIN_S = 100.0
SEEN_S = 30.0
THROTTLED_MS = 10_000
"""Without a tick of a timer of half a second: a page that is only hidden has one a second."""
PINGED_MS = 26_000
"""By when the page has made its second ping, and the other client its fourth."""
HIDDEN_FLAGS = ["--enable-features=IntensiveWakeUpThrottling:grace_period_seconds/1"]
"""Timers once a minute a second after a page is hidden, not after five minutes."""
WATCH = """
(async () => {
  window.states = { page: [], often: [] };
  const state = document.querySelector('#state');
  new MutationObserver(() => states.page.push([performance.now(), state.textContent]))
    .observe(state, { childList: true });
  const { connect } = await import('./agenticai-ws.js');
  const query = new URLSearchParams(location.search);
  const often = connect(query.get('url'), { pingInterval: 6000 });
  await often.ready();
  often.on('state', (state) => states.often.push([performance.now(), state]));
  window.ticks = [];
  (function tick() { ticks.push(performance.now()); setTimeout(tick, 500); })();
})()
"""
"""Beside the page's client one with so many pings that a chain of timers would soon be a long one:
those are the ones that Chromium lets run once a minute only."""


class Tab:
    """A tab of Chromium, over its DevTools protocol."""

    def __init__(self, wire: ClientConnection, address: str) -> None:
        self._wire = wire
        self._numbers = itertools.count(1)
        self._session: str | None = None
        target = self.call("Target.createTarget", url=address)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        request = {"id": number, "method": method, "params": params}
        self._wire.send(
            json.dumps(request | ({"sessionId": self._session} if self._session else {}))
        )
        while True:
            answer = json.loads(self._wire.recv(SEEN_S))
            if answer.get("id") == number and answer.get("sessionId") == self._session:
                return answer["result"]

    def run(self, script: str) -> Any:
        """Return what a script has for a value."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r})?.textContent ?? ''"))


@pytest.fixture(scope="module")
def chromium() -> Iterator[ClientConnection]:
    program = stage_chromium()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
        with subprocess.Popen(
            [program, *flags, *CHROMIUM, *HIDDEN_FLAGS], stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr
            lines = (re.search(r"DevTools listening on (\S+)", line) for line in process.stderr)
            found = next(filter(None, lines))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with connect(found[1], max_size=None) as wire:
                yield wire
            process.terminate()


@pytest.fixture(scope="module")
def stage(chromium: ClientConnection) -> Iterator[Stage]:
    """After the browser: without one, nothing is started."""
    assert chromium.state
    with contextlib.ExitStack() as stack:
        aws = ThreadedStandIn()
        stack.callback(aws.close)
        platform = aws.call(lambda: aws.stand_in.create_platform(prefix="pages"))
        stage = Stage(platform, "")
        stack.callback(stage.close)
        yield stage


@pytest.fixture
def example(stage: Stage, tmp_path: Path) -> Iterator[str]:
    """The plain page as its first line says: the module beside it, both served."""
    shutil.copy(ROOT / "client" / "examples" / "page" / "index.html", tmp_path)
    shutil.copy(ROOT / "client" / "agenticai-ws.js", tmp_path)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None: ...  # noqa: A002

    server = ThreadingHTTPServer((HOST, 0), functools.partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    query = urlencode({"url": stage.balancer.url, "project": "proj_123"})
    yield f"http://{HOST}:{server.server_port}/?{query}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_plain_page(chromium: ClientConnection, example: str) -> None:
    """It connects, sends a task, says that SQS has it, and lists what the agent answers."""
    page = Tab(chromium, example)
    wait_until(lambda: page.text("#state") == "open", SEEN_S)
    page.run("document.querySelector('form button').click()")
    wait_until(lambda: page.text("output") == "SQS has it.", SEEN_S)
    wait_until(lambda: page.run("document.querySelectorAll('#events li').length") >= 4, SEEN_S)
    assert re.match(r"1 \w+ \{", page.text("#events li"))


def test_dead_socket_in_a_hidden_tab(
    chromium: ClientConnection, stage: Stage, example: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is noticed within 100 s, though timers run once a minute. Takes some 60 s."""
    page = Tab(chromium, example)
    wait_until(lambda: page.text("#state") == "open", SEEN_S)
    page.run(WATCH)
    wait_until(lambda: page.run("window.ticks?.length > 0"), SEEN_S)
    Tab(chromium, "about:blank")
    wait_until(lambda: page.run("document.visibilityState") == "hidden", SEEN_S)
    wait_until(lambda: page.run("performance.now() - ticks.at(-1)") > THROTTLED_MS, SEEN_S)
    wait_until(lambda: page.run("performance.now() - ticks[0]") > PINGED_MS, SEEN_S)
    assert page.run("states") == {"page": [], "often": []}, "it was given up before it died"
    stage.balancer.fall_silent()
    began = page.run("performance.now()")
    seen = "states.page.length > 0 && states.often.length > 0"
    wait_until(lambda: page.run(seen), NOTICED_WITHIN_S + 5)
    first = [page.run(f"states.{which}[0]") for which in ("page", "often")]
    took = [(at - began) / 1000 for at, _ in first]
    ticks = [at for at in page.run("ticks") if began < at < began + max(took) * 1000]
    with capsys.disabled():
        print(f"\nnoticed after {took[0]:.1f} s and {took[1]:.1f} s, {len(ticks)} ticks meanwhile")
    assert [state for _, state in first] == ["waiting", "waiting"]
    assert page.run("document.visibilityState") == "hidden"
    assert len(ticks) <= 1 + max(took) / 30, "timers were not slowed down"
    assert max(took) <= NOTICED_WITHIN_S
