"""The Hub: pushed, pulled and loaded through its HTTP interface on loopback."""

import json
import re
import shlex
import sys
import types
import warnings
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.utils._http
import pytest
import timm
import torch
from hub_server import READER, TOKEN
from huggingface_hub import ModelCard
from timm.models import save_for_hf

import tpp
from tpp import describe, latency, prune, pull, push
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import read_metadata, save_model
from tpp.checkpoints.sources import read_source
from tpp.common.errors import Note, UserError
from tpp.common.hub import CARD, CONFIG, WEIGHTS
from tpp.models.architecture import Architecture, build_model
from tpp.models.preparation import assumed_preparation
from tpp.plan import PruningPlan
from train import evaluate

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"image_size": 32, "resize": None, "mean": [0.5], "std": [0.2], "channels": 3}
NAME = "me/small"


@pytest.fixture(autouse=True)
def _notes_are_notes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        yield


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A pruned network in a file."""
    torch.manual_seed(0)
    plan = PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [0, 3, 5]})
    pruned = prune_model(build_model("cifar_resnet8", 10), plan)
    path = tmp_path_factory.mktemp("pruned") / "small.safetensors"
    save_model(path, pruned, preprocessing=IMAGES, extra={"classes": [*"abcdefghij"]})
    return path


def refused(call, *arguments):
    """The one line that a call ends in."""
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message and TOKEN not in message
    return message


def test_what_is_pushed_comes_back_to_the_bit(file, tmp_path, hub_service, monkeypatch, capsys):
    push.main([str(file), NAME, "--license", "mit", "--message", "first"])
    said = capsys.readouterr().out
    commit = re.search(rf"made, and wrote hf-hub:{NAME}@([0-9a-f]{{40}})\n", said)[1]
    assert commit == hub_service.repositories[NAME].branches["main"]
    assert hub_service.repositories[NAME].messages == ["initial commit", "first"]
    assert hub_service.files(NAME).keys() == {".gitattributes", WEIGHTS, CONFIG, CARD}
    assert hub_service.files(NAME)[WEIGHTS] == file.read_bytes()
    pull.main([NAME, "--output", str(tmp_path / "new" / "back.safetensors")])
    assert f"hf-hub:{NAME}@{commit}: " in capsys.readouterr().out
    assert (tmp_path / "new" / "back.safetensors").read_bytes() == file.read_bytes()
    images = torch.randn(2, 3, 32, 32)
    with pytest.warns(Note, match=rf"^hf-hub:{NAME}@main: is commit {commit}$"):
        found = tpp.load_model(f"hf-hub:{NAME}@main")
    assert found(images).equal(tpp.load_model(file)(images))
    # Nobody is asked for a commit that is here, and offline for no branch that was.
    hub_service.asked.clear()
    tpp.load_model(f"hf-hub:{NAME}@{commit}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert tpp.load_model(f"hf-hub:{NAME}")(images).equal(found(images))
    assert hub_service.asked == []
    said = refused(tpp.load_model, f"hf-hub:{NAME}@v7")
    assert "is not in the cache" in said and "HF_HUB_OFFLINE is set" in said
    assert said.endswith(f": tpp pull {NAME}@v7 --output FILE")
    assert "HF_HUB_OFFLINE is set" in refused(push.main, [str(file), NAME])
    assert hub_service.asked == []


def test_commands_take_a_repository_in_place_of_a_file(file, tmp_path, hub_service, capsys):
    push.main([str(file), NAME])
    commit = hub_service.repositories[NAME].branches["main"]
    capsys.readouterr()
    describe.main([f"hf-hub:{NAME}"])
    assert f"checkpoint  hf-hub:{NAME}@{commit}" in capsys.readouterr().out
    out = tmp_path / "out.safetensors"
    words = ["--ratio", "layer2*.conv1=0.5", "--output", str(out)]
    prune.main(["--checkpoint", f"hf-hub:{NAME}@main", *words])
    assert tpp.load_model(out).layer2[0].conv1.out_channels == 16
    assert read_metadata(out).extra["pruned_from"]["file"] == f"small@{commit}"
    with pytest.raises(UserError, match=r"hf-hub:me: expected OWNER/NAME or OWNER/NAME@REVISION"):
        describe.main(["hf-hub:me"])


def test_a_repository_of_timms_form_is_read_as_its_folder_is(tmp_path, hub_service, capsys):
    network = timm.create_model("test_resnet", num_classes=7)
    save_for_hf(network, tmp_path / "timm", safe_serialization=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "timm").iterdir()}
    commit = hub_service.keep("timm/x", files)
    describe.main(["hf-hub:timm/x@main"])
    assert "timm:test_resnet, 7 classes" in capsys.readouterr().out
    said = refused(pull.main, ["timm/x", "--output", str(tmp_path / "x.safetensors")])
    assert said.startswith(f"hf-hub:timm/x@{commit}: its {WEIGHTS} is no checkpoint of tpp's")
    line = said.partition("make one of it: tpp prune ")[2]
    prune.main(shlex.split(line.replace("NEW", str(tmp_path / "new"))))
    found = tpp.load_model(tmp_path / "new.safetensors")
    assert found.fc.weight.equal(network.fc.weight)


def test_what_is_there_stays_unless_it_is_to_be_replaced(file, hub_service):
    theirs = {CARD: b"# mine\n", "notes.txt": b"kept", ".gitattributes": b""}
    before = hub_service.keep(NAME, theirs)
    said = refused(push.main, [str(file), NAME])
    assert f"hf-hub:{NAME}@main: holds {CARD} already" in said and "--overwrite" in said
    assert "--private does not change" in refused(push.main, [str(file), NAME, "--private"])
    assert hub_service.files(NAME) == theirs
    push.main([str(file), NAME, "--branch", "v2", "--overwrite"])
    assert hub_service.files(NAME) == theirs
    assert hub_service.files(NAME, "v2")["notes.txt"] == b"kept"
    assert tpp.load_model(f"hf-hub:{NAME}@v2").architecture.name == "cifar_resnet8"
    assert "has no revision v3" in refused(tpp.load_model, f"hf-hub:{NAME}@v3")
    assert f"holds no {WEIGHTS}" in refused(tpp.load_model, f"hf-hub:{NAME}@{before}")


def test_a_new_branch_holds_what_is_pushed_in_place_of_mains(file, hub_service, capsys):
    theirs = {CARD: b"# mine\n", WEIGHTS: b"another's", "notes.txt": b"kept"}
    hub_service.keep(NAME, theirs)
    push.main([str(file), NAME, "--branch", "a/v2"])
    assert capsys.readouterr().out.endswith(f"\n{hub_service.url}/{NAME}/tree/a%2Fv2\n")
    found = hub_service.files(NAME, "a/v2")
    assert found[WEIGHTS] == file.read_bytes() and found["notes.txt"] == b"kept"
    assert hub_service.files(NAME) == theirs
    text = found[CARD].decode()
    assert f'tpp.load_model("hf-hub:{NAME}@a/v2")' in text
    assert f"tpp pull {NAME}@a/v2 --output" in text
    # Now it is there, and what it holds counts.
    said = refused(push.main, [str(file), NAME, "--branch", "a/v2", "--accuracy", "another"])
    assert said.startswith(f"hf-hub:{NAME}@a/v2: holds {CARD} already")


@pytest.mark.parametrize("words", [["--private"], ["--license", "of my own"]])
def test_what_is_refused_leaves_nothing_behind(file, hub_service, words):
    hub_service.keep(NAME, {})
    said = refused(push.main, [str(file), NAME, "--branch", "v2", *words])
    assert said.startswith(f"hf-hub:{NAME}@v2: ") and words[0] in said
    assert hub_service.repositories[NAME].branches.keys() == {"main"}


def test_the_same_again_is_no_commit(file, hub_service, capsys):
    for expected in (1, 1):
        push.main([str(file), NAME])
        assert len(hub_service.repositories[NAME].messages) == 1 + expected
    assert "all of it was there already" in capsys.readouterr().out


def test_a_private_repository_is_made_and_read_with_a_token(file, hub_service, monkeypatch):
    push.main([str(file), NAME, "--private"])
    assert hub_service.repositories[NAME].private
    tpp.load_model(f"hf-hub:{NAME}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "another")
    monkeypatch.delenv("HF_TOKEN")
    said = refused(tpp.load_model, f"hf-hub:{NAME}")
    assert said.endswith("there is no such repository, or it is private, and HF_TOKEN unset")
    assert not Path("another").exists()


def test_a_dry_run_without_a_token_shows_the_card_and_asks_nobody(
    file, hub_service, monkeypatch, capsys
):
    monkeypatch.delenv("HF_TOKEN")
    push.main([str(file), NAME, "--dry-run"])
    said = capsys.readouterr().out
    assert f"would write hf-hub:{NAME}@main: {WEIGHTS}, " in said and "\n# small\n" in said
    assert "note: the Hub was not asked whether it refuses this: " in said
    assert "HF_TOKEN is not set" in said
    assert hub_service.asked == []


def test_a_dry_run_is_refused_where_the_push_is(file, hub_service, monkeypatch, capsys):
    """Each by the same line, and nothing is made for it."""
    arguments = [str(file), NAME]
    push.main([*arguments, "--branch", "v2", "--dry-run"])
    assert "note: the Hub was not asked" not in capsys.readouterr().out
    assert hub_service.repositories == {}
    hub_service.keep(NAME, {CARD: b"# mine\n"})
    cases = ([], ["--private"], ["--license", "of my own"])
    said = [refused(push.main, [*arguments, *words, "--dry-run"]) for words in cases]
    assert said == [refused(push.main, [*arguments, *words]) for words in cases]
    assert "would write" not in capsys.readouterr().out
    push.main([*arguments, "--branch", "v2", "--dry-run"])
    assert f"would write hf-hub:{NAME}@v2: {WEIGHTS}, " in capsys.readouterr().out
    assert hub_service.repositories[NAME].branches.keys() == {"main"}
    hub_service.fail("/api/", 503)
    push.main([*arguments, "--dry-run"])
    said = capsys.readouterr().out
    assert "note: the Hub was not asked whether it refuses this: " in said and ": 503)" in said
    assert f"would write hf-hub:{NAME}@main: {WEIGHTS}, " in said


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, r"HF_TOKEN is not set: export HF_TOKEN=\.\.\. with a token that may write"),
        (READER, r"the token in HF_TOKEN may not write it; make one that may: https://"),
        ("hf_nobody_knows", r"the Hub does not take the token in HF_TOKEN; make another: https://"),
        ("hf_two\nlines", r"^HF_TOKEN: holds a blank, a line break or other letters"),
    ],
)
def test_tokens_are_of_the_environment_and_never_shown(
    file, hub_service, monkeypatch, capsys, token, message
):
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    said = refused(push.main, [str(file), NAME])
    assert re.search(message, said), said
    shown = said + "".join(capsys.readouterr())
    assert token is None or not any(part in shown for part in (token, repr(token), "hf_two"))
    assert hub_service.repositories == {}


def test_a_hub_that_fails_for_a_while_is_asked_again(file, tmp_path, hub_service):
    hub_service.fail("GET /api/models", 503, times=2)
    hub_service.fail("POST /api/repos/create", 429, times=2)
    hub_service.fail("POST /api/models/.*/commit", 0, times=1)  # the connection is broken off
    push.main([str(file), NAME])
    assert hub_service.files(NAME)[WEIGHTS] == file.read_bytes()
    assert len(hub_service.repositories[NAME].messages) == 2


def test_a_hub_that_goes_on_failing_ends_in_one_line(file, tmp_path, hub_service, monkeypatch):
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    hub_service.fail("/api/repos/create", 500)
    said = refused(push.main, [str(file), NAME])
    assert (
        said == f"hf-hub:{NAME}@main: the Hub fails ({hub_service.url}: 500), also when asked "
        "again; try again later"
    )
    assert hub_service.asked.count("POST /api/repos/create") == 4
    out = tmp_path / "x.safetensors"
    hub_service.keep(NAME, {WEIGHTS: file.read_bytes()})
    hub_service.fail("HEAD ", 503)
    assert "the Hub fails" in refused(pull.main, [NAME, "--output", str(out)])
    assert len(hub_service.asked) < 30 and not out.exists()
    hub_service.faults.clear()
    hub_service.fail("/commit/", 412)
    hub_service.keep("me/other", {})
    said = refused(push.main, [str(file), "me/other"])
    assert "was changed by somebody else meanwhile; nothing was written" in said
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in refused(push.main, [str(file), NAME])
    assert "http://127.0.0.1:9 cannot be reached (" in refused(tpp.load_model, f"hf-hub:{NAME}")


def flipped(data):
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


@pytest.mark.parametrize("damage", [flipped, lambda data: data[: len(data) // 2]])
def test_what_was_damaged_on_the_way_is_not_kept(file, tmp_path, hub_service, monkeypatch, damage):
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    hub_service.keep(NAME, {WEIGHTS: file.read_bytes()})
    hub_service.damage = damage
    out = tmp_path / "x.safetensors"
    said = refused(pull.main, [NAME, "--output", str(out)])
    assert said.startswith(f"hf-hub:{NAME}: "), said
    assert not out.exists()
    hub_service.damage = None
    pull.main([NAME, "--output", str(out)])
    assert out.read_bytes() == file.read_bytes()


# The card


def test_the_card_of_a_stage_says_what_its_run_found(tmp_path, hub_service):
    run = tmp_path / "runs" / "own"
    torch.manual_seed(0)
    plan = PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [*range(8)]})
    pruned = prune_model(build_model("cifar_resnet8", 10), plan)
    path = run / "finetune" / WEIGHTS
    extra = {"run": "own", "stage": "finetune", "accuracy": {"top1": 1.0, "images": 2}}
    save_model(path, pruned, preprocessing=IMAGES, extra=extra)
    stage = {"kind": "finetune", "title": "TPP", "top1": 91.6, "top5": 99.8, "images": 1000}
    dense = {"top1": 92.3, "top5": 99.4}
    results = {"name": "own", "seed": 3, "dense": dense, "stages": {"finetune": stage}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.yaml").write_text(
        "method: {name: tpp, weight: 5.0}\npruning: {ratios: {layer*.conv1: 0.5}, criterion: l2}\n"
        "model: {name: cifar_resnet8, checkpoint: 'timm:small.a1'}\n"
    )
    timed = tmp_path / "latency.json"
    latency.main([str(path), "--json", str(timed), "--threads=1", "--repeats=2", "--warmup=0"])
    push.main([str(path), NAME, "--dataset", "cifar10", "--latency", str(timed)])
    text = hub_service.files(NAME)[CARD].decode()
    said = ModelCard(text).data.to_dict()
    assert (
        said["tags"][:2] == ["tpp", "pruning"] and "trainability-preserving-pruning" in said["tags"]
    )
    assert said["base_model"] == "timm/small.a1" and said["datasets"] == ["cifar10"]
    assert "license" not in said and said["pipeline_tag"] == "image-classification"
    found = ModelCard(text).data.eval_results
    assert [(r.metric_name, r.metric_value) for r in found] == [("top-1", 91.6), ("top-5", 99.8)]
    assert (
        "top-1 91.60 %, top-5 99.80 %, measured over 1,000 images by stage finetune of the run own "
        "(its results.json). The dense network of the run: top-1 92.30 %, top-5 99.40 %." in text
    )
    for row in (
        "| method | TPP |",
        "| criterion | l2 |",
        "| ratios | layer*.conv1: 0.5 |",
        "| `layer1.0.conv1` | 8 of 16 |",
        f"| parameters | {sum(p.numel() for p in pruned.parameters()):,} |",
    ):
        assert row in text, row
    measured = json.loads(timed.read_text())["results"][-1]
    assert f"| {WEIGHTS} | 1 | {measured['median_ms']:.3f} | " in text
    assert str(tmp_path) not in text


def stage_card(folder, name, model, hub_service, **more):
    """The card of a stage of the run in a folder."""
    path = folder / name / WEIGHTS
    save_model(path, model, preprocessing=IMAGES, extra={"run": "own", "stage": name}, **more)
    push.main([str(path), f"me/{name}"])
    return hub_service.files(f"me/{name}")[CARD].decode()


def test_the_card_of_a_stage_says_nothing_of_those_after_it(tmp_path, hub_service):
    run = tmp_path / "runs" / "own"
    run.mkdir(parents=True)
    inputs = {"dense": None, "measured": "dense", "prune": "dense", "finetune": "prune"}
    stages = {name: {"kind": name, "input": before} for name, before in inputs.items()}
    (run / "results.json").write_text(json.dumps({"name": "own", "seed": 3, "stages": stages}))
    (run / "config.yaml").write_text("method: {name: tpp}\npruning: {ratios: {layer*: 0.5}}\n")
    network = build_model("cifar_resnet8", 10)
    text = stage_card(run, "dense", network, hub_service)
    assert ": not pruned, " in text
    assert "| pruned by | nothing: every filter and weight is there |" in text
    for word in ("| method |", "| criterion |", "| ratios |", "| stages |", "trainability-pres"):
        assert word not in text, word
    mask = {"mask": {"conv1.weight": torch.ones_like(network.conv1.weight, dtype=torch.bool)}}
    text = stage_card(run, "prune", network, hub_service, companions=mask)
    assert ": no filters removed, but weights masked to zero, " in text
    assert "| method | tpp |" in text and "| stages | dense, prune |" in text
    plan = PruningPlan({"layer1.0.conv1": 16}, {"layer1.0.conv1": [*range(8)]})
    text = stage_card(run, "finetune", prune_model(network, plan), hub_service)
    assert "| ratios | layer*: 0.5 |" in text and "| stages | dense, prune, finetune |" in text


def test_the_card_of_a_file_alone_says_what_nobody_measured(file, tmp_path, hub_service):
    push.main([str(file), NAME])
    text = hub_service.files(NAME)[CARD].decode()
    assert text.count("Not measured.") == 2 and "| pruned by | not recorded in the file |" in text
    assert "model-index" not in text and "metrics" not in text
    words = ["--accuracy", "75.6 | <b>top-1", "--pruned-by", "L1", "--license", "mit"]
    push.main([str(file), NAME, *words, "--overwrite"])
    text = hub_service.files(NAME)[CARD].decode()
    assert "As who uploaded it says: 75.6 \\| &lt;b>top-1" in text and "| pruned by | L1 |" in text
    assert ModelCard(text).data.license == "mit"
    timed = tmp_path / "latency.json"
    row = {"parameters": 1, "macs": 2, "network": "x", "dense": "x", "batch": 1}
    timed.write_text(json.dumps({"results": [row]}))
    said = refused(push.main, [str(file), NAME, "--latency", str(timed)])
    assert f"--latency {timed}: has no row of this network" in said


def test_only_a_checkpoint_of_ours_is_pushed(tmp_path, hub_service):
    torch.save(build_model("cifar_resnet8", 10).state_dict(), tmp_path / "x.pth")
    said = refused(push.main, [str(tmp_path / "x.pth"), NAME])
    assert "make one of it: tpp prune" in said
    assert hub_service.asked == []


# torch.hub


def test_entry_points_of_torch_hub(file, hub_service):
    images = torch.randn(1, 3, 32, 32)
    truth = tpp.load_model(file)(images)
    found = torch.hub.load(str(ROOT), "pruned", source="local", checkpoint=str(file))
    assert found(images).equal(truth)
    push.main([str(file), NAME])
    found = torch.hub.load(str(ROOT), "hf_hub", NAME, source="local")
    assert found(images).equal(truth)


# The authors' checkpoints


def test_the_authors_checkpoint_converts_by_the_command_of_the_page(tmp_path, monkeypatch):
    """A pruned network, pickled whole, of a class whose module is not here."""
    page = (ROOT / "docs/checkpoints.md").read_text()
    line = next(row for row in page.splitlines() if row.startswith("tpp prune ckpt_best.pth"))
    layers = {"layer1.0.conv1": 64, "layer4.1.conv1": 512}
    plan = PruningPlan(layers, {name: [1, 2, 5] for name in layers})
    pruned = prune_model(build_model("resnet18", 10), plan)
    of_theirs = type("ResNet", (type(pruned),), {"__module__": "authors_model"})
    pruned.__class__ = of_theirs
    pruned.empty = b""  # which this pickle spells as a call
    with monkeypatch.context() as patch:
        module = types.ModuleType("authors_model")
        module.ResNet = of_theirs
        patch.setitem(sys.modules, "authors_model", module)
        content = {"arch": "resnet18", "model": torch.nn.DataParallel(pruned), "acc1": 75.6}
        torch.save(content, tmp_path / "ckpt_best.pth")
    with pytest.raises(ModuleNotFoundError):
        torch.load(tmp_path / "ckpt_best.pth", weights_only=False)
    monkeypatch.chdir(tmp_path)
    prune.main(shlex.split(line.removeprefix("tpp prune ").replace("resnet50", "resnet18")))
    found = tpp.load_model("tpp_resnet18.safetensors")
    images = torch.randn(1, 3, 64, 64)
    assert found(images).equal(pruned.eval()(images))
    assert found.layer4[1].conv1.out_channels == 509


@pytest.mark.parametrize("page", ["docs/checkpoints.md", "docs/hub.md"])
def test_the_page_says_how_the_authors_prepared_images(page):
    """Their files do not, and what is assumed for a resnet50 is not what they did."""
    text = (ROOT / page).read_text()
    found = re.search(r"^tpp prune ckpt_best.*--output (\S+)\n(tpp evaluate .*)", text, re.M)
    assert found, "no command to evaluate what tpp prune wrote"
    options = evaluate.make_parser().parse_args(shlex.split(found[2], comments=True)[2:])
    assert str(options.checkpoint) == found[1] and options.resize == 256
    assert assumed_preparation(Architecture("resnet50", 1000)).values["resize"] == 232


def test_every_part_of_the_page_of_checkpoints_has_its_heading():
    parts = re.split(r"\n## (.+)\n", (ROOT / "docs/checkpoints.md").read_text())
    texts = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert "`tpp prune`, `sparsify`, `survey`" in texts["What commands read"]
    assert not any("\n\n\n" in text for text in texts.values())


class Called:
    def __reduce__(self):
        return print, ("called",)


def test_a_network_in_which_something_is_to_be_called_is_refused(tmp_path, capsys):
    network = build_model("cifar_resnet8", 10)
    network.called = Called()
    torch.save(network, tmp_path / "x.pth")
    said = refused(read_source, tmp_path / "x.pth")
    assert "holds builtins.print, and reading that could run any code" in said
    assert capsys.readouterr().out == ""


def test_a_network_that_holds_itself_is_refused(tmp_path):
    network = build_model("cifar_resnet8", 10)
    network.layer1.add_module("again", network.layer1)
    torch.save({"model": network}, tmp_path / "x.pth")
    said = refused(read_source, tmp_path / "x.pth")
    assert said.endswith("x.pth: its network holds modules in too many places")
