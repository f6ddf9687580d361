"""Speed of every stage beside what the machine allows, and beside transformers and TRL on the same shapes.

    python -m tools.bench                             4 layers of width 256, vocabulary 2048, in float32
    python -m tools.bench --dtype bfloat16 --peers    and the peers: pip install trl==1.12.0 (the last one with PPO)
    python -m tools.bench --model smollm2             random weights of another size (prepare.pretrained has the names)

On a CPU one thread and the CPU time of this process, on a GPU the time on the wall. One warm-up, then --repeats runs:
the median. A peer does the same work in the same process with its own defaults. Floor: the operations that this code
runs (see flop), at the speed of a matrix product.
"""
import math
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch

import ppo
from common import Log, adamw, generator, optimizer_step, run, set_up
from dpo import Config as DPOConfig, measure, response_logprobs
from model import GPT, GPTConfig, ScalarModel, hub_config, row_logprobs
from prepare.pretrained import shape_of
from reward import ranking_loss, score_rankings
from sampling import sample
from tools.export import exported_config

@dataclass
class Config:
    model: str = "tiny"     # tiny, smollm2, gpt2, gpt2-xl, HuggingFaceTB/SmolLM2-360M, Qwen/Qwen2.5-0.5B, ...
    only: str = "train,sample,sample-group,ppo,ppo-shared,grpo,reward,dpo,dpo-ranked"  # figures
    peers: bool = False     # transformers (train, sample) and TRL (the others; its value model is separate), too
    dtype: str = "float32"  # float32, bfloat16 (autocast; the weights stay float32)
    compile: bool = False   # torch.compile of the layers, as the stages' flag does
    profile: bool = False   # print which operations, on which shapes, the time goes to, in one more run
    device: str = "auto"    # auto, cpu, cuda
    repeats: int = 5        # timed runs per figure, after one warm-up
    seed: int = 1           # weights, tokens

TINY, BLOCK = GPTConfig(2048, 128, n_layer=4, n_head=4, width=256), 128
TRAIN, TRAIN_LARGE = (32, 128), (16, 40)  # rows, tokens
SAMPLE = (64, 16, 32)  # rows, tokens of a prompt, tokens of a response
GROUP, LONG = 8, 96  # responses to a prompt in sample-group and grpo; tokens of a prompt in sample-group
RANKINGS = {"reward": (32, 2), "dpo": (32, 2), "dpo-ranked": (8, 4)}  # behind a step, and responses of each
PROMPT, TEXT, TEMPERATURE, LR = 16, 48, 0.7, 1e-5  # tokens of a prompt and of a whole text in a ranking
NEVER = -1  # an EOS that cannot be sampled: every response has its full length

def flop(config, T, read, head=False, past=0):
    """Operations of the matrix products (two per multiply-add) of a forward pass on a row: T tokens after `past` cached
    ones, `read` positions wanted, to which the last layer's projection and MLP, and the head, are limited."""
    C, queries = config.width, config.n_head * config.head_size
    attention = 2 * C * (queries + 2 * config.n_kv_head * config.head_size) + 4 * (past + T) * queries
    rest = 2 * C * queries + 2 * (2 + config.swiglu) * C * config.mlp_width
    trunk = config.n_layer * T * attention + ((config.n_layer - 1) * T + read) * rest
    return trunk + (2 * read * C * config.padded_vocab if head else 0)

def sample_flop(config, P, R, group=1):
    """One row: a prompt of P tokens, computed once for a group, then R - 1 single tokens; the last is never read."""
    prompt, head = flop(config, P, 1) / group, flop(config, 0, 1, True) - flop(config, 0, 1)
    return prompt + head + sum(flop(config, 1, 1, True, past) for past in range(P, P + R - 1))

class Bench:
    """Device, clock, and the speed of a large matrix product, on which every floor rests."""

    def __init__(self, cfg):
        self.cfg, self.random, n = cfg, generator(cfg.seed), 2048
        self.device, self.autocast = set_up(cfg)
        self.model, self.train = (TINY, TRAIN) if cfg.model == "tiny" else (
            hub_config(shape_of(cfg.model), BLOCK), TRAIN_LARGE)
        a, b = torch.randn(2, n, n, device=self.device).to(getattr(torch, cfg.dtype))
        self.flops = 2 * n**3 / min(products := self.time(lambda: a @ b))
        self.record("matrix product", products, 2e-9 * n**3, "GFLOP/s")

    def build(self, kind=GPT):
        """A model of random weights, in eval mode, compiled if --compile says so."""
        model = kind(self.model).to(self.device).eval()
        model.trunk.set_flags(SimpleNamespace(recompute=False, compile=self.cfg.compile))
        return model

    def clock(self):
        """Seconds from some start, after all work handed to the GPU is done."""
        return time.process_time() if self.device == "cpu" else torch.cuda.synchronize() or time.perf_counter()

    def tokens(self, *shape):
        """Random ids, as lists; never the last two of the vocabulary, which the peers use as padding and EOS."""
        return torch.randint(self.model.vocab_size - 2, shape, generator=self.random).tolist()

    def time(self, work):
        """Call work() once to warm up and then --repeats times: seconds of each."""
        ends = [self.clock()]
        for _ in range(1 + self.cfg.repeats):
            work()
            ends.append(self.clock())
        if self.cfg.profile:
            with torch.profiler.profile(record_shapes=True) as profiler:
                work()
            name = f"self_{'cpu' if self.device == 'cpu' else 'device'}_time_total"
            for of in map(profiler.key_averages, (False, True)):  # by operation; by operation and shape
                for row in sorted(of, key=lambda row: -getattr(row, name))[:12]:
                    share = getattr(row, name) / sum(getattr(row, name) for row in of)
                    print(f"  {share:5.1%} {row.count:6} x {row.key} {row.input_shapes or ''}")
        return [end - start for start, end in zip(ends[1:], ends[2:])]

    def time_step(self, model, loss_of):
        """Seconds of training steps: forward and backward of loss_of(), clipping, fused AdamW."""
        parameters, log = list(model.train().parameters()), Log("")  # a log only to add to: nothing is written
        optimizer = adamw(parameters, LR, weight_decay=0.1)

        def step():
            with self.autocast():
                loss = loss_of()
            loss.backward()
            optimizer_step(optimizer, parameters, LR, 1.0, log)
        return self.time(step)

    def record(self, figure, seconds, amount, unit, work=None):
        """Print one figure. amount: what the rate counts; work: operations; both of one run."""
        middle, spread = median(seconds), f"{min(seconds):.4g}-{max(seconds):.4g}"
        floor = f", {work / self.flops / middle:.0%} of the floor's speed" if work else ""
        print(f"{figure:20}{amount / middle:10,.2f} {unit:10} {middle:.4g} s ({spread}){floor}")

def train(bench, _):
    """Next-token prediction where every token counts; transformers: with labels, and our optimizer."""
    (B, T), device, model = bench.train, bench.device, bench.build()
    rows = [(ids, 1) for ids in bench.tokens(B, T + 1)]
    seconds = bench.time_step(model, lambda: -row_logprobs(model, rows, 0, device, bench.autocast).sum() / (B * T))
    bench.record("train", seconds, B * T, "tokens/s", 3 * B * flop(bench.model, T, T, True))
    if bench.cfg.peers:
        model, ids = peer_model(bench), torch.tensor(bench.tokens(B, T), device=device)
        seconds = bench.time_step(model, lambda: model(input_ids=ids, labels=ids).loss)
        bench.record("train transformers", seconds, B * T, "tokens/s")

@torch.no_grad()
def sampling(bench, figure):
    """Responses of full length to prompts of equal length; transformers: generate with its cache."""
    (B, P, R), random = SAMPLE, torch.Generator(bench.device).manual_seed(1)
    P, group = (P, 1) if figure == "sample" else (LONG, GROUP)
    model = GPT(bench.model).to(bench.device).eval()
    tokens = torch.tensor(bench.tokens(B // group, P), device=bench.device).repeat_interleave(group, 0)
    with bench.autocast():
        seconds = bench.time(lambda: sample(model, tokens, None, R, NEVER, TEMPERATURE, random=random))
        bench.record(figure, seconds, B * R, "tokens/s", B * sample_flop(bench.model, P, R, group))
        if bench.cfg.peers:
            model, how = peer_model(bench).eval(), {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}
            model.generation_config.eos_token_id = None  # every response has its full length
            seconds = bench.time(lambda: model.generate(tokens, max_new_tokens=R, **how))
            bench.record(f"{figure} transformers", seconds, B * R, "tokens/s")

def ppo_work(bench, figure, shape, group):
    """An iteration of PPO, as a function, and its operations: sampling, scoring, 4 epochs of 4 minibatches. The value
    model is separate ("ppo") or shared ("ppo-shared"), or there is none ("grpo": group responses to a prompt)."""
    (B, P, R), device, log = shape, bench.device, Log("")
    how = {"advantages": "grpo", "group": group} if figure == "grpo" else {}
    cfg = ppo.Config(episodes=B, minibatches=4, response_tokens=R, temperature=TEMPERATURE, **how)
    policy, ref, reward = bench.build(), bench.build(), ScalarModel(bench.model).to(device).eval()
    ref.load_state_dict(policy.state_dict())
    if bench.cfg.dtype == "bfloat16":
        ppo.freeze(ref, reward)
    value = {"ppo": lambda: bench.build(ScalarModel), "grpo": lambda: None,
             "ppo-shared": lambda: torch.nn.Linear(bench.model.width, 1).to(device)}[figure]()
    trained = [*policy.parameters(), *(value.parameters() if value else [])]
    optimizer, random = adamw(trained, LR, weight_decay=0.0), torch.Generator(device).manual_seed(1)
    prompts = [ids for ids in bench.tokens(B // group, P) for _ in range(group)]

    def iteration():
        rollout, _ = ppo.collect(policy, ref, [reward], value, prompts, cfg.kl_coef, cfg, SimpleNamespace(end=NEVER),
                                 bench.autocast, random)
        ppo.update(policy, value, optimizer, rollout, LR, cfg, bench.autocast, log, generator(bench.cfg.seed))
    forward, values = flop(bench.model, P + R - 1, R, True), flop(bench.model, P + R - 1, R) * (figure == "ppo")
    collect = sample_flop(bench.model, P, R, group) + 2 * forward + values + flop(bench.model, P + R, 1)
    return iteration, B * (collect + cfg.epochs * 3 * (forward + values))

def ppo_iteration(bench, figure):
    """Ours, and TRL's with as many epochs and minibatches, a reward model and a reference."""
    (B, P, R), group = SAMPLE, GROUP if figure == "grpo" else 1
    iteration, work = ppo_work(bench, figure, SAMPLE, group)
    bench.record(figure, bench.time(iteration), B, "episodes/s", work)
    del iteration  # and its models
    if bench.cfg.peers and figure == "ppo":
        models = {f"{part}_model": peer_model(bench, part != "ref") for part in ("ref", "reward", "value")}
        how = {"num_mini_batches": 4, "num_ppo_epochs": 4, "response_length": R, "temperature": TEMPERATURE,
               "stop_token": "eos", "total_episodes": B * (bench.cfg.repeats + 1), "num_sample_generations": 0,
               "local_rollout_forward_batch_size": B}
        seconds = trl_steps(bench, "PPO", B, {"input_ids": bench.tokens(B, P)}, models, **how)
        bench.record("ppo trl", seconds, B, "episodes/s")
    elif bench.cfg.peers and figure == "grpo":
        models = {"reward_funcs": peer_model(bench, True), "reward_processing_classes": peer_tokenizer(bench)}
        how = {"num_generations": group, "steps_per_generation": 4, "num_iterations": 4, "max_completion_length": R,
               "temperature": TEMPERATURE, "beta": 0.05, "generation_kwargs": {"min_new_tokens": R}}
        data = {"prompt": [" ".join(f"t{i}" for i in ids) for ids in bench.tokens(B, P)]}
        seconds = trl_steps(bench, "GRPO", B // 4, data, models, steps=16, **how)
        bench.record("grpo trl", seconds, B, "episodes/s")

def ranked(bench, figure):
    """A training step of the reward model, or of DPO, where the reference's log-probabilities are known. In rankings of
    more than two a response is in several pairs, and computed once; TRL takes pairs and computes it again."""
    (n, K), device, is_dpo = RANKINGS[figure], bench.device, figure != "reward"
    pairs, rankings = n * math.comb(K, 2), bench.tokens(n, K, TEXT)
    model = bench.build(GPT if is_dpo else ScalarModel)
    parted = [[(ids, PROMPT) for ids in x] for x in rankings]
    logprobs = partial(response_logprobs, model, parted, 0, device, bench.autocast)
    if is_dpo:
        known, work = [x.detach() for x in logprobs()], flop(bench.model, TEXT - 1, TEXT - PROMPT, True)
        seconds = bench.time_step(model, lambda: measure(logprobs(), known, DPOConfig())["loss"])
    else:
        work = flop(bench.model, TEXT, 1)
        seconds = bench.time_step(model, lambda: ranking_loss(*score_rankings(model, rankings)))
    bench.record(figure, seconds, pairs, "pairs/s", 3 * n * K * work)
    if bench.cfg.peers:
        data = {side: ["".join(f" t{i}" for i in ids) for ids in bench.tokens(pairs * (bench.cfg.repeats + 1), size)]
                for side, size in (("prompt", PROMPT), ("chosen", TEXT - PROMPT - 1), ("rejected", TEXT - PROMPT - 1))}
        how = {"precompute_ref_log_probs": True} if is_dpo else {}
        seconds = trl_steps(bench, "DPO" if is_dpo else "Reward", pairs, data, {}, **how)  # it adds an EOS
        bench.record(f"{figure} trl", seconds, pairs, "pairs/s")

def peer_model(bench, scalar=False):
    """The same model in transformers, with the language-model head or a scalar one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
    config = AutoConfig.for_model(**{**exported_config(bench.model, "lm"), "pad_token_id": bench.model.vocab_size - 2})
    return (AutoModelForSequenceClassification if scalar else AutoModelForCausalLM).from_config(config).to(bench.device)

def peer_tokenizer(bench):
    """Its tokens are the words t0, t1, ...; the last but one is padding, the last EOS."""
    import tokenizers
    import transformers
    words = {f"t{i}": i for i in range(bench.model.vocab_size)}
    words, (pad, end) = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="t0")), list(words)[-2:]
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=pad,
                                                padding_side="left")

def trl_steps(bench, name, rows, data, models, steps=1, **how):
    """Seconds of so many steps each of TRL's PPOTrainer, GRPOTrainer, RewardTrainer or DPOTrainer."""
    bf16 = bench.cfg.dtype == "bfloat16"  # which TRL 1.12's PPO ignores, but not this variable:
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "bf16" if bf16 else "no", "TRL_EXPERIMENTAL_SILENCE": "1"}
    import datasets, transformers, trl.experimental.ppo  # noqa: E401
    module, ends, model = trl.experimental.ppo if name == "PPO" else trl, [], peer_model(bench, name == "Reward")

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            ends.append(bench.clock())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # GRPO reads its reference from there
        model.config._name_or_path = folder
        args = getattr(module, f"{name}Config")(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=steps * (bench.cfg.repeats + 1), bf16=bf16,
            gradient_accumulation_steps=1, gradient_checkpointing=False, learning_rate=LR, disable_tqdm=True,
            use_cpu=bench.device == "cpu", report_to=[], save_strategy="no", logging_strategy="no", **how)
        getattr(module, f"{name}Trainer")(
            args=args, model=model, callbacks=[Watch()], **models,
            processing_class=peer_tokenizer(bench), train_dataset=datasets.Dataset.from_dict(data)).train()
    ends = ends[steps - 1::steps]
    return [end - start for start, end in zip(ends, ends[1:])]

def main(cfg):
    torch.set_num_threads(1)
    bench = Bench(cfg)
    work = {"train": train, "sample": sampling, "sample-group": sampling,
            "ppo": ppo_iteration, "ppo-shared": ppo_iteration, "grpo": ppo_iteration}
    for figure in cfg.only.split(","):
        work.get(figure, ranked)(bench, figure)

if __name__ == "__main__":
    run(main, Config)
