#!/usr/bin/env bash
# The whole path once: set-up, build, `aod dev --scripted-model`, a real Claude Code session with two turns, stop.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${CARGO_TARGET_DIR:-target}/debug
data=$(mktemp -d)
started=$(date +%s%N)
steps=()
stack=
end() {
    local code=$?
    if [ -n "$stack" ]; then
        kill -TERM "$stack" 2>/dev/null || true
        wait "$stack" 2>/dev/null || true
    fi
    [ $code = 0 ] || { echo "demo: failed; the stack's last words:" >&2; tail -n 20 "$data/aod-dev.log" >&2 || true; }
    rm -rf "$data"
    exit $code
}
trap end EXIT

step() { # name, command ...
    local name=$1 begun
    shift
    printf '\n== %s\n' "$name"
    begun=$(date +%s%N)
    "$@"
    steps+=("$(printf '%8.1f s  %s' "$(($(date +%s%N) - begun))e-9" "$name")")
}

start_stack() {
    local port
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$bin/aod" dev --data-dir "$data/stack" --port "$port" --ready-file "$data/ready.json" --scripted-model >"$data/aod-dev.log" 2>&1 &
    stack=$!
    until [ -e "$data/ready.json" ]; do
        kill -0 "$stack" 2>/dev/null || return 1
        sleep 0.05
    done
    AOD_API_URL=$(ready api_url) AOD_API_TOKEN=$(ready api_key)
    export AOD_API_URL AOD_API_TOKEN
    echo "ready at $AOD_API_URL"
}
ready() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$data/ready.json" "$1"; }

first_turn() {
    "$bin/aod" run 'write a haiku' 2> >(tee "$data/turn" >&2)
    session=$(sed -n 's/^session //p' "$data/turn")
}
second_turn() { "$bin/aod" run --session "$session" 'what was my first message?'; }
build() { scripts/console.sh && cargo build --quiet; }
stop_stack() {
    kill -TERM "$stack"
    wait "$stack"
    stack=
}

step 'set-up' scripts/setup.sh
step 'build' build
step 'start the stack' start_stack
step 'first turn: Claude Code runs tools and writes a file in its Sprite' first_turn
step 'second turn: it remembers the first' second_turn
step 'stop' stop_stack

printf '\n'
printf '%s\n' "${steps[@]}"
printf '%8.1f s  in all\n' "$(($(date +%s%N) - started))e-9"
