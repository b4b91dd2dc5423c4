# shellcheck shell=bash
# A stack for a script that sources this file: `start_stack` starts `aod dev --scripted-model` on a directory of its own, and the script's end
# stops it. `ready FIELD` prints a field of its ready file.
bin=${CARGO_TARGET_DIR:-target}/debug
data=$(mktemp -d)
stack=

start_stack() {
    local port
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "$bin/aod" dev --data-dir "$data/stack" --port "$port" --ready-file "$data/ready.json" --scripted-model >"$data/aod-dev.log" 2>&1 &
    stack=$!
    until [ -e "$data/ready.json" ]; do
        kill -0 "$stack" 2>/dev/null || return 1
        sleep 0.05
    done
}

ready() { python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$data/ready.json" "$1"; }

stop_stack() {
    kill -TERM "$stack"
    wait "$stack"
    stack=
}

end() {
    local code=$?
    [ -z "$stack" ] || stop_stack 2>/dev/null || true
    if [ $code != 0 ] && [ -e "$data/aod-dev.log" ]; then
        echo "$(basename "$0"): failed; the end of the stack's log:" >&2
        tail -n 20 "$data/aod-dev.log" >&2
    fi
    rm -rf "$data"
    exit $code
}
trap end EXIT
