"""The mixers of Cambium models in PyTorch, by their options in config.json."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .sequences_cambium import Options, make

L2_EPS = 1e-6
CHUNK = 64  # tokens of a recurrence's chunk
CHUNK_OF_CHANNELS = 16  # where every channel decays by itself: (chunk, chunk, K) numbers a head


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
    kind, eps = options.get("qk_norm", "rms"), options.get("qk_norm_eps", 0.0)
    return Norm(kind, channels, eps) if eps > 0 else None


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


def short_conv(conv, x, step, state, act=True):
    """A causal convolution of each channel over the last tokens, then silu; x (B, T, C) -> (B, T, C)."""
    taps = conv.kernel_size[0]
    x = step.masked(x).transpose(1, 2).to(conv.weight.dtype)
    before = state.get("conv") if state is not None else None
    if before is None:
        before = x.new_zeros(x.shape[0], x.shape[1], taps - 1)
    x = torch.cat([before, x], dim=-1)
    if state is not None:
        state["conv"] = x[..., x.shape[-1] - (taps - 1) :]
    return (F.silu(conv(x)) if act else conv(x)).transpose(1, 2)


def conv_of(channels, taps, bias):
    return nn.Conv1d(channels, channels, taps, groups=channels, bias=bias)


class Softmax(nn.Module):
    """Softmax attention of each head over all tokens, or the last `window` and the first `sinks`."""

    def __init__(self, options, count, dim):
        super().__init__()
        o = options
        self.count, self.kv_count, self.dim = count, o.get("kv_heads", count), dim
        self.window, self.first, self.rope = o.get("window", 0), o.get("sinks", 0), o.get("rope", True)
        self.scale = o.get("scale", dim**-0.5) * o.get("key_scale", 1.0)
        self.softcap = o.get("softcap", 0.0)
        # A learned score of each head that joins the softmax and has no value.
        self.sinks = nn.Parameter(torch.zeros(count)) if o.get("sink_logits", False) else None

    def attend(self, q, k, v, step, state, choose=None):
        """q (B, T, H, D), k, v (B, T, H', D) of these tokens -> (B, T, H, D). `choose` takes away from
        what tokens see, (B, 1 or H', T, keys)."""
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
            visible &= (keys > asks - self.window) | (keys < self.first)
        visible = visible[:, None]
        if choose is not None:
            visible = choose(visible, asks, keys)
            if visible.shape[1] > 1:
                visible = visible.repeat_interleave(self.count // visible.shape[1], dim=1)
        if self.softcap > 0 or self.sinks is not None:
            y = self.by_scores(q, k, v, visible)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
        return y.transpose(1, 2)

    def by_scores(self, q, k, v, visible):
        """Attention whose scores are bent or have company."""
        scores = q.float() @ k.float().transpose(-1, -2) * self.scale
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        scores = scores.masked_fill(~visible, -math.inf)
        if self.sinks is not None:
            alone = self.sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, alone], dim=-1)
        return (scores.softmax(-1)[..., : k.shape[2]] @ v.float()).to(v.dtype)

    def forget(self, state):
        """Drops the keys that no later token of any sequence sees."""
        if self.window > 0:
            positions = state["positions"]
            first = (positions >= 0) & (positions < self.first)
            keep = (positions > positions[:, -1:] - self.window) | first
            if not bool((keep := keep.any(0)).all()):
                for name in ("keys", "values", "positions"):
                    state[name] = state[name][:, keep]

    def forward(self, x, step, state):
        return self.o_proj(self.heads(x, step, state))


class Choice:
    """What a token chooses by an index: `top` tokens, blocks or pools of what it sees, of equal scores the
    earlier. A block has the largest score of its tokens, and the last `local` are always chosen; a pool has
    their mean, and what comes after the last whole one is seen besides."""

    def __init__(self, options, of):
        of = options.get("index_of", of)
        if of not in ("tokens", "blocks", "pools"):
            raise ValueError(f"index_of: {of!r} is not known to modeling_cambium.py")
        self.top, self.size, self.pools = options["index_top"], options.get("index_size", 1), of == "pools"
        self.local = options.get("index_local", 1) if of == "blocks" else 0

    def __call__(self, dots, weights, visible, asks, keys):
        """dots (B, T, H, keys) of the index, weights (B, T, H) of its heads or None, visible (B, 1, T, keys),
        positions asks (B, T, 1) and keys (B, 1, keys) -> (B, 1, T, keys), without weights (B, H, T, keys)"""
        pieces = keys.clamp(min=0) // self.size
        of_keys = pieces[:, :, None].expand_as(dots)
        shape = (*dots.shape[:3], int(pieces.max()) + 1)
        hidden = ~visible.transpose(1, 2)
        if self.pools:
            scores = dots.new_zeros(shape).scatter_add(-1, of_keys, dots.masked_fill(hidden, 0.0)) / self.size
        else:
            scores = dots.new_full(shape, -math.inf)
            scores = scores.scatter_reduce(-1, of_keys, dots.masked_fill(hidden, -math.inf), "amax")
        if weights is not None:
            scores = (scores.relu() * weights[..., None]).sum(2, keepdim=True)
        asks = asks[:, :, None]  # (B, T, 1, 1)
        at = torch.arange(shape[-1], device=dots.device)
        own = asks // self.size
        candidates = (at + 1) * self.size <= asks + 1 if self.pools else at <= own
        scores = scores.masked_fill(at > own - self.local, math.inf) if self.local > 0 else scores
        scores = scores.masked_fill(~candidates, -math.inf)
        best = scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.top]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & candidates
        chosen = chosen | (asks < 0)  # padded tokens see padded ones
        if self.pools:
            chosen = chosen | (at == (asks + 1) // self.size)
        return visible & chosen.gather(-1, of_keys[:, :, : chosen.shape[2]]).transpose(1, 2)


def kept_index(k, state):
    """The keys of an index k (B, T, D) after those before them."""
    if state is not None:
        k = torch.cat([state["index_keys"], k], dim=1) if "index_keys" in state else k
        state["index_keys"] = k
    return k


class HeadIndexer(nn.Module):
    """The index of MiniMax-M3: for each head of keys a query, one key for all, normed as attention's."""

    def __init__(self, options, width):
        super().__init__()
        self.count, self.dim, self.rope = options["index_heads"], options["index_dim"], options.get("rope", True)
        self.q_proj = nn.Linear(width, self.count * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.dim, bias=False)
        self.q_norm, self.k_norm = head_norm(options, self.dim), head_norm(options, self.dim)
        self.choice = Choice(options, "blocks")

    def chooser(self, x, step, state):
        """x (B, T, C) -> what attend() takes as `choose`"""
        q, k = self.q_proj(x).unflatten(-1, (self.count, self.dim)), self.k_proj(x)[:, :, None]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = step.rotate(q), step.rotate(k)
        k = kept_index(k[:, :, 0], state)
        dots = torch.einsum("bthd,bsd->bths", q.float(), k.float())
        return lambda *seen: self.choice(dots, None, *seen)


class Attention(Softmax):
    """Attention with a query of each head, and keys and values of each or of several."""

    def __init__(self, options, width):
        o = options
        super().__init__(o, o["heads"], o["head_dim"])
        self.gate = o.get("gate", False)
        bias = o.get("qkv_bias", False)
        self.q_proj = nn.Linear(width, (2 if self.gate else 1) * self.count * self.dim, bias=bias)
        self.k_proj = nn.Linear(width, self.kv_count * self.dim, bias=bias)
        self.v_proj = nn.Linear(width, self.kv_count * self.dim, bias=bias)
        self.o_proj = nn.Linear(self.count * self.dim, width, bias=o.get("out_bias", False))
        over = o.get("qk_norm_over", "head")
        self.norms_width = over == "width"
        self.q_norm = head_norm(o, self.count * self.dim if self.norms_width else self.dim)
        self.k_norm = head_norm(o, self.kv_count * self.dim if self.norms_width else self.dim)
        self.indexer = HeadIndexer(o, width) if o.get("index_heads", 0) > 0 else None
        # A learned factor of the scores of each query head, or of those that share a key head.
        self.of = o.get("temperature", "")
        if self.of not in ("", "query", "key"):
            raise ValueError(f"temperature: {self.of!r} is not known to modeling_cambium.py")
        if self.of:
            self.temperature = nn.Parameter(torch.ones(self.count if self.of == "query" else self.kv_count))

    def heads(self, x, step, state):
        """x (B, T, C) -> (B, T, H D), before the projection"""
        q, k, gate = self.q_proj(x), self.k_proj(x), None
        if self.norms_width and self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q = q.unflatten(-1, (self.count, -1))
        if self.gate:  # the rows of a head are its query's, then its gate's
            q, gate = q.split(self.dim, dim=-1)
        k = k.unflatten(-1, (self.kv_count, self.dim))
        v = self.v_proj(x).unflatten(-1, (self.kv_count, self.dim))
        if not self.norms_width and self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.of:
            factors = self.temperature.float()[:, None]
            q, k = ((factors * x).to(x.dtype) if name == self.of else x for name, x in (("query", q), ("key", k)))
        if self.rope:
            q, k = step.scaled(step.rotate(q)), step.rotate(k)
        chosen = {} if self.indexer is None else {"choose": self.indexer.chooser(x, step, state)}
        y = self.attend(q, k, v, step, state, **chosen)
        if gate is not None:
            y = y * torch.sigmoid(gate.float()).to(y.dtype)
        return y.flatten(-2)


class Indexer(nn.Module):
    """The index of DeepSeek-V3.2 (arXiv 2512.02556), which scores by the sum over heads of weight relu(q . k)."""

    def __init__(self, options, width, q_rank):
        super().__init__()
        o = options
        self.count, self.dim, self.choice = o["index_heads"], o["index_dim"], Choice(o, "tokens")
        self.rope, self.interleaved = o.get("rope", True), o.get("index_interleaved", False)
        self.q_proj = nn.Linear(q_rank, self.count * self.dim, bias=False)
        self.k_proj = nn.Linear(width, self.dim, bias=False)
        self.k_norm = Norm("layer", self.dim, 1e-6)
        self.weights_proj = nn.Linear(width, self.count, bias=False)

    def chooser(self, x, low, step, state):
        """x (B, T, C), the query's latent (B, T, R) -> what attend() takes as `choose`"""
        q = self.q_proj(low).unflatten(-1, (self.count, self.dim))
        k = self.k_norm(self.k_proj(x))[:, :, None]
        if self.rope:
            q, k = step.rotate(q, self.interleaved), step.rotate(k, self.interleaved)
        k = kept_index(k[:, :, 0], state)
        dots = torch.einsum("bthd,bsd->bths", q.float(), k.float())
        weights = self.weights_proj(x).float()
        return lambda *seen: self.choice(dots, weights, *seen)


class LatentAttention(Softmax):
    """Multi-head latent attention (arXiv 2405.04434): keys and values of all heads come from one latent
    a token, beside one rotated key that all heads share. They are kept as heads, not as latents."""

    def __init__(self, options, width):
        o, parts = options, [options["nope_dim"], options["rope_dim"]]
        kept = ("rope", "scale", "window", "sinks")
        super().__init__({k: o[k] for k in kept if k in o}, o["heads"], sum(parts))
        self.parts, self.rank, self.value_dim = parts, o["kv_rank"], o["value_dim"]
        q_rank, eps = o.get("q_rank", 0), o.get("norm_eps", 1e-6)
        rows = self.count * self.dim
        if q_rank > 0:
            self.q_a_proj = nn.Linear(width, q_rank, bias=False)
            self.q_a_norm = Norm("rms", q_rank, eps)
            self.q_b_proj = nn.Linear(q_rank, rows, bias=False)
        else:
            self.q_proj = nn.Linear(width, rows, bias=False)
        self.low = q_rank > 0
        self.indexer = Indexer(o, width, q_rank) if o.get("index_heads", 0) > 0 else None
        self.kv_a_proj = nn.Linear(width, self.rank + self.parts[1], bias=False)
        self.kv_a_norm = Norm("rms", self.rank, eps)
        self.kv_b_proj = nn.Linear(self.rank, self.count * (self.parts[0] + self.value_dim), bias=False)
        self.gated = o.get("gate", False)
        if self.gated:
            self.gate_proj = nn.Linear(width, self.count, bias=False)
        self.o_proj = nn.Linear(self.count * self.value_dim, width, bias=False)

    def heads(self, x, step, state):
        """x (B, T, C) -> (B, T, H V), before the projection"""
        low = self.q_a_norm(self.q_a_proj(x)) if self.low else None
        q = self.q_b_proj(low) if self.low else self.q_proj(x)
        q, q_turned = q.unflatten(-1, (self.count, self.dim)).split(self.parts, dim=-1)
        latent, shared = self.kv_a_proj(x).split([self.rank, self.parts[1]], dim=-1)
        shared = shared[:, :, None]
        if self.rope:
            q_turned, shared = step.rotate(q_turned), step.rotate(shared)
        kv = self.kv_b_proj(self.kv_a_norm(latent)).unflatten(-1, (self.count, -1))
        k, v = kv.split([self.parts[0], self.value_dim], dim=-1)
        q = torch.cat([q, q_turned], dim=-1)
        k = torch.cat([k, repeat_heads(shared, self.count)], dim=-1)
        chosen = {} if self.indexer is None else {"choose": self.indexer.chooser(x, low, step, state)}
        y = self.attend(q, k, v, step, state, **chosen)
        if self.gated:
            y = y * torch.sigmoid(self.gate_proj(x).float())[..., None].to(y.dtype)
        return y.flatten(-2)


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
        self.strongest = 2.0 if o.get("allow_neg_eigval", False) else 1.0
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


def out_gate(options, usual):
    """What the gate of a mixer's output goes through."""
    return {"silu": F.silu, "sigmoid": torch.sigmoid}[options.get("out_gate", usual)]


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
        self.norm = GroupNorm(self.value_dim, self.value_dim, o.get("norm_eps", 1e-6), out_gate(o, "silu"))
        self.out_proj = nn.Linear(inner, width, bias=o.get("out_bias", False))

    def heads(self, x, step, state):
        rows, z = self.in_proj(x).split([sum(self.rows), self.count * self.value_dim], dim=-1)
        q, k, v = self.qkv(rows, step, state)
        beta, raw = self.ba_proj(x).float().chunk(2, dim=-1)
        decay = -self.A_log.float().exp() * softplus(raw + self.dt_bias.float())
        beta = step.masked(self.strongest * torch.sigmoid(beta))
        y = recurrence(q, k, v, decay[..., None], beta, True, state)
        return self.norm(y.flatten(-2), z).to(x.dtype)


class KimiDelta(DeltaHeads):
    """Kimi Delta Attention (arXiv 2510.26692): the delta rule with a decay per key channel."""

    def __init__(self, options, width):
        o = options
        dim = o["head_dim"]
        super().__init__(o, dim, o.get("value_dim", dim))
        inner, keys = self.count * self.value_dim, self.count * dim
        rank = o.get("gate_rank", dim)
        bound = o.get("lower_bound", -5.0)
        self.bound = bound if o.get("decay", "softplus") == "sigmoid" else None  # of the log decay
        self.in_proj = nn.Linear(width, sum(self.rows), bias=False)
        self.beta_proj = nn.Linear(width, self.count, bias=False)
        for name, channels in (("decay", keys), ("gate", inner)):
            if rank > 0:
                setattr(self, name + "_a_proj", nn.Linear(width, rank, bias=False))
                setattr(self, name + "_b_proj", nn.Linear(rank, channels, bias=False))
            else:
                setattr(self, name + "_proj", nn.Linear(width, channels, bias=False))
        self.rank = rank
        self.A_log = nn.Parameter(torch.zeros(self.count))
        self.dt_bias = nn.Parameter(torch.zeros(keys))
        self.norm = GroupNorm(self.value_dim, self.value_dim, o.get("norm_eps", 1e-5), out_gate(o, "sigmoid"))
        self.out_proj = nn.Linear(inner, width, bias=o.get("out_bias", False))

    def low_rank(self, name, x):
        if self.rank == 0:
            return getattr(self, name + "_proj")(x)
        return getattr(self, name + "_b_proj")(getattr(self, name + "_a_proj")(x))

    def heads(self, x, step, state):
        q, k, v = self.qkv(self.in_proj(x), step, state)
        raw = self.low_rank("decay", x).float() + self.dt_bias.float()
        raw = raw.unflatten(-1, (self.count, self.key_dim))
        rate = self.A_log.float().exp()[:, None]
        decay = -rate * softplus(raw) if self.bound is None else self.bound * torch.sigmoid(rate * raw)
        beta = step.masked(self.strongest * torch.sigmoid(self.beta_proj(x).float()))
        y = recurrence(q, k, v, decay, beta, True, state)
        return self.norm(y.flatten(-2), self.low_rank("gate", x)).to(x.dtype)


class Mamba2(nn.Module):
    """Mamba-2 (arXiv 2405.21060); x, B and C each have their own number of heads."""

    def __init__(self, options, width):
        super().__init__()
        o = options
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
        group, eps = o.get("norm_group", self.inner), o.get("norm_eps", 1e-5)
        gate, first = out_gate(o, "silu"), not o.get("norm_first", False)
        self.norm = GroupNorm(self.inner, group, eps, gate, gate_first=first) if o.get("norm", True) else None
        scales = o.get("row_scales") or [1.0] * 5
        self.scales = [o.get("in_scale", 1.0) * scale for scale in scales]  # of z, x, B, C and dt
        self.out_proj = nn.Linear(self.inner, width, bias=o.get("out_bias", False))

    def heads(self, x, step, state):
        parts = self.in_proj(x).split([self.inner, *self.rows, self.count], dim=-1)
        z, *xbc, raw = (part if by == 1.0 else part * by for part, by in zip(parts, self.scales))
        xbc = torch.cat(xbc, dim=-1)
        v, b, c = short_conv(self.conv1d, xbc, step, state).float().split(self.rows, dim=-1)
        v = repeat_heads(v.unflatten(-1, (self.x_count, self.dim)), self.count)
        b = repeat_heads(b.unflatten(-1, (self.b_count, self.state)), self.count)
        c = repeat_heads(c.unflatten(-1, (self.c_count, self.state)), self.count)
        dt = softplus(raw.float() + self.dt_bias.float())
        decay = -self.A_log.float().exp() * dt
        y = recurrence(c, b, v, decay[..., None], step.masked(dt), False, state)
        y = y + self.D.float()[:, None] * v
        y = y.flatten(-2)
        return (F.silu(z.float()) * y if self.norm is None else self.norm(y, z)).to(x.dtype)

    def forward(self, x, step, state):
        return self.out_proj(self.heads(x, step, state))


class Lightning(nn.Module):
    """Lightning attention (arXiv 2501.08313): linear attention whose heads forget at fixed rates."""

    def __init__(self, options, width):
        super().__init__()
        o = options
        self.count, self.dim = o["heads"], o["head_dim"]
        self.kv_count, self.value_dim = o.get("kv_heads", self.count), o.get("value_dim", self.dim)
        self.silu, self.rope = o.get("silu", True), o.get("rope", False)
        self.by_head = o.get("rows_by_head", False)
        self.layers, self.layer = o.get("layers", 0), o.get("layer_of_slopes", 0)
        self.geometric = o.get("geometric_slopes", False)
        inner = self.count * self.value_dim
        self.rows = [self.count * self.dim, self.kv_count * self.dim, self.kv_count * self.value_dim]
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
        if self.geometric:
            return [-(2.0 ** (-8.0 * (h + 1) / self.count)) * slower for h in range(self.count)]
        steps = [2 * (h + 1) if h < power else 2 * (h - power) + 1 for h in range(self.count)]
        return [-(2.0 ** (-4.0 * s / power)) * slower for s in steps]

    def heads(self, x, step, state):
        rows = self.qkv_proj(x)
        if self.by_head:  # q, k and v of a head stand together
            q, k, v = F.silu(rows).unflatten(-1, (self.count, 3, self.dim)).unbind(-2)
        else:
            q, k, v = (F.silu(rows) if self.silu else rows).split(self.rows, dim=-1)
            q = q.unflatten(-1, (self.count, self.dim))
            k, v = (r.unflatten(-1, (self.kv_count, -1)) for r in (k, v))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = step.rotate(q), step.rotate(k)
        q, k, v = (repeat_heads(r, self.count).float() for r in (q, k, v))
        k = step.masked(k)
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
        self.gate = out_gate(o, "silu")
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
        y = selective_scan(u, dt, self.A_log, repeat_heads(b, heads).float(), c.float(), state)
        y = (y + self.D.float() * u) * self.gate(z.float())
        return self.out_proj(y.to(x.dtype))


def selective_scan(u, dt, a_log, b, c, state):
    """h <- exp(dt A) h + dt B u, y = C h, for each channel; u, dt (B, T, C), a_log (C, N), b, c
    (B, T, G, N) for G groups of channels -> (B, T, C)."""
    u, dt = (r.unflatten(-1, (b.shape[2], -1)) for r in (u, dt))
    rate = -a_log.float().exp().unflatten(0, (b.shape[2], -1))  # (G, channels of a group, N)
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


class Mamba1(nn.Module):
    """Mamba-1 (arXiv 2312.00752), with the norms of dt, B and C that Jamba gives it."""

    def __init__(self, options, width):
        super().__init__()
        o = options
        self.inner, self.state, rank, eps = o["inner"], o["state"], o["dt_rank"], o.get("norm_eps", 0.0)
        self.rows = [rank, self.state, self.state]
        self.in_proj = nn.Linear(width, 2 * self.inner, bias=False)
        self.conv1d = conv_of(self.inner, o.get("conv", 4), o.get("conv_bias", True))
        self.x_proj = nn.Linear(self.inner, sum(self.rows), bias=False)
        self.dt_norm, self.b_norm, self.c_norm = (
            Norm("rms" if eps > 0 else "none", channels, eps) for channels in self.rows
        )
        self.dt_proj = nn.Linear(rank, self.inner, bias=True)
        self.A_log = nn.Parameter(torch.zeros(self.inner, self.state))
        self.D = nn.Parameter(torch.ones(self.inner))
        self.out_proj = nn.Linear(self.inner, width, bias=False)

    def forward(self, x, step, state):
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = short_conv(self.conv1d, u, step, state)
        dt, b, c = self.x_proj(u).split(self.rows, dim=-1)
        dt = softplus(self.dt_proj(self.dt_norm(dt)))
        u = step.masked(u.float())
        b, c = (r.float()[:, :, None] for r in (self.b_norm(b), self.c_norm(c)))
        y = selective_scan(u, dt, self.A_log, b, c, state)
        y = (y + self.D.float() * u) * F.silu(z.float())
        return self.out_proj(y.to(x.dtype))


class ShortConv(nn.Module):
    """LFM2's gated short convolution: out(C * conv(B * x))."""

    def __init__(self, options, width):
        super().__init__()
        taps, bias = options.get("conv", 3), options.get("bias", False)
        self.in_proj = nn.Linear(width, 3 * width, bias=bias)
        self.conv = conv_of(width, taps, bias)
        self.out_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x, step, state):
        b, c, u = self.in_proj(x).chunk(3, dim=-1)
        return self.out_proj(c * short_conv(self.conv, b * u, step, state, act=False))


class Beside:
    """A window of attention, the class that comes after this one, beside a recurrence, mixed by a gate per
    head before one projection."""

    def __init__(self, options, width):
        kind = options["recurrent"]
        prefix = "recurrent."
        own = {k: v for k, v in options.items() if not k.startswith("recurrent")}
        own.pop("window_dropout", None)  # of training
        own = Options("parallel", own)
        super().__init__(own, width)
        own.expect_all_used()
        options.asked.update(options)
        inner = {k[len(prefix) :]: v for k, v in options.items() if k.startswith(prefix)}
        self.recurrent = make(MIXERS, kind, inner, width)
        del self.recurrent.out_proj  # o_proj stands for both
        self.mixing = "mix_proj" if hasattr(self, "gate_proj") else "gate_proj"
        setattr(self, self.mixing, nn.Linear(width, self.count, bias=True))

    def heads(self, x, step, state):
        near = super().heads(x, step, state).unflatten(-1, (self.count, -1))
        far = self.recurrent.heads(x, step, state).unflatten(-1, (self.count, -1))
        s = torch.sigmoid(getattr(self, self.mixing)(x).float())[..., None]
        return (s * near + (1 - s) * far).flatten(-2).to(x.dtype)


class Parallel(Beside, Attention):
    pass


class LatentParallel(Beside, LatentAttention):
    pass


def parallel(options, width):
    return (LatentParallel if "kv_rank" in options else Parallel)(options, width)


def window(options, width):
    return (LatentAttention if "kv_rank" in options else Attention)(options, width)


MIXERS = {
    "attention": Attention,
    "sliding_window": window,
    "latent_attention": LatentAttention,
    "gated_delta_net": GatedDeltaNet,
    "kimi_delta": KimiDelta,
    "mamba": Mamba,
    "mamba1": Mamba1,
    "short_conv": ShortConv,
    "mamba2": Mamba2,
    "lightning": Lightning,
    "parallel": parallel,
}
