"""Other libraries on the shapes of bench.py, for its --against. Nothing else in this project needs them.

    pip install trl==1.12.0      brings both peers: this release is the last one with PPO
"""
import contextlib
import importlib
import io
import math
import os
import tempfile
import warnings

import torch

from bench import K, LR, PAIRS, PROMPT, RANKINGS, TEMPERATURE, TEXT, stepper
from common import UserError


def load_peer(cfg):
    """Import the peer, silenced; UserError if it is not installed."""
    mixed = "bf16" if cfg.dtype == "bfloat16" else "no"  # TRL 1.12 ignores bf16=True, but not accelerate's variable
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1",
                      TQDM_DISABLE="1", ACCELERATE_MIXED_PRECISION=mixed)
    warnings.simplefilter("ignore")
    try:
        importlib.import_module("transformers").logging.set_verbosity_error()
        if cfg.against == "trl":
            importlib.import_module("datasets").disable_progress_bars()
            importlib.import_module("trl.experimental.ppo")
    except ImportError as error:
        raise UserError(f"--against {cfg.against}: {error} (pip install trl==1.12.0 brings both peers)") from None


def peer_model(bench, scalar=False):
    """The same model in transformers, with the language-model head or a scalar one."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel
    config, V = bench.config, bench.config.vocab_size
    return (GPT2ForSequenceClassification if scalar else GPT2LMHeadModel)(GPT2Config(
        vocab_size=V, n_positions=config.block_size, n_embd=config.width, n_layer=config.n_layer, n_head=config.n_head,
        activation_function={"none": "gelu", "tanh": "gelu_new"}[config.gelu], resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, num_labels=1, pad_token_id=V - 2, eos_token_id=V - 1, bos_token_id=V - 1)).to(bench.device)


def peer_train(bench, _):
    """GPT2LMHeadModel with labels, and this project's optimizer."""
    model, ids = peer_model(bench), torch.tensor(bench.tokens(*bench.shapes["train"]), device=bench.device)

    def loss():
        with bench.autocast():
            return model(input_ids=ids, labels=ids).loss
    return bench.time(stepper(model, loss))


def peer_sample(bench, _):
    """generate with its cache."""
    B, P, R = bench.shapes["sample"]
    model, tokens = peer_model(bench).eval(), torch.tensor(bench.tokens(B, P), device=bench.device)

    model.generation_config.eos_token_id = None  # every response has its full length

    def generate():
        with torch.no_grad(), bench.autocast():
            model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, temperature=TEMPERATURE,
                           top_k=0, top_p=1.0, max_new_tokens=R)
    return bench.time(generate)


def peer_trl(bench, figure):
    """TRL's PPOTrainer, RewardTrainer or DPOTrainer: from the end of one step to the end of the next."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    name = {"ppo": "PPO", "reward": "Reward", "dpo": "DPO", "dpo-ranked": "DPO"}[figure]
    pairs = RANKINGS * math.comb(K, 2) if figure == "dpo-ranked" else PAIRS
    module = importlib.import_module("trl.experimental.ppo" if figure == "ppo" else "trl")
    V, steps, ends = bench.config.vocab_size, bench.cfg.repeats + 1, []
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(V)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"t{V - 1}", pad_token=f"t{V - 2}",
                                        padding_side="left")
    model, parts = peer_model(bench, scalar=figure == "reward"), {}
    how = {"per_device_train_batch_size": pairs, "max_steps": steps, "logging_strategy": "no"}
    if figure == "ppo":
        B, P, R = bench.shapes["ppo"]
        parts = {f"{part}_model": peer_model(bench, part != "ref") for part in ("ref", "reward", "value")}
        parts["ref_model"].load_state_dict(model.state_dict())
        data = {"input_ids": bench.tokens(B, P)}
        how = {"per_device_train_batch_size": B, "num_mini_batches": 4, "num_ppo_epochs": 4, "response_length": R,
               "total_episodes": B * steps, "temperature": TEMPERATURE, "stop_token": "eos",
               "num_sample_generations": 0, "local_rollout_forward_batch_size": B}
    elif figure == "reward":
        data = {side: bench.tokens(pairs * steps, TEXT) for side in ("chosen_ids", "rejected_ids")}
    else:  # takes words only, and adds an end to a response without one
        def text(size, end=""):
            return ["".join(f" t{i}" for i in ids) + end for ids in bench.tokens(pairs * steps, size)]
        chosen, rejected = (text(TEXT - PROMPT - 1, f" t{V - 1}") for _ in range(2))
        data = {"prompt": text(PROMPT), "chosen": chosen, "rejected": rejected}
        how["precompute_ref_log_probs"] = True

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(bench.clock())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        args = getattr(module, f"{name}Config")(
            output_dir=folder, gradient_accumulation_steps=1, bf16=bench.cfg.dtype == "bfloat16", learning_rate=LR,
            use_cpu=not bench.cuda, report_to=[], save_strategy="no", gradient_checkpointing=False, disable_tqdm=True,
            **how)
        trainer = getattr(module, f"{name}Trainer")(
            args=args, model=model, processing_class=tokenizer, train_dataset=Dataset.from_dict(data),
            callbacks=[Watch()], **parts)
        bench.peak(reset=True)
        trainer.train()
    return [b - a for a, b in zip(ends, ends[1:])], bench.peak()


PEERS = {"transformers": {"train": peer_train, "sample": peer_sample},
         "trl": dict.fromkeys(("ppo", "reward", "dpo", "dpo-ranked"), peer_trl)}
