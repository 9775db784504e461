#!/bin/sh
# Runs as root inside the new tree, after the packages of the lock are in; its folder is at /.recipe.
set -eu

ln -s /opt/pip/bin/hermes /usr/local/bin/hermes
# The volume's place: what is below it is the user's.
install -d -o user -g user -m 0755 /opt/data
