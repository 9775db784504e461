#!/bin/bash
# Exports one image. Called by image_export.py, as root, inside mount, network, ipc and pid namespaces of its own: whatever it
# mounts or starts is gone when it ends, however it ends.
#
#   image_export.sh PLAN     reads PLAN, writes $work/image.erofs and $work/files (how many files are in it)
#
# Exit status 3: too many files; 4: too many bytes.
set -euo pipefail

work='' disk='' lower='' output='' max_bytes='' max_files='' uid='' gid='' uuid='' erofs_options=''
# shellcheck source=/dev/null
. "$1"

# What reads the tree lives in a root of its own: itself, the libraries it needs, the tree, and a file system for what it makes. As a
# user of no consequence it may read everything, and there is nothing of the host to read: not by a path, and not by a file
# handle either, since no descriptor of a file system of the host is to be had.
jail=$work/jail
mkdir "$jail"
mount -t tmpfs -o mode=755,size=64m,nodev,nosuid jail "$jail"
mkdir "$jail/bin" "$jail/tree" "$jail/out"
for program in setpriv prlimit find mkfs.erofs; do
    path=$(PATH=$PATH:/usr/sbin:/sbin command -v "$program")
    cp -L "$path" "$jail/bin/$program"
    ldd "$path" | awk '/=> \//{ print $3 } /^[[:space:]]*\//{ print $1 }' | while IFS= read -r library; do
        mkdir -p "$jail$(dirname "$library")"
        cp -Lu "$library" "$jail$library"
    done
done
mount -t ext4 -o nodev,nosuid,noatime,noexec "$output" "$jail/out"
jailed() {
    chroot "$jail" /bin/setpriv --reuid "$uid" --regid "$gid" --clear-groups --no-new-privs \
        --bounding-set -all,+dac_read_search --inh-caps -all,+dac_read_search --ambient-caps -all,+dac_read_search -- "$@"
}

layers=$work/skeleton
mkdir "$work/disk" "$work/lower"
if [ -n "$disk" ]; then
    mount -t ext4 -o nodev,nosuid,noatime "$disk" "$work/disk"
    layers=$layers:$work/disk/u
fi
if [ -n "$lower" ]; then
    mount -t erofs -o ro,nodev,nosuid,noatime "$lower" "$work/lower"
    layers=$layers:$work/lower
else
    layers=$layers:$work/lower
fi
mount -t overlay -o "ro,nodev,nosuid,noatime,userxattr,metacopy=off,redirect_dir=nofollow,index=off,lowerdir=$layers" overlay "$jail/tree"

# Types only, no names: a name may hold anything.
counts=$(jailed /bin/find /tree -xdev -printf '%y\n' | sort | uniq -c)
files=$(awk '{ sum += $1 } END { print sum + 0 }' <<< "$counts")
printf '%s\n' "$files" > "$work/files"
[ "$files" -le "$max_files" ] || exit 3

# What a guest has from its host is no part of its image.
exclude=(--exclude-path=etc/hosts --exclude-path=etc/hostname --exclude-path=etc/resolv.conf --exclude-path=etc/machine-id)
if grep -q '[bcps]$' <<< "$counts"; then
    # Devices, FIFOs and sockets mean something to the guest that made them, and nothing in an image.
    while IFS= read -r -d '' path; do
        exclude+=("--exclude-path=$path")
        [ ${#exclude[@]} -lt 1000 ] || exit 3
    done < <(jailed /bin/find /tree -xdev \( -type b -o -type c -o -type p -o -type s \) -printf '%P\0')
fi

# mkfs.erofs clamps times to this one, and writes it down as the image's own: far in the future, every file keeps its time and
# equal trees still make equal images.
export SOURCE_DATE_EPOCH=4102444800
# shellcheck disable=SC2086  # options, to be split
jailed /bin/prlimit --fsize="$max_bytes" --core=0 -- /bin/mkfs.erofs --quiet $erofs_options -U "$uuid" "${exclude[@]}" \
    /out/image.erofs /tree || {
    status=$?
    [ "$(stat --format=%s "$jail/out/image.erofs" 2> /dev/null || echo 0)" -ge "$max_bytes" ] && exit 4
    # 128 + SIGXFSZ
    [ "$status" = 153 ] && exit 4
    exit "$status"
}
# A regular file and nothing else, whatever took its place.
[ -f "$jail/out/image.erofs" ] && [ ! -L "$jail/out/image.erofs" ] || exit 1
cp --no-preserve=all "$jail/out/image.erofs" "$work/image.erofs"
