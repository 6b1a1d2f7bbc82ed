#!/usr/bin/env python3
"""The house: a source includes, itself or through a header of ours, the headers of what it names.
scripts/includes.py [FILES] says what is missing. The gate compiles files several at a time
(scripts/units.py), where a header that one of them forgot may come from another.
"""

import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^ *# *include ["<]([^">]+)[">]', re.M)
ASIDE = re.compile(r'//[^\n]*|R"(\w*)\((?:.|\n)*?\)\1"|"(?:\\.|[^"\\\n])*"'
                   r"|TEST\w*\(\s*\w+,\s*\w+")
TYPE = re.compile(r"^(?:struct|class|enum class) (\w+)|^using (\w+) =|^#define (\w+)", re.M)
HEADERS_OF_STD = {name: header for header, names in {
    "algorithm": "all_of any_of clamp copy copy_n count count_if equal fill fill_n find find_if "
                 "for_each is_sorted lower_bound max max_element min min_element minmax_element "
                 "none_of nth_element partial_sort remove_if replace reverse sort stable_sort "
                 "transform unique upper_bound",
    "array": "array",
    "atomic": "atomic",
    "bit": "bit_cast",
    "charconv": "from_chars to_chars",
    "chrono": "chrono",
    "cmath": "abs ceil cos cosh exp expm1 floor isfinite isinf isnan ldexp lgamma llround log "
             "log10 log1p nextafter pow round signbit sin sqrt tanh",
    "complex": "complex",
    "condition_variable": "condition_variable",
    "cstdio": "fflush fprintf fputs printf",
    "cstdlib": "abort getenv",
    "cstring": "memcmp memcpy memset strerror",
    "deque": "deque",
    "exception": "current_exception exception exception_ptr rethrow_exception",
    "filesystem": "filesystem",
    "fstream": "ifstream ofstream",
    "functional": "function",
    "limits": "numeric_limits",
    "map": "map",
    "memory": "make_shared make_unique shared_ptr unique_ptr",
    "mutex": "call_once lock_guard mutex once_flag unique_lock",
    "numbers": "numbers",
    "numeric": "accumulate inner_product iota",
    "optional": "nullopt optional",
    "random": "mt19937_64",
    "set": "set",
    "span": "as_bytes span",
    "string": "stod stoi stoll stoul stoull string to_string u32string",
    "string_view": "string_view u32string_view",
    "thread": "this_thread thread",
    "tuple": "tie tuple",
    "unordered_map": "unordered_map",
    "unordered_set": "unordered_set",
    "utility": "exchange",
    "variant": "get_if holds_alternative variant",
    "vector": "vector",
}.items() for name in names.split()}


@functools.cache
def text_of(path):
    """Without comments, strings and names of tests."""
    return ASIDE.sub("", path.read_text())


@functools.cache
def closure(path):
    """Headers of ours and of others that a file sees."""
    ours, others = {path}, set()
    for header in INCLUDE.findall(path.read_text()):
        for place in (path.parent, ROOT / "src", ROOT / "tests"):
            if (place / header).is_file():
                seen = closure((place / header).resolve())
                ours |= seen[0]
                others |= seen[1]
                break
        else:
            others.add(header)
    return ours, others


def types_of(text):
    """Types and macros that a header of ours declares at the left margin."""
    return {name for found in TYPE.findall(text) for name in found if name}


@functools.cache
def inner_types_of(path):
    """All types of a file, those of templates and macros' parameters too."""
    before = r"(?:struct|class|using|typename|class\.\.\.) +|#define \w+\(\w+, "
    return set(re.findall("(?:%s)(\\w+)" % before, text_of(path)))


def missing(path, headers):
    """What a file names and does not see; headers: type -> headers of ours that declare it."""
    (ours, others), text = closure(path), text_of(path)
    for name in set(re.findall(r"\bstd::(\w+)", text)) & set(HEADERS_OF_STD):
        if HEADERS_OF_STD[name] not in others:
            yield "<%s> for std::%s" % (HEADERS_OF_STD[name], name)
    named = set(re.findall(r"(?<![.>:\w])[A-Z]\w+\b", text)) & set(headers)
    for name in named - set().union(*(inner_types_of(file) for file in ours)):
        if not headers[name] & ours:
            paths = sorted(str(header.relative_to(ROOT)) for header in headers[name])
            yield "%s for %s" % (" or ".join(paths), name)


def main():
    tracked = subprocess.run(["git", "ls-files", "src/*", "tests/*"], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, check=True).stdout.split()
    headers = {}
    for file in tracked:
        if file.endswith(".h"):
            for name in types_of(text_of(ROOT / file)):
                headers.setdefault(name, set()).add(ROOT / file)
    files = [file for file in sys.argv[1:] or tracked
             if re.match(r"(src|tests)/.*\.(h|cc)$", file)]
    said = ["%s: expected an include of %s" % (file, what)
            for file in files for what in sorted(missing(ROOT / file, headers))]
    print("\n".join(said), end="\n" if said else "", file=sys.stderr)
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
