#!/usr/bin/env bash
# Table 2 as an array: ResNet-34 at 1.32x, ResNet-50 at 1.49x, 2.31x, 2.56x and 3.06x, on ImageNet.
#
#   sbatch slurm/table2.sh data.root=/data/imagenet
#   sbatch --array=1,2 --nodes=4 slurm/table2.sh data.root=/data/imagenet     (two of the rows)
#   bash slurm/table2.sh data.root=/data/imagenet                             (checked first)
#
# One row is one task, on whole nodes with all their GPUs; each has its own run folder and resumes
# by itself. When they have ended: tpp report runs/resnet*_tpp_*x
#
#SBATCH --job-name=table2
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
set -euo pipefail

rows=( # of the array's tasks, from 0 on
  configs/imagenet/resnet34_tpp_1.32x.yaml
  configs/imagenet/resnet50_tpp_1.49x.yaml
  configs/imagenet/resnet50_tpp_2.31x.yaml
  configs/imagenet/resnet50_tpp_2.56x.yaml
  configs/imagenet/resnet50_tpp_3.06x.yaml
)
own=()
for row in "${rows[@]}"; do own+=(--row "$row"); done
# sbatch runs a copy of this file in another folder.
job=""
if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  job="$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=\(/.*\)/slurm/.*|\1|p')" || true
fi
for root in "${TPP_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "${job%%$'\n'*}" "${SLURM_SUBMIT_DIR:-}"; do
  if [[ -n "$root" && -f "$root/launch/job.sh" ]]; then
    exec bash "$root/launch/job.sh" --script "${BASH_SOURCE[0]}" "${own[@]}" "$@"
  fi
done
echo "error: the repository is not found; submit from inside of it, or set TPP_ROOT to it" >&2
exit 2
