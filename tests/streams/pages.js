/**
 * The pages of a run, on the real client: `node pages.js TEXTS SEED`. TEXTS is a JSON file of what each attempt at each
 * order writes, `{messageId: [text of attempt 1, …]}`. Commands come as lines of JSON on standard input; what is worth
 * knowing goes out in the same way: `{"fault": …}`, `{"confirmed": messageId}`, `{"finished": …}`.
 */
import { readFileSync } from 'node:fs';
import { createInterface } from 'node:readline';

import { connect } from '../../client/agenticai-ws.js';
import { seeded } from '../../client/test/gateway.js';
import WebSocket from '../../client/node_modules/ws/wrapper.mjs';
import { Watch } from './watch.js';

const [textsPath, seed] = process.argv.slice(2);
const inOrder = seed % 2 === 0; // as the updates of a FIFO queue are
const texts = JSON.parse(readFileSync(textsPath, 'utf8'));
const random = seeded(Number(seed));
const pages = new Map();
let ports = [];
let seen = 0; // how often a page was given a text that had changed
let middle = 0; // how often of them it had come in the text's middle
let connections = 0;

const say = (message) => process.stdout.write(`${JSON.stringify(message)}\n`);
const watchOf = (name, late) => new Watch(name, texts, say, late);
const delay = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** One page: it watches whole projects, and orders texts that it watches each by itself. */
class Page {
  saved = new Map(); // what it keeps over a reload: of each order what its confirmation said, or null before that
  life = 0;

  constructor(number, projects) {
    this.number = number;
    this.projects = projects;
    this.open(false);
  }

  open(reloaded) {
    this.life++;
    const sockets = this.sockets = new Set();
    class Socket extends WebSocket {
      constructor(...args) {
        super(...args);
        connections++;
        sockets.add(this);
        this.on('close', () => sockets.delete(this));
      }
    }
    this.client = connect(() => this.address(), { WebSocket: Socket, minDelay: 50, maxDelay: 1000, pingInterval: 2000 });
    this.client.on('error', (error) => this.failed(error));
    this.watches = this.projects.flatMap((project) => [this.watchProject(project, { since: 0 }), this.watchProject(project)]);
    this.orders = new Map();
    if (reloaded) for (const [messageId, { project, stops, confirmed }] of this.saved) {
      if (confirmed) this.watchOrder(messageId, this.client.follow(confirmed), stops);
      else this.order({ messageId, project, stops });
    }
  }

  /** From the log's beginning, or from now on: then in the middle of texts. */
  watchProject(project, options) {
    const watch = watchOf(`page ${this.number}.${this.life}, ${project} ${options ? 'whole' : 'from then on'}`, !options);
    const sub = this.client.subscribe(project, options);
    sub.on('stream', (stream) => {
      seen++;
      if (stream.from) middle++;
      watch.take(stream);
    });
    sub.on('gap', (gap) => say({ fault: `${watch.name}: a gap: ${JSON.stringify(gap)}` }));
    sub.on('error', (error) => this.failed(error));
    return { project, watch };
  }

  /** A task as a load balancer picks one. */
  async address() {
    while (!ports.length) await delay(50);
    const others = ports.filter((port) => port !== this.port);
    this.port = random.of(this.moving && others.length ? others : ports);
    this.moving = false;
    return `ws://127.0.0.1:${this.port}/ws`;
  }

  failed(error) {
    const excused = error.retryable || error.code === 'closed';
    if (!excused) say({ fault: `page ${this.number}: ${error.code}: ${error.message} ${JSON.stringify(error.detail)}` });
  }

  order({ messageId, project, stops }) {
    this.saved.set(messageId, { project, stops });
    const order = this.client.order('dev', { text: 'please' }, { project, messageId, timeout: 120_000 });
    this.watchOrder(messageId, order, stops);
    order.then((confirmed) => {
      this.saved.set(messageId, { project, stops, confirmed });
      say({ confirmed: messageId });
    }, (error) => this.failed(error));
  }

  watchOrder(messageId, order, stops) {
    const watch = watchOf(`page ${this.number}.${this.life}, its order`);
    this.orders.set(messageId, watch);
    order.on('stream', (stream) => {
      seen++;
      watch.take(stream);
      if (stops && !stream.done) {
        stops = false;
        order.stop({ timeout: 120_000 }).catch((error) => this.failed(error));
      }
    });
    order.on('error', (error) => this.failed(error));
  }

  cut() {
    for (const socket of this.sockets) random.chance(0.5) ? socket.terminate() : socket.close();
  }

  move() {
    this.moving = true;
    this.client.reconnect();
  }

  reload() {
    this.client.close();
    this.open(true);
  }

  /** What is missing of the logs `{project: {messageId: {id: {text, states}}}}`. */
  *missing(logs) {
    for (const { project, watch } of this.watches) if (inOrder || !watch.late) yield* watch.missing(Object.assign({}, ...Object.values(logs[project])));
    for (const [messageId, watch] of this.orders) yield* watch.missing(logs[this.saved.get(messageId).project][messageId] ?? {});
  }
}

const commands = {
  ports: (now) => { ports = now; },
  page: ({ number, projects }) => pages.set(number, new Page(number, projects)),
  order: ({ page, ...order }) => pages.get(page).order(order),
  cut: (number) => pages.get(number).cut(),
  move: (number) => pages.get(number).move(),
  reload: (number) => pages.get(number).reload(),
  /** Whether every page has what the logs have, as soon as it does. */
  async finish({ logs, seconds }) {
    const missing = () => [...pages.values()].flatMap((page) => [...page.missing(logs)]);
    for (const end = performance.now() + seconds * 1000; missing().length && performance.now() < end;) await delay(100);
    for (const what of missing().slice(0, 20)) say({ fault: what });
    for (const { client } of pages.values()) client.close();
    say({ finished: { seen, middle, connections } });
    process.exit();
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  for (const [name, value] of Object.entries(JSON.parse(line))) commands[name](value);
}
process.exit();
