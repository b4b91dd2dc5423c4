#!/usr/bin/env bash
# Installs agent CLIs from npm, each in a folder of its own. Says nothing when they are there.
#   scripts/agents.sh DIRECTORY AGENT ...   agents: claude, codex, gemini, opencode; or none
set -euo pipefail
. "$(dirname "$0")/versions.env"
agents=$1
shift

agent() { # name, npm package, version, path of the executable in the package
    local dir=$agents/$1-$3
    if [ ! -e "$dir/done" ]; then
        echo "setup: installing $2 $3" >&2
        rm -rf "$dir"
        mkdir -p "$dir"
        npm install --prefix "$dir" --no-fund --no-audit --loglevel=error "$2@$3" >/dev/null 2>"$dir/npm.log" || { cat "$dir/npm.log" >&2; exit 1; }
        touch "$dir/done"
    fi
    mkdir -p "$agents/bin"
    [ "$(readlink "$agents/bin/$1" 2>/dev/null)" = "../$1-$3/node_modules/$4" ] || ln -sfn "../$1-$3/node_modules/$4" "$agents/bin/$1"
    [ -x "$agents/bin/$1" ] || { echo "setup: $2 $3 has no executable $4" >&2; exit 1; }
}
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=x64 ;; esac
for name in "$@"; do
    case $name in
        none) ;;
        claude) agent claude @anthropic-ai/claude-code "$CLAUDE_CODE_VERSION" "@anthropic-ai/claude-code-linux-$arch/claude" ;;
        codex) agent codex @openai/codex "$CODEX_VERSION" .bin/codex ;;
        gemini) agent gemini @google/gemini-cli "$GEMINI_CLI_VERSION" .bin/gemini ;;
        opencode) agent opencode opencode-ai "$OPENCODE_VERSION" .bin/opencode ;;
        *) echo "setup: unknown agent $name" >&2; exit 2 ;;
    esac
done
