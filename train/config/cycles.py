"""Stages that repeat: a cycle is written out into plain stages when a configuration is read.

So folders, skipping, resuming and the report need to know nothing of it.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from tpp.common.settings import Section, mistakes
from train.config.references import LIKE
from train.config.stage_kinds import KINDS

CYCLE = "cycle"


class CycleSection(Section):
    """A stage of kind ``cycle`` is a list of stages that run several times over (docs/masks.md).

    Stage S of round i of cycle C is the stage ``Ci_S``. An ``input`` or ``optimizer.like`` that
    names a stage of the cycle means that of the same round; the first stage of a round begins with
    the network of the last one of the round before. Stages behind the cycle may name C, which is
    its last stage.

    A ``sparsify.sparsity`` in it is what comes out in the end of the weights that were not masked
    before it: each round masks the same share of what is left, ``1 - (1 - s)^(1/times)`` (Zimmer et
    al. 2023).

    Attributes:
        times: how many rounds there are.
        stages: the stages of a round, by name, as a configuration has them.
        input: the stage whose network the first round begins with; by default the one before the
            cycle.

    Example:
        {times: 3, stages: {sparsify: {sparsify: {sparsity: 0.9}}, finetune: {epochs: 40,
        optimizer: {lr: 0.01}}}, input: dense}
    """

    times: Annotated[int, Field(ge=1, le=1000)]  # each stage of each round has a folder
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
            cycle = CycleSection.model_validate({k: v for k, v in stage.items() if k != "kind"})
        except ValidationError as error:
            lines = (f"{key}.{line}" for line in mistakes(error, CycleSection))
            raise ValueError("\n".join(lines)) from None
        if cycle.input is not None and cycle.input not in {*plain, *last}:
            there = ", ".join(map(str, plain)) or "none"
            raise ValueError(
                f"{key}.input: {cycle.input!r} is no earlier stage; there are: {there}"
            )
        made: list[str] = []
        for number in range(1, cycle.times + 1):
            for inner, settings in cycle.stages.items():
                written = _of_round(key, inner, dict(settings or {}), f"{name}{number}", cycle)
                if not made and cycle.input is not None and "input" not in written:
                    written["input"] = cycle.input
                if isinstance(source := written.get("input"), str):
                    written["input"] = last.get(source, source)
                _add(plain, f"{name}{number}_{inner}", written)
                if KINDS[written["kind"]].makes_network:
                    made.append(f"{name}{number}_{inner}")
        if not made:
            raise ValueError(f"{key}.stages: none of them makes a network")
        last[str(name)] = made[-1]
    return plain


def as_written(line: str, stages: Any) -> str:
    """A mistake's line, which begins with its key, with the key that a configuration has for it.

    Args:
        line: of the stages as they are written out.
        stages: as the configuration has them.
    """
    for name, stage in stages.items() if isinstance(stages, Mapping) else ():
        inner = stage.get("stages") if isinstance(stage, Mapping) else None
        if isinstance(inner, Mapping) and stage.get("kind") == CYCLE:
            names = "|".join(re.escape(str(one)) for one in inner)
            found = re.match(rf"stages\.{re.escape(str(name))}\d+_({names})(?=[.:])", line)
            if found is not None:
                return f"stages.{name}.stages.{found[1]}{line[found.end() :]}"
    return line


def _of_round(
    key: str, inner: str, settings: dict[str, Any], prefix: str, cycle: CycleSection
) -> dict[str, Any]:
    kind = settings.setdefault("kind", inner)
    if not isinstance(kind, str) or kind not in KINDS:
        *most, final = KINDS
        why = "a stage of another name has to say it"
        if kind == CYCLE:
            why = "there are no cycles in cycles"
        raise ValueError(
            f"{key}.stages.{inner}.kind: {', '.join(most)} or {final}, not {kind!r}; {why}"
        )
    source, optimizer = settings.get("input"), settings.get("optimizer")
    if isinstance(source, str) and source in cycle.stages:
        settings["input"] = f"{prefix}_{source}"
    if isinstance(optimizer, Mapping):
        like = optimizer.get(LIKE)
        if isinstance(like, str) and like in cycle.stages:
            settings["optimizer"] = {**optimizer, LIKE: f"{prefix}_{like}"}
    masks = settings.get("sparsify")
    if isinstance(masks, Mapping) and isinstance(masks.get("sparsity"), int | float):
        share = masks["sparsity"]
        # Anything else is refused where it is read.
        if 0 <= share < 1 and not isinstance(share, bool):
            rest = {k: value for k, value in masks.items() if k != "sparsity"}
            settings["sparsify"] = {**rest, "fraction": 1 - (1 - share) ** (1 / cycle.times)}
    return settings


def _add(plain: dict[Any, Any], name: Any, stage: Any) -> None:
    if name in plain:
        raise ValueError(f"stages.{name}: a cycle is written out into a stage of that name, too")
    plain[name] = stage
