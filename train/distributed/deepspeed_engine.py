"""DeepSpeed's ZeRO as an engine, and what it may be told."""

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from tpp.common.errors import UserError
from tpp.common.reading import read_json
from train.config.sections import TrainingSection
from train.distributed.engine import Engine

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
        self._has_momentum = any(group["momentum"] for group in self._groups)
        for parameter in network.parameters():
            # It looks at their bytes in one row, which channels last are not (findings/).
            parameter.data = parameter.data.contiguous()
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
        if not self._has_momentum:
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
        if not self._has_momentum or not zero._hp_optimizer_states_linked:
            return {}
        return {
            number: {_BUFFER: safe_get_full_optimizer_state(parameter, _BUFFER)}
            for number, parameter in enumerate(self._numbered)
            if parameter.requires_grad
        }


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
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        asked = int(stage) if stage and stage.isdigit() else stage or 2
        if not path:
            settings = {"zero_optimization": {"stage": asked}}
            return _checked(settings, "accelerate launch, zero_stage")
        found = _checked(read_json(path, "DeepSpeed's configuration"), path)
        if stage is not None and asked != found.get("zero_optimization", {}).get("stage", 0):
            raise UserError(
                f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}: {path}, which accelerate launch names "
                "too, says otherwise; leave zero_stage out"
            )
        return found
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
