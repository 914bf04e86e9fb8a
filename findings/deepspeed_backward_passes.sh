#!/usr/bin/env bash
# DeepSpeed 0.19.8: what a loss term of the weights alone counts for depends on who calls backward.
#
# ZeRO 1, 4 micro-batches; each one's task has a gradient of 1, and in the last one's loss there is a
# penalty on the weights with a gradient of 100. Divided by 4, as losses are: 1 + 25.
#   engine.backward(task + penalty)                  26, as expected
#   (task + penalty).backward()                      101: the division by gradient_accumulation_steps
#                                                    hangs on the network's outputs, through which
#                                                    the penalty does not come
#   engine.backward(task); penalty.backward()        1: the second backward pass is lost
#   engine.backward(task); engine.backward(penalty)  25: the tasks of all micro-batches are lost
# None of the four says a word. One would expect 26 of each, or a refusal.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 deepspeed==0.19.8 numpy setuptools
  bin="$folder/venv/bin"
fi
cat >"$folder/passes.py" <<'PYTHON'
import deepspeed
import torch
from torch import nn

assert deepspeed.__version__.startswith("0.19.8"), f"made for 0.19.8, not {deepspeed.__version__}"
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile
PARTS = 4
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": PARTS,
    "gradient_clipping": 0.0,
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


def gradient(way):
    torch.manual_seed(0)
    net = nn.Linear(4, 1, bias=False)
    before = net.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=CONFIG)
    for part in range(PARTS):
        task = engine(torch.ones(1, 4)).sum()  # a gradient of 1
        if part == PARTS - 1:
            way(engine, task, 100.0 * net.weight.sum())
        else:
            engine.backward(task)
        engine.step()
    return (before - net.weight.detach()).mean().item()


def both(engine, task, penalty):
    engine.backward(task + penalty)


def by_torch(engine, task, penalty):
    (task + penalty).backward()


def then_by_torch(engine, task, penalty):
    engine.backward(task)
    penalty.backward()


def then_by_engine(engine, task, penalty):
    engine.backward(task)
    engine.backward(penalty)


found = [round(gradient(way), 3) for way in (both, by_torch, then_by_torch, then_by_engine)]
print(f"DeepSpeed {deepspeed.__version__}, torch {torch.__version__}, ZeRO 1, {PARTS} micro-batches")
print(f"engine.backward(task + penalty): {found[0]}")
print(f"(task + penalty).backward(): {found[1]}")
print(f"engine.backward(task); penalty.backward(): {found[2]}")
print(f"engine.backward(task); engine.backward(penalty): {found[3]}")
if found != [26.0, 101.0, 1.0, 25.0]:
    raise SystemExit("this has changed")
PYTHON
port="$("$bin/python" -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')"
env RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT="$port" CUDA_VISIBLE_DEVICES="" \
  DS_ACCELERATOR=cpu "$bin/python" "$folder/passes.py" 2>"$folder/log" || { cat "$folder/log"; exit 1; }
