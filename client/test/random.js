/**
 * One random run of the library against the fake gateway under virtual time, with calls inside listeners.
 * Every promise is checked from outside: against the gateway's own log, never against the library's state alone.
 */
import { fileURLToPath, pathToFileURL } from 'node:url';

import { FakeGateway, microtasks, network, seeded, VirtualClock } from './gateway.js';

const PROJECTS = ['a', 'b', '*'];
const OURS = new Set(['open', 'waiting', 'connecting', 'closed']);

/** What went wrong in the run of a seed, as sentences; none if all is well. */
export async function run(seed, { connect, GatewayError }) {
  const random = seeded(seed);
  const clock = new VirtualClock();
  const faults = [];
  const fault = (what) => { if (faults.length < 5) faults.push(`seed ${seed}: ${what}`); };
  const gentle = random.chance(0.4); // nothing expires and no log is replaced: then there is no gap at all
  let healthy = false; // the end of the run
  const gateway = new FakeGateway({
    clock, random,
    announces: random.chance(0.8),
    maxCatchup: gentle ? 1e9 : random.of([6, 1_000]),
    maxSubscriptions: random.of([1, 2, 100]),
    maxMessageBytes: random.of([2_000, 262_144]),
    messagesPerSecond: 0,
    readMs: () => (random.chance(0.5) ? 0 : random.below(60)),
    sqsMs: () => (random.chance(0.9) ? random.below(40) : random.below(9_000)),
  });
  if (!gateway.announces && random.chance(0.5)) gateway.messagesPerSecond = random.of([20, 200]);
  const slow = random.chance(0.1);
  const { WebSocket, sockets } = network(gateway, {
    latency: () => (slow ? 200 : 1) + random.below(40),
    up: () => healthy || random.chance(0.8),
  });
  const gateToken = random.chance(0.2);
  const client = connect('ws://gateway/ws', {
    clock, random, WebSocket, maxBuffer: 3, minDelay: 100, maxDelay: 2_000,
    ...(gateToken ? {
      getToken: async () => {
        if (!healthy && random.chance(0.3)) throw new Error('no token');
        return random.chance(0.5) ? 'token' : null;
      },
    } : {}),
  });

  // What the page does, from outside and from inside of listeners.
  const subs = [];
  const loops = [];
  const messages = [];
  let depth = 0, calls = 0, closed = false, messageIds = 0;
  const replaced = new Map(); // epoch -> when it ended
  const inListener = (what, fn) => (...args) => {
    if (depth) fault(`${what}: a listener inside another one`);
    depth++;
    try {
      fn(...args);
      if (random.chance(0.15)) act();
      if (random.chance(0.02)) throw Object.assign(new Error('a bug of the page'), { planned: true });
    } finally {
      depth--;
    }
  };

  /** Follows one reader of a project, and says what should not be. */
  function follower(name, project, { since, epoch }, position, looped = () => false, beyond = false) {
    let last = since;
    let inc = epoch;
    return {
      get last() { return last; },
      live() {
        const at = position();
        if (looped()) return;
        if (last === undefined) last = at.seq;
        inc ??= at.epoch;
        if (last > 0 && at.seq !== last) fault(`${name}: live at ${at.seq}, was at ${last}`);
        const log = gateway.log(project);
        if (inc === gateway.epoch && since === undefined && last > log.head) fault(`${name}: live at ${last}, beyond the end ${log.head}`);
      },
      event(event) {
        if (event.project_id !== project) fault(`${name}: an event of ${event.project_id}`);
        if (event.seq === undefined) return;
        const known = gateway.history.get(event.data.id);
        if (!known || known.seq !== event.seq || known.project_id !== project) fault(`${name}: event ${event.seq} is not the log's`);
        if (last === undefined && (project === '*' || looped())) last = event.seq - 1; // a broadcast before the confirmation
        if (event.seq !== last + 1) fault(`${name}: event ${event.seq} after ${last}`);
        if (inc !== undefined && known && known.epoch !== inc) fault(`${name}: event ${event.seq} of another log without a gap`);
        if (project !== '*') inc ??= known?.epoch; // a broadcast before the confirmation says nothing of its log
        last = event.seq;
      },
      gap({ from, to }) {
        if (from !== last && last !== undefined) fault(`${name}: a gap from ${from}, was at ${last}`);
        const log = gateway.log(project);
        const same = inc === undefined || inc === gateway.epoch;
        const excused = !same || log.floor > from || log.head - from > gateway.maxCatchup || replaced.size > 0;
        if (!beyond && (gentle || !excused)) fault(`${name}: a gap ${from}-${to} without need`);
        last = to;
        inc = position().epoch;
      },
    };
  }

  function subscribe() {
    const project = random.of(PROJECTS);
    const log = gateway.log(project);
    const other = subs.filter((record) => record.project === project && record.sub.seq !== undefined);
    const options = { snapshot: random.chance(0.2) };
    if (random.chance(0.5)) {
      if (other.length && random.chance(0.6)) {
        const { sub } = random.of(other);
        Object.assign(options, { since: sub.seq, epoch: random.chance(0.8) ? sub.epoch : undefined });
      } else if (random.chance(0.85)) {
        Object.assign(options, { since: random.below(log.head + 1), epoch: random.chance(0.7) ? gateway.epoch : undefined });
      } else if (!gentle) {
        Object.assign(options, { since: log.head + random.below(20), epoch: random.chance(0.5) ? 'E0' : undefined });
      }
      if (options.since === undefined) delete options.epoch;
      if (options.epoch === undefined && (replaced.size || !gentle) && options.since !== undefined && random.chance(0.7)) options.epoch = gateway.epoch;
    }
    const name = `subscription ${subs.length} of ${project}`;
    const beyond = options.since > log.head;
    const sub = client.subscribe(project, options);
    // With a loop over it, the subscription stands where the loop does.
    const follow = follower(name, project, options, () => (record.looped ? { seq: undefined, epoch: undefined } : sub), () => record.looped !== undefined, beyond);
    const record = { name, sub, project, options, follow, snapshots: 0, open: true, refused: undefined, sinceLive: 0 };
    subs.push(record);
    const wanted = (what) => { if (!record.open || closed) fault(`${name}: ${what} after its end`); };
    if (sub.state === 'live') follow.live();
    if (random.chance(0.85)) {
      record.listens = true;
      sub.on('event', inListener(name, (event) => {
        wanted('an event');
        follow.event(event);
        if (event.seq !== undefined && !record.looped && sub.seq !== event.seq) fault(`${name}: seq ${sub.seq} at event ${event.seq}`);
      }));
      sub.on('gap', inListener(name, (gap) => {
        wanted('a gap');
        follow.gap(gap);
        if (options.snapshot) record.owed = true;
      }));
      sub.on('snapshot', inListener(name, () => {
        wanted('a snapshot');
        if (!options.snapshot) fault(`${name}: a snapshot nobody asked for`);
        record.snapshots++;
        record.owed = false;
      }));
      sub.on('state', inListener(name, (state, error) => {
        if (state !== 'closed') wanted(`state ${state}`);
        else if (sub.state !== 'closed') fault(`${name}: told of its end, and is ${sub.state}`);
        if (state === 'live') follow.live();
        if (state === 'pending' && options.snapshot) record.owed = true;
        record.refused = state === 'failed' ? error : undefined;
      }));
      record.owed = options.snapshot;
    }
    return record;
  }

  function unsubscribe() {
    const open = subs.filter((record) => record.open);
    if (!open.length) return;
    const record = random.of(open);
    record.open = false;
    record.sub.unsubscribe();
    if (record.sub.state !== 'closed') fault(`${record.name}: ${record.sub.state} after unsubscribe`);
  }

  async function loop() {
    const open = subs.filter((record) => record.open && record.sub.state !== 'closed');
    if (!open.length || loops.length > 8) return;
    const record = random.of(open);
    const { sub, project } = record;
    const name = `loop ${loops.length} over ${record.name}`;
    const only = !record.looped;
    record.looped = (record.looped ?? 0) + 1;
    const mine = { since: sub.seq, epoch: sub.epoch };
    const follow = follower(name, project, mine, () => ({ seq: undefined, epoch: undefined }));
    const entry = { name, record, follow, done: false, ending: 0 };
    loops.push(entry);
    const most = random.of([2, 10, 1e9]);
    let count = 0, first = true;
    try {
      for await (const event of sub) {
        // One that was handed over before the end may reach the loop's body after it.
        if ((closed || !record.open) && entry.ending++) fault(`${name}: events after the end`);
        if (event.seq !== undefined) {
          if (first && mine.since === undefined) { // began wherever the subscription did
            const known = gateway.history.get(event.data.id);
            if (known?.seq !== event.seq) fault(`${name}: event ${event.seq} is not the log's`);
            Object.assign(entry, { follow: follower(name, project, { since: event.seq, epoch: known?.epoch }, () => ({})) });
          } else {
            entry.follow.event(event);
          }
          first = false;
          if (only && record.looped === 1 && sub.seq !== event.seq) fault(`${name}: seq ${sub.seq} at event ${event.seq}`);
        }
        if (++count >= most) break;
        if (random.chance(0.3)) await new Promise((resolve) => clock.setTimeout(resolve, random.below(400)));
      }
    } catch (error) {
      entry.error = error;
      if (!(error instanceof GatewayError)) fault(`${name}: threw ${error}`);
      if (error.code === 'gap') {
        const { from, to } = error.detail;
        if (gentle) fault(`${name}: a gap ${from}-${to} without need`);
        if (entry.follow.last !== undefined && entry.follow.last !== from) fault(`${name}: a gap from ${from}, was at ${entry.follow.last}`);
      }
    }
    record.looped--;
    entry.done = true;
    if (sub.state === 'closed') record.open = false; // it was the last to leave
    else if (!record.looped && !record.listens) fault(`${name}: left, and nobody holds its subscription`);
    if (record.listens && sub.state === 'closed' && !closed && !record.ended) record.ended = true;
  }

  function forward() {
    const id = `m${++messageIds}`;
    const big = random.chance(0.1);
    const controller = random.chance(0.1) ? new AbortController() : undefined;
    const record = { id, big, done: undefined };
    messages.push(record);
    client.forward('dev', big ? 'x'.repeat(3_000) : 1, { messageId: id, timeout: random.of([1e9, Infinity]), signal: controller?.signal }).then(
      () => {
        record.done = 'confirmed';
        if (!gateway.queue.includes(id)) fault(`message ${id}: confirmed, and SQS does not have it`);
      },
      (error) => {
        record.done = error instanceof GatewayError ? error.code : error.name;
        const may = {
          closed, AbortError: controller !== undefined, refused: client.state === 'closed', queue_full: true,
          too_large: gateway.maxMessageBytes === 2_000 && big,
        }[record.done];
        if (!may) fault(`message ${id}: rejected with ${record.done}`);
      },
    );
    if (controller) clock.setTimeout(() => controller.abort(), random.below(100));
  }

  function act() {
    if (closed || ++calls > 150) return;
    const what = random();
    if (what < 0.3) { if (subs.filter(({ open }) => open).length < 6) subscribe(); }
    else if (what < 0.5) unsubscribe();
    else if (what < 0.75) forward();
    else if (what < 0.85) loop();
    else if (what < 0.87) client.reconnect();
    else if (what < 0.88) close();
    else client.ready().catch(() => {});
  }

  function close() {
    closed = true;
    client.close();
    if (client.state !== 'closed') fault(`${client.state} after close()`);
  }

  // What the world does.
  gateway.history = new Map();
  function publish(options, project = random.of(PROJECTS)) {
    const event = gateway.publish(project, options);
    const logged = gateway.log(project).events.at(-1);
    if (event.seq !== undefined) gateway.history.set(logged.id, { ...logged });
  }
  function world() {
    const what = random();
    const socket = [...sockets].at(-1);
    if (what < 0.5) for (let i = random.below(4); i >= 0; i--) publish();
    else if (what < 0.57) publish({ ephemeral: true });
    else if (what < 0.67) socket?.cut(random.of([1006, 1011, 1012, 1013]));
    else if (what < 0.70) { if (socket) socket.dead = true; }
    else if (what < 0.75) { if (random.chance(0.5)) gateway.forbid('b'); else gateway.forbidden.clear(); }
    else if (what < 0.80) for (const connection of gateway.connections) connection.stall(random.chance(0.5));
    else if (what < 0.82) clock.freeze(random.below(100_000));
    else if (!gentle && what < 0.86) publish({ lost: true });
    else if (!gentle && what < 0.90) { const project = random.of(PROJECTS); gateway.expire(project, random.below(gateway.log(project).head + 1)); }
    else if (!gentle && what < 0.95) { // lost between the tasks, and expired before the log was read
      const project = random.of(PROJECTS);
      publish({ lost: true }, project);
      gateway.skip(project);
    } else if (!gentle && what < 0.957) { replaced.set(gateway.epoch, clock.now()); gateway.replace(); }
  }

  for (const name of ['event', 'error', 'busy']) client.on(name, inListener(name, () => { if (closed) fault(`${name} after close()`); }));
  client.on('message', inListener('message', () => { if (closed) fault('message after close()'); }));
  client.on('state', inListener('state', (state) => { if (!OURS.has(state) || closed && state !== 'closed') fault(`state ${state} after close()`); }));
  for (let i = random.below(3); i >= 0; i--) publish();
  const steps = 10 + random.below(30);
  for (let i = 0; i < steps && !faults.length; i++) {
    if (random.chance(0.5)) act();
    else world();
    await microtasks();
    await clock.advance(random.of([0, 1, 20, 100, 1_000, 10_000]) * random());
  }

  // In the end all is well with the world.
  healthy = true;
  calls = 1e9;
  gateway.forbidden.clear();
  gateway.maxSubscriptions = 100;
  for (const connection of gateway.connections) connection.stall(false);
  for (const socket of sockets) if (!socket.dead && random.chance(0.5)) socket.cut(1006);
  const before = gateway.received;
  for (let i = 0; i < 12; i++) {
    await clock.advance(20_000);
    if (i < 6) publish();
    gateway.audit();
  }
  if (client.state !== (closed ? 'closed' : 'open')) fault(`${client.state} in the end`);
  for (const record of subs) {
    const { sub, name, project, options } = record;
    if (!record.open || closed || sub.state === 'closed') {
      if (!closed && record.open && record.listens && !record.ended) fault(`${name}: closed, and nobody closed it`);
      continue;
    }
    if (sub.state === 'failed' && ['forbidden', 'too_many_subscriptions'].includes(record.refused?.code)) continue; // asked again on the next connection
    if (sub.state === 'failed' && !record.listens) continue;
    if (sub.state !== 'live') fault(`${name}: ${sub.state} in the end`);
    if (record.listens && record.follow.last !== undefined && record.follow.last !== gateway.log(project).head) {
      fault(`${name}: at ${record.follow.last} in the end, of ${gateway.log(project).head}`);
    }
    if (record.owed) fault(`${name}: no snapshot came`);
    if (options.snapshot && record.listens && !record.snapshots) fault(`${name}: no snapshot at all`);
  }
  for (const { name, record, follow, done, error } of loops) {
    if (done || closed) continue;
    if (record.sub.state === 'live' && follow.last !== undefined && follow.last !== gateway.log(record.project).head) {
      fault(`${name}: at ${follow.last} in the end, of ${gateway.log(record.project).head}`);
    }
    if (error) fault(`${name}: ${error}`);
  }
  for (const { id, done } of messages) if (!done) fault(`message ${id}: neither confirmed nor rejected`);
  const held = new Set(subs.filter(({ sub }) => sub.state === 'live').map(({ project }) => project));
  for (const connection of gateway.connections) {
    if (closed || [...sockets].every(({ peer }) => peer !== connection)) continue;
    for (const project of connection.subscriptions) {
      if (project !== '*' && !held.has(project)) fault(`the server stays subscribed to ${project}`);
    }
  }
  if (gateway.received - before > 40) fault(`${gateway.received - before} connections in the end`);
  faults.push(...gateway.faults);
  if (!closed) close();
  await clock.advance(40_000);
  for (const { name, done } of loops) if (!done) fault(`${name}: hangs after close()`);
  for (const { id, done } of messages) if (!done) fault(`message ${id}: unsettled after close()`);
  if (clock.pending || sockets.size) fault(`${clock.pending} timers and ${sockets.size} sockets after close()`);
  return faults;
}

/** `node test/random.js LIBRARY FROM TO`: prints the first faults, as JSON; an empty list if there are none. */
if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const [library, from, to] = process.argv.slice(2);
  Error.stackTraceLimit = 0; // errors are many here, and nobody reads where they were made
  const faults = [];
  process.on('unhandledRejection', (error) => { if (!error?.planned) faults.push(`unhandled: ${error}`); });
  const { connect, GatewayError } = await import(pathToFileURL(library));
  for (let seed = Number(from); seed < Number(to) && faults.length < 5; seed++) {
    try {
      faults.push(...await run(seed, { connect, GatewayError }));
    } catch (error) {
      faults.push(`seed ${seed}: ${error}`);
    }
    if (seed % 100 === 0) await new Promise(setImmediate); // so that rejections are reported
  }
  process.stdout.write(JSON.stringify(faults), () => process.exit());
}
