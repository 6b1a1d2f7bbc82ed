"""The feed-forwards of Cambium models in PyTorch, by their options in config.json."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def relu2(x):
    return F.relu(x).square()


def xielu(x, alpha_p, alpha_n):
    """xIELU (arXiv 2411.13010) with two learned numbers; beta and eps as in every published model."""
    beta, eps, wide = 0.5, -1e-6, x.float()
    p, n = F.softplus(alpha_p.float()), beta + F.softplus(alpha_n.float())
    low = torch.expm1(wide.clamp(max=eps)) - wide
    return (torch.where(wide > 0, p * wide.square(), n * low) + beta * wide).to(x.dtype)


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": relu2,
}


def clamped_swiglu(gate, up, limit):
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * gate * torch.sigmoid(1.702 * gate)


class FeedForward(nn.Module):
    """down(f(up x)), or gated: down(f(scale gate x) * up x). `names`: as transformers' decoders call
    the matrices."""

    def __init__(self, options, width, gated, names):
        super().__init__()
        inner, bias = options["inner"], options.get("bias", False)
        self.gated, self.scale = gated, options.get("gate_scale", 1.0) if gated else 1.0
        self.called = {k: k + "_proj" if names else k for k in ("gate", "up", "down")}
        if gated:
            setattr(self, self.called["gate"], nn.Linear(width, inner, bias=bias))
        setattr(self, self.called["up"], nn.Linear(width, inner, bias=bias))
        setattr(self, self.called["down"], nn.Linear(inner, width, bias=bias))
        name = options.get("activation", "silu")
        if name == "xielu" and not gated:
            self.alpha_p, self.alpha_n = (nn.Parameter(torch.zeros(1)) for _ in range(2))
            self.act = lambda x: xielu(x, self.alpha_p, self.alpha_n)
        elif name == "clamped_swiglu" and gated:
            self.act = None
            self.limit = options.get("limit", 7.0)
        elif name in ACTIVATIONS:
            self.act = ACTIVATIONS[name]
        else:
            raise ValueError(f"the activation {name!r} is not known to modeling_cambium.py")

    def forward(self, x, step, state):
        gate, up, down = (getattr(self, self.called[name], None) for name in ("gate", "up", "down"))
        if self.act is None:
            return down(clamped_swiglu(self.scale * gate(x), up(x), self.limit))
        return down(self.act(self.scale * gate(x)) * up(x) if self.gated else self.act(up(x)))


class Stacked(nn.Module):
    """The matrices of many experts, (E, out, in)."""

    def __init__(self, experts, into, out, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, out, into))
        self.bias = nn.Parameter(torch.zeros(experts, out)) if bias else None

    def forward(self, x, expert):
        return F.linear(x, self.weight[expert], None if self.bias is None else self.bias[expert])


class Experts(nn.Module):
    """A mixture of experts: the `top` of a router, and a shared one."""

    def __init__(self, options, width, names):
        super().__init__()
        o = options
        self.count, self.top, inner = o["experts"], o["top"], o["inner"]
        self.score = o["router"]
        self.groups = o.get("groups", 1)
        self.group_top = o.get("group_top", self.groups)
        self.renormalise = self.score == "topk_softmax" or o.get("renormalise", False)
        self.eps, self.scale = o.get("renormalise_eps", 0.0), o.get("scale", 1.0)
        self.kind, self.limit = o.get("activation", "swiglu"), o.get("limit", 7.0)
        if self.kind not in ("swiglu", "clamped_swiglu", *ACTIVATIONS):
            raise ValueError(f"the activation {self.kind!r} is not known to modeling_cambium.py")
        bias, self.choice_bias = o.get("bias", False), o.get("router_bias", False)
        self.router = nn.Linear(width, self.count, bias=bias or self.choice_bias)
        latent = o.get("latent", 0)
        self.latent_in = nn.Linear(width, latent, bias=False) if latent else None
        self.latent_out = nn.Linear(latent, width, bias=False) if latent else None
        gated = self.kind in ("swiglu", "clamped_swiglu")
        self.experts = nn.ModuleDict()
        for name in ("gate", "up") if gated else ("up",):
            self.experts[name] = Stacked(self.count, latent or width, inner, bias)
        self.experts["down"] = Stacked(self.count, inner, latent or width, bias)
        shared = o.get("shared", 0)
        self.shared = nn.ModuleDict() if shared else None
        if shared:
            for name in ("gate", "up") if gated else ("up",):
                self.shared[name] = nn.Linear(width, shared, bias=False)
            self.shared["down"] = nn.Linear(shared, width, bias=False)
        self.shared_gate = nn.Linear(width, 1, bias=False) if o.get("shared_gate", False) else None

    def inside(self, matrices, x, *expert):
        up = matrices["up"](x, *expert)
        if self.kind == "swiglu":
            return F.silu(matrices["gate"](x, *expert)) * up
        if self.kind == "clamped_swiglu":
            return clamped_swiglu(matrices["gate"](x, *expert), up, self.limit)
        return ACTIVATIONS[self.kind](up)

    def route(self, x):
        """x (N, C) -> the chosen experts and their weights, (N, top)"""
        logits = F.linear(x.float(), self.router.weight.float())
        bias = None if self.router.bias is None else self.router.bias.float()
        if bias is not None and not self.choice_bias:
            logits = logits + bias
        scores = torch.sigmoid(logits) if self.score == "sigmoid" else logits.softmax(-1)
        choice = scores + bias if self.choice_bias else scores
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))
            best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            groups = best.topk(self.group_top, dim=-1).indices
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, groups, True)
            choice = grouped.masked_fill(~kept[..., None], -math.inf).flatten(-2)
        chosen = choice.topk(self.top, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        return chosen, self.scale * weights

    def forward(self, x, step, state):
        flat = x.flatten(0, 1)
        chosen, weights = self.route(flat)
        rows = flat if self.latent_in is None else self.latent_in(flat)
        y = torch.zeros(rows.shape, dtype=torch.float32, device=x.device)
        for expert in chosen.unique().tolist():
            token, slot = (chosen == expert).nonzero(as_tuple=True)
            part = self.experts["down"](self.inside(self.experts, rows[token], expert), expert)
            y.index_add_(0, token, weights[token, slot, None] * part.float())
        y = y.to(x.dtype)
        y = y if self.latent_out is None else self.latent_out(y)
        if self.shared is not None:
            other = self.shared["down"](self.inside(self.shared, flat))
            y = y + (other if self.shared_gate is None else torch.sigmoid(self.shared_gate(flat)) * other)
        return y.view_as(x)


def swiglu(options, width, names):
    return FeedForward(options, width, True, names)


def feed_forward(options, width, names):
    return FeedForward(options, width, False, names)


FEED_FORWARDS = {"swiglu": swiglu, "feed_forward": feed_forward, "experts": Experts}
