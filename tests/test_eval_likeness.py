# SPDX-License-Identifier: Apache-2.0
"""Likeness of a student to teachers over whole retrieval sets."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from kdengine import models, reference
from kdengine.cli import main
from kdengine.data.tokenize import load_tokenizer
from kdengine.evaluate import command, embed, evaluate_command, likeness, parse_eval_sets

NUM = 11


class FakeIndex:
    """Eleven images with two captions each."""

    num_samples = NUM

    def texts(self, numbers):
        return [[f"picture {number}", "another caption"] for number in numbers]


def picture(number: int, size: int) -> torch.Tensor:
    """What a model sees of an image: the same scene at its size."""
    small = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(number))
    return F.interpolate(small, size=(size, size), mode="bilinear")[0]


class FakeLoader:
    """Gives the images out of order, with padding at the end."""

    def __init__(self, index, *, views, batch_size, **_):
        self.batch_size, self.size = batch_size, views["image"].size

    def __iter__(self):
        places = torch.arange(NUM + 1)
        for part in places.split(self.batch_size):
            sample, valid = (NUM - 1 - part) % NUM, part < NUM
            image = torch.stack([picture(int(n), self.size) for n in sample])
            yield {"image": image, "sample": sample, "valid": valid}

    def close(self):
        pass


def embeddings(model: models.Student) -> tuple[torch.Tensor, torch.Tensor]:
    size, tokenizer = model.spec.preprocess.size, load_tokenizer(model.spec.tokenizer)
    tokens = torch.as_tensor(tokenizer([f"picture {n}" for n in range(NUM)])).long()
    with torch.no_grad():
        image = model.tower.encode_image(torch.stack([picture(n, size) for n in range(NUM)]))
        text = model.tower.encode_text(tokens)
    return F.normalize(image.double(), dim=1), F.normalize(text.double(), dim=1)


def student(name: str, seed: int) -> models.Student:
    tower, spec = models.build_student(name, seed=seed)
    return models.Student(tower.eval(), spec)


def test_all_images_and_first_captions_are_compared_with_each_teacher(monkeypatch) -> None:
    monkeypatch.setattr(likeness, "ensure_index", lambda *_, **__: FakeIndex())
    monkeypatch.setattr(embed, "build_loader", FakeLoader)
    own, equal, wider = (
        student(*s) for s in (("ViT-Pico-32", 0), ("ViT-Pico-32", 1), ("ViT-Nano-64", 2))
    )
    sets = parse_eval_sets(["a=x.tar"], [])
    found = likeness.likeness_of_sets(own, [equal, wider], sets, batch_size=4)
    mine = embeddings(own)
    expected = {}
    for ending, teacher in (("", equal), ("_1", wider)):
        for modality, x, u in zip(("image", "text"), mine, embeddings(teacher), strict=True):
            expected[f"a/cka/{modality}{ending}"] = reference.linear_cka(x, u).item()
            if x.shape == u.shape:
                expected[f"a/cosine/{modality}{ending}"] = reference.mean_cosine(x, u).item()
    assert len(expected) == 6
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_what_is_not_defined_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(likeness, "ensure_index", lambda *_, **__: FakeIndex())
    monkeypatch.setattr(embed, "build_loader", FakeLoader)
    own, teacher = student("ViT-Pico-32", 0), student("ViT-Pico-32", 1)
    flat = torch.ones(1, own.spec.embed_dim)
    monkeypatch.setattr(own.tower, "encode_image", lambda image: flat.expand(len(image), -1))
    found = likeness.likeness_of_sets(own, [teacher], parse_eval_sets(["a=x.tar"], []))
    assert set(found) == {"a/cosine/image", "a/cosine/text", "a/cka/text"}


def words(table: object) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_the_command_shows_and_writes_the_likeness_on_real_photos(
    test_data: Path, tmp_path: Path
) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        tower, spec = models.build_student("ViT-Pico-32", seed=seed)
        models.export_student(tower.state_dict(), spec, tmp_path / name)
    folders = {"itself": f"{tmp_path}/student", "another": f"{tmp_path}/teacher"}
    table = evaluate_command(
        folders["itself"],
        parse_eval_sets([f"coco={test_data}/cocomini-by-000.tar"], []),
        teachers=folders,
        index_dir=str(tmp_path / "index"),
        out=tmp_path / "out.json",
    )
    found = json.loads((tmp_path / "out.json").read_text())
    for name in ("cosine/image", "cosine/text", "cka/image", "cka/text"):
        assert found[f"coco/{name}"] == pytest.approx(1, abs=1e-5)
        assert found[f"coco/{name}_1"] < 0.9
    assert "coco/image_to_text_R@1" in found
    rows = [line.replace("\u2502", " ").split() for line in words(table).splitlines()]
    assert ["coco", "itself", "images", "1.000", "1.000"] in rows
    told = [f"{found[f'coco/{name}/text_1']:.3f}" for name in ("cosine", "cka")]
    assert ["coco", "another", "texts", *told] in rows


def test_the_table_says_why_a_cosine_is_missing() -> None:
    values = {"a/cka/image": 0.5, "a/cka/text": 0.25}
    values |= {f"a/{name}_1": 0.125 for name in ("cosine/image", "cosine/text", "cka/image")}
    sets = parse_eval_sets(["a=x.tar"], [])
    told = words(likeness.likeness_table(values, sets, 64, {"big": 128, "like": 64}))
    rows = [" ".join(line.replace("\u2502", " ").split()) for line in told.splitlines()]
    assert "a big images - (64 and 128 wide) 0.500" in rows
    assert "a like images 0.125 0.125" in rows and "a like texts 0.125 -" in rows
    assert "no cosine of unequal widths" in " ".join(rows)
    alike = words(likeness.likeness_table(values, sets, 64, {"like": 64}))
    assert "unequal" not in alike


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the evaluation was asked for; nothing is evaluated."""
    seen: dict[str, object] = {}
    monkeypatch.setattr(
        "kdengine.evaluate.evaluate_command",
        lambda model, *_, **options: seen.update(options, model=model),
    )
    monkeypatch.setattr(
        "kdengine.checkpoint.export_run", lambda run, out: seen.update({str(out): str(run)})
    )
    return seen


def test_a_teacher_may_be_a_run_and_keeps_its_name(asked: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    line = ["eval", "ViT-B-32@x", "--retrieval", "a=b.tar", "--teacher", str(run), "ViT-L-14@y"]
    assert main(line) == 0
    assert asked["model"] == "ViT-B-32@x"
    teachers = asked["teachers"]
    assert list(teachers) == [str(run), "ViT-L-14@y"]
    assert asked[teachers[str(run)]] == str(run) and teachers["ViT-L-14@y"] == "ViT-L-14@y"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--zeroshot", "a=b;c;d"], "--teacher compares on retrieval sets; give --retrieval"),
        (["--retrieval", "a=b.tar", "--teacher", "/nowhere/t"], "/nowhere/t does not exist"),
    ],
    ids=["no pairs", "no teacher"],
)
def test_a_teacher_without_use_or_existence_is_refused(
    monkeypatch, capsys, line: list[str], message: str
) -> None:
    monkeypatch.setattr("kdengine.cli.results.read_sets", lambda *_: ["one"])
    assert main(["eval", "ViT-B-32@x", "--teacher", "ViT-L-14@y", *line]) == 2
    assert message in capsys.readouterr().err


def test_a_teacher_that_cannot_be_loaded_is_named_before_anything_is_evaluated(
    monkeypatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "Evaluator", lambda *_, **__: pytest.fail("evaluated"))
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    models.export_student(tower.state_dict(), spec, tmp_path / "student")
    with pytest.raises(ValueError, match="ViT-Pico-32: it has no weights"):
        evaluate_command(f"{tmp_path}/student", [], teachers={"t": "ViT-Pico-32"})
