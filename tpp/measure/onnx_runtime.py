"""Networks and single layers in onnxruntime on the CPU, on CUDA and in TensorRT, to be timed.

onnxruntime goes on with another provider, the CPU at last, where the one that it is asked for
cannot be loaded, and says so in its log alone. Here that is an error: a time would be another
device's.
"""

import ctypes
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError, reason_of

_INPUT, _OUTPUT = "images", "out"
# By backend and device: what onnxruntime runs a network by, and then what that does not take.
_PROVIDERS = {
    ("onnxruntime", "cpu"): ("CPUExecutionProvider",),
    ("onnxruntime", "cuda"): ("CUDAExecutionProvider", "CPUExecutionProvider"),
    ("tensorrt", "cuda"): (
        "TensorrtExecutionProvider",
        "CUDAExecutionProvider",
        "CPUExecutionProvider",
    ),
}


@dataclass(frozen=True)
class Runtime:
    """What runs a network.

    Attributes:
        backend: ``onnxruntime``, or ``tensorrt``, which is onnxruntime's too.
        device: ``cpu`` or ``cuda``; ``tensorrt`` has ``cuda`` alone.
        threads: of onnxruntime on the CPU; None for its own choice.
    """

    backend: str = "onnxruntime"
    device: str = "cpu"
    threads: int | None = None

    @property
    def providers(self) -> Sequence[str]:
        """The one that is meant, and those for operations that it does not know."""
        return _PROVIDERS[self.backend, self.device]

    def check_packages(self) -> None:
        """Check that there is what it takes.

        Raises:
            UserError: a package is missing, or is built without it; says what to install.
        """
        own = "onnxruntime" if self.device == "cpu" else "onnxruntime-gpu"
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                importlib.import_module(package)
            except ImportError:
                raise UserError(
                    f"backend {self.backend}: needs {package}: pip install onnx onnxscript {own}"
                ) from None
        found = importlib.import_module("onnxruntime").get_available_providers()
        if self.providers[0] not in found:
            raise UserError(
                f"backend {self.backend}: the onnxruntime that is installed has no "
                f"{self.providers[0]} (it has {', '.join(found)}): pip uninstall onnxruntime, then "
                f"pip install {own}"
            )

    def versions(self) -> dict[str, str]:
        """Of what it consists of, by package."""
        found = {"onnxruntime": importlib.import_module("onnxruntime").__version__}
        if self.backend == "tensorrt":
            with suppress(ImportError):  # its libraries may have come without Python's package
                found["tensorrt"] = importlib.import_module("tensorrt").__version__
        return found

    def session(self, model: bytes, images: Tensor) -> Callable[[], Any]:
        """What runs a model on a batch; on a GPU without copying it there each time.

        Args:
            model: in ONNX's format, whose only input and output are called as here.
            images: the batch, on the CPU.

        Returns:
            What runs it, and gives its outputs on the CPU; on a GPU nothing, once it is done.

        Raises:
            UserError: onnxruntime would run it by another provider.
        """
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # What it falls back to and why it prints and logs; here that is an error.
        onnxruntime.set_default_logger_severity(4)
        with redirect_stdout(io.StringIO()):
            if self.device == "cuda":
                onnxruntime.preload_dlls()  # CUDA's libraries of Python's packages
            session = onnxruntime.InferenceSession(model, options, providers=[*self.providers])
        if session.get_providers()[0] != self.providers[0]:
            raise UserError(
                f"backend {self.backend} on {self.device}: onnxruntime {onnxruntime.__version__} "
                f"cannot load {self.providers[0]} ({_missing(onnxruntime, self.providers[0])}) and "
                f"would go on with {session.get_providers()[0]}"
            )
        array = images.numpy()
        if self.device == "cpu":
            return lambda: session.run(None, {_INPUT: array})
        binding = session.io_binding()
        there = onnxruntime.OrtValue.ortvalue_from_numpy(array, self.device, 0)
        binding.bind_ortvalue_input(_INPUT, there)
        binding.bind_output(_OUTPUT, self.device, 0)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def _missing(onnxruntime: Any, provider: str) -> str:
    """Why a provider cannot be loaded, such as for want of a library of CUDA's."""
    name = provider.removesuffix("ExecutionProvider").lower()
    path = Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        ctypes.CDLL(str(path))
    except OSError as error:
        return reason_of(error)
    return "its libraries are there: it does not take this GPU or driver"


def session_of(network: nn.Module, images: Tensor, runtime: Runtime) -> Callable[[], Any]:
    """A network as onnxruntime runs it.

    Args:
        network: on the CPU, float32 or float16, in evaluation mode.
        images: the batch that it is to take, likewise.
        runtime: what runs it.

    Returns:
        As of :meth:`Runtime.session`.

    Raises:
        UserError: as there.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (images,),
                dynamo=True,
                verbose=False,
                input_names=[_INPUT],
                output_names=[_OUTPUT],
            )
        assert program is not None
    finally:
        logging.disable(level)
    return runtime.session(program.model_proto.SerializeToString(), images)


def layer_session(
    layer: nn.Conv2d | nn.Linear, images: Tensor, runtime: Runtime
) -> Callable[[], Any]:
    """One layer likewise, in a fraction of the time that PyTorch takes to export it.

    Args:
        layer: on the CPU; zeros around its images, or none, are its only padding.
        images: as of :func:`session_of`.
        runtime: what runs it.
    """
    from onnx import helper, numpy_helper

    weight = layer.weight.detach().numpy()
    values = [numpy_helper.from_array(weight, "weight")]
    if layer.bias is not None:
        values.append(numpy_helper.from_array(layer.bias.detach().numpy(), "bias"))
    inputs = [_INPUT, *(value.name for value in values)]
    if isinstance(layer, nn.Linear):
        node, rank = helper.make_node("Gemm", inputs, [_OUTPUT], transB=1), 2
    else:
        assert not isinstance(layer.padding, str)
        node, rank = (
            helper.make_node(
                "Conv",
                inputs,
                [_OUTPUT],
                kernel_shape=[*layer.kernel_size],
                strides=[*layer.stride],
                pads=[*layer.padding, *layer.padding],
                dilations=[*layer.dilation],
                group=layer.groups,
            ),
            4,
        )
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    shapes = [
        helper.make_tensor_value_info(name, kind, [None] * rank) for name in (_INPUT, _OUTPUT)
    ]
    graph = helper.make_graph([node], "layer", shapes[:1], shapes[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return runtime.session(model.SerializeToString(), images)
