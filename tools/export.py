"""A checkpoint as a folder that transformers loads, and with it TRL, OpenRLHF, vLLM and the rest.

    python -m tools.export out/tiny/ppo exported/policy       loads as GPT2LMHeadModel
    python -m tools.export out/tiny/reward exported/reward    loads as GPT2ForSequenceClassification with one label

The reward model's scores are those of reward.py, normalised; it reads at EOS, and has a padding token of its own. The
tokenizer begins each text with <|endoftext|>, as each prompt does here; its chat template writes Human:, Assistant:.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch

from common import check, open_folder, run, write_atomic, write_json
from data import END, REPLY, TURN, load_tokenizer
from model import load_model
from prepare.pretrained import names
from prepare.reviews import save_ranks

# tiktoken's \b after a letter, spelled out: the two regular-expression libraries differ in what belongs to a word.
BORDER = r"(?![\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])"
MARKS = {"system": "", "user": TURN + " ", "assistant": REPLY + " "}  # before a message; another role is an error
CHAT = (f"{{{{ bos_token }}}}{{% for m in messages %}}{{{{ {MARKS}[m['role']] + m['content'] | trim }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {REPLY!r} }}}}"
        "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}")


@dataclass
class Config:
    model: str = "out/tiny/ppo"  # checkpoint folder of a language model or a reward model
    out: str = "exported/ppo"    # folder for the exported model


def exported_weights(model, kind):
    """{name: tensor} of a GPT or ScalarModel under GPT-2's names, without the unused rows of the token embedding."""
    config, state = model.config, model.trunk.state_dict()
    weights = {f"transformer.{theirs}": state[ours].T.contiguous() if transposed else state[ours]
               for ours, theirs, transposed in names(config.n_layer)}
    embedding = state["token_embedding.weight"][:config.vocab_size]
    if kind == "reward":
        head = model.head.weight * model.gain  # (1, C)
        # The classifier's head has no bias. Ours goes into the last norm's: head . (x + shift) = head . x + bias.
        weights["transformer.ln_f.bias"] = state["norm.bias"] + model.bias * head.squeeze(0) / head.square().sum()
        weights["score.weight"] = head
        embedding = torch.cat([embedding, torch.zeros_like(head)])  # of the padding token
    return weights | {"transformer.wte.weight": embedding.contiguous()}


def exported_config(config, kind):
    """config.json of the exported model."""
    end, is_reward = config.vocab_size - 1, kind == "reward"
    return {
        "model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification" if is_reward else "GPT2LMHeadModel"],
        "vocab_size": config.vocab_size + is_reward, "n_positions": config.block_size, "n_embd": config.width,
        "n_layer": config.n_layer, "n_head": config.n_head, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "activation_function": {"tanh": "gelu_new", "none": "gelu"}[config.gelu], "num_labels": 1,
        "bos_token_id": end, "eos_token_id": end, "pad_token_id": end + is_reward}


def merges(ranks):
    """The merge (left, right) of each token of several bytes, by rank: the last step when its own bytes are encoded."""
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], ranks[token]))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        yield parts


def exported_tokenizer(enc, special):
    """tokenizer.json of the tokenizers library: EOS, then the ids of enc.encode_ordinary (but for a literal EOS)."""
    ranks, pattern = enc._mergeable_ranks, enc._pat_str.replace(r"\b", BORDER)
    # GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on.
    others = [byte for byte in range(256) if chr(byte) == " " or not chr(byte).isprintable()]
    letters = {byte: chr(byte) for byte in range(256)} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    begin, one, two = ({kind: {"id": name, "type_id": 0}} for kind, name in zip(
        ("SpecialToken", "Sequence", "Sequence"), (END, "A", "B")))
    return {
        "version": "1.0", "decoder": byte_level,
        "added_tokens": [{"id": len(ranks) + i, "content": text, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for i, text in enumerate(special)],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "TemplateProcessing", "single": [begin, one], "pair": [begin, one, two],
                           "special_tokens": {END: {"id": END, "ids": [enc.end], "tokens": [END]}}},
        # A merge is one string: versions before 0.20 cannot read pairs, and no letter is a space.
        "model": {"type": "BPE", "ignore_merges": True, "vocab": {words[token]: rank for token, rank in ranks.items()},
                  "merges": [f"{words[left]} {words[right]}" for left, right in merges(ranks)]}}


@torch.no_grad()
def main(cfg):
    out, kind = Path(cfg.out), json.loads((Path(cfg.model) / "config.json").read_text())["kind"]
    check(not (out / "model.pt").exists(), f"{out} is a checkpoint: export to another folder")
    model, enc = load_model(cfg.model, kind=kind), load_tokenizer(cfg.model)
    special, side = ([END, "<|pad|>"], "right") if kind == "reward" else ([END], "left")  # side of the padding
    weights, config = exported_weights(model, kind), exported_config(model.config, kind)
    open_folder(out)
    write_atomic(out / "model.safetensors", lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
    save_ranks(enc._mergeable_ranks, out / "vocab.tiktoken")  # for the way back: prepare.pretrained
    write_json(out / "config.json", config)
    write_json(out / "tokenizer.json", exported_tokenizer(enc, special))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size, "bos_token": END,
        "eos_token": END, "pad_token": special[-1], "padding_side": side, "clean_up_tokenization_spaces": False,
        "chat_template": CHAT})
    print(f"{out}: {config['architectures'][0]}, {sum(x.numel() for x in weights.values()):,} parameters")


if __name__ == "__main__":
    run(main, Config, words=("model", "out"))
