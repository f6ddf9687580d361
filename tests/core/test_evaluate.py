"""The evaluation: its estimators against brute force and closed forms, and one run of all policies on one footing."""
import itertools
import json
import math

import pytest
import torch

import evaluate
from conftest import random_model
from data import write_jsonl
from model import GPT, token_logprobs


def pool():
    """scores and values (3, 6), with equal scores among them."""
    random = torch.Generator().manual_seed(0)
    return torch.randint(4, (3, 6), generator=random).float(), torch.randn(3, 6, generator=random)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Weights off by one, the worst instead of the best, or one subset for all: a curve that is biased or noisy."""
    scores, values = pool()
    for row, value, estimate in zip(scores, values, evaluate.expected_best(scores, values, n)):
        best = [max(subset, key=lambda i: (row[i], i)) for subset in itertools.combinations(range(6), n)]
        assert estimate.item() == pytest.approx(sum(value[i].item() for i in best) / len(best), abs=1e-6)


def test_kl_of_best_of_n_and_bigrams():
    """The KL of the wrong n, bigrams over a border."""
    k = torch.arange(1, 4001, dtype=torch.double) / 4000  # the best of n of 4,000 equal responses has a known law
    best = k ** 5 - (k - 1 / 4000) ** 5  # probability that the k-th worst is the best of 5 draws
    assert (best * (best * 4000).log()).sum().item() == pytest.approx(evaluate.best_of_kl(5), abs=1e-3)
    assert evaluate.best_of_kl(1) == 0
    assert evaluate.unique_bigrams([[1, 2, 3], [1, 2], [9]]) == pytest.approx(2 / 3)


def test_same_order_by_brute_force():
    """A pair counted twice, a pair of two prompts, or a tie that counts as agreement."""
    a, b = pool()
    hits = [0.5 + 0.5 * torch.sign(x[i] - x[j]).item() * torch.sign(y[i] - y[j]).item()
            for x, y in zip(a, b) for i, j in itertools.combinations(range(6), 2)]
    assert evaluate.same_order(a, b) == pytest.approx(sum(hits) / len(hits))
    assert evaluate.same_order(b, 2 * b) == 1 and evaluate.same_order(b, -b) == 0


@pytest.mark.parametrize("missing_eos_score, best_texts", [(-1.0, ["b", "c"]), (math.nan, ["a", "c"])])
def test_the_pool_gives_the_responses_that_the_proxy_likes(missing_eos_score, best_texts):
    """Responses of another prompt, the best by the judge, which would be cheating, or one that lacks its EOS."""
    scores = {"proxy": torch.tensor([2.0, 1.0, 3.0, -2.0]), "judge": torch.tensor([0.3, -0.4, -0.5, 0.6])}
    drawn = {"responses": [[i] for i in range(4)], "texts": list("abcd"), "kl": torch.zeros(4), "length": torch.ones(4),
             "scores": scores, "ended": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    base = {"texts": ["x", "y"], "scores": {name: torch.zeros(2) for name in scores}}
    best, curve, agreement = evaluate.best_of_n(drawn, base, 2, missing_eos_score)
    chosen = ["abcd".index(text) for text in best_texts]
    assert best["texts"] == best_texts and best["kl"].tolist() == pytest.approx([math.log(2) - 1 / 2] * 2)
    assert best["scores"]["judge"].tolist() == scores["judge"][chosen].tolist()
    assert [point["n"] for point in curve] == [1, 2]
    assert curve[0]["win_rate_judge"] == pytest.approx(0.5)
    for name in scores:
        assert curve[-1][name] == pytest.approx(scores[name][chosen].mean().item())
    assert agreement == {"judge": 0.5}  # the two scorers order one of the two pairs alike


def test_kl_of_a_policy_is_the_sum_over_its_tokens(autocast_off):
    """The prompt or padding in the sum, rows of unequal length mixed up, or another temperature than the sampler's."""
    policy, ref = random_model(GPT, 1), random_model(GPT, 2)
    prompts, responses = [[1, 2, 3], [4], [5, 6]], [[7, 0], [8, 9, 10], [3]]
    kl = evaluate.kl_to(ref, policy, prompts, responses, 0, evaluate.Config(temperature=0.7), autocast_off)
    for prompt, response, sum_of in zip(prompts, responses, kl.tolist()):
        tokens = torch.tensor([prompt + response])
        own, other = (token_logprobs(model(tokens), tokens, 0.7)[0, len(prompt) - 1:] for model in (policy, ref))
        assert sum_of == pytest.approx((own - other).sum().item(), abs=1e-4)
    assert not evaluate.kl_to(ref, ref, prompts, responses, 0, evaluate.Config(), autocast_off).any()


def test_intervals_and_length_control():
    """A standard deviation in place of a standard error; a correction for length with the wrong sign."""
    x, half = (torch.arange(1000) < 300).float(), 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    mean, interval = evaluate.mean_interval(x, 4000, torch.Generator().manual_seed(0))
    assert mean == pytest.approx(0.3, abs=1e-4) and interval == pytest.approx([0.3 - half, 0.3 + half], abs=0.003)
    random = torch.Generator().manual_seed(0)
    longer = torch.randn(4000, generator=random) + 1
    wins = (torch.rand(4000, generator=random) < torch.sigmoid(2 * torch.tanh(longer / longer.std()))).float()
    assert wins.mean() > 0.65
    rate, (low, high) = evaluate.length_controlled(wins, longer, 100, random)
    assert rate == pytest.approx(0.5, abs=0.04) and low < 0.5 < high
    coin = (torch.rand(4000, generator=random) < 0.8).float()
    assert evaluate.length_controlled(coin, longer, 100, random)[0] == pytest.approx(0.8, abs=0.03)


def test_a_run_on_one_footing(checkpoints, tmp_path, capsys):
    """A policy that differs from itself, a score at the edge of a histogram that is lost, a table without a policy."""
    write_jsonl(tmp_path / "text.jsonl", [{"text": "the film was good " * 30}])
    (tmp_path / "twin").symlink_to(checkpoints.sft)
    evaluate.main(evaluate.Config(
        out=str(tmp_path / "out"), sft=checkpoints.sft, policies=str(tmp_path / "twin"), reward=checkpoints.reward,
        labeler="", judge=checkpoints.reward, prompts=checkpoints.prompts, text=str(tmp_path / "text.jsonl"), best_of=3,
        response_tokens=8, bootstrap=9, missing_eos_score=math.nan, device="cpu", dtype="float32"))
    results = json.loads((tmp_path / "out/results.json").read_text())
    sft, best, twin = (results["policies"][name] for name in ("sft", "best-of-3", "twin"))
    assert twin["kl"] == 0 and twin["win_rate_judge"] == 0.5 and twin["judge"] == sft["judge"]
    assert best["win_rate_judge"] > 0.5 and best["kl"] == pytest.approx(math.log(3) - 2 / 3, abs=1e-3)
    for part in results["histograms"].values():
        assert {name: sum(counts) for name, counts in part["counts"].items()} == dict.fromkeys(results["policies"], 12)
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and all(row["sft"] == row["twin"] for row in samples)
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in results["policies"])
