#!/usr/bin/env python3
"""The seed systems at their published sizes, with random weights, each beside a dense baseline.

Runs `cambium bench` on the shapes of plans/true-size on one GPU, with the sequences that an 80 GB
card holds, and prints the rows of docs/performance.md, "Seed systems at true size". A model that
no such card holds is cut to some of its layers, at two depths, and the time of a step of all layers
is extrapolated by layer. Arguments: names of systems (all of them otherwise), --cambium PROGRAM,
--plans FOLDER, --seconds N (no measurement is begun after so many), --short (one measurement of
each, to see that it runs).
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

GIB = 2**30
CARD = 78.65 * GIB  # of an H100's 80 GB
BESIDE = 2.5 * GIB  # reserve and workspace
BEGUN = time.monotonic()
MILLION = 1_048_576


class Plan:
    """A configuration, perhaps changed, in a folder of its own."""

    def __init__(self, name, config, label=None):
        self.name, self.config, self.label = name, config, label or name

    def changed(self, label, **keys):
        return Plan(self.name, {**self.config, **keys}, f"{self.name}, {label}")

    def folder(self):
        folder = tempfile.mkdtemp(prefix="true-size-")
        pathlib.Path(folder, "config.json").write_text(json.dumps(self.config))
        return folder


def read_plan(name):
    return Plan(name, json.loads((args.plans / name / "config.json").read_text()))


def cambium(*words, seconds=60):
    """The JSON that a command prints, or None with a line that says why."""
    if time.monotonic() - BEGUN > args.seconds:
        return None
    try:
        run = subprocess.run([args.cambium, *map(str, words), "--quiet", "--json"], timeout=seconds,
                             capture_output=True, text=True, check=False)
    except subprocess.TimeoutExpired:
        print(f"no result in {seconds} s: {' '.join(map(str, words))}", flush=True)
        return None
    if run.returncode != 0:
        print(f"failed: {' '.join(map(str, words))}: {run.stderr.strip()[-400:]}", flush=True)
        return None
    return json.loads(run.stdout)


def fitting(plan, context):
    """Sequences of `context` tokens that fit beside the weights."""
    about = cambium("inspect", plan.folder(), "--storage", "bf16")
    if about is None:
        return 0
    fixed = sum(m["bytes_per_sequence"] for m in about["mixers"].values())
    each = fixed + (context + 64) * about["cache_bytes_per_token"]
    return int((CARD - BESIDE - 2 * about["parameters"]) // each)


def show(plan, what, r):
    print(f"| {plan.label} | {what} | {r['rate']:,.0f} | {r['ms']:,.2f} ms | {r['gb']:,.1f} GB, "
          f"{r['tflop']:,.2f} TFLOP | {100 * r['share']:.0f} % |", flush=True)


def measure(kind, plan, contexts, batch, *more):
    """{context: figures} of one model; prints a row for each."""
    json_rows = cambium("bench", kind, "--random-weights", plan.folder(), "--storage", "bf16",
                        "--contexts", ",".join(map(str, contexts)), "--batch", batch, "--repeats",
                        "1", *more)
    found = {}
    for r in json_rows or []:
        values = r[kind]
        found[r["context"]] = f = {"rate": values[0], "ms": r["ms"], "gb": 1e-9 * r["bytes"],
                                   "tflop": 1e-12 * r["flops"], "share": r["share"],
                                   "batch": batch}
        of = f"{batch} x " if batch > 1 else ""
        show(plan, f"{kind}, {of}{r['context']:,}" + ("" if r["finite"] else ", NOT FINITE"), f)
    return found


def decode(plan, contexts, batch, steps=32):
    return measure("decode", plan, contexts, batch, "--decode", steps) if batch > 0 else {}


def prefill(plan, contexts):
    return measure("prefill", plan, contexts, 1)


def extrapolated(plan, shallow, deep, depths, layers, kind="decode"):
    """Of two depths, a step or a prompt of all layers: one row a context that both have."""
    found = {}
    for context in sorted(set(shallow) & set(deep)):
        a, b = shallow[context], deep[context]
        f = {key: b[key] + (b[key] - a[key]) * (layers - depths[1]) / (depths[1] - depths[0])
             for key in ("ms", "gb", "tflop")}
        f["batch"] = b["batch"]
        tokens = f["batch"] * (context if kind == "prefill" else 1)
        f["rate"] = 1e3 * tokens / f["ms"]
        f["share"] = b["share"]
        found[context] = f
        show(plan, f"{kind}, {f['batch']} x {context:,}, all {layers} layers by those of "
             f"{depths[0]} and {depths[1]}", f)
    return found


def claim(text, ours, dense, context):
    if context in ours and context in dense:
        a, b = ours[context], dense[context]
        print(f"| claim | {text} | {a['batch']} sequences {a['rate']:,.0f} against {b['batch']} "
              f"{b['rate']:,.0f} at {context:,} | **{a['rate'] / b['rate']:.2f}x** | a sequence's "
              f"part of a step {a['gb'] / a['batch']:,.2f} against {b['gb'] / b['batch']:,.2f} GB: "
              f"{b['gb'] / b['batch'] / (a['gb'] / a['batch']):.2f}x | |", flush=True)


def cut_hybrid(plan, layers, pattern_key, pattern):
    return plan.changed(f"{layers} layers", num_hidden_layers=layers, **{pattern_key: pattern})


def flat(plan, what):
    """A model of linear mixers alone, at 1k and at 1M tokens."""
    found = decode(plan, [1024, 65536, MILLION], 1)
    if 1024 in found and MILLION in found:
        near, far = found[1024]["ms"], found[MILLION]["ms"]
        print(f"| {what} | a step at 1,024 and at {MILLION:,} tokens | {near:.3f}, {far:.3f} ms | "
              f"{far / near:.3f}x | | |", flush=True)


# --- The systems.
def nano():
    ours, dense = read_plan("nemotron-nano-9b-v2"), read_plan("qwen3-8b")
    decode(ours, [1024, 33000], 1)
    if args.short:
        return
    prefill(ours, [8192, 32768])
    decode(ours, [1024], 64)
    decode(ours, [1024], 256)
    at_9k = decode(ours, [9216], fitting(ours, 9216))
    at_16k = decode(ours, [16384], fitting(ours, 16384))
    at_33k = decode(ours, [33000], fitting(ours, 33000))
    prefill(dense, [8192, 32768])
    decode(dense, [1024], 1)
    claim("up to 6x Qwen3-8B at 8k in, 16k out (its mean, memory full)", at_16k,
          decode(dense, [16384], fitting(dense, 16384)), 16384)
    claim("the same with 9,216", at_9k, decode(dense, [9216], fitting(dense, 9216)), 9216)
    claim("the same with 33,000", at_33k, decode(dense, [33000], fitting(dense, 33000)), 33000)
    pattern = ours.config["hybrid_override_pattern"].replace("*", "")
    flat(ours.changed("no attention", hybrid_override_pattern=pattern,
                      num_hidden_layers=len(pattern), max_position_embeddings=2 * MILLION),
         "Mamba-2 of Nemotron-Nano-9B-v2")


def falcon():
    ours, dense = read_plan("falcon-h1-34b"), read_plan("qwen2.5-32b")
    if args.short:
        decode(ours, [1024], 1)
        return
    pair = prefill(ours, [32768]), prefill(dense, [32768])
    claim("4x prefill of long contexts, Falcon-H1-34B", *pair, 32768)
    one = decode(ours, [1024, 32768], 1), decode(dense, [1024, 32768], 1)
    claim("8x decode at long contexts, one sequence", *one, 32768)
    full = [decode(p, [8192], fitting(p, 8192)) for p in (ours, dense)]
    claim("the same, memory full", *full, 8192)
    # At 262,144 tokens no card holds both: a quarter of the layers of each, and an eighth.
    quarter = []
    for p, layers in ((ours, 72), (dense, 64)):
        depths = layers // 8, layers // 4
        runs = [decode(p.changed(f"{d} layers", num_hidden_layers=d,
                                 max_position_embeddings=MILLION), [262144], 1) for d in depths]
        quarter.append(extrapolated(p, *runs, depths, layers))
    claim("the same, one sequence, by layers", *quarter, 262144)


def nemotron_h():
    """Nemotron-H-47B by 20 and 40 of 98 layers, one of attention for nine of Mamba-2; it and its
    baseline have the memory of two and a half 80 GB cards."""
    ours, dense = read_plan("nemotron-h-47b"), read_plan("llama-3.1-70b")
    period = "M-" * 9 + "*-"
    ours = {20 * n: ours.changed(f"{20 * n} layers", hybrid_override_pattern=period * n,
                                 num_hidden_layers=20 * n) for n in (1, 2)}
    dense = dict(zip((16, 33), cuts(dense, (16, 33))))
    if args.short:
        decode(ours[20], [1024, 65536], 1)
        return
    full, prompts, served = [], [], []
    for models, layers in ((ours, 98), (dense, 80)):
        depths, (shallow, deep) = list(models), models.values()
        sequences = fitting(deep, 65536)
        full.append(extrapolated(deep, decode(shallow, [65536], sequences),
                                 decode(deep, [65536], sequences), depths, layers))
        prompts.append(extrapolated(deep, prefill(shallow, [65536]), prefill(deep, [65536]), depths,
                                    layers, "prefill"))
        if 65536 in full[-1] and 65536 in prompts[-1]:
            batch = full[-1][65536]["batch"]
            seconds = 1e-3 * (batch * prompts[-1][65536]["ms"] + 1024 * full[-1][65536]["ms"])
            served.append(1024 * batch / seconds)
    claim("3x a dense 70B at 64k in, 1k out: steps, memory full (by layers)", *full, 65536)
    claim("the same: prompts (by layers)", *prompts, 65536)
    if len(served) == 2:
        print(f"| claim | the same: 65,536 in and 1,024 out, prompts one after another, then steps "
              f"together | {served[0]:,.1f} against {served[1]:,.1f} | "
              f"**{served[0] / served[1]:.2f}x** | | |", flush=True)


def cuts(plan, depths):
    return [plan.changed(f"{d} layers", num_hidden_layers=d) for d in depths]


def next_80b():
    """Three 80 GB cards hold all 48 layers of one and all 64 of the other (63 here)."""
    ours, dense = read_plan("qwen3-next-80b"), read_plan("qwen3-32b")
    if args.short:
        decode(cuts(ours, [4])[0], [1024], 1)
        return
    full = []
    for p, depths, layers in ((ours, (8, 16), 48), (dense, (11, 21), 64)):
        shallow, deep = cuts(p, depths)
        sequences = fitting(deep, 32768)
        full.append(extrapolated(p, decode(shallow, [32768], sequences),
                                 decode(deep, [32768], sequences), depths, layers))
        one = decode(shallow, [1024, 32768], 1), decode(deep, [1024, 32768], 1)
        extrapolated(p, *one, depths, layers)
        prefill(deep, [32768])
    claim("more than 10x Qwen3-32B past 32k (three 80 GB cards' memory, by layers)", *full, 32768)
    flat(ours.changed("8 layers of Gated DeltaNet", num_hidden_layers=8, full_attention_interval=9,
                      max_position_embeddings=2 * MILLION), "Gated DeltaNet of Qwen3-Next")


def kimi_plan(plan, depth, full):
    linear = {**plan.config["linear_attn_config"], "full_attn_layers": full,
              "kda_layers": [i for i in range(1, depth + 1) if i not in full]}
    return plan.changed(f"{depth} layers, {len(full)} of MLA", num_hidden_layers=depth,
                        linear_attn_config=linear, model_max_length=2 * MILLION)


def kimi():
    """The card holds 16 of 27 layers; the baseline has MLA in all of them."""
    plan, depths = read_plan("kimi-linear-48b"), (8, 16)
    hybrids = [kimi_plan(plan, d, list(range(4, d + 1, 4))) for d in depths]
    denses = [kimi_plan(plan, d, list(range(1, d + 1))) for d in depths]
    if args.short:
        decode(kimi_plan(plan, 4, [4]), [1024, 65536], 1)
        return
    one, full = [], []
    for models in (hybrids, denses):
        sequences = fitting(models[1], MILLION)
        one.append(extrapolated(models[1], *(decode(m, [1024, MILLION], 1) for m in models), depths,
                                27))
        full.append(extrapolated(models[1], *(decode(m, [MILLION], sequences) for m in models),
                                 depths, 27) if sequences > 1 else one[-1])
    claim("6x decode at 1M, one sequence", *one, MILLION)
    claim("6x decode at 1M, memory full", *full, MILLION)
    prefill(hybrids[1], [32768])
    prefill(denses[1], [32768])
    flat(kimi_plan(plan, 4, []), "Kimi Delta Attention of Kimi-Linear")


def without_index(plan):
    config = {k: v for k, v in plan.config.items() if not k.startswith("index_")}
    config["model_type"], config["architectures"] = "deepseek_v3", ["DeepseekV3ForCausalLM"]
    return Plan(plan.name, config, plan.label + ", all keys")


def deepseek():
    """A dense layer and one or two with experts; the baseline attends to all keys."""
    plan, depths = read_plan("deepseek-v3.2"), (2, 3)
    sparse = [p.changed(f"{d} layers", first_k_dense_replace=1)
              for p, d in zip(cuts(plan, depths), depths)]
    dense = [without_index(p) for p in sparse]
    if args.short:
        decode(sparse[0], [1024, 65536], 1)
        decode(dense[0], [65536], 1)
        return
    for sequences in (1, fitting(sparse[1], 131072)):
        pair = [extrapolated(models[1], *(decode(m, [131072], sequences, 16) for m in models),
                             depths, 61) for models in (sparse, dense)]
        claim(f"3x at 128k, {sequences} sequences", *pair, 131072)
    prefill(sparse[1], [32768])
    prefill(dense[1], [32768])


def minimax():
    """Lightning and softmax layers apart: 70 and 10 of them make M1, 80 of the latter its
    baseline."""
    plan = read_plan("minimax-m1")
    kinds = {name: plan.changed(name, num_hidden_layers=len(types), attn_type_list=types)
             for name, types in (("2 layers of lightning", [0] * 2),
                                 ("4 layers of lightning", [0] * 4),
                                 ("4 layers of softmax", [1] * 4))}
    if args.short:
        decode(plan.changed("2 layers", num_hidden_layers=2, attn_type_list=[0, 1]), [1024, 65536],
               1)
        return
    context = 100_000
    for sequences in (1, fitting(kinds["4 layers of softmax"], context)):
        runs = [decode(p, [context], sequences) for p in kinds.values()]
        if not all(context in r for r in runs):
            continue
        both = []
        for layers in ((70, 10), (0, 80)):
            f = {"batch": sequences, "share": runs[1][context]["share"]}
            for key in ("ms", "gb", "tflop"):
                two, four, softmax = (r[context][key] for r in runs)
                lightning = (four - two) / 2
                head = two - 2 * lightning
                f[key] = head + layers[0] * lightning + layers[1] * (softmax - head) / 4
            f["rate"] = 1e3 * sequences / f["ms"]
            both.append({context: f})
            show(plan, f"decode, {sequences} x {context:,}, {layers[0]} layers of lightning and "
                 f"{layers[1]} of softmax, by layer", f)
        claim("3-4x decode at 100k", *both, context)
    flat(kinds["2 layers of lightning"], "Lightning of MiniMax-M1")


SYSTEMS = {"nano": nano, "nemotron_h": nemotron_h, "falcon": falcon, "next": next_80b, "kimi": kimi,
           "deepseek": deepseek, "minimax": minimax}

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("systems", nargs="*", choices=[*SYSTEMS, []], help="all of them otherwise")
parser.add_argument("--cambium", default="build/cambium")
parser.add_argument("--plans", type=pathlib.Path,
                    default=pathlib.Path(__file__).resolve().parent.parent / "plans" / "true-size")
parser.add_argument("--seconds", type=float, default=3600)
parser.add_argument("--short", action="store_true")
args = parser.parse_args()
print("| model | what | tokens/s | a step or prompt | moves, multiplies | of the limit |\n"
      "| --- | --- | --- | --- | --- | --- |")
for system in args.systems or SYSTEMS:
    SYSTEMS[system]()
    print(f"{system}: {time.monotonic() - BEGUN:.0f} s", file=sys.stderr, flush=True)
