"""What a run would do: configuration, plan, counts, and how the penalty is shared."""

import os
import sys
from pathlib import Path
from statistics import mean

import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from data_pipelines.images.image_index import open_images
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import Counts, count
from tpp.models.architecture import Architecture, build_on_meta, set_preprocessing
from tpp.plan import PruningPlan
from train.config.batch_rule import describe
from train.config.config import Config
from train.data import image_place, look_at_images
from train.preflight import (
    check_network,
    only_prunes,
    what_counts_zeros,
)
from train.teachers import open_teachers
from train.weights import load_starting_weights, notes_on_images, weights_missing_here

_RANKS = 8  # that shares are shown for, where nobody says how many there are to be


def dry_run(config: Config, *, ranks: int | None = None) -> None:
    """Print what the run would do; nothing is trained, downloaded or written.

    What is there is opened: images, starting weights, what the run folder holds. The data need not
    be there if ``model.num_classes`` says how many classes there are; the last lines name what was
    not.

    Raises:
        UserError: what the run would end with, as far as it can be known here; or fewer than one
            rank.
    """
    if ranks is not None:
        if ranks < 1:
            raise UserError(f"--ranks must be at least 1, not {ranks}")
        from train.distributed.accelerator import check_batch_size

        check_batch_size(config.training, ranks)
    # A pipe has no width; 100 columns keep every row on one line there.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    architecture = _architecture(config)
    plan = check_network(config, architecture)
    missing = _open_what_is_there(config, architecture)
    for note in notes_on_images(config.model, config.data):
        console.print(note, markup=False)
    console.print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    _say_reconstructions(config, console)
    _say_batch_rule(config, console)
    dense = build_on_meta(architecture)
    set_preprocessing(dense, config.data.preprocessing())
    counts = count(dense)
    if plan is None:
        console.print(
            f"no pruning: {counts.parameters:,} parameters, {counts.macs:,} MACs for "
            f"{counts.of_image}"
        )
    else:
        _say_plan(config, plan, dense, counts, ranks or _RANKS, console)
    for what in missing:
        console.print(f"not looked at: {what}", soft_wrap=True)


def _say_plan(
    config: Config,
    plan: PruningPlan,
    dense: nn.Module,
    counts: Counts,
    ranks: int,
    console: Console,
) -> None:
    """What goes, what is left, and how the penalty is shared."""
    pruned = count(prune_model(dense, plan))
    console.print(_plan_table(plan))
    _say_what_stands_in(config, console)
    for name, before, after in (
        ("parameters", counts.parameters, pruned.parameters),
        (f"MACs for {counts.of_image}", counts.macs, pruned.macs),
    ):
        removed = 100 * (1 - after / before)
        console.print(f"{name}: {before:,} -> {after:,} ({removed:.2f}% removed)")
    console.print(f"speedup: {counts.macs / pruned.macs:.4f}x fewer MACs\n")
    for name, stage in config.stages.items():
        method = config.stage_method(name)
        costs = method.rank_costs(dense, plan, ranks)
        if stage.does.regularizes and costs is not None:
            average = mean(costs)
            console.print(
                f"penalty of {name}: {sum(costs):,} multiply-adds per step, shared over {ranks} "
                f"rank(s): mean {average:,.0f}, busiest {max(costs):,} "
                f"({100 * (max(costs) / average - 1) if average else 0:+.2f}%)",
                soft_wrap=True,
            )
        if stage.does.regularizes:
            _say_removal(config, name, dense, plan, console)
            cost = method.training_cost(dense, plan)
            if cost is not None:
                console.print(
                    f"{name}: filters go while it trains: {100 * cost:.1f}% of the multiply-adds "
                    "of a stage that keeps them all",
                    soft_wrap=True,
                )


def _say_removal(
    config: Config, name: str, dense: nn.Module, plan: PruningPlan, console: Console
) -> None:
    """When a stage removes its filters itself, or what keeps it from that."""
    method, counts_zeros = config.stage_method(name), what_counts_zeros(config, name)
    steps = method.removes_after(dense, plan, counts_zeros=counts_zeros)
    total = method.steps()
    if steps is not None and total is not None and steps < total:
        console.print(
            f"{name}: after {steps:,} of {total:,} steps all filters that go are at zero, and are "
            f"removed: {100 * (1 - steps / total):.0f}% of the stage train the smaller network",
            soft_wrap=True,
        )
    elif counts_zeros is not None and method.removes_after(dense, plan) is not None:
        console.print(
            f"{name}: filters at zero stay to its end, because of {counts_zeros}", soft_wrap=True
        )


def _open_what_is_there(config: Config, architecture: Architecture) -> list[str]:
    """Meet the mistakes that the run would meet; returns what of its files is not there."""
    _check_output(Path(config.output))
    if Path(config.output).exists():
        from train.run_folder.same_run import results_of_done  # and Accelerate with it

        for name in config.stages:
            results_of_done(config, name)
    weights = weights_missing_here(config.model)
    if weights is None and config.model.checkpoint is not None:
        load_starting_weights(config.model, architecture, config.seed)
    missing = [weights] if weights is not None else []
    missing += open_teachers(config, architecture)
    if config.training.deepspeed is not None:
        from train.distributed.deepspeed_engine import deepspeed_plugin

        deepspeed_plugin(config.training)
    root = Path(config.data.root)
    if only_prunes(config, config.stages):
        return missing
    if not root.is_dir():
        if config.data.demo is None:
            missing.append(f"data.root: there is no folder {root} here")
        return missing
    index = look_at_images(config)
    config.make_task().architecture(config.model, len(index.classes), str(index.root))
    return missing


def _check_output(folder: Path) -> None:
    """Check that the run folder is one, or can be made."""
    place = folder.absolute()
    there = next(above for above in (place, *place.parents) if above.exists())
    if not there.is_dir():
        raise UserError(f"output: {there} is a file; choose another folder with output=...")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"output: {there} cannot be written to; choose another folder with output=..."
        )


def _say_reconstructions(config: Config, console: Console) -> None:
    """One line for each method of which not all is known that was published."""
    having = [name for name in config.stages if config.has_method(name)]
    for title in dict.fromkeys(
        method.title for method in map(config.stage_method, having) if not method.faithful
    ):
        console.print(f"{title}: a reconstruction: the published settings are not known")


def _say_batch_rule(config: Config, console: Console) -> None:
    """One line for each stage that the batch changes the settings of."""
    for name in config.stages:
        rule = describe(config, name)
        if rule is not None:
            console.print(f"{name}: {rule}", soft_wrap=True)


def _say_what_stands_in(config: Config, console: Console) -> None:
    """One line for a budget: how far the widths above are those of the run."""
    budget = config.selection().budget
    if budget is None:
        return
    if budget.kind == "latency_ms":
        shown = "latency is measured when the plan is chosen; shown is the most that may go"
    else:
        shown = "widths depend on the weights; shown are those of weights that are all alike"
    console.print(f"budget, {budget}: {shown}", soft_wrap=True)


def _architecture(config: Config) -> Architecture:
    task = config.make_task()
    found = task.architecture(config.model)
    if found is None and config.data.demo is not None:
        found = task.architecture(config.model, config.data.demo.classes)
    if found is None:
        index = open_images(*image_place(config, config.data.train))
        found = task.architecture(config.model, len(index.classes), str(index.root))
    assert found is not None
    return found


def _plan_table(plan: PruningPlan) -> Table:
    table = Table(title="plan (which filters go is decided from the weights)", title_justify="left")
    table.add_column("layer")
    for column in ("filters", "pruned", "kept"):
        table.add_column(column, justify="right")
    for layer in plan.active_layers:
        gone = len(plan.pruned[layer])
        table.add_row(layer, str(plan.filters[layer]), str(gone), str(plan.filters[layer] - gone))
    return table
