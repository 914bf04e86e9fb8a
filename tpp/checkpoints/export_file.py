"""Files for serving programs: ONNX, and PyTorch's exported programs.

A pruned network is an ordinary dense one, so whatever runs ONNX or PyTorch's exported programs
runs it at its smaller size, without this repository.
"""

import importlib
import io
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tpp.checkpoints.any_file import open_network
from tpp.checkpoints.safetensors_files import PathLike
from tpp.common.errors import UserError
from tpp.common.files import aside_of, sync
from tpp.models.architecture import (
    Architecture,
    architecture_of,
    image_shape_for,
    plain_copy,
)
from tpp.models.preparation import take_image_size

INPUT = "images"
TOLERANCE = 1e-4
# An ONNX file is one protocol buffer, which cannot exceed 2 GiB; some of it is for the graph.
_ONNX_BYTES = 2**31 - 2**24
_ONNX_PACKAGES = ("onnx", "onnxscript")
_METADATA = ("architecture", "preprocessing", "classes")


@dataclass(frozen=True)
class Exported:
    """What :func:`export_model` wrote.

    Attributes:
        path: the file.
        image_shape: (channels, height, width) of the images that it takes.
        batch: images per call; None if any number will do.
        opset: version of the ONNX operators; None for ``.pt2``.
        difference: largest difference from the network's own output on random images, relative
            to its largest value; None if it was not checked.
        output: the name of what it gives: ``logits``, or ``outputs`` where that is an image.
    """

    path: Path
    image_shape: tuple[int, int, int]
    batch: int | None
    opset: int | None
    difference: float | None
    output: str = "logits"


def export_model(
    source: nn.Module | PathLike,
    output: PathLike,
    *,
    batch: int | None = None,
    opset: int | None = None,
    check: bool = True,
    classes: Sequence[str] | None = None,
    example_input: Tensor | None = None,
    image_size: int | None = None,
    architecture: Architecture | None = None,
) -> Exported:
    """Write a network as ONNX (``.onnx``) or as an exported program of PyTorch (``.pt2``).

    The file takes float32 ``images`` (N, channels, height, width), prepared as the checkpoint's
    preprocessing says, and gives float32 ``logits`` (N, classes); a network whose output is an
    image gives ``outputs`` (N, channels, height, width). Architecture, preprocessing and class
    names, where known, travel with it as JSON: in the ``metadata_props`` of ONNX, as
    ``extra_files`` of ``.pt2``. It appears whole and checked, or not at all.

    Args:
        source: one of our checkpoints, pruned or not, or, if ``architecture`` is given, anything
            else that :func:`tpp.checkpoints.sources.read_source` reads; or a network, which is
            left alone.
        output: where to; its ending says the format. Missing folders are made.
        batch: images per call; by default any number.
        opset: version of the ONNX operators, 18 or newer; by default PyTorch's choice.
        check: run the file (ONNX in onnxruntime) on random images beside the network: on
            ``batch`` images, or on 1 and on 3.
        classes: names of the outputs; by default those in the checkpoint.
        example_input: an image batch (N, channels, height, width) whose shape the file is to
            take; by default what the preprocessing, or else the architecture, says.
        image_size: side of its images, in pixels, in place of what the preprocessing says.
        architecture: the network of a file that does not say which one it holds.

    Raises:
        UserError: the output's ending is unknown, a package is missing, the network cannot be
            exported or is too large for ONNX, the file cannot be written, or what it computes
            differs from the network by more than 1e-4 of its largest value.
    """
    output = Path(output)
    _check_request(output, batch, opset, check)
    name = type(source).__name__ if isinstance(source, nn.Module) else str(source)
    if isinstance(source, nn.Module):
        network = source
    else:
        opened = open_network(source, architecture, image_size=image_size)
        network = opened.model
        classes = opened.extra.get("classes") if classes is None else classes
    if output.suffix == ".onnx":
        _check_size(name, network)
    model = plain_copy(network).to("cpu", torch.float32).eval()
    take_image_size(model, image_size)
    shape = _image_shape(model, example_input)
    _check_runs(name, model, shape)
    metadata = _metadata(model, classes)
    aside = aside_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with _quiet():
            program = _trace(name, model, shape, batch)
            if output.suffix == ".onnx":
                output_name = _output_name(model)
                opset = _write_onnx(name, program, aside, batch, opset, metadata, output_name)
            else:
                _write_program(program, aside, metadata)
            sync(aside)
            difference = _difference(output, aside, model, shape, batch) if check else None
        aside.replace(output)
        sync(output.parent)
    except OSError as error:
        raise UserError(f"{output}: cannot write it: {error}") from None
    finally:
        with suppress(OSError):
            aside.unlink()
    return Exported(output, shape, batch, opset, difference, _output_name(model))


def _check_request(output: Path, batch: int | None, opset: int | None, check: bool) -> None:
    if output.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{output}: the name must end in .onnx or .pt2, which says the format")
    if batch is not None and batch < 1:
        raise UserError(f"--batch-size {batch}: must be 1 or more images per call")
    if output.suffix == ".pt2":
        if opset is not None:
            raise UserError(f"--opset {opset}: is for .onnx files, {output} is none")
        return
    for package in (*_ONNX_PACKAGES, *(("onnxruntime",) if check else ())):
        try:
            importlib.import_module(package)
        except ImportError:
            raise UserError(
                f"{output}: exporting to ONNX needs {package}: "
                "pip install onnx onnxscript onnxruntime"
            ) from None


def _check_size(name: str, model: nn.Module) -> None:
    values = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    if 4 * values > _ONNX_BYTES:
        raise UserError(
            f"{name}: {4 * values / 1e9:.1f} GB of float32 weights, more than the 2 GB that one "
            "ONNX file can hold; export it to a .pt2 file"
        )


def _image_shape(model: nn.Module, example_input: Tensor | None) -> tuple[int, int, int]:
    if example_input is None:
        return image_shape_for(model)
    channels, height, width = example_input.shape[1:]
    return channels, height, width


def _output_name(model: nn.Module) -> str:
    """What the network gives is called in the file, and in messages."""
    architecture = architecture_of(model)
    return "logits" if architecture is None or architecture.num_classes else "outputs"


def _check_runs(name: str, model: nn.Module, shape: tuple[int, int, int]) -> None:
    try:
        with torch.no_grad():
            model(torch.zeros(1, *shape))
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        raise UserError(
            f"{name}: does not run on images of {'x'.join(map(str, shape))}: {_first_line(error)}"
        ) from None


def _metadata(model: nn.Module, classes: Sequence[str] | None) -> dict[str, str]:
    architecture = architecture_of(model)
    values = {
        "architecture": architecture and architecture.to_dict(),
        "preprocessing": getattr(model, "preprocessing", None),
        "classes": classes and list(classes),
    }
    return {key: json.dumps(values[key]) for key in _METADATA if values[key]}


def _trace(
    name: str, model: nn.Module, shape: tuple[int, int, int], batch: int | None
) -> ExportedProgram:
    # An example of one image would be taken for a batch that is always one.
    images = torch.zeros(batch or 2, *shape)
    sizes = None if batch else ({0: Dim("batch", min=1)},)
    try:
        program = torch.export.export(model, (images,), dynamic_shapes=sizes)
    # Tracing runs the network's own code on stand-ins for tensors; it can fail in any way.
    except Exception as error:
        hint = "" if batch else "; with --batch-size N it may do for that many images"
        raise UserError(
            f"{name}: PyTorch cannot trace it for {f'{batch} images' if batch else 'any batch'}: "
            f"{_first_line(error)}{hint}"
        ) from None
    for node in program.graph.nodes:
        # Paths and source lines of the machine that exports, no use to the one that serves.
        node.meta.pop("stack_trace", None)
    return program


def _write_program(program: ExportedProgram, path: Path, metadata: Mapping[str, str]) -> None:
    # The images it was traced with would be stored too: 150 MB for a batch of 256.
    program.example_inputs = None
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files=dict(metadata))


def _write_onnx(
    name: str,
    program: ExportedProgram,
    path: Path,
    batch: int | None,
    opset: int | None,
    metadata: Mapping[str, str],
    output_name: str,
) -> int:
    """Write the program as one ONNX file; the opset that it has."""
    try:
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=[INPUT],
            output_names=[output_name],
            # The name that the program's free dimension has in the file.
            dynamic_shapes=None if batch else ({0: "batch"},),
            opset_version=opset,
        )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"{name}: PyTorch cannot turn it into ONNX: {_root(error)}") from None
    assert onnx is not None
    written = onnx.model.opset_imports[""]
    if opset not in (None, written):
        # The exporter falls back to another one in silence.
        raise UserError(
            f"--opset {opset}: PyTorch's exporter can only write {written} instead; ask for a "
            "newer one that it knows, or leave --opset out"
        )
    onnx.model.metadata_props.update(metadata)
    onnx.save(path, external_data=False)
    return written


def _difference(
    output: Path, aside: Path, model: nn.Module, shape: tuple[int, int, int], batch: int | None
) -> float:
    """The largest difference of outputs over the largest value, file against network."""
    try:
        run = _run_onnx(aside) if output.suffix == ".onnx" else _run_program(aside)
        worst = max(_compare(run, model, shape, n) for n in ([batch] if batch else [1, 3]))
    # Every runtime has exceptions of its own.
    except Exception as error:
        raise UserError(f"{output}: what was exported does not run: {_first_line(error)}") from None
    if not worst <= TOLERANCE:
        raise UserError(
            f"{output}: not written: its {_output_name(model)} differ from the network's by "
            f"{worst:.1e} of the largest, more than {TOLERANCE:.0e}"
        )
    return worst


def _compare(
    run: Callable[[Tensor], Tensor], model: nn.Module, shape: tuple[int, int, int], n: int
) -> float:
    images = torch.randn(n, *shape, generator=torch.Generator().manual_seed(n))
    with torch.no_grad():
        expected, found = model(images), run(images)
    if found.shape != expected.shape:
        what = _output_name(model)
        raise ValueError(f"{what} of {tuple(found.shape)}, not {tuple(expected.shape)}")
    # A head that is still all zeros has no scale.
    return ((found - expected).abs().max() / (expected.abs().max() or 1)).item()


def _run_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {INPUT: images.numpy()})[0])


def _run_program(path: Path) -> Callable[[Tensor], Tensor]:
    with path.open("rb") as file:
        return torch.export.load(file).module()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' progress, warnings, graphs and tracebacks from the user's screen."""
    void = io.StringIO()
    with warnings.catch_warnings(), redirect_stdout(void), redirect_stderr(void):
        warnings.simplefilter("ignore")
        yield


def _root(error: BaseException) -> str:
    """What an error that wraps others comes down to."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line.partition(" For more information")[0].rstrip(".!")
