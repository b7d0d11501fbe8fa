/**
 * The fake gateway behind a real socket. `node test/server.js` prints its port, and then does what lines of JSON on
 * standard input say: {"publish": PROJECT, ...}, {"expire": PROJECT, "upTo": SEQ}.
 */
import { once } from 'node:events';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';

import { WebSocketServer } from 'ws';

import { FakeGateway } from './gateway.js';

export async function serve(options = {}) {
  const clock = { now: () => performance.now(), setTimeout, clearTimeout };
  const gateway = new FakeGateway({ clock, ...options });
  const server = new WebSocketServer({ port: 0, host: '127.0.0.1', handleProtocols: (offered) => (offered.has('agenticai.v1') ? 'agenticai.v1' : false) });
  await once(server, 'listening');
  server.on('connection', (socket, { url }) => {
    const connection = gateway.accept({ send: (text) => socket.send(text), close: (code, reason) => socket.close(code, reason) }, url);
    socket.on('message', (data) => connection.open && connection.receive(String(data)));
    socket.on('close', () => connection.gone());
  });
  return {
    gateway,
    url: `ws://127.0.0.1:${server.address().port}/ws`,
    close() {
      for (const socket of server.clients) socket.terminate();
      server.close();
    },
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { gateway, url } = await serve(JSON.parse(process.argv[2] ?? '{}'));
  console.log(url);
  for await (const line of createInterface({ input: process.stdin })) {
    const { publish, expire, upTo, ...more } = JSON.parse(line);
    if (publish) gateway.publish(publish, more);
    if (expire) gateway.expire(expire, upTo);
    console.log('{}');
  }
  process.exit();
}
