# SPDX-License-Identifier: Apache-2.0
"""Cameras against OpenCV, against transcriptions of the lens formulas, and against its own laws."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import tritool.cameras
from tritool.cameras import Cameras, Distortion

WIDTH, HEIGHT = 1280, 720

# Coefficients of real lenses, or close to them, that are one-to-one over the whole image.
LENSES = {
    "pinhole": ("pinhole", None),
    "brown_conrady_4": ("brown_conrady", [[-0.28, 0.07, 0.001, -0.002], [0.1, -0.02, 0.0, 0.004]]),
    "brown_conrady_5": (
        "brown_conrady",
        [[-0.338, 0.0967, -0.00135, 0.00316, -0.00375], [0.17, -0.25, -0.00075, 0.0125, 0.156]],
    ),
    "brown_conrady_8": (
        "brown_conrady",
        [
            [10.3, 5.2, 0.0003, -0.0002, 0.2, 10.6, 9.1, 1.1],
            [-0.2, 0.1, 0.001, 0.001, 0.02, 0.3, 0.1, 0.0],
        ],
    ),
    "fisheye": ("fisheye", [[-0.02, 0.01, -0.005, 0.001], [0.05, -0.01, 0.003, -0.0005]]),
    "human36m": (
        "human36m",
        [[-0.2078, 0.2475, -0.00097, -0.00142, -0.0031], [-0.2, 0.25, 0.01, -0.02, -0.003]],
    ),
}
DISTORTED = [name for name in LENSES if name != "pinhole"]


def rotation(vector):
    """Rodrigues' formula, NumPy."""
    angle = np.linalg.norm(vector)
    if angle == 0:
        return np.eye(3)
    x, y, z = np.asarray(vector) / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def make_cameras(name="brown_conrady_5", dtype=torch.float64, skew=(1.5, -0.7)):
    """Two cameras that look at the origin from about 3 m and 4 m."""
    lens, coefficients = LENSES[name]
    K = torch.tensor(
        [
            [[820.0, skew[0], 630.5], [0, 835.0, 352.0], [0, 0, 1]],
            [[760.0, skew[1], 651.0], [0, 744.0, 366.5], [0, 0, 1]],
        ],
        dtype=torch.float64,
    )
    R = torch.tensor(np.stack([rotation([0.1, 0.4, -0.05]), rotation([-0.2, -1.1, 0.1])]))
    t = torch.tensor([[30.0, -50.0, 3000.0], [-80.0, 20.0, 4000.0]], dtype=torch.float64)
    if coefficients is not None:
        coefficients = torch.tensor(coefficients, dtype=torch.float64)
    cameras = Cameras(
        K,
        R,
        t,
        coefficients,
        image_size=(WIDTH, HEIGHT),
        names=["left", "right"],
        lens=lens,
    )
    return cameras.to(dtype)


def image_grid(dtype=torch.float64, columns=33, rows=19):
    """[rows, columns, 2, 2], the same grid of pixels over the image for both cameras."""
    x = torch.linspace(0, WIDTH - 1, columns, dtype=dtype)
    y = torch.linspace(0, HEIGHT - 1, rows, dtype=dtype)
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y], -1)[:, :, None, :].expand(-1, -1, 2, -1)


def world_points(count=40, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (600 * torch.randn(count, 3, generator=generator, dtype=torch.float64)).to(dtype)


def transcribed_lens(lens, k, x, y):
    """The published formulas for one normalised point, in plain Python numbers."""
    r2 = x * x + y * y
    if lens == "pinhole":
        return x, y
    if lens == "fisheye":
        r = np.sqrt(r2)
        if r == 0:
            return x, y
        a = np.arctan(r)
        bent = a + k[0] * a**3 + k[1] * a**5 + k[2] * a**7 + k[3] * a**9
        return x * bent / r, y * bent / r
    k1, k2, p1, p2, k3, k4, k5, k6 = [*k, *[0.0] * (8 - len(k))]
    if lens == "human36m":
        # As the data set's projection is usually written: one factor for the radial and the
        # tangential part, and an outer product.
        factor = 1 + np.dot([k1, k2, k3], [r2, r2**2, r2**3]) + p1 * y + p2 * x
        return tuple(np.array([x, y]) * factor + np.array([p2, p1]) * r2)
    radial = (1 + k1 * r2 + k2 * r2**2 + k3 * r2**3) / (1 + k4 * r2 + k5 * r2**2 + k6 * r2**3)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x),
        y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y,
    )


def transcribed_project(cameras, lens, coefficients, points):
    K, R, t = (tensor.numpy() for tensor in (cameras.K, cameras.R, cameras.t))
    pixels = np.full((len(points), len(K), 2), np.nan)
    for n, point in enumerate(points.numpy()):
        for c in range(len(K)):
            x, y, z = R[c] @ point + t[c]
            if z > 0:
                k = None if coefficients is None else coefficients[c]
                u, v = transcribed_lens(lens, k, x / z, y / z)
                pixels[n, c] = (K[c] @ [u, v, 1])[:2]
    return pixels


# Against independent sources.


@pytest.mark.parametrize("name", LENSES)
def test_project_is_the_published_formula(name):
    cameras = make_cameras(name)
    points = world_points()
    expected = transcribed_project(cameras, *LENSES[name], points)
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(cameras.project(points).numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in LENSES if name != "human36m"])
def test_project_and_undistort_agree_with_opencv(name):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed")
    cameras = make_cameras(name, skew=(0.0, 0.0))  # OpenCV's pinhole functions ignore skew
    lens, coefficients = LENSES[name]
    points = world_points()
    pixels = cameras.project(points)
    ideal = cameras.undistort(pixels)
    for c in range(2):
        K, R, t = (tensor[c].numpy() for tensor in (cameras.K, cameras.R, cameras.t))
        k = np.zeros(4) if coefficients is None else np.array(coefficients[c])
        pose = cv2.Rodrigues(R)[0], t
        measured = pixels[:, c : c + 1].contiguous().numpy()
        if lens == "fisheye":
            expected, _ = cv2.fisheye.projectPoints(points[:, None].numpy(), *pose, K, k)
            straight = cv2.fisheye.undistortPoints(measured, K, k, P=K)
        else:
            expected, _ = cv2.projectPoints(points.numpy(), *pose, K, k)
            criteria = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 500, 1e-13)
            straight = cv2.undistortPoints(measured, K, k, P=K, criteria=criteria)
        np.testing.assert_allclose(pixels[:, c], expected.reshape(-1, 2), rtol=0, atol=1e-6)
        np.testing.assert_allclose(ideal[:, c], straight.reshape(-1, 2), rtol=0, atol=1e-5)


def test_human36m_is_not_opencv_with_other_coefficients():
    k = torch.tensor([[0.0, 0.0, 0.01, -0.02, 0.0]], dtype=torch.float64)
    point = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    theirs = Distortion(k, "human36m").distort(point) - point
    opencv = Distortion(k, "brown_conrady").distort(point) - point
    r2 = 0.13
    constant = torch.tensor([[-0.02 * r2, 0.01 * r2]], dtype=torch.float64)
    # The r^2 term is shared, the others have half the factor.
    torch.testing.assert_close(theirs - constant, (opencv - constant) / 2, rtol=0, atol=1e-15)


def test_projections_and_centers():
    cameras = make_cameras("pinhole")
    points = world_points()
    homogeneous = torch.cat([points, torch.ones(len(points), 1, dtype=torch.float64)], -1)
    image = torch.einsum("cij,nj->nci", cameras.projections, homogeneous)
    pixels = image[..., :2] / image[..., 2:]
    torch.testing.assert_close(cameras.project(points), pixels, rtol=0, atol=1e-9)
    in_camera = torch.einsum("cij,cj->ci", cameras.R, cameras.centers) + cameras.t
    torch.testing.assert_close(in_camera, torch.zeros_like(in_camera), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", DISTORTED)
def test_undistorted_pixels_fit_the_projections(name):
    cameras = make_cameras(name)
    ideal = dataclasses.replace(cameras, distortion=None)
    points = world_points()
    straightened = cameras.undistort(cameras.project(points))
    torch.testing.assert_close(straightened, ideal.project(points), rtol=0, atol=1e-9)
    torch.testing.assert_close(cameras.distort(ideal.project(points)), cameras.project(points))


def shared_data(name):
    root = os.environ.get("TRITOOL_SHARED", Path(__file__).parents[2] / "shared")
    path = Path(root) / "data" / name
    if not path.is_file():
        pytest.skip(reason=f"real data {name} is not here (set TRITOOL_SHARED)")
    return np.load(path, allow_pickle=False)


def test_round_trip_on_real_measurements():
    data = shared_data("charuco_dev.npz")
    fields = (torch.as_tensor(data[key]).double() for key in ("K", "R", "t", "dist"))
    cameras = Cameras(*fields, image_size=torch.as_tensor(data["image_size"]))
    assert cameras.problems() == []
    pixels = torch.as_tensor(data["kp2d"]).double().movedim(-3, -2)  # [F, A, J, C, 2]
    seen = pixels.isfinite().all(-1)
    assert 1000 < int(seen.sum()) < seen.numel()
    ideal = cameras.undistort(pixels)
    assert torch.equal(ideal.isfinite().all(-1), seen)
    torch.testing.assert_close(cameras.distort(ideal), pixels, rtol=0, atol=1e-9, equal_nan=True)
    moved = (ideal - pixels)[seen].norm(dim=-1)
    assert moved.max() > 5  # the lenses do bend
    single = cameras.to(torch.float32)
    again = single.distort(single.undistort(pixels.float()))
    torch.testing.assert_close(again, pixels.float(), rtol=0, atol=2e-3, equal_nan=True)


# The inverse.


@pytest.mark.parametrize("name", LENSES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_round_trip_over_the_image(name, dtype, atol):
    cameras = make_cameras(name, dtype)
    pixels = image_grid(dtype)
    torch.testing.assert_close(
        cameras.undistort(cameras.distort(pixels)), pixels, rtol=0, atol=atol
    )
    torch.testing.assert_close(
        cameras.distort(cameras.undistort(pixels)), pixels, rtol=0, atol=atol
    )


def test_fisheye_near_the_edge_of_the_half_space():
    lens = Distortion(torch.zeros(1, 4, dtype=torch.float64), "fisheye")
    angle = torch.tensor([0.0, 1e-9, 0.05, 0.1, 0.1003, 1.0, 1.5, 1.56], dtype=torch.float64)
    points = torch.stack([angle, torch.zeros_like(angle)], -1)[:, None]
    ideal = lens.undistort(points)
    torch.testing.assert_close(ideal[:, 0, 0], torch.tan(angle), rtol=1e-9, atol=0)
    beyond = torch.tensor([[[1.58, 0.0]], [[0.0, 3.0]]], dtype=torch.float64)
    assert lens.undistort(beyond).isnan().all()


@pytest.mark.parametrize("lens", ["brown_conrady", "human36m"])
def test_barrel_without_inverse_is_nan(lens):
    # r (1 - 0.3 r^2) is largest at r = 1.054, where it is 0.7027.
    barrel = Distortion(torch.tensor([[-0.3, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64), lens)
    fold = (1 / 0.9) ** 0.5
    assert 0.998 * fold < barrel.radius_limit.item() < fold
    direction = torch.tensor([0.6, -0.8], dtype=torch.float64)
    radii = torch.tensor([0.0, 0.3, 0.7, 0.7028, 0.75, 2.0, 50.0], dtype=torch.float64)
    ideal = barrel.undistort(radii[:, None, None] * direction)
    assert ideal.isnan().all(-1)[:, 0].tolist() == [False] * 3 + [True] * 4
    # 0.7 is reached three times; the lens does it on the near branch.
    near = min(root.real for root in np.roots([-0.3, 0, 1, -0.7]) if root.real > 0)
    torch.testing.assert_close(ideal[2, 0].norm().item(), float(near), rtol=1e-12, atol=0)
    assert barrel.distort(1.5 * direction[None]).isnan().all()


def test_no_inverse_is_nan_in_pixels_and_in_projection():
    K = torch.tensor([[[500.0, 0, 639.5], [0, 500.0, 359.5], [0, 0, 1]]], dtype=torch.float64)
    pose = torch.eye(3, dtype=torch.float64)[None], torch.zeros(1, 3, dtype=torch.float64)
    cameras = Cameras(K, *pose, torch.tensor([[-0.3, 0, 0, 0]], dtype=torch.float64))
    pixels = torch.tensor([[[639.5 + 350, 359.5]], [[639.5 + 352, 359.5]]], dtype=torch.float64)
    assert cameras.undistort(pixels).isnan().any(-1)[:, 0].tolist() == [False, True]
    # At 60 degrees off the axis the polynomial comes back into the image.
    off_axis = torch.tensor([3**0.5, 0.0, 1.0], dtype=torch.float64)
    assert cameras.project(off_axis).isnan().all()
    assert cameras.project(off_axis * torch.tensor([0.5, 1, 1])).isfinite().all()


def test_pole_of_the_rational_model_ends_the_disc():
    # Numerator and denominator vanish together at s = 1: beyond it g is positive again.
    k = torch.tensor([[-1.0, 0, 0, 0, 0, -1.0001, 0, 0]], dtype=torch.float64)
    assert Distortion(k).radius_limit.item() < 1


def test_nearly_folding_lens_is_inverted_everywhere():
    # One-to-one all over, but nearly flat around r = 0.9 on one side: full Newton steps from the
    # radial start cycle there.
    k = torch.tensor([[-0.7296, 0.0182, 0.0269, 0.0133, 0.2840]], dtype=torch.float64)
    lens = Distortion(k)
    radius = torch.linspace(0, 2, 201, dtype=torch.float64)
    turn = torch.linspace(0, 6.3, 201, dtype=torch.float64)[:, None]
    points = torch.stack([radius * turn.cos(), radius * turn.sin()], -1)[:, :, None]
    torch.testing.assert_close(lens.undistort(lens.distort(points)), points, rtol=0, atol=1e-12)


def wild_coefficients(lens):
    bounds = {
        "brown_conrady": [0.8, 0.5, 0.05, 0.05, 0.3],
        "human36m": [0.8, 0.5, 0.05, 0.05, 0.3],
        "fisheye": [0.3, 0.2, 0.1, 0.05],
    }[lens]
    return st.tuples(*[st.floats(-bound, bound, allow_subnormal=False) for bound in bounds])


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_law_inverse_on_the_disc_and_never_wrong_off_it(data):
    lens = data.draw(st.sampled_from(["brown_conrady", "fisheye", "human36m"]))
    k = torch.tensor([data.draw(wild_coefficients(lens))], dtype=torch.float64)
    model = Distortion(k, lens)
    turn = torch.linspace(0, 2 * torch.pi, 25, dtype=torch.float64)[:, None]
    radius = torch.linspace(0, 1, 21, dtype=torch.float64)
    ring = torch.stack([radius * turn.cos(), radius * turn.sin()], -1).reshape(-1, 1, 2)
    points = ring * 0.98 * model.radius_limit.clamp_max(3)
    bent = model.distort(points)
    # One-to-one, seen without the inverse: the map is strictly monotone between any two points.
    difference, image = (p - p.transpose(0, 1) for p in (points, bent))
    apart = difference.norm(dim=-1) > 1e-9
    assert ((difference * image).sum(-1)[apart] > 0).all()
    torch.testing.assert_close(model.undistort(bent), points, rtol=0, atol=1e-9)
    # Any pixel at all: NaN, or a point on the disc that maps there.
    pixels = ring * 4
    ideal = model.undistort(pixels)
    found = ideal.isfinite().all(-1)[:, 0]
    assert (ideal[found].norm(dim=-1) <= model.radius_limit * (1 + 1e-12)).all()
    torch.testing.assert_close(
        model.distort(ideal * (1 - 1e-12))[found], pixels[found], atol=1e-9, rtol=0
    )


# Gradients.


def leaves(cameras):
    coefficients = [] if cameras.distortion is None else [cameras.distortion.coefficients]
    return [x.clone().requires_grad_() for x in (cameras.K, cameras.R, cameras.t, *coefficients)]


@pytest.mark.parametrize("name", LENSES)
def test_gradcheck_project(name):
    cameras = make_cameras(name)

    def project(points, K, R, t, k=None):
        return Cameras(K, R, t, k, lens=cameras.lens).project(points)

    points = world_points(2).requires_grad_()
    assert gradcheck(project, (points, *leaves(cameras)), fast_mode=True)
    assert gradgradcheck(project, (points, *leaves(cameras)), fast_mode=True)


@pytest.mark.parametrize("name", DISTORTED)
@pytest.mark.parametrize("method", ["undistort", "distort"])
def test_gradcheck_pixels(name, method):
    cameras = make_cameras(name)

    def mapped(points, K, k):
        rig = Cameras(K, cameras.R, cameras.t, k, lens=cameras.lens)
        return getattr(rig, method)(points)

    K, _, _, k = leaves(cameras)
    points = image_grid(columns=3, rows=2).clone().requires_grad_()
    assert gradcheck(mapped, (points, K, k))
    assert gradgradcheck(mapped, (points, K, k), fast_mode=True)


@pytest.mark.parametrize("name", DISTORTED)
def test_gradients_are_finite_on_the_axis(name):
    cameras = make_cameras(name, skew=(0.0, 0.0))
    points = cameras.K[:, :2, 2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(cameras.undistort(points).sum(), points, create_graph=True)
    torch.testing.assert_close(grad.detach(), torch.ones_like(grad), rtol=0, atol=1e-12)
    (second,) = torch.autograd.grad(grad.sum(), points)
    assert second.isfinite().all()


@pytest.mark.parametrize("name", LENSES)
def test_missing_points_have_zero_gradient_everywhere(name):
    cameras = make_cameras(name)
    inputs = leaves(cameras)
    rig = Cameras(*inputs, lens=cameras.lens)
    behind = cameras.centers[0] - 100 * cameras.R[0, 2]  # camera 1 sees it or not, 0 cannot
    good = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    missing = torch.tensor([torch.nan, 1.0, 2.0], dtype=torch.float64)
    far = torch.tensor([torch.inf, 1.0, 2.0], dtype=torch.float64)
    points = torch.stack([good, missing, far, behind, cameras.centers[0]]).requires_grad_()
    pixels = rig.project(points)
    assert pixels[0].isfinite().all()
    assert pixels[1:3].isnan().all()
    assert pixels[3:, 0].isnan().all()
    grads = torch.autograd.grad(pixels[:, 0].nansum(), [points, *inputs], retain_graph=True)
    alone = torch.autograd.grad(rig.project(good)[0].sum(), inputs)
    assert (grads[0][1:] == 0).all()
    for grad, expected in zip(grads[1:], alone, strict=True):
        torch.testing.assert_close(grad, expected)

    measured = torch.tensor([[500.0, 300.0], [torch.nan, 3.0], [torch.inf, 4.0], [1e9, 1e9]])
    measured = measured.double()[:, None].repeat(1, 2, 1).requires_grad_()
    for method in (rig.undistort, rig.distort):
        ideal = method(measured)
        assert ideal[0].isfinite().all()
        assert ideal[1:3].isnan().all()
        (grad,) = torch.autograd.grad(ideal[:3].sum(), measured, retain_graph=True)
        assert (grad[1:] == 0).all()
        if name != "pinhole":
            grads = torch.autograd.grad(ideal.nansum(), [inputs[0], *inputs[3:]])
            assert all(grad.isfinite().all() for grad in grads)


def test_gradient_of_a_pixel_without_inverse_is_zero():
    k = torch.tensor([[-0.3, 0.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    points = torch.tensor([[[0.8, 0.0]], [[0.3, 0.1]]], dtype=torch.float64, requires_grad=True)
    ideal = Distortion(k).undistort(points)
    grad_points, grad_k = torch.autograd.grad(ideal.nansum(), (points, k))
    assert (grad_points[0] == 0).all()
    assert (grad_points[1] != 0).all()
    assert grad_k.isfinite().all()


def test_func_transforms():
    cameras = make_cameras()
    k = cameras.distortion.coefficients
    points = image_grid(columns=5, rows=2)

    def undistorted(k, points):
        return Cameras(cameras.K, cameras.R, cameras.t, k).undistort(points)

    reverse = torch.func.jacrev(undistorted)(k, points)
    torch.testing.assert_close(torch.func.jacfwd(undistorted)(k, points), reverse)
    mapped = torch.func.vmap(undistorted, in_dims=(None, 0))(k, points)
    torch.testing.assert_close(mapped, undistorted(k, points))
    rigs = torch.stack([k, k / 2])
    several = torch.func.vmap(undistorted, in_dims=(0, None))(rigs, points)
    torch.testing.assert_close(several[1], undistorted(k / 2, points))


@pytest.mark.parametrize("name", LENSES)
def test_compiles_without_graph_breaks(name):
    cameras = make_cameras(name)

    def run(points, box):
        pixels = cameras.crop(box).project(points)
        return pixels, cameras.undistort(pixels)

    torch._dynamo.reset()
    points, box = world_points(3), torch.tensor([10.0, 20, 400, 300], dtype=torch.float64)
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, expected in zip(compiled(points, box), run(points, box), strict=True):
        torch.testing.assert_close(got, expected, equal_nan=True)


def test_autocast_leaves_geometry_alone():
    cameras = make_cameras(dtype=torch.float32)
    points = world_points(dtype=torch.float32)
    expected = cameras.undistort(cameras.project(points))
    with torch.autocast("cpu", torch.bfloat16):
        got = cameras.undistort(cameras.project(points))
        assert cameras.projections.dtype == torch.float32
        assert cameras.centers.dtype == torch.float32
    assert torch.equal(got, expected)


# Crop and resize.


@pytest.mark.parametrize("name", LENSES)
def test_crop_shifts_pixels(name):
    cameras = make_cameras(name)
    points = world_points()
    boxes = torch.tensor([[100.0, 50.0, 740.0, 530.0], [-20.0, 10.5, 300.0, 90.0]])
    cropped = cameras.crop(boxes)
    shifted = cameras.project(points) - boxes[:, :2]
    torch.testing.assert_close(cropped.project(points), shifted, rtol=0, atol=1e-9)
    assert cropped.image_size.tolist() == [[640, 480], [320, 79.5]]
    same = cameras.crop((100, 50, 740, 530)).K[0]
    assert torch.equal(same, cropped.K[0])
    restored = cropped.undistort(shifted)
    torch.testing.assert_close(restored + boxes[:, :2], cameras.undistort(shifted + boxes[:, :2]))


@pytest.mark.parametrize("name", LENSES)
def test_resize_moves_pixel_centres_edge_to_edge(name):
    cameras = make_cameras(name)
    points = world_points()
    smaller = cameras.resize((320, 240))
    scale = torch.tensor([320 / WIDTH, 240 / HEIGHT], dtype=torch.float64)
    expected = (cameras.project(points) + 0.5) * scale - 0.5
    torch.testing.assert_close(smaller.project(points), expected, rtol=0, atol=1e-9)
    assert smaller.image_size.tolist() == [[320, 240]] * 2


def test_resize_is_what_interpolation_does():
    # A linear ramp sampled at pixel centres is reproduced by linear interpolation.
    size = torch.tensor([[48.0, 24.0]], dtype=torch.float64)
    K = torch.tensor([[[30.0, 0, 20], [0, 30, 10], [0, 0, 1]]], dtype=torch.float64)
    cameras = Cameras(K, torch.eye(3).double()[None], torch.zeros(1, 3).double(), image_size=size)
    ramp = torch.arange(48.0, dtype=torch.float64).expand(1, 1, 24, 48)
    small = torch.nn.functional.interpolate(ramp, (6, 12), mode="bilinear", align_corners=False)
    # Column 5 of the small image shows the point that the large camera sees at the ramp's value.
    value = small[0, 0, 0, 5].item()
    point = torch.tensor([(value - 20) / 30, 0.0, 1.0], dtype=torch.float64)
    assert abs(cameras.resize((12, 6)).project(point)[0, 0].item() - 5) < 1e-12


@settings(deadline=None, max_examples=30)
@given(
    st.tuples(*[st.integers(-200, 400)] * 2, *[st.integers(1, 900)] * 2),
    st.tuples(st.integers(1, 500), st.integers(1, 500)),
)
def test_law_crop_then_resize_undoes(box, size):
    cameras = make_cameras()
    x, y, width, height = box
    there = cameras.crop((x, y, x + width, y + height)).resize(size)
    back = there.resize((width, height)).crop((-x, -y, WIDTH - x, HEIGHT - y))
    torch.testing.assert_close(back.K, cameras.K, rtol=1e-12, atol=1e-9)
    assert torch.equal(back.image_size, cameras.image_size)


# The object.


def test_batches_lead_and_views_follow():
    cameras = make_cameras()
    points = world_points(30).reshape(5, 3, 2, 3)
    pixels = cameras.project(points)
    assert pixels.shape == (5, 3, 2, 2, 2)
    torch.testing.assert_close(pixels[3, 1, 0], cameras.project(points[3, 1, 0]))
    torch.testing.assert_close(cameras.undistort(pixels)[3, 1], cameras.undistort(pixels[3, 1]))
    assert cameras.project(points[:0]).shape == (0, 3, 2, 2, 2)
    assert cameras.undistort(pixels[:0]).shape == (0, 3, 2, 2, 2)
    transposed = pixels.movedim(0, 2)  # not contiguous
    torch.testing.assert_close(
        cameras.undistort(transposed), cameras.undistort(pixels).movedim(0, 2)
    )


def test_select_by_position_name_slice_and_mask():
    cameras = make_cameras()
    for index in (1, -1, "right", ["right"], slice(1, None), torch.tensor([False, True]), [1]):
        chosen = cameras.select(index)
        assert len(chosen) == 1
        assert chosen.names == ("right",)
        assert torch.equal(chosen.K, cameras.K[1:])
        assert torch.equal(chosen.distortion.coefficients, cameras.distortion.coefficients[1:])
    swapped = cameras.select(["right", "left"])
    points = world_points()
    assert torch.equal(swapped.project(points), cameras.project(points).flip(-2))
    assert swapped.names == ("right", "left")
    for index in ("middle", 2, -3, [], torch.tensor([5])):
        with pytest.raises(ValueError, match="index must"):
            cameras.select(index)


def test_to_moves_everything():
    cameras = make_cameras("fisheye").to(torch.float32)
    assert cameras.dtype == torch.float32
    assert cameras.distortion.coefficients.dtype == torch.float32
    assert cameras.image_size.dtype == torch.float32
    assert (cameras.lens, cameras.names) == ("fisheye", ("left", "right"))
    meta = cameras.to("meta")
    assert meta.device.type == "meta"
    assert meta.project(torch.zeros(7, 3, device="meta")).shape == (7, 2, 2)
    with pytest.raises(TypeError, match="float32 or float64"):
        cameras.to(torch.float16)


def test_immutable_copied_pickled_and_shown():
    cameras = make_cameras()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cameras.K = cameras.K * 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        cameras.distortion.lens = "fisheye"
    for twin in (copy.deepcopy(cameras), pickle.loads(pickle.dumps(cameras))):
        assert torch.equal(twin.project(world_points()), cameras.project(world_points()))
    expected = "Cameras(2 x brown_conrady, names=(left, right), image_size=1280x720, float64, cpu)"
    assert repr(cameras) == expected
    assert len(cameras) == 2


def test_docstring_examples():
    assert doctest.testmod(tritool.cameras).failed == 0


def parts():
    cameras = make_cameras()
    return {
        "K": cameras.K,
        "R": cameras.R,
        "t": cameras.t,
        "distortion": cameras.distortion.coefficients,
    }


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"K": torch.eye(3)}, ValueError, r"K must be \[C, 3, 3\].*got \(3, 3\)"),
        ({"K": np.eye(3)}, TypeError, r"K must be a torch.Tensor, got ndarray"),
        ({"K": torch.ones(2, 3, 3, dtype=torch.int64)}, TypeError, r"K must be float32 or float64"),
        ({"R": torch.ones(3, 3, 3).double()}, ValueError, r"R must be \[C, 3, 3\] with C = 2, got"),
        ({"R": torch.ones(2, 3, 3)}, TypeError, r"R must be torch.float64 like the cameras"),
        ({"t": torch.ones(2, 3, 1).double()}, ValueError, r"t must be .*got \(2, 3, 1\)"),
        ({"t": torch.ones(2, 3, device="meta").double()}, TypeError, r"t must be on cpu"),
        ({"distortion": torch.zeros(2, 6).double()}, ValueError, r"n = 4 or 5 or 8.*got \(2, 6\)"),
        ({"distortion": torch.zeros(1, 5).double()}, ValueError, r"distortion must be .*C = 2"),
        ({"distortion": torch.zeros(2, 5)}, TypeError, r"distortion must be torch.float64"),
        ({"lens": "fisheye"}, ValueError, r"n = 4 for lens 'fisheye', got \(2, 5\)"),
        ({"lens": "pinhole"}, ValueError, r"distortion must be None"),
        ({"lens": "kannala"}, ValueError, r"lens must be one of pinhole, .*got 'kannala'"),
        ({"lens": "fisheye", "distortion": None}, ValueError, r"needs distortion coefficients"),
        ({"image_size": (3, 4, 5)}, ValueError, r"image_size must be \[2\] or \[C, 2\]"),
        ({"names": ["a"]}, ValueError, r"names must be 2 different names"),
        ({"names": ["a", "a"]}, ValueError, r"names must be 2 different names"),
        ({"names": "ab"}, TypeError, r"names must be a sequence"),
    ],
)
def test_wrong_construction_is_refused(change, error, message):
    with pytest.raises(error, match=message):
        Cameras(**{**parts(), **change})


def test_wrong_points_are_refused():
    cameras = make_cameras()
    with pytest.raises(ValueError, match=r"points must be \[..., 3\], got \(4, 2\)"):
        cameras.project(torch.zeros(4, 2, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"points must be torch.float64"):
        cameras.project(torch.zeros(4, 3))
    for method in (cameras.undistort, cameras.distort):
        with pytest.raises(ValueError, match=r"\[..., C, 2\] with C = 2, got \(4, 17, 2\)"):
            method(torch.zeros(4, 17, 2, dtype=torch.float64))
        with pytest.raises(TypeError, match=r"points must be float32 or float64"):
            method(torch.zeros(4, 2, 2, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"box must be \[4\] or \[C, 4\]"):
        cameras.crop((1, 2, 3))
    with pytest.raises(ValueError, match="resize needs"):
        Cameras(cameras.K, cameras.R, cameras.t).resize((10, 10))


def test_problems_name_the_camera():
    cameras = make_cameras()
    assert cameras.problems() == []

    def broken(**change):
        return dataclasses.replace(cameras, **change).problems()

    def second(tensor, value):
        tensor = tensor.clone()
        tensor[1] = torch.as_tensor(value, dtype=tensor.dtype)
        return tensor

    K, R, k = cameras.K, cameras.R, cameras.distortion
    assert broken(K=second(K, torch.nan)) == ["camera right: K is not finite"]
    assert broken(t=second(cameras.t, torch.inf)) == ["camera right: t is not finite"]
    assert broken(R=second(R, torch.nan)) == ["camera right: R is not finite"]
    bad = dataclasses.replace(k, coefficients=second(k.coefficients, torch.nan))
    assert broken(distortion=bad) == ["camera right: distortion is not finite"]
    (line,) = broken(K=second(K, torch.diag(torch.tensor([0.0, 700.0, 1.0]))))
    assert "K is singular" in line
    (line,) = broken(K=second(K, K[1].T))
    assert "transposed" in line
    (line,) = broken(K=second(K, K[1] / 2))
    assert "last row of K" in line
    (line,) = broken(R=second(R, R[1] * 1.01))
    assert "camera right: R is not a rotation" in line
    (line,) = broken(R=second(R, -R[1]))
    assert "reflection" in line
    assert broken(R=second(R, (R[1] * 1e4).round() / 1e4)) == []
    (line,) = broken(image_size=torch.tensor([[1280.0, 720.0], [0.0, 720.0]]))
    assert "image_size must be positive, got 0x720" in line
    nameless = dataclasses.replace(cameras, K=second(K, torch.nan), names=None)
    assert nameless.problems() == ["camera 1: K is not finite"]
