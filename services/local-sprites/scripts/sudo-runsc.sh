#!/bin/sh
# sudo of a local Sprite that runsc runs. gVisor has no ambient capabilities, which the other sudo needs.
echo "sudo: not supported by this sandbox's runtime (runsc): programs have no rights but those of their user" >&2
exit 1
