#!/usr/bin/env bash
# The whole of Table 1 on a SLURM cluster: the dense network first, then all other runs as arrays.
#
#   bash slurm/table1.sh [--sbatch-option=value ...] [key.sub=value ...]
#   bash slurm/table1.sh --partition=gpu --time=1-0 data.root=/data/cifar10
#
# Submits what is not done yet and prints the ids of its jobs; called again when these have ended,
# it submits what is still missing. A task that is requeued or submitted again goes on where it
# was. One run is one task on one GPU; logs are in the sweep's folder. Stages that several runs have
# in common are an array of their own; a run whose stage no task is at work on trains it itself.
# From the environment:
#
#   CONFIG    the sweep                     default: configs/cifar10/table1.yaml
#   OUTPUT    the folder of its runs        default: runs/table1
#   PARALLEL  how many tasks of an array run at once    default: 8
#   JOBS      how many runs a task has at once on its GPU, which small networks do not fill; it
#             gets a core for each, or what --cpus-per-task says   default: one run per task
#   LAUNCHER  what starts train/main.py in a task, such as "torchrun --nproc_per_node 4"
#   PYTHON    the interpreter               default: .venv/bin/python, or else python3
#
# TPP_PRINT=1 prints what would be called instead of calling it, JOB_OF_dense in the place of an id.
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

# A task of an array: these very runs and nothing else. The working directory is the repository; the
# arguments are what comes before a number (s: of a shared stage), the runs of each task where it
# has several, and from the interpreter on the command, see below.
if [[ -n "${SLURM_ARRAY_TASK_ID:-}" ]]; then
  only="$1$SLURM_ARRAY_TASK_ID"
  for runs in $2; do # a task's number is its first run's
    if [[ "$runs" =~ ^"$only"([-,]|$) ]]; then only="$runs" && break; fi
  done
  exec "${@:3}" --only "$only"
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

if [[ -n "${JOBS:-}" ]]; then
  sweep+=(--jobs "$JOBS")
  options=("--cpus-per-task=$JOBS" "${options[@]}")
fi
dense="$("${sweep[@]}" --pending --only 0)"
shared="$("${sweep[@]}" --pending --only s1-)"
others="$("${sweep[@]}" --pending --only 1-)"
if [[ -n "${LAUNCHER:-}" ]]; then sweep+=(--launcher "$LAUNCHER"); fi
command -v sbatch >/dev/null ||
  fail "there is no SLURM here (sbatch is not found); without it: ${sweep[*]}"
if [[ -z "${TPP_PRINT:-}" ]]; then mkdir -p "$OUTPUT/logs"; fi

submit() { # the runs, more options of sbatch; the job's id is in JOB then
  local runs="$1" prefix="" tasks="" id command
  if [[ "$runs" == s* ]]; then prefix=s; fi
  if [[ -n "${JOBS:-}" ]]; then # a line for each task
    tasks="$(tr '\n' ' ' <<<"$runs")"
    runs="$(sed 's/[-,].*//' <<<"$runs" | paste -sd,)"
  fi
  command=(sbatch --parsable --chdir="$PWD" --output="$OUTPUT/logs/$prefix%A_%a.log"
    --array="${runs//s/}${2:-}" "${@:3}" "${options[@]}" slurm/table1.sh "$prefix" "$tasks"
    "${sweep[@]}")
  if [[ -n "${TPP_PRINT:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
    JOB=JOB_OF_dense # the only one that others wait for
    return
  fi
  # Errexit is off where || follows: a refusal has to be handed on.
  id="$("${command[@]}")" || return
  id="${id%%;*}" # a cluster's name may follow
  [[ "$id" =~ ^[0-9]+$ ]] || return
  JOB="$id"
}

say() { # of TPP_PRINT=1 the commands are all
  if [[ -z "${TPP_PRINT:-}" ]]; then echo "$*"; fi
}

dependency=() queued=""
if [[ -n "$dense" ]]; then
  submit "$dense" ||
    fail "sbatch refuses the job of the dense network, see above; nothing is submitted"
  dependency=("--dependency=afterok:$JOB" --kill-on-invalid-dep=yes)
  queued="job $JOB of the dense network is in the queue: scancel $JOB, or let it end; then "
  say "dense network: job $JOB"
fi
for runs in "$shared" "$others"; do
  if [[ -z "$runs" ]]; then continue; fi
  what="runs ${runs//$'\n'/, }"
  if [[ "$runs" == s* ]]; then what="shared stages ${runs//$'\n'/, }"; fi
  submit "$runs" "%${PARALLEL:-8}" "${dependency[@]}" ||
    fail "sbatch refuses the array of $what, see above; ${queued}call this again"
  say "$what: job $JOB"
done
if [[ -z "$dense$shared$others" ]]; then
  echo "nothing to do: all runs in $OUTPUT are done"
else
  say "how far it is: cd $(printf '%q' "$PWD") && $(printf '%q ' "${sweep[@]}")--list"
fi
