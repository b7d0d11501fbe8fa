import { StrictMode, useState } from 'react';
import { createRoot } from 'react-dom/client';

import { connect, GatewayError } from 'agenticai-ws';
import { useConnectionState, useProject } from 'agenticai-ws/react';

/** What the agents of this project send: the type of each event's `data`. */
interface Events {
  project_updated: { status: string; step?: number; of?: number };
}

const query = new URLSearchParams(location.search);
const gateway = connect<Events>(query.get('url') ?? 'ws://127.0.0.1:8080/ws');
const id = query.get('project') ?? 'demo';

function Project() {
  const online = useConnectionState(gateway);
  const { state, events, gap } = useProject<Events['project_updated']>(gateway, id, { keep: 20 });
  const [answer, setAnswer] = useState('');

  async function send(): Promise<void> {
    try {
      const { messageId } = await gateway.forward('dev', { task: 'A login page' }, { project: id });
      setAnswer(`SQS has ${messageId}.`);
    } catch (error) {
      setAnswer(error instanceof GatewayError ? `${error.code}: ${error.message}` : String(error));
    }
  }

  return (
    <main>
      <p>Gateway: <b id="state">{online}</b>, {id}: {state}</p>
      {gap && <p>Events {gap.from + 1} to {gap.to} are lost.</p>}
      <button onClick={() => void send()}>Send to dev</button> <output>{answer}</output>
      <ol id="events">
        {events.map((event, i) => <li key={event.seq ?? `e${i}`}>{event.seq} {event.type} {event.data?.status}</li>)}
      </ol>
    </main>
  );
}

createRoot(document.querySelector('#root')!).render(<StrictMode><Project /></StrictMode>);
