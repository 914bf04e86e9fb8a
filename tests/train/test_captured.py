"""Steps that are recorded and replayed are the steps that they are recordings of.

A GPU replays kernels with the arguments that they were recorded with, and no Python. ``Operations``
does the same on the CPU with PyTorch's operations: each is done again on the very tensors that it
was recorded with, and its results go to where they went then.
"""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpp.methods.base import Method, Settings, TrainingContext
from tpp.methods.tpp import TPP
from tpp.methods.tpp import Settings as TPPSettings
from tpp.models.architecture import build_model
from tpp.selection.selection import Selection
from train.distillation.distillation import Distillation
from train.distillation.settings import DistillSection
from train.distributed.engine import Engine
from train.loop.bad_steps import StepCheck
from train.loop.loop import LoopSettings, train
from train.loop.step import WARM_UP
from train.tasks import make_task

STEPS, BATCH = 36, 8
SIDES = (16, 8)  # pixels of the first half of the steps, and of the others


def tensors(values):
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


class Operations(TorchDispatchMode):
    """Records operations, as a CUDA graph does kernels."""

    def __init__(self):
        super().__init__()
        self.recordings = self.warm_ups = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits for a number"
        for tensor in tensors((args, kwargs)):
            self._before.setdefault(tensor.untyped_storage()._cdata, (tensor, tensor.clone()))
        found = function(*args, **kwargs)
        for tensor in tensors(found):  # made by the recording itself
            self._before.setdefault(tensor.untyped_storage()._cdata, (tensor, None))
        self._done.append((function, args, kwargs, found))
        return found

    def warm_up(self, function):
        self.warm_ups += 1
        return function()

    def record(self, function):
        """Here it is also done; what it has changed is put back."""
        self.recordings += 1
        self._done, self._before = done, before = [], {}
        drawn = torch.get_rng_state()
        with self:
            found = function()
        torch.set_rng_state(drawn)
        with torch.no_grad():
            for tensor, value in before.values():
                if value is not None:
                    tensor.copy_(value)

        def replay():
            with torch.no_grad():
                for operation, args, kwargs, results in done:
                    again = operation(*args, **kwargs)
                    for place, value in zip(tensors(results), tensors(again), strict=True):
                        if place.data_ptr() != value.data_ptr():
                            place.copy_(value)
            return found

        return replay


def batches(spoilt):
    """Two micro-batches for each step, smaller images from half of the steps on."""
    for step in range(STEPS):
        numbers = torch.Generator().manual_seed(step)
        side = SIDES[2 * step // STEPS]
        for micro in range(2):
            images = torch.randn(BATCH, 3, side, side, generator=numbers)
            if (step, micro) == (spoilt, 1):
                images[0, 0, 0, 0] = math.nan
            yield images, torch.randint(0, 4, (BATCH,), generator=numbers)


def tpp_settings():
    return TPPSettings(
        delta=0.25,
        update_interval=2,
        stabilize_steps=40,
        zero_out_interval=2,
        remove_at_zero=False,
    )


def trained(recorder, network, method, *, spoilt=None, clip=None, teacher=None):
    """The weights of some steps, and the reports on them."""
    torch.manual_seed(0)
    model = network()
    torch.manual_seed(1)
    distillation = None
    if teacher is not None:
        distillation = Distillation(
            DistillSection(),
            model,
            teacher().eval().requires_grad_(False),
            example=torch.zeros(1, 3, SIDES[0], SIDES[0]),
            preprocessing={"channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3},
            key="distill",
        )
    if isinstance(method, TPP):
        selection = Selection({"layer*.conv1": 0.5})
        plan = selection.select(model)
        method.prepare(model, TrainingContext("regularize", plan, selection, 0, 1, None))
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, fused=True
    )
    engine = Engine(accelerator, model, optimizer, clip=clip)
    reports, bad_steps = [], []
    done = train(
        engine,
        batches(spoilt),
        make_task({"kind": "classification"}),
        method,
        LoopSettings(
            lr=lambda step: 2.0 ** -(5 + step // 10),  # numbers that float32 has
            finished=lambda step: step == STEPS,
            accumulation=2,
            log_every=5,
            recorder=recorder,
        ),
        check=StepCheck(model, max_norm=None, at_once=spoilt is not None),
        distillation=distillation,
        on_bad_step=bad_steps.append,
        on_report=lambda step, report: reports.append((step, report)),
        on_step=lambda step: False,
    )
    assert done == STEPS
    assert [bad.step - 1 for bad in bad_steps] == ([] if spoilt is None else [spoilt])
    return model.state_dict(), optimizer.state_dict(), reports


def with_dropout():
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.4)),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)),
    )


def resnet():
    return build_model("cifar_resnet8", 4)


CASES = {
    "TPP": (resnet, lambda: TPP(tpp_settings()), {}),
    "TPP, clipping": (resnet, lambda: TPP(tpp_settings()), {"clip": 0.5}),
    "TPP, a bad step": (resnet, lambda: TPP(tpp_settings()), {"spoilt": 12}),
    "a bad first step": (with_dropout, lambda: Method(Settings()), {"spoilt": 0}),
    "dropout": (with_dropout, lambda: Method(Settings()), {}),
    "a teacher": (with_dropout, lambda: Method(Settings()), {"teacher": resnet}),
}


@pytest.mark.parametrize("case", CASES)
def test_recorded_steps_are_the_computed_ones_to_the_bit(case):
    network, method, more = CASES[case]
    recorder = Operations()
    weights, state, reports = trained(None, network, method(), **more)
    replayed, replayed_state, replayed_reports = trained(recorder, network, method(), **more)
    for name, values in weights.items():
        assert torch.equal(values, replayed[name]), name
    for number, own in state["state"].items():
        assert torch.equal(
            own["momentum_buffer"], replayed_state["state"][number]["momentum_buffer"]
        )
    for (step, report), (other_step, other) in zip(reports, replayed_reports, strict=True):
        assert step == other_step
        assert report.loss_terms == other.loss_terms
        assert (report.loss, report.gradient_norm) == (other.loss, other.gradient_norm)
        assert report.metrics == other.metrics
    assert recorder.recordings and recorder.warm_ups < STEPS


def test_steps_are_recorded_anew_where_terms_or_shapes_change():
    """Both graphs at the start and where images change; TPP's grow, then its layers go to zero."""
    recorder = Operations()
    trained(recorder, with_dropout, Method(Settings()))
    assert (recorder.recordings, recorder.warm_ups) == (4, 2 * WARM_UP)

    class Changing(Method):
        def before_step(self, step):
            return step in (8, 10, 20)

    recorder = Operations()
    trained(recorder, with_dropout, Changing(Settings()))
    # From step 8 on there are two steps to warm up, from 10 on three, from 18 on two.
    assert (recorder.recordings, recorder.warm_ups) == (6, WARM_UP + 2 + WARM_UP + 2 + WARM_UP)
