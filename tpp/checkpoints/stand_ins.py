"""What takes the place of foreign classes when a file of torch.save is read.

Training scripts put their arguments, paths, NumPy numbers and times beside the tensors. Only the
names of these classes are looked up: none is imported or called, and what stands for one holds
nothing, or is a plain dict. A class that is not named here is refused.
"""

from collections import OrderedDict
from typing import Any


class Inert:
    """Takes the place of an object whose content is of no interest; does nothing.

    Attributes:
        stands_for: the name of the class whose place it takes.
    """

    stands_for = ""

    def __new__(cls, *_: Any) -> "Inert":  # noqa: D102
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


class _Number(int):
    """Takes the place of an enumeration of integers."""

    def __new__(cls, value: Any = 0, *_: Any) -> "_Number":
        return super().__new__(cls, value if isinstance(value, int) else 0)


class _Table:
    """Takes the place of a kind of dict; what comes out is a plain one."""

    def __new__(cls, *_: Any) -> Any:
        return OrderedDict()


_INERT = (
    # Arguments, paths, times, versions: what scripts note down.
    *("argparse.Namespace", "types.SimpleNamespace", "torch.torch_version.TorchVersion"),
    *("datetime.datetime", "datetime.date", "datetime.timedelta", "datetime.timezone"),
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath")
    ),
    "torchvision.transforms.functional.InterpolationMode",
    # NumPy's numbers and arrays, in its versions 1 and 2.
    *("numpy.dtype", "numpy.ndarray"),
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("scalar", "_reconstruct")
    ),
    # Types that are arguments of the kinds of dict below.
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple")),
    # Hydra's and Lightning's settings; OpenMMLab's averages of the log.
    *("typing.Any", "omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Integer", "Float", "String", "Boolean", "Path", "Enum", "Bytes")
    ),
    "mmengine.logging.history_buffer.HistoryBuffer",
    # DeepSpeed 0.19.
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
_TABLES = (
    *("collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict"),
    *("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode"),
    "mmengine.config.config.ConfigDict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
)
_MEANT = {"_reconstruct": "ndarray", "scalar": "number"}


def _inert(name: str) -> type[Inert]:
    module, _, short = name.rpartition(".")
    said = f"NumPy {_MEANT[short]}" if short in _MEANT else name
    return type(short, (Inert,), {"stands_for": said, "__module__": f"{__name__}.{module}"})


# As torch.serialization.safe_globals takes them.
STAND_INS: list[Any] = [
    *((_inert(name), name) for name in _INERT),
    *((type(name, (_Table,), {}), name) for name in _TABLES),
    (_Number, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
