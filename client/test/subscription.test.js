import assert from 'node:assert/strict';
import { describe, test } from 'node:test';

import { confirmed, event, record, settled, setup } from './fakes.js';

/** A subscription of project p that is live at a seq. */
async function live(seq = 10, options = undefined) {
  const all = setup();
  const socket = await all.opened();
  const sub = all.client.subscribe('p', options);
  socket.receive(confirmed(seq));
  return { ...all, socket, sub, seen: record(sub) };
}

/** Breaks the connection and opens the next. */
async function reconnect({ clock, sockets, opened }) {
  sockets.at(-1).break();
  await clock.advance(20_000 / 2);
  return opened();
}

describe('subscribing', () => {
  test('is asked for when open, and confirmed', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    assert.deepEqual(socket.actions('subscribe'), [{ action: 'subscribe', project_id: 'p', snapshot: false }]);
    assert.deepEqual([sub.state, sub.seq], ['pending', undefined]);
    socket.receive(confirmed(42));
    assert.deepEqual([sub.state, sub.seq, sub.epoch], ['live', 42, 'E1']);
  });

  test('before the connection is open, or while waiting for it, is asked for once it is', async () => {
    const { client, clock, dialled, opened } = setup();
    client.subscribe('early');
    (await dialled()).break();
    assert.equal(client.state, 'waiting');
    client.subscribe('p', { since: 7, epoch: 'E1' });
    await clock.advance(250);
    const socket = await opened();
    assert.deepEqual(socket.actions('subscribe').map(({ project_id, since, epoch }) => [project_id, since, epoch]),
      [['early', undefined, undefined], ['p', 7, 'E1']]);
  });

  test('bad arguments are refused before anything is sent', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    for (const project of [undefined, null, 7, {}]) assert.throws(() => client.subscribe(project), TypeError);
    for (const since of ['7', -1, 1.5, NaN, {}]) assert.throws(() => client.subscribe('p', { since }), TypeError);
    assert.equal(socket.actions('subscribe').length, 0);
  });

  test('an error about a project that answers nothing is told, and changes nothing', async () => {
    const all = setup();
    const socket = await all.opened();
    const sub = all.client.subscribe('p');
    socket.receive(confirmed(3), { type: 'error', code: 'forbidden', message: 'No.', project_id: 'p' });
    assert.deepEqual([sub.state, ...all.errors()], ['live', 'forbidden']);
  });

  test('a refusal fails the subscription, and is asked again after a reconnect', async () => {
    const all = setup();
    const socket = await all.opened();
    const sub = all.client.subscribe('p');
    const seen = record(sub);
    socket.receive({ type: 'error', code: 'forbidden', message: 'Not yours.', action: 'subscribe', project_id: 'p' });
    assert.deepEqual([sub.state, ...all.errors()], ['failed', 'forbidden']);
    await all.clock.advance(4_000);
    socket.receive({ type: 'pong' });
    await all.clock.advance(22_000);
    assert.equal(socket.actions('subscribe').length, 1);
    (await reconnect(all)).receive(confirmed(3));
    assert.deepEqual(seen, ['failed', 'pending', 'live']);
  });

  test('a refusal that is retryable is asked again with the next ping', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    socket.receive({ type: 'error', code: 'unavailable', message: 'Later.', retryable: true, action: 'subscribe', project_id: 'p' });
    await clock.advance(25_000);
    assert.equal(socket.actions('subscribe').length, 2);
    socket.receive(confirmed(3));
    assert.equal(sub.state, 'live');
    await clock.advance(20_000);
    assert.equal(socket.actions('subscribe').length, 2);
  });
});

describe('the cursor', () => {
  test('events come in order, duplicates once', async () => {
    const { socket, seen, sub } = await live();
    socket.receive(event(11), event(12), event(12), event(11), event(13), event(3));
    assert.deepEqual([seen, sub.seq], [[11, 12, 13], 13]);
  });

  test('resumes after the last event, with its epoch', async () => {
    const all = await live();
    all.socket.receive(event(11), event(12));
    const socket = await reconnect(all);
    assert.deepEqual(socket.actions('subscribe'),
      [{ action: 'subscribe', project_id: 'p', since: 12, epoch: 'E1', snapshot: false }]);
  });

  test('recovered: the head at confirmation does not move it, what was missed follows', async () => {
    const all = await live();
    const socket = await reconnect(all);
    socket.receive(confirmed(13, true));
    assert.equal(all.sub.seq, 10);
    socket.receive(event(11), event(12), event(13), event(14));
    assert.deepEqual(all.seen, ['pending', 'live', 11, 12, 13, 14]);
  });

  test('recovered, but lost again in the middle of the catch-up: resumes from there', async () => {
    const all = await live();
    (await reconnect(all)).receive(confirmed(90, true), event(11), event(12));
    const socket = await reconnect(all);
    assert.equal(socket.actions('subscribe')[0].since, 12);
  });

  test('not recovered: a gap, and the stream goes on at the head', async () => {
    const all = await live();
    const socket = await reconnect(all);
    socket.receive(confirmed(500, false, 'p', 'E2'), event(500), event(501));
    assert.deepEqual(all.seen, ['pending', 'live', 'gap 10-500', 501]);
    assert.equal(all.sub.epoch, 'E2');
    assert.deepEqual((await reconnect(all)).actions('subscribe')[0].epoch, 'E2');
  });

  test('lost before the first confirmation: asks for the present again', async () => {
    const all = setup();
    await all.opened();
    const sub = all.client.subscribe('p');
    const socket = await reconnect(all);
    assert.equal('since' in socket.actions('subscribe')[0], false);
    socket.receive(confirmed(8));
    assert.equal(sub.seq, 8);
  });

  test('a wiped log starts at 0 and is not taken for the old one', async () => {
    const all = await live(10);
    (await reconnect(all)).receive(confirmed(0, false, 'p', 'E2'), event(1));
    assert.deepEqual(all.seen, ['pending', 'live', 'gap 10-0', 1]);
  });

  test('a gap may come at any time, and is followed by a request for what is new', async () => {
    const { socket, seen } = await live(10, { snapshot: true });
    socket.receive(event(11), confirmed(400, false));
    assert.deepEqual(socket.actions('subscribe').map(({ since, snapshot }) => [since, snapshot]), [[undefined, true], [400, true]]);
    socket.receive(confirmed(401, true), { type: 'project_snapshot', project_id: 'p', data: 's' }, event(401));
    assert.deepEqual(seen, [11, 'gap 11-400', ['snapshot', 's'], 401]);
  });

  test('events before the confirmation on this connection are dropped: the catch-up repeats them', async () => {
    const all = await live();
    const socket = await reconnect(all);
    socket.receive(event(12), confirmed(12, true), event(11), event(12));
    assert.deepEqual(all.seen, ['pending', 'live', 11, 12]);
  });

  test('a hole, as where a frame was unreadable, is a gap', async () => {
    const { socket, seen, errors } = await live();
    socket.receive(event(11), '{"type":"step","project_id":"p","seq":12', event(13), event(14));
    assert.deepEqual([seen, errors()], [[11, 'gap 11-12', 13, 14], ['bad_message']]);
  });

  test('ephemeral events are delivered and move nothing, confirmed or not', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p', { since: 4 });
    const seen = record(sub);
    const token = { type: 'token', project_id: 'p', data: 'x' };
    socket.receive(token, confirmed(5, true), token, event(5));
    assert.deepEqual([seen, sub.seq], [['token', 'live', 'token', 5], 5]);
  });

  test('projects do not mix', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const [a, b] = ['a', 'b'].map((project) => record(client.subscribe(project)));
    socket.receive(confirmed(1, undefined, 'a'), confirmed(7, undefined, 'b'), event(8, 'b'), event(2, 'a'), event(9, 'b'));
    assert.deepEqual([a, b], [['live', 2], ['live', 8, 9]]);
  });

  test('a server without a log sends no seq: everything is delivered', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const seen = record(client.subscribe('p'));
    socket.receive({ type: 'subscription_confirmed', project_id: 'p' }, event(undefined), event(undefined));
    assert.deepEqual(seen, ['live', 'step', 'step']);
  });
});

describe('what belongs to no subscription', () => {
  test('goes to the connection: broadcasts, messages to it alone', async () => {
    const { socket, seen, log } = await live();
    socket.receive(event(5, '*', 'notice'), { type: 'hello' }, event(11));
    assert.deepEqual(log.filter(([name]) => name === 'event').map(([, { type }]) => type), ['notice', 'hello']);
    assert.deepEqual(seen, [11]);
  });

  test('broadcasts can be subscribed to like a project', async () => {
    const { client, opened, log } = setup();
    const socket = await opened();
    const seen = record(client.subscribe('*', { since: 3 }));
    socket.receive(confirmed(5, true, '*'), event(4, '*'), event(5, '*'));
    assert.deepEqual(seen, ['live', 4, 5]);
    assert.equal(log.filter(([name]) => name === 'event').length, 0);
  });
});

describe('snapshots', () => {
  test('are asked for at every subscription and go before the events', async () => {
    const all = setup();
    const socket = await all.opened();
    const seen = record(all.client.subscribe('p', { snapshot: true }));
    assert.equal(socket.actions('subscribe')[0].snapshot, true);
    socket.receive(confirmed(1), { type: 'project_snapshot', project_id: 'p', data: { n: 1 } }, event(2));
    const next = await reconnect(all);
    assert.equal(next.actions('subscribe')[0].snapshot, true);
    next.receive(confirmed(2, true), { type: 'project_snapshot', project_id: 'p', data: null });
    assert.deepEqual(seen, ['live', ['snapshot', { n: 1 }], 2, 'pending', 'live', ['snapshot', null]]);
  });
});

describe('several subscriptions of one project', () => {
  test('share one request and one unsubscribe', async () => {
    const { client, socket, sub, seen } = await live();
    const other = client.subscribe('p');
    const seenToo = record(other);
    assert.deepEqual([other.state, other.seq, other.epoch], ['live', 10, 'E1']);
    socket.receive(event(11));
    sub.unsubscribe();
    sub.unsubscribe();
    socket.receive(event(12));
    assert.equal(socket.actions('unsubscribe').length, 0);
    other.unsubscribe();
    assert.deepEqual(socket.actions('subscribe').length, 1);
    assert.deepEqual(socket.actions('unsubscribe'), [{ action: 'unsubscribe', project_id: 'p' }]);
    assert.deepEqual([seen, seenToo], [[11, 'closed'], [11, 12, 'closed']]);
  });

  test('one that wants the past gets it; the others get nothing twice', async () => {
    const { client, socket, seen } = await live();
    socket.receive(event(11));
    const late = record(client.subscribe('p', { since: 8 }));
    assert.equal(socket.actions('subscribe')[1].since, 8);
    socket.receive(event(12), confirmed(12, true), event(9), event(10), event(11), event(12), event(13));
    assert.deepEqual([seen, late], [[11, 12, 13], ['live', 9, 10, 11, 12, 13]]);
  });

  test('several that want the past at once: one request at a time, as the server answers only the latest', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const logs = [7, 3, 5].map((since) => record(client.subscribe('p', { since })));
    assert.deepEqual(socket.actions('subscribe').map(({ since }) => since), [7]);
    socket.receive(confirmed(8, true), event(8));
    assert.deepEqual(socket.actions('subscribe').map(({ since }) => since), [7, 3]);
    socket.receive(confirmed(8, true), ...[4, 5, 6, 7, 8].map((seq) => event(seq)));
    assert.deepEqual(logs, [['live', 8], ['live', 4, 5, 6, 7, 8], ['live', 6, 7, 8]]);
  });

  test('one that wants the present does not get the catch-up of another', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const past = record(client.subscribe('p', { since: 8 }));
    const present = record(client.subscribe('p'));
    assert.equal(socket.actions('subscribe').length, 1);
    socket.receive(confirmed(10, true), event(9), event(10), event(11));
    assert.deepEqual([past, present], [['live', 9, 10, 11], ['live', 11]]);
  });

  test('a position of another epoch is a gap for whom it belongs to', async () => {
    const { client, socket, seen } = await live();
    const stale = record(client.subscribe('p', { since: 900, epoch: 'E0' }));
    socket.receive(confirmed(10, true), event(11));
    assert.deepEqual([seen, stale], [[11], ['live', 'gap 900-10', 11]]);
  });

  test('all resume together after a reconnect', async () => {
    const all = await live();
    const seenToo = record(all.client.subscribe('p'));
    const socket = await reconnect(all);
    assert.equal(socket.actions('subscribe').length, 1);
    socket.receive(confirmed(11, true), event(11));
    assert.deepEqual([all.seen, seenToo], [['pending', 'live', 11], ['pending', 'live', 11]]);
  });
});

describe('unsubscribing', () => {
  test('ends the listening, and a reconnect does not ask again', async () => {
    const all = await live();
    all.sub.unsubscribe();
    all.socket.receive(event(11));
    assert.deepEqual(all.seen, ['closed']);
    assert.equal((await reconnect(all)).actions('subscribe').length, 0);
  });

  test('before the answer came waits for it', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    const seen = record(sub);
    sub.unsubscribe();
    assert.deepEqual(socket.sent.slice(1).map(({ action }) => action), ['subscribe']);
    socket.receive(confirmed(9), event(10), { type: 'unsubscription_confirmed', project_id: 'p' });
    assert.deepEqual(socket.sent.slice(1).map(({ action }) => action), ['subscribe', 'unsubscribe']);
    assert.deepEqual(seen, ['closed']);
  });

  test('and subscribing anew before the first answer: each answer goes to its request', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const first = client.subscribe('p');
    const seen = record(first);
    first.unsubscribe();
    const second = client.subscribe('p', { since: 5 });
    const seenToo = record(second);
    socket.receive(confirmed(9), event(10));
    assert.deepEqual([second.state, second.seq], ['pending', 5]);
    assert.deepEqual(socket.sent.slice(1).map(({ action, since }) => [action, since]), [['subscribe', undefined], ['subscribe', 5]]);
    socket.receive(confirmed(10, true), event(6), event(7), event(8), event(9), event(10));
    assert.deepEqual([seen, seenToo], [['closed'], ['live', 6, 7, 8, 9, 10]]);
  });

  test('after a refusal leaves nothing behind', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    sub.unsubscribe();
    socket.receive({ type: 'error', code: 'busy', message: 'Later.', retryable: true, action: 'subscribe', project_id: 'p' });
    assert.equal(client.subscribe('p').state, 'pending');
    assert.deepEqual(socket.sent.slice(1).map(({ action }) => action), ['subscribe', 'subscribe']);
  });

  test('inside a listener is taken at once', async () => {
    const { client, socket, sub, seen } = await live();
    const other = record(client.subscribe('p'));
    sub.on('event', () => sub.unsubscribe());
    socket.receive(event(11), event(12));
    assert.deepEqual([seen, other], [[11, 'closed'], [11, 12]]);
  });

  test('during the wait sends nothing later', async () => {
    const all = await live();
    all.socket.break();
    all.sub.unsubscribe();
    await all.clock.advance(250);
    const socket = await all.opened();
    assert.deepEqual(socket.sent.map(({ action }) => action), ['ping']);
  });
});

describe('iterating', () => {
  test('yields every event in order and ends with unsubscribe', async () => {
    const { socket, sub } = await live();
    const got = [];
    const done = (async () => {
      for await (const { seq } of sub) got.push(seq);
    })();
    socket.receive(event(11), event(12));
    await settled();
    socket.receive(event(13));
    await settled();
    sub.unsubscribe();
    await done;
    assert.deepEqual(got, [11, 12, 13]);
  });

  test('of a closed subscription ends at once', async () => {
    const { client, sub } = await live();
    client.close();
    for await (const _ of sub) assert.fail('nothing can come');
  });

  test('leaving the loop keeps a subscription that has listeners', async () => {
    const { socket, sub, seen } = await live();
    const first = (async () => {
      for await (const { seq } of sub) return seq;
    })();
    socket.receive(event(11));
    assert.equal(await first, 11);
    socket.receive(event(12));
    assert.deepEqual([sub.state, sub.seq, seen], ['live', 12, [11, 12]]);
  });

  test('the last loop to end takes a subscription with it that nobody else listens to', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    for (let i = 0; i < 3; i++) {
      const sub = client.subscribe('p');
      const loops = [sub[Symbol.asyncIterator](), sub[Symbol.asyncIterator]()];
      socket.receive(confirmed(0), event(1), event(2));
      await loops[0].next();
      await loops[0].return();
      assert.equal(sub.state, 'live');
      await assert.rejects(loops[1].throw(new Error('of the page')), /of the page/);
      assert.equal(sub.state, 'closed');
      socket.receive({ type: 'unsubscription_confirmed', project_id: 'p' });
    }
    assert.equal(socket.actions('unsubscribe').length, 3);
  });

  test('too slowly: memory stays bounded, and what did not fit is read again from the log', async () => {
    const { client, opened } = setup({ maxBuffer: 3 });
    const socket = await opened();
    const sub = client.subscribe('p');
    socket.receive(confirmed(0));
    const reader = sub[Symbol.asyncIterator]();
    const first = reader.next();
    for (let seq = 1; seq <= 50; seq++) socket.receive(event(seq));
    const got = [(await first).value.seq];
    for (let i = 0; i < 3; i++) got.push((await reader.next()).value.seq);
    assert.equal(socket.actions('subscribe').at(-1).since, 4);
    const next = reader.next();
    socket.receive(confirmed(50, true), ...Array.from({ length: 46 }, (_, i) => event(5 + i)));
    got.push((await next).value.seq);
    assert.deepEqual([got, sub.state, sub.seq], [[1, 2, 3, 4, 5], 'live', 5]);
  });

  test('too slowly for ephemeral events, which nobody keeps: an error says so', async () => {
    const { client, opened } = setup({ maxBuffer: 2 });
    const socket = await opened();
    const sub = client.subscribe('p');
    socket.receive(confirmed(0));
    const reader = sub[Symbol.asyncIterator]();
    for (let i = 0; i < 5; i++) socket.receive(event(undefined));
    await reader.next();
    await reader.next();
    await assert.rejects(reader.next(), { code: 'overflow', retryable: true });
    assert.equal((await reader.next()).done, true);
  });

  test('two readers each get everything', async () => {
    const { socket, sub } = await live();
    const read = async () => {
      const got = [];
      for await (const { seq } of sub) if (got.push(seq) === 2) return got;
    };
    const both = Promise.all([read(), read()]);
    socket.receive(event(11), event(12));
    assert.deepEqual(await both, [[11, 12], [11, 12]]);
  });

  test('continues over a reconnect', async () => {
    const all = await live();
    const read = (async () => {
      const got = [];
      for await (const { seq } of all.sub) if (got.push(seq) === 3) return got;
    })();
    all.socket.receive(event(11));
    (await reconnect(all)).receive(confirmed(13, true), event(12), event(13));
    assert.deepEqual(await read, [11, 12, 13]);
  });
});

test('whatever the network does, every event comes once and in order (seeded)', async () => {
  for (let seed = 1; seed <= 30; seed++) {
    let state = seed;
    const random = (n) => Math.floor(((state = (state * 48_271) % 2_147_483_647) / 2_147_483_647) * n);
    const all = setup();
    await all.opened();
    let head = random(5);
    const subs = [all.client.subscribe('p', { since: head, epoch: 'E1' })];
    const starts = [head];
    const logs = [record(subs[0])];
    let answered = 0;
    let sent = head; // of the log, on this connection
    const answer = () => { // the server answers the requests one by one, then replays
      const socket = all.sockets.at(-1);
      const requests = socket.actions('subscribe');
      if (answered >= requests.length) return;
      const { since } = requests[answered++];
      socket.receive(confirmed(head, since === undefined ? undefined : true));
      sent = since ?? head;
    };
    for (let step = 0; step < 200; step++) {
      const socket = all.sockets.at(-1);
      switch (random(7)) {
        case 0: case 1: head++; break;
        case 2: case 3: if (answered && sent < head) socket.receive(event(++sent)); break;
        case 4: if (sent && random(2)) socket.receive(event(sent)); break; // repeated
        case 5: answer(); break;
        case 6:
          if (random(4) === 0) {
            await reconnect(all);
            answered = 0;
            sent = 0;
          } else if (subs.length < 4 && subs[0].state === 'live') {
            starts.push(random(head + 1));
            subs.push(all.client.subscribe('p', { since: starts.at(-1), epoch: 'E1' }));
            logs.push(record(subs.at(-1)));
          }
      }
    }
    while (answered < all.sockets.at(-1).actions('subscribe').length) answer();
    while (sent < head) all.sockets.at(-1).receive(event(++sent));
    logs.forEach((log, i) => {
      const events = log.filter((entry) => typeof entry === 'number');
      assert.deepEqual(events, Array.from({ length: head - starts[i] }, (_, n) => starts[i] + n + 1), `seed ${seed}, subscription ${i}`);
      assert.equal(log.some((entry) => String(entry).startsWith('gap')), false);
    });
    all.client.close();
  }
});
