/** Ten thousand random runs, with calls inside listeners: see random.js. RUNS and SEED choose others. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const RUNS = Number(process.env.RUNS ?? 10_000);
const SEED = Number(process.env.SEED ?? 1);
const path = (name) => fileURLToPath(new URL(name, import.meta.url));

test(`${RUNS} random runs keep every promise`, async () => {
  const half = SEED + Math.floor(RUNS / 2);
  const parts = await Promise.all([[SEED, half], [half, SEED + RUNS]].map(([from, to]) =>
    promisify(execFile)(process.execPath, [path('random.js'), path('../agenticai-ws.js'), String(from), String(to)])));
  assert.deepEqual(parts.flatMap(({ stdout }) => JSON.parse(stdout)), []);
});
