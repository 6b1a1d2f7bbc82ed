#!/usr/bin/env python3
"""PyTorch's training of plans/true-size/llama-3.2-1b, to stand beside `cambium bench train`.

Random weights and tokens, transformers' layers with torch.compile and scaled dot product attention,
fused AdamW without clipping. Prints a row for each case: tokens/s (median and range of the steps
after two), the time of a step, the device's memory (allocated at the most; in use after the last
step, context and all, as `cambium bench train` counts it) and the last loss.

A case is MODE:WEIGHTS:ROWS with perhaps :chunked and :checkpoint behind it:
  train     the next token's cross entropy; distill: reverse KL against a frozen bf16 teacher of the
            same shape, over the whole vocabulary
  f32       fp32 masters, gradients and moments, products by bf16 autocast; bf16: all of them bf16
  ROWS      sequences that run at once; a step has --tokens of them and adds their gradients
  chunked   head and loss by --chunk tokens, each chunk's backward at once, so that no logits stay
  checkpoint  layers are recomputed
"""
import argparse
import gc
import os
import pathlib
import signal
import statistics
import sys
import time

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # none lost to fragments
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

BEGUN = time.monotonic()
WARM_UP = 2
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DEFAULT = ("train:f32:4 train:f32:8:chunked distill:f32:4:chunked train:bf16:4 "
           "distill:bf16:4:chunked train:f32:2 distill:f32:2 distill:bf16:2 "
           "distill:f32:2:chunked:checkpoint train:f32:8 train:bf16:8").split()


def make_model(weights, frozen=False, checkpoint=False):
    """The model with its layers compiled, each by itself (one compilation, as they are alike)."""
    config = AutoConfig.from_pretrained(args.config)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[weights])
    if checkpoint:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.requires_grad_(not frozen).train(not frozen)
    for part in [] if args.whole else [*model.model.layers, model.model.norm]:
        part.compile(mode=args.compile, dynamic=False)
    return model


def layers(model, rows):
    """All of them, causal without a mask, which the model's own loop would make if it is traced."""
    turns = model.rotary_emb(rows, torch.arange(rows.shape[1], device=rows.device)[None])
    for layer in model.layers:
        rows = layer(rows, position_embeddings=turns)
    return model.norm(rows)


def hidden(model, ids):
    """(tokens, width) in bf16, which the layers pass on too."""
    with torch.autocast(args.device, torch.bfloat16, enabled=model.dtype == torch.float32):
        rows = model.model.embed_tokens(ids).bfloat16()
        return run_layers(model.model, rows).bfloat16().flatten(0, 1)


def logits(h, weight):
    return F.linear(h, weight.bfloat16()).float()


def cross_entropy(weight, h, labels):
    return F.cross_entropy(logits(h, weight), labels, reduction="sum") / args.tokens


def reverse_kl(weight, h, teacher_weight, teacher_h):
    p, q = (F.log_softmax(logits(x, w), -1) for x, w in ((h, weight), (teacher_h, teacher_weight)))
    return (p.exp() * (p - q)).sum() / args.tokens


class Trainer:
    def __init__(self, mode, weights, rows, *options):
        unknown = set(options) - {"chunked", "checkpoint"}
        if mode not in ("train", "distill") or weights not in DTYPES or unknown:
            raise ValueError(f"expected a case as --help says, got {mode} {weights} {options}")
        self.rows, self.at_once = int(rows), int(rows) * args.sequence
        self.chunk = args.chunk if "chunked" in options else self.at_once
        if args.tokens % self.at_once != 0:
            raise ValueError(f"{args.tokens} tokens a step are no multiple of {self.at_once}")
        self.student = make_model(weights, checkpoint="checkpoint" in options)
        self.teacher = make_model("bf16", frozen=True) if mode == "distill" else None
        self.loss = torch.compile(reverse_kl if self.teacher else cross_entropy, mode=args.compile,
                                  dynamic=False)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-5, fused=True)

    def backward(self, ids):
        """Adds the gradients of some rows; their part of the step's loss."""
        fixed, others = (), (ids[:, 1:].flatten(),)
        if self.teacher:
            with torch.no_grad():
                others = (hidden(self.teacher, ids[:, :-1]),)
            fixed = (self.teacher.lm_head.weight,)
        h = hidden(self.student, ids[:, :-1])
        parts = [part.detach().requires_grad_() for part in h.split(self.chunk)]
        loss = 0
        for i, part in enumerate(parts):
            part_loss = self.loss(self.student.lm_head.weight, part, *fixed,
                                  *(x.split(self.chunk)[i] for x in others))
            part_loss.backward()
            loss = loss + part_loss.detach()
        h.backward(torch.cat([part.grad for part in parts]) if len(parts) > 1 else parts[0].grad)
        return loss

    def step(self):
        """Seconds and loss."""
        steps = args.tokens // self.at_once
        vocab = self.student.config.vocab_size
        ids = torch.randint(vocab, (steps, self.rows, args.sequence + 1), device=args.device)
        synchronize()
        begun = time.perf_counter()
        loss = sum(self.backward(rows) for rows in ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return time.perf_counter() - begun, float(loss)


def synchronize():
    if args.device == "cuda":
        torch.cuda.synchronize()


def memory():
    """GiB at the most by tensors, and in use on the device (the allocator gives nothing back)."""
    if args.device == "cpu":
        return "-"
    free, total = torch.cuda.mem_get_info()
    return f"{torch.cuda.max_memory_allocated() / 2**30:.1f}, {(total - free) / 2**30:.1f}"


def run(case):
    """A row of the table; the case ends early, with fewer steps, where its seconds are over."""
    begun = time.monotonic()
    signal.alarm(args.case_seconds)
    steps = []
    torch.manual_seed(1)
    try:
        trainer = Trainer(*case.split(":"))
        while len(steps) < WARM_UP + args.steps:
            steps.append(trainer.step())
    except Exception as error:  # out of memory or of time: the other cases go on
        if len(steps) <= WARM_UP:
            return f"{case}: {type(error).__name__}: {str(error).strip()[:300]}"
    finally:
        signal.alarm(0)
    seconds = [s for s, _ in steps[WARM_UP:]]
    low, middle, high = (args.tokens / f(seconds) for f in (max, statistics.median, min))
    return (f"| {case} | {middle:,.0f} [{low:,.0f}, {high:,.0f}] | "
            f"{1e3 * args.tokens / middle:,.1f} | {memory()} | {steps[-1][1]:.4f} | "
            f"{len(seconds)} | {time.monotonic() - begun:.0f} s |")


def out_of_time(*_):
    raise TimeoutError(f"no result in {args.case_seconds} s")


parser = argparse.ArgumentParser(description=__doc__,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("cases", nargs="*", default=DEFAULT)
parser.add_argument("--config", type=pathlib.Path,
                    default=pathlib.Path(__file__).resolve().parent.parent /
                    "plans/true-size/llama-3.2-1b")
parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
parser.add_argument("--sequence", type=int, default=4096)
parser.add_argument("--tokens", type=int, default=32768, help="of a step")
parser.add_argument("--chunk", type=int, default=4096, help="tokens of a chunked head")
parser.add_argument("--steps", type=int, default=5, help="measured ones")
parser.add_argument("--whole", action="store_true", help="the layers are compiled as one graph")
parser.add_argument("--compile", default="default", help="torch.compile's mode")
parser.add_argument("--attention", default="auto", choices=["auto", "cudnn", "flash"])
parser.add_argument("--seconds", type=float, default=105, help="no case is begun after so many")
parser.add_argument("--case-seconds", type=int, default=45)
args = parser.parse_args()
if args.attention != "auto":
    torch.backends.cuda.enable_cudnn_sdp(args.attention == "cudnn")
    torch.backends.cuda.enable_flash_sdp(args.attention == "flash")
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_math_sdp(args.device == "cpu")
    torch._functorch.config.enable_autograd_cache = False  # its key does not have the choice
run_layers = torch.compile(layers, mode=args.compile, dynamic=False) if args.whole else layers
signal.signal(signal.SIGALRM, out_of_time)
card = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
print(f"{card}, PyTorch {torch.__version__}, attention {args.attention}, compile {args.compile}, "
      f"{args.tokens} tokens a step, sequences of {args.sequence}\n"
      "| case | tokens/s | ms a step | GiB allocated, in use | loss | steps | with compilation |\n"
      "| --- | --- | --- | --- | --- | --- | --- |", flush=True)
for words in args.cases:
    if time.monotonic() - BEGUN > args.seconds:
        break
    print(run(words), flush=True)
    torch._dynamo.reset()
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
print(f"{time.monotonic() - BEGUN:.0f} s", file=sys.stderr)
