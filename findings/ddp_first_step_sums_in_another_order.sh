#!/usr/bin/env bash
# torch 2.15.0: DistributedDataParallel adds the ranks' gradients in one order in the first step after
# wrapping and in another from the second on, so a resumed run of three or more ranks drifts away.
#
# A network is trained for six steps on fixed data with one wrapper, and again with a new wrapper made
# in the middle, as a process that resumes from a checkpoint makes one. Weights, momentum and data are
# the same, all arithmetic is deterministic, so one expects the same bits. On two ranks that is so. On
# three and four it is not: after its first backward pass DDP arranges its buckets anew, in the order
# in which gradients arrived, and where in a bucket a value lies decides at which rank gloo's ring
# begins to add it up. With two ranks there is but one order. find_unused_parameters=True leaves the
# buckets as they are, and then all agree.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if [[ -z "$python" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
  python="$folder/venv/bin/python"
fi
cat > "$folder/ranks.py" <<'PYTHON'
import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()


class Network(nn.Module):
    """Its layers are registered in another order than they are used in, as in most networks."""

    def __init__(self):
        super().__init__()
        self.last, self.shortcut = nn.Linear(64, 10), nn.Linear(32, 64)
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x))) + self.shortcut(x)))


def trained(wrapped_anew, **options):
    torch.manual_seed(0)
    network = Network()
    model = DistributedDataParallel(network, **options)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for step in range(6):
        if wrapped_anew and step == 3:
            model = DistributedDataParallel(network, **options)
        numbers = torch.Generator().manual_seed(100 * step + rank)
        optimizer.zero_grad()
        model(torch.randn(8, 32, generator=numbers)).square().mean().backward()
        optimizer.step()
    weights = b"".join(p.detach().numpy().tobytes() for p in network.parameters())
    return hashlib.sha256(weights).hexdigest()


same = trained(False) == trained(True)
again = trained(False) == trained(False)
fixed = trained(False, find_unused_parameters=True) == trained(True, find_unused_parameters=True)
if rank == 0:
    print(f"torch {torch.__version__}, {ranks} ranks: undisturbed twice, same bits: {again}; "
          f"wrapped anew in the middle: {same}; with buckets that stay: {fixed}", flush=True)
assert again and fixed, "not even without wrapping anew"
assert same == (ranks == 2), "no longer so: the first step is summed as the later ones are"
dist.destroy_process_group()
PYTHON
for ranks in 2 3 4; do
  "$python" -W ignore -m torch.distributed.run --standalone --nproc_per_node "$ranks" \
    "$folder/ranks.py" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
done
