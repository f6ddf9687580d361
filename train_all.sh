#!/usr/bin/env bash
# The whole of RLHF, from people's ratings to a report:   bash train_all.sh [preset]
#   tiny   (the default) minutes on a laptop's CPU or on a GPU
#   smoke  under a minute: does every stage run?
# A finished stage is not run again, unless one before it was. SEED=2 is another seed; OUT and DATA are other folders
# (a DATA of your own is used as it is: the files that the stages below name).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
preset=${1:-tiny}
case $preset in tiny|smoke) ;; *) echo "error: no preset '$preset' (tiny, smoke)" >&2; exit 2 ;; esac
. ./setup.sh
OUT=${OUT:-out/$preset} SEED=${SEED:-1} rerun=""
mkdir -p "$OUT"
[ -f "$OUT/seed" ] || echo "$SEED" > "$OUT/seed"
[ "$(cat "$OUT/seed")" = "$SEED" ] || { echo "error: $OUT has seed $(cat "$OUT/seed"), not $SEED: set OUT to another folder" >&2; exit 2; }

stage() {  # stage NAME SCRIPT [FLAGS]: run it unless $OUT/NAME/done.json says that it is finished
  local name=$1; shift
  if [ -z "$rerun" ] && [ -f "$OUT/$name/done.json" ]; then echo "== $name: finished already"; return; fi
  rerun=yes
  echo "== $name"
  "$PYTHON" "$@" --out "$OUT/$name" --seed "$SEED"
}

if [ -z "${DATA:-}" ]; then
  DATA=data/reviews
  [ -f $DATA/summary.json ] || { echo "== data"; "$PYTHON" data.py --out $DATA; }
fi
stage base     sft.py --preset $preset-base --train "$DATA/corpus_train.jsonl" --test "$DATA/corpus_valid.jsonl" --vocab "$DATA/vocab.tiktoken"
stage sft      sft.py --preset $preset-sft --model "$OUT/base" --train "$DATA/demos_train.jsonl" --test "$DATA/demos_valid.jsonl"
for half in labeler judge; do
  stage $half  reward.py --preset $preset-people --model "$OUT/base" --train "$DATA/rankings_$half.jsonl" --test "$DATA/rankings_test.jsonl" \
                         --pairs "$DATA/pairs_test.jsonl" --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
done
stage samples  label.py sample --preset $preset --model "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
stage label    label.py rank --labeler "$OUT/labeler" --samples "$OUT/samples/samples.jsonl" --calibrate "$DATA/rankings_test.jsonl"
stage reward   reward.py --preset $preset --model "$OUT/sft" --train "$OUT/label/rankings.jsonl" --pairs "$DATA/pairs_test.jsonl" \
                         --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
stage ppo      ppo.py --preset $preset --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl"
stage evaluate evaluate.py --preset $preset --sft "$OUT/sft" --policies "$OUT/ppo" --reward "$OUT/reward" --labeler "$OUT/labeler" \
                         --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --text "$DATA/corpus_test.jsonl"
echo "done in $SECONDS s: $OUT/evaluate/report.md"
