"""Imports run down one list of packages, and never in a circle; docs/architecture.md draws it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tpp", "data_pipelines", "train", "launch", "benchmarks")
# From the ground up. A module belongs to the longest name that it begins with; those on one line
# know nothing of each other.
LAYERS: list[tuple[str, ...]] = [
    ("tpp.common",),
    ("tpp.plan",),
    ("tpp.models",),
    ("tpp.measure", "tpp.channels"),
    ("tpp.masks",),
    ("tpp.selection", "tpp.regularization", "tpp.checkpoints"),
    ("tpp.methods",),
    ("tpp",),
    ("data_pipelines.settings",),
    ("data_pipelines.images",),
    ("data_pipelines.loading", "data_pipelines.sets"),
    ("data_pipelines",),
    ("train.downloads", "train.copies"),
    ("train.public_weights",),
    ("train.tasks",),
    ("train.distillation",),
    ("train.config",),
    ("train.distributed",),
    ("train.data", "train.weights", "train.loop.optim"),
    ("train.teachers",),
    ("train.loop", "train.run", "train.opening", "train.preflight", "train.schedules"),
    ("train.run_folder",),
    ("train.tags",),
    ("train.monitor", "train.grid", "train.trackers"),
    ("train.stages", "train.reporting"),
    ("train",),
    ("train.graphs",),
    ("launch",),
    ("benchmarks",),
    # The command `tpp`: Python looks for it there, and nothing imports it. It starts all commands.
    ("tpp.__main__",),
]
LARGEST_FILE = 650  # lines


def modules(root: Path) -> dict[str, Path]:
    """All modules of the packages, by name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """Modules that a file imports, with the line; those inside functions and for types too.

    And those that it names in a string of nothing else, as for ``importlib.import_module``.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in known:
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known or node.module in known:
                    yield (inner if inner in known else node.module), node.lineno
        elif isinstance(node, ast.Constant) and node.value in known and "." in node.value:
            # Without a dot it is any word, such as the folder `train` of images.
            yield node.value, node.lineno


def arrows(root: Path) -> dict[str, dict[str, int]]:
    """For every module those that it imports, with a line where it does."""
    known = modules(root)
    return {
        name: {other: line for other, line in imported(path, known) if other != name}
        for name, path in known.items()
    }


def layer_of(module: str) -> int:
    """Which of the layers a module belongs to."""
    names = [
        (len(name), number)
        for number, layer in enumerate(LAYERS)
        for name in layer
        if module == name or module.startswith(f"{name}.")
    ]
    return max(names)[1]


def room_of(module: str) -> str:
    """The name in its layer that a module belongs to."""
    layer = LAYERS[layer_of(module)]
    return max((n for n in layer if module == n or module.startswith(f"{n}.")), key=len)


def upward(graph: dict[str, dict[str, int]]) -> list[str]:
    """The imports that do not run down."""
    return [
        f"{module}:{line} imports {other}"
        for module, targets in graph.items()
        for other, line in targets.items()
        if room_of(module) != room_of(other) and layer_of(other) >= layer_of(module)
    ]


def circle(graph: dict[str, dict[str, int]]) -> list[str]:
    """The modules of one circle of imports; empty where there is none."""
    done: set[str] = set()
    for start in graph:
        trail: list[str] = []
        stack = [(start, iter(graph[start]))] if start not in done else []
        trail = [start]
        while stack:
            module, rest = stack[-1]
            following = next((other for other in rest if other not in done), None)
            if following is None:
                done.add(module)
                stack.pop()
                trail.pop()
            elif following in trail:
                return [*trail[trail.index(following) :], following]
            else:
                stack.append((following, iter(graph[following])))
                trail.append(following)
    return []


def test_imports_run_down_the_layers():
    assert upward(arrows(ROOT)) == []


def test_no_circle_of_imports():
    assert circle(arrows(ROOT)) == []


def test_nothing_imports_what_rewires_graphs():
    """It prunes nothing, and takes of a run no more than its folder."""
    graph = arrows(ROOT)
    importing = [
        (module, other)
        for module, targets in graph.items()
        for other in targets
        if other.startswith("train.graphs") != module.startswith("train.graphs")
        and module != "tpp.__main__"  # which starts it as a command
    ]
    assert [pair for pair in importing if pair[1].startswith("train.graphs")] == []
    taken = {".".join(other.split(".")[:2]) for _, other in importing if other.startswith("train")}
    # Of these the settings of checkpoints, the stop signals and their exit code.
    assert taken == {"train.run_folder", "train.monitor", "train.config", "train.distributed"}


def test_no_file_is_a_hallway():
    long = {
        name: lines
        for name, path in modules(ROOT).items()
        if not name.startswith("benchmarks")
        and (lines := len(path.read_text().splitlines())) > LARGEST_FILE
    }
    assert long == {}


@pytest.mark.parametrize(
    "text",
    [
        "from train.run import Run\n",
        "def late():\n    import train.run\n",
        "if TYPE_CHECKING:\n    from train import run\n",
        "importlib.import_module('train.run')\n",
    ],
)
def test_an_arrow_upward_is_seen_wherever_it_stands(tmp_path, text):
    for name in ("tpp/plan.py", "train/run.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "tpp" / "plan.py").write_text(text)
    (found,) = upward(arrows(tmp_path))
    assert found.startswith("tpp.plan:") and found.endswith("imports train.run")


def test_a_circle_is_seen_though_one_arrow_of_it_is_inside_a_function(tmp_path):
    (tmp_path / "tpp").mkdir()
    for name, text in {
        "a": "from tpp.b import x\n",
        "b": "from tpp.c import x\n",
        "c": "def f():\n    from tpp import a\n",
    }.items():
        (tmp_path / "tpp" / f"{name}.py").write_text(text)
    assert circle(arrows(tmp_path)) == ["tpp.a", "tpp.b", "tpp.c", "tpp.a"]
