#!/bin/bash
# Installs what the tests need, then runs them all, or what pytest's arguments say. pytest's summary is the last thing printed and
# its exit status is ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

setup/prepare.sh test
exec .venv/bin/python -m pytest --durations=15 --durations-min=1 "$@"
