/**
 * An agent of AG-UI over a connection: see ag-ui.d.ts. A run is an order; what answers it becomes AG-UI's events.
 *
 * SPDX-License-Identifier: MIT
 */
import { AbstractAgent } from '@ag-ui/client';
import { Observable } from 'rxjs';

import { isPiece } from './agenticai-ws.js';

const OF_AG_UI = 'ag-ui'; // the type of updates whose data are events of AG-UI as they are
const OURS = new Set(['RUN_STARTED', 'RUN_FINISHED', 'RUN_ERROR']); // said by us, by how the order goes
const ENDS = new Set(['done', 'failed', 'cancelled']);
const LATE_MS = 30000; // after the last answer, for the ends of texts; one of a killed attempt may never have one

/** One run: told what answers the order, it emits AG-UI's events, in an order that AG-UI allows. */
class Run {
  /** Streams that have begun, by their ids: {text, state}; `text` is what the page has of it. */
  texts = new Map();
  /** @type {string | undefined} */ step = undefined;
  /** The order's last answer, while texts that belong to it are still to come. @type {any} */ last = undefined;
  /** @type {ReturnType<typeof setTimeout> | undefined} */ timer = undefined;
  over = false;

  constructor(agent, { threadId, runId, messages }, observer) {
    this.agent = agent;
    this.threadId = threadId;
    this.runId = runId;
    this.observer = observer;
    /** What a page has kept over a reload of texts that go on. */
    this.before = new Map(messages.map(({ id, content }) => [id, content]));
    this.emit({ type: 'RUN_STARTED', threadId, runId });
  }

  emit(event) {
    if (!this.over) this.observer.next(event);
  }

  event(event) {
    const { type, data } = event;
    if (this.last || type === 'stream' || isPiece(event)) return; // texts are told as such
    if (type === OF_AG_UI) {
      if (typeof data?.type === 'string' && !OURS.has(data.type)) this.emit(data);
    } else if (ENDS.has(data?.status)) {
      this.last = event;
      this.finish();
    } else if (type === 'project_updated' && data?.status === 'working') {
      this.endStep();
      this.step = String(data.message ?? data.step ?? status);
      this.emit({ type: 'STEP_STARTED', stepName: this.step, rawEvent: event });
    } else {
      this.emit({ type: 'CUSTOM', name: type, value: data ?? null, rawEvent: event });
    }
  }

  stream({ id, text, state }) {
    if (this.over) return;
    let known = this.texts.get(id);
    if (!known) {
      const kept = this.before.get(id);
      if (state === 'superseded' && kept === undefined) return; // nobody has seen it
      this.texts.set(id, known = { text: typeof kept === 'string' ? kept : '', state: undefined });
      this.emit({ type: 'TEXT_MESSAGE_START', messageId: id, role: 'assistant' });
    }
    if (text.startsWith(known.text)) {
      const delta = text.slice(known.text.length);
      known.text = text;
      if (delta) this.emit({ type: 'TEXT_MESSAGE_CONTENT', messageId: id, delta });
    } else if (state && state !== 'superseded') { // what came early was not what was logged
      known.text = text;
      this.emitMessages();
    }
    if (!state) return;
    known.state = state;
    this.emit({ type: 'TEXT_MESSAGE_END', messageId: id });
    if (state === 'superseded') this.emitMessages();
    this.finish();
  }

  /** All messages as they are now: without texts that another attempt has taken the place of. */
  emitMessages() {
    const messages = this.agent.messages.map((message) => {
      const own = this.texts.get(message.id);
      return own ? { ...message, content: own.text } : message;
    });
    const there = new Set(messages.map(({ id }) => id));
    for (const [id, { text }] of this.texts) if (!there.has(id)) messages.push({ id, role: 'assistant', content: text });
    const left = messages.filter(({ id, role }) => role !== 'activity' && this.texts.get(id)?.state !== 'superseded');
    this.emit({ type: 'MESSAGES_SNAPSHOT', messages: left });
  }

  endStep() {
    if (this.step !== undefined) this.emit({ type: 'STEP_FINISHED', stepName: this.step });
    this.step = undefined;
  }

  /** A standard queue may bring the last answer before the end of a text that was written before it. */
  finish(late = false) {
    const open = [...this.texts].filter(([, { state }]) => !state);
    if (!this.last || this.over) return;
    const { data } = this.last;
    if (data.status === 'done' && open.length && !late) {
      this.timer ??= setTimeout(() => this.finish(true), LATE_MS);
      return;
    }
    if (data.status === 'failed') return this.fail({ message: String(data.message ?? 'The agent has failed.'), code: 'failed' });
    for (const [messageId] of open) this.emit({ type: 'TEXT_MESSAGE_END', messageId });
    this.endStep();
    const { threadId, runId } = this;
    const outcome = data.status === 'done' ? { result: data, outcome: { type: 'success' } } : { outcome: { type: 'cancelled' } };
    this.emit({ type: 'RUN_FINISHED', threadId, runId, ...outcome, rawEvent: this.last });
    this.end();
  }

  fail({ message, code }) {
    this.emit({ type: 'RUN_ERROR', message, code });
    this.end();
  }

  end() {
    if (this.over) return;
    this.over = true;
    clearTimeout(this.timer);
    this.observer.complete();
  }
}

export class GatewayAgent extends AbstractAgent {
  constructor({ gateway, type, project, data = (input) => input, saved, ...config }) {
    super({ ...config, threadId: config.threadId ?? saved?.project ?? project });
    Object.assign(this, { gateway, type, project, data, saved, order: undefined });
  }

  run(input) {
    const { gateway, type, project = input.threadId } = /** @type {any} */ (this);
    this.saved = undefined;
    return this.relay(input, () => gateway.order(type, /** @type {any} */ (this).data(input), { project, messageId: input.runId }));
  }

  /** The run that another page has begun, or this one before it was loaded anew. */
  connect(input) {
    const { gateway, saved } = /** @type {any} */ (this);
    if (!saved) return super.connect(input);
    return this.relay({ ...input, runId: saved.messageId }, () => gateway.follow(saved));
  }

  relay(input, begin) {
    const { gateway } = /** @type {any} */ (this);
    return new Observable((observer) => {
      const run = new Run(this, input, observer);
      let order;
      try {
        order = begin();
      } catch (error) {
        run.fail(/** @type {any} */ (error));
        return undefined;
      }
      this.order = order;
      const fail = (error) => error && run.fail(error);
      const ended = (state, error) => {
        if (state === 'closed') fail(error ?? (gateway.state === 'closed' && { message: 'The connection was closed.', code: 'closed' }));
        else if (state === 'failed' && !error?.retryable) fail(error);
      };
      const offs = [
        order.on('event', (event) => run.event(event)),
        order.on('stream', (stream) => run.stream(stream)),
        order.on('gap', ({ from, to }) => fail({ message: `events ${from + 1} to ${to} are lost`, code: 'gap' })),
        order.on('state', ended),
      ];
      order.then((saved) => { this.saved = saved; }, fail);
      return () => {
        for (const off of offs) off();
        run.end();
        order.close();
        if (this.order === order) this.order = undefined;
      };
    });
  }

  /** Asks the agent to end its work; the run is over when it has: with what it has written, and as cancelled. */
  abortRun() {
    this.order?.stop().catch(() => {}); // the run goes on, and shows it
  }

  clone() {
    const { gateway, type, project, data, saved } = /** @type {any} */ (this);
    return Object.assign(super.clone(), { gateway, type, project, data, saved, order: undefined });
  }
}
