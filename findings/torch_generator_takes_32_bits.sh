#!/usr/bin/env bash
# torch 2.15.0: a CPU generator's seed is taken modulo 2**32, without a word.
#
#   torch.Generator().manual_seed(s)          s = 5, 5 + 2**32, 5 + 7 * 2**40: the same numbers
#   .initial_seed()                           says all 64 bits, as if they had been used
#   numpy.random.default_rng(s)               other numbers for each
# One would expect other numbers for other seeds, as the documentation gives the range of 64 bits, or an
# error. A seed made of a run's seed in the high half and a batch's or rank's number in the low half, or
# the other way round, is the case that meets it: one of the two does nothing.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy==2.4.6
  bin="$folder/venv/bin"
fi
CUDA_VISIBLE_DEVICES="" "$bin/python" - <<'PYTHON'
import numpy
import torch

version = torch.__version__.partition("+")[0]
assert version == "2.15.0", f"made for 2.15.0, not {version}"
SEEDS = (5, 5 + 2**32, 5 + 7 * 2**40)


def kinds(numbers):
    return len({tuple(map(float, drawn)) for drawn in numbers})


generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
ours = kinds(torch.rand(4, generator=generator) for generator in generators)
said = tuple(generator.initial_seed() for generator in generators)
numpys = kinds(numpy.random.default_rng(seed).random(4) for seed in SEEDS)
print(f"torch {version}: {len(SEEDS)} seeds, {ours} sequence, initial_seed() {said}; NumPy: {numpys} sequences")
if (ours, numpys, said) != (1, 3, SEEDS):
    raise SystemExit("this has changed")
PYTHON
