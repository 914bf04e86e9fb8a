#!/usr/bin/env bash
# PyTorch 2.15.0: fused SGD under a gradient scaler keeps a momentum that nobody has written when the
# scaler leaves the very first step out.
#
# One would expect a step that is left out to leave the optimiser as it was, as SGD without `fused`
# does: the next one is then its first. Fused SGD makes its momentum with torch.empty_like before its
# kernel looks at found_inf, the kernel does nothing, and the second step takes what the memory held
# for momentum. A scaler starts at a scale that overflows, so that first step is a usual one. Memory
# that nobody has written is filled with NaN by PyTorch's deterministic mode, which makes it visible;
# without it the numbers are whatever was there, mostly zeros and now and then not.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
  python="$folder/venv/bin/python"
fi
"$python" -W ignore - <<'PYTHON'
import math

import torch

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
torch.use_deterministic_algorithms(True)


def weights(fused):
    """After a step that overflows and one that does not, each with a gradient of ones."""
    weight = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e38)
    for factor in (1e3, 1.0):
        scaler.scale((factor * weight).sum()).backward()
        scaler.step(optimizer)
        if factor > 1:
            kept = optimizer.state[weight].get("momentum_buffer")
            print(f"fused={fused}: after the step that is left out momentum is {kept}")
            assert weight.equal(torch.ones(4)), "the step was not left out"
            scaler.update(1.0)
        optimizer.zero_grad()
    return weight.tolist()


plain, fused = weights(False), weights(True)
print(f"after the next step: {plain} without fused, {fused} with it")
assert all(math.isclose(value, 0.9, rel_tol=1e-6) for value in plain)
assert all(math.isnan(value) for value in fused), "no longer so: fused SGD begins as SGD does"
PYTHON
