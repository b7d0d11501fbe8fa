/**
 * Client of the AgenticAI WebSocket gateway: one ES module without dependencies, for browsers and Node.
 *
 * It connects again by itself and resumes every subscription after the last event it saw: a listener gets
 * each project event once, in order, or a `gap` that says it must fetch its state anew.
 *
 * ```js
 * const gateway = connect('wss://gateway.example.com/ws', { getToken: () => session.accessToken() });
 * const project = gateway.subscribe('proj_123', { snapshot: true });
 * project.on('snapshot', render);
 * project.on('event', apply);
 * project.on('gap', refetch);
 * await gateway.forward('dev', { task: 'add a login page' }, { project: 'proj_123' });
 * ```
 */

/** `connecting`: token, handshake. `open`: usable. `waiting`: until the next attempt. `closed`: for good. */
export type ConnectionState = 'connecting' | 'open' | 'waiting' | 'closed';

/**
 * `pending`: not confirmed on this connection. `live`: confirmed. `failed`: the server refused it (asked again
 * after a reconnect, and with the next ping where the refusal was `retryable`). `closed`: given up, for good.
 */
export type SubscriptionState = 'pending' | 'live' | 'failed' | 'closed';

/** Calling it removes the listener; calling it again does nothing. */
export type Off = () => void;

/** A project event. `type` is the agent's own word. */
export interface ProjectEvent<Data = unknown> {
  type: string;
  /** Absent, or `*`, for what goes to everyone. */
  project_id?: string;
  data?: Data;
  /** Position in the project's log. Absent: ephemeral (such as a stream of tokens), never repeated. */
  seq?: number;
  /** UTC, as `2025-11-24T12:00:00Z`. */
  timestamp?: string;
  [field: string]: unknown;
}

/** What happened between `from`, the last event seen, and `to` is not known: fetch the state anew. */
export interface Gap {
  from: number;
  to: number;
}

/** Why the state changed. `code` is the WebSocket close code, 0 where the client gave up by itself. */
export interface StateInfo {
  code?: number;
  reason?: string;
  /** Milliseconds to the next attempt; only with `waiting`. */
  delay?: number;
}

/**
 * Codes of the client's own; every other code is the server's.
 *
 * | code | meaning |
 * |---|---|
 * | `bad_message` | the server sent something unreadable or out of turn; it was ignored |
 * | `connect_failed` | `url` or `getToken` failed, or the address is not valid; it is tried again |
 * | `closed` | `close()` was called |
 * | `refused` | the server closed with 1008, or with 4401 and there is no `getToken` |
 * | `queue_full` | `maxPending` messages are unconfirmed already; nothing was sent |
 * | `duplicate_id` | a message with this id is unconfirmed already; nothing was sent |
 * | `timeout` | not confirmed in time: the agent may still get the message; repeat it with the same id |
 * | `too_large` | the server closed with 1009; this was the largest unconfirmed message |
 * | `overflow` | an async iterator was read too slowly; subscribe anew with `since` |
 */
export class GatewayError extends Error {
  constructor(code: string, retryable?: boolean, message?: string, detail?: unknown);
  readonly name: 'GatewayError';
  readonly code: string;
  /** Whether the same call may succeed later. */
  readonly retryable: boolean;
  /** The server's whole message (with `retry_after_ms`, for one), or what was thrown or unreadable. */
  readonly detail?: any;
}

export interface Options {
  /**
   * Asked for the bearer token before every attempt; may be slow (15 s with the handshake) and may reject: the
   * attempt is then repeated like any other. `fresh` says that the last token may have been refused: do not
   * answer from a cache. The token travels as WebSocket subprotocol, never in the address.
   */
  getToken?: (request: { fresh: boolean }) => string | Promise<string>;
  /** Milliseconds. The n-th attempt waits random() * min(maxDelay, minDelay * 2^n). Default 500. */
  minDelay?: number;
  /** Milliseconds, default 20000. The server's own wish (`reconnect`, up to 2 minutes) may be longer. */
  maxDelay?: number;
  /** Milliseconds between pings, which a page must send itself to notice a dead socket; over 5000. Default 25000. */
  pingInterval?: number;
  /** Bound on unconfirmed messages, those written while offline included. Default 100. */
  maxPending?: number;
  /** Bound on events that wait in one async iterator. Default 1000. */
  maxBuffer?: number;
  /** For Node 20: `WebSocket` of the package ws. Default: the global one. */
  WebSocket?: new (url: string | URL, protocols: string[]) => any;
  /** In [0, 1). */
  random?: () => number;
  /** `now` in milliseconds, monotonic. The functions are called without `this`. */
  clock?: {
    now(): number;
    setTimeout(fn: () => void, ms: number): any;
    clearTimeout(timer: any): void;
  };
}

export interface SubscribeOptions {
  /** The last `seq` seen: what came later is delivered first. Without it, only what happens from now on. */
  since?: number;
  /** The `epoch` that goes with `since`; a log that was replaced meanwhile is then recognised. */
  epoch?: string;
  /** Ask for the project's state too, now and after every reconnect or gap. */
  snapshot?: boolean;
}

export interface ForwardOptions {
  project?: string;
  /** Idempotency key; default: random. */
  messageId?: string;
  /** Milliseconds in all, reconnects included; default 30000. */
  timeout?: number;
  /** Stops the waiting; what was sent already may still reach the agent. */
  signal?: AbortSignal;
}

export interface Confirmation {
  messageId: string;
  sqsMessageId?: string;
}

/**
 * One subscriber of one project. Several of the same project share what goes over the wire, each with a
 * position of its own. Iterating ends with `unsubscribe()` or `close()`; leaving the loop keeps the subscription.
 */
export interface Subscription<Data = unknown> extends AsyncIterable<ProjectEvent<Data>> {
  readonly project: string;
  readonly state: SubscriptionState;
  /** Last event delivered; keep it with `epoch` to resume in another page. */
  readonly seq?: number;
  readonly epoch?: string;
  on(event: 'event', fn: (event: ProjectEvent<Data>) => void): Off;
  on(event: 'gap', fn: (gap: Gap) => void): Off;
  /** Null where the project has no state. */
  on(event: 'snapshot', fn: (data: any) => void): Off;
  on(event: 'state', fn: (state: SubscriptionState, error?: Error) => void): Off;
  unsubscribe(): void;
}

export interface Connection {
  readonly state: ConnectionState;
  /** Milliseconds of the last ping's round trip; undefined before the first. */
  readonly latency: number | undefined;
  /** Resolves when open, at once if it is; rejects when closed for good. */
  ready(): Promise<void>;
  on(event: 'state', fn: (state: ConnectionState, info: StateInfo) => void): Off;
  /** Broadcasts, messages to this connection, and whatever else belongs to no subscription. */
  on(event: 'event', fn: (event: ProjectEvent) => void): Off;
  /** Failures that belong to no promise. */
  on(event: 'error', fn: (error: GatewayError) => void): Off;
  /** Every readable message of the server, as it came: for logs. */
  on(event: 'message', fn: (message: { type: string; [field: string]: unknown }) => void): Off;
  /** `*` is the project of the broadcasts. Throws once closed. */
  subscribe<Data = unknown>(project: string, options?: SubscribeOptions): Subscription<Data>;
  /**
   * Resolves once SQS has the message, and sends it again (same id) after a reconnect until then.
   * Rejects with a GatewayError, or with the signal's reason.
   */
  forward(type: string, data?: unknown, options?: ForwardOptions): Promise<Confirmation>;
  /** For good: every promise, subscription and iterator ends. May be called again. */
  close(): void;
}

/**
 * Connects at once, and again until `close()` or until the server refuses (1008).
 * @param url ws: or wss:, or a function that says it anew for every attempt. Current browsers also take
 *   https: and relative addresses.
 */
export function connect(url: string | URL | (() => string | URL | Promise<string | URL>), options?: Options): Connection;
