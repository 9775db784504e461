#!/bin/bash
# Installs what the server (run), its tests (test), the performance tables (bench) or its packages (package) need and is
# missing; on a machine that has everything it costs a tenth of a second. Debian 12 or 13, as root.
#
#   setup/prepare.sh run|test|bench|package
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

purpose=${1:-run}
api_user=${INNKEEPER_API_USER:-innkeeper}
# shellcheck source=setup/apt.sh
. setup/apt.sh
packages=("${server_packages[@]}" "${build_packages[@]}")

# A kernel that has these as modules loads most of them by itself at the first mount, but not inside every container.
ensure_modules() {
    local filesystem
    for filesystem in ext4 erofs overlay xfs; do
        grep -qw "$filesystem" /proc/filesystems || modprobe --quiet "$filesystem" || true
    done
    [ -e /dev/loop-control ] || modprobe --quiet loop || true
}

# The API process runs as the first one, virtual machines as the second.
ensure_users() {
    local user
    for user in "$api_user" innkeeper-vm; do
        grep -q "^$user:" /etc/passwd && continue
        say "creating the system user $user"
        useradd --system --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin "$user"
    done
}

# Whether it looks as if KVM could run microVMs here. That it does is for the server to find out, by running one.
may_have_kvm() { [ -c /dev/kvm ] && grep -qwE '^flags.*(vmx|svm)' /proc/cpuinfo && [ "$(uname -m)" = x86_64 ]; }

# What microVMs boot, into the state directory that `inn` would take. Without it guests run under gVisor.
ensure_kernel() {
    [ "$(.venv/bin/inn kernel list --json)" = '[]' ] || return 0
    .venv/bin/inn kernel fetch > /dev/null || { apt update && .venv/bin/inn kernel fetch > /dev/null; } ||
        say 'no kernel for microVMs: guests run under gVisor'
}

ensure_python() {
    local groups=() stamp=.venv/installed-$purpose state
    case $purpose in test | bench) groups=(--group dev) ;; esac
    # Which interpreter, which requirements, which folder (an editable installation points at it).
    state=$({ readlink -f /usr/bin/python3; pwd; cat pyproject.toml; } | sha256sum)
    [ "$(cat "$stamp" 2> /dev/null)" = "$state" ] && return
    /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || die 'Python 3.11 or newer is needed: Debian 12 or 13'
    if ! .venv/bin/python -c '' 2> /dev/null; then
        say 'creating the Python environment .venv'
        rm -rf .venv
        /usr/bin/python3 -m venv .venv
    fi
    say "installing the Python packages for: $purpose"
    # Debian 12's pip knows no dependency groups.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.3'
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable . ${groups[@]+"${groups[@]}"}
    printf '%s\n' "$state" > "$stamp"
}

# Other people's clients, as they are installed by their users: what they need of libraries must not decide about ours.
ensure_clients() {
    local stamp=.venv/clients/installed state
    state=$({ readlink -f /usr/bin/python3; pwd; cat tests/clients/requirements.txt; } | sha256sum)
    [ "$(cat "$stamp" 2> /dev/null)" = "$state" ] && return
    say 'installing the clients that the tests drive'
    rm -rf .venv/clients
    /usr/bin/python3 -m venv .venv/clients
    .venv/clients/bin/python -m pip install --quiet --disable-pip-version-check --requirement tests/clients/requirements.txt
    printf '%s\n' "$state" > "$stamp"
}

# The API's user may not write beside the sources, so without this it would compile its own modules at every start.
ensure_bytecode() {
    local stamp=.venv/compiled
    [ -e "$stamp" ] && [ -z "$(find src -name '*.py' -newer "$stamp" -print -quit)" ] && return
    .venv/bin/python -m compileall -q src || true
    touch "$stamp"
}

case $purpose in
    run) ! may_have_kvm || packages+=("${microvm_packages[@]}") ;;
    test) packages+=("${test_packages[@]}") ;;
    bench) packages+=("${bench_packages[@]}") ;;
    package) packages+=("${package_packages[@]}") ;;
    *) die "not known: $purpose (run, test, bench or package)" ;;
esac
[ "$(id -u)" = 0 ] || die "this needs root, for namespaces, mounts and cgroups: sudo make $purpose"
command -v dpkg-query > /dev/null || die 'this sets up Debian 12 or 13; elsewhere see docs/operations.md'

ensure_packages "${packages[@]}"
ensure_modules
ensure_users
ensure_python
[ "$purpose" != test ] || ensure_clients
ensure_bytecode
setup/build_agent.sh
if [ "$purpose" = run ] && may_have_kvm; then ensure_kernel; fi
