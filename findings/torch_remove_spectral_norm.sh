#!/usr/bin/env bash
# torch 2.15.0: after torch.nn.utils.remove_spectral_norm a module does not load its own state_dict.
#
# One would expect the module to be an ordinary one again, as after remove_weight_norm. The hook that
# asks for weight_orig and weight_u when a state_dict is loaded stays: it is looked for by its class,
# and torch keeps it in a wrapper of another class. The parametrization of the same name has no such
# hook.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0
  python="$folder/venv/bin/python"
fi
"$python" -W ignore - <<'PYTHON'
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"


def reloads(add, remove):
    layer = add(nn.Linear(3, 3))
    layer(torch.rand(2, 3))
    remove(layer)
    assert sorted(layer.state_dict()) == ["bias", "weight"]
    try:
        layer.load_state_dict(layer.state_dict())
    except RuntimeError as error:
        return str(error).splitlines()[-1].strip()
    return "loads"


old = reloads(nn.utils.spectral_norm, nn.utils.remove_spectral_norm)
weight_norm = reloads(nn.utils.weight_norm, nn.utils.remove_weight_norm)
new = reloads(
    parametrizations.spectral_norm, lambda layer: parametrize.remove_parametrizations(layer, "weight")
)
print(f"torch {torch.__version__}: a layer's own state_dict after remove_spectral_norm: {old}; "
      f"after remove_weight_norm: {weight_norm}; after the parametrization is removed: {new}")
assert weight_norm == new == "loads"
assert old.startswith("Missing key"), "no longer so: the layer loads its own state_dict"
PYTHON
