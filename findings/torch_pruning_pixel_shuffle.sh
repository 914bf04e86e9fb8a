#!/usr/bin/env bash
# Torch-Pruning 1.6.1: filters before a PixelShuffle take other channels from the layer behind it.
#
# PixelShuffle(2) makes channel c of filters 4c to 4c+3. Removing filters 0 to 3 of the layer before it
# is therefore the removal of channel 0 behind it, and one would expect the reader to lose that one.
# The indices are handed on as if the shuffle were not there: the reader loses channels 0 to 3, and the
# network does not run any more.
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
import copy
from importlib.metadata import version

import torch
import torch_pruning as tp
from torch import nn

assert version("torch-pruning") == "1.6.1", f"made for 1.6.1, not {version('torch-pruning')}"


def without_channel_0(channels):
    """Widths behind, and the largest difference to the dense network with these filters at zero."""
    torch.manual_seed(0)
    dense = nn.Sequential(
        nn.Conv2d(3, 4 * channels, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Conv2d(channels, 3, 3, padding=1),
    ).double()
    images, pruned = torch.randn(1, 3, 8, 8).double(), copy.deepcopy(dense)
    graph = tp.DependencyGraph().build_dependency(pruned, example_inputs=images)
    graph.get_pruning_group(pruned[0], tp.prune_conv_out_channels, idxs=[0, 1, 2, 3]).prune()
    with torch.no_grad():
        dense[0].weight[:4], dense[0].bias[:4] = 0, 0
        expected = dense(images)
        # What one would expect: the reader without its channel 0.
        dense[0].weight = nn.Parameter(dense[0].weight[4:])
        dense[0].bias = nn.Parameter(dense[0].bias[4:])
        dense[2].weight = nn.Parameter(dense[2].weight[:, 1:])
        assert torch.allclose(dense(images), expected, atol=1e-12)
        try:
            found = f"off by {(pruned(images) - expected).abs().max():.1e}"
        except RuntimeError as error:
            found = f"does not run: {str(error)[:40]}..."
    return pruned[0].out_channels, pruned[2].in_channels, found


for channels in (4, 16):
    before, behind, found = without_channel_0(channels)
    print(f"torch-pruning 1.6.1, {channels} channels behind a PixelShuffle(2), one of them to go: "
          f"{before} filters are left before it (expected {4 * channels - 4}) and {behind} channels "
          f"behind it (expected {channels - 1}); {found}")
    assert before == 4 * channels - 4
    assert behind == channels - 4, "no longer so: another number of channels is left behind"
    assert found.startswith("does not run"), "no longer so: the pruned network runs"
PYTHON
