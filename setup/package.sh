#!/bin/bash
# Builds the packages: dist/innkeeper-VERSION-….whl, and dist/innkeeper_VERSION-1~debRELEASE_ARCH.deb for this machine's release of
# Debian. Both hold the guest agent and the image recipes; the second has a Python environment of its own below /usr/lib/innkeeper,
# so that installing it takes neither pip nor a network. The same sources make the same bytes.
#
#   setup/package.sh [DIRECTORY]      DIRECTORY in place of dist
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=setup/apt.sh
. setup/apt.sh

output=${1:-dist}
wheels=build/wheels
prefix=/usr/lib/innkeeper
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
architecture=$(dpkg --print-architecture)
release=$(sed -n 's/^VERSION_ID="\(.*\)"$/\1/p' /etc/os-release)
# Times inside are the commit's, or the newest there was when these sources left their repository.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || stat --format=%Y pyproject.toml)}
export SOURCE_DATE_EPOCH
# The order of sets gets into bytecode.
export PYTHONHASHSEED=0 LC_ALL=C.UTF-8
umask 022

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

pip() { .venv/bin/python -m pip --quiet --disable-pip-version-check "$@"; }

build_wheel() {
    say "building the wheel"
    pip wheel --build-constraint setup/build-constraints.txt --no-deps --wheel-dir "$scratch/wheel" .
}

# What pyproject.toml depends on, as requirements.lock says. Kept for the next time.
fetch_wheels() {
    local state
    state=$(/usr/bin/python3 --version; cat setup/requirements.lock)
    if [ "$(cat "$wheels/fetched" 2> /dev/null)" = "$state" ]; then return; fi
    say "fetching the Python packages that come with it"
    rm -rf "$wheels"
    pip download --require-hashes --no-deps --only-binary :all: --requirement setup/requirements.lock --dest "$wheels"
    printf '%s\n' "$state" > "$wheels/fetched"
}

# A Python environment whose place is $prefix, put together below $1.
make_environment() {
    local home=$1$prefix python_version site
    /usr/bin/python3 -m venv --without-pip "$home"
    pip --python "$home/bin/python3" install --isolated --no-index --find-links "$wheels" --no-deps --no-compile \
        --require-hashes --requirement setup/requirements.lock
    pip --python "$home/bin/python3" install --isolated --no-index --no-deps --no-compile "$scratch"/wheel/innkeeper-*.whl
    pip --python "$home/bin/python3" check > "$scratch/check" || die "requirements.lock does not fit pyproject.toml, run
setup/lock_requirements.sh: $(cat "$scratch/check")"
    # Out with what belongs to an installer that is not there, and with paths of this machine.
    find "$home/bin" -mindepth 1 -not -name 'python*' -delete
    find "$home" \( -name RECORD -o -name INSTALLER -o -name REQUESTED -o -name direct_url.json \) -path '*.dist-info/*' -delete
    rm -rf "${home:?}/include" "${home:?}/lib64"
    python_version=$("$home/bin/python3" -c 'import platform; print(platform.python_version())')
    printf 'home = /usr/bin\ninclude-system-site-packages = false\nversion = %s\n' "$python_version" > "$home/pyvenv.cfg"
    printf '#!%s/bin/python3 -I\nfrom innkeeper.cli.main import main\n\nmain()\n' "$prefix" > "$home/bin/inn"
    chmod 755 "$home/bin/inn"
    # Bytecode comes with it: neither root nor the API's user should write into what dpkg owns. It is not checked against
    # the sources' times, because those may not be kept.
    site=$(echo "$home"/lib/python3.*/site-packages)
    "$home/bin/python3" -I -m compileall -q --invalidation-mode unchecked-hash -s "$1" -p / "$site"
}

# Everything but control files, below $1.
fill_package() {
    local doc=$1/usr/share/doc/innkeeper
    make_environment "$1"
    install -d "$1/usr/bin" "$1/etc/innkeeper" "$1/usr/lib/systemd/system" "$doc"
    ln -s ../lib/innkeeper/bin/inn "$1/usr/bin/inn"
    install -m 0644 deploy/*.service "$1/usr/lib/systemd/system/"
    install -m 0644 setup/debian/innkeeper.toml "$1/etc/innkeeper/"
    # It may hold a key.
    install -m 0600 setup/debian/environment "$1/etc/innkeeper/"
    install -m 0644 README.md setup/debian/copyright deploy/grafana-dashboard.json "$doc/"
    cp -r --no-preserve=mode docs "$doc/"
}

# Counted as Debian's policy says, and so the same wherever it is built: files in whole KiB, 1 for everything else.
installed_kib() {
    find "$1" -mindepth 1 -not -path "$1/DEBIAN*" -printf '%y %s\n' |
        awk '{ kib += $1 == "f" ? int(($2 + 1023) / 1024) : 1 } END { print kib }'
}

write_control() { # $1: the package's tree, $2: its version
    local depends=() package python_minor
    python_minor=$(/usr/bin/python3 -c 'import sys; print(sys.version_info.minor)')
    for package in "${server_packages[@]}"; do
        [ "$package" = python3 ] || depends+=("$package")
    done
    # The environment's bytecode and compiled modules are of this release of Python.
    depends+=("python3 (>= 3.$python_minor~)" "python3 (<< 3.$((python_minor + 1)))" libc6 libgcc-s1 passwd)
    install -d "$1/DEBIAN"
    install -m 0755 setup/debian/postinst setup/debian/prerm setup/debian/postrm "$1/DEBIAN/"
    printf '/etc/innkeeper/%s\n' environment innkeeper.toml > "$1/DEBIAN/conffiles"
    (cd "$1" && find . -type f -not -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum) > "$1/DEBIAN/md5sums"
    cat > "$1/DEBIAN/control" << CONTROL
Package: innkeeper
Version: $2
Architecture: $architecture
Maintainer: Innkeeper maintainers <innkeeper@localhost>
Installed-Size: $(installed_kib "$1")
Depends: $(printf '%s, ' "${depends[@]}" | sed 's/, $//')
Recommends: runsc (>= 0.0~${oldest_runsc}0101)$([ "$architecture" != amd64 ] || printf ', %s' "${microvm_packages[@]}")
Section: admin
Priority: optional
Description: isolated guest computers for AI agents, on your own Linux machines
 A server that gives AI agents computers of their own: it answers requests
 for rooms and VMs with guests under gVisor or QEMU, runs commands in them
 and says which files each command changed.
 .
 runsc has to be of $oldest_runsc or newer: in Debian 12 that is the one in
 bookworm-backports.
CONTROL
}

build_deb() {
    local root=$scratch/root full_version=$version-1~deb$release
    say "building the Debian package"
    # Not under the umask of mktemp: this becomes / where it is unpacked.
    install -d -m 0755 "$root"
    fill_package "$root"
    write_control "$root" "$full_version"
    # zstd takes seconds where xz takes minutes, for a tenth more; dpkg reads it since Debian 12.
    dpkg-deb --root-owner-group -Zzstd --build "$root" "$scratch/innkeeper_${full_version}_$architecture.deb" > /dev/null
}

setup/build_agent.sh
build_wheel
fetch_wheels
build_deb
mkdir -p "$output"
rm -f "$output"/innkeeper-*.whl "$output"/innkeeper_*.deb
mv "$scratch"/wheel/*.whl "$scratch"/*.deb "$output/"
ls -sh1 "$output" >&2
