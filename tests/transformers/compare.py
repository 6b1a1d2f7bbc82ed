#!/usr/bin/env python3
"""Checkpoints that Cambium writes, run by transformers, and the reverse.

    python3 tests/transformers/compare.py build/cambium [CASE ...]

Each case makes a tiny model: converted by the program, or of random weights by PyTorch. Then

  golden    our logits, as golden.safetensors has them, against PyTorch's
  verify    PyTorch's logits and cached greedy tokens against every way through our program
  steps     PyTorch in pieces and token by token, with its cache, against all at once
  padded    a batch padded on the left against each of its sequences alone

Errors are the largest over the standard deviation of the logits, in fp32; 1e-3 is the bound (of verify
too, whose own is narrower: a norm of nearly nothing, as random weights give, magnifies rounding).
Without torch, transformers and safetensors it says so and skips.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import torch
    import transformers
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
except ImportError as missing:
    print(f"skipped: {missing}; pip install torch transformers safetensors")
    sys.exit(0)

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests/fixtures"
BOUND = 1e-3
PROMPTS = (1, 23, 100)
GREEDY = 12


def error(got, wanted):
    worst = ((got.double() - wanted.double()).abs().max() / wanted.double().std()).item()
    return worst if worst == worst else float("inf")  # max() would pass over NaN


def load(folder, **more):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, torch_dtype=torch.float32, **more)
    model.generation_config.eos_token_id = None  # always as many tokens as are asked for
    for module in model.modules():
        if model.config.model_type == "nemotron_h" and hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # the class alone has another, not its authors' code
    return model.eval()


@torch.no_grad()
def logits_of(model, tokens):
    return model(tokens[None], use_cache=False).logits[0]


def golden(model, folder, name="logits"):
    file = load_file(folder / "golden.safetensors")
    return error(logits_of(model, file["tokens"]), file[name])


def prompts_of(vocab):
    random = torch.Generator().manual_seed(5)
    return [torch.randint(3, vocab, (n,), generator=random) for n in PROMPTS]


def generated(model, tokens, count):
    made = model.generate(tokens[None], max_new_tokens=count, do_sample=False, pad_token_id=0)
    return made[0, tokens.shape[0] :]


def verify(program, model, folder, *more):
    """The worst error of all ways through our program, and greedy tokens that are the same."""
    reference = {}
    for i, tokens in enumerate(prompts_of(model.config.vocab_size)):
        reference[f"tokens.{i}"] = tokens
        reference[f"logits.{i}"] = logits_of(model, tokens).contiguous()
        reference[f"greedy.{i}"] = generated(model, tokens, GREEDY)
    return verified(program, folder, reference, *more)


def verified(program, folder, reference, *more):
    """The same of a reference: tokens.N, logits.N and greedy.N for each sequence."""
    with tempfile.TemporaryDirectory() as scratch:
        save_file(reference, Path(scratch) / "torch.safetensors")
        done = run(program, "verify", folder, "--reference", Path(scratch) / "torch.safetensors", *more, check=False)
    rows = re.findall(r"^(\S.*?) +\d+ +\d+ +(\S+) +\S+ +\d+/\d+ +(\d+)/(\d+)", done.stdout, re.M)
    if not rows:
        raise RuntimeError(done.stdout + done.stderr)
    same = min(int(row[2]) - int(row[3]) for row in rows)
    return max(float(row[1]) for row in rows), same


@torch.no_grad()
def steps(model):
    """In pieces and token by token, against all at once."""
    tokens = prompts_of(model.config.vocab_size)[-1]
    whole = logits_of(model, tokens)
    worst = 0.0
    for cuts in ([40, 41, 90], list(range(60, 75))):
        cache, parts = None, []
        for begin, end in zip([0, *cuts], [*cuts, len(tokens)]):
            out = model(tokens[None, begin:end], use_cache=True, **({CACHE: cache} if cache is not None else {}))
            cache = out[CACHE]
            parts.append(out.logits[0])
        worst = max(worst, error(torch.cat(parts), whole))
    return worst


@torch.no_grad()
def padded(model):
    """A batch of two lengths, generated from, against each alone: (error, greedy tokens)."""
    one, two = prompts_of(model.config.vocab_size)[1:]
    batch = torch.zeros(2, len(two), dtype=torch.long)
    mask = torch.zeros_like(batch)
    batch[0, -len(one) :], batch[1] = one, two
    mask[0, -len(one) :], mask[1] = 1, 1
    out = model(batch, attention_mask=mask, use_cache=False).logits
    worst = max(error(out[0, -len(one) :], logits_of(model, one)), error(out[1], logits_of(model, two)))
    made = model.generate(
        batch, attention_mask=mask, max_new_tokens=GREEDY, do_sample=False, pad_token_id=0
    )[:, len(two) :]
    alone = torch.stack([generated(model, t, GREEDY) for t in (one, two)])
    return worst, int((made == alone).sum()) - made.numel()


def run(program, *words, check=True):
    done = subprocess.run([str(program), *map(str, words)], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done


# What `cambium convert` makes of a fixture.
CONVERTED = {
    "convert sliding_window": ("llama", ["--mixer", "sliding_window", "--window", 16, "--sinks", 3]),
    "convert mamba": ("llama", ["--mixer", "mamba"]),
    "convert mamba2": ("llama", ["--mixer", "mamba2"]),
    "convert gates to mamba": ("qwen3_next", ["--layers", 3, "--mixer", "mamba"]),
    "convert gates to mamba2": ("qwen3_next", ["--layers", 3, "--mixer", "mamba2"]),
    "convert gates to parallel": ("qwen3_next", ["--layers", 3, "--mixer", "parallel", "--window", 12, "--recurrent", "mamba2"]),
    "convert gated_delta_net": ("llama_bias", ["--mixer", "gated_delta_net"]),
    "convert kimi_delta": ("qwen3", ["--mixer", "kimi_delta"]),
    "convert lightning": ("qwen3", ["--mixer", "lightning"]),
    "convert parallel": ("qwen3", ["--mixer", "parallel", "--window", 12, "--recurrent", "gated_delta_net"]),
    "convert parallel lightning": ("llama", ["--mixer", "parallel", "--window", 12, "--recurrent", "lightning"]),
    "convert parallel mamba2": ("llama", ["--mixer", "parallel", "--window", 12, "--recurrent", "mamba2"]),
    "convert parallel, sinks": ("qwen3", ["--mixer", "parallel", "--window", 12, "--sinks", 2, "--recurrent", "kimi_delta"]),
    "convert latents to parallel": ("deepseek_v3", ["--mixer", "parallel", "--window", 12, "--recurrent", "mamba2"]),
    "convert gated latents to parallel": ("bailing_hybrid", ["--layers", 3, "--mixer", "parallel", "--window", 12,
                                          "--sinks", 2]),
    "convert beside mamba2": ("falcon_h1", ["--mixer", "gated_delta_net"]),
    "convert beside mamba2, window": ("falcon_h1", ["--mixer", "sliding_window", "--window", 12]),
    "convert xielu": ("apertus", ["--mixer", "gated_delta_net"]),
    "convert some of indexed latents": ("deepseek_v32", ["--mixer", "gated_delta_net"]),
    "convert some of indexed blocks": ("minimax_m3", ["--mixer", "gated_delta_net"]),
    "convert yarn": ("llama_rope_yarn", ["--mixer", "gated_delta_net"]),
    "convert longrope": ("llama_rope_longrope", ["--mixer", "lightning"]),
}


def mixer(kind, **options):
    return {"kind": kind, "options": options}


def layer(unit, **more):
    return {"mixer": unit["kind"], "options": unit["options"], "intermediate_size": 96, **more}


def branches(unit, feed_forward, **more):
    return {"branches": [{**more, "units": [unit]}, {**more, "units": [feed_forward]}]}


ATTENTION = mixer("attention", heads=4, kv_heads=2, head_dim=16)
BIASED = mixer("attention", heads=4, kv_heads=1, head_dim=16, qkv_bias=True, out_bias=True, scale=0.2, key_scale=1.5)
NORMED = mixer("attention", heads=4, kv_heads=2, head_dim=16, qk_norm="zero_centred", qk_norm_eps=1e-6, rope=False)
GDN = mixer("gated_delta_net", heads=6, q_heads=3, k_heads=2, v_heads=6, key_dim=16, value_dim=8, conv=3, conv_bias=True)
KDA = mixer("kimi_delta", heads=4, head_dim=16, gate_rank=0, out_bias=True, rope=True)
MAMBA = mixer("mamba", inner=64, xb=32, state=16, dt_rank=4, repeat_before_conv=False, in_bias=True, out_bias=True)
MAMBA2 = mixer("mamba2", heads=4, head_dim=16, state=8, b_heads=2, norm_group=32)
LIGHTNING = mixer("lightning", heads=6, head_dim=8, layer_of_slopes=2, layers=4, rows_by_head=True, norm_group=8)
GATED = mixer("attention", heads=4, kv_heads=2, head_dim=16, gate=True, softcap=3.0, qk_norm="layer", qk_norm_eps=1e-5)
SINKING = mixer("sliding_window", heads=4, head_dim=16, window=9, sink_logits=True, qk_norm_eps=1e-5,
                qk_norm_over="width")
COOLED = mixer("attention", heads=4, kv_heads=2, head_dim=16, temperature="query", gate=True, qk_norm_eps=1e-6)
COOLED_KEYS = mixer("attention", heads=4, kv_heads=2, head_dim=16, temperature="key", qkv_bias=True)
BEHIND = mixer("mamba2", heads=4, head_dim=16, state=8, b_heads=2, norm_group=16, norm_first=True, out_gate="sigmoid")
OPEN = mixer("mamba", inner=64, xb=32, state=16, dt_rank=4, out_gate="sigmoid")
BEYOND = mixer("gated_delta_net", heads=4, key_dim=16, value_dim=16, allow_neg_eigval=True, out_gate="sigmoid")
BOUNDED = mixer("kimi_delta", heads=4, head_dim=16, decay="sigmoid", lower_bound=-4.0, out_gate="silu")
GEOMETRIC = mixer("lightning", heads=3, head_dim=8, geometric_slopes=True)
BARE = mixer("mamba2", heads=4, head_dim=16, state=8, b_heads=2, norm=False, in_scale=0.8,
             row_scales=[1.0, 0.5, 2.0, 1.5, 0.7])
LATENTS = mixer("latent_attention", heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=16, value_dim=20, gate=True)
UNTURNED = mixer("latent_attention", heads=3, kv_rank=16, nope_dim=12, rope_dim=6, value_dim=12, rope=False, scale=0.3,
                 norm_eps=1e-5)
NEAR = mixer("sliding_window", window=5, sinks=2, heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=16, value_dim=20)
INDEXED = mixer("latent_attention", heads=4, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=16, value_dim=20, index_heads=3,
                index_dim=20, index_top=11, index_interleaved=False)
INDEXED_TOO = mixer("latent_attention", heads=3, q_rank=20, kv_rank=16, nope_dim=12, rope_dim=16, value_dim=12,
                    index_heads=2, index_dim=16, index_top=30, index_interleaved=True)
POOLED = mixer("latent_attention", heads=3, q_rank=20, kv_rank=16, nope_dim=12, rope_dim=16, value_dim=12,
               index_heads=12, index_dim=16, index_of="pools", index_top=3, index_size=5)
BLOCKS = mixer("attention", heads=6, kv_heads=2, head_dim=16, qk_norm="zero_centred", qk_norm_eps=1e-6, index_heads=2,
               index_dim=20, index_top=4, index_size=7, index_local=2)
POOLS = mixer("attention", heads=4, kv_heads=4, head_dim=16, index_heads=4, index_dim=16, index_of="pools", index_top=4,
              index_size=6)
MAMBA1 = mixer("mamba1", inner=64, state=8, dt_rank=4, norm_eps=1e-5)
EXPERTS = mixer("experts", experts=8, top=3, inner=24, router="sigmoid", router_bias=True, groups=4, group_top=2,
                renormalise=True, renormalise_eps=1e-20, scale=1.5, shared=32, shared_gate=True)
CLAMPED = mixer("experts", experts=6, top=2, inner=24, router="topk_softmax", activation="clamped_swiglu", limit=1.0,
                bias=True)
LATENT = mixer("experts", experts=6, top=2, inner=24, router="softmax", activation="relu2", latent=16, shared=32)
SWIGLU = mixer("swiglu", inner=96, bias=True, gate_scale=0.7)
# Configurations with what no conversion makes.
DESCRIBED = {
    "options of attention": {"layers": [layer(BIASED), layer(NORMED), layer(ATTENTION)]},
    "options of recurrences": {"layers": [layer(u) for u in (GDN, KDA, MAMBA, MAMBA2, LIGHTNING)]},
    "removed and identity": {
        "layers": [layer(ATTENTION), {"mixer": "identity", "options": {}, "intermediate_size": 0, "removed": True},
                   {"mixer": "identity", "options": {}, "intermediate_size": 64}, layer(GDN)],
        "tie_word_embeddings": True,
    },
    "branches": {
        "layers": [
            {"branches": [{"units": [{**ATTENTION, "out": 0.5}, {**MAMBA2, "name": "beside"}], "keep": 0.9},
                          {"norm": "zero_centred", "norm_eps": 1e-4, "units": [SWIGLU]},
                          {"residual_normed": True, "units": [{**SWIGLU, "name": "more", "out": 2.0}]}]},
            {"branches": [{"units": [KDA]}]},
        ],
        "embedding_scale": 3.0,
        "logit_scale": 0.25,
    },
    "gates, caps, sinks' scores": {"layers": [layer(GATED), layer(SINKING)], "logit_cap": 5.0},
    "temperatures, sigmoid gates": {"layers": [layer(u) for u in (COOLED, BEHIND, COOLED_KEYS, OPEN)]},
    "more recurrences": {
        "layers": [layer(u) for u in (BEYOND, BOUNDED, BARE, MAMBA1, GEOMETRIC, mixer("short_conv", bias=True))],
    },
    "latent attention": {"layers": [layer(u) for u in (LATENTS, GDN, UNTURNED, NEAR)], "rope_interleave": True},
    "an index of latents": {"layers": [layer(INDEXED), layer(GDN), layer(INDEXED_TOO)], "rope_interleave": True},
    "indexes beside attention": {"layers": [layer(INDEXED), layer(ATTENTION), layer(BLOCKS)], "rope_interleave": True},
    "indexes of blocks and pools": {"layers": [layer(BLOCKS), layer(POOLED), layer(GDN), layer(POOLS)]},
    "feed-forwards": {
        "layers": [branches(ATTENTION, u) for u in
                   (mixer("feed_forward", inner=96, activation="xielu"), mixer("swiglu", inner=96, activation="gelu_tanh"),
                    mixer("swiglu", inner=96, activation="clamped_swiglu", limit=0.7),
                    mixer("feed_forward", inner=96, activation="relu2"),
                    EXPERTS, CLAMPED, LATENT)],
    },
    "norms of outputs, more ropes": {
        "layers": [branches(ATTENTION, SWIGLU, out_norm="zero_centred", out_norm_eps=1e-4),
                   {**branches(ATTENTION, SWIGLU, norm="none", out_norm="rms"), "rope": 1}],
        "rope_interleave": True,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
                         "llama_4_scaling_beta": 0.3},
        "more_ropes": [{"rope_dim": 8, "rope_theta": 500.0}],
    },
    "llama3 rope": {
        "layers": [layer(ATTENTION), layer(GDN)],
        "rope_scaling": {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 32},
    },
    "linear rope, half a head": {
        "layers": [layer(ATTENTION), layer(KDA)], "rope_dim": 8, "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    },
    "dynamic rope": {
        "layers": [layer(ATTENTION)], "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
}
# Kinds that no class of transformers runs, or none by AutoModelForCausalLM (ministral3's file has images too). Of
# bamba's two groups its newer versions compute the norm in another way than those that the fixture is from.
WITHOUT_A_CLASS = {"apriel_h1", "apriel2", "kimi_k2", "minimax_m1", "ministral3", "bamba"}
FAMILIES = [f.name for f in sorted(FIXTURES.iterdir()) if f.name not in WITHOUT_A_CLASS]


def described(program, config, folder):
    """A folder as save_pretrained writes it, of random weights, and what the program makes of it."""
    source = folder / "source"
    source.mkdir()
    whole = {
        "model_type": "cambium", "vocab_size": 200, "hidden_size": 48, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "rope_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": False,
        "auto_map": {"AutoConfig": "configuration_cambium.CambiumConfig",
                     "AutoModelForCausalLM": "modeling_cambium.CambiumForCausalLM"},
        **config,
    }
    (source / "config.json").write_text(json.dumps(whole))
    for code in (REPO / "src/model/transformers").glob("*.py"):
        shutil.copy(code, source)
    # Not by AutoModel: what a plugin registered under the same name would come before the folder's code.
    model_class = get_class_from_dynamic_module("modeling_cambium.CambiumForCausalLM", source)
    torch.manual_seed(3)
    model = model_class(model_class.config_class.from_pretrained(source))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.uniform_(-1.0, 1.5)
            elif p.dim() == 1:
                p.add_(0.3 * torch.randn_like(p))
            else:
                p.normal_(0.0, 1.0 / max(p[0].numel(), 1) ** 0.5)
    model.save_pretrained(folder / "saved")
    run(program, "export", folder / "saved", "--transformers", folder / "out")
    return folder / "out"


def converted(program, base, options, folder):
    layers = [] if "--layers" in options else ["--layers", "0,2"]
    run(program, "convert", FIXTURES / base, "-o", folder / "out", *layers, "--init", "random", *options)
    return folder / "out"


def supernet(program, base, folder):
    run(program, "convert", FIXTURES / base, "-o", folder / "out", "--layers", "0,2", "--init", "random",
        "--mixer", "gated_delta_net,sliding_window", "--window", 16, "--supernet", "--add-preset", "fast=gated_delta_net")
    return folder / "out"


def family(program, name, folder):
    run(program, "export", FIXTURES / name, "--transformers", folder / "out")
    return folder / "out"


def check(program, name, folder, ours=True):
    """One line of the table; whether all is within the bound."""
    model = load(folder)
    results = {"golden": golden(model, folder)}
    results["verify"], greedy = verify(program, model, folder)
    if ours:
        # Where rotations go by the length of the text, that of a first piece is another.
        if model.config.rope_parameters["rope_type"] not in ("dynamic", "longrope"):
            results["steps"] = steps(model)
        results["padded"], same = padded(model)
        greedy = min(greedy, same)
    good = greedy == 0 and all(e <= BOUND for e in results.values())
    print(f"{name:<28}", *(f"{k} {v:.1e}" for k, v in results.items()), "greedy", "same" if greedy == 0 else greedy,
          "" if good else "FAILED", flush=True)
    return good


def cases(program):
    for name, (base, options) in CONVERTED.items():
        yield name, lambda folder, b=base, o=options: check(program, name, converted(program, b, o, folder))
    for name, config in DESCRIBED.items():
        yield name, lambda folder, c=config: check(program, name, described(program, c, folder))
    for name, base in (("supernet", "llama"), ("supernet beside mamba2", "falcon_h1")):
        yield name, lambda folder, n=name, b=base: check_supernet(program, n, supernet(program, b, folder))
    for base in FAMILIES:
        yield base, lambda folder, b=base: check(program, b, family(program, b, folder), ours=False)


def check_supernet(program, name, folder):
    good = check(program, name, folder)
    model = load(folder, preset="fast")
    worst = golden(model, folder, "logits.fast")
    verified, greedy = verify(program, model, folder, "--preset", "fast")
    ok = greedy == 0 and max(worst, verified) <= BOUND
    print(f"{name + ', preset':<28} golden {worst:.1e} verify {verified:.1e}", "" if ok else "FAILED", flush=True)
    return good and ok


# What the program says of units and options that it does not have.
NOT_BUILT = ("this build cannot run", "unknown unit", "unknown option", "is not supported")


def main():
    program = Path(sys.argv[1] if len(sys.argv) > 1 else REPO / "build/cambium").resolve()
    wanted = sys.argv[2:]
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; errors are largest / deviation, fp32")
    return run_cases(cases(program), wanted)


def run_cases(named, wanted):
    """Those whose name has one of the words `wanted`, or all; whether any failed."""
    failed = 0
    for name, case in named:
        if wanted and not any(w in name for w in wanted):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            try:
                failed += not case(Path(scratch))
            except Exception as problem:  # the other cases still run
                lacks = any(words in str(problem) for words in NOT_BUILT)
                failed += not lacks
                kind = "not in this build" if lacks else f"FAILED: {type(problem).__name__}"
                print(f"{name:<28} {kind}: {problem}", flush=True)
    print("all agree" if failed == 0 else f"{failed} do not agree")
    return failed != 0


transformers.logging.set_verbosity_error()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
CACHE = "cache" if "cache" in transformers.modeling_outputs.CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
if __name__ == "__main__":
    sys.exit(main())
