/**
 * Client of the AgenticAI WebSocket gateway. What it promises: agenticai-ws.d.ts.
 *
 * `Machine` decides. It knows no socket, no timer, no promise and no listener: each of its methods is something
 * that has happened, and leaves in `io` what is to be done and in `news` what the page is to be told. `connect`
 * does both. It calls listeners only between two steps of the machine, one after the other, never inside one
 * another, so that a listener may call anything.
 *
 * SPDX-License-Identifier: MIT
 */

// --- Vocabulary ---

const PATIENCE_MS = 5000; // silence after a ping that ends a connection; doubled by each one that it ended
const PATIENCE_MAX_MS = 60000;
const PROMPT_FOR_MS = 60000; // answers within PATIENCE_MS for so long end what a slow network has taught
const CONNECT_MS = 15000; // url, getToken and handshake
const LASTED_MS = 5000; // a connection that lasted so long starts the back-off anew
const WAKE_MS = 5000; // between two attempts that nothing but a waking page brought about
const BUSY_MS = 3000; // the gateway says every two seconds that it does not read
const REPLAY_MS = 2000; // for which a catch-up is left alone before another one is asked for
const AFTER_MS_MAX = 120000; // what a gateway may wish for
const CLOSE_MS = 1000; // for a deliberate close, where a socket can be ended at all
const HISTORY_RETRIES = 5;
const TIMER_MAX_MS = 2 ** 31 - 1; // what setTimeout can carry
const MAX_FRAME = 4 << 20; // characters
const EVERYONE = '*';
const STREAMS_KEPT = 500; // of one subscription
const STALE_MS = 30000; // after a page has come, for ephemeral pieces of texts that are older
const PIECES_WAITING = 1000; // of one stream, for the one before them
const ENDS = new Set(['done', 'failed', 'cancelled']); // `data.status` of an order's last answer
// Forwards on their way at once. A gateway stops reading, pings too, at 32 that wait for SQS.
const WINDOW = 31;
// What a gateway without `ref` takes a second, in its own units, is 200: it drops the rest and cannot say what.
const PACE_PER_MS = 0.15;
const PACE_BURST = 150;
const LARGE_BYTES = 32768; // for which a message counts once more
const SUBSCRIBE_COUNTS_FOR = 3;
const PROJECT_MAX_CHARS = 256; // a longer one is not repeated in the error about it
const WAKE = ['online', 'offline', 'pageshow', 'visibilitychange'];
// Events of a subscription that are ours: an agent's of these names reach listeners of `event` only.
const OWN = new Set(['event', 'gap', 'snapshot', 'state', 'stream', 'error']);

const isSeq = (/** @type {unknown} */ value) => Number.isSafeInteger(value) && /** @type {number} */ (value) >= 0;

let ofThisPage; // the same for all its connections and for as long as it is there, made with the first

const newId = () => crypto.getRandomValues(new Uint32Array(4)).join('-');

/** By which a message that is sent again is known to be the same, over whatever connection. */
function clientId() {
  return ofThisPage ??= crypto.randomUUID?.() ?? crypto.getRandomValues(new Uint32Array(4)).join('-'); // the first: https only
}

export class GatewayError extends Error {
  /** @type {string} */ code;
  /** @type {boolean} */ retryable;
  /** @type {any} */ detail;

  constructor(code, retryable = false, message = code, detail = undefined) {
    super(message);
    this.name = 'GatewayError';
    this.code = code;
    this.retryable = retryable;
    this.detail = detail;
  }
}

function gapError(gap) {
  return new GatewayError('gap', true, `events ${gap.from + 1} to ${gap.to} are lost`, gap);
}

// --- The machine ---

/**
 * @typedef {{ action: string, since?: number, epoch?: string, snapshot?: boolean, ref?: string }} Request
 *   What waits for an answer.
 * @typedef {{ position: any, head: any, epoch?: string, settlesBy: number }} Flow
 *   What the server sends by itself since it confirmed: every event after `position`, in order. `head` is the
 *   highest `seq` known to exist, `settlesBy` how long what was missed may take to come. Numbers, or undefined
 *   from a gateway that has no log.
 * @typedef {{ seq?: number, epoch?: string }} Position
 *   A place in a log.
 */

/** What is subscribed at the server: one a project, whoever on the page is interested. */
class Channel {
  /** @type {Set<Reader>} */ readers = new Set();
  /** One at a time: the server answers only the latest. @type {Request | null} */
  request = null;
  /** @type {Flow | null} */
  flow = null;
  /** Of the last confirmation, also of an earlier connection. @type {string | undefined} */
  epoch = undefined;
  /** Why nothing is asked for at present. @type {GatewayError | null} */
  refusal = null;
  /** A snapshot follows the last confirmation. */
  snapshotDue = false;

  constructor(project) {
    this.project = project;
  }
}

/** One position in a project's log: a subscription of the page, or one loop over it. */
class Reader {
  /** `pending`, `live`, `failed` or `closed`. */
  state = 'pending';
  /** Everything after `at` comes by the channel's flow. */
  covered = false;
  /** Its loop is full: it is left out, and reads again after `at` when there is room. */
  behind = false;
  /** Told news are void once this has moved. */
  turn = 0;

  constructor(channel, { since, epoch, snapshot = false }, tell) {
    this.channel = channel;
    /** The last event on its way to the page. @type {any} */ this.at = since;
    /** @type {string | undefined} */ this.epoch = epoch;
    this.snapshot = this.wantsSnapshot = snapshot;
    this.tell = tell; // (name, values, position) of the page's side
  }
}

class Machine {
  /** For the driver to do, in order. */
  /** @type {any[]} */ io = [];
  /** For the page to hear, in order. */
  /** @type {any[]} */ news = [];
  /** `connecting`, `open`, `waiting` or `closed`. */
  state = 'connecting';
  /** Set by the driver before each step: the time, and what the socket has not sent yet. */
  now = 0;
  buffered = 0;
  /** Why the state is `closed`. @type {GatewayError | null} */
  ended = null;
  /** @type {number | undefined} */ latency = undefined;

  /** @type {Map<string, Channel>} */ channels = new Map();
  /** Messages that SQS does not have yet, by their id, in the page's order. */
  /** Forwards and stops that are not confirmed, by their ids: a stop's is a symbol. @type {Map<any, any>} */
  forwards = new Map();
  /** The first that is up, if that is known. @type {number | undefined} */ deadline = undefined;

  // Attempts.
  attempts = 0;
  attemptAt = 0; // or, when connecting, until when it may take
  notBefore = 0;
  wokenAt = -Infinity;
  refusals = 0; // of the token, in a row
  fresh = false;

  // The connection.
  /** @type {number | undefined} */ openedAt = undefined;
  announced = false; // that answers carry the `ref` of their message
  maxBytes = Infinity;
  asked = new Map(); // ref -> what was sent under it
  refs = 0;
  inFlight = 0;
  abandonedBytes = 0; // of the largest message sent on it that the page no longer waits for

  // Signs of life.
  /** [ref, sent at] of those without an answer. @type {[string | undefined, number][]} */ pings = [];
  pingAt = Infinity;
  /** The first ping since anything was heard. @type {number | undefined} */ silentSince = undefined;
  bufferedThen = 0;
  slept = false;
  patience = PATIENCE_MS;
  promptSince = 0;
  busyUntil = 0;

  // Sending.
  pumpAt = Infinity; // when what had to wait is to be tried again
  holdUntil = 0;
  credit = PACE_BURST;
  creditAt = 0;

  /** Those of `connect`, and whether a token that was refused may be followed by another. */
  constructor({ minDelay, maxDelay, maxRetries, pingInterval, maxPending, random, renewable }) {
    this.minDelay = minDelay;
    this.maxDelay = maxDelay;
    this.maxRetries = maxRetries;
    this.pingInterval = pingInterval;
    this.maxPending = maxPending;
    this.random = random;
    this.renewable = renewable;
  }

  /** When `timer` is to be called at the latest. */
  get due() {
    let due = Math.min(this.pumpAt, this.firstDeadline());
    if (this.state === 'connecting' || this.state === 'waiting') due = Math.min(due, this.attemptAt);
    if (this.state === 'open') {
      due = Math.min(due, this.busyUntil || this.pingAt);
      if (this.silentSince !== undefined) due = Math.min(due, this.silentSince + this.patience);
    }
    return due;
  }

  get busy() {
    return this.busyUntil > 0;
  }

  // What happens on the network.

  start() {
    this.attemptAt = this.now + CONNECT_MS;
    this.io.push({ do: 'dial', fresh: this.fresh });
    this.become('connecting');
  }

  /** An attempt failed before there was a socket. */
  failed(error) {
    this.tell('error', new GatewayError('connect_failed', true, String(error), error));
    this.lost(0, 'connect failed');
  }

  message(frame) {
    let message;
    try {
      if (typeof frame === 'string' && frame.length <= MAX_FRAME) message = JSON.parse(frame);
    } catch {
      // is reported below
    }
    if (message?.seq === null) delete message.seq;
    const { type, seq = 0 } = message ?? {};
    this.silentSince = undefined;
    this.slept = false;
    if (typeof type !== 'string' || !isSeq(seq) || (type === 'connected') === (this.state === 'open')) {
      return this.tell('error', new GatewayError('bad_message', false, 'bad message', message));
    }
    this.tell('message', message);
    const channel = this.channels.get(message.project_id);
    switch (type) {
      case 'connected': return this.opened(message);
      case 'subscription_confirmed': return channel && this.confirmed(channel, message);
      case 'unsubscription_confirmed': return channel && this.unsubscribed(channel, message);
      case 'project_snapshot': return channel && this.snapshot(channel, message.data);
      case 'forward_confirmed': return this.accepted(message);
      case 'stop_confirmed': return this.settle(this.stopOf(message) ?? {}, undefined, { messageId: message.message_id });
      case 'error': return this.refused(message);
      case 'pong': return this.pong(message);
      case 'reconnect': return this.notBefore = this.now + Math.min(Number(message.after_ms) || 0, AFTER_MS_MAX);
      case 'authenticated': case 'token_expiring': return undefined;
      case 'busy': if (message.project_id === undefined) return this.held();
    }
    if (channel) this.deliver(channel, message);
    else this.tell('event', message);
  }

  /** The socket is gone, was given up (code 0), or never came to be. */
  lost(code, reason) {
    const { now } = this;
    const { openedAt } = this;
    this.io.push({ do: 'drop' });
    if (code === 1009 && !this.announced) this.blame(reason);
    this.fresh = code === 4401 || openedAt === undefined; // a page is not shown that a handshake was refused with 401
    if (code === 1008 || code === 4401 && !this.renewable) return this.end(new GatewayError('refused', false, reason), code);
    if (code === 4401 && ++this.refusals > 1) this.tell('error', new GatewayError('unauthenticated', true, reason));
    if (openedAt !== undefined && now - openedAt >= LASTED_MS) {
      this.attempts = 0;
      if (code !== 4401) this.refusals = 0;
    }
    if (this.attempts >= this.maxRetries) return this.end(new GatewayError('gave_up', true, reason), code);
    const most = Math.min(this.maxDelay, this.minDelay * 2 ** Math.min(this.attempts++, 30));
    const delay = Math.max(this.random() * most, this.notBefore - now);
    this.attemptAt = now + delay;
    this.become('waiting', { code, reason, delay });
    this.reset();
  }

  /** Time has come for whatever is due. */
  timer() {
    const { now } = this;
    if (this.state === 'connecting' && now >= this.attemptAt) this.lost(0, 'timeout');
    else if (this.state === 'waiting' && now >= this.attemptAt) this.start();
    if (this.state === 'open') this.watch();
    if (now >= this.pumpAt) {
      this.pumpAt = Infinity;
      this.pump();
    }
    if (now >= this.firstDeadline()) {
      for (const forward of [...this.forwards.values()]) {
        if (now >= forward.deadline) this.settle(forward, new GatewayError('timeout', true));
      }
    }
  }

  /** The page is seen again, or its network has changed. */
  wake(name) {
    if (this.state === 'open') {
      if (this.silentSince === undefined && !this.busy) this.ping();
      return;
    }
    if (this.ended || name === 'offline') return;
    const soonest = Math.max(this.notBefore, this.wokenAt + WAKE_MS);
    if (soonest > this.now) {
      if (this.state === 'waiting' && soonest < this.attemptAt) this.attemptAt = this.wokenAt = soonest;
    } else if (this.state === 'waiting' || name === 'online') { // an attempt begun without a network may hang
      this.wokenAt = this.now;
      this.io.push({ do: 'drop' });
      this.start();
    }
  }

  // What the page calls.

  close() {
    this.end(new GatewayError('closed'));
  }

  reconnect() {
    if (this.ended) throw this.ended;
    this.io.push({ do: 'drop' });
    this.attempts = 0;
    this.reset();
    this.start();
  }

  /** A new reader of a project. */
  join(project, options, tell) {
    if (this.ended) throw this.ended;
    let channel = this.channels.get(project);
    if (!channel) this.channels.set(project, channel = new Channel(project));
    const reader = new Reader(channel, options, tell);
    const { since, epoch } = options;
    const { flow } = channel;
    channel.readers.add(reader);
    channel.refusal = null;
    // What already flows is all it needs, unless it asks for the past or may know another log.
    const served = flow && !reader.snapshot && (since === undefined
      || since >= flow.position && since <= flow.head && (epoch ?? flow.epoch) === flow.epoch);
    if (served) {
      Object.assign(reader, { at: since ?? flow.head, epoch: flow.epoch, covered: true, state: 'live' });
    }
    this.reconcile(channel);
    return reader;
  }

  leave(reader, error = undefined) {
    const { channel } = reader;
    if (!channel.readers.delete(reader)) return;
    this.turnTo(reader, 'closed', { error });
    this.reconcile(channel);
  }

  /** A reader's loop is full: what follows `seq` is to come again. */
  pause(reader, seq, epoch) {
    Object.assign(reader, { behind: true, covered: false, at: seq, epoch, turn: reader.turn + 1 });
  }

  resume(reader) {
    reader.behind = false;
    this.reconcile(reader.channel);
  }

  forward(forward) {
    if (this.ended) throw this.ended;
    if (this.forwards.has(forward.id)) throw new GatewayError('duplicate_id');
    if (this.forwards.size >= this.maxPending) throw new GatewayError('queue_full', true);
    forward.deadline = this.now + forward.timeout;
    if (this.state === 'open') this.checkSize(forward);
    this.forwards.set(forward.id, forward);
    this.deadline = Math.min(this.firstDeadline(), forward.deadline);
    this.pumpForwards();
  }

  /** A forward has an end; `result` where SQS has it. */
  settle(forward, error, result = /** @type {any} */ (undefined)) {
    if (!this.forwards.delete(forward.id)) return;
    if (this.deadline === forward.deadline) this.deadline = undefined;
    if (forward.sent) {
      this.inFlight--;
      if (error) this.abandonedBytes = Math.max(this.abandonedBytes, forward.bytes);
    }
    if (forward.ref) this.asked.delete(forward.ref);
    this.io.push({ do: 'settle', forward, error, result });
    this.pumpForwards();
  }

  // Inside: telling.

  tell(name, ...values) {
    this.news.push({ name, values });
  }

  become(state, info = {}) {
    this.state = state;
    this.tell('state', state, info);
  }

  /** `position` is what the page's side takes over when it hears of it. */
  inform(reader, name, values, position = /** @type {Position | undefined} */ (undefined)) {
    this.news.push({ reader, turn: reader.turn, name, values, position });
  }

  turnTo(reader, state, { error, position } = /** @type {{ error?: GatewayError | undefined, position?: Position | undefined }} */ ({})) {
    if (reader.state !== state || position) this.inform(reader, 'state', reader.state === state ? [] : [state, error], position);
    reader.state = state;
  }

  // Inside: the connection.

  opened({ ref, max_message_bytes: maxBytes }) {
    const { now } = this;
    this.announced = Boolean(ref);
    this.maxBytes = Number.isSafeInteger(maxBytes) ? maxBytes : Infinity;
    this.openedAt = this.promptSince = this.creditAt = now;
    this.credit = PACE_BURST;
    this.become('open');
    this.ping();
    for (const forward of [...this.forwards.values()]) {
      try {
        this.checkSize(forward);
      } catch (error) {
        this.settle(forward, error);
      }
    }
    this.pump();
  }

  /** Nothing of a connection outlives it. */
  reset() {
    Object.assign(this, {
      openedAt: undefined, inFlight: 0, abandonedBytes: 0, pings: [], pingAt: Infinity, silentSince: undefined,
      slept: false, pumpAt: Infinity, holdUntil: 0, announced: false, maxBytes: Infinity,
    });
    this.asked.clear();
    if (this.busy) this.unheld();
    for (const forward of this.forwards.values()) forward.sent = false;
    for (const [project, channel] of this.channels) {
      Object.assign(channel, { request: null, flow: null, refusal: null, snapshotDue: false });
      if (!channel.readers.size) this.channels.delete(project);
      for (const reader of channel.readers) {
        reader.covered = false;
        reader.wantsSnapshot = reader.snapshot;
        this.turnTo(reader, 'pending');
      }
    }
  }

  end(error, code) {
    if (this.ended) return;
    const deliberate = code === undefined;
    this.ended = error;
    this.io.push({ do: 'drop' }, { do: 'end' });
    this.become('closed', { code, reason: error.message });
    for (const forward of [...this.forwards.values()]) this.settle(forward, error);
    for (const { readers } of [...this.channels.values()]) {
      for (const reader of [...readers]) this.leave(reader, deliberate ? undefined : error);
    }
    this.channels.clear();
    this.pumpAt = Infinity;
    this.busyUntil = 0;
  }

  // Inside: signs of life.

  watch() {
    const { now } = this;
    if (this.busy && now >= this.busyUntil) {
      this.unheld();
      this.ping();
      this.pump();
    }
    const deadline = this.silentSince === undefined ? Infinity : this.silentSince + this.patience;
    if (now >= deadline) {
      if (this.buffered < this.bufferedThen) { // what was sent before the ping still makes its way
        this.bufferedThen = this.buffered;
        this.silentSince = now;
      } else if (now - deadline > this.patience && !this.slept) { // slept: the answer may be next
        this.slept = true;
        this.silentSince = undefined;
        this.ping();
      } else {
        this.patience = Math.min(PATIENCE_MAX_MS, 2 * this.patience);
        this.lost(0, 'no answer');
      }
    } else if (!this.busy && now >= this.pingAt) {
      this.ping();
    }
  }

  ping() {
    const { now } = this;
    this.pingAt = now + this.pingInterval;
    if (this.silentSince === undefined) {
      this.silentSince = now;
      this.bufferedThen = this.buffered;
    }
    this.credit--;
    this.pings.push([this.send({ action: 'ping' }, this), now]);
    for (const channel of this.channels.values()) {
      if (channel.refusal?.retryable) this.askAgain(channel);
    }
  }

  pong({ ref }) {
    const i = Math.max(0, this.pings.findIndex(([sent]) => sent !== undefined && sent === ref));
    const [, sentAt] = this.pings[i] ?? [];
    if (sentAt === undefined) return;
    for (const [sent] of this.pings.splice(0, i + 1)) this.asked.delete(sent);
    this.latency = this.now - sentAt;
    if (this.latency > PATIENCE_MS) this.promptSince = this.now;
    else if (this.now - this.promptSince >= PROMPT_FOR_MS) this.patience = PATIENCE_MS;
  }

  /** The gateway is there, and does not read. */
  held() {
    if (!this.busy) this.tell('busy', true);
    this.busyUntil = this.now + BUSY_MS;
  }

  unheld() {
    this.busyUntil = 0;
    this.tell('busy', false);
  }

  // Inside: sending.

  /** Write a message; what answers to its `ref`, where the gateway knows that, is `from`. */
  send(message, from) {
    const ref = this.announced ? String(++this.refs) : undefined;
    if (ref) this.asked.set(ref, from);
    this.io.push({ do: 'send', text: JSON.stringify({ ref, ...message }) });
    return ref;
  }

  /** Whether a message that counts for `cost` may go now; if not, there will be another try. */
  mayGo(cost) {
    let at = Math.max(this.busyUntil, this.holdUntil);
    if (!this.announced) {
      this.credit = Math.min(PACE_BURST, this.credit + (this.now - this.creditAt) * PACE_PER_MS);
      this.creditAt = this.now;
      if (this.credit < cost) at = Math.max(at, this.now + Math.ceil((cost - this.credit) / PACE_PER_MS));
    }
    if (at > this.now) {
      if (!this.busy) this.pumpAt = Math.min(this.pumpAt, at); // else the end of that leads here
      return false;
    }
    this.credit -= cost;
    return true;
  }

  pump() {
    if (this.state !== 'open') return;
    for (const channel of [...this.channels.values()]) this.reconcile(channel);
    this.pumpForwards();
  }

  pumpForwards() {
    if (this.state !== 'open') return;
    for (const forward of this.forwards.values()) {
      if (forward.sent) continue;
      const cost = Math.min(PACE_BURST, 1 + Math.floor(forward.bytes / LARGE_BYTES));
      if (this.inFlight >= WINDOW || !this.mayGo(cost)) return;
      forward.sent = true;
      this.inFlight++;
      let { text } = forward;
      forward.ref = this.announced ? String(++this.refs) : undefined;
      const prefix = `{"ref":"${forward.ref}",`;
      if (forward.ref && forward.bytes + prefix.length - 1 <= this.maxBytes) { // else its id has to do
        this.asked.set(forward.ref, forward);
        text = prefix + text.slice(1);
      }
      this.io.push({ do: 'send', text });
    }
  }

  firstDeadline() {
    if (this.deadline === undefined) {
      this.deadline = Infinity;
      for (const { deadline } of this.forwards.values()) this.deadline = Math.min(this.deadline, deadline);
    }
    return this.deadline;
  }

  checkSize({ bytes }) {
    if (bytes <= this.maxBytes) return;
    throw new GatewayError('too_large', false, `The message has ${bytes} bytes; the gateway takes ${this.maxBytes}.`);
  }

  /** A gateway that announces no bound closes with 1009 and names no message: the largest, or it would be sent for ever. */
  blame(reason) {
    let largest;
    for (const forward of this.forwards.values()) {
      if (forward.sent && !(forward.bytes <= largest?.bytes)) largest = forward;
    }
    if (largest?.bytes >= this.abandonedBytes) this.settle(largest, new GatewayError('too_large', false, reason));
  }

  // Inside: answers.

  accepted({ message_id: messageId, sqs_message_id: sqsMessageId }) {
    const forward = this.forwards.get(messageId);
    if (forward) this.settle(forward, undefined, { messageId, sqsMessageId });
  }

  stopOf({ message_id: messageId }) {
    return [...this.forwards.values()].find(({ stops }) => stops !== undefined && stops === messageId);
  }

  /** What of ours a message answers: by its `ref` or, from a gateway that does not know that, by what it names. */
  answers(message) {
    if (this.announced && message.ref !== undefined) {
      const from = this.asked.get(message.ref);
      this.asked.delete(message.ref);
      return from instanceof Channel && from.request?.ref !== message.ref ? undefined : from;
    }
    if (message.message_id !== undefined) {
      return message.action === 'stop' ? this.stopOf(message) : this.forwards.get(message.message_id);
    }
    const { action, project_id: project } = message;
    const ours = ({ request }) => request && request.action === action && !(this.announced && request.ref);
    const named = this.channels.get(project);
    if (named && ours(named)) return named;
    const unspeakable = ({ length }) => !length || length > PROJECT_MAX_CHARS;
    if (action && project === undefined) {
      return [...this.channels.values()].find((channel) => ours(channel) && unspeakable(channel.project));
    }
  }

  refused(message) {
    const error = new GatewayError(message.code, message.retryable === true, message.message, message);
    const from = this.answers(message);
    if (message.code === 'rate_limited') {
      this.tell('error', error);
      return this.dropped(from, Math.max(0, Number(message.retry_after_ms) || 0));
    }
    if (from?.id !== undefined) return this.settle(from, error);
    this.tell('error', error);
    if (from instanceof Channel) return this.denied(from, error);
    const channel = this.channels.get(message.project_id);
    if (message.action === 'subscribe' && channel?.snapshotDue) { // the subscription stands
      channel.snapshotDue = false;
      for (const reader of channel.readers) reader.wantsSnapshot = false;
    }
  }

  /** The gateway did not act on a message, and may on the next; on which, an old one does not say. */
  dropped(from, afterMs) {
    this.holdUntil = this.now + Math.max(afterMs, from ? 0 : 1000);
    const forwards = from ? [from].filter(({ id }) => id !== undefined) : this.forwards.values();
    for (const forward of forwards) {
      if (forward.sent) this.inFlight--;
      forward.sent = false;
    }
    for (const channel of from instanceof Channel ? [from] : from ? [] : this.channels.values()) {
      channel.request = null;
    }
    this.pumpAt = Math.min(this.pumpAt, this.holdUntil);
  }

  /** A subscribe was refused: what is confirmed already goes on. */
  denied(channel, error) {
    const { request } = channel;
    if (request.action === 'unsubscribe') return this.unsubscribed(channel, request); // there is nothing to end
    channel.request = null;
    channel.refusal = error;
    for (const reader of channel.readers) {
      if (!reader.covered && !reader.behind) this.turnTo(reader, 'failed', { error });
    }
    this.reconcile(channel);
  }

  // Inside: what is subscribed, and what is to be.

  /** Ask for the next thing that a channel lacks, if there is one and nothing else is under way. */
  reconcile(channel) {
    const { flow, readers, project } = channel;
    if (channel.request) return;
    if (!readers.size) {
      if (!flow) this.channels.delete(project);
      else if (this.mayGo(1)) this.unsubscribe(channel);
      return;
    }
    const lead = this.lead(channel);
    if (this.state !== 'open' || !lead || channel.refusal) return;
    if (flow && flow.position < flow.head && this.now < flow.settlesBy) {
      this.pumpAt = Math.min(this.pumpAt, flow.settlesBy);
    } else if (this.mayGo(SUBSCRIBE_COUNTS_FOR)) {
      this.subscribe(channel, lead);
    }
  }

  /** The first reader that the flow does not serve. */
  lead({ readers, snapshotDue }) {
    for (const reader of readers) {
      if (!reader.behind && (!reader.covered || reader.wantsSnapshot && !snapshotDue)) return reader;
    }
  }

  /** From the earliest position in the log that the reader knows; from its own where no log is known to reach so far. */
  subscribe(channel, lead) {
    const epoch = lead.at === undefined ? channel.epoch : lead.epoch;
    let since, snapshot = false;
    const ahead = lead.at > channel.flow?.head;
    for (const reader of channel.readers) {
      if (reader.behind) continue;
      snapshot ||= reader.wantsSnapshot;
      if (ahead ? reader === lead : reader.epoch === epoch && !(reader.at >= since)) since = reader.at ?? since;
    }
    channel.request = { action: 'subscribe', since, epoch: since === undefined ? undefined : epoch, snapshot };
    channel.request.ref = this.send(
      { action: 'subscribe', project_id: channel.project, since, epoch: channel.request.epoch, snapshot }, channel,
    );
  }

  unsubscribe(channel) {
    channel.request = { action: 'unsubscribe' };
    channel.request.ref = this.send({ action: 'unsubscribe', project_id: channel.project }, channel);
    for (const other of this.channels.values()) { // there is room now
      if (other.refusal?.code === 'too_many_subscriptions') this.askAgain(other);
    }
  }

  askAgain(channel) {
    channel.refusal = null;
    this.reconcile(channel);
  }

  /** A subscription has ended, as it was to, or because a fresh token does not allow it; so has one that was asked for. */
  unsubscribed(channel, { ref }) {
    this.asked.delete(ref);
    channel.request = channel.flow = null;
    for (const reader of channel.readers) {
      reader.covered = false;
      reader.wantsSnapshot = reader.snapshot;
      this.turnTo(reader, 'pending');
    }
    this.reconcile(channel);
  }

  /** Events of a channel follow; or, where nobody asked, some of them were lost on the way. */
  confirmed(channel, { seq, epoch, recovered, ref }) {
    let { request } = channel;
    if (request?.action !== 'subscribe' || request.ref && request.ref !== ref
      || recovered === false && request.since === undefined) {
      request = null; // it answers nothing
    }
    this.asked.delete(ref);
    if (request) channel.request = null;
    channel.snapshotDue = Boolean(request?.snapshot); // an earlier one has come, or failed
    if (channel.request) { // what is under way will say how it goes on
      channel.flow = null;
      for (const reader of channel.readers) reader.covered = false;
      return;
    }
    const since = request ? request.since : channel.flow?.position;
    const asked = request ? request.epoch : channel.flow?.epoch;
    const position = recovered && (asked ?? epoch) === epoch ? since ?? seq : seq;
    channel.flow = { position, head: seq, epoch, settlesBy: this.now + REPLAY_MS };
    channel.epoch = epoch;
    channel.refusal = null;
    for (const reader of channel.readers) {
      if (reader.behind || reader.wantsSnapshot && !channel.snapshotDue && reader.state !== 'live') continue;
      const { at } = reader;
      const meant = at === since && reader.epoch === asked; // the answer is about its very position
      const other = (reader.epoch ?? epoch) !== epoch; // the log is not the one it knows
      const gap = at !== undefined && (other || meant && recovered === false && at !== seq);
      reader.covered = gap || meant || !(at < position || at > seq);
      if (!reader.covered) continue; // it needs a request of its own
      if (gap || at === undefined) reader.at = seq;
      reader.epoch = epoch;
      this.turnTo(reader, 'live', { position: at === undefined ? { seq, epoch } : gap ? undefined : { epoch } });
      if (gap) this.gap(reader, at, seq);
    }
    this.reconcile(channel);
  }

  gap(reader, from, to) {
    reader.wantsSnapshot = reader.snapshot;
    this.inform(reader, 'gap', [{ from, to }], { seq: to, epoch: reader.epoch });
  }

  snapshot(channel, data) {
    channel.snapshotDue = false;
    for (const reader of channel.readers) {
      if (reader.wantsSnapshot && reader.covered) this.inform(reader, 'snapshot', [data]);
      if (reader.covered) reader.wantsSnapshot = false;
    }
  }

  deliver(channel, event) {
    const { flow, readers, project } = channel;
    const { seq } = event;
    if (seq === undefined) { // ephemeral
      for (const reader of readers) this.inform(reader, 'event', [event]);
      return;
    }
    if (!flow) { // it comes again, except to who wants no past
      for (const reader of readers) if (project === EVERYONE && reader.at === undefined) this.hand(reader, event);
      return;
    }
    if (seq <= flow.position) return; // came before
    const hole = seq > flow.position + 1;
    const arrived = flow.position < flow.head;
    flow.position = seq;
    flow.head = Math.max(flow.head ?? 0, seq);
    for (const reader of readers) {
      if (!reader.covered || seq <= reader.at) continue;
      if (hole && seq > reader.at + 1) this.gap(reader, reader.at, seq - 1);
      this.hand(reader, event);
    }
    if (hole || arrived && seq === flow.head) this.reconcile(channel);
  }

  hand(reader, event) {
    reader.at = event.seq;
    this.inform(reader, 'event', [event], { seq: event.seq, epoch: reader.epoch });
  }
}

// --- The page's side ---

function report(error) {
  Promise.reject(error); // the page's: unhandled
}

function emitter() {
  const entries = new Set();
  return {
    get size() { return entries.size; },
    on(event, fn) {
      const entry = [event, fn];
      entries.add(entry);
      return () => void (entry.length = 0, entries.delete(entry));
    },
    /** `wanted` is asked before each listener: the one before may have ended it all. */
    emit(event, values, wanted) {
      for (const [name, fn] of [...entries]) {
        if (name !== event || fn === undefined || !wanted()) continue;
        try {
          fn(...values);
        } catch (error) {
          report(error);
        }
      }
    },
  };
}

/** A loop over a subscription: a reader of its own, whose position is the last event that the loop was given. */
class Loop {
  /** Of {event, position} and {failure}. @type {any[]} */ buffer = [];
  /** Calls of next(). @type {any[]} */ waiting = [];
  done = false;
  failed = false; // the failure is in the buffer

  constructor(sub, { machine, act, maxBuffer, leave }) {
    this.machine = machine;
    this.act = act;
    this.maxBuffer = maxBuffer;
    this.onLeave = leave;
    this.seq = sub.seq;
    this.epoch = sub.epoch;
    if (sub.state === 'closed') {
      if (sub.error) this.buffer.push({ failure: sub.error });
      this.done = !sub.error;
      return;
    }
    this.reader = act(() => machine.join(sub.project, { since: sub.seq, epoch: sub.epoch },
      (name, values, position) => this.hear(name, values, position)));
    if (this.seq === undefined && this.reader.state === 'live') this.seq = this.reader.at;
  }

  hear(name, [value, error], position) {
    if (this.failed || this.done) return;
    if (name === 'event') this.take(value, position);
    else if (name === 'gap') {
      this.put({ failure: gapError(value) });
    } else if (name === 'state') {
      if (position) Object.assign(this, this.seq === undefined ? position : { epoch: position.epoch });
      if (value === 'closed') error ? this.put({ failure: error }) : this.finish();
      else if (value === 'failed' && !error.retryable) this.put({ failure: error });
    }
  }

  take(event, position) {
    const room = !this.reader.behind && (this.waiting.length || this.buffer.length < this.maxBuffer);
    if (room) return this.put({ event, position });
    if (event.seq === undefined) return this.put({ failure: new GatewayError('overflow', true) });
    const last = this.buffer.map((item) => item.position).filter(Boolean).at(-1) ?? this;
    this.machine.pause(this.reader, last.seq, last.epoch);
  }

  put(item) {
    this.failed = Boolean(item.failure);
    if (this.failed) this.act(() => this.machine.leave(this.reader));
    const next = this.waiting.shift();
    if (!next) this.buffer.push(item);
    else if (item.failure) this.finish(() => next.reject(item.failure));
    else next.resolve(this.give(item));
  }

  give({ event, position }) {
    if (position) Object.assign(this, position);
    return { value: event, done: false };
  }

  next() {
    const item = this.buffer.shift();
    if (!item) {
      return this.done ? Promise.resolve({ value: undefined, done: true })
        : new Promise((resolve, reject) => this.waiting.push({ resolve, reject }));
    }
    if (item.failure) {
      this.finish();
      return Promise.reject(item.failure);
    }
    const given = this.give(item);
    if (this.reader.behind && !this.buffer.length && !this.failed) this.act(() => this.machine.resume(this.reader));
    return Promise.resolve(given);
  }

  return(value = undefined) {
    this.finish();
    return Promise.resolve({ value, done: true });
  }

  throw(error) {
    this.finish();
    return Promise.reject(error);
  }

  /** However it ends. */
  finish(settle = () => {}) {
    this.buffer = [];
    if (!this.done) {
      this.done = true;
      if (this.reader) this.act(() => this.machine.leave(this.reader));
      this.onLeave(this);
    }
    settle();
    for (const { resolve } of this.waiting.splice(0)) resolve({ value: undefined, done: true });
  }

  [Symbol.asyncIterator]() {
    return this;
  }
}

/** @type {typeof import('./agenticai-ws.d.ts').isPiece} */
export function isPiece({ data }) {
  return typeof data?.stream === 'string' && isSeq(data.at) && typeof data.text === 'string';
}

/**
 * A text that grows. Its pieces begin `at` a place in it, in UTF-16 code units, which is what a string's length counts.
 * The logged pieces alone are the text, whatever order a standard queue has brought them in; the ephemeral ones make
 * it early, and one that does not fit is left out.
 */
class Stream {
  /** How it ended. @type {string | undefined} */ state = undefined;
  #logged = '';
  #early = '';
  #waiting = new Map(); // logged pieces beyond the end, by their place

  /** `from`: undefined where the page may have come in its middle. */
  constructor({ type, in_reply_to: messageId, data: { stream } }, /** @type {number | undefined} */ from) {
    this.id = stream;
    this.type = type;
    this.messageId = messageId;
    this.from = from;
  }

  get text() { return this.#logged + this.#early; }
  get done() { return this.state !== undefined; }

  /**
   * Whether it is another one with this piece. Throws where the piece contradicts what is logged. `fresh`: an
   * ephemeral piece may be its beginning, and no late one of what was logged before.
   */
  take({ at, text, state }, logged, fresh = false) {
    if (this.from === undefined && (logged || fresh && !at)) this.from = at;
    if (state === 'superseded') {
      this.state = state;
      return true;
    }
    if (this.from === undefined) return false;
    const place = at - this.from;
    const { length } = this.#logged;
    const { length: seen } = this.text;
    if (place < length && text.slice(Math.max(0, -place), length - place) !== this.#logged.slice(Math.max(0, place), Math.max(0, place + text.length))) {
      throw new GatewayError('bad_message', false, 'a piece says otherwise than the text that is logged');
    }
    if (!logged) {
      const fits = place <= seen && place + text.length > seen;
      if (fits) this.#early += text.slice(seen - place);
      return fits;
    }
    if (place > length) {
      if (this.#waiting.size < PIECES_WAITING) this.#waiting.set(place, { at, text, state });
      return false;
    }
    const added = text.slice(length - place);
    const known = this.#early.startsWith(added); // what came early
    this.#logged += added;
    this.#early = known ? this.#early.slice(added.length) : '';
    if (typeof state === 'string') {
      this.state = state;
      this.#early = '';
      return true;
    }
    const next = this.#waiting.get(this.#logged.length);
    this.#waiting.delete(this.#logged.length);
    return Boolean(next && this.take(next, true)) || !known;
  }
}

/**
 * The texts that events are pieces of, the latest of them.
 * @param {(name: string, values: any[], wanted: () => boolean) => void} emit
 * @param {{ now: () => number, whole?: () => boolean, lasting?: boolean }} options `whole`: events come from before the
 *   beginning of each text on; `lasting`: those without `seq` are all there is, as nothing is logged of what goes to one
 *   connection.
 */
function streamsOf(emit, { now, whole = () => false, lasting = false }) {
  let begun = now();
  let lost = false;
  const streams = new Map(); // by their ids; null where it has ended
  return {
    take(event, wanted) {
      if (!isPiece(event)) {
        if (event.type === 'stream') emit('error', [new GatewayError('bad_message', false, 'a piece of no text', event)], wanted);
        return;
      }
      const { data } = event;
      let stream = streams.get(data.stream);
      if (stream === null) return;
      if (!stream) {
        streams.set(data.stream, stream = new Stream(event, whole() && !lost ? 0 : undefined));
        if (streams.size > STREAMS_KEPT) streams.delete(streams.keys().next().value);
      }
      try {
        const changed = stream.take(data, lasting || event.seq !== undefined, now() - begun >= STALE_MS);
        if (stream.done) streams.set(data.stream, null);
        if (changed) emit('stream', [stream], wanted);
      } catch (/** @type {any} */ error) {
        emit('error', [Object.assign(error, { detail: event })], wanted);
      }
    },
    /** Events are lost: a text that goes on does so as one that the page has come in the middle of. */
    lose() {
      lost = true;
      begun = now();
      streams.clear();
    },
  };
}

/** The address, with the question for signs of life while the gateway does not read. */
function withBusy(address) {
  const text = String(address);
  return /[?&]busy=/.test(text) ? text : `${text}${text.includes('?') ? '&' : '?'}busy=1`;
}

/** @type {typeof import('./agenticai-ws.d.ts').connect} */
export function connect(url, {
  getToken, minDelay = 500, maxDelay = 20000, maxRetries = Infinity, pingInterval = 25000, maxPending = 100, maxBuffer = 1000,
  WebSocket = globalThis.WebSocket, random = Math.random,
  clock = { setTimeout, clearTimeout, now: () => performance.now() },
} = {}) {
  if (!WebSocket) {
    throw new TypeError('There is no WebSocket here. Pass one as the option `WebSocket`, such as that of the package ws.');
  }
  const { setTimeout, clearTimeout, now } = clock;
  const machine = /** @type {any} */ (new Machine({
    minDelay, maxDelay, maxRetries, pingInterval, maxPending, random, renewable: Boolean(getToken),
  }));
  const page = emitter();
  /** Of what belongs to no subscription, from the first listener on. @type {ReturnType<typeof streamsOf> | undefined} */
  let streams;
  const signals = new Map(); // AbortSignal -> the forwards that it may abort, and its listener
  const histories = new Set(); // what ends those under way
  let socket = null;
  let attempt = 0; // the number of the newest; what another one says counts no more
  let timer, armedFor = Infinity;
  let doing = false, telling = false;

  /** One step of the machine, and what follows from it. */
  function act(step) {
    machine.now = now();
    machine.buffered = socket?.bufferedAmount ?? 0;
    try {
      return step();
    } finally {
      follow();
    }
  }

  function follow() {
    if (!doing) {
      doing = true;
      while (machine.io.length) {
        try {
          effects[machine.io[0].do](machine.io.shift());
        } catch (error) {
          report(error);
        }
      }
      doing = false;
      arm();
    }
    if (telling) return; // whoever is telling goes on with what has been added
    telling = true;
    while (machine.news.length) tell(machine.news.shift());
    telling = false;
  }

  function arm() {
    const due = machine.due;
    if (due === armedFor) return;
    clearTimeout(timer);
    armedFor = due;
    if (due === Infinity) return;
    timer = setTimeout(() => {
      armedFor = Infinity;
      act(() => machine.timer());
    }, Math.min(TIMER_MAX_MS, Math.max(0, due - now())));
  }

  function tell({ reader, turn, name, values, position }) {
    if (reader) {
      const final = values[0] === 'closed' && name === 'state';
      const wanted = () => final || reader.state !== 'closed' && reader.turn === turn;
      if (wanted()) reader.tell(name, values, position, wanted);
    } else {
      const wanted = () => !machine.ended || machine.ended && values[0] === 'closed' && name === 'state';
      page.emit(name, values, wanted);
      if (name === 'event') streams?.take(values[0], wanted);
      if (name === 'state' && values[0] === 'open') streams?.lose();
    }
  }

  const effects = {
    dial: ({ fresh }) => void dial(++attempt, fresh),
    send: ({ text }) => socket?.send(text),
    drop() {
      attempt++;
      const dropped = socket;
      socket = null;
      if (!dropped) return;
      dropped.onmessage = dropped.onclose = null; // a browser may take minutes to close it
      dropped.close();
      // The package ws would keep Node alive for half a minute, if the peer does not answer.
      if (dropped.terminate) setTimeout(() => dropped.terminate(), CLOSE_MS)?.unref?.();
    },
    settle({ forward, error, result }) {
      forward.release();
      if (error) forward.reject(error);
      else forward.resolve(result);
    },
    end() {
      for (const name of WAKE) globalThis.removeEventListener?.(name, wake);
      for (const end of [...histories]) end();
    },
  };

  async function dial(mine, fresh) {
    try {
      await null; // for the caller's listeners
      if (mine !== attempt) return;
      const address = typeof url === 'function' ? await url() : url;
      if (mine !== attempt) return;
      const token = await getToken?.({ fresh });
      if (mine !== attempt) return;
      const bearer = token && 'bearer.' + btoa(token).replace(/\+/g, '-').replace(/\//g, '_').replace(/=/g, '');
      const opening = new WebSocket(withBusy(address), bearer ? ['agenticai.v1', bearer] : []);
      opening.onmessage = ({ data }) => opening === socket && act(() => machine.message(data));
      opening.onclose = ({ code, reason }) => opening === socket && act(() => machine.lost(code, reason));
      opening.onerror = () => {};
      socket = opening;
    } catch (error) {
      if (mine === attempt) act(() => machine.failed(error));
    }
  }

  function wake({ type }) {
    const hidden = type === 'visibilitychange' && globalThis.document?.visibilityState === 'hidden';
    if (!hidden) act(() => machine.wake(type));
  }

  /** One listener a signal, however many forwards it is for. */
  function watch(signal, abort) {
    let aborts = signals.get(signal);
    if (!aborts) {
      aborts = new Set();
      const listener = () => act(() => { for (const each of [...aborts]) each(); });
      signals.set(signal, Object.assign(aborts, { listener }));
      signal.addEventListener('abort', listener);
    }
    aborts.add(abort);
    return () => {
      aborts.delete(abort);
      if (aborts.size || signals.get(signal) !== aborts) return;
      signals.delete(signal);
      signal.removeEventListener('abort', aborts.listener);
    };
  }

  function subscribe(project, { since, epoch, snapshot } = /** @type {any} */ ({})) {
    if (machine.ended) throw machine.ended;
    if (typeof project !== 'string' || !isSeq(since ?? 0)) throw new TypeError('Bad project or since.');
    const ours = emitter();
    const typed = emitter(); // by the agents' own words
    const loops = new Set();
    /** Where in the log it began. */
    let start = since ?? undefined;
    /** From the first listener on. @type {ReturnType<typeof streamsOf> | undefined} */
    let streams;
    /** @type {Position} */ let told = { seq: since ?? undefined, epoch };
    /** Where the last loop was when it ended. @type {Position | undefined} */ let left;

    const hear = (name, values, position, wanted) => {
      if (position) told = { ...told, ...position };
      start ??= told.seq;
      if (values.length) ours.emit(name, values, wanted);
      if (name === 'gap') streams?.lose();
      if (name !== 'event') return;
      typed.emit(values[0].type, values, wanted);
      streams?.take(values[0], wanted);
    };
    const reader = act(() => machine.join(project, { since: since ?? undefined, epoch, snapshot: snapshot === true }, hear));
    if (reader.state === 'live') told = { seq: reader.at, epoch: reader.epoch };
    start ??= told.seq;

    const place = () => {
      if (left) return left;
      /** @type {any} */ let least;
      for (const loop of loops) {
        const at = loop.seq === undefined ? told : loop;
        if (!least || at.seq < least.seq) least = at;
      }
      return least ?? told;
    };
    const leave = (loop) => {
      const unheard = loops.size === 1 && !ours.size && !typed.size;
      if (unheard || reader.state === 'closed') left ??= { ...place() };
      loops.delete(loop);
      if (unheard) sub.unsubscribe();
    };
    /** @type {any} */ const sub = {
      project,
      get state() { return reader.state; },
      get seq() { return place().seq; },
      get epoch() { return place().epoch; },
      /** Why it is closed, unless the page wanted it. */
      get error() { return reader.state === 'closed' && machine.ended?.code !== 'closed' ? machine.ended : undefined; },
      on(name, fn) {
        if (name === 'stream') streams ??= streamsOf(ours.emit, { now, whole: () => start === 0, lasting: project === EVERYONE });
        return (OWN.has(name) ? ours : typed).on(name, fn);
      },
      history: (options) => history(project, options),
      unsubscribe() {
        act(() => machine.leave(reader));
        for (const loop of [...loops]) loop.finish();
      },
      [Symbol.asyncIterator]() {
        const loop = new Loop(sub, { machine, act, maxBuffer, leave });
        if (!loop.done) loops.add(loop);
        return loop;
      },
    };
    return sub;
  }

  /** Send a message until it is confirmed. */
  const submit = (id, message, { timeout = 30000, signal, stops }) => new Promise((resolve, reject) => {
    const text = JSON.stringify(message);
    signal?.throwIfAborted();
    if (!(timeout >= 0)) throw new TypeError('Bad timeout.');
    const forward = {
      id, stops, text, bytes: new TextEncoder().encode(text).length, timeout, sent: false, resolve, reject, release: () => {},
    };
    act(() => machine.forward(forward));
    if (signal) forward.release = watch(signal, () => machine.settle(forward, signal.reason));
  });

  /** The log as it is now, over a connection of its own: this one's subscriptions notice nothing. */
  function history(project, { since, epoch, limit = 100 } = /** @type {any} */ ({})) {
    return new Promise((resolve, reject) => {
      if (machine.ended) throw machine.ended;
      if (!isSeq(since ?? 0) || !isSeq(limit)) throw new TypeError('Bad since or limit.');
      const own = connect(url, {
        getToken, minDelay, maxDelay, maxRetries: Math.min(maxRetries, HISTORY_RETRIES), pingInterval, WebSocket, random, clock,
      });
      const end = () => finish(reject, machine.ended);
      const finish = (settle, result) => {
        histories.delete(end);
        own.close();
        settle(result);
      };
      const fail = (state, error) => state === 'failed' && !error.retryable && finish(reject, error);
      histories.add(end);
      own.on('state', (state) => state === 'closed' && own.ready().catch((error) => finish(reject, error)));

      /** @type {any} */ const last = own.subscribe(project); // says where the log ends
      const off = last.on('state', (state) => {
        if (state !== 'live') return;
        off();
        read(since ?? Math.max(0, last.seq - limit), last.seq);
      });
      last.on('state', fail);

      function read(from, to) {
        const events = [];
        if (!(from < to) || !limit) return finish(resolve, events);
        /** @type {any} */ const sub = own.subscribe(project, { since: from, epoch: since === undefined ? last.epoch : epoch });
        sub.on('state', fail);
        sub.on('event', (event) => {
          if (event.seq !== undefined) events.push(event);
          if (events.length === limit || event.seq >= to) finish(resolve, events);
        });
        sub.on('gap', (gap) => {
          sub.unsubscribe();
          // The last ones: so many as the log still has, to within a half. Those after a position: all or none.
          if (since === undefined) read(Math.ceil((from + to) / 2), to);
          else finish(reject, gapError(gap));
        });
      }
    });
  }

  const forward = (type, data, { project, messageId = newId(), ...options } = /** @type {any} */ ({})) => submit(messageId, {
    action: 'forward', type, message_id: messageId, project_id: project, client_id: clientId(), data,
  }, options);

  const stop = (messageId, { project, ...options } = /** @type {any} */ ({})) => submit(Symbol('stop'), {
    action: 'stop', message_id: messageId, project_id: project,
  }, { ...options, stops: messageId });

  /** Resolves once a subscription stands, or cannot; rejects where it was closed, or that takes too long. */
  const standing = (sub, { timeout = 30000, signal } = /** @type {any} */ ({})) => new Promise((resolve, reject) => {
    signal?.throwIfAborted();
    const late = timeout < TIMER_MAX_MS && setTimeout(() => settle(() => reject(new GatewayError('timeout', true))), timeout);
    const abort = () => settle(() => reject(signal.reason));
    const off = sub.on('state', () => check());
    const settle = (how) => {
      if (late) clearTimeout(late);
      signal?.removeEventListener('abort', abort);
      off();
      how();
    };
    const check = () => {
      if (sub.state === 'closed') settle(() => reject(sub.error ?? new GatewayError('closed')));
      else if (sub.state !== 'pending') settle(() => resolve(undefined));
    };
    signal?.addEventListener('abort', abort);
    check();
  });

  /**
   * An order with its answers: one that `send` sends now, or one that was sent before.
   * @param {import('./agenticai-ws.d.ts').SavedOrder} saved
   * @param {(() => Promise<any>) | undefined} send
   */
  function answersTo(saved, send = undefined, /** @type {any} */ options = undefined) {
    const { messageId, project, seq, epoch } = saved;
    const sub = project === undefined ? undefined : subscribe(project, { since: seq, epoch });
    const place = { seq, epoch };
    /** @type {any} */ let failure;
    const confirmed = (async () => {
      if (sub) await standing(sub, options); // all answers come after where the log is now
      if (sub && place.seq === undefined) Object.assign(place, { seq: sub.seq, epoch: sub.epoch });
      const confirmation = send ? await send() : { messageId };
      return { ...confirmation, project, ...place };
    })();
    const given = new Set(); // loops
    const mine = (event) => event.in_reply_to === messageId;
    // Without a project, what answers it is no event of the connection's where the page has subscribed to `*`.
    const answered = (fn) => (sub ?? page).on(sub ? 'event' : 'message', (event) => mine(event) && fn(event));
    const texts = emitter();
    const streams = streamsOf(texts.emit, { now, whole: () => true, lasting: !sub });
    let over = false;
    const offs = [answered((event) => streams.take(event, () => !over)), sub?.on('gap', streams.lose)];
    const ended = (event) => mine(event) && ENDS.has(event.data?.status);
    confirmed.catch((error) => {
      failure = error;
      order.close();
    });
    /** @type {any} */ const order = {
      messageId,
      project,
      get seq() { return place.seq; },
      get epoch() { return place.epoch; },
      then: (resolve, reject) => confirmed.then(resolve, reject),
      stop: (more) => stop(messageId, { project, ...more }),
      close() {
        over = true;
        sub?.unsubscribe();
        for (const off of offs) off?.();
        for (const end of [...given]) end();
      },
      on(name, fn) {
        if (name === 'event') return answered(fn);
        return (name === 'stream' || name === 'error' ? texts : sub ?? page).on(name, fn);
      },
      async *[Symbol.asyncIterator]() {
        const events = sub ? read() : hear();
        for await (const event of events) {
          yield event;
          if (ended(event)) return;
        }
        if (failure) throw failure;
      },
    };
    /** From the log, as often as it is asked for. */
    async function* read() {
      await standing(sub, options).catch(() => {});
      if (sub.state === 'closed') return;
      const again = subscribe(project, { since: place.seq ?? sub.seq, epoch: place.epoch ?? sub.epoch });
      const end = () => again.unsubscribe();
      given.add(end);
      try {
        for await (const event of again) if (mine(event)) yield event;
      } finally {
        given.delete(end);
        end();
      }
    }
    async function* hear() {
      const waiting = [];
      let wake = () => {};
      let over = false;
      const end = () => { over = true; wake(); };
      const off = [
        answered((event) => { waiting.push(event); wake(); }),
        page.on('state', (state) => { if (state === 'closed') end(); }),
      ];
      given.add(end);
      try {
        while (!over || waiting.length) {
          if (waiting.length) yield waiting.shift();
          else await new Promise((resolve) => wake = () => resolve(undefined));
        }
      } finally {
        given.delete(end);
        for (const each of off) each();
      }
    }
    return order;
  }

  for (const name of WAKE) globalThis.addEventListener?.(name, wake);
  act(() => machine.start());
  return /** @type {any} */ ({
    on(name, fn) {
      if (name === 'stream') streams ??= streamsOf(page.emit, { now, lasting: true });
      return page.on(name, fn);
    },
    get state() { return machine.state; },
    get latency() { return machine.latency; },
    get busy() { return machine.busy; },
    subscribe,
    history,
    reconnect: () => act(() => machine.reconnect()),
    close: () => act(() => machine.close()),

    ready: () => new Promise((resolve, reject) => {
      const check = () => {
        if (machine.state === 'open') resolve(undefined);
        else if (machine.ended) reject(machine.ended);
        else return;
        off();
      };
      const off = page.on('state', check);
      check();
    }),

    forward,
    stop,
    order: (type, data, { project, messageId = newId(), ...options } = /** @type {any} */ ({})) => answersTo(
      { messageId, project }, () => forward(type, data, { project, messageId, ...options }), options,
    ),
    follow: (saved) => answersTo(saved),
  });
}
