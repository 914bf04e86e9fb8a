"""Run a configuration: every stage from the dense network to the pruned, finetuned one.

    accelerate launch train/main.py [--config FILE] [--dry-run] [key.sub=value ...]

With no --config it runs the demo. Also under torchrun and python.
"""

import argparse
import os
import sys
from pathlib import Path

# Launchers put train/ first on the path, where its modules would shadow top-level ones.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [str(ROOT), *(p for p in sys.path if Path(p or ".").resolve() != ROOT / "train")]

from tpp.errors import UserError, run_command  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="train/main.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="example: accelerate launch train/main.py --config "
        "configs/imagenet/resnet50_tpp_2.31x.yaml data.root=/data/imagenet seed=1",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file; default: configs/demo.yaml")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="train nothing; print the resolved configuration, the plan and the penalty's shares",
    )
    parser.add_argument(
        "--ranks", type=int, default=8, metavar="N", help="ranks that --dry-run shares over"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"
    )
    return parser.parse_intermixed_args()


def main() -> None:
    """Run or dry-run the configuration."""
    arguments = parse_arguments()
    from train.config import load_config

    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from train.dry_run import dry_run

            dry_run(config, ranks=arguments.ranks)
            return
        from train.distributed import make_accelerator
        from train.preflight import preflight
        from train.stages import open_run, run_stages

        accelerator = make_accelerator(config.training.precision)
        run = open_run(config, accelerator, preflight(config, accelerator))
    except UserError:
        if os.environ.get("RANK", "0") != "0":
            sys.exit(2)  # every rank found the same mistake; one of them says so
        raise

    from train.report import show_end

    run_stages(run)
    if run.is_main:
        show_end(run.folder)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main)
