"""Runs in a guest: makes `deep` (directories in directories, argv[2] levels) or `wide` (argv[2] files in one directory) at argv[3]."""

import os
import sys
from pathlib import Path

way, number, place = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
place.mkdir(parents=True, exist_ok=True)
os.chdir(place)
if way == "deep":
    for _ in range(number):  # a name at a time: the whole path is longer than one may be
        Path("d").mkdir()
        os.chdir("d")
    Path("bottom").write_text("x")
else:
    for index in range(number):
        Path(f"file-{index:08}").touch()
