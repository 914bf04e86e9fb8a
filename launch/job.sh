#!/usr/bin/env bash
# A configuration on a SLURM cluster; what all of slurm/*.sh have in common.
#
#   sbatch --nodes=2 --exclusive [option ...] launch/job.sh --config FILE [--until STAGE] [key.sub=value ...]
#   bash launch/job.sh --nodes=2 --exclusive [option ...] --config FILE [--until STAGE] [key.sub=value ...]
#
# In a job or an allocation (salloc) it runs the ranks, one per GPU of the allocation, or one per
# task where it has none. Elsewhere, as with bash on a login node, it looks for what can be known
# to go wrong, and then submits itself. `%a` in a value is the number of the task in a job array.
# TPP_PRINT=1 prints what would be called instead of calling it. launch/site.sh has all settings;
# docs/cluster.md says more.
#
# A job that is stopped by a signal (SIGUSR1 ahead of the time limit, SIGTERM at preemption), or
# that loses a rank or a node, requeues itself and goes on from its newest checkpoint.
#
#SBATCH --job-name=tpp
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.log
set -euo pipefail

# Exit codes of train/main.py: a mistake of the user's, and "start the same command again".
readonly MISTAKE=2 AGAIN=75
# How long srun waits for the other ranks when the first one has ended, in seconds.
readonly LAST_RANK=120

fail() { # one line that says what to change
  echo "error: $*" >&2
  exit "$MISTAKE"
}

show_help() { # the comment at a script's head
  sed -n '2,/^[^#]/{/^#SBATCH/d;s/^# \{0,1\}//p}' "$1"
  exit
}

home_in() { # variables by name; a shell leaves ~ alone in quotes and in --config=~/x
  local name
  for name in "$@"; do
    if [[ "${!name:-}" == "~/"* ]]; then printf -v "$name" %s "$HOME${!name:1}"; fi
  done
}

find_root() { # sbatch runs a copy of the script, which is in no repository
  local command="" place
  if [[ -n "${SLURM_JOB_ID:-}" ]]; then
    command="$(scontrol show job "$SLURM_JOB_ID" 2>/dev/null |
      sed -n 's#^ *Command=\(/.*\)/launch/job\.sh.*#\1#p' | head -n 1)"
  fi
  for place in "${TPP_ROOT:-}" "$(dirname "${BASH_SOURCE[0]}")/.." "$command" \
    "${SLURM_SUBMIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}/.."; do
    if [[ -n "$place" && -f "$place/launch/job.sh" && -f "$place/train/main.py" ]]; then
      (CDPATH="" cd "$place" && pwd)
      return
    fi
  done
  fail "the repository is not found from here; submit from inside of it, or set TPP_ROOT to it"
}

read_site() {
  local site="${TPP_SITE:-$ROOT/launch/site.sh}"
  [[ -r "$site" ]] || fail "TPP_SITE: $site cannot be read"
  # shellcheck disable=SC1090
  source "$site"
  home_in PYTHON TPP_CONTAINER TPP_STAGE_DATA TPP_LOCAL_DISK
  LAUNCHER="${TPP_LAUNCHER:-srun}"
  case "$LAUNCHER" in
    srun | torchrun | accelerate | deepspeed) ;;
    *) fail "TPP_LAUNCHER: '$LAUNCHER' is none of srun, torchrun, accelerate, deepspeed" ;;
  esac
  case "${TPP_CONTAINER_KIND:-${TPP_CONTAINER:-none}}" in
    none) CONTAINER=none ;;
    apptainer | *.sif) CONTAINER=apptainer ;;
    pyxis | *) CONTAINER=pyxis ;;
  esac
  if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    if [[ "$CONTAINER" == none && -x "$ROOT/.venv/bin/python" ]]; then
      PYTHON="$ROOT/.venv/bin/python"
    fi
  fi
  local number
  for number in TPP_MAX_RESTARTS TPP_SETTLED_AFTER; do
    [[ "${!number:-0}" =~ ^[0-9]+$ ]] || fail "$number: '${!number}' is not a whole number"
  done
}

find_config() { # of the configuration's name the file
  local file="$1"
  home_in file
  if [[ ! -f "$file" && -f "$ROOT/$file" ]]; then file="$ROOT/$file"; fi
  [[ -f "$file" ]] || fail "--config: there is no file $file"
  echo "$file"
}

read_arguments() { # into OPTIONS (sbatch's), GIVEN, ROWS, CONFIG, UNTIL and OVERRIDES
  # GIVEN is the user's --config; ROWS are the script's own, several of them one for each task of
  # its array; CONFIG is the one that counts here.
  OPTIONS=() OVERRIDES=() ROWS=() GIVEN="" CONFIG="" UNTIL="" DATA_ROOT=""
  local argument
  while (($#)); do
    argument="$1"
    shift
    case "$argument" in
      -h | --help) show_help "$SCRIPT" ;;
      --config=*) GIVEN="${argument#*=}" ;;
      --until=*) UNTIL="${argument#*=}" ;;
      --config | --until | --script | --row)
        (($#)) || fail "$argument: what follows it is missing"
        case "$argument" in
          --config) GIVEN="$1" ;;
          --until) UNTIL="$1" ;;
          --script) SCRIPT="$1" ;; # whose #SBATCH lines count
          --row) ROWS+=("$1") ;;
        esac
        shift
        ;;
      -*)
        OPTIONS+=("$argument")
        # An option's value may be an argument of its own; settings of ours all have a dot or "=".
        if [[ $# -gt 0 && "$argument" != *=* && "$1" != -* && "$1" != *=* ]]; then
          OPTIONS+=("$1")
          shift
        fi
        ;;
      *=*)
        argument="${argument//%a/${SLURM_ARRAY_TASK_ID:-%a}}"
        if [[ "$argument" == data.root=* ]]; then DATA_ROOT="${argument#*=}"; fi
        OVERRIDES+=("$argument")
        ;;
      *) fail "$argument: neither a setting (key.sub=value) nor an option" ;;
    esac
  done
  home_in DATA_ROOT
  local row=0
  if [[ -n "$GIVEN" ]]; then
    GIVEN="$(find_config "$GIVEN")" || exit
    CONFIG="$GIVEN"
  elif ((${#ROWS[@]})); then
    if ((${#ROWS[@]} > 1)); then row="${SLURM_ARRAY_TASK_ID:-0}"; fi
    [[ -n "${ROWS[row]:-}" ]] ||
      fail "--array: there is no row $row; they are 0 to $((${#ROWS[@]} - 1))"
    CONFIG="$(find_config "${ROWS[row]}")" || exit
  else
    fail "--config FILE is missing; configs/ has one for each published row"
  fi
}

do_or_print() {
  if [[ -n "${TPP_PRINT:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# --- Outside of a job: check, then submit -------------------------------------------------------

check_python() { # before a traceback of every rank tells it
  "$PYTHON" -c 'import importlib.util as u, sys
sys.exit(not all(map(u.find_spec, ("torch", "accelerate", "pydantic", "safetensors"))))' 2>/dev/null ||
    fail "PYTHON: $PYTHON does not work or lacks the packages; 'make setup' in $ROOT makes .venv," \
      "or name another one in launch/site.sh"
}

check_site() { # what needs no Python
  command -v sbatch >/dev/null ||
    fail "there is no SLURM here (sbatch is not found); without it: torchrun --nproc_per_node N" \
      "train/main.py --config $CONFIG"
  if [[ -n "${TPP_STAGE_DATA:-}" && ! -e "${TPP_STAGE_DATA}" ]]; then
    fail "TPP_STAGE_DATA: there is no $TPP_STAGE_DATA"
  fi
  local image="${TPP_CONTAINER:-}" file=no
  case "$CONTAINER:$image" in # what else pyxis takes is a registry's name: me/tpp
    *://*) ;;
    apptainer:* | pyxis:[./]* | pyxis:*.sqsh) file=yes ;;
  esac
  if [[ "$file" == yes && ! -e "$image" ]]; then
    fail "TPP_CONTAINER: there is no $image on this machine; name an image that is there, or submit" \
      "by sbatch itself if it is on the compute nodes only"
  fi
}

check_here() { # what can be known to go wrong; the arguments are launch.check's
  check_site
  check_python
  local more=()
  if [[ -n "${TPP_STAGE_DATA:-}${TPP_DATA_ON_NODES:-}" ]]; then more=(--data-on-nodes); fi
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" -m launch.check "${more[@]}" "$@"
}

submit() {
  # The script names its own configurations again in the job, where a task has the row that is its.
  local arguments=() configs=() row file
  if [[ -n "$GIVEN" ]]; then
    arguments+=(--config "$GIVEN")
  else
    for row in "${ROWS[@]}"; do
      file="$(find_config "$row")" || exit
      configs+=(--config "$file")
    done
  fi
  if [[ -n "$UNTIL" ]]; then arguments+=(--until "$UNTIL"); fi
  arguments+=("${OVERRIDES[@]}")
  if [[ "$CONTAINER" == none ]]; then
    check_here "${configs[@]}" "${arguments[@]}" --script "$SCRIPT" -- "${OPTIONS[@]}" || exit
  else
    check_site
    echo "not checked here, but in the job: the configuration takes the container's Python" >&2
  fi
  export TPP_ROOT="$ROOT"
  do_or_print sbatch "${OPTIONS[@]}" "$SCRIPT" "${arguments[@]}" ||
    fail "sbatch refuses it, see above; sinfo -o '%P %D %c %G' shows what there is to ask for"
}

# --- In a job: which ranks, and where -----------------------------------------------------------

expand_counts() { # "4(x2),1" -> 4 4 1
  local part counts
  IFS=, read -ra counts <<<"$1"
  for part in "${counts[@]}"; do
    if [[ "$part" =~ ^([0-9]+)\(x([0-9]+)\)$ ]]; then
      printf "${BASH_REMATCH[1]} %.0s" $(seq "${BASH_REMATCH[2]}")
    else
      printf '%s ' "$part"
    fi
  done
}

job_id() { # of an array, this task alone: one task's SLURM_JOB_ID is the array's, and means all of it
  echo "${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}"
}

show_job() {
  scontrol show job -d "$(job_id)"
}

allocated_gpus() { # of what show_job prints: one number per node; nothing where there are no GPUs
  local nodes count node names
  declare -A found=()
  # Such as: Nodes=node[1-2] CPU_IDs=0-3 Mem=0 GRES=gpu:a100:4(IDX:0-3)
  while read -r nodes count; do
    names="$(scontrol show hostnames "$nodes")" || fail "scontrol: '$nodes' is not understood"
    for node in $names; do found[$node]=$count; done
  done < <(awk '/^ *Nodes=/ && match($0, /GRES=.*/) {
    gres = substr($0, RSTART + 5)
    gsub(/\([^)]*\)/, "", gres)
    total = 0
    parts = split(gres, part, ",")
    for (i = 1; i <= parts; i++)
      if (part[i] ~ /^gpu[:]/) { fields = split(part[i], field, ":"); total += field[fields] }
    split($1, named, "=")
    if (total) print named[2], total
  }' <<<"$1")
  if ((${#found[@]})); then
    for node in "${NODES[@]}"; do printf '%s ' "${found[$node]:-0}"; done
  fi
}

count_ranks() { # RANKS: how many on each node; GPUS: whether SLURM gives them GPUs
  local asked here node count job names gpus
  # Without its answer the nodes would look as if they had no GPUs.
  job="$(show_job)" || fail "scontrol does not say what the job was given, see above; submit again"
  names="$(scontrol show hostnames "$SLURM_JOB_NODELIST")" ||
    fail "scontrol does not say which nodes $SLURM_JOB_NODELIST are"
  mapfile -t NODES <<<"$names"
  gpus="$(allocated_gpus "$job")" || exit
  read -ra RANKS <<<"$gpus"
  GPUS=yes
  if ((${#RANKS[@]})); then
    # An exclusive node brings all its GPUs, whatever --gpus-per-node or --gres asked for, which is
    # shown such as: TresPerNode=gres:gpu:a100:4
    asked="$(sed -n 's#^ *TresPerNode=.*gres[:/]gpu[:=]\([^:=,]*:\)*\([0-9][0-9]*\).*#\2#p' <<<"$job")"
    if [[ -n "$asked" ]]; then
      for node in "${!NODES[@]}"; do RANKS[node]="$asked"; done
    fi
  else
    GPUS=no
    if [[ -n "${SLURM_NTASKS:-}" ]]; then
      read -ra RANKS <<<"$(expand_counts "$SLURM_TASKS_PER_NODE")"
    else
      # GPUs that SLURM knows nothing of; all nodes are taken to be alike.
      here="$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)"
      for node in "${!NODES[@]}"; do RANKS[node]=$((here > 0 ? here : 1)); done
    fi
  fi
  WORLD=0 ALIKE=yes
  for count in "${RANKS[@]}"; do
    WORLD=$((WORLD + count))
    if ((count == 0)); then fail "a node of the job has no GPU, others have; ask for --gpus-per-node"; fi
    if [[ "$count" != "${RANKS[0]}" ]]; then ALIKE=no; fi
  done
  asked="${SLURM_GPUS:-}"
  if [[ "$GPUS" == yes && "${asked##*:}" =~ ^[0-9]+$ ]] && ((${asked##*:} != WORLD)); then
    fail "--gpus=$asked, but the job's nodes are its own, with $WORLD GPUs; use --gpus-per-node=N," \
      "or add --oversubscribe"
  fi
}

cpus_per_rank() { # the same for all, as srun wants it; 0: fewer cores than ranks
  local cpus node least=""
  read -ra cpus <<<"$(expand_counts "$SLURM_JOB_CPUS_PER_NODE")"
  for node in "${!RANKS[@]}"; do
    local share=$((${cpus[node]:-1} / $1))
    if [[ -z "$least" ]] || ((share < least)); then least=$share; fi
  done
  echo "$least"
}

say_layout() {
  local node text=""
  for node in "${!NODES[@]}"; do text+=" ${NODES[node]}:${RANKS[node]}"; done
  echo "job $(job_id): $WORLD rank(s) on ${#NODES[@]} node(s) by $LAUNCHER:$text" \
    "${SLURM_RESTART_COUNT:+(restart $SLURM_RESTART_COUNT)}"
}

add_container() { # to SRUN (pyxis) or INSIDE (apptainer)
  [[ "$CONTAINER" != none ]] || return 0
  local mounts=("$ROOT" "$PWD") mount list="" binds=()
  if [[ "$DATA_ROOT" == /* ]]; then mounts+=("$DATA_ROOT"); fi
  if [[ -n "${TPP_STAGE_DATA:-}" ]]; then mounts+=("$LOCAL_DISK"); fi
  local more
  IFS=, read -ra more <<<"${TPP_MOUNTS:-}"
  for mount in "${mounts[@]}" "${more[@]}"; do
    if [[ "$mount" != *:* ]]; then mount="$mount:$mount"; fi
    if [[ ",$list," != *",$mount,"* ]]; then list+="${list:+,}$mount" binds+=(--bind "$mount"); fi
  done
  if [[ "$CONTAINER" == pyxis ]]; then
    SRUN+=("--container-image=$TPP_CONTAINER" "--container-mounts=$list" "--container-workdir=$PWD")
  else
    INSIDE=(apptainer exec --nv "${binds[@]}" --pwd "$PWD" "$TPP_CONTAINER")
  fi
}

check_cards() { # on each node, before anything is copied for hours; the ranks look again themselves
  [[ "$GPUS" == yes && "$CONTAINER" == none ]] || return 0
  local gpus=("--gpus-per-node=${RANKS[0]}")
  if [[ "$ALIKE" == no ]]; then gpus=("--gpus=$WORLD"); fi
  do_or_print srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 "${gpus[@]}" \
    "$PYTHON" -m train.cards --quiet || exit "$MISTAKE"
}

stage_data() { # a copy on each node's own disk
  [[ -n "${TPP_STAGE_DATA:-}" ]] || return 0
  [[ -z "$DATA_ROOT" ]] || fail "data.root and TPP_STAGE_DATA are both given; leave one out"
  check_cards
  local copy
  copy="$LOCAL_DISK/tpp-data-$(id -un)/$(basename "$TPP_STAGE_DATA")"
  do_or_print srun --nodes="${#NODES[@]}" --ntasks="${#NODES[@]}" --ntasks-per-node=1 \
    bash "$ROOT/launch/stage_data.sh" "$TPP_STAGE_DATA" "$copy" || exit "$MISTAKE"
  OVERRIDES+=("data.root=$copy")
}

forget_the_allocation() { # what sbatch was asked for is no wish of the step's
  unset SLURM_NTASKS SLURM_NPROCS SLURM_NTASKS_PER_NODE SLURM_TASKS_PER_NODE SLURM_DISTRIBUTION \
    SLURM_CPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_GPUS SLURM_GPUS_PER_NODE SLURM_GPUS_PER_TASK \
    SLURM_NTASKS_PER_GPU SLURM_CPUS_PER_GPU SLURM_GPU_BIND
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
  export SLURM_EXPORT_ENV=ALL PYTHONUNBUFFERED=1
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
}

build_srun() { # SRUN: the step; COMMAND: what each of its tasks calls
  local more cpus node host
  # No --kill-on-bad-exit: the rank that writes the checkpoint may be the last to end.
  SRUN=(srun --nodes="${#NODES[@]}" --kill-on-bad-exit=0 "--wait=$LAST_RANK")
  INSIDE=()
  COMMAND=("$ROOT/train/main.py" --config "$CONFIG")
  if [[ -n "$UNTIL" ]]; then COMMAND+=(--until "$UNTIL"); fi
  COMMAND+=("${OVERRIDES[@]}")
  if [[ "$LAUNCHER" == accelerate && "$ALIKE" == no ]]; then
    fail "TPP_LAUNCHER: accelerate wants as many GPUs on each node; use srun or torchrun here"
  fi
  local tasks_here="${RANKS[0]}"
  for node in "${RANKS[@]}"; do if ((node > tasks_here)); then tasks_here=$node; fi; done
  if [[ "$LAUNCHER" != srun ]]; then
    tasks_here=1
    SRUN+=(--ntasks="${#NODES[@]}" --ntasks-per-node=1)
    COMMAND=(bash "$ROOT/launch/node.sh" "$LAUNCHER" "$(IFS=,; echo "${RANKS[*]}")" \
      "$PYTHON" "${COMMAND[@]}")
  elif [[ "$ALIKE" == yes ]]; then
    SRUN+=(--ntasks="$WORLD" --ntasks-per-node="${RANKS[0]}" --distribution=block)
    COMMAND=("$PYTHON" "${COMMAND[@]}")
  else
    # srun has no count per node; this file names the node of each rank.
    SLURM_HOSTFILE="$(mktemp "${TMPDIR:-/tmp}/ranks.XXXXXX")"
    export SLURM_HOSTFILE
    for node in "${!NODES[@]}"; do
      for ((host = 0; host < RANKS[node]; host++)); do echo "${NODES[node]}"; done
    done >"$SLURM_HOSTFILE"
    SRUN+=(--ntasks="$WORLD" --distribution=arbitrary)
    COMMAND=("$PYTHON" "${COMMAND[@]}")
  fi
  if [[ "$GPUS" == yes ]]; then # a step of an exclusive job has none unless it asks
    if [[ "$ALIKE" == yes ]]; then SRUN+=("--gpus-per-node=${RANKS[0]}"); else SRUN+=("--gpus=$WORLD"); fi
  fi
  cpus="$(cpus_per_rank "$tasks_here")"
  if ((cpus > 0)); then SRUN+=("--cpus-per-task=$cpus"); else SRUN+=(--overcommit); fi
  if [[ "$GPUS" == no && "$LAUNCHER" == srun ]]; then
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cpus > 0 ? cpus : 1))}"
  fi
  read -ra more <<<"${TPP_SRUN_OPTIONS:-}"
  SRUN+=("${more[@]}")
  add_container
}

# --- In a job: run, and start again -------------------------------------------------------------

run_ranks() { # in EXIT how they ended, in STOPPED the signal that this script was sent
  local step interrupted
  STOPPED=""
  if [[ -n "${TPP_PRINT:-}" ]]; then
    do_or_print "${SRUN[@]}" "${INSIDE[@]}" "${COMMAND[@]}"
    exit
  fi
  "${SRUN[@]}" "${INSIDE[@]}" "${COMMAND[@]}" &
  step=$!
  # srun would kill its tasks at SIGTERM; SIGUSR1 it hands on.
  trap 'interrupted=1 STOPPED=SIGUSR1; kill -USR1 "$step" 2>/dev/null || true' USR1
  trap 'interrupted=1 STOPPED=SIGTERM; kill -USR1 "$step" 2>/dev/null || true' TERM
  while true; do
    interrupted="" EXIT=0
    wait "$step" || EXIT=$?
    [[ -n "$interrupted" ]] || break # else a signal has ended the wait, not the step
  done
  trap - USR1 TERM
}

requeue_or_end() {
  if ((EXIT != AGAIN && EXIT <= 128)); then exit "$EXIT"; fi
  local restarts="${SLURM_RESTART_COUNT:-0}" job
  job="$(show_job)"
  if [[ "$job" != *BatchFlag=1* ]]; then
    echo "the run is not finished: start the same command again, and it goes on" >&2
    exit "$EXIT"
  fi
  # Cancelled, or requeued by SLURM itself: not ours to bring back.
  if [[ "$job" != *JobState=RUNNING* ]]; then exit "$EXIT"; fi
  # 138 and 143 are SIGUSR1 and SIGTERM before train/main.py listened to them.
  if ((EXIT > 128 && EXIT != 138 && EXIT != 143)) && [[ -z "$STOPPED" ]] &&
    ((SECONDS < ${TPP_SETTLED_AFTER:-60})); then
    echo "error: a rank was killed (exit code $EXIT) $SECONDS s after the start; not requeued, as it" \
      "would happen again: look above for the reason, such as too little memory (--mem)" >&2
    exit "$EXIT"
  fi
  if ((restarts >= ${TPP_MAX_RESTARTS:-50})); then
    echo "error: not requeued: TPP_MAX_RESTARTS=${TPP_MAX_RESTARTS:-50} restarts are used up;" \
      "submit the same command again to go on" >&2
    exit "$EXIT"
  fi
  echo "job $(job_id) is requeued and goes on from its newest checkpoint (restart $((restarts + 1)))"
  if ! scontrol requeue "$(job_id)"; then
    echo "error: this site does not requeue; submit the same command again to go on" >&2
    exit "$EXIT"
  fi
  sleep 60 # SLURM ends this script
  exit "$EXIT"
}

load_modules() {
  [[ -n "${TPP_MODULES:-}" ]] || return 0
  local init code
  set +eu # module is a shell function, and not written for these
  for init in /etc/profile.d/{modules,lmod,z00_lmod,00-modulepath}.sh; do
    if ! type module &>/dev/null && [[ -r "$init" ]]; then source "$init"; fi
  done
  # shellcheck disable=SC2086
  module load $TPP_MODULES
  code=$?
  set -eu
  ((code == 0)) || fail "TPP_MODULES: 'module load $TPP_MODULES' fails"
}

run_in_job() {
  if [[ "${SLURM_STEP_NUM_TASKS:-1}" != 1 ]]; then
    [[ "${SLURM_PROCID:-0}" == 0 ]] || exit "$MISTAKE"
    fail "started by srun as ${SLURM_STEP_NUM_TASKS} tasks; use sbatch, or bash in the allocation"
  fi
  ((${#OPTIONS[@]} == 0)) ||
    fail "${OPTIONS[0]}: options of sbatch come before the script's name, or outside of an allocation"
  command -v scontrol >/dev/null || fail "scontrol is not found in this job; check PATH"
  load_modules
  LOCAL_DISK="${TPP_LOCAL_DISK:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}}"
  if [[ "$CONTAINER" == none ]]; then check_python; fi
  count_ranks
  if ((WORLD == 1)); then LAUNCHER=srun; fi # one process needs no launcher
  say_layout
  forget_the_allocation
  stage_data
  build_srun
  run_ranks
  if [[ -n "${SLURM_HOSTFILE:-}" ]]; then rm -f "$SLURM_HOSTFILE"; fi
  requeue_or_end
}

main() {
  ROOT="$(find_root)" || exit
  SCRIPT="$ROOT/launch/job.sh"
  read_arguments "$@"
  read_site
  if [[ -n "${SLURM_JOB_ID:-}" ]]; then run_in_job; else submit; fi
}

# launch/submit_chain takes what it needs from here.
if [[ "${BASH_SOURCE[0]}" == "$0" ]]; then main "$@"; fi
