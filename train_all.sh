#!/usr/bin/env bash
# The whole of RLHF, from people's ratings to a report:   bash train_all.sh [preset]
#   tiny   (the default) minutes on a laptop's CPU or on a GPU
#   smoke  under a minute: does every stage run?
# A finished stage is not run again. Set SEED for another seed, OUT and DATA for other folders.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
preset=${1:-tiny}
case $preset in tiny|smoke) ;; *) echo "error: no preset '$preset' (tiny, smoke)" >&2; exit 2 ;; esac
. ./setup.sh
DATA=${DATA:-data/reviews} OUT=${OUT:-out/$preset} SEED=${SEED:-1}

stage() {  # stage NAME SCRIPT [FLAGS]: run it unless out/NAME/done.json says that it is finished
  local name=$1; shift
  if [ -f "$OUT/$name/done.json" ]; then echo "== $name: finished already"; return; fi
  echo "== $name"
  "$PYTHON" "$@" --out "$OUT/$name" --seed "$SEED"
}

[ -f "$DATA/summary.json" ] || { echo "== data"; "$PYTHON" data.py --out "$DATA"; }
stage base     sft.py --preset $preset-base --train "$DATA/corpus_train.jsonl" --test "$DATA/corpus_test.jsonl" --vocab "$DATA/vocab.tiktoken"
stage sft      sft.py --preset $preset-sft --model "$OUT/base" --train "$DATA/demos_train.jsonl" --test "$DATA/demos_test.jsonl"
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
echo "done: $OUT/evaluate/report.md"
