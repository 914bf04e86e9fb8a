"""DeepSpeed's ZeRO as an engine, and what it may be told."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor, nn
from torch.optim import Optimizer

from tpp.common.errors import UserError
from tpp.common.reading import read_json
from train.config.sections import TrainingSection
from train.distributed.engine import Engine, numbers_of, plain, portable

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
        self._groups = portable(optimizer.state_dict(), numbers_of(network, optimizer))[
            "param_groups"
        ]
        super().__init__(accelerator, network, optimizer, clip=clip)
        # Stage 0 leaves the optimiser as it is.
        self._is_zero = self.saves_together = self.model.zero_optimization_stage() > 0

    def _prepare(self, network: nn.Module, optimizer: Optimizer) -> tuple[Any, Any]:
        for parameter in network.parameters():
            # It looks at their bytes in one row, which channels last are not (findings/).
            parameter.data = parameter.data.contiguous()
        model, wrapped = self.accelerator.prepare(network, optimizer)
        return model, wrapped

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

    def take_over(self, parameters: Sequence[nn.Parameter] | None) -> None:
        """Under ZeRO, write them to the float32 copies that the optimiser steps on."""
        if self._is_zero and parameters:
            from deepspeed.utils import safe_set_full_fp32_param

            for parameter in parameters:
                safe_set_full_fp32_param(parameter, parameter.detach())

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, gathered from all ranks, as if nothing were split."""
        if not self._is_zero:
            return super().state_dict()
        groups = [
            {**mine, **{key: plain(value) for key, value in now.items() if key != "params"}}
            for mine, now in zip(self._groups, self._optimizer.param_groups, strict=True)
        ]
        return {"state": self._gathered(), "param_groups": groups}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a :meth:`state_dict`: each rank its own part of it."""
        if not self._is_zero:
            super().load_state_dict(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        entries = {int(number): own for number, own in state["state"].items()}
        zero, split = self.model.optimizer, list[tuple[int, str]]()
        for flat, numbers in self._flat_groups():
            mine = [(number, entries[number]) for number in numbers if number in entries]
            for key in mine[0][1] if mine else ():
                values = [(number, own[key]) for number, own in mine]
                if all(self._is_of_shape(number, value) for number, value in values):
                    zero.optimizer.state[flat][key] = torch.zeros_like(flat)
                    split += [(number, key) for number, _ in values]
                elif values[0][1] is not None:
                    zero.optimizer.state[flat][key] = _own(values[0][1])
        if not entries:
            return
        # As torch.optim does it, where some make tensors again of the counts in their groups.
        base = zero.optimizer
        for group, saved in zip(base.param_groups, state["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}
        base.__setstate__({"state": base.state, "param_groups": base.param_groups})
        if not split:
            return
        self._link()
        for number, key in split:
            value = entries[number][key].to(self.accelerator.device)
            safe_set_full_optimizer_state(self._numbered[number], value, key)

    def _link(self) -> None:
        """Let DeepSpeed find the parameters' parts of the states that there are.

        It does so itself once, after the first step of the first group, when the other groups have
        none yet (findings/deepspeed_states_of_later_groups.sh).
        """
        zero = self.model.optimizer
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()

    def _flat_groups(self) -> list[tuple[Tensor, list[int]]]:
        """This rank's part of each group, flat, and the numbers of the group's parameters."""
        numbers = [
            [n for n in group["params"] if self._numbered[n].requires_grad]
            for group in self._groups
        ]
        flats = self.model.optimizer.single_partition_of_fp32_groups
        return list(zip(flats, numbers, strict=True))

    def _is_of_shape(self, number: int, value: Any) -> bool:
        """Whether it is a tensor like the parameter, and not a count of steps."""
        return isinstance(value, Tensor) and value.shape == self._numbered[number].shape

    def _gathered(self) -> dict[int, dict[str, Any]]:
        """What the optimiser keeps of every parameter, whole on every rank, in their order.

        None before the first step. What has the size of this rank's part of a group is split over
        the ranks; the rest, such as a count of steps, is the same of all.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        zero, gathered = self.model.optimizer, dict[int, dict[str, Any]]()
        if not zero._hp_optimizer_states_linked:
            return {}
        self._link()
        for flat, numbers in self._flat_groups():
            for key, value in zero.optimizer.state[flat].items():
                split = isinstance(value, Tensor) and value.shape == flat.shape
                for number in numbers:
                    whole = value
                    if split:
                        whole = safe_get_full_optimizer_state(self._numbered[number], key)
                    gathered.setdefault(number, {})[key] = _own(whole)
        return dict(sorted(gathered.items()))


def _own(value: Any) -> Any:
    """In memory of its own: a count of steps is counted up in place."""
    return value.clone() if isinstance(value, Tensor) else value


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
        import deepspeed
    except ImportError:
        raise UserError(
            "training.deepspeed: DeepSpeed is not installed (pip install deepspeed)"
        ) from None
    # On CPUs it would compile this for minutes before the first step, for an all-reduce that only
    # inference calls; and a run killed meanwhile leaves a lock that later ones wait for.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
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
