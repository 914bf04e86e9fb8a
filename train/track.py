"""Send what a run has logged to wandb, MLflow or Trackio: what was kept offline, or not taken."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tpp.common.command_line import Parser
from tpp.common.errors import run_command
from tpp.common.imports import quick_imports
from tpp.common.paths import user_path


def make_parser(prog: str = "python -m train.track") -> Parser:
    """What the command takes."""
    parser = Parser(
        prog,
        "Send the curves and results of runs to wandb, MLflow or Trackio.",
        more="""
            RUN is a run folder. What a service has already is not sent again, so that the command
            may be repeated: where a service was down, where there was no way out, or with
            another service than the run had. Services and keys are found by their own environment
            variables, such as WANDB_API_KEY and MLFLOW_TRACKING_URI. The exit code is 1 where a
            service has not taken everything.
        """,
        examples=[
            "runs/resnet50_half",
            "--to mlflow runs/table1/tpp_0.9_seed1 runs/table1/l1_0.9_seed1",
        ],
    )
    parser.add_argument("runs", nargs="+", type=user_path, metavar="RUN", help="run folder")
    parser.add_argument(
        "--to",
        action="append",
        metavar="NAME",
        help="wandb, mlflow or trackio; may be repeated (default: the run's own trackers)",
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long a service may take for a run (default: 600)",
    )
    return parser


def main(words: Sequence[str] | None = None, prog: str = "python -m train.track") -> None:
    """Send the runs named on the command line; ``prog`` is how it was called."""
    arguments = make_parser(prog).parse_args(words)
    with quick_imports():
        from train.trackers.afterwards import send

    complete = [send(Path(run), arguments.to, wait=arguments.wait) for run in arguments.runs]
    if not all(complete):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
