"""Presets for a base model that was not trained here, from start to end, on small models of two families."""
import json

import sft
from data import END, REPLY, TURN, load_tokenizer, write_jsonl
from prepare.reviews import save_ranks
from test_pipeline import RATED, finished, make_data, train_all
from tools import export


def test_sentences(tmp_path):
    """A flag that is gone, or a base model on disk whose block size, tokenizer or format is lost on the way."""
    make_data(tmp_path)
    files = {"train": "corpus_train.jsonl", "valid": "corpus_valid.jsonl", "vocab": "vocab.tiktoken"}
    files = {flag: f"{tmp_path}/the data/{name}" for flag, name in files.items()}
    sft.main(sft.Config(**sft.PRESETS["smoke-base"], **files, out=f"{tmp_path}/base", device="cpu"))
    export.main(export.Config(f"{tmp_path}/base", f"{tmp_path}/a base"))
    train_all(tmp_path, "out", "smollm", f"{tmp_path}/a base", "--block-size", "48", STEPS="smoke")
    assert finished(tmp_path / "out") == sorted(RATED)
    assert json.loads((tmp_path / "out/ppo/config.json").read_text())["model"]["block_size"] == 48


def test_dialogues_and_a_llama(tmp_path):
    """A report that needs a labeler; a stage that works with models of GPT-2's family only, or writes no turns; a file
    of comparisons that is not read; a report without refusals."""
    make_data(tmp_path)
    ranks, data = load_tokenizer(f"{tmp_path}/the data")._mergeable_ranks, tmp_path / "hh.jsonl"
    special = {text: len(ranks) + i for i, text in enumerate((END, "<|im_start|>", "<|im_end|>"))}
    (tmp_path / "a base").mkdir()
    save_ranks(ranks, tmp_path / "a base/vocab.tiktoken", {
        "special": special, "end": special[END], "chat": {"format": "chatml", "end": special["<|im_end|>"]}})
    write_jsonl(data, [{name: f"{TURN} Film {i}?{REPLY} {text}" for name, text in
                        (("chosen", "good"), ("rejected", "sad"))} for i in range(120)])
    (tmp_path / "a base/config.json").write_text(json.dumps({
        "model_type": "llama", "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "tie_word_embeddings": True}))
    train_all(tmp_path, "out", "chat", "--train", data, f"{tmp_path}/a base", "--random", "--block-size", "64", DATA="",
              STEPS="smoke")
    assert finished(tmp_path / "out") == sorted("base sft judge reward dpo ppo evaluate".split())
    assert json.loads((tmp_path / "out/ppo/config.json").read_text())["model"]["rope"]
    assert "<|im_start|>assistant" in (tmp_path / "out/ppo/log.jsonl").read_text()
    assert "harmless: refused" in (tmp_path / "out/evaluate/report.md").read_text()
