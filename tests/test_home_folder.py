"""``~`` is the home folder in every path: of a command, of a configuration, of a sweep."""

import ast
from pathlib import Path

import pytest
import yaml

from tpp import describe, export, plan, prune
from tpp.checkpoints.model_file import save_model
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from train.config.config import load_config
from train.grid import expand, load_sweep
from train.weights import starting_weights_exist

ROOT = Path(__file__).resolve().parents[1]
OF_PATHS = {"FILE", "DIR", "FOLDER", "IN", "OUT", "CHECKPOINT", "RUN"}
NAMED = {"--checkpoint", "--data", "--output", "--config", "--folder", "--work", "--runs"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a working directory in which nothing may appear."""
    home, work = tmp_path / "home of mine", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    return home


CONFIG = {
    "name": "x",
    "output": "~/runs/x",
    "model": {"name": "cifar_resnet8", "num_classes": 4, "checkpoint": "~/dense.pth"},
    "data": {"root": "~/images", "index": "~/index", "val": "~/elsewhere/val"},
    "training": {"deepspeed": "~/zero1.json"},
    "stages": {"dense": {"epochs": 1, "optimizer": {"lr": 0.1}}},
}


def test_in_a_configuration(home: Path) -> None:
    (home / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    Path("config.yaml").write_text("extends: ~/base.yaml\nname: y\n")
    for path in ("config.yaml", "~/base.yaml"):
        config = load_config(path)
        assert config.output == f"{home}/runs/x"
        assert config.data.root == f"{home}/images" and config.data.index == f"{home}/index"
        assert Path(config.data.root) / config.data.val == home / "elsewhere" / "val"
        assert config.model.checkpoint == f"{home}/dense.pth"
        assert config.training.deepspeed == f"{home}/zero1.json"
    assert load_config("~/base.yaml", ["output=~/other"]).output == f"{home}/other"
    # Inside of a name, and in a folder that the user names so, it is a letter like others.
    assert load_config("~/base.yaml", ["output=./~/a~b"]).output == "./~/a~b"
    with pytest.raises(UserError, match=r"home of mine/dense.pth: no such file"):
        starting_weights_exist(load_config("~/base.yaml").model)
    (home / "dense.pth").touch()
    starting_weights_exist(load_config("~/base.yaml").model)


@pytest.mark.parametrize("key", ["output", "data.root", "model.checkpoint", "training.deepspeed"])
def test_somebody_without_a_home_folder(home: Path, key: str) -> None:
    (home / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    with pytest.raises(UserError) as error:
        load_config("~/c.yaml", [f"{key}=~no-such-user/x"])
    assert f"{key}: ~no-such-user/x: there is no home folder ~no-such-user here" in str(error.value)
    assert "\n" not in str(error.value)


def test_in_a_sweep(home: Path) -> None:
    method = {
        **CONFIG,
        "stages": {"finetune": {"epochs": 1, "optimizer": {"lr": 0.1}}, "evaluate": {}},
    }
    sweep = {
        "name": "s",
        "output": "~/runs/s",
        "dense": "~/dense.yaml",
        "methods": {"tpp": "~/method.yaml"},
        "ratios": {"half": {"layer*.conv1": 0.5}},
        "finetuning": {"only": {}},
        "seeds": [0],
    }
    for name, content in (("dense", CONFIG), ("method", method), ("sweep", sweep)):
        (home / f"{name}.yaml").write_text(yaml.safe_dump(content))
    for run in expand(load_sweep(home / "sweep.yaml")):
        assert home / "runs" / "s" in run.folder.parents
        assert run.config.parent == home


def test_of_commands(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(home / "dense.safetensors", build_model("cifar_resnet8", 4))
    arguments = ["--output=~/half.safetensors", "--ratio", "layer*.conv1=0.5", "--save-plan=~/p"]
    prune.main(["--checkpoint=~/dense.safetensors", *arguments])
    plan.PruningPlan.load(home / "p")
    describe.main(["~/half.safetensors"])
    export.main(["~/half.safetensors", "--output=~/half.pt2", "--no-check"])
    assert {path.name for path in home.iterdir()} == {
        *("dense.safetensors", "half.safetensors", "half.pt2", "p"),
    }
    assert not list(Path.cwd().iterdir()), "a folder called ~"
    with pytest.raises(UserError, match="there is no home folder ~no-such-user here"):
        describe.main(["~no-such-user/half.safetensors"])


def test_no_command_reads_a_path_otherwise() -> None:
    """Every option of every command that is a path has the type that knows ``~``."""
    found, wrong = 0, []
    for package in ("tpp", "data_pipelines", "train", "launch", "benchmarks"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for call in ast.walk(ast.parse(path.read_text())):
                if isinstance(call, ast.Call) and _names_a_path(call):
                    found += 1
                    types = [k.value for k in call.keywords if k.arg == "type"]
                    if not (
                        types and isinstance(types[0], ast.Name) and types[0].id == "user_path"
                    ):
                        wrong.append(f"{path}:{call.lineno}")
    # Those that commands share are looked at in tests/test_commands.py.
    assert found > 15 and not wrong


def _names_a_path(call: ast.Call) -> bool:
    """Whether an option that a call adds is a path, to judge by its name, metavar or type."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name not in ("add_argument", "add") or not call.args:
        return False
    given = {k.arg: k.value for k in call.keywords}
    kind, metavar, option = given.get("type"), given.get("metavar"), call.args[0]
    return (
        (isinstance(kind, ast.Name) and kind.id == "Path")
        or (isinstance(metavar, ast.Constant) and metavar.value in OF_PATHS)
        or (isinstance(option, ast.Constant) and option.value in NAMED)
    )
