#!/usr/bin/env bash
# datasets 5.2.0 with pyarrow 25.0.1: a data set of save_to_disk whose Arrow file lost its end between
# two record batches loads as a shorter data set, without a word.
#
#   5,000 rows saved, all 5 batches of the file there        5,000 rows
#   the file cut 20 bytes into a batch                       ArrowInvalid
#   the file cut where batch 3 ends (a copy that was broken off, a full disk)     3,000 rows, no error
# One would expect an error, or a count to compare with: the stream format ends with a marker of eight
# bytes, but a reader takes the end of the file for it; and neither state.json nor dataset_info.json
# of save_to_disk says how many rows there are. A reader that wants to know looks for the marker.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
bin="${FINDINGS_VENV:+$FINDINGS_VENV/bin}"
if [[ -z "$bin" ]]; then
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==25.0.1
  bin="$folder/venv/bin"
fi
cat >"$folder/cut.py" <<'PYTHON'
import json
import pathlib
from importlib.metadata import version

import datasets
import pyarrow

for name, expected in (("datasets", "5.2.0"), ("pyarrow", "25.0.1")):
    assert version(name) == expected, f"made for {name} {expected}, not {version(name)}"
datasets.disable_progress_bars()
datasets.Dataset.from_dict({"x": list(range(5000))}).save_to_disk("saved")
(file,) = pathlib.Path("saved").glob("*.arrow")
whole = file.read_bytes()
source, ends = pyarrow.BufferReader(whole), []
for batch in pyarrow.ipc.open_stream(source):
    ends.append(source.tell())
print(f"{len(ends)} batches, {len(datasets.load_from_disk('saved'))} rows; ends {whole[-8:].hex()}")
file.write_bytes(whole[: ends[2] + 20])
try:
    within = len(datasets.load_from_disk("saved"))
except pyarrow.ArrowInvalid as error:
    within = type(error).__name__
file.write_bytes(whole[: ends[2]])
between = len(datasets.load_from_disk("saved"))
said = [json.loads(path.read_text()) for path in sorted(pathlib.Path("saved").glob("*.json"))]
print(f"cut within a batch: {within}; between two: {between} rows; splits said: {said[0].get('splits')}")
if (len(ends), within, between) != (5, "ArrowInvalid", 3000) or "5000" in json.dumps(said):
    raise SystemExit("this has changed")
PYTHON
cd "$folder"
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$bin/python" cut.py
