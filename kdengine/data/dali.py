# SPDX-License-Identifier: Apache-2.0
"""The one DALI graph: shards -> crop windows -> decoded windows -> normalised views.

    reader (webdataset or file) -> peek_image_shape -> window source -> image_slice
        -> resize -> normalise

The graph is the same on CPU and GPU: with a device number the decoder is `mixed` and everything
after it follows onto the GPU. The window source is one small function, see `windows.py`.

Equality with open_clip's transforms (torchvision on Pillow images), same window: the mean absolute
difference of an image is below 0.1 of 255 for nearly all photos (0.01 at 224 pixels). For this
* each resize runs as two, rows first, with the result rounded to 8 bits in between, as Pillow
  does (one DALI resize keeps floats there: 0.15 on photos, 0.5 and more on line art);
* evaluation floors the long side and rounds the crop anchor half to even as torchvision does, and
  resizes only the crop (a 1x4000 image would become 224x896000 first);
* EXIF orientation is ignored, as Pillow does unless asked.
What remains: Pillow leaves out the pixels beyond the border and renormalises its filter, DALI
repeats the border pixel. That is seen in images with a thin frame that are reduced a lot (0.8 in
the worst of 1,000 photos, at 48 pixels) and in images a few pixels high (0.6). Pillow 13 resizes
columns first where the height shrinks far more (0.25). Gray, CMYK, palette and alpha come out as
Pillow's convert("RGB"), which open_clip calls after its resize: there it resizes palette and 1-bit
images without a filter and premultiplies alpha, which is not repeated here. Windows are drawn as
torchvision's RandomResizedCrop draws them, but for an aspect that fits no window: torchvision
centres the largest one, DALI places it at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import math as dali_math

from kdengine.data.views import ViewSpec
from kdengine.data.windows import WindowSource, random_windows, whole_images

# the operators that a pipeline of the reader alone shares with the whole graph
SOURCE_OPERATORS = ("reader", "source", "source_padded")


@dataclass(frozen=True)
class ReaderSpec:
    """What one rank reads, in which order; equal on all ranks but for `rank`.

    `shuffle_buffer` 0 reads in order and the same part in every pass; otherwise the parts change
    hands and the archives are reordered after each pass, and samples are drawn from a buffer.
    `files` are images on their own in place of archives; shuffling takes them all, not a buffer.
    """

    tars: tuple[str, ...]
    indexes: tuple[str, ...]
    rank: int
    world_size: int
    batch_size: int
    shuffle_buffer: int
    seed: int
    files: tuple[str, ...] = ()


class RawBatch(NamedTuple):
    """One run of the pipeline.

    Shapes: views [b, 3, S, S] float32 on the pipeline's device; windows [b, 4] int64 on the CPU,
    (top, left, height, width) in pixels of the stored image; numbers [b] int64, which of the stored
    views it is (0 for windows that were drawn); sources, b times `tar:offset:name`, or the path of
    a file.
    """

    views: list[torch.Tensor]
    windows: np.ndarray
    numbers: np.ndarray
    sources: list[str]


def _float(node: Any) -> Any:
    return fn.cast(node, dtype=types.FLOAT)


def _centre_crop(extent: Any, size: int) -> tuple[Any, Any]:
    """First and last edge, on the source, of torchvision's Resize(size) + CenterCrop(size)."""
    short = dali_math.min(extent[0], extent[1])
    first, last = [], []
    for dim in (0, 1):
        length = extent[dim]
        resized = length * size // short
        excess = resized - size
        half = excess // 2
        # round half to even: up only from an odd half
        anchor = half + (excess & 1) * (half & 1)
        first.append(_float(anchor) * _float(length) / _float(resized))
        last.append(_float(anchor + size) * _float(length) / _float(resized))
    return fn.stack(*first), fn.stack(*last)


def _resize(image: Any, extent: Any, first: Any, last: Any, size: int) -> Any:
    """Bicubic resize of the box from `first` to `last`; along the rows, then along the columns."""
    cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True, "dtype": types.UINT8}
    zero, side, height = types.Constant(0.0), types.Constant(float(size)), _float(extent[0])
    rows = fn.resize(
        image,
        size=fn.stack(height, side),
        roi_start=fn.stack(zero, first[1]),
        roi_end=fn.stack(height, last[1]),
        **cubic,
    )
    return fn.resize(
        rows,
        size=[size, size],
        roi_start=fn.stack(first[0], zero),
        roi_end=fn.stack(last[0], side),
        **cubic,
    )


def read(reader: ReaderSpec) -> tuple[Any, Any]:
    """Encoded images, and where each comes from (`source_info`), inside a pipeline."""
    shared: dict[str, Any] = {
        "name": SOURCE_OPERATORS[0],
        "num_shards": reader.world_size,
        "shard_id": reader.rank,
        "seed": derive_seed(reader.seed, 1, reader.rank),
        # every rank runs the same number of batches in a pass, whatever its part is
        "pad_last_batch": True,
        # a mapped file that shrinks kills the process with SIGBUS; a read raises an error
        "dont_use_mmap": True,
    }
    order: dict[str, Any] = {"stick_to_shard": True}
    if reader.shuffle_buffer:
        # the archive order must be common to all ranks, or their parts would overlap
        order = {
            "random_shuffle": True,
            "initial_fill": reader.shuffle_buffer,
            "shuffle_after_epoch": True,
            "shuffle_after_epoch_seed": derive_seed(reader.seed, 0),
        }
    if reader.files:
        if reader.shuffle_buffer:
            del order["random_shuffle"], order["initial_fill"]
        encoded, _ = fn.readers.file(files=list(reader.files), **shared, **order)
    else:
        tars, indexes = list(reader.tars), list(reader.indexes)
        encoded = fn.readers.webdataset(
            paths=tars, index_paths=indexes, ext=["img"], **shared, **order
        )
    return encoded, fn.get_property(encoded, name=SOURCE_OPERATORS[1], key="source_info")


def _graph(
    reader: ReaderSpec,
    views: Sequence[ViewSpec],
    windows: WindowSource,
    is_crop: bool,
    device: str,
) -> list[Any]:
    encoded, source = read(reader)
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    anchor, extent, number = windows(shape, source)
    image = fn.decoders.image_slice(
        encoded,
        anchor,
        extent,
        device=device,
        axes=[0, 1],
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    resized = {}
    for size in sorted({view.size for view in views}):
        first, last = _float(anchor * 0), _float(extent)
        if is_crop:
            first, last = _centre_crop(extent, size)
        resized[size] = _resize(image, extent, first, last, size)
    normalised = [
        fn.crop_mirror_normalize(
            resized[view.size],
            dtype=types.FLOAT,
            output_layout="CHW",
            mean=[255 * value for value in view.mean],
            std=[255 * value for value in view.std],
        )
        for view in views
    ]
    window = fn.cast(fn.cat(anchor, extent, axis=0), dtype=types.INT64)
    return [padded_source(source), window, fn.cast(number, dtype=types.INT64), *normalised]


def padded_source(source: Any) -> Any:
    """Sources of equal length, so that they leave the pipeline as one array."""
    return fn.pad(source, name=SOURCE_OPERATORS[2], fill_value=0)


def decode_sources(padded: Any) -> list[str]:
    """The strings in an output made with `padded_source`."""
    return [row.tobytes().rstrip(b"\0").decode() for row in padded.as_array()]


class ImagePipeline:
    """The graph, running ahead in DALI's own threads; a checkpoint after every batch.

    Training draws windows at random and resizes them; evaluation (`train=False`) takes whole
    images and crops their centre.

    Seen with DALI 2.4.0 on the CPU: `checkpoint()` belongs to the batch that was handed out last,
    however many are decoded ahead; it takes 0.02 ms and restores in 0.1 s wherever in a pass
    (reads are skipped); outputs are never overwritten, so tensors that share them stay as they are.

    Args:
        reader: what to read.
        views: size and normalisation of each view; all show the same window.
        train: random windows instead of a centre crop.
        num_threads: decoding threads.
        device_id: GPU, None for the CPU.
        num_batches: stop decoding ahead after this many batches; None never stops.
        checkpoint: state of an earlier pipeline with the same reader, views and window source.
        windows: replaces the source of the windows in training.

    Raises:
        RuntimeError: the shards cannot be opened.
    """

    def __init__(
        self,
        reader: ReaderSpec,
        views: Sequence[ViewSpec],
        *,
        train: bool,
        num_threads: int,
        device_id: int | None = None,
        num_batches: int | None = None,
        checkpoint: bytes | None = None,
        windows: WindowSource | None = None,
    ) -> None:
        ahead = 2 if num_batches is None else max(1, min(2, num_batches))
        self._pipeline = Pipeline(
            batch_size=reader.batch_size,
            num_threads=num_threads,
            device_id=device_id,
            prefetch_queue_depth=ahead,
            seed=derive_seed(reader.seed, 2, reader.rank),
            enable_checkpointing=True,
            checkpoint=checkpoint,
        )
        if windows is None:
            seed = derive_seed(reader.seed, 3, reader.rank)
            windows = random_windows(seed) if train else whole_images
        device = "cpu" if device_id is None else "mixed"
        with self._pipeline:
            self._pipeline.set_outputs(*_graph(reader, views, windows, not train, device))
        self._pipeline.build()
        self._device_id = device_id
        self._left = None if num_batches is None else num_batches - (ahead - 1)

    def run(self) -> RawBatch:
        """The next batch; on a GPU its tensors are ordered on torch's current stream."""
        if self._left is None or self._left > 0:
            self._pipeline.schedule_run()
        if self._left is not None:
            self._left -= 1
        stream = None
        if self._device_id is not None:
            # binds the buffers to the stream that uses them, so that DALI waits before reuse
            stream = torch.cuda.current_stream(self._device_id)
        source, window, number, *views = self._pipeline.outputs(stream)
        return RawBatch(
            [torch.from_dlpack(view.as_tensor()) for view in views],
            np.array(window.as_array()),
            np.array(number.as_array())[:, 0],
            decode_sources(source),
        )

    def checkpoint(self) -> bytes:
        """The state right after the last batch that `run` returned."""
        return self._pipeline.checkpoint()


def derive_seed(*words: int) -> int:
    """A 31-bit seed that depends on all the numbers and their order."""
    return int(np.random.SeedSequence(words).generate_state(1)[0] & 0x7FFFFFFF)
