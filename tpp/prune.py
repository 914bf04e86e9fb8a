"""Removing filters: from tensors, from a model, from a checkpoint (Wang & Fu 2023, sec. 3.1).

``tpp prune`` needs neither data nor a GPU, but for the criteria ``taylor`` and ``hessian``, and
``--recalibrate``, which look at images.
"""

import argparse
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.imports import quick_imports
from tpp.common.options import NOT_SAID, add_checkpoint, add_model, checkpoint_of, share
from tpp.common.outputs import check_apart, check_output
from tpp.common.paths import user_path
from tpp.plan import PruningPlan

if TYPE_CHECKING:
    from torch import nn

    from tpp.channels.trials import Trials
    from tpp.checkpoints.prune_file import Dense
    from tpp.class_folders import ClassFolders
    from tpp.measure.timing import LatencySettings
    from tpp.selection.budget import Budget
    from tpp.selection.configured import Configured

# What tpp.selection.criteria.NEED_IMAGES has, which takes PyTorch to be read.
_OF_IMAGES = ("taylor", "hessian")


def _parse_pairs(option: str, texts: list[str], example: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise UserError(f"{option} {text}: must be {example}")
        pairs[pattern] = value
    return pairs


def _parse_ratios(texts: list[str]) -> dict[str, float]:
    example = "PATTERN=R, such as 'layer*.conv1=0.5'"
    ratios = {}
    for pattern, value in _parse_pairs("--ratio", texts, example).items():
        try:
            ratios[pattern] = float(value)
        except ValueError:
            raise UserError(f"--ratio {pattern}={value}: must be {example}") from None
    return ratios


def _parse_floors(texts: list[str]) -> dict[str, int | float]:
    example = "PATTERN=N or PATTERN=SHARE, such as '*=8' or 'layer4*=0.25'"
    floors: dict[str, int | float] = {}
    for pattern, value in _parse_pairs("--floor", texts, example).items():
        try:
            floors[pattern] = float(value) if "." in value else int(value)
        except ValueError:
            raise UserError(f"--floor {pattern}={value}: must be {example}") from None
    return floors


def _budget(arguments: argparse.Namespace) -> "Budget | None":
    from tpp.selection.budget import Budget

    if arguments.speedup is not None:
        return Budget("speedup", arguments.speedup)
    if arguments.max_macs is not None:
        return Budget("macs", _count("--max-macs", arguments.max_macs))
    if arguments.max_parameters is not None:
        return Budget("parameters", _count("--max-parameters", arguments.max_parameters))
    if arguments.max_latency_ms is not None:
        return Budget("latency_ms", arguments.max_latency_ms, *_measured(arguments))
    if arguments.latency_speedup is not None:
        return Budget("latency_speedup", arguments.latency_speedup, *_measured(arguments))
    return None


def _count(option: str, text: str) -> int:
    from tpp.selection.budget import parse_count

    try:
        return parse_count(text)
    except UserError as error:
        raise UserError(f"{option}: {error}") from None


def _measured(arguments: argparse.Namespace) -> "tuple[LatencySettings, str | None]":
    """How a latency is measured, and the file of the layers' times."""
    from tpp.measure.timing import LatencySettings

    backend = {} if arguments.backend is None else {"backend": arguments.backend}
    table = None if arguments.latency_table is None else str(arguments.latency_table)
    return LatencySettings(**backend), table


# With --ratio or a budget only: a plan says it, and a configuration has keys for it.
_HOW = ("criterion", "round_to", "floor", "skip", "coupled", "seed", "batches")
_BUDGETS = ("speedup", "max_macs", "max_parameters", "max_latency_ms", "latency_speedup")


def _check_together(given: argparse.Namespace) -> None:
    """Refuse options that have no effect beside others, before anything is read."""

    def named(*options: str) -> list[str]:
        said = [name for name in options if getattr(given, name) not in (None, [])]
        return [f"--{name.replace('_', '-')}" for name in said]

    what = named("plan", "config", "ratio", *_BUDGETS)
    if not what:
        raise UserError(
            "say what to prune: --plan FILE, or --config FILE, or --ratio 'PATTERN=R' and/or a "
            "budget (--speedup, --max-macs, --max-parameters, --max-latency-ms, "
            "--latency-speedup)"
        )
    for source in named("plan", "config"):
        others = [option for option in what if option != source]
        if others:
            raise UserError(f"{source} and {others[0]} do not go together: both say what to prune")
        how = named(*_HOW)
        if how:
            reason = (
                "a plan names the filters that go"
                if source == "--plan"
                else "the configuration's pruning section says that; change it there"
            )
            raise UserError(f"{how[0]} has no effect with {source}: {reason}")
    if given.seed is not None and given.criterion != "random" and given.data is None:
        raise UserError("--seed has no effect without --criterion random")
    if given.batches is not None and given.criterion not in _OF_IMAGES:
        raise UserError("--batches has no effect without --criterion taylor or hessian")
    for name in ("batches", "recalibrate"):
        value = getattr(given, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}")
    if given.max_latency_ms is None and given.latency_speedup is None:
        for option in named("latency_table", "backend"):
            raise UserError(f"{option} goes with --max-latency-ms and --latency-speedup only")
    used = given.config or given.recalibrate or given.criterion in _OF_IMAGES
    if given.data is not None and not used:
        raise UserError(
            "--data has no effect without --criterion taylor or hessian, or --recalibrate"
        )
    if given.data is None:
        for option in named("recalibrate"):
            raise UserError(f"{option} needs --data DIR, a folder of class folders")
        if given.criterion in _OF_IMAGES:
            raise UserError(
                f"--criterion {given.criterion} needs --data DIR, a folder of class folders"
            )
        for option in named("batch_size", "device"):
            raise UserError(f"{option} has no effect without --data")


def _plan_of(file: Path, model: "nn.Module") -> PruningPlan:
    """What a file says, for this network."""
    from tpp.models.layers import check_layers

    plan = PruningPlan.load(file)
    try:
        check_layers(model, plan.active_layers)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    return plan


def _make_plan(
    arguments: argparse.Namespace,
    configured: "Configured | None",
    model: "nn.Module",
    trials: "Trials",
    images: "ClassFolders | None",
) -> PruningPlan:
    gradients = images.gradients if images is not None else None
    if arguments.plan:
        return _plan_of(arguments.plan, model)
    if configured is not None:
        selection = replace(configured.selection(), gradients=gradients)
        if selection.needs_images and gradients is None:
            raise UserError(
                f"{arguments.config}: pruning.criterion: {selection.criterion} needs --data DIR, a "
                "folder of class folders"
            )
        return selection.select(model, trials=trials)
    from tpp.selection.selection import Selection

    selection = Selection(
        ratios=_parse_ratios(arguments.ratio),
        criterion=arguments.criterion or "l1",
        round_to=1 if arguments.round_to is None else arguments.round_to,
        floors=_parse_floors(arguments.floor or []),
        skip=tuple(arguments.skip or ()),
        coupled=bool(arguments.coupled),
        budget=_budget(arguments),
        seed=arguments.seed or 0,
        gradients=gradients,
        **({} if arguments.batches is None else {"batches": arguments.batches}),
    )
    return selection.select(model, trials=trials)


def _open_images(
    arguments: argparse.Namespace, dense: "Dense", configured: "Configured | None"
) -> "ClassFolders | None":
    """The images of ``--data``, prepared as the file says, or as its network's weights want it."""
    if arguments.data is None:
        return None
    with quick_imports():
        from tpp.class_folders import ClassFolders
        from tpp.models.architecture import architecture_of
        from tpp.models.preparation import find_preparation

    network, path = architecture_of(dense.model), str(dense.path)
    assert network is not None
    if network.num_classes is None:
        raise UserError(f"--data: {network.name} tells no classes apart")
    said = dense.preparation.values if dense.preparation is not None else None
    preparation = find_preparation(said, network, path)
    names = dense.info.extra.get("classes") if dense.info is not None else None
    seed = arguments.seed or (configured.seed if configured is not None else 0)
    return ClassFolders(
        arguments.data,
        preparation.values,
        outputs=network.num_classes,
        names=names if isinstance(names, list) and len(names) == network.num_classes else None,
        file=path,
        batch_size=64 if arguments.batch_size is None else arguments.batch_size,
        seed=seed,
        device=arguments.device or "cpu",
    )


def _recalibration(
    batches: int | None, images: "ClassFolders | None"
) -> "Callable[[nn.Module], int] | None":
    """What estimates BatchNorm's running statistics anew, if that is wanted."""
    if batches is None or images is None:
        return None
    from tpp.models.recalibration import recalibrate, statistics_of

    def on_images(network: "nn.Module") -> int:
        moved = images.network(network)
        seen = recalibrate(moved, (batch for batch, _ in images(batches)))
        network.load_state_dict(statistics_of(moved), strict=False)
        return seen

    return on_images


def make_parser(prog: str = "python -m tpp.prune") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Remove filters from a checkpoint.",
        more="Needs neither data nor a GPU, but for --criterion taylor and hessian, and "
        "--recalibrate. What comes out is an ordinary, smaller network.",
        examples=[
            "dense.safetensors --output half.safetensors --speedup 2.0",
            "dense.safetensors --output half.safetensors --ratio 'layer*.conv1=0.5' --overwrite",
            "resnet50.pth --model resnet50 --output small.safetensors --max-macs 2G --skip conv1",
        ],
    )
    add_checkpoint(parser)
    share(parser, "--output", ": the pruned checkpoint (safetensors)", required=True)
    add_model(parser, f"{NOT_SAID}; --config says it too")
    share(
        parser,
        "--image-size",
        ", used for MACs and latency; the pruned checkpoint keeps it (default: what the "
        "checkpoint or --config says, or else what public weights of the network want)",
    )
    parser.add_argument(
        "--save-plan", type=user_path, metavar="FILE", help="write down which filters went (JSON)"
    )
    share(parser, "--overwrite")

    what = parser.add_argument_group("what to prune")
    share(
        what,
        "--config",
        "; its pruning section says what to prune, model and seed are read, and other sections are "
        "not checked",
    )
    add = what.add_argument
    add("--plan", type=user_path, metavar="FILE", help="the filters of a saved plan (JSON)")
    add(
        "--ratio",
        action="append",
        default=[],
        metavar="PATTERN=R",
        help="the share R of the filters of every layer that the pattern matches; may be "
        "repeated, the last match wins; with a budget: at most that share",
    )
    budget = what.add_mutually_exclusive_group()
    add = budget.add_argument
    add("--speedup", type=float, metavar="X", help="budget: X times fewer MACs, as 2.0")
    add("--max-macs", metavar="N", help="budget: at most N MACs per image, as 2.0G")
    add("--max-parameters", metavar="N", help="budget: at most N parameters, as 10M")
    add(
        "--max-latency-ms",
        type=float,
        metavar="MS",
        help="budget: at most MS per image on this machine",
    )
    add(
        "--latency-speedup",
        type=float,
        metavar="X",
        help="budget: X times as fast on this machine, as 2.0",
    )

    add = what.add_argument
    add(
        "--latency-table",
        type=user_path,
        metavar="FILE",
        help="times of layers at all widths (JSON), measured and written where it is not there: "
        "with a budget of latency, keep the most score that they allow",
    )
    add(
        "--backend",
        choices=("torch", "onnxruntime"),
        help="what measures the latency (default: torch)",
    )

    how = parser.add_argument_group("which filters, with --ratio or a budget")
    add = how.add_argument
    add(
        "--criterion",
        metavar="NAME",
        help="l1, l2, bn_scale, random, largest, fpgm, group_norm, taylor, hessian (default: l1)",
    )
    add("--round-to", type=int, metavar="N", help="keep multiples of N filters")
    add(
        "--floor",
        action="append",
        metavar="PATTERN=N",
        help="keep at least N filters (or, as 0.25, that share) of these layers",
    )
    share(how, "--skip", action="append")
    add(
        "--coupled",
        action="store_true",
        default=None,
        help="prune layers that are added to each other (the residual stream) together",
    )
    share(
        how,
        "--seed",
        ", of the criterion random and of which images of --data are used (default: 0)",
    )
    add(
        "--batches",
        type=int,
        metavar="N",
        help="batches of images for taylor and hessian (default: 50)",
    )

    images = parser.add_argument_group("what needs images")
    share(images, "--data")
    images.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="estimate BatchNorm's running statistics anew over N batches, without the filters",
    )
    share(images, "--batch-size", " (default: 64)")
    share(images, "--device", " (default: cpu)")
    return parser


def _check_outputs(options: argparse.Namespace) -> None:
    inputs = [path for path in (options.checkpoint, options.config, options.plan) if path]
    outputs = [("--output", options.output, "safetensors", ".safetensors")]
    if options.save_plan:
        outputs.append(("--save-plan", options.save_plan, "JSON", ".json"))
    for option, path, kind, ending in outputs:
        check_output(
            option, path, kind=kind, ending=ending, overwrite=options.overwrite, inputs=inputs
        )
    check_apart([(option, path) for option, path, _, _ in outputs])


def main(arguments: Sequence[str] | None = None, prog: str = "python -m tpp.prune") -> None:
    """Command-line entry point; ``prog`` is how it was called, for ``--help``."""
    parser = make_parser(prog)
    options = parser.parse_args(arguments)
    checkpoint_of(parser, options)
    _check_together(options)
    _check_outputs(options)
    with quick_imports():
        from tpp.channels.trials import Trials
        from tpp.checkpoints.model_file import load_dense_buffers, load_model
        from tpp.checkpoints.prune_file import read_dense, write_pruned
        from tpp.measure.counts import count, summary
        from tpp.models.architecture import architecture_of, meta_copy
        from tpp.models.fitting import assign_tensors

    budget = _budget(options)  # before a large file is read
    named, configured = None, None
    if options.model or options.config:
        from tpp.selection.configured import network_named, read_configured

        named = network_named(options.model, options.image_size, options.model_args)
        configured = read_configured(options.config) if options.config else None
    otherwise = configured.architecture() if configured else None
    if named is not None and otherwise is not None:
        if named.name != otherwise.name:
            raise UserError(
                f"--model {named.name} and --config {options.config}, whose model is "
                f"{otherwise.name}, do not go together; leave --model out"
            )
        named = None  # the configuration knows its arguments too
    images = configured.data.preprocessing() if configured and configured.data else None
    dense = read_dense(
        options.checkpoint, named, otherwise, images=images, image_size=options.image_size
    )
    model = meta_copy(dense.model)
    assign_tensors(model, dense.tensors)
    trials = Trials(dense.model)
    folders = _open_images(options, dense, configured)
    if folders is not None:
        load_dense_buffers(options.checkpoint, model)
    plan = _make_plan(options, configured, model, trials, folders)
    recalibrate = _recalibration(options.recalibrate, folders)
    pruned, done = write_pruned(dense, plan, options.output, trials=trials, recalibrate=recalibrate)
    if options.save_plan:
        plan.save(options.save_plan)
    network = architecture_of(dense.model)
    assert network is not None
    counts = count(pruned)
    print(f"{network.name}: {summary(count(dense.model), counts)}")
    if not plan.active_layers and budget is not None:
        print(f"note: the dense network meets {budget}: nothing was pruned")
    if budget is not None and budget.measured:
        from tpp.measure.timing import measure

        settings, _ = _measured(options)
        timing = measure({"dense": model, "pruned": load_model(options.output)}, settings)
        dense_ms, pruned_ms = (1000 * timing[name].median for name in ("dense", "pruned"))
        print(
            f"latency here, {counts.of_image}: {dense_ms:.1f} ms -> {pruned_ms:.1f} ms (medians), "
            f"{dense_ms / pruned_ms:.2f}x as fast"
        )
        if pruned_ms > 1000 * budget.seconds(dense_ms / 1000):
            print(
                f"note: {budget} was met when the widths were chosen, and is not now: the machine "
                "is not quiet, or the budget close to the mark; measure again with tpp latency"
            )
    if recalibrate is not None and folders is not None:
        batches = folders.batches_of(options.recalibrate)
        print(f"BatchNorm's running statistics are of {batches} batches of images")
    if folders is not None and folders.note is not None:
        print(f"note: {folders.note}")
    if done.preparation is not None and done.preparation.source:
        print(f"images {done.preparation}")
    patterns = [*_parse_ratios(options.ratio)]
    along = [
        layer
        for layer in plan.active_layers
        if patterns and not any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)
    ]
    if along:
        # A pattern of one layer of a coupled set means all of them.
        print(f"note: coupled to these, so pruned along with them: {', '.join(along)}")
    if otherwise is not None and otherwise.name != network.name:
        print(f"note: what goes is said by {options.config}, which is of {otherwise.name}")
    for note in done.notes:
        print(f"note: {note}")
    companions = ", ".join(done.companions)
    print(f"wrote {options.output}" + (f", with {companions}" if companions else ""))


if __name__ == "__main__":
    run_command(main)
