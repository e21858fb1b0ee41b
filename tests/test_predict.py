# SPDX-License-Identifier: Apache-2.0
"""`tritool predict`: crops and their intrinsics, what is found, written and said, and errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import one_error_line
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from training_runs import STUDIO, tiny

from tritool.cli import main
from tritool.models import intrinsics_fallback
from tritool.plot.images import plot_image_pose, plot_poses
from tritool.skeletons import HUMAN36M_JOINTS
from tritool.training import predict_images
from tritool.training.config import Config
from tritool.training.prediction import (
    ImagePrediction,
    Predictions,
    crop_image,
    find_images,
    open_image,
    widened_box,
)
from tritool.training.state import write_model
from tritool.training.tasks import build_task

PNG = b"\x89PNG\r\n\x1a\n"
SIZE = (32, 64)
JOINTS = len(HUMAN36M_JOINTS)
# fx and fy differ, and the principal point is not the middle.
INTRINSICS = (150.0, 140.0, 41.0, 66.5)
BOXES: list[tuple[float, ...] | None] = [
    None,
    (20, 11, 62, 95),  # the shape of the network's images already
    (15.3, 20.8, 70.1, 91.5),  # to be widened, from fractions
    (-13, 4, 60, 100),  # beyond the border
    (10, -20, 140, 60),  # beyond two of them, and far too wide
]
STUDIO_PART = {"length": 4, "studio": {**STUDIO, "views": 1}}
WEAK: dict[str, Any] = {
    "name": "tiny-weak",
    "model": {"kind": "weak", "depth": 18, "width": 4, "deconv_channels": 8},
    "data": {
        "kind": "mixture",
        "labelled": {**STUDIO_PART, "seed": 1},
        "multi_view": {"length": 4, "seed": 2, "studio": STUDIO},
        "validation": {**STUDIO_PART, "seed": 3},
    },
    "training": {"steps": 1, "batch_size": 5, "learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learned nothing: what it says depends on the image all the same."""
    path = tmp_path_factory.mktemp("network") / "weak.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = Config.from_dict(WEAK)
        model = build_task(config).model
        with torch.no_grad():  # heat maps with a peak, not nearly flat ones, and possible depths
            model.backbone.final_layer.weight[:JOINTS] *= 1000.0
            model.backbone.final_layer.weight[JOINTS:] *= 0.2
        write_model(path, model, config, 7)
    return path


def noise(seed: int = 0, size: tuple[int, int] = (90, 120)) -> Image.Image:
    """Patches of random colours: no part is like another."""
    colours = np.random.default_rng(seed).integers(0, 256, (8, 6, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    noise().save(path)
    return path


def matrix(intrinsics: Sequence[float]) -> torch.Tensor:
    fx, fy, cx, cy = intrinsics
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)


def projected(points: torch.Tensor, K: torch.Tensor) -> torch.Tensor:
    homogeneous = points.double() @ K.double().mT
    return homogeneous[..., :2] / homogeneous[..., 2:]


# ---- Crops ----


@given(
    corner=st.tuples(st.floats(-300, 300), st.floats(-300, 300)),
    extent=st.tuples(st.floats(0.01, 500), st.floats(0.01, 500)),
    size=st.sampled_from([(32, 64), (64, 32), (96, 96), (256, 192)]),
)
def test_a_box_is_widened_about_its_centre(
    corner: tuple[float, float], extent: tuple[float, float], size: tuple[int, int]
) -> None:
    box = (*corner, corner[0] + extent[0], corner[1] + extent[1])
    x0, y0, x1, y1 = widened = widened_box(box, size)
    assert all(isinstance(value, int) for value in widened)
    assert x0 <= box[0] < box[2] <= x1
    assert y0 <= box[1] < box[3] <= y1
    whole = (np.floor(box[0]), np.floor(box[1]), np.ceil(box[2]), np.ceil(box[3]))
    assert abs((x0 + x1) - (whole[0] + whole[2])) <= 1
    assert abs((y0 + y1) - (whole[1] + whole[3])) <= 1
    # Of the right shape to within a pixel, and not larger than need be.
    wide, high = x1 - x0, y1 - y0
    assert abs(wide * size[1] / size[0] - high) <= max(1, size[1] / size[0])
    assert wide == whole[2] - whole[0] or high == whole[3] - whole[1]


@pytest.mark.parametrize("box", BOXES)
def test_intrinsics_of_a_crop_belong_to_its_pixels(box: tuple[float, ...] | None) -> None:
    """A blob around a known 3D point appears where the crop's intrinsics project the point."""
    K, size = matrix(INTRINSICS), (110, 130)
    rows, columns = np.mgrid[: size[1], : size[0]]
    for point in ([-20.0, -40.0, 300.0], [0.0, -10.0, 280.0], [6.0, 12.0, 290.0]):
        where = torch.tensor(point, dtype=torch.float64)
        x, y = projected(where, K).tolist()
        blob = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 3.0**2))
        image = Image.fromarray(np.repeat(np.rint(blob).astype(np.uint8)[..., None], 3, 2))
        crop = crop_image(image, K, SIZE, box)
        assert crop.pixels.shape == (3, SIZE[1], SIZE[0])
        assert crop.pixels.dtype == torch.uint8
        seen = crop.pixels[1].double()
        assert seen.max() > 150
        middle = torch.stack(
            [
                (seen.sum(0) * torch.arange(SIZE[0])).sum() / seen.sum(),
                (seen.sum(1) * torch.arange(SIZE[1])).sum() / seen.sum(),
            ]
        )
        torch.testing.assert_close(middle, projected(where, crop.intrinsics), atol=0.05, rtol=0)


def test_a_pixel_has_the_same_ray_in_every_crop() -> None:
    K, pixel = matrix(INTRINSICS), torch.tensor([45.0, 50.0], dtype=torch.float64)
    ray = torch.linalg.solve(K, torch.tensor([45.0, 50.0, 1.0], dtype=torch.float64))
    for box in BOXES:
        crop = crop_image(noise(size=(110, 130)), K, SIZE, box)
        x0, y0, x1, y1 = crop.box
        scale = torch.tensor([SIZE[0] / (x1 - x0), SIZE[1] / (y1 - y0)], dtype=torch.float64)
        moved = (pixel - torch.tensor([x0, y0]) + 0.5) * scale - 0.5
        again = torch.linalg.solve(crop.intrinsics, torch.cat([moved, torch.ones(1).double()]))
        torch.testing.assert_close(again, ray, atol=1e-12, rtol=0)


def test_black_beyond_the_border() -> None:
    white = Image.new("RGB", (40, 40), (255, 255, 255))
    crop = crop_image(white, matrix(INTRINSICS), SIZE, (-20, -40, 20, 40))
    assert crop.box == (-20, -40, 20, 40)
    assert crop.pixels[:, :30].max() == 0
    assert crop.pixels[:, :, :14].max() == 0
    assert crop.pixels[:, 34:, 18:].min() == 255


def test_a_box_beside_the_image() -> None:
    for box in [(120, 0, 150, 50), (0, -50, 10, 0), (-9.5, 0, 0, 9)]:
        with pytest.raises(ValueError, match=r"beside the image, which has 90 x 120 pixels"):
            crop_image(noise(), matrix(INTRINSICS), SIZE, box)
    with pytest.raises(ValueError, match="far too large"):
        crop_image(noise(), matrix(INTRINSICS), SIZE, (0, 0, 1e7, 1e7))


# ---- Images ----


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path, checkpoint: Path) -> None:
    upright = noise()
    upright.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = orientation
    # What the camera has stored, so that turning it as the tag says gives the upright image.
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = (
        upright.transpose(list(Image.Transpose)[undo[orientation]]) if orientation > 1 else upright
    )
    stored.save(tmp_path / "stored.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "stored.png")), np.asarray(upright))
    if orientation != 6:
        return
    stored.save(tmp_path / "lying.png")
    expected, found, lying = predict_images(
        [tmp_path / name for name in ("upright.png", "stored.png", "lying.png")], checkpoint
    ).images
    assert found.size == expected.size == (90, 120)
    assert found.intrinsics == expected.intrinsics == (120, 120, 44.5, 59.5)
    assert torch.equal(found.keypoints_3d, expected.keypoints_3d)
    assert lying.size == (120, 90)
    assert not torch.allclose(lying.keypoints_2d, expected.keypoints_2d, atol=1.0)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_images_of_other_kinds_are_converted(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    noise().convert(mode).save(path)
    assert open_image(path).mode == "RGB"
    assert open_image(path).size == (90, 120)


def test_images_of_16_bits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 30), 40000, np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"deep.png: it has more than 8 bits a colour"):
        open_image(path)


def test_folders_stand_for_the_images_in_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner.png").mkdir(parents=True)
    for name in ("b.JPG", "a.png", "c.tiff", ".hidden.png", "notes.txt", "b.jpg.bak"):
        (folder / name).touch()
    single = tmp_path / "single.dat"
    single.touch()
    names = [path.name for path in find_images([single, folder])]
    assert names == ["single.dat", "a.png", "b.JPG", "c.tiff"]
    assert find_images(single) == find_images(str(single)) == (single,)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: there is no image in this folder"):
        find_images([folder, tmp_path / "empty"])
    with pytest.raises(ValueError, match="at least one image"):
        find_images([])
    with pytest.raises(FileNotFoundError):
        find_images([single, tmp_path / "none.png"])


# ---- Predictions ----


@pytest.mark.parametrize("intrinsics", [None, INTRINSICS])
@pytest.mark.parametrize("box", BOXES)
def test_poses_project_to_their_2d_joints_in_the_whole_image(
    photo: Path,
    checkpoint: Path,
    box: tuple[float, ...] | None,
    intrinsics: tuple[float, ...] | None,
) -> None:
    """Whatever the crop: so the pose is one in the coordinates of the image's own camera."""
    (found,) = predict_images(photo, checkpoint, box=box, intrinsics=intrinsics).images
    assert found.size == (90, 120)
    assert found.box == widened_box(box or (0, 0, 90, 120), SIZE)
    K = intrinsics_fallback((90, 120)) if intrinsics is None else matrix(intrinsics)
    torch.testing.assert_close(matrix(found.intrinsics), K.double())
    assert found.intrinsics_assumed == (intrinsics is None)
    assert found.keypoints_3d.shape == (JOINTS, 3)
    assert (found.keypoints_3d[:, 2] > 0).all()
    pixels = projected(found.keypoints_3d, K)
    torch.testing.assert_close(pixels, found.keypoints_2d.double(), atol=0.02, rtol=0)
    # They lie apart, or nothing would have been tested, and in what the network has seen.
    assert (found.keypoints_2d.amax(0) - found.keypoints_2d.amin(0) > 2).all()
    x0, y0, x1, y1 = found.box
    assert (found.keypoints_2d >= torch.tensor([x0 - 0.5, y0 - 0.5])).all()
    assert (found.keypoints_2d <= torch.tensor([x1 - 0.5, y1 - 0.5])).all()
    assert ((found.confidences >= 0) & (found.confidences <= 1)).all()


def test_a_box_is_as_good_as_an_image_cut_to_it(
    photo: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """With the intrinsics that belong to the part."""
    noise().crop((20, 30, 60, 110)).save(tmp_path / "part.png")
    fx, fy, cx, cy = INTRINSICS
    (cut,) = predict_images(
        tmp_path / "part.png", checkpoint, intrinsics=(fx, fy, cx - 20, cy - 30)
    ).images
    (boxed,) = predict_images(
        photo, checkpoint, box=(20, 30, 60, 110), intrinsics=INTRINSICS
    ).images
    torch.testing.assert_close(cut.keypoints_3d, boxed.keypoints_3d)
    torch.testing.assert_close(cut.keypoints_2d + torch.tensor([20, 30]), boxed.keypoints_2d)


def test_batches_do_not_matter(tmp_path: Path, checkpoint: Path) -> None:
    for number in range(5):
        noise(number, (60 + number, 80)).save(tmp_path / f"{number}.png")
    done: list[int] = []
    together = predict_images(tmp_path, checkpoint, progress=done.append)
    assert sum(done) == 5
    done.clear()
    apart = predict_images(tmp_path, checkpoint, batch_size=2, progress=done.append)
    assert done == [2, 2, 1]
    for number, (one, other) in enumerate(zip(together.images, apart.images, strict=True)):
        assert one.file == other.file == str(tmp_path / f"{number}.png")
        torch.testing.assert_close(one.keypoints_3d, other.keypoints_3d, rtol=1e-3, atol=1e-2)
    first, second = together.images[:2]
    assert not torch.allclose(first.keypoints_2d, second.keypoints_2d, atol=0.5)


def test_what_is_written(tmp_path: Path, checkpoint: Path) -> None:
    files = [
        tmp_path / "one" / "me.png",
        tmp_path / "two" / "ME.jpg",
        tmp_path / "two" / "me-2.bmp",
    ]
    for number, file in enumerate(files):
        file.parent.mkdir(exist_ok=True)
        noise(number).save(file)
    output = tmp_path / "new" / "poses"
    done: list[int] = []
    result = predict_images(files, checkpoint, output=output, progress=done.append)
    assert done == [1, 1, 1]
    # Two of one name, but for capitals, and a third that has the name the second would get.
    assert {path.name for path in output.iterdir()} == {
        "me.png",
        "ME-3.png",
        "me-2.png",
        "predictions.json",
    }
    for found, name in zip(result.images, ("me.png", "ME-3.png", "me-2.png"), strict=True):
        assert found.picture == str(output / name)
        assert (output / name).read_bytes().startswith(PNG)
    written = json.loads((output / "predictions.json").read_text())
    assert written == result.to_json()
    assert written["checkpoint"] == str(checkpoint)
    assert written["step"] == 7
    assert written["unit"] == "mm"
    assert tuple(written["joint_names"]) == HUMAN36M_JOINTS
    assert written["output"] == str(output)
    assert [image["file"] for image in written["images"]] == list(map(str, files))
    first = written["images"][0]
    assert first["size"] == [90, 120]
    assert first["box"] == [0, -30, 90, 150]
    assert first["intrinsics"] == [120, 120, 44.5, 59.5]
    assert first["intrinsics_assumed"] is True
    assert np.shape(first["keypoints_3d"]) == (JOINTS, 3)
    assert np.shape(first["keypoints_2d"]) == (JOINTS, 2)
    assert np.shape(first["confidences"]) == (JOINTS,)
    np.testing.assert_array_equal(first["keypoints_3d"], result.images[0].keypoints_3d)


@pytest.mark.parametrize("most", [None, 40])
def test_the_picture_shows_what_the_network_has_seen(
    most: int | None,
    photo: Path,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The box, black beyond the border and not too large, with the 2D joints where they belong."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        "tritool.plot.images.plot_image_pose", lambda *values, **_: calls.append(values)
    )
    if most is not None:
        monkeypatch.setattr("tritool.training.prediction._PICTURED", most)
    (found,) = predict_images(
        photo, checkpoint, box=(-10, 20, 40, 115), output=tmp_path / "out"
    ).images
    x0, y0, x1, y1 = found.box
    ((path, image, flat, points, sure, names),) = calls
    scale = 1 if most is None else most / (y1 - y0)
    assert path == found.picture
    assert image.shape == (round((y1 - y0) * scale), round((x1 - x0) * scale), 3)
    assert image[:, : round(-x0 * scale) - 2].max() == 0
    assert image[:, round((20 - x0) * scale)].max() > 0
    moved = (found.keypoints_2d.numpy() - [x0, y0] + 0.5) * scale - 0.5
    np.testing.assert_allclose(flat, moved, atol=0.3 if most else 1e-4)
    np.testing.assert_array_equal(points, found.keypoints_3d)
    np.testing.assert_array_equal(sure, found.confidences)
    assert names == HUMAN36M_JOINTS


def found_in(file: str, **changes: Any) -> ImagePrediction:
    return replace(
        ImagePrediction(
            file=file,
            size=(90, 120),
            box=(0, 0, 90, 120),
            intrinsics=(120, 120, 44.5, 59.5),
            intrinsics_assumed=True,
            keypoints_3d=torch.tensor([[300.0, 0.0, 4000.0]]).repeat(JOINTS, 1),
            keypoints_2d=torch.full((JOINTS, 2), 40.0),
            confidences=torch.full((JOINTS,), 0.25),
        ),
        **changes,
    )


def predictions(*images: ImagePrediction) -> Predictions:
    return Predictions("weak.safetensors", 7, HUMAN36M_JOINTS, images)


def test_numbers_that_are_none_are_null() -> None:
    points = torch.full((JOINTS, 3), 1.5)
    points[4, 1] = torch.nan
    found = found_in(
        "a.png",
        keypoints_3d=points,
        keypoints_2d=torch.full((JOINTS, 2), torch.inf),
        confidences=torch.full((JOINTS,), torch.nan),
    )
    values = json.loads(json.dumps(predictions(found).to_json(), allow_nan=False))["images"][0]
    assert values["keypoints_3d"][4] == [1.5, None, 1.5]
    assert values["keypoints_3d"][3] == [1.5, 1.5, 1.5]
    assert values["keypoints_2d"] == [[None, None]] * JOINTS
    assert values["confidences"] == [None] * JOINTS
    assert values["picture"] is None


def test_the_table() -> None:
    gone = torch.full((JOINTS, 3), torch.nan)
    text = predictions(found_in("in/a.png"), found_in("in/longer.png", keypoints_3d=gone)).to_text()
    assert text.splitlines()[1:3] == [
        "a.png             0.25     4.01 m",
        "longer.png        0.25    unknown",
    ]
    assert "intrinsics assumed for 2 images" in text
    one = [found_in("in/a.png", intrinsics_assumed=False), found_in("out/a.png")]
    text = predictions(*one).to_text()
    assert "intrinsics assumed for 1 of 2 images" in text
    assert "in/a.png " in text
    assert "out/a.png " in text
    assert "assumed" not in predictions(one[0]).to_text()


# ---- Errors ----


def test_options_that_cannot_be(photo: Path, checkpoint: Path) -> None:
    for options, message in (
        ({"box": (10, 10, 10, 50)}, "x0 below x1"),
        ({"box": (10, 50, 20, 10)}, "y0 below y1"),
        ({"box": (10, 10, float("nan"), 50)}, "four numbers"),
        ({"box": (10, 10, 50)}, "four numbers"),
        ({"box": (200, 0, 300, 50)}, "photo.png: box 200, 0, 300, 50 lies beside the image"),
        ({"intrinsics": (0, 100, 45, 60)}, "above 0"),
        ({"intrinsics": (100, 100, 45, float("inf"))}, "four numbers"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"device": "cuda:99"}, "device must be one of this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            predict_images(photo, checkpoint, **options)


def test_intrinsics_belong_to_images_of_one_size(tmp_path: Path, checkpoint: Path) -> None:
    for number, size in enumerate([(90, 120), (90, 120), (120, 90)]):
        noise(number, size).save(tmp_path / f"{number}.png")
    for batch_size in (1, 3):
        with pytest.raises(ValueError, match=r"2\.png: intrinsics .* 120 x 90 .* has 90 x 120"):
            predict_images(tmp_path, checkpoint, intrinsics=INTRINSICS, batch_size=batch_size)
    assert len(predict_images(tmp_path, checkpoint).images) == 3


def test_nothing_is_written_if_one_image_is_damaged(
    tmp_path: Path, photo: Path, checkpoint: Path
) -> None:
    damaged = tmp_path / "damaged.jpg"
    noise(size=(200, 300)).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"damaged\.jpg: it is a damaged image: .*truncated"):
        predict_images([photo, damaged], checkpoint, output=tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out").exists()


def test_images_are_not_overwritten(photo: Path, checkpoint: Path) -> None:
    content = photo.read_bytes()
    with pytest.raises(ValueError, match=r"photo\.png is an image itself"):
        predict_images(photo, checkpoint, output=photo.parent)
    assert photo.read_bytes() == content
    assert list(photo.parent.iterdir()) == [photo]


def test_checkpoints_that_do_not_fit(tmp_path: Path, photo: Path) -> None:
    config = Config.from_dict(WEAK)
    model = build_task(config).model
    path = tmp_path / "other.safetensors"
    write_model(path, build_task(tiny()).model, tiny(), 1)
    with pytest.raises(ValueError, match=r"other\.safetensors: it is of kind algebraic, not weak"):
        predict_images(photo, path)
    weights = dict(model.state_dict())
    weights.pop("backbone.final_layer.weight")
    write_model(path, weights, config, 1)
    with pytest.raises(ValueError, match=r"other\.safetensors: its weights are not those"):
        predict_images(photo, path)
    # The size of the network's images must be told.
    write_model(path, model, replace(config, data=None), 1)
    with pytest.raises(ValueError, match=r"other\.safetensors: "):
        predict_images(photo, path)


# ---- The command ----


def test_the_command(
    photo: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["predict", str(photo), "--checkpoint", str(checkpoint), "--device", "cpu"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[1].startswith("photo.png ")
    assert "intrinsics assumed for 1 image:" in out
    output = tmp_path / "poses"
    more = ["--box=-10.5,5,70,110", "--intrinsics", "150,140,41,66.5", "-o", str(output), "--json"]
    assert main([*arguments, *more]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result == json.loads((output / "predictions.json").read_text())
    (found,) = result["images"]
    assert found["box"] == list(widened_box((-11, 5, 70, 110), SIZE))
    assert found["intrinsics"] == list(INTRINSICS)
    assert found["intrinsics_assumed"] is False
    assert Path(found["picture"]).read_bytes().startswith(PNG)


def test_bad_input(
    photo: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.touch()
    network = ["--checkpoint", str(checkpoint)]
    for arguments, message in (
        ([str(tmp_path / "none.png"), *network], "none.png: No such file"),
        ([str(text), *network], "text.png: it is no image"),
        ([str(tmp_path / "empty"), *network], "empty: there is no image in this folder"),
        ([str(photo), *network, "--box", "200,0,300,50"], "photo.png: box 200, 0, 300, 50 lies"),
        ([str(photo), *network, "-o", str(file)], f"{file}: Not a directory"),
        ([str(photo), "--checkpoint", str(tmp_path / "no.safetensors")], "no.safetensors: No such"),
        ([str(photo), "--checkpoint", str(photo)], "photo.png: it is no checkpoint"),
    ):
        assert main(["predict", *arguments]) == 1
        assert message in one_error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "a"], "IMAGE"),
        (["a.png"], "--checkpoint"),
        (["a.png", "--checkpoint", "a", "--box", "1,2,3"], "'1,2,3' is not four numbers"),
        (["a.png", "--checkpoint", "a", "--box", "1,2,3,nan"], "is not four numbers"),
        (["a.png", "--checkpoint", "a", "--box", "1,2,x,4"], "is not four numbers"),
        (["a.png", "--checkpoint", "a", "--box", "5,0,5,9"], "X0 below X1"),
        (["a.png", "--checkpoint", "a", "--intrinsics", "0,1,2,3"], "FX and FY above 0"),
        (["a.png", "--checkpoint", "a", "--intrinsics", "1,2"], "is not four numbers"),
        (["a.png", "--checkpoint", "a", "--device", "tpu"], "'tpu' is not cpu, cuda"),
    ],
)
def test_wrong_use(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *arguments]) == 2
    error = one_error_line(capsys)
    assert message in error
    assert "--help" in error


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    printed = capsys.readouterr().out
    assert "example:" in printed
    assert "  tritool predict" in printed


# ---- The picture ----


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The axes, view and points of every skeleton that is drawn in space from now on."""
    from tritool.plot import images

    calls: list[tuple[Any, ...]] = []
    draw = images.draw_skeleton

    def watching(axes: Any, view: Any, points: Any, *args: Any, **style: Any) -> None:
        calls.append((axes, view, points))
        draw(axes, view, points, *args, **style)

    monkeypatch.setattr(images, "draw_skeleton", watching)
    return calls


def test_the_picture_shows_the_camera_s_view_and_the_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = drawn(monkeypatch)
    rng = np.random.default_rng(0)
    points = rng.normal(0, (200, 500, 300), (JOINTS, 3)) + np.array([100, 0, 4000])
    points[3] = np.nan
    flat = rng.uniform(-20, 90, (JOINTS, 2))
    flat[3] = np.nan
    path = tmp_path / "pose.png"
    plot_image_pose(
        path, np.asarray(noise()), flat, points, rng.uniform(0, 1, JOINTS), HUMAN36M_JOINTS,
        name="x" * 300 + " $5", note="mean confidence 0.5",
    )  # fmt: skip
    assert path.read_bytes().startswith(PNG)
    (one, front, _), (two, aside, _) = calls
    x, y, z = points.T
    np.testing.assert_allclose(front(points), np.stack([x, -y], -1))
    # The near is on the left, where the camera is.
    np.testing.assert_allclose(aside(points), np.stack([z, -y], -1), atol=1e-9)
    for axes, view in ((one, front), (two, aside)):
        places = view(points[np.isfinite(points).all(-1)])
        for limits, values in ((axes.get_xlim(), places[:, 0]), (axes.get_ylim(), places[:, 1])):
            assert limits[0] < values.min() < values.max() < limits[1]
    # To the same scale.
    assert np.ptp(one.get_xlim()) == pytest.approx(np.ptp(two.get_xlim()))
    assert np.ptp(one.get_ylim()) == pytest.approx(np.ptp(two.get_ylim()))
    # Joints beyond the border of the image are not cut off, and no text runs out of the figure.
    figure = one.figure
    image = figure.axes[0]
    assert image.get_xlim()[0] <= np.nanmin(flat[:, 0])
    assert image.get_ylim()[1] <= np.nanmin(flat[:, 1])
    width, height = figure.canvas.get_width_height()
    renderer = figure.canvas.get_renderer()
    for text in figure.findobj(match=lambda part: hasattr(part, "get_text") and part.get_text()):
        box = text.get_window_extent(renderer)
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_a_picture_without_any_joint(tmp_path: Path) -> None:
    path = tmp_path / "pose.svg"
    nothing = np.full((JOINTS, 3), np.nan)
    plot_image_pose(
        path, np.asarray(noise()), nothing[:, :2], nothing, nothing[:, 0], HUMAN36M_JOINTS
    )
    assert path.read_text().rstrip().endswith("</svg>")


def test_pictures_of_what_does_not_fit(tmp_path: Path) -> None:
    path, image = tmp_path / "pose.png", np.asarray(noise())
    flat, points, sure = np.zeros((JOINTS, 2)), np.zeros((JOINTS, 3)), np.ones(JOINTS)
    for arguments, message in (
        ((image, flat[1:], points, sure), "keypoints_2d must be"),
        ((image, flat, points[:, :2], sure), "keypoints_3d must be"),
        ((image, flat, points, sure[:3]), "confidences must be"),
        ((image.astype(float), flat, points, sure), "image must be uint8"),
        ((image[..., 0], flat, points, sure), "image must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_image_pose(path, *arguments, HUMAN36M_JOINTS)
    assert not path.exists()


def test_poses_of_several_methods(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (2, 32, 64, 3), dtype=np.uint8)
    flat = generator.uniform(0, 30, (2, 17, 2))
    pose = generator.normal(0, 400, (2, 17, 3))
    pose[0, 3] = np.nan  # a joint that was not found
    path = tmp_path / "poses.png"
    plot_poses(path, list(images), flat, {"one": pose, "none": pose * np.nan}, HUMAN36M_JOINTS)
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"poses\['one'\] must be \[2, 17, 3\], got \(2, 16, 3\)"):
        plot_poses(path, list(images), flat, {"one": pose[:, 1:]}, HUMAN36M_JOINTS)
    with pytest.raises(ValueError, match="must not be empty, got 2 and 0"):
        plot_poses(path, list(images), flat, {}, HUMAN36M_JOINTS)
