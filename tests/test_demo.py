# SPDX-License-Identifier: Apache-2.0
"""The demo: its scenes, their captions, its shards, and the verdict."""

import hashlib
import io
import json
import random
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from kdengine.config import load_recipe
from kdengine.demo import Sizes, render_data, run
from kdengine.demo.drawing import IMAGE_SIZE, OUTLINES, PAINTS, render
from kdengine.demo.scenes import (
    COLOURS,
    COMBINATIONS,
    HELD_OUT,
    RELATIONS,
    SEEN,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    describe,
    sample_family,
    sample_scene,
)
from kdengine.demo.shards import train_samples, val_samples, zeroshot_samples

SMALL = Sizes(num_shards=2, shard_size=12, num_val=30, num_per_class=1)
PAIR = Scene(
    (Thing("red", "star", "small"), Thing("blue", "ring", "large")), "left of", "dotted", "sky"
)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    render_data(folder, 0, SMALL)
    return folder


def test_equal_seeds_give_equal_bytes(data: Path, tmp_path: Path) -> None:
    render_data(tmp_path / "again", 0, SMALL)
    assert digests(tmp_path / "again") == digests(data)


def test_other_seeds_give_other_pictures_in_every_shard(data: Path, tmp_path: Path) -> None:
    render_data(tmp_path / "other", 1, SMALL)
    other, own = digests(tmp_path / "other"), digests(data)
    tars = [name for name in own if name.endswith(".tar")]
    assert len(tars) == 4
    assert not any(other[name] == own[name] for name in tars)


def test_the_layout_is_that_of_img2dataset(data: Path) -> None:
    with tarfile.open(data / "scenes-train-001.tar") as tar:
        members = tar.getmembers()
        assert [m.name for m in members[:4]] == [
            "000010000.jpg",
            "000010000.txt",
            "000010000.json",
            "000010001.jpg",
        ]
        assert len(members) == 3 * SMALL.shard_size
        assert {stat.S_IMODE(m.mode) for m in members} == {0o644}
        assert {m.mtime for m in members} == {0}


def test_the_json_holds_the_captions_and_the_true_size(data: Path) -> None:
    files = read_tar(data / "scenes-train-000.tar")
    about = json.loads(files["000000003.json"])
    picture = Image.open(io.BytesIO(files["000000003.jpg"]))
    assert picture.format == "JPEG"
    assert picture.size == (about["width"], about["height"]) == (IMAGE_SIZE, IMAGE_SIZE)
    assert about["caption"] == about["captions"][0] == files["000000003.txt"].decode()
    assert len(set(about["captions"])) == 5


def test_keys_are_unique_over_all_files(data: Path) -> None:
    names = [name for path in data.glob("*.tar") for name in read_tar(path)]
    assert len(names) == len(set(names))


def test_the_index_takes_every_sample(data: Path) -> None:
    from kdengine.data import ensure_index

    training = ensure_index(
        f"{data}/scenes-train-{{000..001}}.tar", tokenizers=["simple:32"], num_workers=0
    )
    zeroshot = ensure_index(f"{data}/scenes-zeroshot.tar", require="label", num_workers=0)
    assert (training.num_samples, training.num_quarantined) == (24, 0)
    assert (zeroshot.num_samples, zeroshot.num_quarantined) == (len(HELD_OUT), 0)


def test_data_that_are_there_are_not_drawn_again(data: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in data.glob("scenes*")}
    assert render_data(data, 0, SMALL) is False
    assert {path: path.stat().st_mtime_ns for path in data.glob("scenes*")} == before


def test_data_of_another_seed_are_refused_not_overwritten(data: Path) -> None:
    with pytest.raises(FileExistsError, match="does not hold the scenes of seed 7"):
        render_data(data, 7, SMALL)
    assert (data / "scenes-val-000.tar").is_file()


def test_an_interrupted_drawing_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        render_data(tmp_path / "data", 0, SMALL)
    assert not (tmp_path / "data").exists()
    monkeypatch.undo()
    assert render_data(tmp_path / "data", 0, SMALL) is True


def test_held_out_combinations_spare_no_colour_and_no_shape() -> None:
    assert {colour for colour, _ in HELD_OUT} == {colour for colour, _ in SEEN} == set(COLOURS)
    assert {shape for _, shape in HELD_OUT} == {shape for _, shape in SEEN} == set(SHAPES)
    assert set(HELD_OUT) | set(SEEN) == set(COMBINATIONS)
    assert not set(HELD_OUT) & set(SEEN)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_training_never_sees_a_held_out_combination(seed: int) -> None:
    samples = [s for shard in range(8) for s in train_samples(seed, Sizes(), shard)]
    seen = {thing.combination for sample in samples for thing in sample.scene.things}
    assert seen == set(SEEN)


def test_zero_shot_pictures_are_all_held_out_and_labelled_by_name(data: Path) -> None:
    names = (data / "scenes-classnames.txt").read_text().splitlines()
    samples = zeroshot_samples(0, SMALL, 2000)
    assert [s.label for s in samples] == [int(v) for k, v in _labels(data)]
    for sample in samples:
        (thing,) = sample.scene.things
        assert thing.combination in HELD_OUT
        assert sample.label is not None
        assert names[sample.label] == f"{thing.colour} {thing.shape}"


def _labels(data: Path) -> list[tuple[str, bytes]]:
    return [(k, v) for k, v in read_tar(data / "scenes-zeroshot.tar").items() if k[-4:] == ".cls"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_captions_of_the_retrieval_set_are_distinct(seed: int) -> None:
    samples = val_samples(seed, Sizes(), 1000)
    captions = [caption for sample in samples for caption in sample.captions]
    assert len(samples) == 500
    assert len(captions) == len(set(captions)) == 2500


def test_a_family_differs_in_few_details() -> None:
    family = sample_family(random.Random(0), 20)
    first = family[0]
    assert len({scene.described for scene in family}) == 20
    for scene in family:
        assert scene.position == first.position
        assert [t.colour for t in scene.things] == [t.colour for t in first.things]


def test_the_first_caption_names_everything() -> None:
    caption = describe(PAIR, random.Random(0), 1, full=True)[0]
    assert caption == "a small red star left of a large blue ring on a dotted background"


def mentioned(caption: str) -> tuple[list[set[str]], str | None, str | None]:
    """What a caption says: the words of each thing, the relation, the pattern."""
    words = {word: size for size, synonyms in SIZES.items() for word in synonyms}
    content, _, pattern = caption, None, None
    for opening in ("there is ", "a picture of "):
        content = content.removeprefix(opening)
    for ground in (" on a ", " in front of a ", ", with a "):
        if content.endswith(" background") and ground in content:
            content, _, rest = content.rpartition(ground)
            pattern = rest.removesuffix(" background")
    if content.startswith("on a "):
        rest, _, content = content.removeprefix("on a ").partition(" background, ")
        pattern = rest
    relation = None
    for name in ("left of", "right of", "above", "below", "and"):
        for way in (f" to the {name} ", f" {name} "):
            if relation is None and way in content:
                relation, parts = name, content.split(way)
    names = parts if relation else [content]
    return [{words.get(w, w) for w in name.split()[1:]} for name in names], relation, pattern


@pytest.mark.parametrize("full", [True, False], ids=["full", "partial"])
def test_captions_of_pairs_are_true(full: bool) -> None:
    rng = random.Random(0)
    opposite = RELATIONS | {second: first for first, second in RELATIONS.items()}
    for _ in range(200):
        scene = sample_scene(rng, COMBINATIONS, 2)
        for caption in describe(scene, rng, 5, full=full):
            things, relation, pattern = mentioned(caption)
            truth = [{t.size, t.colour, t.shape, "shape"} for t in scene.things]
            straight = all(said <= true for said, true in zip(things, truth, strict=True))
            turned = all(said <= true for said, true in zip(things, truth[::-1], strict=True))
            assert (straight and relation in (scene.position, "and")) or (
                turned and relation in (opposite[scene.position], "and")
            ), (caption, scene)
            assert pattern in (scene.pattern, None), (caption, scene)
            if full:
                assert all(len(said) == 3 for said in things), caption
                assert pattern is not None and relation != "and", caption


def test_captions_of_single_things_are_true() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng, COMBINATIONS, 1)
        (thing,) = scene.things
        allowed = {*SIZES[thing.size], thing.colour, thing.shape, "shape"}
        others = {*COLOURS, *SHAPES, *(w for ws in SIZES.values() for w in ws)} - allowed
        places = {"middle", "left", "right", "top", "bottom"} - set(scene.position.split())
        for caption in describe(scene, rng, 5, full=False):
            words = set(caption.replace(",", "").split())
            assert not words & (others | places), (caption, scene)


def test_captions_agree_with_their_article() -> None:
    rng = random.Random(0)
    scenes = [sample_scene(rng, COMBINATIONS, 2) for _ in range(300)]
    words = [c.split() for s in scenes for c in describe(s, rng, 5, full=False)]
    after = [(a, b) for caption in words for a, b in zip(caption, caption[1:], strict=False)]
    assert {a for a, b in after if a in ("a", "an") and b[0] in "aeiou"} == {"an"}
    assert {a for a, b in after if a in ("a", "an") and b[0] not in "aeiou"} == {"a"}


@pytest.mark.parametrize("colour", COLOURS)
def test_a_thing_is_painted_in_its_colour_and_place(colour: str) -> None:
    scene = Scene((Thing(colour, "circle", "large"),), "on the left", "plain", "grey")
    picture = Image.open(io.BytesIO(render(scene, random.Random(0)))).convert("RGB")

    def distance(x: float) -> int:
        pixel: Any = picture.getpixel((int(x * IMAGE_SIZE), IMAGE_SIZE // 2))
        return max(abs(a - b) for a, b in zip(pixel, PAINTS[colour], strict=True))

    assert distance(0.27) < 45 < distance(0.9)


def test_shapes_fill_their_circle_and_keep_within_it() -> None:
    assert set(OUTLINES) == set(SHAPES)
    for shape, corners in OUTLINES.items():
        reach = max(x * x + y * y for x, y in corners) ** 0.5
        assert 0.9 < reach <= 1.25, shape


def test_nothing_is_cut_off_at_the_border() -> None:
    rng = random.Random(0)
    for _ in range(60):
        scene = sample_scene(rng, COMBINATIONS, 2)
        scene = Scene(scene.things, scene.position, "plain", "grey")
        picture = Image.open(io.BytesIO(render(scene, rng))).convert("RGB")
        edge = [picture.getpixel((x, y)) for x in (0, IMAGE_SIZE - 1) for y in range(IMAGE_SIZE)]
        edge += [picture.getpixel((x, y)) for y in (0, IMAGE_SIZE - 1) for x in range(IMAGE_SIZE)]
        low, high = [min(p) for p in edge], [max(p) for p in edge]  # type: ignore[type-var,arg-type]
        assert max(high) - min(low) < 60, scene  # type: ignore[operator]


def test_the_recipes_differ_in_the_method_and_the_teacher_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", "/demo")
    alone, distilled = load_recipe("demo_student"), load_recipe("demo_student_distilled")
    assert alone.data == distilled.data
    assert (alone.model, alone.optim, alone.train) == (
        distilled.model,
        distilled.optim,
        distilled.train,
    )
    assert alone.eval == distilled.eval
    assert distilled.distill.distill_model == ("local-dir:/demo/teacher/export",)
    assert (alone.method.name, distilled.method.name) == ("clip", "clip_kd")


@pytest.mark.parametrize("recipe", run.RUNS.values())
def test_the_recipes_read_the_files_that_are_drawn(
    recipe: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDENGINE_DEMO", str(data.parent))
    config = load_recipe(recipe)
    assert config.data.train_data == f"{data}/scenes-train-{{000..{Sizes().num_shards - 1:03}}}.tar"
    for one in (*config.eval.retrieval, *config.eval.zeroshot):
        assert Path(one.partition("=")[2]).is_file()
    assert run.RUNS[config.run.name] == recipe
    assert config.run.logs == str(data.parent)


BETTER = {"scenes/image_to_text_R@1": 0.6, "held-out/zeroshot-top1": 0.5}


@pytest.mark.parametrize(
    ("alone", "ahead", "told"),
    [
        ({"scenes/image_to_text_R@1": 0.5, "held-out/zeroshot-top1": 0.4}, True, "all 2 metrics"),
        ({"scenes/image_to_text_R@1": 0.5, "held-out/zeroshot-top1": 0.5}, False, "top1 (+0.0)"),
        ({"scenes/image_to_text_R@1": 0.7, "held-out/zeroshot-top1": 0.4}, False, "R@1 (-10.0)"),
    ],
    ids=["ahead", "tie", "behind"],
)
def test_the_verdict_wants_every_metric(alone: dict, ahead: bool, told: str) -> None:
    verdict, line = run.judge(alone, BETTER)
    assert verdict is ahead
    assert told in line


def fake_training(calls: list[list[str]], out: Path, gain: float) -> Any:
    """Stands in for the processes: writes the evaluation that a training would leave."""

    def call(command: list[str], *_: Any) -> None:
        calls.append(command)
        if "--recipe" in command:
            recipe = command[command.index("--recipe") + 1]
            folder = out / next(name for name, r in run.RUNS.items() if r == recipe)
            folder.mkdir(parents=True)
            value = 0.5 + (gain if recipe == "demo_student_distilled" else 0)
            (folder / "config.toml").touch()
            (folder / "eval.jsonl").write_text(
                json.dumps({"step": 1, "scenes/R@1": 0.1})
                + "\n"
                + json.dumps(
                    {
                        "step": 2,
                        "scenes/R@1": value,
                        "scenes/x_mean_rank": 9.0,
                        "held-out/zeroshot-classes": 4.0,
                    }
                )
            )

    return call


@pytest.mark.parametrize(("gain", "code"), [(0.1, 0), (-0.1, 1)], ids=["ahead", "behind"])
def test_main_trains_three_models_with_deepspeed_and_judges(
    gain: float,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(run, "_call", fake_training(calls, tmp_path, gain))
    monkeypatch.setattr(run, "_deepspeed", lambda: "deepspeed")
    assert run.main(tmp_path, 3, sizes=SMALL, overrides=["--train.steps", "2"]) == code
    recipes = [c[c.index("--recipe") + 1] for c in calls if "--recipe" in c]
    assert recipes == ["demo_teacher", "demo_student", "demo_student_distilled"]
    assert all(c[0] == "deepspeed" and c[-4:] == calls[0][-4:] for c in calls[:3])
    assert calls[0][-4:] == ["--train.seed", "3", "--train.steps", "2"]
    assert calls[3][1:4] == ["-m", "kdengine.cli", "report"]
    printed = capsys.readouterr().out
    assert "10.0" in printed and "mean_rank" not in printed


def test_main_starts_anew_but_spares_what_is_not_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_call", fake_training([], tmp_path, 0.1))
    monkeypatch.setattr(run, "_deepspeed", lambda: "deepspeed")
    assert run.main(tmp_path, sizes=SMALL) == run.main(tmp_path, sizes=SMALL) == 0
    (tmp_path / "teacher" / "config.toml").unlink()
    with pytest.raises(FileExistsError, match="teacher is not a run"):
        run.main(tmp_path, sizes=SMALL)
    assert (tmp_path / "teacher" / "eval.jsonl").is_file()


def test_a_failed_training_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_deepspeed", lambda: "false")
    with pytest.raises(RuntimeError, match=r"ended with code 1; .*teacher/out.log tells more"):
        run.main(tmp_path, sizes=SMALL)
