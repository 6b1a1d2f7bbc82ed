#!/usr/bin/env python3
"""Compares starts of grafted mixers on the shipped teacher, at equal tokens of training.

  python3 scripts/starts.py [-o out/starts] [--mixers mamba2,...] [--seeds 1,2,3] [--jobs 2]

Each run is plans/starts.toml with the keys of its start; one that is done is not run again. Prints
a row a mixer and start: mean (least, most) over the seeds of the held-out reverse KL as converted,
after the alignment and after the end-to-end stage, and of the tokens trained until the reverse KL
of training has been at most --kl over five steps.
"""
import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys

STARTS = {
    "random": ['graft.init="random"'],
    "copy": [],
    # A fit's steps are taken from the alignment's: the tokens are the same.
    "copy, fitted": ["graft.fit=30", "align.steps=30"],
    "calibrated": ["graft.calibrate=64", "graft.fit=0"],
    "calibrated, fitted": ["graft.calibrate=64", "graft.fit=30", "align.steps=30"],
}


def run(cambium, folder, mixer, start, seed):
    if (folder / "summary.json").exists():
        return
    words = [cambium, "hybridize", "plans/starts.toml", "-o", str(folder), "--resume", "--device", "cpu",
             "--quiet", "--set", f'graft.mixer="{mixer}"', "--set", f"seed={seed}"]
    for key in STARTS[start]:
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
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--kl", type=float, default=0.1, help="of training, nats a token")
    args = parser.parse_args()
    seeds = args.seeds.split(",")
    arms = [(mixer, start) for mixer in args.mixers.split(",") for start in STARTS]

    def folder(mixer, start, seed):
        return pathlib.Path(args.o) / f"{mixer}-{start.replace(', ', '-')}-{seed}"

    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        runs = [pool.submit(run, args.cambium, folder(*arm, seed), *arm, seed) for seed in seeds for arm in arms]
        for done in runs:
            done.result()
    print(f"| mixer | start | as converted | aligned | healed | tokens to {args.kl:g} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for arm in arms:
        found = list(zip(*(result(folder(*arm, seed), args.kl) for seed in seeds)))
        print(f"| {arm[0]} | {arm[1]} | " + " | ".join(cell(v, 3) for v in found[:3]) + f" | {cell(found[3], 0)} |")


if __name__ == "__main__":
    main()
