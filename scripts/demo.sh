#!/usr/bin/env bash
# The whole path once: set-up, build, `aod dev --scripted-model`, a real Claude Code session with two turns, stop.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/stack.sh
started=$(date +%s%N)
steps=()

step() { # name, command ...
    local name=$1 begun
    shift
    printf '\n== %s\n' "$name"
    begun=$(date +%s%N)
    "$@"
    steps+=("$(printf '%8.1f s  %s' "$(($(date +%s%N) - begun))e-9" "$name")")
}

start() {
    start_stack
    AOD_API_URL=$(ready api_url) AOD_API_TOKEN=$(ready api_key)
    export AOD_API_URL AOD_API_TOKEN
    echo "ready at $AOD_API_URL"
}

first_turn() {
    "$bin/aod" run 'write a haiku' 2> >(tee "$data/turn" >&2)
    session=$(sed -n 's/^session //p' "$data/turn")
}
second_turn() { "$bin/aod" run --session "$session" 'what was my first message?'; }
build() { scripts/console.sh && cargo build --quiet; }

step 'set-up' scripts/setup.sh
step 'build' build
step 'start the stack' start
step 'first turn: Claude Code runs tools and writes a file in its Sprite' first_turn
step 'second turn: it remembers the first' second_turn
step 'stop' stop_stack

printf '\n'
printf '%s\n' "${steps[@]}"
printf '%8.1f s  in all\n' "$(($(date +%s%N) - started))e-9"
