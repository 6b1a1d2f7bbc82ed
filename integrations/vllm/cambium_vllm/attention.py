"""Attention by vLLM's own kernels and pages."""

import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers.attention import Attention

from .config import padded


class Paged(nn.Module):
    """In place of the attend() of a mixer."""

    def __init__(self, unit, prefix, cache_config):
        super().__init__()
        self.size = padded(unit.dim)
        more = {} if unit.sinks is None else {"sinks": unit.sinks}
        self.attention = Attention(
            unit.count,
            self.size,
            unit.scale,
            num_kv_heads=unit.kv_count,
            cache_config=cache_config,
            logits_soft_cap=unit.softcap or None,
            per_layer_sliding_window=unit.window or None,
            prefix=prefix,
            **more,
        )

    def attend(self, q, k, v, step, state):
        """q (1, N, H, D), k (1, N, H', D), v (1, N, H', V) -> (1, N, H, V)"""
        count, channels = v.shape[1], v.shape[3]
        q, k, v = (F.pad(x[0], (0, self.size - x.shape[3])).flatten(1) for x in (q, k, v))
        return self.attention(q, k, v).view(1, count, -1, self.size)[..., :channels]
