"""Run a configuration: every stage from the dense network to the pruned, finetuned one.

Started by ``tpp train``, python, accelerate launch, torchrun, srun or deepspeed.
"""

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

# Launchers put train/ first on the path, where its modules would shadow top-level ones.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "train")]

from tpp.common.command_line import Parser  # noqa: E402
from tpp.common.errors import UserError, run_command  # noqa: E402
from tpp.common.imports import quick_imports  # noqa: E402
from tpp.common.options import add_settings, share  # noqa: E402

_FIRST_TO_SPEAK = 10.0  # seconds
# Of a run that was told to stop, or failed: its machine may be about to go.
_PATIENCE_WITH_COPIES = 60.0  # seconds

if TYPE_CHECKING:
    from accelerate import Accelerator

    from train.config.config import Config
    from train.distributed.stopping import StopRequest
    from train.run import Run


def make_parser(prog: str = "python train/main.py") -> Parser:
    """What the command takes."""
    launch = "accelerate launch --config_file launch/accelerate/eight_gpus.yaml train/main.py"
    parser = Parser(
        prog,
        "Run a configuration: from the dense network to the pruned, finetuned one.",
        more="""
            With no --config it runs the demo. Several ranks are started by accelerate launch,
            torchrun, srun or deepspeed, with train/main.py and the same options. SIGUSR1 or SIGTERM
            ends it within about a second, with a checkpoint and exit code 75: started again, it
            goes on from the very step.
        """,
        examples=[
            "--config configs/demo.yaml --dry-run",
            "--config configs/own.yaml data.root=/data/images training.batch_size=128",
            f"$ {launch} --config configs/own.yaml data.root=/data/images",
            "--help-settings data.crop_mode",
        ],
    )
    share(parser, "--config", " (default: configs/demo.yaml)")
    share(
        parser,
        "--dry-run",
        ": open what is there, and print the resolved configuration, the plan and the penalty's "
        "shares",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="ranks that --dry-run shares over (default: 8)",
    )
    share(parser, "--until")
    parser.add_argument(
        "--help-settings",
        nargs="?",
        const="",
        metavar="KEY",
        help="say what a key of a configuration means, such as data.crop_mode; its beginning, its "
        "end or a pattern with * will do; alone: list all keys",
    )
    # The deepspeed launcher adds it; the ranks are told by LOCAL_RANK, which it sets too.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    add_settings(parser)
    return parser


def _parse_arguments(words: Sequence[str] | None, prog: str) -> argparse.Namespace:
    try:
        return make_parser(prog).parse_args(words)
    except UserError:
        _leave_it_to_one_rank()
        raise


def main(words: Sequence[str] | None = None, prog: str = "python train/main.py") -> None:
    """Run or dry-run the configuration; ``prog`` is how it was called, for ``--help``."""
    arguments = _parse_arguments(words, prog)
    if arguments.help_settings is not None:
        from train.reference.lookup import show_settings

        show_settings(arguments.help_settings)
        return
    with quick_imports():
        from train.cards import CardError, check_cards
        from train.config.config import load_config, stages_until
        from train.distributed.environment import settle_environment
        from train.distributed.ranks import settle_ranks

    try:
        settle_ranks(os.environ)
        config = load_config(arguments.config, arguments.overrides)
        stages_until(config, arguments.until)
        training = config.training
        to_tell = settle_environment(os.environ, training.precision, training)
        if arguments.dry_run:
            from train.dry_run import dry_run

            dry_run(config, ranks=arguments.ranks)
            return
        to_tell += check_cards(os.environ, training.precision)
        with quick_imports():
            from train.distributed.accelerator import make_accelerator
            from train.distributed.arithmetic import check_capture, settle_arithmetic
            from train.distributed.collectives import EveryRankError
            from train.distributed.deepspeed_engine import deepspeed_plugin
            from train.distributed.stopping import Reached, Stopped, StopRequest
            from train.distributed.watchdog import EXIT_LOST

        plugin = deepspeed_plugin(training)
        # A signal ends what waits for other ranks at once; nothing is lost yet.
        accelerator = make_accelerator(training.precision, training.rank_timeout, plugin=plugin)
        check_capture(training, accelerator)
        settle_arithmetic(training, accelerator.device, Path(config.output))
        stop = StopRequest()
        stop.listen()
        for line in to_tell:
            accelerator.print(line)
    except UserError as error:
        if not (isinstance(error, CardError) and error.alone):
            _leave_it_to_one_rank(of_each_node=True)
        if os.environ.get("RANK", "0") == "0":
            raise
        where = f"rank {os.environ['RANK']} on {socket.gethostname()}"
        raise UserError(f"{where}: {error}") from None
    with quick_imports():
        from tpp.common.object_storage import AwayError
        from train.stages.sequence import run_stages

    try:
        with _opened(config, accelerator, stop, until=arguments.until) as run:
            run_stages(run, arguments.until)
    except EveryRankError:
        _leave_it_to_one_rank()
        raise
    except AwayError as error:  # of an image: before training it is one of every rank's
        print(f"error: {error}; started again, the run goes on", file=sys.stderr)
        sys.exit(EXIT_LOST)
    except Stopped as request:
        if accelerator.is_main_process:  # of all nodes
            print(f"{config.output}: {request}", flush=True)
        sys.exit(0 if isinstance(request, Reached) else EXIT_LOST)


@contextmanager
def _opened(
    config: "Config", accelerator: "Accelerator", stop: "StopRequest", until: str | None
) -> Iterator["Run"]:
    """Open a run, alone in its folder and with an eye on the other ranks, and end it.

    Args:
        config: what to run.
        accelerator: the ranks.
        stop: listens for the signals that end the run early.
        until: the last stage to run; None for all.

    Raises:
        Stopped: a signal asked for it.
        UserError: a mistake in the configuration, data that cannot be read, a run folder that
            another run holds, a full disk.
    """
    from train.distributed.collectives import EveryRankError, from_main_rank
    from train.distributed.stopping import Reached, Stopped
    from train.distributed.watchdog import Watchdog, ranks_named
    from train.preflight import preflight
    from train.run_folder.lock import RunLock
    from train.run_folder.log import say
    from train.run_folder.record import write_results
    from train.stages.sequence import offer_copy, open_run, stages_until

    watchdog = Watchdog.from_environment(config.training.rank_timeout)
    lock = RunLock(Path(config.output))
    stopped: Stopped | None = None
    run: Run | None = None
    patience: float | None = _PATIENCE_WITH_COPIES
    try:
        with ranks_named(watchdog):
            try:
                found = preflight(config, accelerator, stages_until(config, until))
            except UserError as error:  # all ranks look at the same things
                raise EveryRankError(str(error)) from None
            from_main_rank(accelerator, lock.acquire)
            run = open_run(config, accelerator, found, watchdog, stop)
            try:
                yield run
            except Stopped as request:  # no failure that the watchdog should tell others of
                stopped = request
                if run.is_main:
                    write_results(run, "stopped")
            if run.is_main and stopped is None:
                from train.report import show_end  # half a second that the other ranks save

                show_end(run.folder)
            offer_copy(run, "results.json")
            if stopped is None or isinstance(stopped, Reached):
                patience = None  # nobody is about to kill it
    except OSError as error:
        place = error.filename or config.output
        raise UserError(
            f"{place}: {error.strerror or error}; started again, the run goes on from its newest "
            "checkpoint"
        ) from error
    finally:
        if run is not None and run.copies is not None:
            for line in run.copies.close(patience):
                say(line)
        lock.release()
    accelerator.end_training()
    if stopped is not None:
        raise stopped


def _leave_it_to_one_rank(*, of_each_node: bool = False) -> None:
    """End quietly on all ranks but one: all of them met the same mistake.

    The launcher ends the others when the first one is gone, and that one might still be at its
    imports. So they wait a while for the launcher to end them.

    Args:
        of_each_node: return on the first rank of each node where no launcher ends it: before the
            ranks have met, the mistake may be one node's own.
    """
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_FIRST_TO_SPEAK)
        if not (of_each_node and os.environ.get("LOCAL_RANK") == "0"):
            sys.exit(2)


if __name__ == "__main__":
    run_command(main)
