#!/usr/bin/env bash
# Runs Anthropic's SDKs, unmodified, against a stack with the scripted model, and writes the table into docs/managed-agents-api.md.
#   scripts/conformance.sh [ARGS of suite.py, such as --only 16,19]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
. scripts/stack.sh
suite=system-tests/clients/conformance

# shellcheck disable=SC2086
scripts/anthropic.sh $ANTHROPIC_VERSION $ANTHROPIC_OLDER_VERSIONS
# The suite serves MCP there, where sandboxes reach it.
MCP_PORT=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MCP_PORT LOCAL_SPRITES_PRIVATE_HOSTS=127.0.0.1:$MCP_PORT
start_stack
BASE_URL=$(ready api_url) API_KEY=$(ready api_key)
"$bin/aod" admin --data-dir "$data/stack" user create other >/dev/null
OTHER_API_KEY=$("$bin/aod" admin --data-dir "$data/stack" key create other | sed -n 's|^key  *||p')
# More CLIs than two at a time start slowly on two cores: opencode needs a minute and more then.
export BASE_URL API_KEY OTHER_API_KEY PATIENCE=${PATIENCE:-240}

failed=0
".venv/anthropic-$ANTHROPIC_VERSION/bin/python" $suite/suite.py --runtimes claude,codex,gemini,opencode,shell --parallel 3 --json "$data/python.json" "$@" || failed=1
for version in $ANTHROPIC_OLDER_VERSIONS; do
    ".venv/anthropic-$version/bin/python" $suite/suite.py --runtimes claude --parallel 3 --json "$data/python-$version.json" "$@" || failed=1
done
NODE_MODULES_OF=$PWD/.venv/anthropic-js .venv/node/node $suite/suite.mjs --json "$data/js.json" "$@" || failed=1
python3 $suite/table.py docs/managed-agents-api.md "$data"/python.json "$data"/python-*.json "$data/js.json"
exit $failed
