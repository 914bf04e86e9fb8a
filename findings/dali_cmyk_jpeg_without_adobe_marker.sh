#!/usr/bin/env bash
# DALI 2.4.0: a CMYK JPEG without Adobe's marker comes out as the negative of what others show.
#
# The numbers of a CMYK JPEG are inverted by convention. DALI inverts them back where the file has
# Adobe's marker (APP14) and takes them as they are where it has none; Pillow (and with it
# torchvision's and timm's data sets) inverts always. The marker may be missing after a tool has
# stripped metadata. One would expect that taking it out does not turn the picture into its negative,
# or that decoders agree. Nothing is said.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet nvidia-dali-cuda130==2.4.0 pillow==13.0.0 numpy==2.4.6
  python="$folder/venv/bin/python"
fi
"$python" - <<'PYTHON'
from io import BytesIO

import nvidia.dali as dali
import numpy as np
from nvidia.dali import Pipeline, fn
from nvidia.dali.types import DALIDataType
from PIL import Image

assert dali.__version__.startswith("2.4.0"), f"made for 2.4.0, not {dali.__version__}"


def of_dali(data):
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        given = np.frombuffer(data, np.uint8)
        encoded = fn.external_source(source=lambda: [given], dtype=DALIDataType.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu"))
    (images,) = pipeline.run()
    return np.asarray(images.as_cpu()[0])[8, 8].tolist()


def of_pillow(data):
    return list(Image.open(BytesIO(data)).convert("RGB").getpixel((8, 8)))


file = BytesIO()
Image.new("CMYK", (16, 16), (200, 30, 10, 20)).save(file, "JPEG", quality=100)
marked = file.getvalue()
start = marked.index(b"\xff\xee")
bare = marked[:start] + marked[start + 2 + int.from_bytes(marked[start + 2 : start + 4], "big") :]
found = {"with the marker": marked, "without": bare}
for name, data in found.items():
    print(f"DALI {dali.__version__}, {name}: {of_dali(data)}; Pillow: {of_pillow(data)}")
assert np.abs(np.subtract(of_dali(marked), of_pillow(marked))).max() <= 2
assert of_pillow(marked) == of_pillow(bare)
difference = np.abs(np.subtract(of_dali(bare), of_pillow(bare))).max()
assert difference > 30, "no longer so: both show the same"
PYTHON
