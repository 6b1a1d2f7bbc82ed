"""Models of Cambium's own layout in vLLM: `pip install` is all, vLLM finds the plugin by its entry point."""


def register():
    """Tells vLLM of the configuration and the model; in every process, more than once where it likes."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from .config import CambiumConfig

    AutoConfig.register("cambium", CambiumConfig, exist_ok=True)
    ModelRegistry.register_model("CambiumForCausalLM", "cambium_vllm.model:CambiumForCausalLM")
