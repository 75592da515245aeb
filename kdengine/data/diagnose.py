# SPDX-License-Identifier: Apache-2.0
"""Which sample made DALI fail: its own message may name neither the file nor the sample.

DALI 2.4.0 says "nvImageCodec failure: '#4'" for an image that is not one, and hands out nothing of
the batch. But the state before the batch is known: a pipeline of the reader alone, started from
it, tells which samples the batch has, and each of them is then decoded on its own, always on the
CPU: a GPU whose decoder has just failed is not to be trusted with the question.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from nvidia.dali import Pipeline

from kdengine.data import dali
from kdengine.data.causes import Fault
from kdengine.data.decode import MAX_BATCH, DaliCheck, find_failures

if TYPE_CHECKING:
    from kdengine.data.index import DatasetIndex


def explain(
    error: RuntimeError,
    index: DatasetIndex,
    reader: dali.ReaderSpec,
    checkpoint: bytes | None,
    number_of: Callable[[str], int],
    *,
    on_gpu: bool = False,
) -> str:
    """The message for a batch that DALI could not make.

    Args:
        error: what DALI raised.
        index: names the samples.
        reader: the reader of the pipeline that failed.
        checkpoint: the state before the batch.
        number_of: global sample number of a `tar:offset:name`, or of a file.
        on_gpu: whether the pipeline that failed decodes on a GPU.
    """
    reason = _reason(str(error))
    who = f"data (rank {reader.rank} of {reader.world_size})"
    what, option = ("folder", " --require label") if reader.files else ("shard", "")
    advice = f"the {what} was changed after it was indexed; re-run `kdengine index {{}}{option}` "
    advice += "and resume"
    try:
        failed = _failed_sample(reader, read_sources(reader, checkpoint))
    except (RuntimeError, OSError) as second:
        told = f"{error} {second}"
        pairs = zip(reader.tars, reader.indexes, strict=True)
        tar = next((tar for tar, idx in pairs if tar in told or idx in told), None)
        place = next((file for file in reader.files if file in told), tar)
        if tar is None or place is None:
            return f"{who}: DALI cannot read the shards: {reason}"
        return f"{who}: DALI cannot read {place}: {reason}; {advice.format(tar)}"
    if failed is None:
        again = "each was decoded again, with DALI's CPU decoder"
        if on_gpu:
            again += ", while this run decodes on the GPU, which may refuse what the CPU takes"
        return f"{who}: DALI failed, but not on a single sample of the batch ({again}): {reason}"
    source, fault = failed
    number = number_of(source)
    tar, place = reader.tars[0], source
    if not reader.files:
        tar, offset, _ = source.rsplit(":", 2)
        place = f"at byte {offset} of {tar}"
    judge = "DALI's CPU decoder" + (", asked in place of the GPU's" if on_gpu else "")
    return (
        f"{who}: DALI cannot decode sample {number} (key {index.key(number)!r}, {place}): "
        f"{fault.detail} (says {judge}); {advice.format(tar)}"
    )


def read_sources(reader: dali.ReaderSpec, checkpoint: bytes | None) -> list[str]:
    """Where the samples of the next batch come from, without decoding them.

    Args:
        reader: as given to the pipeline that wrote the checkpoint.
        checkpoint: state of an `ImagePipeline`, None for its beginning.

    Returns:
        `tar:offset:name`, or file, of each sample of the batch that follows the checkpoint.

    Raises:
        RuntimeError: the reader fails too.
    """
    if checkpoint is not None:
        checkpoint = _keep_operators(checkpoint, dali.SOURCE_OPERATORS)
    pipeline = Pipeline(
        batch_size=reader.batch_size,
        num_threads=1,
        device_id=None,
        prefetch_queue_depth=1,
        enable_checkpointing=True,
        checkpoint=checkpoint,
    )
    with pipeline:
        pipeline.set_outputs(dali.padded_source(dali.read(reader)[1]))
    pipeline.build()
    return dali.decode_sources(pipeline.run()[0])


def _failed_sample(reader: dali.ReaderSpec, sources: Sequence[str]) -> tuple[str, Fault] | None:
    """The first sample that does not decode on its own, and why."""
    check = DaliCheck()
    for begin in range(0, len(sources), MAX_BATCH):
        part = sources[begin : begin + MAX_BATCH]
        failures = find_failures([_read_image(reader, source) for source in part], check)
        if failures:
            first = min(failures)
            return part[first], failures[first]
    return None


def _read_image(reader: dali.ReaderSpec, source: str) -> bytes:
    if reader.files:
        with open(source, "rb") as file:
            return file.read()
    tar, offset, _ = source.rsplit(":", 2)
    with open(reader.indexes[reader.tars.index(tar)]) as lines:
        size = next(int(line.split()[2]) for line in lines if line.split()[1] == offset)
    with open(tar, "rb") as file:
        file.seek(int(offset))
        return file.read(size)


def _reason(message: str) -> str:
    """What DALI says was encountered, without the traceback of the pipeline's definition."""
    told = message.rpartition("encountered:")[2].strip()
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"


def _keep_operators(checkpoint: bytes, names: Sequence[str]) -> bytes:
    """The checkpoint without the operators of other names.

    It is a protobuf message: field 1, repeated, is an operator (field 1 its name); field 2 the
    state of the pipeline. DALI refuses a checkpoint that names an operator it does not have.
    """
    kept, position = b"", 0
    while position < len(checkpoint):
        length, begin = _varint(checkpoint, position + 1)
        if checkpoint[position] == 0x0A:
            name_length, name_begin = _varint(checkpoint, begin + 1)
            name = checkpoint[name_begin : name_begin + name_length].decode()
            # the copy that DALI makes of an output is called __MakeContiguous_CpuToCpu_name
            wanted = any(name in (own, f"__MakeContiguous_CpuToCpu_{own}") for own in names)
        else:
            wanted = True
        if wanted:
            kept += checkpoint[position : begin + length]
        position = begin + length
    return kept


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
