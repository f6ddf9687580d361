"""The ranking loss against explicit pairs, batching that changes no score, normalisation, the report card."""
import itertools
import json
import math

import pytest
import torch

import data
import reward
from common import UserError
from conftest import END, log_of, ragged_mask, random_model
from model import ScalarModel, load_model, score_many
from reward import normalise, pair_accuracy, ranking_loss, score_rankings, share
from runs import Stage
from sampling import sample_many

LENGTHS = [4, 2, 1, 3, 0]  # unequal K, a lone response and none: neither holds a comparison
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def ragged_scores(dtype):
    """scores (B, K), best first, and mask; where no response exists stands a large number that must not count."""
    random, mask = torch.Generator().manual_seed(0), ragged_mask(LENGTHS, 4).to(dtype)
    scores = torch.randn(len(LENGTHS), 4, dtype=torch.float64, generator=random).to(dtype)
    return torch.where(mask == 1, scores, 1000.0), mask


def loss_by_pairs(scores, lengths):
    """InstructGPT eq. 1 pair by pair: the mean over each prompt's pairs, then over the prompts that have one."""
    means = []
    for row, n in zip(scores.tolist(), lengths):
        pairs = [math.log1p(math.exp(-(better - worse))) for better, worse in itertools.combinations(row[:n], 2)]
        means += [sum(pairs) / len(pairs)] if pairs else []
    return sum(means) / len(means)


@both_precisions
def test_ranking_loss_is_the_mean_over_pairs(dtype):
    """A flipped sign, pairs counted twice, or a prompt with many responses that outweighs the others."""
    scores, mask = ragged_scores(dtype)
    loss = ranking_loss(scores, mask)
    assert loss.item() == pytest.approx(loss_by_pairs(scores, LENGTHS), abs=1e-5 if dtype == torch.float32 else 1e-12)
    assert loss.dtype == dtype


@both_precisions
def test_ranking_loss_of_one_pair(dtype):
    """-log sigmoid(better - worse), in closed form, and finite however wrong the order is."""
    def loss(better, worse):
        return ranking_loss(torch.tensor([[better, worse]], dtype=dtype), torch.ones(1, 2, dtype=dtype)).item()
    assert loss(0.3, 0.3) == pytest.approx(math.log(2))  # a tie
    assert loss(1.0, -1.0) == pytest.approx(math.log(1 + math.exp(-2)))
    assert loss(-500.0, 500.0) == pytest.approx(1000)
    assert loss(500.0, -500.0) == pytest.approx(0)


def test_ranking_loss_does_not_know_the_order_of_prompts():
    """A result that depends on which row of the batch a prompt is in, or on padding columns."""
    scores, mask = ragged_scores(torch.float64)
    order = [3, 0, 4, 2, 1]
    wide = torch.nn.functional.pad(scores, (0, 3), value=9.0), torch.nn.functional.pad(mask, (0, 3))
    expected = ranking_loss(scores, mask).item()
    assert ranking_loss(scores[order], mask[order]).item() == pytest.approx(expected, abs=1e-12)
    assert ranking_loss(*wide).item() == pytest.approx(expected, abs=1e-12)
    assert ranking_loss(scores + 5.0, mask).item() == pytest.approx(expected, abs=1e-12)  # only differences count


def test_ranking_loss_without_a_pair_is_zero():
    """0 / 0 for a batch in which every prompt has one response, or a gradient into padding."""
    scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    loss = ranking_loss(scores, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 0 and not scores.grad.any()


def test_ranking_loss_raises_the_better():
    """The sign: one step down the gradient must raise the best response's score and lower the worst's."""
    scores = torch.zeros(1, 3, requires_grad=True)
    ranking_loss(scores, torch.ones(1, 3)).backward()
    best, middle, worst = scores.grad[0].tolist()
    assert best < 0 and middle == pytest.approx(0) and worst > 0


def test_pair_accuracy_counts_pairs_and_half_of_ties():
    """Ties counted as hits, padding counted as pairs, or rankings counted in place of pairs."""
    scores = torch.tensor([[3.0, 2.0, 2.0], [1.0, 5.0, 99.0], [7.0, 99.0, 99.0]])
    hits, pairs = pair_accuracy(scores, ragged_mask([3, 2, 1], 3))
    assert (hits.item(), pairs.item()) == (2.5, 4)
    assert share(torch.tensor([1.0, -1.0, 0.0, 2.0]), torch.arange(8).view(4, 2))["accuracy"] == 2.5 / 4


def test_interval_knows_that_pairs_share_texts():
    """An interval for independent pairs: with 40 texts in 400 pairs it misses the truth far more often than 1 in 20."""
    random, covered, tight = torch.Generator().manual_seed(0), 0, 0
    truth = 0.75  # of sign(a + noise - b - noise) for noise as large as the signal: 0.5 + atan(1) / pi
    for _ in range(200):
        quality = torch.randn(40, generator=random)
        score = quality + torch.randn(40, generator=random)
        ends = torch.stack([torch.randperm(40, generator=random)[:2] for _ in range(400)])
        better = (quality[ends[:, 0]] > quality[ends[:, 1]])[:, None]
        ends = torch.where(better, ends, ends.flip(1))
        result = share(score[ends[:, 0]] - score[ends[:, 1]], ends)
        low, high = result["interval"]
        p = result["accuracy"]
        covered += low <= truth <= high
        tight += abs(p - truth) < 1.96 * (p * (1 - p) / 400) ** 0.5
    assert covered >= 186 > tight  # 93 % and more, where the simple interval has fewer


def test_scores_do_not_depend_on_the_batch():
    """A score read from padding, or scores given to the wrong ranking: against one text at a time."""
    model = random_model(ScalarModel)
    rankings = [[[END, 1, 2, END], [END, 3, END]], [[END, 4, 5, 6, 7, END], [END, 8, END], [END, END]],
                [[END, 9], [END, 1]]]
    scores, mask = score_rankings(model, rankings, "cpu")
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1], [1, 1, 0]]
    for b, texts in enumerate(rankings):
        for k, text in enumerate(texts):
            assert scores[b, k].item() == pytest.approx(model(torch.tensor([text]))[0, -1].item(), abs=1e-5)


def test_encoded_rankings_are_prompt_response_end(checkpoints):
    """A text without its end, or with the responses in another order."""
    enc = data.load_tokenizer(checkpoints.vocab)
    (texts,) = reward.encode_rankings(enc, [{"prompt": "the film", "responses": [" was good", " was bad"]}], 32)
    decoded = [enc.decode(ids) for ids in texts]
    assert decoded == [f"{data.END}the film was {word}{data.END}" for word in ("good", "bad")]
    (texts,) = reward.encode_rankings(enc, [{"prompt": "the film " * 9, "responses": [" good" * 50, " bad"]}], 16)
    assert len(texts[0]) == 16 and texts[0][:8] == texts[1][:8]  # both fit the block, after the same prompt


def config(checkpoints, folder, **changes):
    """The reward model's configuration on the tiny checkpoints, for a short training."""
    return reward.Config(**{"out": str(folder), "model": checkpoints.sft, "sft": checkpoints.sft, "pairs": "",
                            "prompts": checkpoints.prompts, "train": checkpoints.rankings, "test_share": 0.25,
                            "samples": 40, "response_tokens": 8, "batch_size": 4, "epochs": 30, "lr": 1e-2,
                            "log_every": 1, "device": "cpu", "dtype": "float32", **changes})


@pytest.mark.parametrize("microbatch", [1, 3, 5])
def test_microbatches_change_no_gradient(monkeypatch, tmp_path, autocast_off, microbatch):
    """A mean per microbatch, which makes the result depend on the memory of the machine."""
    rankings = [[[i % 7 + 1] * (j + 2) + [i % 3, END] for j in range(2 + i % 3)] for i in range(8)]
    seen, model = {}, random_model(ScalarModel)
    start = {name: x.clone() for name, x in model.state_dict().items()}

    def step(optimizer, parameters, lr, grad_clip, log):
        seen[cfg.microbatch] = [parameter.grad.clone() for parameter in parameters]
        optimizer.zero_grad()
    monkeypatch.setattr(reward, "optimizer_step", step)
    for size in (8, microbatch):
        cfg = reward.Config(out=str(tmp_path / str(size)), batch_size=8, microbatch=size, log_every=9)
        model.load_state_dict(start)
        stage = Stage(cfg)
        stage.open()
        reward.train(model, rankings, cfg, stage, "cpu", autocast_off)
    for whole, split in zip(seen[8], seen[microbatch]):
        assert torch.allclose(whole, split, rtol=1e-4, atol=1e-6)


def test_texts_that_are_equal_once_cut_are_no_comparison(checkpoints, capsys):
    """A pair of which nothing is left but the same beginning: a label that contradicts itself."""
    enc = data.load_tokenizer(checkpoints.vocab)
    rows = [{"prompt": "the", "responses": ["x" * 20 + "a", "x" * 20 + "b"]},
            {"prompt": "the", "responses": ["x" * 20 + "a", "y", "x" * 20 + "b"]}]
    kept = reward.drop_equal(reward.encode_rankings(enc, rows, 16))
    assert [len(texts) for texts in kept] == [2] and "1 rankings left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no ranking is left"):
        reward.drop_equal(reward.encode_rankings(enc, rows[:1], 16))


def test_report_card_reads_the_prompt(checkpoints, monkeypatch, autocast_off):
    """A long prompt that pushes the response out of the text that is scored."""
    enc, seen = data.load_tokenizer(checkpoints.vocab), []
    monkeypatch.setattr(reward, "score_many", lambda model, texts: seen.extend(texts) or torch.arange(len(texts)) / 1.0)
    rows = [{"prompt": "word " * 40, "chosen": " good", "rejected": " bad"}]
    others = [{"prompt": "", "responses": ["a", "b"]}]
    reward.report_card(random_model(ScalarModel), enc, rows, others, {}, autocast_off)
    assert [enc.decode(ids) for ids in seen] == [enc.decode(ids[:16]) + text + data.END
                                                 for ids, text in zip(seen, (" bad", " good"))]


def test_training_learns_and_normalises(checkpoints, tmp_path, monkeypatch):
    """A model that cannot learn three words, or whose scores of the SFT model's samples are not mean 0, deviation 1."""
    normalised = []

    def watched(model, policy, prompts, cfg, enc, device, autocast):
        normalise(model, policy, prompts, cfg, enc, device, autocast)
        normalised.append((model, enc))
    monkeypatch.setattr(reward, "normalise", watched)
    rows = [{"prompt": f"the film {i}", "responses": [f" good {i % 7}", " plain", " bad bad"][:2 + i % 2]}
            for i in range(120)]
    data.write_jsonl(tmp_path / "rankings.jsonl", rows)  # 30 held out: enough for their accuracy to mean something
    cfg = config(checkpoints, tmp_path, train=str(tmp_path / "rankings.jsonl"), epochs=8)
    reward.main(cfg)
    assert json.loads((tmp_path / "report_card.json").read_text())["held-out rankings"]["accuracy"] > 0.8
    assert all(0 <= line["seconds"] < 100 for line in log_of(tmp_path))

    (_, enc), model = normalised[0], load_model(tmp_path, kind="reward")
    rows = data.read_jsonl(cfg.prompts, {"prompt": str})
    prompts = [data.encode_prompt(enc, rows[i % len(rows)]["prompt"], 32 - 8) for i in range(cfg.samples)]
    responses = sample_many(load_model(cfg.sft), prompts, 8, enc.eot_token, temperature=cfg.temperature,
                            random=torch.Generator().manual_seed(cfg.seed))
    scores = score_many(model, [prompt + response for prompt, response in zip(prompts, responses)])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4) and scores.std().item() == pytest.approx(1, abs=1e-4)


def test_no_prompt_is_on_both_sides_of_the_split(checkpoints, tmp_path, monkeypatch):
    """Held-out accuracy on prompts that were learned: two rankings of one prompt stay on one side."""
    rows = [{"prompt": f"film {i}", "responses": [f" good {k}", " bad"]} for i in range(10) for k in range(3)]
    data.write_jsonl(tmp_path / "rankings.jsonl", rows)
    sides, plain = [], reward.encode_rankings
    monkeypatch.setattr(reward, "encode_rankings", lambda enc, rows, size: sides.append(rows) or plain(enc, rows, size))
    reward.main(config(checkpoints, tmp_path / "out", train=str(tmp_path / "rankings.jsonl"), epochs=1, sft=""))
    train, test = ({row["prompt"] for row in side} for side in sides)
    assert len(train) == 8 and len(test) == 2 and not train & test
    assert sum(map(len, sides)) == 30


@pytest.mark.parametrize("flag", ["pairs", "prompts", "sft", "train", "model"])
def test_missing_input_is_noticed_before_training(checkpoints, tmp_path, monkeypatch, flag):
    """A typing error that is noticed only after the training, whose result is then lost."""
    trained = []
    monkeypatch.setattr(reward, "train", lambda *_: trained.append(True))
    with pytest.raises(UserError, match="nowhere"):
        reward.main(config(checkpoints, tmp_path, **{flag: "nowhere"}))
    assert not trained


def test_bag_of_words_learns_the_word_that_decides():
    """A baseline that is too weak to be a baseline."""
    words = "red green blue old new".split()
    rows = [{"prompt": f"{a} {b}", "responses": [" good thing", " poor thing"]} for a in words for b in words]
    score = reward.bag_of_words(rows)
    assert score("any good film") > score("any film") > score("any poor film")
    assert reward.features("a b a") == reward.features("A B a") and len(reward.features("a b a")) == 4


def test_report_card_of_a_model_that_counts_tokens(checkpoints, monkeypatch, autocast_off):
    """Scores given to the wrong text, chosen and rejected exchanged, or a text scored without its prompt."""
    sides = [(" yy", " y")] * 3 + [(" z", " zzz")]
    rows = [{"prompt": "x", "chosen": better, "rejected": worse, "domain": "film", "sample": "random", "gap": 0.1 + i}
            for i, (better, worse) in enumerate(sides)]
    monkeypatch.setattr(reward, "score_many", lambda model, texts: torch.tensor([float(len(ids)) for ids in texts]))
    card = reward.report_card(random_model(ScalarModel), data.load_tokenizer(checkpoints.vocab), rows,
                              [{"prompt": "x", "responses": [" good", " bad"]}], {"film": {"random": [0.9]}},
                              autocast_off)
    assert card["film, random"]["reward model"] == card["film, random"]["longer wins"]
    assert card["film, random"]["reward model"]["accuracy"] == 0.75 and card["film, random"]["people"] == 0.9
    assert {name: row["reward model"]["accuracy"] for name, row in card.items() if "gap" in name} \
        == {"film, gap from 0": 1, "film, gap from 1": 1, "film, gap from 2": 1, "film, gap from 3": 0}
