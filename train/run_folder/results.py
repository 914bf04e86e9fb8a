"""results.json: what the stages found."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from tpp.common.errors import UserError
from tpp.common.reading import read_json
from train.config.sections import PublishedSection


class Accuracy(BaseModel):
    """Accuracy on the validation images: top-1 and top-5 in per cent, and the mean loss."""

    top1: float | None = None
    top5: float | None = None
    loss: float | None = None


class NetworkResult(Accuracy):
    """A network with its accuracy, parameters and multiply-accumulates of one image."""

    parameters: int | None = None
    macs: int | None = None


class StageResult(NetworkResult):
    """One stage, as results.json describes it; of a stage under way only what it is to do."""

    kind: str
    method: str | None = None
    title: str | None = None
    input: str | None = None
    speedup: float | None = None
    steps: int | None = None
    epochs: float | None = None
    wall_seconds: float | None = None
    start: Accuracy | None = None


class Results(BaseModel):
    """The content of results.json."""

    name: str
    seed: int | None = None
    status: str = "running"
    model: str = ""
    wall_seconds: float | None = None
    versions: dict[str, str] = {}
    git_commit: str | None = None
    device: str | None = None
    ranks: int | None = None
    published: PublishedSection | None = None
    dense: NetworkResult | None = None
    stages: dict[str, StageResult] = {}


def read_results(path: Path) -> Results:
    """Read a results.json.

    Raises:
        UserError: it cannot be read, or is not the results of a run.
    """
    try:
        return Results.model_validate(read_json(path, "the results"))
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(str(part) for part in problem["loc"]) or "the file"
        message = problem["msg"][0].lower() + problem["msg"][1:]
        raise UserError(f"{path}: not the results of a run: {key}: {message}") from None
