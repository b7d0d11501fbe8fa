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

async function live(seq = 0) {
  const all = setup();
  const socket = await all.opened();
  const sub = all.client.subscribe(P);
  const seen = [];
  const errors = [];
  sub.on('stream', (stream) => seen.push([stream.text, stream.state]));
  sub.on('error', (error) => errors.push(error.code));
  socket.receive(confirmed(seq));
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

  test('in any order and with any losses of the early ones, they are a prefix at each moment and the text at the end', async () => {
    for (let seed = 1; seed <= 300; seed++) await check(seed);
  });
});

const PARTS = ['a', 'é', '😀', '\ud83d', 'e\u0301', '👩‍💻', '"}', '\n', 'word '];

async function check(seed) {
  const { socket, sub } = await live();
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
  for (let n = logged.length - 2; n > 0; n--) if (next() < 0.3) [logged[n], logged[n - 1]] = [logged[n - 1], logged[n]];
  const early = cut(4).filter(() => next() < 0.8);
  let stream;
  sub.on('stream', (each) => {
    stream = each;
    assert.ok(text.startsWith(each.text), `seed ${seed}: ${JSON.stringify(each.text)} of ${JSON.stringify(text)}`);
  });
  let seq = 0;
  while (logged.length) {
    if (early.length && next() < 0.7) socket.receive(piece(undefined, ...early.splice(pick(Math.min(3, early.length)), 1)[0]));
    else socket.receive(piece(++seq, ...logged.shift()));
  }
  assert.equal(stream.text, text, `seed ${seed}`);
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

  test('are stopped under their id and project', async () => {
    const { socket, order } = await ordered();
    const stopped = order.stop();
    socket.receive({ type: 'stop_confirmed', message_id: 'm', project_id: P });
    assert.deepEqual(await stopped, { messageId: 'm' });
    assert.equal(socket.actions('stop')[0].project_id, P);
  });
});
