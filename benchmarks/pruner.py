"""What pruning a checkpoint costs, and what is right, beside Torch-Pruning on a live model.

time   ResNet-50 at 2.31x: file to file (read, check, choose, trace, cut, check, write, read back),
       beside Torch-Pruning's dependency graph doing the same to a model that is in memory already
       (trace, choose, cut, save); seconds and peak memory of each in a fresh process, imports not
       counted, and the seconds of our whole command and of `import torch`
large  a checkpoint of 2.5 GB (ViT-H/14): seconds and peak memory
cases  every supported architecture: some of the layers that can go, half of the filters of each,
       drawn at random (as many of every group of a convolution in groups): are the logits those
       of the dense network with these filters at zero? Ours and Torch-Pruning's, the same filters
refused  filters that cannot go (a classifier's outputs, a padded stream, an attention's heads):
       what either side says when asked to remove them

Peak memory is the high-water mark of the resident set over what the process had after its
imports. It counts the pages of mapped files, which the system can take back. Both sides take
turns; medians. Results go to benchmarks/results/pruner.json.
"""

import argparse
import copy
import importlib
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tpp.checkpoints.model_file import save_model
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.models.architecture import Architecture, build_model, build_on_meta
from tpp.plan import PruningPlan

RESULTS = Path(__file__).parent / "results" / "pruner.json"
RATIOS = {"layer[1-3]*conv[1-2]": 0.6, "layer4*conv[1-2]": 0.21}
# Name, arguments, side of the images.
ARCHITECTURES: list[tuple[str, dict[str, Any], int]] = [
    *(
        (name, {}, 64)
        for name in (
            "resnet18",
            "resnet34",
            "resnet50",
            "resnet101",
            "wide_resnet50_2",
            "resnext50_32x4d",
            "vgg16_bn",
            "mobilenet_v2",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "densenet121",
            "regnet_y_400mf",
            "googlenet",
            "squeezenet1_1",
            "convnext_tiny",
            "shufflenet_v2_x1_0",
            "timm:resnet50d",
            "timm:seresnet50",
        )
    ),
    ("timm:vit_tiny_patch16_224", {"img_size": 32}, 32),
    ("cifar_resnet20", {}, 32),
    ("cifar_resnet56", {}, 32),
    ("cifar_vgg19_bn", {}, 32),
    ("mlp7_linear", {}, 28),
]

# Network, layer, side of the images.
REFUSED = [
    ("resnet18", "fc", 64),
    ("cifar_resnet20", "layer3.0.conv2", 32),
    ("shufflenet_v2_x1_0", "stage2.1.branch2.5", 64),
    ("vit_b_16", "encoder.layers.encoder_layer_0.self_attention.out_proj", 224),
    ("timm:vit_tiny_patch16_224", "blocks.0.attn.qkv", 224),
]

Result = dict[str, Any]


def resident(key: str) -> float:
    """A figure of this process's memory from the kernel, in MB: VmRSS now, VmHWM at its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1000
    raise UserError(f"this system does not say {key}")


def memory_mark() -> float:
    """Start the high-water mark of memory anew; what there is now, in MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def run_ours(source: Path, target: Path, ratios: dict[str, float]) -> Result:
    """File to file, as ``tpp prune`` does it."""
    # What the command imports once it knows that it has something to do.
    for name in ("torchvision.models", "tpp.checkpoints.prune_file", "tpp.selection.configured"):
        importlib.import_module(name)
    from tpp import prune

    arguments = [f"--ratio={pattern}={ratio}" for pattern, ratio in ratios.items()]
    files = ["--checkpoint", str(source), "--output", str(target), "--overwrite"]
    sys.argv = ["prune", *files, *arguments]
    before, started = memory_mark(), time.perf_counter()
    prune.main()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": resident("VmHWM") - before}


def run_torch_pruning(source: Path, target: Path, ratios: dict[str, float]) -> Result:
    """The same filters off a live model, with the dependency graph.

    The model is there already when the clock starts; its memory counts.
    """
    import torch_pruning

    from tpp.selection.criteria import l1_scores, layer_ratios, pruned_count

    before = memory_mark()
    model = build_model("resnet50", 1000).eval()
    model.load_state_dict(torch.load(source, mmap=True, weights_only=True))
    started = time.perf_counter()
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, torch.zeros(1, 3, 224, 224), verbose=False
    )
    gone = {}
    for layer, ratio in layer_ratios(model, ratios).items():
        scores = l1_scores(model.get_parameter(f"{layer}.weight"))
        gone[layer] = scores.argsort()[: pruned_count(ratio, len(scores))].tolist()
    for layer, filters in gone.items():
        graph.get_pruning_group(
            model.get_submodule(layer), torch_pruning.prune_conv_out_channels, filters
        ).prune()
    torch.save(model.state_dict(), target)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_mb": resident("VmHWM") - before}


SIDES = {"ours": run_ours, "torch_pruning": run_torch_pruning}


def in_a_process(side: str, source: Path, target: Path, ratios: dict[str, float]) -> Result:
    """Run one side in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.pruner", "--side", side]
    command += [str(source), str(target), json.dumps(ratios)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_time(rounds: int) -> Result:
    """Both sides in turn, and the whole command."""
    found: dict[str, list[Result]] = {side: [] for side in SIDES}
    whole: list[float] = []
    imports: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = build_model("resnet50", 1000)
        ours, theirs = Path(folder, "in.safetensors"), Path(folder, "in.pth")
        save_model(ours, model)
        torch.save(model.state_dict(), theirs)
        size = ours.stat().st_size / 1e6
        for _ in range(rounds):
            for side, source in (("ours", ours), ("torch_pruning", theirs)):
                found[side].append(in_a_process(side, source, Path(folder, side), RATIOS))
            command = ["-m", "tpp.prune", "--checkpoint", str(ours)]
            command += ["--output", str(Path(folder, "out")), "--overwrite"]
            command += [f"--ratio={pattern}={ratio}" for pattern, ratio in RATIOS.items()]
            for taken, arguments in ((whole, command), (imports, ["-c", "import torch"])):
                started = time.perf_counter()
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
                taken.append(time.perf_counter() - started)
    result: Result = {
        "checkpoint_mb": size,
        "whole_command_seconds": statistics.median(whole),
        "import_torch_seconds": statistics.median(imports),
    }
    for side, runs in found.items():
        result[side] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        result[side]["peak_over_size"] = result[side]["peak_mb"] / size
    return result


def measure_large(_: int) -> Result:
    """A checkpoint that is large, with the MLPs' widths halved."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "in.safetensors")
        architecture = Architecture("vit_h_14", 1000, {"image_size": 224})
        shapes = build_on_meta(architecture).state_dict()
        torch.manual_seed(0)
        pool = torch.rand(max(tensor.numel() for tensor in shapes.values()) + len(shapes))
        tensors = {
            name: pool[n : n + tensor.numel()].view(tensor.shape)
            for n, (name, tensor) in enumerate(shapes.items())
        }
        save_model(source, tensors, architecture=architecture)
        size = source.stat().st_size / 1e6
        found = in_a_process("ours", source, Path(folder, "out"), {"*.mlp.0": 0.5})
        return {"checkpoint_mb": size, **found, "peak_over_size": found["peak_mb"] / size}


def _torch_pruned(model: nn.Module, plan: PruningPlan, image: Tensor) -> nn.Module:
    import torch_pruning

    model = copy.deepcopy(model).eval()
    graph = torch_pruning.DependencyGraph().build_dependency(model, image, verbose=False)
    layer = plan.active_layers[0]
    module = model.get_submodule(layer)
    function = (
        torch_pruning.prune_conv_out_channels
        if isinstance(module, nn.Conv2d)
        else torch_pruning.prune_linear_out_channels
    )
    graph.get_pruning_group(module, function, plan.pruned[layer]).prune()
    return model


def _judge(prune: Callable[[], nn.Module], images: Tensor, expected: Tensor) -> str:
    """Prune and run: right, wrong, or what went wrong."""
    try:
        pruned = prune()
        with torch.no_grad():
            logits = pruned(images)
    except Exception as error:  # whatever the other side stumbles over is what is asked here
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    if logits.shape != expected.shape:
        return "wrong: other outputs"
    difference = ((logits - expected).abs().max() / expected.abs().max()).item()
    return "right" if difference < 1e-9 else f"wrong: off by {difference:.1e}"


def measure_cases(layers: int) -> Result:
    """For some layers of every architecture, what either side makes of half of the filters."""
    from tpp.channels.removal import prune_model
    from tpp.channels.survey import survey_channels

    zeroing: Any = importlib.import_module("tests.tpp.zeroing")
    result: Result = {}
    for name, arguments, side in ARCHITECTURES:
        model = zeroing.randomised(name, **arguments).eval()
        images = torch.rand(2, 1 if name == "mlp7_linear" else 3, side, side, dtype=torch.float64)
        channels = survey_channels(model).channels
        ours, theirs = [], []
        shuffled = random.Random(0)
        chosen = shuffled.sample(sorted(channels), min(layers, len(channels)))
        for layer in chosen:
            found = channels[layer]
            per_group = found.filters // found.groups
            pruned = [
                group * per_group + filter_
                for group in range(found.groups)
                for filter_ in sorted(shuffled.sample(range(per_group), per_group // 2))
            ]
            plan = PruningPlan({layer: found.filters}, {layer: pruned})
            with torch.no_grad():
                expected = zeroing.zeroed(model, plan.pruned, images[:1])(images)
            ours.append(_judge(partial(prune_model, model, plan), images, expected))
            other = partial(_torch_pruned, model, plan, images[:1])
            theirs.append(_judge(other, images, expected))
        together = survey_channels(model, coupled=True)
        exact = [layer for layer, c in together.channels.items() if c.inexact is None]
        result[name] = {
            "all_layers": len(together.channels) + len(together.refused),
            "can_go_alone": len(channels),
            "can_go_coupled": len(exact),
            "coupled_under_a_norm": len(together.channels) - len(exact),
            "cannot_go": dict(
                Counter(reason.partition(" (")[0] for reason in together.refused.values())
            ),
            "layers": len(chosen),
            "ours_right": ours.count("right"),
            "torch_pruning_right": theirs.count("right"),
            "ours_otherwise": sorted(set(ours) - {"right"}),
            "torch_pruning_otherwise": sorted(set(theirs) - {"right"})[:3],
        }
        Console().print(f"{name}: {result[name]}", highlight=False, soft_wrap=True)
    return result


def measure_refused(_: int) -> Result:
    """Filters that cannot go: what either side makes of half of a layer's."""
    from tpp.channels.removal import prune_model

    zeroing: Any = importlib.import_module("tests.tpp.zeroing")
    result: Result = {}
    for name, layer, side in REFUSED:
        model = zeroing.randomised(name).eval()
        images = torch.rand(2, 3, side, side, dtype=torch.float64)
        filters = model.get_submodule(layer).weight.shape[0]
        plan = PruningPlan({layer: filters}, {layer: list(range(filters // 2))})
        with torch.no_grad():
            dense = model(images)
        found = {}
        for label, prune in (
            ("ours", partial(prune_model, model, plan)),
            ("torch_pruning", partial(_torch_pruned, model, plan, images[:1])),
        ):
            outcome = _judge(prune, images, dense)
            found[label] = (
                "runs, with other logits" if outcome.startswith("wrong: off") else outcome
            )
        result[f"{name} {layer}"] = found
    return result


def show(results: Result, console: Console) -> None:
    """The results as tables."""
    if "time" in results:
        found = results["time"]
        table = Table(title=f"ResNet-50 at 2.31x, checkpoint of {found['checkpoint_mb']:.0f} MB")
        for heading in ("", "seconds", "peak MB", "times the checkpoint"):
            table.add_column(heading, justify="right" if heading else "left")
        for side, label in (
            ("ours", "ours, file to file"),
            ("torch_pruning", "Torch-Pruning, live model"),
        ):
            run = found[side]
            table.add_row(
                label,
                f"{run['seconds']:.2f}",
                f"{run['peak_mb']:.0f}",
                f"{run['peak_over_size']:.2f}",
            )
        table.add_row("ours, the whole command", f"{found['whole_command_seconds']:.2f}", "", "")
        table.add_row("import torch", f"{found['import_torch_seconds']:.2f}", "", "")
        console.print(table)
        ratio = found["torch_pruning"]["seconds"] / found["ours"]["seconds"]
        console.print(f"ours takes {1 / ratio:.2f} times Torch-Pruning's time")
    if "large" in results:
        found = results["large"]
        console.print(
            f"ViT-H/14, {found['checkpoint_mb']:.0f} MB: {found['seconds']:.1f} s, peak "
            f"{found['peak_mb']:.0f} MB = {found['peak_over_size']:.2f} times the checkpoint"
        )
    if "cases" in results:
        table = Table(title="logits equal to those of the zeroed network, layers tried")
        for heading in ("network", "ours", "Torch-Pruning", "where not"):
            table.add_column(heading, justify="left" if "n" in heading[:1] else "right")
        for name, case in results["cases"].items():
            table.add_row(
                name,
                f"{case['ours_right']}/{case['layers']}",
                f"{case['torch_pruning_right']}/{case['layers']}",
                "; ".join(case["torch_pruning_otherwise"])[:70],
            )
        console.print(table)
    if "refused" in results:
        table = Table(title="asked to remove filters that cannot go")
        for heading in ("layer", "ours", "Torch-Pruning"):
            table.add_column(heading)
        for name, found in results["refused"].items():
            table.add_row(name, found["ours"].removeprefix("UserError: "), found["torch_pruning"])
        console.print(table)


def main() -> None:
    """Command-line entry point."""
    parser = Parser.of_script(
        "python -m benchmarks.pruner", __doc__, ["--parts refused --output /tmp/pruner.json"]
    )
    share(parser, "--parts", default="time,large,cases,refused")
    share(parser, "--rounds", ", in the part time", default=5)
    parser.add_argument(
        "--layers", type=int, default=8, metavar="N", help="of each network in cases"
    )
    share(parser, "--output", default=RESULTS)
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, source, target, ratios = arguments.side
        print(json.dumps(SIDES[side](Path(source), Path(target), json.loads(ratios))))
        return
    parts: dict[str, Callable[[int], Result]] = {
        "time": measure_time,
        "large": measure_large,
        "cases": measure_cases,
        "refused": measure_refused,
    }
    chosen = arguments.parts.split(",")
    for name in chosen:
        if name not in parts:
            raise UserError(f"--parts: there is no {name!r}; there are {', '.join(parts)}")
    results: Result = {}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    for name in chosen:
        results[name] = parts[name](arguments.layers if name == "cases" else arguments.rounds)
    results["machine"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    show(results, Console())


if __name__ == "__main__":
    run_command(main)
