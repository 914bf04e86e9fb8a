#!/usr/bin/env bash
# Pillow 13.0.0: Image.resize scales the height before the width where more than twice as many rows go
# as columns (and at least one row); else the width first, as all versions before always did.
#
# A resize is two passes, and the levels are rounded in between, so the order shows: with noise, one
# value in six is another one. One expects a version not to change what bilinear and bicubic resizing
# of the same image give, or to follow the cheaper order (the one with the smaller image in between);
# it is neither. Networks evaluated on images that another library (or Pillow 12) scales see other
# pixels. Each order is made by hand here, from two resizes that change one side alone.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6
  python="$folder/venv/bin/python"
fi
"$python" - <<'PYTHON'
import numpy as np
import PIL
from PIL import Image

assert PIL.__version__ == "13.0.0", f"made for 13.0.0, not {PIL.__version__}"
numbers = np.random.default_rng(0)
counts = {"height first": 0, "width first": 0}
not_cheaper = 0
for trial in range(2000):
    h, w = (int(n) for n in numbers.integers(20, 200, 2))
    new_h, new_w = (int(n) for n in numbers.integers(10, 160, 2))
    if h == new_h or w == new_w:
        continue
    image = Image.fromarray(numbers.integers(0, 256, (h, w, 3), dtype=np.uint8))
    mode = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[trial % 2]
    found = image.resize((new_w, new_h), mode).tobytes()
    by_height = image.resize((w, new_h), mode).resize((new_w, new_h), mode).tobytes()
    by_width = image.resize((new_w, h), mode).resize((new_w, new_h), mode).tobytes()
    if by_height == by_width:
        continue
    rule = h > new_h and h - new_h > 2 * (w - new_w)
    assert found == (by_height if rule else by_width), f"no longer so: {h}x{w} to {new_h}x{new_w}"
    counts["height first" if rule else "width first"] += 1
    not_cheaper += rule != (new_h * w < h * new_w)
print(f"Pillow {PIL.__version__}: {counts}, all as the rule says, to the byte; "
      f"in {not_cheaper} the image in between is the larger of the two")
assert min(counts.values()) > 300
PYTHON
