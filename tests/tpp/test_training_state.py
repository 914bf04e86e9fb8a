"""A training checkpoint comes back bit for bit, or is known to be damaged."""

import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from tpp.checkpoints import training_state
from tpp.checkpoints.training_state import (
    DamagedState,
    TrainingState,
    check_state,
    read_notes,
    read_state,
    state_folder,
    state_folders,
    write_state,
)
from tpp.common import files
from tpp.common.errors import UserError

JSON_FILES = ("manifest.json", "state.json")
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
ALL_FILES = JSON_FILES + TENSOR_FILES
DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
)
# On a file system in memory, if there is one, a sync costs nothing.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def small_state(step=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 2, generator=generator)
    return TrainingState(
        step=step,
        model={"conv.weight": weight, "conv.bias": torch.zeros(2)},
        optimizer={
            "state": {0: {"momentum_buffer": weight / 3, "step": torch.tensor(2.0)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1]}],
        },
        extra={"elapsed": 1 / 3, "seed": seed},
        architecture={"name": "mlp7_linear", "num_classes": 10, "args": {}},
        number=2,
        score=50.5,
    )


@pytest.fixture
def checkpoint(tmp_path):
    path = state_folder(tmp_path / "checkpoints", 7)
    write_state(path, small_state())
    return path


def as_bits(value):
    """Plain data of which equal parts are equal bit for bit, dtypes and NaN included."""
    if isinstance(value, torch.Tensor):
        raw = value.contiguous().reshape(-1).view(torch.uint8)
        return str(value.dtype), tuple(value.shape), bytes(raw.tolist())
    if isinstance(value, dict):
        return {key: as_bits(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [as_bits(member) for member in value]
    if isinstance(value, float):
        return "nan" if math.isnan(value) else struct.pack(">d", value)
    return type(value).__name__, value


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    size = math.prod(shape) * torch.tensor([], dtype=dtype).element_size()
    values = st.integers(0, 1) if dtype == torch.bool else st.integers(0, 255)
    raw = draw(st.lists(values, min_size=size, max_size=size))
    tensor = torch.tensor(raw, dtype=torch.uint8).view(dtype).reshape(shape)
    return tensor.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else tensor


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
PLAIN = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)
STATES = st.builds(
    TrainingState,
    step=st.integers(0, 10**9),
    model=st.dictionaries(NAMES, tensors(), max_size=4),
    optimizer=st.fixed_dictionaries(
        {
            "state": st.dictionaries(
                st.integers(0, 20),
                st.dictionaries(NAMES | st.just("a.b..c"), tensors() | LEAVES, max_size=3),
                max_size=3,
            ),
            "param_groups": st.lists(st.dictionaries(NAMES, PLAIN, max_size=3), max_size=2),
        }
    ),
    extra=st.dictionaries(NAMES, PLAIN, max_size=3),
    architecture=st.none() | st.dictionaries(NAMES, PLAIN, max_size=3),
    number=st.integers(0, 1000),
    score=st.none() | st.floats(),
)


@given(state=STATES)
@settings(max_examples=40, deadline=None)
def test_every_state_comes_back_bit_for_bit_and_is_written_the_same_way_again(state):
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        first, second = (state_folder(Path(folder) / name, state.step) for name in "ab")
        written = write_state(first, state)
        found = read_state(first)
        assert as_bits(vars(found)) == as_bits(vars(state))
        assert check_state(first) == state.step
        assert as_bits(read_notes(first)) == as_bits((state.number, state.score))
        write_state(second, found)
        assert contents(first) == contents(second)
        assert written == sum(len(content) for content in contents(first).values())
        assert load_file(first / "model.safetensors").keys() == state.model.keys()


@pytest.mark.parametrize("key", ["a.b", "a.b..c", ".", "0.1", ""])
def test_an_optimisers_keys_may_have_dots(tmp_path, key):
    path, state = state_folder(tmp_path, 7), {3: {key: torch.ones(2)}, 10: {key: 0.5}}
    optimizer = {"state": state, "param_groups": []}
    write_state(path, replace(small_state(), optimizer=optimizer))
    assert as_bits(read_state(path).optimizer) == as_bits(optimizer)


def test_tied_and_overlapping_tensors_are_each_written(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    model = {"a": weight, "tied": weight, "row": weight[1], "same": weight[:1].expand(2, 3)}
    path = state_folder(tmp_path, 7)
    write_state(path, replace(small_state(), model=model))
    assert as_bits(read_state(path).model) == as_bits(model)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.AdamW(p, 0.01, betas=(0.8, 0.99)),
    ],
)
def test_an_optimiser_goes_on_as_if_nothing_had_been(tmp_path, make):
    parameters = [torch.ones(4, requires_grad=True), torch.ones(2, 2, requires_grad=True)]
    unused = torch.ones(3, requires_grad=True)  # has no state
    optimizer = make([*parameters, unused])

    def step(optimizer, parameters):
        optimizer.zero_grad()
        sum((p**3).sum() for p in parameters).backward()
        optimizer.step()

    step(optimizer, parameters)
    path = state_folder(tmp_path, 7)
    write_state(path, replace(small_state(), optimizer=optimizer.state_dict()))
    copies = [p.detach().clone().requires_grad_() for p in parameters]
    resumed = make([*copies, unused])
    resumed.load_state_dict(read_state(path).optimizer)
    for _ in range(3):
        step(optimizer, parameters)
        step(resumed, copies)
    assert as_bits(copies) == as_bits(parameters)


READS = (read_state, check_state)


def refused(path, name, ways=READS):
    """A damaged checkpoint is read by no way, and the message names the file."""
    for read in ways:
        with pytest.raises(DamagedState) as caught:
            read(path)
        message = str(caught.value)
        assert str(path / name) in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(("name", "bits"), [("manifest.json", range(8)), ("state.json", (0, 5))])
def test_a_bit_flipped_at_any_place_of_the_json_is_seen(checkpoint, name, bits):
    whole = (checkpoint / name).read_bytes()
    with (checkpoint / name).open("r+b", buffering=0) as file:
        for place, bit in product(range(len(whole)), bits):
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << bit)]))
            refused(checkpoint, name, ways=READS[bit % 2 :][:1])
            file.seek(place)
            file.write(whole[place : place + 1])
    assert read_state(checkpoint).step == 7


@pytest.mark.parametrize("name", JSON_FILES)
def test_any_beginning_of_the_json_is_seen(checkpoint, name):
    whole = (checkpoint / name).read_bytes()
    for length in range(len(whole)):
        (checkpoint / name).write_bytes(whole[:length])
        refused(checkpoint, name)


@pytest.fixture(scope="module")
def kept_checkpoint(tmp_path_factory):
    path = state_folder(tmp_path_factory.mktemp("states"), 7)
    write_state(path, small_state())
    return path


@given(name=st.sampled_from(TENSOR_FILES), place=st.floats(0, 1, exclude_max=True), data=st.data())
@settings(max_examples=120, deadline=None)
def test_a_bit_flipped_in_the_tensors_or_any_beginning_of_them_is_seen(
    kept_checkpoint, name, place, data
):
    whole = (kept_checkpoint / name).read_bytes()
    index = int(place * len(whole))
    flipped = bytes([whole[index] ^ (1 << data.draw(st.integers(0, 7)))])
    ways = (whole[:index] + flipped + whole[index + 1 :], whole[:index], whole + flipped)
    (kept_checkpoint / name).write_bytes(data.draw(st.sampled_from(ways)))
    try:
        refused(kept_checkpoint, name)
    finally:
        (kept_checkpoint / name).write_bytes(whole)
    assert read_state(kept_checkpoint).step == 7


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_file_that_is_missing_or_a_folder_is_seen(checkpoint, name):
    (checkpoint / name).unlink()
    refused(checkpoint, name)
    (checkpoint / name).mkdir()
    refused(checkpoint, name)


@pytest.mark.parametrize("name", ["model.safetensors.old", ".hidden", "MANIFEST.json"])
def test_a_file_too_many_is_seen(checkpoint, name):
    (checkpoint / name).touch()
    refused(checkpoint, name)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_file_of_another_checkpoint_is_seen(checkpoint, name):
    other = state_folder(checkpoint.parent, 8)
    write_state(other, small_state(step=8, seed=1))
    for path, step in ((checkpoint, 7), (other, 8)):
        assert check_state(path) == step
    shutil.copy(other / name, checkpoint / name)
    with pytest.raises(DamagedState, match=r"step-00000007/.*\.(json|safetensors): "):
        read_state(checkpoint)


def test_a_checkpoint_under_the_name_of_another_step_is_seen(checkpoint):
    wrong = checkpoint.rename(state_folder(checkpoint.parent, 8))
    with pytest.raises(DamagedState, match=r"manifest\.json: is of step 7, not of step-00000008"):
        read_state(wrong)
    # A name that says no step contradicts nothing, and neither does a link.
    copy = wrong.rename(checkpoint.parent / "before the change")
    assert read_state(copy).step == 7
    copy.rename(checkpoint)
    (checkpoint.parent / "latest").symlink_to(checkpoint.name)
    assert read_state(checkpoint.parent / "latest").step == 7


def test_another_file_or_nothing_in_place_of_the_folder(tmp_path):
    path = state_folder(tmp_path, 7)
    with pytest.raises(DamagedState, match="missing"):
        read_state(path)
    path.touch()
    with pytest.raises(DamagedState, match="missing"):
        read_state(path)


def with_manifest(path, **changes):
    """Rewrite a manifest as a program that writes other ones would, with its hash right."""
    content = json.loads((path / "manifest.json").read_text())
    del content["sha256"]
    content |= changes

    def encoded(content):
        return (json.dumps(content, indent=1) + "\n").encode()

    digest = hashlib.sha256(encoded(content)).hexdigest()
    (path / "manifest.json").write_bytes(encoded({**content, "sha256": digest}))


def test_a_newer_version_is_not_taken_for_damage(checkpoint):
    with_manifest(checkpoint, version=3, more={"files": []})
    (checkpoint / "another.file").touch()
    for read in (read_state, check_state, read_notes):
        with pytest.raises(UserError, match=r"manifest\.json: .* version 3, this is version 2; go"):
            read(checkpoint)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 1},
        {"version": "3"},
        {"format": "another"},
        {"more": 1},
        {"files": {}},
        {"files": None},
        {"files": {name: {} for name in ("state.json", *TENSOR_FILES)}},
        {"files": {name: None for name in ("state.json", *TENSOR_FILES)}},
        {"step": "7"},
        {"step": 8},
        {"step": None},
    ],
)
def test_a_manifest_that_nobody_wrote_is_refused(checkpoint, changes):
    with_manifest(checkpoint, **changes)
    with pytest.raises(DamagedState):
        read_state(checkpoint)
    with pytest.raises(DamagedState):
        check_state(checkpoint)


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": 7}', "nothing", "[" * 100_000])
def test_files_that_nobody_wrote_are_refused_though_their_hashes_fit(checkpoint, text):
    (checkpoint / "state.json").write_text(text)
    entry = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    entries = json.loads((checkpoint / "manifest.json").read_text())["files"]
    with_manifest(checkpoint, files={**entries, "state.json": entry})
    for read in (read_state, read_notes):
        with pytest.raises(DamagedState, match="whole, but not as"):
            read(checkpoint)


def test_version_1_is_not_taken_for_damage(tmp_path):
    path = state_folder(tmp_path, 7)
    path.mkdir()
    content = {"version": 1, "step": 7, "architecture": None, "optimizer": {}, "extra": {}}
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"state\.json: .* version 1, .*finish .* or delete"):
        read_state(path)


def test_folders_newest_first(tmp_path):
    assert state_folders(tmp_path / "nothing") == []
    steps = (5, 99_999_999, 100_000_000, 20)
    for step in steps:
        state_folder(tmp_path, step).mkdir()
    (tmp_path / "latest").symlink_to("step-00000020")
    for name in ("step-7", "step-000000007", ".step-00000007.1.tmp", "step-00000007x", "step-"):
        (tmp_path / name).mkdir()
    assert [path.name for path in state_folders(tmp_path)] == [
        *("step-100000000", "step-99999999", "step-00000020", "step-00000005")
    ]
    (tmp_path / "file").touch()
    assert state_folders(tmp_path / "file") == []


# ---- writing ----


def test_every_byte_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    """What a power cut leaves cannot be tried here; the order of the system calls can."""
    target = state_folder(tmp_path / "checkpoints", 7)
    fsync, before, after = os.fsync, set(), set()

    def record(descriptor):
        (after if target.exists() else before).add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    write_state(target, small_state())
    inodes = {path.stat().st_ino for path in (*target.iterdir(), target)}
    assert inodes <= before and tmp_path.stat().st_ino in before
    assert after == {target.parent.stat().st_ino}


def test_only_the_checkpoints_folder_itself_is_made(tmp_path):
    target = state_folder(tmp_path / "gone" / "stage" / "checkpoints", 7)
    with pytest.raises(UserError, match=r"the folder .*checkpoints has vanished"):
        write_state(target, small_state())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_json_leaves_nothing(checkpoint):
    target = state_folder(checkpoint.parent, 8)
    with pytest.raises(TypeError):
        write_state(target, replace(small_state(8), extra={"method": torch.zeros(2)}))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_disk_that_keeps_other_bytes_than_it_was_given_is_seen(checkpoint, monkeypatch, name):
    """What is read back is compared with what was in memory, not with itself."""

    def spoil(path):
        if path.name == name:
            raw = bytearray(path.read_bytes())
            raw[-9] ^= 4
            path.write_bytes(raw)

    monkeypatch.setattr(training_state, "forget", spoil)
    target = state_folder(checkpoint.parent, 8)
    with pytest.raises(UserError, match=rf"{target.name}: cannot write .* does not read back"):
        write_state(target, small_state(8))
    assert list(checkpoint.parent.iterdir()) == [checkpoint] and check_state(checkpoint) == 7


def test_a_disk_that_keeps_an_older_checkpoint_instead_is_seen(checkpoint, monkeypatch):
    """Whole in itself, but not what was meant."""
    older = contents(checkpoint)

    def keep_older(path):
        path.write_bytes(older[path.name])

    monkeypatch.setattr(training_state, "forget", keep_older)
    with pytest.raises(UserError, match=r"does not read back .*manifest\.json is not what was"):
        write_state(checkpoint, small_state(seed=1))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_writer_that_is_interrupted_leaves_nothing(checkpoint, monkeypatch):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(training_state, "forget", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_state(state_folder(checkpoint.parent, 8), small_state(8))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_what_safetensors_writes_is_compared_with_the_tensors_in_memory(checkpoint, monkeypatch):
    save_file = training_state.save_file

    def another(tensors, path):
        changed = {name: tensor.clone() for name, tensor in tensors.items()}
        for tensor in changed.values():
            tensor.view(-1)[0] += 1
        save_file(changed, path)

    monkeypatch.setattr(training_state, "save_file", another)
    with pytest.raises(UserError, match=r"does not read back .*model\.safetensors: damaged"):
        write_state(state_folder(checkpoint.parent, 8), small_state(8))
    monkeypatch.setattr(
        training_state, "save_file", lambda tensors, path: save_file({"x": torch.zeros(2)}, path)
    )
    with pytest.raises(UserError, match=r"does not read back .*holds other tensors"):
        write_state(state_folder(checkpoint.parent, 8), small_state(8))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_checkpoint_of_the_same_step_is_exchanged(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(b"damaged")
    write_state(checkpoint, small_state(seed=3))
    assert read_state(checkpoint).extra["seed"] == 3
    write_state(checkpoint, small_state(seed=4))
    assert read_state(checkpoint).extra["seed"] == 4
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_rename_that_is_refused_puts_the_older_one_back(checkpoint, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match="cannot write the checkpoint: Permission denied"):
        write_state(checkpoint, small_state(seed=3))
    assert read_state(checkpoint).extra["seed"] == 0
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_rename_that_is_seen_late(checkpoint, monkeypatch):
    replace_now, timers = os.replace, []

    def late(source, target):
        timers.append(threading.Timer(0.3, replace_now, (source, target)))
        timers[-1].start()

    monkeypatch.setattr(os, "replace", late)
    for step, seed in ((8, 0), (7, 3)):  # a new one, and one that is there
        target = state_folder(checkpoint.parent, step)
        write_state(target, small_state(step, seed))
        assert read_state(target).extra["seed"] == seed
    for timer in timers:
        timer.join()
    assert len(list(checkpoint.parent.iterdir())) == 2


def test_a_rename_that_is_done_but_answered_with_an_error(checkpoint, monkeypatch):
    replace_now = os.replace

    def lost(source, target):
        replace_now(source, target)
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(os, "replace", lost)
    target = state_folder(checkpoint.parent, 8)
    write_state(target, small_state(8))
    assert check_state(target) == 8


def test_a_rename_that_never_comes(checkpoint, monkeypatch):
    monkeypatch.setattr(files, "_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(os, "replace", lambda source, target: None)
    target = state_folder(checkpoint.parent, 8)
    with pytest.raises(UserError, match="renamed into place, but is not there"):
        write_state(target, small_state(8))
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def large_state(step, seed=0):
    """One of about 1.2 MB."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(150_000, generator=generator)
    optimizer = {"state": {0: {"momentum_buffer": weight}}, "param_groups": []}
    return replace(small_state(step, seed), model={"weight": weight}, optimizer=optimizer)


@pytest.mark.parametrize("asked", [True, False], ids=["foreseen", "met while writing"])
def test_a_full_disk(small_disk, monkeypatch, asked):
    first, second = (state_folder(small_disk / "checkpoints", step) for step in (7, 8))
    write_state(first, large_state(7))
    if not asked:  # as with a quota, or where another job takes the rest meanwhile
        usage, answers = shutil.disk_usage, iter([10**9])

        def promised(path):
            found = usage(path)
            return found._replace(free=next(answers, found.free))

        monkeypatch.setattr(shutil, "disk_usage", promised)
    message = r"No space left on device: it needs 1\.2 MB, 8\d\d\.\d kB are free"
    with pytest.raises(UserError, match=rf"step-00000008: cannot write .*: {message}"):
        write_state(second, large_state(8))
    assert check_state(first) == 7 and list(first.parent.iterdir()) == [first]
    # An exchange that there is no room for leaves the older one too.
    with pytest.raises(UserError, match="No space left"):
        write_state(first, large_state(7, seed=1))
    assert read_state(first).extra["seed"] == 0
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    write_state(second, large_state(8))
    assert check_state(second) == 8


def test_a_disk_that_became_read_only(small_disk):
    first, second = (state_folder(small_disk / "checkpoints", step) for step in (7, 8))
    write_state(first, small_state(7))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"step-00000008: cannot write .*: Read-only file system"):
        write_state(second, small_state(8))
    assert check_state(first) == 7
