"""Pure functions of scores and wins: means with intervals, win rates at equal length, best-of-n from a pool."""
import math

import torch


def mean_interval(x, resamples, random):
    """Mean of x (N,) and its 95 % bootstrap interval over the rows."""
    means = x[torch.randint(len(x), (resamples, len(x)), generator=random)].mean(1)
    return round(x.mean().item(), 4), [round(q, 4) for q in means.quantile(torch.tensor([0.025, 0.975])).tolist()]


def length_controlled(wins, longer, resamples, random):
    """Win rate at equal length, with a 95 % bootstrap interval: logistic regression of the win on the difference.

    wins (N,) in {0, 0.5, 1}; longer (N,) tokens that the policy's response is longer by. Fits P(win) = sigmoid(a +
    b * tanh(longer / std)) by Newton's method and reports sigmoid(a), the idea of Dubois et al. 2024 in two parameters.
    """
    x = torch.tanh(longer / longer.std(correction=min(1, len(longer) - 1)).clamp(min=1e-6))
    X = torch.stack([torch.ones_like(x), x], dim=1).double()  # (N, 2)
    rows = torch.randint(len(x), (resamples, len(x)), generator=random)
    rows[0] = torch.arange(len(x))  # the first fit is of the data itself
    X, y = X[rows], wins.double()[rows]  # (S, N, 2), (S, N)
    weights = torch.zeros(resamples, 2, dtype=torch.double)
    for _ in range(20):
        p = torch.sigmoid((X @ weights[:, :, None]).squeeze(2))  # (S, N)
        # A trace of ridge keeps the step finite where every answer won; it is subtracted from the gradient too.
        gradient = (X * (y - p)[:, :, None]).sum(1) - 1e-3 * weights
        hessian = torch.einsum("snj,sn,snk->sjk", X, p * (1 - p), X) + 1e-3 * torch.eye(2, dtype=torch.double)
        weights = weights + torch.linalg.solve(hessian, gradient).clamp(-2, 2)
    rates = torch.sigmoid(weights[:, 0])
    low, high = rates[1:].quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return round(rates[0].item(), 4), [round(low, 4), round(high, 4)]


def repetition(responses, mask):
    """Share of the pairs of neighbouring tokens that their response had before, a response without pairs counted 0.

    responses (B, R) ids, mask (B, R): the mean over responses. 0: nothing twice; near 1: the same words for ever.
    """
    pairs, real = responses[:, :-1] * (responses.max() + 1) + responses[:, 1:], mask[:, 1:]  # (B, R - 1), each a number
    before = (pairs[:, :, None] == pairs[:, None]).tril(-1).any(2)  # (B, R - 1)
    return ((before * real).sum(1) / real.sum(1).clamp(min=1)).mean()


def expected_best(scores, values, n):
    """Mean value of the response with the highest score among n: scores, values (M, N) to (M,), one per prompt.

    scores choose (the proxy's), values count (the judge's, say). Unbiased, and less noisy than one draw of n: the mean
    over all C(N, n) subsets of the N responses (Nakano et al. 2021, appendix I). The response with i others below it is
    the best of a subset if the n - 1 others come from those i: in C(i, n - 1) subsets. Ties go to the later one.
    """
    N = scores.size(1)
    weights = torch.tensor([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)], dtype=torch.double)
    return (values.double().gather(1, scores.argsort(dim=1, stable=True)) * weights).sum(1)


def best_of_kl(n):
    """KL of best-of-n to the model sampled from, nats (Stiennon et al. 2020): an upper bound, nearly met while
    responses hardly repeat (Beirami et al. 2024). The chosen response's rank u in (0, 1) has the density n u^(n-1), and
    the KL is the mean of its logarithm."""
    return math.log(n) - (n - 1) / n


def distinct_2(responses):
    """Share of different pairs of neighbouring tokens among all such pairs, over all responses (Li et al. 2016). Of
    more responses of the same kind it is smaller."""
    pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def same_order(a, b):
    """Share of the pairs of one prompt's responses that two scorers order alike, a tie of either counted half:
    a, b (M, N)."""
    i, j = torch.triu_indices(a.size(1), a.size(1), offset=1)
    return (0.5 + 0.5 * torch.sign(a[:, i] - a[:, j]) * torch.sign(b[:, i] - b[:, j])).mean().item()
