#!/usr/bin/env bash
# What a GPU shows, in one call:
#   bash tools/gpu.sh [hours]     1 if nothing is said: a part that takes more than its share is stopped, and the next begins
#   bash tools/gpu.sh --smoke     the same parts, small, on whatever is there
# Tests on the device; the presets tiny and smollm from start to report; speed beside the matrix product, and beside
# transformers if it is installed; a few steps at other sizes, of random weights and with SmolLM2's vocabulary of 49,152; what
# some flags change. $OUT (out/gpu) gets results.jsonl, a line for each part, stage and measurement, table.md, and a log of
# each part. A part that fails is a line, too; a preset that is finished there is not run again. No network is needed where
# data/reviews and data/pretrained/smollm2 are.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
hours=1 size=full
case ${1:-} in
  --smoke) size=smoke ;;
  ""|[0-9]*) hours=${1:-1} ;;
  *) echo "error: expected a number of hours, or --smoke, found: $1" >&2; exit 2 ;;
esac
has_packages() { "$1" -c 'from importlib.util import find_spec as has
assert all(map(has, "torch tiktoken numpy tqdm matplotlib safetensors pytest".split()))' 2>/dev/null; }
PYTHON=${PYTHON:-python3} OUT=${OUT:-out/gpu} DATA=${DATA:-}
has_packages "$PYTHON" || {  # as in train_all.sh
  [ -x .venv/bin/python ] || "$PYTHON" -m venv .venv
  PYTHON=$PWD/.venv/bin/python
  has_packages "$PYTHON" || "$PYTHON" -m pip install --quiet -r requirements.txt
}
mkdir -p "$OUT"
results=$OUT/results.jsonl
: > "$results"

line() {  # line NAME FIELDS: one line of JSON
  printf '{"name": "%s", %s}\n' "$1" "$2" >> "$results"
}
part() {  # part NAME PERCENT COMMAND: of the hours
  local name=$1 limit=$(awk "BEGIN {print int($hours * 36 * $2) + 60}") begin=$SECONDS code=0; shift 2
  echo "== $name, at most $limit s"
  timeout -k 30 "$limit" "$@" > "$OUT/$name.log" 2>&1 || code=$?
  line "$name" "\"seconds\": $((SECONDS - begin)), \"exit\": $code"
  [ $code = 0 ] || tail -n 3 "$OUT/$name.log"
}
steps() {  # steps NAME COMMAND: seconds and memory of a few steps, in 2 % of the hours
  echo "== $1"
  timeout -k 30 "$(awk "BEGIN {print int($hours * 72) + 60}")" "$PYTHON" -m tools.cost "$results" "$@" || line "$1" "\"exit\": $?"
}

figures=train,sample,sample-group,ppo-shared,reward,dpo presets="tiny smollm" speeds="tiny gpt2 smollm2" few="--dtype bfloat16 --iterations 4 --snapshots 1"
sizes=(smollm2 HuggingFaceTB/SmolLM2-360M Qwen/Qwen2.5-0.5B gpt2 gpt2-xl)
flags=("" "--value separate" "--microbatch 8" "--recompute" "--compile" "--advantages rloo" "--dtype float32")
if [ $size = smoke ]; then  # $OUT/small: a folder with the config.json of a model of few parameters
  presets=smoke speeds=tiny figures=sample sizes=("$OUT/small") flags=(--recompute)
  few="--iterations 3 --episodes 8 --epochs 1 --response-tokens 8 --snapshots 1"
fi
[ $size = smoke ] || part tests 5 "$PYTHON" -m pytest -q tests/core/test_device.py  # otherwise test.sh has run them
for preset in $presets; do
  [ -f "$OUT/$preset/evaluate/report.md" ] || part "$preset" 20 env OUT="$OUT/$preset" DATA="$DATA" PYTHON="$PYTHON" bash train_all.sh "$preset"
  for file in "$OUT/$preset"/*/done.json; do
    [ ! -f "$file" ] || line "$preset $(basename "$(dirname "$file")")" "$(tr -d '\n' < "$file" | sed 's/^{ *//; s/}$//')"
  done
done
run=$OUT/$preset  # the last of them: smollm, or tiny if that has come to nothing
[ -f "$run/reward/done.json" ] || run=$OUT/tiny
DATA=${DATA:-data/reviews}

bench="-m tools.bench --dtype bfloat16 $([ $size = full ] || echo --repeats 1)"
for model in $speeds; do
  part "speed-$model" 3 "$PYTHON" $bench --model "$model" --only "$figures"
  [ $size = smoke ] || ! "$PYTHON" -c 'import transformers' 2>/dev/null || part "peers-$model" 3 "$PYTHON" $bench --model "$model" --only train,sample --peers
done
for model in "${sizes[@]}"; do
  name=${model##*/} base=$OUT/base-${model##*/} reward=$OUT/reward-${model##*/}
  part "base-$name" 1 "$PYTHON" -m prepare.pretrained "$model" --random --block-size 256 --vocab "$run/base/vocab.tiktoken" --out "$base" --overwrite
  steps "reward, $name" "reward.py --model '$base' --train '$DATA/rankings_labeler.jsonl' --pairs '' --sft '$base' --prompts '$DATA/prompts_label.jsonl' \
    --limit 64 --samples 16 --response-tokens 8 --batch-size 8 --microbatch 8 --log-every 1 --out '$reward' --overwrite"
  steps "ppo, $name" "ppo.py --sft '$base' --reward '$reward' --prompts '$DATA/prompts_ppo.jsonl' $few --value shared"
done
for more in "${flags[@]}"; do
  steps "ppo${more:+ }$more" "ppo.py --sft '$run/sft' --reward '$run/reward' --prompts '$DATA/prompts_ppo.jsonl' $few --value shared $more"
done

{ echo "# What this machine showed: $(date +%F), \`bash tools/gpu.sh ${1:-}\`"
  echo
  "$PYTHON" -m tools.cost "$results"
  for log in "$OUT"/speed-*.log "$OUT"/peers-*.log; do
    [ ! -f "$log" ] || printf '\n**%s**\n\n```\n%s\n```\n' "$(basename "$log" .log)" "$(cat "$log")"
  done
} > "$OUT/table.md"
echo "done in $SECONDS s: $OUT/table.md"
