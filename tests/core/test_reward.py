"""The ranking loss against explicit pairs, batching that changes no score, normalisation, accuracy."""
import itertools
import json
import math

import pytest
import torch

import data
import reward
import stages
from conftest import END, both_precisions, close, ragged_mask, random_model
from data import pair_accuracy, ranking_accuracy
from model import ScalarModel, load_model
from reward import batch_accuracy, ranking_loss, score_many, score_rankings
from sampling import sample_many

@both_precisions
def test_ranking_loss_is_the_mean_over_pairs(dtype):
    """A flipped sign, pairs counted twice, a long ranking that outweighs others, padding or order that matters."""
    lengths, means = [4, 2, 1, 3, 0], []  # unequal K, a lone response and none: neither holds a comparison
    mask = ragged_mask(lengths, 4).to(dtype)
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = torch.where(mask == 1, scores, 1000.0)  # where no response exists stands a number that must not count
    for row, n in zip(scores.tolist(), lengths):
        pairs = [math.log1p(math.exp(-(better - worse))) for better, worse in itertools.combinations(row[:n], 2)]
        means += [sum(pairs) / len(pairs)] if pairs else []
    order, pad = [3, 0, 4, 2, 1], torch.nn.functional.pad
    wide = pad(scores, (0, 3), value=9.0), pad(mask, (0, 3))
    for other in ((scores, mask), (scores[order], mask[order]), wide, (scores + 5.0, mask)):
        loss = ranking_loss(*other)
        assert loss.item() == pytest.approx(sum(means) / len(means), **close(dtype)) and loss.dtype == dtype


def test_ranking_loss_is_finite():
    """An overflow where scores are far apart; a gradient that lowers the best or reaches a lone response; 0 / 0."""
    far = torch.tensor([[-500.0, 500.0], [500.0, -500.0]])
    assert [ranking_loss(row[None], torch.ones(1, 2)).item() for row in far] == pytest.approx([1000, 0])
    scores = torch.zeros(2, 3, requires_grad=True)
    ranking_loss(scores, torch.tensor([[1.0, 1, 1], [1, 0, 0]])).backward()
    assert scores.grad[0].sign().tolist() == [-1, 0, 1] and not scores.grad[1].any()  # none to a lone response
    assert ranking_loss(scores, torch.tensor([[1.0, 0, 0], [1, 0, 0]])).item() == 0


def test_accuracy_counts_pairs_and_half_of_ties():
    """Ties counted as hits, padding counted as pairs, rankings counted in place of pairs, a duplicate as two texts."""
    scores = torch.tensor([[3.0, 2.0, 2.0], [1.0, 5.0, 99.0], [7.0, 99.0, 99.0]])
    assert batch_accuracy(scores, ragged_mask([3, 2, 1], 3)).item() == 2.5 / 4
    assert pair_accuracy(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.arange(8).view(4, 2))["accuracy"] == 2.5 / 4
    rankings = [[[1], [2], [3]], [[1], [4]]]
    card = ranking_accuracy(rankings, [torch.tensor([3.0, 2.0, 2.0]), torch.tensor([1.0, 5.0])])
    margins, ends = torch.tensor([1.0, 1.0, 0.0, -4.0]), torch.tensor([[0, 1], [0, 2], [1, 2], [0, 3]])
    assert card == pair_accuracy(margins, ends) and (card["accuracy"], card["pairs"]) == (2.5 / 4, 4)


def test_interval_knows_that_pairs_share_texts():
    """An interval for independent pairs: with 40 texts in 400 pairs it misses the truth far more often than 1 in 20."""
    random, covered, tight = torch.Generator().manual_seed(0), 0, 0
    truth = 0.75  # of sign(a + noise - b - noise) for noise as large as the signal: 0.5 + atan(1) / pi
    for _ in range(100):
        quality = torch.randn(40, generator=random)
        score = quality + torch.randn(40, generator=random)
        ends = torch.stack([torch.randperm(40, generator=random)[:2] for _ in range(400)])
        ends = torch.where((quality[ends[:, 0]] > quality[ends[:, 1]])[:, None], ends, ends.flip(1))
        result = pair_accuracy(score[ends[:, 0]] - score[ends[:, 1]], ends)
        (low, high), p = result["interval"], result["accuracy"]
        covered += low <= truth <= high
        tight += abs(p - truth) < 1.96 * (p * (1 - p) / 400) ** 0.5
    assert covered >= 93 > tight  # 93 % and more, where the simple interval has fewer


def test_scores_do_not_depend_on_the_batch():
    """A score read from padding, at "the last token that is not EOS", or given to another text: one by one."""
    model = random_model(ScalarModel)
    rankings = [[[END, 1, 2, END], [END, 3, END]], [[END, 4, 5, 6, 7, END], [END, 8, END], [END, END]], [[END, 9]]]
    expected = [model(torch.tensor([text]))[0, -1].item() for text in sum(rankings, [])]
    scores, mask = score_rankings(model, rankings)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert [x for row, n in zip(scores.tolist(), (2, 3, 1)) for x in row[:n]] == pytest.approx(expected, abs=1e-5)
    assert score_many(model, sum(rankings, [])).tolist() == pytest.approx(expected, abs=1e-5)


def test_training_learns_and_normalises(checkpoints, tmp_path):
    """A model that cannot learn three words, or whose scores of the SFT model's samples are not mean 0, deviation 1."""
    rows = [{"prompt": f"the film {i}", "responses": [f" good {i % 7}", " plain", " bad bad"][:2 + i % 2]}
            for i in range(80)]
    data.write_jsonl(tmp_path / "rankings.jsonl", rows)  # 20 held out: enough for their accuracy to mean something
    stages.run("reward", checkpoints.folder, tmp_path / "out", train=tmp_path / "rankings.jsonl", test="",
               test_share=0.25, samples=40, epochs=8, lr=1e-2, dropout=0.1)
    card = json.loads((tmp_path / "out/report_card.json").read_text())
    assert card["held-out rankings"]["accuracy"] > 0.8 and list(card) == ["held-out rankings"]

    enc, model = data.load_tokenizer(checkpoints.vocab), load_model(tmp_path / "out", kind="reward")
    rows = data.read_jsonl(checkpoints.prompts, {"prompt": str})
    prompts = [data.encode_prompt(enc, rows[i % len(rows)]["prompt"], 32 - 6) for i in range(40)]
    responses = sample_many(load_model(checkpoints.sft), prompts, 6, enc.end, temperature=0.7,
                            random=torch.Generator().manual_seed(1))
    scores = score_many(model, [prompt + response for prompt, response in zip(prompts, responses)])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-4)


def test_no_prompt_is_on_both_sides_of_the_split(capsys):
    """Held-out accuracy on prompts that were trained on; a task of a single prompt that cannot be trained on."""
    rows = [{"prompt": f"film {i}", "responses": [f" good {k}", " bad"]} for i in range(10) for k in range(3)]
    sides = data.split_by_prompt(rows, 0.25, 1)
    train, test = ({row["prompt"] for row in side} for side in sides)
    assert len(train) == 8 and len(test) == 2 and not train & test and sum(map(len, sides)) == 30
    assert sides == data.split_by_prompt(rows, 0.25, 1) != data.split_by_prompt(rows, 0.25, 2)
    train, test = data.split_by_prompt(rows[:3], 0.25, 1)  # of one prompt
    assert len(test) == 1 and sorted(train + test, key=rows.index) == rows[:3]
    assert "all rankings share one prompt" in capsys.readouterr().out


def test_report_card_of_a_model_that_counts_tokens(checkpoints, monkeypatch, autocast_off):
    """Scores given to the wrong text, rankings' to comparisons, chosen and rejected exchanged, or a text scored without
    its prompt."""
    sides, seen = [(" yy", " y")] * 3 + [(" z", " zzz")], []
    rows = [{"prompt": "x", "chosen": better, "rejected": worse, "domain": "film", "sample": ["random", "close"][i > 1]}
            for i, (better, worse) in enumerate(sides)]
    monkeypatch.setattr(reward, "score_many", lambda model, texts: seen.extend(texts) or torch.tensor(
        [float(len(ids)) for ids in texts]))
    enc = data.load_tokenizer(checkpoints.vocab)
    card = reward.report_card(random_model(ScalarModel), enc, [[[1] * 9, [2] * 3, [3] * 5]], rows, autocast_off)
    texts = {f"{data.END}x {word}{data.END}" for word in ("y", "yy", "z", "zzz")}
    assert {enc.decode(ids) for ids in seen[3:]} == texts
    assert card["held-out rankings"]["accuracy"] == pytest.approx(2 / 3, abs=1e-4)
    accuracy = {name: row["reward model"]["accuracy"] for name, row in card["human comparisons"].items()}
    assert accuracy == {"film, random": 1, "film, close": 0.5}
