"""The evaluation: its estimators against brute force and closed forms, and the report redrawn from results.json."""
import html
import itertools
import json
import math

import pytest
import torch

import estimators
import evaluate
import report
from common import UserError
from conftest import random_model
from model import GPT, Ensemble, ScalarModel, load_reward, score_many, token_logprobs


def pool(M=3, N=6, seed=0):
    """scores and values (M, N), with equal scores among them."""
    random = torch.Generator().manual_seed(seed)
    return torch.randint(4, (M, N), generator=random).float(), torch.randn(M, N, generator=random)


@pytest.mark.parametrize("n", range(1, 7))
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """Weights off by one, the worst instead of the best, or one subset for all: a curve that is biased or noisy."""
    scores, values = pool()
    for row, value, estimate in zip(scores, values, estimators.expected_best(scores, values, n)):
        best = [max(subset, key=lambda i: (row[i], i)) for subset in itertools.combinations(range(6), n)]
        assert estimate.item() == pytest.approx(sum(value[i].item() for i in best) / len(best), abs=1e-6)


def test_best_of_1_is_the_mean_and_of_all_the_maximum():
    """An estimate that depends on the order of the pool, or that loses weight for a large pool."""
    random = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 64, generator=random)
    assert torch.allclose(estimators.expected_best(scores, scores, 1).float(), scores.mean(1))
    assert torch.allclose(estimators.expected_best(scores, scores, 64).float(), scores.amax(1))
    shuffled = scores[:, torch.randperm(64, generator=random)]
    for n in (2, 16, 63):
        one, other = (estimators.expected_best(x, x, n) for x in (scores, shuffled))
        assert torch.allclose(one, other)


def test_kl_of_best_of_n_by_enumeration():
    """log n + (n - 1) / n, or the log of the wrong n. The best of n of 4,000 equal responses has a known law."""
    V, n = 4000, 5
    k = torch.arange(1, V + 1, dtype=torch.double)
    best = (k / V) ** n - ((k - 1) / V) ** n  # probability that the k-th worst is the best of n draws
    assert (best * (best * V).log()).sum().item() == pytest.approx(estimators.best_of_kl(n), abs=1e-3)
    assert estimators.best_of_kl(1) == 0


def test_same_order_by_brute_force():
    """A pair counted twice, a pair of two prompts, or a tie that counts as agreement."""
    a, b = pool()
    hits = [0.5 + 0.5 * torch.sign(x[i] - x[j]).item() * torch.sign(y[i] - y[j]).item()
            for x, y in zip(a, b) for i, j in itertools.combinations(range(6), 2)]
    assert estimators.same_order(a, b) == pytest.approx(sum(hits) / len(hits))
    assert estimators.same_order(b, 2 * b) == 1 and estimators.same_order(b, -b) == 0


def test_the_pool_gives_the_answers_that_the_proxy_likes():
    """Answers of another prompt, or the best by the judge, which would be cheating."""
    random = torch.Generator().manual_seed(2)
    scores = {name: torch.randn(6, generator=random) for name in ("proxy", "judge")}
    drawn = {"responses": [[i] for i in range(6)], "texts": list("abcdef"), "scores": scores, "kl": torch.zeros(6),
             "length": torch.arange(6.0), "ended": torch.ones(6)}
    base = {"texts": ["x", "y"], "scores": {name: torch.zeros(2) for name in scores}}
    best, curve, agreement = evaluate.best_of_n(drawn, base, 3, -1.0)
    chosen = [scores["proxy"][:3].argmax().item(), 3 + scores["proxy"][3:].argmax().item()]
    assert best["texts"] == ["abcdef"[i] for i in chosen] and best["kl"].tolist() == pytest.approx([1.0986 - 2 / 3] * 2,
                                                                                                 abs=1e-3)
    assert best["scores"]["judge"].tolist() == scores["judge"][chosen].tolist()
    assert [point["n"] for point in curve] == [1, 2, 3]
    assert curve[0]["win_rate_judge"] == pytest.approx((scores["judge"] > 0).float().mean().item())
    assert curve[-1]["judge"] == pytest.approx(scores["judge"][chosen].mean().item())
    assert agreement == {"judge": pytest.approx(estimators.same_order(*(scores[name].view(2, 3) for name in scores)),
                                                abs=1e-4)}


def test_best_of_n_takes_no_response_without_an_end_unless_all_are_worse():
    """A comparison with PPO, which pays for such responses, that is not on one footing."""
    drawn = {"responses": [[i] for i in range(4)], "texts": list("abcd"), "kl": torch.zeros(4), "length": torch.ones(4),
             "scores": {"proxy": torch.tensor([2.0, 1.0, 3.0, -2.0]), "judge": torch.zeros(4)},
             "ended": torch.tensor([0.0, 1.0, 0.0, 1.0])}
    base = {"texts": ["x", "y"], "scores": {name: torch.zeros(2) for name in drawn["scores"]}}
    best, curve, _ = evaluate.best_of_n(drawn, base, 2, -1.0)
    assert best["texts"] == ["b", "c"] and curve[-1]["proxy"] == pytest.approx((1.0 + 3.0) / 2)
    assert evaluate.best_of_n(drawn, base, 2, math.nan)[0]["texts"] == ["a", "c"]


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


def test_intervals():
    """A standard deviation instead of a standard error, or the interval of another share than 95 %."""
    x = (torch.arange(1000) < 300).float()
    mean, (low, high) = estimators.mean_interval(x, 4000, torch.Generator().manual_seed(0))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert mean == pytest.approx(0.3, abs=1e-4) and (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)


def test_length_control():
    """A correction with the wrong sign. Wins that only length explains are none at equal length."""
    random = torch.Generator().manual_seed(0)
    longer = torch.randn(4000, generator=random) + 1
    wins = (torch.rand(4000, generator=random) < torch.sigmoid(2 * torch.tanh(longer / longer.std()))).float()
    assert wins.mean() > 0.65
    rate, (low, high) = estimators.length_controlled(wins, longer, 100, random)
    assert rate == pytest.approx(0.5, abs=0.04) and low < 0.5 < high
    coin = (torch.rand(4000, generator=random) < 0.8).float()
    assert estimators.length_controlled(coin, longer, 100, random)[0] == pytest.approx(0.8, abs=0.03)


def test_distinct_2():
    """Pairs over the border of two responses."""
    assert estimators.distinct_2([[1, 2, 3], [1, 2], [9]]) == pytest.approx(2 / 3) and estimators.distinct_2([[1]]) == 0


@pytest.mark.parametrize("how", ["mean", "min"])
def test_an_ensemble_is_the_mean_or_the_least(how):
    """The maximum, which is what is to be avoided; or the members' scores in another order than the texts."""
    members = [random_model(ScalarModel, seed) for seed in (1, 2, 3)]
    texts = [[1, 2, 3], [4], [5, 6, 7, 8]]
    each = torch.stack([score_many(member, texts) for member in members])
    joined = score_many(Ensemble(members, how), texts)
    assert torch.allclose(joined, each.mean(0) if how == "mean" else each.min(0).values, atol=1e-5)


def test_loading_one_reward_model_or_several(checkpoints):
    """A comma taken for part of a name, or a rule that nobody knows taken for the mean."""
    assert isinstance(load_reward(checkpoints.reward), ScalarModel)
    several = load_reward(f"{checkpoints.reward},{checkpoints.reward}", ensemble="min")
    assert isinstance(several, Ensemble) and len(several.models) == 2 and not several.training
    with pytest.raises(UserError, match="--ensemble is 'max'"):
        load_reward(checkpoints.reward, ensemble="max")


def test_a_log_that_is_none_costs_a_figure_not_the_report(tmp_path):
    """A traceback at the end of an evaluation because of a damaged or foreign log."""
    for content in ("", "no JSON\n", "[]\n", '{"loss": 1}\n', '{"margin": 1, "step": 1}\n', "3\n"):
        (tmp_path / "log.jsonl").write_text(content)
        lines = evaluate.training_log(tmp_path)
        for flags in ({"beta": 0.1}, {"kl_coef": 0.2}, {}):
            assert report.log_of({"flags": {"x": flags}, "training": {"x": lines}}, "x") == []
    assert evaluate.training_log(tmp_path / "nowhere") == []


def test_text_of_a_model_is_text_in_the_report():
    """Markup that acts, or an escape that is escaped again and shows as rubbish."""
    text = report.escape("<b>*x*</b> | [a](b) & `c` \\ #1 _y_\x1b")
    assert not set(text) & set("<>*|[]`\\_\x1b") and html.unescape(text) == "<b>*x*</b> | [a](b) & `c` \\ #1 _y_ "


@pytest.mark.parametrize("content, message", [(None, "no such file"), ("{", "Expecting"),
                                              ("{}", "not from this version"), ("[1]", "not from this version")])
def test_report_of_what_is_no_result(tmp_path, content, message):
    """A traceback instead of a line that names the file."""
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=message):
        report.main(report.Config(folders=str(tmp_path)))


def test_histograms_hold_every_response():
    """A score at the edge of the last bin that is lost, or bins that differ from policy to policy."""
    random = torch.Generator().manual_seed(0)
    everyone = {name: {"scores": {"judge": torch.randn(100, generator=random)}} for name in ("sft", "ppo")}
    made = evaluate.histograms(everyone)["judge"]
    assert all(sum(counts) == 100 for counts in made["counts"].values()) and len(made["edges"]) == 31
    json.dumps(made)
