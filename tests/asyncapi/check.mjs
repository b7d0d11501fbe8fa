// Reads AsyncAPI documents from standard input, each a JSON string on a line of its own, and prints
// for each a line of what the parser has to say about it: a JSON array of
// {severity, code, message, path}; severity 0 is an error, 1 a warning.
import { createInterface } from 'node:readline';
import { Parser } from '@asyncapi/parser';

const parser = new Parser();
for await (const line of createInterface({ input: process.stdin })) {
  const { diagnostics } = await parser.parse(JSON.parse(line));
  const found = diagnostics.map(({ severity, code, message, path }) => ({ severity, code, message, path }));
  process.stdout.write(`${JSON.stringify(found)}\n`);
}
