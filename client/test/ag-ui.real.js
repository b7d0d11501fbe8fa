/**
 * Runs of @ag-ui/client over a real gateway with the sample agents: `node ag-ui.real.js URL`. Prints what came of them.
 */
import { EventSchema } from '@ag-ui/core/schemas';
import WebSocket from 'ws';

import { GatewayAgent } from '../ag-ui.js';
import { connect } from '../agenticai-ws.js';

const open = () => connect(process.argv[2], { WebSocket });
const found = { types: [], failures: [] };

/** What a page has of its own, and what it shows. */
function page(config) {
  const gateway = open();
  const agent = new GatewayAgent({ gateway, type: 'dev', project: 'ag-ui', ...config });
  agent.subscribe({
    onEvent: ({ event }) => { found.types.push(EventSchema.parse(event).type); },
    onRunFailed: ({ error }) => { found.failures.push(String(error)); },
  });
  return { gateway, agent };
}

/** Once a text has begun: to be called before its run. */
const begun = (agent) => new Promise((resolve) => {
  agent.subscribe({ onTextMessageContentEvent: ({ textMessageBuffer }) => { if (textMessageBuffer.length > 40) resolve(undefined); } });
});
const ask = (agent) => agent.addMessage({ id: crypto.randomUUID(), role: 'user', content: 'A login page' });
const texts = (agent) => agent.messages.map(({ role, content }) => [role, content]);

const whole = page({});
ask(whole.agent);
found.result = (await whole.agent.runAgent()).result;
found.whole = texts(whole.agent);
found.wholeTypes = found.types.splice(0);
whole.gateway.close();

for (const keeps of [true, false]) {
  const before = page({});
  ask(before.agent);
  const messages = structuredClone(before.agent.messages);
  const half = begun(before.agent);
  const run = before.agent.runAgent();
  await half;
  const kept = JSON.stringify({ saved: before.agent.saved, messages: keeps ? before.agent.messages : messages });
  await before.agent.detachActiveRun();
  await run;
  before.gateway.close();

  const { saved, messages: initialMessages } = JSON.parse(kept);
  const after = page({ saved, initialMessages });
  await after.agent.connectAgent();
  (found.reloaded ??= []).push(texts(after.agent));
  after.gateway.close();
}
found.types = [];

const stopped = page({});
ask(stopped.agent);
stopped.agent.subscribe({ onRunFinishedEvent: ({ outcome }) => { found.outcome = outcome; } });
const half = begun(stopped.agent);
const run = stopped.agent.runAgent();
await half;
stopped.agent.abortRun();
await run;
found.stopped = texts(stopped.agent);
stopped.gateway.close();
console.log(JSON.stringify(found));
