#!/usr/bin/env python3
"""GGUF files that Cambium writes, run by llama.cpp, and files of llama.cpp's read by Cambium.

    python3 tests/llama_cpp/compare.py build/cambium [CASE ...]

Each case is a fixture, or one with a change that llama.cpp's architecture asks for (a window left
out, say). It is exported in f32, and imported again, which adds a golden prompt. Then

  reference  llama.cpp's logits against those of reference.safetensors, where nothing was changed
  golden     llama.cpp's logits against ours of the imported file
  quantised  the file quantised by llama.cpp (to Q8_0; one case to every kind) and imported: ours
             against llama.cpp's of the f32 file that it makes of the quantised one

Errors are the largest over the standard deviation of the logits. The bound is 1e-3, unless the case
says why it is wider. Each case runs in a process of its own, since llama.cpp aborts where it cannot go
on. Without llama-cpp-python and numpy this says so and skips.
"""

import ctypes
import json
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import llama_cpp
    import numpy as np
except ImportError as missing:
    print(f"skipped: {missing}; pip install llama-cpp-python numpy")
    sys.exit(0)

REPO = Path(__file__).resolve().parents[2]
FIXTURES = REPO / "tests/fixtures"
BOUND = 1e-3


def load(path):
    """The tensors of a safetensors file."""
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    head = json.loads(raw[8 : 8 + size])
    types = {"F32": np.float32, "I64": np.int64, "I32": np.int32, "BF16": np.uint16, "F8_E4M3": np.uint8}
    tensors = {}
    for name, entry in head.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(raw[8 + size + begin : 8 + size + end], types[entry["dtype"]])
            tensors[name] = (entry["dtype"], values.reshape(entry["shape"]))
    return tensors


def save(path, tensors):
    head, blobs, at = {}, [], 0
    for name, (dtype, values) in tensors.items():
        blob = np.ascontiguousarray(values).tobytes()
        head[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


Q8_0 = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
# Every kind that llama.cpp quantises to without statistics of activations.
KINDS = [getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind) for kind in
         ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K",
          "IQ4_NL", "IQ4_XS")]


class Case:
    """A fixture with `config` changed, tensors cut or repeated to `shapes` (by the ends of their names) and
    what `copies` gives added. Only texts of more than `longer_than` tokens are compared.
    `ours` changes the configuration of our side alone: what llama.cpp computes whatever the file says."""

    def __init__(self, fixture, config=None, shapes=None, copies=None, bound=BOUND, longer_than=0, yarn_beta_fast=-1.0,
                 kinds=(Q8_0,), ours=None, note=""):
        self.kinds, self.ours = kinds, ours
        self.fixture, self.config, self.shapes, self.copies = fixture, config, shapes or {}, copies
        self.bound, self.longer_than, self.yarn_beta_fast, self.note = bound, longer_than, yarn_beta_fast, note

    def make(self, folder, more=None):
        folder.mkdir()
        source = FIXTURES / self.fixture
        config = json.loads((source / "config.json").read_text())
        (config["text_config"] if "text_config" in config else config).update({**(self.config or {}), **(more or {})})
        (folder / "config.json").write_text(json.dumps(config))
        tensors = load(source / "model.safetensors")
        if self.copies:
            tensors.update(self.copies(tensors))
        for name, (dtype, values) in tensors.items():
            for end, shape in self.shapes.items():
                if name.endswith(end):
                    for axis, count in enumerate(shape):  # cut, or repeated
                        values = values.take(range(count), axis, mode="wrap")
                    tensors[name] = dtype, values
        save(folder / "model.safetensors", tensors)
        return folder


def experts_everywhere(tensors):
    """Layer 1 of qwen3_moe with the experts of layer 0."""
    more = {}
    for name, value in tensors.items():
        if name.startswith("model.layers.0.mlp."):
            more[name.replace("layers.0", "layers.1")] = value
    for name in list(tensors):
        if name.startswith("model.layers.1.mlp.") and "expert" not in name and ".gate." not in name:
            del tensors[name]
    return more


def lightning(tensors):
    """Layers 0 and 1 of minimax_m2 with MiniMax-01's lightning attention in place of their own."""
    random = np.random.default_rng(0)
    shapes = {"qkv_proj": (192, 64), "output_gate": (64, 64), "out_proj": (64, 64), "norm": (64,)}
    for name in [name for name in tensors if "e_score" in name or "_norm.weight" in name and "self_attn" in name]:
        del tensors[name]
    more = {}
    for layer in range(2):
        for name in [name for name in tensors if name.startswith(f"model.layers.{layer}.self_attn.")]:
            del tensors[name]
        for name, shape in shapes.items():
            values = random.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) == 2 else 1)
            more[f"model.layers.{layer}.self_attn.{name}.weight"] = "F32", values
    return more


DELTA = {
    "in_proj_qkvz.weight": (192, 64), "in_proj_qkv.weight": (128, 64), "in_proj_z.weight": (64, 64),
    "linear_attn.conv1d.weight": (128, 1, 4), "linear_attn.norm.weight": (16,),
    "linear_attn.out_proj.weight": (64, 64),
}
GELU = "llama.cpp looks GELU up in a table of fp16"
SQUARE = {"linear_value_head_dim": 16}
WIDE = {
    "embed_tokens.weight": (384, 256), "layernorm.weight": (256,), "model.norm.weight": (256,),
    "q_proj.weight": (256, 256), "k_proj.weight": (128, 256), "v_proj.weight": (128, 256), "o_proj.weight": (256, 256),
    "gate_proj.weight": (512, 256), "up_proj.weight": (512, 256), "down_proj.weight": (256, 512),
}
GPT_OSS_ROPE = json.loads((FIXTURES / "gpt_oss/config.json").read_text())["rope_scaling"]
CASES = {
    "llama": Case("llama"),
    "llama_wide": Case("llama", {"hidden_size": 256, "intermediate_size": 512}, WIDE, kinds=KINDS),
    "llama_bias": Case("llama_bias"),
    "llama_rope_yarn": Case("llama_rope_yarn"),
    "llama_rope_longrope": Case("llama_rope_longrope", longer_than=64),
    "mistral": Case("mistral"),
    "mistral_swa": Case("mistral_swa", {"sliding_window": None}),
    "ministral3": Case("ministral3"),
    "mixtral": Case("mixtral"),
    "qwen2_swa": Case("qwen2_swa", {"use_sliding_window": False}),
    "qwen3": Case("qwen3"),
    "qwen3_fp8": Case("qwen3_fp8"),
    "qwen3_moe": Case("qwen3_moe", {"mlp_only_layers": []}, copies=experts_everywhere),
    "gemma2": Case("gemma2", {"query_pre_attn_scalar": 32}, bound=5e-3, note=GELU),
    "gemma3": Case("gemma3", {"query_pre_attn_scalar": 16}, bound=5e-3, note=GELU),
    "phi3": Case("phi3", {"sliding_window": None}),
    "phi3_longrope": Case("phi3_longrope", longer_than=64),
    "olmo2": Case("olmo2"),
    "olmo3": Case("olmo3"),
    "granite": Case("granite"),
    "granite_moe": Case("granite_moe"),
    "smollm3": Case("smollm3"),
    "minimax_m2": Case("minimax_m2"),
    "minimax_m1": Case("minimax_m2", dict(
        {f"layernorm_{branch}_{factor}": value for branch in ("full_attention", "linear_attention", "mlp")
         for factor, value in (("alpha", 3.5), ("beta", 1.0))},
        model_type="minimax_m1", attn_type_list=[0, 0, 1], postnorm=True,
        auto_map={"AutoModelForCausalLM": "modeling_minimax_m1.MiniMaxM1ForCausalLM"}), copies=lightning),
    "gpt_oss": Case("gpt_oss", {"swiglu_limit": 7.0}, ours={"rope_scaling": dict(GPT_OSS_ROPE, truncate=True)},
                    note="ours with YaRN's ramp between whole channels, as llama.cpp has it"),
    "gpt_oss_plain_rope": Case("gpt_oss", {"swiglu_limit": 7.0, "rope_scaling": None}),
    "granite_hybrid": Case("granite_hybrid"),
    "bamba": Case("bamba", {"mamba_n_groups": 1},
                  {"mamba.in_proj.weight": (296, 64), "conv1d.weight": (160, 1, 4), "conv1d.bias": (160,)}),
    "falcon_h1": Case("falcon_h1"),
    "nemotron_h": Case("nemotron_h"),
    "nemotron_h_moe": Case("nemotron_h_moe"),
    "nemotron_h_latent": Case("nemotron_h_latent"),
    "jamba": Case("jamba"),
    "lfm2": Case("lfm2"),
    "lfm2_moe": Case("lfm2_moe"),
    "qwen3_next": Case("qwen3_next", SQUARE, DELTA),
    "qwen3_5": Case("qwen3_5", SQUARE, DELTA),
    "qwen3_5_text": Case("qwen3_5_text", SQUARE, DELTA),
    "qwen3_5_moe": Case("qwen3_5_moe", SQUARE, DELTA),
    "deepseek_v3": Case("deepseek_v3"),
    "deepseek_v32": Case("deepseek_v32", {"index_head_dim": 64},
                         {"indexer.wq_b.weight": (1024, 48), "indexer.wk.weight": (64, 64),
                          "k_norm.weight": (64,), "k_norm.bias": (64,)}),
    "kimi_k2": Case("kimi_k2", yarn_beta_fast=1.0, note="told yarn_beta_fast, whose key it passes over"),
    "kimi_linear": Case("kimi_linear"),
    "bailing_hybrid": Case("bailing_hybrid"),
    "apertus": Case("apertus"),
}


def quiet(level, text, data):
    if level >= 4:  # errors
        errors.append(ctypes.string_at(text).decode(errors="replace").strip())


errors = []
callback = llama_cpp.llama_log_callback(quiet)
llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Model:
    def __init__(self, path, yarn_beta_fast):
        self.yarn_beta_fast = yarn_beta_fast
        options = llama_cpp.llama_model_default_params()
        options.use_mmap = False
        errors.clear()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise RuntimeError("; ".join(errors[:2]) or "llama.cpp does not load it")

    def logits(self, tokens):
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = 256, 512, 512
        options.type_k = options.type_v = 0  # f32
        options.flash_attn_type = 0
        options.yarn_beta_fast = self.yarn_beta_fast
        options.n_threads = options.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(self.model, options)
        if not context:
            raise RuntimeError("; ".join(errors[:2]) or "llama.cpp makes no context")
        count = len(tokens)
        batch = llama_cpp.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = int(token), i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
        if llama_cpp.llama_decode(context, batch) != 0:
            raise RuntimeError("; ".join(errors[:2]) or "llama.cpp does not run it")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rows = [np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (vocabulary,)).copy()
                for i in range(count)]
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        return np.stack(rows)

    def close(self):
        llama_cpp.llama_model_free(self.model)


def error(got, wanted):
    worst = float(np.abs(got.astype(np.float64) - wanted).max() / wanted.std())
    return worst if worst == worst else float("inf")


def run(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])


def golden_error(folder, model):
    golden = load(folder / "golden.safetensors")
    tokens, logits = golden["tokens"][1], golden["logits"][1]
    return error(model.logits(tokens.reshape(-1)), logits.reshape(len(tokens.reshape(-1)), -1))


def quantise(source, target, kind):
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = kind, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) != 0:
        raise RuntimeError("llama.cpp does not quantise it")


def quantised_error(program, case, file, folder, kind):
    """Ours of a file that llama.cpp made Q8_0 of, against llama.cpp's of the f32 that it makes of that."""
    small, wide = folder / "small.gguf", folder / "wide.gguf"
    quantise(file, small, kind)
    quantise(small, wide, llama_cpp.LLAMA_FTYPE_ALL_F32)
    run(program, "import", small, folder / "small", "--f32", "--replace")
    model = Model(wide, case.yarn_beta_fast)
    result = golden_error(folder / "small", model)
    model.close()
    return result


def compare(program, case, folder):
    model_folder = case.make(folder / "model")
    file = folder / "model.gguf"
    run(program, "export", model_folder, "--gguf", file, "--type", "f32")
    run(program, "import", file, folder / "back", "--f32")
    model = Model(file, case.yarn_beta_fast)
    results = {}
    if case.config is None:
        reference = load(FIXTURES / case.fixture / "reference.safetensors")
        worst = 0.0
        for name, (_, tokens) in reference.items():
            if name.startswith("tokens.") and case.longer_than < len(tokens) <= 256:
                wanted = reference[name.replace("tokens", "logits")][1]
                worst = max(worst, error(model.logits(tokens), wanted))
        results["reference"] = worst
    if case.ours is not None:
        changed = case.make(folder / "ours", case.ours)
        run(program, "export", changed, "--transformers", folder / "saved", "--storage", "f32")
        results["golden"] = golden_error(folder / "saved", model)
    elif case.longer_than == 0:
        results["golden"] = golden_error(folder / "back", model)
        results["quantised"] = max(quantised_error(program, case, file, folder, kind) for kind in case.kinds)
    model.close()
    return results


def run_case(program, name):
    case = CASES[name]
    folder = Path(tempfile.mkdtemp(prefix="cambium-llama-"))
    try:
        results = compare(program, case, folder)
        fine = all(value <= case.bound for value in results.values())
        text = "  ".join(f"{kind} {value:.1e}" for kind, value in results.items())
    except RuntimeError as problem:
        fine, text = False, str(problem)
    finally:
        shutil.rmtree(folder)
    print(f"{'ok  ' if fine else 'FAIL'} {name:20} {text}  {case.note}", flush=True)
    return fine


def main():
    program, names = sys.argv[1], sys.argv[2:] or list(CASES)
    if len(names) == 1:
        sys.exit(0 if run_case(program, names[0]) else 1)
    failed = 0
    for name in names:
        done = subprocess.run([sys.executable, __file__, program, name], stderr=subprocess.DEVNULL)
        if done.returncode not in (0, 1):
            print(f"FAIL {name:20} llama.cpp aborts", flush=True)
        failed += done.returncode != 0
    sys.exit(1 if failed else 0)


main()
