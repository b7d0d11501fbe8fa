// socket.io: `io.to(room).emit()`, WebSocket transport only.
import { createServer } from "node:http";
import { Server } from "socket.io";
import { serveFeed } from "./feed.mjs";

const server = createServer();
const io = new Server(server, {
  transports: ["websocket"],
  perMessageDeflate: process.argv.includes("--deflate"),
});
io.on("connection", (socket) => socket.join("bench"));

server.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
  serveFeed(server.address().port, (line) => io.to("bench").emit("event", JSON.parse(line)));
});
