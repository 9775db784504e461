#!/bin/bash
# Runs a command in this mount namespace without what is mounted below a directory. Called as root, in a namespace of its own.
#
#   let_go.sh DIRECTORY COMMAND...
#
# A mount namespace begins as a copy of the host's, so one in which an image is made holds the disks and images of guests too. A guest that is destroyed
# meanwhile could not give back its disk.
set -euo pipefail

directory=$1
shift
findmnt --noheadings --list --output TARGET | sort -r | while read -r target; do
    case $target in
        "$directory"/*)
            # One that is unmounted on the host at this very moment may be gone already: the kernel detaches a mount from every
            # namespace when its directory is removed.
            if ! umount --lazy "$target" 2> /dev/null && mountpoint --quiet "$target"; then
                printf 'cannot let go of %s\n' "$target" >&2
                exit 1
            fi
            ;;
    esac
done
exec "$@"
