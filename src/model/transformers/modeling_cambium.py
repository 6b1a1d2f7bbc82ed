"""Models of Cambium's own layout in PyTorch: any mixer in any layer, by config.json.

Written for reading and for agreement: plain PyTorch, no kernels of its own. Shapes: B sequences of T
tokens, C channels, H heads, K channels of a key and V of a value, N numbers of a state. States and
recurrences are fp32 whatever the weights are.

Sequences of a batch may be padded on the left, which attention_mask then says. Padding on the
right, packed sequences and rewinding a cache are refused: a recurrent state cannot be taken back.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_cambium import CambiumConfig

# Newer ones of transformers call past_key_values cache.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
L2_EPS = 1e-6
CHUNK = 64  # tokens of a recurrence's chunk
CHUNK_OF_CHANNELS = 16  # where every channel decays by itself: (chunk, chunk, K) numbers a head


class CambiumCache:
    """What sequences keep of the tokens so far: a dictionary of tensors for each unit, batch first."""

    is_compileable = False
    is_croppable = False

    def __init__(self, layers):
        self.units = [{} for _ in range(layers)]
        self.seen = 0  # tokens so far, padding included
        self.padding = None  # (B): how many of them are padding
        self.lengths = None  # (B): tokens of the prompts, by which some rotations go

    def get_seq_length(self, layer_idx=0):
        return self.seen

    def get_max_cache_shape(self, layer_idx=0):
        return -1

    def of(self, layer, unit):
        return self.units[layer].setdefault(unit, {})

    def select(self, rows):
        """The sequences `rows` (B'), in this order, one more than once where it is named so."""
        for layer in self.units:
            for state in layer.values():
                for name, tensor in state.items():
                    state[name] = tensor.index_select(0, rows.to(tensor.device))
        for name in ("padding", "lengths"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).index_select(0, rows))

    def reorder_cache(self, beam_idx):
        self.select(beam_idx)

    def batch_select_indices(self, indices):
        self.select(indices)

    def batch_repeat_interleave(self, repeats):
        self.select(torch.arange(self.padding.shape[0], device=self.padding.device).repeat_interleave(repeats))

    def crop(self, max_length):
        raise ValueError("a Cambium model cannot go back in its cache: recurrent states have no past")


def rope_frequencies(rope, dim, max_positions, length):
    """Radians a position for each rotated pair, (dim / 2) floats, of a sequence of `length` tokens."""
    kind = rope["rope_type"]
    theta = rope["rope_theta"]
    factor = rope.get("factor", 1.0)
    original = rope.get("original_max_position_embeddings") or max_positions
    if kind == "dynamic" and length > max_positions:
        ratio = length / max_positions
        theta = theta * (factor * ratio - (factor - 1)) ** (dim / (dim - 2))
    plain = [1.0 / theta ** (2.0 * i / dim) for i in range(dim // 2)]
    if kind in ("default", "dynamic"):
        return plain
    if kind == "linear":
        return [f / factor for f in plain]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = [min(max((original * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0) for f in plain]
        return [(1 - k) * f / factor + k * f for k, f in zip(keep, plain)]
    if kind == "yarn":
        def dim_of(turns):
            return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = dim_of(rope.get("beta_fast", 32.0)), dim_of(rope.get("beta_slow", 1.0))
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        high += 0.001 if low == high else 0
        ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dim // 2)]
        return [f * (1 - r) + f / factor * r for f, r in zip(plain, ramp)]
    if kind in ("longrope", "su"):
        factors = rope["long_factor"] if length > original else rope["short_factor"]
        return [f / by for f, by in zip(plain, factors)]
    raise ValueError(f"rope of the kind {kind!r} is not known to modeling_cambium.py")


class Step:
    """What every unit sees of a forward call."""

    def __init__(self, config, tokens, device, attention_mask, position_ids, cache):
        batch, count = tokens
        seen = cache.seen if cache is not None else 0
        if attention_mask is not None:
            if attention_mask.shape != (batch, seen + count):
                raise ValueError(
                    f"attention_mask: expected {(batch, seen + count)}, one for each token so far, "
                    f"got {tuple(attention_mask.shape)}"
                )
            mask = attention_mask.to(torch.bool)
            if (mask[:, 1:] < mask[:, :-1]).any():
                raise ValueError("attention_mask: expected padding on the left alone (padding_side='left')")
            padding = (~mask).sum(1)
        elif cache is not None and cache.padding is not None:
            padding = cache.padding
        else:
            padding = torch.zeros(batch, dtype=torch.long, device=device)
        # (B, T): within its own sequence; -1 of padding.
        self.positions = (torch.arange(seen, seen + count, device=device) - padding[:, None]).clamp(min=-1)
        self.padded = bool((padding > 0).any())
        # (B, T, 1), or None where every token is real
        self.real = (self.positions >= 0)[..., None] if bool((self.positions < 0).any()) else None
        if position_ids is not None and not self.padded and (position_ids != self.positions).any():
            raise ValueError("position_ids: expected those of whole sequences; packed ones are not supported")
        lengths = cache.lengths if cache is not None and cache.lengths is not None else count - padding
        if cache is not None:
            cache.padding, cache.lengths = padding, lengths
        self.cos, self.sin = self.turns(config, lengths) if config.rope_dim > 0 else (None, None)

    def turns(self, config, lengths):
        """Cosines and sines, (B, T, 1, rope_dim / 2)."""
        rope = config.rope_parameters
        by_length = rope["rope_type"] in ("dynamic", "longrope", "su")
        rows = [
            rope_frequencies(rope, config.rope_dim, config.max_position_embeddings, length)
            for length in (lengths.tolist() if by_length else [0])
        ]
        frequencies = torch.tensor(rows, dtype=torch.float32, device=self.positions.device).double()
        angles = self.positions[:, :, None].clamp(min=0) * frequencies[:, None]
        scale = self.amplitude(rope, config.max_position_embeddings)
        return ((f(angles) * scale).float()[:, :, None] for f in (torch.cos, torch.sin))

    @staticmethod
    def amplitude(rope, max_positions):
        if rope["rope_type"] not in ("yarn", "longrope", "su"):
            return 1.0
        if rope.get("attention_factor") is not None:
            return rope["attention_factor"]
        factor = rope.get("factor", 1.0)
        if factor <= 1.0:
            return 1.0
        if rope["rope_type"] == "yarn":
            return 0.1 * math.log(factor) + 1.0
        return math.sqrt(1 + math.log(factor) / math.log(rope.get("original_max_position_embeddings") or max_positions))

    def rotate(self, x):
        """x (B, T, H, D): the pairs i and i + rope_dim / 2 of each head turn, the rest stays."""
        half = self.cos.shape[-1]
        a, b, rest = x.float().split([half, half, x.shape[-1] - 2 * half], dim=-1)
        turned = [a * self.cos - b * self.sin, b * self.cos + a * self.sin, rest]
        return torch.cat(turned, dim=-1).to(x.dtype)

    def masked(self, x):
        """x (B, T, ...) with zeros where there is padding."""
        return x if self.real is None else x * self.real.reshape(self.real.shape[:2] + (1,) * (x.dim() - 2))


class Norm(nn.Module):
    """The norms of a model: rms, zero_centred (1 + weight), layer, none."""

    def __init__(self, kind, channels, eps):
        super().__init__()
        if kind not in ("rms", "zero_centred", "layer", "none"):
            raise ValueError(f"norm: {kind!r} is not known to modeling_cambium.py")
        self.kind, self.eps = kind, eps
        if kind != "none":
            self.weight = nn.Parameter(torch.ones(channels))
        if kind == "layer":
            self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        if self.kind == "none":
            return x
        wide, weight = x.float(), self.weight.float()
        if self.kind == "layer":
            return F.layer_norm(wide, weight.shape, weight, self.bias.float(), self.eps).to(x.dtype)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * (weight + 1 if self.kind == "zero_centred" else weight)).to(x.dtype)


class GroupNorm(nn.Module):
    """RMS norm over groups of channels of x, with a gate: act(gate) norm(x), or norm(act(gate) x)."""

    def __init__(self, channels, group, eps, act, gate_first=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.group, self.eps, self.act, self.gate_first = group, eps, act, gate_first

    def forward(self, x, gate):
        """x, gate (B, T, channels) -> the same, fp32"""
        x, gate = x.float(), self.act(gate.float())
        groups = (x * gate if self.gate_first else x).unflatten(-1, (-1, self.group))
        groups = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        weight = self.weight.float()
        # The weight of one head stands for all, or each channel has its own.
        y = groups * weight if weight.numel() == self.group else groups * weight.view(-1, self.group)
        y = y.flatten(-2)
        return y if self.gate_first else y * gate


def head_norm(options, channels):
    """The norm of each head of q or k that the options name, or None."""
    eps = options.get("qk_norm_eps", 0.0)
    return Norm(options.get("qk_norm", "rms"), channels, eps) if eps > 0 else None


def repeat_heads(x, heads):
    """x (B, T, H', D) -> (B, T, heads, D): each head `heads / H'` times, one after the other."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def l2_norm(x):
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def softplus(x):
    return F.softplus(x.float(), threshold=20.0)


def recurrence(q, k, v, log_decay, weight, delta, state):
    """S <- D S, then S <- S + k (w (v - S'k))' with the delta rule, S + k (w v)' without; y = S'q.

    q, k (B, T, H, K), v (B, T, H, V), log_decay (B, T, H, 1 or K), weight (B, T, H) or None for one,
    all fp32; `state` keeps S (B, H, K, V). In chunks: with G the decay summed up from a chunk's begin
    and D_ij = exp(G_i - G_j), the errors of its tokens solve (I + tril(w k D k')) e = w (v - (e^G k) S),
    and y = (e^G q) S + tril(q D k') e  (Yang et al. 2024, arXiv 2406.06484 and 2412.06464). The
    exponents are differences, which are never above zero.
    """
    q, k, v, log_decay = (x.transpose(1, 2) for x in (q, k, v, log_decay))  # (B, H, T, ...)
    weight = None if weight is None else weight.transpose(1, 2)[..., None]
    s = state.get("state") if state is not None else None
    if s is None:
        s = v.new_zeros(q.shape[0], q.shape[1], k.shape[-1], v.shape[-1])
    by_channel = log_decay.shape[-1] > 1
    results = []
    size = CHUNK_OF_CHANNELS if by_channel else CHUNK
    for begin in range(0, q.shape[2], size):
        at = slice(begin, begin + size)
        qc, kc, vc, g = q[:, :, at], k[:, :, at], v[:, :, at], log_decay[:, :, at].cumsum(2)
        count = qc.shape[2]
        later = torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
        between = g[:, :, :, None] - g[:, :, None]  # (B, H, i, j, 1 or K)
        between = between.masked_fill(~later[..., None], -math.inf).exp()
        if by_channel:
            seen = torch.einsum("bhid,bhijd,bhjd->bhij", qc, between, kc)
        else:
            seen = qc @ kc.transpose(-1, -2) * between[..., 0]
        e = vc
        if delta:
            e = e - (g.exp() * kc) @ s
        if weight is not None:
            e = weight[:, :, at] * e
        if delta:
            if by_channel:
                own = torch.einsum("bhid,bhijd,bhjd->bhij", kc, between, kc)
            else:
                own = kc @ kc.transpose(-1, -2) * between[..., 0]
            own = (own if weight is None else weight[:, :, at] * own).tril(-1)
            e = torch.linalg.solve_triangular(own, e, upper=False, unitriangular=True)
        results.append((g.exp() * qc) @ s + seen @ e)
        last = g[:, :, -1:]
        s = last.exp().transpose(-1, -2) * s + ((last - g).exp() * kc).transpose(-1, -2) @ e
    if state is not None:
        state["state"] = s
    return torch.cat(results, dim=2).transpose(1, 2)


def short_conv(conv, x, step, state):
    """silu of a causal convolution of each channel over the last tokens; x (B, T, C) -> (B, T, C)."""
    taps = conv.kernel_size[0]
    x = step.masked(x).transpose(1, 2).to(conv.weight.dtype)
    before = state.get("conv") if state is not None else None
    if before is None:
        before = x.new_zeros(x.shape[0], x.shape[1], taps - 1)
    x = torch.cat([before, x], dim=-1)
    if state is not None:
        state["conv"] = x[..., x.shape[-1] - (taps - 1) :]
    return F.silu(conv(x)).transpose(1, 2)


def conv_of(channels, taps, bias):
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


class Attention(nn.Module):
    """Softmax attention over all tokens, or the last `window` and the first `sinks`."""

    def __init__(self, options, width):
        super().__init__()
        o = options
        if o.get("gate", False):
            raise ValueError("attention: the output gate is not known to modeling_cambium.py")
        self.count, self.dim = o["heads"], o["head_dim"]
        self.kv_count = o.get("kv_heads", self.count)
        self.window, self.sinks, self.rope = o.get("window", 0), o.get("sinks", 0), o.get("rope", True)
        self.scale = o.get("scale", self.dim**-0.5) * o.get("key_scale", 1.0)
        bias = o.get("qkv_bias", False)
        self.q_proj = nn.Linear(width, self.count * self.dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_count * self.dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_count * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.count * self.dim, width, bias=o.get("out_bias", False))
        self.q_norm, self.k_norm = head_norm(o, self.dim), head_norm(o, self.dim)

    def heads(self, x, step, state):
        """x (B, T, C) -> (B, T, H D), before the projection"""
        q = self.q_proj(x).unflatten(-1, (self.count, self.dim))
        k = self.k_proj(x).unflatten(-1, (self.kv_count, self.dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_count, self.dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = step.rotate(q), step.rotate(k)
        positions = step.positions  # of the keys, (B, keys)
        if state is not None:
            if "keys" in state:
                k, v = torch.cat([state["keys"], k], dim=1), torch.cat([state["values"], v], dim=1)
                positions = torch.cat([state["positions"], positions], dim=1)
            state["keys"], state["values"], state["positions"] = k, v, positions
            self.forget(state)
        q, k, v = (t.transpose(1, 2) for t in (q, repeat_heads(k, self.count), repeat_heads(v, self.count)))
        asks = step.positions[:, :, None]
        keys = positions[:, None]
        # A padded token sees padded ones, so that no row is without any.
        visible = (keys <= asks) & ((keys >= 0) | (asks < 0))
        if self.window > 0:
            visible &= (keys > asks - self.window) | (keys < self.sinks)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None], scale=self.scale)
        return y.transpose(1, 2).flatten(-2)

    def forget(self, state):
        """Drops the keys that no later token of any sequence sees."""
        if self.window > 0:
            positions = state["positions"]
            keep = (positions > positions[:, -1:] - self.window) | ((positions >= 0) & (positions < self.sinks))
            if not bool((keep := keep.any(0)).all()):
                for name in ("keys", "values", "positions"):
                    state[name] = state[name][:, keep]

    def forward(self, x, step, state):
        return self.o_proj(self.heads(x, step, state))


class DeltaHeads(nn.Module):
    """What Gated DeltaNet and Kimi Delta share: convolved q, k and v, q and k of length one."""

    def __init__(self, options, key_dim, value_dim):
        super().__init__()
        o = options
        self.count, self.key_dim, self.value_dim = o["heads"], key_dim, value_dim
        self.q_count = o.get("q_heads", self.count)
        self.k_count = o.get("k_heads", self.q_count)
        self.v_count = o.get("v_heads", self.count)
        self.rope = o.get("rope", False)
        self.rows = [self.q_count * key_dim, self.k_count * key_dim, self.v_count * value_dim]
        self.conv1d = conv_of(sum(self.rows), o.get("conv", 4), o.get("conv_bias", False))

    def qkv(self, rows, step, state):
        """rows (B, T, channels of q, k and v) -> q, k (B, T, H, K), v (B, T, H, V), fp32"""
        q, k, v = short_conv(self.conv1d, rows, step, state).split(self.rows, dim=-1)
        q = l2_norm(q.unflatten(-1, (self.q_count, self.key_dim))) * self.key_dim**-0.5
        k = l2_norm(k.unflatten(-1, (self.k_count, self.key_dim)))
        v = v.unflatten(-1, (self.v_count, self.value_dim)).float()
        if self.rope:
            q, k = step.rotate(q), step.rotate(k)
        return (repeat_heads(x, self.count) for x in (q, k, v))

    def forward(self, x, step, state):
        return self.out_proj(self.heads(x, step, state))


class GatedDeltaNet(DeltaHeads):
    """Gated DeltaNet (arXiv 2412.06464): the delta rule with a learned decay per head."""

    def __init__(self, options, width):
        o = options
        super().__init__(o, o["key_dim"], o["value_dim"])
        inner = self.count * self.value_dim
        self.in_proj = nn.Linear(width, sum(self.rows) + inner, bias=False)
        self.ba_proj = nn.Linear(width, 2 * self.count, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.count))
        self.dt_bias = nn.Parameter(torch.zeros(self.count))
        self.norm = GroupNorm(self.value_dim, self.value_dim, o.get("norm_eps", 1e-6), F.silu)
        self.out_proj = nn.Linear(inner, width, bias=o.get("out_bias", False))

    def heads(self, x, step, state):
        rows, z = self.in_proj(x).split([sum(self.rows), self.count * self.value_dim], dim=-1)
        q, k, v = self.qkv(rows, step, state)
        beta, raw = self.ba_proj(x).float().chunk(2, dim=-1)
        decay = -self.A_log.float().exp() * softplus(raw + self.dt_bias.float())
        beta = step.masked(torch.sigmoid(beta))
        y = recurrence(q, k, v, decay[..., None], beta, True, state)
        return self.norm(y.flatten(-2), z).to(x.dtype)


class KimiDelta(DeltaHeads):
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per key channel."""

    def __init__(self, options, width):
        o = options
        dim = o["head_dim"]
        super().__init__(o, dim, dim)
        inner = self.count * dim
        rank = o.get("gate_rank", dim)
        self.in_proj = nn.Linear(width, sum(self.rows), bias=False)
        self.beta_proj = nn.Linear(width, self.count, bias=False)
        for name in ("decay", "gate"):
            if rank > 0:
                setattr(self, name + "_a_proj", nn.Linear(width, rank, bias=False))
                setattr(self, name + "_b_proj", nn.Linear(rank, inner, bias=False))
            else:
                setattr(self, name + "_proj", nn.Linear(width, inner, bias=False))
        self.rank = rank
        self.A_log = nn.Parameter(torch.zeros(self.count))
        self.dt_bias = nn.Parameter(torch.zeros(inner))
        self.norm = GroupNorm(dim, dim, o.get("norm_eps", 1e-5), torch.sigmoid)
        self.out_proj = nn.Linear(inner, width, bias=o.get("out_bias", False))

    def low_rank(self, name, x):
        if self.rank == 0:
            return getattr(self, name + "_proj")(x)
        return getattr(self, name + "_b_proj")(getattr(self, name + "_a_proj")(x))

    def heads(self, x, step, state):
        q, k, v = self.qkv(self.in_proj(x), step, state)
        pace = softplus(self.low_rank("decay", x).float() + self.dt_bias.float())
        decay = -self.A_log.float().exp()[:, None] * pace.unflatten(-1, (self.count, self.key_dim))
        beta = step.masked(torch.sigmoid(self.beta_proj(x).float()))
        y = recurrence(q, k, v, decay, beta, True, state)
        return self.norm(y.flatten(-2), self.low_rank("gate", x)).to(x.dtype)


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060); x, B and C each have their own number of heads."""

    def __init__(self, options, width):
        super().__init__()
        o = options
        if not o.get("norm", True) or "row_scales" in o or o.get("in_scale", 1.0) != 1.0:
            raise ValueError("mamba2 without its norm or with scales is not known to modeling_cambium.py")
        self.count, self.dim, self.state = o["heads"], o["head_dim"], o["state"]
        self.x_count, self.b_count = o.get("x_heads", self.count), o["b_heads"]
        self.c_count = o.get("c_heads", self.b_count)
        self.inner = self.count * self.dim
        self.rows = [self.x_count * self.dim, self.b_count * self.state, self.c_count * self.state]
        self.in_proj = nn.Linear(width, self.inner + sum(self.rows) + self.count, bias=False)
        self.conv1d = conv_of(sum(self.rows), o.get("conv", 4), True)
        self.dt_bias = nn.Parameter(torch.zeros(self.count))
        self.A_log = nn.Parameter(torch.zeros(self.count))
        self.D = nn.Parameter(torch.ones(self.count))
        group = o.get("norm_group", self.inner)
        self.norm = GroupNorm(self.inner, group, o.get("norm_eps", 1e-5), F.silu, gate_first=True)
        self.out_proj = nn.Linear(self.inner, width, bias=o.get("out_bias", False))

    def heads(self, x, step, state):
        z, xbc, raw = self.in_proj(x).split([self.inner, sum(self.rows), self.count], dim=-1)
        v, b, c = short_conv(self.conv1d, xbc, step, state).float().split(self.rows, dim=-1)
        v = repeat_heads(v.unflatten(-1, (self.x_count, self.dim)), self.count)
        b = repeat_heads(b.unflatten(-1, (self.b_count, self.state)), self.count)
        c = repeat_heads(c.unflatten(-1, (self.c_count, self.state)), self.count)
        dt = softplus(raw.float() + self.dt_bias.float())
        decay = -self.A_log.float().exp() * dt
        y = recurrence(c, b, v, decay[..., None], step.masked(dt), False, state)
        y = y + self.D.float()[:, None] * v
        return self.norm(y.flatten(-2), z).to(x.dtype)

    def forward(self, x, step, state):
        return self.out_proj(self.heads(x, step, state))


class Lightning(nn.Module):
    """Lightning attention (arXiv 2501.08313): linear attention whose heads forget at fixed rates."""

    def __init__(self, options, width):
        super().__init__()
        o = options
        self.count, self.dim = o["heads"], o["head_dim"]
        self.kv_count = o.get("kv_heads", self.count)
        self.silu, self.rope, self.by_head = o.get("silu", True), o.get("rope", False), o.get("rows_by_head", False)
        self.layers, self.layer = o.get("layers", 0), o.get("layer_of_slopes", 0)
        inner, kv = self.count * self.dim, self.kv_count * self.dim
        self.rows = [inner, kv, kv]
        self.qkv_proj = nn.Linear(width, sum(self.rows), bias=o.get("qkv_bias", False))
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.q_norm, self.k_norm = head_norm(o, self.dim), head_norm(o, self.dim)
        self.norm = GroupNorm(inner, o.get("norm_group", inner), o.get("norm_eps", 1e-6), torch.sigmoid)
        self.out_proj = nn.Linear(inner, width, bias=o.get("out_bias", False))

    def rates(self):
        """The slopes of ALiBi (arXiv 2108.12409); later layers forget more slowly."""
        power = 2 ** int(math.log2(self.count))
        slower = 1.0
        if self.layers > 0:
            slower = 1.0 - self.layer / (self.layers - 1.0 + 1e-5) + 1e-5
        steps = [2 * (h + 1) if h < power else 2 * (h - power) + 1 for h in range(self.count)]
        return [-(2.0 ** (-4.0 * s / power)) * slower for s in steps]

    def heads(self, x, step, state):
        rows = self.qkv_proj(x)
        if self.by_head:  # q, k and v of a head stand together
            q, k, v = F.silu(rows).unflatten(-1, (self.count, 3, self.dim)).unbind(-2)
        else:
            q, k, v = (F.silu(rows) if self.silu else rows).split(self.rows, dim=-1)
            q = q.unflatten(-1, (self.count, self.dim))
            k, v = (r.unflatten(-1, (self.kv_count, self.dim)) for r in (k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = step.rotate(q), step.rotate(k)
        q, k, v = q.float(), step.masked(repeat_heads(k, self.count).float()), repeat_heads(v, self.count).float()
        rates = torch.tensor(self.rates(), dtype=torch.float32, device=x.device)
        decay = rates[:, None].expand(*q.shape[:3], 1)
        y = recurrence(q, k, v, decay, None, False, state)
        return self.norm(y.flatten(-2), self.gate_proj(x)).to(x.dtype)

    def forward(self, x, step, state):
        return self.out_proj(self.heads(x, step, state))


class Mamba(nn.Module):
    """Apriel-H1's mixer: a Mamba-1 scan whose x and B have the width of key-value heads.

    The bias of dt_proj enters twice, once in the projection and once in the scan: the released
    weights were trained so.
    """

    def __init__(self, options, width):
        super().__init__()
        o = options
        self.inner, self.xb, self.state = o["inner"], o["xb"], o["state"]
        self.repeat_first = o.get("repeat_before_conv", True)
        self.rows = [self.inner, self.xb, self.xb, self.inner]
        self.in_proj = nn.Linear(width, sum(self.rows), bias=o.get("in_bias", False))
        self.dt_in_proj = nn.Linear(width, o["dt_rank"], bias=False)
        self.dt_proj = nn.Linear(o["dt_rank"], self.inner, bias=True)
        channels = self.inner if self.repeat_first else self.xb
        self.conv1d = conv_of(channels, o.get("conv", 4), o.get("conv_bias", True))
        self.A_log = nn.Parameter(torch.zeros(self.inner, self.state))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=o.get("out_bias", False))

    def forward(self, x, step, state):
        heads = self.inner // self.state
        z, u, b, c = self.in_proj(x).split(self.rows, dim=-1)
        u, b, c = (r.unflatten(-1, (-1, self.state)) for r in (u, b, c))
        if self.repeat_first:
            u = repeat_heads(u, heads)
        u = short_conv(self.conv1d, u.flatten(-2), step, state)
        if not self.repeat_first:
            u = repeat_heads(u.unflatten(-1, (-1, self.state)), heads).flatten(-2)
        u = step.masked(u.float())
        dt = softplus(self.dt_proj(self.dt_in_proj(x)).float() + self.dt_proj.bias.float())
        y = self.scan(u, dt, repeat_heads(b, heads).float(), c.float(), state)
        y = (y + self.D.float() * u) * F.silu(z.float())
        return self.out_proj(y.to(x.dtype))

    def scan(self, u, dt, b, c, state):
        """h <- exp(dt A) h + dt B u, y = C h, for each channel; u, dt (B, T, C), b, c (B, T, H, N)."""
        u, dt = (r.unflatten(-1, (-1, self.state)) for r in (u, dt))  # (B, T, H, N): heads as wide as a state
        rate = -self.A_log.float().exp().unflatten(0, (-1, self.state))  # (H, channels of a head, N)
        h = state.get("scan") if state is not None else None
        if h is None:
            h = u.new_zeros(u.shape[0], *rate.shape)
        results = []
        for t in range(u.shape[1]):
            h = (dt[:, t, ..., None] * rate).exp() * h + (dt[:, t] * u[:, t])[..., None] * b[:, t, :, None]
            results.append((h * c[:, t, :, None]).sum(-1))
        if state is not None:
            state["scan"] = h
        return torch.stack(results, dim=1).flatten(-2)


class Parallel(Attention):
    """A window of attention beside a recurrence, mixed by a gate per head before one projection."""

    def __init__(self, options, width):
        kind = options["recurrent"]
        prefix = "recurrent."
        own = {k: v for k, v in options.items() if not k.startswith("recurrent") and k != "window_dropout"}
        super().__init__(own, width)
        self.recurrent = make_unit(kind, {k[len(prefix) :]: v for k, v in options.items() if k.startswith(prefix)}, width)
        del self.recurrent.out_proj  # o_proj stands for both
        self.gate_proj = nn.Linear(width, self.count, bias=True)

    def heads(self, x, step, state):
        near = super().heads(x, step, state).unflatten(-1, (self.count, -1))
        far = self.recurrent.heads(x, step, state).unflatten(-1, (self.count, -1))
        s = torch.sigmoid(self.gate_proj(x).float())[..., None]
        return (s * near + (1 - s) * far).flatten(-2).to(x.dtype)


class Swiglu(nn.Module):
    """down(silu(gate_scale gate x) * up x)"""

    # What transformers' decoders call these matrices.
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}

    def __init__(self, options, width, own_name=False):
        super().__init__()
        inner, bias = options["inner"], options.get("bias", False)
        self.scale = options.get("gate_scale", 1.0)
        self.called = {k: k for k in self.names} if own_name else self.names
        setattr(self, self.called["gate"], nn.Linear(width, inner, bias=bias))
        setattr(self, self.called["up"], nn.Linear(width, inner, bias=bias))
        setattr(self, self.called["down"], nn.Linear(inner, width, bias=bias))

    def forward(self, x, step, state):
        gate, up, down = (getattr(self, self.called[name]) for name in ("gate", "up", "down"))
        return down(F.silu(self.scale * gate(x)) * up(x))


MIXERS = {
    "attention": Attention,
    "sliding_window": Attention,
    "gated_delta_net": GatedDeltaNet,
    "kimi_delta": KimiDelta,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "lightning": Lightning,
    "parallel": Parallel,
}
FEED_FORWARDS = {"swiglu": Swiglu}


def make_unit(kind, options, width, **more):
    made = MIXERS.get(kind) or FEED_FORWARDS.get(kind)
    if made is None:
        known = ", ".join([*MIXERS, *FEED_FORWARDS])
        raise ValueError(f"the unit {kind!r} is not known to modeling_cambium.py; it has {known}")
    return made(options, width, **more)


def branches_of(layer):
    """A layer of config.json as a list of branches; none of a removed one."""
    if "branches" in layer:
        return layer["branches"]
    if layer.get("removed", False):
        return []
    mixer = layer["mixer"]
    mixers = [] if mixer == "identity" else [{"kind": mixer, "options": layer.get("options", {})}]
    return [{"units": mixers}, {"units": [{"kind": "swiglu", "options": {"inner": layer["intermediate_size"]}}]}]


def mixer_label(unit):
    """What presets call a mixer of a choice."""
    name = unit.get("name", "")
    return name[len("mixer_") :] if name.startswith("mixer_") else name or unit["kind"]


class Branch:
    """A norm and the units that read it: x = norm(h); h = keep h (or x) + sum of out unit(x)."""

    def __init__(self, number, spec, chosen):
        self.norm = ("input_layernorm", "post_attention_layernorm")[number] if number < 2 else f"norm_{number + 1}"
        self.keep, self.residual_normed = spec.get("keep", 1.0), spec.get("residual_normed", False)
        units = spec["units"]
        active = spec.get("active", -1)
        if active >= 0 and chosen:
            active = [mixer_label(unit) for unit in units].index(chosen)
        self.units = []  # (module's name, out) of those that run
        for i, unit in enumerate(units):
            if active in (-1, i):
                self.units.append((unit_name(unit), unit.get("out", 1.0)))


def unit_name(unit):
    return unit.get("name") or ("mlp" if unit["kind"] in FEED_FORWARDS else "mixer")


class CambiumLayer(nn.Module):
    def __init__(self, config, number):
        super().__init__()
        self.number = number
        preset = next((p for p in getattr(config, "presets", []) if p["name"] == config.preset), None)
        if config.preset is not None and preset is None:
            names = ", ".join(p["name"] for p in getattr(config, "presets", []))
            raise ValueError(f"there is no preset {config.preset!r}; the model has: {names or 'none'}")
        chosen = preset["mixers"][number] if preset is not None else ""
        self.branches = []
        for i, spec in enumerate(branches_of(config.layers[number])):
            branch = Branch(i, spec, chosen)
            self.branches.append(branch)
            norm = Norm(spec.get("norm", config.norm), config.hidden_size, spec.get("norm_eps", config.rms_norm_eps))
            self.add_module(branch.norm, norm)
            for unit in spec["units"]:
                more = {"own_name": bool(unit.get("name"))} if unit["kind"] in FEED_FORWARDS else {}
                made = make_unit(unit["kind"], unit.get("options", {}), config.hidden_size, **more)
                self.add_module(unit_name(unit), made)

    def forward(self, h, step, cache):
        for branch in self.branches:
            if not branch.units:
                continue
            x = getattr(self, branch.norm)(h)
            h = branch.keep * (x if branch.residual_normed else h)
            for name, out in branch.units:
                state = None if cache is None else cache.of(self.number, name)
                h = h + out * getattr(self, name)(x, step, state)
        return h


class CambiumPreTrainedModel(PreTrainedModel):
    config_class = CambiumConfig
    base_model_prefix = "model"
    _no_split_modules = ["CambiumLayer"]
    _supports_sdpa = True
    _is_stateful = True
    # Their sums run over many tokens.
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias", "D"}


class CambiumModel(CambiumPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([CambiumLayer(config, i) for i in range(len(config.layers))])
        self.norm = Norm(config.norm, config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=False,
        past_key_values=None,
        cache=None,
        **kwargs,
    ):
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected input_ids or inputs_embeds, one of them")
        h = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = cache if cache is not None else past_key_values
        if cache is not None and not isinstance(cache, CambiumCache):
            if cache.get_seq_length() > 0:
                raise ValueError(f"expected a CambiumCache with the tokens so far, got {type(cache).__name__}")
            cache = None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = CambiumCache(len(self.layers))
        step = Step(self.config, h.shape[:2], h.device, attention_mask, position_ids, cache)
        h = self.config.embedding_scale * h
        states = [h]
        for layer in self.layers:
            h = layer(h, step, cache)
            states.append(h)
        if cache is not None:
            cache.seen += h.shape[1]
        h = self.norm(h)
        states[-1] = h
        return BaseModelOutputWithPast(
            last_hidden_state=h,
            hidden_states=tuple(states) if output_hidden_states else None,
            **{CACHE_NAME: cache if use_cache else None},
        )


class CambiumForCausalLM(CambiumPreTrainedModel, GenerationMixin):
    # A dictionary since version 5 of transformers, whose base class has a mapping of them.
    _tied_weights_keys = (
        {"lm_head.weight": "model.embed_tokens.weight"}
        if hasattr(PreTrainedModel, "get_expanded_tied_weights_keys")
        else ["lm_head.weight"]
    )

    def __init__(self, config):
        super().__init__(config)
        self.model = CambiumModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # forward makes its own

    def prepare_inputs_for_generation(
        self, input_ids, attention_mask=None, inputs_embeds=None, past_key_values=None, cache=None, **kwargs
    ):
        cache = cache if cache is not None else past_key_values
        inputs = {"attention_mask": attention_mask, CACHE_NAME: cache, "use_cache": kwargs.get("use_cache")}
        seen = cache.get_seq_length() if cache is not None else 0
        if seen > 0:
            new = input_ids.shape[1] - seen if attention_mask is None else attention_mask.shape[1] - seen
            return {"input_ids": input_ids[:, -new:], **inputs}
        if inputs_embeds is not None:
            return {"inputs_embeds": inputs_embeds, **inputs}
        return {"input_ids": input_ids, **inputs}

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=False,
        past_key_values=None,
        cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
            cache=cache,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(self.config.logit_scale * outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            passed = {k: v for k, v in kwargs.items() if k == "num_items_in_batch"}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **passed)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs[CACHE_NAME] if CACHE_NAME in outputs else None},
        )
