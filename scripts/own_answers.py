#!/usr/bin/env python3
"""A model's own answers to the public training questions of GSM8K and MBPP, as documents.

  own_answers.py prompts --gsm8k train.jsonl --mbpp sanitized-mbpp.json -o prompts.jsonl
  cambium generate MODEL -i prompts.jsonl -o answers.jsonl -n 512 --temperature 0.7 --batch 1024
  own_answers.py split answers.jsonl --train train.jsonl --valid valid.jsonl

Held out are questions, never answers: the last GSM8K ones of the training file and MBPP's own
validation questions. They come first in prompts.jsonl, the others after them in a fixed random
order, so that its first lines are a fair share of the whole. `--also` adds the questions of other
files to train on, of ASDiv, SVAMP or MAWPS for instance. MBPP's tasks 11 to 510, its test
questions, are in neither; `own_answers.py mbpp-test` writes them to a file for `cambium eval`.
"""
import argparse
import json
import random

MBPP_TEST, MBPP_VALID, MBPP_TRAIN = (11, 510), (511, 600), (601, 974)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def mbpp_tasks(path, numbers):
    with open(path, encoding="utf-8") as f:
        return [task for task in json.load(f) if numbers[0] <= task["task_id"] <= numbers[1]]


def mbpp_question(task):
    """As `cambium eval --task mbpp` asks it."""
    tests = "".join(test + "\n" for test in task["test_list"])
    return (f"{task['prompt']}\n\nWrite it in Python so that these tests pass:\n\n"
            f"```python\n{tests}```\n\nGive the code alone, in one ```python block.")


def prompts(args):
    def row(split, question):
        return {"prompt": [{"role": "user", "content": question}], "split": split}

    def question(line):
        """Of GSM8K, ASDiv, SVAMP (where a text comes before it) and MAWPS."""
        line = {key.lower(): value for key, value in line.items()}
        asked = line.get("question") or line["input"]
        return f"{line['body'].strip().rstrip('.')}. {asked}" if line.get("body") else asked

    gsm8k = [line["question"] for line in read_lines(args.gsm8k)]
    cut = len(gsm8k) - args.held_out
    if cut <= 0:
        raise SystemExit(f"{args.gsm8k}: expected more than {args.held_out} questions, "
                         f"got {len(gsm8k)}; give --held-out a smaller number")
    mbpp = [mbpp_question(task) for task in mbpp_tasks(args.mbpp, MBPP_TRAIN)]
    valid = gsm8k[cut:] + [mbpp_question(task) for task in mbpp_tasks(args.mbpp, MBPP_VALID)]
    also = [question(line) for path in args.also for line in read_lines(path)]
    train = gsm8k[:cut] + also + mbpp * args.mbpp_answers
    shuffle = random.Random(1).shuffle
    shuffle(valid)
    shuffle(train)
    write_lines(args.output, [row("valid", q) for q in valid] + [row("train", q) for q in train])
    print(f"{args.output}: {len(valid)} questions held out, {len(train)} to train on")


def split(args):
    """Answers that ended by themselves; those cut off would teach to stop there."""
    files = {"train": [], "valid": []}
    cut = 0
    for row in read_lines(args.answers):
        if row.get("finish_reason") == "stop" and row["completion"][0]["content"].strip():
            files[row["split"]].append({key: row[key] for key in ("prompt", "completion")})
        else:
            cut += 1
    for name, path in (("train", args.train), ("valid", args.valid)):
        write_lines(path, files[name])
    print(f"{len(files['train'])} answers to train on, {len(files['valid'])} held out, "
          f"{cut} left out: cut off or empty")


def mbpp_test(args):
    tasks = mbpp_tasks(args.mbpp, MBPP_TEST)
    with open(args.output, "w", encoding="utf-8") as f:
        json.dump(tasks, f)
    print(f"{args.output}: {len(tasks)} test questions")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    p = commands.add_parser("prompts", help="questions for cambium generate")
    p.add_argument("--gsm8k", required=True, help="GSM8K's training file")
    p.add_argument("--mbpp", required=True, help="sanitized-mbpp.json")
    p.add_argument("--also", nargs="*", default=[], help="more questions to train on")
    p.add_argument("--held-out", type=int, default=240, help="GSM8K questions to hold out")
    p.add_argument("--mbpp-answers", type=int, default=8, help="answers to each MBPP question")
    p.add_argument("-o", "--output", required=True)
    p.set_defaults(run=prompts)
    p = commands.add_parser("split", help="answers of cambium generate to training files")
    p.add_argument("answers")
    p.add_argument("--train", required=True)
    p.add_argument("--valid", required=True)
    p.set_defaults(run=split)
    p = commands.add_parser("mbpp-test", help="MBPP's test questions alone")
    p.add_argument("--mbpp", required=True, help="sanitized-mbpp.json")
    p.add_argument("-o", "--output", required=True)
    p.set_defaults(run=mbpp_test)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
