/** The agent of AG-UI: what it emits against the schemas of @ag-ui/core, and what @ag-ui/client makes of it. */
import assert from 'node:assert/strict';
import { access } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { describe, mock, test } from 'node:test';
import { fileURLToPath } from 'node:url';

import { confirmed, settled, setup } from './fakes.js';

const modules = join(dirname(dirname(fileURLToPath(import.meta.url))), 'node_modules');
const installed = await access(join(modules, '@ag-ui/client')).then(() => true, () => false);
const skip = installed ? false : 'not everything is installed: run npm ci in client/';
const { GatewayAgent } = installed ? await import('../ag-ui.js') : {};
const { EventSchema, RunAgentInputSchema } = installed ? await import('@ag-ui/core/schemas') : {};

const P = 'p';
const base = (seq) => ({ project_id: P, timestamp: 't', in_reply_to: 'r', ...(seq === undefined ? {} : { seq }) });
const piece = (seq, at, text, state, stream = 's.1') => ({ type: 'stream', ...base(seq), data: { stream, at, text, ...(state ? { state } : {}) } });
const answer = (seq, data, type = 'project_updated') => ({ type, ...base(seq), data });

/** An agent whose run is under way: `tell` is the gateway, `events` what was emitted, `run` its promise. */
async function running(config = {}, { messages = [], again = undefined, refusal = undefined } = {}) {
  const all = setup();
  const socket = await all.opened();
  const agent = new GatewayAgent({ gateway: all.client, type: 'dev', project: P, initialMessages: messages, saved: again, ...config });
  const events = [];
  const failures = [];
  agent.subscribe({ onEvent: ({ event }) => void events.push(event), onRunFailed: ({ error }) => void failures.push(error) });
  const run = again ? agent.connectAgent() : agent.runAgent({ runId: 'r' });
  await settled();
  await settled();
  if (again) socket.receive(confirmed(9, true));
  else {
    socket.receive(confirmed(4));
    await settled();
    socket.receive(refusal ?? { type: 'forward_confirmed', message_id: 'r', sqs_message_id: 'x', project_id: P, seq: 4, epoch: 'E1' });
    await settled();
  }
  return { ...all, agent, socket, events, failures, run, tell: (...frames) => socket.receive(...frames) };
}

function check({ events, failures }) {
  for (const event of events) EventSchema.parse(event);
  assert.deepEqual(failures, []);
  return events.map(({ type }) => type);
}
const contents = (agent) => agent.messages.map(({ role, content }) => [role, content]);

describe('the agent of AG-UI', { skip }, () => {
  test('sends a run as an order, and its answers as a run', async () => {
    const user = { id: 'u', role: 'user', content: 'A login page' };
    const all = await running({}, { messages: [user] });
    const [order] = all.socket.actions('forward');
    assert.deepEqual([order.type, order.message_id, order.project_id], ['dev', 'r', P]);
    assert.deepEqual(RunAgentInputSchema.parse(order.data).messages, [user]);
    all.tell(answer(5, { status: 'working', message: 'Reading' }), answer(6, { status: 'working', step: 2 }),
      piece(undefined, 0, 'Hel'), piece(7, 0, 'Hello'), piece(8, 5, ' you', 'done'), answer(9, { any: 1 }, 'note'), answer(10, { status: 'done', n: 1 }));
    assert.deepEqual((await all.run).result, { status: 'done', n: 1 });
    assert.deepEqual(check(all), ['RUN_STARTED', 'STEP_STARTED', 'STEP_FINISHED', 'STEP_STARTED', 'TEXT_MESSAGE_START', 'TEXT_MESSAGE_CONTENT',
      'TEXT_MESSAGE_CONTENT', 'TEXT_MESSAGE_CONTENT', 'TEXT_MESSAGE_END', 'CUSTOM', 'STEP_FINISHED', 'RUN_FINISHED']);
    assert.deepEqual(contents(all.agent), [['user', 'A login page'], ['assistant', 'Hello you']]);
    assert.deepEqual({ ...all.agent.saved }, { messageId: 'r', sqsMessageId: 'x', project: P, seq: 4, epoch: 'E1' });
  });

  test('stops the order, and ends as cancelled when the agent has', async () => {
    const all = await running();
    all.tell(piece(5, 0, 'half'));
    all.agent.abortRun();
    assert.deepEqual(all.socket.actions('stop').map(({ message_id, project_id }) => [message_id, project_id]), [['r', P]]);
    all.tell({ type: 'stop_confirmed', message_id: 'r', project_id: P }, { type: 'stop_requested', ...base(6), data: null },
      piece(7, 4, ' text', 'cancelled'), answer(8, { status: 'cancelled' }));
    await all.run;
    assert.equal(check(all).at(-1), 'RUN_FINISHED');
    assert.equal(all.events.at(-1).outcome.type, 'cancelled');
    assert.deepEqual(contents(all.agent), [['assistant', 'half text']]);
  });

  test('says what failed, and with which code', async () => {
    const failed = await running();
    failed.tell(piece(5, 0, 'half', 'failed'), answer(6, { status: 'failed', message: 'No such task.' }));
    await failed.run;
    assert.deepEqual([check(failed).at(-1), failed.events.at(-1).message, failed.events.at(-1).code], ['RUN_ERROR', 'No such task.', 'failed']);
    const refused = await running({}, { refusal: { type: 'error', action: 'forward', code: 'forbidden', message: 'No.', message_id: 'r' } });
    await refused.run;
    assert.deepEqual([check(refused).at(-1), refused.events.at(-1).code], ['RUN_ERROR', 'forbidden']);
    const lost = await running();
    lost.tell({ type: 'subscription_confirmed', project_id: P, seq: 20, epoch: 'E1', recovered: false });
    await lost.run;
    assert.deepEqual([check(lost).at(-1), lost.events.at(-1).code], ['RUN_ERROR', 'gap']);
  });

  test('leaves out what another attempt has written anew', async () => {
    const all = await running({}, { messages: [{ id: 'u', role: 'user', content: 'Go' }] });
    all.tell(piece(5, 0, 'one'));
    await settled();
    all.tell(piece(6, 0, '', 'superseded'), piece(7, 0, '', 'superseded', 's.0'), piece(8, 0, 'another', 'done', 's.2'), answer(9, { status: 'done' }));
    await all.run;
    check(all);
    assert.deepEqual(contents(all.agent), [['user', 'Go'], ['assistant', 'another']]);
  });

  test('waits for the end of a text that a standard queue brings after the last answer', async () => {
    const all = await running();
    all.tell(piece(5, 0, 'Hello'), answer(6, { status: 'done' }), piece(7, 5, ' you', 'done'));
    await all.run;
    assert.equal(check(all).at(-1), 'RUN_FINISHED');
    assert.deepEqual(contents(all.agent), [['assistant', 'Hello you']]);
  });

  test('ends all the same where a text never does', async () => {
    const all = await running();
    const emitted = () => all.events.map(({ type }) => type);
    mock.timers.enable({ apis: ['setTimeout'] });
    all.tell(piece(5, 0, 'killed'), piece(6, 0, 'whole', 'done', 's.2'), answer(7, { status: 'done' }));
    mock.timers.tick(29_000);
    mock.timers.reset();
    await settled();
    assert.equal(emitted().at(-1), 'TEXT_MESSAGE_END', 'it may be late');
    all.client.close();
    await all.run;

    const again = await running();
    mock.timers.enable({ apis: ['setTimeout'] });
    again.tell(piece(5, 0, 'killed'), piece(6, 0, 'whole', 'done', 's.2'), answer(7, { status: 'done' }));
    mock.timers.tick(31_000);
    mock.timers.reset();
    await again.run;
    assert.deepEqual(check(again).slice(-3), ['TEXT_MESSAGE_END', 'TEXT_MESSAGE_END', 'RUN_FINISHED']);
    assert.deepEqual(contents(again.agent), [['assistant', 'killed'], ['assistant', 'whole']]);
  });

  test('ends with the connection, which the page has closed', async () => {
    const all = await running();
    all.tell(piece(5, 0, 'half'));
    all.client.close();
    await all.run;
    assert.deepEqual([check(all).at(-1), all.events.at(-1).code], ['RUN_ERROR', 'closed']);
  });

  test('ends where an order does, whatever the agent calls its last answer', async () => {
    const all = await running();
    all.tell(answer(5, { type: 'CUSTOM', name: 'n', value: 1, status: 'done' }, 'ag-ui'), answer(6, { status: 'done' }, 'answered'));
    await all.run;
    assert.deepEqual(check(all), ['RUN_STARTED', 'CUSTOM', 'RUN_FINISHED']);
  });

  test('takes texts for texts, whatever the agent calls their events', async () => {
    const all = await running();
    all.tell({ ...piece(5, 0, 'why', 'done'), type: 'thinking' }, answer(6, { status: 'done' }));
    await all.run;
    assert.deepEqual(check(all), ['RUN_STARTED', 'TEXT_MESSAGE_START', 'TEXT_MESSAGE_CONTENT', 'TEXT_MESSAGE_END', 'RUN_FINISHED']);
  });

  test('passes on events of AG-UI, but for the run\'s own', async () => {
    const all = await running();
    all.tell(answer(5, { type: 'STATE_SNAPSHOT', snapshot: { files: 1 } }, 'ag-ui'), answer(6, { type: 'RUN_FINISHED' }, 'ag-ui'),
      answer(7, { type: 'STATE_DELTA', delta: [{ op: 'replace', path: '/files', value: 2 }] }, 'ag-ui'), answer(8, 'nonsense', 'ag-ui'),
      answer(9, { status: 'done' }));
    await all.run;
    assert.deepEqual(check(all), ['RUN_STARTED', 'STATE_SNAPSHOT', 'STATE_DELTA', 'RUN_FINISHED']);
    assert.deepEqual(all.agent.state, { files: 2 });
  });

  for (const [kept, why] of [[[], 'without its messages'], [['Hel'], 'with the first part of the text'], [['Hello yo'], 'with more than is logged']]) {
    test(`goes on after a reload, ${why}`, async () => {
      const messages = kept.map((content) => ({ id: 's.1', role: 'assistant', content }));
      const all = await running({}, { messages, again: { messageId: 'r', project: P, seq: 4, epoch: 'E1' } });
      assert.deepEqual(all.socket.actions('subscribe').map(({ since, epoch }) => [since, epoch]), [[4, 'E1']]);
      assert.equal(all.socket.actions('forward').length, 0);
      all.tell(piece(5, 0, 'Hello'), piece(6, 5, ' you', 'done'), answer(7, { status: 'done' }));
      await all.run;
      check(all);
      assert.equal(all.events[0].runId, 'r');
      assert.deepEqual(contents(all.agent), [['assistant', 'Hello you']]);
    });
  }

  test('leaves the order to who is detached from it', async () => {
    const all = await running();
    all.tell(piece(5, 0, 'half'));
    await all.agent.detachActiveRun();
    await all.run;
    assert.equal(all.socket.actions('unsubscribe').length, 1);
    assert.equal(all.socket.actions('stop').length, 0);
    assert.equal(all.agent.order, undefined);
    assert.equal(all.agent.clone().gateway, all.client);
  });
});
