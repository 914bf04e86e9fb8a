#!/usr/bin/env bash
# torch 2.15.0: FlopCounterMode fails, even under no_grad, where a module gets a parameter's view.
#
# Counting operations needs no gradients, and under torch.no_grad() there are none. One would expect
# a network that runs to be counted. But the counter's module tracker asks each tensor that a module
# is called with for its gradient function if it requires gradients, and a view that is made of a
# parameter under no_grad, such as the expanded query of attention that pools (timm's test_vit3 and
# others), does so without having one: AssertionError "Expected gradient function to be set". A copy
# of the network with requires_grad_(False) is counted.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0
  python="$folder/venv/bin/python"
fi
"$python" - <<'PYTHON'
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.query.expand(2, -1)) + x


def counted(net):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3))
    return counter.get_total_flops()


try:
    counted(Net())
except AssertionError as error:
    found = str(error)
else:
    raise SystemExit("no longer so: it is counted")
frozen = counted(Net().requires_grad_(False))
assert frozen == 2 * 2 * 8 * 3
print(f"torch {torch.__version__}: under no_grad: AssertionError: {found}; "
      f"with requires_grad_(False): {frozen} flops. Expected: {frozen} both times")
PYTHON
