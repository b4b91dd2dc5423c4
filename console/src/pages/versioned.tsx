// Versions of agents and environments, and what changed between two of them.
import { useState } from "preact/hooks";
import { Age, TextDiff } from "../ui";

export interface Version {
  version: number;
  created_at: string;
}

const LEFT_OUT = new Set(["id", "type", "version", "created_at", "updated_at", "archived_at"]);

function shown(version: Version): string {
  return JSON.stringify(Object.fromEntries(Object.entries(version).filter(([name]) => !LEFT_OUT.has(name))), null, 2).replaceAll("\\n", "\n");
}

/** `versions`: newest first. */
export function Versions({ versions }: { versions: Version[] }) {
  const [chosen, setChosen] = useState<number>();
  const at = versions.findIndex((version) => version.version === (chosen ?? versions[0]?.version));
  const [version, before] = [versions[at], versions[at + 1]];
  return (
    <section aria-label="Versions">
      <h2>Versions</h2>
      <p class="hint">Sessions keep the version that they began with.</p>
      <div class="chips" role="group" aria-label="Version">
        {versions.map((each) => (
          <button type="button" key={each.version} class="chip" aria-pressed={each.version === version?.version} onClick={() => setChosen(each.version)}>
            {each.version} <span class="hint">· <Age time={each.created_at} /></span>
          </button>
        ))}
      </div>
      {version && before && <TextDiff path={`Version ${before.version} to ${version.version}`} before={shown(before)} after={shown(version)} />}
      {version && !before && <pre class="snippet" tabIndex={0} role="region" aria-label={`Version ${version.version}`}>{shown(version)}</pre>}
    </section>
  );
}
