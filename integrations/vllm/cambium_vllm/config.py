"""The configuration as vLLM wants it: what layers keep, and how wide the attention is."""

from .modeling import configuration_cambium as code
from .modeling.modeling_cambium import Branch, branches_of, unit_name
from .modeling.mixers_cambium import MIXERS

# Sizes of heads that vLLM's kernels have; others are padded with zeros, which changes no score.
HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


def padded(head_dim):
    for size in HEAD_DIMS:
        if head_dim <= size:
            return size
    raise ValueError(f"heads of {head_dim} channels: expected at most {HEAD_DIMS[-1]}")


def is_indexed(unit):
    """Whether an index chooses the tokens that it attends to."""
    return unit.get("options", {}).get("index_heads", 0) > 0


def is_paged(unit):
    """Whether the unit's attention goes by vLLM's own, keys and values in its pages. A window that also
    sees a sequence's first tokens does not: vLLM has none such; nor does what an index chooses from."""
    attends = unit["kind"] in ("attention", "sliding_window", "latent_attention", "parallel")
    return attends and not unit.get("options", {}).get("sinks", 0) and not is_indexed(unit)


def heads_of(unit):
    """(query heads, key-value heads, channels as vLLM has them) of a unit that is paged."""
    options = unit["options"]
    heads, dim = options["heads"], options.get("head_dim", 0)
    if "kv_rank" in options:
        dim = options["nope_dim"] + options["rope_dim"]
    return heads, options.get("kv_heads", heads), padded(dim)


def keeps_state(unit):
    """Whether the unit keeps a state of fixed size for each sequence."""
    return unit["kind"] in MIXERS and not is_indexed(unit) and (unit["kind"] == "parallel" or not is_paged(unit))


def chosen_mixers(config):
    """The mixers that `preset` of a supernet runs, a name a layer ("" for the active one)."""
    if config.preset is None:
        return [""] * len(config.layers)
    presets = {p["name"]: p["mixers"] for p in getattr(config, "presets", [])}
    if config.preset not in presets:
        raise ValueError(f"there is no preset {config.preset!r}; the model has: {', '.join(presets) or 'none'}")
    return presets[config.preset]


def running_units(config, layer):
    """(module's name, unit) of what runs in a layer: not the other choices of a supernet."""
    chosen = chosen_mixers(config)[layer]
    for i, spec in enumerate(branches_of(config.layers[layer])):
        runs = [name for name, _ in Branch(i, spec, chosen).units]
        for unit in spec["units"]:
            if unit_name(unit) in runs:
                yield unit_name(unit), unit


class CambiumConfig(code.CambiumConfig):
    """With the names under which vLLM asks for sizes. Of the same name, so that transformers takes it for the
    code beside a checkpoint too, in a process that has both."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        # vLLM sizes its pages by these; layers say their own. Any widths do where no attention runs.
        sizes = [heads_of(unit) for unit in self.units() if is_paged(unit)]
        sizes = sizes[0] if sizes else (1, 1, HEAD_DIMS[0])
        self.num_attention_heads, self.num_key_value_heads, self.head_dim = sizes

    def units(self):
        return [unit for layer in range(len(self.layers)) for _, unit in running_units(self, layer)]

    @property
    def layer_types(self):
        """Where every layer is "full_attention", vLLM plans no states."""
        states = any(keeps_state(unit) for unit in self.units())
        return ["linear_attention" if states else "full_attention"] * len(self.layers)
