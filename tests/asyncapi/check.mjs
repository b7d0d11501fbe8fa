// Reads an AsyncAPI document from standard input and prints what the parser has to say about it:
// a JSON array of {severity, code, message, path}; severity 0 is an error, 1 a warning.
import { readFileSync } from 'node:fs';
import { Parser } from '@asyncapi/parser';

const { diagnostics } = await new Parser().parse(readFileSync(0, 'utf8'));
const found = diagnostics.map(({ severity, code, message, path }) => ({ severity, code, message, path }));
process.stdout.write(`${JSON.stringify(found)}\n`);
