"""What fits on a GPU, computed: a Markdown table of the largest microbatch (in brackets: with --recompute true).

    python docs/memory.py

Computed, not measured: the bytes below, counted from what the backward pass keeps, and a tenth of the memory left free.
Bytes per parameter: 4 for a frozen model, 16 for a trained one (weight, gradient, two moments of AdamW, all float32),
and 2 for the bf16 copy of the weights that autocast keeps until the backward pass. Per token and block of width C: 36 C
(two float32 residual streams 8 C; in bf16 two norms 4 C, query, key and value 6 C, attention 2 C, GELU's input and
output 16 C); with --recompute 4 C, and 36 C for one block. Per position whose logits are read: 16 V (bf16 and float32
logits, log-softmax, and its gradients).
"""
SIZES = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "XL": (48, 1600)}  # GPT-2: layers, width C
V, BLOCK = 50257, 1024
# stage: trained models, frozen models, tokens of a row, positions whose logits are read
STAGES = {"sft, 512 tokens": (1, 0, 512, 512), "reward, 512 tokens": (1, 0, 512, 0),
          "dpo, 256 + 256": (1, 0, 512, 256), "ppo separate, 64 + 128": (2, 2, 192, 128),
          "ppo shared, 64 + 128": (1, 2, 192, 128)}


def parameters(n_layer, C):
    """Parameters of GPT-2 with this many layers of this width."""
    return n_layer * (12 * C * C + 13 * C) + (V + BLOCK + 2) * C


def rows_that_fit(memory, n_layer, C, trained, frozen, T, read, recompute):
    """Rows of a microbatch that fit into this many bytes; 0: the models alone do not, or not one row does."""
    N = parameters(n_layer, C)
    models = N * (18 * trained + 4 * frozen)
    block = 36 * C * T
    row = trained * (n_layer * 4 * C * T + block if recompute else n_layer * block) + read * 16 * V
    return max(0, int((0.9 * memory - models) // row))


if __name__ == "__main__":
    print("| stage | GPT-2 | parameters | 8 GB | 16 GB | 24 GB | 80 GB |\n|---|---|---|---|---|---|---|")
    for stage, shape in STAGES.items():
        for size, (n_layer, C) in SIZES.items():
            line = f"| {stage} | {size} | {parameters(n_layer, C) / 1e6:,.0f}M |"
            for memory in (8e9, 16e9, 24e9, 80e9):
                plain, saved = (rows_that_fit(memory, n_layer, C, *shape, recompute) for recompute in (False, True))
                line += f" {plain or '-'} ({saved}) |" if saved else " - |"
            print(line)
