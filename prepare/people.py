"""How far people agree with each other on the sentences that they rated: what a reward model is measured against.

The rows are reviews.Sentence: .ratings is a list of whole numbers, .mean their mean, .group the block of rows that the
same people rated (movie reviews only: there, position k of the list is one person).
"""
import json
import math
from collections import defaultdict

import numpy as np

from common import UserError


def agreement(rows, same_sign, seed, draws=100_000):
    """Share of comparisons in which one rater agrees with (the mean of the other raters, one other rater).

    A pair of sentences is drawn at random, its means equal or not, then a rater for each sentence. A comparison that
    either side ties is left out. same_sign: only pairs whose means are both positive or both negative.
    """
    rng = np.random.default_rng(seed)
    count = np.array([len(s.ratings) for s in rows])  # (N,)
    ratings = np.array([s.ratings + [0] * (count.max() - len(s.ratings)) for s in rows])  # (N, most ratings)
    total = ratings.sum(1)
    pair = rng.integers(len(rows), size=(2, draws))
    pair = pair[:, (pair[0] != pair[1]) & ((total[pair[0]] * total[pair[1]] > 0) | (not same_sign))]
    n = count[pair]  # (2, draws that are left)
    one = rng.integers(n)
    another = (one + rng.integers(1, n)) % n  # anyone but the first
    first, second = ratings[pair, one], ratings[pair, another]
    shares = []
    for other in ((total[pair] - first) / (n - 1), second):
        agree = np.sign(first[0] - first[1]) * np.sign(other[0] - other[1])  # 0 for a tie
        shares.append(round(float((agree > 0).sum() / max(1, (agree != 0).sum())), 4))
    return shares


def blocks_of(rows):
    """Movie sentences rated by the same people, as lists; a block with unequal numbers of ratings is left out."""
    blocks = defaultdict(list)
    for s in rows:
        blocks[s.group].append(s)
    return [block for block in blocks.values() if len({len(s.ratings) for s in block}) == 1]


def person_margins(rows):
    """Every comparison that one person made within a block, their ties left out: the mean rating by the others of the
    sentence they preferred, minus that of the one they did not. (comparisons,), rating units."""
    margins = [np.zeros(0)]
    for block in blocks_of(rows):
        ratings = np.array([s.ratings for s in block])  # (sentences, people)
        others = (ratings.sum(1, keepdims=True) - ratings) / (ratings.shape[1] - 1)
        i, j = np.triu_indices(len(block), 1)
        preferred = np.sign(ratings[i] - ratings[j])
        margins.append((preferred * (others[i] - others[j]))[preferred != 0])
    return np.concatenate(margins)


def fit_temperature(margins):
    """Maximum-likelihood t, in the unit of the margins, of P(prefers i to j) = sigmoid((mean_i - mean_j) / t)
    (Bradley-Terry); 100 at most.

    The log-likelihood is concave in 1 / t: bisect 1 / t for where its slope, sum of m * sigmoid(-m / t), is 0.
    """
    low, high = 0.01, 100.0
    for _ in range(30):
        middle = (low * high) ** 0.5
        slope = (margins / (1 + np.exp(np.clip(middle * margins, -500, 500)))).sum()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return round(1 / low, 4)


def read_summary(path):
    """The summary.json that reviews.py writes: {"temperature", "agreement": {domain: {sample: shares}}, ...}. Of other
    data, or of none, these two are None and {}. UserError if it is damaged."""
    try:
        facts = {"agreement": {}, "temperature": None, **(json.loads(path.read_text()) if path.is_file() else {})}
        shares = [share for samples in facts["agreement"].values() for pair in samples.values() for share in pair[:2]]
        if not all(0 <= share <= 1 for share in shares):
            raise ValueError
        if facts["temperature"] is not None and not 0 < facts["temperature"] < math.inf:
            raise ValueError
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged: not the summary that python data.py writes") from None
    return facts
