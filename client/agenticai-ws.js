/** The gateway's client: see agenticai-ws.d.ts. */
const PONG_MS = 5000; // silence of a dead socket
const CONNECT_MS = 15000; // getToken and handshake
const LASTED_MS = 5000; // then the back-off starts anew
const MAX_FRAME = 4 << 20; // characters
const WAKE = ['online', 'offline', 'pageshow', 'visibilitychange'];
const isSeq = (value) => Number.isSafeInteger(value) && value >= 0;

export class GatewayError extends Error {
  constructor(code, retryable = false, message = code, detail) {
    super(message);
    Object.assign(this, { name: 'GatewayError', code, retryable, detail });
  }
}

function emitter() {
  const entries = new Set();
  return {
    on(event, fn) {
      const entry = [event, fn];
      entries.add(entry);
      return () => void (entry.length = 0, entries.delete(entry));
    },
    emit(event, ...args) {
      for (const [name, fn] of [...entries]) {
        try {
          if (name === event) fn(...args);
        } catch (error) {
          Promise.reject(error); // the page's: unhandled
        }
      }
    },
  };
}

async function* iterate(sub, limit) {
  const buffer = [];
  let wake, full;
  const offs = [
    sub.on('event', (event) => {
      full ||= buffer.push(event) > limit;
      wake?.();
    }),
    sub.on('state', () => wake?.()),
  ];
  try {
    for (;;) {
      while (buffer.length) yield buffer.shift();
      if (full) throw new GatewayError('overflow', true);
      if (sub.state === 'closed') return;
      await new Promise((resolve) => wake = resolve);
    }
  } finally {
    for (const off of offs) off();
  }
}

/** @type {typeof import('./agenticai-ws.d.ts').connect} */
export function connect(url, {
  getToken, minDelay = 500, maxDelay = 20000, pingInterval = 25000, maxPending = 100, maxBuffer = 1000,
  WebSocket = globalThis.WebSocket, random = Math.random,
  clock = { setTimeout, clearTimeout, now: () => performance.now() },
} = {}) {
  const { setTimeout, clearTimeout, now } = clock;
  const { on, emit } = emitter();
  const channels = new Map(); // project -> what its subscriptions share
  const pending = new Map(); // message id -> unconfirmed forward
  let state, latency, socket, ended;
  let timer; // the only one: a state waits for one thing
  let attempts = 0, openedAt = 0, pingedAt, heard, notBefore = 0, fresh = false;

  const arm = (ms, fn) => {
    clearTimeout(timer);
    timer = setTimeout(fn, ms);
  };
  const become = (next, info = {}) => emit('state', state = next, info);
  const send = (message) => socket.send(JSON.stringify(message));

  async function start() {
    arm(CONNECT_MS, () => lost(0, 'timeout'));
    const mine = timer; // another attempt has another
    become('connecting');
    try {
      await 0; // for the caller's listeners
      const address = typeof url === 'function' ? await url() : url;
      const token = await getToken?.({ fresh });
      if (mine !== timer) return;
      const bearer = token && 'bearer.' + btoa(token).replace(/\+/g, '-').replace(/\//g, '_').replace(/=/g, '');
      socket = new WebSocket(address, bearer ? ['agenticai.v1', bearer] : []);
      socket.onmessage = ({ data }) => receive(data);
      socket.onclose = ({ code, reason }) => lost(code, reason);
      socket.onerror = () => {};
    } catch (error) {
      if (mine !== timer) return;
      emit('error', new GatewayError('connect_failed', true, String(error), error));
      lost(0, 'connect failed');
    }
  }

  /** The close may take a browser minutes. */
  function drop() {
    if (socket) {
      socket.onmessage = socket.onclose = null;
      socket.close();
    }
    clearTimeout(timer);
    timer = socket = null;
  }

  function lost(code, reason) {
    drop();
    fresh = code === 4401 || !openedAt; // 401 is not shown to pages
    if (code === 1008 || code === 4401 && !getToken) return end(new GatewayError('refused', false, reason), code);
    // 1009 names no message: the largest, or it would be sent for ever.
    if (code === 1009) {
      [...pending.values()].sort((a, b) => b.text.length - a.text.length)[0]?.reject(new GatewayError('too_large', false, reason));
    }
    if (openedAt && now() - openedAt >= LASTED_MS) attempts = 0;
    openedAt = 0;
    const delay = Math.max(random() * Math.min(maxDelay, minDelay * 2 ** attempts++), notBefore - now());
    arm(delay, start);
    become('waiting', { code, reason, delay });
    for (const [project, channel] of channels) {
      Object.assign(channel, { asked: false, live: false, again: false });
      if (!channel.subs.size) channels.delete(project);
      for (const sub of channel.subs) sub.become('pending');
    }
  }

  function end(error, code) {
    if (ended) return;
    ended = error;
    drop();
    for (const name of WAKE) globalThis.removeEventListener?.(name, wake);
    become('closed', { code, reason: error.message });
    for (const forward of [...pending.values()]) forward.reject(error);
    for (const { subs } of channels.values()) for (const sub of subs) sub.unsubscribe();
  }

  function wake() {
    if (state === 'open' && heard) ping();
    if (state === 'waiting' && now() >= notBefore) start();
  }

  function ping() {
    heard = false;
    pingedAt = now();
    send({ action: 'ping' });
    arm(PONG_MS, () => {
      if (heard) arm(pingInterval - PONG_MS, ping);
      else if (now() - pingedAt > 2 * PONG_MS) ping(); // slept: the answer may be next
      else lost(0, 'no answer');
    });
    for (const channel of channels.values()) if (channel.again) ask(channel);
  }

  /** From the earliest position that a subscription needs. */
  function ask(channel) {
    channel.again = channel.asked; // one at a time: the server answers only the latest
    if (state !== 'open' || channel.asked) return;
    const subs = [...channel.subs];
    const since = channel.since = subs.map((sub) => sub.seq).filter(isSeq).sort((a, b) => a - b)[0];
    const snapshot = channel.snapshot = subs.some((sub) => sub.snapshot);
    channel.asked = true;
    channel.live = false;
    send({ action: 'subscribe', project_id: channel.project, since, epoch: channel.epoch, snapshot });
  }

  function leave({ project, subs, asked }) {
    if (subs.size || asked || ended) return;
    channels.delete(project);
    if (state === 'open') send({ action: 'unsubscribe', project_id: project });
  }

  const transmit = ({ text }) => state === 'open' && socket.send(text);

  function receive(frame) {
    heard = true;
    let message;
    try {
      if (frame.length <= MAX_FRAME) message = JSON.parse(frame);
    } catch {}
    const { type, seq = 0 } = message ?? {};
    if (typeof type !== 'string' || !isSeq(seq) || (type === 'connected') === (state === 'open')) {
      return emit('error', new GatewayError('bad_message', false, 'bad message', message));
    }
    emit('message', message);
    const channel = channels.get(message.project_id);
    const forward = pending.get(message.message_id);
    switch (type) {
      case 'connected': return opened();
      case 'subscription_confirmed': return channel && confirmed(channel, message);
      case 'project_snapshot': return channel?.subs.forEach((sub) => sub.emit('snapshot', message.data));
      case 'forward_confirmed': return forward?.resolve({ messageId: message.message_id, sqsMessageId: message.sqs_message_id });
      case 'error': return failed(channel, forward, message);
      case 'pong': return latency = now() - pingedAt;
      case 'reconnect': return notBefore = now() + Math.min(Number(message.after_ms) || 0, 120000);
      case 'unsubscription_confirmed': case 'token_expiring': return;
      default: return channel?.subs.size ? deliver(channel, message) : emit('event', message);
    }
  }

  function opened() {
    state = 'open';
    openedAt = now();
    ping();
    channels.forEach(ask);
    pending.forEach(transmit);
    become('open');
  }

  /** Is this answer still wanted? */
  function answered(channel) {
    channel.asked = false;
    leave(channel);
    if (channel.again && channel.subs.size) ask(channel);
    return !channel.asked;
  }

  function confirmed(channel, { seq, epoch, recovered }) {
    const { asked } = channel;
    if (asked ? !answered(channel) : recovered !== false) return;
    Object.assign(channel, { live: true, epoch, seq: recovered ? channel.since : seq });
    for (const sub of channel.subs) {
      const from = sub.seq;
      const kept = recovered && (sub.epoch ?? epoch) === epoch;
      if (!kept || from === undefined) sub.seq = seq;
      sub.epoch = epoch;
      sub.become('live');
      if (!kept && from !== undefined) sub.emit('gap', { from, to: seq });
    }
    if (!asked && channel.snapshot) ask(channel);
  }

  function deliver(channel, event) {
    const { seq } = event;
    if (seq !== undefined) {
      if (!channel.live || seq <= channel.seq) return; // comes again; came before
      if (seq > channel.seq + 1) for (const sub of channel.subs) sub.emit('gap', { from: channel.seq, to: seq - 1 });
      channel.seq = seq;
    }
    for (const sub of channel.subs) {
      if (seq <= sub.seq) continue;
      sub.seq = seq ?? sub.seq;
      sub.emit('event', event);
    }
  }

  function failed(channel, forward, message) {
    const error = new GatewayError(message.code, message.retryable, message.message, message);
    if (forward) return forward.reject(error);
    emit('error', error);
    if (message.action !== 'subscribe' || !channel || !answered(channel)) return;
    channel.again = message.retryable;
    for (const sub of channel.subs) sub.become('failed', error);
  }

  if (!WebSocket) throw new TypeError('Pass a WebSocket.');
  for (const name of WAKE) globalThis.addEventListener?.(name, wake);
  start();
  return {
    on,
    get state() { return state; },
    get latency() { return latency; },
    close: () => end(new GatewayError('closed')),

    ready: () => new Promise((resolve, reject) => {
      const check = () => {
        if (state === 'open') resolve();
        else if (ended) reject(ended);
        else return;
        off();
      };
      const off = on('state', check);
      check();
    }),

    subscribe(project, { since, epoch, snapshot } = {}) {
      if (ended) throw ended;
      if (typeof project !== 'string' || !isSeq(since ?? 0)) throw new TypeError('Bad project or since.');
      let channel = channels.get(project);
      if (!channel) channels.set(project, channel = { project, subs: new Set(), epoch });
      const { on, emit } = emitter();
      /** @type {any} */ const sub = {
        on, emit, project, snapshot, epoch, seq: since, state: 'pending',
        become(next, error) {
          if (sub.state !== next) emit('state', sub.state = next, error);
        },
        unsubscribe() {
          if (!channel.subs.delete(sub)) return;
          sub.become('closed', ended);
          leave(channel);
        },
        [Symbol.asyncIterator]: () => iterate(sub, maxBuffer),
      };
      channel.subs.add(sub);
      if (isSeq(since) || snapshot || !channel.live && !channel.asked) ask(channel);
      else if (channel.live) Object.assign(sub, { seq: channel.seq, epoch: channel.epoch, state: 'live' });
      return sub;
    },

    forward: (type, data, {
      project, messageId = crypto.getRandomValues(new Uint32Array(4)).join('-'), timeout = 30000, signal,
    } = {}) => new Promise((resolve, reject) => {
      const text = JSON.stringify({ action: 'forward', type, message_id: messageId, project_id: project, data });
      signal?.throwIfAborted();
      if (ended) throw ended;
      if (pending.has(messageId)) throw new GatewayError('duplicate_id');
      if (pending.size >= maxPending) throw new GatewayError('queue_full', true);
      const settle = (act) => (value) => {
        pending.delete(messageId);
        clearTimeout(deadline);
        signal?.removeEventListener('abort', abort);
        act(value);
      };
      const forward = { text, resolve: settle(resolve), reject: settle(reject) };
      const abort = () => forward.reject(signal?.reason);
      const deadline = setTimeout(() => forward.reject(new GatewayError('timeout', true)), timeout);
      signal?.addEventListener('abort', abort);
      pending.set(messageId, forward);
      transmit(forward);
    }),
  };
}
