#!/bin/sh
# Runs as root inside the new tree, without network, after the packages of recipe.toml are in; its folder is at /.recipe.
set -eu

# A first plot would otherwise build the font cache and show up as a file that the user's command changed.
# The cache lists fonts in the order of a set, which depends on the hash of strings.
su user -s /bin/sh -c 'cd /tmp && HOME=/home/user MPLBACKEND=Agg PYTHONHASHSEED=0 python3 -c "
import matplotlib.pyplot as plt
import numpy, pandas
plt.plot([1, 2, 3, 4])
plt.savefig(\"/tmp/warm.png\")"'
rm -f /tmp/warm.png
