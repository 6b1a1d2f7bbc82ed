"""Cambium's own layout as a model of vLLM: the layers of modeling_cambium.py, whose mixers keep what
they keep in vLLM's pages. One device, eager: no kernels but attention's are vLLM's."""

import torch
from torch import nn
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.platforms import current_platform

from .attention import Paged
from .config import is_indexed, is_paged, keeps_state, running_units
from .modeling.mixers_cambium import Norm
from .modeling.modeling_cambium import CambiumLayer
from .sequences import Rows
from .states import States, holders, layouts, page_size
from .tokens import Tokens, row_of

FP32 = ("A_log", "dt_bias", "D", "alpha_p", "alpha_n")  # whatever the type of the others


def refuse(what, expected):
    raise ValueError(f"cambium_vllm: {what}; expected {expected}")


def expect_runnable(vllm_config):
    """Refuses, by name, what would give other numbers or none."""
    config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
    if parallel.tensor_parallel_size > 1:
        refuse("the model in parts on more devices", "tensor_parallel_size=1")
    if vllm_config.quant_config is not None:
        refuse("a quantized model", "weights as Cambium writes them")
    if vllm_config.speculative_config is not None:
        refuse("speculative decoding", "none: a recurrent state cannot go back")
    if vllm_config.cache_config.mamba_cache_mode == "all":
        refuse("mamba_cache_mode 'all'", "'align', which keeps a state at the end of a page of tokens")
    if not current_platform.is_cpu() and not vllm_config.model_config.enforce_eager:
        refuse("CUDA graphs", "enforce_eager=True: recurrences go by the lengths of a batch")
    longest = vllm_config.model_config.max_model_len
    ropes = [config.rope_parameters, *((r.get("rope_scaling") or {}) for r in config.more_ropes)]
    for rope in ropes:
        kind, limit = rope.get("rope_type", rope.get("type")), config.max_position_embeddings
        if kind in ("longrope", "su"):
            limit = rope.get("original_max_position_embeddings") or limit
        if kind in ("dynamic", "longrope", "su") and longest > limit:
            refuse(f"a {kind} rotation with max_model_len {longest}", f"at most {limit}, where it does not go by length")


class Body(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([CambiumLayer(config, i) for i in range(len(config.layers))])
        self.norm = Norm(config.norm, config.hidden_size, config.rms_norm_eps)


class CambiumForCausalLM(nn.Module, HasInnerState, IsHybrid):
    allow_patterns_overrides = ["model*.safetensors"]  # of the folder's files: not golden.safetensors

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__()
        expect_runnable(vllm_config)
        config = self.config = vllm_config.model_config.hf_config
        self.model = Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if name.rpartition(".")[2] in FP32:
                p.data = p.data.float()
        self.paged = nn.ModuleList()
        made = layouts(config, vllm_config.model_config.dtype)
        for i, layer in enumerate(self.model.layers):
            for name, spec in running_units(config, i):
                unit, full = getattr(layer, name), f"model.layers.{i}.{name}"
                if is_paged(spec):
                    self.paged.append(Paged(unit, f"{full}.attention", vllm_config.cache_config))
                    unit.attend = self.paged[-1].attend
                if is_indexed(spec):
                    unit.forward = Tokens(f"{full}.tokens", unit.forward, row_of(unit), vllm_config)
                if keeps_state(spec):
                    for part, owner, method in holders(unit):
                        call, kept = getattr(owner, method), made[i][name][part]
                        setattr(owner, method, States(f"{full}.{part}", call, kept, page_size(made), vllm_config))

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config):
        model = vllm_config.model_config
        return ((page_size(layouts(model.hf_config, model.dtype)),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config):
        return (torch.int8,)

    @classmethod
    def get_mamba_state_copy_func(cls):
        return MambaStateCopyFuncCalculator.linear_attention_state_copy_func()

    def embed_input_ids(self, input_ids):
        return self.model.embed_tokens(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        """Tokens of all sequences, (N) -> (N, C)"""
        h = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        step = Rows(self.config, positions[None])
        h = self.config.embedding_scale * h[None]
        for layer in self.model.layers:
            h = layer(h, step, None)
        return self.model.norm(h)[0]

    def compute_logits(self, hidden_states):
        logits = self.lm_head(self.config.logit_scale * hidden_states)
        cap = self.config.logit_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def load_weights(self, weights):
        """Takes tensors by name: all of the model, and no others."""
        wanted, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name == "lm_head.weight" and self.config.tie_word_embeddings:
                continue
            if name not in wanted:
                refuse(f"the tensor {name}, which the model has not", "the files of one checkpoint")
            if wanted[name].shape != tensor.shape:
                refuse(f"{name} of the shape {tuple(tensor.shape)}", str(tuple(wanted[name].shape)))
            wanted[name].data.copy_(tensor)
            loaded.add(name)
        if missing := sorted(set(wanted) - loaded):
            refuse(f"the checkpoint lacks {', '.join(missing[:5])}", "every tensor of the model")
        return loaded
