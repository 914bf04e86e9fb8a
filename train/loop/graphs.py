"""Recording what a device does, to have it done again by one call: CUDA graphs."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")


class Recorder(Protocol):
    """Records functions that read and write tensors which stay where they are."""

    def warm_up(self, function: Callable[[], T]) -> T:
        """Call ``function`` as it is."""

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        """What does again what ``function`` does on the device, which is not done yet.

        It returns what ``function`` returned, tensors in the same place.
        """


class CudaGraphs:
    """Records on one CUDA device.

    Args:
        device: the current one.
    """

    def __init__(self, device: torch.device) -> None:
        # Autograd computes on the stream that it first met a parameter on, so all on this one.
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], T]) -> T:
        """Call ``function`` on the stream that records."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            found = function()
        current.wait_stream(self._stream)
        return found

    def record(self, function: Callable[[], T]) -> Callable[[], T]:
        """A CUDA graph of ``function``, with memory of its own."""
        graph = torch.cuda.CUDAGraph()
        # By default whatever other threads do meanwhile, such as the loader's, would be an error.
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            found = function()

        def replay() -> T:
            graph.replay()
            return found

        return replay
