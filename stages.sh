# Sourced by train_all.sh, study.sh and labelers.sh, with the preset in $preset and its flags in $@: the folders of the run,
# and how a stage is run. Leaves OUT, SEED, STEPS, FLAGS as train_all.sh explains them, and refuses a folder of another run.
# on_top=yes: for scripts that go on from a finished train_all.sh.
if [ -n "${on_top:-}" ]; then
  case $preset in
    tiny|smoke) ;;
    *) echo "error: no preset '$preset' here (tiny, smoke: the numbers in this script were chosen for these)" >&2; exit 2 ;;
  esac
  [ -f "${OUT:-out/$preset}/evaluate/done.json" ] || { echo "error: ${OUT:-out/$preset} holds no finished run: bash train_all.sh $preset comes first" >&2; exit 2; }
fi
case $preset in tiny|smoke) [ $# = 0 ] || { echo "error: $preset takes no flags, found: $*" >&2; exit 2; } ;; esac
. ./setup.sh
OUT=${OUT:-out/$preset} SEED=${SEED:-1} STEPS=${STEPS:-$preset} FLAGS=${FLAGS:-} child=""
mkdir -p "$OUT"
made="seed $SEED, $STEPS${*:+ $*}${DATA:+, $DATA}"
[ -s "$OUT/made" ] || { echo "$made" > "$OUT/made.tmp"; mv "$OUT/made.tmp" "$OUT/made"; }
[ "$(cat "$OUT/made")" = "$made" ] || { echo "error: $OUT was made with $(cat "$OUT/made"), not $made: set OUT to another folder" >&2; exit 2; }

[ -z "${on_top:-}" ] || DATA=${DATA:-data/reviews}  # not before "made" was compared, which has it only if it was given

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
