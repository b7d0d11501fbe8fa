/** The hooks under React 19, in StrictMode, in a DOM that Node has. */
import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { FakeGateway, network, VirtualClock } from './gateway.js';

const dom = await import('happy-dom').catch(() => undefined);
const skip = dom ? false : 'happy-dom is not installed: run npm ci in client/';
if (dom) {
  const window = new dom.Window();
  for (const name of ['document', 'navigator', 'Node', 'Element', 'HTMLElement', 'HTMLIFrameElement']) {
    Object.defineProperty(globalThis, name, { value: window[name], configurable: true });
  }
  globalThis.window = window;
  globalThis.IS_REACT_ACT_ENVIRONMENT = true;
}
const [{ act, createElement, StrictMode, version }, { createRoot }, hooks, { connect }] = skip ? [{}, {}, {}, {}]
  : await Promise.all([import('react'), import('react-dom/client'), import('../react.js'), import('../agenticai-ws.js')]);

/** A gateway, a connection, and a component that shows a project. */
function stage(t, options = {}) {
  const clock = new VirtualClock();
  const gateway = new FakeGateway({ clock, ...options.gateway });
  const { WebSocket, sockets } = network(gateway);
  const dial = () => connect('ws://gateway/ws', { clock, WebSocket, random: () => 0.5 });
  const client = dial();
  const views = [];
  const heard = [];
  function Project({ connection = client, project = 'p', ...more }) {
    const view = hooks.useProject(connection, project, { onEvent: ({ seq }) => heard.push(seq), ...more });
    const state = hooks.useConnectionState(connection);
    views.push({ ...view, connection: state });
    return createElement('p', null, `${state} ${view.state} ${view.events.map(({ seq }) => seq).join()}`);
  }
  const root = createRoot(document.body.appendChild(document.createElement('div')));
  const render = (props) => act(async () => root.render(createElement(StrictMode, null, createElement(Project, props))));
  const advance = (ms) => act(() => clock.advance(ms));
  t.after(async () => {
    await act(async () => root.unmount());
    client.close();
  });
  return { clock, gateway, client, dial, root, render, advance, views, heard, sockets, text: () => document.body.lastChild.textContent };
}

describe('the React hooks', { skip }, () => {
  test('show a project, each event once, in order, though StrictMode runs every effect twice', async (t) => {
    assert.match(version, /^19\./);
    const { gateway, render, advance, views, heard, text } = stage(t);
    gateway.publish('p');
    await render({ since: 0 });
    assert.equal(text(), 'connecting pending ');
    await advance(100);
    assert.equal(text(), 'open live 1');
    gateway.publish('p');
    await advance(100);
    assert.equal(text(), 'open live 1,2');
    assert.deepEqual(heard, [1, 2]);
    assert.equal(views.at(-1).seq, 2);
    assert.deepEqual([...gateway.connections].map(({ subscriptions }) => [...subscriptions].sort()), [['*', 'p']]);
  });

  test('go on where they were when mounted on an open connection, twice', async (t) => {
    const { client, gateway, render, advance, heard } = stage(t);
    await advance(100);
    assert.equal(client.state, 'open');
    await render({});
    gateway.publish('p');
    await advance(100);
    gateway.publish('p');
    await advance(100);
    assert.deepEqual(heard.at(-1), 2);
    assert.deepEqual(heard, [...new Set(heard)]);
  });

  test('unsubscribe when unmounted, and when the project changes', async (t) => {
    const { gateway, render, advance, root, text } = stage(t);
    gateway.publish('q');
    await render({ since: 0 });
    await advance(100);
    await render({ project: 'q', since: 0 });
    await advance(100);
    assert.equal(text(), 'open live 1');
    assert.deepEqual([...gateway.connections].map(({ subscriptions }) => [...subscriptions].sort()), [['*', 'q']]);
    await act(async () => root.render(null));
    await advance(100);
    assert.deepEqual([...gateway.connections].map(({ subscriptions }) => [...subscriptions]), [['*']]);
  });

  test('go on over another connection', async (t) => {
    const { gateway, render, advance, dial, client, heard, text } = stage(t);
    await render({ since: 0 });
    gateway.publish('p');
    await advance(100);
    client.close();
    gateway.publish('p');
    const next = dial();
    t.after(() => next.close());
    await render({ connection: next, since: 0 });
    await advance(100);
    assert.equal(text(), 'open live 1,2');
    assert.deepEqual(heard, [1, 2]);
  });

  test('tell of a gap, a snapshot, a refusal, and keep as many events as they are told to', async (t) => {
    const gaps = [];
    const { gateway, render, advance, views } = stage(t, { gateway: { maxCatchup: 3 } });
    for (let i = 0; i < 9; i++) gateway.publish('p');
    await render({ since: 0, snapshot: true, keep: 2, onGap: (gap) => gaps.push(gap) });
    await advance(100);
    for (let i = 0; i < 3; i++) gateway.publish('p');
    await advance(100);
    const view = views.at(-1);
    assert.deepEqual([gaps, view.gap, view.snapshot, view.events.map(({ seq }) => seq)],
      [[{ from: 0, to: 9 }], { from: 0, to: 9 }, { at: 9 }, [11, 12]]);
    gateway.forbidden.add('q');
    await render({ project: 'q' });
    await advance(100);
    assert.deepEqual([views.at(-1).state, views.at(-1).error.code], ['failed', 'forbidden']);
  });

  test('wait for a connection and for a project', async (t) => {
    const { render, views } = stage(t);
    await render({ connection: null });
    await render({ project: null });
    assert.equal(views.at(-1).state, 'closed');
  });
});
