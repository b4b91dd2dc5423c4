#!/usr/bin/env bash
# Installs versions of the Python package `anthropic`, each into an environment of its own below .venv.
#   scripts/anthropic.sh VERSION ...
set -euo pipefail
cd "$(dirname "$0")/.."
for version; do
    venv=.venv/anthropic-$version
    [ -e "$venv/installed" ] && continue
    printf 'setup: installing anthropic %s\n' "$version" >&2
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --disable-pip-version-check "anthropic==$version"
    touch "$venv/installed"
done
