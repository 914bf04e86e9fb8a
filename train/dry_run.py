"""What a run would do: configuration, plan, counts, and how the penalty is shared."""

import os
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table
from torch import nn

from data_pipelines.images.image_index import ImageIndex
from data_pipelines.sets.inputs import open_input
from tpp.channels.removal import prune_model
from tpp.common.consoles import output_console
from tpp.common.errors import UserError
from tpp.common.object_storage import is_url
from tpp.measure.counts import Counts, count
from tpp.methods.base import Method
from tpp.models.architecture import Architecture, build_on_meta, set_preprocessing
from tpp.plan import PruningPlan
from train.config.batch_rule import describe, describe_length
from train.config.config import Config, as_yaml
from train.config.tracking import check_trackers
from train.data import input_of, look_at_images
from train.opening import opening
from train.preflight import (
    check_network,
    check_plans,
    only_prunes,
    what_counts_zeros,
)
from train.teachers import open_teachers
from train.weights import load_starting_weights, notes_on_images, weights_missing_here

_RANKS = 8  # that shares are shown for, where nobody says how many there are to be


def dry_run(config: Config, *, ranks: int | None = None) -> None:
    """Print what the run would do; nothing is trained, downloaded or written.

    What is there is opened: images, starting weights, what the run folder holds. The data need not
    be there if ``model.num_classes`` says how many classes there are; a line names what was
    not. What one looks for first comes first; last the resolved configuration, and what was not
    looked at, where nobody misses it.

    Raises:
        UserError: what the run would end with, as far as it can be known here; or fewer than one
            rank.
    """
    if ranks is not None:
        if ranks < 1:
            raise UserError(f"--ranks must be at least 1, not {ranks}")
        from train.distributed.accelerator import check_batch_size

        check_batch_size(config.training, ranks)
    console = output_console(100, highlight=False)
    check_trackers(config.trackers)
    architecture = _architecture(config)
    plan = check_network(config, architecture)
    missing, indexes = _open_what_is_there(config, architecture)
    images = len(indexes[0]) if indexes is not None else None
    if images is not None and any(map(config.is_stretched, config.stages)):
        check_plans(config, architecture, images)
    dense = build_on_meta(architecture)
    set_preprocessing(dense, config.data.preprocessing())
    counts = count(dense)
    for line in opening(config, counts, images=indexes, where=None):
        console.print(line, markup=False, soft_wrap=True)
    for note in notes_on_images(config.model, config.data):
        console.print(note, markup=False)
    _say_reconstructions(config, console)
    _say_batch_rule(config, images, console)
    if plan is None:
        console.print(
            f"no pruning: {counts.parameters:,} parameters, {counts.macs:,} MACs for "
            f"{counts.of_image}"
        )
    else:
        _say_plan(config, plan, dense, counts, ranks or _RANKS, images, console)
    console.print("\nthe configuration, resolved:")
    console.print(as_yaml(config), markup=False)
    for what in missing:
        console.print(f"not looked at: {what}", soft_wrap=True)


def _say_plan(
    config: Config,
    plan: PruningPlan,
    dense: nn.Module,
    counts: Counts,
    ranks: int,
    images: int | None,
    console: Console,
) -> None:
    """What goes, what is left, and how the penalty is shared."""
    pruned = count(prune_model(dense, plan))
    if not plan.active_layers:
        console.print("note: the dense network meets the budget: nothing would be pruned")
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
        method = config.stage_method(name, images=images)
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
            if images is not None or not config.is_stretched(name):
                _say_removal(config, name, method, dense, plan, console)
            cost = method.training_cost(dense, plan)
            if cost is not None:
                console.print(
                    f"{name}: filters go while it trains: {100 * cost:.1f}% of the multiply-adds "
                    "of a stage that keeps them all",
                    soft_wrap=True,
                )


def _say_removal(
    config: Config,
    name: str,
    method: Method,
    dense: nn.Module,
    plan: PruningPlan,
    console: Console,
) -> None:
    """When a stage removes its filters itself, or what keeps it from that."""
    counts_zeros = what_counts_zeros(config, name)
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


def _open_what_is_there(
    config: Config, architecture: Architecture
) -> tuple[list[str], tuple[ImageIndex, ImageIndex] | None]:
    """Meet the mistakes that the run would meet.

    Returns:
        What of its files is not there, and the images of training and validation, where they are.
    """
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
        return missing, None
    if not root.is_dir() and not is_url(config.data.root):
        if config.data.demo is None:
            missing.append(f"data.root: there is no folder {root} here")
        return missing, None
    train, val = look_at_images(config)
    config.make_task().architecture(config.model, len(train.classes), train.place)
    return missing, (train, val)


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


def _say_batch_rule(config: Config, images: int | None, console: Console) -> None:
    """One line for each stage that batch or length change the settings of."""
    for name in config.stages:
        for rule in (describe(config, name), describe_length(config, name, images)):
            if rule is not None:
                console.print(f"{name}: {rule}", soft_wrap=True)


def _say_what_stands_in(config: Config, console: Console) -> None:
    """One line for a budget: how far the widths above are those of the run."""
    budget = config.selection().budget
    if budget is None:
        return
    if budget.measured:
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
        index = open_input(input_of(config, "train"))
        found = task.architecture(config.model, len(index.classes), index.place)
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
