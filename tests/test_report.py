# SPDX-License-Identifier: Apache-2.0
"""The report: what stands on the page, what is marked, what is noted, what is refused."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdengine import data, models
from kdengine.config import RunConfig, from_dict, to_toml
from kdengine.report import curves, marks, metrics, runs, samples, verdict, write_report

METRICS = {
    "pets/zeroshot-top1": 0.4,
    "pets/zeroshot-top5": 0.8,
    "val/image_to_text_R@1": 0.2,
    "val/image_to_text_R@5": 0.5,
    "val/image_to_text_mean_rank": 30.0,
    "val/text_to_image_R@1": 0.1,
    "val/1caption/text_to_image_R@10": 0.6,
}
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Reads a page: its words, its cells by row, the classes of cells, and where it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.links, self.open, self.rows = "", [], [], []
        self.unbalanced: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        named = dict(attrs)
        self.links += [
            v for k, v in attrs if k in ("src", "href", "xlink:href", "action", "srcset")
        ]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(["", named.get("class") or ""])

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        self.words += data + " "
        if ("td" in self.open or "th" in self.open) and self.rows:
            self.rows[-1][-1][0] += data + " "

    def row(self, start: str) -> list[tuple[str, str]]:
        """Text and class of the cells of the first row that starts so."""
        found = next(row for row in self.rows if row and row[0][0].strip().startswith(start))
        return [(" ".join(text.split()), class_) for text, class_ in found]


def step_record(step: int, **changes: object) -> dict:
    values = {
        "step": step, "epoch": step / 10, "samples_seen": step * 16, "loss": 3 / step,
        "loss/task": 2 / step, "scale": 14.3, "lr": 1e-3, "grad_norm": 1.0,
        "samples_per_second": 100.0 + step, "data_wait_pct": 1.5, "step_time_ms": 90.0,
        "num_skipped": 0, "time_s": 3723.0, "peak_memory_mib": 1234.0,
    }  # fmt: skip
    return values | changes


def write_lines(path: Path, records: list[dict]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(folder: Path, better: float = 0.0, num_evaluations: int = 2, **sections) -> Path:
    """A folder as training leaves it; shares are ``better`` above METRICS, ranks below."""
    folder.mkdir(parents=True)
    values = {"train": {"batch_size": 8, "steps": 40}, "method": {"name": "clip"}} | sections
    config = from_dict(RunConfig, values, "test")
    (folder / "config.toml").write_text(to_toml(config))
    write_lines(folder / "metrics.jsonl", [step_record(step) for step in range(4, 41, 4)])
    results = {
        key: value - 100 * better if key.endswith("rank") else value + better
        for key, value in METRICS.items()
    }
    steps = [40 * (n + 1) // num_evaluations for n in range(num_evaluations)]
    write_lines(folder / "eval.jsonl", [{"step": step} | results for step in steps])
    return folder


def report(*folders: Path, **options) -> tuple[str, Page]:
    """The page of some runs, as text and read."""
    out = folders[0].parent / "out" / "report.html"
    assert write_report(list(folders), out, **options) == out
    text = out.read_text()
    return text, Page(text)


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal students, the second distilled and five points better."""
    plain = make_run(tmp_path / "plain")
    teacher = {"distill_model": f"local-dir:{tmp_path}/teacher/export"}
    return plain, make_run(tmp_path / "kd", 0.05, distill=teacher, method={"name": "clip_kd"})


def test_every_metric_stands_in_the_table_with_its_difference(pair):
    _, page = report(*pair)
    assert [text for text, _ in page.row("Zero-shot top-1")] == [
        "Zero-shot top-1 %", "40.0", "45.0 +5.0"
    ]  # fmt: skip
    assert page.row("Zero-shot top-5")[2][0] == "85.0 +5.0"
    assert page.row("Image \u2192 text R@5")[1][0] == "50.0"
    assert page.row("Text \u2192 image R@10")[2][0] == "65.0 +5.0"
    for group in ("pets: zero-shot", "val: retrieval, all", "val: retrieval, 1 caption"):
        assert page.row(group)


@pytest.mark.parametrize("name", ["Image \u2192 text R@1", "Image \u2192 text mean rank"])
def test_the_best_run_is_marked_and_lower_ranks_are_better(pair, name):
    _, page = report(*pair)
    assert [class_ for _, class_ in page.row(name)] == ["", "", "best"]


def test_equal_runs_have_no_best(tmp_path):
    _, page = report(make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert page.row("Zero-shot top-1")[1:] == [("40.0", ""), ("40.0 \u00b10.0", "")]
    assert "score alike" in page.words


def test_the_verdict_says_what_distillation_gained(pair):
    _, page = report(*pair)
    words = " ".join(page.words.split())
    assert "kd is best on every metric; distillation ( kd against plain , same student" in words
    assert "gains 5.0 points on zero-shot top-1 (pets), 5.0 on image \u2192 text R@1 (val)" in words
    assert page.row("Image \u2192 text mean rank (val)")[1][0] == "\u22125.0 30.0 \u2192 25.0"


def test_a_loss_by_distillation_is_not_called_a_gain(tmp_path):
    plain = make_run(tmp_path / "plain")
    teacher = {"distill_model": "local-dir:x"}
    worse = make_run(tmp_path / "kd", -0.02, distill=teacher, method={"name": "clip_kd"})
    words = " ".join(report(plain, worse)[1].words.split())
    assert "plain is best on every metric" in words
    assert "changes zero-shot top-1 (pets) by \u22122.0 points" in words


@pytest.mark.parametrize(
    "other",
    [{"train": {"batch_size": 8, "steps": 80}}, {"model": {"model": "ViT-Pico-32"}}],
    ids=["budget", "student"],
)
def test_unequal_runs_are_not_called_a_gain_of_distillation(tmp_path, pair, other):
    found = runs.read_runs([make_run(tmp_path / "other", **other), pair[1]])
    assert verdict.find_pairs(found, metrics.collect(found)) == []


def test_a_run_that_ended_early_had_another_budget(pair):
    write_lines(pair[0] / "metrics.jsonl", [step_record(20)])
    found = runs.read_runs(list(pair))
    assert verdict.find_pairs(found, metrics.collect(found)) == []


def test_a_teacher_is_shown_but_not_best(tmp_path, pair):
    teacher = make_run(tmp_path / "teacher", 0.25, model={"model": "RN50"})
    _, page = report(teacher, *pair)
    name = "Zero-shot top-1"
    assert [class_ for _, class_ in page.row(name)] == ["", "", "", "best"]
    assert [text for text, _ in page.row(name)][1:] == ["65.0 +25.0", "40.0", "45.0 +5.0"]
    assert page.row("Zero-shot top-1 (pets)")[1][0] == "+5.0 40.0 \u2192 45.0, gap 20 %"


@pytest.mark.parametrize("other", [0.4004, 0.4006], ids=["equal", "over a rounding edge"])
def test_a_difference_that_prints_as_none_is_neutral(tmp_path, other):
    plain = make_run(tmp_path / "plain")
    write_lines(plain / "eval.jsonl", [{"step": 40, "pets/zeroshot-top1": 0.4004}])
    kd = {"distill": {"distill_model": "local-dir:x"}, "method": {"name": "clip_kd"}}
    distilled = make_run(tmp_path / "kd", **kd)
    write_lines(distilled / "eval.jsonl", [{"step": 40, "pets/zeroshot-top1": other}])
    text, page = report(plain, distilled)
    assert "leaves zero-shot top-1 (pets) unchanged" in " ".join(page.words.split())
    assert [class_ for _, class_ in page.row("Zero-shot top-1")] == ["", "", ""]
    assert text.count('class="same">\u00b10.0<') == 2


def test_what_stays_is_told_apart_from_what_is_gained(tmp_path, pair):
    record = {"step": 40} | METRICS | {"pets/zeroshot-top1": 0.45}
    write_lines(pair[1] / "eval.jsonl", [record])
    words = " ".join(report(*pair)[1].words.split())
    assert "gains 5.0 points on zero-shot top-1 (pets) and leaves image" in words
    assert "unchanged" in words


def test_what_several_runs_lack_is_noted_once(pair):
    for folder in pair:
        (folder / "eval.jsonl").unlink()
    _, page = report(*pair)
    assert page.words.count("no eval.jsonl") == 1
    assert "plain, kd : no eval.jsonl" in " ".join(page.words.split())


def test_differences_of_ranks_are_no_points(pair):
    assert "in points (ranks: in ranks)" in report(*pair)[1].words


def test_the_number_of_classes_is_no_metric_to_win():
    results = {"r/zeroshot-classes": 200, "r/zeroshot-top1": 0.5}
    found = [type("Run", (), {"results": results})]
    assert [metric.key for metric in metrics.collect(found)] == ["r/zeroshot-top1"]


def test_dots_of_equal_results_lie_apart(tmp_path):
    found = runs.read_runs([make_run(tmp_path / name) for name in "abc"])
    shares = [m for m in metrics.collect(found) if m.kind == "share"]
    drawn = curves.draw_results(found, shares, set())
    for i in range(3):
        style = f"fill: {marks.colour(i).lower()}"
        assert drawn.count(style) >= len(shares)
    places = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)" style="fill', drawn)
    assert len(places) == len(set(places)) == 3 * len(shares)


def test_28_runs_are_told_apart_in_spots_keys_dots_and_lines():
    numbers = range(28)
    assert len({marks.swatch(i) for i in numbers}) == len({marks.stroke(i) for i in numbers}) == 28
    assert len({(marks.colour(i), marks.dot(i)) for i in numbers}) == 28
    assert len({(marks.colour(i), str(marks.dashes(i))) for i in numbers}) == 28
    # few runs need no style to read
    assert {marks.dot(i) for i in range(7)} == {"o"}
    assert {marks.dashes(i) for i in range(7)} == {"solid"}


def test_the_eighth_run_has_its_style_wherever_it_is_drawn(tmp_path):
    folders = [make_run(tmp_path / f"run{i}") for i in range(8)]
    text, _ = report(*folders)
    assert f'<i class="swatch square" style="background:{marks.colour(0)}">' in text
    assert f'stroke="{marks.colour(0)}" stroke-width="2" stroke-dasharray="10 4"' in text
    lines = {i: ([0.0, 1.0], [0.5, i]) for i in (0, 7)}
    drawn = curves.draw_curve(curves.Curve("t", "u", lines), [f"r{i}" for i in range(8)], "c0")
    strokes = re.findall(rf'style="fill: none; (stroke[^"]*{marks.colour(0).lower()}[^"]*)"', drawn)
    assert len(strokes) == 2 and len(set(strokes)) == 2, strokes


def test_of_several_teachers_the_best_counts(tmp_path, pair):
    taught = [make_run(tmp_path / f"teacher{i}", 0.1 * i) for i in (1, 2)]
    names = [f"local-dir:{folder}/export" for folder in (*taught, tmp_path / "elsewhere")]
    kd = {"distill": {"distill_model": names}, "method": {"name": "clip_kd"}}
    student = make_run(tmp_path / "student", 0.05, **kd)
    found = runs.read_runs([pair[0], student, *taught])
    assert runs.teachers(found) == found[2:]
    (pair,) = verdict.find_pairs(found, metrics.collect(found))
    assert list(pair.teachers) == found[2:]
    (top1,) = [m for m in metrics.collect(found) if m.key == "pets/zeroshot-top1"]
    assert pair.closed(top1) == pytest.approx(0.05 / 0.2)


def test_the_teacher_of_an_old_run_is_a_text(tmp_path):
    teacher = make_run(tmp_path / "teacher")
    kd = {"distill": {"distill_model": "ViT-B-32"}, "method": {"name": "clip_kd"}}
    student = make_run(tmp_path / "student", **kd)
    config = student / "config.toml"
    text, changed = config.read_text(), f'"local-dir:{teacher}/export"'
    config.write_text(text.replace('["ViT-B-32"]', changed))
    assert changed in config.read_text()
    assert runs.teachers_of(*(lambda r: (r[1], r))(runs.read_runs([teacher, student])))


def test_several_pairs_have_a_mean(tmp_path):
    folders = []
    for seed, gain in enumerate((0.02, 0.04)):
        train = {"batch_size": 8, "steps": 40, "seed": seed}
        folders.append(make_run(tmp_path / f"plain{seed}", train=train))
        kd = {"distill": {"distill_model": "ViT-B-32"}, "method": {"name": "clip_kd"}}
        folders.append(make_run(tmp_path / f"kd{seed}", gain, train=train, **kd))
    _, page = report(*folders)
    assert [text for text, _ in page.row("Zero-shot top-1 (pets)")][1:] == [
        "+2.0 40.0 \u2192 42.0", "+4.0 40.0 \u2192 44.0", "+3.0"
    ]  # fmt: skip
    assert "mean of 2 pairs" in page.words


def test_cost_names_time_memory_and_ranks(pair):
    _, page = report(*pair)
    expected = {
        "Steps": "40", "Samples seen": "640", "Wall time": "01:02:03", "Peak memory": "1,234",
        "Ranks": "2", "Throughput": "122", "Waiting for data": "1.5", "Precision": "fp32",
        "Parameters": "\u2013",
    }  # fmt: skip
    assert {name: page.row(name)[1][0] for name in expected} == expected


def test_curves_are_drawn_for_what_was_logged(pair):
    text, page = report(*pair)
    drawn = re.findall(r'aria-label="([^"]*)"', text)
    for name in ("Training loss", "InfoNCE", "Learning rate", "Scale", "Throughput", "Zero-shot"):
        assert any(label.startswith(name) for label in drawn), name
    assert "samples / s, all ranks" in page.words and "step" in page.words


def test_likeness_to_the_teacher_has_rows_and_curves_where_a_run_logged_it(pair):
    values = {"cka/text": 0.25, "cosine/image_1": 0.35, "cka/image": 0.45, "cosine/image": 0.55}
    records = [step_record(4, **values), step_record(40, **values | {"cka/image": 0.5})]
    # neither is a likeness: not a modality, and never finite
    records[1] |= {"cosine/text_x": 0.6, "cosine/text": None}
    write_lines(pair[1] / "metrics.jsonl", records)
    text, page = report(*pair)
    rows = [row for row in page.rows if " with teacher" in row[0][0]]
    assert [[cell.strip() for cell, _ in row] for row in rows] == [
        ["Cosine with teacher, images", "0.550"],
        ["CKA with teacher, images", "0.500"],
        ["CKA with teacher, texts", "0.250"],
        ["Cosine with teacher 2, images", "0.350"],
    ]
    drawn = re.findall(r'aria-label="([^"]*with teacher[^"]*)"', text)
    assert drawn == [row[0][0].strip() for row in rows]
    assert "debiased linear CKA" in page.words and "Likeness to the teacher" in page.words


def test_without_likeness_or_evaluation_nothing_is_said_of_it(tmp_path):
    folder = make_run(tmp_path / "a")
    assert "Likeness" not in report(folder)[1].words
    write_lines(folder / "metrics.jsonl", [step_record(3, **{"cka/image": 0.5})])
    (folder / "eval.jsonl").unlink()
    _, page = report(folder)
    assert page.row("CKA with teacher, images")[1][0] == "0.500"
    assert "step 3" in page.words


def test_a_single_evaluation_is_no_curve(tmp_path):
    text, _ = report(make_run(tmp_path / "a", num_evaluations=1))
    assert 'aria-label="Training loss"' in text and 'aria-label="Zero-shot' not in text


def test_ids_of_the_page_are_unique(pair):
    text, _ = report(*pair)
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert len(ids) > 50 and len(set(ids)) == len(ids)


def test_the_page_needs_nothing_but_itself(pair):
    text, page = report(*pair)
    assert {link[0] for link in page.links if not link.startswith("data:")} == {"#"}
    assert "http" not in text and "<script" not in text and "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert page.unbalanced == [] and page.open == []


def test_all_that_comes_from_a_run_is_escaped(tmp_path):
    evil = '<script>alert("&")</script>'
    folder = make_run(tmp_path / r"<b>&run$\x$", data={"train_data": evil})
    records = [step_record(step, **{f"loss/{evil}": 1.0}) for step in (1, 2)]
    write_lines(folder / "metrics.jsonl", records)
    write_lines(folder / "eval.jsonl", [{"step": 2, f"{evil}/zeroshot-top1": 0.5}])
    other = make_run(tmp_path / "other")
    text, page = report(folder, other, title=evil)
    assert "<script" not in text and "<b>&run" not in text
    assert page.words.count(evil) >= 3 and "<b>&run" in page.words
    assert page.unbalanced == [] and page.open == []


@pytest.mark.parametrize("name", ["config.toml", "metrics.jsonl", "eval.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage"])
def test_a_missing_or_damaged_file_is_noted(pair, name, damage):
    path = pair[1] / name
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"" if damage == "empty" else b"\xff\xfe[\x00 = {{{")
    _, page = report(*pair)
    if (name, damage) != ("config.toml", "empty"):
        assert re.search(rf"kd :? *:? *(no )?{re.escape(name)}", page.words)
    assert "40.0" in page.words


def test_values_that_are_not_finite_are_left_out_and_counted(tmp_path):
    folder = make_run(tmp_path / "a")
    write_lines(folder / "metrics.jsonl", [step_record(1), step_record(2, loss=None)])
    write_lines(folder / "eval.jsonl", [{"step": 2, "val/image_to_text_R@1": None}])
    _, page = report(folder)
    assert "1 of 2 logged losses are not finite" in page.words
    assert "None of these runs has been evaluated" in page.words


def test_a_single_run_has_no_winner(tmp_path):
    _, page = report(make_run(tmp_path / "a"))
    assert " reaches " in page.words and "40.0 %" in page.words
    assert not any("best" in class_ for row in page.rows for _, class_ in row)
    assert "What differs" not in page.words


def test_runs_with_different_sets_leave_gaps(tmp_path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", 0.1)
    write_lines(b / "eval.jsonl", [{"step": 1, "pets/zeroshot-top1": 0.5, "x/zeroshot-top1": 0.3}])
    _, page = report(a, b)
    assert page.row("Image \u2192 text R@1")[1:] == [("20.0", ""), ("\u2013", "none")]
    assert [text for text, _ in page.row("Zero-shot top-1")][1:] == ["40.0", "50.0 +10.0"]
    assert "were not measured for every run" in page.words


def test_differences_of_configurations_come_first(pair):
    text, page = report(*pair)
    cells = [cell for cell, _ in page.row("method.name")]
    assert cells == ["method.name", "clip", "clip_kd"]
    assert "run.name" not in [row[0][0].strip() for row in page.rows if row]
    assert text.index("What differs") < text.index("<details>") and text.count("<details>") == 2


def test_an_unknown_metric_is_shown_as_it_is(tmp_path):
    folder = make_run(tmp_path / "a")
    write_lines(folder / "eval.jsonl", [{"step": 1, "val/speed": 1234.56}])
    assert report(folder)[1].row("speed")[1] == ("1234.6", "")


def test_runs_of_one_name_are_told_apart(tmp_path):
    _, page = report(make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run"))
    assert "x/run" in page.words and "y/run" in page.words


def test_an_empty_folder_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"config\.toml, metrics\.jsonl, eval\.jsonl.*is empty"):
        write_report([tmp_path / "empty"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_folder_above_a_run_is_refused_with_the_run(tmp_path):
    make_run(tmp_path / "runs" / "first")
    with pytest.raises(ValueError, match="holds only first; did you mean .*runs/first"):
        write_report([tmp_path / "runs"], tmp_path / "r.html")


def test_a_folder_in_place_of_the_page_is_refused(pair, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(IsADirectoryError, match="^report: .*out is a folder"):
        write_report(list(pair), tmp_path / "out")
    assert not list(tmp_path.glob(".*"))


def test_runs_that_are_absent_none_or_twice_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="^report: .*nowhere is no folder"):
        write_report([tmp_path / "nowhere"], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one run"):
        write_report([], tmp_path / "r.html")
    folder = make_run(tmp_path / "a")
    with pytest.raises(ValueError, match="given twice"):
        write_report([folder, folder], tmp_path / "r.html")


def test_many_points_are_thinned_and_keep_their_mean():
    steps = [float(n) for n in range(10_000)]
    curve = curves.Curve("t", "u", {0: (steps, [0.5] * 10_000)})
    drawn = curves.draw_curve(curve, ["run"], "c0")
    assert len(drawn) < 60_000
    assert (
        curves._smooth(curves._thin(curves.np.array(steps), curves.np.ones(10_000))[1]) == 1
    ).all()


@pytest.mark.parametrize("ends", [[0.5] * 6, [1.0] * 6, [0.0] * 6, [0.0, 0.02, 0.9, 1.0, 1.0, 1.0]])
def test_labels_of_lines_do_not_overlap(ends):
    lines = {i: ([0.0, 1.0], [0.5, end]) for i, end in enumerate(ends)}
    drawn = curves.draw_curve(curves.Curve("t", "u", lines), [f"run-{i}" for i in lines], "c0")
    places = re.findall(r'translate\(([\d.]+) ([\d.]+)\)">run-|y="([\d.]+)"[^>]*>run-', drawn)
    heights = sorted(float(b or c) for _, b, c in places)
    assert len(heights) == 6
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 9


def test_without_export_or_shards_the_samples_leave_a_note(tmp_path):
    sets = {"retrieval": ("val=/nowhere/val.tar",)}
    folder = make_run(tmp_path / "a", eval=sets)
    assert "no exported student" in report(folder)[1].words
    (folder / "export").mkdir()
    assert "exported student cannot be loaded" in report(folder)[1].words
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    (folder / "export").rmdir()
    models.export_student(tower.state_dict(), spec, folder / "export")
    words = report(folder)[1].words
    assert "images of val cannot be used" in words and "/nowhere/val.tar" in words


@pytest.mark.parametrize("options", [{}, {"index_dir": "/elsewhere", "max_pixels": 1_000_000}])
def test_the_samples_are_read_through_the_index_of_the_run(tmp_path, monkeypatch, options):
    folder = make_run(tmp_path / "a", data=options, eval={"retrieval": ("val=/nowhere/val.tar",)})
    asked = {}
    monkeypatch.setattr(samples, "_load", lambda *_: {0: None})
    monkeypatch.setattr(data, "ensure_index", lambda *_, **given: asked.update(given))
    samples.choose_captions(runs.read_runs([folder]))
    default = {"index_dir": None, "max_pixels": data.index.MAX_PIXELS}
    assert default | asked == default | options


@pytest.fixture(scope="module")
def exported(test_data, tmp_path_factory) -> Path:
    """A run with an exported student and a set of real photos."""
    root = tmp_path_factory.mktemp("report")
    folder = make_run(
        root / "real",
        model={"model": "ViT-Pico-32"},
        data={"index_dir": str(root / "index")},
        eval={"retrieval": (f"coco={test_data}/cocomini-by-000.tar",)},
    )
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    models.export_student(tower.state_dict(), spec, folder / "export")
    return folder


def test_an_exported_student_picks_captions_for_photos(exported):
    found = samples.choose_captions(runs.read_runs([exported]))
    assert found.notes == [] and found.dataset == "coco"
    assert len(found.found) == samples.NUM_IMAGES
    for sample in found.found:
        pick = sample.picks[0]
        assert pick.correct == (pick.caption in sample.captions) == (pick.rank == 1)
        assert 1 <= pick.rank <= found.num_captions
    text, page = report(exported)
    assert text.count("data:image/jpeg;base64,") == samples.NUM_IMAGES
    assert found.found[0].picks[0].caption in page.words
    tower, _ = models.load_model(exported / "export")
    millions = sum(weight.numel() for weight in tower.parameters()) / 1e6
    assert page.row("Parameters")[1][0] == f"{millions:.2f} M"
    assert page.row("Image size")[1][0] == "32"
    assert len(text) < 600_000


def test_the_right_caption_is_recognised_whatever_its_image(exported, monkeypatch):
    import torch

    class Echo:
        """A tower for which every image resembles the first text only."""

        def encode_image(self, image):
            return torch.tensor([[1.0, 0.0]]).repeat(len(image), 1)

        def encode_text(self, tokens):
            return torch.eye(2)[(tokens[:, 1] != 1).long()]

    monkeypatch.setattr(
        "kdengine.data.tokenize.load_tokenizer",
        lambda name: lambda texts: [[0, int(text == "a cat")] for text in texts],
    )
    spec = models.load_model(exported / "export").spec
    own = [["a cat"], ["a dog", "a cat"], ["a dog"]]
    picks = samples._answer((Echo(), spec), torch.zeros(3, 3, 2, 2), ["a cat", "a dog"], own)
    assert [(pick.correct, pick.rank) for pick in picks] == [(True, 1), (True, 1), (False, 2)]
