"""Class folders divided into train and val."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from other_forms import as_list, as_tars
from PIL import Image

from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.sets.division import chosen_for_val, prepare_split
from data_pipelines.sets.inputs import Input
from tpp.common.errors import UserError


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes of 2, 5 and 20 images, each of another colour."""
    for label, count in (("a", 2), ("b", 5), ("c", 20)):
        (tmp_path / "classes" / label).mkdir(parents=True)
        for number in range(count):
            colour = (count, number, 0)
            Image.new("RGB", (8, 8), colour).save(tmp_path / "classes" / label / f"{number}.png")
    return tmp_path / "classes"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.png"))
    }


def test_every_image_is_in_one_part_to_the_byte(classes: Path, tmp_path: Path) -> None:
    before = files(classes)
    train, val = prepare_split(tmp_path / "out", classes, share=0.3)
    assert (train.images, val.images) == (1 + 3 + 14, 1 + 2 + 6)
    parts = [files(tmp_path / "out" / split) for split in ("train", "val")]
    assert not parts[0].keys() & parts[1].keys()
    assert parts[0] | parts[1] == before == files(classes)
    assert prepare_split(tmp_path / "out", classes, share=0.3) == []
    assert scan_class_folders(tmp_path / "out" / "val").classes == ["a", "b", "c"]


def test_it_goes_by_names_and_seed_alone(classes: Path, tmp_path: Path) -> None:
    def chosen(name: str, seed: int) -> set[str]:
        prepare_split(tmp_path / name, classes, share=0.3, seed=seed)
        return {*files(tmp_path / name / "val")}

    one = chosen("one", 0)
    assert one != chosen("other", 1)
    for number in range(20, 23):
        Image.new("RGB", (8, 8)).save(classes / "c" / f"{number}.png")
    more = chosen("more", 0)
    assert len(one & more) >= len(one) - 2 and len(more) == len(one) + 1


@given(counts=st.lists(st.integers(2, 60), min_size=1, max_size=4), share=st.floats(0.001, 0.999))
def test_no_class_is_without_images_in_either_part(counts: list[int], share: float) -> None:
    names = [f"{label}/{number}.png" for label, n in enumerate(counts) for number in range(n)]
    labels = np.repeat(np.arange(len(counts)), counts)
    index = ImageIndex.of("/nowhere", names, labels, [str(n) for n in range(len(counts))])
    chosen = chosen_for_val(index, share, 0)
    for label, count in enumerate(counts):
        taken = int(chosen[labels == label].sum())
        assert 1 <= taken <= count - 1
        assert abs(taken - share * count) <= 1


def test_mistakes_are_one_line(classes: Path, tmp_path: Path) -> None:
    for share in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"--val .*: must be a share between 0 and 1"):
            prepare_split(tmp_path / "out", classes, share=share)
    with pytest.raises(UserError, match="lies in"):
        prepare_split(classes / "out", classes)
    (classes / "b" / "0.png").rename(classes / "a" / "9.png")
    for number in range(1, 4):
        (classes / "b" / f"{number}.png").unlink()
    with pytest.raises(UserError, match=r"classes/b: 1 image; a class needs two"):
        prepare_split(tmp_path / "out", classes)
    (classes / "train").mkdir()
    with pytest.raises(UserError, match="is divided already"):
        prepare_split(tmp_path / "out", classes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["list", "tars"])
def test_tars_and_lists_are_divided_as_class_folders_are(
    classes: Path, tmp_path: Path, form: str
) -> None:
    if form == "list":
        source = Input(classes, as_list(classes, tmp_path / "all.csv"))
    else:
        source = Input(as_tars(classes, tmp_path / "tars", label="label"))
    prepare_split(tmp_path / "folders", classes, share=0.3)
    prepare_split(tmp_path / "out", source, share=0.3)
    for split in ("train", "val"):
        assert files(tmp_path / "out" / split) == files(tmp_path / "folders" / split)
    assert prepare_split(tmp_path / "out", source, share=0.3) == []


def test_images_of_one_name_and_classes_that_are_no_folders(classes: Path, tmp_path: Path) -> None:
    names = [f"{folder}/{number}.png" for folder in "bc" for number in range(5)]
    (tmp_path / "all.csv").write_text("".join(f"classes/{name},x\n" for name in names))
    source = Input(tmp_path / "all.csv")
    prepare_split(tmp_path / "out", source, share=0.3)
    found = {**files(tmp_path / "out" / "train"), **files(tmp_path / "out" / "val")}
    truth = files(classes)
    expected = {f"x/classes-{name.replace('/', '-')}": truth[name] for name in names}
    assert found == expected
    (tmp_path / "all.csv").write_text("".join(f"classes/{name},../x\n" for name in names))
    with pytest.raises(UserError, match=r"class '../x' cannot be the name of a folder"):
        prepare_split(tmp_path / "refused", source)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("share", "asked"), [(0.2, "0.2"), (1e-05, "1e-05")])
def test_another_division_for_the_same_folder(
    classes: Path, tmp_path: Path, share: float, asked: str
) -> None:
    out = tmp_path / "out"
    prepare_split(out, classes, share=0.3)

    def refused(source: Path, share: float = 0.3, seed: int = 0) -> str:
        with pytest.raises(UserError) as caught:
            prepare_split(out, source, share=share, seed=seed)
        assert "-0.3-" not in str(caught.value) and "choose another folder" in str(caught.value)
        return str(caught.value)

    assert refused(classes, share=share) == (
        f"{out}: was divided with --val 0.3, and --val {asked} is asked for; give --val "
        f"0.3 to go on with it, or choose another folder for --output, or empty this one"
    )
    assert f"{out}: was divided with --seed 0, and --seed -1 is asked for" in refused(
        classes, seed=-1
    )
    both = f"with --val 0.3 --seed 0, and --val {asked} --seed 2 is asked for"
    assert both in refused(classes, share=share, seed=2)
    other = classes.rename(tmp_path / "other")
    assert "from a folder called 'classes', and --from is one called 'other'" in refused(other)
    (other / "c" / "0.png").unlink()
    assert f"{out}: was divided from other images than those of --from are now" in refused(other)
    # With images that have grown, the names stay as they were.
    prepare_split(tmp_path / "more", other, share=0.3)
    (other / "c" / "1.png").write_bytes(bytes(5000))
    with pytest.raises(UserError, match="was divided from other images than those of --from"):
        prepare_split(tmp_path / "more", other, share=0.3)
