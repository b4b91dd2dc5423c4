// What the console knows of runtimes that the API does not say.
import type { Agent } from "../api";

/** Kinds of credentials of which a runtime needs one. */
export const PROVIDERS: Record<string, string[]> = {
  claude: ["provider:anthropic", "runtime_token:claude-oauth"],
  codex: ["provider:openai"],
  gemini: ["provider:google"],
  opencode: ["provider:anthropic", "provider:openai", "provider:google"],
};

export const DEFAULT_MODELS: Record<string, string> = {
  claude: "claude-sonnet-4-5",
  codex: "gpt-5-codex",
  gemini: "gemini-2.5-pro",
  opencode: "anthropic/claude-sonnet-4-5",
  shell: "none",
};

/** Runtimes that can ask before they use a tool. */
export const CAN_ASK = new Set(["claude", "codex", "gemini", "opencode"]);

/** Names of an agent's MCP servers that are reached over HTTP without a header: no credential is sent. */
export const withoutCredential = (agent: Agent): string[] =>
  agent.mcp_servers.flatMap((server) => (server.type === "url" && Object.keys(server.headers ?? {}).length === 0 ? [server.name] : []));
