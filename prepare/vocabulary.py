"""Tokenizers in Hugging Face's format: what of them tiktoken computes to the id is read, the rest is refused by name.

All of these are byte-pair encodings of bytes. tiktoken merges the pair whose result has the least id, so merges must be
in the order of their ids; what splits text before is one regular expression here.
"""
import json
import re
from pathlib import Path

import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common import UserError, check, say
from data import END, FORMATS, Tokenizer, load_tokenizer

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same when digits have been split off one by one before: white space before a digit is then at an end.
DIGITS_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
# GPT-2's letter for each byte: printable ones stand for themselves, the others for letters from 256 on.
OTHERS = [byte for byte in range(256) if chr(byte) == " " or not chr(byte).isprintable()]
LETTERS = {byte: chr(byte) for byte in range(256)} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
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

def chat_format(ranks, settings, template, named):
    """{"chat": how dialogues are written (data.load_tokenizer)}, from the special tokens, and from what the template
    makes of a short dialogue; {} if they mark no turns, or if it writes them in no format of ours. named: the special
    tokens that a template may name."""
    special = settings["special"]
    kind = next((kind for kind, parts in FORMATS.items() if {x for x in parts if "|" in x} <= special.keys()), None)
    if kind is None:
        return {}
    before, after = "".join(FORMATS[kind]).split("{content}")
    chat = {"format": kind, "end": special[after.strip()]}
    if not template:
        begins = kind == "llama3" and "<|begin_of_text|>" in special
        return {"chat": {**chat, **({"begin": special["<|begin_of_text|>"]} if begins else {})}}
    dialogue = [("user", "A"), ("assistant", "B"), ("user", "C")]
    turns = "".join(before.format(role=role) + text + after for role, text in dialogue)
    head, tail, turns = map(re.escape, (before.format(role="system"), after, turns + before.format(role="assistant")))
    form, found = re.compile(f"(.*?)(?:{head}(.*?){tail})?{turns}(.*)", re.DOTALL), []
    try:
        template = re.sub(r"{%-?\s*(end)?generation\s*-?%}", "", template)  # TRL's, around what is to be learned
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        for first in ([], [("system", "S")]):
            messages = [{"role": role, "content": text} for role, text in first + dialogue]
            text = environment.from_string(template).render(
                messages=messages, add_generation_prompt=True, enable_thinking=False, tools=None, documents=None,
                strftime_now=lambda _: "26 Jul 2024", **named)  # Llama 3.1's own date
            found.append(form.fullmatch(text))
        (begin, default, think), (_, given, _) = (match.groups(default="") for match in found)
    except Exception:  # a template is a program, which can fail in any way
        return {}
    preamble = given[:-1]
    if not (given == f"{preamble}S" and default.startswith(preamble) and begin in ("", *special)) or (
            "bos_token" in template and "bos_token" not in named):
        return {}
    facts = {"begin": special.get(begin), "system": default.removeprefix(preamble), "preamble": preamble,
             "think": Tokenizer(ranks, settings, False).encode(think, allowed_special="all")}
    return {"chat": {**chat, **{name: fact for name, fact in facts.items() if fact not in ("", [], None)}}}

def read_json(content, name, template="", named={}, gpt2=False):
    """(ranks, settings) for save_ranks from the content of a tokenizer.json. UserError names what tiktoken would do
    otherwise. template, named: as in chat_format. gpt2: special tokens behind the one that ends a text are dropped, as
    with GPT-2's rows of padding."""
    model, normalizer, byte_of = content["model"], content.get("normalizer"), {x: b for b, x in LETTERS.items()}
    check(normalizer in (None, {"type": "NFC"}), f"{name}: normalizer {json.dumps(normalizer)[:200]} is not supported")
    pattern = split_pattern(content.get("pre_tokenizer"), name)
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        check(not model.get(setting), f"{name}: {setting} {model.get(setting)!r} is not supported")
    check(model.get("type", "BPE") == "BPE", f"{name}: a model of type {model.get('type')} is not supported")
    pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    written = {*LETTERS.values(), *map("".join, pairs)}  # "!" as a padding token is still what texts are written with
    special = {token["content"]: token["id"] for token in sorted(content["added_tokens"], key=lambda x: x["id"])
               if token["content"] not in written}
    if added := [token["content"] for token in content["added_tokens"] if not token.get("special", True)]:
        say(f"{name}: in a text {', '.join(added[:5])} is read as letters, not as the token that was added for it")
    words = sorted(model["vocab"].items() - special.items(), key=lambda item: item[1])
    strange = {letter for word, _ in words for letter in word} - byte_of.keys()
    check(not strange, f"{name}: its tokens are no bytes in GPT-2's letters, but have {sorted(strange)[:5]}")
    ranks = {bytes(byte_of[x] for x in word): rank for word, rank in words}
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
    ids = sorted([*ranks.values(), *special.values()])
    check(ids == list(range(len(ids))), f"{name}: its ids have gaps (an added token far behind the others?)")
    begin = begin_token(content.get("post_processor"))
    named = {**({"bos_token": begin} if begin else {}), **named}
    settings = {"pattern": pattern, "special": special, "end": end, **({"begin": special[begin]} if begin else {}),
                **({"nfc": True} if normalizer else {})}
    chat = chat_format(ranks, settings, template, named)
    if template and not chat and any(parts[0] in special for parts in FORMATS.values()):
        say(f"{name}: its chat template writes turns in no format that is known here (no --chat)")
    return ranks, {**settings, **chat}

def read_tokenizer(folder, vocab="", gpt2=False):
    """(ranks, settings) of the file vocab, or else of vocab.tiktoken, tokenizer.json or vocab.json in a model's folder.
    A GPT-2 without any of them has its own, which tiktoken downloads once. Settings None: our own vocabulary's."""
    path = Path(vocab or folder / "vocab.tiktoken")
    if vocab or path.is_file():
        ranks, first = load_tokenizer(path)._mergeable_ranks, path.read_text().partition("\n")[0]
        own = {"pattern": GPT2_PATTERN, "special": {END: 50256}, "end": 50256} if gpt2 and len(ranks) == 50256 else None
        check(first.startswith("{") or len(ranks) not in (128000, 151643), f"{path}: Llama 3's or Qwen's tokens, but "
              "neither how they split a text nor their special tokens are in it (tokenizer.json has them)")
        return ranks, json.loads(first) if first.startswith("{") else own
    there = {path.name: path.read_text(encoding="utf-8") for path in map(folder.joinpath, FILES) if path.is_file()}
    config = json.loads(there.get("tokenizer_config.json", "{}"))
    named = {name: token["content"] if isinstance(token, dict) else token for name, token in config.items()
             if name.endswith("_token") and token is not None}
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = {part["name"]: part["template"] for part in template}.get("default", "")
    template = there.get("chat_template.jinja", template)
    if "tokenizer.json" in there:
        return read_json(json.loads(there["tokenizer.json"]), folder / "tokenizer.json", template, named, gpt2)
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
