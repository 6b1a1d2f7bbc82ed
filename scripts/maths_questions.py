#!/usr/bin/env python3
"""Questions of school mathematics, drawn by chance, for a model to answer in its own words.

  maths_questions.py -n 4000 --seed 1 -o maths.jsonl
  own_answers.py prompts --gsm8k train.jsonl --mbpp sanitized-mbpp.json --also maths.jsonl -o prompts.jsonl

GSM8K's training questions ask for whole numbers of everyday things; a hybrid that is healed on their
answers alone forgets algebra in LaTeX. These ask in that form. They have no solutions: what is learned
is how the teacher answers, right or wrong. None is taken from a benchmark; forms are ours, numbers drawn.
"""

from own_answers import write_drawn


def signed(n):
    return f"+ {n}" if n >= 0 else f"- {-n}"


def terms(*pairs):
    """A sum as it is written: of numbers and what each multiplies, zeros left out."""
    text = ""
    for c, unit in pairs:
        if c:
            size = str(abs(c)) if abs(c) != 1 or not unit else ""
            sign = f" {'+' if c > 0 else '-'} " if text else "-" if c < 0 else ""
            text += f"{sign}{size}{unit}"
    return text or "0"


def polynomial(rng, degree):
    units = [f"x^{power}" for power in range(degree, 1, -1)] + ["x", ""]
    lead = rng.choice([1, 1, 2, 3, -1, -2])
    return terms((lead, units[0]), *((rng.randint(-9, 9), unit) for unit in units[1:]))


def fraction(rng):
    return rf"\frac{{{rng.randint(1, 11)}}}{{{rng.randint(2, 12)}}}"


def pick(rng, n, low, high):
    return [rng.randint(low, high) for _ in range(n)]


def quadratic(rng):
    r, s = pick(rng, 2, -9, 9)
    square = terms((1, "x^2"), (-r - s, "x"), (r * s, ""))
    return rng.choice([f"Solve ${square} = 0.$ Give all solutions.",
                       f"Find the larger root of the equation ${square} = 0$.",
                       f"Factor ${square}$ completely.",
                       f"For which values of $x$ is ${square} < 0$? Write an interval."])


def linear(rng):
    a, b, c, d = pick(rng, 4, 2, 12)
    return rng.choice([f"Solve for $x$: ${a}x - {b} = {c}x + {d + a}$.",
                       rf"If $\frac{{x + {a}}}{{{b}}} = \frac{{x - {c}}}{{{d + b}}}$, what is $x$?",
                       f"If $|{a}x - {b}| = {c}$, what is the sum of all values of $x$ that fit?"])


def system(rng):
    x, y = pick(rng, 2, -7, 7)
    a, b, c, d = pick(rng, 4, 1, 9)
    return (rf"Find the ordered pair $(x, y)$ with $\begin{{aligned}} {terms((a, 'x'), (b, 'y'))} &= {a * x + b * y} \\ "
            rf"{terms((c, 'x'), (-d, 'y'))} &= {c * x - d * y} \end{{aligned}}$.")


def function(rng):
    f, g = polynomial(rng, 2), polynomial(rng, 1)
    k = rng.randint(-4, 5)
    return rng.choice([f"Let $f(x) = {f}$ and $g(x) = {g}$. Compute $f(g({k}))$.",
                       f"If $f(x) = {f}$, what is $f({k}) - f({-k - 1})$?",
                       f"Let $g(x) = {polynomial(rng, 1)}$. Find $g^{{-1}}({k})$.",
                       f"What is the vertex of the parabola $y = {f}$?"])


def expand(rng):
    return rng.choice([f"Expand the product $({polynomial(rng, 1)})({polynomial(rng, 2)})$.",
                       f"What is the remainder when ${polynomial(rng, 3)}$ is divided by $x {signed(rng.randint(-4, 4) or 1)}$?",
                       f"What is the coefficient of $x^2$ when $({polynomial(rng, 2)})({polynomial(rng, 2)})$ is multiplied out?",
                       f"Find the sum of the coefficients of $({polynomial(rng, 1)})^{rng.randint(2, 4)}$."])


def powers(rng):
    b, e = rng.randint(2, 5), rng.randint(2, 5)
    return rng.choice([rf"Evaluate $\log_{{{b}}} {b ** e} + \log_{{{b}}} {b}$.",
                       rf"Simplify $\sqrt{{{rng.randint(2, 9) ** 2 * rng.randint(2, 7)}}}$.",
                       f"If ${b}^{{2x - {e}}} = {b ** (e + 2)}$, what is $x$?",
                       rf"Rationalise the denominator of $\frac{{{e}}}{{\sqrt{{{rng.choice([2, 3, 5, 6, 7])}}} - 1}}$."])


def sequence(rng):
    a, d, n = rng.randint(1, 20), rng.randint(2, 9), rng.randint(8, 40)
    return rng.choice([f"The first term of an arithmetic sequence is {a} and its common difference is {d}. What is term number {n}?",
                       f"What is the sum of the first {n} terms of the sequence ${a}, {a + d}, {a + 2 * d}, \\dots$?",
                       rf"Compute the sum of the infinite geometric series ${a} + \frac{{{a}}}{{{d}}} + \frac{{{a}}}{{{d * d}}} + \dots$.",
                       f"How many terms has the arithmetic sequence ${a}, {a + d}, {a + 2 * d}, \\dots, {a + d * n}$?"])


def numbers(rng):
    a, b, m = rng.randint(12, 400), rng.randint(12, 400), rng.randint(5, 19)
    return rng.choice([f"What is the greatest common divisor of {a * m} and {b * m}?",
                       f"Find the least common multiple of {rng.randint(4, 40)}, {rng.randint(4, 40)} and {rng.randint(4, 40)}.",
                       f"How many positive divisors does {a} have?",
                       f"What is the remainder when ${a}^{{{rng.randint(3, 30)}}}$ is divided by {m}?",
                       f"What is the units digit of ${a}^{{{b}}}$?",
                       f"Write the base-10 number {a} in base {rng.randint(2, 9)}.",
                       f"Find the smallest positive integer $n$ with ${rng.choice([3, 7, 9, 11])}n \\equiv {rng.randint(1, 12)} \\pmod{{13}}$.",
                       f"What is the sum of the prime factors of {rng.randint(60, 900)}?",
                       f"How many multiples of {m} lie between {a} and {a + b}?"])


def counting(rng):
    n, k = rng.randint(5, 12), rng.randint(2, 4)
    red, blue = pick(rng, 2, 3, 9)
    letters = rng.choice(["BANANA", "LETTER", "SUMMER", "ORANGE", "PEPPER", "CIRCLE", "GALAXY", "MINIMUM"])
    return rng.choice([rf"Compute $\binom{{{n}}}{{{k}}}$.",
                       f"In how many ways can the letters of {letters} be put in a row?",
                       f"A club of {n} members chooses a president, a secretary and a treasurer, all different. In how many ways can it do so?",
                       f"A bag has {red} red and {blue} blue marbles. {k} are drawn without putting any back. What is the probability that all are red?",
                       f"Two fair dice are rolled. What is the probability that the sum is {rng.randint(3, 11)}? Give a fraction.",
                       f"A fair coin is tossed {n} times. What is the probability of exactly {k} heads?",
                       f"How many committees of {k} can be chosen from {red} women and {blue} men if at least one of each is in it?"])


def geometry(rng):
    a, b, c = rng.choice([(3, 4, 5), (5, 12, 13), (8, 15, 17), (7, 24, 25), (20, 21, 29)])
    r, h = pick(rng, 2, 2, 12)
    return rng.choice([f"A right triangle has legs of {a * r} and {b * r}. What is the length of its hypotenuse?",
                       f"The hypotenuse of a right triangle is {c * r} and one leg is {a * r}. What is its area?",
                       f"A cylinder has radius {r} and height {h}. Express its volume in terms of $\\pi$.",
                       f"What is the area of a circle whose circumference is ${2 * r}\\pi$?",
                       f"Each interior angle of a regular polygon measures {rng.choice([108, 120, 135, 140, 144, 150, 156])} degrees. How many sides has it?",
                       f"Find the distance between the points $({a}, {-r})$ and $({a + b}, {h})$.",
                       f"What is the equation of the line through $({r}, {h})$ and $({r + 3}, {h + 6 + a})$? Write it as $y = mx + b$.",
                       f"In triangle $ABC$, angle $A$ is {rng.randint(20, 70)} degrees and angle $B$ is {rng.randint(20, 80)} degrees. How many degrees is angle $C$?",
                       f"The sides of two similar triangles are in the ratio $ {r} : {r + h}$. The smaller has area {r * r * 2}. What is the area of the larger?"])


def precalculus(rng):
    angle = rng.choice([30, 45, 60, 90, 120, 135, 150, 180, 210, 225, 240, 300, 315])
    a, b, c, d = pick(rng, 4, -6, 6)
    return rng.choice([rf"Compute $\{rng.choice(['sin', 'cos', 'tan'])} {rng.choice([30, 45, 60, 120, 135, 150, 210, 225, 240, 300])}^\circ$.",
                       rf"Compute $\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}} \begin{{pmatrix}} {d} \\ {a} \end{{pmatrix}}$.",
                       rf"Find the determinant of $\begin{{pmatrix}} {a} & {b} \\ {c} & {d} \end{{pmatrix}}$.",
                       f"Simplify $({a or 1} {signed(b or 2)}i)({c or 3} {signed(d or 1)}i)$.",
                       f"What is the magnitude of the complex number ${abs(a) + 3} {signed(b or 4)}i$?",
                       rf"Convert {angle} degrees to radians.",
                       rf"Find the dot product of $\begin{{pmatrix}} {a} \\ {b} \\ {c} \end{{pmatrix}}$ and $\begin{{pmatrix}} {d} \\ {c} \\ {b} \end{{pmatrix}}$.",
                       rf"Convert the point $({abs(a) + 2}, {angle}^\circ)$ in polar coordinates to rectangular coordinates."])


def arithmetic(rng):
    a, b, c = pick(rng, 3, 2, 15)
    return rng.choice([rf"Compute ${fraction(rng)} + {fraction(rng)} \cdot {fraction(rng)}$. Give a fraction in lowest terms.",
                       f"What is {rng.choice([5, 12, 15, 20, 30, 45, 60, 75])} percent of {rng.randint(2, 40) * 10}?",
                       f"Compute ${a} - {b} \\cdot ({c} - {a})^2 \\div 1$.",
                       f"The average of five numbers is {a + 10}. Four of them are {a}, {b + 5}, {c + 8} and {a + b}. What is the fifth?",
                       f"Write ${a * 10 + b}.{c}$ as a fraction in lowest terms.",
                       f"Which is larger, ${fraction(rng)}$ or ${fraction(rng)}$?",
                       f"Round ${rng.randint(100, 9999)}.{rng.randint(100, 999)}$ to the nearest tenth."])


FORMS = [quadratic, linear, system, function, expand, powers, sequence, numbers, numbers, counting, counting,
         geometry, geometry, precalculus, precalculus, arithmetic]


if __name__ == "__main__":
    write_drawn(__doc__, lambda rng: rng.choice(FORMS)(rng))
