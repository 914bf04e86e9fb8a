"""The networks that the pruner is tested on."""

from typing import Any

# Per network: how many layers' filters can go alone, and how many with those tied to them, without
# changing what is left; counted from the block diagrams. Then sizes of images.
NETWORKS: dict[str, tuple[int, int, dict[str, Any], tuple[int, int]]] = {
    # the first of two convolutions of each block; all but the classifier
    "resnet18": (8, 20, {}, (64, 80)),
    "resnet34": (16, 36, {}, (64, 80)),
    # the first two of three
    "resnet50": (32 + 1, 53, {}, (64, 80)),
    "resnet101": (66 + 1, 104, {}, (64, 80)),
    "wide_resnet50_2": (32 + 1, 53, {}, (64, 80)),
    "resnext50_32x4d": (32 + 1, 53, {}, (64, 80)),
    "vgg16_bn": (15, 15, {}, (64, 80)),
    "mobilenet_v2": (20, 52, {}, (64, 80)),
    "mobilenet_v3_large": (24, 63, {}, (64, 80)),
    "efficientnet_b0": (35, 81, {}, (64, 80)),
    "densenet121": (120, 120, {}, (64, 80)),
    "regnet_y_400mf": (49, 85, {}, (64, 80)),
    "googlenet": (57, 57, {}, (64, 80)),
    "squeezenet1_1": (25, 25, {}, (64, 80)),
    "convnext_tiny": (18, 18, {}, (64, 80)),  # the wide layer of each block; LayerNorms elsewhere
    "shufflenet_v2_x1_0": (18, 35, {}, (64, 80)),
    "timm:resnet50d": (35, 55, {}, (64, 80)),
    "timm:seresnet50": (49, 85, {}, (64, 80)),
    "timm:vit_tiny_patch16_224": (12, 12, {"img_size": 32, "dynamic_img_size": True}, (32, 64)),
    # Depthwise convolutions beside what they filter, and a format of its own.
    "timm:repvit_m1": (37, 126, {}, (64, 80)),
    "mnasnet0_5": (20, 52, {}, (64, 80)),
    "cifar_resnet20": (9, 9, {}, (16, 24)),
    "cifar_resnet56": (27, 27, {}, (16, 24)),
    "cifar_vgg16_bn": (13, 13, {}, (32, 64)),
    "cifar_vgg19_bn": (16, 16, {}, (32, 64)),
    "mlp7_linear": (6, 6, {}, (28, 28)),
}
