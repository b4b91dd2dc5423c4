#!/bin/bash
# Runs one turn's agent, detached, and spools what it writes. May be called any number of times; the agent starts once.
#   stdout, stderr  the spool        exit     how it ended: `exit N`, `timeout` or `lost`; written last, atomically
#   lock            held while it runs        started  it was started
# @settings@
cd "$(dirname "$0")" || exit 1
if [ "$1" != --detached ]; then
    [ -e exit ] || setsid -f bash ./run-agent.sh --detached </dev/null >/dev/null 2>&1
    exit 0
fi

exec 9>>lock
flock -n 9 || exit 0
[ -e exit ] && exit 0
finish() {
    printf '%s\n' "$1" >exit.draft && mv exit.draft exit
    exit 0
}
# Started, not ended, and nobody holds the lock: the sandbox went down under it.
[ -e started ] && finish lost
spool=$PWD
: >stdout
: >stderr
: >started

set -a
. "$ENV_FILE"
[ -n "$TRACE" ] && TRACEPARENT=$TRACE
set +a
[ "$STDIN" = prompt ] && STDIN=$spool/prompt
cd /workspace 2>/dev/null || cd "$HOME" || finish 'exit 127'
prepare() {
    :
    @prepare@
}
# Where a sandbox tells what its network policy refused.
refused=/.sprite/policy/refused
cat $refused >"$spool/refused-before" 2>/dev/null
prepare </dev/null >/dev/null 2>>"$spool/stderr" 9>&-
CONVERSATION=$(
    @find@
)
if [ -n "$CONVERSATION" ]; then
    set -- @resume@
else
    set -- @begin@
fi
AOD_TURN=$MARK setsid "$@" <"$STDIN" >>"$spool/stdout" 2>>"$spool/stderr" 9>&- &
agent=$!

# What the agent started, wherever it went: the mark is in its environment.
marked() {
    grep -lzxs "AOD_TURN=$MARK" /proc/[0-9]*/environ | cut -d/ -f3
}

# Holds the Sprite awake, and ends the turn when its time is up.
watch() {
    end=$((SECONDS + TIMEOUT))
    while [ $SECONDS -lt $end ]; do
        if [ -S /.sprite/api.sock ]; then
            curl -s -m 5 --unix-socket /.sprite/api.sock -X PUT -d '{"expire":"5m"}' http://sprite/v1/tasks/aod >/dev/null 2>&1
        fi
        left=$((end - SECONDS))
        sleep $((left < 60 ? left : 60))
    done
    : >"$spool/timed-out"
    kill -TERM -- -$agent $(marked) 2>/dev/null
    for ((tenths = 0; tenths < KILL_GRACE * 10; tenths++)); do
        kill -0 -- -$agent 2>/dev/null || [ -n "$(marked)" ] || return 0
        sleep 0.1
    done
    kill -KILL -- -$agent $(marked) 2>/dev/null
}
export -f watch marked
export TIMEOUT KILL_GRACE MARK spool agent
setsid bash -c watch </dev/null >/dev/null 2>&1 9>&- &
watcher=$!

wait $agent
code=$?
cd "$spool" || exit 1
[ ! -s $refused ] || grep -vxFf refused-before $refused | sed 's/^/refused by the network policy: /' >>stderr
if [ -e timed-out ]; then
    # What ignores TERM has its grace, then goes too.
    wait $watcher
    finish timeout
fi
kill -KILL -- -$watcher 2>/dev/null
finish "exit $code"
