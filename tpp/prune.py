"""Removing filters: from tensors, from a model, from a checkpoint (Wang & Fu 2023, sec. 3.1).

``python -m tpp.prune`` needs neither data nor a GPU.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator
from torch import nn

from tpp.checkpoints.model_file import load_model
from tpp.checkpoints.prune_file import read_dense, write_pruned
from tpp.common.errors import UserError, run_command
from tpp.common.settings import Section, Seed, mistakes
from tpp.common.yaml_files import Merging, read_yaml
from tpp.describe import summary
from tpp.measure.counts import count
from tpp.measure.timing import LatencySettings, measure
from tpp.models.architecture import Architecture, architecture_of, gives_images, meta_copy
from tpp.models.fitting import assign_tensors
from tpp.models.settings import MODEL_REPLACED, ModelSection
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget, parse_count
from tpp.selection.criteria import CRITERIA
from tpp.selection.selection import Selection
from tpp.selection.settings import PRUNING_REPLACED, PruningSection, another_budget


def _parse_pairs(option: str, texts: list[str], example: str) -> dict[str, str]:
    pairs = {}
    for text in texts:
        pattern, equals, value = text.rpartition("=")
        if not equals or not pattern:
            raise UserError(f"{option} {text}: must be {example}")
        pairs[pattern] = value
    return pairs


def _parse_ratios(texts: list[str]) -> dict[str, float]:
    example = "PATTERN=R, such as 'layer*.conv1=0.5'"
    ratios = {}
    for pattern, value in _parse_pairs("--ratio", texts, example).items():
        try:
            ratios[pattern] = float(value)
        except ValueError:
            raise UserError(f"--ratio {pattern}={value}: must be {example}") from None
    return ratios


def _parse_floors(texts: list[str]) -> dict[str, int | float]:
    example = "PATTERN=N or PATTERN=SHARE, such as '*=8' or 'layer4*=0.25'"
    floors: dict[str, int | float] = {}
    for pattern, value in _parse_pairs("--floor", texts, example).items():
        try:
            floors[pattern] = float(value) if "." in value else int(value)
        except ValueError:
            raise UserError(f"--floor {pattern}={value}: must be {example}") from None
    return floors


def _budget(arguments: argparse.Namespace) -> Budget | None:
    if arguments.speedup is not None:
        return Budget("speedup", arguments.speedup)
    if arguments.max_macs is not None:
        return Budget("macs", parse_count(arguments.max_macs))
    if arguments.max_parameters is not None:
        return Budget("parameters", parse_count(arguments.max_parameters))
    if arguments.max_latency_ms is not None:
        return Budget("latency_ms", arguments.max_latency_ms)
    return None


def _make_plan(
    arguments: argparse.Namespace, configured: "_Configured | None", model: nn.Module
) -> PruningPlan:
    budget = _budget(arguments)
    chosen = [arguments.plan, arguments.config, arguments.ratio or budget]
    if sum(map(bool, chosen)) != 1:
        raise UserError(
            "say what to prune: --plan FILE, or --config FILE, or --ratio 'PATTERN=R' and/or a "
            "budget (--speedup, --max-macs, --max-parameters, --max-latency-ms)"
        )
    if arguments.plan:
        return PruningPlan.load(arguments.plan)
    if configured is not None:
        return configured.selection().select(model)
    selection = Selection(
        ratios=_parse_ratios(arguments.ratio),
        criterion=arguments.criterion,
        round_to=arguments.round_to,
        floors=_parse_floors(arguments.floor),
        skip=tuple(arguments.skip),
        coupled=arguments.coupled,
        budget=budget,
        seed=arguments.seed,
    )
    return selection.select(model)


def _network(
    name: str, num_classes: int | None = None, args: Mapping[str, Any] | None = None
) -> Architecture:
    """A network of which it need not be known how many classes it has: its weights say that."""
    if num_classes is None and not gives_images(name):
        num_classes = 1000
    return Architecture(name, num_classes, args or {})


class _Configured(Section):
    """What a run's configuration says of the network and of what goes; the rest is not looked at.

    Attributes:
        seed: of the run.
    """

    seed: Seed = 0
    model: ModelSection
    pruning: PruningSection = PruningSection()

    @model_validator(mode="after")
    def _something_goes(self) -> "_Configured":
        if not self.pruning.ratios and not self.pruning.budget:
            raise ValueError(
                "pruning.ratios says of no layer what goes, and there is no pruning.budget"
            )
        return self

    def architecture(self) -> Architecture:
        """The network."""
        return _network(self.model.name, self.model.num_classes, self.model.args)

    def selection(self) -> Selection:
        """How the filters that go are chosen."""
        return self.pruning.selection(self.seed)


def _read_config(path: Path) -> _Configured:
    data = read_yaml(path, Merging((*MODEL_REPLACED, *PRUNING_REPLACED), (another_budget,)))
    known = {key: value for key, value in data.items() if key in _Configured.model_fields}
    try:
        return _Configured.model_validate(known)
    except ValidationError as error:
        lines = mistakes(error, _Configured)
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tpp.prune",
        description="Remove filters from a checkpoint. Needs neither data nor a GPU.",
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="IN",
        help="a checkpoint that tpp wrote, .pth or .safetensors weights, or a DeepSpeed folder",
    )
    add("--output", required=True, metavar="OUT", help="the pruned checkpoint (safetensors)")
    add("--model", metavar="NAME", help="the network, where neither IN nor --config says it")
    add("--save-plan", metavar="FILE", help="write down which filters went (JSON)")

    what = parser.add_argument_group("what goes")
    add = what.add_argument
    add(
        "--config",
        type=Path,
        metavar="FILE",
        help="what the pruning section of this configuration says; of the others only model and "
        "seed are read, and mistakes elsewhere are not looked for",
    )
    add("--plan", metavar="FILE", help="the filters of a saved plan (JSON)")
    add(
        "--ratio",
        action="append",
        default=[],
        metavar="PATTERN=R",
        help="the share R of the filters of every layer that the pattern matches; may be "
        "repeated, the last match wins; with a budget: at most that share",
    )
    budget = what.add_mutually_exclusive_group()
    add = budget.add_argument
    add("--speedup", type=float, metavar="X", help="budget: X times fewer MACs, as 2.0")
    add("--max-macs", metavar="N", help="budget: at most N MACs for one image, as 2.0G")
    add("--max-parameters", metavar="N", help="budget: at most N parameters, as 10M")
    add("--max-latency-ms", type=float, metavar="MS", help="budget: at most MS for an image here")

    how = parser.add_argument_group("which, with --ratio or a budget")
    add = how.add_argument
    add("--criterion", default="l1", metavar="C", help=f"{', '.join(CRITERIA)} (default: l1)")
    add("--round-to", type=int, default=1, metavar="N", help="keep multiples of N filters")
    add(
        "--floor",
        action="append",
        default=[],
        metavar="PATTERN=N",
        help="keep at least N filters (or, as 0.25, that share) of these layers",
    )
    add("--skip", action="append", default=[], metavar="PATTERN", help="leave these layers alone")
    add(
        "--coupled",
        action="store_true",
        help="prune layers that are added to each other (the residual stream) together",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the criterion random")
    return parser.parse_args()


def main() -> None:
    """Command-line entry point."""
    arguments = _parse_arguments()
    named = _network(arguments.model) if arguments.model else None
    configured = _read_config(arguments.config) if arguments.config else None
    otherwise = configured.architecture() if configured else None
    dense = read_dense(arguments.checkpoint, named, otherwise)
    model = meta_copy(dense.model)
    assign_tensors(model, dense.tensors)
    plan = _make_plan(arguments, configured, model)
    pruned, done = write_pruned(dense, plan, arguments.output)
    if arguments.save_plan:
        plan.save(arguments.save_plan)
    network = architecture_of(dense.model)
    assert network is not None
    print(f"{network.name}: {summary(count(dense.model), count(pruned))}")
    if arguments.max_latency_ms is not None:
        timing = measure(
            {"dense": model, "pruned": load_model(arguments.output)}, LatencySettings()
        )
        dense_ms, pruned_ms = (1000 * timing[name].median for name in ("dense", "pruned"))
        print(f"latency here, one image: {dense_ms:.1f} ms -> {pruned_ms:.1f} ms (medians)")
    for note in done.notes:
        print(f"note: {note}")
    companions = ", ".join(done.companions)
    print(f"wrote {arguments.output}" + (f", with {companions}" if companions else ""))


if __name__ == "__main__":
    run_command(main)
