// What the Node peers have in common: events come in as lines, and are broadcast one by one.
import net from "node:net";
import readline from "node:readline";

/** Announce the WebSocket port, then call `broadcast` with each line that comes in. */
export function serveFeed(port, broadcast) {
  const server = net.createServer((socket) => {
    readline.createInterface({ input: socket }).on("line", broadcast);
  });
  server.listen(0, "127.0.0.1", () => {
    console.log(JSON.stringify({ port, feed: server.address().port }));
  });
}
