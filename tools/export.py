"""A checkpoint as a folder that transformers loads, and with it TRL, OpenRLHF, vLLM and the rest.

    python -m tools.export out/tiny/ppo exported/policy       loads as GPT2LMHeadModel, LlamaForCausalLM, Qwen2..., ...
    python -m tools.export out/tiny/reward exported/reward    loads as GPT2ForSequenceClassification, one label

The reward model's scores are those of reward.py, normalised; it reads at EOS, and has a padding token of its own. The
tokenizer begins each text as each prompt begins here; its chat template writes dialogues as data.py does: Human:,
Assistant:, or the model's chat format if it was trained in it (prepare.pretrained --chat).
"""
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch

from common import check, open_folder, run, write_atomic, write_json
from data import BEFORE, FORMATS, REPLY, load_tokenizer
from model import GPT2, LLAMA, ROPE_SCALING, hub_config, hub_weights, load_model
from prepare.vocabulary import LETTERS, merges

# tiktoken's \b after a letter, spelled out: the two regular-expression libraries differ in what belongs to a word.
BORDER = r"(?![\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D}])"
PAD = "<|pad|>"  # of a reward model: it must not be the token at which the score is read
TRANSCRIPT = (f"{{{{ bos_token }}}}{{% for m in messages %}}{{{{ {BEFORE}[m['role']] + m['content'] | trim }}}}"
              f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ {REPLY!r} }}}}"
              "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}")

@dataclass
class Config:
    model: str = "out/tiny/ppo"  # checkpoint folder of a language model or a reward model
    out: str = "exported/ppo"    # folder for the exported model

def exported_weights(model):
    """{name: tensor} of a GPT or ScalarModel under Hugging Face's names. A ScalarModel's classifier has no bias: a
    LayerNorm's takes it, as head . (x + shift) = head . x + bias; an RMSNorm has none (main notes it)."""
    prefix, own = "model." if model.config.rope else "transformer.", ("lm_head.", "head.")
    weights = {name if name.startswith(own) else prefix + name: x.clone(memory_format=torch.contiguous_format)
               for name, x in hub_weights(model)}
    if model.kind == "reward":
        head = weights["score.weight"] = weights.pop("head.weight") * model.gain  # (1, C)
        if not model.config.rms_norm:
            weights["transformer.ln_f.bias"] += model.bias * head.squeeze(0) / head.square().sum()
        embedding = f"{prefix}{'embed_tokens' if model.config.rope else 'wte'}.weight"
        weights[embedding] = torch.cat([weights[embedding], torch.zeros_like(head)])  # of the padding token
    return weights

def exported_config(config, kind, begin=None, end=None):
    """config.json of the exported "lm" or "reward" model; UserError if no family of transformers computes the same."""
    is_reward, names = kind == "reward", LLAMA if config.rope else GPT2
    family = ("Qwen3" if config.qk_norm else "Qwen2" if config.bias == "qkv" else "Llama") if config.rope else "GPT2"
    head = "ForSequenceClassification" if is_reward else "ForCausalLM" if config.rope else "LMHeadModel"
    settings = {theirs: getattr(config, ours) for ours, theirs in names.items() if hasattr(config, ours)}
    settings |= {"model_type": family.lower(), "architectures": [family + head],
                 "vocab_size": config.vocab_size + is_reward, "tie_word_embeddings": config.tied, "num_labels": 1,
                 "bos_token_id": begin, "eos_token_id": end, "pad_token_id": config.vocab_size if is_reward else end}
    if config.rope:
        settings |= {"hidden_act": "silu", "rope_theta": config.rope}
        if config.rope_scaling:
            settings["rope_scaling"] = {"rope_type": "llama3", **dict(zip(ROPE_SCALING, config.rope_scaling))}
    else:
        settings |= {"activation_function": {"tanh": "gelu_new", "none": "gelu"}[config.gelu],
                     **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)}
    check(hub_config(settings, 0, config.vocab_size) == replace(config, dropout=0.0),
          f"transformers has no model that computes what this one does: {config}")
    return settings

def exported_tokenizer(enc, special, begin):
    """tokenizer.json of the tokenizers library: the text begin (None: nothing), then the ids of enc.encode_ordinary,
    but for special tokens, {text: id}, which are found in a text there."""
    ranks, pattern = enc._mergeable_ranks, enc._pat_str.replace(r"\b", BORDER)
    words = {token: "".join(LETTERS[byte] for byte in token) for token in ranks}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    first, one, two = ({kind: {"id": name, "type_id": 0}} for kind, name in zip(
        ("SpecialToken", "Sequence", "Sequence"), (begin, "A", "B")))
    return {
        "version": "1.0", "decoder": byte_level, "normalizer": {"type": "NFC"} if enc.settings.get("nfc") else None,
        "added_tokens": [{"id": i, "content": text, "special": True, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False} for text, i in special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {"type": "TemplateProcessing", "single": [first, one], "pair": [first, one, two],
                           "special_tokens": {begin: {"id": begin, "ids": [special[begin]], "tokens": [begin]}}
                           } if begin else None,
        # A merge is one string: versions before 0.20 cannot read pairs, and no letter is a space. Special tokens are in
        # the vocabulary, too: otherwise they would be numbered from its end.
        "model": {"type": "BPE", "ignore_merges": True, "merges": [f"{words[a]} {words[b]}" for a, b in merges(ranks)],
                  "vocab": {**special, **{words[token]: rank for token, rank in ranks.items()}}}}

def chat_template(chat, think):
    """Jinja template that writes what data.chat_ids does in this chat format; think: its "think" as a text."""
    before, after = "".join(FORMATS[chat["format"]]).split("{content}")
    before, trim = f"{before!r}.replace('{{role}}', m['role'])", " | trim" * (chat["format"] == "llama3")
    system = f"[{{'role': 'system', 'content': {chat.get('system', '')!r}}}]"
    return (f"{'{{ bos_token }}' if 'begin' in chat else ''}{{% set lacks = messages[0]['role'] != 'system' %}}"
            f"{{% for m in ({system} if lacks else []) + messages %}}"
            f"{{% set text = ({chat.get('preamble', '')!r} if loop.first else '') + (m['content']{trim}) %}}"
            f"{{% if text or not loop.first %}}{{{{ {before} + ({think!r} if loop.last and m['role'] == 'assistant' "
            f"else '') + text + {after!r} }}}}{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}"
            f"{{% set m = {{'role': 'assistant'}} %}}{{{{ {before} + {think!r} }}}}{{% endif %}}")

@torch.no_grad()
def main(cfg):
    out, kind = Path(cfg.out), json.loads((Path(cfg.model) / "config.json").read_text()).get("kind", "lm")
    check(not (out / "model.pt").exists(), f"{out} is a checkpoint: export to another folder")
    model, enc = load_model(cfg.model, kind=kind), load_tokenizer(cfg.model)
    special, begin = enc.settings["special"], enc.chat.get("begin") if enc.chat else enc.begin
    text_of = {i: text for text, i in special.items()}
    config, weights = exported_config(model.config, kind, begin, enc.end), exported_weights(model)
    if kind == "reward" and model.config.rms_norm:
        config["score_bias"] = model.bias.item()
    open_folder(out)
    write_atomic(out / "model.safetensors", lambda file: file.write(safetensors.torch.save(weights, {"format": "pt"})))
    shutil.copy(Path(cfg.model) / "vocab.tiktoken", out)  # for the way back: prepare.pretrained
    write_json(out / "config.json", config)
    added = {**special, PAD: model.config.vocab_size} if kind == "reward" else special
    write_json(out / "tokenizer.json", exported_tokenizer(enc, added, text_of.get(begin)))
    template = chat_template(enc.chat, enc.decode(enc.chat.get("think", []))) if enc.chat else TRANSCRIPT
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.config.block_size,
        "bos_token": text_of.get(begin), "eos_token": text_of[enc.end], "clean_up_tokenization_spaces": False,
        "pad_token": PAD if kind == "reward" else text_of[enc.end], "chat_template": template,
        "padding_side": "right" if kind == "reward" else "left"})
    print(f"{out}: {config['architectures'][0]}, {sum(x.numel() for x in weights.values()):,} parameters")
    if config.get("score_bias"):
        print(f"its scores are {-config['score_bias']:+.4f} from those here, all of them: a score there has no bias to "
              "hold the constant; config.json has it as score_bias, to be added")

if __name__ == "__main__":
    run(main, Config, words=("model", "out"))
