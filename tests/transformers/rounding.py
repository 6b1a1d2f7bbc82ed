"""What rounding of bf16's size does to fixtures of tests/fixtures, drawn anew each time.

    python tests/transformers/rounding.py nemotron_h_moe bailing_hybrid deepseek_v3

transformers' model in fp32, but what each module of weights (routers and head left out) gives is
multiplied by 1 + u / 512, u uniform in [-1, 1]: a draw of what rounding to bf16 may do. Where experts
are chosen a choice turns now and then, so that one draw, which is what a model in bf16 is, says little.
Prints the KL a token to the reference of 16 draws, of three prompts the largest.
"""
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

DRAWS = 16
FIXTURES = pathlib.Path(__file__).resolve().parent.parent / "fixtures"


def divergence(model, tokens, expected):
    with torch.no_grad():
        logits = model(tokens.long()[None], use_cache=False).logits[0].double()
    p, q = expected.double().log_softmax(-1), logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def main():
    transformers.logging.set_verbosity_error()
    for name in sys.argv[1:]:
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / name, dtype=torch.float32).eval()
        reference = load_file(FIXTURES / name / "reference.safetensors")
        generator = torch.Generator()

        def rounded(x):
            if not torch.is_tensor(x) or not x.is_floating_point():
                return x
            return x * (1 + (2 * torch.rand(x.shape, generator=generator) - 1) / 512)

        def hook(module, inputs, output):
            if isinstance(output, tuple):
                return (rounded(output[0]), *output[1:])
            return rounded(output)

        for path, module in model.named_modules():
            own = path and not list(module.children()) and hasattr(module, "weight")
            if own and "gate" not in path.split(".")[-1] and "lm_head" not in path:
                module.register_forward_hook(hook)
        found = []
        for seed in range(DRAWS):
            generator.manual_seed(seed)
            prompts = range(sum(key.startswith("tokens.") for key in reference))
            found.append(max(divergence(model, reference[f"tokens.{k}"], reference[f"logits.{k}"])
                             for k in prompts))
        found.sort()
        print(f"{name}: KL a token {found[0]:.4f} at least, {found[DRAWS // 2]:.4f} in the median, "
              f"{found[-1]:.4f} at most")


if __name__ == "__main__":
    main()
