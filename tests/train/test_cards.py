"""What is said of a machine's GPUs before a run begins; there are none here, so no card was seen.

The decision is a function of plain values, and is tried on all cards, drivers and builds there are.
"""

import re
from itertools import combinations_with_replacement, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packaging.requirements import Requirement

from launch.check import Request, check_gpus
from tests.test_package import told
from tpp.common.errors import UserError
from train import cards
from train.cards import (
    KINDS,
    SETS,
    Build,
    Card,
    CardError,
    Machine,
    branch,
    judge,
    kind_of,
    of_driver,
    refuse_by_name,
    runs,
    sets_for,
)

ROOT = Path(__file__).resolve().parents[2]
CUDA13, CUDA12 = (Build(f"{one.torch}+cu", one.cuda, one.code) for one in SETS)
CPU = Build("2.13.0+cpu", None, ())
CAPABILITIES = sorted({kind.capability for kind in KINDS} | {(3, 5), (7, 2), (11, 0)})
DRIVERS = (None, "470.256.02", "525.60.13", "535.129.03", "570.211.01", "580.65.06", "595.40")
V100, A100 = Card(0, "Tesla V100-SXM2-16GB", (7, 0)), Card(1, "NVIDIA A100-SXM4-40GB", (8, 0))


def pinned(file: str) -> dict[str, str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / file).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {one.name: str(one.specifier).removeprefix("==") for one in found}


def machine(*found: Card, driver: str | None = "580.65.06", **known: object) -> Machine:
    names = tuple(card.name for card in found)
    return Machine(driver, found, **{"there": names, **known})


@pytest.mark.parametrize("build", [CUDA13, CUDA12], ids=["cuda13", "cuda12"])
def test_every_card_with_every_driver_under_every_build(build: Build) -> None:
    for driver, several in product(DRIVERS, combinations_with_replacement(CAPABILITIES, 2)):
        found = [Card(i, f"GPU{i}", capability) for i, capability in enumerate(several)]
        verdict = judge(machine(*found, driver=driver), build, ranks=2)
        assert verdict.usable == all(runs(one, build.code) for one in several)
        assert "\n" not in verdict.line and ("GPU0" in verdict.line or "GPU1" in verdict.line)
        if verdict.usable:
            continue
        fits = sets_for(several, driver)
        assert ("pip install -r" in verdict.line) == bool(fits)
        if fits:
            assert f"-r {fits[0].file} " in verdict.line
        for name in re.findall(r"-r (\S+)", verdict.line):
            (named,) = [one for one in SETS if one.file == name]
            assert all(runs(one, named.code) for one in several)
            assert driver is None or branch(driver) >= named.driver


@given(
    major=st.integers(5, 13),
    minor=st.integers(0, 9),
    of=st.tuples(st.integers(5, 13), st.integers(0, 9)),
    kind=st.sampled_from(["sm_{}{}", "sm_{}{}a", "sm_{}{}f", "compute_{}{}", "lto_{}{}"]),
)
def test_what_runs_what(major: int, minor: int, of: tuple[int, int], kind: str) -> None:
    """As NVIDIA has it, "Binary Compatibility" and "PTX Compatibility"."""
    expected = {
        "sm_{}{}": major == of[0] and minor >= of[1],
        "sm_{}{}f": major == of[0] and minor >= of[1],
        "sm_{}{}a": (major, minor) == of,
        "compute_{}{}": 10 * major + minor >= 10 * of[0] + of[1],
        "lto_{}{}": False,
    }[kind]
    assert runs((major, minor), [kind.format(*of)]) == expected


def test_torch_says_the_same_of_cards_that_it_knows() -> None:
    knows = getattr(torch.cuda, "_code_compatible_with_device", None)
    if knows is None:
        pytest.skip("this PyTorch does not say")
    for (major, minor), code in product(CAPABILITIES, CUDA13.code):
        if (major, minor) not in ((7, 2), (11, 0)):  # Jetson's, which PyTorch leaves out
            assert runs((major, minor), [code]) == knows(10 * major + minor, int(code[3:]))


@pytest.mark.parametrize(
    ("seen", "build", "ranks", "said"),
    [
        (machine(V100), CUDA13, 1, "Tesla V100-SXM2-16GB (sm_70): PyTorch 2.15.0+cu has code for "),
        (machine(V100), CUDA13, 1, "; requirements-cuda12.txt (PyTorch 2.10.0, CUDA 12.8) runs on"),
        (machine(V100, driver="470.1"), CUDA13, 1, "driver 525 or newer, and here is 470.1"),
        (machine(Card(0, "Tesla P100", (6, 0))), CUDA13, 1, "neither requirements.txt nor requir"),
        (machine(V100, A100), CUDA13, 2, "cuda:0 of Tesla V100-SXM2-16GB (sm_70), NVIDIA A100-SX"),
        (machine(V100, A100, visible="4,7"), CUDA13, 2, "CUDA_VISIBLE_DEVICES=7 leaves out"),
        (machine(A100, V100), CUDA13, 1, None),  # as many ranks as good cards
        (machine(V100, A100), CUDA12, 2, None),
        # What PyTorch does not see, the driver has.
        (
            Machine("535.129.03", (), ("NVIDIA L4",)),
            CUDA13,
            1,
            "535.129.03, and PyTorch 2.15.0+cu ",
        ),
        (Machine("535.129.03", (), ("NVIDIA L4",)), CUDA13, 1, "-r requirements-cuda12.txt"),
        (Machine("470.1", (), ("Tesla V100-PCIE-32GB",)), CUDA12, 1, "with driver 525 or newer"),
        (
            Machine("590.1", (), ("X", "X"), None, "error 802"),
            CUDA13,
            1,
            "cannot use it: error 802;",
        ),
        (Machine("590.1", (), ("X",), "7"), CUDA13, 1, "(CUDA_VISIBLE_DEVICES=7)"),
        (Machine("590.1", (), ("NVIDIA L4",)), CPU, 1, "built without CUDA; requirements.txt"),
        # Nothing is to be used, and nothing is said.
        (Machine("470.1", (), ("Tesla V100",), ""), CUDA13, 1, ""),
        (Machine("470.1", (), ("Tesla V100",), "-1"), CUDA13, 1, ""),
        (Machine("470.1", (), ("Tesla V100",), "NoDevFiles"), CUDA13, 1, ""),
        (Machine("470.1", (), ()), CUDA13, 1, ""),
        (Machine(), CPU, 1, ""),
    ],
)
def test_what_is_said(seen: Machine, build: Build, ranks: int, said: str | None) -> None:
    verdict = judge(seen, build, ranks=ranks)
    assert verdict.usable == (not said)
    if said is None:
        assert "PyTorch" in verdict.line and "pip install" not in verdict.line
    elif said == "":
        assert verdict.line == ""
    else:
        assert said in verdict.line and "\n" not in verdict.line


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        *(("Tesla V100-SXM2-16GB", (7, 0)), ("v100s", (7, 0)), ("tesla_v100-pcie-32gb", (7, 0))),
        *(("Tesla T4", (7, 5)), ("rtx_2080_ti", (7, 5)), ("Quadro RTX 8000", (7, 5))),
        *(("NVIDIA TITAN RTX", (7, 5)), ("NVIDIA TITAN V", (7, 0)), ("NVIDIA TITAN Xp", (6, 1))),
        *(("NVIDIA A100 80GB PCIe", (8, 0)), ("nvidia_a100_3g.20gb", (8, 0)), ("A30", (8, 0))),
        *(("NVIDIA A10G", (8, 6)), ("rtx3090", (8, 6)), ("NVIDIA RTX A6000", (8, 6))),
        *(("NVIDIA L40S", (8, 9)), ("l4", (8, 9)), ("NVIDIA RTX 6000 Ada Generation", (8, 9))),
        *(("GeForce RTX 4090", (8, 9)), ("nvidia_h100_80gb_hbm3", (9, 0)), ("gh200", (9, 0))),
        *(("NVIDIA GH200 480GB", (9, 0)), ("NVIDIA H200", (9, 0)), ("NVIDIA B200", (10, 0))),
        *(("NVIDIA GB300", (10, 3)), ("NVIDIA GeForce RTX 5090", (12, 0))),
        *(("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)), ("NVIDIA GB10", (12, 1))),
        *(
            ("NVIDIA GeForce GTX 1080 Ti", (6, 1)),
            ("Tesla P100-PCIE-16GB", (6, 0)),
            ("p40", (6, 1)),
        ),
        *(("gpu", None), ("volta-or-so", None), ("mi250", None), ("1g.10gb", None)),
    ],
)
def test_a_card_is_known_by_its_name(name: str, capability: tuple[int, int] | None) -> None:
    kind = kind_of(name)
    assert (kind.capability if kind else None) == capability


def test_the_sets_are_what_their_files_and_the_page_say() -> None:
    for one, dali in zip(SETS, ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), strict=True):
        found = pinned(one.file)
        assert found["torch"] == one.torch and dali in found
    assert set(pinned(SETS[0].file)) ^ set(pinned(SETS[1].file)) == {
        *("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    }
    assert f"\n{cards.table()}\n" in (ROOT / "docs" / "cards.md").read_text()
    # Of the two the one that the tests run with.
    here = next(one for one in SETS if torch.__version__.startswith(f"{one.torch}+"))
    assert cards.installed() == Build(torch.__version__, here.cuda, here.code)


def test_the_driver_is_read_as_the_kernel_tells_of_it(tmp_path: Path) -> None:
    assert of_driver(tmp_path / "none") == (None, ())
    for number, model in enumerate(("Tesla V100-SXM2-16GB", "NVIDIA A100-SXM4-40GB")):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        text = f"Model: \t\t {model}\nIRQ:   \t\t 4{number}\nGPU UUID: \t GPU-1\n"
        (folder / "information").write_text(
            f"{text}Device Minor: \t {number}\nGPU Excluded:\t No\n"
        )
    (tmp_path / "nvidia1").touch()  # the other one is not this job's
    for text, version in (
        (
            "NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
            "535.129.03",
        ),
        ("NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)", "580.65.06"),
    ):
        (tmp_path / "version").write_text(f"NVRM version: {text}\nGCC version:  gcc 12.2.0\n")
        assert of_driver(tmp_path, tmp_path) == (version, ("NVIDIA A100-SXM4-40GB",))


@pytest.fixture
def on_a_v100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "look", lambda _: (machine(V100, A100), CUDA13))


def test_a_run_is_refused_before_anything_is_opened(on_a_v100, monkeypatch, capsys, tmp_path):
    words = ["--config", str(ROOT / "configs" / "demo.yaml"), f"output={tmp_path / 'run'}"]
    words += ["data.demo=null", "data.root=/no/such/folder"]  # so that it would end soon
    code, out, err = told(monkeypatch, capsys, "tpp", "train", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: Tesla V100-SXM2-16GB (sm_70): ") and "-cuda12.txt" in err
    assert not [*tmp_path.iterdir()]
    code, out, err = told(monkeypatch, capsys, "tpp", "cards")
    assert (code, out, err.count("\n")) == (2, "", 1) and "CUDA_VISIBLE_DEVICES=1 leaves" in err


def test_who_alone_sees_a_card_says_so_himself(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"LOCAL_WORLD_SIZE": "2"}
    for there, alone in ((("V100", "A100"), True), (("V100", "V100"), False)):
        monkeypatch.setattr(cards, "look", lambda _, t=there: (machine(V100, there=t), CUDA13))
        with pytest.raises(CardError) as caught:
            cards.check_cards(ranks)
        assert caught.value.alone == alone


def test_bf16_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "look", lambda _: (machine(V100, A100), CUDA12))
    assert [line.split()[0] for line in cards.check_cards({}, "bf16")] == [
        *("cards", "training.precision:")
    ]
    assert len(cards.check_cards({}, "fp16")) == 1
    monkeypatch.undo()
    assert cards.check_cards({"LOCAL_WORLD_SIZE": "2"}, "bf16") == []  # this machine, for real


@pytest.mark.parametrize(
    ("options", "sinfo", "said"),
    [
        (["--gpus-per-node=v100:4"], "", "v100: V100, Titan V (sm_70): PyTorch "),
        (["--gres=gpu:tesla_v100:2,shard:1"], "", "; requirements-cuda12.txt (PyTorch 2.10.0, "),
        (["--gpus=p100:8"], "", "p100: P100 (sm_60): PyTorch"),
        (["--gpus=v100:8", "--gres=gpu:a100:1"], "", None),
        (
            ["--exclusive", "-p", "old"],
            "gpu:v100:8(S:0-1)\ngpu:p100:4",
            "old: V100, Titan V (sm_70), ",
        ),
        (["--gpus-per-node=2", "-p", "old"], "gpu:v100:8\ngpu:h100:8", None),
        (["--gpus-per-node=2"], "(null)\ngpu:8", None),
        (["--gpus-per-node=mi250:2"], "", None),
        (["--ntasks=2"], "gpu:v100:8", None),  # no GPU is asked for
    ],
)
def test_before_the_queue(options, sinfo, said, monkeypatch) -> None:
    monkeypatch.setattr("launch.check._lines", lambda *_: sinfo.splitlines())
    monkeypatch.setattr(cards, "installed", lambda: CUDA13)
    if said is None:
        check_gpus(Request.of(options, "", {}))
        return
    with pytest.raises(UserError) as caught:
        check_gpus(Request.of(options, "", {}))
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert "CUDA_VISIBLE_DEVICES" not in str(caught.value)


def test_a_name_is_no_mistake_where_the_build_has_its_code() -> None:
    refuse_by_name("x", ["v100"], CUDA12)
    refuse_by_name("x", ["v100", "?"], CUDA13)
    with pytest.raises(UserError, match=r"x: P100 \(sm_60\): PyTorch 2.10.0"):
        refuse_by_name("x", ["p100"], CUDA12)
