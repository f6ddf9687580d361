#!/usr/bin/env bash
# Keep what a finished run found:   bash results/collect.sh out/tiny results/tiny/seed1
# Logs, report cards, the report and its figures, and of study.sh's stages, if there are any, the same; no weights, and no
# text of the data set beyond the report's samples.
set -euo pipefail
run=$1 kept=$2
[ -f "$run/evaluate/done.json" ] || { echo "error: $run is not finished (evaluate/done.json is missing)" >&2; exit 2; }
mkdir -p "$kept"
cp "$run"/evaluate/results.json "$run"/evaluate/report.md "$run"/evaluate/*.png "$kept"
for stage in "$run"/*/; do
  for file in log.jsonl report_card.json done.json agreement.json; do
    [ ! -f "$stage$file" ] || cp "$stage$file" "$kept/$(basename "$stage")_$file"
  done
done
for stage in labelers agreement; do  # of labelers.sh
  for file in "$run/$stage"/{results.json,report.json,report.md,*.png}; do
    [ ! -f "$file" ] || { mkdir -p "$kept/$stage"; cp "$file" "$kept/$stage"; }
  done
done
for stage in "$run"/study/*/; do
  for file in log.jsonl report_card.json done.json results.json; do
    [ ! -f "$stage$file" ] || { mkdir -p "$kept/study/$(basename "$stage")"; cp "$stage$file" "$kept/study/$(basename "$stage")"; }
  done
done
