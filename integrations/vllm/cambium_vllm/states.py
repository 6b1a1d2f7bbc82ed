"""States of fixed size for each sequence, in vLLM's pages: of recurrences, and of windows with sinks."""

import math

import torch
import torch.nn.functional as F
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from .config import is_paged, keeps_state, running_units
from .modeling.modeling_cambium import made_of
from .sequences import Rows, StatesBackend

WINDOW = ("keys", "values", "positions")
EMPTY = {"positions": -1}  # what a state has before the first token; zeros elsewhere


def keep_window(state, window, sinks):
    """Cuts or fills a window's state to `window + sinks` keys a sequence; empty ones have position -1.

    In place of Attention.forget, whose states grow to that and are as long as the batch's longest.
    """
    size = window + sinks
    missing = max(size - state["positions"].shape[1], 0)
    positions = F.pad(state["positions"], (0, missing), value=-1)
    newest = positions.max(1, keepdim=True).values
    kept = (positions >= 0) & ((positions > newest - window) | (positions < sinks))
    order = kept.int().argsort(dim=1, descending=True, stable=True)[:, :size]
    state["positions"] = positions.masked_fill(~kept, -1).gather(1, order)
    for name in ("keys", "values"):
        filled = F.pad(state[name], (0, 0, 0, 0, 0, missing))
        state[name] = filled.gather(1, order[:, :, None, None].expand(-1, -1, *filled.shape[2:]))


def holders(unit):
    """The calls of a mixer that keep a state: [(name, object, method)]."""
    found = []
    if getattr(unit, "first", 0) > 0:
        unit.forget = lambda state: keep_window(state, unit.window, unit.first)
        found.append(("window", unit, "attend"))
    if hasattr(unit, "recurrent"):
        found.append(("recurrent", unit.recurrent, "heads"))
    elif not found:
        found.append(("recurrent", unit, "forward"))
    return found


def layouts(config, dtype):
    """{layer: {unit: {"window" or "recurrent": {name: (shape, type)}}}}: what one sequence keeps.

    Found by running a token through each unit without numbers.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return {
                layer: {
                    name: layout(config, layer, unit)
                    for name, unit in running_units(config, layer)
                    if keeps_state(unit)
                }
                for layer in range(len(config.layers))
            }
    finally:
        torch.set_default_dtype(default)


def layout(config, layer, spec):
    unit = made_of(spec, config.hidden_size)
    step = Rows(config, torch.zeros(1, 1, dtype=torch.long))
    step.turn_by(config.layers[layer].get("rope", 0))
    state, parts = {}, {}
    names = [name for name, _, _ in holders(unit)]
    if is_paged(spec):
        unit.attend = lambda q, k, v, step, state: q.new_zeros(*q.shape[:3], v.shape[3])
    unit(torch.zeros(1, 1, config.hidden_size), step, state)
    for name, tensor in state.items():
        part = "window" if name in WINDOW else "recurrent"
        if part in names:
            parts.setdefault(part, {})[name] = (tuple(tensor.shape[1:]), tensor.dtype)
    return parts


def size_of(part):
    """Bytes of a part of layouts()."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in part.values())


def page_size(made):
    """Bytes of the largest state: every page has as many, for vLLM wants pages of one size."""
    sizes = [size_of(part) for units in made.values() for parts in units.values() for part in parts.values()]
    return -(-max(sizes, default=0) // 16) * 16


class States(MambaBase):
    """Stands before a call that keeps a state, and runs it for each group of a batch."""

    def __init__(self, prefix, call, layout, page, vllm_config):
        self.prefix, self.call, self.layout, self.page = prefix, call, layout, page
        self.kv_cache = (torch.tensor([]),)
        known = vllm_config.compilation_config.static_forward_context
        if prefix in known:
            raise ValueError(f"two layers are called {prefix}")
        known[prefix] = self

    def __call__(self, *args):
        """args: tensors (1, N, ...) of all tokens, then step and state, which is of no use here."""
        *rows, step, _ = args
        metadata = (get_forward_context().attn_metadata or {}).get(self.prefix)
        if metadata is None:  # vLLM measures memory, or tunes kernels of attention
            return self.call(*rows, step, {})
        y = None
        for group in metadata.groups:
            state = self.load(group)
            part = self.call(*(r[0][group.tokens] for r in rows), step.of(group), state)
            self.store(group, state)
            if y is None:
                y = part.new_zeros(1, rows[0].shape[1], *part.shape[2:])
            y[0][group.tokens] = part
        return y

    def load(self, group):
        """What the sequences keep, batch first."""
        state, begin = {}, 0
        for name, (shape, dtype) in self.layout.items():
            end = begin + math.prod(shape) * dtype.itemsize
            kept = self.kv_cache[0][:, begin:end][group.pages].contiguous().view(dtype)
            kept = kept.masked_fill(group.fresh[:, None], EMPTY.get(name, 0))
            state[name] = kept.view(-1, *shape)
            begin = end
        return state

    def store(self, group, state):
        begin = 0
        for name, (shape, dtype) in self.layout.items():
            kept = state[name].to(dtype).contiguous().flatten(1).view(torch.int8)
            self.kv_cache[0][:, begin : begin + kept.shape[1]][group.pages] = kept
            begin += kept.shape[1]

    def get_state_shape(self):
        return ((self.page,),)

    def get_state_dtype(self):
        return (torch.int8,)

    @property
    def mamba_type(self):
        return MambaAttentionBackendEnum.LINEAR

    def get_attn_backend(self):
        return StatesBackend
