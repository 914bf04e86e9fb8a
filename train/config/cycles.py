"""Stages that repeat: a cycle is written out into plain stages when a configuration is read.

So folders, skipping, resuming and the report need to know nothing of it.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from tpp.common.settings import PositiveInt, Section, mistakes
from train.config.stage_kinds import KINDS

CYCLE = "cycle"


class CycleSection(Section):
    """A list of stages, ``times`` times over.

    Stage S of round i of cycle C is the stage ``Ci_S``. An ``input`` that names a stage of the
    cycle is that of the same round; the first stage of a round comes from the last one of the round
    before. What is behind the cycle may name C: its last stage.

    A ``sparsify.sparsity`` in it is what comes out in the end: each round masks the same share of
    what is left, ``1 - (1 - s)^(1/times)`` (Zimmer et al. 2023).

    Attributes:
        times: how often.
        stages: by name, as a configuration has them.
        input: the stage that the first round starts from; by default the one before the cycle.
    """

    times: PositiveInt
    stages: dict[str, dict[str, Any] | None] = Field(min_length=1)
    input: str | None = None


def written_out(stages: Mapping[Any, Any]) -> dict[Any, Any]:
    """The stages of a configuration with plain ones in the place of cycles.

    Raises:
        ValueError: a mistake in a cycle; names the key.
    """
    plain: dict[Any, Any] = {}
    last: dict[str, str] = {}
    for name, stage in stages.items():
        if not isinstance(stage, Mapping) or stage.get("kind") != CYCLE:
            source = stage.get("input") if isinstance(stage, Mapping) else None
            if isinstance(source, str) and source in last:
                stage = {**stage, "input": last[source]}
            _add(plain, name, stage)
            continue
        key = f"stages.{name}"
        try:
            cycle = CycleSection(**{k: value for k, value in stage.items() if k != "kind"})
        except ValidationError as error:
            raise ValueError("\n".join(mistakes(error, CycleSection, prefix=key))) from None
        made: list[str] = []
        for number in range(1, cycle.times + 1):
            for inner, settings in cycle.stages.items():
                written = _of_round(key, inner, dict(settings or {}), f"{name}{number}", cycle)
                if not made and cycle.input is not None and "input" not in written:
                    written["input"] = last.get(cycle.input, cycle.input)
                _add(plain, f"{name}{number}_{inner}", written)
                if KINDS[written["kind"]].makes_network:
                    made.append(f"{name}{number}_{inner}")
        if not made:
            raise ValueError(f"{key}.stages: none of them makes a network")
        last[str(name)] = made[-1]
    return plain


def _of_round(
    key: str, inner: str, settings: dict[str, Any], prefix: str, cycle: CycleSection
) -> dict[str, Any]:
    kind = settings.setdefault("kind", inner)
    if not isinstance(kind, str) or kind not in KINDS:
        *most, final = KINDS
        raise ValueError(
            f"{key}.stages.{inner}.kind: {', '.join(most)} or {final}, not {kind!r}; a stage of "
            "another name has to say it"
        )
    source = settings.get("input")
    if isinstance(source, str) and source in cycle.stages:
        settings["input"] = f"{prefix}_{source}"
    masks = settings.get("sparsify")
    if isinstance(masks, Mapping) and isinstance(masks.get("sparsity"), int | float):
        share = masks["sparsity"]
        if 0 <= share < 1:  # anything else is refused where it is read
            rest = {k: value for k, value in masks.items() if k != "sparsity"}
            settings["sparsify"] = {**rest, "fraction": 1 - (1 - share) ** (1 / cycle.times)}
    return settings


def _add(plain: dict[Any, Any], name: Any, stage: Any) -> None:
    if name in plain:
        raise ValueError(f"stages.{name}: a cycle is written out into a stage of that name, too")
    plain[name] = stage
