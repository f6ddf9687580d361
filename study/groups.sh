#!/usr/bin/env bash
# Do different people need different reward models? On top of a finished train_all.sh:
#   bash study/groups.sh [tiny|smoke]               (the preset, SEED, OUT, DATA and FLAGS as train_all.sh had them)
# Two groups of raters and two random halves (study/groups.py): a reward model from the rankings of each, a policy by PPO
# for the two groups, and what each group's reward model says of the other's policy: $OUT/groups/groups.md.
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

G=$OUT/groups
[ -f "$G/labels/agreement.json" ] || script labels -m study.groups "$G/labels" --data "$DATA" --seed "$SEED"
for group in strict lenient half-a half-b; do
  stage "groups/$group" reward.py --preset $STEPS-people $FLAGS --model "$OUT/base" --train "$G/labels/rankings-$group.jsonl" \
             --pairs "$G/labels/pairs.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
done
for group in strict lenient; do
  stage "groups/ppo-$group" ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$G/$group" --prompts "$DATA/prompts_ppo.jsonl"
done
stage groups/evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$G/ppo-strict,$G/ppo-lenient" --reward "$G/strict" \
             --labeler "$G/lenient" --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --text "$DATA/corpus_test.jsonl" --best-of 0
script collect -m study.collect "$G" "$G" --seed "$SEED"
script page    -m study.groups "$G"
echo "done in $SECONDS s: $G/groups.md"
