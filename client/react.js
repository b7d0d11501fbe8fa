/**
 * React hooks over a connection: see react.d.ts. They keep what React 19 asks for, StrictMode included, where every
 * effect runs twice: the second subscription goes on where the first one was.
 *
 * SPDX-License-Identifier: MIT
 */
import { useCallback, useEffect, useInsertionEffect, useRef, useState, useSyncExternalStore } from 'react';

const NOTHING = Object.freeze({ state: 'closed', error: undefined, seq: undefined, epoch: undefined, snapshot: undefined, gap: undefined, events: Object.freeze([]) });

/** @type {typeof import('./react.d.ts').useConnectionState} */
export function useConnectionState(gateway) {
  const listen = useCallback((changed) => gateway?.on('state', changed) ?? (() => {}), [gateway]);
  const state = () => gateway?.state ?? 'closed';
  return useSyncExternalStore(listen, state, state);
}

/** @type {typeof import('./react.d.ts').useProject} */
export function useProject(gateway, project, options = {}) {
  const { snapshot = false } = options;
  const latest = useRef(options);
  const place = useRef(/** @type {any} */ (undefined)); // where the last subscription was when it ended
  const [view, setView] = useState(/** @type {any} */ (NOTHING));
  useInsertionEffect(() => {
    latest.current = options;
  });

  useEffect(() => {
    if (!gateway || project === undefined || project === null || gateway.state === 'closed') {
      setView(NOTHING);
      return undefined;
    }
    const resumes = place.current?.project === project && place.current.since !== undefined;
    const { since, epoch } = resumes ? place.current : latest.current;
    const sub = gateway.subscribe(project, { since, epoch, snapshot });
    const show = (change) => setView((before) => ({ ...before, seq: sub.seq, epoch: sub.epoch, ...change(before) }));
    show((before) => ({ ...(resumes ? before : NOTHING), state: sub.state, error: undefined }));
    sub.on('state', (state, error) => show(() => ({ state, error })));
    sub.on('snapshot', (data) => {
      show(() => ({ snapshot: data }));
      latest.current.onSnapshot?.(data);
    });
    sub.on('gap', (gap) => {
      show(() => ({ gap, events: [] }));
      latest.current.onGap?.(gap);
    });
    sub.on('event', (event) => {
      const { keep = 100 } = latest.current;
      show(({ events }) => ({ events: keep > 0 ? [...events, event].slice(-keep) : [] }));
      latest.current.onEvent?.(/** @type {any} */ (event));
    });
    return () => {
      place.current = { project, since: sub.seq, epoch: sub.epoch };
      sub.unsubscribe();
    };
  }, [gateway, project, snapshot]);

  return view;
}
