#!/usr/bin/env python3
"""Compares starts of grafted mixers on the shipped teacher, at equal tokens of training.

  python3 scripts/starts.py [-o out/starts] [--mixers mamba2,...] [--seeds 1,2,3] [--jobs 2]
  python3 scripts/starts.py --plan plans/starts-38m.toml --fit 100 --device cuda -o out/starts-38m

Each run is the plan with the keys of its start; one that is done is not run again. Prints a row a
mixer and start: mean (least, most) over the seeds of the held-out reverse KL as converted, after
the alignment and after the end-to-end stage, and of the tokens trained until the reverse KL of
training has been at most --kl over five steps. With --done nothing is run, and a row has the seeds
that there are. Starts that end in -unaligned have no alignment and as many more tokens end to end.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import tomllib

STARTS = ["random", "copy", "copy, fitted", "calibrated", "calibrated, fitted"]
# The alignment's tokens are trained end to end.
UNALIGNED = ["copy, unaligned", "calibrated, unaligned"]


def keys_of(start, fit, plan):
    align, distill = plan["align"]["steps"], plan["distill"]["steps"]
    if start == "random":
        return ['graft.init="random"']
    keys = ["graft.calibrate=64"] if start.startswith("calibrated") else []
    if start.endswith("fitted"):
        # A fit's steps are taken from the alignment's: the tokens are the same.
        return keys + [f"graft.fit={fit}", f"align.steps={align - fit}"]
    if start.endswith("unaligned"):
        more = align * plan["align"]["sequence_length"] // plan["distill"]["sequence_length"]
        keys += ["align.steps=0", f"distill.steps={distill + more}"]
    return keys + ["graft.fit=0"]


def run(args, folder, mixer, start, seed):
    if (folder / "summary.json").exists():
        return
    words = [args.cambium, "hybridize", args.plan, "-o", str(folder), "--resume", "--device", args.device,
             "--quiet", "--set", f'graft.mixer="{mixer}"', "--set", f"seed={seed}"]
    if args.teacher:
        words += ["--teacher", args.teacher]
    plan = tomllib.loads(pathlib.Path(args.plan).read_text())
    for key in keys_of(start, args.fit, plan):
        words += ["--set", key]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "CAMBIUM_THREADS": "1"})
    if done.returncode != 0:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def steps(folder, phase):
    """(tokens, reverse KL or None) of each step of a phase."""
    stage = "healed" if phase == "distill" else "aligned"
    log = folder / "stages" / stage / "attempt-1" / phase / "log.jsonl"
    lines = map(json.loads, log.read_text().splitlines()) if log.exists() else []
    return [(s["tokens"], s.get("reverse_kl")) for s in lines if s["event"] == "step"]


def tokens_to(folder, kl):
    before = sum(tokens for phase in ("fit", "align") for tokens, _ in steps(folder, phase))
    seen = []
    for tokens, now in steps(folder, "distill"):
        before += tokens
        seen = (seen + [now])[-5:]
        if len(seen) == 5 and sum(seen) / 5 <= kl:
            return before
    return None


def result(folder, kl):
    models = {m["name"]: m for m in json.loads((folder / "summary.json").read_text())["models"]}
    aligned, healed = (models[stage]["held_out"] for stage in ("aligned", "healed"))
    return [aligned["reverse_kl_converted"], aligned["reverse_kl"], healed["reverse_kl"], tokens_to(folder, kl)]


def cell(values, digits):
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return f"{len(known)} of {len(values)} runs"
    mean = sum(known) / len(known)
    return f"{mean:.{digits}f} ({min(known):.{digits}f}, {max(known):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", default="out/starts", help="folder of the runs")
    parser.add_argument("--cambium", default="build/cambium")
    parser.add_argument("--mixers", default="gated_delta_net,mamba2,mamba")
    parser.add_argument("--starts", default=",".join(s.replace(", ", "-") for s in STARTS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--plan", default="plans/starts.toml")
    parser.add_argument("--teacher", help="the plan's otherwise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fit", type=int, default=30, help="steps of a fit, of those of the alignment")
    parser.add_argument("--done", action="store_true", help="only the table, of the runs that are done")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--kl", type=float, default=0.3, help="of training, nats a token")
    args = parser.parse_args()
    seeds = args.seeds.split(",")
    named = {s.replace(", ", "-"): s for s in STARTS + UNALIGNED}
    for name in args.starts.split(","):
        if name not in named:
            parser.error(f"--starts: expected some of {','.join(named)}, got {name}")
    arms = [(mixer, named[name]) for mixer in args.mixers.split(",") for name in args.starts.split(",")]

    def folder(mixer, start, seed):
        return pathlib.Path(args.o) / f"{mixer}-{start.replace(', ', '-')}-{seed}"

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [] if args.done else [pool.submit(run, args, folder(*arm, seed), *arm, seed)
                                     for seed in seeds for arm in arms]
        for done in runs:
            done.result()
    print(f"| mixer | start | as converted | aligned | healed | tokens to {args.kl:g} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for arm in arms:
        there = [f for f in (folder(*arm, seed) for seed in seeds) if (f / "summary.json").exists()]
        if not there:
            print(f"| {arm[0]} | {arm[1]} | no run is done | | | |")
            continue
        found = list(zip(*(result(f, args.kl) for f in there)))
        print(f"| {arm[0]} | {arm[1]} | " + " | ".join(cell(v, 3) for v in found[:3]) + f" | {cell(found[3], 0)} |")


if __name__ == "__main__":
    main()
