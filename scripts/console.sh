#!/usr/bin/env bash
# Builds the web console, which the gateway embeds, where its sources changed since the last build. Without Node.js the gateway is built
# without the console, and its page says so.
set -euo pipefail
cd "$(dirname "$0")/../console"
# The set-up's Node.js: the distribution's may be too old.
[ -x ../.venv/node/node ] && PATH="$(cd ../.venv/node && pwd):$PATH"
if ! command -v npm >/dev/null || ! command -v node >/dev/null; then
    echo "console: not built, for want of Node.js with npm; run make setup" >&2
    exit 0
fi
sources=$(cat package.json package-lock.json ../docs/openapi.json index.html ./*.ts scripts/*.mjs $(find src public -type f | LC_ALL=C sort) | sha256sum | cut -d' ' -f1)
[ "$(cat node_modules/.built 2>/dev/null)" = "$sources" ] && [ -e dist/index.html ] && exit 0
[ node_modules/.package-lock.json -nt package-lock.json ] || npm ci --no-fund --no-audit --loglevel=error >/dev/null
npm run --silent types >/dev/null 2>&1
npm run --silent check
npm run --silent build >/dev/null
echo "$sources" >node_modules/.built
