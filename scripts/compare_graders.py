#!/usr/bin/env python3
"""Compares cambium's grades with those of math-verify and lm-evaluation-harness on the same answers.

    pip install math-verify 'antlr4-python3-runtime==4.11.0' sympy numpy
    pip install lm-eval --no-deps
    scripts/compare_graders.py --math500 math500/test.jsonl --gsm8k gsm8k/test.jsonl

Answers are made of the reference answers: in the shapes that models write, in other notations, and
wrong in ways that are nearly right. Nothing is random. Prints the counts and every disagreement;
exits 1 where more than --allowed of them are not on the list of those we want (WANTED).
"""

import argparse
import importlib.metadata
import json
import logging
import re
import subprocess
import sys
import tempfile
import types
from pathlib import Path

# Where we differ on purpose: (why, a test of gold and given answer).
WANTED = [
    ("a base is part of the number", lambda gold, given: bool(re.search(r"_\{?\d", gold))),
]

SHAPES = [
    "We compute it step by step.\n\nTherefore the result is $\\boxed{%s}$.",
    "First simplify. The answer is $%s$.",
    "So it follows.\n\n**Answer:** $\\boxed{%s}$",
    "Let us see: $1 + 1 = 2$.\n\n\\[\\boxed{%s}\\]",
    "Final Answer: The final answer is $%s$. I hope it is correct.",
]


def fraction_parts(text):
    return re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", text)


def notations(gold):
    """The same answer, written otherwise."""
    yield gold
    yield gold.replace("\\frac", "\\dfrac").replace("\\ddfrac", "\\dfrac")
    yield gold.replace(" ", "")
    yield gold.replace("(", "\\left(").replace(")", "\\right)").replace("\\left\\left", "\\left").replace(
        "\\right\\right", "\\right")
    if "pmatrix" in gold:
        yield gold.replace("pmatrix", "bmatrix")
        yield re.sub(r"(-?\d+)/(\d+)", r"\\frac{\1}{\2}", gold)
    parts = fraction_parts(gold)
    if parts:
        sign, a, b = parts.groups()
        yield f"{sign}{a}/{b}"
        yield f"\\frac{{{sign}{a}}}{{{b}}}"
        yield f"{sign}\\frac{{{2 * int(a)}}}{{{2 * int(b)}}}"
        if (10**6 * int(a)) % int(b) == 0:
            yield sign + repr(int(a) / int(b))
    if re.fullmatch(r"-?\d+", gold):
        yield gold + ".0"
        yield gold + "\\text{ units}"
        yield "x = " + gold
        if len(gold.lstrip("-")) > 3:
            yield f"{int(gold):,}"
            yield f"{int(gold):,}".replace(",", "{,}")
    if "^\\circ" in gold:
        yield gold.replace("^\\circ", "")
        yield gold.replace("^\\circ", "^{\\circ}")
        yield gold.replace("^\\circ", "\\text{ degrees}")
    if re.fullmatch(r"[-\w\\{}^ ]+ [+] [-\w\\{}^ ]+", gold) and "," not in gold:
        yield " + ".join(reversed(gold.split(" + ")))
    if re.fullmatch(r"\d*\\sqrt\{?\d+\}?", gold):
        outside, inside = re.fullmatch(r"(\d*)\\sqrt\{?(\d+)\}?", gold).groups()
        yield f"\\sqrt{{{int(outside or 1) ** 2 * int(inside)}}}"
    if re.fullmatch(r"-?\d+(, ?-?\d+)+", gold):
        yield ", ".join(reversed(re.split(", ?", gold)))
        yield "\\{" + gold + "\\}"
    if "\\text{" in gold and not re.search(r"\d", gold):
        yield re.sub(r"\\text\{(.*?)\}", r"\1", gold)
        yield gold.upper().replace("\\TEXT", "\\text")
    if "\\pm" in gold and "," not in gold:
        yield gold.replace("\\pm", "+") + ", " + gold.replace("\\pm", "-")
    if "\\infty" in gold:
        yield gold.replace("\\infty", "+\\infty").replace("-+", "-")
    match = re.fullmatch(r"\((-?\w+), ?\\infty\)", gold)
    if match:
        yield "x > " + match[1]


def wrong(gold):
    """Near misses."""
    number = re.search(r"\d+", gold)
    if number:
        yield gold[:number.start()] + str(int(number[0]) + 1) + gold[number.end():]
        yield gold + "0" if gold[-1].isdigit() else gold.replace(number[0], number[0] + "7", 1)
    if not gold.startswith(("(", "\\", "x", "y")) and not gold.startswith("-"):
        yield "-" + gold
    parts = fraction_parts(gold)
    if parts and parts[2] != parts[3]:
        yield f"{parts[1]}\\frac{{{parts[3]}}}{{{parts[2]}}}"
    if re.fullmatch(r"\([^()]*,[^()]*\)", gold):
        a, b = gold[1:-1].split(",", 1)
        if a.strip() != b.strip():
            yield f"({b.strip()}, {a.strip()})"
        yield "[" + gold[1:]
    if "+" in gold:
        yield gold.replace("+", "-", 1)
    if re.fullmatch(r"\\text\{\w+\}", gold):
        yield "\\text{none of these}"
    if "sqrt" in gold:
        yield gold.replace("\\sqrt", "", 1)


def math_cases(path):
    """(row, given, shape, response); all notations in one shape each, turn by turn."""
    turn = 0
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        seen = set()
        for given in [*notations(row["answer"]), *wrong(row["answer"])]:
            if given in seen:
                continue
            seen.add(given)
            turn += 1
            shape = SHAPES[turn % len(SHAPES)]
            yield row, given, shape, shape % given


def gsm8k_cases(path, count):
    shapes = [
        "{steps}\n#### {n}", "{steps} The answer is {n}.", "{steps}\n\nThe answer is: ${n}", "#### {n} dollars",
        "{steps}\n#### {n:,}", "{steps} So she has \\boxed{{{n}}}.", "#### {n}.00", "It is {n}. That is all.",
        "#### ${n}", "So {n} in 3 days", "{steps}\n#### {wrong}", "The answer is {wrong}.",
        "I first thought #### {wrong}\nbut it is #### {n}", "no answer", "#### -{n}",
    ]
    for i, line in enumerate(open(path, encoding="utf-8")):
        if i >= count:
            break
        row = json.loads(line)
        steps, answer = row["answer"].rsplit("\n#### ", 1)
        steps = re.sub(r"<<.*?>>", "", steps)
        value = int(answer.replace(",", ""))
        for k in range(3):
            shape = shapes[(3 * i + k) % len(shapes)]
            yield row, shape.format(steps=steps, n=value, wrong=value + 1)


def cambium_grades(binary, task, rows, responses, extraction):
    with tempfile.TemporaryDirectory() as folder:
        data, answers, out = (str(Path(folder) / name) for name in ("data.jsonl", "answers.jsonl", "grades.jsonl"))
        with open(data, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        with open(answers, "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"response": text}) + "\n" for text in responses)
        subprocess.run([binary, "eval", "--task", task, "--data", data, "-n", str(len(rows)), "--answers", answers,
                        "-o", out, "--extract", extraction], check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in open(out, encoding="utf-8")]


def harness_module(name):
    """lm_eval.tasks.NAME.utils without the data sets library, which grading does not need."""
    sys.modules.setdefault("datasets", types.SimpleNamespace(Dataset=object))
    folder = Path(importlib.metadata.distribution("lm_eval").locate_file("lm_eval"))
    module = types.ModuleType(name)
    exec(compile((folder / "tasks" / name / "utils.py").read_text(), name, "exec"), module.__dict__)
    return module


def report(title, cases, ours, theirs, show):
    """Counts, then the disagreements; returns how many we do not want."""
    both = sum(1 for a, b in zip(ours, theirs) if a == b)
    print(f"{title}: {len(ours)} answers, {sum(theirs)} right for the reference, {both} graded alike "
          f"({100 * both / len(ours):.2f} %)")
    unwanted = 0
    for case, a, b in zip(cases, ours, theirs):
        if a != b:
            gold, given = case
            why = next((why for why, test in WANTED if test(gold, given)), None)
            unwanted += why is None
            if show:
                print(f"  {'ours right ' if a else 'theirs right'}  gold {gold!r}  given {given!r}"
                      + (f"  [{why}]" if why else ""))
    return unwanted


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cambium", default="build/cambium")
    options.add_argument("--math500", help="JSON lines with problem, solution, answer")
    options.add_argument("--gsm8k", help="JSON lines with question, answer")
    options.add_argument("--gsm8k-count", type=int, default=1319)
    options.add_argument("--allowed", type=int, default=25, help="disagreements that are not on the list")
    options.add_argument("--quiet", action="store_true", help="counts only")
    a = options.parse_args()
    logging.disable(logging.ERROR)
    unwanted = 0
    if a.math500:
        from math_verify import parse, verify

        cases = list(math_cases(a.math500))
        rows = [case[0] for case in cases]
        responses = [case[3] for case in cases]
        pairs = [(row["answer"], given) for row, given, _, _ in cases]
        ours = [g["correct"] for g in cambium_grades(a.cambium, "math500", rows, responses, "own")]
        gold = {row["answer"]: parse("$" + row["answer"] + "$") for row in rows}
        theirs = [bool(verify(gold[row["answer"]], parse(text))) for row, text in zip(rows, responses)]
        unwanted += report("MATH500, math-verify " + importlib.metadata.version("math-verify"), pairs, ours, theirs,
                           not a.quiet)
        hendrycks = harness_module("hendrycks_math")
        theirs = [bool(hendrycks.process_results({"solution": "\\boxed{" + row["answer"] + "}"}, [text])["exact_match"])
                  for row, text in zip(rows, responses)]
        ours = [g["correct"] for g in cambium_grades(a.cambium, "math500", rows, responses, "hendrycks")]
        unwanted += report("MATH500, hendrycks_math of lm-eval " + importlib.metadata.version("lm-eval"), pairs, ours,
                           theirs, not a.quiet)
        minerva = harness_module("minerva_math")
        chosen = [i for i, case in enumerate(cases) if case[2] == SHAPES[4]]
        theirs = [minerva.is_equiv(minerva.normalize_final_answer(minerva.get_unnormalized_answer(responses[i])),
                                   minerva.normalize_final_answer(rows[i]["answer"])) for i in chosen]
        ours = [g["correct"] for g in cambium_grades(a.cambium, "math500", [rows[i] for i in chosen],
                                                     [responses[i] for i in chosen], "minerva")]
        unwanted += report("MATH500, minerva_math", [pairs[i] for i in chosen], ours, [bool(t) for t in theirs],
                           not a.quiet)
    if a.gsm8k:
        cases = list(gsm8k_cases(a.gsm8k, a.gsm8k_count))
        rows, responses = [c[0] for c in cases], [c[1] for c in cases]
        for name, pattern, choose in (("strict", r"#### (\-?[0-9\.\,]+)", 0),
                                      ("flexible", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)):
            theirs = []
            for row, text in zip(rows, responses):
                # lm_eval/filters/extraction.py RegexFilter and api/metrics.py exact_match, of gsm8k.yaml
                found = re.findall(pattern, text)
                found = found[choose] if found else "[invalid]"
                found = next((part for part in found if part), "[invalid]") if isinstance(found, tuple) else found
                both = [found.strip(), row["answer"]]
                for ignored in (",", r"\$", "(?s).*#### ", r"\.$"):
                    both = [re.sub(ignored, "", part) for part in both]
                theirs.append(both[0].lower() == both[1].lower())
            ours = [g["correct"] for g in cambium_grades(a.cambium, "gsm8k", rows, responses, name)]
            pairs = [(row["answer"].rsplit(" ", 1)[1], text[-60:]) for row, text in zip(rows, responses)]
            unwanted += report(f"GSM8K, {name} of lm-eval", pairs, ours, theirs, not a.quiet)
    print(f"{unwanted} disagreements that are not on the list")
    return 1 if unwanted > a.allowed else 0


if __name__ == "__main__":
    sys.exit(main())
