/** Faults planted in the library, one at a time: the random test finds each, or it would not find the next real one. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { after, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';

const RUNS = 1_000;
const path = (name) => fileURLToPath(new URL(name, import.meta.url));
const source = await readFile(path('../agenticai-ws.js'), 'utf8');

const FAULTS = {
  'listeners inside one another': ['if (telling) return; // whoever', 'if (false) return; // whoever'],
  'a queued event after unsubscribe': [
    "const wanted = () => final || reader.state !== 'closed' && reader.turn === turn;", 'const wanted = () => true;'],
  'a reader that is behind the flow counts as served': ['reader.covered = gap || meant || !(at < position || at > seq);', 'reader.covered = true;'],
  'an event that came before is handed over again': ['if (!reader.covered || seq <= reader.at) continue;', 'if (!reader.covered) continue;'],
  'no gap where the log was replaced': ['const gap = at !== undefined && (other || meant', 'const gap = at !== undefined && (meant'],
  'seq does not follow what a loop was given': ['if (position) Object.assign(this, position);', ''],
  'a forward is not sent again on the next connection': ['for (const forward of this.forwards.values()) forward.sent = false;', ''],
  'the server stays subscribed': ["else if (this.mayGo(1)) this.unsubscribe(channel);", 'else this.channels.delete(project);'],
  'a reconnect resumes from now on, not from where it was': ["since = reader.at ?? since;", 'since = undefined;'],
  'a snapshot is not asked for anew after a gap': [
    "  gap(reader, from, to) {\n    reader.wantsSnapshot = reader.snapshot;", '  gap(reader, from, to) {'],
  'what a full loop left out is not read again': ['this.act(() => this.machine.resume(this.reader));', '(() => {})();'],
  'silence is never noticed': ["this.lost(0, 'no answer');", 'this.silentSince = undefined;'],
};

describe('the random test finds', () => {
  let folder;
  after(() => folder && rm(folder, { recursive: true, force: true }));

  for (const [name, [from, to]] of Object.entries(FAULTS)) {
    test(name, async () => {
      assert.equal(source.split(from).length, 2, 'the line is in the library, once');
      folder ??= await mkdtemp(join(tmpdir(), 'planted-'));
      const library = join(folder, `${Object.keys(FAULTS).indexOf(name)}.mjs`);
      await writeFile(library, source.replace(from, () => to));
      const { stdout } = await promisify(execFile)(process.execPath, [path('random.js'), library, '1', String(1 + RUNS)], { timeout: 120_000 });
      assert.notDeepEqual(JSON.parse(stdout), []);
    });
  }
});
