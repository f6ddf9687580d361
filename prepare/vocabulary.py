"""Tokenizers in Hugging Face's format: what of them tiktoken computes to the id is read, the rest is refused by name.

All of these are byte-pair encodings of bytes. tiktoken merges the pair whose result has the least id, so merges must be
in the order of their ids; what splits text before is one regular expression here.
"""
import json
import re
from pathlib import Path

import tiktoken

from common import UserError, check, say
from data import END, load_tokenizer

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same when digits have been split off one by one before: white space before a digit is then at an end.
DIGITS_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
# GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on.
OTHERS = [byte for byte in range(256) if chr(byte) == " " or not chr(byte).isprintable()]
LETTERS = {byte: chr(byte) for byte in range(256)} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
DATED = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"  # Llama 3.1's template, its own date
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.json", "merges.txt")

def merges(ranks):
    """The last merge (left, right) of each token of several bytes, by rank, when byte pairs make it of its own bytes.
    A token that they do not make (Llama 3 has some) has none: it is found only as a whole piece of text."""
    for token in sorted((token for token in ranks if len(token) > 1), key=ranks.get):
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], 2**32), i) for i in range(len(parts) - 1))
            if rank == 2**32:
                break
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            yield tuple(parts)

def split_pattern(steps, name):
    """The regular expression that splits text first, from the pre-tokenizer of a tokenizer.json."""
    steps = steps.get("pretokenizers", [steps]) if steps else []
    kinds, last = [step["type"] for step in steps], steps[-1] if steps else {}
    if kinds and kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if len(kinds) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        if kinds[:-1] == ["Digits"] and steps[0]["individual_digits"] and last.get("use_regex", True):
            return DIGITS_PATTERN
        if kinds[:-1] == ["Split"] and not last.get("use_regex", True) and "Regex" in steps[0]["pattern"] and (
                steps[0]["behavior"], steps[0]["invert"]) == ("Isolated", False):
            return steps[0]["pattern"]["Regex"]
    raise UserError(f"{name}: pre-tokenizer {json.dumps(steps)[:200]} is not supported")

def begin_token(step):
    """The special token that a post-processor of a tokenizer.json puts before a text, or None."""
    for part in [step, *step.get("processors", [])] if step else []:
        first = (part.get("single") or [{}])[0]
        if "SpecialToken" in first:
            return first["SpecialToken"]["id"]

def chat_format(ranks, special, template):
    """How dialogues are written (data.load_tokenizer), from the special tokens; {} if they mark no turns. A template
    tells only its default system message, and whether it knows thinking (Qwen 3) or dated lines (Llama 3.1)."""
    if {"<|im_start|>", "<|im_end|>"} <= special.keys():
        system = re.search(r"<\|im_start\|>system(?:\\n|\n)([^'\"{}<>]+)<\|im_end\|>", template)
        chat = {"format": "chatml", "end": special["<|im_end|>"], **({"system": system[1]} if system else {})}
        if "enable_thinking" in template and b"\n\n" in ranks:
            gap = ranks[b"\n\n"]
            chat["think"] = [special["<think>"], gap, special["</think>"], gap]
        return {"chat": chat}
    if {"<|start_header_id|>", "<|eot_id|>", "<|begin_of_text|>"} <= special.keys():
        chat = {"format": "llama3", "end": special["<|eot_id|>"], "begin": special["<|begin_of_text|>"]}
        return {"chat": {**chat, **({"preamble": DATED} if "Cutting Knowledge Date" in template else {})}}
    return {}

def read_json(content, name, template="", gpt2=False):
    """(ranks, settings) for save_ranks from the content of a tokenizer.json. UserError names what tiktoken would do
    otherwise. gpt2: special tokens behind the one that ends a text are dropped, as with GPT-2's rows of padding."""
    model, normalizer, byte_of = content["model"], content.get("normalizer"), {x: b for b, x in LETTERS.items()}
    check(normalizer in (None, {"type": "NFC"}), f"{name}: normalizer {json.dumps(normalizer)[:200]} is not supported")
    pattern = split_pattern(content.get("pre_tokenizer"), name)
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        check(not model.get(setting), f"{name}: {setting} {model.get(setting)!r} is not supported")
    check(model.get("type", "BPE") == "BPE", f"{name}: a model of type {model.get('type')} is not supported")
    special = {token["content"]: token["id"] for token in sorted(content["added_tokens"], key=lambda x: x["id"])}
    if added := [token["content"] for token in content["added_tokens"] if not token.get("special", True)]:
        say(f"{name}: in a text {', '.join(added[:5])} is read as letters, not as the token that was added for it")
    words = sorted(model["vocab"].items() - special.items(), key=lambda item: item[1])
    strange = {letter for word, _ in words for letter in word} - byte_of.keys()
    check(not strange, f"{name}: its tokens are no bytes in GPT-2's letters, but have {sorted(strange)[:5]}")
    ranks = {bytes(byte_of[x] for x in word): rank for word, rank in words}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    pairs = [tuple(bytes(byte_of[x] for x in part) for part in pair) for pair in pairs]
    order = [ranks[left + right] for left, right in pairs]
    check(order == sorted(order), f"{name}: its merges are not in the order of their ids, as tiktoken needs them")
    made = list(merges(ranks))
    check(set(made) <= set(pairs) and (model.get("ignore_merges") or len(made) == sum(len(x) > 1 for x in ranks)),
          f"{name}: tiktoken would merge other pairs than its merges")
    end = next((special[text] for text in (END, "<|end_of_text|>") if text in special), None)
    check(end is not None, f"{name}: no special token that ends a text ({END} or <|end_of_text|>)")
    if gpt2:
        special = {text: i for text, i in special.items() if i <= max(end, *ranks.values())}
    begin = begin_token(content.get("post_processor"))
    return ranks, {"pattern": pattern, "special": special, "end": end, **({"begin": special[begin]} if begin else {}),
                   **({"nfc": True} if normalizer else {}), **chat_format(ranks, special, template)}

def read_tokenizer(folder, vocab="", gpt2=False):
    """(ranks, settings) of the file vocab, or else of vocab.tiktoken, tokenizer.json or vocab.json in a model's folder.
    A GPT-2 without any of them has its own, which tiktoken downloads once. Settings None: our own vocabulary's."""
    path = Path(vocab or folder / "vocab.tiktoken")
    if vocab or path.is_file():
        ranks, first = load_tokenizer(path)._mergeable_ranks, path.read_text().partition("\n")[0]
        own = {"pattern": GPT2_PATTERN, "special": {END: 50256}, "end": 50256} if gpt2 and len(ranks) == 50256 else None
        return ranks, json.loads(first) if first.startswith("{") else own
    there = {path.name: path.read_text(encoding="utf-8") for path in map(folder.joinpath, FILES) if path.is_file()}
    template = json.loads(there.get("tokenizer_config.json", "{}")).get("chat_template") or ""
    template = there.get("chat_template.jinja", template if isinstance(template, str) else json.dumps(template))
    if "tokenizer.json" in there:
        return read_json(json.loads(there["tokenizer.json"]), folder / "tokenizer.json", template, gpt2)
    check(gpt2, f"{folder}: no tokenizer.json is there (--vocab names a file in tiktoken's format)")
    ids = json.loads(there.get("vocab.json", "{}"))
    if ids and "merges.txt" in there:
        pairs = [line for line in there["merges.txt"].splitlines() if line and not line.startswith("#version")]
        return read_json({"model": {"vocab": ids, "merges": pairs}, "pre_tokenizer": {"type": "ByteLevel"},
                          "added_tokens": [{"content": END, "id": ids.get(END, len(ids))}]}, folder / "vocab.json")
    try:
        ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    except OSError as error:
        raise UserError(f"GPT-2's vocabulary cannot be downloaded ({type(error).__name__}): put its tokenizer.json in "
                        f"{folder}, or set TIKTOKEN_CACHE_DIR to a folder in which tiktoken.get_encoding('gpt2') has "
                        "run with a network") from None
    letters = {token.decode(): rank for token, rank in ranks.items() if token.isalpha()}  # the same in both
    check(not ids or letters.items() <= ids.items(), f"{folder}: its vocab.json is not GPT-2's (or add merges.txt)")
    return ranks, {"pattern": GPT2_PATTERN, "special": {END: len(ranks)}, "end": len(ranks)}
