"""The configuration of Cambium's own layout: config.json lists every layer."""

from transformers.configuration_utils import PretrainedConfig


class CambiumConfig(PretrainedConfig):
    """What config.json says of a model with any mixer in any layer.

    `layers` has an entry a layer: {"mixer", "options", "intermediate_size"}, {"removed": true}, or
    {"branches": [{"norm", "norm_eps", "out_norm", "out_norm_eps", "active", "beside", "keep",
    "residual_normed", "units": [{"kind", "options", "out", "name"}]}], "rope"}. `preset` names one
    of `presets` (a supernet's placements): then its mixers run in place of the active ones.
    """

    model_type = "cambium"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vocab_size=512,
        hidden_size=64,
        layers=None,
        norm="rms",
        rms_norm_eps=1e-6,
        rope_dim=0,
        rope_theta=10000.0,
        rope_scaling=None,
        rope_parameters=None,
        embedding_scale=1.0,
        logit_scale=1.0,
        logit_cap=0.0,
        more_ropes=None,
        rope_interleave=False,
        max_position_embeddings=2048,
        presets=None,
        preset=None,
        use_cache=True,
        tie_word_embeddings=False,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.layers = layers if layers is not None else []
        self.norm = norm
        self.rms_norm_eps = rms_norm_eps
        self.rope_dim = rope_dim
        # Both spellings of config.json, as newer ones of transformers have it.
        parameters = dict(rope_parameters or rope_scaling or {})
        parameters["rope_type"] = parameters.get("rope_type", parameters.get("type", "default"))
        parameters.setdefault("rope_theta", rope_theta)
        self.rope_parameters = parameters
        # transformers asks for them where it checks rotations; layers say their own.
        self.num_attention_heads, self.head_dim = 1, rope_dim
        self.embedding_scale = embedding_scale
        self.logit_scale = logit_scale
        self.logit_cap = logit_cap
        self.more_ropes = more_ropes if more_ropes is not None else []
        self.rope_interleave = rope_interleave
        self.max_position_embeddings = max_position_embeddings
        if presets:
            self.presets = presets
        self.preset = preset
        self.use_cache = use_cache
        kwargs["num_hidden_layers"] = len(self.layers)
        for name in ("num_attention_heads", "head_dim"):
            kwargs.pop(name, None)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
