#!/usr/bin/env python3
"""Which files can be compiled together: scripts/units.py PREFIX FILES writes PREFIX_0.cc, PREFIX_1.cc,
..., which include them, and prints what there is to compile, a path a line.

Most of the time of a compiler, and of clang-tidy, goes to headers and to what they instantiate.
Files that are included from one unit share that. They may be as long as no name that one of
them keeps in an unnamed namespace is defined by another, or by a header that the other includes.
"""

import functools
import os
import re
import sys
from pathlib import Path

FILES_A_UNIT = 12

ROOT = Path(__file__).resolve().parent.parent
UNNAMED = re.compile(r"^namespace \{\n(.*?)^\}  // namespace$", re.S | re.M)
TEST = re.compile(r"^\w*TEST\w*\(\s*(\w+),\s*(\w+)", re.M)
REPEATED = re.compile(r"using (namespace )?[\w:]+;|namespace |\w*TEST\w*\(")  # harms nobody
TYPE = re.compile(r"(?:struct|class|enum class|enum|union)\s+(\w+)|using (\w+) =")
OTHER = re.compile(r"(\w+)\s*(?=[(\[={;])")
SHARED = re.compile(r"^(?:struct|class|enum class) (\w+)|^\w[^(=;\n]*[\s&*>](\w+)\(", re.M)
INCLUDE = re.compile(r'^#include "([^"]+)"', re.M)


def own_names(text):
    """Names that nothing else of a unit may define."""
    names = {"%s %s" % pair for pair in TEST.findall(text)}
    names.update(re.findall(r"^#define (\w+)", text, re.M))
    for block in UNNAMED.findall(text):
        for line in block.splitlines():
            if not line or not line[0].isalpha() or REPEATED.match(line):
                continue
            found = TYPE.search(line) or OTHER.search(line)
            if found:
                names.add(next(name for name in found.groups() if name))
    return names


@functools.cache
def shared_names(path):
    """Names that a file, or a header of ours that it includes, defines for all who see them."""
    text = UNNAMED.sub("", path.read_text())
    names = {name for pair in SHARED.findall(text) for name in pair if name}
    for header in INCLUDE.findall(text):
        for place in (path.parent, ROOT / "src", ROOT / "tests"):
            if (place / header).is_file():
                names |= shared_names(place / header)
                break
    return names


def units_of(files, key=lambda file: None):
    """Lists of files to be read together; all files of one have the same key."""
    units = []
    for file in files:
        own, shared = own_names(Path(file).read_text()), shared_names(Path(file).resolve())
        own_key = key(file)
        for unit in units:
            if (unit["key"] == own_key and len(unit["files"]) < FILES_A_UNIT
                    and not unit["own"] & (own | shared) and not unit["shared"] & own):
                break
        else:
            unit = {"key": own_key, "files": [], "own": set(), "shared": set()}
            units.append(unit)
        unit["files"].append(file)
        unit["own"] |= own
        unit["shared"] |= shared
    return [unit["files"] for unit in units]


def write_units(prefix, files):
    """The paths to compile. What a unit includes it names from its own folder, so that the same
    sources elsewhere have the same units; one that would not change is not written."""
    paths = []
    for number, members in enumerate(units_of(files)):
        if len(members) == 1:
            paths.append(Path(members[0]))
            continue
        path = Path("%s_%d.cc" % (prefix, number))
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join('#include "%s"\n' % os.path.relpath(file, path.parent) for file in members)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        paths.append(path)
    return paths


if __name__ == "__main__":
    print(*write_units(sys.argv[1], sys.argv[2:]), sep="\n")
