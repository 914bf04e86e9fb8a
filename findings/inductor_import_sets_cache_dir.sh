#!/usr/bin/env bash
# PyTorch 2.15.0: importing a part of its compiler writes TORCHINDUCTOR_CACHE_DIR into the
# environment, before anything is compiled.
#
# One would expect the variable to be read where a cache is used, and an import to leave the
# environment alone. A program that looks for a C++ compiler first (torch._inductor.cpp_builder) and
# then sets the variable "unless the user has" finds it set, to the system's temporary folder, and
# compiles into that one: on a cluster it is gone with the job. Its children inherit it too.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 numpy
  python="$folder/venv/bin/python"
fi
env -u TORCHINDUCTOR_CACHE_DIR "$python" -W ignore - <<'PYTHON'
import os

import torch

name = "TORCHINDUCTOR_CACHE_DIR"
assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
assert name not in os.environ, "import torch alone sets it"
import torch._inductor.cpp_builder

print(f"PyTorch {torch.__version__}: after the import {name} is {os.environ.get(name)}")
assert name in os.environ, "no longer so: the import leaves the environment alone"
os.environ.setdefault(name, "/somewhere/that/stays")
from torch._inductor.runtime.cache_dir_utils import cache_dir

print(f"after setdefault the cache is {cache_dir()}")
assert cache_dir() != "/somewhere/that/stays"
PYTHON
