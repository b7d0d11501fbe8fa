/**
 * An agent for frontends that are built on @ag-ui/client: its runs are orders over the gateway.
 * SPDX-License-Identifier: MIT
 *
 * ```ts
 * const agent = new GatewayAgent({ gateway: connect(url, { getToken }), type: 'dev', project: 'proj_123' });
 * agent.addMessage({ id: crypto.randomUUID(), role: 'user', content: 'A login page' });
 * await agent.runAgent();                                       // agent.messages has the answer, and grows with it
 * ```
 *
 * | what answers the order | what the frontend gets |
 * |---|---|
 * | a text that grows | `TEXT_MESSAGE_START`, `TEXT_MESSAGE_CONTENT`, `TEXT_MESSAGE_END`; the message's id is the stream's |
 * | another attempt at it | `MESSAGES_SNAPSHOT` without the earlier text, and the new one |
 * | `project_updated` with the status `working` | `STEP_FINISHED` of the step before, `STEP_STARTED`, by its `message` |
 * | the status `done`, in an answer of any type | `RUN_FINISHED` with the data as its result, once the texts have ended; after 30 s in any case |
 * | … `cancelled` | `RUN_FINISHED`, cancelled |
 * | … `failed`; a refusal, a timeout, a gap, `close()` | `RUN_ERROR` with its code |
 * | an update of the type `ag-ui` | its data, which are an event of AG-UI: state, tool calls, reasoning |
 * | any other | `CUSTOM` by its type |
 */
import { AbstractAgent } from '@ag-ui/client';
import type { AgentConfig, BaseEvent, RunAgentInput } from '@ag-ui/client';
import type { Observable } from 'rxjs';

import type { Connection, Order, SavedOrder } from './agenticai-ws.js';

export interface GatewayAgentConfig extends AgentConfig {
  /** One for all agents of a page. */
  gateway: Connection<any>;
  /** The word that chooses the agent's queue, such as `dev`. */
  type: string;
  /** Default: the thread's id. It is the default of `threadId`, too. */
  project?: string | undefined;
  /**
   * What the agent gets as the order's `data`. Default: the whole input of the run, which for a long thread may be
   * more than the gateway takes.
   */
  data?: ((input: RunAgentInput) => unknown) | undefined;
  /**
   * `saved` of an agent in an earlier page: `connectAgent()` goes on with its run, from its beginning. Texts go on where
   * `initialMessages` have them; tool calls of the run come anew, so leave out messages that have them already.
   */
  saved?: SavedOrder | undefined;
}

export class GatewayAgent extends AbstractAgent {
  constructor(config: GatewayAgentConfig);
  /** Of the latest run, from its confirmation on: keep it over a reload, as JSON. */
  saved: SavedOrder | undefined;
  /** Of the run under way. */
  readonly order: Order | undefined;
  /** An order under the run's id. Who unsubscribes leaves it; the agent goes on. */
  run(input: RunAgentInput): Observable<BaseEvent>;
  /** The run of `saved` from its beginning, with a text where `messages` have the first part of it already. */
  protected connect(input: RunAgentInput): Observable<BaseEvent>;
  /** Asks the agent to end its work. The run ends, as cancelled, when the agent has. */
  abortRun(): void;
  clone(): GatewayAgent;
}
