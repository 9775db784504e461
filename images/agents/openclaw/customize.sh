#!/bin/sh
# Runs as root inside the new tree, after the packages of the lock are in; its folder is at /.recipe.
set -eu

node=$(echo /opt/npm/node_modules/node-linux-*/bin/node)
[ -x "$node" ]
ln -s "$node" /usr/local/bin/node
ln -s ../../../opt/npm/node_modules/openclaw/openclaw.mjs /usr/local/bin/openclaw
chmod a+x /opt/npm/node_modules/openclaw/openclaw.mjs
# The volume's place: what is below it is the user's.
install -d -o user -g user -m 0755 /opt/data
