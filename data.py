"""Text in, tensors out: the tokenizer, JSONL files, padding, and which tokens count.

    python data.py                      prepare the built-in human ratings under data/reviews (see reviews.py)
    python data.py hh                   Anthropic's helpful and harmless dialogues under data/hh (see hh.py)
    python data.py own FILE ...         check and convert files of your own (see own.py, which names the layouts)
    python data.py --help, hh --help, own --help    the flags of each

Layout of a batch, the same in every script (B rows, P prompt tokens, R response tokens, T = P + R):

    tokens  . . e p p p | r r r r e .      (B, T)  prompts padded on the left, responses on the right
    pad     2                              (B,)    how many tokens of padding stand on the left
    mask                  1 1 1 1 1 0      (B, R)  1.0 on response tokens up to and including end of text

Every prompt begins with end of text (e), which separates documents in the pretraining text, as in GPT-2: so no prompt
is empty, and the model knows that a text starts here. Masks and positions come from lengths, never from comparing ids:
padding uses the end-of-text id too, and a text may hold any id.
"""
import base64
import bisect
import gzip
import hashlib
import json
import math
import re
import sys
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import regex  # comes with tiktoken, which needs it
import tiktoken
import torch

from checkpoint import write_atomic
from common import UserError, generator, run

END = "<|endoftext|>"
# A word with the space before it, a number, a run of punctuation, or white space: GPT-2's idea, in fewer cases.
# Merges never cross these borders, so text cut before a space keeps the tokens that it has in the whole.
PATTERN = r"""'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""  # with GPT-2's merges
GPT2_VOCAB = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"  # sha256 of their vocab.tiktoken
# How a dialogue is written as one text, as in Anthropic's HH: a prompt is turns that end with REPLY.
TURN, REPLY = "\n\nHuman:", "\n\nAssistant:"


@dataclass
class Config:
    out: str = "data/reviews"  # folder for the prepared files
    archive: str = ""          # the source package vaderSentiment-3.3.2.tar.gz, if it is already on disk
    vocab_size: int = 4096     # size of the byte-pair vocabulary, the end-of-text token included
    seed: int = 1              # splits, cuts and groups depend on it


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def train_bpe(texts, vocab_size):
    """Byte-pair encoding (Sennrich et al. 2016, on bytes as in GPT-2): {token bytes: rank}, vocab_size - 1 entries.

    The 256 bytes come first, so any text round-trips. Then the most frequent adjacent pair is merged, again and again;
    of equally frequent pairs the one with the smallest ids wins, which makes the result a function of the text alone.
    """
    if vocab_size < 258:
        raise UserError(f"--vocab-size is {vocab_size}: the 256 bytes, end of text and one merge need 258")
    words = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    spelling = [list(word.encode()) for word in words]  # each distinct word as a list of ids, merged below
    count = list(words.values())
    pairs, where = Counter(), defaultdict(set)  # how often each pair of ids occurs, and in which words
    for i, ids in enumerate(spelling):
        for pair in zip(ids, ids[1:]):
            pairs[pair] += count[i]
            where[pair].add(i)
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        most = max(pairs.values(), default=0)
        if most < 2:
            break  # too little text for a larger vocabulary
        best = min(pair for pair, n in pairs.items() if n == most)
        new = len(tokens)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for i in where.pop(best):
            ids = spelling[i]
            for pair in zip(ids, ids[1:]):
                pairs[pair] -= count[i]
            merged, k = [], 0
            while k < len(ids):
                hit = tuple(ids[k:k + 2]) == best
                merged.append(new if hit else ids[k])
                k += 2 if hit else 1
            spelling[i] = merged
            for pair in zip(merged, merged[1:]):
                pairs[pair] += count[i]
                where[pair].add(i)
        pairs = +pairs if len(tokens) % 64 == 0 else pairs  # forget pairs that no longer occur, now and then
        pairs.pop(best, None)
    ranks = {}
    for token in tokens:
        ranks.setdefault(token, len(ranks))
    return ranks


def load_tokenizer(where):
    """tiktoken.Encoding from a folder with vocab.tiktoken (or that file itself), which holds GPT-2's merges or ours.

    Use encode_ordinary for text: a literal "<|endoftext|>" in somebody's text is then ordinary text. The special id is
    enc.eot_token, and enc.n_vocab counts it.
    """
    path = Path(where)
    path = path / "vocab.tiktoken" if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no tokenizer here (python data.py makes data/reviews/vocab.tiktoken)")
    ranks, content = {}, path.read_bytes()
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"{path}:{number}: expected base64 and a rank (damaged; make it again)") from None
    if len(ranks) < 256 or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(f"{path}: not a complete vocabulary (the file is damaged; make it again)")
    pattern = GPT2_PATTERN if hashlib.sha256(content).hexdigest() == GPT2_VOCAB else PATTERN
    return tiktoken.Encoding("plainrlhf", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def check_same_vocab(*folders):
    """UserError unless these checkpoint folders have the same vocabulary: the ids of one model go into the others."""
    first, *others = paths = [Path(folder) / "vocab.tiktoken" for folder in folders]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path.parent}: no checkpoint here ({path.name} is missing; has its stage been run?)")
    for path in others:
        if path.read_bytes() != first.read_bytes():
            raise UserError(f"{path} and {first} differ: these models do not share a vocabulary")


def save_ranks(ranks, path):
    """Write a vocabulary in tiktoken's own text format: base64 of the bytes, a space, the rank."""
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    write_atomic(path, lambda temporary: temporary.write_text(lines))


# ---- tokens and batches --------------------------------------------------------------------------------------------


def encode_prompt(enc, prompt, limit):
    """End of text, then the prompt's tokens: limit ids at most, for which a longer prompt loses its beginning.

    A dialogue loses what stands before its first turn, then whole turns, as few as will do: what is left begins with
    TURN. If the last turn alone is too long, it loses its own beginning.
    """
    ids = enc.encode_ordinary(prompt)
    if len(ids) >= limit and (starts := [match.start() for match in re.finditer(TURN, prompt) if match.start() > 0]):
        # From one start to the next the rest gets shorter, so the first that fits can be bisected for.
        fits = bisect.bisect_left(starts, True, key=lambda start: len(enc.encode_ordinary(prompt[start:])) < limit)
        ids = enc.encode_ordinary(prompt[starts[min(fits, len(starts) - 1)]:])
    return [enc.eot_token] + ids[max(0, len(ids) - (limit - 1)):]


def encode_response(enc, response, limit):
    """The response's tokens and end of text; a response of more than limit tokens loses its end (and has no end)."""
    return (enc.encode_ordinary(response) + [enc.eot_token])[:limit]


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


def length_mask(lengths, size):
    """(B, size) with 1.0 in the first lengths[b] places of row b."""
    return (torch.arange(size, device=lengths.device) < lengths[:, None]).float()


def batches(lengths, size, *seed):
    """Shuffled batches of row numbers, a function of the seed numbers; rows of similar length share a batch.

    lengths: one number per row (all equal: a plain shuffle). The rows are shuffled, sorted by length within pools of 16
    batches, so that little of a batch is padding, and the batches shuffled again. The last batch may be smaller.
    """
    random = generator(*seed)
    order = torch.randperm(len(lengths), generator=random).tolist()
    pools = [sorted(order[i:i + 16 * size], key=lambda row: lengths[row]) for i in range(0, len(order), 16 * size)]
    made = [pool[i:i + size] for pool in pools for i in range(0, len(pool), size)]
    return [made[i] for i in torch.randperm(len(made), generator=random).tolist()]


# ---- files ---------------------------------------------------------------------------------------------------------


def write_jsonl(path, rows):
    """Write one JSON object per line, UTF-8, atomically."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomic(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def read_jsonl(path, *layouts):
    """Rows of a JSONL file, each checked to be an object with these fields: {"prompt": str, "responses": list, ...}.

    A list means a list of two or more different texts. Of several layouts the first row decides that has a field of one
    besides the prompt; the others must be like it. For the rest see read_rows.
    """
    left = list(layouts)

    def accept(row):
        left[:] = [fields for fields in left if fields.keys() & row.keys() - {"prompt"}][:1] or left
        return checked(row, left[0])
    return read_rows(path, accept, f"an object with {' or '.join(map(', '.join, layouts))}")


def read_rows(path, accept, expected, array=False, text=None):
    """[accept(row) for each JSON object of a JSONL file]; accept raises ValueError("field: problem") for a bad one.

    Raises UserError "file:line: field: problem" that counts all bad lines and shows the first five. Blank lines are
    skipped, CRLF and a byte-order mark are accepted. expected: what a row should be, in words. array: the file may also
    be one JSON array of the rows. text: the content of the file, if it has been read.
    """
    text, rows, bad = read_text(path) if text is None else text, [], []
    lines = [(number, line, parse) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if array and text.lstrip().startswith("["):
        try:  # the rows of one array are parsed already
            lines = [(f"row {number}", row, lambda row: row) for number, row in enumerate(parse(text), start=1)]
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
    for number, line, read in lines:
        try:
            row = read(line)
            if not isinstance(row, dict):
                raise ValueError(f"expected {expected}, found {type(row).__name__}")
            rows.append(accept(row))
        except ValueError as error:
            bad.append(f"{path}:{number}: {error}")
    if bad:
        raise UserError("; ".join(bad[:5]) + (f" (and {len(bad) - 5} more bad lines)" if len(bad) > 5 else ""))
    if not rows:
        raise UserError(f"{path}: empty (expected on every line: {expected})")
    return rows


def read_text(path, cut=0):
    """The content of a UTF-8 text file, but for so many bytes at its end (cut), unpacked if its name ends in .gz;
    UserError that says what it is instead."""
    path = Path(path)
    if not path.is_file():
        what = "a folder, not a file" if path.is_dir() else "not a plain file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}")
    try:
        content = path.read_bytes()
        content = content[:len(content) - cut]
        if path.suffix == ".gz" and content.startswith(b"\x1f\x8b"):  # a browser may have unpacked it
            content = gzip.decompress(content)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: damaged: {error} (fetch it again)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    for start, what in {b"\x1f\x8b": "compressed by gzip (unpack it: gunzip -k)", b"PK": "a zip archive (unpack it)",
                        b"PAR1": "a Parquet file (save it as JSON lines)", b"<": "HTML or XML (a failed download?)",
                        b"version https://git-lfs": "a Git LFS pointer, not the file itself (git lfs pull)",
                        b"\xff\xfe": "UTF-16 (save it as UTF-8)", b"\xfe\xff": "UTF-16 (save it as UTF-8)"}.items():
        if content.startswith(start):
            raise UserError(f"{path}: {what}")
    if content[:2].count(b"\0") == 1:  # without the mark, but a letter has two bytes
        raise UserError(f"{path}: UTF-16 (save it as UTF-8)")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text at byte {error.start} (save it as UTF-8)") from None


def parse(line):
    """json.loads, but a ValueError for a key that stands twice and for numbers that are none."""
    def number(text):
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text} is not a finite number")
        return value

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)
    try:
        return json.loads(line, object_pairs_hook=unique, parse_constant=number, parse_float=number)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error} (one object per line)") from None


def checked(row, fields):
    """The row, if it has these fields; else ValueError that names the field."""
    for name, kind in fields.items():
        if name not in row:
            raise ValueError(f"{name}: missing (found: {', '.join(map(str, row)) or 'nothing'})")
        value = row[name]
        if not isinstance(value, kind):
            raise ValueError(f"{name}: expected {kind.__name__}, found {type(value).__name__}")
        if kind is list and len(value) < 2:
            raise ValueError(f"{name}: {len(value)} of them (a ranking needs two or more)")
        for text in value if kind is list else [value] if kind is str else []:
            check_text(text, name)
        if kind is list and len(set(value)) < len(value):
            raise ValueError(f"{name}: the same text twice")
    if "chosen" in fields and row["chosen"] == row["rejected"]:
        raise ValueError("chosen: the same as rejected")
    return row


def check_text(text, name):
    """ValueError unless this is a text that a model can be trained on; only a prompt may be empty."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, found {type(text).__name__}")
    if not text.strip() and name != "prompt":
        raise ValueError(f"{name}: empty")
    if re.search("[\ud800-\udfff\0]", text):
        raise ValueError(f"{name}: holds a NUL or half a surrogate pair")
    if re.search(r"\s{100000}", text):
        raise ValueError(f"{name}: a run of 100,000 white-space characters, which no tokenizer survives")


def read_rankings(path):
    """Rows {"prompt", "responses": best to worst} of a rankings file, or of a pairs file ("chosen", "rejected")."""
    rows = read_jsonl(path, {"prompt": str, "responses": list}, {"prompt": str, "chosen": str, "rejected": str})
    return [row if "responses" in row else {**row, "responses": [row["chosen"], row["rejected"]]} for row in rows]


def prepare_reviews(cfg):
    import reviews  # only preparing the data needs it
    reviews.prepare(cfg.out, cfg.archive, cfg.vocab_size, cfg.seed)


if __name__ == "__main__":
    if sys.argv[1:2] == ["hh"]:
        import hh
        sys.argv[:2] = ["data.py hh"]  # the flags that follow are its own
        run(hh.main, hh.Config)
    elif sys.argv[1:2] == ["own"]:
        import own
        from terminal import words_for  # which needs this file
        sys.argv[:2] = ["data.py own"]
        words_for("files", several=True)
        run(own.main, own.Config)
    else:
        run(prepare_reviews, Config)
