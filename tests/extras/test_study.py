"""The study's arithmetic: Gao et al.'s forms recovered from their own curves, the turn, labels upside down."""
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ablations
import common
import data
import label
import ppo
import report
import reward
import study


ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("method, form, peak", [
    ("best-of-n", lambda d: d * (1.5 - 0.4 * d), 1.5 / 0.8),
    ("PPO", lambda d: d * (1.5 - 0.6 * math.log(d)) if d else 0.0, math.exp(1.5 / 0.6 - 1))])
def test_the_fit_recovers_the_form(method, form, peak):
    """The two forms mixed up, a logarithm of KL instead of its root, or the peak of the other form."""
    d = torch.linspace(0, 6, 20, dtype=torch.double)
    scores = torch.tensor([form(x) for x in d.tolist()], dtype=torch.double)
    a, b, where, residual = study.fit(d, scores, method)
    assert (a, b, where) == pytest.approx((1.5, 0.4 if method == "best-of-n" else 0.6, peak)) and residual < 1e-9
    step = torch.tensor([where - 0.01, where, where + 0.01], dtype=torch.double)
    low, top, high = (study.basis(step, method) @ torch.tensor([a, -b], dtype=torch.double)).tolist()
    assert top > low and top > high
    noisy = scores + 0.1 * torch.tensor([1, -1] * 10)
    assert study.fit(d, noisy, method)[3] == pytest.approx(0.1, abs=0.02)


def test_a_curve_that_only_climbs_has_no_peak():
    """A division by zero, or a peak where the form has a minimum."""
    d = torch.linspace(0, 2, 5, dtype=torch.double)
    assert study.fit(d, d + d * d, "best-of-n")[2] is None and study.fit(d, -d, "best-of-n")[2] is None
    assert study.fit(d, -d + torch.special.xlogy(d, d), "PPO")[2] is None


def points(*labeler, proxy=None):
    """A curve: KL 0, 1, 2, ...; the proxy climbs unless given."""
    proxy = proxy or range(len(labeler))
    return [{"kl": float(i), "labeler": x, "proxy": float(y)} for i, (x, y) in enumerate(zip(labeler, proxy))]


def test_the_turn():
    """A last point called a turn, or a turn where the proxy falls too, which is a failed run and no hacking."""
    assert study.turn(points(0.0, 0.5, 0.2)) == (points(0.0, 0.5, 0.2)[1], True)
    assert study.turn(points(0.0, 0.5, 0.6)) == (points(0.0, 0.5, 0.6)[2], False)
    assert not study.turn(points(0.0, 0.5, 0.45))[1] and not study.turn(points(0.0, 0.5, 0.2, proxy=[0, 2, 1]))[1]


def test_gains_are_over_the_first_point_and_the_root_is_never_of_less_than_0():
    """NaN from an estimate of KL just below 0, or a curve that does not begin at 0, where the forms do."""
    curve = [{"kl": -1e-3, "judge": 0.5}, {"kl": 4.0, "judge": 1.5}]
    assert study.root_kl(curve).tolist() == [0, 2] and study.gains(curve, "judge").tolist() == [0, 1]


def result(rates):
    """results.json of policies: {name: (KL, win rate)}."""
    return {"config": {"seed": 1}, "policies": {
        name: {"kl": kl, "win_rate_judge": rate, "win_rate_judge_interval": [rate - 0.1, rate + 0.1]}
        for name, (kl, rate) in rates.items()}}


def test_equal_kl_is_interpolated_and_never_extrapolated():
    """DPO compared with the nearest PPO, or with a straight line beyond the last one."""
    lines = study.equal_kl([result({"sft": (0, 0.5), "ppo": (2.0, 0.6), "ppo-kl6": (6.0, 0.8), "ppo-kl9": (6.0, 0.8),
                                    "dpo": (3.0, 0.7), "dpo-beta1": (1.0, 0.55), "dpo-beta0.05": (6.5, 0.9)})])
    assert lines[2:] == ["| 1 | dpo-beta1 | 1.0 | 0.550 (0.450 to 0.650) | 0.550 |",
                         "| 1 | dpo | 3.0 | 0.700 (0.600 to 0.800) | 0.650 |",
                         "| 1 | dpo-beta0.05 | 6.5 | 0.900 (0.800 to 1.000) | - (PPO ends at 6.0) |"]


def rank(checkpoints, folder, **flags):
    """The rankings of label.py without noise, on samples made of the tests' rankings: {id: responses}."""
    rows = [{**row, "id": str(i)} for i, row in enumerate(data.read_jsonl(
        checkpoints.rankings, {"prompt": str, "responses": list}))]
    data.write_jsonl(folder / "samples.jsonl", rows)
    label.rank(label.RankConfig(labeler=checkpoints.reward, samples=str(folder / "samples.jsonl"), device="cpu",
                                out=str(folder / str(flags)), noise=0.0, **flags))
    made = data.read_jsonl(folder / str(flags) / "rankings.jsonl", {"id": str, "responses": list})
    return {row["id"]: row["responses"] for row in made}


def test_flipped_rankings_are_upside_down(checkpoints, tmp_path):
    """--flip that shuffles instead of reversing, flips all or none, or changes the rankings that it leaves alone."""
    plain, all_of_them, some = (rank(checkpoints, tmp_path, **flags) for flags in ({}, {"flip": 1.0}, {"flip": 0.5}))
    assert all(all_of_them[name] == plain[name][::-1] for name in plain)
    flipped = [name for name in plain if some[name] != plain[name]]
    assert all(some[name] == plain[name][::-1] for name in flipped) and 0 < len(flipped) < len(plain)


def configs_of(script, tmp_path):
    """{output folder: the configuration of its command} of all commands of a script on top of a finished run, each
    checked: flags that the command takes, and models that were made before it."""
    out, record, stub = tmp_path / "the output", tmp_path / "record", tmp_path / "python"
    stub.write_text(f'''#!/bin/sh
[ "$1" != -c ] || exec "{sys.executable}" "$@"
printf "%s\\n" "$@" END >> "{record}"
''')
    stub.chmod(0o755)
    (out / "evaluate").mkdir(parents=True)
    (out / "evaluate" / "done.json").touch()
    result = subprocess.run(["bash", str(ROOT / script), "smoke"], capture_output=True, text=True, timeout=100,
                            env={**os.environ, "PYTHON": str(stub), "OUT": str(out), "DATA": str(tmp_path),
                                 "SEED": "7"})
    assert result.returncode == 0, result.stderr
    made = {str(out / name) for name in ("labeler", "judge", "reward", "sft", "ppo", "dpo", "samples", "label")}
    found = {}
    for command in record.read_text().split("END\n")[:-1]:
        name, *flags = command.split("\n")[:-1]
        module = importlib.import_module(name.removesuffix(".py"))
        if name == "label.py":
            _, Config, *presets = module.STEPS[flags.pop(0)]
        else:
            Config, presets = module.Config, [module.PRESETS]
        cfg = common.load_config(Config, dict(*presets), flags)
        for flag in ("sft", "model", "reward", "labeler", "judge", "policies"):
            missing = set(filter(None, str(getattr(cfg, flag, "")).split(","))) - made
            assert not missing, f"{name} --{flag}: {missing} not made yet"
        assert cfg.out not in made and cfg.restart
        made.add(cfg.out)
        found[cfg.out] = cfg
    return found


def test_every_command_of_the_study_is_one_that_its_script_takes(tmp_path):
    """A flag that was renamed, a policy measured before it is trained, or one that study.py will not find: all of which
    would show only after half an hour."""
    found = configs_of("study.sh", tmp_path)
    seeds = {Path(out).name: (cfg.seed, getattr(cfg, "split_seed", -1)) for out, cfg in found.items()}
    assert set(study.NAMES) <= set(seeds)
    assert seeds.pop("reward-250-2") == (72, 7) and seeds.pop("reward-250-3") == (73, 7)
    assert {seed for seed, _ in seeds.values()} == {7}
    assert "no finished run" in subprocess.run(
        ["bash", str(ROOT / "study.sh"), "smoke"], capture_output=True, text=True,
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "nothing")}).stderr


def test_every_command_of_the_ablations_changes_one_thing(tmp_path):
    """A flag that was renamed, a run that the table does not show, or one that differs from the default in more than it
    says."""
    found = {Path(out).name: cfg for out, cfg in configs_of("ablations.sh", tmp_path).items()}
    runs = {name: cfg for name, cfg in found.items() if isinstance(cfg, ppo.Config)}
    shown = {name for _, names in ablations.DETAILS.values() for name in names}
    assert shown - set(runs) == {"free-all", "ppo-kl3", "ppo-kl12"} and set(runs) <= shown
    assert {Path(path).name for path in found["evaluate"].policies.split(",")} == set(runs) | {"ppo"}
    same = {"out", "snapshots", "kl_ceiling", "restart", "sft", "reward", "prompts", "seed"}
    plain = vars(ppo.Config(**ppo.PRESETS["smoke"]))
    for name, cfg in runs.items():
        changed = {flag for flag, value in vars(cfg).items() if str(value) != str(plain[flag])} - same
        own_reward = Path(cfg.reward).name != "reward"
        assert len(changed) + own_reward == (2 if name == "value-zero" else 1), (name, changed)
    reads = {K: found[f"reward-K{K}"] for K in (2, 4, 9)}  # the same number of responses, in all and in a step
    assert all(K * cfg.limit == 2880 and cfg.batch_size == 64 // K for K, cfg in reads.items())


def test_the_table_of_ablations(tmp_path):
    """Differences between seeds instead of within one, or a spread that is not the least and the largest."""
    for seed, (default, change) in enumerate([(0.90, 0.80), (0.94, 0.90)]):
        (tmp_path / str(seed) / "evaluate").mkdir(parents=True)
        row = {"kl": 5.0, "length": 10.0, "proxy": 2.0, "labeler": 1.0}
        (tmp_path / str(seed) / "evaluate" / "results.json").write_text(json.dumps({
            "config": {"seed": seed, "count": 100}, "hardware": "x", "date": "y", "torch": "z", "policies": {
                name: {**row, "win_rate_judge": wins, "length_controlled": wins, "win_rate_judge_interval": [0, wins]}
                for name, wins in (("ppo", default), ("lam-1", change))}}))
        (tmp_path / str(seed) / "evaluate" / "done.json").write_text('{"seconds": 1800}')
    ablations.main(ablations.Config(",".join(str(tmp_path / str(seed)) for seed in range(2)), str(tmp_path)))
    text = (tmp_path / "ablations.md").read_text()
    assert "| 1 | 0.850 (0.800 to 0.900) | -0.070 (-0.100 to -0.040) | 0.850 (0.800 to 0.900) | 5.0" in text
    assert "2 stages took 1.0 hours" in text and "## Clip" not in text
    with pytest.raises(common.UserError, match="ablations.sh"):
        ablations.main(ablations.Config(str(tmp_path)))


def test_agreement_with_flips():
    """order_kept that forgets the flips: 25 % upside down is 75 % of the pairs in order."""
    margins = torch.tensor([0.5, 1.0, 2.0])
    assert label.order_kept(margins, 0.0, 0.25) == (0.75, pytest.approx(0.75**2 + 0.25**2))
    one, _ = label.order_kept(margins, 0.7)
    assert label.order_kept(margins, 0.7, 0.5)[0] == pytest.approx(0.5)
    assert label.order_kept(margins, 0.7, 0.0)[0] == one


def test_an_ensemble_shares_its_data(checkpoints, tmp_path, monkeypatch):
    """Members that learn from different comparisons, so that three of them know more than one."""
    seeds = []

    def split(rows, share, seed):
        seeds.append(seed)
        raise common.UserError("far enough")
    monkeypatch.setattr(reward, "split_by_prompt", split)
    for flags in ({"seed": 3}, {"seed": 31, "split_seed": 3}, {"seed": 5, "split_seed": 0}):
        with pytest.raises(common.UserError, match="far enough"):
            reward.main(reward.Config(out=str(tmp_path / "out"), model=checkpoints.sft, train=checkpoints.rankings,
                                      pairs="", sft="", device="cpu", **flags))
    assert seeds == [3, 3, 0]


def same_words(text, other):
    """Whether two texts are the same, numbers up to 0.002 (another version of PyTorch may round otherwise)."""
    def close(a, b):
        try:
            return a == b or abs(float(a.strip("()")) - float(b.strip("()"))) < 0.002
        except ValueError:
            return False
    return len(text.split()) == len(other.split()) and all(map(close, text.split(), other.split()))


def test_committed_figures_and_tables_are_drawn_from_committed_files(tmp_path):
    """A figure in results/ that needs a checkpoint nobody has, or a table that belongs to other numbers."""
    seeds = sorted((ROOT / "results" / "tiny").glob("seed*"))
    assert len(seeds) == 3
    for seed in seeds:
        shutil.copytree(seed, tmp_path / seed.name)
        for drawn in (tmp_path / seed.name).glob("*.png"):
            drawn.unlink()
    report.main(report.Config(",".join(str(tmp_path / seed.name) for seed in seeds)))
    study.main(study.Config(",".join(str(tmp_path / seed.name / "study") for seed in seeds), str(tmp_path / "study")))
    for seed in seeds:
        assert same_words((tmp_path / seed.name / "report.md").read_text(), (seed / "report.md").read_text())
        made, kept = ({path.name for path in folder.glob("*.png")} for folder in (tmp_path / seed.name, seed))
        assert made == kept
    for seed in seeds:  # of labelers.sh
        report.main(report.Config(str(tmp_path / seed.name / "labelers")))
        made, kept = (folder / "labelers/report.md" for folder in (tmp_path / seed.name, seed))
        assert "## Who ranked" in made.read_text() and same_words(made.read_text(), kept.read_text())
    assert same_words((tmp_path / "study" / "study.md").read_text(), (ROOT / "results/study/study.md").read_text())
    ablations.main(ablations.Config(",".join(str(seed / "ablations") for seed in seeds), str(tmp_path)))
    assert (tmp_path / "ablations.md").read_text() == (ROOT / "results" / "ablations.md").read_text()
    for name in ("frontier.png", "over_optimisation.png"):
        assert (tmp_path / "study" / name).is_file() and (ROOT / "results/study" / name).is_file()
