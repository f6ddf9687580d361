#!/usr/bin/env bash
# What does each detail of PPO do? On top of a finished train_all.sh, its PPO again with one thing changed at a time:
#   bash study/ablations.sh [tiny|smoke]            (the preset, SEED, OUT, DATA and FLAGS as train_all.sh had them)
# The PPO of train_all.sh is measured beside them, and so are, if these have been run, one of over_optimisation.sh (no KL
# penalty) and two of frontier.sh (KL targets of 3 and 12 nats). The table: out/tiny/ablations/ablations.md.
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

A=$OUT/ablations policies=$OUT/ppo rankings=$OUT/label/rankings.jsonl
ppo() {  # ppo NAME REWARD [FLAGS]; a run that runs away is a result: no ceiling
  stage "ablations/$1" ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$2" --prompts "$DATA/prompts_ppo.jsonl" --snapshots 1 \
                       --kl-ceiling 0 "${@:3}"
  policies=$policies,$A/$1
}
reward() {  # reward NAME RANKINGS [FLAGS]
  stage "ablations/$1" reward.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$2" --pairs "$DATA/pairs_test.jsonl" "${@:3}"
}

ppo whiten-rewards     "$OUT/reward" --whiten-rewards true
ppo raw-advantages     "$OUT/reward" --whiten-advantages false
ppo value-sft          "$OUT/reward" --value sft
ppo value-shared       "$OUT/reward" --value shared
ppo epochs-1           "$OUT/reward" --epochs 1
ppo epochs-8           "$OUT/reward" --epochs 8
ppo minibatches-4      "$OUT/reward" --minibatches 4
ppo kl-fixed           "$OUT/reward" --kl-horizon 0
ppo any-end            "$OUT/reward" --missing-eos-score nan
ppo clip-0.1           "$OUT/reward" --clip 0.1
ppo clip-0.4           "$OUT/reward" --clip 0.4
ppo temperature-1      "$OUT/reward" --temperature 1
ppo lam-1              "$OUT/reward" --lam 1
ppo adam-eps-1e-8      "$OUT/reward" --adam-eps 1e-8

reward reward-raw "$rankings" --sft ""  # the same reward model; its scores stay as they are
ppo raw-reward "$A/reward-raw"
# A labeler reads 2,880 responses each time: 1,440 rankings of two, 720 of four, 320 of nine; 64 of them are in a step.
for K in 4 2 9; do
  if [ $K != 4 ]; then
    stage ablations/samples-K$K label.py sample --preset $STEPS --model "$OUT/sft" --prompts "$DATA/prompts_label.jsonl" --K $K \
                                --prompts-limit $((K == 2 ? 0 : 380))
    stage ablations/label-K$K label.py rank --preset $STEPS --labeler "$OUT/labeler" --samples "$A/samples-K$K/samples.jsonl" \
                              --calibrate "$DATA/rankings_test.jsonl"
    rankings=$A/label-K$K/rankings.jsonl
  fi
  reward reward-K$K "$rankings" --limit $((2880 / K)) --batch-size $((64 / K)) --sft "$OUT/sft" --prompts "$DATA/prompts_label.jsonl"
  ppo K-$K "$A/reward-K$K"
done

for name in over_optimisation/free-all frontier/ppo-kl3 frontier/ppo-kl12; do
  [ ! -f "$OUT/$name/done.json" ] || policies=$policies,$OUT/$name
done
stage ablations/evaluate evaluate.py --preset $STEPS --sft "$OUT/sft" --policies "$policies" --reward "$OUT/reward" --labeler "$OUT/labeler" \
                         --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --others "" --text "$DATA/corpus_test.jsonl" \
                         --best-of 0 --snapshot-count 1
script collect -m study.collect "$A" "$A" --seed "$SEED"
script report -m study.ablations "$A"
echo "done in $SECONDS s: $A/ablations.md"
