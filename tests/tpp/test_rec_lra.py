"""rec-LRA's updates against the written-down equations, in float64, and what must not be there."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.local_memory import PeakOfBatch, step_of
from tpp.common.errors import UserError
from tpp.methods.base import TrainingContext
from tpp.methods.rec_lra import RecLRA, Settings
from tpp.models.architecture import build_model, example_input_for
from tpp.selection.selection import Selection

PLAIN = {"reproject": None, "mixed": False}
CLASSES = 5


def prepared(model, *, seed=0, **settings):
    """A network in float64 with its method, and its E by layer."""
    method = RecLRA(Settings(**settings))
    method.modify(model, "dense")
    model.double().train()
    context = TrainingContext(
        stage="dense",
        plan=None,
        selection=Selection({}),
        rank=0,
        world_size=1,
        example_input=example_input_for(model),
    )
    method.prepare(model, context)
    return method


def backward(model, method, images, labels):
    """One micro-batch as the loop has it; returns outputs, loss and the method's terms."""
    outputs = model(images)
    terms = method.batch_terms((images, labels), outputs)
    loss = F.cross_entropy(outputs, labels)
    model.zero_grad(set_to_none=True)
    (loss + sum(terms.values())).backward()
    return outputs, loss, terms


def mlp(depth=5, width=7, activation="tanh", skip=0, bias=False):
    model = build_model(
        "plain_mlp",
        CLASSES,
        depth=depth,
        width=width,
        activation=activation,
        skip=skip,
        image_size=3,
    )
    if bias:
        for layer in (*model.layers, model.linear):
            layer.bias = nn.Parameter(torch.randn(layer.out_features))
    return model


def convnet(activation="tanh", skip=0, depth=10, width=3):
    return build_model(
        "plain_convnet", CLASSES, depth=depth, width=width, activation=activation, skip=skip
    )


def batch(channels=1, side=3, count=6):
    torch.manual_seed(5)
    images = torch.randn(count, channels, side, side, dtype=torch.float64)
    return images, torch.randint(0, CLASSES, (count,))


def layers_of(model):
    return [*model.layers, model.linear]


def close(one, other, tolerance=1e-13):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


PHI = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}


def written_down(model, images, labels, settings, activation, skip):
    """Steps 1 to 8 for fully connected layers, image by image and layer by layer; with its E."""
    phi, c = PHI[activation], settings.reproject
    layers = layers_of(model)
    depth, count = len(layers), len(images)
    m = settings.error_skip
    totals = {}
    for x, label in zip(images.flatten(1), labels, strict=True):
        h, z = [None], [x]
        for number, layer in enumerate(layers, 1):
            pre = layer.weight.detach() @ z[-1]
            if layer.bias is not None:
                pre = pre + layer.bias.detach()
            earlier = z[number - skip] if skip and number % skip == 0 else None
            if number < depth and earlier is not None and earlier.shape == pre.shape:
                pre = pre + earlier
            h.append(pre)
            z.append(phi(pre) if number < depth else pre.softmax(0))
        e = {depth: z[depth] - F.one_hot(labels[:1] * 0 + label, CLASSES)[0]}
        for number in range(depth - 1, 0, -1):
            E = layers[number - 1].errors.detach()
            from_output = m > 0 and number % m == 0
            source = e[depth] if from_output else e[number + 1]
            matrix = E if from_output else E.T  # the next layer's has its weights' shape
            d = matrix @ source
            y = phi(h[number] - settings.beta * d)
            e[number] = z[number] - y
            if settings.mixed:
                a = 0.19 if from_output else 0.24
                e[number] = a * e[number] + (1 - a) * e[number].sign()
            local = {"lra_e": z[number], "published": -d, "descent": d}.get(settings.rule)
            if local is not None:
                change = settings.gamma * torch.outer(local, source)
                key = (number, "errors")
                totals[key] = totals.get(key, 0) + (change if from_output else change.T) / count
        for number, layer in enumerate(layers, 1):
            found = {"weight": torch.outer(e[number], z[number - 1])}
            if layer.bias is not None:
                found["bias"] = e[number]
            for name, value in found.items():
                totals[number, name] = totals.get((number, name), 0) + value / count
    if c is None:
        return totals
    return {key: t * c / t.norm() if t.norm() >= c else t for key, t in totals.items()}


@pytest.mark.parametrize("rule", ["lra_e", "published", "descent", "fixed"])
@pytest.mark.parametrize(
    ("error_skip", "skip", "mixed", "reproject", "activation"),
    [
        (2, 2, False, None, "tanh"),
        (0, 0, False, 0.05, "relu"),
        (3, 2, True, 0.3, "tanh"),
        (1, 3, True, None, "relu"),
    ],
)
def test_every_gradient_is_the_written_down_update(
    rule, error_skip, skip, mixed, reproject, activation
):
    if rule == "descent" and mixed:
        pytest.skip("refused")
    torch.manual_seed(0)
    model = mlp(6, skip=skip, activation=activation, bias=True)
    method = prepared(
        model,
        rule=rule,
        error_skip=error_skip,
        mixed=mixed,
        reproject=reproject,
        beta=0.7,
        gamma=0.4,
    )
    images, labels = batch()
    backward(model, method, images, labels)
    truth = written_down(model, images, labels, method.settings, activation, skip)
    named = {
        (number, name): parameter.grad
        for number, layer in enumerate(layers_of(model), 1)
        for name, parameter in layer.named_parameters()
    }
    assert named.keys() == truth.keys()
    for key, gradient in named.items():
        assert gradient.any(), key
        assert (gradient - truth[key]).norm() <= 1e-13 * truth[key].norm(), key


def test_convolutions_have_the_gradient_of_the_sheets_surrogate():
    """S = 1/B sum <e_l, conv(z_{l-1}, W_l)> by autograd; errors sent down by its adjoints."""
    torch.manual_seed(1)
    model = convnet(skip=2)
    method = prepared(model, error_skip=3, beta=0.3, gamma=0.4, **PLAIN)
    images, labels = batch(3, 32, 2)
    backward(model, method, images, labels)
    layers, z, h, x = layers_of(model), [], [], images
    earlier = images  # as many channels as the first layers have
    inputs = []
    for number, layer in enumerate(model.layers, 1):
        inputs.append(x)
        a = F.conv2d(x, layer.weight.detach(), stride=layer.stride, padding=1)
        if number % 2 == 0 and earlier.shape == a.shape:
            a = a + earlier
        h.append(a)
        x = torch.tanh(a)
        z.append(x)
        earlier = x if number % 2 == 0 else earlier
    inputs.append(x.mean((2, 3)))
    depth = len(layers)
    logits = inputs[-1] @ model.linear.weight.detach().T
    e = {depth: logits.softmax(1) - F.one_hot(labels, CLASSES)}
    for number in range(depth - 1, 0, -1):
        E = layers[number - 1].errors.detach()
        below = z[number - 1].clone().requires_grad_()
        if number % 3 == 0:
            d = (e[depth] @ E.T).reshape(below.shape)
        else:
            above = layers[number]
            if number == depth - 1:
                out = F.linear(below.mean((2, 3)), E)
            else:
                out = F.conv2d(below, E, stride=above.stride, padding=1)
            (d,) = torch.autograd.grad(out, below, e[number + 1])
        e[number] = z[number - 1] - torch.tanh(h[number - 1] - 0.3 * d)
    for number, layer in enumerate(layers, 1):
        weight = layer.weight.detach().clone().requires_grad_()
        x = inputs[number - 1]
        a = (
            F.linear(x, weight)
            if number == depth
            else F.conv2d(x, weight, stride=layer.stride, padding=1)
        )
        (truth,) = torch.autograd.grad((e[number] * a).sum() / len(images), weight)
        close(layer.weight.grad, truth)
        if number < depth:
            if number % 3 == 0:
                truth_of_e = z[number - 1].flatten(1).T @ e[depth] / len(images)
                close(layer.errors.grad, 0.4 * truth_of_e)
            else:
                close(layer.errors.grad, 0.4 * layers[number].weight.grad)


def with_transposed_errors(model, **settings):
    """Each E, adjacent, is the next layer's weights, which is applied transposed."""
    method = prepared(model, error_skip=0, **settings)
    for layer, above in itertools.pairwise(layers_of(model)):
        layer.errors.data.copy_(above.weight.data)
    return method


@pytest.mark.parametrize(("build", "shape"), [(mlp, (1, 3)), (convnet, (3, 32))])
def test_identity_and_transposed_weights_give_scaled_backpropagation(build, shape):
    torch.manual_seed(2)
    beta, model = 0.5, build(depth=6, activation="identity")
    method = with_transposed_errors(model, beta=beta, **PLAIN)
    images, labels = batch(*shape)
    backward(model, method, images, labels)
    found = [layer.weight.grad.clone() for layer in layers_of(model)]
    method.restore(model)
    F.cross_entropy(model(images), labels).backward()
    for number, layer in enumerate(layers_of(model)):
        layer_grad = layer.weight.grad - found[number]  # the two were added up
        scale = beta ** (len(found) - 1 - number)
        assert (found[number] - scale * layer_grad).norm() <= 1e-11 * found[number].norm()


def test_with_tanh_it_is_backpropagation_to_first_order_in_beta():
    torch.manual_seed(3)
    images, labels = batch()
    apart = []
    for beta in (1e-1, 1e-2, 1e-3):
        torch.manual_seed(3)
        model = mlp(3)
        method = with_transposed_errors(model, beta=beta, **PLAIN)
        backward(model, method, images, labels)
        first = model.layers[0].weight.grad / beta**2
        method.restore(model)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        truth = model.layers[0].weight.grad
        apart.append(float((first - truth).norm() / truth.norm()))
    assert apart[0] < 0.3
    for coarse, fine in itertools.pairwise(apart):
        assert 7 < coarse / fine < 13


def test_straight_from_the_output_it_is_beta_times_backpropagation():
    torch.manual_seed(4)
    model = mlp(activation="identity")
    method = prepared(model, error_skip=1, beta=0.3, **PLAIN)
    product = torch.eye(CLASSES, dtype=torch.float64)
    for layer, above in reversed([*itertools.pairwise(layers_of(model))]):
        product = product @ above.weight.detach()
        layer.errors.data.copy_(product.T)
    images, labels = batch()
    backward(model, method, images, labels)
    found = [layer.weight.grad.clone() for layer in model.layers]
    method.restore(model)
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()
    for layer, gradient in zip(model.layers, found, strict=True):
        close(gradient, 0.3 * layer.weight.grad)


def test_last_layer_has_the_tasks_gradient_to_the_bit():
    torch.manual_seed(6)
    images, labels = batch()
    for reproject in (None, 1e3):
        model = mlp(skip=2)
        method = prepared(model, reproject=reproject)
        backward(model, method, images, labels)
        found = model.linear.weight.grad.clone()
        method.restore(model)
        model.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        assert torch.equal(found, model.linear.weight.grad)


def reached(start):
    """The parameters that an autograd graph ends at."""
    waiting, seen, found = [start.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


@pytest.mark.parametrize("skip", [0, 2])
def test_no_tensor_of_a_layer_reaches_the_layer_before(skip):
    model = convnet(skip=skip)
    method = prepared(model)
    images, labels = batch(3, 32, 2)
    seen = {}
    for layer in layers_of(model):
        layer.register_forward_hook(lambda module, inputs, output: seen.update({module: output}))
    for activation in model.activations:
        activation.register_forward_hook(
            lambda module, inputs, output: seen.update({module: output})
        )
    outputs = model(images)
    for layer in layers_of(model):
        assert reached(seen[layer]) == {id(layer.weight)}
    assert not any(seen[activation].requires_grad for activation in model.activations)
    assert reached(F.cross_entropy(outputs, labels)) == {id(model.linear.weight)}
    F.cross_entropy(outputs, labels).backward()
    assert all(layer.weight.grad is None for layer in model.layers)
    # The terms lead to the parameters at once: through no layer, and to no layer's output.
    (term,) = method.batch_terms((images, labels), outputs.detach()).values()
    direct = [type(following).__name__ for following, _ in term.grad_fn.next_functions]
    assert {*direct} == {"NoneType", "AccumulateGrad"}


def test_nothing_learns_where_the_output_is_right_and_only_the_last_layer_with_beta_zero():
    images, labels = batch()
    model = mlp()
    method = prepared(model, rule="fixed", **PLAIN)
    outputs = model(images)
    sure = 1e4 * F.one_hot(labels, CLASSES).double()
    (term,) = method.batch_terms((images, labels), sure).values()
    term.backward()
    assert term == 0 and not any(layer.weight.grad.any() for layer in model.layers)
    for skip in (0, 2):
        model = mlp()
        method = prepared(model, beta=0.0, error_skip=skip)
        backward(model, method, images, labels)
        assert not any(layer.weight.grad.any() for layer in model.layers)
        assert model.linear.weight.grad.any()
    assert outputs.requires_grad


def test_reprojection_shortens_and_does_not_turn():
    images, labels = batch()
    found = []
    for reproject in (None, 0.5):
        torch.manual_seed(7)
        model = mlp()
        method = prepared(model, beta=0.7, reproject=reproject)
        backward(model, method, 3 * images, labels)
        found.append([p.grad for p in model.parameters()])
    shortened = 0
    for free, bound in zip(*found, strict=True):
        assert bound.norm() <= 0.5 * (1 + 1e-12)
        shortened += bool(free.norm() > 0.5)
        close(bound, free * min(1, 0.5 / float(free.norm())))
    assert 0 < shortened < len(found[0])


def test_under_the_predecessors_rule_errors_stay_the_transposed_weights():
    torch.manual_seed(8)
    model = mlp()
    method = with_transposed_errors(model, gamma=1.0, beta=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    images, labels = batch()
    before = model.layers[0].errors.detach().clone()
    for _ in range(20):
        backward(model, method, images, labels)
        optimizer.step()
    for layer, above in itertools.pairwise(layers_of(model)):
        close(layer.errors, above.weight)
    assert (before - model.layers[0].errors).norm() > 0.01


def test_mixed_labels_are_shares():
    images, labels = batch()
    shares = 0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot(labels.flip(0), CLASSES)
    model = mlp()
    method = prepared(model, error_skip=1, beta=0.3, **PLAIN)
    backward(model, method, images, shares)
    error = model(images).detach().softmax(1) - shares
    layer = model.layers[0]
    h = images.flatten(1) @ layer.weight.detach().T
    e = h.tanh() - (h - 0.3 * error @ layer.errors.detach().T).tanh()
    close(layer.weight.grad, e.T @ images.flatten(1) / len(images))


def test_the_mean_over_parts_is_the_update_of_the_whole():
    """What ranks and micro-batches rely on; re-projection is of each part."""
    images, labels = batch()
    model = mlp(skip=2)
    method = prepared(model, beta=0.5, reproject=None)
    found = []
    for parts in ((slice(None),), (slice(0, 3), slice(3, 6))):
        total = [0.0] * len([*model.parameters()])
        for part in parts:
            backward(model, method, images[part], labels[part])
            grads = [p.grad / len(parts) for p in model.parameters()]
            total = [a + b for a, b in zip(total, grads, strict=True)]
        found.append(total)
    for whole, parted in zip(*found, strict=True):
        close(whole, parted)


def test_under_autocast_updates_are_near_those_of_float32():
    torch.manual_seed(10)
    model = convnet(skip=2, depth=6)
    method = prepared(model, beta=0.3)
    model.float()
    images, labels = batch(3, 32, 8)
    found = []
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            outputs = model(images.float())
            (term,) = method.batch_terms((images, labels), outputs.float()).values()
        model.zero_grad(set_to_none=True)
        (F.cross_entropy(outputs.float(), labels) + term).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for full, lower in zip(*found, strict=True):
        assert lower.dtype == torch.float32
        assert 0 < (full - lower).norm() < 0.05 * full.norm()


def test_noise_is_the_same_in_both_runs_and_absent_in_evaluation():
    images, labels = batch()
    model = mlp(3)
    method = prepared(model, noise=0.5, error_skip=1, beta=0.3, **PLAIN)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backward(model, method, images, labels)
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], images.flatten(1))
    model.eval()
    model(images)
    assert torch.equal(seen[2], images.flatten(1))


def test_a_step_keeps_no_more_of_a_deeper_network():
    """Unlike backpropagation, and unlike errors that come down layer by layer."""

    def peak(depth, error_skip):
        model = mlp(depth, width=16)
        counted = PeakOfBatch(64)
        step = step_of(model, error_skip, 64, images=torch.randn(64, 1, 3, 3))
        with counted:
            step()
        return counted.peak

    assert peak(40, 2) == peak(12, 2) < peak(12, None)
    for way in (None, 0):
        assert peak(40, way) > 2.5 * peak(12, way)


@pytest.mark.parametrize(
    ("name", "args", "why"),
    [
        ("cifar_resnet8", {}, "CifarResNet bn1 is a BatchNorm2d|conv1 is followed by bn1"),
        ("mlp7_linear", {}, "LinearMLP fc1 is followed by fc2"),
        ("resnet18", {}, "conv1 is followed by bn1"),
        ("cifar_vgg16_bn", {}, "features.0 is followed by features.1"),
        ("vgg11", {"num_classes": 3}, "overwrites what it gets"),
    ],
)
def test_other_networks_are_refused(name, args, why):
    classes = args.pop("num_classes", 10)
    model = build_model(name, classes, **args)
    with pytest.raises(UserError, match=rf"^name: rec_lra trains chains .*({why})"):
        RecLRA(Settings()).check_network(model, "dense")
    RecLRA(Settings()).check_network(model, "finetune")


def test_images_of_another_size_are_refused_where_errors_depend_on_it():
    images, labels = batch(3, 16, 2)
    for error_skip in (0, 2):
        model = convnet(width=4, depth=6)
        method = prepared(model, error_skip=error_skip)
        if error_skip:
            with pytest.raises(UserError, match=r"\(3, 32, 32\), and training has \(3, 16, 16\)"):
                model(images)
        else:
            backward(model, method, images, labels)


def test_descent_with_mixed_errors_is_refused():
    with pytest.raises(ValueError, match="ends at chance"):
        Settings(rule="descent", mixed=True)


def test_it_begins_alike_and_leaves_an_ordinary_network():
    states = []
    for _ in range(2):
        torch.manual_seed(11)
        model = convnet(width=4)
        names = [*model.state_dict()]
        torch.manual_seed(len(states))
        method = prepared(model)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        method.restore(model)
        assert [*model.state_dict()] == names
        images, labels = batch(3, 32, 2)
        F.cross_entropy(model(images), labels).backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert sum(key.endswith("errors") for key in states[0]) == 9
