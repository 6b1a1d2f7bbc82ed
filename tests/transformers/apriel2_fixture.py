#!/usr/bin/env python3
"""Makes tests/fixtures/apriel2: a tiny Apriel 2 by its authors' own code, and what it computes.

    python3 tests/transformers/apriel2_fixture.py FAST_LLM OUT

FAST_LLM is a checkout of github.com/ServiceNow/Fast-LLM. Its modeling_apriel2.py takes kernels from
flash-linear-attention, causal_conv1d and mamba_ssm; here they are the recurrences themselves, token by
token in plain PyTorch, so that it runs on a CPU. Needs `pip install torch transformers safetensors einops`.
"""

import importlib
import json
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers.utils.import_utils as available
from safetensors.torch import save_file

PROMPTS = (5, 13, 110)
GREEDY = 12
WINDOW = 24


def normed(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def delta_rule(q, k, v, g, beta, initial_state=None, **_):
    """S <- e^g S; S <- S + k beta (v - S'k)'; y = S' q.   q, k (B, T, H, K), v (B, T, H, V), g (B, T, H) or a channel"""
    g = g[..., None] if g.dim() == 3 else g
    q, k = normed(q) * q.shape[-1] ** -0.5, normed(k)
    state = torch.zeros(*q[:, 0].shape, v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None]
        write = beta[:, t][..., None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
        state = state + k[:, t][..., None] * write[..., None, :]
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(outputs, 1), state


def kda_gate(g, a_log, dt_bias):
    return -a_log.exp()[:, None] * F.softplus(g + dt_bias.view(g.shape[-2:]))


def chunk_kda(g, A_log, dt_bias, **rest):  # noqa: N803
    return delta_rule(g=kda_gate(g, A_log, dt_bias), **rest)


def gated_norm(x, gate, weight, bias, activation, eps, **_):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight
    return y * {"silu": F.silu, "sigmoid": torch.sigmoid}[activation](gate)


def conv(x, weight, bias=None, activation="silu", **_):
    """x (B, C, T), weight (C, K), causal."""
    y = F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=x.shape[1])
    return F.silu(y) if activation == "silu" else y


def scan(x, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):  # noqa: N803
    """Mamba-1.   x, dt, z (B, C, T), A (C, N), B and C (B, groups, N, T)"""
    dt = F.softplus(dt + delta_bias[:, None])
    each = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(each, 1), C.repeat_interleave(each, 1)  # noqa: N806
    state = torch.zeros(*x.shape[:2], A.shape[1])
    outputs = []
    for t in range(x.shape[2]):
        state = state * (dt[..., t, None] * A).exp() + (dt[..., t] * x[..., t])[..., None] * B[..., t]
        outputs.append((state * C[..., t]).sum(-1) + D * x[..., t])
    return torch.stack(outputs, -1) * F.silu(z)


def module(name, **members):
    made = types.ModuleType(name)
    made.__dict__.update(members)
    made.__path__ = []
    sys.modules[name] = made


def authors_code(source):
    for name in ("fla", "fla.ops", "fla.modules", "mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton"):
        module(name)
    module("fla.ops.gated_delta_rule", chunk_gated_delta_rule=lambda q, k, v, **m: delta_rule(q, k, v, **m),
           fused_recurrent_gated_delta_rule=lambda q, k, v, **m: delta_rule(q, k, v, **m))
    module("fla.modules.fused_norm_gate", rms_norm_gated=gated_norm)
    module("fla.ops.kda", chunk_kda=chunk_kda, fused_recurrent_kda=lambda **m: delta_rule(**m))
    module("fla.ops.kda.gate", fused_kda_gate=lambda g, a_log, dt_bias: kda_gate(g, a_log, dt_bias))
    module("causal_conv1d", causal_conv1d_fn=conv, causal_conv1d_update=None)
    module("mamba_ssm.ops.selective_scan_interface", selective_scan_fn=scan)
    module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=None)
    available.is_causal_conv1d_available = available.is_mamba_ssm_available = lambda: True
    module("apriel2")
    sys.modules["apriel2"].__path__ = [str(Path(source) / "fast_llm_external_models/apriel2")]
    return importlib.import_module("apriel2.modeling_apriel2")


def configuration():
    attention = {"type": "attention", "heads": 4, "head_groups": 2, "head_size": 16, "add_linear_biases": False,
                 "rotary": {"type": "mistral_1d", "theta": 10000.0}}
    window = {**attention, "window_size": WINDOW}
    gdn = {"type": "gdn", "value_heads": 4, "key_heads": 2, "key_head_dim": 16, "value_head_dim": 16,
           "convolution_layer": {"kernel_size": 4}}
    kda = {"type": "kda", "heads": 4, "head_dim": 16, "convolution_layer": {"kernel_size": 4},
           "normalization": {"epsilon": 1e-5, "activation": "sigmoid"}}
    plain_kda = {**kda, "normalization": {"epsilon": 1e-5}}
    mamba = {"type": "mamba", "d_inner": 64, "d_xb": 32, "state_size": 16, "dt_rank": 4, "d_conv": 4, "conv_bias": True,
             "dt_proj_bias": True, "repeat_kv_before_conv": True}
    choice = {"attention": attention, "sliding_window": window, "gdn": gdn, "kda": kda}

    def block(mixer):
        return {"mixer": mixer, "mlp": {"type": "mlp", "intermediate_size": 96, "activation": "silu", "gated": True,
                                        "add_linear_biases": False},
                "normalization": {"type": "rms_norm", "epsilon": 1e-5}}

    def stochastic(main):
        return {"type": "stochastic", "main_mixer_name": main, "sampling_strategy": "uniform", "mixers": choice}

    mixers = {"attn": attention, "swa": stochastic("sliding_window"), "gdn": stochastic("gdn"), "kda": stochastic("kda"),
              "mamba": mamba, "plain_kda": plain_kda}
    return {
        "architectures": ["Apriel2ForCausalLM"], "model_type": "apriel2_text", "vocab_size": 384, "hidden_size": 64,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False, "torch_dtype": "float32",
        "decoder": {"type": "pattern", "num_blocks": len(mixers), "pattern": list(mixers),
                    "blocks": {name: block(mixer) for name, mixer in mixers.items()}},
        "embeddings": {"max_position_embeddings": 512}, "head": {"normalization": {"type": "rms_norm", "epsilon": 1e-5}},
    }


@torch.no_grad()
def main(source, out):
    code = authors_code(source)
    config = configuration()
    parsed = code.Apriel2TextConfig(**{k: v for k, v in config.items() if k != "model_type"})
    parsed._attn_implementation = "eager"
    model = code.Apriel2ForCausalLM(parsed).eval()
    code.is_fast_path_available = False  # by which Mamba would ask for a GPU
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if name.endswith("A_log"):
            p.uniform_(-1.0, 1.5, generator=generator)
        elif name.endswith("dt_bias"):
            p.normal_(0.0, 0.5, generator=generator)
        elif p.dim() == 1:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        else:
            p.normal_(0.0, 1.0 / p.shape[-1] ** 0.5, generator=generator)
        p.copy_(p.to(torch.bfloat16))

    def logits(tokens):
        return model(tokens[None], use_cache=False).logits[0]

    reference = {}
    for i, n in enumerate(PROMPTS):
        tokens = torch.randint(3, config["vocab_size"], (n,), generator=generator)
        reference[f"tokens.{i}"], reference[f"logits.{i}"] = tokens, logits(tokens).contiguous()
        whole = tokens
        for _ in range(GREEDY):
            whole = torch.cat([whole, logits(whole)[-1:].argmax(-1)])
        reference[f"greedy.{i}"] = whole[n:]
    out = Path(out)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file({n: t.detach().to(torch.bfloat16).contiguous() for n, t in model.state_dict().items()},
              out / "model.safetensors", metadata={"format": "pt"})
    save_file(reference, out / "reference.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
