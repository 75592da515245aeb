# SPDX-License-Identifier: Apache-2.0
"""DALI's pixels against open_clip's transforms, on photos and on odd images."""

import io
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import RandomResizedCrop

from kdengine.data import ViewSpec
from kdengine.data.dali import ImagePipeline, ReaderSpec
from kdengine.data.windows import stored_windows

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
# mean absolute difference of one image, of 255
LIMIT = 0.5
# the typical one is far smaller, and a shift by one pixel far larger
TYPICAL_LIMIT = 0.1

EXTENSIONS = (".jpg", ".png", ".webp")


def read_images(tar: Path, keys=None, num=None) -> list[bytes]:
    with tarfile.open(tar) as archive:
        members = [m for m in archive if m.name.endswith(EXTENSIONS)]
        members = [m for m in members if keys is None or m.name.split(".")[0] in keys][:num]
        return [archive.extractfile(m).read() for m in members]


def pipeline_of(images, folder, *, sizes=(64,), train=False, windows=None, seed=3):
    """The pipeline over a tar of the images, one batch of all."""
    tar, idx, lines = folder / "images.tar", folder / "images.idx", [f"v1.2 {len(images)}"]
    with tarfile.open(tar, "w") as archive:
        for number, data in enumerate(images):
            member = tarfile.TarInfo(f"{number}.img")
            member.size = len(data)
            lines.append(f"img {archive.offset + 512} {len(data)} {number}")
            archive.addfile(member, io.BytesIO(data))
    idx.write_text("\n".join([*lines, ""]))
    reader = ReaderSpec((str(tar),), (str(idx),), 0, 1, len(images), 0, seed)
    views = [ViewSpec(size, MEAN, STD) for size in sizes]
    return ImagePipeline(reader, views, train=train, num_threads=1, windows=windows)


def difference(view: torch.Tensor, expected: list[torch.Tensor]) -> np.ndarray:
    """Mean absolute difference of each image on the scale of its pixels, 0 to 255."""
    scale = 255 * torch.tensor(STD).view(3, 1, 1)
    return ((view - torch.stack(expected)).abs() * scale).mean((1, 2, 3)).numpy()


def open_clip_eval(images, size, convert_first=False):
    transform = open_clip.image_transform(size, is_train=False, mean=MEAN, std=STD)
    return [transform(open_image(data, convert_first)) for data in images]


def open_clip_train(images, size, windows, monkeypatch, convert_first=False):
    """The transform of training with given windows in place of random ones."""
    transform = open_clip.image_transform(size, is_train=True, mean=MEAN, std=STD)
    expected = []
    for data, window in zip(images, windows.tolist(), strict=True):
        monkeypatch.setattr(RandomResizedCrop, "get_params", lambda *_, w=window: w)
        expected.append(transform(open_image(data, convert_first)))
    return expected


def open_image(data, convert_first):
    image = Image.open(io.BytesIO(data))
    return image.convert("RGB") if convert_first else image


SETS = {
    "cocomini": ("cocomini-by-000.tar", None),
    "flickr8k": ("flickr8k-val-000.tar", 60),
    "imagenet": ("imagenet-sample-zeroshot.tar", 40),
}


@pytest.fixture(params=SETS, ids=list(SETS))
def photos(request, test_data):
    name, num = SETS[request.param]
    images = read_images(test_data / name, num=num)
    assert any(len(set(Image.open(io.BytesIO(data)).size)) == 2 for data in images)
    return images


@pytest.mark.parametrize("size", [64, 224])
def test_evaluation_equals_open_clip(photos, size, tmp_path):
    (view,) = pipeline_of(photos, tmp_path, sizes=[size]).run().views
    errors = difference(view, open_clip_eval(photos, size))
    assert errors.max() <= LIMIT
    assert np.median(errors) <= TYPICAL_LIMIT


@pytest.mark.parametrize("size", [64, 224])
def test_training_equals_open_clip_for_the_same_window(photos, size, tmp_path, monkeypatch):
    raw = pipeline_of(photos, tmp_path, sizes=[size], train=True).run()
    expected = open_clip_train(photos, size, raw.windows, monkeypatch)
    errors = difference(raw.views[0], expected)
    assert errors.max() <= LIMIT
    assert np.median(errors) <= TYPICAL_LIMIT


# what decodes is compared with Pillow's own reading of it; EXIF orientation must be ignored
ODD = {
    "009000000": "plain",
    "009000010": "damaged-scan",
    "009000011": "trailing-garbage",
    "009000014": "cmyk",
    "009000015": "gray",
    "009000016": "exif-rotated",
    "009000017": "bogus-icc",
    "009000018": "garbage-exif",
    "009000022": "rgba",
    "009000023": "palette",
    "009000024": "gray-alpha",
    "009000025": "one-bit",
    "009000026": "one-pixel",
    "009000027": "1x4000",
    "009000037": "animated-webp",
    "009000038": "webp",
    "009000039": "bmp",
}
# open_clip converts to RGB after its resize, which has no filter for these and premultiplies alpha
CONVERTED_FIRST = {"rgba", "palette", "one-bit"}


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("key", ODD, ids=ODD.values())
def test_odd_image_equals_open_clip(test_data, key, train, tmp_path, monkeypatch):
    images = read_images(test_data / "hostile-000.tar", keys=[key])
    raw = pipeline_of(images, tmp_path, train=train).run()
    first = ODD[key] in CONVERTED_FIRST
    if train:
        expected = open_clip_train(images, 64, raw.windows, monkeypatch, first)
    else:
        expected = open_clip_eval(images, 64, first)
    assert difference(raw.views[0], expected).max() <= LIMIT


def test_image_two_pixels_high_is_near_open_clip(test_data, tmp_path):
    images = read_images(test_data / "hostile-000.tar", keys=["009000028"])
    (view,) = pipeline_of(images, tmp_path).run().views
    # Pillow and DALI continue an image differently beyond its border, and here all is border
    assert difference(view, open_clip_eval(images, 64)).max() <= 1.5 * LIMIT


def encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# noise is unforgiving: a crop that is one pixel off differs by more than 20
@pytest.mark.parametrize(
    "shape",
    [(67, 100), (101, 64), (64, 64), (65, 66), (66, 65), (99, 300), (300, 97), (127, 64), (31, 45)],
    ids=lambda shape: f"{shape[0]}x{shape[1]}",
)
def test_centre_crop_rounds_as_torchvision(shape, tmp_path):
    noise = np.random.default_rng(0).integers(64, 192, (shape[1], shape[0], 3), np.uint8)
    images = [encode(Image.fromarray(noise))]
    (view,) = pipeline_of(images, tmp_path).run().views
    assert difference(view, open_clip_eval(images, 64)).max() <= LIMIT


def test_line_art_equals_open_clip(tmp_path):
    page = Image.new("RGB", (400, 300), "white")
    for line in range(24):
        ImageDraw.Draw(page).text((4, 12 * line + 6), "a quick brown fox " * 3, fill="black")
    images = [encode(page)]
    (view,) = pipeline_of(images, tmp_path).run().views
    assert difference(view, open_clip_eval(images, 64)).max() <= LIMIT


def test_random_windows_are_those_of_torchvision(tmp_path):
    images = [encode(Image.new("RGB", (200, 150)))] * 800
    windows = pipeline_of(images, tmp_path, sizes=[4], train=True).run().windows
    draws = [
        RandomResizedCrop.get_params(torch.empty(3, 150, 200), [0.9, 1.0], [3 / 4, 4 / 3])
        for _ in range(800)
    ]
    ours, theirs = windows.astype(float), np.array(draws, float)
    spread = theirs.std(0)
    # 5 standard errors of a difference of means; spreads agree within a fifth
    np.testing.assert_array_less(np.abs(ours.mean(0) - theirs.mean(0)), 5 * spread / 20)
    np.testing.assert_allclose(ours.std(0), spread, rtol=0.2)
    area = windows[:, 2] * windows[:, 3] / (150 * 200)
    assert area.min() > 0.88 and (windows[:, 0] + windows[:, 2]).max() <= 150
    assert (windows[:, 1] + windows[:, 3]).max() <= 200


def test_window_source_can_be_replaced_by_stored_windows(test_data, tmp_path):
    images = read_images(test_data / "cocomini-by-000.tar", num=8)
    drawn = pipeline_of(images, tmp_path, sizes=[32, 48], train=True).run()

    def find(sources: list[str], numbers: np.ndarray) -> np.ndarray:
        rows = [int(source.rsplit(":")[-1]) for source in sources]
        return drawn.windows[rows] + 0 * numbers[:, None]

    replay = stored_windows(find, 3, seed=5)
    again = pipeline_of(images, tmp_path, sizes=[32, 48], train=True, windows=replay, seed=99).run()
    assert np.array_equal(again.windows, drawn.windows)
    assert set(again.numbers) <= {0, 1, 2} and not drawn.numbers.any()
    assert all(torch.equal(a, b) for a, b in zip(again.views, drawn.views, strict=True))


def test_number_of_threads_does_not_change_a_pixel(test_data, tmp_path):
    images = read_images(test_data / "cocomini-by-000.tar", num=8)
    one = pipeline_of(images, tmp_path, train=True)
    reader = ReaderSpec(
        (str(tmp_path / "images.tar"),), (str(tmp_path / "images.idx"),), 0, 1, 8, 0, 3
    )
    three = ImagePipeline(reader, [ViewSpec(64, MEAN, STD)], train=True, num_threads=3)
    for _ in range(3):
        assert torch.equal(one.run().views[0], three.run().views[0])


def test_view_refuses_a_wrong_normalisation():
    with pytest.raises(ValueError, match="std above 0"):
        ViewSpec(64, (0.5, 0.5, 0.5), (0.5, 0.0, 0.5))
