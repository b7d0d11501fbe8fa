/** Compiled, never run: how the declarations are used. A line that should not compile says so. */
import { connect, GatewayError } from 'agenticai-ws';
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
