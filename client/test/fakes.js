/** A clock, a socket and a page under the test's control. */
import { connect } from '../agenticai-ws.js';

export class FakeClock {
  #now = 1_000;
  #timers = new Map();
  #next = 1;

  now = () => this.#now;
  setTimeout = (fn, ms) => {
    if (!(ms < 2 ** 31)) ms = 1; // as the real one
    this.#timers.set(this.#next, { fn, at: this.#now + Math.max(0, ms) });
    return this.#next++;
  };
  clearTimeout = (timer) => void this.#timers.delete(timer);

  /** How many were set so far. */
  get armed() {
    return this.#next - 1;
  }

  get pending() {
    return this.#timers.size;
  }

  /** Lets time pass and runs what falls due on the way. */
  async advance(ms) {
    const end = this.#now + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at)[0];
      if (!due) break;
      this.#timers.delete(due[0]);
      this.#now = Math.max(this.#now, due[1].at);
      due[1].fn();
      await settled();
    }
    this.#now = end;
  }

  /** Lets time pass without a timer running, as in a frozen page. */
  freeze(ms) {
    this.#now += ms;
  }
}

export class FakeSocket {
  sent = [];
  texts = [];
  closed = false;

  constructor(url, protocols) {
    this.url = url;
    this.protocols = protocols;
  }

  send(text) {
    if (this.closed) throw new Error('sent on a dropped socket');
    this.texts.push(text);
    this.sent.push(JSON.parse(text));
  }

  close() {
    this.closed = true;
  }

  /** What the server sends: objects as JSON, anything else as it is. */
  receive(...frames) {
    for (const frame of frames) {
      this.onmessage?.({ data: frame?.constructor === Object ? JSON.stringify(frame) : frame });
    }
  }

  /** The connection breaks or is closed by the server. */
  break(code = 1006, reason = '') {
    this.onclose?.({ code, reason });
  }

  /** What was sent under an action, in order. */
  actions(action) {
    return this.sent.filter((message) => message.action === action);
  }
}

/** Everything queued has run: promises and what they lead to. */
export const settled = () => new Promise((resolve) => setImmediate(resolve));

/** A client with everything faked; `random` is 0.5 unless given. */
export function setup(options = {}, url = 'ws://gateway/ws') {
  const clock = new FakeClock();
  const sockets = [];
  const client = connect(url, {
    clock,
    random: () => 0.5,
    WebSocket: class extends FakeSocket {
      constructor(...args) {
        super(...args);
        sockets.push(this);
      }
    },
    ...options,
  });
  const log = [];
  for (const name of ['state', 'event', 'error']) client.on(name, (...args) => log.push([name, ...args]));
  return {
    client,
    clock,
    sockets,
    log,
    /** The names of the states so far. */
    states: () => log.filter(([name]) => name === 'state').map(([, state]) => state),
    errors: () => log.filter(([name]) => name === 'error').map(([, error]) => error.code),
    /** The newest socket, once its attempt got that far. */
    async dialled() {
      await settled();
      return sockets.at(-1);
    },
    /** The newest socket, opened. */
    async opened() {
      await settled();
      sockets.at(-1).receive({ type: 'connected', connection_id: `c${sockets.length}` });
      return sockets.at(-1);
    },
  };
}

/** What a subscription told its listeners, in order. */
export function record(sub) {
  const seen = [];
  sub.on('event', (event) => seen.push(event.seq ?? event.type));
  sub.on('gap', ({ from, to }) => seen.push(`gap ${from}-${to}`));
  sub.on('snapshot', (data) => seen.push(['snapshot', data]));
  sub.on('state', (state) => seen.push(state));
  return seen;
}

export const event = (seq, project = 'p', type = 'step') => ({ type, project_id: project, seq, data: { n: seq } });
export const confirmed = (seq, recovered, project = 'p', epoch = 'E1') => ({
  type: 'subscription_confirmed', project_id: project, seq, epoch, ...(recovered === undefined ? {} : { recovered }),
});

/** The page's global event target, as a browser has one, for as long as the test runs. */
export function fakePage(t) {
  const page = new EventTarget();
  let listeners = 0;
  globalThis.addEventListener = (...args) => { listeners++; page.addEventListener(...args); };
  globalThis.removeEventListener = (...args) => { listeners--; page.removeEventListener(...args); };
  t.after(() => {
    delete globalThis.addEventListener;
    delete globalThis.removeEventListener;
  });
  return { fire: (name) => page.dispatchEvent(new Event(name)), get listeners() { return listeners; } };
}
