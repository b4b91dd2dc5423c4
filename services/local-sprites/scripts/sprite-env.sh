#!/bin/sh
# Talks to the sandbox server from inside of a Sprite.
api=/.sprite/api.sock
call() {
    exec curl --silent --show-error --unix-socket "$api" "$@"
}
case $1 in
    curl)
        # sprite-env curl [CURL OPTION ...] PATH: the path is the last argument.
        shift
        [ $# -gt 0 ] || { echo "sprite-env: curl [OPTION ...] /v1/..." >&2; exit 2; }
        for path; do :; done
        case $path in /*) ;; *) echo "sprite-env: the last argument is a path, such as /v1/tasks" >&2; exit 2 ;; esac
        n=$#
        for argument; do
            n=$((n - 1))
            shift
            [ $n -eq 0 ] && argument="http://sprite$path"
            set -- "$@" "$argument"
        done
        call "$@"
        ;;
    tasks | services | checkpoints) call "http://sprite/v1/$1" ;;
    *)
        cat <<'USAGE'
sprite-env: talks to the sandbox server from inside of a Sprite
  sprite-env curl [OPTION ...] PATH   any call, for example: sprite-env curl -X PUT -d '{"expire":"5m"}' /v1/tasks/build
  sprite-env tasks                    what holds the Sprite awake
  sprite-env services                 its services
  sprite-env checkpoints              its checkpoints
USAGE
        [ "$1" = --help ] || [ "$1" = -h ] || exit 2
        ;;
esac
