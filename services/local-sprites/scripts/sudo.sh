#!/bin/sh
# sudo of a local Sprite: its user may become any of the Sprite's users. Programs that gain rights when they are started, as the usual
# sudo does, cannot in a Sprite.
usage() {
    echo "sudo: this sandbox's sudo runs a command as another user: sudo [-EHn] [-u USER] [NAME=value ...] COMMAND ..." >&2
    exit 1
}
user=root
keep_home=
while [ $# -gt 0 ]; do
    case $1 in
        --) shift; break ;;
        -u | --user) [ $# -gt 1 ] || usage; user=$2; shift 2 ;;
        -v | --validate | -k) exit 0 ;;
        -E | --preserve-env) keep_home=yes; shift ;;
        -[EHnSib]* | --preserve-env=* | --non-interactive | --set-home | --login | --stdin) shift ;;
        -*) usage ;;
        *) break ;;
    esac
done
[ $# -gt 0 ] || usage
entry=$(getent passwd "$user") || { echo "sudo: unknown user $user" >&2; exit 1; }
group=$(echo "$entry" | cut -d: -f4)
home=${keep_home:+$HOME}
home=${home:-$(echo "$entry" | cut -d: -f6)}
exec setpriv --reuid "$user" --regid "$group" --init-groups env HOME="$home" USER="$user" LOGNAME="$user" SUDO_USER="$(id -un)" "$@"
