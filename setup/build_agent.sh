#!/bin/bash
# Builds the guest agent, build/inn-agent, unless it is newer than its sources. Needs Go 1.19 or newer and no network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

agent=build/inn-agent
[ -x "$agent" ] && [ -z "$(find guest pyproject.toml \( -name '*.go' -o -path 'guest/kernel/*.py' -o -name go.mod -o -name pyproject.toml \) -newer "$agent" -print -quit)" ] && exit
command -v go > /dev/null || {
    echo 'error: the guest agent is written in Go, and there is no go here: apt-get install golang-go' >&2
    exit 1
}
echo '-- building the guest agent' >&2
mkdir -p build
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
# A file of its own, renamed into place: two builds do not meet, and guests that run keep the binary they started with.
new=$(mktemp build/.inn-agent.XXXXXX)
trap 'rm -f "$new"' EXIT
(cd guest && CGO_ENABLED=0 GOFLAGS=-buildvcs=false GOCACHE="${GOCACHE:-/var/cache/innkeeper-go}" \
    go build -trimpath -ldflags "-s -w -X main.version=$version" -o "../$new" .)
chmod 755 "$new"
mv "$new" "$agent"
