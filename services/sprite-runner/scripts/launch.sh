#!/bin/bash
# Becomes the agent, with the session's variables in its environment: none of them may be changed here, so this sets no variables.
prepare() {
    :
    @prepare@
}
prepare </dev/null >/dev/null
# The conversation to go on with.
set -- "$(
    @find@
)" </dev/null
if [ -n "$1" ]; then
    set -- @resume@
else
    set -- @begin@
fi
@options@
exec "$@"
