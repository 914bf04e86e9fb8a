"""The numbers that a network computes with: what its code derives from a tensor's sizes.

Labels say which channels an operation reads, and nothing of a factor such as ``x.shape[1] ** -0.5``
or the default scale of attention. So two runs are held against each other, one of the dense and
one of the pruned network, on images of one size: batch and pixels are alike in both, and a number
that differs comes from a width.
"""

import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tpp.channels.rules import COPIES, MOVES
from tpp.models.architecture import meta_copy
from tpp.models.fitting import place_of, running_modules
from tpp.models.meta_runs import PlainMode, ShapesOnly

# Types of arguments that are numbers to compute with. Whole numbers are sizes and positions, but
# for a number where a tensor could stand, and these, of what computes something at every pixel.
_NUMBERS = ("number", "float", "Optional[number]", "Optional[float]", "List[float]")
_AT_PIXELS = {"convolution", "avg_pool2d", "max_pool2d_with_indices", "_adaptive_avg_pool2d"}
_GEOMETRY = ("kernel_size", "stride", "padding", "dilation", "output_padding", "output_size")
# These come and go with layouts and with widths of one, and change no value.
_PLUMBING = {
    *MOVES,
    *COPIES,
    *("mm", "bmm", "addmm", "baddbmm", "add", "add_", "mul", "mul_", "sub", "sum"),
    *("empty", "empty_strided", "zeros", "ones", "new_empty", "new_zeros", "new_ones"),
}
_MAKERS = (torch.tensor, torch.as_tensor, Tensor.new_tensor)

Seen = tuple[str, tuple[Any, ...]]


class NumberTrace:
    """What the modules of a network do, in order: operations and the numbers that they get.

    Args:
        running: names of the modules that are running, innermost last, see
            :func:`tpp.models.fitting.running_modules`.
    """

    def __init__(self, running: Sequence[str]) -> None:
        self._running = running
        self._seen: dict[str, list[Seen]] = {}

    def see(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Note an ATen operation."""
        name = func.overloadpacket.__name__
        numbers: list[Any] = []
        for place, key in _numeric(func):
            value = args[place] if place < len(args) else kwargs.get(key)
            if isinstance(value, int | float | list | tuple):
                numbers.append(value)
        for value in args:  # a tensor that was made of a number
            if isinstance(value, Tensor) and not value.is_meta and value.numel() == 1:
                numbers.append(value.item())
        if numbers or name not in _PLUMBING:
            self._note(name, numbers)

    def see_made(self, values: Any) -> None:
        """Note a tensor that is made of Python's numbers."""
        if isinstance(values, bool | int | float):
            values = [values]
        if isinstance(values, list | tuple) and all(isinstance(v, int | float) for v in values):
            self._note("tensor", values)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See all that runs meanwhile."""
        with _MakerMode(self), _NumberMode(self):
            yield

    def _note(self, name: str, numbers: Sequence[Any]) -> None:
        self._seen.setdefault(place_of(self._running), []).append((name, tuple(numbers)))

    def difference(self, other: "NumberTrace") -> str | None:
        """The first thing that another run does otherwise, and where; None if there is none."""
        for place in dict.fromkeys((*self._seen, *other._seen)):
            mine, its = self._seen.get(place, []), other._seen.get(place, [])
            for before, after in zip(mine, its, strict=False):
                if repr(before) != repr(after):  # which is the same for NaN, too
                    return f"{_words(before)} becomes {_words(after)} {place}"
            if len(mine) != len(its):
                return f"{len(mine)} operations become {len(its)} {place}"
        return None


class _NumberMode(PlainMode):
    """Shows every operation to a trace."""

    def __init__(self, trace: NumberTrace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        self._trace.see(func, args, kwargs)
        return func(*args, **kwargs)


class _MakerMode(TorchFunctionMode):
    """Shows to a trace what tensors are made of; without memory, they do not say it themselves."""

    def __init__(self, trace: NumberTrace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _MAKERS:
            for value in (*args, *(kwargs or {}).values()):
                self._trace.see_made(value)
        return func(*args, **(kwargs or {}))


@functools.cache
def _numeric(func: Any) -> list[tuple[int, str]]:
    """Place and name of the arguments of an operation that are numbers to compute with."""
    return [
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if str(argument.type) in (*_NUMBERS, "Tensor", "Optional[Tensor]")
        or (argument.name in _GEOMETRY and func.overloadpacket.__name__ in _AT_PIXELS)
    ]


def _words(seen: Seen) -> str:
    name, numbers = seen
    shown = ", ".join(f"{n:.4g}" if isinstance(n, float) else str(n) for n in numbers)
    return f"{name.strip('_')} {shown}".strip()


def training_numbers(model: nn.Module, example: Tensor) -> NumberTrace | None:
    """What a network does in training mode, on two images; None if it does not run so.

    Args:
        model: any network, on any device; left alone.
        example: images of the size to take, (N, channels, height, width).
    """
    copy = meta_copy(model).train()
    dtype = next((p.dtype for p in copy.parameters()), example.dtype)
    images = torch.empty((2, *example.shape[1:]), device="meta", dtype=dtype)
    trace = NumberTrace(running_modules(copy))
    try:
        with (
            same_draws(),
            torch.inference_mode(False),
            torch.no_grad(),
            ShapesOnly(),
            trace.watching(),
        ):
            copy(images)
    except Exception:  # whatever a network's own code raises; it may want targets, say
        return None
    return trace


@contextmanager
def same_draws() -> Iterator[None]:
    """Random numbers of a fixed seed; afterwards all generators are as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
