#!/usr/bin/env bash
# DeepSpeed 0.19.8: the optimiser's state of every parameter group but the first cannot be read.
#
# ZeRO 1, AdamW, two parameter groups (weights with decay, biases without), some steps.
#   safe_get_full_optimizer_state(weight, "exp_avg")   the moment, as expected
#   safe_get_full_optimizer_state(bias, "exp_avg")     ValueError: exp_avg not found in optimizer state
#                                                      fragment, after any number of steps
# The parts are linked to their parameters once, after the first step of the first group, when the
# other groups have no state yet. One would expect both. Linking them anew gives both (tried).
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 deepspeed==0.19.8 numpy setuptools
  bin="$folder/venv/bin"
fi
cat >"$folder/states.py" <<'PYTHON'
import deepspeed
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from torch import nn

assert deepspeed.__version__.startswith("0.19.8"), f"made for 0.19.8, not {deepspeed.__version__}"
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
torch.manual_seed(0)
net = nn.Linear(4, 2)
groups = [
    {"params": [net.weight], "weight_decay": 0.1},
    {"params": [net.bias], "weight_decay": 0.0},
]
engine, optimizer, *_ = deepspeed.initialize(
    model=net,
    optimizer=torch.optim.AdamW(groups, lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
        "zero_allow_untested_optimizer": True,
    },
)
for _ in range(3):
    engine.backward(engine(torch.ones(1, 4)).square().sum())
    engine.step()


def read(parameter):
    try:
        return safe_get_full_optimizer_state(parameter, "exp_avg").abs().sum().item() > 0
    except ValueError as error:
        return str(error)


found = [read(net.weight), read(net.bias)]
optimizer._hp_optimizer_states_linked = False
optimizer._lazy_init_hp_params_optimizer_state()
linked = [read(net.weight), read(net.bias)]
print(f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, ZeRO 1, AdamW, 3 steps")
print(f"exp_avg of the first group's weight: {found[0]}; of the second group's bias: {found[1]}")
print(f"once linked anew: {linked}")
if found != [True, "exp_avg not found in optimizer state fragment"] or linked != [True, True]:
    raise SystemExit("this has changed")
PYTHON
port="$("$bin/python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')"
env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" CUDA_VISIBLE_DEVICES="" \
  DS_ACCELERATOR=cpu "$bin/python" "$folder/states.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
