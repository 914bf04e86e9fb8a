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

fail() {
  echo "error: $*" >&2
  exit 2
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
for argument in "$@"; do
  if [[ "$argument" == -h || "$argument" == --help ]]; then
    exec sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' slurm/table1.sh
  fi
done
# shellcheck source=launch/site.sh
source "${TPP_SITE:-launch/site.sh}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
CONFIG="${CONFIG:-configs/cifar10/table1.yaml}" OUTPUT="${OUTPUT:-runs/table1}"
for name in PYTHON CONFIG OUTPUT; do # a shell leaves ~ alone in quotes
  if [[ "${!name}" == "~/"* ]]; then printf -v "$name" %s "$HOME${!name:1}"; fi
done
options=()
sweep=("$PYTHON" -m train.sweep --config "$CONFIG" --output "$OUTPUT")
for argument in "$@"; do
  case "$argument" in
    -*) options+=("$argument") ;;
    *) sweep+=("$argument") ;;
  esac
done

dense="$("${sweep[@]}" --pending --only 0)"
others="$("${sweep[@]}" --pending --only 1-)"
if [[ -n "${LAUNCHER:-}" ]]; then sweep+=(--launcher "$LAUNCHER"); fi
command -v sbatch >/dev/null ||
  fail "there is no SLURM here (sbatch is not found); without it: ${sweep[*]}"
mkdir -p "$OUTPUT/logs"

submit() { # the tasks, then more options of sbatch; prints the job's id
  local id
  # Inside of $(...) errexit is off: a refusal has to be handed on.
  id="$(sbatch --parsable --chdir="$PWD" --output="$OUTPUT/logs/%A_%a.log" --array="$1" \
    "${@:2}" "${options[@]}" slurm/table1.sh "${sweep[@]}")" || return
  id="${id%%;*}" # a cluster's name may follow
  [[ "$id" =~ ^[0-9]+$ ]] || return
  echo "$id"
}

dependency=() queued=""
if [[ -n "$dense" ]]; then
  job="$(submit "$dense")" ||
    fail "sbatch refuses the job of the dense network, see above; nothing is submitted"
  dependency=("--dependency=afterok:$job" --kill-on-invalid-dep=yes)
  queued="job $job of the dense network is in the queue: scancel $job, or let it end; then "
  echo "dense network: job $job"
fi
if [[ -n "$others" ]]; then
  job="$(submit "$others%${PARALLEL:-8}" "${dependency[@]}")" ||
    fail "sbatch refuses the array of runs $others, see above; ${queued}call this again"
  echo "runs $others: job $job"
fi
if [[ -z "$dense$others" ]]; then
  echo "nothing to do: all runs in $OUTPUT are done"
else
  echo "how far it is: cd $(printf '%q' "$PWD") && $(printf '%q ' "${sweep[@]}")--list"
fi
