"""``python -m data_pipelines.sets.matlab < meta.mat`` tells the synsets in a MATLAB file, as JSON.

A program of its own because SciPy's reader, which is C code, believes every size and depth that a
file claims: a few kilobytes can make it fill the memory or crash. Here that ends nothing else.
"""

import io
import json
import resource
import sys
from typing import Any

_MEMORY, _CPU_SECONDS = 2 * 2**30, 60
# ImageNet has 1860 synsets; their names are words of nine letters.
_MOST_SYNSETS, _LONGEST_NAME = 100_000, 50
_FIELDS = ("ILSVRC2012_ID", "WNID", "num_train_images", "num_children")


def leaves(content: bytes) -> list[tuple[int, str, int]]:
    """ILSVRC2012_ID, WNID and num_train_images of the synsets that have no children.

    Raises:
        Exception: SciPy reports damage by exceptions of many kinds.
    """
    import numpy as np
    from scipy.io import loadmat

    synsets = np.atleast_1d(loadmat(io.BytesIO(content), squeeze_me=True)["synsets"])
    if synsets.size > _MOST_SYNSETS:
        raise ValueError(f"{synsets.size:,} synsets")
    fields = [synsets[name].tolist() for name in _FIELDS]
    return [
        (int(number), str(name)[:_LONGEST_NAME], int(count))
        for number, name, count, children in zip(*fields, strict=True)
        if int(children) == 0
    ]


def main() -> None:
    """Print the leaves, or the name of the exception; within limits of memory and time."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    said: Any
    try:
        said = leaves(sys.stdin.buffer.read())
    except Exception as error:
        said = type(error).__name__
    print(json.dumps(said))


if __name__ == "__main__":
    main()
