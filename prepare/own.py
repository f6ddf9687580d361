"""Files of your own: checked line by line, converted into the fields that the other scripts read, and described.

    python -m prepare.own demos.jsonl pairs.jsonl              writes data/own/demos.jsonl and data/own/pairs.jsonl
    python -m prepare.own pairs.jsonl --test-share 0.1         writes data/own/pairs_train.jsonl and pairs_test.jsonl

A file has one JSON object per line, in UTF-8, all of one kind; the fields tell which:

    corpus           {"text"}
    demonstrations   {"prompt", "completion"}, or {"messages"}
    pairs            {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"}: an empty prompt
    rankings         {"prompt", "responses"}, best to worst
    prompts          {"prompt"}

They are texts or, but for rankings, lists of messages {"role", "content"} as in TRL, of which the last is the response;
chosen and rejected alone may be dialogues as in Anthropic's HH. Messages become one text as in HH: "\\n\\nHuman: ...",
"\\n\\nAssistant: ...", a system message as it is before them. A prompt that its responses repeat is taken off
them. Other fields are left out and counted, except "id" and "domain"; where content would be lost, that is an error.
Nothing is written unless every file is good.
"""
import hashlib
import itertools
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low

from common import check, open_folder, progress, run, visible, write_json
from data import BEFORE, REPLY, TURN, check_text, encode_texts, load_tokenizer, read_rows, write_jsonl

@dataclass
class Config:
    files: tuple = ()         # the files
    out: str = "data/own"     # folder for the converted files
    vocab: str = "data/reviews/vocab.tiktoken"  # tokenizer that counts tokens: a file or a checkpoint folder
    block_size: int = 1024    # of the model that will be trained, to tell what is truncated
    turns: str = "last"       # responses of a dialogue {"messages"}: last, or all: a row for each assistant turn
    pairs: bool = False       # write rankings as all their pairs, for programs that know no rankings
    valid_share: float = 0.0  # hold out this share of the prompts in NAME_valid.jsonl, for sft.py --valid
    test_share: float = 0.0   # hold out this share of the prompts in NAME_test.jsonl; the same prompts of every file
    skip_bad: bool = False    # leave out bad rows, a tenth of a file at most, instead of refusing the file
    seed: int = 1             # chooses the prompts that are held out

LAYOUTS = {  # field that tells the layout, the first that a row has: kind, fields
    "chosen": ("pairs", ("prompt", "chosen", "rejected")), "responses": ("rankings", ("prompt", "responses")),
    "completion": ("demonstrations", ("prompt", "completion")), "messages": ("demonstrations", ("messages",)),
    "text": ("corpus", ("text",)), "prompt": ("prompts", ("prompt",))}
# Fields that hold content. Beside a layout that does not use them it would be lost, and the rest would mislead.
CONTENT = LAYOUTS.keys() | set(
    "question instruction query input output response answer answers completions rejected system history context "
    "conversations reasoning reasoning_content thinking tools tool_calls functions documents image images audio video "
    "parent_id label labels rank ranks ranking scores ties preference winner desirable summary target".split())
SPECIAL = re.compile(r"<\|\w+\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>")  # marks of turns and ends: here letters

def holds_content(name):
    """Whether a field's name promises content: one of CONTENT; or response_1, response_b; or better_response_id."""
    named = re.sub("_?[0-9ab]$", "", name) in CONTENT
    return named or name in CONTENT or name.startswith(("better_", "winner_", "prefer"))

def dialogue(name, *parts):
    """(prompt, response) of lists of messages, one after the other. ValueError names the field and the message."""
    for part in parts:
        if not isinstance(part, list):
            raise ValueError(f"{name}: expected messages, found {type(part).__name__}")
    messages = [message for part in parts for message in part]
    for number, message in enumerate(messages, start=1):
        where = f"{name}: message {number}"
        if not isinstance(message, dict) or str(message.get("role")) not in BEFORE:
            raise ValueError(f"{where}: role: expected system, user or assistant")
        for field, value in message.items():
            harmless = field in ("role", "content", "name", "id") or value in (None, "", [], {})
            if not harmless and (field, value) != ("weight", 1):
                raise ValueError(f"{where}: {field}: not used, so it would be lost (remove it)")
        if message["role"] != "system" or message.get("content") != "":  # some files begin with an empty one everywhere
            check_text(message.get("content"), f"{where}: content")
            if re.search(f"{TURN}|{REPLY}", "\n\n" * (message["role"] == "system") + message["content"].strip()):
                raise ValueError(f"{where}: content: holds Human: or Assistant:, which begin a turn here")
    roles = [message["role"] for message in messages]
    if roles[-2:] != ["user", "assistant"] or "system" in roles[1:]:
        raise ValueError(f"{name}: the last two messages have to be the user's and the assistant's")
    *texts, response = [message["content"].strip() for message in messages]
    return "".join(BEFORE[role] + text for role, text in zip(roles, texts)) + REPLY, f" {response}"

def split_transcript(text):
    """(prompt, response) of a dialogue as one text, split after the last REPLY; ValueError if another turn is last."""
    prompt, reply, response = text.rpartition(REPLY)
    if not reply or TURN in response:
        raise ValueError("ends with Human" if reply else "no Assistant turn")
    return prompt + reply, response

def transcript(text):
    """A text with plain line ends; a dialogue that begins with "Human:" as HH has it."""
    text = text.replace("\r\n", "\n")
    return f"\n\n{text.lstrip()}" if text.lstrip().startswith(TURN.strip()) and REPLY in text else text

def pair(row):
    """(prompt, chosen, rejected) of a pair of texts, messages or transcripts."""
    given, *both = row.get("prompt", ""), row["chosen"], row["rejected"]
    if any(isinstance(value, list) for value in (given, *both)):
        before = given if isinstance(given, list) else []
        (prompt, chosen), (other, rejected) = (dialogue(name, before, row[name]) for name in ("chosen", "rejected"))
    elif given or not any(mark in str(text) for mark in (TURN, REPLY) for text in both):
        return given, *both
    else:
        (prompt, chosen), (other, rejected) = map(split_transcript, map(str, both))
    if prompt != other or isinstance(given, str) and given.strip() not in prompt:
        raise ValueError("prompt: not what chosen and rejected begin with")
    return prompt, chosen, rejected

def convert(row, counts):
    """(kind, row with the fields of that kind); ValueError("field: problem"). Counts the fields that are left out."""
    row = {name: transcript(value) if isinstance(value, str) else value for name, value in row.items()}
    telling = next((name for name in LAYOUTS if name in row), None)
    if telling is None:
        raise ValueError(f"no known layout (found: {', '.join(row) or 'nothing'})")
    kind, fields = LAYOUTS[telling]
    for name in fields:
        if name not in row and (kind, name) != ("pairs", "prompt"):
            raise ValueError(f"{name}: missing (found: {', '.join(row)})")
    new = {name: row.get(name) for name in fields}
    if kind == "pairs":
        new = dict(zip(fields, pair(row)))
    elif telling == "messages" or kind == "demonstrations" and any(isinstance(value, list) for value in new.values()):
        new = dict(zip(("prompt", "completion"), dialogue(fields[-1], *new.values())))
    elif kind == "prompts" and isinstance(row["prompt"], list):  # a dialogue whose response is yet to come
        new["prompt"], _ = dialogue("prompt", row["prompt"], [{"role": "assistant", "content": "..."}])
    prompt, after = new.get("prompt"), [name for name in fields if name in new and name != "prompt"]
    texts = [text for name in after for text in (new[name] if isinstance(new[name], list) else [new[name]])]
    if prompt and texts and all(isinstance(text, str) and text.startswith(prompt) for text in texts):
        cut = iter([text.removeprefix(prompt) for text in texts])
        new |= {name: list(cut) if name == "responses" else next(cut) for name in after}
        counts["prompts are taken off their responses, which repeated them"] += 1
    for name, value in new.items():
        for text in value if name == "responses" and isinstance(value, list) else [value]:
            check_text(text, name)
    if kind == "rankings" and (isinstance(ranked := new["responses"], str) or len(set(ranked)) < max(2, len(ranked))):
        raise ValueError("responses: expected a list of two or more, all different")
    if kind == "pairs" and new["chosen"].strip() == new["rejected"].strip():
        raise ValueError("chosen: the same as rejected")
    if TURN in new.get("prompt", "") and not new["prompt"].rstrip().endswith(REPLY.strip()):
        raise ValueError("prompt: a dialogue that does not end with Assistant: (the response could not follow)")
    messages = [message for value in map(row.get, fields) if isinstance(value, list) for message in value
                if isinstance(message, dict)]
    used = [str(value).strip() for value in (*map(row.get, fields), *new.values(), "".join(map(str, new.values())),
                                             *(message["content"] for message in messages))]
    kept = {name: row[name] for name in ("id", "domain") if isinstance(row.get(name), (int, str))}
    for name in row.keys() - {*fields, *kept}:
        repeats = str(row[name]).strip() in used
        tells = holds_content(name) or kind == "rankings" and isinstance(row[name], list)  # a list may tell an order
        if (tells and row[name] not in ("", [], {}) or (name, row[name]) == ("weight", 0)) and not repeats:
            raise ValueError(f"{name}: not used beside {', '.join(fields)}, so it would be lost (remove it)")
        counts[f"field {ascii(name)[:60]} left out{' (it repeats another)' * repeats}"] += 1
    counts.update(f"field {ascii(name)[:60]} of messages left out" for message in messages
                  for name in message.keys() - {"role", "content"})
    return kind, {**new, **kept}

def dialogues(row, turns):
    """The row, or, with turns "all", one for each assistant turn of its messages, which end there."""
    messages = row.get("messages")
    if turns == "last" or not isinstance(messages, list):
        return [row]
    ends = [i for i, message in enumerate(messages) if isinstance(message, dict) and message.get("role") == "assistant"]
    return [{**row, "messages": messages[:end + 1]} for end in ends] or [row]

def read_own(path, counts, cfg):
    """(kind, converted rows) of a file; UserError that names the bad lines. Counts what is left out."""
    bad = Counter()

    def accept(row):
        try:  # None: tables have a column for each field of any row
            row = {name: value for name, value in row.items() if value is not None}
            return [convert(part, counts) for part in dialogues(row, cfg.turns)]
        except ValueError as error:
            if not cfg.skip_bad:
                raise ValueError(f"{error} (--skip-bad leaves it out)") from None
            bad[f"rows left out: {error}"] += 1
            return [None]
    check(cfg.turns in ("last", "all"), f"--turns is {cfg.turns!r}: write last or all")
    rows = [row for parts in read_rows(path, accept) for row in parts]
    check(10 * bad.total() <= len(rows), f"{path}: more than a tenth of the rows are bad: {'; '.join(list(bad)[:3])}")
    counts.update(bad)
    kinds = sorted({row[0] for row in rows if row})
    check(len(kinds) == 1, f"{path}: {' and '.join(kinds)} (a file has to be of one kind)")
    return kinds[0], [row[1] for row in rows if row]

def describe(rows, enc, block_size, counts, name):
    """Count what is worth a look. What is truncated is what training truncates; a corpus is packed, never truncated."""
    lengths, seen = {"prompt": [], "response": []}, set()
    for row in progress(rows, name):
        prompt = row.get("prompt", "")
        texts = row.get("responses") or [row[key] for key in ("completion", "chosen", "rejected", "text") if key in row]
        counts["rows are duplicates of an earlier one (kept)"] += (prompt, *texts) in seen
        seen.add((prompt, *texts))
        counts["texts hold a special token's name (no special token here)"] += sum(
            bool(SPECIAL.search(text)) for text in (prompt, *texts))
        lengths["response"] += [len(enc.encode_ordinary(text)) for text in texts]
        if "prompt" in row:
            lengths["prompt"].append(len(enc.encode_ordinary(prompt)))
            counts["prompts end in a space (does it belong to the response?)"] += prompt.endswith(" ")
            counts["responses begin with a word right after the prompt (does a space belong before it?)"] += sum(
                prompt[-1:].strip() != "" and text[0].isalnum() for text in texts)
            if texts:
                encode_texts(enc, prompt, texts, block_size, counts)
    for field, values in lengths.items():
        counts[f"tokens in the median {field}"] = median_low(values or [0])
        counts[f"tokens in the longest {field}"] = max(values, default=0)

def key_of(row):
    """What is in one part only: a dialogue's first message, as the same dialogue may come with more turns; else the
    prompt, or the text of a corpus; in lower case, with single spaces."""
    text = row.get("prompt", row.get("text")).split(TURN)[:2][-1]  # what is before the first TURN is nobody's message
    return " ".join(text.split(REPLY)[0].lower().split())

def split(rows, cfg, counts):
    """{"_train", "_test", "_valid": rows}, or {"": rows} if nothing is held out: a function of seed and prompt, so that
    all files agree about a prompt. Rows that all have the same prompt are held out each by itself."""
    shares = {"_test": cfg.test_share, "_valid": cfg.valid_share}
    if not any(shares.values()):
        return {"": rows}
    alike, parts = len(set(map(key_of, rows))) == 1, {"_train": [], "_test": [], "_valid": []}
    counts["rows have the same prompt, so rows are held out, not prompts"] = len(rows) * alike
    for row in rows:
        key = f"{cfg.seed} {row if alike else key_of(row)}"
        place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64  # in [0, 1)
        held_out = "_test" if place < cfg.test_share else "_valid" if place < sum(shares.values()) else "_train"
        parts[held_out].append(row)
    return {part: kept for part, kept in parts.items() if shares.get(part, 1)}

def main(cfg):
    """Convert cfg.files into cfg.out; returns what summary.json says of the files, written last."""
    paths, out = list(map(Path, cfg.files)), Path(cfg.out)
    check(paths, "name your files: python -m prepare.own demos.jsonl pairs.jsonl")
    enc, files, content = load_tokenizer(cfg.vocab), {}, {}
    for path in paths:
        kind, rows = read_own(path, counts := Counter(), cfg)
        if cfg.pairs and kind == "rankings":
            kind, rows = "pairs", [{**{key: row[key] for key in row if key != "responses"}, "chosen": a, "rejected": b}
                                   for row in rows for a, b in itertools.combinations(row["responses"], 2)]
        stem = Path(path.name.removesuffix(".gz")).stem
        parts = {out / f"{stem}{part}.jsonl": kept for part, kept in split(rows, cfg, counts).items()}
        for target, kept in parts.items():
            check(kept, f"{path}: no rows for {target} (other shares, or another --seed)")
            check(target not in content, f"{path}: another file is written to {target}, too (rename one)")
            check(target.resolve() not in [path.resolve() for path in paths], f"{target} is an input (another --out)")
        content |= parts
        describe(rows, enc, cfg.block_size, counts, path.name)
        counts = {what: n for what, n in counts.items() if n}
        sizes = {str(target): len(kept) for target, kept in parts.items()}
        files[str(path)] = {"kind": kind, "rows": sizes, "counts": counts}
        print(visible(f"{path}: {len(rows):,} rows of {kind} (block size {cfg.block_size})"))
        for what, n in counts.items():
            print(visible(f"{n:>9,} {what}"))
    open_folder(out)
    for target, rows in content.items():
        write_jsonl(target, rows)
    write_json(out / "summary.json", {"config": asdict(cfg), "files": files})
    return files

if __name__ == "__main__":
    run(main, Config, words=("files",))
