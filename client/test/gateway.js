/**
 * A gateway after docs/PROTOCOL.md, as much of it as a client can tell, and a network to it.
 *
 * It runs on whatever clock it is given: a virtual one for the random test, the real one for the test that holds
 * it to the real server. It keeps its own log of everything, against which the client is checked.
 */

/** Time that passes only when the test says so. */
export class VirtualClock {
  #now = 1_000;
  #timers = []; // sorted by time, and among equals by age
  #id = 0;

  now = () => this.#now;
  setTimeout = (fn, ms = 0) => {
    if (!(ms < 2 ** 31)) ms = 1; // as the real one
    const timer = { fn, at: this.#now + Math.max(0, ms), id: ++this.#id };
    let i = this.#timers.length;
    while (i > 0 && this.#timers[i - 1].at > timer.at) i--;
    this.#timers.splice(i, 0, timer);
    return timer;
  };
  clearTimeout = (timer) => {
    const i = this.#timers.indexOf(timer);
    if (i >= 0) this.#timers.splice(i, 1);
  };

  get pending() {
    return this.#timers.length;
  }

  /** Runs the next timer that is due by `end`; whether there was one. */
  step(end) {
    const timer = this.#timers[0];
    if (!timer || timer.at > end) {
      this.#now = Math.max(this.#now, end);
      return false;
    }
    this.#timers.shift();
    this.#now = Math.max(this.#now, timer.at);
    timer.fn();
    return true;
  }

  async advance(ms, flush = microtasks) {
    const end = this.#now + ms;
    do await flush(); while (this.step(end));
  }

  /** Time passes and nothing runs, as on a page that is frozen. */
  freeze(ms) {
    this.#now += ms;
  }
}

/** What promises lead to has happened. */
export async function microtasks() {
  for (let i = 0; i < 6; i++) await null;
}

/** Random numbers that a seed repeats. */
export function seeded(seed) {
  let state = (seed * 2_654_435_761) >>> 0 || 1;
  const random = () => { // mulberry32
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4_294_967_296;
  };
  return Object.assign(random, {
    below: (n) => Math.floor(random() * n),
    chance: (p) => random() < p,
    of: (list) => list[Math.floor(random() * list.length)],
  });
}

const bytesOf = (text) => Buffer.byteLength(text);
const FORWARDS_IN_FLIGHT = 32;
const PAGE = 4; // events that a catch-up sends at once

/** One project's events; `floor` of them have expired. */
class Log {
  events = [];
  floor = 0;

  get head() {
    return this.events.length;
  }
}

export class FakeGateway {
  logs = new Map();
  epoch = 'E1';
  epochs = ['E1'];
  connections = new Set();
  /** Every message that SQS has, in order. */
  queue = [];
  /** What went wrong for those who watch from outside: a client that breaks the protocol. */
  faults = [];
  forbidden = new Set();
  received = 0;
  #ids = 0;

  constructor({
    clock, random = () => 0, announces = true, maxMessageBytes = 262_144, maxCatchup = 1_000, maxSubscriptions = 100,
    messagesPerSecond = 0, readMs = () => 0, sqsMs = () => 5, busy = true,
  }) {
    Object.assign(this, {
      clock, random, announces, maxMessageBytes, maxCatchup, maxSubscriptions, messagesPerSecond, readMs, sqsMs, sendsBusy: busy,
    });
  }

  log(project) {
    let log = this.logs.get(project);
    if (!log) this.logs.set(project, log = new Log());
    return log;
  }

  /** An agent's update; `lost` is one that the tasks did not hear of. */
  publish(project, { type = 'step', ephemeral = false, lost = false, data = undefined } = {}) {
    const log = this.log(project);
    const id = ++this.#ids;
    const event = { type, project_id: project, data: data ?? { id }, timestamp: 't' };
    if (!ephemeral) {
      event.seq = log.head + 1;
      log.events.push({ ...event, id, epoch: this.epoch });
    }
    if (!lost) for (const connection of this.connections) connection.event(event);
    return event;
  }

  /** The oldest events expire, up to a seq. */
  expire(project, upTo) {
    const log = this.log(project);
    log.floor = Math.max(log.floor, Math.min(upTo, log.head));
  }

  /** Events expire before the task has heard of them: its listeners are told. */
  skip(project) {
    const log = this.log(project);
    this.expire(project, log.head);
    for (const connection of this.connections) connection.skipped(project);
  }

  /** The tasks look whether they have heard of everything. */
  audit() {
    for (const connection of this.connections) connection.audit();
  }

  /** The table is wiped: all logs begin anew. The tasks start again with it. */
  replace() {
    this.epoch = `E${this.epochs.length + 1}`;
    this.epochs.push(this.epoch);
    this.logs.clear();
    for (const connection of [...this.connections]) connection.close(1012, 'restart');
  }

  /** A fresh token no longer allows a project. */
  forbid(project) {
    this.forbidden.add(project);
    for (const connection of this.connections) connection.turnedOut(project);
  }

  accept(wire, address = '') {
    return new FakeConnection(this, wire, address);
  }
}

class FakeConnection {
  live = new Map(); // project -> last seq sent
  catching = new Map(); // project -> the catch-up
  inFlight = 0;
  inbox = [];
  open = true;
  ids = new Set(); // of the forwards that came over it
  #credit = 400;
  #creditAt;
  #busy;

  constructor(gateway, wire, address) {
    Object.assign(this, { gateway, wire });
    this.wantsBusy = /[?&]busy=1/.test(address);
    this.#creditAt = gateway.clock.now();
    gateway.connections.add(this);
    this.say({
      type: 'connected', message: 'WebSocket connection established', timestamp: 't', connection_id: `c${++gateway.received}`,
      ...(gateway.announces ? { ref: true, max_message_bytes: gateway.maxMessageBytes } : {}),
    });
    this.live.set('*', gateway.log('*').head);
  }

  say(message) {
    if (this.open) this.wire.send(JSON.stringify(message));
  }

  /** The peer, or the network, has gone. */
  gone() {
    this.open = false;
    this.catching.clear();
    this.gateway.clock.clearTimeout(this.#busy);
    this.gateway.connections.delete(this);
  }

  close(code, reason) {
    if (!this.open) return;
    this.gone();
    this.wire.close(code, reason);
  }

  receive(text) {
    this.inbox.push(text);
    this.#read();
  }

  get paused() {
    return this.inFlight >= FORWARDS_IN_FLIGHT || this.stalled;
  }

  /** It is not read from for a while, whatever the reason. */
  stall(on) {
    this.stalled = on;
    if (on) this.#sayBusy();
    this.#read();
  }

  #sayBusy() {
    const { clock, sendsBusy } = this.gateway;
    if (!this.wantsBusy || !sendsBusy || this.#busy) return;
    this.#busy = clock.setTimeout(() => {
      this.#busy = undefined;
      if (!this.paused || !this.open) return;
      this.say({ type: 'busy' });
      this.#sayBusy();
    }, 2_000);
  }

  #read() {
    while (this.open && this.inbox.length && !this.paused) this.#take(this.inbox.shift());
    if (this.paused) this.#sayBusy();
  }

  #take(text) {
    const { gateway } = this;
    if (bytesOf(text) > gateway.maxMessageBytes) return this.close(1009, 'message too big');
    const message = JSON.parse(text);
    const ref = gateway.announces && typeof message.ref === 'string' && message.ref.length <= 64 ? message.ref : undefined;
    const answer = (said) => this.say({ ...said, ...(ref === undefined ? {} : { ref }) });
    if (!this.#withinPace(text, answer)) return;
    const { action, project_id: project, message_id: messageId } = message;
    const refuse = (code, retryable) => answer({
      type: 'error', message: code, code, action, ...(retryable === undefined ? {} : { retryable }),
      ...(messageId === undefined ? {} : { message_id: messageId }),
      ...(project === undefined || project.length > 256 ? {} : { project_id: project }),
    });
    if (action !== 'ping' && project !== undefined && (!project.length || project.length > 256)) return refuse('invalid_field');
    if (gateway.forbidden.has(project)) return refuse('forbidden');
    switch (action) {
      case 'ping': return answer({ type: 'pong', timestamp: 't' });
      case 'subscribe': return this.#subscribe(message, answer, refuse);
      case 'unsubscribe':
        if (project !== '*') this.#stop(project);
        return answer({ type: 'unsubscription_confirmed', project_id: project });
      case 'forward': return this.#forward(message, answer);
      default: return refuse('unknown_action');
    }
  }

  #withinPace(text, answer) {
    const { messagesPerSecond: rate, clock } = this.gateway;
    if (!rate) return true;
    this.#credit = Math.min(2 * rate, this.#credit + (clock.now() - this.#creditAt) * rate / 1_000);
    this.#creditAt = clock.now();
    if (this.#credit >= 1) {
      this.#credit -= 1 + Math.floor(bytesOf(text) / 32_768) + (text.includes('"subscribe"') ? 2 : 0);
      return true;
    }
    const wait = Math.ceil((1 - this.#credit) / rate * 1_000);
    answer({ type: 'error', message: 'too fast', code: 'rate_limited', retry_after_ms: wait });
    return false;
  }

  #stop(project) {
    this.catching.delete(project);
    this.live.delete(project);
  }

  turnedOut(project) {
    if (!this.subscriptions.has(project)) return;
    this.#stop(project);
    this.say({ type: 'unsubscription_confirmed', project_id: project });
  }

  get subscriptions() {
    return new Set([...this.live.keys(), ...this.catching.keys()]);
  }

  #subscribe({ project_id: project, since = null, epoch, snapshot }, answer, refuse) {
    const { gateway } = this;
    const others = [...this.subscriptions].filter((name) => name !== '*' && name !== project);
    if (project !== '*' && others.length >= gateway.maxSubscriptions) return refuse('too_many_subscriptions');
    this.#stop(project);
    const run = {};
    this.catching.set(project, run);
    const current = () => this.open && this.catching.get(project) === run;
    const later = (fn) => {
      const ms = gateway.readMs();
      if (ms) gateway.clock.setTimeout(() => current() && fn(), ms);
      else fn();
    };
    const log = () => gateway.log(project);
    const confirm = (recovered, say = answer) => say({
      type: 'subscription_confirmed', project_id: project, seq: log().head, epoch: gateway.epoch,
      ...(recovered === undefined ? {} : { recovered }),
    });
    let position;
    const begin = () => {
      let recovered;
      position = log().head;
      if (since !== null) {
        const missed = position - since;
        recovered = !(epoch != null && epoch !== gateway.epoch) && missed >= 0 && missed <= gateway.maxCatchup && since >= log().floor;
        if (recovered) position = since;
      }
      confirm(recovered);
      if (snapshot) later(() => { answer({ type: 'project_snapshot', project_id: project, data: { at: log().head } }); later(page); });
      else page();
    };
    const page = () => {
      if (position < log().floor) { // expired in the middle of it
        position = log().head;
        confirm(false, (message) => this.say(message));
      }
      for (const event of log().events.slice(position, position + PAGE)) this.#sayEvent(event);
      position = Math.min(position + PAGE, log().head);
      if (position < log().head) return later(page);
      this.catching.delete(project);
      this.live.set(project, position);
    };
    later(begin);
  }

  #sayEvent({ id: _, epoch: __, ...event }) {
    this.say(event);
  }

  /** Something has just been published. */
  event(event) {
    const { project_id: project, seq } = event;
    if (seq === undefined) {
      if (this.live.has(project)) this.say(event);
    } else if (this.live.has(project)) {
      const log = this.gateway.log(project);
      if (this.live.get(project) < log.floor) this.skipped(project, seq - 1); // it did not hear of some, and they are gone
      for (const missed of log.events.slice(this.live.get(project), seq)) this.#sayEvent(missed);
      this.live.set(project, seq);
    }
  }

  audit() {
    for (const [project, position] of this.live) {
      const { events, floor, head } = this.gateway.log(project);
      if (position >= head) continue;
      if (position < floor) this.skipped(project, floor);
      for (const missed of events.slice(Math.max(position, floor))) this.#sayEvent(missed);
      this.live.set(project, head);
    }
  }

  skipped(project, seq = this.gateway.log(project).head) {
    if (!this.live.has(project) || this.live.get(project) >= seq) return;
    this.live.set(project, seq);
    this.say({ type: 'subscription_confirmed', project_id: project, seq, epoch: this.gateway.epoch, recovered: false });
  }

  #forward({ message_id: id = 'made', project_id: project }, answer) {
    const { gateway } = this;
    if (this.ids.has(id)) gateway.faults.push(`forward ${id} came twice over one connection`);
    this.ids.add(id);
    this.inFlight++;
    const settle = () => {
      gateway.queue.push(id);
      this.inFlight--;
      answer({ type: 'forward_confirmed', message_id: id, sqs_message_id: `sqs-${id}`, ...(project ? {} : {}) });
      if (this.inFlight <= FORWARDS_IN_FLIGHT / 2 || !this.inbox.length) this.#read();
    };
    const ms = gateway.sqsMs();
    if (ms) gateway.clock.setTimeout(settle, ms);
    else settle();
  }
}

/**
 * The `WebSocket` of a page, at the other end of a network to a gateway. `latency()` in milliseconds each way;
 * `up` says whether an attempt reaches the gateway; a connection whose `dead` is set carries nothing any more.
 */
export function network(gateway, { latency = () => 1, up = () => true } = {}) {
  const { clock } = gateway;
  const sockets = new Set();
  class NetworkSocket {
    #arrival = [0, 0];
    onmessage = null;
    onclose = null;

    constructor(address, protocols) {
      Object.assign(this, { address, protocols, closed: false, dead: false });
      sockets.add(this);
      const far = latency();
      this.latency = far;
      clock.setTimeout(() => {
        if (this.closed) return;
        if (!up()) return this.cut();
        const wire = {
          send: (text) => this.#carry(0, () => this.onmessage?.({ data: text })),
          close: (code, reason) => this.#carry(0, () => this.cut(code, reason)),
        };
        this.peer = gateway.accept(wire, address);
      }, 2 * far);
    }

    /** In order, after the latency. */
    #carry(way, fn) {
      const at = Math.max(this.#arrival[way], clock.now() + this.latency);
      this.#arrival[way] = at;
      clock.setTimeout(() => !this.dead && (way || !this.closed) && fn(), at - clock.now());
    }

    send(text) {
      if (this.closed) throw new Error('sent on a closed socket');
      this.#carry(1, () => this.peer.open && this.peer.receive(text));
    }

    close() {
      if (this.closed) return;
      this.closed = true;
      sockets.delete(this);
      this.#carry(1, () => this.peer?.gone());
      if (this.dead) this.peer?.gone();
    }

    /** The connection ends. */
    cut(code = 1006, reason = '') {
      if (this.closed) return;
      this.closed = true;
      sockets.delete(this);
      this.peer?.gone();
      this.onclose?.({ code, reason });
    }
  }
  return { WebSocket: NetworkSocket, sockets };
}
