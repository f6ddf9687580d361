#!/usr/bin/env bash
# What difference does it make who ranks, and how much? On top of a finished train_all.sh:
#   bash study/labelers.sh [tiny|smoke]             (the preset, SEED, OUT, DATA and FLAGS as train_all.sh had them)
# 1. VADER's rules rank the samples (RLAIF without a server; pip install vaderSentiment==3.3.2). From their rankings, and
#    from all others that lie in $OUT/label-NAME/rankings.jsonl (yours: labeling.terminal, labeling.merge), a reward model and
#    a PPO policy, beside those of train_all.sh: $OUT/labelers/evaluate/report.md.
# 2. Reward models from 100, 200, 400 and 800 of the labeler's rankings (their report_card.json shows what a doubling
#    brings); how far all these labelers and reward models agree is in $OUT/labelers/agreement/report.md.
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

L=$OUT/labelers
reward() {  # reward NAME RANKINGS HOW_MANY [FLAGS]: few rankings take more epochs, 80 steps at least (see over_optimisation.sh)
  local epochs=$((80 * 16 / $3))
  stage "labelers/reward-$1" reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$2" --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" \
             --prompts "$DATA/prompts_label.jsonl" --epochs $((epochs > 2 ? epochs : 2)) "${@:4}"
}

stage labelers/label-vader -m labeling.rlaif rank --labeler vader --samples "$OUT/samples/samples.jsonl" --pairs "$DATA/pairs_test.jsonl" --pairs-count 0
policies=$OUT/ppo files=$OUT/label/rankings.jsonl rewards=$OUT/labeler,$OUT/reward
for rankings in "$L/label-vader/rankings.jsonl" "$OUT"/label-*/rankings.jsonl; do
  [ -f "$rankings" ] || continue
  name=$(basename "$(dirname "$rankings")")
  name=${name#label-}
  case ,$policies, in *",$L/ppo-$name,"*) continue ;; esac  # your own label-vader: it is there already
  [ "$(wc -l < "$rankings")" -ge 10 ] || { echo "$rankings has fewer than 10 rankings: left out"; continue; }
  reward "$name" "$rankings" "$(wc -l < "$rankings")"
  stage "labelers/ppo-$name" ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$L/reward-$name" --prompts "$DATA/prompts_ppo.jsonl"
  policies=$policies,$L/ppo-$name rewards=$rewards,$L/reward-$name
  answers=${rankings%rankings.jsonl}answers.jsonl
  [ -f "$answers" ] || answers=$rankings
  files=$files,$answers
done
stage labelers/evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$policies" --reward "$OUT/reward" --labeler "$OUT/labeler" \
               --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --text "$DATA/corpus_test.jsonl" --best-of 0
for count in 100 200 400 800; do
  reward "first-$count" "$OUT/label/rankings.jsonl" $count --limit $count
  rewards=$rewards,$L/reward-first-$count
done
script agreement -m labeling.agreement ${files//,/ } --rewards "$rewards" --out "$L/agreement"
script report -m study.report "$L/evaluate"
echo "done in $SECONDS s: $L/evaluate/report.md, $L/agreement/report.md"
