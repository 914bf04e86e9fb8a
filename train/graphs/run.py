"""A run from its folder's lock to its results."""

from pathlib import Path

import torch

from train.config.config import as_yaml
from train.distributed.stopping import Stopped, StopRequest, message_of
from train.graphs.config import Config, save_config
from train.graphs.graph import algebraic_connectivity, global_efficiency, local_efficiency
from train.graphs.report import policy_rows, results_of, search_rows, show, write_results
from train.graphs.states import States
from train.graphs.training import Training
from train.run_folder.checkpoints import remove_leftovers
from train.run_folder.lock import RunLock
from train.run_folder.log import say


def run(config: Config) -> None:
    """Train, evaluate and search, alone in the run folder; prints what came out.

    Raises:
        Stopped: a signal asked for it.
        UserError: the graph's file cannot be read, the folder is another run's or has another
            one's settings, a file cannot be written.
    """
    start = config.graph.make()
    torch.set_num_threads(config.threads)
    states = States(config.objective, config.network.filtration)
    stop = StopRequest()
    stop.listen()
    folder = Path(config.output)

    def pause() -> None:
        signal = stop.agreed_now()
        if signal is not None:
            raise Stopped(message_of(signal, "while it was evaluated"))

    with RunLock(folder):
        remove_leftovers(folder)
        training = Training(config, start, states, stop)
        save_config(config, folder / "config.yaml")
        write_results(results_of(config, start, states, "running"), folder)
        try:
            trained = training.run()
            rows = policy_rows(config, start, states, trained.policy, pause)
            rows += search_rows(config, start, states, pause)
        except Stopped:
            write_results(results_of(config, start, states, "stopped"), folder)
            raise
        results = results_of(config, start, states, "finished", trained, rows)
        write_results(results, folder)
    show(results, config)
    say(f"run folder: {folder.absolute()}")


def dry_run(config: Config) -> None:
    """Print the resolved configuration, and what is known of the start graph.

    Raises:
        UserError: the graph cannot be made.
    """
    start = config.graph.make()
    training = config.training
    state = States(config.objective, config.network.filtration).of(start)
    say(as_yaml(config).rstrip())
    say(
        f"graph: {len(start)} nodes, {len(start.edges)} edges, F {state.score:.6f}, global "
        f"efficiency {global_efficiency(start):.6f}, local {local_efficiency(start):.6f}, "
        f"algebraic connectivity {algebraic_connectivity(start):.6f}, "
        f"{sum(1 for _ in start.swaps()):,} swaps"
    )
    say(
        f"train: {training.iterations:,} iterations of {training.iteration_steps:,} steps in "
        f"{training.environments} environments"
    )
