"""The processes of a sweep: what each runs, what it waits for, and what it takes up."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tpp.common.errors import UserError
from tpp.models.architecture import build_on_meta
from tpp.selection.criteria import layer_ratios
from train.config.config import Config
from train.grid import SweepRun, state_of
from train.sharing import SharedStage, SweepConfigs, needs, not_begun, take_up
from train.side_by_side import Job, Place, Running

_SOME = 10  # classes


@dataclass(frozen=True)
class Way:
    """How a sweep's processes are started.

    Attributes:
        launcher: what starts train/main.py.
        places: where they run, and so how many at once.
        logs: folder of the files that take what they say; None to let them say it here.
    """

    launcher: Sequence[str]
    places: Sequence[Place]
    logs: Path | None = None


def run_sweep(
    runs: Sequence[SweepRun],
    asked: Sequence[SharedStage],
    shared: Sequence[SharedStage],
    configs: SweepConfigs,
    way: Way,
) -> list[str]:
    """Run what is not done, as many at once as there are places; a line for each that failed.

    The dense run comes first, then what several runs have in common, then the others; each starts
    as soon as what it needs is there.

    Args:
        runs: those to run.
        asked: shared stages that are not done and are to be, whether or not ``runs`` need them.
        shared: all shared stages of the sweep.
        configs: the runs' configurations.
        way: how.

    Raises:
        UserError: a run's dense network is not there, and making it is not among ``runs``; or a
            pattern of a run matches no layer.
    """
    left = []
    for run in runs:
        if state_of(run).done:
            print(f"run {run.number} ({run.name}): done before, skipped", flush=True)
        else:
            left.append(run)
    _check_patterns(left, configs)
    jobs = _Jobs(shared, configs, way)
    for run in left:
        jobs.add_run(run)
    for one in asked:
        jobs.add_shared(one)
    return Running(jobs.in_order(), way.places).to_the_end()


def _check_patterns(runs: Sequence[SweepRun], configs: SweepConfigs) -> None:
    """Check, before their dense network is trained, that the runs' patterns match its layers.

    Raises:
        UserError: one matches none; names the run.
    """
    networks: dict[str, nn.Module] = {}
    known = set()
    for run in runs:
        config = configs.of(run)
        task = config.make_task()
        # How many classes there are is nothing to the names of layers.
        network = task.architecture(config.model) or task.architecture(config.model, _SOME)
        assert network is not None
        for name in filter(config.needs_plan, config.stages):
            pruning = config.stages[name].pruning or config.pruning
            if (key := f"{network} {pruning.ratios}") in known:
                continue
            known.add(key)
            try:
                if str(network) not in networks:
                    networks[str(network)] = build_on_meta(network)
                layer_ratios(networks[str(network)], pruning.ratios)
            except UserError as error:
                raise UserError(f"{run.config}, run {run.number} ({run.name}): {error}") from None


class _Jobs:
    """The processes of a sweep, and what each of them waits for."""

    def __init__(self, shared: Sequence[SharedStage], configs: SweepConfigs, way: Way) -> None:
        self._all_shared, self._configs, self._way = shared, configs, way
        self._dense: Job | None = None
        self._shared: dict[int, Job] = {}
        self._runs: list[Job] = []

    def in_order(self) -> list[Job]:
        """The dense run first, then shared stages, then all others."""
        return [*([self._dense] if self._dense else []), *self._shared.values(), *self._runs]

    def add_run(self, run: SweepRun) -> None:
        """Add a run that is not done, and the shared stages that it needs."""
        label = f"run {run.number} ({run.name})"
        config = self._configs.of(run)
        self._check_start(run.starts_from, f"run {run.number}")
        job = self._job(
            label,
            run.name,
            run.folder,
            run.starts_from,
            config,
            command=run.command,
            is_done=lambda: state_of(run).done,
            to_take_up=lambda: needs(run.folder, run.number, self._all_shared),
        )
        if run.method is None:
            self._dense = job
        else:
            self._runs.append(job)

    def add_shared(self, one: SharedStage) -> None:
        """Add a shared stage that is not done, once, and those that it needs itself."""
        if one.number in self._shared:
            return
        self._check_start(one.starts_from, f"shared s{one.number}")
        job = self._job(
            one.label,
            one.folder.name,
            one.folder,
            one.starts_from,
            one.resolved(),
            command=one.command,
            is_done=lambda: one.done,
            to_take_up=lambda: not_begun(one.folder, one.before),
        )
        self._shared[one.number] = job

    def _job(
        self,
        label: str,
        name: str,
        folder: Path,
        starts_from: Path | None,
        config: Config,
        *,
        command: Callable[[Sequence[str]], list[str]],
        is_done: Callable[[], bool],
        to_take_up: Callable[[], list[SharedStage]],
    ) -> Job:
        for one in to_take_up():
            if not one.done:
                self.add_shared(one)
        for maker in (self._dense, *(self._shared.get(one.number) for one in to_take_up())):
            if maker is not None:
                maker.needed = True

        def lacks() -> list[tuple[str, Job | None]]:
            missing: list[tuple[str, Job | None]] = []
            if starts_from is not None and not starts_from.exists():
                missing.append((str(starts_from), self._dense))
            for one in to_take_up():
                if not one.done:
                    missing.append((one.label, self._shared.get(one.number)))
            return missing

        def prepare() -> None:
            for one in to_take_up():
                take_up(one, folder, config)

        def in_place(place: Place) -> list[str]:
            words = command(self._way.launcher)
            if place.threads is not None and place.threads < config.data.threads:
                words.append(f"data.threads={place.threads}")
            return words

        logs = self._way.logs
        log = logs / f"{name}.log" if logs else None
        return Job(label, folder, in_place, is_done, lacks, prepare, log)

    def _check_start(self, starts_from: Path | None, who: str) -> None:
        if starts_from is not None and self._dense is None and not starts_from.exists():
            raise UserError(f"{starts_from}: {who} starts from it; run number 0 first")
