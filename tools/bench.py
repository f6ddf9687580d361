r"""Benchmarks: the speed of every stage beside the machine's limits. One JSON line per figure, a table at the end.

    python bench.py                                    all figures of the tiny size: float32, one thread
    python bench.py --only ppo --value shared --dtype bfloat16
    python bench.py --against transformers             and --against trl; neither is required: pip install trl==1.12.0

Clock: on a CPU with one thread it is the CPU time of this process, which a neighbour on the machine can hardly disturb;
otherwise it is the time on the wall, and the machine must be idle. One warm-up, then --repeats timed runs: the median
counts. A peer does the same work on the same shapes in the same process, after ours, with its own defaults.

Floor: the operations that this code runs (see flop) at the speed of the best matrix product measured at the
start; fraction: floor / median. Sampling on a GPU has a second floor, reading weights and cache at the speed of a copy.
"""
import ctypes
import dataclasses
import gc
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import ppo
from budget import flop, sample_flop
from common import adamw, check, check_positive, generator, optimizer_step, run, set_up
from dpo import Config as DPOConfig, measure, response_logprobs
from model import GPT, GPTConfig, ScalarModel
from reward import ranking_loss, score_rankings
from runs import Log
from sampling import sample
from sft import row_logprobs


@dataclass
class Config:
    size: str = "tiny"       # tiny: 4 layers of width 256, vocabulary 2048; small: GPT-2 124M
    only: str = ""           # of limits,train,sample,ppo,reward,dpo,dpo-ranked (empty: all of these), or scaling
    against: str = ""        # a peer to run too: transformers (train, sample) or trl (ppo, reward, dpo, dpo-ranked)
    value: str = "separate"  # value model of ppo: separate, or shared (the peer's is separate in any case)
    gelu: str = "none"       # ours and the peer's: none is exact, as in our models; tanh is GPT-2's approximation
    graph: bool = False      # our sampler on CUDA: with a step recorded as a CUDA graph
    threads: int = 1         # CPU threads
    dtype: str = "float32"   # float32, bfloat16 (autocast; the weights stay float32)
    device: str = "auto"     # auto, cpu, cuda
    repeats: int = 5         # timed runs per figure, after one warm-up
    out: str = ""            # append the JSON lines to this file; empty: only print them
    seed: int = 1            # weights, tokens


SIZES = {"tiny": (2048, 128, 4, 4, 256), "small": (50257, 1024, 12, 12, 768)}  # the first fields of GPTConfig
# train: rows, tokens; sample and ppo: rows, prompt tokens, response tokens
SHAPES = {"tiny": {"train": (32, 128), "sample": (64, 16, 32), "ppo": (64, 16, 32)},
          "small": {"train": (4, 256), "sample": (8, 64, 64), "ppo": (64, 16, 32)},
          "small cuda": {"train": (32, 1024), "sample": (512, 64, 128), "ppo": (512, 64, 128)}}
SCALES = {"batch": (16, 32, 64, 128, 256), "prompt": (4, 16, 32, 64, 96), "response": (8, 16, 32, 64, 96),
          "width": (64, 128, 256, 512)}
PAIRS, PROMPT, TEXT = 32, 16, 48  # reward and dpo: pairs behind a step, tokens of a prompt, tokens of a whole text
RANKINGS, K = 8, 4  # dpo-ranked: rankings behind a step, each of so many responses (48 pairs)
TEMPERATURE, LR = 0.7, 1e-5
NEVER = -1  # an end id that cannot be drawn: every response has its full length


class Bench:
    """Model size, clock, limits of the machine, and the records so far."""

    def __init__(self, cfg):
        self.cfg, self.random, self.records = cfg, generator(cfg.seed), {}
        self.device, self.autocast = set_up(cfg, quiet=True)
        self.cuda = self.device.startswith("cuda")
        self.config = GPTConfig(*SIZES[cfg.size], gelu=cfg.gelu)
        self.shapes = SHAPES.get(f"{cfg.size} cuda" if self.cuda else "", SHAPES[cfg.size])
        self.clock_name = "process CPU time" if not self.cuda and cfg.threads == 1 else "wall time"
        cpu = Path("/proc/cpuinfo")  # on Linux
        name = re.search(r"model name\s*: (.*)", cpu.read_text() if cpu.is_file() else "")
        self.processor = torch.cuda.get_device_name() if self.cuda else name.group(1) if name else platform.machine()
        self.flops = self.bandwidth = None  # operations and bytes per second, set by limits()

    def clock(self):
        """Seconds from some start, after all work handed to the GPU is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.process_time() if self.clock_name == "process CPU time" else time.perf_counter()

    def tokens(self, *shape):
        """Random ids, as lists; never the last two of the vocabulary, which the peers use as padding and end."""
        return torch.randint(self.config.vocab_size - 2, shape, generator=self.random).tolist()

    def peak(self, reset=False):
        """Peak memory in MB since it was reset: of tensors on a GPU, of the whole process on Linux, else None."""
        if self.cuda:
            return torch.cuda.reset_peak_memory_stats() if reset else torch.cuda.max_memory_allocated() / 2**20
        if not os.access("/proc/self/clear_refs", os.W_OK):
            return None
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # freed memory that was kept would count
            return Path("/proc/self/clear_refs").write_text("5")  # the code for VmHWM
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) / 2**10

    def time(self, work, repeats=0):
        """Call work() once to warm up and then --repeats times: (seconds of each, peak memory in MB or None)."""
        self.peak(reset=True)
        seconds = []
        for _ in range(1 + (repeats or self.cfg.repeats)):
            start = self.clock()
            work()
            seconds.append(self.clock() - start)
        return seconds[1:], self.peak()

    def record(self, figure, what, measured, amount, unit, work=0, byte=0, **facts):
        """Print one JSON line and keep it. measured: as from time(); amount: what the rate counts, in one run.

        work, byte: operations and memory traffic of one run, for the floor.
        """
        (seconds, memory), cfg = measured, self.cfg
        median = statistics.median(seconds)
        floor = max(work / self.flops, byte / self.bandwidth) if work else None
        line = {"figure": figure, "what": what, "size": cfg.size, "value": None, "gelu": cfg.gelu, "graph": cfg.graph,
                "device": self.device, "dtype": cfg.dtype, "threads": torch.get_num_threads(),
                "clock": self.clock_name, "repeats": len(seconds), "seconds": median, "seconds_min": min(seconds),
                "seconds_max": max(seconds), "rate": amount / median, "unit": unit, "flop": work or None,
                "floor_seconds": floor, "fraction": floor and floor / median, "peak_memory_mb": memory, "ratio": None,
                "torch": torch.__version__, "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "processor": self.processor, **facts}
        line = {name: float(f"{x:.5g}") if isinstance(x, float) else x for name, x in line.items()}
        self.records[figure] = line
        print(json.dumps(line), flush=True)
        if cfg.out:
            with open(cfg.out, "a") as file:
                print(json.dumps(line), file=file)

    def table(self):
        """Print the records for people."""
        row, cfg = "{:20} {:>20} {:>27} {:>8} {:>8} {:>7} {:>6}", self.cfg
        print(f"\n{self.processor}: {cfg.size}, {cfg.dtype}, {cfg.threads} threads, gelu {cfg.gelu}, {self.clock_name}")
        print(row.format("figure", "rate", "seconds (min to max)", "floor", "fraction", "MB", "ratio"))
        forms = {"floor_seconds": ".3g", "fraction": ".1%", "peak_memory_mb": ",.0f", "ratio": ".2f"}
        for name, line in self.records.items():
            seconds = "{seconds:.4g} ({seconds_min:.4g} to {seconds_max:.4g})".format(**line)
            rest = ("-" if line[key] is None else format(line[key], form) for key, form in forms.items())
            print(row.format(name, f"{line['rate']:,.1f} {line['unit']}", seconds, *rest))
        print("MB: peak memory; ratio: the peer's seconds / ours")


def limits(bench):
    """The speed of a large matrix product and of a copy; every floor rests on the best runs of these."""
    size, times = (8192, 20) if bench.cuda else (2048, 1)  # a GPU needs more work than it takes to start it
    a, b = torch.randn(2, size, size, device=bench.device).to(getattr(torch, bench.cfg.dtype))
    source, target = torch.ones(2, 2**28, dtype=torch.uint8, device=bench.device)
    product = bench.time(lambda: [a @ b for _ in range(times)], 10)
    copy = bench.time(lambda: [target.copy_(source) for _ in range(times)], 10)
    work, byte = times * 2 * size**3, times * 2 * 2**28
    bench.flops, bench.bandwidth = work / min(product[0]), byte / min(copy[0])
    bench.record("matrix product", f"{size} x {size} x {size}", product, work / 1e9, "GFLOP/s")
    bench.record("copy", "256 MB, read and written", copy, byte / 1e9, "GB/s")


def stepper(model, loss_of):
    """One training step as a function: forward and backward of loss_of(), clipping, fused AdamW."""
    parameters = list(model.train().parameters())
    optimizer, log = adamw(parameters, LR, weight_decay=0.1), Log("")  # only to add to: nothing is written

    def step():
        loss_of().backward()
        optimizer_step(optimizer, parameters, LR, 1.0, log)
    return step


def train(bench):
    """Next-token prediction where every token counts."""
    B, T = bench.shapes["train"]
    model, rows = GPT(bench.config).to(bench.device), [(ids, 1) for ids in bench.tokens(B, T + 1)]
    step = stepper(model, lambda: -row_logprobs(model, rows, 0, bench.device, bench.autocast).sum() / (B * T))
    bench.record("train", f"one step on {B} x {T} tokens", bench.time(step), B * T, "tokens/s",
                 3 * B * flop(bench.config, T, T, True))


def sampling(bench):
    """Responses of full length to prompts of equal length."""
    B, P, R = bench.shapes["sample"]
    config, model = bench.config, GPT(bench.config).to(bench.device).eval()
    tokens, random = torch.tensor(bench.tokens(B, P), device=bench.device), torch.Generator(bench.device).manual_seed(1)

    def draw():
        with bench.autocast():
            sample(model, tokens, None, R, NEVER, TEMPERATURE, random=random, graph=bench.cfg.graph)
    # Numbers that must be read: at each step all weights, and keys and values of the tokens so far.
    read = R * sum(p.numel() for p in model.parameters()) + B * sum(range(P, P + R)) * 2 * config.n_layer * config.width
    byte = read * (2 if bench.cfg.dtype == "bfloat16" else 4) if bench.cuda else 0
    bench.record("sample", f"{B} rows, {P} + {R} tokens", bench.time(draw), B * R, "tokens/s",
                 B * sample_flop(config, P, R), byte)


def time_ppo(bench, config, B, P, R):
    """Iterations on B prompts of P tokens with responses of R: ({part: seconds of each}, seconds of each, MB, work).

    work: {part: operations}. The parts are rollout (sampling), scoring (the rest of collect) and update.
    """
    shared = bench.cfg.value == "shared"
    cfg = ppo.Config(episodes=B, epochs=4, minibatches=4, microbatch=max(64, B // 4), response_tokens=R,
                     temperature=TEMPERATURE, value=bench.cfg.value, graph=bench.cfg.graph)
    policy, ref, reward = (kind(config).to(bench.device).eval() for kind in (GPT, GPT, ScalarModel))
    ref.load_state_dict(policy.state_dict())
    value = (nn.Linear(config.width, 1) if shared else ScalarModel(config).eval()).to(bench.device)
    optimizer = adamw([*policy.parameters(), *value.parameters()], LR, weight_decay=0.0, eps=1e-5)
    random, prompts = torch.Generator(bench.device).manual_seed(1), bench.tokens(B, P)
    spans = {"rollout": [], "scoring": [], "update": []}  # seconds of every iteration
    untimed = ppo.sample_prompts

    def timed_sample(*args, **how):
        start = bench.clock()
        drawn = untimed(*args, **how)
        spans["rollout"].append(bench.clock() - start)
        return drawn

    def iteration():
        start = bench.clock()
        rollout, _ = ppo.collect(policy, ref, reward, value, prompts, cfg.kl_coef, cfg, NEVER, bench.autocast, random)
        collected = bench.clock()
        ppo.update(policy, value, optimizer, rollout, LR, cfg, bench.autocast, log, generator(bench.cfg.seed))
        spans["scoring"].append(collected - start - spans["rollout"][-1])
        spans["update"].append(bench.clock() - collected)

    with tempfile.TemporaryDirectory() as folder:
        log, ppo.sample_prompts = Log(folder), timed_sample
        try:
            seconds, memory = bench.time(iteration)
        finally:
            ppo.sample_prompts = untimed
    lm, score = flop(config, P + R - 1, R, True), flop(config, P + R, 1)
    values = 0 if shared else flop(config, P + R - 1, R)
    work = {"rollout": B * sample_flop(config, P, R), "scoring": B * (2 * lm + values + score),
            "update": cfg.epochs * 3 * B * (lm + values)}
    return {part: times[1:] for part, times in spans.items()}, seconds, memory, work


def ppo_iteration(bench):
    """One iteration and its parts."""
    B, P, R = bench.shapes["ppo"]
    spans, seconds, memory, work = time_ppo(bench, bench.config, B, P, R)
    for part, what in {"rollout": f"sampling, {B} rows, {P} + {R} tokens",
                       "scoring": "log-probabilities of policy and reference, rewards, values",
                       "update": "4 epochs of 4 minibatches"}.items():
        amount, unit = (B * R, "tokens/s") if part == "rollout" else (B, "episodes/s")
        bench.record(f"ppo.{part}", what, (spans[part], memory), amount, unit, work[part], value=bench.cfg.value)
    bench.record("ppo", "one iteration", (seconds, memory), B, "episodes/s", sum(work.values()), value=bench.cfg.value)


def scaling(bench):
    """Seconds per episode of PPO against batch, prompt length, response length and width, one changed at a time."""
    for name, sizes in SCALES.items():
        for size in sizes:
            base = dict(zip(("batch", "prompt", "response"), bench.shapes["ppo"]), width=bench.config.width)
            B, P, R, width = {**base, name: size}.values()
            config = dataclasses.replace(bench.config, width=width, block_size=max(bench.config.block_size, P + R))
            _, seconds, memory, work = time_ppo(bench, config, B, P, R)
            bench.record(f"{name} {size}", f"one iteration, {B} rows, {P} + {R} tokens, width {width}",
                         (seconds, memory), B, "episodes/s", sum(work.values()), value=bench.cfg.value)


def reward_step(bench):
    """A training step of the reward model."""
    model, rankings = ScalarModel(bench.config).to(bench.device), bench.tokens(PAIRS, 2, TEXT)

    def loss():
        with bench.autocast():
            scores, mask = score_rankings(model, rankings, bench.device)
        return ranking_loss(scores, mask)
    bench.record("reward", f"one step on {PAIRS} pairs of {TEXT} tokens", bench.time(stepper(model, loss)), PAIRS,
                 "pairs/s", 3 * 2 * PAIRS * flop(bench.config, TEXT, 1))


def dpo_step(bench, figure="dpo", rankings=None, K=2):
    """A training step of DPO; the reference's log-probabilities are known, as in dpo.py."""
    rankings = rankings or PAIRS
    model, pairs = GPT(bench.config).to(bench.device), rankings * math.comb(K, 2)
    texts = [[(ids, PROMPT) for ids in ranking] for ranking in bench.tokens(rankings, K, TEXT)]
    with torch.no_grad():
        ref_logprobs = response_logprobs(model, texts, 0, bench.device, bench.autocast)

    def loss():
        logprobs = response_logprobs(model, texts, 0, bench.device, bench.autocast)
        return measure(logprobs, ref_logprobs, DPOConfig())["loss"]
    bench.record(figure, f"one step on {pairs} pairs of {rankings} rankings of {K}, {PROMPT} + {TEXT - PROMPT} tokens",
                 bench.time(stepper(model, loss)), pairs, "pairs/s",
                 3 * rankings * K * flop(bench.config, TEXT - 1, TEXT - PROMPT, True))


def dpo_ranked(bench):
    """The same on rankings, whose responses are in several pairs each: a peer that takes pairs computes them again."""
    dpo_step(bench, "dpo-ranked", RANKINGS, K)


FIGURES = {"limits": limits, "train": train, "sample": sampling, "ppo": ppo_iteration, "reward": reward_step,
           "dpo": dpo_step, "dpo-ranked": dpo_ranked, "scaling": scaling}


def main(cfg):
    check_positive(cfg, "threads", "repeats")
    for name, allowed in {"size": ["tiny", "small"], "against": ["", "transformers", "trl"], "gelu": ["none", "tanh"],
                          "value": ["separate", "shared"], "dtype": ["float32", "bfloat16"]}.items():
        given = getattr(cfg, name)
        check(given in allowed, f"--{name} is {given!r}: write {' or '.join(filter(None, allowed))}")
    chosen = cfg.only.split(",") if cfg.only else [name for name in FIGURES if name != "scaling"]  # which takes minutes
    for name in chosen:
        check(name in FIGURES, f"--only {name!r}: the figures are {', '.join(FIGURES)}")
    check(Path(cfg.out).parent.is_dir(), f"--out {cfg.out}: its folder does not exist")
    torch.set_num_threads(cfg.threads)
    bench = Bench(cfg)
    peers = {}
    if cfg.against:
        from bench_peers import PEERS, load_peer  # only this needs them
        load_peer(cfg)
        peers = PEERS[cfg.against]
    for name in dict.fromkeys(["limits", *chosen]):  # every floor needs the limits
        FIGURES[name](bench)
        if name in peers:
            ours, measured = bench.records[name], peers[name](bench, name)
            bench.record(f"{name} {cfg.against}", ours["what"], measured, ours["rate"] * ours["seconds"], ours["unit"],
                         ratio=statistics.median(measured[0]) / ours["seconds"],
                         value="separate" if name == "ppo" else None)
    bench.table()


if __name__ == "__main__":
    run(main, Config)
