#!/usr/bin/env bash
# Keep what a finished run printed:   bash results/collect.sh out/tiny results/tiny/seed1
# Logs, report cards, the report and its figures; no weights, and no text of the data set beyond the report's samples.
set -euo pipefail
run=$1 kept=$2
[ -f "$run/evaluate/done.json" ] || { echo "error: $run is not finished (evaluate/done.json is missing)" >&2; exit 2; }
mkdir -p "$kept"
cp "$run"/evaluate/results.json "$run"/evaluate/report.md "$run"/evaluate/*.png "$kept"
for stage in "$run"/*/; do
  for file in log.jsonl report_card.json done.json; do
    [ ! -f "$stage$file" ] || cp "$stage$file" "$kept/$(basename "$stage")_$file"
  done
done
