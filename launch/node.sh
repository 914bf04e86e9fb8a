#!/usr/bin/env bash
# One node's ranks by torchrun, accelerate launch or deepspeed, as the only task of an srun step on
# this node: node.sh LAUNCHER RANKS_OF_EACH_NODE PYTHON SCRIPT [argument ...]
#
#   bash launch/node.sh torchrun 8,8,4 python train/main.py --config FILE
#   TPP_NODE_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500 \
#     bash launch/node.sh torchrun 2x8 python train/main.py --config FILE
#
# Without SLURM (launch/kubernetes/, launch/skypilot.yaml, launch/torchx.py) TPP_NODE_RANK is this
# node's number from 0 on, MASTER_ADDR and MASTER_PORT are where the ranks meet, and a SIGTERM to
# this script alone, as a container gets it, is handed to the ranks.
#
# These launchers end with 1 whatever their ranks ended with, so that each rank leaves its own exit
# code in a folder of this node's. 2: a mistake; 75: start the same again; both are train/main.py's.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
fi
fail() { # 1, as bash ends where it fails itself, is tried again by Kubernetes
  echo "error: $*" >&2
  exit 2
}

given=()
for what in LAUNCHER RANKS_OF_EACH_NODE PYTHON SCRIPT; do
  (($#)) || fail "$what is missing: node.sh LAUNCHER RANKS_OF_EACH_NODE PYTHON SCRIPT [argument ...]"
  given+=("$1")
  shift
done
set -- "${given[@]}" "$@"
launcher="$1" python="$3"
layout="$2"
case "$launcher" in
  torchrun | accelerate | deepspeed) ;;
  *) fail "$launcher: none of torchrun, accelerate, deepspeed" ;;
esac
count="[1-9][0-9]{0,4}"
[[ "$layout" =~ ^($count(,$count)*|${count}x$count)$ ]] ||
  fail "$layout: neither ranks of each node, such as 8,8,4, nor NODESxRANKS, such as 2x8"
if [[ "$layout" =~ ^([0-9]+)x([0-9]+)$ ]]; then # 2x8 is 8,8
  printf -v layout "${BASH_REMATCH[2]},%.0s" $(seq "${BASH_REMATCH[1]}")
fi
IFS=, read -ra ranks <<<"${layout%,}"
shift 3

if [[ -n "${TPP_EXIT_CODES:-}" && -n "${RANK:-}" ]]; then # started by the launcher: one rank
  "$python" "$@" &
  rank=$!
  echo "$rank" >"$TPP_EXIT_CODES/running/$RANK"
  trap 'kill -USR1 "$rank" 2>/dev/null || true; again=1' USR1
  trap 'kill -TERM "$rank" 2>/dev/null || true; again=1' TERM
  if [[ -e "$TPP_EXIT_CODES/running/stop" ]]; then kill -TERM "$rank" 2>/dev/null || true; fi
  while true; do
    again="" code=0
    wait "$rank" || code=$?
    [[ -n "$again" ]] || break
  done
  rm -f "$TPP_EXIT_CODES/running/$RANK"
  echo "$code" >"$TPP_EXIT_CODES/$RANK"
  exit "$code"
fi

world=0
for count in "${ranks[@]}"; do world=$((world + count)); done
node="${TPP_NODE_RANK:-${SLURM_NODEID:-}}"
if [[ ! "$node" =~ ^[0-9]+$ ]] || ((node >= ${#ranks[@]})); then
  fail "TPP_NODE_RANK='$node': not one of ${#ranks[@]} node(s), from 0 on"
fi
here="${ranks[node]}"
if [[ -n "${TPP_NODE_RANK:-}" && (-z "${MASTER_ADDR:-}" || -z "${MASTER_PORT:-}") ]]; then
  fail "MASTER_ADDR and MASTER_PORT have to say where the ranks meet, on node 0"
fi
if [[ -z "${MASTER_ADDR:-}" || -z "${MASTER_PORT:-}" ]]; then
  # As for ranks that srun starts itself.
  found="$("$python" -c '
import os
from train.distributed.ranks import meeting_place
print(*meeting_place(os.environ))')"
  read -r found_address found_port <<<"$found"
  export MASTER_ADDR="${MASTER_ADDR:-$found_address}" MASTER_PORT="${MASTER_PORT:-$found_port}"
fi
TPP_EXIT_CODES="$(mktemp -d)"
export TPP_EXIT_CODES
mkdir "$TPP_EXIT_CODES/running"
one_rank=("$0" "$launcher" "$here" "$python" "$@")

bin="$(dirname "$python")/"
[[ "$bin" != ./ ]] || bin=""
case "$launcher" in
  torchrun)
    # The rank that writes the checkpoint may be the last to end; torchrun's own limit is 30 s.
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-150}"
    start=("$python" -m torch.distributed.run --nnodes="${#ranks[@]}" --node_rank="$node"
      --nproc_per_node="$here" --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT"
      --no-python bash "${one_rank[@]}")
    ;;
  accelerate)
    # --num_processes is of all nodes, which accelerate takes to be alike; --multi_gpu means "several
    # ranks by torchrun", also on the CPU, where --cpu would start one process and say nothing.
    several=()
    if ((world > 1)); then several=(--multi_gpu); fi
    start=("${bin}accelerate" launch --num_machines="${#ranks[@]}" --machine_rank="$node"
      --num_processes="$world" --main_process_ip="$MASTER_ADDR"
      --main_process_port="$MASTER_PORT" --mixed_precision=no --dynamo_backend=no
      "${several[@]}" --no_python bash "${one_rank[@]}")
    ;;
  deepspeed)
    # The launcher that deepspeed's runner would start over ssh: SLURM is there already.
    # It sets CUDA_VISIBLE_DEVICES from these numbers: here those of the GPUs that SLURM has given.
    layout="$("$python" -c '
import base64, json, os, sys
ranks = [int(count) for count in sys.argv[1].split(",")]
layout = {f"node{node}": list(range(count)) for node, count in enumerate(ranks)}
given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
here = f"node{sys.argv[2]}"
if all(number.isdigit() for number in given) and len(given) >= len(layout[here]):
    layout[here] = [int(number) for number in given[: len(layout[here])]]
print(base64.urlsafe_b64encode(json.dumps(layout).encode()).decode())' \
      "$(IFS=,; echo "${ranks[*]}")" "$node")"
    start=("$python" -m deepspeed.launcher.launch --world_info="$layout" --node_rank="$node"
      --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --no_python --no_local_rank
      bash "${one_rank[@]}")
    ;;
esac

# The launchers would end at SIGUSR1; what is ignored here they ignore too, and the ranks are sent it
# by SLURM themselves. A container's SIGTERM is sent to this script alone; torchrun, if it were handed
# it, would kill the ranks 30 s later, whatever they are writing.
stop_ranks() {
  touch "$TPP_EXIT_CODES/running/stop" # for those that are not there yet
  local file
  for file in "$TPP_EXIT_CODES"/running/[0-9]*; do
    if [[ -f "$file" ]]; then kill -TERM "$(<"$file")" 2>/dev/null || true; fi
  done
}
trap '' USR1
if [[ -n "${TPP_NODE_RANK:-}" ]]; then trap stop_ranks TERM; else trap 'true' TERM; fi
code=0
"${start[@]}" &
launched=$!
wait "$launched" || code=$?
while kill -0 "$launched" 2>/dev/null; do
  code=0
  wait "$launched" || code=$?
done
# Beside other codes 143 says only that the launcher has ended the rank because another one had ended.
codes="$(cat "$TPP_EXIT_CODES"/* 2>/dev/null | sort -n)" || true
most="$(grep -vx 143 <<<"$codes" | tail -n 1)" || true
most="${most:-$(tail -n 1 <<<"$codes")}"
rm -rf "$TPP_EXIT_CODES"
if ((code != 0)); then code="${most:-$code}"; fi
exit "$code"
