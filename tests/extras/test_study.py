"""study/: its mathematics, the commands of its scripts, and that results/ holds what its figures and tables need."""
import importlib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import common
import dpo
import ppo
from data import read_rows, write_jsonl
from prepare.reviews import Sentence
from study import ablations, card, collect, frontier, groups, markdown, over_optimisation, report, reward_models

ROOT = Path(__file__).parents[2]


def test_the_turn():
    """A last point called a turn, or one where the proxy falls too: a failed run. Or NaN from a KL just below 0."""
    def turn(labeler, proxy=(0, 1, 2)):
        points = [{"kl": i, "labeler": x, "proxy": y} for i, (x, y) in enumerate(zip(labeler, proxy))]
        return over_optimisation.turn(points)[0]["kl"], over_optimisation.turn(points)[1]
    assert turn([0.0, 0.5, 0.2]) == (1, True) and turn([0.0, 0.5, 0.6]) == (2, False)
    assert not turn([0.0, 0.5, 0.45])[1] and not turn([0.0, 0.5, 0.2], proxy=(0, 2, 1))[1]
    d, gains = over_optimisation.series([{"kl": -1e-3, "judge": 0.5}, {"kl": 4.0, "judge": 1.5}], "judge")
    assert d.tolist() == [0, 2] and gains.tolist() == [0, 1]


RATES = {"sft": (0.0, 0.5), "ppo": (2.5, 0.9), "ppo-kl3": (2.0, 0.6), "ppo-kl6": (6.0, 0.8), "ppo-kl9": (6.0, 0.8),
         "rloo-kl6": (4.0, 0.75), "rloo-group2": (5.0, 0.74), "reinforce": (4.0, 0.7), "dpo": (3.0, 0.7),
         "dpo-beta1": (1.0, 0.57), "dpo-beta0.05": (6.5, 0.9)}  # KL and win rate


def results_of(seed, **rates):
    """What evaluate.py finds of some policies, without what the frontier does not read."""
    rows = {name: {field: rate for field, _ in markdown.COLUMNS.values()} | {
        "kl": kl, "judge": 10 * rate, "prompts": 9, "win_rate_judge_interval": [rate - 0.1, rate + 0.1]}
        for name, (kl, rate) in (RATES | rates).items()}
    flags = {name: {"beta": 0.1} if name[0] == "d" else {
        "kl_coef": 0.2, "kl_horizon": 250.0, "episodes": 128, "lam": 1.0, "advantages": "rloo" if name[0] == "r" else
        "gae", "group": 2 if name == "rloo-group2" else 4} for name in rows if name != "sft"}
    return {"config": {"seed": seed, "temperature": 0.7}, "prompts": 9, "policies": rows, "flags": flags,
            "hardware": "", "snapshots": {}, "best_of_n": [{"n": 1, **rows["sft"]}], "torch": "", "date": ""}


def test_equal_kl_is_interpolated_and_never_extrapolated():
    """Compared with the nearest PPO, with one that is no part of the frontier (ppo), or with a straight line beyond the
    last; the judge's line begun at 0.5; a seed without a number counted, or not told of."""
    runs = [results_of(1), results_of(2, **{"dpo-beta0.05": (6.0, 0.86), "rloo-kl6": (4.0, 0.65)})]
    gaps = {row[0]: (row[4], row[6]) for row in frontier.equal_rows(runs)}
    assert gaps == {  # PPO's line: 0.55 at 1 nat, 0.65 at 3, 0.7 at 4, 0.8 at 6, and 10 times that by the judge
        "rloo-kl6": ("+0.000 (-0.050 to +0.050)", "+0.000 (-0.500 to +0.500)"),
        "dpo-beta1": ("+0.020 (+0.020 to +0.020)", "+0.200 (+0.200 to +0.200)"),
        "dpo": ("+0.050 (+0.050 to +0.050)", "+0.500 (+0.500 to +0.500)"),
        "dpo-beta0.05": ("+0.060, 1 of 2 seeds", "+0.600, 1 of 2 seeds")}
    assert [row[3] for row in frontier.equal_rows(runs)] == ["± 0.100"] * 4
    lines = {row[0]: row[1:] for row in frontier.seed_rows(runs[0])}
    assert lines["dpo"] == ["3.00", "0.700 (0.600 to 0.800)", "0.650", "7.00", "6.50"]
    assert lines["dpo-beta0.05"][2] == lines["dpo-beta0.05"][4] == "-"
    hot = {row[0]: row[1:5] for row in frontier.at_one_rows(runs[:1], [results_of(1, dpo=(1.0, 0.6))])}
    assert hot["dpo"] == ["3.00", "1.00", "+0.150", "+0.050"]  # at temperature 1 its KL is 1, its win rate 0.6


def test_the_passes_of_each_method():
    """A value model counted where there is none, one reward model for several, or a rule that is charged as a model."""
    def count(**flags):
        return frontier.passes(vars(ppo.Config(**flags)))
    assert count() == (1, 4, 8, 8) and count(value="shared") == count(value="none") == (1, 3, 4, 4)
    assert count(reward="a,b,c", epochs=1, value="sft") == (1, 6, 2, 2)
    assert count(reward="rule:no-negative-word", value="none") == (1, 2, 4, 4)
    assert frontier.passes(vars(dpo.Config(epochs=2))) == (0, 1, 2, 2)


def test_the_frontier_of_a_few_policies(tmp_path):
    """A page that needs all policies: no default RLOO, no GRPO, no measurement at temperature 1. A table of groups with
    another run's K; seconds summed over the seeds; policies without a place on a line drawn as PPO's."""
    runs = [results_of(1), results_of(2)]
    for name, results in ("two", runs), ("one", runs[:1]):
        (folder := tmp_path / name).mkdir()
        common.write_json(folder / "results.json", {i: {"evaluate": found} for i, found in enumerate(results)})
        write_jsonl(folder / "logs.jsonl", [{"run": "rloo-kl6", **line} for line in (
            {"config": vars(ppo.Config(value="none"))}, {"done": {"seconds": 90.0, "peak_memory_mb": 1500}},
            {"done": {"seconds": 110.0, "peak_memory_mb": 1500}})])
        frontier.main(frontier.Config(str(folder)))
        page = (folder / "frontier.md").read_text()
        assert (folder / "frontier.png").is_file() and "temperature of its training" not in page
        assert "| RLOO | rloo-kl6 | 1 | 3 | 4 | 4 | 100 (90 to 110) | 1,500 (1,500 to 1,500) |" in page
        assert "| PPO |" not in page and "| dpo-beta0.05 |" in page
    assert [row[:3] for row in frontier.group_rows(runs)] == [["RLOO", "2", "64"], ["RLOO", "4", "32"]]
    assert [row[0] for row in frontier.value_rows(runs)] == ["ppo-kl6", "rloo-kl6", "reinforce"]
    found = report.curves(frontier.joined(runs[0]))
    assert {method: [*rows] for method, rows in found.items()} == {
        "best-of-n": [1], "PPO": ["ppo-kl3", "ppo-kl6", "ppo-kl9"], "RLOO": ["rloo-kl6"],
        "DPO": ["dpo", "dpo-beta1", "dpo-beta0.05"]}
    old = report.curves({**runs[0], "flags": {"mine": {"kl_coef": 0.2}}, "policies": {"mine": {}}})  # of before 0.10
    assert [*old["PPO"]] == ["mine"]


def test_bag_of_words_against_its_optimum():
    """The penalty forgotten or halved, a word counted twice, or long texts that count for more than short ones."""
    linear = card.bag_of_words([{"prompt": "", "responses": ["good", "bad"]}], l2=0.1)
    w = linear("Good")  # by symmetry the other word has -w, and -log sigmoid(2 w) + 0.2 w^2 is least
    assert 0.4 * w == pytest.approx(2 / (1 + math.exp(2 * w)), abs=1e-3)
    assert linear("bad") == pytest.approx(-w, abs=1e-6) and linear("unknown") == 0
    assert linear("good good good") == pytest.approx(w / math.sqrt(2))  # of two features: good, and good good


def test_the_card_of_a_few_pairs(tmp_path):
    """A baseline fitted to more rankings than the model, pairs of one domain in another, accuracy of the wrong side."""
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "", "responses": words.split()} for words in ["good bad"] * 2
                                           + ["bad good"] * 9])  # the limit of 2 counts
    pairs = ("good", "bad bad", "film"), ("bad", "good", "news"), ("good ones", "bad", "news")
    write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": "", "chosen": a, "rejected": b, "domain": domain, "sample": "random"} for a, b, domain in pairs])
    (tmp_path / "summary.json").write_text('{"agreement": {"film": {"random": [0.9, 0.8]}}}')
    found, flags = {"film, random": {}, "news, random": {}}, {"test": "given", "limit": 2}
    card.add_baselines(found, flags | {name: f"{tmp_path}/{name}.jsonl" for name in ("train", "pairs")})
    shares = [[row[name]["accuracy"] for name in ("bag of words", "longer wins")] for row in found.values()]
    assert shares == [[1.0, 0.0], [0.5, 0.5]] and [row.get("people") for row in found.values()] == [0.9, None]


def test_the_version_of_a_study():
    """A run of today that is called one of version 0.7, or committed tables that are taken for those of this code."""
    facts = {"hardware": "CPU", "torch": "2", "date": "today"}
    assert markdown.made(Path("out/tiny/ablations"), facts) == "CPU, torch 2, today"
    assert "version 0.7" in markdown.made(Path("results/ablations"), facts)


def test_text_of_a_model_is_escaped():
    """A sample that ends its table, or puts a link, an image or markup into report.md."""
    text = markdown.escape("a | b\n![x](http://y) <img src=z> `c` *d* # &amp; \x1b[0m\u202e")
    assert not re.search(r"[|\n\[\]<>`*\x1b\u202e]|&(?!#\d+;)", text)


def test_the_report_shows_what_lies_beside_it(tmp_path, monkeypatch):
    """A judge's name that breaks the table, its win rate in another model's column, a verdict on other samples."""
    monkeypatch.setattr(report, "draw_frontier", lambda *_: "")
    monkeypatch.setattr(report, "draw_policy", lambda *_: {})
    shutil.copy(ROOT / "results/tiny/seed1/results.json", tmp_path)
    (tmp_path / "refusals.md").write_text("# Refusals\n\nNone {here}.\n")
    card = {"accuracy": 0.61, "interval": [0.5, 0.7], "pairs": 9}
    mine = {"win_rate": 0.75, "win_rate_interval": [0.6, 0.9], "prompts": 40, "ties": 3, "flipped": 0.1}
    common.write_json(tmp_path / "verdict.json", {"labeler": "a|b", "samples": "0", "people": {"both orders": card},
                                                  "policies": {"ppo": mine}})
    report.main(report.Config((str(tmp_path),)))
    page, policy = (tmp_path / "report.md").read_text(), report.load_json(tmp_path / "results.json")["policies"]["ppo"]
    row, = re.findall(r"a&#124;b \| proxy \| labeler \| judge .*\n.*\n\| ppo \| (.*) \|", page)
    assert re.findall(r"([\d.]+) \(", row) == ["0.750", *(f"{policy[f'win_rate_{x}']:.3f}" for x in report.SCORERS)]
    assert row.endswith("| 40 | 3 | 0.100") and "0.610 (0.500 to 0.700) of 9" in page
    assert "\n\nNone {here}.\n\n## What" in page
    (tmp_path / "samples.jsonl").touch()
    assert not report.beside(tmp_path, {})["verdict"]


def commands_of(script, out):
    """{name: configuration} of a script's commands, each checked: flags that it takes, and models made before it."""
    folders = "base sft reward labeler judge ppo rloo dpo evaluate samples label label-ann"
    made = {str(out / name) for name in folders.split()}
    for folder in [*map(Path, made), out / "labelers/label-vader"]:
        folder.mkdir(parents=True)
        (folder / "rankings.jsonl").write_text("{}\n" * 20)
    for name in ("evaluate", "rloo"):
        (out / name / "done.json").touch()
    (out / "made").write_text(f"seed 7, smoke, {out}\n")
    (out / "python").write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@" END >> "{out}/record"\n')
    (out / "python").chmod(0o755)
    subprocess.run(["bash", str(ROOT / "study" / script), "smoke"], check=True, timeout=100, stdout=subprocess.DEVNULL,
                   env={**os.environ, "PYTHON": f"{out}/python", "OUT": str(out), "DATA": str(out), "SEED": "7"})
    found = {}
    for command in (out / "record").read_text().split("END\n")[:-1]:
        name, *flags = command.removeprefix("-m\n").splitlines()
        module = importlib.import_module(name.removesuffix(".py"))
        _, Config, *presets = module.STEPS[flags.pop(0)] if hasattr(module, "STEPS") else (
            "main", module.Config, getattr(module, "PRESETS", {}))
        words = re.search(r"words=\((.*)\)\)", Path(module.__file__).read_text())
        cfg = common.load_config(Config, dict(*presets), flags, re.findall(r"\w+", words[1] if words else ""))
        models = [getattr(cfg, flag, "") for flag in ("sft", "model", "reward", "labeler", "judge", "policies")]
        assert set(",".join(models).split(",")) <= made | {"", "vader"}, f"{command}: not made yet"
        made.add(getattr(cfg, "out", ""))
        found[Path(getattr(cfg, "out", name)).name] = cfg
    return found


def test_the_commands_of_the_frontier(tmp_path):
    """A method at other settings than PPO's, a policy that is trained and not measured, DPO measured at 0.7 twice, or a
    table of runs that do not exist."""
    found = commands_of("frontier.sh", tmp_path)
    runs = {name: cfg for name, cfg in found.items() if isinstance(cfg, ppo.Config)}
    measured, hot = ({Path(path).name for path in found[name].policies.split(",")} for name
                     in ("evaluate", "evaluate-at-1"))
    dpos = {name for name, cfg in found.items() if isinstance(cfg, dpo.Config)} | {"dpo"}
    assert measured == runs.keys() | dpos | {"ppo", "rloo"} and hot == dpos and len(dpos) == 4
    assert found["evaluate-at-1"].temperature == 1 and found["evaluate"].temperature == 0.7
    assert {*frontier.COSTS.values(), *frontier.BASELINES} <= measured and "study.frontier" in found
    assert {f"{kind}-{run}" for kind in ("rloo", "grpo") for run in ("kl3", "kl12", "group2", "group8")} < measured
    assert (runs["no-values"].value, runs["no-values"].lam) == ("none", 1)  # below 1 the score would be discounted
    assert runs["reinforce"].lam == 1 and not runs["reinforce"].whiten_advantages
    free = {"out", "kl_target", "advantages", "group", "value", "lam", "whiten_advantages"}
    assert len({str({flag: x for flag, x in vars(cfg).items() if flag not in free}) for cfg in runs.values()}) == 1
    assert all(name.split("-")[0] in (cfg.advantages.replace("gae", "ppo"), "no", "reinforce")
               for name, cfg in runs.items())


def test_the_commands_of_the_over_optimisation_and_of_the_labelers(tmp_path):
    """A flag that was renamed, or a policy measured before it is trained: it would show only after half an hour."""
    found = commands_of("over_optimisation.sh", tmp_path / "a b")
    labels = {f"labels-{kind}" for kind in ("people", "exact", "flipped")}
    assert {f"over-{size}" for size in over_optimisation.SIZES} | labels <= found.keys()
    seeds = {(cfg.seed, getattr(cfg, "split_seed", -1)) for cfg in found.values() if hasattr(cfg, "seed")}
    assert seeds == {(7, -1), (72, 7), (73, 7)} and "study.over_optimisation" in found  # an ensemble shares its data
    policies = commands_of("labelers.sh", tmp_path / "c")["evaluate"].policies
    assert [Path(path).name for path in policies.split(",")] == ["ppo", "ppo-vader", "ppo-ann"]


def test_groups_of_raters(tmp_path, monkeypatch):
    """A rating that both puts a rater into a group and speaks for it; a group's order given to the other; a sentence to
    train on among the held-out ones; halves that are drawn anew for each sentence, or are the groups."""
    draw = random.Random(1)
    values = {f"{block} {i}": draw.uniform(-1, 1) for block in range(20) for i in range(30)}
    sentences = [Sentence("movie", int(text.split()[0]), text, [-2 + x] * 4 + [1 - x] * 4, x)
                 for text, x in values.items()]  # four rate lower, and like what the others dislike
    for name, value in (("fetch", None), ("read_archive", {"movie": ()}), ("parse", sentences)):
        monkeypatch.setattr(groups, name, lambda *_, value=value: value)
    groups.main(groups.Config(str(tmp_path)))
    for sign, group in ((1, "strict"), (-1, "lenient")):
        for row in read_rows(tmp_path / f"rankings-{group}.jsonl", dict):
            assert row["responses"] == sorted(row["responses"], key=lambda text: -sign * values[text])
        pairs = [row for row in read_rows(tmp_path / "pairs.jsonl", dict) if row["domain"] == group]
        assert len(pairs) > 50 and all((values[row["chosen"]] - values[row["rejected"]]) * sign > 0 for row in pairs)
        assert not {row["chosen"] for row in pairs} & {t for row in read_rows(
            tmp_path / f"rankings-{group}.jsonl", dict) for t in row["responses"]}
    shares = groups.read(tmp_path / "agreement.json")
    assert shares["strict, lenient"]["disagree"] == 1 and 0.1 < shares["half-a, half-b"]["disagree"] < 0.9
    two = [Sentence("movie", 0, str(i), ratings, 0) for i, ratings in enumerate([[5, 1, 5, 1], [1, 5, 1, 5]])]
    assert [means[:2] for _, means in groups.halves(two, np.random.default_rng(0))] == [[5, 1]] * 2  # strict elsewhere


def test_the_page_of_groups(tmp_path):
    """A reward model's accuracy in another group's column; the two policies, or their judges, exchanged."""
    rates = {"proxy": 0.9, "labeler": 0.8, "judge": 0.7}
    rows = {f"ppo-{name}": {f"win_rate_{who}": x - less for who, x in rates.items()}
            for name, less in (("strict", 0), ("lenient", 0.5))}
    share = {"disagree": 0.14, "interval": [0.13, 0.15]}
    found = {"labels": {"strict, lenient": share, "half-a, half-b": share}, "evaluate": {
        "policies": rows, "config": {"seed": 3}, "hardware": "CPU", "torch": "2", "date": "today"}}
    (tmp_path / "results.json").write_text(json.dumps({"3": found}))
    card = {f"{name}, random": {"reward model": {"accuracy": i / 10}} for i, name in enumerate(groups.GROUPS)}
    write_jsonl(tmp_path / "logs.jsonl", [{"run": name, "card": {"human comparisons": card}} for name in groups.GROUPS])
    groups.main(groups.Config(str(tmp_path)))
    page = (tmp_path / "groups.md").read_text()
    assert "| half-a | 0.000 | 0.100 | 0.200 | 0.300 |" in page and "0.140 (0.130 to 0.150)" in page
    assert "| ppo-strict | 0.900 | 0.800 | 0.700 |" in page and "| ppo-lenient | 0.400 | 0.300 | 0.200 |" in page


def test_the_commands_of_the_groups(tmp_path):
    """A policy that is not measured, or measured by one group's reward model twice."""
    found = commands_of("groups.sh", tmp_path)
    assert {*groups.GROUPS, "ppo-strict", "ppo-lenient"} < found.keys()
    assert Path(found["strict"].pairs).name == "pairs.jsonl"
    assert Path(found["evaluate"].reward).name == "strict" and Path(found["evaluate"].labeler).name == "lenient"


def test_every_command_of_the_ablations_changes_one_thing(tmp_path):
    """A run that the table does not show, or one that differs from the default in more than it says."""
    found = commands_of("ablations.sh", tmp_path)
    runs = {name: cfg for name, cfg in found.items() if isinstance(cfg, ppo.Config)}
    shown = set(re.findall(r"(?m)^@(\S+)", markdown.template("ablations.md")))
    assert shown == set(runs) | {"free-all", "ppo-kl3", "ppo-kl12"}
    assert {Path(path).name for path in found["evaluate"].policies.split(",")} == set(runs) | {"ppo"}
    same = {"out", "snapshots", "kl_ceiling", "overwrite", "sft", "reward", "prompts", "seed"}
    plain = vars(ppo.Config(**ppo.PRESETS["smoke"]))
    changes = {name: {flag for flag, value in vars(cfg).items() if str(value) != str(plain[flag])} - same
               for name, cfg in runs.items()}
    assert all(len(changed) + (Path(runs[name].reward).name != "reward") == 1 for name, changed in changes.items())
    assert all(K * found[f"reward-K{K}"].limit == 2880 for K in (2, 4, 9))  # responses


STUDIES = {"frontier": frontier, "over_optimisation": over_optimisation, "ablations": ablations}


def test_committed_figures_and_tables_are_drawn_from_committed_files(tmp_path):
    """A figure in results/ that needs a checkpoint nobody has, or a table that belongs to other numbers."""
    tmp_path = tmp_path / "results"
    shutil.copytree(ROOT / "results", tmp_path)
    studies = [tmp_path / name for name in STUDIES if (tmp_path / name / "results.json").is_file()]
    drawn = [path for path in (tmp_path / "README.md", *tmp_path.glob("tiny/*/*"), *(
        path for study in studies for path in study.iterdir())) if path.suffix in (".png", ".md")]
    for path in drawn:
        path.unlink()
    subprocess.run([sys.executable, "-m", "study.report", *map(str, sorted(tmp_path.glob("tiny/seed*")))], check=True,
                   cwd=ROOT, env={**os.environ, "MPLBACKEND": "module://that.of_a_notebook"})  # not installed here
    for study in studies:
        STUDIES[study.name].main(STUDIES[study.name].Config(str(study)))
    assert len(drawn) >= 25 and all(path.is_file() for path in drawn)
    decimal = re.compile(r"-?\d+\.\d+")
    for path in (path for path in drawn if path.suffix == ".md"):
        text, kept = path.read_text(), (ROOT / "results" / path.relative_to(tmp_path)).read_text()
        assert decimal.sub("", text) == decimal.sub("", kept)  # another PyTorch may round the fits otherwise
        assert [*map(float, decimal.findall(text))] == pytest.approx([*map(float, decimal.findall(kept))], abs=0.002)


def test_what_collect_keeps(tmp_path):
    """A seed lost when another is added, or kept twice when collected again; paths that only this machine has."""
    folder = tmp_path / "x/frontier/ppo"
    folder.mkdir(parents=True)
    for name in ("config", "done", "results"):
        common.write_json(folder / f"{name}.json", {"stage": {"out": str(folder)}, "files": [], "samples": 1})
    (folder / "log.jsonl").write_text('{"kl": 0.123456789, "sample": "text"}\n')
    for seed in (1, 2, 1):
        collect.main(collect.Config(f"{tmp_path}/x/frontier", f"{tmp_path}/kept", seed))
    results, lines = (collect.read(tmp_path / "kept" / name, 9) for name in ("results.json", "logs.jsonl"))
    assert results.keys() == {"1", "2"} and "samples" not in results["1"]["ppo"]
    assert [line["seed"] for line in lines] == [2] * 3 + [1] * 3 and "files" not in lines[2]["done"]
    assert lines[:2] == [{"seed": 2, "run": "ppo", "config": {"out": "out/tiny/frontier/ppo"}},
                         {"seed": 2, "run": "ppo", "kl": 0.12346}]


def test_pairs_by_rating_gap():
    """A pair in two gaps or in none, same-sign pairs among the gaps, chosen and rejected exchanged."""
    pairs = (("b", 0.5, "random"), ("b", 1.0, "random"), ("ccc", 2.9, "random"), ("b", 6.0, "random"),
             ("b", 2.5, "same_sign"))
    rows = [{"chosen": "aa", "rejected": rejected, "gap": gap, "sample": sample} for rejected, gap, sample in pairs]
    found = reward_models.card({text: len(text) for text in ("aa", "b", "ccc")}, rows)
    assert {name: (row["pairs"], row["accuracy"]) for name, row in found.items()} == {
        "random": (4, 0.75), "same sign": (1, 1), "gap under 1": (1, 1), "1 to 2": (1, 1), "2 to 3": (1, 0),
        "3 and more": (1, 1)}
