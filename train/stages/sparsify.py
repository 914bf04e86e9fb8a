"""The stage that sets weights of a checkpoint to zero."""

from typing import Any

from tpp.checkpoints.model_file import network_of, read_companion, read_metadata
from tpp.checkpoints.sparsify_file import sparsify_checkpoint
from tpp.common.errors import UserError
from tpp.masks import COMPANION
from tpp.measure.counts import count
from train.config.sections import MODEL_FILE
from train.distributed.collectives import from_main_rank
from train.run import Run
from train.run_folder.log import say
from train.run_folder.networks import file_of_input


def sparsify_stage(run: Run, name: str) -> dict[str, Any]:
    """Mask weights of the input checkpoint: no data, no GPU, one rank."""
    folder, settings = run.stage_folder(name), run.config.stages[name].sparsify
    output = folder / MODEL_FILE
    assert settings is not None

    def mask() -> dict[str, float]:
        """Write the checkpoint; what that took."""
        folder.mkdir(parents=True, exist_ok=True)
        source = file_of_input(run, name)
        try:
            found = sparsify_checkpoint(source, settings, output)
        except UserError as error:
            raise UserError(f"stages.{name}.sparsify: {error}") from None
        for note in found.notes:
            say(f"{name}: {note}")
        return {
            "removed_share": found.removed,
            "norm_before": found.norm_before,
            "norm_after": found.norm_after,
        }

    taken = from_main_rank(run.accelerator, mask)
    counts = count(network_of(read_metadata(output), source=str(output)))
    return {
        **{metric.name: None for metric in run.task.metrics},
        **run.count_fields(counts, read_companion(output, COMPANION)),
        **taken,
    }
