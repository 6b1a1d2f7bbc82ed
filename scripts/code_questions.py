#!/usr/bin/env python3
"""Small programming tasks with their tests, drawn by chance, for a model to answer with code.

  code_questions.py -n 4000 --seed 1 -o code.jsonl
  own_answers.py prompts --gsm8k train.jsonl --mbpp sanitized-mbpp.json --also code.jsonl -o prompts.jsonl

MBPP has 120 training tasks beside GSM8K's 7,473 questions, so a hybrid that is healed on the answers to
both sees little code. These ask as `cambium eval --task mbpp` asks, with three tests that a function
here passes. What is learned is how the teacher answers, right or wrong. None is taken from a benchmark:
forms are ours, numbers and texts drawn.
"""
import math
from collections import Counter

from own_answers import mbpp_question, write_drawn

WORDS = """amber basin candle dune ember fjord garden harbor island jungle kettle lantern meadow nectar
orchard pepper quartz river saddle timber umber valley willow yellow zephyr apple eel iris oak""".split()


def prime(n):
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def digits(n):
    return sum(map(int, str(abs(n))))


def numbers(rng, low=-20, high=60, least=4, most=9):
    return [rng.randint(low, high) for _ in range(rng.randint(least, most))]


def words(rng, least=3, most=6):
    return [rng.choice(WORDS) for _ in range(rng.randint(least, most))]


def text(rng):
    return " ".join(w.title() if rng.random() < 0.3 else w for w in words(rng)) + rng.choice(["", "", " 7", "!", " 42"])


def pairs(rng):
    return [(rng.choice(WORDS), rng.randint(1, 30)) for _ in range(rng.randint(3, 5))]


def table(rng, rows, columns):
    return [[rng.randint(0, 20) for _ in range(columns)] for _ in range(rows)]


def counts(rng):
    return {w: rng.randint(1, 40) for w in rng.sample(WORDS, rng.randint(3, 5))}


# Of a list of whole numbers: which are kept, what becomes of them, what is given.
def chosen(rng):
    k, a = rng.randint(2, 12), rng.randint(-5, 20)
    b = a + rng.randint(5, 30)
    keep, kept = rng.choice([
        ("the even numbers", lambda x: x % 2 == 0), ("the odd numbers", lambda x: x % 2 == 1),
        (f"the numbers greater than {k}", lambda x: x > k), ("the negative numbers", lambda x: x < 0),
        (f"the multiples of {k}", lambda x: x % k == 0), ("the prime numbers", prime),
        (f"the numbers from {a} to {b}, both included", lambda x: a <= x <= b),
        ("the numbers whose digits add up to an even number", lambda x: digits(x) % 2 == 0),
        ("the numbers that are larger than the average of the list", None)])
    turn, turned = rng.choice([("", lambda x: x), ("", lambda x: x), (" squared", lambda x: x * x), (" doubled", lambda x: 2 * x),
                               (f" plus {k}", lambda x: x + k), (" cubed", lambda x: x**3)])
    give, given = rng.choice([
        ("the sum of", sum), ("the number of", len), ("the largest of", lambda v: max(v, default=None)),
        ("the smallest of", lambda v: min(v, default=None)), ("the sorted list of", sorted),
        ("the list, from last to first, of", lambda v: v[::-1]), ("the product of", math.prod),
        ("the sorted list without duplicates of", lambda v: sorted(set(v)))])

    def solve(v):
        return given([turned(x) for x in v if (kept(x) if kept else x > sum(v) / len(v))])
    note = " Return None if there is none." if "est of" in give else ""
    return f"return {give} {keep}{turn} in a list of integers.{note}", solve, lambda: (numbers(rng),)


def of_lists(rng):
    k = rng.randint(2, 4)
    one = [
        (f"split a list into pieces of {k} elements; the last piece may be shorter.", lambda v: [v[i:i + k] for i in range(0, len(v), k)]),
        (f"rotate a list to the left by {k} places.", lambda v: v[k % len(v):] + v[:k % len(v)]),
        (f"find the largest sum of {k} neighbouring elements of a list.", lambda v: max(sum(v[i:i + k]) for i in range(len(v) - k + 1))),
        ("compute the running totals of a list of numbers.", lambda v: [sum(v[:i + 1]) for i in range(len(v))]),
        ("find the second largest distinct number of a list.", lambda v: sorted(set(v))[-2]),
        ("remove duplicates from a list and keep the order of first appearance.", lambda v: list(dict.fromkeys(v))),
        ("find the largest difference between two neighbouring elements of a list.", lambda v: max(abs(x - y) for x, y in zip(v, v[1:]))),
        ("put all zeros of a list at its end without changing the order of the others.", lambda v: [x for x in v if x] + [x for x in v if not x]),
        (f"return every element of a list at a position divisible by {k}, counted from zero.", lambda v: v[::k]),
        ("count how often the sign changes between neighbouring elements of a list.", lambda v: sum(x * y < 0 for x, y in zip(v, v[1:]))),
        ("separate a list of numbers into a tuple of two lists, the even and the odd ones.", lambda v: ([x for x in v if x % 2 == 0], [x for x in v if x % 2])),
        ("check whether a list of numbers never decreases.", lambda v: all(x <= y for x, y in zip(v, v[1:]))),
        ("find the median of a list of numbers.", lambda v: sorted(v)[len(v) // 2] if len(v) % 2 else (sorted(v)[len(v) // 2 - 1] + sorted(v)[len(v) // 2]) / 2),
        ("return the positions of the largest element of a list.", lambda v: [i for i, x in enumerate(v) if x == max(v)])]
    two = [
        ("add two lists of numbers element by element; the longer one is cut.", lambda v, w: [x + y for x, y in zip(v, w)]),
        ("return the elements of the first list that are not in the second, in their order.", lambda v, w: [x for x in v if x not in w]),
        ("merge two lists into one sorted list.", lambda v, w: sorted(v + w)),
        ("take elements of two lists by turns; the longer one is cut.", lambda v, w: [x for pair in zip(v, w) for x in pair]),
        ("compute the dot product of two lists of numbers; the longer one is cut.", lambda v, w: sum(x * y for x, y in zip(v, w))),
        ("count the positions at which two lists agree.", lambda v, w: sum(x == y for x, y in zip(v, w)))]
    if rng.random() < 0.7:
        return *rng.choice(one), lambda: (numbers(rng, *rng.choice([(-20, 60), (0, 4), (0, 9)]), least=5),)
    return *rng.choice(two), lambda: (numbers(rng, 0, 9), numbers(rng, 0, 9))


def of_texts(rng):
    k, c, d = rng.randint(2, 6), rng.choice("aeilnorst"), rng.choice("-_*#")
    return *rng.choice([
        ("count the vowels in a string.", lambda s: sum(x in "aeiouAEIOU" for x in s)),
        ("reverse the order of the words in a string.", lambda s: " ".join(s.split()[::-1])),
        (f"remove every '{c}' from a string.", lambda s: s.replace(c, "")),
        (f"count the words of a string that have more than {k} characters.", lambda s: sum(len(w) > k for w in s.split())),
        (f"replace the spaces of a string by '{d}'.", lambda s: s.replace(" ", d)),
        ("return the longest word of a string, the first one of several.", lambda s: max(s.split(), key=len)),
        ("count the upper case letters of a string.", lambda s: sum(x.isupper() for x in s)),
        ("return the first character that occurs again later in a string, or None.", lambda s: next((x for i, x in enumerate(s) if x in s[i + 1:]), None)),
        ("swap upper and lower case in a string.", lambda s: s.swapcase()),
        (f"return the words of a string that begin with '{c}', whatever their case.", lambda s: [w for w in s.split() if w[0].lower() == c]),
        ("check whether a string reads the same backwards, without spaces and whatever its case.", lambda s: (t := s.replace(" ", "").lower()) == t[::-1]),
        (f"return every {k}th character of a string, beginning with the first.", lambda s: s[::k]),
        ("sort the words of a string by their length; equal lengths keep their order.", lambda s: sorted(s.split(), key=len)),
        ("write each word of a string backwards and keep the order of the words.", lambda s: " ".join(w[::-1] for w in s.split())),
        ("count how often each letter occurs in a string, without spaces, as a dictionary.", lambda s: dict(Counter(s.replace(" ", "")))),
        ("extract the numbers in a string as a list of integers.", lambda s: [int(w) for w in s.split() if w.isdigit()]),
        ("return the initial letters of the words of a string in upper case.", lambda s: "".join(w[0] for w in s.split()).upper()),
        (f"find the position of the last '{c}' in a string, or -1.", lambda s: s.rfind(c)),
        ("turn the words of a string into one name in snake case.", lambda s: "_".join(s.lower().split())),
        ("count the characters of a string that are not letters.", lambda s: sum(not x.isalpha() for x in s))]), lambda: (text(rng),)


def of_a_number(rng):
    k, b = rng.randint(2, 9), rng.randint(2, 8)

    def base(n):
        return base(n // b) + str(n % b) if n >= b else str(n)

    def steps(n):
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)
    return *rng.choice([
        ("add up the digits of a positive integer.", digits),
        ("write the digits of a positive integer in reverse order, as an integer.", lambda n: int(str(n)[::-1])),
        ("count the divisors of a positive integer.", lambda n: sum(n % d == 0 for d in range(1, n + 1))),
        ("find the largest prime factor of an integer above one.", lambda n: max(p for p in range(2, n + 1) if n % p == 0 and prime(p))),
        ("list the prime numbers up to and including n.", lambda n: [p for p in range(n + 1) if prime(p)]),
        (f"write a positive integer in base {b}, as a string.", base),
        ("count the ones in the binary form of a positive integer.", lambda n: bin(n).count("1")),
        ("count the steps of the Collatz sequence from n to one.", steps),
        (f"add up the numbers from 1 to n that are divisible by {k}.", lambda n: sum(range(k, n + 1, k))),
        (f"find the smallest multiple of {k} that is larger than n.", lambda n: (n // k + 1) * k),
        ("compute the sum of the squares of the first n odd numbers.", lambda n: sum((2 * i + 1)**2 for i in range(n))),
        ("check whether a number is the sum of its proper divisors.", lambda n: n == sum(d for d in range(1, n) if n % d == 0)),
        ("compute the n-th triangular number.", lambda n: n * (n + 1) // 2),
        ("find the product of the digits of a positive integer that are not zero.", lambda n: math.prod(int(d) for d in str(n) if d != "0")),
        (f"check whether the last digit of a number is divisible by {k}.", lambda n: n % 10 % k == 0),
        ("find the largest power of two that is at most n.", lambda n: 1 << (n.bit_length() - 1))]), lambda: (rng.randint(2, 120),)


def of_records(rng):
    k = rng.randint(5, 20)
    return rng.choice([
        ("sort a list of (name, value) tuples by value, the largest first; equal values keep their order.", lambda v: sorted(v, key=lambda p: -p[1]), lambda: (pairs(rng),)),
        ("return the names of the (name, value) tuples whose value is at least " + str(k) + ".", lambda v: [n for n, x in v if x >= k], lambda: (pairs(rng),)),
        ("add up the values of equal names in a list of (name, value) tuples, as a dictionary.", lambda v: {n: sum(x for m, x in v if m == n) for n, _ in v}, lambda: (pairs(rng),)),
        ("turn a list of (name, value) tuples into a tuple of two lists.", lambda v: ([n for n, _ in v], [x for _, x in v]), lambda: (pairs(rng),)),
        ("keep the entries of a dictionary whose value is above " + str(k) + ".", lambda d: {n: x for n, x in d.items() if x > k}, lambda: (counts(rng),)),
        ("find the key with the largest value of a dictionary, the first one of several.", lambda d: max(d, key=d.get), lambda: (counts(rng),)),
        ("add the values of two dictionaries; a key may be in one alone.", lambda d, e: {n: d.get(n, 0) + e.get(n, 0) for n in [*d, *e]}, lambda: (counts(rng), counts(rng))),
        ("return the keys of a dictionary sorted by their values.", lambda d: sorted(d, key=d.get), lambda: (dict(zip(rng.sample(WORDS, 4), rng.sample(range(40), 4))),)),
        ("group a list of words by their length, as a dictionary of lists.", lambda v: {n: [w for w in v if len(w) == n] for n in dict.fromkeys(map(len, v))}, lambda: (words(rng),)),
        ("return the word that occurs most often in a list, the first one of several.", lambda v: max(v, key=v.count), lambda: (words(rng) + words(rng),)),
        ("transpose a matrix given as a list of rows.", lambda m: [list(c) for c in zip(*m)], lambda: (table(rng, rng.randint(2, 3), rng.randint(2, 4)),)),
        ("add up each row of a matrix given as a list of rows.", lambda m: [sum(r) for r in m], lambda: (table(rng, 3, rng.randint(2, 4)),)),
        ("add up the main diagonal of a square matrix.", lambda m: sum(m[i][i] for i in range(len(m))), lambda: (table(rng, 3, 3),)),
        ("find the largest element of each column of a matrix.", lambda m: [max(c) for c in zip(*m)], lambda: (table(rng, 3, rng.randint(2, 4)),)),
        ("flatten a list of lists into one list.", lambda m: [x for r in m for x in r], lambda: (table(rng, 3, rng.randint(1, 3)),)),
        (f"multiply every element of a matrix by {k}.", lambda m: [[k * x for x in r] for r in m], lambda: (table(rng, 2, 3),))])


FORMS = [chosen, chosen, of_lists, of_texts, of_a_number, of_records]
NAMES = """solve compute_result find_value process get_answer evaluate handle transform calculate run_task
determine work_out""".split()


def name_of(rng, sentence):
    """A name of the sentence's own words, or one that says nothing."""
    said = [w for w in "".join(c if c.isalpha() else " " for c in sentence.split(";")[0]).lower().split()
            if len(w) > 2 and w not in ("the", "that", "and", "with", "whose", "none", "return", "first", "several", "there")]
    return rng.choice(NAMES) if rng.random() < 0.2 else "_".join(said[:rng.randint(2, 3)])


def question(rng):
    sentence, solve, arguments = rng.choice(FORMS)(rng)
    name = name_of(rng, sentence)
    tests = []
    for _ in range(3):
        given = arguments()
        try:
            tests.append(f"assert {name}({', '.join(map(repr, given))}) == {solve(*given)!r}")
        except (ValueError, IndexError):  # a list too short for what is asked
            return None
    asked = rng.choice(["Write a function to", "Write a python function to", "Write a function that can", "Implement a function to"])
    return mbpp_question({"prompt": f"{asked} {sentence}", "test_list": tests})


if __name__ == "__main__":
    write_drawn(__doc__, question)
