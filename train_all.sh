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
  tiny|smoke|gpt2|hh) ;;
  *) echo "error: no preset '$preset' (tiny, smoke, gpt2, hh)" >&2; exit 2 ;;
esac
. ./stages.sh

if [ -z "${DATA:-}" ]; then
  case $preset in hh) DATA=data/hh kind=hh ;; *) DATA=data/reviews kind="" ;; esac
  last=$DATA/summary.json
  [ $preset = hh ] || [ ! -f $last ] || last=$DATA/prompts_tweets.jsonl  # which an earlier version of data.py did not make
  [ -f $last ] || script data data.py $kind --out $DATA
fi
others=""  # prompts of other domains, where the data has them
for domain in amazon nyt tweets; do
  [ ! -f "$DATA/prompts_$domain.jsonl" ] || others=$others${others:+,}$DATA/prompts_$domain.jsonl
done
case $preset in
  gpt2) stage base gpt2.py --block-size 128 "$@" ;;
  hh)   stage base gpt2.py --block-size 512 "$@" ;;
  *)    stage base sft.py --preset $STEPS-base $FLAGS --train "$DATA/corpus_train.jsonl" --test "$DATA/corpus_valid.jsonl" --vocab "$DATA/vocab.tiktoken" ;;
esac
stage sft      sft.py --preset $STEPS-sft $FLAGS --model "$OUT/base" --train "$DATA/demos_train.jsonl" --test "$DATA/demos_valid.jsonl"
if [ $preset = hh ]; then
  labeler="" rankings=$DATA/pairs_reward.jsonl held_out=$DATA/pairs_test.jsonl
  # The judge starts from the base model, as elsewhere: the less it shares with the reward model, the better.
  stage judge  reward.py --preset $STEPS $FLAGS --model "$OUT/base" --train "$DATA/pairs_judge.jsonl" --test "$DATA/pairs_test.jsonl" \
                         --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_ppo.jsonl"
  stage reward reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$rankings" --test "$held_out" \
                         --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_ppo.jsonl"
else
  labeler=$OUT/labeler rankings=$OUT/label/rankings.jsonl held_out=""
  for half in labeler judge; do
    stage $half  reward.py --preset $STEPS-people $FLAGS --model "$OUT/base" --train "$DATA/rankings_$half.jsonl" --test "$DATA/rankings_test.jsonl" \
                           --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
  done
  stage samples  label.py sample --preset $STEPS --model "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
  stage label    label.py rank --labeler "$labeler" --samples "$OUT/samples/samples.jsonl" --calibrate "$DATA/rankings_test.jsonl"
  stage reward   reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$rankings" --pairs "$DATA/pairs_test.jsonl" \
                           --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
fi
stage dpo      dpo.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$rankings" --test "$held_out"
stage ppo      ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl"
stage evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$OUT/dpo,$OUT/ppo" --reward "$OUT/reward" --labeler "$labeler" \
                         --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --others "$others" --text "$DATA/corpus_test.jsonl"
echo "done in $SECONDS s: $OUT/evaluate/report.md"
