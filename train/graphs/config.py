"""Settings of a run of ResiNet: a YAML file, and overrides from the command line."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.common.reading import read_text
from tpp.common.settings import (
    MAY_DIFFER,
    NaturalNumber,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    UserPath,
    mistakes,
)
from tpp.common.yaml_files import Merging, merge, parse_override, read_yaml
from train.config.config import as_yaml, with_sources
from train.graphs.firegnn import NetworkSection
from train.graphs.graph import Graph, ba15, barabasi_albert, parse_edges
from train.graphs.objective import ObjectiveSection
from train.graphs.ppo import PpoSection

_MERGING = Merging()
# Beyond it the dense adjacency of a minibatch takes gigabytes.
_MOST_NODES = 2000


class GraphSection(Section):
    """The graph at which every episode begins.

    Attributes:
        kind: ``ba15``, of the authors' code; ``barabasi_albert``, drawn; ``file``.
        nodes, attached: of a drawn one: how many, and to how many others each new one is joined.
        seed: of the draw.
        file: two node ids in each line, from 0 on.
    """

    kind: Literal["ba15", "barabasi_albert", "file"] = "ba15"
    nodes: Annotated[int, Field(ge=4, le=_MOST_NODES)] | None = None
    attached: PositiveInt | None = None
    seed: Seed = 0
    file: UserPath | None = None

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "GraphSection":
        needed = {"ba15": (), "barabasi_albert": ("nodes", "attached"), "file": ("file",)}
        for kind, keys in needed.items():
            for key in keys:
                if (getattr(self, key) is None) == (kind == self.kind):
                    what = "is needed" if kind == self.kind else f"goes with kind: {kind}"
                    raise ValueError(f"graph.{key}: {what}")
        if self.nodes and self.attached and self.attached >= self.nodes:
            raise ValueError(f"graph.attached: less than the {self.nodes} nodes there are")
        return self

    def make(self) -> Graph:
        """The graph.

        Raises:
            UserError: its file cannot be read, or nothing in it can be rewired.
        """
        if self.kind == "ba15":
            return ba15()
        if self.kind == "barabasi_albert":
            assert self.nodes is not None and self.attached is not None
            graph, where = barabasi_albert(self.nodes, self.attached, self.seed), "graph"
        else:
            where = f"graph.file: {self.file}"
            graph = parse_edges(read_text(str(self.file), "the graph's edges"), str(self.file))
            if len(graph) > _MOST_NODES:
                raise UserError(f"{where}: {len(graph):,} nodes; {_MOST_NODES:,} at most")
        if next(graph.swaps(), None) is None:
            raise UserError(f"{where}: no two of its {len(graph.edges)} edges can be swapped")
        return graph


class SearchSection(Section):
    """What the policy is put beside; 0 leaves a search out.

    Attributes:
        greedy: runs of best-improvement search, which differ in how ties are broken.
        beam: graphs kept by beam search.
        annealing: runs of simulated annealing.
        annealing_steps: swaps that each of them tries.
        hot, cold: temperatures at which it begins and ends, in units of the objective.
    """

    greedy: NaturalNumber = 60
    beam: NaturalNumber = 50
    annealing: NaturalNumber = 3
    annealing_steps: PositiveInt = 30_000
    hot: PositiveFloat = 0.01
    cold: PositiveFloat = 0.0005


class EvaluationSection(Section):
    """How the policy is judged.

    Attributes:
        every: iterations between two episodes of the most probable actions, for the log.
        episodes: sampled at the end.
    """

    every: PositiveInt = 10
    episodes: PositiveInt = 256


class Config(Section):
    """A run.

    Attributes:
        name: of the run; also of its folder unless ``output`` says otherwise.
        output: the run folder.
        seed: of weights, actions, minibatches, and of the searches.
        threads: of PyTorch; other numbers may round otherwise. Small graphs gain nothing by more.
        graph: where episodes begin.
        objective: what is to rise.
        rewirings: the most in one episode.
        network: of the policy and the value.
        training: by PPO.
        checkpoint_every: iterations between two checkpoints.
        evaluation: of the policy.
        search: beside it.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,199}$"), MAY_DIFFER]
    output: Annotated[UserPath, MAY_DIFFER] = ""
    seed: Seed = 0
    threads: PositiveInt = 1
    graph: GraphSection = GraphSection()
    objective: ObjectiveSection = ObjectiveSection()
    rewirings: PositiveInt = 20
    network: NetworkSection = NetworkSection()
    training: PpoSection = PpoSection()
    checkpoint_every: Annotated[PositiveInt, MAY_DIFFER] = 10
    evaluation: Annotated[EvaluationSection, MAY_DIFFER] = EvaluationSection()
    search: Annotated[SearchSection, MAY_DIFFER] = SearchSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        self.output = self.output or f"runs/{self.name}"
        if self.search.cold > self.search.hot:
            raise ValueError("search.cold: not above search.hot")
        return self


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: the YAML file.
        overrides: ``key.sub=value`` strings; the value is YAML.

    Raises:
        UserError: with one line per mistake, each naming the key, and the file or the override
            that it is in.
    """
    overrides = list(overrides)
    data = in_file = read_yaml(path, _MERGING)
    if {"model", "stages"} & data.keys():
        raise UserError(f"{path}: a run that prunes a network; train/main.py --config {path}")
    for override in overrides:
        data = merge(data, parse_override(override, _MERGING), _MERGING)
    lines = _mistakes_in(data)
    if not lines:
        return Config.model_validate(data)
    raise with_sources(lines, {*_mistakes_in(in_file)} if overrides else {*lines}, path, overrides)


def _mistakes_in(data: object) -> list[str]:
    try:
        Config.model_validate(data)
    except ValidationError as error:
        return mistakes(error, Config)
    return []


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration: every key, defaults included."""
    write_whole(path, as_yaml(config))
