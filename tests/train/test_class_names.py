"""Which class folder is which output: by name, by number, or not at all."""

import sys

import pytest
import torch
from PIL import Image

from tpp.checkpoints.model_file import save_model
from tpp.common.class_names import match_classes
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from train.evaluate import main as evaluate

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def match(folders, names, order=None, outputs=None):
    outputs = outputs or len(names or folders)
    return match_classes(sorted(folders), outputs, names, order, file="net", place="images")


def test_the_same_names_need_no_word():
    assert match(TEN, TEN) == ([*range(10)], None)


def test_names_in_another_order_are_found():
    """As where the file's writer sorted without regard to case."""
    names = ["ant", "Bee", "cat"]
    assert match(names, names).outputs == [1, 0, 2]  # "Bee" is the first folder


@pytest.mark.parametrize(
    ("folders", "names", "outputs", "said"),
    [
        (["Cat", "DOG"], ["cat", "dog"], [0, 1], "Cat is taken for cat"),
        (["great_dane", "Poodle"], ["poodle", "great dane"], [0, 1], "Poodle is taken for poodle"),
        (["great-dane ", "b"], ["great dane", "B"], [1, 0], "b is taken for B"),
        (["00", "01", "02"], ["0", "1", "2"], [0, 1, 2], "00 is taken for 0"),
        (["1", "10", "2"], ["001", "002", "010"], [0, 2, 1], "1 is taken for 001"),
    ],
)
def test_names_written_another_way_are_found_and_said(folders, names, outputs, said):
    found = match(folders, names)
    assert found.outputs == outputs
    assert found.note is not None and said in found.note


def test_some_of_the_classes_are_told_from_all():
    found = match(["cat", "truck"], TEN)
    assert found.outputs == [3, 9]
    assert found.note == "images holds 2 of the 10 classes, which is told from all"
    both = match(["Cat", "truck"], TEN)
    assert both.outputs == [3, 9]
    assert both.note == f"{found.note}; class folder Cat is taken for cat, and so on"


def test_numbers_from_0_are_places():
    """As in ImageNetV2, whose folders are 0 to 999."""
    names = [f"n{k:08}" for k in range(1000)]
    found = match([str(k) for k in range(1000)], names)
    assert found.outputs[:4] == [0, 1, 10, 100]
    assert found.note == (
        "the class folders are taken for places among the classes: class folder 0 is n00000000, "
        "and so on"
    )


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        ([str(k) for k in range(1, 11)], TEN),  # from 1
        ([str(k) for k in range(9)], TEN),  # not as many
        (["0", "00", *map(str, range(2, 10))], TEN),  # one number twice
        ([str(k) for k in range(10)], [str(k) for k in range(1, 11)]),  # names or places?
        (["bird", "cat", "unicorn"], TEN),  # one that there is not
        ([*TEN, "unicorn"], TEN),  # more
        (["cat", "Cat"], ["cat", "dog"]),  # two for one
        (["CAT", "dog"], ["cat", "Cat"]),  # one for two
    ],
)
def test_what_is_not_sure_is_refused_with_both(folders, names):
    with pytest.raises(UserError) as error:
        match(folders, names)
    message = str(error.value)
    assert f"the classes of net are {names[0]}, " in message
    assert f"the class folders of images {sorted(folders)[0]}, " in message
    assert "--class-order" in message and "\n" not in message


def test_a_network_without_names():
    found = match(["b", "a"], None)
    assert found.outputs == [0, 1]
    assert found.note == "net does not name its classes: class k is the k-th folder by name (a, b)"
    assert match(["0", "1", "2"], None).outputs == [0, 1, 2]
    with pytest.raises(UserError, match="say --class-order text or --class-order numbers"):
        match([str(k) for k in range(11)], None)
    with pytest.raises(UserError, match="net tells 3 classes apart, images holds 2 class folders"):
        match(["a", "b"], None, outputs=3)


def test_the_order_may_be_told():
    folders = [str(k) for k in range(1, 11)]
    assert match(folders, TEN, "numbers").outputs == [0, 9, 1, 2, 3, 4, 5, 6, 7, 8]
    assert match(folders, TEN, "text").outputs == [*range(10)]
    assert match(folders, None, "numbers").outputs == [0, 9, 1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(UserError, match="not all class folders are numbers: a, b"):
        match(["a", "b"], ["b", "a"], "numbers")
    with pytest.raises(UserError, match="tells 10 classes apart, images holds 2"):
        match(["1", "2"], TEN, "numbers")


def test_labels_are_mapped_in_an_evaluation(tmp_path, monkeypatch, capsys):
    """Each folder's image is one that the network tells apart by its brightness."""
    model = build_model("mlp7_linear", 11, image_size=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
        for layer in layers[:-1]:
            layer.weight[0] = 1 / layer.in_features if layer is layers[0] else 0
            if layer is not layers[0]:
                layer.weight[0, 0] = 1
        # Output k is largest for a brightness of k / 10: 2 k x / 10 - (k / 10)^2.
        tenths = torch.arange(11) / 10
        layers[-1].weight[:, 0], layers[-1].bias[:] = 2 * tenths, -tenths.square()
    said = {"image_size": 4, "resize": None, "mean": [0.0], "std": [1.0], "channels": 1}
    names = [f"brightness {k}" for k in range(11)]
    save_model(tmp_path / "net", model, preprocessing=said, extra={"classes": names})
    for folder, called in (("places", str), ("names", "Brightness_{}".format)):
        for k in range(11):
            path = tmp_path / folder / called(k) / "0.png"
            path.parent.mkdir(parents=True)
            Image.new("L", (4, 4), round(25.5 * k)).save(path)
        command = ["--checkpoint", str(tmp_path / "net"), "--data", str(tmp_path / folder)]
        monkeypatch.setattr(sys, "argv", ["evaluate", *command, "--threads", "1"])
        evaluate()
        said = capsys.readouterr().out
        assert "top-1 100.00%" in said and "class folder" in said
    (tmp_path / folder / called(0)).rename(tmp_path / folder / "eleven")
    with pytest.raises(UserError, match=r"are brightness 0, .* no class is called eleven;"):
        evaluate()


@pytest.mark.parametrize("renamed", [False, True])
def test_a_run_from_weights_of_other_classes_says_so(
    renamed, tiny_config, tiny_data, tmp_path, run_inside, capsys
):
    names = sorted(path.name for path in (tiny_data / "train").iterdir() if path.is_dir())
    names = [f"other {name}" for name in names] if renamed else names
    save_model(tmp_path / "net", build_model("cifar_resnet8", 4), extra={"classes": names})
    tiny_config["model"]["checkpoint"] = str(tmp_path / "net")
    tiny_config["stages"] = {"evaluate": {"kind": "evaluate", "input": None}}
    run_inside(tiny_config)
    said = capsys.readouterr().out
    assert (f"model.checkpoint: {tmp_path / 'net'} is of the classes other " in said) == renamed
    assert ("taken for them in this order" in said) == renamed
