/** With real sockets: the package `ws` on both ends. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { test } from 'node:test';

const ws = await import('ws').catch(() => undefined);
const skip = ws ? false : 'the package ws is not installed: run npm ci in client/';

test('connects, subscribes, forwards and resumes in Node', { skip }, async (t) => {
  const { connect } = await import('agenticai-ws');
  const server = new ws.WebSocketServer({ port: 0, host: '127.0.0.1', handleProtocols: () => 'agenticai.v1' });
  t.after(() => server.close());
  await once(server, 'listening');
  const requests = [];
  server.on('connection', (socket, request) => {
    const send = (message) => socket.send(JSON.stringify(message));
    send({ type: 'connected', connection_id: 'c' });
    socket.on('message', (text) => {
      const message = JSON.parse(text);
      requests.push([request.headers['sec-websocket-protocol'], message.action, message.since]);
      if (message.action === 'ping') send({ type: 'pong' });
      if (message.action === 'subscribe') {
        const { since } = message;
        send({ type: 'subscription_confirmed', project_id: 'p', seq: since ?? 0, epoch: 'E', ...(since === undefined ? {} : { recovered: true }) });
        send({ type: 'step', project_id: 'p', seq: (since ?? 0) + 1 });
        if (since === undefined) setTimeout(() => socket.terminate(), 20);
      }
      if (message.action === 'forward') send({ type: 'forward_confirmed', message_id: message.message_id });
    });
  });

  const client = connect(`ws://127.0.0.1:${server.address().port}/ws`, {
    WebSocket: ws.WebSocket, getToken: () => 'secret', minDelay: 20,
  });
  t.after(() => client.close());
  const seqs = [];
  for await (const { seq } of client.subscribe('p')) if (seqs.push(seq) === 2) break;
  assert.deepEqual(seqs, [1, 2]);
  await client.ready();
  assert.equal((await client.forward('dev', {}, { messageId: 'm' })).messageId, 'm');
  assert.ok(requests.every(([protocol]) => protocol === `agenticai.v1,bearer.${Buffer.from('secret').toString('base64url')}`));
  assert.deepEqual(requests.filter(([, action]) => action === 'subscribe').map(([, , since]) => since), [undefined, 1]);
});

test('a server that is away is waited for, and closing in the middle of a handshake crashes nothing', { skip }, async () => {
  const { connect } = await import('agenticai-ws');
  const client = connect('ws://127.0.0.1:9/', { WebSocket: ws.WebSocket, minDelay: 1 });
  await new Promise((resolve) => client.on('state', (state) => state === 'waiting' && resolve()));
  await new Promise((resolve) => client.on('state', (state) => state === 'connecting' && resolve()));
  await new Promise(setImmediate);
  client.close();
  assert.equal(client.state, 'closed');
});
