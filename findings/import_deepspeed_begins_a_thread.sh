#!/usr/bin/env bash
# deepspeed 0.19.8 with MLflow 3.17.2 installed: `import deepspeed` imports MLflow, pandas and
# pyarrow, and leaves a thread of pyarrow 25.0.1's allocator behind, in a process that never asked for
# any of them.
#
#   import deepspeed, in an environment with mlflow and pyarrow     a thread more: jemalloc_bg_thd
#   the same with JE_ARROW_MALLOC_CONF=background_thread:false      none, though all are imported
# One would expect an import of a training library to load no tracking server's package (its
# autotuner wants MLflow), and none to begin a thread: a process that has imported it can no longer be
# forked safely, which is what fork servers are for, and Python 3.12 warns of it.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet torch==2.15.0 deepspeed==0.19.8 mlflow==3.17.2 pyarrow==25.0.1
  bin="$folder/venv/bin"
fi
cat >"$folder/threads.py" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path


def threads():
    return sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


for name, expected in (("deepspeed", "0.19.8"), ("mlflow", "3.17.2"), ("pyarrow", "25.0.1")):
    assert version(name) == expected, f"made for {name} {expected}, not {version(name)}"
import torch  # begins none with one thread of OpenMP

before = threads()
import deepspeed

more = [name for name in threads() if name not in before]
loaded = [name for name in ("mlflow", "pandas", "pyarrow") if name in sys.modules]
print(f"threads after torch: {len(before)}; more after deepspeed: {more}; loaded: {loaded}")
if loaded != ["mlflow", "pandas", "pyarrow"] or (more == ["jemalloc_bg_thd"]) != (sys.argv[1] == "1"):
    raise SystemExit("this has changed")
PYTHON
cd "$folder"
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" "$bin/python" threads.py 1 2>/dev/null
OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES="" JE_ARROW_MALLOC_CONF=background_thread:false \
  "$bin/python" threads.py 0 2>/dev/null
