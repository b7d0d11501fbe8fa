// ws: `clients.forEach(client => client.send())`, as in its documentation on broadcasting.
// `--deflate` allows permessage-deflate with the library's defaults, which is off otherwise.
import { createServer } from "node:http";
import WebSocket, { WebSocketServer } from "ws";
import { serveFeed } from "./feed.mjs";

const server = createServer();
const sockets = new WebSocketServer({
  server,
  perMessageDeflate: process.argv.includes("--deflate"),
});
sockets.on("connection", (socket) => socket.on("error", () => {}));

server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
  serveFeed(server.address().port, (line) => {
    sockets.clients.forEach((client) => {
      if (client.readyState === WebSocket.OPEN) client.send(line);
    });
  });
});
