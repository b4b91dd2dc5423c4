#!/usr/bin/env bash
# Measures the server at BASE_URL, with the key API_KEY, by benches/peers/peers.py; without BASE_URL a stack with the scripted model.
#   scripts/peers.sh [ARGS of peers.py, such as --only first,readers]
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
scripts/anthropic.sh "$ANTHROPIC_VERSION"
peers=(".venv/anthropic-$ANTHROPIC_VERSION/bin/python" benches/peers/peers.py)
if [ -n "${BASE_URL:-}" ]; then
    exec "${peers[@]}" "$@"
fi
. scripts/stack.sh
start_stack
BASE_URL=$(ready api_url) API_KEY=$(ready api_key)
export BASE_URL API_KEY
runner=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["services"]["sprite-runner"][0]["pid"])' "$data/ready.json")
# What the scripted model understands; the stack starts the runner again.
"${peers[@]}" --say hello --run 'run: {command}' --kill-command "kill -9 $runner" "$@"
