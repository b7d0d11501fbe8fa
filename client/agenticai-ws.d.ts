/**
 * Client of the AgenticAI WebSocket gateway: one ES module without dependencies, for browsers and Node.
 * SPDX-License-Identifier: MIT
 *
 * It connects again by itself and resumes every subscription after the last event it saw: a listener gets
 * each project event once, in order, or a `gap` that says it must fetch its state anew.
 *
 * A listener may call anything, `close()` too. Listeners are called one after the other, never inside one another;
 * what they call takes effect at once: after `unsubscribe()` or `close()` no event comes any more.
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
 * after a reconnect, with the next ping where the refusal was `retryable`, and where there were too many
 * subscriptions once another one has ended). `closed`: given up, for good.
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
 * | `gave_up` | `maxRetries` attempts in a row have failed |
 * | `unauthenticated` | the token was refused again and again: ask the user; it is tried again all the same |
 * | `gap` | a loop over events missed those of `detail`, a {@link Gap}: fetch the state anew, and loop again |
 * | `queue_full` | `maxPending` messages are unconfirmed already; nothing was sent |
 * | `duplicate_id` | a message with this id is unconfirmed already; nothing was sent |
 * | `timeout` | not confirmed in time: the agent may still get the message; repeat it with the same id |
 * | `too_large` | the message has more bytes than the gateway takes |
 * | `overflow` | a loop read too slowly for ephemeral events, which nobody keeps; loop again |
 */
export class GatewayError extends Error {
  constructor(code: string, retryable?: boolean, message?: string, detail?: unknown);
  readonly name: 'GatewayError';
  readonly code: string;
  /** Whether the same call may succeed later. */
  readonly retryable: boolean;
  /** The server's whole message, or what was thrown or unreadable. */
  readonly detail?: any;
}

export type Token = string | null | undefined;

export interface Options {
  /**
   * Asked for the bearer token before every attempt; may be slow (15 s with the handshake) and may reject: the
   * attempt is then repeated like any other. `fresh` says that the last token may have been refused: do not
   * answer from a cache. The token travels as WebSocket subprotocol, never in the address. Without one (null,
   * undefined, empty) the attempt is made without.
   */
  getToken?: ((request: { fresh: boolean }) => Token | Promise<Token>) | undefined;
  /** Milliseconds. The n-th attempt waits random() * min(maxDelay, minDelay * 2^n). Default 500. */
  minDelay?: number | undefined;
  /** Milliseconds, default 20000. The server's own wish (`reconnect`, up to 2 minutes) may be longer. */
  maxDelay?: number | undefined;
  /** Attempts in a row that may fail after the first before it is `closed` with `gave_up`. Default: no bound. */
  maxRetries?: number | undefined;
  /** Milliseconds between pings, which a page must send itself to notice a dead socket. Default 25000. */
  pingInterval?: number | undefined;
  /** Bound on unconfirmed messages, those written while offline included. Default 100. */
  maxPending?: number | undefined;
  /** Bound on events that wait in one async iterator; what does not fit is read again from the log. Default 1000. */
  maxBuffer?: number | undefined;
  /** For Node 20: `WebSocket` of the package ws. Default: the global one. */
  WebSocket?: (new (url: string, protocols: string[]) => any) | undefined;
  /** In [0, 1). */
  random?: (() => number) | undefined;
  /** `now` in milliseconds, monotonic. The functions are called without `this`. */
  clock?: {
    now(): number;
    setTimeout(fn: () => void, ms: number): any;
    clearTimeout(timer: any): void;
  } | undefined;
}

export interface SubscribeOptions {
  /** The last `seq` seen: what came later is delivered first. Without it, only what happens from now on. */
  since?: number | undefined;
  /** The `epoch` that goes with `since`; a log that was replaced meanwhile is then recognised. */
  epoch?: string | undefined;
  /** Ask for the project's state too, now and after every reconnect or gap. */
  snapshot?: boolean | undefined;
}

export interface HistoryOptions {
  /** The events after this `seq`, the earliest first. Without it, the last ones. */
  since?: number | undefined;
  /** The `epoch` that goes with `since`. */
  epoch?: string | undefined;
  /** How many at most. Default 100. */
  limit?: number | undefined;
}

export interface ForwardOptions {
  project?: string | undefined;
  /** Idempotency key; default: random. */
  messageId?: string | undefined;
  /** Milliseconds in all, reconnects included, or Infinity; default 30000. */
  timeout?: number | undefined;
  /** Stops the waiting; what was sent already may still reach the agent. */
  signal?: AbortSignal | undefined;
}

export interface Confirmation {
  messageId: string;
  sqsMessageId?: string;
}

/** Names of a subscription's own events: an agent's type of such a name reaches listeners of `event` only. */
export type OwnEvent = 'event' | 'gap' | 'snapshot' | 'state' | 'stream' | 'error';

/**
 * One subscriber of one project. Several of the same project share what goes over the wire, each with a
 * position of its own.
 *
 * Looping over it (`for await`) starts at `seq` and ends with `unsubscribe()` or `close()`. It throws a GatewayError
 * for a `gap`, with `detail` `{from, to}`, for a refusal, and for ephemeral events that it read too slowly. The
 * last loop to end unsubscribes, unless the subscription has listeners.
 */
export interface Subscription<Data = unknown, Events extends object = Record<string, any>>
  extends AsyncIterable<ProjectEvent<Data>> {
  readonly project: string;
  readonly state: SubscriptionState;
  /**
   * Last event handed over, to the listeners or, in a loop, to its body; keep it with `epoch` to resume in another
   * page.
   */
  readonly seq: number | undefined;
  readonly epoch: string | undefined;
  on(event: 'event', fn: (event: ProjectEvent<Data>) => void): Off;
  on(event: 'gap', fn: (gap: Gap) => void): Off;
  /**
   * A text has begun, has grown or has ended; from the first such listener on. A page that comes in its middle (without
   * `since`, or with one after its beginning) has it from the first logged piece that it sees: see {@link Stream.from}.
   * After a `gap` the texts under way go on in the same way, as other objects of the same ids. With `since: 0`, and in a
   * log that was empty then, every text is whole: a piece that comes before its turn waits. In the first 30 s a text may
   * begin as late as with its first logged piece.
   */
  on(event: 'stream', fn: (stream: Stream) => void): Off;
  /** A piece of a text that is none, or contradicts what is logged: it was left out. `detail` is the event. */
  on(event: 'error', fn: (error: GatewayError) => void): Off;
  /** Null where the project has no state. Only with the option `snapshot`. */
  on(event: 'snapshot', fn: (data: any) => void): Off;
  /** `error` says why it `failed`, or was closed without the page's doing. */
  on(event: 'state', fn: (state: SubscriptionState, error?: GatewayError) => void): Off;
  /** Events of one type, the agents' word for it. */
  on<Type extends Exclude<keyof Events & string, OwnEvent>>(
    type: Type,
    fn: (event: ProjectEvent<Events[Type]> & { type: Type }) => void,
  ): Off;
  /** As {@link Connection.history}, of this project. */
  history(options?: HistoryOptions): Promise<ProjectEvent<Data>[]>;
  unsubscribe(): void;
}

/**
 * A text that an agent writes, such as a model's: the pieces of one `stream`, in events of any type. What is in it once
 * never changes, but for what came early; it has no holes, and nothing twice.
 */
export interface Stream {
  readonly id: string;
  /** Of the event that it began with: `stream`, or the agent's own word. */
  readonly type: string;
  /**
   * Where in the agent's text `text` begins, in UTF-16 code units: 0, or more where the page has come in its middle.
   * It does not change. With `since` at the last event that another page was given, it is the length of what is logged
   * of the text in that page. On a standard queue, a text may stand still where its pieces change places just then.
   */
  readonly from: number;
  /** The `message_id` of the order that it answers. */
  readonly messageId: string | undefined;
  readonly text: string;
  readonly done: boolean;
  /**
   * How it ended: `done`, `cancelled`, `failed`, or `superseded` where the agent has begun anew, with another stream.
   */
  readonly state: 'done' | 'cancelled' | 'failed' | 'superseded' | undefined;
}

/** Whether an event is a piece of a {@link Stream}. */
export function isPiece(event: { data?: any }): boolean;

/** What `order()` needs to go on in another page. */
export interface SavedOrder {
  messageId: string;
  project?: string | undefined;
  /** Where in the project's log the answers begin. */
  seq?: number | undefined;
  epoch?: string | undefined;
}

/**
 * An order and what answers it. `await` it for the confirmation. Loop over it for the events that answer it: each
 * loop begins with the first one, and ends after the one whose `data.status` is `done`, `failed` or `cancelled`.
 * A loop throws as one over a subscription does, and what the order was refused with.
 *
 * Without a project, answers come to this connection alone and only once: loop at once.
 */
export interface Order<Data = unknown> extends AsyncIterable<ProjectEvent<Data>>, PromiseLike<Confirmation & SavedOrder> {
  readonly messageId: string;
  readonly project: string | undefined;
  readonly seq: number | undefined;
  readonly epoch: string | undefined;
  on(event: 'event', fn: (event: ProjectEvent<Data>) => void): Off;
  /** Its texts, whole unless there was a `gap`. Listen at once: one that has ended is not told again. */
  on(event: 'stream', fn: (stream: Stream) => void): Off;
  on(event: 'error', fn: (error: GatewayError) => void): Off;
  /** Of its project's log: some of its answers may be lost. */
  on(event: 'gap', fn: (gap: Gap) => void): Off;
  /** Of its subscription to the project. */
  on(event: 'state', fn: (state: SubscriptionState, error?: GatewayError) => void): Off;
  /** As `Connection.stop`, of this order. */
  stop(options?: { timeout?: number; signal?: AbortSignal }): Promise<{ messageId: string }>;
  /** Ends its listeners and loops; the agent goes on. Call it once nobody wants its answers any more. */
  close(): void;
}

export interface Connection<Events extends object = Record<string, any>> {
  readonly state: ConnectionState;
  /** Milliseconds of the last ping's round trip; undefined before the first. */
  readonly latency: number | undefined;
  /** The gateway is there and does not read at present: what is sent waits until it does. */
  readonly busy: boolean;
  /** Resolves when open, at once if it is; rejects when closed for good. */
  ready(): Promise<void>;
  on(event: 'state', fn: (state: ConnectionState, info: StateInfo) => void): Off;
  /** Broadcasts, messages to this connection, and whatever else belongs to no subscription. */
  on(event: 'event', fn: (event: ProjectEvent) => void): Off;
  /**
   * Texts of these events, as {@link Subscription.on} has those of a project. Nothing comes again after a reconnect:
   * what goes on then is another object with a later `from`.
   */
  on(event: 'stream', fn: (stream: Stream) => void): Off;
  /** Failures that belong to no promise; pieces of a text that are none. */
  on(event: 'error', fn: (error: GatewayError) => void): Off;
  /** Every readable message of the server, as it came: for logs. */
  on(event: 'message', fn: (message: { type: string; [field: string]: unknown }) => void): Off;
  on(event: 'busy', fn: (busy: boolean) => void): Off;
  /** `*` is the project of the broadcasts. Throws once closed. */
  subscribe<Data = unknown>(project: string, options?: SubscribeOptions): Subscription<Data, Events>;
  /**
   * Resolves once SQS has the message, and sends it again (same id) after a reconnect until then.
   * Rejects with a GatewayError, or with the signal's reason.
   */
  forward(type: string, data?: unknown, options?: ForwardOptions): Promise<Confirmation>;
  /**
   * Asks the agents to end their work on a forward of this id, also one that they have not begun. Resolves once the
   * gateway has written that down; whoever watches the project gets an event `stop_requested` with `in_reply_to`.
   * An order with a project has to be stopped with the same `project`. It is sent again like a forward.
   */
  stop(messageId: string, options?: Omit<ForwardOptions, 'messageId'>): Promise<{ messageId: string }>;
  /**
   * Events of a project's log as it is now, in order, over a connection of its own. Rejects with code `gap` where the
   * log does not reach back to `since`; without `since` there are fewer then.
   */
  history<Data = unknown>(project: string, options?: HistoryOptions): Promise<ProjectEvent<Data>[]>;
  /**
   * Forwards, and gathers the answers. Keep what it resolves to, and `follow` it after a reload.
   */
  order<Data = unknown>(type: string, data?: unknown, options?: ForwardOptions): Order<Data>;
  /** The answers to an order that was sent before, from their beginning. */
  follow<Data = unknown>(saved: SavedOrder): Order<Data>;
  /** Gives up the connection or the waiting, and makes an attempt at once. Throws once closed. */
  reconnect(): void;
  /** For good: every promise, subscription and iterator ends. May be called again. */
  close(): void;
}

/**
 * Connects at once, and again until `close()` or until the server refuses (1008).
 *
 * The types of a project's events may be given: `connect<{ project_updated: { step: number } }>(url)`.
 * @param url ws: or wss:, or a function that says it anew for every attempt. Current browsers also take
 *   https: and relative addresses.
 */
export function connect<Events extends object = Record<string, any>>(
  url: string | URL | (() => string | URL | Promise<string | URL>),
  options?: Options,
): Connection<Events>;
