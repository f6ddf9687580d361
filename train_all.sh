#!/usr/bin/env bash
# The whole of RLHF, from people's judgements to a report:   bash train_all.sh [preset]
#   tiny   (the default) a model trained from nothing, in minutes on a laptop's CPU or on a GPU
#   smoke  under a minute: does every stage run?
#   smollm SmolLM2 135M on the same ratings of sentences: English, in under two hours on two cores (7.4 GB)
#   chat   SmolLM2 as an assistant, on Anthropic's dialogues: people compared responses to the same prompt, so the reward
#          model learns from them, without a labeler. Of each part (reward model, judge, PPO, test) 700: PAIRS=5000 takes
#          more, PAIRS=0 all, for a GPU. chat --train FILE takes comparisons on disk in place of them, all unless PAIRS is set
# Behind smollm or chat words for prepare.pretrained may follow, another model for one: smollm gpt2
# Stopped or killed, the same command resumes. A finished stage is not run again, unless its flags or inputs have changed.
# RLOO=1 trains RLOO, too. SEED=2 is another seed; OUT and DATA are other folders (a DATA of your own is used as it is: the
# files that the stages below name). FLAGS="--microbatch 4" goes to the stages that train. STEPS=smoke runs the stages of a
# larger preset with the few steps of smoke.
set -euo pipefail
here=$PWD
{ true >&1; } 2>/dev/null || exec >/dev/null  # a service may have no output
{ true >&2; } 2>/dev/null || exec 2>/dev/null
cd "$(dirname "${BASH_SOURCE[0]}")"
preset=${1:-tiny}
[ $# = 0 ] || shift
case $preset in
  tiny|smoke) [ $# = 0 ] || { echo "error: $preset takes no flags, found: $*" >&2; exit 2; } ;;
  smollm|chat) ;;
  *) echo "error: no preset '$preset' (tiny, smoke, smollm, chat)" >&2; exit 2 ;;
esac

# A Python with the packages of requirements.txt: $PYTHON or python3 if it has them, else .venv, made on the first call.
has_packages() { "$1" -c 'from importlib.util import find_spec as has
assert all(map(has, "torch tiktoken numpy tqdm matplotlib safetensors".split()))' 2>/dev/null; }
PYTHON=${PYTHON:-python3}
has_packages "$PYTHON" || {
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=$PWD/.venv/bin/python
  has_packages "$PYTHON" || { echo "installing requirements.txt into .venv (once)"; "$PYTHON" -m pip install --quiet -r requirements.txt; }
}
[ $preset != tiny ] || "$PYTHON" -c 'import torch
if torch.cuda.is_available(): print("CUDA is here: bash train_all.sh smollm runs on it, too, and writes English")'
# Threads that wait for each other spin for some microseconds and then sleep: to spin on, as is the default, costs a factor
# of three beside another busy process. glibc keeps freed memory: clearing fresh pages is a fifth of base training's time.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000} MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824

data=(reviews data/reviews)  # of the data: module of prepare, folder (empty: in OUT), file
PAIRS=${PAIRS:-}
if [ $preset = chat ] && [ -z "${DATA:-}" ]; then
  [ "${1:-}" = --train ] || PAIRS=${PAIRS:-700}
  [ "$PAIRS" != 0 ] || PAIRS=""
  data=(hh "data/hh$PAIRS")
elif [ -n "$PAIRS" ]; then echo "error: PAIRS is for chat without DATA" >&2; exit 2
fi
if [ "$preset ${1:-}" = "chat --train" ]; then
  file=${2:-}
  case $file in /*) ;; *) file=$here/$file ;; esac
  [ -f "$file" ] && [ -z "${DATA:-}" ] || { echo "error: --train $file: no such file (or DATA is set, too)" >&2; exit 2; }
  data=(hh "" "$file")
  shift 2
fi
words=$*
OUT=${OUT:-out/$preset} SEED=${SEED:-1} STEPS=${STEPS:-$preset} FLAGS=${FLAGS:-} child=""
case $OUT in *,*) echo "error: OUT=$OUT: a comma separates folders in the flags of the stages" >&2; exit 2 ;; esac
mkdir -p "$OUT"
made="seed $SEED, $STEPS${words:+ $words}${DATA:+, $DATA}${PAIRS:+, at most $PAIRS pairs}${data[2]:+, data $(cksum < "${data[2]}")}"
[ -s "$OUT/made" ] || echo "$made" > "$OUT/made"
[ "$(cat "$OUT/made")" = "$made" ] || { echo "error: $OUT was made with $(cat "$OUT/made"), not $made: set OUT to another folder" >&2; exit 2; }

script() {  # script NAME COMMAND: runs it in Python; a signal to this shell reaches it, and it saves its state
  local name=$1 code=0; shift
  echo "== $name"
  "$PYTHON" "$@" & child=$!
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do wait $child || code=$?; done
  [ $code != 137 ] || echo "error: $name was killed, perhaps as memory ran out (FLAGS=\"--microbatch 4\" needs less)" >&2
  return $code
}
stage() {  # stage NAME COMMAND: the script sees for itself whether it is finished, or where to resume
  script "$@" --out "$OUT/$1" --seed "$SEED" --overwrite
}
trap 'kill -TERM $child 2>/dev/null || exit 143' INT TERM

if [ -z "${DATA:-}" ]; then
  DATA=${data[1]:-$OUT/data}
  [ -f "$DATA/summary.json" ] || script data -m prepare.${data[0]} --out "$DATA" ${PAIRS:+--limit "$PAIRS"} ${data[2]:+--train "${data[2]}"}
fi
others=""  # prompts of other domains, where the data has them
for domain in amazon nyt tweets; do
  [ ! -f "$DATA/prompts_$domain.jsonl" ] || others=$others${others:+,}$DATA/prompts_$domain.jsonl
done
case $preset in
  smollm) stage base -m prepare.pretrained --block-size 128 "$@" ;;
  chat)   stage base -m prepare.pretrained --block-size 256 --chat "$@" ;;
  *)      stage base sft.py --preset $STEPS-base $FLAGS --train "$DATA/corpus_train.jsonl" --valid "$DATA/corpus_valid.jsonl" --vocab "$DATA/vocab.tiktoken" ;;
esac
stage sft      sft.py --preset $STEPS-sft $FLAGS --model "$OUT/base" --train "$DATA/demos_train.jsonl" --valid "$DATA/demos_valid.jsonl"
if [ $preset = chat ]; then
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
  stage label    label.py rank --preset $STEPS --labeler "$labeler" --samples "$OUT/samples/samples.jsonl" --calibrate "$DATA/rankings_test.jsonl"
  stage reward   reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$rankings" --pairs "$DATA/pairs_test.jsonl" \
                           --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
fi
stage dpo      dpo.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$rankings" --test "$held_out"
stage ppo      ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl"
rloo=""; [ "${RLOO:-0}" != 1 ] || rloo=,$OUT/rloo
[ -z "$rloo" ] || \
stage rloo     ppo.py --preset $STEPS $FLAGS --advantages rloo --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl"
stage evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$OUT/dpo,$OUT/ppo$rloo" --reward "$OUT/reward" --labeler "$labeler" \
                           --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --others "$others" --text "$DATA/corpus_test.jsonl"
script card    -m study.card "$OUT"
[ $preset != chat ] || [ "$OUT/evaluate/refusals.json" -nt "$OUT/evaluate/done.json" ] || \
script refusals -m study.refusals "$OUT" --policies base,sft,dpo,ppo${rloo:+,rloo}
script report  -m study.report "$OUT/evaluate"
if [ $preset = smollm ]; then
  judges=out/tiny/judge; [ -f $judges/done.json ] || judges=""
  script opinions -m study.opinions "$OUT" --judges "$judges"
fi
echo "done in $SECONDS s: $OUT/evaluate/report.md"
