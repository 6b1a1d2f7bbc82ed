#!/usr/bin/env python3
"""clang-tidy on the translation units given, several in one run: scripts/tidy.py TOOL FILES.

Most of clang-tidy's time goes to the headers, which every run reads and matches again. Files that
the build compiles by the same command are therefore read as one unit that includes them, grouped by
scripts/units.py. A unit that is not clean is halved, down to single files, and only what those say
counts: joining files never accuses one of them.

A unit that was clean is remembered, in any clone of this user, with what every file that it read
held (~/.cache/cambium/tidy); it is read again when one of them, a flag, a rule or the tool changed.
"""

import concurrent.futures
import functools
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from units import units_of

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
FOLDER = BUILD / "tidy"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cambium" / "tidy"
KEPT_DAYS = 30
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
        unit = Path(entry["file"])
        if unit.parent == BUILD / "units":
            files = [unit.parent / file
                     for file in re.findall(r'^#include "(.*)"', unit.read_text(), re.M)]
        for file in files:
            result.setdefault(os.path.relpath(file, ROOT), flags)
    return result


def run(tool, arguments, flags=()):
    return subprocess.run([tool, *ARGUMENTS, *arguments, *flags], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@functools.cache
def digest(file):
    return hashlib.sha256((ROOT / file).read_bytes()).hexdigest()


@functools.cache
def rules(tool):
    version = subprocess.run([tool, "--version"], text=True, stdout=subprocess.PIPE).stdout
    return [version, digest(".clang-tidy"), digest("scripts/tidy.py")]


def memory(tool, command, files):
    """The file that says what was read when the unit was clean."""
    asked = [rules(tool), [flag.replace(str(ROOT), ".") for flag in command], files]
    return CACHE / (hashlib.sha256(json.dumps(asked).encode()).hexdigest() + ".json")


def was_clean(path):
    try:
        held = json.loads(path.read_text())
        if any(digest(file) != before for file, before in held.items()):
            return False
        os.utime(path)  # still of use
    except (OSError, ValueError):
        return False
    return True


def remember(path, command, files):
    """Ours are named from the root: other clones read the same."""
    text = "".join('#include "%s"\n' % (ROOT / file) for file in files)
    read = subprocess.run(["c++", *command, "-w", "-M", "-x", "c++", "-"], cwd=ROOT, text=True,
                          input=text, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if read.returncode != 0:
        return
    read = shlex.split(read.stdout.replace("\\\n", " "))[1:]  # spaces within a path are escaped
    names = {os.path.normpath(name) for name in read}
    names = {name[len(str(ROOT)) + 1:] if name.startswith("%s/" % ROOT) else name
             for name in names - {"-"}}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".%d" % os.getpid())
    new.write_text(json.dumps({name: digest(name) for name in sorted(names)}))
    new.replace(path)


def forget_old():
    for path in CACHE.glob("*"):
        if path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
            path.unlink(missing_ok=True)


def check(tool, command, files, name):
    """Whether the files are clean; prints what is wrong."""
    path = memory(tool, command, files)
    if was_clean(path):
        return True
    clean = read_again(tool, command, files, name)
    if clean:
        remember(path, command, files)
    return clean


def read_again(tool, command, files, name):
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

    forget_old()
    units = sorted(units_of(files, key), key=lambda unit: -len(unit))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        clean = list(pool.map(lambda job: check(tool, known[job[1][0]], job[1], str(job[0])),
                              enumerate(units)))
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main())
