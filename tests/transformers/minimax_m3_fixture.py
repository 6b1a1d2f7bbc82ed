#!/usr/bin/env python3
"""Makes tests/fixtures/minimax_m3: a tiny MiniMax-M3 by transformers' class, and what it computes.

    python3 tests/transformers/minimax_m3_fixture.py OUT

The class is that of the text alone, and the names of the tensors are its own; config.json is spelled as
released files have it, without the model of images. Weights are in bf16.
"""

import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vary import fill, reference_of

TEXT = {
    "model_type": "minimax_m3_vl_text", "vocab_size": 384, "hidden_size": 64, "intermediate_size": 24,
    "dense_intermediate_size": 80, "shared_intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "rotary_dim": 8, "partial_rotary_factor": 0.5, "rope_theta": 5000000,
    "rms_norm_eps": 1e-06, "max_position_embeddings": 512, "num_local_experts": 6, "num_experts_per_tok": 2,
    "n_shared_experts": 1, "moe_layer_freq": [0, 1, 1], "hidden_act": "swigluoai", "swiglu_alpha": 1.702,
    "swiglu_limit": 1.5, "scoring_func": "sigmoid", "use_routing_bias": True, "routed_scaling_factor": 2.0,
    "use_gemma_norm": True, "use_qk_norm": True, "qk_norm_type": "per_head", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
    "sparse_attention_config": {
        "use_sparse_attention": True, "sparse_index_dim": 16, "sparse_num_index_heads": 2, "sparse_topk_blocks": 3,
        "sparse_block_size": 8, "sparse_score_type": "max", "sparse_init_block": 0, "sparse_local_block": 1,
        "sparse_attention_freq": [0, 1, 1], "sparse_disable_index_value": [0, 1, 1]},
}


@torch.no_grad()
def main(out):
    config = AutoConfig.for_model(**json.loads(json.dumps(TEXT)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager",
                                             dtype=torch.float32).eval()
    fill(model, 7)
    for tensor in [*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("bias"))]:
        tensor.copy_(tensor.to(torch.bfloat16))
    out = Path(out)
    out.mkdir(parents=True)
    config = {"architectures": ["MiniMaxM3VLForCausalLM"], "torch_dtype": "bfloat16", **TEXT}
    (out / "config.json").write_text(json.dumps(config, indent=1))
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in model.state_dict().items()},
              out / "model.safetensors", metadata={"format": "pt"})
    save_file(reference_of(model, random.Random(7), (5, 37, 110)), out / "reference.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
