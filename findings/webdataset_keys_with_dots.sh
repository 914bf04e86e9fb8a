#!/usr/bin/env bash
# webdataset 1.0.2: samples whose keys have a dot are written one by one and read back as one.
#
# TarWriter takes any key. The reader ends a key at the first dot of a file's name, so that
# "photo.1.jpg" and "photo.2.jpg" are fields "1.jpg" and "2.jpg" of one sample "photo": of five
# images there is one sample without a field "jpg". One would expect TarWriter to refuse such a key.
#
# It also writes the time of each member with fractions of a second, which takes a header of PAX:
# an image's bytes begin 1536 bytes behind its member's first header, and not 512.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet webdataset==1.0.2
  python="$folder/venv/bin/python"
fi
"$python" - <<'PYTHON'
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

import webdataset

assert version("webdataset") == "1.0.2", f"made for 1.0.2, not {version('webdataset')}"
with tempfile.TemporaryDirectory() as folder:
    tar = Path(folder) / "shard.tar"
    with webdataset.TarWriter(str(tar)) as writer:
        for number in range(5):
            writer.write({"__key__": f"photo.{number}", "jpg": b"image", "cls": number})
    samples = list(webdataset.WebDataset(str(tar), shardshuffle=False))
    with tarfile.open(tar) as archive:
        first = archive.getmembers()[0]
print(f"webdataset {version('webdataset')}: 5 samples written, {len(samples)} read, of which "
      f"{sum('jpg' in sample for sample in samples)} have an image under 'jpg'")
print(f"bytes of headers before the first member: {first.offset_data - first.offset}")
assert len(samples) == 1 and "jpg" not in samples[0], "no longer so: keys may have dots"
assert first.offset_data - first.offset == 1536
PYTHON
