"""What a run is, in the lines that it begins with; a dry run says the same."""

from dataclasses import dataclass

from data_pipelines.images.image_index import ImageIndex
from tpp.measure.counts import Counts
from tpp.models.preparation import in_words
from train.config.config import Config


@dataclass(frozen=True)
class Where:
    """What a run runs on.

    Attributes:
        device: ``cpu`` or ``cuda``.
        ranks: processes that share the work.
        engine: what shares the training among them, for a person.
    """

    device: str
    ranks: int
    engine: str


def opening(
    config: Config,
    counts: Counts,
    *,
    images: tuple[ImageIndex, ImageIndex] | None,
    where: Where | None,
) -> list[str]:
    """What a run is, one line each.

    Args:
        config: what to run.
        counts: of the dense network.
        images: of training and validation; None where they are not known.
        where: what it runs on; None where that is not known.
    """
    lines = [f"run folder  {config.output}"]
    if where is not None:
        share = config.training.batch_size // where.ranks
        ranks = f"{where.ranks} ranks" if where.ranks > 1 else "1 rank"
        lines.append(
            f"ranks       {ranks} on {where.device}, {config.training.precision}, {where.engine}; "
            f"{share} images each in a step"
        )
    model = config.model
    lines.append(
        f"network     {model.name}, {counts.parameters:,} parameters, {counts.macs:,} MACs for "
        f"{counts.of_image}, from {model.checkpoint or 'random weights'}"
    )
    if images is not None:
        train, val = images
        classes = f" of {len(train.classes)} classes" if config.make_task().has_classes else ""
        lines.append(
            f"images      {len(train):,} for training and {len(val):,} for evaluation{classes}, in "
            f"{config.data.root}"
        )
        lines += [f"            {said}" for index in images if (said := index.said_of_form())]
        if config.make_task().has_classes:
            lines.append(f"            evaluated {_evaluated(config)}")
    known = len(images[0]) if images is not None else None
    lines.append("stages      " + " > ".join(_stage(config, name, known) for name in config.stages))
    return lines


def _evaluated(config: Config) -> str:
    """How an image is prepared for evaluation, and how much of it is seen where that is little."""
    data = config.data
    said = in_words({**data.preprocessing(), "mean": None, "std": None})
    if data.resize is None or data.image_size > 0.7 * data.resize:
        return said
    share = data.image_size / data.resize
    return f"{said}: the middle {share:.0%} of the shorter side; data.resize says how much"


def _stage(config: Config, name: str, images: int | None) -> str:
    """``regularize (TPP, 3,909 steps)``."""
    stage = config.stages[name]
    said = []
    if stage.does.regularizes:
        said.append(config.stage_method(name).title)
    if (steps := config.steps_of(name, images)) is not None:
        said.append(f"{steps:,} steps")
    elif stage.epochs is not None:
        said.append(f"{stage.epochs:g} epoch" + "s" * (stage.epochs != 1))
    return f"{name} ({', '.join(said)})" if said else name
