"""Samples and rankings by a reward model: seeds, what is sampled again, order, noise, calibration."""
import json
import math

import pytest
import torch

import label
from common import UserError, generator, save_checkpoint
from data import load_tokenizer, write_jsonl
from label import RankConfig, SampleConfig
from model import load_model
from reward import score_many
from stages import make_inputs

PROMPTS = ["The film", "A plot", "Rarely", "This is", "One of", "My dog"]
SAMPLES = [{"id": prompt[:3], "prompt": prompt, "responses": [f" {prompt} {c}." for c in "abcd"]} for prompt in PROMPTS]
RATINGS = {"the film is good": 2.0, "the plot is bad": -1.0, "a very good dog": 0.5, "bad bad film": -3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model of readable letters that draws EOS now and then, a reward model, prompts, samples, ratings."""
    folder = make_inputs(tmp_path_factory.mktemp("label"))
    lm, logits = load_model(folder / "sft"), torch.full((257,), -20.0)
    logits[[ord(c) for c in " abcdefgh"] + [256]] = 0.0  # the same for every prefix: the final norm ignores its input
    lm.trunk.norm.weight.data.zero_()
    lm.trunk.norm.bias.data.copy_(torch.eye(16)[0])
    lm.trunk.token_embedding.weight.data[:257, 0] = logits
    save_checkpoint(folder / "lm", lm, RankConfig(), folder / "vocab.tiktoken")
    write_jsonl(folder / "samples.jsonl", SAMPLES)
    write_jsonl(folder / "ratings.jsonl", [
        {"prompt": "", "responses": list(RATINGS), "means": list(RATINGS.values()), "domain": "movie"},
        {"prompt": "", "responses": ["not a film", "the news"], "means": [4.0, -4.0], "domain": "nyt"}])
    (folder / "summary.json").write_text('{"temperature": 0.5, "agreement": {"movie": {"random": [0.9, 0.8]}}}')
    return folder


def made(step, folder, out, **flags):
    """label.sample or label.rank, whose flags that are texts name files in the folder: rows written, and done.json."""
    Config, flags = (SampleConfig, {"model": "lm", "prompts": "samples.jsonl", "response_tokens": 30} | flags) if (
        step is label.sample) else (RankConfig, {"labeler": "reward", "samples": "samples.jsonl"} | flags)
    flags = {name: str(folder / x) if isinstance(x, str) else x for name, x in flags.items()}
    step(Config(**flags, out=str(out), device="cpu"))
    rows = [json.loads(line) for path in out.glob("*.jsonl") for line in path.read_text().splitlines()]
    return rows, json.loads((out / "done.json").read_text())


def score(folder, rows):
    """The reward model's score of each response of some rows."""
    model, enc = load_model(folder / "reward", kind="reward"), load_tokenizer(folder)
    return score_many(model, [[256, *enc.encode_ordinary(row["prompt"] + text), 256] for row in rows
                              for text in row["responses"]])


def test_samples_depend_on_the_seed_alone(folder, tmp_path):
    """A global generator behind the draws; responses to one prompt that are not different texts."""
    first, again = (made(label.sample, folder, tmp_path / name)[0] for name in "ab")
    assert first == again != made(label.sample, folder, tmp_path / "c", seed=2)[0]
    assert [row["prompt"] for row in first] == PROMPTS and len({row["id"] for row in first}) == len(first)
    assert all(2 <= len(set(row["responses"])) == len(row["responses"]) <= 4 for row in first)


def test_truncated_empty_and_duplicate_responses_are_sampled_again_and_counted(folder, tmp_path):
    """reward.py would read an EOS behind a truncated response. With two tokens at most, single letters can be kept."""
    rows, done = made(label.sample, folder, tmp_path / "a", response_tokens=2)
    assert all(len(text) == 1 and text != " " for row in rows for text in row["responses"])
    assert done["truncated"] > done["empty"] > 0 < done["prompts_below_K"] and len(rows) + done["prompts_dropped"] == 6
    rows, _ = made(label.sample, folder, tmp_path / "b", response_tokens=2, keep_truncated=True, prompts_limit=2)
    assert 2 in {len(text) for row in rows for text in row["responses"]} and len(rows) == 2


def test_a_ranking_is_the_order_of_the_scores_but_for_calibrated_noise(folder, tmp_path):
    """Rankings worst first; noise that depends on the place in the file, or is calibrated on other domains' ratings."""
    rows, _ = made(label.rank, folder, tmp_path / "plain", noise=0.0)
    assert all(scores.tolist() == sorted(scores.tolist(), reverse=True) for scores in score(folder, rows).split(4))
    assert [(row["id"], sorted(row["responses"])) for row in rows] == [(row["id"], row["responses"]) for row in SAMPLES]
    noisy, done = made(label.rank, folder, tmp_path / "a", noise=5.0, calibrate="ratings.jsonl")
    write_jsonl(folder / "half.jsonl", SAMPLES[3:])
    half, _ = made(label.rank, folder, tmp_path / "b", noise=5.0, calibrate="ratings.jsonl", samples="half.jsonl")
    assert half == noisy[3:] and noisy != rows
    spread = score(folder, [{"prompt": "", "responses": list(RATINGS)}]).std()
    expected = 5 * 0.5 * spread / torch.tensor(list(RATINGS.values())).std()
    assert done["temperature"] == pytest.approx(expected.item(), abs=1e-4)


def test_noisy_pairs_are_bradley_terry_and_how_many_stay_in_order():
    """Noise whose pairs are not sigmoid(difference / temperature); a wrong share of pairs that it keeps in order."""
    scores, temperature, random, draws = torch.tensor([1.0, 0.4, -0.3]), 0.7, generator(1), 10_000
    place = torch.tensor([label.noisy_order(scores, temperature, random) for _ in range(draws)]).argsort(1)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        expected = torch.sigmoid((scores[i] - scores[j]) / temperature).item()
        share = (place[:, i] < place[:, j]).double().mean().item()
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / draws)
    assert label.noisy_order(scores, 0.0, random) == [0, 1, 2]
    assert label.order_kept(torch.tensor([math.log(3)]), 1.0) == pytest.approx((0.75, 0.75**2 + 0.25**2))
    assert label.order_kept(torch.tensor([math.log(3)]), 1.0, flip=1.0)[0] == pytest.approx(0.25)
    assert label.order_kept(torch.tensor([-math.log(3)]), 0.0) == (1.0, 1.0)


@pytest.mark.parametrize("step, flags, message", [
    (label.sample, {"K": 1}, "--K is 1"), (label.sample, {"model": "reward"}, "expected lm"),
    (label.rank, {"labeler": "lm", "noise": 0.0}, "expected reward")])
def test_errors_write_nothing(folder, tmp_path, step, flags, message):
    """A folder that looks like a run after flags that make no sense."""
    with pytest.raises(UserError, match=message):
        made(step, folder, tmp_path / "out", **flags)
    assert not (tmp_path / "out").exists()
