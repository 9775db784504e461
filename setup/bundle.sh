#!/bin/bash
# Builds dist/innkeeper-VERSION-debRELEASE-ARCH.bundle.tar: everything that a machine of the same release of Debian needs and does
# not reach. In it: our packages, the shipped images (INNKEEPER_IMAGES says which), the kernel of microVMs, every Debian package that
# these depend on, the Python wheels, checksums, and install.sh.
#
#   setup/bundle.sh [DIRECTORY]      DIRECTORY in place of dist
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=setup/apt.sh
. setup/apt.sh

output=${1:-dist}
architecture=$(dpkg --print-architecture)
release=$(sed -n 's/^VERSION_ID="\(.*\)"$/\1/p' /etc/os-release)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2> /dev/null || stat --format=%Y pyproject.toml)}
export SOURCE_DATE_EPOCH
umask 022

mkdir -p "$output" build
# Beside the output: it takes three times as much space as the bundle, which is more than /tmp may have.
scratch=$(mktemp -d "$output/.bundle.XXXXXX")
scratch=$(readlink -f "$scratch")
trap 'rm -rf "$scratch"' EXIT

# Files as a package, so that dpkg knows whose they are and an upgrade takes the old ones away. What they are, from standard input.
data_package() { # $1: name, $2: version, $3: the tree
    mkdir "$3/DEBIAN"
    { cat << CONTROL; cat; } > "$3/DEBIAN/control"
Package: $1
Version: $2
Architecture: $architecture
Maintainer: Innkeeper maintainers <innkeeper@localhost>
Installed-Size: $(du --summarize --apparent-size --block-size=1024 "$3" | cut -f 1)
Enhances: innkeeper
Section: admin
Priority: optional
CONTROL
    # They are compressed as they are.
    dpkg-deb --root-owner-group -Znone --build "$3" "$bundle/debs/$1_$2_$architecture.deb" > /dev/null
    rm -r "$3"
}

build_images() { # $1: version
    local tree=$scratch/images place name digest
    say 'building the images, or taking those that are there'
    .venv/bin/inn image build-shipped --home "$PWD/build/images" > "$scratch/images.built"
    install -d "$tree/usr/share/innkeeper/images"
    while read -r name digest _; do
        for place in "$name.json" "$digest.erofs"; do
            install -m 0644 "build/images/host/images/$place" "$tree/usr/share/innkeeper/images/"
        done
    done < "$scratch/images.built"
    data_package innkeeper-images "$1" "$tree" << CONTROL
Description: guest images for Innkeeper, built ahead
 With these a server starts without building its images, for which it would
 need a mirror of Debian.
CONTROL
}

# Debian's package of the kernel that microVMs boot, as it is: it is not to be installed there, only unpacked by the server.
fetch_kernel() { # $1: version
    local tree=$scratch/kernel package
    package=$(apt-cache "${options[@]}" depends --important "linux-image-cloud-$architecture" |
        sed -n 's/^ *Depends: \(linux-image-.*\)$/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no kernel for virtual machines, linux-image-cloud-$architecture"
    say "fetching $package"
    install -d "$tree/usr/share/innkeeper/kernel"
    (cd "$tree/usr/share/innkeeper/kernel" && apt-get -qq "${options[@]}" download "$package" && chmod 0644 ./*.deb)
    data_package innkeeper-kernel "$1" "$tree" << CONTROL
Description: the kernel of Innkeeper's microVMs
 Debian's package of it, which is not installed: with it a server boots
 microVMs without fetching one from a mirror of Debian.
CONTROL
}

# Our package's dependencies, runsc and QEMU, with all of theirs: as for a machine that has nothing installed, since what the other one
# has is not known here.
fetch_dependencies() {
    local runsc=runsc
    say 'fetching the Debian packages that it takes'
    mkdir -p "$scratch/sources" "$scratch/lists/partial" "$scratch/archives/partial"
    : > "$scratch/status"
    options=(
        -o Dir::Etc::SourceList=/dev/null -o "Dir::Etc::SourceParts=$scratch/sources" -o "Dir::State::Lists=$scratch/lists"
        -o "Dir::State::status=$scratch/status" -o "Dir::Cache=$scratch" -o "Dir::Cache::archives=$scratch/archives"
        -o APT::Sandbox::User=root
    )
    debian_sources > "$scratch/sources/debian.list"
    apt "${options[@]}" update
    if ! fresh_enough "$(candidate_release "${options[@]}")"; then
        backports_line > "$scratch/sources/backports.list"
        apt "${options[@]}" update
        runsc=runsc/$codename-backports
    fi
    apt_with_progress "$scratch/output" "${options[@]}" --yes --no-install-recommends --download-only install \
        "$(readlink -f "$bundle"/debs/innkeeper_*.deb)" python3-venv "$runsc" ${microvms[@]+"${microvms[@]}"} || {
        tail -n 20 "$scratch/output" >&2
        die 'apt could not fetch them'
    }
    mv "$scratch"/archives/*.deb "$bundle/debs/"
}

setup/package.sh "$scratch/packages"
full_version=$(dpkg-deb --field "$scratch"/packages/innkeeper_*.deb Version)
name=innkeeper-${full_version%%-*}-deb$release-$architecture
bundle=$scratch/$name
mkdir -p "$bundle/debs" "$bundle/wheels"
mv "$scratch"/packages/*.deb "$bundle/debs/"
cp build/wheels/*.whl "$scratch"/packages/*.whl "$bundle/wheels/"
build_images "$full_version"
# MicroVMs run on this kind of processor alone.
microvms=()
[ "$architecture" != amd64 ] || microvms=("${microvm_packages[@]}")
options=()
fetch_dependencies
[ ${#microvms[@]} = 0 ] || fetch_kernel "$full_version"
(cd "$bundle/debs" && apt-ftparchive packages . > Packages && apt-ftparchive release . > "$scratch/Release" && mv "$scratch/Release" .)
install -m 0755 setup/debian/install.sh "$bundle/"
printf '%s\n' "$full_version" > "$bundle/VERSION"
printf '%s %s\n' "$release" "$architecture" > "$bundle/FOR"
(cd "$bundle" && find . -type f -printf '%P\0' | sort -z | xargs -0 sha256sum) > "$scratch/SHA256SUMS"
mv "$scratch/SHA256SUMS" "$bundle/"
say 'writing the bundle'
rm -f "$output"/innkeeper-*.bundle.tar "$output"/innkeeper-*.bundle.tar.sha256
tar --create --directory "$scratch" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" \
    --file "$scratch/bundle.tar" "$name"
mv "$scratch/bundle.tar" "$output/$name.bundle.tar"
(cd "$output" && sha256sum "$name.bundle.tar" > "$name.bundle.tar.sha256")
ls -sh1 "$output" >&2
