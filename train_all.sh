#!/usr/bin/env bash
# The whole of RLHF, from people's judgements to a report:   bash train_all.sh [preset]
#   tiny   (the default) a model trained from nothing, in minutes on a laptop's CPU or on a GPU
#   smoke  under a minute: does every stage run?
#   gpt2   GPT-2 on the same ratings of sentences, for one GPU of 24 GB
#   hh     GPT-2 on Anthropic's dialogues, for one GPU of 24 GB: people compared answers to the same prompt, so the reward
#          model learns from them and nobody has to stand in. --init gpt2-medium, or any flag of gpt2.py, may follow.
# Stopped or killed, the same command goes on where it was. A finished stage is not run again, unless its flags or inputs
# have changed. SEED=2 is another seed; OUT and DATA are other folders (a DATA of your own is used as it is: the files that
# the stages below name). FLAGS="--microbatch 4" goes to the stages that train: for less memory. STEPS=smoke bash
# train_all.sh hh runs the stages of hh with the few steps of smoke.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
preset=${1:-tiny}
[ $# = 0 ] || shift
case $preset in
  tiny|smoke) [ $# = 0 ] || { echo "error: $preset takes no flags, found: $*" >&2; exit 2; } ;;
  gpt2|hh) ;;
  *) echo "error: no preset '$preset' (tiny, smoke, gpt2, hh)" >&2; exit 2 ;;
esac
. ./setup.sh
OUT=${OUT:-out/$preset} SEED=${SEED:-1} STEPS=${STEPS:-$preset} FLAGS=${FLAGS:-} child=""
mkdir -p "$OUT"
made="seed $SEED, $STEPS${*:+ $*}${DATA:+, $DATA}"
[ -s "$OUT/made" ] || { echo "$made" > "$OUT/made.tmp"; mv "$OUT/made.tmp" "$OUT/made"; }
[ "$(cat "$OUT/made")" = "$made" ] || { echo "error: $OUT was made with $(cat "$OUT/made"), not $made: set OUT to another folder" >&2; exit 2; }

script() {  # script NAME SCRIPT [FLAGS]
  local name=$1 code=0; shift
  echo "== $name"
  "$PYTHON" "$@" & child=$!
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do wait $child || code=$?; done  # a signal ends wait: let the script save its state
  [ $code != 137 ] || echo "error: $name was killed, perhaps as memory ran out (FLAGS=\"--microbatch 4\" needs less)" >&2
  return $code
}
stage() {  # stage NAME SCRIPT [FLAGS]: the script sees for itself whether it is finished, or where to go on
  script "$@" --out "$OUT/$1" --seed "$SEED" --restart true
}
trap 'kill -TERM $child 2>/dev/null || exit 143' INT TERM HUP

if [ -z "${DATA:-}" ]; then
  case $preset in hh) DATA=data/hh kind=hh ;; *) DATA=data/reviews kind="" ;; esac
  [ -f $DATA/summary.json ] || script data data.py $kind --out $DATA
fi
case $preset in
  gpt2) stage base gpt2.py --block-size 128 "$@" ;;
  hh)   stage base gpt2.py --block-size 512 "$@" ;;
  *)    stage base sft.py --preset $STEPS-base $FLAGS --train "$DATA/corpus_train.jsonl" --test "$DATA/corpus_valid.jsonl" --vocab "$DATA/vocab.tiktoken" ;;
esac
stage sft      sft.py --preset $STEPS-sft $FLAGS --model "$OUT/base" --train "$DATA/demos_train.jsonl" --test "$DATA/demos_valid.jsonl"
if [ $preset = hh ]; then
  labeler=""  # the judge starts from the base model, as elsewhere: the less it shares with the reward model, the better
  stage judge  reward.py --preset $STEPS $FLAGS --model "$OUT/base" --train "$DATA/pairs_judge.jsonl" --test "$DATA/pairs_test.jsonl" \
                         --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_ppo.jsonl"
  stage reward reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$DATA/pairs_reward.jsonl" --test "$DATA/pairs_test.jsonl" \
                         --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_ppo.jsonl"
else
  labeler=$OUT/labeler
  for half in labeler judge; do
    stage $half  reward.py --preset $STEPS-people $FLAGS --model "$OUT/base" --train "$DATA/rankings_$half.jsonl" --test "$DATA/rankings_test.jsonl" \
                           --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
  done
  stage samples  label.py sample --preset $STEPS --model "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
  stage label    label.py rank --labeler "$labeler" --samples "$OUT/samples/samples.jsonl" --calibrate "$DATA/rankings_test.jsonl"
  stage reward   reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$OUT/label/rankings.jsonl" --pairs "$DATA/pairs_test.jsonl" \
                           --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
fi
stage ppo      ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl"
stage evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$OUT/ppo" --reward "$OUT/reward" --labeler "$labeler" \
                         --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --text "$DATA/corpus_test.jsonl"
echo "done in $SECONDS s: $OUT/evaluate/report.md"
