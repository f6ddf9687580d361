"""The README's tables, from the committed results:   python results/table.py results/tiny/seed*/results.json"""
import json
import sys
from pathlib import Path


def cell(row, name):
    """value (low to high)"""
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"


runs = [json.loads(Path(path).read_text()) for path in sys.argv[1:]]
print("| seed | win rate of PPO | at equal length | proxy | labeler | judge | KL, nats | length, SFT to PPO | ends | "
      "perplexity, SFT to PPO |")
print("|---|---|---|---|---|---|---|---|---|---|")
for run in runs:
    sft, ppo = run["policies"]["sft"], run["policies"]["ppo"]
    print(f"| {run['config']['seed']} | {cell(ppo, 'win_rate_judge')} | {cell(ppo, 'length_controlled')} | "
          f"{ppo['proxy']:.2f} | {ppo['labeler']:.2f} | {ppo['judge']:.2f} | {ppo['kl']:.2f} | "
          f"{sft['length']:.1f} to {ppo['length']:.1f} | "
          f"{ppo['end_rate']:.3f} | {sft['perplexity']:.0f} to {ppo['perplexity']:.0f} |")

print("\n| movie reviews, held out | seed | labeler | judge | reward model | "
      "bag of words, labeler's half, judge's half | one person |")
print("|---|---|---|---|---|---|---|")
for group in ("movie, random", "movie, same_sign"):
    for run in runs:
        cards = run["reward_models"]
        scores = [f"{c['accuracy']:.3f} ({c['interval'][0]:.3f} to {c['interval'][1]:.3f})"
                  for c in (cards[name][group]["reward model"] for name in ("labeler", "judge", "proxy"))]
        words = [f"{cards[name][group]['bag of words']['accuracy']:.3f}" for name in ("labeler", "judge")]
        print(f"| {group.split(', ')[1].replace('_', ' ')} pairs | {run['config']['seed']} | {' | '.join(scores)} | "
              f"{', '.join(words)} | {cards['labeler'][group]['people']:.3f} |")

print("\n| stage | seconds | peak memory, MB |\n|---|---|---|")
for name, row in runs[0]["stages"].items():
    print(f"| {name} | {row['seconds']:.0f} | {row['peak_memory_mb']} |")
print(f"\n{runs[0]['hardware']}, torch {runs[0]['torch']}, {runs[0]['date']}, {runs[0]['prompts']} prompts")
