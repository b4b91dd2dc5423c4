// Names of agents, for pages that know only ids. Archived agents are looked up one by one.
import { signal } from "@preact/signals";
import { type Agent, all, get } from "./api";

export const agentsById = signal<ReadonlyMap<string, Agent>>(new Map());
const asked = new Set<string>();

export async function loadAgents(): Promise<Agent[]> {
  const agents = await all<Agent>("/agents");
  const map = new Map(agentsById.value);
  for (const agent of agents) map.set(agent.id, agent);
  agentsById.value = map;
  return agents;
}

/** Looks up agents that the list does not have. */
export function need(ids: Iterable<string | null | undefined>): void {
  for (const id of ids) {
    if (!id || agentsById.value.has(id) || asked.has(id)) continue;
    asked.add(id);
    get<Agent>(`/agents/${id}`).then(
      (agent) => (agentsById.value = new Map(agentsById.value).set(id, agent)),
      () => asked.delete(id),
    );
  }
}
