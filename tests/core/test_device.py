"""What a GPU can get wrong, kernels and precision: run on one where there is one (tools/gpu.sh), else on the CPU."""
import signal

import pytest
import torch

import common
import ppo
from common import UserError
from conftest import END, log_of, ppo_config, random_model
from data import pad_prompts
from model import GPT, GPTConfig, token_logprobs
from sampling import sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA = GPTConfig(11, 32, 2, 4, 16, n_kv_head=1, swiglu=True, rms_norm=True, rope=1e4, bias="none")
PROMPTS = [[END, 3, 4, 5, 6], [END], [END, 7, END, 2], [END, 1]]
TOLERANCE = {"float32": 2e-2 if DEVICE == "cuda" else 1e-4, "bfloat16": 0.15}  # the head's products are TF32 on a GPU


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
@torch.no_grad()
def test_sampler_and_padding_on_the_device(family, dtype):
    """A fused kernel that reads the padding, or the mask at the wrong place in grouped queries; a cache that it reads
    in another order; a row that goes on with another row's keys."""
    autocast = common.set_up(ppo_config(device=DEVICE, dtype=dtype))[1]
    torch.manual_seed(0)
    model = (random_model() if family == "GPT-2" else GPT(LLAMA).eval()).to(DEVICE)
    for weight in (x.data for x in model.parameters() if x.dim() == 2):
        weight.normal_(std=0.3)  # so large that every key and position matters
    tokens, pad = (x.to(DEVICE) for x in pad_prompts(PROMPTS * 16, END))
    with autocast():
        random = torch.Generator(DEVICE).manual_seed(0)
        responses, lengths, logprobs = sample(model, tokens, pad, 20, END, random=random)
        for row in range(0, 64, 5):
            n, text = int(lengths[row]), torch.cat([tokens[row, pad[row]:], responses[row]])[None]
            alone = token_logprobs(model(text), text)[0, -responses.size(1):][:n]
            assert torch.allclose(alone, logprobs[row, :n], rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("changes", [{"dtype": "float32"}, {"value": "shared"}, {"advantages": "rloo"}], ids=str)
def test_a_run_on_the_device_that_is_interrupted(checkpoints, tmp_path, monkeypatch, changes):
    """A tensor left on the CPU; a first ratio that kernels for sampling and training, TF32 or bf16 move away from 1; a
    generator or an optimizer of the GPU that does not resume."""
    keep = common.Stage.keep

    def run(name, stop=0):
        def keep_or_stop(stage, step):
            stage.received = signal.SIGTERM if step == stop else 0
            keep(stage, step)
        monkeypatch.setattr(common.Stage, "keep", keep_or_stop)
        ppo.main(ppo_config(**{"out": f"{tmp_path}/{name}", "sft": checkpoints.sft, "reward": checkpoints.reward,
                               "prompts": checkpoints.prompts, "iterations": 4, "epochs": 2, "device": DEVICE,
                               "dtype": "bfloat16", **changes}))
        return log_of(tmp_path / name)
    whole = run("whole")
    with pytest.raises(UserError, match="stopped after step 2"):
        run("parts", stop=2)
    parts = run("parts")
    assert all(line["first_ratio_error"] < 0.02 and line["sampler_difference"] < 0.05 for line in whole)
    for a, b in zip(whole, parts, strict=True):  # on a CPU the same bit for bit; a GPU's sums have no fixed order
        assert [b[name] for name in ("score", "kl", "length", "grad_norm")] == pytest.approx(
            [a[name] for name in ("score", "kl", "length", "grad_norm")], rel=0.05 * (DEVICE == "cuda"), abs=1e-6)
