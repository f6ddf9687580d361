#!/usr/bin/env bash
# Which method, at what KL? On top of a finished train_all.sh (RLOO=1), all methods on one footing, and out/tiny/frontier/frontier.md:
#   bash study/frontier.sh [tiny|smoke]             (the preset, SEED, OUT, DATA and FLAGS as train_all.sh had them)
# Best-of-n; DPO at four betas; PPO, RLOO and GRPO at four KL targets; RLOO and GRPO with groups of 2 and 8; PPO without a
# value model (--lam 1: lam 0.95 would discount the score by 5 % a token), and without any baseline: REINFORCE.
# All have 128 episodes in a rollout: 128 prompts once, 64 twice, 32 four times or 16 eight times.
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

F=$OUT/frontier policies=$OUT/ppo,$OUT/dpo dpos=$OUT/dpo
ppo() {  # ppo NAME [FLAGS]; horizon 250: 10 % per rollout; the default's 2.6 % hardly moves the coefficient in 32 rollouts
  stage "frontier/$1" ppo.py --preset $STEPS $FLAGS --sft "$OUT/sft" --reward "$OUT/reward" --prompts "$DATA/prompts_ppo.jsonl" \
                      --kl-horizon 250 --snapshots 1 "${@:2}"
  policies=$policies,$F/$1
}
measure() {  # measure NAME POLICIES [FLAGS]
  stage "frontier/$1" evaluate.py --preset $STEPS --sft "$OUT/sft" --reward "$OUT/reward" --policies "$2" --labeler "$OUT/labeler" \
                      --judge "$OUT/judge" --prompts "$DATA/prompts_eval.jsonl" --others "" --text "$DATA/corpus_test.jsonl" "${@:3}"
}

[ ! -f "$OUT/rloo/done.json" ] || policies=$policies,$OUT/rloo
for target in 3 6 9 12; do
  ppo ppo-kl$target --kl-target $target
  ppo rloo-kl$target --kl-target $target --advantages rloo
  ppo grpo-kl$target --kl-target $target --advantages grpo
done
for K in 2 8; do
  ppo rloo-group$K --advantages rloo --group $K
  ppo grpo-group$K --advantages grpo --group $K
done
ppo no-values --value none --lam 1
ppo reinforce --value none --lam 1 --whiten-advantages false
for beta in 0.05 0.5 1; do
  stage frontier/dpo-beta$beta dpo.py --preset $STEPS $FLAGS --model "$OUT/sft" --train "$OUT/label/rankings.jsonl" --beta $beta
  dpos=$dpos,$F/dpo-beta$beta policies=$policies,$F/dpo-beta$beta
done
measure evaluate "$policies" --best-of 64 --best-of-count 256
measure evaluate-at-1 "$dpos" --temperature 1 --best-of 0 --snapshot-count 1  # the temperature that DPO trains at
script collect -m study.collect "$F" "$F" --seed "$SEED"
script report -m study.frontier "$F"
echo "done in $SECONDS s: $F/frontier.md"
