#!/usr/bin/env bash
# The whole of Table 1 on a SLURM cluster: the dense network first, then all other runs as an array.
#
#   bash slurm/table1.sh [--sbatch-option=value ...] [key.sub=value ...]
#   bash slurm/table1.sh --partition=gpu --time=1-0 data.root=/data/cifar10
#
# Submits what is not done yet and prints the ids of its jobs; called again when these have ended,
# it submits what is still missing. A task that is requeued or submitted again goes on where it
# was. One run is one task on one GPU; logs are in the sweep's folder. From the environment:
#
#   CONFIG    the sweep                     default: configs/cifar10/table1.yaml
#   OUTPUT    the folder of its runs        default: runs/table1
#   PARALLEL  how many tasks run at once    default: 8
#   LAUNCHER  what starts train/main.py in a task, such as "torchrun --nproc_per_node 4"
#   PYTHON    the interpreter               default: .venv/bin/python, or else python3
#
# launch/site.sh may set PYTHON and what sbatch is asked for (SBATCH_PARTITION and the like).
#
#SBATCH --job-name=table1
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=4
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# A task of the array: this very run and nothing else. The working directory is the repository, and
# the first argument the interpreter, see below.
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  exec "$@" --only "$SLURM_ARRAY_TASK_ID"
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/site.sh
source "${TPP_SITE:-launch/site.sh}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
output="${OUTPUT:-runs/table1}"
options=()
sweep=("$PYTHON" -m train.sweep --config "${CONFIG:-configs/cifar10/table1.yaml}" --output "$output")
for argument in "$@"; do
  case "$argument" in
    -*) options+=("$argument") ;;
    *) sweep+=("$argument") ;;
  esac
done

dense="$("${sweep[@]}" --pending --only 0)"
others="$("${sweep[@]}" --pending --only 1-)"
if [[ -n "${LAUNCHER:-}" ]]; then sweep+=(--launcher "$LAUNCHER"); fi
mkdir -p "$output/logs"

submit() { # the tasks, then more options of sbatch; prints the job's id
  local id
  id="$(sbatch --parsable --chdir="$PWD" --output="$output/logs/%A_%a.log" --array="$1" \
    "${@:2}" "${options[@]}" slurm/table1.sh "${sweep[@]}")"
  echo "${id%%;*}" # a cluster's name may follow
}

dependency=()
if [[ -n "$dense" ]]; then
  job="$(submit "$dense")"
  dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  echo "dense network: job $job"
fi
if [[ -n "$others" ]]; then
  job="$(submit "$others%${PARALLEL:-8}" "${dependency[@]}")"
  echo "runs $others: job $job"
fi
if [[ -z "$dense$others" ]]; then
  echo "nothing to do: all runs in $output are done"
else
  echo "how far it is: ${sweep[*]} --list"
fi
