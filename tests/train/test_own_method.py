"""A method in a file of the user's own: the example of docs/extending.md, as it stands there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tpp.common.errors import UserError
from tpp.methods import method_class
from train.config.config import load_config

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def block(language: str) -> str:
    """The page's first block in a language."""
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


@pytest.fixture
def own(tiny_config: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """The tiny run by the page's method and its stage, in a folder with ``mine.py``."""
    (tmp_path / "mine.py").write_text(block("python"))
    said = yaml.safe_load(block("yaml"))
    tiny_config["method"] = said["method"]
    tiny_config["stages"] |= {
        name: {**tiny_config["stages"][name], **of} for name, of in said["stages"].items()
    }
    return tiny_config


def test_the_pages_method_goes_through_a_run(own, tmp_path, run_inside, monkeypatch, capsys):
    run_inside(own)
    results = json.loads((Path(own["output"]) / "results.json").read_text())
    regularize = results["stages"]["regularize"]
    assert (regularize["method"], regularize["title"]) == ("mine", "Mine")
    log = [json.loads(line) for line in (Path(own["output"]) / "log.jsonl").open()]
    terms = [e["loss/squares"] for e in log if e["event"] == "train" and "loss/squares" in e]
    assert len(terms) > 1 and all(term > 0 for term in terms)
    # Done stages are taken up from elsewhere, as nothing in them has the file's folder.
    capsys.readouterr()
    run_inside(own)
    assert "regularize: done before, skipped" in capsys.readouterr().out


def test_the_file_lies_beside_what_names_it(own, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "run.yaml"
    own["method"]["name"] = "../mine.py:Mine"
    own["stages"]["finetune"]["method"] = {"name": "../mine.py:Mine"}
    path.write_text(yaml.safe_dump(own))
    monkeypatch.chdir("/")
    config = load_config(path)
    for stage in ("regularize", "finetune"):
        assert config.stage_method(stage).title == "Mine"
    monkeypatch.chdir(tmp_path)
    assert load_config(path, ["method.name=mine.py:Mine"]).stage_method("regularize").name == "mine"


@pytest.mark.parametrize(
    ("method", "code", "message"),
    [
        ("nothere.py:Mine", None, "method.name: Mine: there is no file"),
        ("mine.py:Other", None, "has no Other; it has Settings, Mine"),
        ("mine.py", None, "expected FILE.py:NAME"),
        ("mine.py:Settings", None, "expected a class that derives from tpp.methods.base.Method"),
        ("mine.py:Mine", ("mine", "tpp"), "there is a method 'tpp' already; rename it"),
        ("mine.py:Mine", ('name = "mine"', ""), "give the class a name and a title"),
        ("mine.py:Mine", ("import torch\n", "import torhc\n"), "line 3: cannot be imported"),
    ],
)
def test_mistakes_are_one_line(own, tmp_path, run_inside, capsys, method, code, message):
    if code is not None:
        text = (tmp_path / "mine.py").read_text()
        before, after = (
            f'"{part}"' if '"' not in part and part.isalpha() else part for part in code
        )
        (tmp_path / "mine.py").write_text(text.replace(before, after))
    own["method"]["name"] = method
    run_inside(own, expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.startswith("error: ")


def test_settings_of_its_own_are_checked(own, run_inside, capsys):
    own["method"]["weight"] = -1
    run_inside(own, expect=2)
    assert "method.weight: input should be greater than or equal to 0" in capsys.readouterr().err


def test_the_name_alone_finds_only_the_projects_methods():
    with pytest.raises(UserError, match="unknown method 'mine'"):
        method_class("mine")
