#!/bin/bash
# Installs what the tests need, then runs them all, or what pytest's arguments say. pytest's summary is the last thing printed and
# its exit status is ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup/prepare.sh test
# Where /tmp is memory, as on Debian 13, it is too small for the disks of this many guests.
if [ -z "${TMPDIR:-}" ] && [ "$(stat --file-system --format %T /tmp)" = tmpfs ]; then export TMPDIR=/var/tmp; fi
exec .venv/bin/python -m pytest --durations=15 --durations-min=1 "$@"
