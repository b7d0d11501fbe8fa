/** Compiled, never run: how the declarations are used. A line that should not compile says so. */
import { connect, GatewayError } from 'agenticai-ws';
import { GatewayAgent } from 'agenticai-ws/ag-ui';
import { useConnectionState, useProject } from 'agenticai-ws/react';
import type { ProjectView } from 'agenticai-ws/react';
import type { Connection, Off, ProjectEvent, Subscription } from 'agenticai-ws';

const gateway: Connection = connect(() => 'wss://example.com/ws', {
  getToken: async ({ fresh }) => (fresh ? 'new' : 'cached'),
  minDelay: 500,
  maxDelay: 20_000,
  WebSocket,
  random: Math.random,
  clock: { now: Date.now, setTimeout, clearTimeout },
});

const off: Off = gateway.on('state', (state, { code, delay }) => {
  const known: 'connecting' | 'open' | 'waiting' | 'closed' = state;
  console.log(known, code?.toFixed(), delay?.toFixed());
});
off();
gateway.on('error', (error) => console.log(error.code, error.retryable, error.detail));
// @ts-expect-error: there is no such event
gateway.on('closed', () => {});
// @ts-expect-error: the state is not for the page to set
gateway.state = 'open';

const project: Subscription<{ step: number }> = gateway.subscribe('proj_123', { since: 41, epoch: 'e', snapshot: true });
project.on('event', ({ data, seq }) => console.log(data?.step.toFixed(), seq));
project.on('gap', ({ from, to }) => console.log(to - from));
// @ts-expect-error: since is a number
gateway.subscribe('proj_123', { since: '41' });

// What was kept goes in as it is, also where it is still undefined; a page may have no token.
gateway.subscribe('proj_123', { since: project.seq, epoch: project.epoch });
connect('wss://example.com/ws', { getToken: () => null, maxRetries: 3 }).reconnect();
connect('wss://example.com/ws', { getToken: undefined });

interface Events {
  project_updated: { step: number };
  state: { never: 'heard by its name' };
}
const typed = connect<Events>('wss://example.com/ws').subscribe('proj_123');
typed.on('project_updated', ({ type, data, seq }) => {
  const word: 'project_updated' = type;
  console.log(word, data?.step.toFixed(), seq);
});
// @ts-expect-error: step is a number
typed.on('project_updated', ({ data }) => data?.step.trim());
// @ts-expect-error: no agent sends this
typed.on('project_update', () => {});
typed.on('state', (state, error) => console.log(state === 'live', error?.code)); // the subscription's own
project.on('whatever_an_agent_says', ({ data }) => console.log(data));
gateway.on('busy', (busy) => console.log(busy === gateway.busy));

const view: ProjectView<{ step: number }> = useProject<{ step: number }>(gateway, 'proj_123', {
  snapshot: true, keep: 10, onEvent: ({ data }) => console.log(data?.step), onGap: ({ from, to }) => console.log(to - from),
});
console.log(useConnectionState(null) === 'open', view.events[0]?.data?.step, view.state);

export async function use(signal: AbortSignal): Promise<string> {
  await gateway.ready();
  try {
    const { messageId } = await gateway.forward('dev', { any: ['thing'] }, { project: 'proj_123', timeout: 1000, signal });
    for await (const event of project) {
      const typed: ProjectEvent<{ step: number }> = event;
      if (typed.type === messageId) break;
    }
    return messageId;
  } catch (error) {
    if (error instanceof GatewayError && error.retryable) return error.code;
    throw error;
  }
}

// Orders and texts that grow.
async function orders(gateway: import('../agenticai-ws.js').Connection) {
  const order = gateway.order<{ status: string }>('dev', { task: 't' }, { project: 'p' });
  order.on('stream', (stream) => { stream.text.toUpperCase(); stream.state === 'superseded'; });
  const saved: import('../agenticai-ws.js').SavedOrder = await order;
  for await (const event of gateway.follow<{ status: string }>(saved)) event.data?.status.trim();
  gateway.subscribe('p').on('stream', ({ done }) => done === true);
  gateway.on('stream', ({ from, type }) => from.toFixed() + type.toUpperCase());
  // @ts-expect-error a text cannot be written by a page
  gateway.subscribe('p').on('stream', (stream) => { stream.text = ''; });
  await order.stop();
}
void orders;

// A frontend on @ag-ui/client.
async function agents(gateway: import('../agenticai-ws.js').Connection) {
  const agent: import('@ag-ui/client').AbstractAgent = new GatewayAgent({ gateway, type: 'dev', project: 'p', data: ({ messages }) => messages.at(-1) });
  await agent.runAgent();
  const { saved } = agent as GatewayAgent;
  await new GatewayAgent({ gateway, type: 'dev', saved, initialMessages: agent.messages }).connectAgent();
  // @ts-expect-error an order goes to one of the agents
  new GatewayAgent({ gateway });
}
void agents;
