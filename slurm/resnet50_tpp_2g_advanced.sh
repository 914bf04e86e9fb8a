#!/usr/bin/env bash
# ResNet-50 on ImageNet, pruned by TPP to 2 GMAC and distilled from its dense network.
#
#   sbatch --nodes=4 slurm/resnet50_tpp_2g_advanced.sh data.root=/data/imagenet
#   bash slurm/resnet50_tpp_2g_advanced.sh --nodes=4 data.root=/data/imagenet     (the same, checked first)
#
# Expect: no figure of our own yet (published at 2 GFLOPs: 77.75, by a recipe that is not public).
# Takes: 90,001 regularised iterations and 200 epochs of finetuning; see the configuration's head. Not run here.
# Whole nodes with all their GPUs, unless options of sbatch say otherwise, such as
# --oversubscribe --gpus-per-node=4 --cpus-per-gpu=8. launch/site.sh holds what your site needs.
#
#SBATCH --job-name=resnet50_tpp_2g_advanced
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
set -euo pipefail

# sbatch runs a copy of this file in another folder.
job=""
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  job="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(/.*\)/slurm/.*|\1|p')" || true
fi
for root in "${TPP_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${job%%$'\n'*}" "${SLURM_SUBMIT_DIR:-}"; do
  if [[ -n "$root" && -f "$root/launch/job.sh" ]]; then
    exec bash "$root/launch/job.sh" --script "${BASH_SOURCE[0]}" --row configs/imagenet/resnet50_tpp_2g_advanced.yaml "$@"
  fi
done
echo "error: the repository is not found; submit from inside of it, or set TPP_ROOT to it" >&2
exit 2
