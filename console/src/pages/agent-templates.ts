// What a new agent may start from.
import type { Agent } from "../api";

export type Draft = Partial<Pick<Agent, "name" | "description" | "runtime" | "model" | "system" | "environment_id" | "permissions" | "mcp_servers" | "skills">>;

export interface Template {
  title: string;
  about: string;
  draft: Draft;
}

export const BLANK: Template = { title: "Blank", about: "Fill in everything yourself", draft: {} };

export const TEMPLATES: Template[] = [
  BLANK,
  {
    title: "Careful engineer",
    about: "Writes code; asks before it runs a command",
    draft: {
      name: "Careful engineer",
      description: "Changes code, and asks before it runs a command",
      runtime: "claude",
      system: "You change code in small steps.\nRead what is there before you write. Run the tests after each change.\nEnd with a list of what you changed and why.",
      permissions: { default: "allow", rules: [{ tool: "Bash", evaluation: "ask" }] },
    },
  },
  {
    title: "Reviewer",
    about: "Reads and reports; changes no file",
    draft: {
      name: "Reviewer",
      description: "Reviews a repository and changes nothing",
      runtime: "claude",
      system: "You review code. Change nothing.\nReport what is wrong by file and line, the worst first, each with the reason and a suggestion.\nSay so when you find nothing.",
      permissions: {
        default: "allow",
        rules: [
          { tool: "Edit", evaluation: "deny" },
          { tool: "Write", evaluation: "deny" },
          { tool: "NotebookEdit", evaluation: "deny" },
          { tool: "Bash", evaluation: "ask" },
        ],
      },
    },
  },
  {
    title: "Test fixer",
    about: "Runs the tests and repairs what fails, without asking",
    draft: {
      name: "Test fixer",
      description: "Runs the tests and repairs what fails",
      runtime: "claude",
      system: "Run the tests of the repository. Repair the code, not the tests, until all pass.\nIf a test is wrong, say why and leave it.",
    },
  },
  {
    title: "With an MCP server",
    about: "Calls tools of a server that you name",
    draft: {
      name: "Researcher",
      description: "Answers from the documents of an MCP server",
      runtime: "claude",
      system: "Answer from what the tools of the server return, and name your sources.",
      mcp_servers: [{ name: "docs", type: "url", url: "https://mcp.example.com/mcp", headers: { Authorization: "Bearer YOUR_TOKEN" } }],
    },
  },
  {
    title: "Script",
    about: "Runs prompts as shell scripts, without a model",
    draft: { name: "Script", description: "Runs each prompt as a shell script", runtime: "shell", model: "none" },
  },
];
