"""A checkpoint as a folder that transformers loads, and with it TRL, OpenRLHF, vLLM and the rest.

    python export.py out/tiny/ppo exported/policy       loads as GPT2LMHeadModel
    python export.py out/tiny/reward exported/reward    loads as GPT2ForSequenceClassification with one label

The scores of the exported reward model are those of reward.py, normalisation included. Its texts are prompt, response
and end of text; as a classifier reads the last token that is no padding, it gets a padding token of its own.
Every prompt of ours begins with <|endoftext|>: put it there (tokenizer.bos_token) where another program does not.
"""
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from checkpoint import read_checkpoint, write_atomic, write_json
from common import check, run
from data import END, load_tokenizer, save_ranks
from gpt2 import byte_letters, names
from model import load_model
from runs import open_folder
from terminal import words_for

PAD = "<|pad|>"
# tiktoken's \b after a letter, spelled out: the two regular-expression libraries differ in what belongs to a word.
BORDER = r"(?![\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])"


@dataclass
class Config:
    model: str = ""  # checkpoint folder of a language model or a reward model
    out: str = ""    # folder for the exported model


def exported_weights(model, kind):
    """{name: tensor} of a GPT or ScalarModel under GPT-2's names, without the unused rows of the token embedding."""
    config, state = model.config, model.trunk.state_dict()
    weights = {f"transformer.{theirs}": state[ours].T.contiguous() if transposed else state[ours]
               for ours, theirs, transposed in names(config.n_layer)}
    embedding = weights["transformer.wte.weight"][:config.vocab_size]
    if kind == "reward":
        head = model.head.weight * model.gain  # (1, C)
        check(head.any(), "the head of this reward model is zero: it has not been trained")
        # The classifier's head has no bias. Ours goes into the final layer norm's, along the head's direction:
        # head . (x + shift) = head . x + bias.
        shift = model.bias * head.squeeze(0) / head.square().sum()
        weights["transformer.ln_f.bias"] = weights["transformer.ln_f.bias"] + shift
        weights["score.weight"] = head
        embedding = torch.cat([embedding, torch.zeros(1, config.width)])  # of the padding token
    return weights | {"transformer.wte.weight": embedding.contiguous()}


def exported_config(config, kind):
    """config.json of the exported model."""
    end, pad = config.vocab_size - 1, config.vocab_size if kind == "reward" else config.vocab_size - 1
    settings = {
        "model_type": "gpt2", "vocab_size": config.vocab_size + (kind == "reward"), "n_positions": config.block_size,
        "n_embd": config.width, "n_layer": config.n_layer, "n_head": config.n_head,
        "activation_function": {"tanh": "gelu_new", "none": "gelu"}[config.gelu], "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": pad, "torch_dtype": "float32"}
    if kind == "reward":
        return settings | {"architectures": ["GPT2ForSequenceClassification"], "id2label": {"0": "score"},
                           "label2id": {"score": 0}, "problem_type": "regression"}
    return settings | {"architectures": ["GPT2LMHeadModel"]}


def merges(ranks):
    """The merge (left, right) that makes each token of more than one byte, by rank: what byte-pair encoding of the
    token's own bytes arrives at before its last step."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], rank))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield parts


def exported_tokenizer(enc, kind):
    """tokenizer.json of the tokenizers library: the same ids as enc.encode_ordinary.

    Except for a literal <|endoftext|> in a text, which becomes the special id there, as everywhere in that library.
    """
    letters, ranks, pattern = byte_letters(), enc._mergeable_ranks, enc._pat_str.replace(r"\b", BORDER)

    def spell(token):
        return "".join(letters[byte] for byte in token)
    special = [END, PAD] if kind == "reward" else [END]
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": len(ranks) + i, "content": text, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i, text in enumerate(special)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {spell(token): rank for token, rank in ranks.items()},
                  "merges": [[spell(left), spell(right)] for left, right in merges(ranks)]},
    }


def main(cfg):
    check(cfg.model and cfg.out, "name a checkpoint and a folder: python export.py out/tiny/ppo exported/policy")
    _, facts = read_checkpoint(cfg.model, ["lm", "reward"])
    kind, out = facts["kind"], Path(cfg.out)
    model, enc = load_model(cfg.model, kind=kind), load_tokenizer(cfg.model)
    check(not (out / "model.pt").exists(), f"{out} is a checkpoint of ours: export to another folder")
    with torch.no_grad():
        weights = exported_weights(model, kind)
    open_folder(out)
    write_atomic(out / "model.safetensors",
                 lambda temporary: safetensors.torch.save_file(weights, temporary, metadata={"format": "pt"}))
    (out / "model.safetensors").chmod(0o644)  # for whoever may read the folder: it was made for one user only
    save_ranks(enc._mergeable_ranks, out / "vocab.tiktoken")  # for the way back: gpt2.py --init
    write_json(out / "config.json", exported_config(model.config, kind))
    write_json(out / "tokenizer.json", exported_tokenizer(enc, kind))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size, "bos_token": END,
        "eos_token": END, "pad_token": PAD if kind == "reward" else END, "clean_up_tokenization_spaces": False,
        "padding_side": "right" if kind == "reward" else "left"})
    print(f"{out}: {'GPT2ForSequenceClassification' if kind == 'reward' else 'GPT2LMHeadModel'}, "
          f"{sum(x.numel() for x in weights.values()):,} parameters, {enc.n_vocab:,} tokens")


if __name__ == "__main__":
    words_for("model", "out")
    run(main, Config)
