# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: frozen dataclasses, filled from TOML recipes.

Field names keep open_clip's spelling. Text in the data fields may hold ``${NAME}`` or
``${NAME:-default}``, replaced from the environment when a recipe is read. The parser of the
command line lives in ``kdengine.arguments``; this module needs the standard library only.
"""

import dataclasses
import difflib
import os
import re
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from kdengine import MAX_PIXELS
from kdengine.methodconfig import ClipCID as ClipCID
from kdengine.methodconfig import ClipKD as ClipKD
from kdengine.methodconfig import ComKD as ComKD
from kdengine.methodconfig import Method
from kdengine.methodconfig import TinyClip as TinyClip
from kdengine.promptconfig import Classes, Prompt, refuse_with_prompts
from kdengine.promptconfig import check as _check

RECIPES = Path(__file__).parent / "recipes"
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the training pairs come from."""

    train_data: str = ""
    """Shards: braces ('/data/{00000..00331}.tar'), a folder (all .tar files directly in it),
    several joined by '::'."""
    dataset_type: Literal["webdataset", "synthetic"] = "webdataset"
    """'synthetic' makes random pairs, for benchmarks only."""
    train_num_samples: int = 0
    """Samples in an epoch of synthetic data; shards know their own number."""
    index_dir: str | None = None
    """Folder for the index, where the shards' own folder cannot be written."""
    max_pixels: int = MAX_PIXELS
    """An image whose header states more pixels is quarantined before any decode."""
    keep: str | None = None
    """Folder that 'kdengine balance' made: train on the samples that it keeps."""
    caption: Literal["random", "first"] = "random"
    """Which of a sample's captions a step uses."""
    workers: int = 4
    """Decoding threads of a rank."""
    shuffle_buffer: int = 4096
    """Samples in the reader's shuffle buffer, on each rank."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """The student."""

    model: str = "ViT-T-16"
    """open_clip architecture, one of ours, 'local-dir:PATH', or a JSON config file."""
    pretrained: str | None = None
    """open_clip tag or a checkpoint file to start from; none starts from scratch."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""


@dataclass(frozen=True, kw_only=True)
class Distill:
    """The teachers; methods without one ignore them."""

    distill_model: tuple[str, ...] = ()
    """One or several: open_clip architecture, 'local-dir:PATH', or a JSON config file."""
    distill_pretrained: tuple[str, ...] = ()
    """open_clip tag or checkpoint file of each teacher, '' for one without; or none at all."""
    distill_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the teachers' forward; 'auto' follows train.precision."""
    cache: str | None = None
    """Folder that 'kdengine cache' made: train on its crops, with the embeddings stored for them;
    no teacher is loaded, and none needs to be named."""
    cache_live: bool = False
    """Train on the crops of the cache, but run the teachers all the same: to compare."""

    def __post_init__(self) -> None:
        if self.cache_live and self.cache is None:
            raise ValueError("distill: cache_live needs a cache, got none; give --distill.cache")
        models, tags = self.distill_model, self.distill_pretrained
        if tags and len(tags) != len(models):
            raise ValueError(
                "distill: expected distill_pretrained to be empty or as long as distill_model, "
                f"got {list(tags)} for {list(models)}; give one for each teacher, '' where there "
                "is none"
            )

    def teachers(self) -> list[tuple[str, str | None]]:
        """Model and pretrained of each teacher."""
        tags = self.distill_pretrained or ("",) * len(self.distill_model)
        return [(model, tag or None) for model, tag in zip(self.distill_model, tags, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Masks over channels, heads and neurons, then a cut (automatic inheritance of TinyCLIP)."""

    target: float = 0.0
    """Share of the parameters of the attention and feed-forward blocks that the student loses,
    counted from the model before any cut; 0 does not prune."""
    steps: int = 3000
    """Steps with masks; then the student is cut, and trained on with a new optimiser."""
    warmup: int = 1000
    """Steps in which the share that is to be gone rises to the target."""
    mask_lr: float = 0.02
    """Learning rate of masks and multipliers, constant."""

    def __post_init__(self) -> None:
        _check("prune", "target", self.target, "a share of 0 <= t < 1", 0 <= self.target < 1)
        _check("prune", "steps", self.steps, "a number of steps >= 1", self.steps >= 1)
        _check("prune", "warmup", self.warmup, "a number of steps >= 0", self.warmup >= 0)
        if self.target and self.warmup > self.steps:
            raise ValueError(
                f"prune.warmup: expected at most the {self.steps} steps with masks (prune.steps), "
                f"got {self.warmup}: the masks would never be asked for the whole target; lower it"
            )
        _check("prune", "mask_lr", self.mask_lr, "a learning rate > 0", self.mask_lr > 0)


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW or SGD with warm-up and decay."""

    name: Literal["adamw", "sgd"] = "adamw"
    """The optimiser."""
    lr: float = 1e-3
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    eps: float = 1e-6
    """Added to the root of the mean of squared gradients."""
    momentum: float = 0.9
    """Of sgd."""
    wd: float = 0.1
    """Weight decay; norms, biases and scales get none."""
    warmup: int = 10_000
    """Steps of linear warm-up."""
    lr_scheduler: Literal["cosine", "const"] = "cosine"
    """After the warm-up: cosine to zero, or constant."""
    grad_clip_norm: float | None = None
    """Clip the global gradient norm to this; none does not clip."""

    def __post_init__(self) -> None:
        _check("optim", "lr", self.lr, "a learning rate > 0", self.lr > 0)
        _check("optim", "wd", self.wd, "a weight decay >= 0", self.wd >= 0)
        _check("optim", "warmup", self.warmup, "a number of steps >= 0", self.warmup >= 0)
        clip = self.grad_clip_norm
        _check("optim", "grad_clip_norm", clip or 0, "a norm > 0", clip is None or clip > 0)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Batch, length, precision and engine."""

    batch_size: int = 128
    """Pairs on each rank in a forward pass."""
    accum_freq: int = 1
    """Forward passes whose pairs one exact loss sees together: a step's batch is batch_size x
    accum_freq x ranks, in the memory of batch_size, for up to one more forward pass of each."""
    epochs: float | None = None
    """Length in passes over the data; give this or steps."""
    steps: int | None = None
    """Length in optimiser steps; give this or epochs."""
    num_chunks: int | None = None
    """Pieces in which the loss sends features to the other ranks, and gradients home, each computed
    on while the next travels; none chooses by the batch, up to four."""
    regather: bool = False
    """Let features travel again in the backward pass, instead of keeping those of all ranks: less
    memory for a very large batch, for more bytes."""
    precision: Literal["fp32", "bf16", "amp_bf16"] = "fp32"
    """'bf16' casts the student and keeps fp32 masters; 'amp_bf16' computes in bf16 from fp32."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO: 0 none, 1 optimiser, 2 + gradients, 3 + parameters sharded."""
    deepspeed_config: str | None = None
    """JSON file merged over the DeepSpeed configuration that kdengine builds."""
    torchcompile: bool = False
    """Compile the student with torch.compile."""
    max_skipped: int = 10
    """Consecutive steps with a non-finite loss or gradient that are skipped; one more stops."""
    seed: int = 0
    """Of weights, data order and all random draws."""

    def __post_init__(self) -> None:
        _check("train", "batch_size", self.batch_size, "a size >= 1", self.batch_size >= 1)
        _check("train", "accum_freq", self.accum_freq, "a number >= 1", self.accum_freq >= 1)
        chunks = self.num_chunks
        _check("train", "num_chunks", chunks or 0, "a number >= 1", chunks is None or chunks >= 1)
        if self.epochs is not None and self.steps is not None:
            raise ValueError(
                f"train: expected epochs or steps, got both (epochs={self.epochs}, "
                f"steps={self.steps}); set one of them to None"
            )
        if self.torchcompile and self.zero_stage == 3:
            raise ValueError(
                "train: torchcompile cannot go with zero_stage 3: ZeRO frees gathered weights that "
                "the compiled backward pass still needs, and the gradients come out wrong; use "
                "zero_stage 2, or no torchcompile"
            )
        length = self.steps if self.steps is not None else self.epochs
        _check("train", "steps/epochs", length or 0, "a length > 0", length is None or length > 0)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """Evaluation during training and by 'kdengine eval'."""

    retrieval: tuple[str, ...] = ()
    """Sets of image-caption pairs, each 'NAME=SHARDS'."""
    zeroshot: tuple[str, ...] = ()
    """Classification sets, each 'NAME=SHARDS;CLASSNAMES;TEMPLATES' (two text files, or the
    word imagenet) or 'NAME=DATA;SPLIT.json[:val]'; without them X-zeroshot.tar takes
    X-classnames.txt and X-templates.txt beside it; a folder with a folder of images for
    each class may stand for the shards."""
    val_frequency: int = 0
    """Evaluate every so many steps; 0 only at the end."""
    batch_size: int = 128
    """Images on each rank at a time."""
    select: str = ""
    """'SET/METRIC': the export holds the student of the evaluation where this was the highest, and
    not that of the last step; of a set 'NAME=SHARDS;SPLIT.json:val'."""
    select_on_test: bool = False
    """Let select look at a set to test on, as PromptKD's released trainer does."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Names, logs, checkpoints."""

    name: str = "run"
    """Folder of the run."""
    logs: str = "runs"
    """Everything is written under LOGS/NAME."""
    resume: str | None = None
    """'latest', the number of a step, or the folder of a checkpoint."""
    log_every_n_steps: int = 10
    """Steps from one line of the log to the next."""
    save_every_n_steps: int = 1000
    """Steps from one checkpoint to the next; 0 saves by minutes and at the end only."""
    save_every_minutes: float = 30.0
    """Minutes from one checkpoint to the next; 0 saves by steps and at the end only."""
    keep_last: int = 2
    """Checkpoints to keep."""
    timeout_minutes: float = 20.0
    """A rank that keeps the others waiting for longer ends the run."""
    tensorboard: bool = True
    """Also write TensorBoard files."""

    def __post_init__(self) -> None:
        every, keep, wait = self.log_every_n_steps, self.keep_last, self.timeout_minutes
        _check("run", "log_every_n_steps", every, "a number of steps >= 1", every >= 1)
        _check("run", "keep_last", keep, "a number of checkpoints >= 1", keep >= 1)
        _check("run", "timeout_minutes", wait, "a time > 0", wait > 0)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run, whole."""

    data: Data = field(default_factory=Data)
    classes: Classes = field(default_factory=Classes)
    model: Model = field(default_factory=Model)
    distill: Distill = field(default_factory=Distill)
    method: Method = field(default_factory=Method)
    prompt: Prompt = field(default_factory=Prompt)
    prune: Prune = field(default_factory=Prune)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if self.prune.target and self.train.zero_stage == 3:
            raise ValueError(
                "prune: a student that is cut cannot have its parameters sharded, got zero_stage "
                "3; use zero_stage 2"
            )
        if self.method.on_classes:
            refuse_with_prompts(self)
        own = self.method.clip_cid
        learns = self.method.name == "clip_cid" and own.on_clusters and own.prototypes == "own"
        if learns and self.optim.name != "adamw":
            raise ValueError(
                f"optim.name: expected adamw with method clip_cid, whose own prototypes have an "
                f"AdamW at a multiple of optim.lr; got {self.optim.name}; or set "
                "method.clip_cid.prototypes to 'teacher'"
            )


def recipe_names() -> list[str]:
    """The recipes that ship with kdengine, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.toml"))


def load_recipe(name: str) -> RunConfig:
    """Read a recipe by name or path into a RunConfig.

    A key ``base = "NAME"`` at the top of a recipe starts from that recipe; of one with ``stages``
    this is the first stage, see ``kdengine.stages``.

    Raises:
        FileNotFoundError: no such recipe; the message lists those there are.
        ValueError: not TOML, an unknown key (the nearest valid one is named), or a wrong value.
    """
    values = _read(name, ())
    if stages := values.pop("stages", ()):
        values = _merge(_read(stages[0], (name,)), values)
    return from_dict(RunConfig, values, name)


def recipe_stages(name: str) -> tuple[str, ...]:
    """The recipes of a recipe's stages, in order; none of one that is a single training.

    Raises:
        FileNotFoundError, ValueError: see ``load_recipe``; or they are no list of recipes.
    """
    stages = _read(name, ()).get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, str) for stage in stages):
        raise ValueError(f"recipe {name!r}: stages: expected a list of recipes, got {stages!r}")
    for stage in stages:
        if _read(stage, (name,)).get("stages"):
            raise ValueError(f"recipe {name!r}: its stage {stage!r} has stages of its own")
    return tuple(stages)


def _read(name: str, above: tuple[str, ...]) -> dict[str, Any]:
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    if not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise FileNotFoundError(
            f"recipe {name!r}: no file {path}.{hint} There are: {', '.join(recipe_names())}; "
            "or give the path of a .toml file"
        )
    if name in above:
        raise ValueError(f"recipe {name!r}: 'base' goes in a circle: {' -> '.join(above)}")
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"recipe {path}: not valid TOML: {error}") from None
    base = values.pop("base", None)
    return values if base is None else _merge(_read(base, (*above, name)), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def from_dict(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Build the dataclass ``cls`` from nested plain values, refusing what does not fit.

    Raises:
        ValueError: an unknown key or a value of the wrong type, named with ``where``.
    """
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        near = difflib.get_close_matches(unknown[0], hints, 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(hints)}"
        raise ValueError(f"{where}: unknown key {unknown[0]!r}; {hint}")
    return cls(**{key: _convert(hints[key], v, f"{where}: {key}") for key, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, dict):
            return from_dict(hint, value, where)
        raise ValueError(f"{where}: expected a table, got {value!r}")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType or origin is typing.Union:
        if value is None:
            return None
        return _convert(next(a for a in arguments if a is not type(None)), value, where)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
        raise ValueError(f"{where}: expected one of {list(arguments)}, got {value!r}")
    if origin is tuple and isinstance(value, list | tuple | str):
        items = [value] if isinstance(value, str) else value
        return tuple(_convert(arguments[0], item, where) for item in items)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (type(value) is hint):
        return expand_variables(value, where) if isinstance(value, str) else value
    name = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where}: expected {name}, got {value!r}")


def expand_variables(text: str, where: str) -> str:
    """Replace ``${NAME}`` and ``${NAME:-default}`` from the environment.

    Raises:
        ValueError: the variable is not set and there is no default.
    """

    def replace(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(2)
        value = os.environ.get(name, default)
        if value is None:
            raise ValueError(f"{where}: the environment variable {name} is not set; export it")
        return value

    return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", replace, text)


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as nested plain values, without the fields that are None."""
    pairs = ((f.name, getattr(config, f.name)) for f in dataclasses.fields(config))
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for name, value in pairs
        if value is not None
    }


def to_toml(config: Any) -> str:
    """The configuration as a recipe that ``load_recipe`` reads back to an equal object."""
    lines: list[str] = []

    def table(values: dict[str, Any], prefix: str) -> None:
        plain = {k: v for k, v in values.items() if not isinstance(v, dict)}
        if prefix and plain:
            lines.append(f"\n[{prefix}]")
        lines.extend(f"{key} = {_literal(value)}" for key, value in plain.items())
        for key, value in values.items():
            if isinstance(value, dict):
                table(value, f"{prefix}.{key}".lstrip("."))

    table(to_dict(config), "")
    return "\n".join(lines).strip() + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m.group()):04x}", escaped) + '"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in value) + "]"
    return repr(value)
