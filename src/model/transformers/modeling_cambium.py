"""Models of Cambium's own layout in PyTorch: any mixer in any layer, by config.json.

Written for reading and for agreement: plain PyTorch, no kernels of its own. Shapes: B sequences of T
tokens, C channels, H heads, K channels of a key and V of a value, N numbers of a state. States and
recurrences are fp32 whatever the weights are.

Sequences of a batch may be padded on the left, which attention_mask then says. Padding on the
right, packed sequences and rewinding a cache are refused: a recurrent state cannot be taken back.
"""

import torch
from torch import nn
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel

from .configuration_cambium import CambiumConfig
from .feed_forwards_cambium import FEED_FORWARDS
from .mixers_cambium import MIXERS, Norm
from .sequences_cambium import CambiumCache, Step, expect_known, make

# Newer ones of transformers call past_key_values cache.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def branches_of(layer):
    """A layer of config.json as a list of branches; none of a removed one."""
    if "branches" in layer:
        return layer["branches"]
    if layer.get("removed", False):
        return []
    mixer = layer["mixer"]
    mixers = [] if mixer == "identity" else [{"kind": mixer, "options": layer.get("options", {})}]
    swiglu = {"kind": "swiglu", "options": {"inner": layer["intermediate_size"]}}
    return [{"units": mixers}, {"units": [swiglu]}]


# What config.json may say of layers and branches; anything else is refused.
KEYS_OF_LAYER = ("mixer", "options", "intermediate_size", "removed", "branches", "rope")
KEYS_OF_BRANCH = ("norm", "norm_eps", "out_norm", "out_norm_eps", "active", "beside", "keep", "residual_normed",
                  "units")



def made_of(unit, width):
    kind, options = unit["kind"], unit.get("options", {})
    if kind in FEED_FORWARDS:
        return make(FEED_FORWARDS, kind, options, width, names=not unit.get("name"))
    return make(MIXERS, kind, options, width)


def mixer_label(unit):
    """What presets call a mixer of a choice."""
    name = unit.get("name", "")
    return name[len("mixer_") :] if name.startswith("mixer_") else unit["kind"]


class Branch:
    """A norm and the units that read it: x = norm(h); h = keep h (or x) + sum of out unit(x)."""

    def __init__(self, number, spec, chosen):
        first = ("input_layernorm", "post_attention_layernorm")
        self.norm = first[number] if number < 2 else f"norm_{number + 1}"
        self.keep, self.residual_normed = spec.get("keep", 1.0), spec.get("residual_normed", False)
        self.out_norm = f"out_norm_{number + 1}" if spec.get("out_norm", "none") != "none" else None
        units = spec["units"]
        active = spec.get("active", -1)
        if active >= 0 and chosen:
            active = [mixer_label(unit) for unit in units].index(chosen)
        choices = len(units) - spec.get("beside", 0)  # what stands after them runs with each
        self.units = []  # (module's name, out) of those that run
        for i, unit in enumerate(units):
            if active in (-1, i) or i >= choices:
                self.units.append((unit_name(unit), unit.get("out", 1.0)))


def unit_name(unit):
    """Of its module: what its tensors' names begin with."""
    usual = "mixer" if unit["kind"] in MIXERS else "feed_forward" if unit["kind"] == "experts" else "mlp"
    return unit.get("name") or usual


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
        expect_known(f"layer {number}", config.layers[number], KEYS_OF_LAYER)
        self.rope = config.layers[number].get("rope", 0)
        for i, spec in enumerate(branches_of(config.layers[number])):
            expect_known(f"a branch of layer {number}", spec, KEYS_OF_BRANCH)
            branch = Branch(i, spec, chosen)
            self.branches.append(branch)
            kind, eps = spec.get("norm", config.norm), spec.get("norm_eps", config.rms_norm_eps)
            norm = Norm(kind, config.hidden_size, eps)
            self.add_module(branch.norm, norm)
            if branch.out_norm is not None:
                eps = spec.get("out_norm_eps", 1e-5)
                self.add_module(branch.out_norm, Norm(spec["out_norm"], config.hidden_size, eps))
            for unit in spec["units"]:
                self.add_module(unit_name(unit), made_of(unit, config.hidden_size))

    def forward(self, h, step, cache):
        step.turn_by(self.rope)
        for branch in self.branches:
            if not branch.units and branch.keep == 1.0 and not branch.residual_normed:
                continue
            x = getattr(self, branch.norm)(h)
            h = branch.keep * (x if branch.residual_normed else h)
            for name, out in branch.units:
                state = None if cache is None else cache.of(self.number, name)
                y = getattr(self, name)(x, step, state)
                h = h + out * (y if branch.out_norm is None else getattr(self, branch.out_norm)(y))
        return h


class CambiumPreTrainedModel(PreTrainedModel):
    config_class = CambiumConfig
    base_model_prefix = "model"
    _no_split_modules = ["CambiumLayer"]
    _supports_sdpa = True
    _is_stateful = True
    _keys_to_ignore_on_load_unexpected = [r"^kept\."]  # heads for more tokens, which nothing runs

    def post_init(self):
        # Decays, whose products run over many tokens, and single numbers stay fp32. Some versions of transformers refuse
        # the name of a parameter that is not there.
        names = {name.rsplit(".", 1)[-1] for name, _ in self.named_parameters()}
        self._keep_in_fp32_modules_strict = {"A_log", "dt_bias", "D", "alpha_p", "alpha_n"} & names or None
        super().post_init()


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
        if self.config.logit_cap > 0:
            logits = self.config.logit_cap * torch.tanh(logits / self.config.logit_cap)
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
