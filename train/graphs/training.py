"""A run: the policy trained iteration by iteration, with checkpoints, logs and a stop at any time.

What an iteration does follows from the state before it, the seed and its number. A stop within
one goes back to where it began, so that nothing of it has to be kept.
"""

import random
import time
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from tpp.checkpoints.training_state import TrainingState
from tpp.common.errors import UserError
from train.config.config import as_yaml
from train.config.sections import CheckpointsSection
from train.distributed.stopping import Stopped, StopRequest, message_of
from train.graphs.config import Config
from train.graphs.episodes import Experience, collect, play
from train.graphs.firegnn import Policy, Value
from train.graphs.graph import Edge, Graph
from train.graphs.imitation import BestPaths
from train.graphs.imitation import Path as ActionPath
from train.graphs.ppo import Losses, make_optimizer, update
from train.graphs.states import States
from train.monitor import Monitor
from train.run_folder.checkpoints import CHECKPOINTS, CheckpointWriter, newest_state
from train.run_folder.same_run import differences, plain

STAGE = "train"
# Iterations between two lines in the terminal.
_SAY_EVERY = 10


@dataclass
class Trained:
    """A policy after some iterations.

    Attributes:
        policy: in evaluation mode.
        iterations: done.
        elapsed: seconds that they took, in all processes.
        processor: seconds of a processor's core among these; fewer where others compute as well.
        best_score, best_edges: the best graph that any episode of the training met.
    """

    policy: Policy
    iterations: int
    elapsed: float
    processor: float
    best_score: float
    best_edges: list[Edge]


def seed_of(run: int, what: str) -> int:
    """A seed for one thing in a run; torch's generators look at 32 bits alone."""
    return random.Random(f"{run} {what}").getrandbits(32)


class Training:
    """The training of a run, taken up where its newest checkpoint is.

    Args:
        config: the run; its folder is this process's own.
        start: where episodes begin.
        states: scores and features.
        stop: a signal that may come.

    Raises:
        UserError: the folder holds a run with other settings.
    """

    def __init__(self, config: Config, start: Graph, states: States, stop: StopRequest) -> None:
        self._config, self._start, self._states, self._stop = config, start, states, stop
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, "weights"))
            self.policy = Policy(config.network)
            self._value = Value(config.network, float(len(start) ** 2))
        self._both = nn.ModuleDict({"policy": self.policy, "value": self._value}).eval()
        self._optimizer = make_optimizer(self.policy, self._value, config.training)
        self._folder = Path(config.output) / STAGE
        self._iteration, self._elapsed, self._processor = 0, 0.0, 0.0
        self._best_score, self._best_edges = states.of(start).score, start.edges
        settings = config.training
        most = settings.imitated if settings.imitation else 0
        self._paths = BestPaths(states, start, most, settings.discount)
        self._passed_over: list[str] = []
        self._resume()

    def _resume(self) -> None:
        state, self._passed_over = newest_state(self._folder / CHECKPOINTS)
        if state is None:
            return
        found = list(differences(state.extra["settings"], self._config))
        if found:
            raise UserError(
                f"{self._config.output}: this run was begun with other settings: "
                f"{', '.join(found)}; choose another folder with output=..., or delete this one"
            )
        self._both.load_state_dict(state.model)
        self._optimizer.load_state_dict(state.optimizer)
        self._iteration = state.step
        self._elapsed, self._processor = state.extra["elapsed"], state.extra["processor"]
        best = state.extra["best"]
        self._best_score = best["score"]
        self._best_edges = [(u, v) for u, v in best["edges"]]
        self._paths.kept = [
            ActionPath(score, tuple((a, b, c) for a, b, c in actions))
            for score, actions in state.extra["imitated"]
        ]

    def run(self) -> Trained:
        """Train to the end.

        Raises:
            Stopped: a signal asked for it; there is a checkpoint.
            UserError: a file cannot be written.
        """
        config, total = self._config, self._config.training.iterations
        (self._folder).mkdir(parents=True, exist_ok=True)
        monitor = Monitor(
            Path(config.output),
            STAGE,
            total,
            self._iteration,
            before=0,
            configuration=as_yaml(config),
            enabled=True,
        )
        writer = CheckpointWriter(self._folder / CHECKPOINTS, CheckpointsSection(), say=monitor.say)
        try:
            for line in self._passed_over:
                monitor.say(f"passed over: {line}")
            if self._iteration:
                monitor.say(f"{STAGE}: goes on after {self._iteration:,} of {total:,} iterations")
            while self._iteration < total:
                before = self._state()
                began, busy = time.perf_counter(), time.process_time()
                try:
                    experience, losses = self._iterate()
                except Stopped:
                    writer.save(before, also_sync=monitor.flush())
                    writer.wait()
                    raise
                self._iteration += 1
                self._elapsed += time.perf_counter() - began
                self._processor += time.process_time() - busy
                self._report(monitor, experience, losses)
                if self._iteration % config.checkpoint_every == 0 or self._iteration == total:
                    writer.save(self._state(), also_sync=monitor.flush())
        finally:
            writer.close()
            monitor.close()
        return Trained(
            policy=self.policy,
            iterations=self._iteration,
            elapsed=self._elapsed,
            processor=self._processor,
            best_score=self._best_score,
            best_edges=self._best_edges,
        )

    def _iterate(self) -> tuple[Experience, Losses]:
        """One iteration: act, then learn from it."""
        config, settings = self._config, self._config.training
        drawn = torch.Generator().manual_seed(seed_of(config.seed, f"step {self._iteration}"))
        experience = collect(
            self._states,
            self._start,
            self.policy,
            self._value,
            environments=settings.environments,
            steps=settings.horizon,
            most=config.rewirings,
            generator=drawn,
            pause=self._pause,
        )
        self._paths.offer(experience.paths)
        losses = update(
            self.policy,
            self._value,
            self._optimizer,
            experience,
            settings,
            self._paths,
            scale=config.objective.scale,
            left=settings.left(self._iteration),
            generator=drawn,
            pause=self._pause,
        )
        if experience.best.score > self._best_score:
            self._best_score = experience.best.score
            self._best_edges = experience.best.graph.edges
        return experience, losses

    def _pause(self) -> None:
        signal = self._stop.agreed_now()
        if signal is not None:
            total = self._config.training.iterations
            where = f"after {self._iteration:,} of {total:,} iterations"
            raise Stopped(message_of(signal, where))

    def _state(self) -> TrainingState:
        """All that the next iteration needs, in tensors of its own."""
        best = {"score": self._best_score, "edges": [list(edge) for edge in self._best_edges]}
        extra: dict[str, Any] = {
            "settings": plain(self._config),
            "elapsed": round(self._elapsed, 3),
            "processor": round(self._processor, 3),
            "best": best,
            "imitated": [[path.score, path.actions] for path in self._paths.kept],
        }
        return TrainingState(
            step=self._iteration,
            model={name: tensor.clone() for name, tensor in self._both.state_dict().items()},
            optimizer=deepcopy(self._optimizer.state_dict()),
            extra=extra,
        )

    def _report(self, monitor: Monitor, experience: Experience, losses: Losses) -> None:
        config, step = self._config, self._iteration
        settings = config.training
        values = {
            "environment_steps": float(step * settings.iteration_steps),
            "lr": settings.lr * settings.left(step - 1),
            "best": self._best_score,
            **{f"loss/{name}": value for name, value in asdict(losses).items()},
        }
        if experience.ends:  # none, where an iteration is shorter than an episode
            values |= {
                "episode/return": fmean(experience.returns),
                "episode/end": fmean(experience.ends),
                "episode/best_end": max(experience.ends),
            }
        if step % config.evaluation.every == 0 or step == settings.iterations:
            (episode,) = play(self._states, self._start, self.policy, most=config.rewirings)
            values |= {"greedy/end": episode.end.score, "greedy/swaps": float(episode.swaps)}
        monitor.scalars("iteration", step, values)
        monitor.advance(step)
        if step % _SAY_EVERY == 0 or step == settings.iterations:
            ends = f"ends {values['episode/end']:.4f}, " if experience.ends else ""
            greedy = f"greedy {values['greedy/end']:.4f}, " if "greedy/end" in values else ""
            monitor.say(
                f"{STAGE}: iteration {step:,} of {settings.iterations:,}, {ends}{greedy}best "
                f"{self._best_score:.4f}, entropy {losses.entropy:.2f}, KL {losses.kl:.4f}, "
                f"{self._elapsed:.0f} s"
            )
