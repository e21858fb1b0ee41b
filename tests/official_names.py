# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the tensors in the official checkpoints, by rule.

Those of `karfly/learnable-triangulation-pytorch`, trained with ResNet-152 and 17 joints: plain
state dicts. Written without the package, to compare it with.
"""

from __future__ import annotations

Shapes = dict[str, tuple[int, ...]]

BOTTLENECKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def weights(name: str, *shape: int, bias: int = 0) -> Shapes:
    """A convolution or a fully connected layer."""
    return {f"{name}.weight": shape} | ({f"{name}.bias": (bias,)} if bias else {})


def batch_norm(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{v}": (channels,) for v in vectors} | {f"{name}.num_batches_tracked": ()}


def trunk(depth: int = 152) -> Shapes:
    """A ResNet of bottlenecks without its classifier, as in torchvision."""
    shapes = weights("conv1", 64, 3, 7, 7) | batch_norm("bn1", 64)
    incoming = 64
    for stage, count in enumerate(BOTTLENECKS[depth]):
        inner = 64 * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            shapes |= weights(f"{name}.conv1", inner, incoming, 1, 1)
            shapes |= weights(f"{name}.conv2", inner, inner, 3, 3)
            shapes |= weights(f"{name}.conv3", 4 * inner, inner, 1, 1)
            shapes |= batch_norm(f"{name}.bn1", inner) | batch_norm(f"{name}.bn2", inner)
            shapes |= batch_norm(f"{name}.bn3", 4 * inner)
            if block == 0:
                shapes |= weights(f"{name}.downsample.0", 4 * inner, incoming, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", 4 * inner)
            incoming = 4 * inner
    return shapes


def backbone(joints: int = 17, *, algebraic: bool = False, volumetric: bool = False) -> Shapes:
    shapes = trunk()
    for index, incoming in ((0, 2048), (3, 256), (6, 256)):
        shapes |= weights(f"deconv_layers.{index}", incoming, 256, 4, 4)
        shapes |= batch_norm(f"deconv_layers.{index + 1}", 256)
    shapes |= weights("final_layer", joints, 256, 1, 1, bias=joints)
    if algebraic:
        shapes |= confidences("alg_confidences", joints)
    if volumetric:
        shapes |= confidences("vol_confidences", 32)
    return shapes


def confidences(name: str, count: int) -> Shapes:
    return (
        weights(f"{name}.features.0", 512, 2048, 3, 3, bias=512)
        | batch_norm(f"{name}.features.1", 512)
        | weights(f"{name}.features.4", 256, 512, 3, 3, bias=256)
        | batch_norm(f"{name}.features.5", 256)
        | weights(f"{name}.head.0", 512, 256, bias=512)
        | weights(f"{name}.head.2", 256, 512, bias=256)
        | weights(f"{name}.head.4", count, 256, bias=count)
    )


def volume_net(joints: int = 17) -> Shapes:
    shapes = convolution("front_layers.0", 32, 16, 7) | residual("front_layers.1", 16, 32)
    shapes |= residual("front_layers.2", 32, 32) | residual("front_layers.3", 32, 32)
    sizes = {1: (32, 64), 2: (64, 128), 3: (128, 128), 4: (128, 128), 5: (128, 128)}
    for level, (outer, inner) in sizes.items():
        shapes |= residual(f"encoder_decoder.encoder_res{level}", outer, inner)
        shapes |= residual(f"encoder_decoder.skip_res{level}", outer, outer)
        shapes |= residual(f"encoder_decoder.decoder_res{level}", inner, inner)
        name = f"encoder_decoder.decoder_upsample{level}"
        shapes |= weights(f"{name}.block.0", inner, outer, 2, 2, 2, bias=outer)
        shapes |= batch_norm(f"{name}.block.1", outer)
    shapes |= residual("encoder_decoder.mid_res", 128, 128)
    shapes |= residual("back_layers.0", 32, 32)
    shapes |= convolution("back_layers.1", 32, 32, 1) | convolution("back_layers.2", 32, 32, 1)
    return shapes | weights("output_layer", joints, 32, 1, 1, 1, bias=joints)


def convolution(name: str, incoming: int, outgoing: int, kernel: int) -> Shapes:
    shapes = weights(f"{name}.block.0", outgoing, incoming, kernel, kernel, kernel, bias=outgoing)
    return shapes | batch_norm(f"{name}.block.1", outgoing)


def residual(name: str, incoming: int, outgoing: int) -> Shapes:
    first, second = f"{name}.res_branch.0", f"{name}.res_branch.3"
    shapes = weights(first, outgoing, incoming, 3, 3, 3, bias=outgoing)
    shapes |= batch_norm(f"{name}.res_branch.1", outgoing)
    shapes |= weights(second, outgoing, outgoing, 3, 3, 3, bias=outgoing)
    shapes |= batch_norm(f"{name}.res_branch.4", outgoing)
    if incoming != outgoing:
        shapes |= weights(f"{name}.skip_con.0", outgoing, incoming, 1, 1, 1, bias=outgoing)
        shapes |= batch_norm(f"{name}.skip_con.1", outgoing)
    return shapes


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def algebraic_network(joints: int = 17) -> Shapes:
    return prefixed("backbone.", backbone(joints, algebraic=True))


def volumetric_network(joints: int = 17, *, confidence: bool = False) -> Shapes:
    return (
        prefixed("backbone.", backbone(joints, volumetric=confidence))
        | weights("process_features.0", 32, 256, 1, 1, bias=32)
        | prefixed("volume_net.", volume_net(joints))
    )
