"""What libraries read from the environment: taken over, without effect, or refused by name.

Accelerate, DeepSpeed and torch take settings from variables, some of which win over what a program
hands them. A run's settings are in its configuration, so that none of them may change what is
trained without a word. docs/distributed.md has the table.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

from tpp.common.errors import UserError
from train.config.sections import TrainingSection

_OFF = ("", "0", "no", "none", "false", "auto")

# What the run's configuration says: the variable, what accelerate launch calls it, the setting.
_SAID_BY: tuple[tuple[str, str, str], ...] = (
    ("ACCELERATE_MIXED_PRECISION", "mixed_precision", "precision"),
    ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "gradient_accumulation_steps", "accumulation"),
    ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", "clip_gradient_norm"),
)
# What is not possible here, and what would be right.
_REFUSED: Mapping[str, str] = {
    "ACCELERATE_USE_FSDP": "FSDP splits every layer's weights over the ranks, and the correlation "
    "of two filters needs both of them whole; use data parallelism or DeepSpeed's ZeRO 0 to 2",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM is not supported; use data parallelism or DeepSpeed",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "every rank has the whole network here; leave it out",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's own collectives are not supported; use torchrun",
    "ACCELERATE_DYNAMO_BACKEND": "torch.compile is not supported; leave dynamo_backend out",
    "ACCELERATE_TORCH_DEVICE": "every rank takes the GPU of its LOCAL_RANK; choose GPUs with "
    "CUDA_VISIBLE_DEVICES",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "offloading is not supported; leave it out",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "offloading is not supported; leave it out",
    "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "no network here has experts; leave it out",
}
# Without effect on what is trained once they are gone; Accelerate stumbles over the first one.
_WITHOUT_EFFECT = (
    "ACCELERATE_CONFIG_DS_FIELDS",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL",
    "ACCELERATE_DOWNCAST_BF16",
)
_WITHOUT_EFFECT_BEGIN = (
    "ACCELERATE_DYNAMO_",
    "ACCELERATE_FP8_",
    "FSDP_",
    "MEGATRON_LM_",
    "PARALLELISM_CONFIG_",
)
# Rounding of float32 arithmetic on GPUs.
_TOLD: Mapping[str, str] = {
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "matrix products",
    "NVIDIA_TF32_OVERRIDE": "matrix products and convolutions",
}


def settle_environment(
    environment: MutableMapping[str, str], precision: str, training: TrainingSection | None = None
) -> list[str]:
    """Take out of the environment what would change a run behind its configuration's back.

    To be called before anything else reads it, and before a GPU is used. What is left of
    Accelerate's variables are those that ``train.distributed.deepspeed_engine`` takes over.

    Args:
        environment: of this process; ``os.environ``.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        training: what else the configuration says; None where nothing is trained.

    Returns:
        What is to be said of variables that change how results are rounded; a line each.

    Raises:
        UserError: a variable asks for what the configuration says otherwise, or what is not
            possible here; names it.
    """
    for name, option, setting in _SAID_BY:
        asked = environment.get(name, "").lower()
        if setting == "precision":
            said: Any = precision
        elif training is not None:
            said = getattr(training, setting)
        else:
            continue
        if asked not in _OFF and not _same(asked, said):
            raise UserError(
                f"{name}={asked}, as accelerate launch sets it for {option}: training.{setting} "
                f"says so, and is {'null' if said is None else said}; set training.{setting}, or "
                "leave the other one out"
            )
    for name, why in _REFUSED.items():
        if environment.get(name, "").lower() not in _OFF:
            raise UserError(f"{name}={environment[name]}: {why}")
    _settle_cpu(environment)
    _check_deepspeed_device(environment)
    _check_debugging(environment)
    gone = (*(name for name, _, _ in _SAID_BY), *_REFUSED, *_WITHOUT_EFFECT)
    for name in [*environment]:
        if name in gone or name.startswith(_WITHOUT_EFFECT_BEGIN):
            del environment[name]
    return [
        f"{name}={environment[name]} decides whether float32 {what} on a GPU are rounded to TF32"
        for name, what in _TOLD.items()
        if environment.get(name)
    ]


def _same(asked: str, said: Any) -> bool:
    if isinstance(said, str):
        return asked == said
    try:
        return said is not None and float(asked) == float(said)
    except ValueError:
        return False


def _settle_cpu(environment: MutableMapping[str, str]) -> None:
    """Let ``accelerate launch --cpu`` mean that there are no GPUs, for everything in the run."""
    if environment.pop("ACCELERATE_USE_CPU", "").lower() in ("1", "y", "yes", "t", "true", "on"):
        environment["CUDA_VISIBLE_DEVICES"] = ""


def _check_deepspeed_device(environment: Mapping[str, str]) -> None:
    asked = environment.get("DS_ACCELERATOR", "")
    if not asked:
        return
    mine = "cuda" if _has_gpu(environment) else "cpu"
    if asked != mine:
        raise UserError(
            f"DS_ACCELERATOR={asked}: the run uses {'the GPU' if mine == 'cuda' else 'the CPU'}, "
            f"for DeepSpeed that is {mine}; leave it out (CUDA_VISIBLE_DEVICES= hides the GPUs)"
        )


def _check_debugging(environment: Mapping[str, str]) -> None:
    if environment.get("TORCH_DISTRIBUTED_DEBUG", "").upper() != "DETAIL":
        return
    if environment.get("WORLD_SIZE", "1") != "1" and not _has_gpu(environment):
        raise UserError(
            "TORCH_DISTRIBUTED_DEBUG=DETAIL: DistributedDataParallel on the CPU crashes under it "
            "in torch 2.15; use INFO"
        )


def _has_gpu(environment: Mapping[str, str]) -> bool:
    import torch

    hidden = environment.get("CUDA_VISIBLE_DEVICES") == ""
    return not hidden and torch.cuda.is_available()
