"""What does a training step over the ranks: DistributedDataParallel, or DeepSpeed's ZeRO.

Both train float32 weights, under autocast where the precision says so, and keep what resuming
needs in the same form: a run may go on with another engine, or another number of ranks.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer

from tpp.errors import UserError
from tpp.reading import read_json
from train.config import TrainingSection

# What the run's configuration says, and so DeepSpeed's must not.
_OURS = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.batch_size and training.accumulation",
    "gradient_accumulation_steps": "training.accumulation",
    "gradient_clipping": "training.clip_gradient_norm",
    "fp16": "training.precision",
    "bf16": "training.precision",
    "amp": "training.precision",
    "torch_autocast": "training.precision",
    "optimizer": "the stage's optimizer section",
    "scheduler": "the stage's optimizer section",
}
_BUFFER = "momentum_buffer"


class Engine:
    """A network and its optimiser, on one process or under DistributedDataParallel.

    A step is any number of micro-batches, each with a forward pass inside :meth:`micro_batch` and
    a :meth:`backward`, then :meth:`gradient_norm`, and :meth:`step` or :meth:`drop`.

    Args:
        accelerator: the ranks.
        network: on its device; the same on all ranks.
        optimizer: over the network's parameters.
        clip: norm that the gradient is scaled down to where it is longer; None for no clipping.

    Attributes:
        model: what makes forward passes.
        saves_together: whether :meth:`state_dict` takes all ranks; otherwise any may ask.
    """

    saves_together = False

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
    ) -> None:
        self.accelerator, self._clip = accelerator, clip
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._norm: Tensor | None = None
        self.model, self._optimizer = accelerator.prepare(network, optimizer)

    def set_learning_rate(self, lr: float) -> None:
        """The learning rate of the step to come."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For forward passes."""
        return cast(contextlib.AbstractContextManager[Any], self.accelerator.autocast())

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """For a micro-batch's forward and backward pass; the last one's averages the gradients."""
        if last:
            return contextlib.nullcontext()
        return cast(contextlib.AbstractContextManager[Any], self.accelerator.no_sync(self.model))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``, already divided by the number of micro-batches."""
        self.accelerator.backward(loss)

    def gradient_norm(self) -> Tensor:
        """L2 norm over all parameters, as the optimiser gets the gradient, but before clipping."""
        # What the optimiser gets, not what a loss scaler made of it.
        self.accelerator.unscale_gradients()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        self._norm = torch.nn.utils.get_total_norm(gradients)
        return self._norm

    def step(self) -> None:
        """Clip, let the optimiser make its step, and forget the gradient."""
        if self._clip is not None and self._norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self._clip, self._norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def drop(self) -> None:
        """Forget the gradient without a step."""
        self._optimizer.zero_grad(set_to_none=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, as ``torch.optim.SGD`` numbers it; see ``saves_together``."""
        return cast(dict[str, Any], self._optimizer.state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a :meth:`state_dict` of any engine and number of ranks."""
        self._optimizer.load_state_dict(state)


class DeepSpeedEngine(Engine):
    """A network and its optimiser under DeepSpeed, ZeRO stage 0, 1 or 2.

    DeepSpeed works out the gradient's norm within its step, so that a step cannot be dropped.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
    ) -> None:
        self._numbered = list(network.parameters())
        self._groups = optimizer.state_dict()["param_groups"]
        super().__init__(accelerator, network, optimizer, clip=clip)
        # Stage 0 leaves the optimiser as it is.
        self._is_zero = self.saves_together = self.model.zero_optimization_stage() > 0

    def micro_batch(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Let DeepSpeed know whether it is the step's last one."""
        self.model.set_gradient_accumulation_boundary(is_boundary=last)
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of ``loss``, already divided by the number of micro-batches."""
        self.model.backward(loss)
        if not last:
            self.model.step()  # which only counts

    def gradient_norm(self) -> Tensor:
        """Make the step, and return the norm that the gradient had before clipping."""
        if not self._is_zero:
            norm = super().gradient_norm()
            self.model.step()
            return norm
        self.model.step()
        norm = self.model.get_global_grad_norm()
        return torch.as_tensor(norm, device=self.accelerator.device)

    def step(self) -> None:
        """Nothing: it has been made, see :meth:`gradient_norm`."""

    def drop(self) -> None:
        """Not possible."""
        raise NotImplementedError("DeepSpeed has made the step")

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, gathered from all ranks, as if nothing were split."""
        if not self._is_zero:
            return super().state_dict()
        groups = [
            {**mine, **{key: value for key, value in now.items() if key != "params"}}
            for mine, now in zip(self._groups, self._optimizer.param_groups, strict=True)
        ]
        return {"state": self._gathered(), "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a :meth:`state_dict`: each rank its own part of it."""
        if not self._is_zero:
            super().load_state_dict(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        zero = self.model.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat][_BUFFER] = torch.zeros_like(flat)
        # DeepSpeed does so after its first step, when these are there.
        zero._lazy_init_hp_params_optimizer_state()
        for number, entries in state["state"].items():
            value = entries[_BUFFER].to(self.accelerator.device)
            safe_set_full_optimizer_state(self._numbered[int(number)], value, _BUFFER)

    def _gathered(self) -> dict[int, dict[str, Tensor]]:
        """The momentum of every parameter, whole on every rank; none before the first step."""
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = self.model.optimizer
        if not zero._hp_optimizer_states_linked:
            return {}
        return {
            number: {_BUFFER: safe_get_full_optimizer_state(parameter, _BUFFER)}
            for number, parameter in enumerate(self._numbered)
            if parameter.requires_grad
        }


def make_engine(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Optimizer,
    *,
    clip: float | None = None,
) -> Engine:
    """The engine that the accelerator was made for."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return (DeepSpeedEngine if deepspeed else Engine)(accelerator, network, optimizer, clip=clip)


def engine_name(accelerator: Accelerator) -> str:
    """What shares the training among the ranks, for a person."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed, ZeRO stage {accelerator.deepspeed_plugin.zero_stage}"
    return "DistributedDataParallel" if accelerator.num_processes > 1 else "one process"


def deepspeed_plugin(training: TrainingSection) -> DeepSpeedPlugin | None:
    """Accelerate's plugin with DeepSpeed's settings; None where nobody asked for DeepSpeed.

    Raises:
        UserError: its configuration cannot be read, or asks for what is not possible here.
    """
    settings = _asked_for_deepspeed(training.deepspeed)
    if settings is None:
        return None
    if training.on_bad_step != "stop":
        raise UserError(
            f"training.on_bad_step: {training.on_bad_step} is not possible with DeepSpeed, which "
            "shows a step's gradient when the step is made; use stop"
        )
    try:
        import deepspeed  # noqa: F401
    except ImportError:
        raise UserError(
            "training.deepspeed: DeepSpeed is not installed (pip install deepspeed)"
        ) from None
    # A plugin without this would be ignored.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return DeepSpeedPlugin(
        hf_ds_config={
            **settings,
            "train_micro_batch_size_per_gpu": max(
                training.batch_size // (ranks * training.accumulation), 1
            ),
            # Micro-batches are the loop's business, as under DDP.
            "gradient_accumulation_steps": 1,
            # DeepSpeed itself would clip to 1.
            "gradient_clipping": training.clip_gradient_norm or 0.0,
            "zero_allow_untested_optimizer": True,
        }
    )


def _asked_for_deepspeed(path: str | None) -> dict[str, Any] | None:
    """DeepSpeed's configuration; without a ``path``, by what accelerate launch was told."""
    environment = os.environ
    if path is None and environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() in ("1", "true"):
        path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
        if not path:
            stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            asked = {"zero_optimization": {"stage": int(stage)}}
            return _checked(asked, "accelerate launch --zero_stage")
    return None if path is None else _checked(read_json(path, "DeepSpeed's configuration"), path)


def _checked(found: Any, source: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise UserError(f"{source}: DeepSpeed's configuration is an object of keys and values")
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0) if isinstance(zero, dict) else None
    if stage == 3:
        raise UserError(
            f"{source}: zero_optimization.stage 3 splits every layer's weights over the ranks, and "
            "the correlation of two filters needs both of them whole; use stage 0, 1 or 2"
        )
    if stage not in (0, 1, 2):
        raise UserError(
            f"{source}: zero_optimization.stage must be 0, 1 or 2, not {json.dumps(stage)}"
        )
    offloads = [key for key in zero if key.startswith("offload_") and zero[key] is not None]
    if offloads:
        raise UserError(f"{source}: zero_optimization.{offloads[0]} is not supported; leave it out")
    settings = {}
    for key, value in found.items():
        if key not in _OURS:
            settings[key] = value
        elif value != "auto":
            raise UserError(
                f'{source}: {key}: {_OURS[key]} says so; set it to "auto" here, or leave it out'
            )
    return settings
