"""Many names in little memory."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from data_pipelines.images.order import Int64s


class Names(Sequence[str]):
    """Many short strings in two arrays: a tenth of what a list of them takes.

    Args:
        text: all strings, one after the other, as the file system spells them; uint8.
        ends: where each one ends in ``text``; int64, shape (len(self),).
    """

    def __init__(self, text: NDArray[np.uint8], ends: Int64s) -> None:
        self.text, self.ends = text, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Names":
        """Pack strings."""
        encoded = [os.fsencode(string) for string in strings]
        ends = np.cumsum([len(part) for part in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        number = range(len(self))[place]
        start = int(self.ends[number - 1]) if number else 0
        return os.fsdecode(self.text[start : int(self.ends[number])].tobytes())

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield os.fsdecode(text[start:end])
            start = end
