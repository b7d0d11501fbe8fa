/** The package as others get it: packed, unpacked beside their own code, and used. */
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { access, cp, mkdir, mkdtemp, readdir, readFile, rm, symlink, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import vm from 'node:vm';

const client = dirname(dirname(fileURLToPath(import.meta.url)));
const modules = join(client, 'node_modules');
const installed = await access(join(modules, 'vite')).then(() => true, () => false);
const skip = installed ? false : 'not everything is installed: run npm ci in client/';
const run = promisify(execFile);
const node = (cwd, ...args) => run(process.execPath, args, { cwd });

describe('the package', { skip }, () => {
  /** A project that has the packed package among its modules. */
  let project, tarball;

  before(async () => {
    project = await mkdtemp(join(tmpdir(), 'agenticai-ws-'));
    await mkdir(join(project, 'node_modules'));
    const { stdout } = await run('npm', ['pack', '--json', '--offline', '--pack-destination', project], { cwd: client });
    const packed = JSON.parse(stdout);
    tarball = join(project, (Array.isArray(packed) ? packed[0] : Object.values(packed)[0]).filename);
    await run('tar', ['xzf', tarball, '-C', project]);
    await cp(join(project, 'package'), join(project, 'node_modules/agenticai-ws'), { recursive: true });
    for (const name of ['react', 'react-dom', 'scheduler', 'ws', 'vite', 'typescript', '@types', 'csstype', '@ag-ui', 'rxjs']) {
      await symlink(join(modules, name), join(project, 'node_modules', name));
    }
    for (const name of ['page', 'vite', 'node']) await cp(join(client, 'examples', name), join(project, name), { recursive: true });
  });
  after(() => rm(project, { recursive: true, force: true }));

  test('dist/ is what build.js makes', async () => {
    const made = join(project, 'made');
    await node(client, 'build.js', made);
    const names = (await readdir(made)).sort();
    assert.deepEqual(names, (await readdir(join(client, 'dist'))).sort());
    for (const name of names) {
      const [now, committed] = await Promise.all([made, join(client, 'dist')].map((folder) => readFile(join(folder, name), 'utf8')));
      assert.ok(now === committed, `dist/${name} is old: run npm run build`);
    }
  });

  test('is clean for publint and for attw', async () => {
    await node(client, join(modules, 'publint/src/cli.js'), '--strict');
    await node(client, join(modules, '@arethetypeswrong/cli/dist/index.js'), tarball);
  });

  test('can be required, imported and loaded by a script element', async () => {
    const names = 'console.log(Object.keys(m).sort().join())';
    const required = await node(project, '--input-type=commonjs', '--eval', `const m = require('agenticai-ws'); ${names}`);
    const imported = await node(project, '--input-type=module', '--eval', `const m = await import('agenticai-ws'); ${names}`);
    const page = vm.createContext({}); // as a script element has: no module, no exports, no require
    vm.runInContext(await readFile(join(project, 'node_modules/agenticai-ws/dist/agenticai-ws.js'), 'utf8'), page);
    assert.equal(vm.runInContext('Object.keys(AgenticAI).sort().join()', page), 'GatewayError,connect,isPiece');
    assert.deepEqual([required, imported].map(({ stdout }) => stdout.trim()), Array(2).fill('GatewayError,connect,isPiece'));
    const hooks = await node(project, '--input-type=commonjs', '--eval', `const m = require('agenticai-ws/react'); ${names}`);
    assert.equal(hooks.stdout.trim(), 'useConnectionState,useProject');
    for (const load of ["require('agenticai-ws/ag-ui')", "await import('agenticai-ws/ag-ui')"]) {
      const agent = await node(project, `--input-type=${load.startsWith('await') ? 'module' : 'commonjs'}`, '--eval', `const m = ${load}; ${names}`);
      assert.equal(agent.stdout.trim(), 'GatewayAgent');
    }
  });

  test('CommonJS with TypeScript takes its types', async () => {
    const folder = join(project, 'cts');
    await mkdir(folder);
    await writeFile(join(folder, 'use.cts'), "import gateway = require('agenticai-ws');\nconst open: string = gateway.connect('ws://x').state;\nexport = open;\n");
    await node(folder, join(modules, 'typescript/bin/tsc'), '--strict', '--exactOptionalPropertyTypes', '--noEmit',
      '--module', 'node16', '--target', 'es2022', 'use.cts');
  });

  test('the example for Vite compiles strictly and builds', async () => {
    await node(join(project, 'vite'), join(modules, 'typescript/bin/tsc'));
    await node(join(project, 'vite'), join(modules, 'vite/bin/vite.js'), 'build', '--logLevel', 'error');
    const assets = await readdir(join(project, 'vite/dist/assets'));
    assert.ok(assets.some((name) => name.endsWith('.js')));
  });

  test('the example for Node prints what happens, and ends', async () => {
    const { serve } = await import('./server.js');
    const { gateway, url, close } = await serve();
    gateway.publish('demo');
    const child = spawn(process.execPath, ['watch.js', url, 'demo', '0'], { cwd: join(project, 'node'), stdio: ['ignore', 'pipe', 'inherit'] });
    let output = '';
    child.stdout.on('data', (data) => { if (!output) gateway.publish('demo', { type: 'done' }); output += data; });
    const [code] = await once(child, 'close');
    close();
    assert.deepEqual([output.trim().split('\n').map((line) => JSON.parse(line).seq), code], [[1, 2], 0]);
  });
});
