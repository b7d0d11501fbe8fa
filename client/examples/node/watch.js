/** Prints a project's events, one JSON object a line: `node watch.js ws://127.0.0.1:8080/ws demo [SINCE]`. */
import { connect, GatewayError } from 'agenticai-ws';
import { WebSocket } from 'ws'; // from Node 22 on there is a global one

const [url, project, since] = process.argv.slice(2);
const gateway = connect(url, { WebSocket, maxRetries: 5 });
gateway.on('error', (error) => console.error(error.code, error.message));

const subscription = gateway.subscribe(project, { since: since === undefined ? undefined : Number(since) });
try {
  for await (const event of subscription) {
    console.log(JSON.stringify(event));
    if (event.type === 'done') break;
  }
} catch (error) {
  if (!(error instanceof GatewayError)) throw error;
  console.error(error.code, error.message); // a gap, for one: `error.detail` has {from, to}
  process.exitCode = 1;
}
gateway.close();
