"""What looks at the network while a stage trains it; each at its steps, and at the last one."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from torch import nn

from tpp.common.images import CROP_MODES
from tpp.methods.base import Method
from train.data import image_transform
from train.loop.average import WeightAverage
from train.monitor import Monitor
from train.run import Run
from train.run_folder.networks import evaluate_network
from train.stages.trainability import TrainabilityProbe
from train.tasks.base import Scores


class Observer(Protocol):
    """Looks at the network after some steps.

    Attributes:
        takes_time: whether the steps' rate leaves out the time that a look takes.
    """

    takes_time: bool

    def due(self, step: int, *, last: bool) -> bool:
        """Whether to look after ``step`` steps, maybe the last one; all ranks answer alike."""
        ...

    def look(self, step: int, network: nn.Module) -> None:
        """Look, and log what is found; all ranks together."""
        ...


class LayerObserver:
    """Logs the method's statistics per layer."""

    takes_time = False

    def __init__(self, every: int, method: Callable[[], Method], monitor: Monitor) -> None:
        self._every, self._method, self._monitor = every, method, monitor

    def due(self, step: int, *, last: bool) -> bool:
        """Before the first step too."""
        return last or step % self._every == 0

    def look(self, step: int, network: nn.Module) -> None:
        """Log them."""
        self._monitor.layers(step, self._method().statistics())


class JacobianObserver:
    """Measures the singular values of the Jacobian, on the main rank.

    The others train on, and meet it at the next step.
    """

    takes_time = True

    def __init__(self, run: Run, monitor: Monitor) -> None:
        training = run.config.training
        self._every, self._monitor = training.trainability_every, monitor
        self._probe: TrainabilityProbe | None = None
        if self._every is not None and run.is_main:
            self._probe = TrainabilityProbe(
                run.data.val.index,
                # Squares, of which there is a batch, even where images are evaluated whole.
                replace(image_transform(run.config), crop_mode=CROP_MODES[0]),
                run.task.inputs,
                count=training.trainability_images,
                loader=run.data.loader,
                device=run.accelerator.device,
            )

    def due(self, step: int, *, last: bool) -> bool:
        """Before the first step too; never, if nobody asked for it."""
        return self._every is not None and (last or step % self._every == 0)

    def look(self, step: int, network: nn.Module) -> None:
        """Measure and log it."""
        if self._probe is not None:
            self._monitor.trainability(step, self._probe(network))


class ScoreObserver:
    """Evaluates over the validation images; where weights are averaged, raw weights and averages.

    Attributes:
        scores: what the newest evaluation found, of the weights that the stage's figures are of.
        others: by ``raw`` or ``ema``, what it found of the other ones.
        at: the step that it was at.
    """

    takes_time = True

    def __init__(
        self,
        run: Run,
        stage: str,
        every: int,
        epochs_per_step: float,
        monitor: Monitor,
        average: Callable[[], WeightAverage | None],
    ) -> None:
        self._run, self._stage, self._monitor = run, stage, monitor
        self._every, self._epochs_per_step = every, epochs_per_step
        self._average = average
        self.scores: Scores | None = None
        self.others: dict[str, Scores] = {}
        self.at = 0

    def due(self, step: int, *, last: bool) -> bool:
        """Not before the first step: that is the stage's start."""
        return last or (step > 0 and step % self._every == 0)

    def look(self, step: int, network: nn.Module) -> None:
        """Evaluate, log and tell."""
        task, average = self._run.task, self._average()
        self.scores, self.others = evaluate_network(self._run, network), {}
        if average is not None:
            found = {"raw": self.scores}
            with average.in_place():
                found["ema"] = evaluate_network(self._run, network)
            self.scores = found.pop(average.settings.chosen)
            self.others = found
        self.at = step
        self._monitor.scalars("evaluate", step, self.scores.to_dict(), prefix="val/")
        told = task.say(self.scores.values)
        for weights, scores in self.others.items():
            values = scores.to_dict()
            self._monitor.scalars(f"evaluate_{weights}", step, values, prefix=f"val_{weights}/")
            told += f" ({weights}: {task.say(values)})"
        epoch = step * self._epochs_per_step
        self._monitor.say(f"{self._stage}: step {step}, epoch {epoch:.2f}: {told}")


def look(observers: Iterable[Observer], step: int, network: nn.Module, *, last: bool) -> bool:
    """Let those look whose step it is, in their order; whether that took time."""
    took_time = False
    for observer in observers:
        if observer.due(step, last=last):
            observer.look(step, network)
            took_time |= observer.takes_time
    return took_time
