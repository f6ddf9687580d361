"""study/: its mathematics, the commands of its scripts, and that the figures and tables of results/ are drawn from there."""
import importlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import ppo
from study import ablations, card, collect, frontier, markdown

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("method, form, peak", [
    ("best-of-n", lambda d: d * (1.5 - 0.4 * d), 1.5 / 0.8),
    ("PPO", lambda d: d * (1.5 - 0.6 * math.log(d)) if d else 0.0, math.exp(1.5 / 0.6 - 1))])
def test_the_fit_recovers_the_form(method, form, peak):
    """The two forms mixed up, a logarithm of KL instead of its root, the peak of the other form, or of one that climbs."""
    d = torch.linspace(0, 6, 20, dtype=torch.double)
    scores = torch.tensor([form(x) for x in d.tolist()], dtype=torch.double)
    a, b, where, residual = frontier.fit(d, scores, method)
    assert (a, b, where) == pytest.approx((1.5, 0.4 if method == "best-of-n" else 0.6, peak)) and residual < 1e-9
    step = torch.tensor([where - 0.01, where, where + 0.01], dtype=torch.double)
    low, top, high = (frontier.basis(step, method) @ torch.tensor([a, -b], dtype=torch.double)).tolist()
    assert top > low and top > high
    assert frontier.fit(d, scores + 0.1 * torch.tensor([1, -1] * 10), method)[3] == pytest.approx(0.1, abs=0.02)
    assert frontier.fit(d, frontier.basis(d, method).sum(1), method)[2] is None  # b < 0: a minimum, if anything


def test_the_turn():
    """A last point called a turn, or a turn where the proxy falls too, which is a failed run and no over-optimisation."""
    def turn(labeler, proxy=(0, 1, 2)):
        best, turned = frontier.turn([{"kl": i, "labeler": x, "proxy": y} for i, (x, y) in enumerate(zip(labeler, proxy))])
        return best["kl"], turned
    assert turn([0.0, 0.5, 0.2]) == (1, True) and turn([0.0, 0.5, 0.6]) == (2, False)
    assert not turn([0.0, 0.5, 0.45])[1] and not turn([0.0, 0.5, 0.2], proxy=(0, 2, 1))[1]


def test_gains_are_over_the_first_point_and_the_root_is_never_of_less_than_0():
    """NaN from an estimate of KL just below 0, or a curve that does not begin at 0, where the forms do."""
    curve = [{"kl": -1e-3, "judge": 0.5}, {"kl": 4.0, "judge": 1.5}]
    assert frontier.root_kl(curve).tolist() == [0, 2] and frontier.gains(curve, "judge").tolist() == [0, 1]


def test_equal_kl_is_interpolated_and_never_extrapolated():
    """DPO compared with the nearest PPO, or with a straight line beyond the last one."""
    rates = {"sft": (0, 0.5), "ppo": (2.0, 0.6), "ppo-kl6": (6.0, 0.8), "ppo-kl9": (6.0, 0.8), "dpo": (3.0, 0.7),
             "dpo-beta1": (1.0, 0.55), "dpo-beta0.05": (6.5, 0.9)}
    rows = {name: {"kl": kl, "win_rate_judge": rate} for name, (kl, rate) in rates.items()}
    assert list(frontier.equal_kl({"policies": rows})) == [
        ["dpo-beta1", "1.0", "0.550", "0.550"], ["dpo", "3.0", "0.700", "0.650"],
        ["dpo-beta0.05", "6.5", "0.900", "- (PPO ends at 6.0)"]]


def test_the_table_of_ablations():
    """Differences between seeds instead of within one, or a spread that is not the lowest to the highest."""
    seeds = [{name: {"win_rate_judge": rate} for name, rate in rates.items()}
             for rates in ({"ppo": 0.90, "lam-1": 0.80}, {"ppo": 0.94, "lam-1": 0.90}, {"ppo": 1.0})]
    assert ablations.row("lam-1", "1", seeds)[:3] == ["1", "-0.070 (-0.100 to -0.040)", "0.850 (0.800 to 0.900)"]


def test_bag_of_words_against_its_optimum():
    """The penalty forgotten or halved, a word counted twice, or long texts that count for more than short ones."""
    linear = card.bag_of_words([{"prompt": "", "responses": ["good", "bad"]}], l2=0.1)
    w = linear("Good")  # by symmetry the other word has -w, and -log sigmoid(2 w) + 0.2 w^2 is least
    assert 0.4 * w == pytest.approx(2 / (1 + math.exp(2 * w)), abs=1e-3)
    assert linear("bad") == pytest.approx(-w, abs=1e-6) and linear("unknown") == 0
    assert linear("good good good") == pytest.approx(w / math.sqrt(2))  # of two features: good, and good good


def test_the_card_of_a_few_pairs(tmp_path):
    """A baseline fitted to more rankings than the model, pairs of one domain in another, accuracy of the wrong side."""
    rows = [{"prompt": "", "responses": ["good", "bad"]}] * 2 + [{"prompt": "", "responses": ["bad", "good"]}] * 9
    pairs = [{"prompt": "", "chosen": chosen, "rejected": rejected, "domain": domain, "sample": "random"} for
             domain, chosen, rejected in (("film", "good", "bad bad"), ("news", "bad", "good"), ("news", "good day", "bad"))]
    for name, lines in (("train", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text('{"agreement": {"film": {"random": [0.9, 0.8]}}}')
    found = {"film, random": {}, "news, random": {}}
    card.add_baselines(found, {"train": f"{tmp_path}/train.jsonl", "test": "x", "limit": 2, "pairs": f"{tmp_path}/pairs.jsonl"})
    shares = {group: [row[name]["accuracy"] for name in ("bag of words", "longer wins")] for group, row in found.items()}
    assert shares == {"film, random": [1.0, 0.0], "news, random": [0.5, 0.5]}
    assert found["film, random"]["people"] == 0.9 and "people" not in found["news, random"]


def test_text_of_a_model_is_escaped():
    """A sample that ends its table, or puts a link, an image or markup into report.md."""
    text = markdown.escape("a | b\n![x](http://y) <img src=z> `c` *d* # &amp; \x1b[0m\u202e")
    assert not re.search(r"[|\n\[\]<>`*\x1b\u202e]|&(?!#\d+;)", text)


def commands_of(script, out):
    """{name: configuration} of a script's commands, each checked: flags that it takes, and models made before it."""
    made = {str(out / name) for name in "sft reward labeler judge ppo dpo evaluate samples label label-ann".split()}
    for folder in [*map(Path, made), out / "labelers/label-vader"]:
        folder.mkdir(parents=True)
        (folder / "rankings.jsonl").write_text("{}\n" * 20)
    (out / "evaluate/done.json").touch()
    (out / "made").write_text(f"seed 7, smoke, {out}\n")
    (out / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@" END >> "{out}/record"\n')
    (out / "python").chmod(0o755)
    run = ["bash", str(ROOT / "study" / script), "smoke"]
    variables = {**os.environ, "PYTHON": f"{out}/python", "OUT": str(out), "DATA": str(out), "SEED": "7"}
    subprocess.run(run, check=True, timeout=100, env=variables, stdout=subprocess.DEVNULL)
    assert subprocess.run(run, env={**variables, "SEED": "8"}, stderr=subprocess.DEVNULL).returncode == 2  # another run's
    found = {}
    for command in (out / "record").read_text().split("END\n")[:-1]:
        name, *flags = command.removeprefix("-m\n").splitlines()
        module = importlib.import_module(name.removesuffix(".py"))
        Config, presets = module.STEPS[flags.pop(0)][1:] if hasattr(module, "STEPS") else (
            module.Config, getattr(module, "PRESETS", {}))
        cfg = common.load_config(Config, presets, flags, ("source", "target") if module is collect else ("folder",))
        models = [getattr(cfg, flag, "") for flag in ("sft", "model", "reward", "labeler", "judge", "policies")]
        assert set(",".join(models).split(",")) <= made | {"", "vader"}, f"{command}: not made yet"
        made.add(getattr(cfg, "out", ""))
        found[Path(getattr(cfg, "out", name)).name] = cfg
    return found


def test_the_commands_of_the_frontier_and_of_the_labelers(tmp_path):
    """A flag that was renamed, or a policy measured before it is trained: it would show only after half an hour."""
    found = commands_of("frontier.sh", tmp_path / "a b")
    seeds = {name: (cfg.seed, getattr(cfg, "split_seed", -1)) for name, cfg in found.items() if hasattr(cfg, "seed")}
    assert {f"over-{size}" for size in frontier.SIZES} | {"frontier", "labels-exact", "labels-flipped"} <= seeds.keys()
    assert seeds.pop("reward-250-2") == (72, 7) and seeds.pop("reward-250-3") == (73, 7)
    assert {seed for seed, _ in seeds.values()} == {7} and "study.frontier" in found
    policies = commands_of("labelers.sh", tmp_path / "c")["evaluate"].policies
    assert [Path(path).name for path in policies.split(",")] == ["ppo", "ppo-vader", "ppo-ann"]


def test_every_command_of_the_ablations_changes_one_thing(tmp_path):
    """A run that the table does not show, or one that differs from the default in more than it says."""
    found = commands_of("ablations.sh", tmp_path)
    runs = {name: cfg for name, cfg in found.items() if isinstance(cfg, ppo.Config)}
    shown = set(re.findall(r"(?m)^@(\S+)", markdown.template("ablations.md")))
    assert shown - set(runs) == {"free-all", "ppo-kl3", "ppo-kl12"} and set(runs) <= shown
    assert {Path(path).name for path in found["evaluate"].policies.split(",")} == set(runs) | {"ppo"}
    same = {"out", "snapshots", "kl_ceiling", "overwrite", "sft", "reward", "prompts", "seed"}
    plain = vars(ppo.Config(**ppo.PRESETS["smoke"]))
    changes = {name: {flag for flag, value in vars(cfg).items() if str(value) != str(plain[flag])} - same
               for name, cfg in runs.items()}
    assert changes.pop("value-none") == {"value", "lam"}  # with lam below 1 the score would be discounted
    assert changes.pop("reinforce") == {"value", "lam", "whiten_advantages"}
    assert all(len(changed) + (Path(runs[name].reward).name != "reward") == 1 for name, changed in changes.items())
    reads = {K: found[f"reward-K{K}"] for K in (2, 4, 9)}  # the same number of responses, in all and in a step
    assert all(K * cfg.limit == 2880 and cfg.batch_size == 64 // K for K, cfg in reads.items())


def same_words(text, other):
    """Whether two texts are the same, numbers up to 0.002 (another version of PyTorch may round otherwise)."""
    numbers = re.compile(r"-?\d+\.\d+")
    return numbers.sub("", text) == numbers.sub("", other) and all(
        abs(float(a) - float(b)) < 0.002 for a, b in zip(numbers.findall(text), numbers.findall(other)))


def test_committed_figures_and_tables_are_drawn_from_committed_files(tmp_path):
    """A figure in results/ that needs a checkpoint nobody has, or a table that belongs to other numbers."""
    shutil.copytree(ROOT / "results", tmp_path, dirs_exist_ok=True)
    drawn = [path for path in (tmp_path / "README.md", *tmp_path.glob("tiny/*/*"), *tmp_path.glob("study/*"),
                               tmp_path / "ablations/ablations.md") if path.suffix in (".png", ".md")]
    for path in drawn:
        path.unlink()
    subprocess.run([sys.executable, "-m", "study.report", *map(str, sorted(tmp_path.glob("tiny/seed*")))], check=True,
                   cwd=ROOT, env={**os.environ, "MPLBACKEND": "module://that.of_a_notebook"})  # not installed here
    frontier.main(frontier.Config(str(tmp_path / "study")))
    ablations.main(ablations.Config(str(tmp_path / "ablations")))
    assert len(drawn) == 26
    for path in drawn:
        kept = ROOT / "results" / path.relative_to(tmp_path)
        assert path.is_file() and (path.suffix == ".png" or same_words(path.read_text(), kept.read_text())), path


def test_what_collect_keeps(tmp_path):
    """A seed lost when another is added, or kept twice when it is collected again; or paths that only this machine has."""
    folder = tmp_path / "x/study/ppo"
    folder.mkdir(parents=True)
    content = json.dumps({"stage": {"out": str(folder)}, "outputs": {}, "policies": {"kl": 1 / 3}, "samples": 1})
    for name in ("config", "done", "results"):
        (folder / f"{name}.json").write_text(content)
    (folder / "log.jsonl").write_text('{"kl": 0.123456789, "sample": "text"}\n')
    for seed in (1, 2, 1):
        collect.main(collect.Config(f"{tmp_path}/x/study", f"{tmp_path}/kept", seed))
    results, lines = (collect.read(tmp_path / "kept" / name, 9) for name in ("results.json", "logs.jsonl"))
    assert results.keys() == {"1", "2"} and "samples" not in results["1"]["ppo"]
    assert [line["seed"] for line in lines] == [2] * 3 + [1] * 3 and "outputs" not in lines[2]["done"]
    assert lines[:2] == [{"seed": 2, "run": "ppo", "config": {"out": "out/tiny/study/ppo"}},
                         {"seed": 2, "run": "ppo", "kl": 0.12346}]
