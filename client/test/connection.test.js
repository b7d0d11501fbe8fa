import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { describe, test } from 'node:test';

import { connect, GatewayError } from '../agenticai-ws.js';
import { fakePage, settled, setup } from './fakes.js';

describe('states', () => {
  test('connecting until the server says connected, then open', async () => {
    const { client, dialled, states } = setup();
    assert.equal(client.state, 'connecting');
    const socket = await dialled();
    assert.equal(socket.url, 'ws://gateway/ws?busy=1');
    assert.deepEqual(socket.protocols, []);
    assert.equal(client.state, 'connecting');
    socket.receive({ type: 'connected' });
    assert.deepEqual([client.state, ...states()], ['open', 'open']);
  });

  test('waiting after a loss, with the close code, the reason and the delay, then connecting again', async () => {
    const { client, clock, opened, log, sockets } = setup();
    (await opened()).break(1006, 'gone');
    assert.equal(client.state, 'waiting');
    assert.deepEqual(log.at(-1), ['state', 'waiting', { code: 1006, reason: 'gone', delay: 250 }]);
    await clock.advance(249);
    assert.equal(sockets.length, 1);
    await clock.advance(1);
    assert.equal(client.state, 'connecting');
    await opened();
    assert.equal(client.state, 'open');
    assert.equal(sockets.length, 2);
  });

  test('a handshake that hangs is given up after 15 s and its socket closed', async () => {
    const { client, clock, dialled } = setup();
    const socket = await dialled();
    await clock.advance(15_000);
    assert.equal(client.state, 'waiting');
    assert.equal(socket.closed, true);
    socket.receive({ type: 'connected' });
    assert.equal(client.state, 'waiting');
  });

  for (const code of [1000, 1001, 1006, 1011, 1012, 1013, 4000, 4999]) {
    test(`close code ${code} is followed by another attempt`, async () => {
      const { client, opened } = setup();
      (await opened()).break(code);
      assert.equal(client.state, 'waiting');
    });
  }

  test('1008 stops for good and says so everywhere', async () => {
    const { client, clock, opened, log } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    const message = client.forward('dev', {});
    socket.break(1008, 'banned');
    await assert.rejects(message, { code: 'refused', message: 'banned', retryable: false });
    await assert.rejects(client.ready(), { code: 'refused' });
    assert.deepEqual([client.state, sub.state, clock.pending], ['closed', 'closed', 0]);
    assert.equal(log.at(-1)[2].code, 1008);
  });

  test('an address that is no address is reported and tried again, as a function may answer better', async () => {
    let calls = 0;
    const { client, clock, errors, dialled } = setup({}, () => {
      if (++calls === 1) throw new Error('no address yet');
      return 'ws://later/';
    });
    await settled();
    assert.deepEqual([client.state, ...errors()], ['waiting', 'connect_failed']);
    await clock.advance(250);
    assert.equal((await dialled()).url, 'ws://later/?busy=1');
  });

  test('without any WebSocket the caller is told at once', () => {
    assert.throws(() => connect('ws://gateway/', { WebSocket: null }), TypeError);
  });
});

describe('ready', () => {
  test('resolves when open, and at once when open already', async () => {
    const { client, opened } = setup();
    const ready = client.ready();
    await opened();
    await ready;
    await client.ready();
  });

  test('survives failed attempts', async () => {
    const { client, clock, dialled, opened } = setup();
    const ready = client.ready();
    (await dialled()).break(1006);
    await clock.advance(500);
    await opened();
    await ready;
  });

  test('rejects when closed, before and after', async () => {
    const { client } = setup();
    const ready = client.ready();
    client.close();
    await assert.rejects(ready, GatewayError);
    await assert.rejects(client.ready(), { code: 'closed' });
  });
});

describe('close', () => {
  test('ends everything, once, however often it is called', async (t) => {
    const page = fakePage(t);
    const { client, clock, opened, states } = setup();
    const socket = await opened();
    const sub = client.subscribe('p');
    const message = client.forward('dev', {});
    client.close();
    client.close();
    await assert.rejects(message, { code: 'closed' });
    await assert.rejects(client.forward('dev', {}), { code: 'closed' });
    assert.throws(() => client.subscribe('p'), { code: 'closed' });
    sub.unsubscribe();
    assert.deepEqual(states(), ['open', 'closed']);
    assert.deepEqual([socket.closed, clock.pending, page.listeners], [true, 0, 0]);
    socket.break(1006);
    assert.equal(client.state, 'closed');
  });

  for (const state of ['connecting', 'open', 'waiting']) {
    test(`inside a listener of "${state}" leaves nothing behind`, async (t) => {
      const page = fakePage(t);
      const { client, clock, sockets, opened, dialled } = setup();
      const sub = client.subscribe('p', { since: 1 });
      (await dialled()).break();
      client.on('state', (now) => now === state && client.close());
      if (state !== 'waiting') await clock.advance(250);
      if (state === 'open') await opened();
      if (state === 'waiting') {
        await clock.advance(250);
        sockets.at(-1).break();
      }
      await clock.advance(100_000);
      assert.deepEqual([client.state, sub.state, clock.pending, page.listeners], ['closed', 'closed', 0, 0]);
      assert.equal(sockets.filter((socket) => !socket.closed).length, 0);
    });
  }

  test('while getToken is under way opens no socket afterwards', async () => {
    let answer;
    const { client, sockets, clock } = setup({ getToken: () => new Promise((resolve) => { answer = resolve; }) });
    await settled();
    client.close();
    answer('late');
    await settled();
    assert.deepEqual([sockets.length, clock.pending], [0, 0]);
  });
});

describe('back-off', () => {
  /** Lets n attempts fail and returns the delays that followed. */
  async function failures(n, options) {
    const { clock, dialled, log } = setup(options);
    for (let i = 0; i < n; i++) {
      (await dialled()).break(1006);
      await clock.advance(log.at(-1)[2].delay);
    }
    return log.filter(([, state]) => state === 'waiting').map(([, , { delay }]) => delay);
  }

  test('the bound doubles from minDelay to maxDelay', async () => {
    assert.deepEqual(await failures(8, { random: () => 1 }), [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 20_000]);
    assert.deepEqual(await failures(4, { random: () => 1, minDelay: 10, maxDelay: 35 }), [10, 20, 35, 35]);
  });

  test('without any delay it goes on after a thousand failures', async () => {
    assert.deepEqual([...new Set(await failures(1_100, { minDelay: 0 }))], [0]);
  });

  test('jitter is full: uniform from 0 to the bound', async () => {
    let seed = 1; // a small generator, so that the test repeats itself
    const random = () => (seed = (seed * 48_271) % 2_147_483_647) / 2_147_483_647;
    const tenths = Array(10).fill(0);
    const n = 4000;
    for (let i = 0; i < n; i++) {
      const { dialled, log, client } = setup({ random });
      (await dialled()).break();
      tenths[Math.floor(log.at(-1)[2].delay / 50)]++;
      client.close();
    }
    const chi2 = tenths.reduce((sum, count) => sum + (count - n / 10) ** 2 / (n / 10), 0);
    assert.ok(chi2 < 27.9, `chi-square ${chi2} of ${tenths}`); // p = 0.001 at 9 degrees of freedom
  });

  test('is reset only by a connection that lasted', async () => {
    const { clock, opened, log } = setup({ random: () => 1 });
    const delay = () => log.at(-1)[2].delay;
    for (const expected of [500, 1000, 2000]) { // opened, but lost within 5 s
      const socket = await opened();
      await clock.advance(4_000);
      socket.break();
      assert.equal(delay(), expected);
      await clock.advance(expected);
    }
    const socket = await opened();
    socket.receive({ type: 'pong' });
    await clock.advance(5_000);
    socket.break();
    assert.equal(delay(), 500);
  });

  test('the server sets the least delay, for one time', async () => {
    const { client, clock, opened, log } = setup();
    let socket = await opened();
    socket.receive({ type: 'reconnect', after_ms: 7_000 });
    await clock.advance(1_000);
    socket.break(1012);
    assert.equal(log.at(-1)[2].delay, 6_000);
    await clock.advance(6_000);
    socket = await opened();
    socket.break(1006);
    assert.equal(log.at(-1)[2].delay, 500); // half of 1000, the second attempt
    client.close();
  });

  test('a wish beyond two minutes or of no sense is bounded', async () => {
    for (const [wish, expected] of [[1e12, 120_000], ['soon', 250], [-5, 250], [null, 250]]) {
      const { opened, log } = setup();
      const socket = await opened();
      socket.receive({ type: 'reconnect', after_ms: wish });
      socket.break(1012);
      assert.equal(log.at(-1)[2].delay, expected);
    }
  });
});

describe('getToken', () => {
  test('goes as subprotocol in base64url, never in the address', async () => {
    const { dialled } = setup({ getToken: () => 'a?b>c~\u00ff' });
    const { url, protocols } = await dialled();
    assert.equal(url, 'ws://gateway/ws?busy=1');
    assert.deepEqual(protocols, ['agenticai.v1', 'bearer.YT9iPmN-_w']);
    assert.equal(Buffer.from(protocols[1].slice(7), 'base64url').toString('latin1'), 'a?b>c~\u00ff');
  });

  test('is asked for every attempt, for a fresh one after 4401 or a handshake that failed', async () => {
    const asked = [];
    const { client, clock, opened, dialled } = setup({ getToken: async ({ fresh }) => `t${asked.push(fresh)}` });
    (await opened()).break(4401, 'expired');
    assert.equal(client.state, 'waiting');
    await clock.advance(1_000);
    (await opened()).break(1006);
    await clock.advance(1_000);
    (await dialled()).break(1006); // as a 401 looks to a page
    await clock.advance(1_000);
    assert.deepEqual(asked, [false, true, false, true]);
  });

  test('4401 without getToken stops', async () => {
    const { client, opened } = setup();
    (await opened()).break(4401, 'who are you');
    assert.equal(client.state, 'closed');
    await assert.rejects(client.ready(), { code: 'refused', message: 'who are you' });
  });

  test('rejecting is reported, visible, and backed off from', async () => {
    let fail = true;
    const { client, clock, errors, sockets, opened } = setup({
      getToken: async () => {
        if (fail) throw new Error('sign in first');
        return 't';
      },
    });
    await settled();
    assert.deepEqual([client.state, ...errors()], ['waiting', 'connect_failed']);
    await clock.advance(250 + 500);
    assert.deepEqual([client.state, errors().length, sockets.length], ['waiting', 3, 0]);
    fail = false;
    await clock.advance(1_000);
    await opened();
    assert.equal(client.state, 'open');
  });

  test('hanging is given up like a handshake; its late answer is ignored', async () => {
    const answers = [];
    const { client, clock, sockets } = setup({ getToken: () => new Promise((resolve) => answers.push(resolve)) });
    await settled();
    assert.equal(client.state, 'connecting');
    await clock.advance(15_000);
    assert.equal(client.state, 'waiting');
    await clock.advance(250);
    answers[0]('late');
    await settled();
    assert.equal(sockets.length, 0);
    answers[1]('in time');
    await settled();
    assert.equal(sockets.length, 1);
  });

  test('a token that no header can carry is reported', async () => {
    const { client, errors } = setup({ getToken: () => '\u{1f511}' });
    await settled();
    assert.deepEqual([client.state, ...errors()], ['waiting', 'connect_failed']);
  });
});

describe('watchdog', () => {
  test('pings at once for the latency, then every 25 s', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    assert.equal(client.latency, undefined);
    await clock.advance(30);
    socket.receive({ type: 'pong' });
    assert.equal(client.latency, 30);
    await clock.advance(24_969);
    assert.equal(socket.actions('ping').length, 1);
    await clock.advance(1);
    assert.equal(socket.actions('ping').length, 2);
  });

  test('abandons a silent socket within 5 s of a ping, without waiting for its close', async () => {
    const { client, clock, opened, log } = setup();
    const socket = await opened();
    await clock.advance(5_000);
    assert.deepEqual([client.state, socket.closed], ['waiting', true]);
    assert.equal(log.at(-1)[2].reason, 'no answer');
    const before = log.length;
    socket.receive({ type: 'pong' });
    socket.break(1006);
    assert.equal(log.length, before);
  });

  test('takes any message for a sign of life', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    await clock.advance(4_000);
    socket.receive({ type: 'news' });
    await clock.advance(4_000);
    assert.equal(client.state, 'open');
  });

  test('pings again after a freeze, as the answer may wait behind the timer', async () => {
    const { client, clock, opened } = setup();
    const socket = await opened();
    clock.freeze(3_600_000);
    await clock.advance(0);
    assert.equal(client.state, 'open');
    assert.equal(socket.actions('ping').length, 2);
    await clock.advance(5_000);
    assert.equal(client.state, 'waiting');
  });
});

describe('waking', () => {
  for (const name of ['online', 'pageshow', 'visibilitychange']) {
    test(`${name} ends the waiting`, async (t) => {
      const page = fakePage(t);
      const { client, clock, dialled, sockets } = setup({ random: () => 1 });
      (await dialled()).break();
      page.fire(name);
      assert.equal(client.state, 'connecting');
      await settled();
      page.fire(name); // and no second attempt beside the first
      await settled();
      assert.equal(sockets.length, 2);
      assert.equal(clock.pending, 1);
      client.close();
    });

    test(`${name} probes an open connection, once`, async (t) => {
      const page = fakePage(t);
      const { client, clock, opened } = setup();
      const socket = await opened();
      socket.receive({ type: 'pong' });
      await clock.advance(10_000);
      page.fire(name);
      page.fire(name);
      assert.equal(socket.actions('ping').length, 2);
      await clock.advance(5_000);
      assert.equal(client.state, 'waiting');
      client.close();
    });
  }

  test("does not cut short the server's own delay", async (t) => {
    const page = fakePage(t);
    const { client, clock, opened } = setup();
    const socket = await opened();
    socket.receive({ type: 'reconnect', after_ms: 3_000 });
    socket.break(1012);
    page.fire('online');
    assert.equal(client.state, 'waiting');
    await clock.advance(3_000);
    assert.equal(client.state, 'connecting');
    client.close();
  });
});

describe('bad input', () => {
  const junk = {
    'not JSON': '{"type":',
    'a number': '7',
    null: 'null',
    'an array': '[{"type":"pong"}]',
    'no type': '{"project_id":"p"}',
    'a type that is no word': '{"type":{}}',
    'a binary frame': new ArrayBuffer(8),
    'a huge frame': JSON.stringify({ type: 'step', data: 'x'.repeat(5 << 20) }),
    'a bad seq': '{"type":"step","seq":-1}',
    'a seq that is no number': '{"type":"step","seq":"1"}',
    'a second connected': '{"type":"connected"}',
  };
  for (const [what, frame] of Object.entries(junk)) {
    test(`${what} is reported and changes nothing`, async () => {
      const { client, opened, errors, log } = setup();
      const socket = await opened();
      const before = log.length;
      socket.receive(frame);
      assert.deepEqual([client.state, ...errors()], ['open', 'bad_message']);
      assert.equal(log.length, before + 1);
    });
  }

  test('a message before connected is reported', async () => {
    const { client, dialled, errors } = setup();
    (await dialled()).receive({ type: 'pong' });
    assert.deepEqual([client.state, ...errors()], ['connecting', 'bad_message']);
  });

  test('answers to nothing are ignored', async () => {
    const { client, opened, errors } = setup();
    const socket = await opened();
    socket.receive(
      { type: 'forward_confirmed', message_id: 'x' },
      { type: 'subscription_confirmed', project_id: 'nobody', seq: 3 },
      { type: 'unsubscription_confirmed', project_id: 'nobody' },
      { type: 'project_snapshot', project_id: 'nobody', data: 1 },
    );
    assert.deepEqual([client.state, ...errors()], ['open']);
  });

  test('types named like properties of objects are events like any other', async () => {
    const { opened, log } = setup();
    const socket = await opened();
    socket.receive('{"type":"constructor"}', '{"type":"__proto__","__proto__":{"seq":1}}');
    assert.deepEqual(log.slice(-2).map(([name, { type }]) => [name, type]), [['event', 'constructor'], ['event', '__proto__']]);
  });

  test("the server's errors that answer no message are reported whole", async () => {
    const { opened, log } = setup();
    (await opened()).receive({ type: 'error', code: 'unknown_action', message: 'No such action.', retryable: false, action: 'x' });
    const [, error] = log.at(-1);
    assert.deepEqual([error.code, error.message, error.retryable, error.detail.action], ['unknown_action', 'No such action.', false, 'x']);
  });
});

describe('listeners', () => {
  test('removed ones are not called, also when removed by another one', async () => {
    const { client, opened } = setup();
    const calls = [];
    client.on('state', () => { calls.push('first'); off(); });
    const off = client.on('state', () => calls.push('second'));
    await opened();
    off();
    assert.deepEqual(calls, ['first']);
  });

  test('one that replaces itself is called once an event', async () => {
    const { client, opened } = setup();
    let calls = 0;
    let off;
    const again = () => { calls++; off(); off = client.on('state', again); };
    off = client.on('state', again);
    await opened();
    assert.equal(calls, 1);
  });

  test('one that throws disturbs neither the others nor the connection, and is not silent', () => {
    const script = `
      import { setup } from '${new URL('./fakes.js', import.meta.url)}';
      process.on('unhandledRejection', (error) => console.log(error.message, client.state));
      const { client, opened } = setup();
      client.on('state', () => { throw new Error('a bug of the page'); });
      client.on('state', (state) => console.log(state));
      await opened();`;
    const { stdout } = spawnSync(process.execPath, ['--input-type=module', '--eval', script], { encoding: 'utf8' });
    assert.equal(stdout, 'open\na bug of the page open\n');
  });

  test('two clients on one page have nothing in common', async (t) => {
    const page = fakePage(t);
    const one = setup();
    const two = setup();
    await one.opened();
    await two.opened();
    one.client.close();
    assert.deepEqual([one.client.state, two.client.state], ['closed', 'open']);
    two.sockets[0].break();
    page.fire('online');
    assert.equal(two.client.state, 'connecting');
    two.client.close();
    assert.equal(page.listeners, 0);
  });

  test('a thousand reconnects leave one timer and no listener more', async (t) => {
    const page = fakePage(t);
    const { client, clock, dialled, opened, sockets } = setup();
    const before = page.listeners;
    for (let i = 0; i < 1000; i++) {
      (i % 2 ? await opened() : await dialled()).break();
      await clock.advance(20_000);
    }
    assert.deepEqual([clock.pending, page.listeners], [1, before]);
    assert.equal(sockets.filter(({ onmessage, closed }) => onmessage || !closed).length, 1);
    client.close();
    assert.deepEqual([clock.pending, page.listeners], [0, 0]);
  });
});
