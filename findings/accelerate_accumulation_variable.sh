#!/usr/bin/env bash
# Accelerate 1.15.0: an environment variable wins over what a program hands to Accelerator.
#
# With ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 in the environment (accelerate launch sets it from a
# configuration file of DeepSpeed's) Accelerator(gradient_accumulation_steps=1) divides every loss by
# 4 in accelerator.backward, without a word: a program that does not accumulate trains with a quarter
# of its gradient. mixed_precision goes the other way: what the program says wins over
# ACCELERATE_MIXED_PRECISION. Only GradientAccumulationPlugin(num_steps=1) is left alone.
# One would expect an argument to win over the environment, in both.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 accelerate==1.15.0
  bin="$folder/venv/bin"
fi
cat >"$folder/gradient.py" <<'PYTHON'
import os

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

assert accelerate.__version__ == "1.15.0", f"made for 1.15.0, not {accelerate.__version__}"


def gradient(**said):
    accelerator = Accelerator(cpu=True, mixed_precision="no", **said)
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward((4 * weight).sum())
    return weight.grad.item(), accelerator.mixed_precision


os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = "4"
os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
number, precision = gradient(gradient_accumulation_steps=1)
plugin, _ = gradient(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1))
print(f"Accelerate {accelerate.__version__}, torch {torch.__version__}; a gradient of 4")
print(f"the variable says 4, the program 1: {number}; with a plugin of 1: {plugin}")
print(f"the variable says bf16, the program no: {precision}")
if (number, plugin, precision) != (1.0, 4.0, "no"):
    raise SystemExit("this has changed")
PYTHON
"$bin/python" "$folder/gradient.py"
