"""The client in Chromium: thousands of reconnects and events leave nothing behind."""

from __future__ import annotations

import pytest

from local.console import serve_console
from tests.stage import CHROMIUM, chromium

GROWTH_MAX_BYTES = 2_000_000
SCRIPT = """
async () => {
  const { connect } = await import('/agenticai-ws.js');
  let sockets = 0, open = 0, latest;
  class Wire {
    constructor() {
      sockets++; open++; latest = this;
      setTimeout(() => this.say({ type: 'connected', ref: true }));
    }
    say(message) { this.onmessage?.({ data: JSON.stringify(message) }); }
    send(text) {
      const { ref, action, since } = JSON.parse(text);
      if (action === 'ping') this.say({ type: 'pong', ref });
      else this.say({ type: 'subscription_confirmed', project_id: 'p', seq: since ?? 0, epoch: 'E',
        ref, ...(since === undefined ? {} : { recovered: true }) });
    }
    close() { open--; }
  }
  const gateway = connect('ws://gateway/ws', { WebSocket: Wire, minDelay: 0, maxDelay: 0 });
  let events = 0, seq = 0;
  gateway.subscribe('p').on('event', () => events++);
  const burst = async (reconnects, each) => {
    for (let i = 0; i < reconnects; i++) {
      await gateway.ready();
      for (let n = 0; n < each; n++) {
        latest.say({ type: 'step', project_id: 'p', seq: ++seq, data: { text: 'x'.repeat(200) } });
      }
      latest.onclose({ code: 1006, reason: '' });
      open--;
    }
  };
  await burst(100, 100);
  gc();
  const before = performance.memory.usedJSHeapSize;
  await burst(1000, 100);
  await gateway.ready();
  gc();
  const grown = performance.memory.usedJSHeapSize - before;
  const result = { grown, events, sockets };
  gateway.close();
  return result;
}
"""


def test_nothing_grows(capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 reconnects and 100,000 events: each event once, and the heap is as it was.

    It is looked at after a collection, so that it is the same whatever else the machine does.
    """
    program = chromium()
    sync_api = pytest.importorskip("playwright.sync_api")
    with serve_console() as address, sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            args=[*CHROMIUM, "--js-flags=--expose-gc", "--enable-precise-memory-info"],
        )
        page = browser.new_page()
        page.goto(address)
        found = page.evaluate(SCRIPT)
        browser.close()
    with capsys.disabled():
        print(f"\n{found['sockets']} connections, {found['events']} events: {found['grown']} bytes")
    assert found["events"] == 110_000
    assert found["sockets"] >= 1_100
    assert found["grown"] < GROWTH_MAX_BYTES
