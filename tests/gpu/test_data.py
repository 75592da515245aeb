# SPDX-License-Identifier: Apache-2.0
"""Decoding on a GPU: pixels and windows of the CPU, exact resume, batches that stay as they are."""

from itertools import islice
from typing import Any

import pytest
import torch

SIZES = [(200, 150), (64, 64), (97, 131), (160, 161)]
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
# mean absolute difference of one image, of 255: JPEG decoders may differ by one or two a pixel
LIMIT = 1.0
JPEG = {"kind": "JPEG", "quality": 92}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpeg 4:2:0": ("RGB", {**JPEG, "subsampling": 2}),
    "jpeg 4:4:4": ("RGB", {**JPEG, "subsampling": 0}),
    "progressive jpeg": ("RGB", {**JPEG, "progressive": True}),
    "gray jpeg": ("L", JPEG),
    "cmyk jpeg": ("CMYK", JPEG),
    "png": ("RGB", {"kind": "PNG"}),
    "png with alpha": ("RGBA", {"kind": "PNG"}),
    "webp": ("RGB", {"kind": "WEBP", "lossless": True}),
    "bmp": ("RGB", {"kind": "BMP"}),
}


@pytest.fixture(autouse=True)
def _dali() -> None:
    pytest.importorskip("nvidia.dali", reason="decoding needs DALI")


@pytest.fixture
def open_index(write_shard, tmp_path):
    """``open_index(images)``: the index of a shard of encoded images."""
    from kdengine.data import ensure_index

    def build(images: list[bytes]):
        samples = [{"jpg": data, "txt": b"a picture"} for data in images]
        shard = write_shard(tmp_path / "0.tar", samples)
        index = ensure_index(shard, index_dir=str(tmp_path / "index"), num_workers=0)
        assert index.num_samples == len(images)
        return index

    return build


@pytest.mark.parametrize("train", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_pixels_and_windows_are_those_of_the_cpu(picture, encode, open_index, kind, train) -> None:
    from kdengine.data.dali import ImagePipeline, ReaderSpec
    from kdengine.data.views import ViewSpec

    color, options = kind
    images = [encode(picture(n, size).convert(color), **options) for n, size in enumerate(SIZES)]
    (shard,) = open_index(images).shards
    reader = ReaderSpec((shard.tar,), (shard.idx,), 0, 1, len(images), 0, 3)
    views = [ViewSpec(64, MEAN, STD)]
    cpu, gpu = (
        ImagePipeline(reader, views, train=train, num_threads=2, device_id=device).run()
        for device in (None, 0)
    )
    assert gpu.views[0].is_cuda and (gpu.windows == cpu.windows).all()
    scale = 255 * torch.tensor(STD).view(3, 1, 1)
    ours, truth = gpu.views[0].cpu() * scale, cpu.views[0] * scale
    assert (ours - truth).abs().mean((1, 2, 3)).max() <= LIMIT
    # what a shift by one pixel would do is far above the limit
    assert (truth.roll(1, 3) - truth).abs().mean((1, 2, 3)).min() > 4 * LIMIT


@pytest.fixture
def make_loader(picture, encode, open_index):
    """``make_loader()``: a training loader on the GPU over 20 JPEG files, 3 batches an epoch."""
    from kdengine.data import ViewSpec, build_loader

    images = [encode(picture(n, SIZES[n % len(SIZES)]), **JPEG) for n in range(20)]
    index = open_index(images)

    def make():
        views = {"image": ViewSpec(48, MEAN, STD), "teacher_image": ViewSpec(64, MEAN, STD)}
        options = {"num_threads": 2, "seed": 7, "device_id": 0, "shuffle_buffer": 9}
        return build_loader(index, views=views, tokenizers={}, batch_size=6, **options)

    return make


def assert_equal(found: list[dict], expected: list[dict]) -> None:
    for batch, true in zip(found, expected, strict=True):
        for name in true:
            assert batch[name].is_cuda and torch.equal(batch[name], true[name]), name


# within an epoch, at its end, and beyond
@pytest.mark.parametrize("position", [1, 3, 5])
def test_resume_on_the_device_is_bit_equal(make_loader, tmp_path, position) -> None:
    whole = make_loader()
    assert whole.steps_per_epoch == 3
    list(islice(whole, position))
    torch.save(whole.state_dict(), tmp_path / "state.pt")
    expected = list(islice(whole, 7))
    assert not torch.equal(expected[0]["image"], expected[1]["image"])
    resumed = make_loader()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert_equal(list(islice(resumed, 7)), expected)


def test_batches_handed_out_are_never_overwritten(make_loader) -> None:
    loader = make_loader()
    batches = list(islice(loader, 3))
    copies = [{name: x.clone() for name, x in batch.items()} for batch in batches]
    list(islice(loader, 9))
    loader.close()
    torch.cuda.synchronize()
    assert_equal(batches, copies)
