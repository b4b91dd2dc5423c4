#!/usr/bin/env bash
# Makes the root file system of Sprites: Debian with what agents usually need, and nothing of this machine but the certificates that
# it trusts. Says nothing when it is there.
#   scripts/rootfs.sh DIRECTORY      as root; DIRECTORY becomes a link to a directory beside it, named after what is in it
set -euo pipefail
cd "$(dirname "$0")"
. ./versions.env

directory=$1
suite=${AOD_ROOTFS_SUITE:-bookworm}
packages=bash,bzip2,ca-certificates,curl,diffutils,file,findutils,g++,gcc,git,gzip,iproute2,jq,less,libc6-dev,lsof,make,nano
packages+=,netcat-openbsd,openssh-client,patch,perl,pkg-config,procps,psmisc,python3,python3-pip,python3-venv,ripgrep,tzdata,unzip
packages+=,util-linux,wget,xz-utils,zip
case $(uname -m) in aarch64) arch=arm64 ;; *) arch=x64 ;; esac

trusted() { cat /usr/local/share/ca-certificates/*.crt 2>/dev/null || true; }
sum=$({ cat rootfs.sh foreign-owners.py; echo "$suite $NODE_VERSION $NPM_VERSION"; trusted; } | sha256sum)
made=$directory-${sum:0:12}
if [ ! -e "$made" ]; then
    echo "setup: making the root file system of Sprites (Debian $suite)" >&2
    mkdir -p "$(dirname "$made")"
    work=$(mktemp -d "$made.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work"
    mkdir -p "$work/node"
    npm install --prefix "$work/node" --no-fund --no-audit --loglevel=error "node-linux-$arch@$NODE_VERSION" "npm@$NPM_VERSION" >/dev/null
    mkdir "$work/trusted"
    cp /usr/local/share/ca-certificates/*.crt "$work/trusted/" 2>/dev/null || true
    mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
        --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook="mkdir -p \$1/usr/local/lib/node_modules \$1/usr/local/etc" \
        --customize-hook="cp '$work/node/node_modules/node-linux-$arch/bin/node' \$1/usr/local/bin/node" \
        --customize-hook="cp -R '$work/node/node_modules/npm' \$1/usr/local/lib/node_modules/npm" \
        --customize-hook="ln -s ../lib/node_modules/npm/bin/npm-cli.js \$1/usr/local/bin/npm" \
        --customize-hook="ln -s ../lib/node_modules/npm/bin/npx-cli.js \$1/usr/local/bin/npx" \
        --customize-hook="cp -R '$work/trusted/.' \$1/usr/local/share/ca-certificates/" \
        --customize-hook="chroot \$1 update-ca-certificates >/dev/null 2>&1" \
        --customize-hook="echo cafile=/etc/ssl/certs/ca-certificates.crt >\$1/usr/local/etc/npmrc" \
        --customize-hook="printf '[global]\\ncert = /etc/ssl/certs/ca-certificates.crt\\n' >\$1/etc/pip.conf" \
        --customize-hook='rm -f $1/etc/resolv.conf $1/etc/hostname; : >$1/etc/resolv.conf; : >$1/etc/hosts' \
        "$suite" "$work/root" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
    rm -rf "$work/root/dev"
    mkdir "$work/root/dev"
    # Its users are none of this machine's: a Sprite's root is an unknown user here. Last, so that an image that is there is whole.
    python3 foreign-owners.py "$work/root"
    # Another set-up may have been faster.
    mv -T "$work/root" "$made" 2>/dev/null || [ -e "$made" ]
fi
[ "$(readlink "$directory" 2>/dev/null)" = "$(basename "$made")" ] || ln -sfn "$(basename "$made")" "$directory"
