"""The plans of a run's stages."""

from torch import nn

from tpp.methods.base import Method
from tpp.models.architecture import example_input_for
from tpp.plan import PruningPlan
from tpp.selection.selection import same_on_all_ranks
from train.run import Run
from train.run_folder.calibration import selection_of
from train.run_folder.log import say

PLAN_FILE = "plan.json"


def choose_plan(run: Run, name: str, model: nn.Module, method: Method) -> PruningPlan | None:
    """The plan of a stage that begins: what its input was regularised for, or chosen now.

    None for a stage that begins without one: its method picks the filters later.
    """
    stage = run.config.stages[name]
    if not stage.does.needs_plan or (stage.does.regularizes and method.picks != "before"):
        return None
    if stage.input is not None and run.config.readies_a_plan(stage.input):
        plan = load_plan(run, stage.input)
    else:
        example = example_input_for(model)
        plan = method.select(model, selection_of(run, name), example_input=example)
        plan = same_on_all_ranks(plan)
        if run.is_main and not plan.active_layers:
            say(f"{name}: note: nothing is to be pruned: the network meets the budget as it is")
    save_plan(run, name, plan)
    return plan


def save_plan(run: Run, name: str, plan: PruningPlan) -> None:
    """Write down a stage's plan; that of the run's first stage that has one is also the run's."""
    if run.is_main:
        plan.save(run.stage_folder(name) / PLAN_FILE)
        config = run.config
        with_plan = (
            other
            for other, stage in config.stages.items()
            if stage.does.removes or config.readies_a_plan(other)
        )
        if name == next(with_plan):
            plan.save(run.folder / PLAN_FILE)


def load_plan(run: Run, name: str) -> PruningPlan:
    """The plan that a stage wrote down."""
    return PruningPlan.load(run.stage_folder(name) / PLAN_FILE)
