#!/bin/sh
# Runs as root inside the new tree, after the packages of the lock are in; its folder is at /.recipe.
set -eu

case $(uname -m) in
    x86_64) kind=x64 ;;
    aarch64) kind=arm64 ;;
    *) echo "Claude Code has no program for $(uname -m)" >&2 && exit 1 ;;
esac
program=/opt/npm/node_modules/@anthropic-ai/claude-code-linux-$kind/claude
# It is optional to npm, which leaves it out without a word when its hash is another.
if [ ! -x "$program" ]; then echo "npm did not install $program: it is not there, or not as its hash says" >&2 && exit 1; fi
ln -s "$program" /usr/local/bin/claude
# The volume's place: what is below it is the user's.
install -d -o user -g user -m 0755 /workspace
