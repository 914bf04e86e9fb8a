#!/usr/bin/env bash
# One node's ranks by torchrun, accelerate launch or deepspeed, as the only task of an srun step on
# this node: node.sh LAUNCHER RANKS_OF_EACH_NODE PYTHON SCRIPT [argument ...]
#
# These launchers end with 1 whatever their ranks ended with, so that each rank leaves its own exit
# code in a folder of this node's.
set -euo pipefail
if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
  exec sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
fi
launcher="$1" python="$3"
IFS=, read -ra ranks <<<"$2"
shift 3

if [[ -n "${TPP_EXIT_CODES:-}" && -n "${RANK:-}" ]]; then # started by the launcher: one rank
  "$python" "$@" &
  rank=$!
  trap 'kill -USR1 "$rank" 2>/dev/null || true; again=1' USR1
  trap 'kill -TERM "$rank" 2>/dev/null || true; again=1' TERM
  while true; do
    again="" code=0
    wait "$rank" || code=$?
    [[ -n "$again" ]] || break
  done
  echo "$code" >"$TPP_EXIT_CODES/$RANK"
  exit "$code"
fi

world=0
for count in "${ranks[@]}"; do world=$((world + count)); done
node="$SLURM_NODEID" here="${ranks[$SLURM_NODEID]}"
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
one_rank=("$0" "$launcher" "$here" "$python" "$@")

bin="$(dirname "$python")/"
[[ "$bin" != ./ ]] || bin=""
case "$launcher" in
  torchrun)
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
here = "node" + os.environ["SLURM_NODEID"]
if all(number.isdigit() for number in given) and len(given) >= len(layout[here]):
    layout[here] = [int(number) for number in given[: len(layout[here])]]
print(base64.urlsafe_b64encode(json.dumps(layout).encode()).decode())' \
      "$(IFS=,; echo "${ranks[*]}")")"
    start=("$python" -m deepspeed.launcher.launch --world_info="$layout" --node_rank="$node"
      --master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT" --no_python --no_local_rank
      bash "${one_rank[@]}")
    ;;
esac

# The launchers would end at SIGUSR1; what is ignored here they ignore too, and the ranks are sent it
# by SLURM themselves.
trap '' USR1
trap 'true' TERM
code=0
"${start[@]}" &
launched=$!
wait "$launched" || code=$?
while kill -0 "$launched" 2>/dev/null; do
  code=0
  wait "$launched" || code=$?
done
most="$(cat "$TPP_EXIT_CODES"/* 2>/dev/null | sort -n | tail -n 1)" || true
rm -rf "$TPP_EXIT_CODES"
if ((code != 0)); then code="${most:-$code}"; fi
exit "$code"
