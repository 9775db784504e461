#!/bin/bash
# Installs what the tests need, then runs them all, or what pytest's arguments say, a file of tests on each processor. pytest's
# summary is the last thing printed and its exit status is ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup/prepare.sh test
# Minutes where they are not there yet; a millisecond each where they are.
[ "$(id -u)" != 0 ] || .venv/bin/python -m tests.integration.image_fixture
# Where /tmp is memory, as on Debian 13, it is too small for the disks of this many guests.
if [ -z "${TMPDIR:-}" ] && [ "$(stat --file-system --format %T /tmp)" = tmpfs ]; then export TMPDIR=/var/tmp; fi
# Of this run alone: pytest removes older runs' folders, and falls over one in which a run that was killed has left a mount.
scratch=$(mktemp -d "${TMPDIR:-/tmp}/ik.XXXXXX")
trap 'rm -rf --one-file-system "$scratch" 2> /dev/null || true' EXIT
# Each worker has servers, guests and folders of its own, so files of tests are as far from each other as two servers on one machine.
# More than four would need memory that a small machine has not. -n 0 in the arguments runs them one after the other, as a debugger wants it.
workers=$(($(nproc) < 4 ? $(nproc) : 4))
PYTEST_DEBUG_TEMPROOT=$scratch .venv/bin/python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder \
    --durations=15 --durations-min=1 "$@"
