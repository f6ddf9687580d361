"""What fits on a GPU, computed: a Markdown table of the largest microbatch (in brackets: with --recompute).

    python -m tools.memory

Per parameter: 4 bytes of a frozen model; 18 of a trained one (weight, gradient, two moments of AdamW in float32; the
bf16 copy that autocast keeps). Per token and block of width C: 36 C for the backward pass (float32 residual streams
8 C; bf16 norms 4 C, query, key and value 6 C, attention 2 C, GELU's input and output 16 C); with --recompute 4 C, and
36 C for one block. Per position whose logits are read: 16 V (logits in bf16 and float32, log-softmax, gradients).
"""
from model import GPTConfig
from prepare.pretrained import SIZES

# stage: trained models, frozen models, tokens of a row, positions whose logits are read
STAGES = {"sft, 512 tokens": (1, 0, 512, 512), "reward, 512 tokens": (1, 0, 512, 0),
          "dpo, 256 + 256": (1, 0, 512, 256), "ppo separate, 64 + 128": (2, 2, 192, 128),
          "ppo shared, 64 + 128": (1, 2, 192, 128)}

def parameters(config):
    """Parameters of a trunk, which is nearly all of a model."""
    C = config.width
    return config.n_layer * (12 * C * C + 13 * C) + (config.padded_vocab + config.block_size + 2) * C

def row_bytes(config, trained, T, read, recompute):
    """Bytes that one row of T tokens keeps for the backward pass through so many trained models."""
    block = 36 * config.width * T
    trunk = config.n_layer * 4 * config.width * T + block if recompute else config.n_layer * block
    return trained * trunk + read * 16 * config.vocab_size

if __name__ == "__main__":
    print("| stage | model | parameters | 8 GB | 16 GB | 24 GB | 80 GB |\n|---|---|---|---|---|---|---|")
    for stage, (trained, frozen, T, read) in STAGES.items():
        for size, (n_layer, n_head, width, *_) in SIZES.items():
            config = GPTConfig(50257, 1024, n_layer, n_head, width)
            line = f"| {stage} | {size} | {parameters(config) / 1e6:,.0f}M |"
            for memory in (8e9, 16e9, 24e9, 80e9):
                left = 0.9 * memory - parameters(config) * (18 * trained + 4 * frozen)  # a tenth stays free
                plain, saved = (max(0, int(left // row_bytes(config, trained, T, read, recompute)))
                                for recompute in (False, True))
                line += f" {plain or '-'} ({saved}) |" if saved else " - |"
            print(line)
