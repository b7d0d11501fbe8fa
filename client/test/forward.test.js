import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { settled, setup } from './fakes.js';

const confirm = (id) => ({ type: 'forward_confirmed', message_id: id, sqs_message_id: `sqs-${id}` });

describe('forward', () => {
  test('resolves when SQS has the message, not before', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    let result;
    const message = client.forward('dev', { task: 1 }, { project: 'p', messageId: 'm1' }).then((value) => { result = value; });
    const [{ client_id: clientId, ...sent }] = socket.actions('forward');
    assert.deepEqual(sent, { action: 'forward', type: 'dev', message_id: 'm1', project_id: 'p', data: { task: 1 } });
    assert.match(clientId, /^[\w-]{20,64}$/);
    await settled();
    assert.equal(result, undefined);
    socket.receive(confirm('m1'));
    await message;
    assert.deepEqual(result, { messageId: 'm1', sqsMessageId: 'sqs-m1' });
  });

  test('makes an id where none is given, another each time', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    for (let i = 0; i < 50; i++) {
      client.forward('pm').catch(() => {});
      socket.receive(confirm(socket.actions('forward').at(-1).message_id));
    }
    const ids = socket.actions('forward').map(({ message_id }) => message_id);
    assert.equal(new Set(ids).size, 50);
    for (const id of ids) assert.match(id, /^[\w-]{4,128}$/);
    client.close();
  });

  test("rejects with the server's code and whether another try makes sense", async () => {
    const { client, opened, errors } = setup();
    const socket = await opened();
    const message = client.forward('dev', {}, { messageId: 'm1' });
    socket.receive({ type: 'error', code: 'overloaded', message: 'Too much.', retryable: true, message_id: 'm1', retry_after_ms: 50 });
    await assert.rejects(message, (error) => {
      assert.deepEqual([error.name, error.code, error.message, error.retryable, error.detail.retry_after_ms],
        ['GatewayError', 'overloaded', 'Too much.', true, 50]);
      return true;
    });
    assert.deepEqual(errors(), []);
  });

  test('what cannot be written as JSON rejects and sends nothing', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const circle = {};
    circle.circle = circle;
    await assert.rejects(client.forward('dev', circle), TypeError);
    await assert.rejects(client.forward('dev', 1n), TypeError);
    assert.equal(socket.actions('forward').length, 0);
  });

  test('takes the data as it was at the call', async () => {
    const { client, opened } = setup();
    const data = { n: 1 };
    client.forward('dev', data, { messageId: 'm1' });
    data.n = 2;
    const socket = await opened();
    assert.deepEqual(socket.actions('forward')[0].data, { n: 1 });
    socket.receive(confirm('m1'));
  });
});

describe('over reconnects', () => {
  test('written while offline is sent when open, in order', async () => {
    const { client, opened } = setup();
    const all = ['a', 'b', 'c'].map((messageId) => client.forward('dev', {}, { messageId }));
    const socket = await opened();
    assert.deepEqual(socket.actions('forward').map(({ message_id }) => message_id), ['a', 'b', 'c']);
    socket.receive(confirm('a'), confirm('b'), confirm('c'));
    await Promise.all(all);
  });

  test('unconfirmed is sent again with the same id, confirmed is not', async () => {
    const { client, clock, opened } = setup();
    let socket = await opened();
    const a = client.forward('dev', {}, { messageId: 'a' });
    const b = client.forward('dev', {}, { messageId: 'b' });
    socket.receive(confirm('a'));
    await a;
    socket.break();
    await clock.advance(250);
    socket = await opened();
    assert.deepEqual(socket.actions('forward').map(({ message_id }) => message_id), ['b']);
    socket.receive(confirm('b'));
    await b;
  });

  test('one written in a listener of "open" is sent once', async () => {
    const { client, opened } = setup();
    client.on('state', (state) => state === 'open' && client.forward('dev', {}, { messageId: 'a' }));
    const socket = await opened();
    assert.equal(socket.actions('forward').length, 1);
    socket.receive(confirm('a'));
  });

  test('1009 fails the largest only: the others are sent again', async () => {
    const { client, clock, opened } = setup();
    const small = client.forward('dev', 'x', { messageId: 'small' });
    const large = client.forward('dev', 'x'.repeat(10_000), { messageId: 'large' });
    (await opened()).break(1009, 'message too big');
    await assert.rejects(large, { code: 'too_large', message: 'message too big', retryable: false });
    await clock.advance(250);
    const socket = await opened();
    assert.deepEqual(socket.actions('forward').map(({ message_id }) => message_id), ['small']);
    socket.receive(confirm('small'));
    await small;
  });
});

describe('bounds', () => {
  test('a full queue rejects at once and takes more when there is room', async () => {
    const { client, opened } = setup({ maxPending: 2 });
    const first = client.forward('dev', {}, { messageId: 'a' });
    const second = client.forward('dev', {}, { messageId: 'b' });
    await assert.rejects(client.forward('dev', {}), { code: 'queue_full', retryable: true });
    const socket = await opened();
    socket.receive(confirm('a'));
    await first;
    const third = client.forward('dev', {}, { messageId: 'c' });
    socket.receive(confirm('b'), confirm('c'));
    await Promise.all([second, third]);
  });

  test('an id that is under way is refused, the first goes on', async () => {
    const { client, opened } = setup();
    const first = client.forward('dev', {}, { messageId: 'a' });
    await assert.rejects(client.forward('dev', {}, { messageId: 'a' }), { code: 'duplicate_id' });
    (await opened()).receive(confirm('a'));
    await first;
  });

  test('not confirmed in time rejects; the late answer is ignored and nothing is sent again', async () => {
    const { client, clock, opened, errors } = setup();
    let socket = await opened();
    const rejected = assert.rejects(client.forward('dev', {}, { messageId: 'a', timeout: 3_000 }), { code: 'timeout', retryable: true });
    await clock.advance(3_000);
    await rejected;
    socket.receive(confirm('a'));
    socket.break();
    await clock.advance(250);
    socket = await opened();
    assert.deepEqual([socket.actions('forward').length, ...errors()], [0]);
  });

  test('the time-out counts while offline too', async () => {
    const { client, clock } = setup({ getToken: () => new Promise(() => {}) });
    const rejected = assert.rejects(client.forward('dev', {}), { code: 'timeout' });
    await clock.advance(30_000);
    await rejected;
  });
});

describe('signal', () => {
  test('aborted before: nothing is sent', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    await assert.rejects(client.forward('dev', {}, { signal: AbortSignal.abort() }), { name: 'AbortError' });
    assert.equal(socket.actions('forward').length, 0);
  });

  test('aborted while offline: nothing is sent later', async () => {
    const { client, opened } = setup();
    const controller = new AbortController();
    const message = client.forward('dev', {}, { signal: controller.signal });
    controller.abort(new Error('changed my mind'));
    await assert.rejects(message, /changed my mind/);
    assert.equal((await opened()).actions('forward').length, 0);
  });

  test('a settled message leaves neither timer nor listener', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    const controller = new AbortController();
    let listeners = 0;
    const { signal } = controller;
    const [add, remove] = [signal.addEventListener.bind(signal), signal.removeEventListener.bind(signal)];
    signal.addEventListener = (...args) => { listeners++; add(...args); };
    signal.removeEventListener = (...args) => { listeners--; remove(...args); };
    const timers = clock.pending;
    for (let i = 0; i < 500; i++) {
      const message = client.forward('dev', {}, { messageId: `m${i}`, signal });
      socket.receive(confirm(`m${i}`));
      await message;
    }
    assert.deepEqual([clock.pending, listeners], [timers, 0]);
  });
});

describe('stop', () => {
  test('resolves when the gateway has written it down, apart from the forward of the same id', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const forward = client.forward('dev', {}, { project: 'p', messageId: 'm1' });
    const stop = client.stop('m1', { project: 'p' });
    const [{ ref, ...sent }] = socket.actions('stop');
    assert.deepEqual(sent, { action: 'stop', message_id: 'm1', project_id: 'p' });
    socket.receive({ type: 'stop_confirmed', message_id: 'another' });
    socket.receive({ type: 'stop_confirmed', message_id: 'm1', project_id: 'p' });
    assert.deepEqual(await stop, { messageId: 'm1' });
    socket.receive(confirm('m1'));
    await forward;
  });

  test("rejects with the server's reason", async () => {
    const { client, opened, errors } = setup();
    const socket = await opened();
    const forward = client.forward('dev', {}, { messageId: 'm1' });
    const stop = client.stop('m1');
    socket.receive({ type: 'error', code: 'forbidden', message: 'No.', action: 'stop', message_id: 'm1' });
    await assert.rejects(stop, { code: 'forbidden' });
    socket.receive(confirm('m1'));
    await forward;
    assert.deepEqual(errors(), []);
  });

  test('is sent again after a reconnect', async () => {
    const { client, clock, opened } = setup();
    const stop = client.stop('m1');
    (await opened()).break();
    await clock.advance(1000);
    const next = await opened();
    assert.equal(next.actions('stop').length, 1);
    next.receive({ type: 'stop_confirmed', message_id: 'm1' });
    await stop;
  });

  test('gives up in time, and when it is told to', async () => {
    const { client, opened } = setup();
    await opened();
    const controller = new AbortController();
    const stop = client.stop('m1', { signal: controller.signal });
    controller.abort();
    await assert.rejects(stop, { name: 'AbortError' });
    const another = client.stop('m1');
    client.close();
    await assert.rejects(another, { code: 'closed' });
  });
});
