"""Removing filters: from tensors, from a model, from a checkpoint (Wang & Fu 2023, sec. 3.1).

``python -m tpp.prune`` needs neither data nor a GPU.
"""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpp.common.errors import UserError, run_command
from tpp.common.imports import quick_imports
from tpp.common.outputs import check_apart, check_output
from tpp.common.paths import user_path
from tpp.plan import PruningPlan

if TYPE_CHECKING:
    from torch import nn

    from tpp.channels.trials import Trials
    from tpp.selection.budget import Budget
    from tpp.selection.configured import Configured


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
    from tpp.selection.budget import Budget, parse_count

    if arguments.speedup is not None:
        return Budget("speedup", arguments.speedup)
    if arguments.max_macs is not None:
        return Budget("macs", parse_count(arguments.max_macs))
    if arguments.max_parameters is not None:
        return Budget("parameters", parse_count(arguments.max_parameters))
    if arguments.max_latency_ms is not None:
        return Budget("latency_ms", arguments.max_latency_ms)
    return None


# With --ratio or a budget only: a plan says it, and a configuration has keys for it.
_HOW = ("criterion", "round_to", "floor", "skip", "coupled", "seed")
_BUDGETS = ("speedup", "max_macs", "max_parameters", "max_latency_ms")


def _check_together(given: argparse.Namespace) -> None:
    """Refuse options that have no effect beside others, before anything is read."""

    def named(*options: str) -> list[str]:
        said = [name for name in options if getattr(given, name) not in (None, [])]
        return [f"--{name.replace('_', '-')}" for name in said]

    what = named("plan", "config", "ratio", *_BUDGETS)
    if not what:
        raise UserError(
            "say what to prune: --plan FILE, or --config FILE, or --ratio 'PATTERN=R' and/or a "
            "budget (--speedup, --max-macs, --max-parameters, --max-latency-ms)"
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
    if given.seed is not None and given.criterion != "random":
        raise UserError("--seed has no effect without --criterion random")


def _make_plan(
    arguments: argparse.Namespace,
    configured: "Configured | None",
    model: "nn.Module",
    trials: "Trials",
) -> PruningPlan:
    if arguments.plan:
        return PruningPlan.load(arguments.plan)
    if configured is not None:
        return configured.selection().select(model, trials=trials)
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
    )
    return selection.select(model, trials=trials)


def _parse_arguments(arguments: Sequence[str] | None, prog: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Remove filters from a checkpoint. Needs neither data nor a GPU.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=user_path,
        required=True,
        metavar="IN",
        help="a checkpoint that tpp wrote, .pth or .safetensors weights, or a folder of DeepSpeed, "
        "Accelerate or Hugging Face; docs/checkpoints.md lists them",
    )
    add(
        "--output",
        type=user_path,
        required=True,
        metavar="OUT",
        help="the pruned checkpoint (safetensors)",
    )
    add("--model", metavar="NAME", help="the network, where neither IN nor --config says it")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="side of the images that MACs and milliseconds are of, in pixels; OUT keeps it "
        "(default: what IN or --config says, or else what public weights of the network want)",
    )
    add("--save-plan", type=user_path, metavar="FILE", help="write down which filters went (JSON)")
    add("--overwrite", action="store_true", help="replace OUT and the plan if they are there")

    what = parser.add_argument_group("what goes")
    add = what.add_argument
    add(
        "--config",
        type=user_path,
        metavar="FILE",
        help="what the pruning section of this configuration says; of the others only model and "
        "seed are read, and mistakes elsewhere are not looked for",
    )
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
    add("--max-macs", metavar="N", help="budget: at most N MACs for one image, as 2.0G")
    add("--max-parameters", metavar="N", help="budget: at most N parameters, as 10M")
    add("--max-latency-ms", type=float, metavar="MS", help="budget: at most MS for an image here")

    how = parser.add_argument_group("which, with --ratio or a budget")
    add = how.add_argument
    add(
        "--criterion",
        metavar="C",
        help="l1, l2, bn_scale, random, largest (default: l1)",
    )
    add("--round-to", type=int, metavar="N", help="keep multiples of N filters")
    add(
        "--floor",
        action="append",
        metavar="PATTERN=N",
        help="keep at least N filters (or, as 0.25, that share) of these layers",
    )
    add("--skip", action="append", metavar="PATTERN", help="leave these layers alone")
    add(
        "--coupled",
        action="store_true",
        default=None,
        help="prune layers that are added to each other (the residual stream) together",
    )
    add("--seed", type=int, metavar="N", help="of the criterion random (default: 0)")
    return parser.parse_args(arguments)


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
    options = _parse_arguments(arguments, prog)
    _check_together(options)
    _check_outputs(options)
    with quick_imports():
        from tpp.channels.trials import Trials
        from tpp.checkpoints.model_file import load_model
        from tpp.checkpoints.prune_file import read_dense, write_pruned
        from tpp.measure.counts import count, summary
        from tpp.models.architecture import architecture_of, meta_copy
        from tpp.models.fitting import assign_tensors

    named, configured = None, None
    if options.model or options.config:
        from tpp.selection.configured import network_named, read_configured

        named = network_named(options.model) if options.model else None
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
    plan = _make_plan(options, configured, model, trials)
    pruned, done = write_pruned(dense, plan, options.output, trials=trials)
    if options.save_plan:
        plan.save(options.save_plan)
    network = architecture_of(dense.model)
    assert network is not None
    counts = count(pruned)
    print(f"{network.name}: {summary(count(dense.model), counts)}")
    if options.max_latency_ms is not None:
        from tpp.measure.timing import LatencySettings, measure

        timing = measure({"dense": model, "pruned": load_model(options.output)}, LatencySettings())
        dense_ms, pruned_ms = (1000 * timing[name].median for name in ("dense", "pruned"))
        print(f"latency here, {counts.of_image}: {dense_ms:.1f} ms -> {pruned_ms:.1f} ms (medians)")
    if done.preparation is not None and done.preparation.source:
        print(f"images {done.preparation}")
    if otherwise is not None and otherwise.name != network.name:
        print(f"note: what goes is said by {options.config}, which is of {otherwise.name}")
    for note in done.notes:
        print(f"note: {note}")
    companions = ", ".join(done.companions)
    print(f"wrote {options.output}" + (f", with {companions}" if companions else ""))


if __name__ == "__main__":
    run_command(main)
