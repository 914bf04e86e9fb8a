"""How far a training stage has come: what its checkpoints keep beside the tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from train.run_folder.networks import Shapes


@dataclass(frozen=True)
class Progress:
    """What a stage that goes on must have again.

    Attributes:
        settings: all that decides its outcome, see ``train.run_folder.same_run``.
        images: fingerprint of the training images.
        method: the method's state.
        scaler: the loss scaler's state; None for none.
        start: what was measured before the first step; None for nothing.
        elapsed: seconds that it has taken.
        bad_steps: how many were found bad.
        best_score: the best yet of an evaluation; None before the first.
        looked: whether what was due after this step was measured and logged.
        skipped_images: bad images by path, and why each is bad.
        shapes: of the ordinary network's tensors, where those in the state are not just these.
        teacher: fingerprint of the teacher's weights; None without a teacher.
    """

    settings: dict[str, Any]
    images: str | None
    method: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] | None = None
    start: dict[str, float] | None = None
    elapsed: float = 0.0
    bad_steps: int = 0
    best_score: float | None = None
    looked: bool = True
    skipped_images: dict[str, str] = field(default_factory=dict)
    shapes: Shapes | None = None
    teacher: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain data, ready for JSON."""
        values = dict(vars(self))
        values["best_top1"] = values.pop("best_score")  # its name in files, whatever the task
        shapes = values.pop("shapes")
        if shapes is not None:
            values["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_dict` wrote, now or in an earlier version."""
        known = {"looked": True, **values}
        known["best_score"] = known.pop("best_top1")
        if "shapes" in known:
            known["shapes"] = {name: tuple(shape) for name, shape in known["shapes"].items()}
        return cls(**known)
