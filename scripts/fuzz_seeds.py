#!/usr/bin/env python3
"""Writes the seeds of the fuzz targets: scripts/fuzz_seeds.py FOLDER. They are cut from the tests'
fixtures and the shipped model and plans, small enough that thousands run a second."""
import base64
import json
import pathlib
import re
import struct
import sys

top = pathlib.Path(__file__).resolve().parent.parent
out = pathlib.Path(sys.argv[1])


def put(target, name, data):
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def safetensors(tensors, **metadata):
    header, blob = {}, b""
    if metadata:
        header["__metadata__"] = metadata
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(blob), len(blob) + len(data)]}
        blob += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + blob


def text_bytes(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf(keys, tensors):
    """keys: (name, type, bytes); tensors: (name, shape, type, bytes)."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for name, kind, value in keys:
        head += text_bytes(name) + struct.pack("<I", kind) + value
    blob = b""
    for name, shape, kind, data in tensors:
        head += text_bytes(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", n) for n in shape) + struct.pack("<IQ", kind, len(blob))
        blob += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + blob


def array(kind, values):
    return struct.pack("<IQ", kind, len(values)) + b"".join(values)


put("safetensors", "two", safetensors({"a.weight": ("F32", [2, 3], bytes(24)), "b": ("BF16", [4], bytes(8))},
                                      format="pt"))
put("safetensors", "kinds", safetensors({k: (k, [1], bytes(n)) for k, n in
                                         {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "U8": 1, "BOOL": 1}.items()}))
put("safetensors", "empty", safetensors({"none": ("F32", [0, 4], b""), "scalar": ("F32", [], bytes(4))}))

put("gguf", "small", gguf(
    [("general.architecture", 8, text_bytes("llama")), ("llama.block_count", 4, struct.pack("<I", 1)),
     ("llama.rope.freq_base", 6, struct.pack("<f", 1e4)), ("general.alignment", 4, struct.pack("<I", 32)),
     ("tokenizer.ggml.add_bos_token", 7, b"\1"),
     ("tokenizer.ggml.tokens", 9, array(8, [text_bytes("<s>"), text_bytes("a")])),
     ("tokenizer.ggml.scores", 9, array(6, [struct.pack("<f", 0.5)] * 2)),
     ("tokenizer.ggml.token_type", 9, array(5, [struct.pack("<i", 3), struct.pack("<i", 1)]))],
    [("token_embd.weight", [4, 2], 0, bytes(32)), ("blk.0.attn_q.weight", [32, 1], 8, bytes(34))]))

whole = json.loads((top / "models/teacher/tokenizer.json").read_text())
small = json.loads(json.dumps(whole))
vocab = sorted(small["model"]["vocab"].items(), key=lambda item: item[1])
merges = small["model"]["merges"][:8]
made = {"".join(m if isinstance(m, list) else m.split(" ")) for m in merges}
small["model"]["vocab"] = {t: i for t, i in vocab if len(t) == 1 or t in made or t.startswith("<")}
small["model"]["merges"] = merges
put("tokenizer", "teacher", json.dumps(small))
parts = {
    "normalizer": [{"type": "NFC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "_"},
                   {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
                   {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Strip", "strip_left": True,
                                                                           "strip_right": True}]}],
    "pre_tokenizer": [{"type": "Split", "pattern": {"Regex": "\\\\p{L}+|\\\\s+(?!\\\\S)"}, "behavior": "Isolated",
                       "invert": False}, {"type": "Digits", "individual_digits": True},
                      {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True},
                      {"type": "Whitespace"}, {"type": "Punctuation", "behavior": "Isolated"}],
    "decoder": [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}],
    "post_processor": [{"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                                                                 {"Sequence": {"id": "A", "type_id": 0}}],
                        "pair": [], "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}}],
}
tiny = {"version": "1.0", "added_tokens": [{"id": 0, "content": "<s>", "special": True, "single_word": False,
                                            "lstrip": False, "rstrip": False, "normalized": False}],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"],
                  "byte_fallback": False, "unk_token": "<s>"}}
put("tokenizer", "bpe", json.dumps(tiny))
for key, values in parts.items():
    for number, value in enumerate(values):
        put("tokenizer", f"{key}-{number}", json.dumps({**tiny, key: value}))
put("tokenizer", "unigram", json.dumps({**tiny, "model": {
    "type": "Unigram", "unk_id": 0, "byte_fallback": False,
    "vocab": [["<s>", 0.0], ["a", -1.5], ["b", -2.0], ["ab", -1.0], ["\u2581", -2.5]]}}))
# A charsmap that makes A an a: the root's base is 1, that of A is 2, and there stands the value.
units = [0] * 256
units[0], units[0x40], units[2] = 1 << 10, 0x42 << 10 | 1 << 8 | 0x41, 1 << 31
charsmap = struct.pack("<257I", 1024, *units) + b"a\0"
put("charsmap", "letter", charsmap)
put("tokenizer", "precompiled", json.dumps({**tiny, "normalizer": {
    "type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()}}))
put("tokenizer", "wordpiece", json.dumps({**tiny, "model": {
    "type": "WordPiece", "unk_token": "<s>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
    "vocab": {"<s>": 0, "a": 1, "##b": 2}}}))

config = json.loads((top / "models/teacher/tokenizer_config.json").read_text())
if isinstance(config.get("chat_template"), str):
    put("template", "teacher", config["chat_template"])
put("template", "chatml", "{%- for m in messages -%}<|im_start|>{{ m['role'] + '\\n' + m.content | trim }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}")
put("template", "tools", "{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}{{ loop.index0 ~ m.content.split(' ')[-1][::-1] }}"
    "{% else %}{{ raise_exception('none') }}{% endfor %}")
put("template", "macro", "{% macro f(x, y=2) %}{{ '%s-%d' % (x, y) }}{% endmacro %}{% set ns = namespace(n=0) %}"
    "{% for k, v in {'a': 1, 'b': [1, 2]}.items() %}{% set ns.n = ns.n + 1 %}{{ f(k) }}{{ v }}{% endfor %}"
    "{{ range(3) | list | join(',') }}{{ '{:>5}'.format(ns.n) }}{{ strftime_now('%Y') }}")

for number, pattern in enumerate([
        "(?i:'s|'t|'re)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
        "[a-z&&[^aeiou]]+", "(?<name>a|b)*+\\k<name>", "\\h{2,}|(?<=x)y|(?m:.)", "[[:alpha:]]+|\\x{1F600}"]):
    put("regex", str(number), pattern + "\nHello's 123 worlds\n\n  e\u0301 xyz \U0001F600")

for plan in (top / "plans").glob("*.toml"):
    put("plan", plan.stem, plan.read_text()[:6000])
put("plan", "train", "[train]\nsteps = 10\nsequence_length = 64\n[train.schedule]\nrate = 1e-3\nwarmup = 0.1\n"
    "[train.loss]\nreverse_kl = 1.0\n")

def stored_logits(top_k, vocabulary, counts):
    """Without the checksum that ends the file: the target adds it."""
    bits, rows = max(1, (vocabulary - 1).bit_length()), sum(counts)
    header = json.dumps({"version": 1, "top_k": top_k, "vocabulary": vocabulary, "documents": len(counts),
                         "max_tokens": 8, "rows": rows, "data": "d", "tokenizer": "t", "teacher": "m",
                         "teacher_name": "dir"}).encode()
    starts = [sum(counts[:i]) for i in range(len(counts) + 1)]
    row = struct.pack(f"<{top_k + 1}e", *[-1.0] * (top_k + 1)) + bytes((top_k * bits + 7) // 8)
    return (b"CAMLOGIT" + struct.pack("<Q", len(header)) + header +
            b"".join(struct.pack("<Q", s) for s in starts) + row * rows)


put("logits", "small", stored_logits(2, 24, [3, 0, 2]))
put("logits", "all", stored_logits(5, 5, [3]))
put("logits", "none", stored_logits(1, 1, []))

rows = [{"text": "one two"}, {"question": "1 + 1?", "answer": "2"}, {"prompt": "a", "completion": " b"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "weight": 0},
                      {"role": "assistant", "content": "no"}], "tools": None},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "system": "s"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "x"}]}]
for number, row in enumerate(rows):
    put("jsonl", str(number), json.dumps(row) + "\n")
put("jsonl", "all", "\r\n".join(json.dumps(row) for row in rows) + "\n\n")

for path in sorted((top / "tests/fixtures").glob("*/config.json")) + [top / "models/teacher/config.json",
                                                                      top / "plans/apriel-15b/config.json"]:
    if path.exists():
        put("config", path.parent.name, path.read_text())
# Configurations that tests hold as text.
for source in (top / "src/model/families").glob("*_test.cc"):
    for number, text in enumerate(re.findall(r'R"\((\{.*?\})\)"', source.read_text(), re.S)):
        put("config", f"{source.stem}-{number}", text)
