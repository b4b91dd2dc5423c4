#!/usr/bin/env bash
# Attacks on sandboxes, with each OCI runtime that is installed.
set -euo pipefail
cd "$(dirname "$0")/.."
for runtime in runc crun runsc; do
    if ! version=$($runtime --version 2>/dev/null); then
        echo "$runtime is not installed"
        continue
    fi
    # Debian 12's gVisor cannot run the programs of our root file system.
    release=$(grep -oE '[0-9]{8}' <<<"$version" | head -1 || true)
    if [ "$runtime" = runsc ] && [ "${release:-0}" -lt 20230501 ]; then
        echo "runsc is too old (${release:-unknown release}): 20230501 or later is needed"
        continue
    fi
    echo "with $(head -1 <<<"$version"):"
    LOCAL_SPRITES_RUNTIME=$runtime "${CARGO:-cargo}" test --quiet -p local-sprites --test it -- escape:: isolation:: secrets:: users:: runsc::
done
