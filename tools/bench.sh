#!/usr/bin/env bash
# Measures everything in docs/performance.md, on an idle machine, in about half an hour:
#   PYTHON=/path/to/python bash results/performance/run.sh        (with trl==1.12.0 installed, for the peers)
# Leaves one JSON line per figure in bench.jsonl, the same as tables in bench.txt, then table.md and scaling.png.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3} folder=results/performance
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-30000}  # as in setup.sh
rm -f $folder/bench.jsonl $folder/bench.txt
bench() { "$PYTHON" bench.py --out $folder/bench.jsonl "$@" | grep -v '^{' | tee -a $folder/bench.txt; }
for gelu in tanh none; do
  for dtype in float32 bfloat16; do
    bench --gelu $gelu --dtype $dtype --only ppo,reward,dpo,dpo-ranked --against trl
    bench --gelu $gelu --dtype $dtype --only train,sample --against transformers
    bench --gelu $gelu --dtype $dtype --only ppo --value shared
  done
done
for dtype in float32 bfloat16; do
  bench --dtype $dtype --size small --only train --repeats 3 --against transformers
  bench --dtype $dtype --threads 2 --only train,sample --against transformers
done
bench --threads 2 --only ppo --against trl
bench --dtype bfloat16 --gelu none --only scaling --repeats 2
"$PYTHON" $folder/table.py > $folder/table.md
