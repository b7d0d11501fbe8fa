/** Listeners that call back, answers that say what they answer, and all that was once lost, wrong or awkward. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { describe, test } from 'node:test';

import { confirmed, event, fakePage, record, settled, setup } from './fakes.js';
import { FakeGateway, microtasks, network, VirtualClock } from './gateway.js';

const { connect } = await import('../agenticai-ws.js');

/** A client and a whole gateway on a virtual clock. */
function world(options = {}, gatewayOptions = {}, networkOptions = {}) {
  const clock = new VirtualClock();
  const gateway = new FakeGateway({ clock, ...gatewayOptions });
  const net = network(gateway, networkOptions);
  const client = connect('ws://gateway/ws', { clock, random: () => 0.5, WebSocket: net.WebSocket, ...options });
  const publish = (project, n = 1) => { for (let i = 0; i < n; i++) gateway.publish(project); };
  return { clock, gateway, client, publish, net, advance: (ms) => clock.advance(ms) };
}

/** A subscription of project p that is live at a seq. */
async function live(seq = 10, options = undefined) {
  const all = setup();
  const socket = await all.opened();
  const sub = all.client.subscribe('p', options);
  socket.receive(confirmed(seq));
  return { ...all, socket, sub, seen: record(sub) };
}

const refused = (code, more = {}) => ({ type: 'error', code, message: code, action: 'subscribe', project_id: 'p', ...more });

describe('a listener may call', () => {
  test('subscribe with since: the new one gets all from there, in order', async () => {
    const { client, advance, publish } = world();
    const sub = client.subscribe('p');
    await advance(100);
    let late;
    sub.on('event', ({ seq }) => { if (seq === 5) late = record(client.subscribe('p', { since: 2 })); });
    publish('p', 7);
    await advance(1_000);
    assert.deepEqual(late, ['live', 3, 4, 5, 6, 7]);
  });

  test('unsubscribe and subscribe in a gap: the new one gets its snapshot, and the server is asked once', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p', { snapshot: true });
    socket.receive(confirmed(10), { type: 'project_snapshot', project_id: 'p', data: 0 });
    let seen;
    sub.on('gap', () => {
      sub.unsubscribe();
      seen = record(client.subscribe('p', { snapshot: true }));
    });
    socket.receive(confirmed(400, false));
    const asked = () => socket.actions('subscribe').length;
    for (let answered = 1; answered < asked(); answered++) {
      const { since } = socket.actions('subscribe')[answered];
      socket.receive(confirmed(400, since === undefined ? undefined : true), { type: 'project_snapshot', project_id: 'p', data: answered });
    }
    assert.deepEqual([seen.filter((what) => Array.isArray(what)).length, asked() <= 3], [1, true]);
  });

  test('unsubscribe in a gap: the server is left, too', async () => {
    const { client, gateway, advance } = world();
    const sub = client.subscribe('p', { since: 0, snapshot: true });
    await advance(1_000);
    sub.on('gap', () => sub.unsubscribe());
    gateway.publish('p', { lost: true });
    gateway.skip('p');
    await advance(1_000);
    assert.equal(sub.state, 'closed');
    assert.deepEqual([...gateway.connections].map(({ subscriptions }) => [...subscriptions]), [['*']]);
  });

  test("unsubscribe and subscribe where another one's end is told: none is lost", async () => {
    const all = await live();
    const { client, socket, sub: a } = all;
    const b = client.subscribe('p');
    let c;
    a.on('state', (state) => {
      if (state !== 'closed') return;
      b.unsubscribe();
      c = client.subscribe('p');
    });
    a.unsubscribe();
    socket.receive({ type: 'unsubscription_confirmed', project_id: 'p' });
    if (socket.actions('subscribe').length > 1) socket.receive(confirmed(10));
    assert.equal(c.state, 'live');
    const seen = record(c);
    socket.receive(event(11));
    assert.deepEqual(seen, [11]);
  });

  test('close in an error, while getToken throws: no attempt follows', async () => {
    let asked = 0;
    const { client, clock, sockets } = setup({ getToken: () => { asked++; throw new Error('no'); } });
    client.on('error', () => client.close());
    await settled();
    await clock.advance(60_000);
    assert.deepEqual([client.state, asked, sockets.length, clock.pending], ['closed', 1, 0, 0]);
  });

  test('close in a message, at connected', async () => {
    const { client, dialled, clock } = setup();
    client.on('message', () => client.close());
    const socket = await dialled();
    socket.receive({ type: 'connected' });
    assert.deepEqual([client.state, socket.closed, clock.pending], ['closed', true, 0]);
  });

  test('anything: no listener runs inside another one, and none after the end', async () => {
    const { client, socket, sub } = await live();
    let depth = 0, deepest = 0, after = 0;
    const other = client.subscribe('p');
    const enter = (fn) => (...args) => { deepest = Math.max(deepest, ++depth); fn(...args); depth--; };
    sub.on('event', enter(() => { other.unsubscribe(); client.subscribe('p'); client.forward('dev').catch(() => {}); }));
    other.on('state', enter(() => {}));
    other.on('event', () => after++);
    sub.on('event', () => client.close());
    sub.on('event', () => after++);
    sub.on('state', enter(() => {}));
    socket.receive(event(11));
    assert.deepEqual([deepest, after, sub.state], [1, 0, 'closed']);
  });

  test('seq moves only as an event is handed over', async () => {
    const { client, socket } = await live();
    const [a, b] = [client.subscribe('p'), client.subscribe('p')];
    const seen = [];
    a.on('event', () => seen.push(a.seq, b.seq));
    b.on('event', () => seen.push(a.seq, b.seq));
    socket.receive(event(11));
    assert.deepEqual(seen, [11, 10, 11, 11]);
  });
});

describe('several positions in one project', () => {
  test('one far in the past, which is gone, costs the others nothing', async () => {
    const { client, gateway, advance, publish } = world();
    publish('p', 10);
    const sub = client.subscribe('p');
    await advance(100);
    gateway.expire('p', 8);
    const seen = record(sub);
    const [late] = [record(client.subscribe('p', { since: 1 }))];
    publish('p', 2); // on their way while it is asked
    await advance(3_000);
    publish('p');
    await advance(100);
    assert.deepEqual(seen, [11, 12, 13]);
    assert.deepEqual([late[1].slice(0, 5), late.at(-1)], ['gap 1', 13]);
  });

  test('one beyond the end, without an epoch, is told that its log is gone', async () => {
    const { client, gateway, advance, publish } = world();
    publish('p', 10);
    const seen = record(client.subscribe('p'));
    await advance(100);
    const late = record(client.subscribe('p', { since: 20 }));
    await advance(3_000);
    publish('p', 11);
    await advance(100);
    assert.deepEqual(late.slice(0, 3), ['live', 'gap 20-10', 11]);
    assert.deepEqual(seen.filter((what) => typeof what === 'number'), Array.from({ length: 11 }, (_, i) => 11 + i));
    assert.equal(gateway.log('p').head, 21);
  });

  test('one that joins gets neither a gap nor what another one catches up on', async () => {
    const { client, advance, publish } = world({}, { readMs: () => 50 });
    publish('p', 20);
    const past = record(client.subscribe('p', { since: 0 }));
    await advance(130); // in the middle of it
    const present = record(client.subscribe('p'));
    await advance(3_000);
    publish('p');
    await advance(100);
    assert.deepEqual(past, ['live', ...Array.from({ length: 21 }, (_, i) => i + 1)]);
    assert.deepEqual(present.filter((what) => what !== 'live'), [21]);
  });

  test('new ones every 30 ms, at answers of 40 ms, starve nobody', async () => {
    const { client, advance, publish } = world({}, { readMs: () => 30 }, { latency: () => 5 });
    publish('p', 6);
    const seen = record(client.subscribe('p'));
    await advance(100);
    for (let i = 0; i < 100; i++) {
      client.subscribe('p', { since: i % 6 });
      if (i % 10 === 0) publish('p');
      await advance(30);
    }
    const soFar = seen.filter((what) => typeof what === 'number');
    assert.ok(soFar.length >= 9, `${soFar.length} of 10 events in time`);
  });

  test('an error to a second subscribe does not silence the first', async () => {
    const { client, socket, seen } = await live();
    const other = client.subscribe('p', { since: 3 });
    socket.receive(refused('unavailable'), event(11));
    assert.deepEqual([seen, other.state], [[11], 'failed']);
  });

  test('a broadcast before the confirmation of * reaches its subscriber', async () => {
    const { client, opened, log } = setup();
    const socket = await opened();
    const seen = record(client.subscribe('*'));
    socket.receive(event(5, '*'));
    socket.receive(confirmed(5, undefined, '*'), event(6, '*'));
    const elsewhere = log.filter(([name]) => name === 'event').map(([, { seq }]) => seq);
    assert.deepEqual([...seen.filter(Number.isInteger), ...elsewhere].sort(), [5, 6]);
  });
});

describe('after unsubscribe', () => {
  test('events in flight go nowhere', async () => {
    const { socket, sub, log } = await live();
    sub.unsubscribe();
    socket.receive(event(11), event(undefined));
    assert.equal(log.filter(([name]) => name === 'event').length, 0);
    socket.receive({ type: 'unsubscription_confirmed', project_id: 'p' });
  });

  test('at the limit of subscriptions, one can be exchanged for another, in either order', async () => {
    for (const first of ['subscribe', 'unsubscribe']) {
      const { client, advance } = world({}, { maxSubscriptions: 1, readMs: () => 20 });
      const a = client.subscribe('a');
      await advance(5);
      if (first === 'unsubscribe') a.unsubscribe();
      const b = client.subscribe('b');
      if (first === 'subscribe') a.unsubscribe();
      await advance(1_000);
      assert.equal(b.state, 'live', first);
    }
  });
});

describe('answers without a name', () => {
  for (const announces of [true, false]) {
    const gateway = announces ? 'a gateway with ref' : 'an old gateway';
    test(`99 large forwards, then subscribe: nothing is lost at ${gateway} that drops what is too fast`, async () => {
      const { client, advance, gateway: g } = world({}, { announces, messagesPerSecond: 200 });
      await advance(10);
      const all = Array.from({ length: 99 }, () => client.forward('dev', 'x'.repeat(150_000)));
      const sub = client.subscribe('p');
      await advance(30_000);
      assert.equal(sub.state, 'live');
      await Promise.all(all);
      assert.equal(new Set(g.queue).size, 99);
    });

    test(`a project whose name ${gateway} does not repeat fails, and does not hang`, async () => {
      const { client, advance } = world({}, { announces });
      const subs = ['x'.repeat(257), ''].map((project) => client.subscribe(project));
      await advance(1_000);
      assert.deepEqual(subs.map(({ state }) => state), ['failed', 'failed']);
    });
  }

  test('after an outage 100 subscriptions and 100 forwards all arrive', async () => {
    const { client, advance, gateway, net } = world({}, { announces: false, messagesPerSecond: 200, sqsMs: () => 20 });
    await advance(10);
    const subs = Array.from({ length: 100 }, (_, i) => client.subscribe(`p${i}`));
    await advance(10_000);
    [...net.sockets].at(-1).cut();
    const all = Array.from({ length: 100 }, () => client.forward('dev', 'x'.repeat(40_000)));
    await advance(29_000);
    assert.ok(subs.every(({ state }) => state === 'live'));
    await Promise.all(all);
    assert.equal(gateway.queue.length, 100);
  });

  test('an answer goes by its ref, whatever it names', async () => {
    const { client, dialled } = setup();
    const socket = await dialled();
    socket.receive({ type: 'connected', ref: true });
    const sub = client.subscribe('p', { since: 10, epoch: 'E1' });
    const seen = record(sub);
    const [{ ref }] = socket.actions('subscribe');
    assert.match(ref, /^.{1,64}$/);
    assert.match(socket.texts.at(-1), /^\{"ref":/);
    socket.receive(confirmed(12, false)); // not asked for
    assert.equal(sub.state, 'pending');
    socket.receive({ ...confirmed(12, true), ref }, event(11), event(12));
    assert.deepEqual(seen, ['live', 11, 12]);
    const message = client.forward('dev', {}, { messageId: 'm' });
    socket.receive({ type: 'error', code: 'invalid_json', message: 'x', ref: socket.actions('forward')[0].ref });
    await assert.rejects(message, { code: 'invalid_json' });
  });
});

describe('size', () => {
  test('what exceeds the announced bound is refused here, in UTF-8 bytes; what fits is sent', async () => {
    const { client, dialled } = setup();
    const socket = await dialled();
    const early = assert.rejects(client.forward('dev', 'x'.repeat(400), { messageId: 'early' }), { code: 'too_large', retryable: false });
    socket.receive({ type: 'connected', ref: true, max_message_bytes: 300 });
    await early;
    client.forward('dev', '', { messageId: 'm' }).catch(() => {});
    const { ref: _, ...bare } = JSON.parse(socket.texts.at(-1));
    const room = 300 - Buffer.byteLength(JSON.stringify(bare));
    await assert.rejects(client.forward('dev', '\u00fc'.repeat(Math.floor(room / 2) + 1), { messageId: 'n' }), { code: 'too_large' });
    client.forward('dev', 'x'.repeat(room), { messageId: 'o' }).catch(() => {});
    assert.deepEqual(socket.actions('forward').map(({ message_id: id }) => id), ['m', 'o']);
    assert.ok(socket.texts.every((text) => Buffer.byteLength(text) <= 300));
    client.close();
  });

  test('1009 of an old gateway fails the one with the most bytes', async () => {
    const { client, opened } = setup();
    const wide = client.forward('dev', '\u{1f600}'.repeat(1_000), { messageId: 'wide' }); // 2,000 characters, 4,000 bytes
    const long = client.forward('dev', 'x'.repeat(3_000), { messageId: 'long' });
    long.catch(() => {});
    (await opened()).break(1009, 'too big');
    await assert.rejects(wide, { code: 'too_large' });
    client.close();
  });

  test('1009 fails no innocent one when the guilty one was aborted', async () => {
    const { client, clock, opened } = setup();
    const controller = new AbortController();
    const socket = await opened();
    const guilty = client.forward('dev', 'x'.repeat(9_000), { signal: controller.signal });
    guilty.catch(() => {});
    const innocent = client.forward('dev', 'x', { messageId: 'innocent' });
    controller.abort();
    socket.break(1009);
    await clock.advance(250);
    (await opened()).receive({ type: 'forward_confirmed', message_id: 'innocent' });
    await innocent;
  });

  test('seq null is as good as none', async () => {
    const { socket, seen, errors } = await live();
    socket.receive({ ...event(1), seq: null });
    assert.deepEqual([seen, errors()], [['step'], []]);
  });
});

describe('a slow or dead network', () => {
  /** Timers run once a minute, as in a tab that is hidden; messages come at any time. */
  async function hidden(all, minutes) {
    for (let i = 0; i < minutes; i++) {
      all.clock.freeze(60_000);
      await all.clock.advance(0);
    }
  }

  test('a dead socket is noticed where timers run once a minute', async () => {
    const all = setup();
    await all.opened();
    await hidden(all, 4);
    assert.notEqual(all.client.state, 'open');
  });

  test('the answer to a ping sets the timer of the next: browsers slow down timers that are set by timers', async () => {
    const all = setup();
    const socket = await all.opened();
    const before = all.clock.armed;
    socket.receive({ type: 'pong' });
    assert.equal(all.clock.armed, before + 1);
    await all.clock.advance(24_999);
    assert.equal(socket.actions('ping').length, 1);
    await all.clock.advance(1);
    assert.equal(socket.actions('ping').length, 2);
  });

  test('patience doubles with each connection given up for silence, to a minute; a minute of answers resets it', async () => {
    const { client, clock, opened } = setup({ random: () => 0 });
    const patience = async () => {
      const socket = await opened();
      const from = clock.now();
      while (client.state === 'open') await clock.advance(1_000);
      assert.ok(socket.actions('ping').length >= (clock.now() - from) / 25_000, 'it goes on pinging');
      const took = clock.now() - from;
      await clock.advance(0);
      return took;
    };
    const seen = [];
    for (let i = 0; i < 6; i++) seen.push(await patience());
    assert.deepEqual(seen, [5_000, 10_000, 20_000, 40_000, 60_000, 60_000]);
    const socket = await opened();
    for (let i = 0; i < 80; i++) {
      await clock.advance(1_000);
      socket.receive({ type: 'pong' });
    }
    const from = clock.now();
    while (client.state === 'open') await clock.advance(1_000);
    assert.ok(clock.now() - from <= 31_000, `${clock.now() - from} ms`);
  });

  test('an event that takes 40 s to arrive does arrive', async () => {
    const { client, clock, opened } = setup({ random: () => 0 });
    let got = 0;
    client.subscribe('p', { since: 0, epoch: 'E1' }).on('event', () => got++);
    for (let i = 0; i < 8 && !got; i++) {
      const socket = await opened();
      socket.receive(confirmed(1, true));
      for (let s = 0; s < 40 && client.state === 'open'; s++) await clock.advance(1_000);
      if (client.state === 'open') socket.receive(event(1), { type: 'pong' });
      await clock.advance(0);
    }
    assert.equal(got, 1);
  });

  test('what is still being written counts as life', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    socket.receive({ type: 'pong' });
    socket.bufferedAmount = 1_000_000;
    for (let i = 0; i < 60; i++) {
      socket.bufferedAmount -= 10_000;
      await clock.advance(1_000);
    }
    assert.equal(client.state, 'open');
    await clock.advance(60_000); // stuck
    assert.notEqual(client.state, 'open');
  });

  for (const announces of [true, false]) {
    test(`40 forwards at an SQS that takes 8 s are sent once, ${announces ? 'with' : 'without'} a gateway that says it is busy`, async () => {
      const { client, gateway, advance, net } = world({}, { announces, busy: announces, sqsMs: () => 8_000 });
      await advance(10);
      const all = Array.from({ length: 40 }, () => client.forward('dev', {}));
      await advance(30_000);
      await Promise.all(all);
      assert.deepEqual([gateway.queue.length, net.sockets.size, gateway.received], [40, 1, 1]);
    });
  }

  test('busy: asked for in the address, shown, a sign of life; what is to be sent waits, and a ping goes first', async () => {
    const { client, clock, opened, log } = setup();
    const told = [];
    client.on('busy', (busy) => told.push(busy));
    const socket = await opened();
    assert.match(socket.url, /[?&]busy=1$/);
    for (let i = 0; i < 15; i++) {
      socket.receive({ type: 'busy' });
      if (i === 0) {
        client.forward('dev', {}, { messageId: 'm', timeout: Infinity }).catch(() => {});
        client.subscribe('p');
      }
      await clock.advance(2_000);
    }
    assert.deepEqual([client.state, client.busy, told, socket.sent.length], ['open', true, [true], 1]);
    await clock.advance(1_000);
    assert.deepEqual(socket.sent.slice(1).map(({ action }) => action), ['ping', 'subscribe', 'forward']);
    assert.deepEqual([told, log.filter(([name]) => name === 'event').length], [[true, false], 0]);
    client.close();
  });

  test('an event that an agent calls busy is an event', async () => {
    const { socket, seen, client } = await live();
    socket.receive(event(11, 'p', 'busy'));
    assert.deepEqual([seen, client.busy], [[11], false]);
  });

  test('the address keeps its own question', async () => {
    for (const [url, expected] of [['/ws?a=1', '/ws?a=1&busy=1'], ['/ws?busy=0', '/ws?busy=0'], [new URL('wss://h/ws'), 'wss://h/ws?busy=1']]) {
      const { dialled } = setup({}, url);
      assert.equal((await dialled()).url, expected);
    }
  });
});

describe('loops tell', () => {
  test('a gap', async () => {
    const { client, advance, publish, gateway } = world({}, { maxCatchup: 3 });
    const sub = client.subscribe('p', { since: 0 });
    const got = [];
    const done = (async () => { for await (const { seq } of sub) got.push(seq); })();
    await advance(100);
    publish('p');
    await advance(100);
    for (const connection of [...gateway.connections]) connection.close(1011, '');
    publish('p', 9);
    const failed = assert.rejects(done, (error) => {
      assert.deepEqual([error.name, error.code, error.detail], ['GatewayError', 'gap', { from: 1, to: 10 }]);
      return true;
    });
    await advance(3_000);
    await failed;
    assert.deepEqual(got, [1]);
  });

  test('a refusal of the project', async () => {
    const { client, opened } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    const next = sub[Symbol.asyncIterator]().next();
    socket.receive(refused('forbidden'));
    await assert.rejects(next, { code: 'forbidden' });
  });

  test('a refusal of the client, before and after it', async () => {
    const { socket, sub } = await live();
    const loop = sub[Symbol.asyncIterator]();
    const next = loop.next();
    socket.break(1008, 'banned');
    await assert.rejects(next, { code: 'refused' });
    assert.equal((await loop.next()).done, true);
    await assert.rejects(sub[Symbol.asyncIterator]().next(), { code: 'refused' });
  });

  test('return() ends a next() that waits', async () => {
    const { sub } = await live();
    const loop = sub[Symbol.asyncIterator]();
    const next = loop.next();
    assert.deepEqual(await loop.return('x'), { value: 'x', done: true });
    assert.deepEqual(await next, { value: undefined, done: true });
  });

  test('what comes between [Symbol.asyncIterator]() and next() is not lost', async () => {
    const { socket, sub } = await live();
    const loop = sub[Symbol.asyncIterator]();
    socket.receive(event(11), event(12));
    assert.deepEqual([(await loop.next()).value.seq, (await loop.next()).value.seq], [11, 12]);
  });

  test('break: 150 loops leave no subscription behind', async () => {
    const { client, gateway, advance, publish } = world();
    publish('p', 3);
    for (let i = 0; i < 150; i++) {
      const done = (async () => { for await (const _ of client.subscribe('p', { since: 0 })) break; })();
      await advance(100);
      await done;
    }
    await advance(100);
    assert.deepEqual([...gateway.connections].map(({ subscriptions }) => [...subscriptions]), [['*']]);
  });

  test('seq is the last event yielded: a reload after one of three loses none', async () => {
    const all = setup();
    const socket = await all.opened();
    const sub = all.client.subscribe('p');
    socket.receive(confirmed(10));
    const loop = sub[Symbol.asyncIterator]();
    socket.receive(event(11), event(12), event(13));
    await loop.next();
    assert.equal(sub.seq, 11);
    await loop.return();
    assert.deepEqual([sub.seq, sub.epoch, sub.state], [11, 'E1', 'closed']);
  });

  test('close() ends a loop at once, what it has not seen yet included', async () => {
    const { client, socket, sub } = await live();
    const loop = sub[Symbol.asyncIterator]();
    socket.receive(event(11), event(12));
    await loop.next();
    client.close();
    assert.deepEqual([(await loop.next()).done, sub.seq], [true, 11]);
  });
});

describe('small things', () => {
  test('a deliberate close() is no error to a subscription; a refusal is', async () => {
    for (const [end, expected] of [['close', undefined], ['refuse', 'refused']]) {
      const { client, socket, sub } = await live();
      const seen = [];
      sub.on('state', (state, error) => seen.push(state, error?.code));
      if (end === 'close') client.close();
      else socket.break(1008, 'banned');
      assert.deepEqual(seen, ['closed', expected]);
    }
  });

  test('timeout: Infinity waits', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    let done;
    client.forward('dev', {}, { messageId: 'm', timeout: Infinity }).then(() => { done = true; }, (error) => { done = error.code; });
    for (let i = 0; i < 400; i++) {
      await clock.advance(4_000);
      socket.receive({ type: 'pong' });
    }
    assert.equal(done, undefined);
    socket.receive({ type: 'forward_confirmed', message_id: 'm' });
    await settled();
    assert.equal(done, true);
  });

  test('getToken is not asked after close(), and may return null', async () => {
    let asked = 0;
    let answer;
    const { client } = setup({ getToken: () => { asked++; } }, () => new Promise((resolve) => { answer = resolve; }));
    await settled();
    client.close();
    answer('ws://gateway/');
    await settled();
    assert.equal(asked, 0);
    const { dialled } = setup({ getToken: () => null });
    assert.deepEqual((await dialled()).protocols, []);
  });

  test('a page that is shown and hidden all the time makes few attempts, and none when hidden', async (t) => {
    const page = fakePage(t);
    const { client, clock, dialled, sockets } = setup({ random: () => 1, minDelay: 20_000 });
    t.after(() => { delete globalThis.document; });
    (await dialled()).break();
    for (let i = 0; i < 60; i++) {
      globalThis.document = { visibilityState: i % 2 ? 'hidden' : 'visible' };
      page.fire('visibilitychange');
      await settled();
      if (client.state === 'connecting') sockets.at(-1).break();
      await clock.advance(1_000);
    }
    assert.ok(sockets.length <= 14, `${sockets.length} attempts in a minute`);
    assert.ok(sockets.length >= 4);
    client.close();
  });

  test('online ends an attempt that hangs', async (t) => {
    const page = fakePage(t);
    const { client, clock, dialled, sockets } = setup();
    await dialled();
    await clock.advance(6_000);
    page.fire('online');
    await settled();
    assert.deepEqual([client.state, sockets.length, sockets[0].closed], ['connecting', 2, true]);
    client.close();
  });

  test('4401 again and again is told', async () => {
    const { client, clock, opened, errors } = setup({ getToken: () => 'old' });
    for (let i = 0; i < 3; i++) {
      (await opened()).break(4401, 'expired');
      await clock.advance(2_000);
    }
    assert.deepEqual(errors(), ['unauthenticated', 'unauthenticated']);
    client.close();
  });

  test('one AbortSignal for many forwards has one listener', async () => {
    const { client, opened } = setup();
    await opened();
    const controller = new AbortController();
    let most = 0, listeners = 0;
    const { signal } = controller;
    const [add, remove] = [signal.addEventListener.bind(signal), signal.removeEventListener.bind(signal)];
    signal.addEventListener = (...args) => { most = Math.max(most, ++listeners); add(...args); };
    signal.removeEventListener = (...args) => { listeners--; remove(...args); };
    const all = Array.from({ length: 20 }, () => client.forward('dev', {}, { signal }));
    controller.abort();
    for (const message of all) await assert.rejects(message, { name: 'AbortError' });
    assert.deepEqual([most, listeners], [1, 0]);
  });

  test('without a WebSocket the error names the option and a package that has one', () => {
    assert.throws(() => connect('ws://gateway/', { WebSocket: null }), /option `WebSocket`.*package ws/s);
  });

  test("an agent's types may be listened to; those named like ours reach `event` only", async () => {
    const { socket, sub } = await live();
    const seen = [];
    sub.on('progress', ({ seq }) => seen.push(['progress', seq]));
    sub.on('state', () => seen.push(['state']));
    sub.on('event', ({ type }) => seen.push(['event', type]));
    socket.receive(event(11, 'p', 'progress'), event(12, 'p', 'state'), event(13, 'p', 'constructor'));
    assert.deepEqual(seen, [['event', 'progress'], ['progress', 11], ['event', 'state'], ['event', 'constructor']]);
  });

  test('reconnect() makes an attempt at once, from any state, and keeps everything', async () => {
    const all = await live();
    all.client.reconnect();
    assert.deepEqual([all.client.state, all.socket.closed], ['connecting', true]);
    (await all.dialled()).break();
    assert.equal(all.client.state, 'waiting');
    all.client.reconnect();
    const socket = await all.opened();
    assert.equal(socket.actions('subscribe')[0].since, 10);
    all.client.close();
    assert.throws(() => all.client.reconnect(), { code: 'closed' });
  });

  test('maxRetries attempts in a row, then closed with gave_up', async () => {
    const { client, clock, dialled, sockets } = setup({ maxRetries: 2 });
    const ready = assert.rejects(client.ready(), { code: 'gave_up', retryable: true });
    for (let i = 0; i < 3; i++) {
      (await dialled()).break();
      await clock.advance(1_000);
    }
    await ready;
    assert.deepEqual([client.state, sockets.length, clock.pending], ['closed', 3, 0]);
  });

  test('every forward says which page it is from, also when it is sent again', async () => {
    const all = setup();
    const socket = await all.opened();
    all.client.forward('dev', {}).catch(() => {});
    socket.break();
    await all.clock.advance(250);
    const [again] = (await all.opened()).actions('forward');
    assert.deepEqual([typeof again.client_id, again], ['string', socket.actions('forward')[0]]);
    all.client.close();
  });

  test('close() with a peer that does not answer lets Node end', () => {
    const script = `
      import net from 'node:net';
      import { once } from 'node:events';
      import { createHash } from 'node:crypto';
      import { WebSocket } from 'ws';
      import { connect } from '${new URL('../agenticai-ws.js', import.meta.url)}';
      const server = net.createServer((socket) => socket.once('data', (request) => {
        const key = /sec-websocket-key: (.*)\\r/i.exec(request)[1];
        const accept = createHash('sha1').update(key + '258EAFA5-E914-47DA-95CA-C5AB0DC85B11').digest('base64');
        const hello = Buffer.from('{"type":"connected"}');
        socket.write('HTTP/1.1 101 Switching Protocols\\r\\nUpgrade: websocket\\r\\nConnection: Upgrade\\r\\nSec-WebSocket-Accept: ' + accept + '\\r\\n\\r\\n');
        socket.write(Buffer.concat([Buffer.from([0x81, hello.length]), hello]));
        socket.unref();
      }));
      server.listen(0, '127.0.0.1').unref();
      await once(server, 'listening');
      const client = connect('ws://127.0.0.1:' + server.address().port, { WebSocket });
      await client.ready();
      client.close();
      console.log('closed');`;
    const started = Date.now();
    const { stdout, stderr, status } = spawnSync(process.execPath, ['--input-type=module', '--eval', script],
      { encoding: 'utf8', timeout: 25_000, cwd: new URL('.', import.meta.url) });
    assert.deepEqual([stdout, status], ['closed\n', 0], stderr);
    assert.ok(Date.now() - started < 15_000, `${Date.now() - started} ms`);
  });
});

describe('history', () => {
  const seqs = (events) => events.map(({ seq }) => seq);
  const settledBy = async (advance, promise) => {
    let result;
    promise.then((events) => { result = seqs(events); }, (error) => { result = [error.code, error.detail]; });
    await advance(2_000);
    return result;
  };

  test('is read over a connection of its own, the last ones or those after a position', async () => {
    const { client, advance, publish, net, gateway } = world();
    publish('p', 30);
    const sub = client.subscribe('p');
    const seen = record(sub);
    await advance(100);
    assert.deepEqual(await settledBy(advance, sub.history({ limit: 3 })), [28, 29, 30]);
    assert.deepEqual(await settledBy(advance, client.history('p', { since: 4, limit: 2 })), [5, 6]);
    assert.deepEqual(await settledBy(advance, client.history('p', { since: 28 })), [29, 30]);
    assert.deepEqual(await settledBy(advance, client.history('p', { since: 30 })), []);
    assert.deepEqual(await settledBy(advance, client.history('empty')), []);
    assert.deepEqual([seen, net.sockets.size, gateway.connections.size], [['live'], 1, 1]);
  });

  test('that is gone is said, or left out', async () => {
    const { client, advance, publish, gateway } = world();
    publish('p', 30);
    gateway.expire('p', 20);
    assert.deepEqual(await settledBy(advance, client.history('p', { since: 4 })), ['gap', { from: 4, to: 30 }]);
    const last = await settledBy(advance, client.history('p', { limit: 100 }));
    assert.deepEqual([last.length >= 5, last.at(-1)], [true, 30]);
    gateway.forbidden.add('q');
    assert.deepEqual((await settledBy(advance, client.history('q')))[0], 'forbidden');
  });

  test('ends with close(), and when the gateway cannot be reached', async () => {
    const { client, advance, clock } = world({}, {}, { up: () => false });
    const reading = client.history('p');
    const failed = assert.rejects(reading, { code: 'gave_up' });
    await advance(60_000);
    await failed;
    const again = assert.rejects(client.history('p'), { code: 'closed' });
    client.close();
    await again;
    await assert.rejects(client.history('p'), { code: 'closed' });
    await advance(20_000);
    assert.equal(clock.pending, 0);
  });
});
