"""tools/gpu.sh, small, on a CPU: nobody runs it before there is a GPU."""
import json
import os
import shutil
import subprocess

from test_pipeline import ROOT, SURROUNDINGS


def test_everything_that_a_gpu_would_show(checkpoints, tmp_path):
    """A flag that is gone, a part that fails or has no line, a finished preset that is run again."""
    data, run = tmp_path / "the data", tmp_path / "the output/smoke"
    for stage in ("base", "sft", "reward", "evaluate"):  # as a finished preset leaves them
        shutil.copytree(checkpoints.reward if stage == "reward" else checkpoints.sft, run / stage)
        (run / stage / "done.json").write_text('{"seconds": 1.0}')
    (run / "evaluate/report.md").touch()
    data.mkdir()
    for name, of in (("rankings_labeler", "rankings"), ("prompts_label", "prompts"), ("prompts_ppo", "prompts")):
        shutil.copy(getattr(checkpoints, of), data / f"{name}.jsonl")
    (run.parent / "small").mkdir()
    (run.parent / "small/config.json").write_text(json.dumps({
        "model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 256}))
    env = {**os.environ, **SURROUNDINGS, "DATA": str(data), "OUT": str(run.parent)}
    subprocess.run(["bash", ROOT / "tools/gpu.sh", "--smoke"], env=env, check=True, cwd=tmp_path)
    lines = [json.loads(line) for line in (run.parent / "results.jsonl").read_text().splitlines()]
    assert not [line for line in lines if line.get("exit") or "problem" in line]
    assert sorted(line["name"] for line in lines) == sorted([
        "smoke base", "smoke evaluate", "smoke reward", "smoke sft", "speed-tiny", "base-small", "reward, small",
        "ppo, small", "ppo --recompute"])
    assert all("seconds" in line for line in lines)
    assert "GFLOP/s" in (page := (run.parent / "table.md").read_text()) and "| ppo --recompute |" in page
