#!/usr/bin/env bash
# torch 2.15.0: what torch.save writes to a name that ends in .safetensors, torch.load cannot read.
#
# torch.save writes its own format whatever the name is, and torch.load used to look at the content.
# Since it reads safetensors too, it goes by the name alone: of a checkpoint that was saved as
# model.safetensors it says "header too large", which sounds like damage. One would expect it to look
# at the first bytes, as it does for its own two formats, or torch.save to refuse the name. Given as an
# open file, which has no name that counts, the same bytes are read well.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
if [[ -z "$python" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 safetensors numpy
  python="$folder/venv/bin/python"
fi
cd "$folder"
"$python" - <<'PYTHON'
import torch

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
torch.save({"weight": torch.ones(2)}, "model.safetensors")
with open("model.safetensors", "rb") as file:
    assert torch.equal(torch.load(file)["weight"], torch.ones(2))
try:
    found = torch.load("model.safetensors")
except Exception as error:
    print(f"torch {torch.__version__}: torch.load of what torch.save wrote to model.safetensors: {error}; "
          "of the same file, open: read")
else:
    raise SystemExit(f"no longer so: read {found}")
PYTHON
