"""Text in, tensors out: tokenizer, chat formats, truncation, padding and masks, batches, pair accuracy, JSON lines.

Layout of a batch, the same in every script (B rows, P prompt tokens, R response tokens, T = P + R):

    tokens  . . b p p p | r r r r e .      (B, T)  prompts padded on the left, responses on the right
    pad     2                              (B,)    how many tokens of padding stand on the left
    mask                  1 1 1 1 1 0      (B, R)  1.0 on response tokens up to and including EOS

Every prompt begins with a token (b), every response ends with EOS (e); in our own vocabulary both are <|endoftext|>.
Masks and positions come from lengths, never from comparing ids: padding is EOS, too.
"""
import base64
import gzip
import json
import math
import re
import unicodedata
from pathlib import Path

import tiktoken
import torch

from common import UserError, check, generator, write_atomic

END = "<|endoftext|>"
# A word with the space before it, a number, a run of punctuation, or white space: GPT-2's idea, in fewer cases.
# Merges never cross these borders, so a text that is split before a space keeps the tokens it has in the whole.
PATTERN = r"""'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# How a dialogue is written as one text, as in Anthropic's HH: a prompt is turns that end with REPLY.
TURN, REPLY = "\n\nHuman:", "\n\nAssistant:"
BEFORE = {"system": "", "user": f"{TURN} ", "assistant": f"{REPLY} "}
# How chat models write a turn: special tokens, and texts between them. A response follows where the content would.
FORMATS = {"chatml": ("<|im_start|>", "{role}\n{content}", "<|im_end|>", "\n"),
           "llama3": ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{content}", "<|eot_id|>")}

class Tokenizer(tiktoken.Encoding):
    """Byte-pair encoding by tiktoken, and begin, end: the ids before a plain text and behind every response; chat: how
    dialogues are written (load_tokenizer), None: as one text. Use encode_ordinary: no text becomes a special token."""
    def __init__(self, ranks, settings, chat):
        super().__init__("plainrlhf", pat_str=settings["pattern"], mergeable_ranks=ranks,
                         special_tokens=settings["special"])
        self.settings, self.chat = settings, settings.get("chat") if chat or settings.get("dialogues") else None
        self.begin, self.end = settings.get("begin", settings["end"]), (self.chat or settings)["end"]
        self.lacking = {byte for byte in range(256) if bytes([byte]) not in ranks}

    def encode_ordinary(self, text):
        """ids of a text, without begin and end. Characters that the vocabulary cannot write are left out."""
        text = unicodedata.normalize("NFC", text) if self.settings.get("nfc") else text
        if self.lacking:
            text = "".join(c for c in text if self.lacking.isdisjoint(c.encode("utf-8", "replace")))
        return super().encode_ordinary(text)

def load_tokenizer(where, chat=False):
    """The Tokenizer in vocab.tiktoken, a file or in a folder: "base64 rank" of each token, as tiktoken writes them. A
    first line of JSON says what differs from ours: "pattern", "special" {text: id}, "begin", "end", "nfc", "chat":
    {"format", "end", "begin", "system" message if none is given, "preamble" of all of them, "think": ids before a
    response}, and "dialogues": true if prompts are dialogues, written in that format, as with chat=True."""
    path = Path(where) / "vocab.tiktoken" if Path(where).is_dir() else Path(where)
    check(path.is_file(), f"{path}: no tokenizer here (python -m prepare.reviews makes data/reviews/vocab.tiktoken)")
    check(re.match(r"({.*}|\S+ \d+)\n", text := path.read_text()), f"{path}: not a vocabulary in tiktoken's format")
    first, *lines = filter(str.strip, text.splitlines())
    first, lines = (json.loads(first), lines) if first.startswith("{") else ({}, [first, *lines])
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    settings = {"pattern": PATTERN, "special": {END: len(ranks)}, "end": len(ranks), **first}
    ids = sorted([*ranks.values(), *settings["special"].values()])
    check(ids == list(range(len(ids))), f"{path}: damaged, not a complete vocabulary")
    return Tokenizer(ranks, settings, chat)

def check_same_vocab(*folders):
    """UserError unless these checkpoint folders have the same vocabulary: the ids of one model go into the others."""
    check(len({(Path(folder) / "vocab.tiktoken").read_bytes() for folder in folders}) == 1,
          f"{' and '.join(map(str, folders))} do not share a vocabulary")

def turns_of(prompt):
    """Messages {"role", "content"} from a list of them, a transcript as in HH, or a plain text (one user turn). The
    last is the assistant's, usually empty: the response continues it."""
    if isinstance(prompt, list):
        return prompt if prompt[-1]["role"] == "assistant" else [*prompt, {"role": "assistant", "content": ""}]
    system, *parts = re.split(f"((?:^|\n\n){TURN.strip()}|{REPLY})", prompt)
    if not parts:
        return turns_of([{"role": "user", "content": prompt}])
    turns = [{"role": "assistant" if mark == REPLY else "user", "content": text.strip()}
             for mark, text in zip(parts[::2], parts[1::2])]
    return turns_of([{"role": "system", "content": system.strip()}] * bool(system.strip()) + turns)

def chat_ids(enc, turns):
    """ids of a dialogue (turns_of) in the model's chat format, up to where the response follows."""
    chat, ids = enc.chat, [enc.chat["begin"]] if "begin" in enc.chat else []
    if chat["format"] == "llama3":
        turns = [{**turn, "content": turn["content"].strip()} for turn in turns]
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": chat.get("system", "")}, *turns]
    first = {"role": "system", "content": chat.get("preamble", "") + turns[0]["content"]}
    for turn in [first] * bool(first["content"]) + turns[1:]:
        for part in FORMATS[chat["format"]]:
            special = enc.settings["special"].get(part)
            ids += enc.encode_ordinary(part.format(**turn)) if special is None else [special]
            if turn is turns[-1] and "{content}" in part:
                return ids + chat.get("think", [])

def encode_prompt(enc, prompt, limit, counts=None):
    """ids of a prompt, limit at most. A longer one loses its beginning: a dialogue its oldest turns, then the last turn
    its text's. In a chat format the system message stays (a long one: in part). counts: of prompts, truncated ones."""
    begin = [] if enc.chat else [enc.begin]
    if enc.chat:
        turns = turns_of(prompt)
        system = turns[:turns[0]["role"] == "system"]  # stays
        suffixes = [turns] + [system + turns[i:] for i, turn in enumerate(turns) if i and turn["role"] == "user"]
        encoded = (chat_ids(enc, suffix) for suffix in suffixes)
    else:
        if isinstance(prompt, list):
            prompt = "".join(BEFORE[turn["role"]] + turn["content"] for turn in turns_of(prompt)).rstrip(" ")
        starts = [0] + [turn.start() for turn in re.finditer(TURN, prompt)]
        encoded = (begin + enc.encode_ordinary(prompt[start:]) for start in starts)
    for number, ids in enumerate(encoded):  # the first that is short enough, or else the last
        if len(ids) <= limit:
            break
    if counts is not None:
        counts.update({"prompts": 1, "prompts truncated": number > 0 or len(ids) > limit})
    if enc.chat and len(ids) > limit:  # then the user's text alone loses its beginning
        empty = chat_ids(enc, [{**x, "content": x["content"] * (x["role"] != "user")} for x in suffixes[-1]])
        same = next((i for i, (a, b) in enumerate(zip(ids, empty)) if a != b), 0)
        begin = ids[:same] if len(empty) <= limit // 2 else []
    return begin + ids[max(len(begin), len(ids) - limit + len(begin)):]

def encode_texts(enc, prompt, responses, block_size, counts):
    """ids of a prompt, and of each response with EOS. All that training truncates: the prompt keeps what the longest
    response leaves, half of the block at least; a response too long for the rest loses its end, EOS included."""
    encoded = [enc.encode_ordinary(text.strip() if enc.chat else text) + [enc.end] for text in responses]
    prompt_ids = encode_prompt(enc, prompt, max(block_size - max(map(len, encoded)), block_size // 2), counts)
    room = block_size - len(prompt_ids)
    counts.update({"responses": len(encoded), "responses truncated": sum(len(ids) > room for ids in encoded)})
    return prompt_ids, [ids[:room] for ids in encoded]

def report_truncated(counts, log=None):
    """Print what has been truncated, and note it in the log."""
    cut = {what: counts[f"{what} truncated"] for what in ("prompts", "responses")}
    for what in filter(cut.get, cut):
        print(f"{cut[what]:,} of {counts[what]:,} {what} are truncated"
              + ": they have no EOS, and the model will not learn to stop" * (what == "responses"))
    if log and any(cut.values()):
        log.append({"truncated": {**cut, "of": counts["responses"]}})

def prompt_limit(block_size, response_tokens):
    """How many ids a prompt may have before a response of this length is sampled."""
    check(block_size > response_tokens + 1, f"--response-tokens {response_tokens}: no room in block size {block_size}")
    return block_size - response_tokens

def pad_prompts(prompts, pad_id):
    """Left-pad lists of ids: tokens (B, P), pad (B,)."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts])
    return tokens, torch.tensor([longest - len(ids) for ids in prompts])

def pad_responses(responses, pad_id):
    """Right-pad lists of ids: tokens (B, R), mask (B, R) with 1.0 on the real ones."""
    longest = max(map(len, responses))
    tokens = torch.tensor([list(ids) + [pad_id] * (longest - len(ids)) for ids in responses])
    return tokens, length_mask(torch.tensor([len(ids) for ids in responses]), longest)

def length_mask(lengths, size):  # (B,): (B, size) with 1.0 in the first lengths[b] places of row b
    return (torch.arange(size, device=lengths.device) < lengths[:, None]).float()

def batches(lengths, size, *seed):
    """Shuffled batches of row numbers, a function of the seed numbers. lengths: one number per row; rows are sorted by
    it within pools of 16 batches, so that little of a batch is padding. The last batch may be smaller."""
    random = generator(*seed)
    order = torch.randperm(len(lengths), generator=random).tolist()
    pools = [sorted(order[i:i + 16 * size], key=lambda row: lengths[row]) for i in range(0, len(order), 16 * size)]
    made = [pool[i:i + size] for pool in pools for i in range(0, len(pool), size)]
    return [made[i] for i in torch.randperm(len(made), generator=random).tolist()]

def split_by_prompt(rows, test_share, seed):
    """Two lists of rankings, to train on and held out: a prompt is in one of them only (if there are several)."""
    keys = [row["prompt"] for row in rows]
    if len(set(keys)) == 1:
        print("all rankings share one prompt: the held-out ones have it, too")
        keys = list(range(len(rows)))
    names = sorted(set(keys))
    check(len(names) > 1, "--train: one ranking only: nothing can be held out (--test names a file that is)")
    order = torch.randperm(len(names), generator=generator(seed)).tolist()
    held = {names[i] for i in order[:max(1, round(test_share * len(names)))]}
    return [[row for key, row in zip(keys, rows) if (key in held) == chosen] for chosen in (False, True)]

def pair_accuracy(margins, ends):
    """{"accuracy", "interval", "pairs"} of margins (N,): the share above 0, a tie counted half. ends (N, 2): numbers of
    the two texts of each pair. A text is in several pairs, so these are not independent: the 95 % interval is from the
    jackknife that leaves out one text at a time with all its pairs, a little too wide."""
    hits = 0.5 + 0.5 * torch.sign(margins).double()  # (N,)
    _, ends, pairs = ends.unique(return_inverse=True, return_counts=True)  # pairs (S,) that each of S texts is in
    hits_of = torch.zeros(len(pairs)).double().index_add_(0, ends.flatten(), hits.repeat_interleave(2))  # (S,)
    accuracy, S = hits.mean().item(), len(pairs)
    without = (hits.sum() - hits_of) / (len(hits) - pairs).clamp(min=1)  # (S,)
    spread = 1.96 * math.sqrt((S - 1) / S * (without - without.mean()).square().sum().item())
    return {"accuracy": round(accuracy, 4), "pairs": len(margins),
            "interval": [round(max(0.0, accuracy - spread), 4), round(min(1.0, accuracy + spread), 4)]}

def ranking_accuracy(rankings, scores):
    """pair_accuracy of all pairs of some rankings (lists of texts in ids, best first); scores: (K,) of each ranking."""
    texts = [tuple(text) for ranking in rankings for text in ranking]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a duplicate is the same text
    names = torch.tensor([number[text] for text in texts]).split([len(ranking) for ranking in rankings])
    better, worse = torch.cat([torch.combinations(part) for part in scores]).T
    return pair_accuracy(better - worse, torch.cat([torch.combinations(part) for part in names]))

def write_jsonl(path, rows):
    """Write one JSON object per line, UTF-8, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

def read_rows(path, accept, expected="an object"):
    """[accept(row) for each JSON object of a JSONL file, .gz or not]; accept raises ValueError("field: problem") for a
    bad one, which becomes UserError "file:line: field: problem"."""
    check(Path(path).is_file(), f"{path}: no such file")
    rows, number = [], 0
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rb") as file:
            for number, line in ((number, line) for number, line in enumerate(file, start=1) if line.strip()):
                if not isinstance(row := json.loads(line.decode("utf-8-sig")), dict):
                    raise ValueError(f"expected {expected}, found {type(row).__name__}")
                rows.append(accept(row))
    except (ValueError, RecursionError, EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise UserError(f"{path}:{number}: {'not JSON: ' * isinstance(error, json.JSONDecodeError)}{error}") from None
    check(rows, f"{path}: empty (expected on every line: {expected})")
    return rows

def read_jsonl(path, *layouts):
    """Rows of a JSONL file, each with these fields: {"prompt": str, "responses": list, ...}; a list is one of two or
    more different texts. Of several layouts the first row decides, the others must be like it."""
    left = list(layouts)

    def accept(row):
        left[:] = [fields for fields in left if fields.keys() & row.keys() - {"prompt"}][:1] or left
        for name, kind in left[0].items():
            if not isinstance(value := row.get(name), kind):
                found = type(value).__name__ if name in row else f"no such field among {list(row)}"
                raise ValueError(f"{name}: expected {kind.__name__}, found {found}")
            for text in value if kind is list else [value]:
                check_text(text, name)
            if kind is list and len(set(value)) < max(2, len(value)):
                raise ValueError(f"{name}: a ranking needs two or more responses, all different")
        if "chosen" in left[0] and row["chosen"] == row["rejected"]:
            raise ValueError("chosen: the same as rejected")
        return row
    return read_rows(path, accept, f"an object with {' or '.join(map(', '.join, layouts))}")

def check_text(text, name):
    """ValueError unless this is a text that a model can be trained on; only a prompt may be empty."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, found {type(text).__name__}")
    if not text.strip() and name != "prompt":
        raise ValueError(f"{name}: empty")
    if re.search("[\ud800-\udfff\0]", text):
        raise ValueError(f"{name}: holds a NUL or half a surrogate pair")

def read_rankings(files):
    """Rows {"prompt", "responses": best to worst} of rankings or pairs ("chosen", "rejected"); several files: a,b."""
    layouts = {"prompt": str, "responses": list}, {"prompt": str, "chosen": str, "rejected": str}
    paths = [files] if Path(files).exists() else str(files).split(",")  # as common.Stage has it
    rows = [row for path in paths for row in read_jsonl(path, *layouts)]
    return [row if "responses" in row else {**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]
