#!/usr/bin/env bash
# torch 2.15.0: two environments that build the same C++ extension throw away each other's build.
#
# torch.utils.cpp_extension.load keeps what it builds under TORCH_EXTENSIONS_DIR (by default one
# folder in the home directory), by the extension's name, Python's version and the device. The
# folders of headers are not in that key, but they are in the compiler's command line, and ninja
# builds anew when that changes. Two clones of a project, each with an environment of its own, so
# never have a build that lasts: each start of one undoes the other's. DeepSpeed builds its
# shared-memory operator this way at the start of every process group on CPUs (two minutes each
# time), and the second one to start waits for the first one's lock without a word.
# One would expect one build for each, or one for both.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 ninja==1.13.2 setuptools
  bin="$folder/venv/bin"
fi
mkdir "$folder/one" "$folder/two"
cat >"$folder/answer.cpp" <<'CPP'
extern "C" int answer() { return 42; }
CPP
cat >"$folder/build.py" <<'PYTHON'
import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

assert torch.__version__.startswith("2.15.0"), f"made for 2.15.0, not {torch.__version__}"
folder = Path(sys.argv[1])
load("answer", [str(folder / "answer.cpp")], extra_include_paths=[str(folder / sys.argv[2])],
     is_python_module=False)
PYTHON
export TORCH_EXTENSIONS_DIR="$folder/cache" PATH="$bin:$PATH" CUDA_VISIBLE_DEVICES=""
build() { # how often the object has been compiled after one more start with these headers
  "$bin/python" "$folder/build.py" "$folder" "$1" >"$folder/log" 2>&1 || { cat "$folder/log"; exit 1; }
  find "$folder/cache" -name answer.o -printf '%T@\n'
}
first="$(build one)"
again="$(build one)"
other="$(build two)"
back="$(build one)"
echo "the object's time: $first, started again: $again, from the other environment: $other, back: $back"
[[ "$first" == "$again" ]] || { echo "no longer so: it is built at every start"; exit 1; }
[[ "$other" != "$again" && "$back" != "$other" ]] || { echo "no longer so: builds last"; exit 1; }
echo "built anew at each change of environment, in the same folder"
