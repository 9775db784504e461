#!/bin/bash
# Builds one image: a tree of packages and files, then the EROFS file of it. Called by image_build.py, as root, inside
# mount and pid namespaces of its own: whatever it mounts or starts is gone when it ends, however it ends.
#
#   image_tree.sh WORK      reads WORK/plan.sh and, where it is there, apt's WORK/preferences;
#                           writes WORK/image.erofs, WORK/dpkg-status, WORK/architecture and WORK/epoch
#
# Lines on stdout that start with "> " are progress for people; everything else is the tools' own talk.
set -euo pipefail

work=$1
tree=$work/tree
# What plan.sh says; parent is an EROFS file, or empty for a bootstrap; epoch is empty where no lock says it.
recipe='' python='' suite='' mirror='' security_mirror='' source_options='' epoch='' parent='' packages=() erofs_options='' uuid=''
# shellcheck source=/dev/null
. "$work/plan.sh"

# This namespace began as a copy of the host's, so it holds the disks and images of guests too. Let go of them: a guest that
# is destroyed while we build could not give back its disk otherwise.
host_directory=$(dirname "$(dirname "$work")")
findmnt --noheadings --list --output TARGET | sort -r | while read -r target; do
    case $target in "$host_directory"/*) umount --lazy "$target" ;; esac
done

say() { printf '> %s\n' "$*"; }

sources() { # $1: mirror, $2: security mirror, $3: options in brackets
    printf 'deb %s%s %s main\n' "${3:-}" "$1" "$suite"
    printf 'deb %s%s %s-updates main\n' "${3:-}" "$1" "$suite"
    printf 'deb %s%s %s-security main\n' "${3:-}" "$2" "$suite"
}

pins=$tree/etc/apt/preferences.d/innkeeper-lock

copy_files() {
    if [ -d "$recipe/files" ]; then cp -a --no-preserve=ownership "$recipe/files/." "$tree/"; fi
    # In the tree, where every apt of the build looks for it.
    if [ -f "$work/preferences" ]; then install -D -m 0644 "$work/preferences" "$pins"; fi
}

# The host's apt works on the tree, so the host's proxy settings and certificates do their part and none of them ever
# is inside; only dpkg and the maintainer scripts run in the tree.
tree_apt() {
    apt-get --quiet --yes \
        -o Dir="$tree" -o Dir::State::status="$tree/var/lib/dpkg/status" -o DPkg::Chroot-Directory="$tree" \
        -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Trusted=/dev/null -o Dir::Etc::TrustedParts="$tree/usr/share/keyrings" \
        -o APT::Sandbox::User=root -o APT::Install-Recommends=false -o Acquire::Languages=none -o Acquire::Retries=3 \
        -o DPkg::Use-Pty=false "$@"
}

if [ -z "$parent" ]; then
    say "bootstrapping Debian $suite with ${#packages[@]} packages"
    mkdir "$tree"
    copy_files
    sources "$mirror" "$security_mirror" "$source_options" | mmdebstrap --quiet --variant=apt --mode=root --skip=check/empty,cleanup/apt/lists \
        --include="$(IFS=,; printf '%s' "${packages[*]}")" \
        --aptopt='Acquire::Retries "3"' \
        "$suite" "$tree" -
    rm -f "$tree/etc/apt/apt.conf.d/99mmdebstrap"
else
    say "adding ${#packages[@]} packages to the image below"
    mkdir "$work/lower" "$work/upper" "$work/upper/u" "$work/upper/w" "$tree"
    mount -t erofs -o loop,ro,nodev,noatime "$parent" "$work/lower"
    mount -t overlay -o "lowerdir=$work/lower,upperdir=$work/upper/u,workdir=$work/upper/w" overlay "$tree"
    copy_files
    if [ ${#packages[@]} -gt 0 ]; then
        sources "$mirror" "$security_mirror" "$source_options" > "$work/sources.list"
        tree_apt update
        mount -t proc proc "$tree/proc"
        mount --rbind /dev "$tree/dev"
        DEBIAN_FRONTEND=noninteractive tree_apt install -- "${packages[@]}"
    fi
fi

rm -f "$pins"

# Nothing newer than the suite's own release date: the same packages then make the same image, byte for byte.
if [ -n "$epoch" ]; then
    SOURCE_DATE_EPOCH=$epoch
elif [ -n "$parent" ] && [ ${#packages[@]} = 0 ]; then
    SOURCE_DATE_EPOCH=$(stat --format=%Y "$tree/etc/machine-id") # written by this script, below
else
    release_date=$(sed -n 's/^Date: //p' "$tree"/var/lib/apt/lists/*_dists_"${suite}"_*Release)
    SOURCE_DATE_EPOCH=$(date --date="${release_date:?}" +%s)
fi
export SOURCE_DATE_EPOCH
printf '%s\n' "$SOURCE_DATE_EPOCH" > "$work/epoch"
dpkg --print-architecture > "$work/architecture"

in_tree() { chroot "$tree" /usr/bin/env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    HOME=/root LANG=C.UTF-8 SOURCE_DATE_EPOCH="$SOURCE_DATE_EPOCH" "$@"; }

clamp_times() { find "$tree" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" -- {} +; }

if ! mountpoint -q "$tree/proc"; then
    mount -t proc proc "$tree/proc"
    mount --rbind /dev "$tree/dev"
fi

if [ -f "$recipe/npm/package-lock.json" ]; then
    say 'adding the npm packages of the lock'
    # The host's npm, with the host's settings, takes the packages apart once their hashes are right, and runs nothing of them.
    mkdir "$work/npm" "$tree/opt/npm"
    cp "$recipe/npm/package.json" "$recipe/npm/package-lock.json" "$work/npm/"
    (cd "$work/npm" && npm ci --ignore-scripts --omit=dev --no-audit --no-fund --no-update-notifier --cache "$work/npm-cache" < /dev/null)
    rm -f "$work/npm/node_modules/.package-lock.json" # names the host's registry
    cp -a --no-preserve=ownership "$work/npm/node_modules" "$tree/opt/npm/"
    rm -rf "$work/npm" "$work/npm-cache"
fi

if [ -f "$recipe/pip/requirements.txt" ]; then
    say 'adding the pip packages of the lock'
    # The host's pip fetches wheels for the Python of the tree, whose own pip unpacks them, without network.
    platforms=()
    for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_{5..36} linux; do platforms+=(--platform "${tag}_$(uname -m)"); done
    "$python" -m pip --quiet download --disable-pip-version-check --no-input --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        --implementation cp --python-version "$(in_tree python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')" \
        "${platforms[@]}" --dest "$work/wheels" --requirement "$recipe/pip/requirements.txt"
    cp "$recipe/pip/requirements.txt" "$work/wheels/"
    mkdir "$tree/.wheels"
    mount --bind "$work/wheels" "$tree/.wheels"
    in_tree python3 -m venv /opt/pip
    in_tree /opt/pip/bin/python -m pip --quiet install --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir --require-hashes \
        --find-links /.wheels --requirement /.wheels/requirements.txt
    umount "$tree/.wheels"
    rmdir "$tree/.wheels"
    rm -rf "$work/wheels"
fi

if [ -f "$recipe/customize.sh" ]; then
    say 'customizing'
    mkdir "$tree/.recipe"
    mount --bind "$recipe" "$tree/.recipe"
    # No input, so that a command of the script cannot wait for somebody who is not there.
    in_tree sh /.recipe/customize.sh < /dev/null
    umount "$tree/.recipe"
    rmdir "$tree/.recipe"
fi

say 'compiling bytecode'
# Python checks a .pyc against its source's time, so times are final before this.
clamp_times
if [ -x "$tree/usr/bin/python3" ]; then
    in_tree sh -c 'python3 -m compileall -q -j 0 /usr/lib/python3* /usr/local/lib/python3* /opt/pip/lib || true' > /dev/null
fi

say 'cleaning'
umount --recursive --lazy "$tree/dev" "$tree/proc"
cd "$tree"
rm -rf dev/* run/apt var/lib/apt/lists/* var/cache/apt/* var/cache/debconf/*-old var/cache/ldconfig/aux-cache var/lib/dpkg/*-old var/log/* \
    root/.cache var/tmp/* etc/ssh/ssh_host_* etc/hostname etc/resolv.conf etc/apt/sources.list etc/apt/sources.list.d/* \
    usr/share/man/* usr/share/info/* usr/share/lintian
find usr/share/doc -not -type d -not -name copyright -delete
find usr/share/doc -mindepth 1 -type d -empty -delete
find usr/share/locale -mindepth 1 -maxdepth 1 -type d -exec rm -rf {} +
find var/lib/systemd var/lib/dbus -type f -delete 2> /dev/null || true
mkdir -p var/lib/apt/lists/partial var/cache/apt/archives/partial var/log/apt
: > etc/machine-id
: > etc/resolv.conf
printf 'innkeeper\n' > etc/hostname
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n' > etc/hosts
sources http://deb.debian.org/debian http://deb.debian.org/debian-security > etc/apt/sources.list
cd "$work"
cp "$tree/var/lib/dpkg/status" "$work/dpkg-status"
clamp_times

say 'compressing'
# shellcheck disable=SC2086  # options, to be split
mkfs.erofs --quiet $erofs_options -U "$uuid" "$work/image.erofs" "$tree"
