"""Rewire a graph for its resilience by a policy that is trained for it (ResiNet)."""

import sys
from collections.abc import Sequence

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.imports import quick_imports
from tpp.common.options import add_settings, share


def make_parser(prog: str = "python -m train.graphs") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Rewire a graph for its resilience by a policy that is trained for it (ResiNet).",
        more="""
            Nothing is pruned here: graphs in, graphs out. SIGUSR1 or SIGTERM ends it within about a
            second, with a checkpoint and exit code 75: started again, it goes on, and comes to the
            same bits. A run that is done is evaluated, and searched beside, anew.
        """,
        examples=[
            "--config configs/graphs/ba15.yaml --dry-run",
            "--config configs/graphs/ba15.yaml seed=1 output=runs/ba15_seed1",
        ],
    )
    share(parser, "--config", required=True)
    share(
        parser,
        "--dry-run",
        ": print the resolved configuration and what is known of the graph",
    )
    add_settings(parser)
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.graphs") -> None:
    """Run or dry-run the configuration; ``prog`` is how it was called, for ``--help``."""
    arguments = make_parser(prog).parse_args(words)
    with quick_imports():
        from train.distributed.stopping import Stopped
        from train.distributed.watchdog import EXIT_LOST
        from train.graphs.config import load_config
        from train.graphs.run import dry_run, run

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        dry_run(config)
        return
    try:
        run(config)
    except Stopped as request:
        print(f"{config.output}: {request}", flush=True)
        sys.exit(EXIT_LOST)
    except OSError as error:
        place = error.filename or config.output
        raise UserError(
            f"{place}: {error.strerror or error}; started again, the run goes on from its newest "
            "checkpoint"
        ) from error


if __name__ == "__main__":
    run_command(main)
