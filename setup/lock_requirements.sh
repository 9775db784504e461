#!/bin/bash
# Writes setup/requirements.lock anew: the Python packages of the Debian package and of the bundle, to the version and the hash.
# One file for every release of Python and kind of processor that they are made for. Run it when pyproject.toml's dependencies
# change, or to take newer versions of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
/usr/bin/python3 -m venv "$scratch/venv"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check 'uv>=0.13'
# Not what pip is told on this machine: the file says nothing about where a package comes from.
"$scratch/venv/bin/uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    pyproject.toml --output-file "$scratch/requirements.lock"
{
    printf '# Written by setup/lock_requirements.sh.\n'
    cat "$scratch/requirements.lock"
} > setup/requirements.lock
