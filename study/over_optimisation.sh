#!/usr/bin/env bash
# Where does RLHF stop helping? On top of a finished train_all.sh, two experiments, and
# out/tiny/over_optimisation/over_optimisation.md:
#   bash study/over_optimisation.sh [tiny|smoke]    (the preset, SEED, OUT, DATA and FLAGS as train_all.sh had them)
# 1. Over-optimisation: PPO without a KL penalty, and best-of-n, against reward models that learned from 250, from 1,000 and
#    from all comparisons; and against three reward models at once that learned from the same 250.
# 2. Labels that disagree: rankings without noise, and with a quarter of them reversed, beside those of train_all.sh.
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

reward() {  # reward NAME RANKINGS [FLAGS]
  stage "over_optimisation/$1" reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$2" --pairs "$DATA/pairs_test.jsonl" \
                   --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl" "${@:3}"
}
ppo() {  # ppo NAME REWARD [FLAGS]
  stage "over_optimisation/$1" ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$2" --prompts "$DATA/prompts_ppo.jsonl" "${@:3}"
}
measure() {  # measure NAME REWARD POLICIES [FLAGS]
  stage "over_optimisation/$1" evaluate.py --preset $STEPS --sft "$OUT/sft" --reward "$2" --policies "$3" --labeler "$OUT/labeler" --judge "$OUT/judge" \
                   --prompts "$DATA/prompts_eval.jsonl" --others "" --text "$DATA/corpus_test.jsonl" "${@:4}"
}
S=$OUT/over_optimisation rankings=$OUT/label/rankings.jsonl

# 42 rankings of four are 252 comparisons, 167 are 1,002. Epochs: the best held-out accuracy in seed 1, of 2, 8, 30 for 250
# (0.565, 0.547, 0.581) and of 2, 4, 8, 16 for 1,000 (0.609, 0.638, 0.667, 0.664).
free="--kl-coef 0 --kl-horizon 0 --kl-ceiling 0"  # no KL penalty
pool="--best-of 64 --count 256"  # few prompts: only curves are read
reward reward-250  "$rankings" --limit 42 --epochs 30
reward reward-1000 "$rankings" --limit 167 --epochs 8
ppo free-250  "$S/reward-250"  $free
ppo free-1000 "$S/reward-1000" $free
ppo free-all  "$OUT/reward"    $free
measure over-250  "$S/reward-250"  "$S/free-250"  $pool
measure over-1000 "$S/reward-1000" "$S/free-1000" $pool
measure over-all  "$OUT/reward"    "$S/free-all"  $pool

three=$S/reward-250
for member in 2 3; do  # the same comparisons; another head, order and dropout: seeds 12 and 13 for this one call
  split=$SEED
  SEED=$SEED$member reward reward-250-$member "$rankings" --limit 42 --epochs 30 --split-seed $split
  three=$three,$S/reward-250-$member
done
for how in mean min; do
  ppo free-250-$how "$three" --ensemble $how $free
  measure over-250-$how "$three" "$S/free-250-$how" --ensemble $how $pool
done

stage over_optimisation/label-exact   label.py rank --preset $STEPS --labeler "$OUT/labeler" --samples "$OUT/samples/samples.jsonl" --noise 0
stage over_optimisation/label-flipped label.py rank --preset $STEPS --labeler "$OUT/labeler" --samples "$OUT/samples/samples.jsonl" --noise 0 --flip 0.25
measure labels-people "$OUT/reward" "$OUT/ppo" --best-of-count 256
for labels in exact flipped; do
  reward reward-$labels "$S/label-$labels/rankings.jsonl"
  ppo ppo-$labels "$S/reward-$labels"
  measure labels-$labels "$S/reward-$labels" "$S/ppo-$labels" --best-of-count 256
done
script collect -m study.collect "$S" "$S" --seed "$SEED"
script report -m study.over_optimisation "$S"
echo "done in $SECONDS s: $S/over_optimisation.md"
