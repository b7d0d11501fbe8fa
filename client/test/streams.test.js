import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { confirmed, settled, setup } from './fakes.js';

/** mulberry32: the same numbers for a seed, in [0, 1). */
const random = (seed) => () => {
  let t = seed += 0x6D2B79F5;
  t = Math.imul(t ^ (t >>> 15), t | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
};

const P = 'p';
const piece = (seq, at, text, more = {}) => ({
  type: 'stream', project_id: P, timestamp: 't', in_reply_to: 'm', ...(seq === undefined ? {} : { seq }), data: { stream: 's.1', at, text, ...more },
});

/** A subscription from the log's beginning; `seen` are [text, state] at each change. */
async function live() {
  const all = setup();
  const socket = await all.opened();
  const sub = all.client.subscribe(P, { since: 0 });
  const seen = [];
  const errors = [];
  sub.on('stream', (stream) => seen.push([stream.text, stream.state]));
  sub.on('error', (error) => errors.push(error.code));
  socket.receive(confirmed(0, true));
  return { ...all, socket, sub, seen, wrong: errors };
}

/** One of a page that comes later; `seen` are [from, text, state]. */
async function later(options = {}, project = P) {
  const all = setup();
  const socket = await all.opened();
  const sub = all.client.subscribe(project, options);
  const seen = [];
  const errors = [];
  sub.on('stream', ({ from, text, state }) => seen.push([from, text, state]));
  sub.on('error', (error) => errors.push(error.code));
  socket.receive({ ...confirmed(9, options.since === undefined ? undefined : true), project_id: project });
  return { ...all, socket, sub, seen, wrong: errors };
}

describe('streams', () => {
  test('grow early, and are the same text once logged', async () => {
    const { socket, seen } = await live();
    socket.receive(piece(undefined, 0, 'He'), piece(undefined, 2, 'llo'), piece(1, 0, 'Hello'), piece(undefined, 5, ' you'), piece(2, 5, ' you', { state: 'done' }));
    assert.deepEqual(seen, [['He', undefined], ['Hello', undefined], ['Hello you', undefined], ['Hello you', 'done']]);
  });

  test('leave out early what does not fit, and wait for a logged piece before the next', async () => {
    const { socket, seen } = await live();
    socket.receive(piece(undefined, 3, 'lo'), piece(1, 3, 'lo', { state: 'done' }), piece(undefined, 0, 'H'), piece(2, 0, 'Hel'));
    assert.deepEqual(seen, [['H', undefined], ['Hello', 'done']]);
  });

  test('end as superseded, whatever comes after', async () => {
    const { socket, seen } = await live();
    socket.receive(piece(1, 0, 'one'), piece(2, 0, '', { state: 'superseded' }), piece(3, 3, ' two'), piece(undefined, 3, ' two'));
    assert.deepEqual(seen, [['one', undefined], ['one', 'superseded']]);
  });

  test('report pieces that are none, and those that contradict what is logged', async () => {
    const { socket, seen, wrong } = await live();
    socket.receive(piece(1, 0, 'one'), piece(2, 1, 'xx and more'), piece(3, undefined, 'x'), piece(4, -1, 'x'), piece(5, 0, 7),
      piece(6, 0, 'one'), piece(7, 3, ' two'));
    assert.deepEqual(wrong, ['bad_message', 'bad_message', 'bad_message', 'bad_message']);
    assert.deepEqual(seen, [['one', undefined], ['one two', undefined]]);
  });

  test('begin with the first logged piece that a page sees which comes in their middle', async () => {
    const { socket, seen, wrong } = await later();
    socket.receive(piece(undefined, 7, 'early'), piece(10, 5, 'wor'), piece(undefined, 8, 'ld'), piece(undefined, 4, ' world!'), piece(11, 3, 'xxxxx'),
      piece(12, 0, 'Hello'), piece(13, 4, ' world'), piece(14, 12, '!'), piece(15, 10, ', you'), piece(16, 15, '', { state: 'done' }));
    assert.deepEqual(seen, [[5, 'wor', undefined], [5, 'world', undefined], [5, 'world!', undefined], [5, 'world, you', undefined], [5, 'world, you', 'done']]);
    assert.deepEqual(wrong, ['bad_message']);
  });

  test('begin at once where the page sees their beginning', async () => {
    const { socket, seen, clock } = await later();
    clock.freeze(30_000);
    socket.receive(piece(undefined, 0, 'He'), piece(10, 0, 'Hello'));
    assert.deepEqual(seen, [[0, 'He', undefined], [0, 'Hello', undefined]]);
  });

  test('do not begin with an early piece that comes late, after what was logged before the page came', async () => {
    const { socket, seen } = await later();
    socket.receive(piece(undefined, 0, 'He'), piece(10, 5, ' you', { state: 'done' }), { ...piece(undefined, 0, 'over'), data: { stream: 's.2', at: 0, text: 'over' } });
    assert.deepEqual(seen, [[5, ' you', 'done']]);
  });

  test('are whole in a log that was empty when the page came', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const seen = [];
    client.subscribe(P).on('stream', ({ from, text }) => seen.push([from, text]));
    socket.receive(confirmed(0), piece(undefined, 0, 'H'), piece(1, 3, 'lo'), piece(2, 0, 'Hel'));
    assert.deepEqual(seen, [[0, 'H'], [0, 'Hello']]);
  });

  test('go on in another page where its position was', async () => {
    const { socket, seen } = await later({ since: 8, epoch: 'E1' });
    const kept = 'Hello';
    socket.receive(piece(9, kept.length, ' world', { state: 'done' }));
    assert.deepEqual(seen, [[5, ' world', 'done']]);
  });

  test('begin anew after a gap, and never have a hole', async () => {
    const { socket, sub, seen } = await later({ since: 8, epoch: 'E1' });
    const ids = new Set();
    sub.on('stream', (stream) => ids.add(stream));
    socket.receive(piece(9, 0, 'one '), { ...confirmed(20), recovered: false }, piece(undefined, 10, 'x'), piece(21, 8, 'three'), piece(22, 13, '', { state: 'done' }));
    assert.deepEqual(seen, [[0, 'one ', undefined], [8, 'three', undefined], [8, 'three', 'done']]);
    assert.deepEqual([...ids].map(({ id, text }) => [id, text]), [['s.1', 'one '], ['s.1', 'three']]);
  });

  test('of an hour are joined in well under a second, where each piece could have cost the whole text', async () => {
    const { socket, sub, seen } = await live();
    let stream;
    sub.on('stream', (each) => { stream = each; });
    const part = 'word '.repeat(30);
    const began = performance.now();
    for (let seq = 1, at = 0; seq <= 2400; seq++, at += 5 * part.length) {
      for (let n = 0; n < 5; n++) socket.receive(piece(undefined, at + n * part.length, part));
      socket.receive(piece(seq, at, part.repeat(5)));
      seen.length = 0;
    }
    const took = performance.now() - began;
    assert.equal(stream.text.length, 2400 * 5 * part.length);
    assert.ok(took < 5000, `${took} ms`); // on a machine with other things to do
  });

  test('come in events of any type, and are nothing but their pieces', async () => {
    const { socket, sub, seen, wrong } = await live();
    const types = [];
    sub.on('stream', ({ type, id }) => types.push([type, id]));
    socket.receive({ ...piece(1, 0, 'why'), type: 'thinking' }, { ...piece(2, -1, 'x'), type: 'thinking' }, { ...piece(3, 0, 'x'), type: 'other', data: { stream: 'a' } },
      { ...piece(4, 0, 'x'), type: 'other', data: 'x' });
    assert.deepEqual(seen, [['why', undefined]]);
    assert.deepEqual(types, [['thinking', 's.1']]);
    assert.deepEqual(wrong, []);
  });

  test('are forgotten once they have ended', async () => {
    const { socket, seen } = await live();
    socket.receive(piece(1, 0, 'one', { state: 'done' }), piece(2, 0, 'other'), piece(3, 3, ' more', { state: 'failed' }));
    assert.deepEqual(seen, [['one', 'done']]);
  });

  for (const subscribed of [false, true]) {
    test(`to nobody in particular are whole without a log, ${subscribed ? 'in' : 'without'} a subscription to everything`, async () => {
      const { client, opened } = setup();
      const socket = await opened();
      const seen = [];
      const source = subscribed ? client.subscribe('*') : client;
      source.on('stream', ({ from, text, state }) => seen.push([from, text, state]));
      if (subscribed) socket.receive({ ...confirmed(7), project_id: '*' });
      const told = (at, text, more) => ({ ...piece(undefined, at, text, more), project_id: '*' });
      socket.receive(told(0, 'He'), told(5, ' you'), told(0, 'Hello'), told(9, '', { state: 'done' }));
      assert.deepEqual(seen, [[0, 'He', undefined], [0, 'Hello you', undefined], [0, 'Hello you', 'done']]);
      client.close();
    });
  }

  test('to nobody in particular go on after a reconnect without what was lost', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    const seen = [];
    client.on('stream', ({ from, text }) => seen.push([from, text]));
    const told = (at, text) => ({ ...piece(undefined, at, text), project_id: '*' });
    socket.receive(told(0, 'one'));
    socket.break();
    await clock.advance(60_000);
    (await opened()).receive(told(8, 'three'));
    assert.deepEqual(seen, [[0, 'one'], [8, 'three']]);
    client.close();
  });

  test('in any order and with any losses of the early ones, they are a prefix at each moment and the text at the end', async () => {
    for (let seed = 1; seed <= 300; seed++) await check(seed);
  });

  test('for a page that comes in the middle they are the same from there on', async () => {
    for (let seed = 1; seed <= 300; seed++) await check(seed, true);
  });
});

const PARTS = ['a', 'é', '😀', '\ud83d', 'e\u0301', '👩‍💻', '"}', '\n', 'word '];

async function check(seed, middle = false) {
  const { socket, sub } = middle ? await later() : await live();
  const next = random(seed);
  const pick = (n) => Math.floor(next() * n);
  let text = '';
  for (let n = pick(40); n >= 0; n--) text += PARTS[pick(PARTS.length)];
  const cut = (most) => {
    const found = [];
    for (let at = 0; at < text.length;) {
      const length = 1 + pick(most);
      found.push([at, text.slice(at, at + length)]);
      at += length;
    }
    return found;
  };
  const logged = cut(12);
  logged.push([text.length, '', { state: 'done' }]);
  const swapped = middle ? 0 : 0.3; // a FIFO queue keeps them in order
  for (let n = logged.length - 2; n > 0; n--) if (next() < swapped) [logged[n], logged[n - 1]] = [logged[n - 1], logged[n]];
  const early = cut(4).filter(() => next() < 0.8);
  let stream;
  sub.on('stream', (each) => {
    stream ??= each;
    assert.equal(stream, each);
    assert.ok(text.startsWith(each.text, each.from), `seed ${seed}: ${each.from} ${JSON.stringify(each.text)} of ${JSON.stringify(text)}`);
  });
  let seq = middle ? 9 : 0;
  if (middle) for (let missed = pick(logged.length); missed > 0; missed--) logged.shift();
  const first = logged[0][0];
  while (logged.length) {
    if (early.length && next() < 0.7) socket.receive(piece(undefined, ...early.splice(pick(Math.min(3, early.length)), 1)[0]));
    else socket.receive(piece(++seq, ...logged.shift()));
  }
  assert.ok(stream.from === 0 || middle && stream.from === first);
  assert.equal(stream.text, text.slice(stream.from), `seed ${seed}`);
  assert.equal(stream.state, 'done');
}

describe('orders', () => {
  const answer = (seq, status, id = 'm') => ({ type: 'project_updated', project_id: P, seq, timestamp: 't', in_reply_to: id, data: { status } });

  async function ordered() {
    const all = setup();
    const socket = await all.opened();
    const order = all.client.order('dev', { task: 't' }, { project: P, messageId: 'm' });
    assert.equal(socket.actions('forward').length, 0, 'the log comes first');
    socket.receive(confirmed(4));
    await settled();
    assert.equal(socket.actions('forward').length, 1);
    return { ...all, socket, order };
  }

  test('resolve at confirmation, to what another page needs', async () => {
    const { socket, order } = await ordered();
    socket.receive({ type: 'forward_confirmed', message_id: 'm', sqs_message_id: 'x', project_id: P, seq: 4, epoch: 'E1' });
    assert.deepEqual(await order, { messageId: 'm', sqsMessageId: 'x', project: P, seq: 4, epoch: 'E1' });
  });

  test('are their own answers, from the first to the last, however late the loop begins', async () => {
    const { socket, order, client } = await ordered();
    socket.receive({ type: 'forward_confirmed', message_id: 'm' });
    await order;
    socket.receive(answer(5, 'working'), answer(6, 'working', 'another'));
    const seqs = [];
    const loop = (async () => { for await (const { seq } of order) seqs.push(seq); })();
    await settled();
    assert.deepEqual(socket.actions('subscribe').at(-1), { action: 'subscribe', project_id: P, since: 4, epoch: 'E1', snapshot: false });
    socket.receive(confirmed(6, true), answer(5, 'working'), answer(6, 'done', 'another'), answer(7, 'done'), answer(8, 'working'));
    await loop;
    assert.deepEqual(seqs, [5, 7]);
    client.close();
  });

  test('go on in another page', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const order = client.follow({ messageId: 'm', project: P, seq: 4, epoch: 'E1' });
    const texts = [];
    order.on('stream', ({ text, state }) => texts.push([text, state]));
    assert.deepEqual(socket.actions('subscribe'), [{ action: 'subscribe', project_id: P, since: 4, epoch: 'E1', snapshot: false }]);
    socket.receive(confirmed(5, true), piece(5, 0, 'text', { state: 'done' }), { ...piece(6, 0, 'x'), in_reply_to: 'n' });
    assert.deepEqual(texts, [['text', 'done']]);
    assert.equal(socket.actions('forward').length, 0);
  });

  test('that are refused say so, to who awaits and to who loops', async () => {
    const { socket, order } = await ordered();
    const loop = (async () => { for await (const event of order) assert.fail(event); })();
    socket.receive({ type: 'error', code: 'forbidden', message: 'No.', message_id: 'm' });
    await assert.rejects((async () => order)(), { code: 'forbidden' });
    await assert.rejects(loop, { code: 'forbidden' });
  });

  test('without a project are answered to the connection', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const order = client.order('dev', {}, { messageId: 'm' });
    const statuses = [];
    const loop = (async () => { for await (const { data } of order) statuses.push(data.status); })();
    await settled();
    socket.receive({ type: 'forward_confirmed', message_id: 'm' });
    for (const status of ['working', 'done']) socket.receive({ type: 'project_updated', project_id: '*', in_reply_to: 'm', timestamp: 't', data: { status } });
    await loop;
    assert.deepEqual(statuses, ['working', 'done']);
    client.close();
  });

  for (const subscribed of [false, true]) {
    test(`without a project have their texts, ${subscribed ? 'and' : 'not'} subscribed to everything`, async () => {
      const { client, opened } = setup();
      const socket = await opened();
      if (subscribed) {
        client.subscribe('*');
        socket.receive({ ...confirmed(7), project_id: '*' });
      }
      const order = client.order('dev', {}, { messageId: 'm' });
      const heard = [];
      order.on('stream', ({ text, state }) => heard.push([text, state]));
      order.on('event', ({ type }) => heard.push(type));
      const statuses = [];
      const loop = (async () => { for await (const { data } of order) statuses.push(data.status); })();
      await settled();
      socket.receive({ type: 'forward_confirmed', message_id: 'm' });
      const told = (message) => socket.receive({ ...message, project_id: '*' });
      for (const [at, text, state] of [[0, 'He'], [2, 'llo'], [0, 'Hello', 'done']]) told(piece(undefined, at, text, state && { state }));
      told({ ...piece(undefined, 0, 'x'), in_reply_to: 'n' });
      told({ type: 'project_updated', in_reply_to: 'm', data: { status: 'done' } });
      await loop;
      assert.deepEqual(heard, [['He', undefined], 'stream', ['Hello', undefined], 'stream', ['Hello', 'done'], 'stream', 'project_updated']);
      assert.deepEqual(statuses, [undefined, undefined, undefined, 'done']);
      order.close();
      told(piece(undefined, 0, 'x'));
      client.close();
    });
  }

  test('have texts of theirs alone, and after a gap what is left of them', async () => {
    const { socket, order } = await ordered();
    const heard = [];
    order.on('stream', ({ from, text }) => heard.push([from, text]));
    socket.receive({ ...piece(5, 0, 'x'), in_reply_to: 'n' }, piece(6, 3, 'lo'), piece(7, 0, 'Hel'), { ...confirmed(20), recovered: false }, piece(21, 9, 'end'));
    assert.deepEqual(heard, [[0, 'Hello'], [9, 'end']]);
  });

  test('are stopped under their id and project', async () => {
    const { socket, order } = await ordered();
    const stopped = order.stop();
    socket.receive({ type: 'stop_confirmed', message_id: 'm', project_id: P });
    assert.deepEqual(await stopped, { messageId: 'm' });
    assert.equal(socket.actions('stop')[0].project_id, P);
  });
});
