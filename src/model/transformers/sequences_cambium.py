"""What the units of a Cambium model share: sequences of a call, what is kept of them, rotations."""

import math

import torch


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
        rows = torch.arange(self.padding.shape[0], device=self.padding.device)
        self.select(rows.repeat_interleave(repeats))

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


class Options(dict):
    """The options of a unit; what nobody asked for is an error, for it may change the numbers."""

    def __init__(self, kind, options):
        super().__init__(options)
        self.kind, self.asked = kind, set()

    def get(self, key, otherwise=None):
        self.asked.add(key)
        return super().get(key, otherwise)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def expect_all_used(self):
        expect_known(f"the options of {self.kind}", self, self.asked)


def expect_known(what, given, known):
    left = sorted(set(given) - set(known))
    if left:
        raise ValueError(f"{what}: {', '.join(left)} is not known to modeling_cambium.py")


def make(kinds, kind, options, width, **more):
    """The unit of this kind in a table of them; all its options are understood."""
    if kind not in kinds:
        raise ValueError(f"the unit {kind!r} is not known to modeling_cambium.py; it has {', '.join(kinds)}")
    options = Options(kind, options)
    unit = kinds[kind](options, width, **more)
    options.expect_all_used()
    return unit


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
        self.config, self.lengths, self.made = config, lengths, {}

    def turn_by(self, number):
        """Makes rotation `number` of the model the one that rotate() takes."""
        if number not in self.made:
            self.made[number] = Turns(self, self.config, number)
        self.rope = self.made[number]

    def rotate(self, x, interleaved=None):
        return self.rope.rotate(x, self.rope.interleaved if interleaved is None else interleaved)

    def scaled(self, q):
        """Queries times a factor of their positions, where the rotation says so."""
        if self.rope.beta == 0.0:
            return q
        turns = (self.positions.clamp(min=0) // self.rope.original).double()
        return (q * (1.0 + self.rope.beta * torch.log1p(turns))[..., None, None]).to(q.dtype)

    def masked(self, x):
        """x (B, T, ...) with zeros where there is padding."""
        return x if self.real is None else x * self.real.reshape(self.real.shape[:2] + (1,) * (x.dim() - 2))


class Turns:
    """One of the model's rotations: cosines and sines of a step's tokens, (B, T, 1, dim / 2)."""

    def __init__(self, step, config, number):
        if number == 0:
            rope, dim = config.rope_parameters, config.rope_dim
            self.interleaved = getattr(config, "rope_interleave", False)
        else:
            rope, dim = config.more_ropes[number - 1], config.more_ropes[number - 1]["rope_dim"]
            self.interleaved = rope.get("rope_interleave", False)
            scaling = rope.get("rope_scaling") or {"rope_type": "default"}
            rope = {"rope_theta": rope.get("rope_theta", 10000.0), **scaling}
        self.beta = rope.get("llama_4_scaling_beta") or 0.0
        self.original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if dim == 0:
            return
        by_length = rope["rope_type"] in ("dynamic", "longrope", "su")
        rows = [
            rope_frequencies(rope, dim, config.max_position_embeddings, length)
            for length in (step.lengths.tolist() if by_length else [0])
        ]
        frequencies = torch.tensor(rows, dtype=torch.float32, device=step.positions.device).double()
        angles = step.positions[:, :, None].clamp(min=0) * frequencies[:, None]
        scale = self.amplitude(rope)
        self.cos, self.sin = ((f(angles) * scale).float()[:, :, None] for f in (torch.cos, torch.sin))

    def amplitude(self, rope):
        if rope["rope_type"] not in ("yarn", "longrope", "su"):
            return 1.0
        if rope.get("attention_factor") is not None:
            return rope["attention_factor"]
        factor = rope.get("factor", 1.0)
        if factor <= 1.0:
            return 1.0
        if rope["rope_type"] == "yarn":
            return 0.1 * math.log(factor) + 1.0
        return math.sqrt(1 + math.log(factor) / math.log(self.original))

    def rotate(self, x, interleaved):
        """x (B, T, H, D): the pairs i and i + dim / 2 of each head turn, or 2i and 2i + 1 where they
        are interleaved; the rest stays."""
        half = self.cos.shape[-1]
        turned, rest = x.float().split([2 * half, x.shape[-1] - 2 * half], dim=-1)
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
        pair = [a * self.cos - b * self.sin, b * self.cos + a * self.sin]
        turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
        return torch.cat([turned, rest], dim=-1).to(x.dtype)
