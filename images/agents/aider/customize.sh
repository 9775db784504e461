#!/bin/sh
# Runs as root inside the new tree, after the packages of the lock are in; its folder is at /.recipe.
set -eu

useradd --uid 1000 --user-group --create-home --shell /bin/bash user
install -d -o user -g user -m 0755 /home/user/.cache /home/user/.local /home/user/.local/bin
# As in the base image: the guest agent is the guest's sudo, and /tmp is not empty, so that it stays on the disk.
ln -s /.innkeeper/bin/inn-agent /usr/bin/sudo
install -d -m 0755 /.innkeeper /.innkeeper/bin /.innkeeper/link
chmod 1777 /tmp
install -d -m 0555 /tmp/.innkeeper

ln -s /opt/pip/bin/aider /usr/local/bin/aider
# The volume's place: what is below it is the user's.
install -d -o user -g user -m 0755 /workspace
