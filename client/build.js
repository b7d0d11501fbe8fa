/**
 * Makes dist/: one file for `<script src>` and for `require()` (UMD, minified), for `require()` the React hooks and the
 * agent of AG-UI, and their types. `node build.js DIRECTORY` makes it elsewhere, to compare.
 * SPDX-License-Identifier: MIT
 */
import { copyFile, mkdir, readFile, writeFile } from 'node:fs/promises';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';

import { build } from 'vite';

const here = dirname(fileURLToPath(import.meta.url));
const dist = resolve(process.argv[2] ?? join(here, 'dist'));
const { version } = JSON.parse(await readFile(join(here, 'package.json'), 'utf8'));

async function bundle(name, format, external = []) {
  await build({
    configFile: false,
    root: here,
    logLevel: 'warn',
    build: {
      outDir: dist,
      emptyOutDir: false,
      target: 'es2022',
      minify: 'oxc',
      lib: { entry: join(here, `${name}.js`), formats: [format], name: 'AgenticAI', fileName: () => `${name}.js` },
      rolldownOptions: { external, output: { exports: 'named' } },
    },
  });
  const file = join(dist, `${name}.js`);
  await writeFile(file, `/*! agenticai-ws ${version} | MIT | made by build.js of ${name}.js */\n${await readFile(file, 'utf8')}`);
  await copyFile(join(here, `${name}.d.ts`), join(dist, `${name}.d.ts`));
}

await mkdir(dist, { recursive: true });
await bundle('agenticai-ws', 'umd');
await bundle('react', 'cjs', ['react']);
await bundle('ag-ui', 'cjs', ['@ag-ui/client', 'rxjs']);
await writeFile(join(dist, 'package.json'), '{ "type": "commonjs" }\n');
