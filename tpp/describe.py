"""How big a network is, layer by layer: ``python -m tpp.describe CHECKPOINT``."""

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tpp.checkpoint import CheckpointInfo, network_of, read_metadata
from tpp.errors import UserError, run_command
from tpp.models import build_on_meta, example_input_for, meta_copy

# What convolutions and linear layers come down to; attention's products are not among them.
_COUNTED_OPS = {"convolution", "_convolution", "mm", "addmm"}


@dataclass(frozen=True)
class LayerCount:
    """Size of one Conv2d or Linear layer.

    Attributes:
        name: the layer.
        inputs: input channels or features.
        outputs: filters or neurons.
        parameters: weights and biases.
        macs: multiply-accumulates for one image.
    """

    name: str
    inputs: int
    outputs: int
    parameters: int
    macs: int


@dataclass(frozen=True)
class Counts:
    """Size of a network.

    Attributes:
        parameters: all trainable values, those of BatchNorm included.
        macs: multiply-accumulates of convolutions and linear layers for one image.
        layers: the Conv2d and Linear layers that the forward pass calls, in that order.
    """

    parameters: int
    macs: int
    layers: list[LayerCount]


def count(model: nn.Module, *, example_input: Tensor | None = None) -> Counts:
    """Count parameters and multiply-accumulates of convolutions and linear layers.

    Nothing is computed: a copy without memory is run under PyTorch's flop counter, where a
    multiply-accumulate is two flops. BatchNorm, activations, pooling and additions are not
    counted, as in METHOD's "speedup".

    Args:
        model: any network, on any device; left alone.
        example_input: a batch (N, channels, height, width), of which one image is counted; by
            default what the model's architecture expects.

    Raises:
        UserError: the model does not run on such an input.
    """
    if example_input is None:
        example_input = example_input_for(model)
    copy = meta_copy(model).eval()
    dtype = next(copy.parameters()).dtype
    images = torch.empty_like(example_input[:1], device="meta", dtype=dtype)
    counter = FlopCounterMode(display=False)
    macs: dict[str, int] = {}
    for name, module in copy.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            _count_calls(name, module, counter, macs)
    try:
        with torch.no_grad(), counter:
            copy(images)
    except (RuntimeError, ValueError, TypeError, AssertionError, IndexError) as error:
        shape = "x".join(map(str, images.shape))
        raise UserError(
            f"{type(model).__name__} does not run on an input of {shape}: {error}"
        ) from None
    modules = dict(copy.named_modules())
    return Counts(
        parameters=sum(parameter.numel() for parameter in copy.parameters()),
        macs=_counted_macs(counter),
        layers=[_layer_count(name, modules[name], macs[name]) for name in macs],
    )


def _count_calls(
    name: str, module: nn.Module, counter: FlopCounterMode, macs: dict[str, int]
) -> None:
    """Add to ``macs[name]`` what the counter rises by while ``module`` runs."""
    before: list[int] = []

    def enter(*_: Any) -> None:
        before.append(_counted_macs(counter))

    def leave(*_: Any) -> None:
        macs[name] = macs.get(name, 0) + _counted_macs(counter) - before.pop()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _counted_macs(counter: FlopCounterMode) -> int:
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in counts.items() if _op_name(op) in _COUNTED_OPS) // 2


def _op_name(op: Any) -> str:
    return str(op).rpartition(".")[2]


def _layer_count(name: str, layer: nn.Module, macs: int) -> LayerCount:
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    if isinstance(layer, nn.Conv2d):
        return LayerCount(name, layer.in_channels, layer.out_channels, parameters, macs)
    assert isinstance(layer, nn.Linear)
    return LayerCount(name, layer.in_features, layer.out_features, parameters, macs)


def summary(dense: Counts, counts: Counts) -> str:
    """One line: parameters and multiply-accumulates before and after, and the speedup."""
    removed = 1 - counts.parameters / dense.parameters
    return (
        f"parameters {_short(dense.parameters)} -> {_short(counts.parameters)} (-{removed:.2%}), "
        f"MACs {_short(dense.macs)} -> {_short(counts.macs)}, "
        f"speedup {dense.macs / counts.macs:.4f}x"
    )


def print_description(path: str, console: Console) -> None:
    """Print what is in a checkpoint: a table of its layers, totals, and where it came from.

    Raises:
        UserError: the file is not one of our checkpoints.
    """
    info = read_metadata(path)
    dense = count(build_on_meta(info.architecture))
    counts = count(network_of(info, source=path))
    console.print(_layer_table(dense, counts, console), highlight=False)
    console.print(_facts(path, info, dense, counts), highlight=False)


def _layer_table(dense: Counts, counts: Counts, console: Console) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for heading in ("filters", "inputs", "parameters", "MACs"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("share of MACs", no_wrap=True)
    most = max((layer.macs for layer in counts.layers), default=1)
    for before, layer in zip(dense.layers, counts.layers, strict=True):
        pruned = layer.outputs < before.outputs
        table.add_row(
            escape(layer.name),
            f"{layer.outputs} / {before.outputs:<4}",
            f"{layer.inputs}",
            f"{layer.parameters:,}",
            _short(layer.macs),
            f"{layer.macs / counts.macs:6.2%} {_bar(layer.macs / most, console)}",
            style="cyan" if pruned else None,
        )
    return table


def _facts(path: str, info: CheckpointInfo, dense: Counts, counts: Counts) -> Table:
    architecture = info.architecture
    network = f"{architecture.name}, {architecture.num_classes} classes"
    if architecture.args:
        network += f", {_plain(architecture.args)}"
    facts = {
        "checkpoint": str(path),
        "network": network,
        "parameters": f"{counts.parameters:,} of {dense.parameters:,} "
        f"({1 - counts.parameters / dense.parameters:.2%} removed)",
        "MACs": f"{_short(counts.macs)} of {_short(dense.macs)} for one image",
        "speedup": f"{dense.macs / counts.macs:.4f}x",
    }
    if info.preprocessing:
        facts["images"] = _plain(info.preprocessing)
    facts |= {key: _plain(value) for key, value in info.extra.items()}
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("")
    for key, value in facts.items():
        table.add_row(escape(key), escape(value))
    return table


def _plain(value: Any, limit: int = 300) -> str:
    """A JSON value without quotes and outer brackets, long ones cut short."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}={_plain(item)}" for key, item in value.items())
    else:
        text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[:limit]} ..."


def _bar(share: float, console: Console) -> str:
    """A bar for a share in [0, 1]; eighths of a character where the terminal can show them."""
    width = 20 if console.width >= 100 else 6
    if console.options.ascii_only:
        return "#" * round(share * width)
    whole, eighths = divmod(round(share * width * 8), 8)
    return "█" * whole + " ▏▎▍▌▋▊▉"[eighths].strip()


def _short(number: int) -> str:
    """4089184256 as 4.0892 G, 853018 as 853.0 k."""
    for size, unit, digits in ((10**9, "G", 4), (10**6, "M", 2), (10**3, "k", 1)):
        if number >= size:
            return f"{number / size:.{digits}f} {unit}"
    return str(number)


def make_console() -> Console:
    """A console that colours terminals only, and is wide enough for a table when piped."""
    console = Console()
    if not console.is_terminal:
        console.width = 120
    return console


def main() -> None:
    """Command-line entry point."""
    parser = argparse.ArgumentParser(
        prog="python -m tpp.describe", description="Show what is in a checkpoint, layer by layer."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a file that tpp wrote")
    print_description(parser.parse_args().checkpoint, make_console())


if __name__ == "__main__":
    run_command(main)
