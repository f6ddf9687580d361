"""Text in, tensors out: tokenizer, truncation, padding and masks, batches, pair accuracy, JSON lines.

Layout of a batch, the same in every script (B rows, P prompt tokens, R response tokens, T = P + R):

    tokens  . . e p p p | r r r r e .      (B, T)  prompts padded on the left, responses on the right
    pad     2                              (B,)    how many tokens of padding stand on the left
    mask                  1 1 1 1 1 0      (B, R)  1.0 on response tokens up to and including EOS

Every prompt begins with <|endoftext|> (e), which separates documents in the pretraining text: no prompt is empty. The
same id ends a response (EOS). Masks and positions come from lengths, never from comparing ids: padding is that id too.
"""
import base64
import gzip
import hashlib
import json
import math
import re
from pathlib import Path

import tiktoken
import torch

from common import UserError, check, generator, write_atomic

END = "<|endoftext|>"
# A word with the space before it, a number, a run of punctuation, or white space: GPT-2's idea, in fewer cases.
# Merges never cross these borders, so a text that is split before a space keeps the tokens it has in the whole.
PATTERN = r"""'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # with GPT-2's merges
GPT2_VOCAB = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # sha256 of their vocab.tiktoken
# How a dialogue is written as one text, as in Anthropic's HH: a prompt is turns that end with REPLY.
TURN, REPLY = "\n\nHuman:", "\n\nAssistant:"


def load_tokenizer(where):
    """tiktoken.Encoding from a folder with vocab.tiktoken (or that file itself), which holds GPT-2's merges or ours.
    Use encode_ordinary: a literal "<|endoftext|>" in a text is then ordinary text. The special id is enc.eot_token."""
    path = Path(where) / "vocab.tiktoken" if Path(where).is_dir() else Path(where)
    check(path.is_file(), f"{path}: no tokenizer here (python -m prepare.reviews makes data/reviews/vocab.tiktoken)")
    content = path.read_bytes()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, content.splitlines())}
    check(sorted(ranks.values()) == list(range(len(ranks))), f"{path}: damaged, not a complete vocabulary")
    pattern = GPT2_PATTERN if hashlib.sha256(content).hexdigest() == GPT2_VOCAB else PATTERN
    return tiktoken.Encoding("plainrlhf", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def check_same_vocab(first, *others):
    """UserError unless these checkpoint folders have the same vocabulary: the ids of one model go into the others."""
    for folder in others:
        check((Path(folder) / "vocab.tiktoken").read_bytes() == (Path(first) / "vocab.tiktoken").read_bytes(),
              f"{folder} and {first} do not share a vocabulary")


def save_ranks(ranks, path):
    """Write a vocabulary in tiktoken's own text format: base64 of the bytes, a space, the rank."""
    write_atomic(path, "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()))


# ---- truncation ----------------------------------------------------------------------------------------------------


def encode_prompt(enc, prompt, limit):
    """<|endoftext|>, then the prompt's tokens: limit ids at most, for which a longer prompt loses its beginning. A
    dialogue loses what precedes its first turn, then whole turns; if the last turn is too long, its own beginning."""
    ids = enc.encode_ordinary(prompt)
    for turn in re.finditer(TURN, prompt):
        if len(ids) < limit:
            break
        ids = enc.encode_ordinary(prompt[turn.start():])
    return [enc.eot_token] + ids[max(0, len(ids) - (limit - 1)):]


def encode_texts(enc, prompt, responses, block_size, counts):
    """ids of a prompt, and of each response with EOS. The one place that decides what training truncates: the prompt
    keeps what the longest response leaves, never less than half of the block; a response too long for the rest loses
    its end, EOS included. counts: a Counter of prompts and responses, and of how many are truncated."""
    encoded = [enc.encode_ordinary(response) + [enc.eot_token] for response in responses]
    prompt_ids = encode_prompt(enc, prompt, max(block_size - max(map(len, encoded)), block_size // 2))
    room = block_size - len(prompt_ids)
    counts.update({"prompts": 1, "prompts truncated": len(prompt_ids) <= len(enc.encode_ordinary(prompt)),
                   "responses": len(encoded), "responses truncated": sum(len(ids) > room for ids in encoded)})
    return prompt_ids, [ids[:room] for ids in encoded]


def encode_rankings(enc, rows, block_size, counts):
    """Each row's texts as ids of prompt, response and EOS: a list of lists, in the order of row["responses"]."""
    encoded = (encode_texts(enc, row["prompt"], row["responses"], block_size, counts) for row in rows)
    return [[prompt + response for response in responses] for prompt, responses in encoded]


def report_truncated(counts, log):
    """Print what encode_texts has truncated, and note it in the log."""
    for what, so in (("prompts", ""), ("responses", ": they have no EOS, and the model will not learn to stop")):
        if counts[f"{what} truncated"]:
            print(f"{counts[f'{what} truncated']:,} of {counts[what]:,} {what} are truncated{so}")
    if counts["prompts truncated"] or counts["responses truncated"]:
        log.append({"truncated": {"prompts": counts["prompts truncated"], "responses": counts["responses truncated"],
                                  "of": counts["responses"]}})


def prompt_limit(block_size, response_tokens):
    """How many ids a prompt may have before a response of this length is sampled."""
    check(block_size > response_tokens + 1, f"--response-tokens {response_tokens}: no room in block size {block_size}")
    return block_size - response_tokens


# ---- padding, masks, batches ---------------------------------------------------------------------------------------


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
    names, ends = ends.unique(return_inverse=True)
    of_text = torch.zeros(2, len(names), dtype=torch.double)  # hits and pairs that each text is in
    for side in (0, 1):
        of_text[0].index_add_(0, ends[:, side], hits)
        of_text[1].index_add_(0, ends[:, side], torch.ones_like(hits))
    accuracy, S = hits.mean().item(), len(names)
    without = (hits.sum() - of_text[0]) / (len(hits) - of_text[1]).clamp(min=1)  # (S,)
    spread = 1.96 * math.sqrt((S - 1) / S * (without - without.mean()).square().sum().item())
    interval = [round(max(0.0, accuracy - spread), 4), round(min(1.0, accuracy + spread), 4)]
    return {"accuracy": round(accuracy, 4), "pairs": len(margins), "interval": interval}


def ranking_accuracy(rankings, scores):
    """pair_accuracy of all pairs of some rankings (lists of texts in ids, best first); scores: (K,) of each ranking."""
    texts = [tuple(text) for ranking in rankings for text in ranking]
    number = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # a duplicate is the same text
    names = torch.tensor([number[text] for text in texts]).split([len(ranking) for ranking in rankings])
    better, worse = torch.cat([torch.combinations(part) for part in scores]).T
    return pair_accuracy(better - worse, torch.cat([torch.combinations(part) for part in names]))


# ---- files ---------------------------------------------------------------------------------------------------------


def write_jsonl(path, rows):
    """Write one JSON object per line, UTF-8, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path):
    """The content of a UTF-8 text file (without a byte-order mark), unpacked if its name ends in .gz."""
    check(Path(path).is_file(), f"{path}: no such file")
    try:
        with (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            return file.read()
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged, or not UTF-8 text: {error}") from None


def read_rows(path, accept, expected="an object"):
    """[accept(row) for each JSON object of a JSONL file]; accept raises ValueError("field: problem") for a bad one,
    which becomes UserError "file:line: field: problem": the first five, and how many more. Blank lines are skipped."""
    rows, bad = [], []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"expected {expected}, found {type(row).__name__}")
                rows.append(accept(row))
            except (ValueError, RecursionError) as error:
                bad.append(f"{path}:{number}: {'not JSON: ' * isinstance(error, json.JSONDecodeError)}{error}")
    check(not bad, "; ".join(bad[:5] + [f"and {len(bad) - 5} more bad lines"] * (len(bad) > 5)))
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
                raise ValueError(f"{name}: " + (f"expected {kind.__name__}, found {type(value).__name__}"
                                                if name in row else f"missing (found: {', '.join(row)})"))
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
    rows = [row for path in str(files).split(",") for row in read_jsonl(path, *layouts)]
    return [row if "responses" in row else {**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]
