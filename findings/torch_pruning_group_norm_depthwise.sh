#!/usr/bin/env bash
# Torch-Pruning 1.6.1: the group norm leaves the weights of depthwise convolutions out.
#
# GroupMagnitudeImportance adds up the squared weights that go with a filter in all coupled layers.
# The dependency graph has the depthwise convolution in the group, and removal cuts it, but its
# weights add nothing: a channel whose depthwise weights are all zero, on which the output does not
# depend at all, is worth as much as before, and here it is the last one to go.
# One would expect it to lose what its depthwise weights were worth.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 torch-pruning==1.6.1
  python="$folder/venv/bin/python"
fi
"$python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
import torch_pruning
from torch import nn

assert version("torch-pruning") == "1.6.1", f"made for 1.6.1, not {version('torch-pruning')}"
torch.manual_seed(0)
make = nn.Conv2d(3, 4, 1, bias=False)
depthwise = nn.Conv2d(4, 4, 3, groups=4, bias=False)
read = nn.Conv2d(4, 5, 1, bias=False)
network = nn.Sequential(make, depthwise, read)
images = torch.randn(2, 3, 8, 8)


def worth():
    graph = torch_pruning.DependencyGraph().build_dependency(network, images)
    group = graph.get_pruning_group(make, torch_pruning.prune_conv_out_channels, [*range(4)])
    layers = [dependency.target.module for dependency, _ in group]
    assert depthwise in layers, "the depthwise convolution is no longer in the group"
    norm = torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None
    )
    return norm(group).detach()


before = worth()
dead = int(before.argmax())
with torch.no_grad():
    depthwise.weight[dead] = 0
    output = network(images)
    make.weight[dead] += 1  # whatever it is now, nothing of it arrives
    assert torch.equal(network(images), output)
    make.weight[dead] -= 1
after = worth()
others = make.weight.flatten(1).square().sum(1) + read.weight.square().sum((0, 2, 3))
print(f"Torch-Pruning {version('torch-pruning')}: channel {dead} is dead behind the depthwise one")
print(f"worth before {before.tolist()}\nand after    {after.tolist()}")
assert torch.allclose(before, others.detach()), "something else is in it"
assert torch.allclose(before, after), "no longer so: depthwise weights count"
PYTHON
