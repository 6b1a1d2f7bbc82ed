#!/usr/bin/env python3
"""Makes tests/fixtures/granite_moe: a tiny Granite 3 with experts by transformers' class, and what it computes.

    python3 tests/transformers/granite_moe_fixture.py OUT

It is of the kind that has a shared expert beside the chosen (granitemoeshared). Weights are in bf16.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from vary import fill, reference_of

CONFIG = {
    "architectures": ["GraniteMoeSharedForCausalLM"], "model_type": "granitemoeshared", "torch_dtype": "bfloat16",
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 40, "shared_intermediate_size": 56,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 6,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-06, "rope_theta": 10000000.0, "attention_bias": False,
    "attention_multiplier": 0.0625, "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
    "max_position_embeddings": 512, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": True,
}


@torch.no_grad()
def main(out):
    config = AutoConfig.for_model(**json.loads(json.dumps(CONFIG)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager",
                                             dtype=torch.float32).eval()
    fill(model, 11)
    for tensor in model.parameters():
        tensor.copy_(tensor.to(torch.bfloat16))
    out = Path(out)
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    with tempfile.TemporaryDirectory() as saved:  # by which the names are those of released files
        model.save_pretrained(saved)
        tensors = load_file(Path(saved) / "model.safetensors")
    save_file({name: t.to(torch.bfloat16).contiguous() for name, t in tensors.items()}, out / "model.safetensors",
              metadata={"format": "pt"})
    save_file(reference_of(model, random.Random(11), (5, 37, 110)), out / "reference.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
