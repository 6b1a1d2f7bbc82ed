#!/usr/bin/env python3
"""Checks every #include "ROOM/..." under src/ against cmake/arrows.txt: the arrow rule of the house.
A test may name what its room may; there are no exceptions."""
import pathlib
import re
import sys

top = pathlib.Path(__file__).resolve().parent.parent
direct = {}
for line in (top / "cmake/arrows.txt").read_text().splitlines():
    if line and not line.startswith("#"):
        room, *seen = line.split()
        assert all(other in direct for other in seen), f"{room}: a room stands after those it names"
        direct[room] = set(seen)

allowed = {}
for room, seen in direct.items():
    allowed[room] = {room}.union(*(allowed[other] for other in seen))

status = 0
for path in sorted((top / "src").rglob("*")):
    if path.suffix not in (".h", ".cc", ".cu"):
        continue
    room = path.relative_to(top / "src").parts[0]
    if room not in allowed:
        print(f"{path.relative_to(top)}: the room {room} is not in cmake/arrows.txt", file=sys.stderr)
        status = 1
        continue
    for number, line in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r'\s*#\s*include\s*"([a-z_]+)/', line)
        if found and found.group(1) in allowed and found.group(1) not in allowed[room]:
            print(f"{path.relative_to(top)}:{number}: {room} may not name {found.group(1)} "
                  f"(cmake/arrows.txt)", file=sys.stderr)
            status = 1
        elif found and found.group(1) not in allowed:
            print(f"{path.relative_to(top)}:{number}: no room {found.group(1)}", file=sys.stderr)
            status = 1
sys.exit(status)
