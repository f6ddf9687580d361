# Sourced by the scripts beside it, which run on top of a finished train_all.sh: checks that there is one, with
# PYTHON, OUT, SEED, STEPS, FLAGS and DATA as train_all.sh had them, and says how a stage is run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
preset=${1:-tiny}
case $preset in
  tiny|smoke) [ $# -lt 2 ] || { echo "error: unexpected: ${*:2}" >&2; exit 2; } ;;
  *) echo "error: no preset '$preset' here (tiny, smoke: the numbers in this script were chosen for these)" >&2; exit 2 ;;
esac
OUT=${OUT:-out/$preset} SEED=${SEED:-1} STEPS=${STEPS:-$preset} FLAGS=${FLAGS:-} child=""
[ -f "$OUT/evaluate/done.json" ] || { echo "error: $OUT holds no finished run: bash train_all.sh $preset comes first" >&2; exit 2; }
made="seed $SEED, $STEPS${DATA:+, $DATA}"
[ "$(cat "$OUT/made")" = "$made" ] || { echo "error: $OUT was made with $(cat "$OUT/made"), not $made" >&2; exit 2; }
DATA=${DATA:-data/reviews} PYTHON=${PYTHON:-python3}
"$PYTHON" -c 'from importlib.util import find_spec as has; assert has("torch") and has("tiktoken")' 2>/dev/null || PYTHON=$PWD/.venv/bin/python  # train_all.sh made it
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000} MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=1073741824  # as there

script() {  # script NAME COMMAND: runs it in Python; a signal to this shell reaches it, and it saves its state
  local name=$1 code=0; shift
  echo "== $name"
  "$PYTHON" "$@" & child=$!
  wait $child || code=$?
  while kill -0 $child 2>/dev/null; do wait $child || code=$?; done
  return $code
}
stage() {  # stage NAME COMMAND: the script sees for itself whether it is finished, or where to resume
  script "$@" --out "$OUT/$1" --seed "$SEED" --overwrite
}
trap 'kill -TERM $child 2>/dev/null || exit 143' INT TERM
