"""What goes wrong in a run of PPO, and how it shows. guard looks at every rollout while the run is under way."""
import math

from common import GUARD

CLOSE = 0.5  # how far a first ratio may be from 1: the rounding of bf16 at an unlikely token, but no bug
NEGATIVE = -0.1  # nats per response: by chance an estimate of KL is below zero, but not so far below
ROLLOUTS = 5  # ... for so many rollouts in a row


def guard_ratio(error, log):
    """Stop a run whose ratio, before anything has been learned from a rollout, is this far from 1 at some token."""
    if error > CLOSE:
        log.stop(f"the ratio is {error:.2f} away from 1 though nothing has been learned yet: old and new "
                 "log-probabilities of the same weights differ (masks, positions, temperature, dropout?)", GUARD)


def guard(metrics, streak, kl_ceiling, log):
    """Stop a run that has gone wrong; what only looks wrong comes back in words.

    metrics: those of ppo.collect. streak: {"below_zero": rollouts in a row with KL below zero}, changed here.
    kl_ceiling: nats per response; 0: none.
    """
    kl = metrics["kl"].item()
    streak["below_zero"] = streak["below_zero"] + 1 if kl < NEGATIVE else 0
    if kl > (kl_ceiling or math.inf):
        log.stop(f"KL is {kl:.1f} nats per response, above --kl-ceiling {kl_ceiling:g}: the policy runs away (a larger "
                 "--kl-coef or a smaller --lr holds it, with --restart true)", GUARD)
    if streak["below_zero"] >= ROLLOUTS:
        log.stop(f"KL is {kl:.2f} nats per response, below zero for {ROLLOUTS} rollouts: the responses were not drawn "
                 "from the policy whose log-probabilities are counted", GUARD)
    doubts = {"hardly a response reaches end of text": metrics["end_rate"] < 0.05,
              "nearly all responses are the same": metrics["distinct"] < 0.1}
    return [text for text, found in doubts.items() if found]
