"""Networks and single layers in onnxruntime on the CPU, to be timed."""

import importlib
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError

_INPUT = "images"


def check_packages() -> None:
    """Check that there is what it takes.

    Raises:
        UserError: a package is missing; says how to install it.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"backend onnxruntime: needs {package}: pip install onnx onnxscript onnxruntime"
            ) from None


def session_of(network: nn.Module, images: Tensor, threads: int | None) -> Callable[[Any], Any]:
    """A network as onnxruntime runs it.

    Args:
        network: on the CPU, float32, in evaluation mode.
        images: a batch of those that it is to take, whose size stays.
        threads: of onnxruntime; None for its own choice.

    Returns:
        What takes NumPy's array of such images.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network, (images,), dynamo=True, verbose=False, input_names=[_INPUT]
            )
        assert program is not None
    finally:
        logging.disable(level)
    return _session(program.model_proto.SerializeToString(), threads)


def layer_session(layer: nn.Conv2d | nn.Linear, threads: int | None) -> Callable[[Any], Any]:
    """One layer likewise, in a fraction of the time that PyTorch takes to export it.

    Args:
        layer: zeros around its images, or none, are its only padding.
        threads: as of :func:`session_of`.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = layer.weight.detach().numpy()
    values = [numpy_helper.from_array(weight, "weight")]
    if layer.bias is not None:
        values.append(numpy_helper.from_array(layer.bias.detach().numpy(), "bias"))
    inputs = [_INPUT, *(value.name for value in values)]
    if isinstance(layer, nn.Linear):
        node, rank = helper.make_node("Gemm", inputs, ["out"], transB=1), 2
    else:
        assert not isinstance(layer.padding, str)
        node, rank = (
            helper.make_node(
                "Conv",
                inputs,
                ["out"],
                kernel_shape=[*layer.kernel_size],
                strides=[*layer.stride],
                pads=[*layer.padding, *layer.padding],
                dilations=[*layer.dilation],
                group=layer.groups,
            ),
            4,
        )
    shapes = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
        for name in (_INPUT, "out")
    ]
    graph = helper.make_graph([node], "layer", shapes[:1], shapes[1:], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    assert onnx is not None
    return _session(model.SerializeToString(), threads)


def _session(model: bytes, threads: int | None) -> Callable[[Any], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {_INPUT: images})
