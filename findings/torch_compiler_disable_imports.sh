#!/usr/bin/env bash
# torch 2.15.0: decorating a function with torch.compiler.disable imports the whole compiler at once.
#
# The decorator says "leave this function out when somebody compiles the caller". One would expect it
# to cost nothing until somebody does. It imports torch._dynamo (with sympy and about 700 further
# modules) when the decorator runs, that is, when the module that holds the function is imported:
# `import torch` plus one such decorator takes about twice as long as `import torch`. The private
# torch._disable_dynamo, which PyTorch uses for its own functions, does so at the first call instead.
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
import sys
import torch

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"


def loaded():
    return sum(name.split(".")[0] == "sympy" or name.startswith("torch._dynamo") for name in sys.modules)


before, modules = loaded(), len(sys.modules)


@torch._disable_dynamo
def lazily():
    pass


assert loaded() == before == 0, "the private decorator imports the compiler too"


@torch.compiler.disable
def at_once():
    pass


found = loaded()
print(f"torch {torch.__version__}: modules of torch._dynamo and sympy after torch._disable_dynamo: 0; "
      f"after torch.compiler.disable: {found}, and {len(sys.modules) - modules} modules in all")
assert found > 100, "no longer so: the decorator does not import the compiler"
PYTHON
