"""What fits on a GPU, computed: a Markdown table of the largest microbatch (in brackets: with --recompute true).

    python docs/memory.py

Computed, not measured: the bytes of budget.py, with a tenth of the memory left free.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from budget import model_bytes, parameters, row_bytes  # noqa: E402
from gpt2 import SIZES  # noqa: E402
from model import GPTConfig  # noqa: E402

# stage: trained models, frozen models, tokens of a row, positions whose logits are read
STAGES = {"sft, 512 tokens": (1, 0, 512, 512), "reward, 512 tokens": (1, 0, 512, 0),
          "dpo, 256 + 256": (1, 0, 512, 256), "ppo separate, 64 + 128": (2, 2, 192, 128),
          "ppo shared, 64 + 128": (1, 2, 192, 128)}


def rows_that_fit(memory, config, trained, frozen, T, read, recompute):
    """Rows of a microbatch that fit into this many bytes; 0: the models alone do not, or not one row does."""
    left = 0.9 * memory - model_bytes(config, trained, frozen)
    return max(0, int(left // row_bytes(config, trained, T, read, recompute)))


if __name__ == "__main__":
    print("| stage | GPT-2 | parameters | 8 GB | 16 GB | 24 GB | 80 GB |\n|---|---|---|---|---|---|---|")
    for stage, shape in STAGES.items():
        for size, (n_layer, n_head, width, *_) in SIZES.items():
            config = GPTConfig(50257, 1024, n_layer, n_head, width)
            line = f"| {stage} | {size} | {parameters(config) / 1e6:,.0f}M |"
            for memory in (8e9, 16e9, 24e9, 80e9):
                plain, saved = (rows_that_fit(memory, config, *shape, recompute) for recompute in (False, True))
                line += f" {plain or '-'} ({saved}) |" if saved else " - |"
            print(line)
