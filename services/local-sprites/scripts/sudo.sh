#!/bin/bash
# sudo of a local Sprite. Its user owns all that it sees, and is root in name only, in a user namespace of the command's own.
usage() {
    echo "sudo: this sandbox's sudo runs a command as root: sudo [-E] [-H] [-n] [-u root] [NAME=value ...] COMMAND ..." >&2
    exit 1
}
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        -u | --user) [ "$2" = root ] || usage; shift 2 ;;
        -v | --validate | -k) exit 0 ;;
        -[EHnSib]* | --preserve-env* | --non-interactive | --set-home) shift ;;
        -*) usage ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || usage
[ "$(id -u)" != 0 ] || exec env "$@"
exec unshare --map-root-user env "$@"
