"""What attention with an index keeps of every token, in vLLM's pages: keys and values of its heads, and the key
of the index. vLLM's own sparse attention takes latents of fixed sizes and runs on a GPU alone; here the code of
transformers chooses and attends, sequence by sequence."""

import math
from dataclasses import dataclass

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from .sequences import Groups


@dataclass
class Sequence:
    tokens: torch.Tensor  # (1, T): where its new tokens stand among all tokens of the call
    pages: torch.Tensor  # (pages): in the order of its tokens
    past: int  # tokens that the pages have


class SequencesBuilder(AttentionMetadataBuilder[Groups]):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        table = common.block_table_tensor.long()
        starts, lengths = common.query_start_loc_cpu.tolist(), common.seq_lens.tolist()
        sequences = []
        for row, (begin, end) in enumerate(zip(starts, starts[1:])):
            if end > begin:
                tokens = torch.arange(begin, end, device=table.device)
                sequences.append(Sequence(tokens[None], table[row], lengths[row] - (end - begin)))
        return Groups(sequences)


class TokensBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "CAMBIUM_TOKENS"

    @staticmethod
    def get_builder_cls():
        return SequencesBuilder


def row_of(unit):
    """{name: shape}: what one token leaves, beside its position."""
    heads = unit.kv_count
    values = getattr(unit, "value_dim", unit.dim)
    return {"keys": (heads, unit.dim), "values": (heads, values), "index_keys": (unit.indexer.dim,)}


class Tokens(AttentionLayerBase):
    """Stands before the call of such a unit, and runs it for each sequence of a batch."""

    def __init__(self, prefix, call, row, vllm_config):
        self.prefix, self.call, self.row = prefix, call, row
        self.sizes = [math.prod(shape) for shape in row.values()]
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache = torch.tensor([])
        known = vllm_config.compilation_config.static_forward_context
        if prefix in known:
            raise ValueError(f"two layers are called {prefix}")
        known[prefix] = self

    def __call__(self, x, step, _):
        """x (1, N, C) of all tokens; the state that vLLM's model has none of is of no use here."""
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:  # vLLM measures memory
            return self.call(x, step, {})
        y = torch.zeros_like(x)
        for sequence in metadata.groups:
            state = self.load(sequence)
            y[0][sequence.tokens] = self.call(x[0][sequence.tokens], step.of(sequence), state)
            self.store(sequence, state)
        return y

    def places(self, sequence, begin, end):
        """(page, token in it) of the sequence's tokens from `begin` to `end`."""
        size = self.kv_cache.shape[2]
        tokens = torch.arange(begin, end, device=sequence.pages.device)
        return sequence.pages[tokens // size], tokens % size

    def load(self, sequence):
        if sequence.past == 0:
            return {}
        page, token = self.places(sequence, 0, sequence.past)
        parts = self.kv_cache[page, 0, token].split(self.sizes, dim=-1)
        state = {name: part.view(1, -1, *shape) for part, (name, shape) in zip(parts, self.row.items())}
        state["positions"] = torch.arange(sequence.past, device=page.device)[None]
        return state

    def store(self, sequence, state):
        count = sequence.tokens.shape[1]
        page, token = self.places(sequence, sequence.past, sequence.past + count)
        rows = torch.cat([state[name][0, -count:].flatten(1) for name in self.row], dim=-1)
        self.kv_cache[page, 0, token] = rows.to(self.kv_cache.dtype)

    def get_kv_cache_spec(self, vllm_config):
        return FullAttentionSpec(block_size=vllm_config.cache_config.block_size, num_kv_heads=1,
                                 head_size=sum(self.sizes), head_size_v=0, dtype=self.dtype)

    def get_attn_backend(self):
        return TokensBackend
