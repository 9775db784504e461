#!/bin/bash
# Installs Innkeeper from this folder, without any network: the server with its images, runsc, QEMU and the kernel of microVMs where
# they run on this kind of processor, and what of Debian they need and this machine lacks. It upgrades an older Innkeeper. As root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

read -r release architecture < FOR
here=$(sed -n 's/^VERSION_ID="\(.*\)"$/\1/p' /etc/os-release)
[ "$(id -u)" = 0 ] || die 'this needs root'
[ "$here $(dpkg --print-architecture)" = "$release $architecture" ] ||
    die "this is for Debian $release on $architecture, not for ${here:-another system} on $(dpkg --print-architecture)"
echo '-- checking that everything is as it was made'
sha256sum --check --strict --quiet SHA256SUMS || die 'files are missing or damaged, nothing was installed'

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
chmod 755 "$scratch"
mkdir -p "$scratch/lists/partial" "$scratch/debs"
# By a way without blanks, which a list of sources cannot have.
ln -s "$PWD/debs" "$scratch/here"
# No signature: the checksums were compared just now.
printf 'deb [trusted=yes] file:%s/here ./\n' "$scratch" > "$scratch/sources.list"

# Knows this folder alone, and leaves what the machine knows of its own sources as it is.
apt() {
    DEBIAN_FRONTEND=noninteractive apt-get -qq \
        -o "Dir::Etc::SourceList=$scratch/sources.list" -o Dir::Etc::SourceParts=/dev/null -o "Dir::State::Lists=$scratch/lists" \
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=300 \
        -o DPkg::Use-Pty=false "$@" < /dev/null
}

apt update
echo '-- installing'
first=(innkeeper-images runsc)
[ "$architecture" != amd64 ] || first+=(innkeeper-kernel qemu-system-x86)
# Before the server, which starts as soon as it is configured, and would begin to build what is not there.
apt install --yes --no-install-recommends "${first[@]}"
apt install --yes --no-install-recommends innkeeper
inn version
echo 'Now: inn doctor'
