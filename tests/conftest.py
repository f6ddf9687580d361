"""What the tests share: small random models, a small vocabulary, and checkpoint folders made of them."""
import json
from types import SimpleNamespace

import pytest
import torch

import common
import ppo
from model import GPT, GPTConfig, ScalarModel
from prepare.reviews import train_bpe
from stages import SENTENCES, make_inputs

torch.set_num_threads(1)  # for matrices this small, threads only wait for each other

END = 0  # EOS, and padding too, in the tests that need no text
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def close(dtype):
    """Tolerance of a comparison in this precision, for pytest.approx."""
    return {"abs": 1e-5} if dtype == torch.float32 else {"abs": 1e-12}


def random_model(kind=GPT, seed=0, **config):
    """A model in eval mode with weights so large that every token, position and head matters to its output."""
    torch.manual_seed(seed)
    model = kind(GPTConfig(**{"vocab_size": 11, "block_size": 32, "n_layer": 2, "n_head": 2, "width": 16, **config}))
    for weight in (parameter.data for parameter in model.parameters()):
        weight.normal_(std=0.3) if weight.dim() >= 2 else weight.add_(torch.randn_like(weight) * 0.1)
    # EOS somewhat likelier, so that responses end at many lengths.
    model.trunk.norm.bias.data.add_(2 * model.trunk.token_embedding.weight.data[END])
    return model.eval()


def pytest_terminal_summary(terminalreporter):
    """Say it loudly when tests did not run for want of a package or a browser: a skip is one letter among hundreds."""
    for report in terminalreporter.stats.get("skipped", []):
        if "not installed" in (reason := str(report.longrepr)) or "could not import" in reason:
            terminalreporter.write_line(f"WARNING: {reason} (pip install -r tests/requirements.txt)", red=True)


def ragged_mask(lengths, size):
    """(B, size) with 1.0 in the first lengths[b] places, spelled out."""
    return torch.tensor([[1.0 if t < n else 0.0 for t in range(size)] for n in lengths])


def ppo_config(**changes):
    """PPO's configuration on a CPU in float32, for rollouts of a few short responses."""
    return ppo.Config(**{"device": "cpu", "dtype": "float32", "response_tokens": 8, "temperature": 0.7, "episodes": 8,
                         "microbatch": 3, "missing_eos_score": float("nan"), **changes})


def rollout_of(policy, ref, reward, value, prompts, cfg, seed=0, kl_coef=0.1):
    """ppo.collect with EOS 0: (rollout, metrics)."""
    enc = SimpleNamespace(end=END)
    return ppo.collect(policy, ref, [reward], value, prompts, kl_coef, cfg, enc, common.set_up(cfg)[1],
                       torch.Generator().manual_seed(seed))


@pytest.fixture
def four_models():
    """policy, ref, reward and value, all different."""
    return tuple(random_model(kind, seed) for seed, kind in enumerate((GPT, GPT, ScalarModel, ScalarModel), start=1))


@pytest.fixture
def autocast_off():
    return common.set_up(ppo_config())[1]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Paths of a whole tiny set-up: folder, and in it vocab, sft, reward (checkpoints), prompts, rankings and more."""
    folder = make_inputs(tmp_path_factory.mktemp("checkpoints"), train_bpe(SENTENCES * 2, 270))
    paths = {name: f"{folder}/{name}" for name in ("sft", "reward", "prompts.jsonl", "rankings.jsonl")}
    return SimpleNamespace(folder=folder, vocab=folder / "vocab.tiktoken", **{
        name.removesuffix(".jsonl"): path for name, path in paths.items()})


def log_of(folder):
    """The lines of a stage's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
