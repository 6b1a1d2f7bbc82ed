#!/usr/bin/env python3
"""A model's own answers to the public training questions of GSM8K and MBPP, as documents.

  own_answers.py prompts --gsm8k train.jsonl --mbpp sanitized-mbpp.json -o prompts.jsonl
  cambium generate MODEL -i prompts.jsonl -o answers.jsonl -n 512 --temperature 0.7 --batch 1024
  own_answers.py split answers.jsonl --train train.jsonl --valid valid.jsonl
  own_answers.py long train.jsonl --documents 3000 --tokens 8192 --seed 1 -o long.jsonl

Held out are questions, never answers: the last GSM8K ones of the training file and MBPP's own
validation questions. They come first in prompts.jsonl, the others after them in a fixed random
order, so that its first lines are a fair share of the whole. `--also` adds the questions of other
files to train on, of ASDiv, SVAMP or MAWPS for instance. MBPP's tasks 11 to 510, its test
questions, are in neither; `own_answers.py mbpp-test` writes them to a file for `cambium eval`.

`long` makes documents that can only be answered by looking far back: lists with questions about
their rows, numbered passages to be written again, conversations that come back to an earlier
question, and notes among text that has nothing to do with them (`--notes`, the share of these; 0
draws the same documents as before there were any). No wording is that of the retrieval tasks of
`cambium eval`. They come first in the output, or among the short documents in a random order with
`--among`.
"""
import argparse
import json
import random
import re

MBPP_TEST, MBPP_VALID, MBPP_TRAIN = (11, 510), (511, 600), (601, 974)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f if line.strip()]


def write_lines(path, rows):
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_drawn(description, draw):
    """The command of a script that draws questions: `draw(rng)` gives one, or None for none this time."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=4000, help="questions, all different (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--output", required=True)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    questions = {}
    for _ in range(50 * args.n):
        if len(questions) == args.n:
            break
        if (drawn := draw(rng)) is not None:
            questions[drawn] = True
    if len(questions) < args.n:
        raise SystemExit(f"only {len(questions)} different questions were found; give -n {len(questions)} or fewer")
    write_lines(args.output, [{"question": question} for question in questions])
    print(f"{args.output}: {len(questions)} questions")


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


NAMES = """Ada Bruno Chloe Dario Elena Farid Greta Hamid Iris Jonas Kemal Lotte Mateo Nadia Oskar
Petra Quinn Renzo Salma Tariq Ulla Viktor Wanda Xenia Yusuf Zelda""".split()
FAMILIES = """Abel Brandt Cruz Dorn Engel Fuchs Gallo Hansen Ivanov Jansen Keller Lorenz Moreau Novak
Olsen Peters Quist Rossi Silva Toth Unger Vargas Weber Young Zorn""".split()
TOWNS = """Arles Bergen Cadiz Delft Exeter Faro Gdansk Hobart Ithaca Jena Kyoto Lima Malmo Nantes Oslo
Porto Quito Riga Split Turin Utrecht Verona Warsaw York Zagreb""".split()


def number(rng, digits):
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def code(rng):
    return "".join(rng.choice("BCDFGHJKLMNPQRSTVWXZ") for _ in range(3)) + "-" + number(rng, 3)


def person(rng):
    return f"{rng.choice(NAMES)} {rng.choice(FAMILIES)}"


# What a list is of: how a key and a value are drawn, a row, a question and its answer.
LISTS = [
    ("Here are the lockers of our members.", person, lambda rng: number(rng, 4),
     "{k} uses locker {v}.", "Which locker does {k} use?", "{v}"),
    ("Orders and where they go:", lambda rng: number(rng, 6), lambda rng: rng.choice(TOWNS),
     "| {k} | {v} |", "Where does order {k} go?", "{v}"),
    ("The stock of a shop, as JSON:", code, lambda rng: number(rng, 3),
     '"{k}": {v},', "What number stands at {k}?", "{v}"),
    ("Phone book:", person, lambda rng: number(rng, 7), "{k}: {v}", "What is the number of {k}?",
     "{v}"),
    ("Codes given out today:", lambda rng: number(rng, 5), code, "Visitor {k} got code {v}.",
     "Which code did visitor {k} get?", "Code {v}."),
]


def estimated_tokens(text):
    """More rather than fewer: digits and signs one each, words by their length."""
    return sum(1 if len(part) == 1 else -(-len(part) // 4)
               for part in re.findall(r"\d|[^\W\d_]+|[^\w\s]|_|\n", text))


def turns(pairs):
    return {"messages": [{"role": role, "content": text} for pair in pairs
                         for role, text in zip(("user", "assistant"), pair)]}


def list_document(rng, tokens, _):
    title, key, value, row, question, answer = rng.choice(LISTS)
    asked = rng.randint(4, 16)
    rows, used, taken = {}, asked * 40, 0
    while used < tokens and taken < 1000:  # there are 650 names: such a list ends when all are in it
        k = key(rng)
        taken = taken + 1 if k in rows else 0
        if taken:
            continue
        rows[k] = value(rng)
        used += estimated_tokens(row.format(k=k, v=rows[k])) + 1
    text = title + "\n\n" + "\n".join(row.format(k=k, v=v) for k, v in rows.items()) + "\n\n"
    pairs = [(question.format(k=k), answer.format(v=rows[k]))
             for k in rng.sample(sorted(rows), min(asked, len(rows)))]
    return turns([(text + pairs[0][0], pairs[0][1])] + pairs[1:])


def question_and_answer(row):
    return row["prompt"][-1]["content"], row["completion"][0]["content"]


def passage_document(rng, tokens, rows):
    passages, used = [], 0
    while used < tokens * 0.75 or len(passages) < 2:
        passages.append(rng.choice(question_and_answer(rng.choice(rows))))
        used += estimated_tokens(passages[-1]) + 6
    text = "\n\n".join(f"Passage {i + 1}\n{p}" for i, p in enumerate(passages))
    pairs, room = [], tokens - used
    for i in rng.sample(range(len(passages)), len(passages)):
        room -= estimated_tokens(passages[i]) + 30
        if pairs and room < 0:
            break
        pairs.append((f"Write passage {i + 1} again, word for word.", passages[i]))
    return turns([(text + "\n\n" + pairs[0][0], pairs[0][1])] + pairs[1:])


def conversation(rng, tokens, rows):
    pairs, used = [], 0
    while used < tokens * 0.8 or len(pairs) < 2:
        pairs.append(question_and_answer(rng.choice(rows)))
        used += estimated_tokens("".join(pairs[-1])) + 12
    back = []
    for i in rng.sample(range(len(pairs)), len(pairs)):
        used += estimated_tokens(pairs[i][0]) + 30
        if back and used > tokens:
            break
        back.append((f"What was my question number {i + 1}? Say it word for word.", pairs[i][0]))
    return turns(pairs + back)


# A note, what is asked of it, and what is asked where it is the only one.
NOTES = [
    ("({who}'s door code is {v}.)", "Which door code does {who} have?", "Which door code is mentioned?",
     lambda rng: number(rng, rng.randint(3, 8))),
    ("By the way, parcel {v} is for {who}.", "Which parcel is for {who}?", "Which parcel was spoken of?", code),
    ("Reminder: {who} sits in room {v} this week.", "In which room does {who} sit?",
     "Which room was in the reminder?", lambda rng: number(rng, 3)),
    ("{who} asked to be called back on {v}.", "On which number does {who} want to be called back?",
     "Somebody asked to be called back. On which number?", lambda rng: number(rng, rng.randint(5, 7))),
    ("P.S. {who} has moved to {v}.", "Where has {who} moved to?", "Somebody has moved. Where to?",
     lambda rng: rng.choice(TOWNS)),
]


def note_document(rng, tokens, rows):
    """Some of one kind, in text of many passages or of a few that come again and again."""
    note, question, only, value = rng.choice(NOTES)
    owners = rng.sample([f"{name} {family}" for name in NAMES for family in FAMILIES], rng.choice((1, 1, 2, 4, 8)))
    notes = {who: value(rng) for who in owners}
    used = sum(estimated_tokens(note.format(who=who, v=v)) + 60 for who, v in notes.items())
    few = rng.sample(rows, min(len(rows), rng.choice((1, 3, 9)))) if rng.random() < 0.5 else rows
    parts = []
    while used < tokens or not parts:
        parts.append(rng.choice(question_and_answer(rng.choice(few))))
        used += estimated_tokens(parts[-1]) + 1
    for who, v in notes.items():
        parts.insert(rng.randint(0, len(parts)), note.format(who=who, v=v))
    asked = rng.sample(owners, len(owners))
    pairs = [((only if len(owners) == 1 else question).format(who=who), notes[who]) for who in asked]
    return turns([("\n\n".join(parts) + "\n\n" + pairs[0][0], pairs[0][1])] + pairs[1:])


def long(args):
    rng = random.Random(args.seed)
    rows = read_lines(args.answers)
    made = []
    for _ in range(args.documents):
        tokens = int(args.tokens * 0.9 * 8 ** (rng.random() - 1))  # as many of each octave
        form = (note_document if args.notes > 0 and rng.random() < args.notes
                else rng.choice((list_document, passage_document, conversation)))
        made.append(form(rng, tokens, rows))
    if args.among:
        made += rows
        rng.shuffle(made)
    write_lines(args.output, made)
    print(f"{args.output}: {len(made)} documents, {args.documents} of them long")


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
    p = commands.add_parser("long", help="documents that ask for what stands far back")
    p.add_argument("answers", help="short documents of `split`, which they are made of")
    p.add_argument("--documents", type=int, default=3000)
    p.add_argument("--tokens", type=int, default=8192, help="of the longest; the shortest an eighth")
    p.add_argument("--notes", type=float, default=0.25,
                   help="share of the long ones that ask for notes among other text (default: %(default)s)")
    p.add_argument("--among", action="store_true", help="the short documents too, in random order")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("-o", "--output", required=True)
    p.set_defaults(run=long)
    p = commands.add_parser("mbpp-test", help="MBPP's test questions alone")
    p.add_argument("--mbpp", required=True, help="sanitized-mbpp.json")
    p.add_argument("-o", "--output", required=True)
    p.set_defaults(run=mbpp_test)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
