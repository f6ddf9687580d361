"""The byte-pair training of prepare/reviews.py against a slow one."""
from collections import Counter

import pytest
import regex

from conftest import SENTENCES
from data import PATTERN
from prepare.reviews import train_bpe


def slow_bpe(texts, vocab_size):
    """Count every pair of neighbours anew before each merge: {token bytes: rank}."""
    words = [list(word.encode()) for text in texts for word in regex.findall(PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < vocab_size - 1:
        pairs = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in words:
            k = 0
            while k < len(word) - 1:
                if (word[k], word[k + 1]) == best:
                    word[k:k + 2] = [len(tokens)]
                k += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return {token: rank for rank, token in enumerate(tokens)}


@pytest.mark.parametrize("texts", [SENTENCES, ["aaa banana bandana cabana"] * 3,
                                   ["don't, can't 12345 éé 🎬🎬 ..."] * 3])
def test_train_bpe_merges_the_most_frequent_pair(texts):
    """Counts that go stale after a merge, overlapping pairs (aaa) counted twice, ties broken by chance."""
    assert list(train_bpe(texts, 265).items()) == list(slow_bpe(texts, 265).items())
