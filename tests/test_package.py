"""The package tpp by itself: built, installed beside what it needs and nothing else, and used."""

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

import tpp
from tpp.__main__ import COMMANDS, command
from tpp.measure.timing import DEVICES, DTYPES, LatencySettings
from tpp.models import architecture
from tpp.selection.criteria import CRITERIA
from tpp.selection.selection import Selection

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = ("torch", "torchvision", "numpy", "safetensors", "pydantic", "PyYAML", "rich")
# What the environment of the tests has and a user of the package need not have.
HIDDEN = (
    *("accelerate", "timm", "matplotlib", "onnx", "onnxscript", "onnxruntime", "transformers"),
    *("torch_pruning", "scipy", "tensorboard", "deepspeed", "nvidia.dali", "huggingface_hub"),
    *("train", "data_pipelines", "launch", "benchmarks", "pytest"),
)
# A user's session: a network is saved, regularised, pruned by the command and loaded.
SESSION = """
import importlib, importlib.util, pkgutil, subprocess, sys
import torch, tpp

for name in HIDDEN:
    parent = name.partition(".")[0]
    assert importlib.util.find_spec(parent) is None or importlib.util.find_spec(name) is None, name
assert tpp.__file__.startswith(sys.prefix), tpp.__file__
for name in tpp.__all__:
    getattr(tpp, name)
for module in pkgutil.walk_packages(tpp.__path__, "tpp."):
    if module.name != "tpp.plot":
        importlib.import_module(module.name)

from tpp.models.architecture import build_model

torch.manual_seed(0)
model = build_model("cifar_resnet8", 10)
tpp.save_model("dense.safetensors", model, preprocessing=None)
try:
    build_model("timm:resnet18", 10)
except tpp.UserError as error:
    print(error)

plan = tpp.select_filters(model, {"layer*.conv1": 0.5})
growth = tpp.GrowthSchedule(delta=0.5, update_interval=1, stabilize_steps=9, zero_out_interval=1)
regularizer = tpp.Regularizer(model, plan, growth=growth)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
while not regularizer.finished(step):
    loss = model(torch.randn(4, 3, 32, 32)).logsumexp(1).mean() + regularizer.penalty(step)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    regularizer.after_step(step)
    step += 1
for name, filters in plan.pruned.items():
    assert (model.get_submodule(name).weight[filters] == 0).all(), name
print(step, "steps")

arguments = ["--checkpoint", "dense.safetensors", "--output", "pruned.safetensors"]
subprocess.run([sys.argv[1], "prune", *arguments, "--ratio", "layer*.conv1=0.5"], check=True)
assert tpp.load_model("pruned.safetensors").layer1[0].conv1.out_channels == 8
print("loaded")
"""


def top_names(installed: Distribution) -> Iterator[Path]:
    """Where a distribution's files are, each folder once; of nvidia's, which many share, theirs."""
    for file in installed.files or []:
        if file.parts[0] not in ("..", "__pycache__"):
            yield Path(*file.parts[: 2 if file.parts[0] == "nvidia" else 1])


def link_needed(site: Path) -> None:
    """Give a folder of packages the seven, and what they in turn need."""
    waiting, done, links = [*NEEDED], set(), {}
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in done:
            continue
        done.add(name)
        installed = distribution(name)
        for requirement in map(Requirement, installed.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
        links |= {part: str(installed.locate_file(part)) for part in top_names(installed)}
    for part, target in links.items():
        (site / part).parent.mkdir(exist_ok=True)
        (site / part).symlink_to(target)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built in a copy: setuptools takes in what an earlier build has left in build/.
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("tpp", "train", "data_pipelines", "launch", "benchmarks", "tests", "configs"):
        folder = ROOT / name
        shutil.copytree(folder, copy / name, ignore=shutil.ignore_patterns("__pycache__", "corpus"))
    build = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*build, "--no-build-isolation", "--wheel-dir", str(out)], check=True, cwd=copy)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def place(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and what it needs; its folder bin."""
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    link_needed(site)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    return environment / "bin"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    version = tpp.__version__
    about = f"tpp_cluster-{version}.dist-info"
    assert wheel.name == f"tpp_cluster-{version}-py3-none-any.whl"
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "tpp").rglob("*.py")}
    kept = ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel) as file:
        assert {*file.namelist()} == {*ours, "tpp/py.typed", *(f"{about}/{name}" for name in kept)}
        metadata = file.read(f"{about}/METADATA").decode()
    assert f"\nVersion: {version}\n" in metadata and "# TPP at cluster scale" in metadata


def test_the_package_alone_prunes_describes_and_regularises(place: Path, tmp_path: Path) -> None:
    def start(*words: str) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
        return subprocess.Popen([*words], cwd=tmp_path, env=environment, **pipes)

    def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
        out, error = process.communicate(timeout=120)
        return process.returncode, out, error

    tool = str(place / "tpp")
    session = f"HIDDEN = {HIDDEN!r}\n{SESSION}"
    code, out, error = end(start(str(place / "python"), "-P", "-u", "-c", session, tool))
    assert code == 0, error
    lines = out.splitlines()
    assert lines[:2] == ["model 'timm:resnet18' needs timm: pip install timm", "12 steps"]
    assert lines[2].startswith("cifar_resnet8: parameters 75.3 k -> ")
    assert lines[3].startswith("note: the filters that go are not at zero")
    assert lines[4:] == ["wrote pruned.safetensors", "loaded"]

    code, _, error = end(start(tool, "train"))
    assert code == 2 and error.startswith("error: tpp train: is not part of the package tpp alone")
    described = start(tool, "describe", "pruned.safetensors")
    exported = start(tool, "export", "pruned.safetensors", "--output", "pruned.onnx")
    plotted = start(tool, "describe", "pruned.safetensors", "--plot", "pruned.png")
    assert end(plotted) == (2, "", "error: --plot needs Matplotlib: pip install matplotlib\n")
    wanted = "exporting to ONNX needs onnx: pip install onnx onnxscript onnxruntime"
    assert end(exported) == (2, "", f"error: pruned.onnx: {wanted}\n")
    code, out, error = end(described)
    assert (code, error) == (0, "") and "8 / 16" in out and "speedup" in out
    assert {path.name for path in tmp_path.iterdir()} == {"dense.safetensors", "pruned.safetensors"}


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str):
    monkeypatch.setattr(sys, "argv", [*words])
    code: object = 0
    try:
        command()
    except SystemExit as ended:
        code = ended.code
    return code, *capsys.readouterr()


def test_the_command_for_all(monkeypatch, capsys):
    code, out, _ = told(monkeypatch, capsys, "/usr/bin/tpp")
    assert code == 0 and out.startswith("usage: tpp COMMAND ...\n")
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(f"  {name} " in out for name in COMMANDS)
    assert told(monkeypatch, capsys, "tpp", "--help") == (0, out, "")
    assert told(monkeypatch, capsys, "tpp", "--version") == (0, f"tpp {tpp.__version__}\n", "")
    error = "error: tpp: there is no command prun; did you mean prune?\n"
    assert told(monkeypatch, capsys, "tpp", "prun", "--help") == (2, "", error)
    code, _, error = told(monkeypatch, capsys, str(ROOT / "tpp" / "__main__.py"), "export")
    assert code == 2 and error == "error: python -m tpp export: missing: --output\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_told_without_pytorch(name):
    # Others have NumPy or pydantic at hand, which take a tenth of PyTorch's time.
    slow = ("numpy", "pydantic") if COMMANDS[name].module.startswith("tpp.") else ()
    script = (
        f"import sys\nSLOW = {slow!r}\n"
        "from tpp.__main__ import command\n"
        f"sys.argv = ['tpp', {name!r}, '--help']\n"
        "try:\n    command()\n"
        "finally:\n    print({'torch', *SLOW} & {*sys.modules})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith(f"usage: tpp {name}"), done.stdout
    assert done.stdout.endswith("\nset()\n")


def test_options_name_what_there_is(monkeypatch, capsys):
    """They are written out in the parsers, which must not import PyTorch to know them."""
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = told(monkeypatch, capsys, "tpp", "prune", "--help")
    said = f"{', '.join(CRITERIA)} (default: {Selection().criterion})"
    assert said in " ".join(out.split())  # in two lines
    _, out, _ = told(monkeypatch, capsys, "tpp", "latency", "--help")
    default = LatencySettings()
    assert f"--precision {{{','.join(DTYPES)}}}\n" in out and f"default: {default.dtype})\n" in out
    assert f"--device {{{','.join(DEVICES)}}}" in out and f"default: {default.device})\n" in out
    assert f"as 1 or 1,16 (default: {default.batch})\n" in out


class LooksAtValues(nn.Module):
    """Cannot be built under torch.device("meta"), as a few networks of timm cannot."""

    def __init__(self, num_classes):
        super().__init__()
        self.tied = nn.Linear(4, num_classes)
        self.tied.bias.requires_grad_(torch.linspace(0, 1, 3)[1].item() != 0.5)
        self.linear = nn.Linear(4, num_classes)
        self.linear.weight = self.tied.weight
        self.register_buffer("table", torch.arange(3))


def test_a_network_that_looks_at_values_is_built_without_memory_all_the_same(monkeypatch):
    monkeypatch.setitem(architecture._OWN_MODELS, "odd", LooksAtValues)
    model = architecture.build_on_meta(architecture.Architecture("odd", 10))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert model.linear.weight is model.tied.weight and model.linear.weight.shape == (10, 4)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["tied.bias"]
    assert nn.Linear(2, 2).weight.device.type == "cpu"


def test_what_is_pinned_is_what_the_package_asks_for():
    pins = {}
    files = (ROOT / "requirements.txt", ROOT / "requirements-services.txt")
    for line in itertools.chain(*(file.read_text().splitlines() for file in files)):
        if text := line.partition("#")[0].strip():
            requirement = Requirement(text)
            (pin,) = requirement.specifier
            pins[canonicalize_name(requirement.name)] = pin.version
    asked = [Requirement(text) for text in PROJECT["dependencies"]]
    assert [requirement.name for requirement in asked] == [*NEEDED]
    for extra in PROJECT["optional-dependencies"].values():
        asked += map(Requirement, extra)
    names = [canonicalize_name(requirement.name) for requirement in asked]
    assert sorted(names) == sorted({*pins, "setuptools"})
    for requirement in asked:
        version = pins.get(canonicalize_name(requirement.name))
        assert version is None or version in requirement.specifier, requirement
    # The second set, or pip would put another PyTorch in its place.
    second = (ROOT / "requirements-cuda12.txt").read_text()
    for name in ("torch", "torchvision"):
        version = re.search(rf"^{name}==(\S+)", second, re.MULTILINE)[1]
        assert version in asked[names.index(name)].specifier
