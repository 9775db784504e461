#!/bin/sh
# Runs as root inside the new tree, without network, after the packages of recipe.toml are in; its folder is at /.recipe.
set -eu

# `npm install --global` as the user goes where pip's programs go, which is on PATH. A file and not an environment
# variable, so that root's installations (sudo) stay in /usr/local.
# shellcheck disable=SC2016  # npm expands ${HOME} itself
printf 'prefix=${HOME}/.local\nupdate-notifier=false\nlogs-max=0\nfund=false\n' > /home/user/.npmrc
chown user:user /home/user/.npmrc
