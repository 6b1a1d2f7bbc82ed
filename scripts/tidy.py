#!/usr/bin/env python3
"""clang-tidy on the translation units given, several in one run: scripts/tidy.py TOOL FILES.

Most of clang-tidy's time goes to the headers, which every run reads and matches again. Files that
the build compiles by the same command are therefore read as one unit that includes them, grouped by
scripts/units.py. A unit that is not clean is halved, down to single files, and only what those say
counts: joining files never accuses one of them.
"""

import concurrent.futures
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from units import units_of

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
FOLDER = BUILD / "tidy"
NOISE = re.compile(r"warnings? (generated|treated)|^Suppressed|^Use -(header|system)")
ARGUMENTS = ["--quiet", "--header-filter=(src|tests)/.*", "--extra-arg=-Wreserved-identifier",
             "--extra-arg=-Wreserved-macro-identifier"]
JOINED = ["--checks=-bugprone-suspicious-include"]  # scripts/lint.sh looks for such lines itself


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
    over each file, with the flags of the first, is enough. Of a build with CAMBIUM_UNITS a command
    compiles what its unit includes."""
    result = {}
    for entry in json.loads((BUILD / "compile_commands.json").read_text()):
        flags = shlex.split(re.sub(r" -o \S+ -c \S+$", "", entry["command"]))[1:]
        files = [entry["file"]]
        if "/Unity/" in entry["file"]:
            files = re.findall(r'^#include "(.*)"', Path(entry["file"]).read_text(), re.M)
        for file in files:
            result.setdefault(os.path.relpath(file, ROOT), flags)
    return result


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
    result = run(tool, [files[0]], ["--", *command])
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
    os.chdir(ROOT)

    def key(file):  # of files that can be read together
        return known[file], file if names_in_vain(Path(file).read_text()) else ""

    units = sorted(units_of(files, key), key=lambda unit: -len(unit))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: check(tool, known[job[1][0]], job[1], str(job[0])),
                              enumerate(units)))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
