#!/usr/bin/env python3
"""Tiny models of transformers' own classes, of sizes, options and seeds drawn by chance, run by Cambium.

    python3 tests/transformers/vary.py build/cambium [--models N] [--seed S] [--keep DIR] [FAMILY ...]

Each model is a fixture's configuration with keys drawn anew: odd widths, one head of keys or as many as
of queries, heads wider than their share, scalings of the rotation, numbers of experts, groups and shared
experts, dense layers first, tied heads. PyTorch makes its weights and writes it, in the names of public
files; then `cambium verify` runs it by every way, with its config.json as the public files spell it and
as transformers writes it. The bound is verify's own, twice where a model's norms are of nearly nothing.
What transformers refuses to build is drawn again. --keep leaves the models that fail in DIR.
Without torch, transformers and safetensors it says so and skips.
"""

import argparse
import copy
import json
import random
import shutil
import tempfile
from pathlib import Path

from compare import BOUND, FIXTURES, GREEDY, load_file, logits_of, run_cases, save_file, torch, transformers, verified

from transformers import AutoConfig, AutoModelForCausalLM

PROMPTS = (1, 5, 37, 110)


def draw_rope(rng, dim, kinds=("default", "linear", "llama3", "yarn", "longrope")):
    """A rope_scaling of a kind drawn by chance; null as often as any."""
    kind = rng.choice(kinds)
    factor = rng.choice((2.0, 4.0, 8.0))
    if kind == "linear":
        return {rng.choice(("type", "rope_type")): "linear", "factor": factor}
    if kind == "llama3":
        return {"rope_type": "llama3", "factor": factor, "low_freq_factor": rng.choice((1.0, 1.5)),
                "high_freq_factor": rng.choice((3.0, 4.0)), "original_max_position_embeddings": rng.choice((64, 128))}
    if kind == "yarn":
        more = rng.choice(({}, {"mscale": 1.0, "mscale_all_dim": 1.0}, {"mscale": 0.8, "mscale_all_dim": 0.5},
                           {"beta_fast": 16.0, "beta_slow": 2.0}, {"attention_factor": 1.3}, {"truncate": False}))
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64, **more}
    if kind == "longrope":
        # Lengths on one side of the original length alone: none of the prompts crosses it while it goes on.
        return {"rope_type": "longrope", "factor": factor, "original_max_position_embeddings": 64,
                "short_factor": [1.0 + 0.1 * i for i in range(dim // 2)],
                "long_factor": [1.0 + 0.5 * i for i in range(dim // 2)]}
    return None


def heads(rng, head_dim=True, multiple=2):
    """Widths and heads; `head_dim`: the key is the family's own and need not be the width's share."""
    kv = rng.choice((1, 1, 2, 3))
    count = kv * rng.choice((1, 2, 3, 5))
    dim = multiple * rng.choice((4, 5, 7, 8, 12, 16))
    width = count * dim if not head_dim else rng.choice((40, 48, 56, 72, 100))
    keys = {"num_attention_heads": count, "num_key_value_heads": kv, "hidden_size": width}
    if head_dim:
        keys["head_dim"] = dim
    return keys, dim


def common(rng, layers=(1, 2, 3, 4)):
    return {
        "num_hidden_layers": rng.choice(layers), "vocab_size": rng.choice((129, 200, 257, 320)),
        "intermediate_size": rng.choice((17, 48, 90, 131)), "tie_word_embeddings": rng.random() < 0.4,
        "rms_norm_eps": rng.choice((1e-5, 1e-6)), "rope_theta": rng.choice((10000.0, 50000.0, 1e6)),
        "max_position_embeddings": rng.choice((256, 512, 1000)),
    }


def decoder(rng, head_dim=True, ropes=True, **more):
    keys, dim = heads(rng, head_dim)
    return {**common(rng), **keys, **({"rope_scaling": draw_rope(rng, dim)} if ropes else {}), **more}


def experts(rng, count="num_experts", top="num_experts_per_tok"):
    number = rng.choice((3, 5, 8, 12))
    return {count: number, top: rng.randint(1, min(4, number))}


def kinds(rng, layers, names):
    """A kind for each layer, all of them there where there is room."""
    drawn = [rng.choice(names) for _ in range(layers)]
    for i, name in enumerate(names[:layers]):
        drawn[i] = name
    rng.shuffle(drawn)
    return drawn


def llama(rng):
    return decoder(rng, attention_bias=rng.random() < 0.5, mlp_bias=rng.random() < 0.5)


def mistral(rng):
    return decoder(rng, sliding_window=rng.choice((None, 7, 40)))


def qwen2(rng):
    keys = decoder(rng, head_dim=False, use_sliding_window=rng.random() < 0.5, sliding_window=rng.choice((5, 30)))
    return {**keys, "max_window_layers": rng.randint(0, keys["num_hidden_layers"])}


def qwen3(rng):
    keys = qwen2(rng)
    keys["head_dim"] = 2 * rng.choice((3, 8, 13))
    return {**keys, "rope_scaling": draw_rope(rng, keys["head_dim"]), "attention_bias": rng.random() < 0.4}


def qwen3_moe(rng):
    keys = {**qwen3(rng), **experts(rng), "moe_intermediate_size": rng.choice((9, 24)),
            "decoder_sparse_step": rng.choice((1, 2)), "norm_topk_prob": rng.random() < 0.5}
    keys["mlp_only_layers"] = [i for i in range(keys["num_hidden_layers"]) if rng.random() < 0.3]
    return keys


def mixtral(rng):
    return {**mistral(rng), **experts(rng, "num_local_experts")}


def gemma(rng):
    keys = decoder(rng, ropes=False, query_pre_attn_scalar=rng.choice((16, 24, 30)), sliding_window=rng.choice((6, 50)))
    keys["layer_types"] = kinds(rng, keys["num_hidden_layers"], ["sliding_attention", "full_attention"])
    keys["tie_word_embeddings"] = True
    return keys


def gemma2(rng):
    return {**gemma(rng), "attn_logit_softcapping": rng.choice((None, 2.0, 50.0)),
            "final_logit_softcapping": rng.choice((None, 3.0, 30.0))}


def gemma3(rng):
    keys = {**gemma(rng), "rope_local_base_freq": rng.choice((10000, 5000.0)),
            "rope_scaling": rng.choice((None, {"rope_type": "linear", "factor": 8.0}))}
    del keys["layer_types"]
    return {**keys, "sliding_window_pattern": rng.choice((2, 3, 6))}


def phi3(rng):
    keys, dim = heads(rng, head_dim=False, multiple=4)
    part = rng.choice((1.0, 0.5, 0.75))
    turned = int(dim * part)
    part = part if turned % 2 == 0 and turned == dim * part else 1.0
    scaling = draw_rope(rng, int(dim * part), ("default", "longrope"))
    keys = {**common(rng), **keys, "partial_rotary_factor": part, "sliding_window": rng.choice((None, 9, 60))}
    if scaling is None:
        return {**keys, "original_max_position_embeddings": keys["max_position_embeddings"]}
    scaling = {"type": "longrope", "short_factor": scaling["short_factor"], "long_factor": scaling["long_factor"]}
    return {**keys, "rope_scaling": scaling, "original_max_position_embeddings": 64}


def olmo2(rng):
    return decoder(rng, head_dim=False, attention_bias=rng.random() < 0.4)


def olmo3(rng):
    keys = decoder(rng, head_dim=False, sliding_window=rng.choice((4, 40)), attention_bias=rng.random() < 0.4)
    keys["layer_types"] = kinds(rng, keys["num_hidden_layers"], ["sliding_attention", "full_attention"])
    # transformers gives windowed layers the theta of released models whatever is said, and reads neither `truncate` nor `type`.
    keys["rope_theta"] = 500000.0
    scaling = keys["rope_scaling"] or {}
    scaling.pop("truncate", None)
    if "type" in scaling:
        scaling["rope_type"] = scaling.pop("type")
    return keys


def factors(rng):
    return {"embedding_multiplier": rng.choice((1.0, 7.5)), "logits_scaling": rng.choice((1.0, 3.0)),
            "attention_multiplier": rng.choice((0.1, 0.3)), "residual_multiplier": rng.choice((0.22, 0.7))}


def granite(rng):
    return decoder(rng, head_dim=False, attention_bias=rng.random() < 0.4, mlp_bias=rng.random() < 0.4, **factors(rng))


def granite_moe(rng):
    keys = {**granite(rng), **experts(rng, "num_local_experts"), "shared_intermediate_size": rng.choice((21, 64))}
    del keys["mlp_bias"]
    return keys


def smollm3(rng):
    keys = decoder(rng, head_dim=False, attention_bias=rng.random() < 0.4, mlp_bias=rng.random() < 0.4)
    layers = keys["num_hidden_layers"]
    windows = rng.random() < 0.4
    return {**keys, "no_rope_layers": [rng.randint(0, 1) for _ in range(layers)], "use_sliding_window": windows,
            "sliding_window": 20 if windows else None,
            "layer_types": kinds(rng, layers, ["full_attention", "sliding_attention"][: 1 + windows])}


def apertus(rng):
    keys = decoder(rng, head_dim=False, attention_bias=rng.random() < 0.4)
    dim = keys["hidden_size"] // keys["num_attention_heads"]
    # Which transformers takes for an absent one where it is null.
    return {**keys, "rope_scaling": draw_rope(rng, dim, ("llama3", "linear", "yarn"))}


def ministral(rng):
    keys = decoder(rng, sliding_window=rng.choice((4, 40)))
    keys["layer_types"] = kinds(rng, keys["num_hidden_layers"], ["sliding_attention", "full_attention"])
    return keys


def ministral3(rng):
    keys = decoder(rng, ropes=False, sliding_window=None)
    theta = keys.pop("rope_theta")
    return {**keys, "rope_parameters": {
        "rope_type": "yarn", "type": "yarn", "rope_theta": theta, "factor": rng.choice((4.0, 16.0)), "beta_fast": 32.0,
        "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": rng.choice((16, 32)),
        "llama_4_scaling_beta": rng.choice((0.1, 0.3))}}


def minimax_m2(rng):
    keys, dim = heads(rng)
    return {**common(rng), **keys, **experts(rng, "num_local_experts"),
            "rotary_dim": 2 * rng.randint(1, dim // 2), "attn_type_list": None}


def minimax_m3(rng):
    keys, dim = heads(rng, multiple=4)
    made = {**common(rng), **keys, **experts(rng, "num_local_experts"), "partial_rotary_factor": rng.choice((0.5, 1.0)),
            "dense_intermediate_size": rng.choice((33, 70)), "shared_intermediate_size": rng.choice((10, 31)),
            "routed_scaling_factor": rng.choice((1.0, 2.0)), "swiglu_limit": rng.choice((1.5, 7.0))}
    made["rotary_dim"] = int(dim * made["partial_rotary_factor"])
    top = rng.choice((2, 3, 5))
    made["sparse_attention_config"] = {
        "use_sparse_attention": True, "sparse_index_dim": made["rotary_dim"] + rng.choice((0, 6)),
        "sparse_num_index_heads": keys["num_key_value_heads"], "sparse_topk_blocks": top,
        "sparse_block_size": rng.choice((3, 8, 16)), "sparse_local_block": rng.randint(1, top),
        "sparse_attention_freq": [rng.randint(0, 1) for _ in range(made["num_hidden_layers"])]}
    made["moe_layer_freq"] = [rng.randint(0, 1) for _ in range(made["num_hidden_layers"])]
    return made


def minimax(rng):
    keys, _ = heads(rng)
    made = {**common(rng, (2, 3, 5)), **keys, **experts(rng, "num_local_experts")}
    if rng.random() < 0.5:
        made["head_dim"] = 16
    made["block_size"] = rng.choice((8, 32))
    for word in ("full_attn", "linear_attn", "mlp"):
        made[word + "_alpha_factor"] = rng.choice((1.0, 2.5))
        made[word + "_beta_factor"] = rng.choice((1.0, 0.5))
    made["layer_types"] = kinds(rng, made["num_hidden_layers"], ["linear_attention", "full_attention"])
    return made


def gpt_oss(rng):
    keys = {**decoder(rng), **experts(rng, "num_local_experts"), "swiglu_limit": rng.choice((1.5, 7.0)),
            "sliding_window": rng.choice((5, 40))}
    keys["rope_scaling"] = draw_rope(rng, keys["head_dim"], ("yarn",))
    keys["experts_per_token"] = keys["num_experts_per_tok"]
    keys["layer_types"] = kinds(rng, keys["num_hidden_layers"], ["sliding_attention", "full_attention"])
    return keys


def mamba(rng, width):
    """Sizes of Mamba-2 whose heads make up twice the width; one group, for of more versions of transformers
    compute the norm in two ways."""
    dim = rng.choice([d for d in (4, 8, 10, 16, 20) if 2 * width % d == 0])
    count = 2 * width // dim
    return {"mamba_n_heads": count, "mamba_d_head": dim, "mamba_expand": 2, "mamba_d_state": rng.choice((8, 12, 16)),
            "mamba_n_groups": 1,
            "mamba_d_conv": rng.choice((2, 4)), "mamba_chunk_size": rng.choice((16, 32))}


def bamba(rng):
    keys, _ = heads(rng, head_dim=False, multiple=4)
    keys = {**common(rng), **keys}
    layers = keys["num_hidden_layers"] = rng.choice((2, 3, 4))
    attends = [i for i, kind in enumerate(kinds(rng, layers, ["mamba", "attention"])) if kind == "attention"]
    return {**keys, **mamba(rng, keys["hidden_size"]), "attn_layer_indices": attends}


def granite_hybrid(rng):
    keys = decoder(rng, head_dim=False, ropes=False, **factors(rng))
    layers = keys["num_hidden_layers"] = rng.choice((2, 3, 4))
    keys.update(mamba(rng, keys["hidden_size"]))
    keys["layer_types"] = kinds(rng, layers, ["mamba", "attention"])
    keys["position_embedding_type"] = rng.choice(("rope", "nope"))
    keys["shared_intermediate_size"] = rng.choice((30, 64))
    if rng.random() < 0.6:
        keys.update(experts(rng, "num_local_experts"))
    return keys


def falcon_h1(rng):
    keys = decoder(rng)
    count, dim = rng.choice(((3, 8), (4, 16), (6, 10)))
    def some(number):
        return [round(rng.uniform(0.3, 1.5), 3) for _ in range(number)]
    return {**keys, "mamba_n_heads": count, "mamba_d_head": dim, "mamba_d_ssm": count * dim,
            "mamba_d_state": rng.choice((8, 16)), "mamba_n_groups": rng.choice([g for g in (1, 2, 3) if count % g == 0]),
            "mamba_d_conv": rng.choice((2, 4)), "mamba_rms_norm": rng.random() < 0.5,
            "rope_scaling": draw_rope(rng, keys["head_dim"], ("default", "linear", "yarn")),
            "attention_out_multiplier": some(1)[0], "embedding_multiplier": 5.5, "key_multiplier": some(1)[0],
            "lm_head_multiplier": some(1)[0], "mlp_multipliers": some(2), "ssm_in_multiplier": some(1)[0],
            "ssm_multipliers": some(5), "ssm_out_multiplier": some(1)[0]}


def jamba(rng):
    keys = decoder(rng, head_dim=False, ropes=False)
    keys["num_hidden_layers"] = rng.choice((3, 4, 5))
    period, step = rng.choice((2, 3)), rng.choice((1, 2, 3))
    return {**keys, "attn_layer_period": period, "attn_layer_offset": rng.randrange(period), "expert_layer_period": step,
            "expert_layer_offset": rng.randrange(step), **experts(rng), "mamba_d_conv": rng.choice((2, 4)),
            "mamba_d_state": rng.choice((7, 16)), "mamba_dt_rank": rng.choice((3, 8, "auto")),
            "mamba_expand": rng.choice((1, 2, 3)), "mamba_conv_bias": rng.random() < 0.7}


def lfm2(rng):
    keys = decoder(rng, head_dim=False, ropes=False)
    layers = keys["num_hidden_layers"] = rng.choice((2, 3, 5))
    drawn = kinds(rng, layers, ["conv", "full_attention"])
    return {**keys, "norm_eps": rng.choice((1e-5, 1e-6)), "conv_L_cache": rng.choice((2, 3, 4)),
            "conv_bias": rng.random() < 0.4, "block_ff_dim": rng.choice((100, 151)), "block_dim": keys["hidden_size"],
            "block_multiple_of": rng.choice((1, 16, 64)), "block_auto_adjust_ff_dim": rng.random() < 0.7,
            "block_ffn_dim_multiplier": rng.choice((1.0, 1.3)), "conv_dim": keys["hidden_size"],
            "conv_dim_out": keys["hidden_size"], "num_heads": keys["num_attention_heads"],
            "full_attn_idxs": [i for i, kind in enumerate(drawn) if kind == "full_attention"]}


def lfm2_moe(rng):
    keys = decoder(rng, head_dim=False, ropes=False)
    layers = keys["num_hidden_layers"] = rng.choice((2, 3, 5))
    return {**keys, **experts(rng), "norm_eps": 1e-5, "conv_L_cache": rng.choice((2, 3, 4)),
            "conv_bias": rng.random() < 0.4, "moe_intermediate_size": rng.choice((9, 24)),
            "num_dense_layers": rng.randint(0, layers), "norm_topk_prob": rng.random() < 0.5,
            "routed_scaling_factor": rng.choice((1.0, 1.7)), "use_expert_bias": rng.random() < 0.7,
            "layer_types": kinds(rng, layers, ["conv", "full_attention"])}


def groups_of_experts(rng, keys, group="n_group"):
    """Experts in groups, of which some are looked at."""
    per = rng.choice((2, 3, 4))
    number = rng.choice((1, 2, 4))
    looked = rng.randint(1, number)
    return {**keys, group: number, "topk_group": looked, "top": rng.randint(1, per * looked), "count": per * number}


def nemotron_h(rng):
    keys = {**decoder(rng, ropes=False), "tie_word_embeddings": False}  # which its class does not do
    drawn = groups_of_experts(rng, {})
    count, dim = rng.choice(((4, 8), (6, 10), (8, 16)))
    pattern = rng.choice(("M-M*", "M*E", "ME*EM-", "*M", "M-*-M*"))
    made = {**keys, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "mamba_num_heads": count,
            "mamba_head_dim": dim, "n_groups": rng.choice([g for g in (1, 2, 3, 4) if count % g == 0]),
            "ssm_state_size": rng.choice((8, 12)), "conv_kernel": rng.choice((2, 4)), "chunk_size": rng.choice((16, 32)),
            "n_group": drawn["n_group"], "topk_group": drawn["topk_group"], "n_routed_experts": drawn["count"],
            "num_experts_per_tok": drawn["top"], "n_shared_experts": 1, "moe_intermediate_size": rng.choice((9, 40)),
            "moe_shared_expert_intermediate_size": rng.choice((20, 33)),
            "norm_topk_prob": rng.random() < 0.6, "routed_scaling_factor": rng.choice((1.0, 2.5)),
            "layer_norm_epsilon": 1e-5, "norm_eps": 1e-5}
    if rng.random() < 0.4:
        made["moe_latent_size"] = rng.choice((11, 24))
    return made


def latent(rng, yarn=True):
    """Latent attention before experts, in DeepSeek's words."""
    keys = common(rng, (2, 3, 4))
    drawn = groups_of_experts(rng, {})
    count = rng.choice((1, 3, 4, 6))
    turned = rng.choice((8, 12, 16))
    scaling = draw_rope(rng, turned, ("default", "yarn")) if yarn else None
    return {**keys, "hidden_size": rng.choice((40, 64, 72)), "num_attention_heads": count, "num_key_value_heads": count,
            "q_lora_rank": rng.choice((None, 20, 33)), "kv_lora_rank": rng.choice((16, 21)), "qk_rope_head_dim": turned,
            "qk_nope_head_dim": rng.choice((10, 16, 24)), "v_head_dim": rng.choice((12, 16, 25)), "rope_scaling": scaling,
            "n_group": drawn["n_group"], "topk_group": drawn["topk_group"], "n_routed_experts": drawn["count"],
            "num_experts_per_tok": drawn["top"], "n_shared_experts": rng.choice((1, 2)),
            "moe_intermediate_size": rng.choice((9, 32)), "first_k_dense_replace": rng.randint(0, 2),
            "norm_topk_prob": rng.random() < 0.7, "routed_scaling_factor": rng.choice((1.0, 2.5))}


def deepseek_v3(rng):
    return {**latent(rng), "rope_interleave": rng.random() < 0.8}


def deepseek_v32(rng):
    # Of few heads all may score below zero, and of equal tokens (0) each program takes others.
    keys = {**latent(rng), "index_topk": rng.choice((3, 16, 200)), "index_n_heads": rng.choice((16, 20))}
    keys["index_head_dim"] = keys["qk_rope_head_dim"] + rng.choice((4, 16))
    keys["q_lora_rank"] = keys["q_lora_rank"] or 24
    return keys


def kimi_linear(rng):
    keys = {**latent(rng, yarn=False), "tie_word_embeddings": False}
    layers = keys["num_hidden_layers"]
    full = sorted(rng.sample(range(1, layers + 1), rng.randint(1, layers - 1)))
    return {**keys, "q_lora_rank": None, "model_max_length": keys["max_position_embeddings"],
            "num_experts": keys["n_routed_experts"], "num_experts_per_token": keys["num_experts_per_tok"],
            "num_shared_experts": keys["n_shared_experts"], "num_expert_group": keys["n_group"],
            "moe_renormalize": keys["norm_topk_prob"],
            "linear_attn_config": {"full_attn_layers": full, "kda_layers": [i for i in range(1, layers + 1) if i not in full],
                                   "head_dim": rng.choice((8, 12, 16)), "num_heads": rng.choice((1, 3, 4)),
                                   "short_conv_kernel_size": rng.choice((2, 4))}}


def bailing_hybrid(rng):
    keys = {**latent(rng, yarn=False), "tie_word_embeddings": False}
    group = rng.choice((2, 3))
    keys["num_hidden_layers"] = group * rng.choice((1, 2))
    return {**keys, "num_experts": keys["n_routed_experts"], "num_shared_experts": 1, "layer_group_size": group,
            "moe_shared_expert_intermediate_size": keys["moe_intermediate_size"], "head_dim": rng.choice((8, 12, 16)),
            "kda_safe_gate": rng.random() < 0.6, "kda_lower_bound": rng.choice((-5.0, -3.0)),
            "qk_head_dim": keys["qk_nope_head_dim"] + keys["qk_rope_head_dim"],
            "short_conv_kernel_size": rng.choice((2, 4))}


def delta(rng):
    """Gated DeltaNet beside gated attention."""
    keys, dim = heads(rng, multiple=4)
    layers = rng.choice((2, 3, 4))
    key_heads = rng.choice((1, 2, 3))
    part = rng.choice((0.25, 0.5, 1.0))
    return {**common(rng, (layers,)), **keys, "partial_rotary_factor": part if dim * part % 2 == 0 else 0.5,
            "linear_num_key_heads": key_heads, "linear_num_value_heads": key_heads * rng.choice((1, 2, 3)),
            "linear_key_head_dim": rng.choice((8, 12, 16)), "linear_value_head_dim": rng.choice((8, 20)),
            "linear_conv_kernel_dim": rng.choice((2, 4)),
            "layer_types": kinds(rng, layers, ["linear_attention", "full_attention"])}


def shared_experts(rng):
    return {**experts(rng), "moe_intermediate_size": rng.choice((9, 32)),
            "shared_expert_intermediate_size": rng.choice((10, 31))}


def qwen3_next(rng):
    return {**delta(rng), **shared_experts(rng), "norm_topk_prob": rng.random() < 0.6,
            "attention_bias": rng.random() < 0.3}


def qwen3_5(rng):
    keys = delta(rng)
    pairs = int(keys["head_dim"] * keys["partial_rotary_factor"]) // 2
    third = pairs // 3
    keys["rope_parameters"] = {
        "mrope_interleaved": True, "mrope_section": [pairs - 2 * third, third, third], "rope_type": "default",
        "rope_theta": keys.pop("rope_theta"), "partial_rotary_factor": keys.pop("partial_rotary_factor")}
    return keys


def qwen3_5_moe(rng):
    return {**qwen3_5(rng), **shared_experts(rng)}


def olmo_hybrid(rng):
    keys = decoder(rng, head_dim=False, ropes=False)
    layers = keys["num_hidden_layers"] = rng.choice((2, 3, 4))
    count = rng.choice((1, 2, 3))
    return {**keys, "linear_num_key_heads": count, "linear_num_value_heads": count,
            "linear_key_head_dim": rng.choice((8, 12)), "linear_value_head_dim": rng.choice((8, 24)),
            "linear_conv_kernel_dim": rng.choice((2, 4)), "linear_allow_neg_eigval": rng.random() < 0.5,
            "rope_parameters": rng.choice(({"rope_theta": None}, {"rope_type": "default", "rope_theta": 5000.0})),
            "layer_types": kinds(rng, layers, ["linear_attention", "full_attention"])}


# Drawn keys by family; the fixture whose configuration they change.
FAMILIES = {
    "llama": (llama, "llama"), "mistral": (mistral, "mistral"), "ministral": (ministral, "mistral"),
    "ministral3": (ministral3, "ministral3"), "qwen2": (qwen2, "qwen2_swa"), "qwen3": (qwen3, "qwen3"),
    "qwen3_moe": (qwen3_moe, "qwen3_moe"), "mixtral": (mixtral, "mixtral"), "gemma2": (gemma2, "gemma2"),
    "gemma3_text": (gemma3, "gemma3"), "phi3": (phi3, "phi3"), "olmo2": (olmo2, "olmo2"), "olmo3": (olmo3, "olmo3"),
    "granite": (granite, "granite"), "granitemoe": (granite_moe, "granite_moe"),
    "granitemoeshared": (granite_moe, "granite_moe"), "smollm3": (smollm3, "smollm3"), "apertus": (apertus, "apertus"),
    "minimax_m2": (minimax_m2, "minimax_m2"), "minimax_m3_vl_text": (minimax_m3, "minimax_m3"), "minimax": (minimax, "mixtral"), "gpt_oss": (gpt_oss, "gpt_oss"),
    "bamba": (bamba, "bamba"), "granitemoehybrid": (granite_hybrid, "granite_hybrid"),
    "falcon_h1": (falcon_h1, "falcon_h1"), "jamba": (jamba, "jamba"), "lfm2": (lfm2, "lfm2"),
    "lfm2_moe": (lfm2_moe, "lfm2_moe"), "nemotron_h": (nemotron_h, "nemotron_h_moe"),
    "deepseek_v3": (deepseek_v3, "deepseek_v3"), "deepseek_v32": (deepseek_v32, "deepseek_v32"),
    "kimi_linear": (kimi_linear, "kimi_linear"), "bailing_hybrid": (bailing_hybrid, "bailing_hybrid"),
    "qwen3_next": (qwen3_next, "qwen3_next"), "qwen3_5_text": (qwen3_5, "qwen3_5_text"),
    "qwen3_5_moe_text": (qwen3_5_moe, "qwen3_5_moe"), "olmo_hybrid": (olmo_hybrid, "olmo_hybrid"),
}


def configuration(name, rng):
    """A config.json as public files of the family spell it."""
    draw, fixture = FAMILIES[name]
    text = (FIXTURES / fixture / "config.json").read_text().replace("Infinity", "1e999")
    config = json.loads(text)
    config = {**config.pop("text_config", {}), **{k: v for k, v in config.items() if k not in ("vision_config",)}} \
        if "text_config" in config else config
    drawn = draw(rng)
    if "layer_types" not in drawn:  # the fixture's is of its own number of layers
        config.pop("layer_types", None)
    if "rope_parameters" in drawn:
        config.pop("rope_theta", None)
    config.update(drawn, model_type=name)
    for key in ("architectures", "auto_map"):
        config.pop(key, None)
    return config


@torch.no_grad()
def fill(model, seed):
    """Weights by which nothing is small, and buffers of routers too."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if n.endswith("bias"))]:
        if name.endswith("A_log"):
            p.uniform_(-1.0, 1.5, generator=generator)
        elif name.endswith(("dt_bias", "e_score_correction_bias", "expert_bias")):
            p.normal_(0.0, 0.5, generator=generator)
        elif p.dim() <= 1:
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
        else:
            p.normal_(0.0, 1.2 / p.shape[-1] ** 0.5, generator=generator)
    for module in model.modules():
        if hasattr(module, "time_step_limit") and model.config.model_type == "nemotron_h":
            module.time_step_limit = (0.0, float("inf"))  # the released code has no such limit


def built(name, rng):
    """A configuration that transformers takes, and the model."""
    problem = None
    for _ in range(20):
        config = configuration(name, rng)
        try:
            keys = copy.deepcopy(config)
            parsed = AutoConfig.for_model(keys.pop("model_type"), **keys)
            options = {"attn_implementation": "eager", "experts_implementation": "eager", "dtype": torch.float32}
            return config, AutoModelForCausalLM.from_config(parsed, **options).eval()
        except Exception as refused:  # a draw that its authors did not mean
            problem = refused
    raise problem


@torch.no_grad()
def reference_of(model, rng, prompts=PROMPTS):
    """Logits of prompts, and what is likeliest to follow, by full passes: caches have faults of their own."""
    scaling = getattr(model.config, "rope_parameters", None) or {}
    follow = 0 if scaling.get("rope_type") == "dynamic" else GREEDY
    reference = {}
    for k, n in enumerate(prompts):
        tokens = torch.tensor([rng.randrange(3, model.config.vocab_size) for _ in range(n)])
        reference[f"tokens.{k}"] = tokens
        reference[f"logits.{k}"] = logits_of(model, tokens).contiguous()
        whole = tokens
        for _ in range(follow):
            whole = torch.cat([whole, logits_of(model, whole)[-1:].argmax(-1)])
        reference[f"greedy.{k}"] = whole[n:]
    return reference


def mend(model, folder):
    """OLMo Hybrid's convolutions, which transformers saves in equal thirds, by the sizes of q, k and v."""
    if model.config.model_type != "olmo_hybrid":
        return
    tensors = load_file(folder / "model.safetensors")
    for i, layer in enumerate(model.model.layers):
        if hasattr(layer, "linear_attn"):
            sizes = [getattr(layer.linear_attn, part + "_proj").out_features for part in "qkv"]
            for part, kernel in zip("qkv", layer.linear_attn.conv1d.weight.detach().split(sizes)):
                tensors[f"model.layers.{i}.linear_attn.{part}_conv1d.weight"] = kernel.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def check(program, name, seed, folder, keep):
    rng = random.Random(f"{name} {seed}")
    config, model = built(name, rng)
    fill(model, seed)
    reference = reference_of(model, rng)
    model.save_pretrained(folder / "library")
    mend(model, folder / "library")
    public = folder / "public"
    shutil.copytree(folder / "library", public)
    (public / "config.json").write_text(json.dumps(config, indent=1))
    good, results = True, []
    for spelling in ("public", "library"):
        try:
            worst, greedy = verified(program, folder / spelling, reference)
            good = good and worst <= BOUND and greedy == 0
            results.append(f"{spelling} {worst:.1e}" + ("" if greedy == 0 else f" greedy {greedy}"))
        except RuntimeError as problem:
            good = False
            results.append(f"{spelling}: {[line for line in str(problem).splitlines() if 'error' in line]}")
    print(f"{name:<18} {seed:<4}", *results, "" if good else "FAILED", flush=True)
    if keep and not good:
        shutil.copytree(folder, Path(keep) / f"{name}-{seed}", dirs_exist_ok=True)
    return good


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    arguments.add_argument("program", nargs="?", default="build/cambium")
    arguments.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    arguments.add_argument("--models", type=int, default=3)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--keep")
    given = arguments.parse_intermixed_args()
    transformers.logging.disable_progress_bar()
    program = Path(given.program).resolve()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}; errors are largest / deviation, fp32")
    cases = (
        (f"{name}", lambda folder, n=name, s=seed: check(program, n, s, folder, given.keep))
        for name in given.families or FAMILIES for seed in range(given.seed, given.seed + given.models)
    )
    return run_cases(cases, [])


if __name__ == "__main__":
    raise SystemExit(main())
