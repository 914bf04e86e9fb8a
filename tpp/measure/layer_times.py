"""How long each layer of a network takes at which widths, on the machine that counts."""

import functools
import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.common.reading import read_json
from tpp.measure.onnx_runtime import layer_session
from tpp.measure.timing import DTYPES, LatencySettings, machine_of, memory_format, threads_of
from tpp.models.architecture import meta_copy

FORMAT = "tpp-layer-times"
VERSION = 1
_WRITTEN_AFTER = 256


@dataclass(frozen=True)
class LayerShape:
    """What decides how long a layer takes.

    Attributes:
        inputs, outputs: channels, of all groups.
        size: (height, width) of what a convolution reads; () for a Linear layer.
        rows: of what a Linear layer reads, for one image; 1 for a convolution.
        kernel, stride, padding, dilation: of a convolution; () for a Linear layer.
        groups: of a convolution.
        bias: whether there is one.
    """

    inputs: int
    outputs: int
    size: tuple[int, ...]
    rows: int = 1
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False

    @property
    def is_depthwise(self) -> bool:
        """Whether each of its filters reads a channel of its own."""
        return self.groups > 1 and self.groups == self.inputs == self.outputs

    def with_widths(self, outputs: int, columns: int) -> "LayerShape":
        """The layer with other numbers of filters and of the input channels that each reads."""
        groups = outputs if self.is_depthwise else self.groups
        return replace(self, outputs=outputs, inputs=columns * groups, groups=groups)

    def __str__(self) -> str:
        bias = ", bias" if self.bias else ""
        if not self.kernel:
            return f"linear {self.inputs} -> {self.outputs}, {self.rows} rows{bias}"
        numbers = {
            "kernel": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
        }
        said = ", ".join(f"{name} {'x'.join(map(str, pair))}" for name, pair in numbers.items())
        images = "x".join(map(str, self.size))
        return (
            f"conv {self.inputs} -> {self.outputs}, {said}, groups {self.groups}, on {images}{bias}"
        )

    def layer(self) -> nn.Conv2d | nn.Linear:
        """Such a layer, with random weights."""
        if not self.kernel:
            return nn.Linear(self.inputs, self.outputs, self.bias)
        return nn.Conv2d(
            self.inputs,
            self.outputs,
            (self.kernel[0], self.kernel[1]),
            (self.stride[0], self.stride[1]),
            (self.padding[0], self.padding[1]),
            (self.dilation[0], self.dilation[1]),
            self.groups,
            self.bias,
        )

    def images(self, batch: int) -> Tensor:
        """Random numbers that such a layer reads of a batch of images, float32."""
        shape = (
            (batch, self.inputs, *self.size) if self.kernel else (batch * self.rows, self.inputs)
        )
        return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def layer_shapes(model: nn.Module, example_input: Tensor) -> dict[str, list[LayerShape]]:
    """What the Conv2d and Linear layers of a network are called with, once for each call.

    Args:
        model: any network; run without memory.
        example_input: a batch of one image.
    """
    network = meta_copy(model).eval()
    found: dict[str, list[LayerShape]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            read = inputs[0].shape
            bias = module.bias is not None
            if isinstance(module, nn.Linear):
                rows = int(torch.Size(read[:-1]).numel())
                shape = LayerShape(module.in_features, module.out_features, (), rows, bias=bias)
            else:
                shape = LayerShape(
                    module.in_channels,
                    module.out_channels,
                    tuple(read[2:]),
                    1,
                    module.kernel_size,
                    module.stride,
                    _padding(module),
                    module.dilation,
                    module.groups,
                    bias,
                )
            found.setdefault(name, []).append(shape)

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(note(name))
    with torch.no_grad():
        network(example_input[:1].to("meta"))
    return found


def _padding(layer: nn.Conv2d) -> tuple[int, ...]:
    if layer.padding == "valid":
        return (0, 0)
    if isinstance(layer.padding, str):  # same
        pairs = zip(layer.kernel_size, layer.dilation, strict=True)
        return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in pairs)
    return layer.padding


@dataclass
class LayerTimes:
    """Times of layers, each measured once; in a file, if wanted.

    A layer is timed by itself, uncompiled, after as many passes as a network is warmed up by.

    Attributes:
        settings: under which conditions.
        file: where the times are kept; None for nowhere.
        measure: times a layer, in seconds; by default on this machine.
    """

    settings: LatencySettings
    file: Path | None = None
    measure: Callable[[LayerShape, LatencySettings], float] | None = None
    _times: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file is not None and self.file.exists():
            self._times = self._read(self.file)

    def take(self, shapes: Iterable[LayerShape]) -> None:
        """Time those that have not been timed, and write them down."""
        wanted = [shape for shape in dict.fromkeys(shapes) if str(shape) not in self._times]
        for start in range(0, len(wanted), _WRITTEN_AFTER):  # what is broken off goes on there
            for shape in wanted[start : start + _WRITTEN_AFTER]:
                self._times[str(shape)] = (self.measure or time_layer)(shape, self.settings)
            if self.file is not None:
                self._write(self.file)

    def seconds(self, shape: LayerShape) -> float:
        """Of a layer that was timed, for a batch."""
        return self._times[str(shape)]

    def _conditions(self) -> dict[str, Any]:
        said = asdict(self.settings)
        for key in ("compile", "repeats", "warmup"):
            del said[key]
        return {"settings": said, "on": machine_of(self.settings)}

    def _write(self, file: Path) -> None:
        content = {"format": FORMAT, "version": VERSION, **self._conditions()}
        content["milliseconds"] = {key: 1000 * value for key, value in self._times.items()}
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, json.dumps(content, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"{file}: cannot write the layers' times: {error.strerror}") from None

    def _read(self, file: Path) -> dict[str, float]:
        """What :meth:`_write` wrote.

        Raises:
            UserError: it is no such file, or is of another machine or other conditions.
        """
        content = read_json(file, "the layers' times")
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f'{file}: holds no layers\' times (expected "format": "{FORMAT}")')
        if content.get("version") != VERSION:
            raise UserError(f"{file}: version {content.get('version')!r}, expected {VERSION}")
        for part, here in json.loads(json.dumps(self._conditions())).items():
            there = content.get(part)
            there = there if isinstance(there, dict) else {}
            for key in here:
                if here[key] != there.get(key):
                    raise UserError(
                        f"{file}: its times are of {key} {there.get(key)!r}, and {here[key]!r} is "
                        "wanted; name another file, or delete it to measure anew"
                    )
        times = content.get("milliseconds")
        values = [*times.values()] if isinstance(times, dict) else [None]
        if not all(isinstance(value, int | float) and value >= 0 for value in values):
            raise UserError(f"{file}: its milliseconds are no numbers; delete it to measure anew")
        return {key: value / 1000 for key, value in dict(times or {}).items()}


def time_layer(shape: LayerShape, settings: LatencySettings) -> float:
    """Median of a third of as many passes as a network is timed by, at least 5, in seconds."""
    with torch.inference_mode(), threads_of(settings.threads):
        layer, images = shape.layer().eval(), shape.images(settings.batch)
        dtype = DTYPES[settings.dtype]
        run: Callable[[], Any]
        if settings.runtime is not None:
            run = layer_session(layer.to(dtype), images.to(dtype), settings.runtime)
        else:
            layer.to(settings.device, dtype)
            images = images.to(settings.device, dtype)
            if shape.kernel:
                layer.to(memory_format=memory_format(settings))
                images = images.contiguous(memory_format=memory_format(settings))
            run = functools.partial(layer, images)
        seconds = []
        repeats = max(5, settings.repeats // 3)
        for turn in range(1 + settings.warmup + repeats):
            if settings.device == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run()
            if settings.device == "cuda":
                torch.cuda.synchronize()
            if turn > settings.warmup:
                seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
