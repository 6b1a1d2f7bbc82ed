#!/usr/bin/env python3
"""clang-tidy on the translation units given, several in one run: scripts/tidy.py TOOL FILES.

Most of clang-tidy's time goes to the headers, which every run reads and matches again. Files that
the build compiles by the same command are therefore read as one unit that includes them, as long
as no two of them define the same name in an unnamed namespace. A unit that is not clean is halved,
down to single files, and only what those say counts: joining files never accuses one of them.
"""

import concurrent.futures
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
FOLDER = BUILD / "tidy"
FILES_A_UNIT = 12
NOISE = re.compile(r"warnings? (generated|treated)|^Suppressed|^Use -(header|system)")
ARGUMENTS = ["--quiet", "--header-filter=(src|tests)/.*", "--extra-arg=-Wreserved-identifier",
             "--extra-arg=-Wreserved-macro-identifier"]
JOINED = ["--checks=-bugprone-suspicious-include"]  # scripts/lint.sh looks for such lines itself

UNNAMED = re.compile(r"^namespace \{\n(.*?)^\}  // namespace$", re.S | re.M)
TEST = re.compile(r"^\w*TEST\w*\(\s*(\w+),\s*(\w+)", re.M)
REPEATED = re.compile(r"using (namespace )?[\w:]+;|namespace |\w*TEST\w*\(")  # harms nobody
TYPE = re.compile(r"(?:struct|class|enum class|enum|union)\s+(\w+)|using (\w+) =")
OTHER = re.compile(r"(\w+)\s*(?=[(\[={;])")


def own_names(text):
    """Names that would collide if another file that has them were read in the same unit."""
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


def names_in_vain(text):
    """Whether a `using a::b;` or `namespace b = a;` brings a name that the text has only there.
    clang-tidy judges those in the file that it is given alone, not in what that file includes."""
    brought = re.findall(r"^ *using (?:\w*::)*(\w+);", text, re.M)
    brought += re.findall(r"^ *namespace (\w+) =", text, re.M)
    return any(len(re.findall(r"\b%s\b" % name, text)) == 1
               or len(re.findall(r"::%s\b" % name, text)) == len(re.findall(r"\b%s\b" % name, text))
               for name in brought)


def commands():
    """file -> flags it is compiled with. Kernels are compiled once per instruction set; one pass
    over each file, with the flags of the first, is enough."""
    result = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        flags = shlex.split(re.sub(r" -o \S+ -c \S+$", "", entry["command"]))[1:]
        result.setdefault(os.path.relpath(entry["file"], ROOT), flags)
    return result


def units_of(files, known):
    """Lists of files to be read together."""
    units = []
    for file in files:
        text = (ROOT / file).read_text()
        names = own_names(text)
        alone = names_in_vain(text)
        for unit in units:
            if (not alone and not unit["alone"] and unit["key"] == known.get(file)
                    and len(unit["files"]) < FILES_A_UNIT and not unit["names"] & names):
                break
        else:
            unit = {"key": known.get(file), "files": [], "names": set(), "alone": alone}
            units.append(unit)
        unit["files"].append(file)
        unit["names"] |= names
    return [(unit["key"], unit["files"]) for unit in units]


def run(tool, arguments, flags=()):
    return subprocess.run([tool, *ARGUMENTS, *arguments, *flags], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def check(tool, command, files, name):
    """Whether the files are clean; prints what is wrong."""
    if len(files) > 1:
        joined = FOLDER / (name + ".cc")
        joined.write_text("".join('#include "%s"\n' % (ROOT / file) for file in files))
        if run(tool, [*JOINED, str(joined)], ["--", *command]).returncode == 0:
            return True
        half = len(files) // 2
        parts = ((files[:half], name + "a"), (files[half:], name + "b"))
        return all([check(tool, command, *part) for part in parts])
    result = run(tool, ["-p", str(BUILD), files[0]])
    if result.returncode != 0:
        lines = result.stdout.splitlines(keepends=True)
        print("".join(line for line in lines if not NOISE.search(line)), end="", flush=True)
    return result.returncode == 0


def main():
    tool, files = sys.argv[1], sys.argv[2:]
    FOLDER.mkdir(parents=True, exist_ok=True)
    known = commands()
    new = [file for file in files if file not in known]
    if new:
        sys.exit("%s: %d files are not in it, the first %s; configure the build again "
                 "(cmake --preset release)" % (BUILD / "compile_commands.json", len(new), new[0]))
    units = sorted(units_of(files, known), key=lambda unit: -len(unit[1]))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: check(tool, *job[1], str(job[0])), enumerate(units)))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
