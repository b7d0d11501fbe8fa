/**
 * React hooks over a connection, for React 18 and later. SPDX-License-Identifier: MIT
 *
 * ```tsx
 * const gateway = connect<Events>(url, { getToken }); // once, outside of components
 *
 * function Project({ id }: { id: string }) {
 *   const online = useConnectionState(gateway) === 'open';
 *   const { state, snapshot, events } = useProject(gateway, id, { snapshot: true, onGap: refetch });
 *   return <ul>{events.map((event) => <li key={event.seq}>{event.type}</li>)}</ul>;
 * }
 * ```
 */
import type {
  Connection, ConnectionState, Gap, GatewayError, ProjectEvent, SubscribeOptions, SubscriptionState,
} from './agenticai-ws.js';

/** The connection's state; the component renders again when it changes. */
export function useConnectionState(gateway: Connection<any> | null | undefined): ConnectionState;

export interface ProjectOptions<Data = unknown> extends SubscribeOptions {
  /** How many of the last events `events` holds. Default 100; 0 for none. */
  keep?: number | undefined;
  /** Called with each event, once, in order; the latest one given is called, and need not be the same each time. */
  onEvent?: ((event: ProjectEvent<Data>) => void) | undefined;
  onSnapshot?: ((data: any) => void) | undefined;
  onGap?: ((gap: Gap) => void) | undefined;
}

export interface ProjectView<Data = unknown> {
  /** `closed` too while there is no connection or no project. */
  readonly state: SubscriptionState;
  readonly error: GatewayError | undefined;
  readonly seq: number | undefined;
  readonly epoch: string | undefined;
  /** The last snapshot; undefined before the first. */
  readonly snapshot: any;
  /** The last gap: what was lost. `events` begins anew with it. */
  readonly gap: Gap | undefined;
  readonly events: readonly ProjectEvent<Data>[];
}

/**
 * Subscribes for as long as the component is there, and renders it again with what comes. `since` and `epoch` count
 * when it begins. Mounted again (as in StrictMode), or given another connection, it goes on where it was.
 */
export function useProject<Data = unknown>(
  gateway: Connection<any> | null | undefined,
  project: string | null | undefined,
  options?: ProjectOptions<Data>,
): ProjectView<Data>;
