#!/usr/bin/env bash
# Keep what a finished run found:   bash results/collect.sh out/tiny results/tiny/seed1
# Logs, flags, report cards, the report and its figures, and of study.sh's, labelers.sh's and ablations.sh's stages, if there
# are any, the same; no weights, and no text of the data set beyond samples in the report and in PPO's log. Paths into the run
# become paths into out/tiny.
set -euo pipefail
run=$1 kept=$2
[ -f "$run/evaluate/done.json" ] || { echo "error: $run is not finished (evaluate/done.json is missing)" >&2; exit 2; }
keep() {  # keep FILE PLACE, if there is such a file
  [ -f "$1" ] || return 0
  mkdir -p "$(dirname "$2")"
  case $1 in *.png) cp "$1" "$2" ;; *) sed "s|$run/|out/tiny/|g" "$1" > "$2" ;; esac
}
for file in "$run"/evaluate/{results.json,report.md,*.png}; do
  keep "$file" "$kept/$(basename "$file")"
done
for stage in "$run"/*/; do
  for file in config.json log.jsonl report_card.json done.json agreement.json; do
    keep "$stage$file" "$kept/$(basename "$stage")_$file"
  done
done
for stage in labelers agreement; do
  for file in "$run/$stage"/{results.json,report.json,report.md,*.png}; do
    keep "$file" "$kept/$stage/$(basename "$file")"
  done
done
for stage in "$run"/{study,ablations}/*/; do
  for file in config.json log.jsonl report_card.json done.json results.json; do
    keep "$stage$file" "$kept/$(basename "$(dirname "$stage")")/$(basename "$stage")/$file"
  done
done
