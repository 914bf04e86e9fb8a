"""Files from strangers: nothing in them runs, opens another file, or asks the network."""

import ast
import copy
import json
import os
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from tpp.checkpoints.model_file import load_model, save_model
from tpp.checkpoints.sources import read_source
from tpp.checkpoints.torch_files import NeedsPickleError, load_torch
from tpp.common.errors import UserError, printable, run_command
from tpp.common.reading import DEEPEST, LARGEST, parse_json, read_json, read_text
from tpp.models.architecture import Architecture, build_model, build_on_meta, input_shape
from tpp.plan import PruningPlan

ROOT = Path(__file__).resolve().parents[2]


# What the sources may not call

_FORBIDDEN = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "marshal.loads"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.jit.load", "torch.hub.load"),
    *("torch.hub.load_state_dict_from_url", "shutil.unpack_archive"),
}


def dangers(source: str) -> list[str]:
    """Calls in a source that could run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        said = {word.arg: ast.unparse(word.value) for word in node.keywords}
        wrong = (
            name in _FORBIDDEN
            or (name == "torch.load" and said.get("weights_only") != "True")
            or (name == "yaml.load" and said.get("Loader") != "_Loader")
            or said.get("allow_pickle", "False") != "False"
            or said.get("shell", "False") != "False"
            or (name.endswith((".extractall", ".extract")) and said.get("filter") != "'data'")
        )
        if wrong:
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("folder", ["tpp", "train", "data_pipelines", "launch", "benchmarks"])
def test_no_source_calls_what_could_run_a_file(folder):
    found = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        if calls := dangers(path.read_text()):
            found[str(path.relative_to(ROOT))] = calls
    assert not found


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "pickle.load(file)",
        "tar.extractall(folder)",
        "eval(text)",
    ],
)
def test_a_dangerous_call_would_be_seen(call):
    assert len(dangers(f"def f():\n    {call}\n")) == 1


def test_the_allowed_spellings_are_allowed():
    for call in (
        "torch.load(path, weights_only=True)",
        "yaml.load(text, Loader=_Loader)",
        "tar.extractall(folder, filter='data')",
        "model.eval()",
    ):
        assert dangers(call) == []


# Architectures

BAD_ARGUMENTS = [
    ("timm:resnet18", {"pretrained": True}),
    ("timm:resnet18", {"pretrained_cfg": {"file": "FILE"}}),
    ("timm:resnet18", {"pretrained_cfg_overlay": {"file": "FILE"}}),
    ("timm:resnet18", {"checkpoint_path": "FILE"}),
    ("timm:resnet18", {"cache_dir": "FILE"}),
    ("timm:hf-hub:x/y", {}),
    ("timm:local-dir:FOLDER", {}),
    ("resnet18", {"weights": "DEFAULT"}),
    ("resnet18", {"weights_backbone": "DEFAULT"}),
]


def test_no_argument_opens_a_file_or_asks_the_network(tmp_path):
    """In a process of its own, for a hook that watches a process stays there."""
    (tmp_path / "weights.pth").write_bytes(b"x")
    script = textwrap.dedent("""
        import json, sys
        from tpp.common.errors import UserError
        from tpp.models.architecture import Architecture, build_model, build_on_meta
        import timm, accelerate
        build_on_meta(Architecture("timm:resnet18", 10))  # whatever is imported late is now there
        seen = []
        def watch(event, arguments):
            if event == "open" and "weights.pth" in str(arguments[0]):
                seen.append(str(arguments[0]))
            if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen"):
                seen.append(event)
        sys.addaudithook(watch)
        refused = 0
        for name, args in json.loads(sys.argv[1]):
            for build in (build_on_meta, lambda a: build_model(a.name, a.num_classes, **a.args)):
                try:
                    build(Architecture(name, 10, args))
                except UserError:
                    refused += 1
        open("weights.pth").close()
        print(json.dumps([refused, seen]))
    """)
    cases = json.dumps(BAD_ARGUMENTS).replace("FILE", str(tmp_path / "weights.pth"))
    done = subprocess.run(
        [sys.executable, "-c", script, cases.replace("FOLDER", str(tmp_path))],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # The one file that was opened is the test's own proof that the hook would have seen it.
    assert json.loads(done.stdout) == [2 * len(BAD_ARGUMENTS), ["weights.pth"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 10**15}, "no network has"),
        ({"num_classes": 0}, "no network has"),
        ({"num_classes": True}, "no network has"),
        ({"args": {"width": 10**9}}, "none that a network takes"),
        ({"args": {"width": float("nan")}}, "none that a network takes"),
        ({"args": {"a": [[{"b": -(10**9)}]]}}, "none that a network takes"),
        ({"args": {"a": [0] * 2000}}, "none that a network takes"),
    ],
)
def test_a_file_cannot_ask_for_what_no_network_is(change, message):
    data = Architecture("mlp7_linear", 10, {"width": 3}).to_dict()
    assert Architecture.from_dict(data).args == {"width": 3}
    with pytest.raises(UserError, match=message):
        Architecture.from_dict(data | change, source="x")


def test_a_network_without_end_is_not_built():
    with pytest.raises(UserError, match="more than 5,000 modules"):
        build_on_meta(Architecture("timm:vit_tiny_patch16_224", 10, {"depth": 2000}))
    build_on_meta(Architecture("resnet18", 10))  # the count begins anew


def test_a_network_of_wrong_weights_takes_no_memory():
    """Weights of 2 TiB, which build_model would have to have."""
    model = build_on_meta(Architecture("mlp7_linear", 10, {"width": 10**6}))
    assert sum(p.numel() for p in model.parameters()) > 5 * 10**12
    with pytest.raises(UserError, match="takes no images of"):
        input_shape("timm:resnet18", in_chans=10**7)


def test_what_a_network_computes_for_itself_is_bounded(tmp_path, monkeypatch):
    """A vision transformer with windows keeps positions that are in no file."""
    name, small = "timm:swin_tiny_patch4_window7_224", {"embed_dim": 32, "depths": [1, 1, 1, 1]}
    path = tmp_path / "swin.safetensors"
    save_model(path, build_model(name, 3, **small))
    loaded = load_model(path)
    fresh = build_model(name, 3, **small)
    buffers = dict(fresh.named_buffers())
    computed = [n for n, _ in fresh.named_buffers() if n not in fresh.state_dict()]
    assert computed
    for key in computed:
        assert torch.equal(loaded.get_buffer(key), buffers[key]), key
    monkeypatch.setattr("tpp.checkpoints.model_file._SMALL", -1000 * path.stat().st_size)
    with pytest.raises(UserError, match="too small for what could be left of it"):
        load_model(path)


# Files of torch.save


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.zeros(1).expand(2**40), "larger than the file"),
        (torch.empty(2**40, device="meta"), "on meta"),
        (torch.zeros(3).to_sparse(), "sparse"),
        (torch.zeros(3, dtype=torch.complex64), "complex"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_that_no_network_has(tensor, kind, legacy, tmp_path):
    path = tmp_path / "x.pth"
    torch.save(
        {"a": torch.zeros(2), "b": [{"c": tensor}]}, path, _use_new_zipfile_serialization=not legacy
    )
    with pytest.raises(UserError, match=f"x.pth: c is .*{kind}"):
        load_torch(path)


def test_tied_tensors_and_parameters_are_read(tmp_path):
    path = tmp_path / "x.pth"
    weight = nn.Parameter(torch.rand(1_000_000))
    torch.save({"a": weight, "b": weight, "c": weight.detach()[:10]}, path)
    found = load_torch(path)
    assert torch.equal(found["a"], weight) and torch.equal(found["c"], weight[:10])


def test_compressed_and_overlapping_entries_are_refused(tmp_path):
    """torch would read the one as it is, compressed, and inflate it where it is not mapped."""
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"y.pth: its entry .* is compressed"):
        load_torch(tmp_path / "y.pth")
    with zipfile.ZipFile(path, "a") as archive:  # the directory lists the large entry twice
        entry = next(entry for entry in archive.infolist() if entry.file_size == 4000)
        twin = copy.copy(entry)
        twin.filename = entry.filename.replace("/0", "/9")
        archive.filelist.append(twin)
        archive.writestr("x/more", b"")
    with pytest.raises(UserError, match="its entries overlap"):
        load_torch(path)


class Touch:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.processes
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_does_not_run(legacy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Touch()}, "x.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(NeedsPickleError, match=r"x.pth: holds (posix|os).system"):
        load_torch(Path("x.pth"))
    with pytest.raises(UserError, match=r"holds (posix|os).system"):
        read_source("x.pth")
    assert not Path("owned").exists()
    torch.load("x.pth", weights_only=False)
    assert Path("owned").exists()  # the file would have done it


# Text and JSON


def test_a_pipe_or_a_device_is_not_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a regular file"):
            read_text(path, "it")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UserError, match="loop: cannot read it"):
        read_text(loop, "it")


def test_a_file_is_read_up_to_its_bound(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[]" + " " * (LARGEST - 2))
    assert read_json(path, "it") == []
    path.write_text("[]" + " " * (LARGEST - 1))
    with pytest.raises(UserError, match="more than it can have"):
        read_json(path, "it")


def test_json_is_nested_up_to_its_bound():
    for depth in (DEEPEST - 1, DEEPEST):
        text = "[" * depth + "]" * depth
        assert parse_json(text, "x") == json.loads(text)
    for depth in (DEEPEST + 1, 100_000):
        with pytest.raises(UserError, match="x: not JSON that is read here"):
            parse_json("[" * depth + "]" * depth, "x")


def test_a_key_twice_is_refused():
    with pytest.raises(UserError, match="'b' is there twice"):
        parse_json('{"a": {"b": 1, "c": 2, "b": 3}}', "x")


@pytest.mark.parametrize("name", ["../x", "a/b", "a\\b", "a\0b", "a\nb", "\x1b[2J", "\u202e"])
def test_a_plan_names_no_paths(name, tmp_path):
    path = tmp_path / "plan.json"
    PruningPlan({"a.conv1": 3}, {"a.conv1": [1]}).save(path)
    path.write_text(path.read_text().replace('"a.conv1"', json.dumps(name)))
    with pytest.raises(UserError, match="no layer's name has such characters"):
        PruningPlan.load(path)


def test_a_plan_counts_no_more_filters_than_there_are():
    with pytest.raises(UserError, match="expected 1 to 1,048,576 filters"):
        PruningPlan({"a": 10**18}, {"a": [0]})


# What a terminal is shown


def test_messages_are_printable(capsys):
    def fail() -> None:
        raise UserError("x\x1b[31m\u202e\rpath: bad\nsecond" + "y" * 5000)

    with pytest.raises(SystemExit):
        run_command(fail)
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"error: x\x1b[31m\u202e\rpath: bad"
    assert len(second) < 1100 and second.startswith("error: secondyyy") and " ... " in second


def test_ordinary_text_is_shown_as_it_is():
    text = "models/größe-模型.safetensors: «x»"
    assert printable(text) == text and str(UserError(text)) == text
    assert str(UserError("\n".join("abc"))) == "a\nb\nc"
    assert str(UserError("\n".join(["x"] * 100))).splitlines()[-1] == "... and 71 more lines"
