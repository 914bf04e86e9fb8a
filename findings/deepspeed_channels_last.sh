#!/usr/bin/env bash
# DeepSpeed 0.19.8: a network whose weights are channels_last cannot be initialised.
#
# One would expect any dense layout to do, as it does for DistributedDataParallel. Before the first
# step DeepSpeed sends the first rank's weights to the others as bytes, p.data.view(torch.uint8),
# and a view of other elements needs the last dimension to be the innermost one. It is no matter of
# the device or the backend, and happens with one rank too.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 deepspeed==0.19.8
  python="$folder/venv/bin/python"
fi
export RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 CUDA_VISIBLE_DEVICES=
MASTER_PORT="$("$python" -c 'import socket; s = socket.create_server(("", 0)); print(s.getsockname()[1])')"
export MASTER_PORT
"$python" -W ignore - <<'PYTHON' 2> >(grep -v WARNING >&2)
import deepspeed
import torch
from torch import nn

assert deepspeed.__version__.startswith("0.19.8"), f"made for 0.19.8, not {deepspeed.__version__}"
settings = {"train_batch_size": 1, "zero_optimization": {"stage": 0}}


def starts(layout):
    network = nn.Conv2d(3, 4, 3).to(memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    try:
        deepspeed.initialize(
            model=network, optimizer=optimizer, config=settings, dist_init_required=True
        )
    except RuntimeError as error:
        return str(error)
    return "starts"


usual, last = starts(torch.contiguous_format), starts(torch.channels_last)
print(f"DeepSpeed {deepspeed.__version__}: weights laid out as usual: {usual}; channels_last: {last}")
assert usual == "starts"
assert "stride(-1) must be 1" in last, "no longer so: any layout will do"
PYTHON
