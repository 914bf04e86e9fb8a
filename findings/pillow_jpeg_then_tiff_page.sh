#!/usr/bin/env bash
# Pillow 13.0.0: an image that was saved as a JPEG can no longer be a page of a TIFF.
#
# Saving leaves the JPEG encoder's settings on the image object. Image.save clears them on the image
# that is saved, but not on those that are handed over as append_images, and the TIFF writer passes
# them to its own encoder: a TypeError about the number of arguments. One would expect that saving
# an image does not change what can be done with it. A copy of it, made after, works.
set -euo pipefail
python="${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}"
if [[ -z "$python" ]]; then
  folder="$(mktemp -d)"
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet pillow==13.0.0
  python="$folder/venv/bin/python"
fi
"$python" - <<'PYTHON'
from io import BytesIO

import PIL
from PIL import Image

assert PIL.__version__ == "13.0.0", f"made for 13.0.0, not {PIL.__version__}"
first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "red")


def two_pages(page):
    try:
        first.save(BytesIO(), "TIFF", save_all=True, append_images=[page])
    except TypeError as error:
        return f"TypeError: {error}"
    return "two pages"


before = two_pages(second)
second.save(BytesIO(), "JPEG")
after, copied = two_pages(second), two_pages(second.copy())
print(f"Pillow {PIL.__version__}: before the image was saved as a JPEG: {before}; after: {after}; "
      f"a copy: {copied}")
assert before == copied == "two pages"
assert after.startswith("TypeError"), "no longer so: the page is written"
PYTHON
