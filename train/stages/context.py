"""What a training stage tells its method."""

from torch import nn

from tpp.methods.base import TrainingContext
from tpp.models.architecture import example_input_for
from tpp.plan import PruningPlan
from train.distributed.collectives import mean_over_ranks
from train.preflight import what_counts_zeros
from train.run import Run
from train.run_folder.calibration import selection_of
from train.run_folder.networks import companion_of_input, dense_network
from train.stages.first_batch import FirstBatch


def context_of(
    run: Run,
    name: str,
    network: nn.Module,
    plan: PruningPlan | None,
    *,
    total_steps: int | None,
    steps_per_epoch: float,
) -> TrainingContext:
    """What stage ``name`` of a run tells its method.

    Args:
        run, name: the stage.
        network: what it trains, placed.
        plan: the filters that it drives out; None for none.
        total_steps, steps_per_epoch: see :class:`tpp.methods.base.TrainingContext`.
    """
    stage = run.config.stages[name]
    return TrainingContext(
        stage=stage.kind,
        plan=plan,
        selection=selection_of(run, name),
        rank=run.accelerator.process_index,
        world_size=run.accelerator.num_processes,
        example_input=example_input_for(network),
        total_steps=total_steps,
        episode_steps=stage.episodes.steps if stage.episodes is not None else None,
        steps_per_epoch=steps_per_epoch,
        dense=lambda: dense_network(run, name),
        companion=lambda companion: companion_of_input(run, stage, companion),
        counts_zeros=what_counts_zeros(run.config, name),
        average=mean_over_ranks,
        first_gradients=FirstBatch(run, name, network).gradients,
    )
