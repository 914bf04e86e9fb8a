"""What a run would do: configuration, plan, counts, and how the penalty is shared."""

import sys
from statistics import mean

import yaml
from rich.console import Console
from rich.table import Table

from data_pipelines.images.image_index import open_images
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.measure.counts import count
from tpp.models.architecture import Architecture, build_on_meta, set_preprocessing
from tpp.plan import PruningPlan
from train.config.batch_rule import describe
from train.config.config import Config
from train.data import image_place
from train.preflight import check_plans


def dry_run(config: Config, *, ranks: int) -> None:
    """Print what the run would do; nothing is trained, loaded or written.

    The data need not be there if ``model.num_classes`` says how many classes there are.

    Raises:
        UserError: a mistake in the configuration, or fewer than one rank.
    """
    if ranks < 1:
        raise UserError(f"--ranks must be at least 1, not {ranks}")
    # A pipe has no width; 100 columns keep every row on one line there.
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    architecture = _architecture(config)
    plan = check_plans(config, architecture)
    console.print(yaml.safe_dump(config.model_dump(), sort_keys=False, allow_unicode=True))
    _say_batch_rule(config, console)
    dense = build_on_meta(architecture)
    set_preprocessing(dense, config.data.preprocessing())
    counts = count(dense)
    if plan is None:
        console.print(
            f"no pruning: {counts.parameters:,} parameters, {counts.macs:,} MACs for "
            f"{counts.of_image}"
        )
        return
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
        costs = config.stage_method(name).rank_costs(dense, plan, ranks)
        if stage.does.regularizes and costs is not None:
            average = mean(costs)
            console.print(
                f"penalty of {name}: {sum(costs):,} multiply-adds per step, shared over {ranks} "
                f"rank(s): mean {average:,.0f}, busiest {max(costs):,} "
                f"({100 * (max(costs) / average - 1) if average else 0:+.2f}%)",
                soft_wrap=True,
            )


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
