"""Files of your own: checked line by line, converted into the layouts that the other scripts read, and described.

    python data.py own demos.jsonl pairs.json              out: data/own/demos.jsonl, data/own/pairs.jsonl, summary.json
    python data.py own pairs.jsonl --test-share 0.1        out: data/own/pairs_train.jsonl, data/own/pairs_test.jsonl

A file is UTF-8 text, one JSON object per line or one JSON array of them, all of one kind: corpus, demonstrations,
pairs, rankings or prompts. Its fields tell what a row is; layouts.py lists what is known: our own, TRL's with texts or
with messages, Stanford Alpaca's, HH's transcripts, OpenAI's best of four. Fields of other names are left out and
counted, except "id" and "domain". Nothing is written unless every file is good. The files come before the flags.
"""
import hashlib
import itertools
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from checkpoint import write_json
from common import UserError, check, progress
from data import END, TURN, check_text, checked, encode_prompt, encode_response, load_tokenizer, read_rows, write_jsonl
from hh import first_message, percentiles, stem_of
from layouts import KINDS, from_best, recognise, sample_names
from runs import open_folder
from terminal import visible


@dataclass
class Config:
    files: str = ""                           # the files as one word, a comma between them (so no comma in a name)
    out: str = "data/own"                     # folder for the converted files
    vocab: str = "data/reviews/vocab.tiktoken"  # tokenizer that counts tokens: a file or a checkpoint folder
    block_size: int = 1024                    # of the model that will be trained, to tell what it cuts off
    pairs: bool = False                       # write rankings as all their pairs, for programs that know no rankings
    test_share: float = 0.0                   # hold out this share of the prompts; the same prompts in every file
    seed: int = 1                             # chooses the prompts that are held out


USE = {"corpus": "sft.py --train {} --test {} --out out/own/base",
       "demonstrations": "sft.py --model CHECKPOINT --train {} --test {} --out out/own/sft",
       "prompts": "ppo.py --sft CHECKPOINT --reward CHECKPOINT --prompts {} --out out/own/ppo",
       "pairs": "reward.py --model CHECKPOINT --train {} --pairs '' --sft CHECKPOINT --out out/own/reward",
       "rankings": "reward.py --model CHECKPOINT --train {} --pairs '' --sft CHECKPOINT --out out/own/reward"}
FACTS = {"duplicates": "rows like an earlier one (kept)",
         "repeated_prompts": "rows whose prompt occurred before (kept)",
         "no_room": "prompts that fill the block size by themselves",
         "cut_to_equal": "rows with two responses that are equal after the cut",
         "conflicts": "comparisons that occur in both orders",
         "glued": "responses whose first word runs into the prompt (does a space belong before it?)",
         "echoes": "responses that begin with the whole prompt (is it in there twice?)",
         "literal_end": f"rows with a literal {END} (ordinary text here)"}


# ---- one file ------------------------------------------------------------------------------------------------------


def read_own(path):
    """(kind, converted rows, {layout: rows read}, {what is left out: count}); UserError that names the bad lines."""
    layouts, left_out, kinds = Counter(), Counter(), []

    def accept(row):
        row = {name: value for name, value in row.items() if value is not None}  # tables have a column for each field
        layout = recognise(row)
        kinds.append(layout.kind)
        if layout.kind != kinds[0]:
            raise ValueError(f"{', '.join(layout.needed)}: {layout.kind} after {kinds[0]} (one kind in a file)")
        made = [checked({name: new[name] for name in KINDS[layout.kind]}, KINDS[layout.kind])
                for new in layout.convert(row)]
        kept = {name: row[name] for name in ("id", "domain") if type(row.get(name)) in (int, str) and row[name] != ""}
        for name, value in kept.items():
            check_text(str(value), name)
        if layout.convert is from_best:
            left_out["samples like another one"] += len(sample_names(row)) - 1 - len(made)
        left_out.update(f"fields {ascii(name)[:60]}" for name in row.keys() - layout.used(row) - kept.keys())
        layouts[", ".join(layout.needed)] += 1
        return [{**new, **kept} for new in made]
    rows = read_rows(path, accept, "an object with the fields of a known layout", array=True)
    return kinds[0], [new for made in rows for new in made], dict(layouts), dict(sorted((+left_out).items()))


def describe(rows, enc, block_size, name=""):
    """Facts about rows of one kind: {"tokens": percentiles and the share cut, by field, and a count for each of FACTS}.

    Tokens are those of the texts alone. The cuts are those of sft.py and reward.py; a corpus is packed, never cut.
    """
    lengths, cut, facts = {"prompt": [], "response": []}, Counter(), dict.fromkeys(FACTS, 0)
    seen, prompts, orders = set(), set(), set()
    for row in progress(rows, name):
        prompt = row.get("prompt", "")
        responses = row.get("responses") or [row[name] for name in ("completion", "chosen", "rejected", "text")
                                             if name in row]
        facts["duplicates"] += (prompt, *responses) in seen
        seen.add((prompt, *responses))
        facts["literal_end"] += any(END in text for text in (prompt, *responses))
        counts = [len(enc.encode_ordinary(text)) for text in responses]
        lengths["response"] += counts
        if "text" in row:
            continue
        facts["repeated_prompts"] += prompt in prompts and prompt != ""
        prompts.add(prompt)
        ids, size = encode_prompt(enc, prompt, block_size // 2), len(enc.encode_ordinary(prompt))
        lengths["prompt"].append(size)
        cut["prompt"] += size + 1 > block_size // 2  # both with their end of text
        cut["response"] += sum(count + 1 > block_size - len(ids) for count in counts)
        facts["no_room"] += size + 1 >= block_size
        ends = {tuple(encode_response(enc, text, block_size - len(ids))) for text in responses}
        facts["cut_to_equal"] += len(ends) < len(responses)
        orders.update((prompt, better, worse) for better, worse in itertools.combinations(responses, 2))
        if prompt.strip():
            facts["glued"] += sum(not prompt[-1].isspace() and text[0].isalnum() for text in responses)
            facts["echoes"] += sum(text.startswith(prompt) for text in responses)
    facts["conflicts"] = sum((prompt, worse, better) in orders for prompt, better, worse in orders) // 2
    tokens = {field: {**dict(zip(("5", "50", "95", "max"), percentiles(values))),
                      "cut": round(cut[field] / len(values), 4)} for field, values in lengths.items() if values}
    return {"tokens": {"text": tokens["response"]} if "text" in rows[0] else tokens, **facts}


def print_facts(path, facts, block_size):
    """What a file holds, and what to look at in it."""
    layouts = "; ".join(f"{count:,} of {layout}" for layout, count in facts["layouts"].items())
    print(f"\n{visible(str(path))}: {facts['kind']}, {facts['rows']:,} rows from {layouts}")
    print(f"  {'tokens':<10}{'5 %':>9}{'50 %':>9}{'95 %':>9}{'max':>9}{'cut':>9}   at block size {block_size}")
    for field, found in facts["tokens"].items():
        numbers = "".join(f"{found[key]:>9,}" for key in ("5", "50", "95", "max"))
        print(f"  {field:<10}{numbers}{found['cut']:>9.1%}")
    for key, meaning in FACTS.items():
        if facts[key]:
            print(f"  {facts[key]:>9,} {meaning}")
    for what, count in facts["left_out"].items():
        print(f"  {count:>9,} {what} left out")


# ---- all of it -----------------------------------------------------------------------------------------------------


def key_of(row):
    """What may not be both in the training and in the held-out part: a dialogue's first message, as the same dialogue
    may come with more turns; else the prompt, or the text of a corpus; in lower case, with single spaces."""
    prompt = row.get("prompt", row.get("text"))
    return first_message(prompt) if TURN in prompt else " ".join(prompt.lower().split())


def held_out(row, share, seed):
    """Whether a row is in the held-out part: a function of seed and prompt, so that all files agree about it."""
    digest = hashlib.sha256(f"{seed} {key_of(row)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def outputs(paths, out, parts):
    """{input: its output files}, one for each of parts ("" or "_train", "_test"); UserError if two files collide."""
    stems = {}
    for path in paths:
        other = stems.setdefault(stem_of(path).casefold(), path)
        what = "it is named twice" if other == path else f"{other} has the same name up to its suffix (rename one)"
        check(other is path, f"{path}: {what}")
    made = {path: [out / f"{stem_of(path)}{part}.jsonl" for part in parts] for path in paths}
    inputs = {path.resolve() for path in paths}
    for target in [*itertools.chain(*made.values()), out / "summary.json"]:
        check(target.resolve() not in inputs, f"{target}: an input file would be written over (give another --out)")
    return made


def main(cfg):
    """Convert cfg.files into cfg.out; returns the content of summary.json, written last."""
    paths, out = [Path(name) for name in cfg.files.split(",") if name], Path(cfg.out)
    check(paths, "name your files, such as: python data.py own demos.jsonl pairs.jsonl")
    check(cfg.block_size >= 4, f"--block-size is {cfg.block_size}: it must be 4 or more")
    check(0 <= cfg.test_share < 1, f"--test-share is {cfg.test_share}: it must be from 0 to below 1")
    targets = outputs(paths, out, ("_train", "_test") if cfg.test_share else ("",))
    try:
        enc = load_tokenizer(cfg.vocab)
    except UserError as error:
        raise UserError(f"--vocab: {error}") from None

    files, content, keys = {}, {}, {}
    for path in paths:
        kind, rows, layouts, left_out = read_own(path)
        if cfg.pairs and kind == "rankings":
            kind, rows = "pairs", [{**{name: x for name, x in row.items() if name != "responses"}, "chosen": better,
                                    "rejected": worse}
                                   for row in rows for better, worse in itertools.combinations(row["responses"], 2)]
        parts = [rows]
        if cfg.test_share:
            test = [held_out(row, cfg.test_share, cfg.seed) for row in rows]
            parts = [[row for row, held in zip(rows, test) if held == wanted] for wanted in (False, True)]
        keys[path] = {key for row in rows if (key := key_of(row))}  # an empty prompt tells nothing
        check(all(parts), f"{path}: --test-share {cfg.test_share} of its {len({key_of(row) for row in rows})} prompts "
                          "leaves a part empty (another share or --seed, or more prompts)")
        content.update(zip(targets[path], parts))
        files[path] = {"kind": kind, "rows": len(rows), "layouts": layouts, "left_out": left_out,
                       "written": {str(target): len(part) for target, part in zip(targets[path], parts)},
                       **describe(rows, enc, cfg.block_size, path.name)}
    common = {f"{a} {b}": (a, b, n) for a, b in itertools.combinations(paths, 2) if (n := len(keys[a] & keys[b]))}

    open_folder(out, "summary.json")
    for target, rows in content.items():
        write_jsonl(target, rows)
    for path, facts in files.items():
        print_facts(path, facts, cfg.block_size)
    for a, b, n in common.values():
        what = "texts" if files[a]["kind"] == "corpus" else "prompts"
        print(visible(f"\nwarning: {n:,} {what} of {a} are also in {b}"))
    print()
    for path, facts in files.items():
        written = [shlex.quote(str(target)) for target in targets[path]]
        train, test = written if cfg.test_share else (*written, "HELD_OUT")  # sft.py needs one: the reader's to name
        own_test = cfg.test_share and facts["kind"] in ("pairs", "rankings")  # else reward.py holds out a part itself
        print(visible("python " + USE[facts["kind"]].format(train, test) + (f" --test {test}" if own_test else "")))
    summary = {"block_size": cfg.block_size, "vocab": cfg.vocab, "test_share": cfg.test_share, "seed": cfg.seed,
               "files": {str(path): facts for path, facts in files.items()},
               "in_common": {name: n for name, (_, _, n) in common.items()}}
    write_json(out / "summary.json", summary)
    return summary
