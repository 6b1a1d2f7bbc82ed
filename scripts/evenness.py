#!/usr/bin/env python3
"""The house rules of spelling that a machine can check, over the files given or all sources.

  scripts/evenness.py [--fix] [FILES]

- int64_t, size_t and their like without std::
- the body of every if, else, for, while and do stands in braces
- in src/, includes name a header from its room on ("ops/norm/norm.h")
- messages of errors start small and end without a full stop; those of operations, tensors and the
  cache name themselves first: "[rms_norm] expected ..., got ..."
- tests get the message of an Error from base/testing.h, not by a helper of their own

--fix mends the first two; clang-format lays out what it wrote.
"""
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
SPELLED = re.compile(r"std::(u?int(?:_fast|_least)?(?:8|16|32|64)_t|u?intptr_t|size_t|ptrdiff_t)\b")
BODY = re.compile(r"\b(?:(if|for|while|switch)\s*(?:constexpr\s*)?(?=\()|(else|do)\b)")
MESSAGE = re.compile(r"\b(?:expect|fail)\s*\(")
BRACKETED = ("src/ops/", "src/tensor/", "src/serve/")


def blank(text):
    """The text with comments, strings and preprocessor lines as spaces, at the same places."""
    out = list(text)
    pattern = re.compile(
        r'//(?:[^\\\n]|\\.)*|/\*.*?\*/|R"([^()\\ ]{0,16})\(.*?\)\1"|"(?:\\.|[^"\\\n])*"'
        r"|(?<![0-9a-fA-F])'(?:\\.|[^'\\\n])+'|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*",
        re.S | re.M)
    for found in pattern.finditer(text):
        for i in range(*found.span()):
            if out[i] != "\n":
                out[i] = " "
    return "".join(out)


def closing(code, at, open_, close):
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] == open_) - (code[i] == close)
        if depth == 0:
            return i
    return len(code) - 1


def skip_space(code, at):
    """Past spaces and attributes such as [[unlikely]]."""
    while at < len(code) and (code[at].isspace() or code.startswith("[[", at)):
        at = code.index("]]", at) + 2 if code[at] == "[" else at + 1
    return at


def statement_end(code, at):
    """One past the statement that begins at `at`."""
    at = skip_space(code, at)
    if code[at] == "{":
        return closing(code, at, "{", "}") + 1
    found = BODY.match(code, at)
    if found:
        if found[1]:
            end = statement_end(code, closing(code, found.end(), "(", ")") + 1)
            follow = skip_space(code, end)
            if found[1] == "if" and re.match(r"else\b", code[follow:follow + 5]):
                end = statement_end(code, follow + 4)
            return end
        end = statement_end(code, found.end())
        return code.index(";", end) + 1 if found[2] == "do" else end
    depth = 0
    for i in range(at, len(code)):
        depth += (code[i] in "([{") - (code[i] in ")]}")
        if code[i] == ";" and depth == 0:
            return i + 1
    return len(code)


def bare_bodies(code):
    """(begin, end) of every body without braces."""
    bodies = []
    for found in BODY.finditer(code):
        if found[1] == "switch":
            continue
        start = found.end()
        if found[1]:
            start = closing(code, start, "(", ")") + 1
        begin = skip_space(code, start)
        if begin >= len(code) or code[begin] == "{":
            continue
        if found[1] == "while" and code[begin] == ";":
            continue  # of do
        if found[2] == "else" and re.match(r"if\b", code[begin:begin + 3]):
            continue
        bodies.append((begin, statement_end(code, begin)))
    return bodies


def with_braces(text, bodies):
    marks = [(end, 0, "\n}") for _, end in bodies] + [(begin, 1, "{\n") for begin, _ in bodies]
    # From the back; of bodies that end together the inner closes first.
    for at, _, mark in sorted(marks, key=lambda m: (m[0], m[1]), reverse=True):
        if mark == "\n}":
            # A comment after the statement stays with it.
            line_end = text.index("\n", at) if "\n" in text[at:] else len(text)
            rest = text[at:line_end]
            at = line_end if rest.strip().startswith("//") else at
        text = text[:at] + mark + text[at:]
    return text


def line_of(text, at):
    return text.count("\n", 0, at) + 1


def message_at(text, code, at):
    """The message of the call of expect or fail whose bracket stands at `at`; None if it has none."""
    end = closing(code, at, "(", ")")
    if not text[:at].rstrip().endswith("fail"):  # after the condition
        depth = 0
        for at in range(at, end):
            depth += (code[at] in "([{") - (code[at] in ")]}")
            if code[at] == "," and depth == 1:
                break
    pieces = re.match(r'.\s*("(?:\\.|[^"\\])*"(?:\s*"(?:\\.|[^"\\])*")*)', text[at:end], re.S)
    return pieces and "".join(re.findall(r'"((?:\\.|[^"\\])*)"', pieces[1]))


def faults(name, text, code):
    for found in SPELLED.finditer(code):
        yield line_of(text, found.start()), f"expected {found[1]}, got {found[0]}"
    for begin, _ in bare_bodies(code):
        yield line_of(text, begin), "expected braces around the body"
    if name.startswith("src/"):
        for found in re.finditer(r'^#include "([^"]+)"', text, re.M):
            if not (ROOT / "src" / found[1]).is_file():
                yield line_of(text, found.start()), f"expected a path from src/ on, got {found[1]}"
    for found in re.finditer(r"catch \(const Error& (\w+)\) \{\s*return [^;]*\b\1\.what\(\)", text):
        tried = text[text.rfind("try {", 0, found.start()):found.start()]
        if name != "src/base/testing.h" and "return" not in tried and "test" in name:
            yield (line_of(text, found.start()),
                   "expected error_of or message_of of base/testing.h, got a catch of its own")
    if not name.startswith("src/") or re.search(r"test", name):
        return
    for found in MESSAGE.finditer(code):
        at = code.index("(", found.start())
        message = message_at(text, code, at)
        if not message:
            continue
        if re.match(r"[A-Z][a-z]", message) or re.search(r"[a-z}]\.$", message):
            yield line_of(text, at), f'expected a small first letter and no full stop: "{message}"'
        if name.startswith(BRACKETED) and not re.match(r"\[[a-z_0-9{} ]+\] |--", message):
            yield line_of(text, at), f'expected "[who] expected ..., got ...", got "{message}"'


def main():
    given = sys.argv[1:]
    fix = "--fix" in given
    names = [name for name in given if name != "--fix"]
    if not names:
        names = subprocess.run(["git", "ls-files", "*.h", "*.cc"], cwd=ROOT, check=True,
                               capture_output=True, text=True).stdout.split()
    status = 0
    for name in names:
        path = ROOT / name
        text = path.read_text()
        if fix:
            code = blank(text)
            for found in reversed(list(SPELLED.finditer(code))):
                text = text[:found.start()] + found[1] + text[found.end():]
            text = with_braces(text, bare_bodies(blank(text)))
            if text != path.read_text():
                path.write_text(text)
        for line, fault in sorted(faults(name, text, blank(text))):
            print(f"{name}:{line}: {fault}", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
