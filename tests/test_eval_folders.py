# SPDX-License-Identifier: Apache-2.0
"""Zero-shot sets as class folders: which folder is which class, and that scores are a shard's."""

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdengine import evaluate, job, models
from kdengine.config import Data, Eval, RunConfig
from kdengine.evaluate import Evaluator
from kdengine.evaluate.classes import class_numbers, contest
from kdengine.models.prompts import imagenet_classnames, imagenet_wordnet_ids
from kdengine.ranks import Ranks

NAMES = ["dog", "polar bear", "x-ray fish", "Cat"]


def test_wordnet_ids_are_those_of_the_data(test_data: Path) -> None:
    rows = [
        r.split("\t") for r in (test_data / "imagenet-sample-index.tsv").read_text().split("\n")
    ]
    known = {int(row[1]): row[2] for row in rows[1:] if len(row) > 2}
    assert imagenet_wordnet_ids() == [known[number] for number in range(1000)]


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["Polar_Bear", "X_ray-fish", "cat", "dog"], [1, 2, 3, 0]),
        (["dog"], [0]),
        (["0", "1", "2", "3"], [0, 1, 2, 3]),
        (["003", "1"], [3, 1]),
    ],
    ids=["names", "one name", "numbers", "padded"],
)
def test_folders_are_matched_by_their_names(folders, expected) -> None:
    assert class_numbers(folders, NAMES, "names.txt") == expected


def test_numbers_go_by_value_and_not_by_their_order_as_text() -> None:
    folders = sorted(str(number) for number in range(1000))
    assert folders[:4] == ["0", "1", "10", "100"]
    assert class_numbers(folders, imagenet_classnames(), "imagenet") == [int(f) for f in folders]


def test_names_that_are_digits_are_names_first() -> None:
    assert class_numbers(["1", "2"], ["2", "1"], "names.txt") == [1, 0]


def test_wordnet_ids_go_by_the_order_of_ilsvrc() -> None:
    ids = imagenet_wordnet_ids()
    assert class_numbers([ids[999], ids[134], ids[517]], ["x"] * 1000, "f") == [999, 134, 517]


@pytest.mark.parametrize(
    ("folders", "names", "match"),
    [
        (["dog", "lost+found"], NAMES, "'lost[+]found' is no class .1 of 2 are not"),
        (["0", "4"], NAMES, "'4' is no class .*or each by a class number from 0 to 3"),
        (["0", "dog", "cat"], NAMES, "'0' is no class .1 of 3"),
        (["n01440764"], NAMES, "'n01440764' is no class"),
        (["n01440764", "n99999999"], ["x"] * 1000, "'n99999999' is no class .*WordNet id"),
        (["-1"], NAMES, "'-1' is no class"),
        (["\u0663"], NAMES, "is no class"),
        (["crane"], ["crane", "dog", "Crane"], r"'crane' has the name of the classes \[0, 2\]"),
        (["Dog", "dog"], NAMES, "'Dog' and 'dog' both stand for class 0"),
        (["1", "01"], NAMES, "'1' and '01' both stand for class 1 .'polar bear'"),
    ],
)
def test_a_folder_that_is_no_class_is_refused(folders, names, match) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        class_numbers(folders, names, "names.txt")
    assert "names.txt" in str(caught.value)


# classes of one, two and three digits; both cranes (134, 517) and both maillots (638, 639)
CHOSEN = [1, 2, 3, 9, 10, 11, 19, 20, 21, 99, 100, 101, 134, 199, 200, 517, 638, 639, 836, 837, 999]


class Ruler(torch.nn.Module):
    """Embeds an image by its coarse pixels and the prompt of class c by row c of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.randn(1000, 27))

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        coarse = F.adaptive_avg_pool2d(image, 3).flatten(1)
        return coarse - coarse.mean(dim=1, keepdim=True)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table[tokens[:, 0]]


@pytest.fixture(scope="module")
def photos(test_data: Path, tmp_path_factory) -> tuple[Path, dict[int, bytes]]:
    """A folder with a shard of the chosen classes' photos, names and a template; the photos."""
    folder, found = tmp_path_factory.mktemp("photos"), {}
    with (
        tarfile.open(test_data / "imagenet-sample-zeroshot.tar") as tar,
        tarfile.open(folder / "in-zeroshot.tar", "w") as out,
    ):
        members = {member.name: member for member in tar}
        for name in members:
            if name.endswith(".cls"):
                label = int(tar.extractfile(members[name]).read())
                if label in CHOSEN:
                    for member in (members[name.replace(".cls", ".jpg")], members[name]):
                        data = tar.extractfile(member)
                        out.addfile(member, data)
                    image = members[name.replace(".cls", ".jpg")]
                    found[label] = tar.extractfile(image).read()
    (folder / "in-classnames.txt").write_text("\n".join(f"class {n}" for n in range(1000)))
    (folder / "in-templates.txt").write_text("{}\n")
    assert sorted(found) == CHOSEN
    return folder, found


def write_tree(root: Path, folders: dict[str, bytes | None], copies: int = 1) -> Path:
    for name, data in folders.items():
        (root / name).mkdir(parents=True)
        for copy in range(copies if data else 0):
            (root / name / f"{copy}.JPEG").write_bytes(data)
    return root


def open_sets(*words: str) -> Evaluator:
    _, spec = models.build_student("ViT-Pico-32", seed=0)
    runner = Evaluator(spec, evaluate.parse_eval_sets([], words), num_threads=1)
    # the names are `class N`
    runner.tokenizer = lambda texts: torch.tensor([[int(text.split()[1])] for text in texts])
    return runner


@pytest.fixture(scope="module")
def ruler(photos) -> tuple[Ruler, torch.Tensor]:
    """A model whose classes are the photos of the shard, and the photos' labels in the shard."""
    runner = open_sets(f"in={photos[0]}/in-zeroshot.tar")
    (index,) = runner.indexes[0]
    labels, model = torch.from_numpy(index.labels()), Ruler()
    batches = list(runner._loader(index))
    image = torch.cat([batch["image"][batch["valid"]] for batch in batches])
    model.table[labels] = model.encode_image(image)
    return model, labels


def test_folders_by_number_score_like_the_shard(photos, ruler, tmp_path) -> None:
    """As ImageNet-V2's archive: in the order of text the labels would be wrong."""
    folder, found = photos
    tree = write_tree(tmp_path / "v2", {str(n): found.get(n) for n in range(1000)})
    (tree / "7" / "bad.jpeg").write_bytes(b"<html>")
    (tree / "21" / "cut.JPG").write_bytes(found[21][:900])
    prompts = f"{folder}/in-classnames.txt;{folder}/in-templates.txt"
    runner = open_sets(f"in={folder}/in-zeroshot.tar", f"v2={tree};{prompts}")
    metrics = runner.run(ruler[0])
    assert metrics["v2/zeroshot-top1"] == metrics["in/zeroshot-top1"] == 1.0
    assert metrics["v2/zeroshot-classes"] == metrics["in/zeroshot-classes"] == 1000
    (index,) = runner.indexes[1]
    assert index.num_quarantined == 2 and index.num_samples == len(CHOSEN)
    names, labels = contest(index, [f"class {n}" for n in range(1000)], "names")
    assert names == [f"class {n}" for n in range(1000)]
    # label by label, and that the order of the folders is another one
    assert [int(Path(file).parent.name) for file in index.files()] == labels.tolist()
    assert (index.labels() != labels).mean() > 0.8


def test_wordnet_folders_score_over_their_own_columns(photos, ruler, tmp_path) -> None:
    """As ImageNet-R and -A: of 1000 classes those compete that have a folder."""
    folder, found = photos
    ids, model = imagenet_wordnet_ids(), Ruler()
    # a model that errs: about half of the photos are nearer to another class
    model.table = ruler[0].table + 1.5 * torch.randn_like(ruler[0].table)
    tree = write_tree(tmp_path / "r", {ids[n]: found[n] for n in CHOSEN}, copies=2)
    (tree / ids[9] / "cut.jpg").write_bytes(found[9][:900])
    prompts = f"{folder}/in-classnames.txt;{folder}/in-templates.txt"
    runner = open_sets(f"r={tree};{prompts}", f"in={folder}/in-zeroshot.tar")
    metrics = runner.run(model)
    assert metrics["r/zeroshot-classes"] == len(CHOSEN)
    # the same from the 1000-way logits of the shard's photos
    (index,) = runner.indexes[1]
    labels = torch.from_numpy(index.labels())
    image = torch.cat([b["image"][b["valid"]] for b in runner._loader(index)])
    logits = F.normalize(model.encode_image(image)) @ F.normalize(model.table).T
    hits = [CHOSEN[n] for n in logits[:, CHOSEN].argmax(1).tolist()] == labels.numpy()
    assert 0.2 < hits.mean() < 0.9
    assert metrics["r/zeroshot-top1"] == pytest.approx(hits.mean())
    assert metrics["r/zeroshot-mean-per-class-recall"] == pytest.approx(hits.mean())
    top5 = logits[:, CHOSEN].topk(5).indices
    near = (torch.tensor(CHOSEN)[top5] == labels[:, None]).any(1).double().mean()
    assert metrics["r/zeroshot-top5"] == pytest.approx(float(near))
    assert metrics["in/zeroshot-top1"] < metrics["r/zeroshot-top1"]


def test_the_word_imagenet_takes_wordnet_folders(photos, tmp_path) -> None:
    folder, found = photos
    ids = imagenet_wordnet_ids()
    tree = write_tree(tmp_path / "r", {ids[n]: found[n] for n in (999, 134, 517)})
    _, spec = models.build_student("ViT-Pico-32", seed=0)
    word = f"r={tree};imagenet;{folder}/in-templates.txt"
    runner = Evaluator(spec, evaluate.parse_eval_sets([], [word]))
    names, labels = contest(runner.indexes[0][0], imagenet_classnames(), "imagenet")
    assert names == [imagenet_classnames()[n] for n in (134, 517, 999)]
    assert [names[n] for n in labels] == [
        imagenet_classnames()[ids.index(Path(file).parent.name)]
        for file in runner.indexes[0][0].files()
    ]


def test_training_evaluates_class_folders_by_name(photos, tmp_path) -> None:
    folder, found = photos
    chosen = CHOSEN[::-1]
    tree = write_tree(tmp_path / "set", {f"class_{n}": found[n] for n in chosen})
    (tmp_path / "names.txt").write_text("\n".join(f"class {n}" for n in chosen))
    word = f"set={tree};{tmp_path}/names.txt;{folder}/in-templates.txt"
    config = RunConfig(eval=Eval(zeroshot=(word,)), data=Data(index_dir=str(tmp_path / "index")))
    tower, spec = models.build_student("ViT-Pico-32", seed=0)
    runner = job.build_evaluator(config, Ranks(0, 1, 0, torch.device("cpu")), spec)
    assert not (tmp_path / ".kdengine").exists()
    (index,) = runner.indexes[0]
    _, labels = contest(index, [f"class {n}" for n in chosen], "names")
    assert [f"class_{chosen[n]}" for n in labels] == [Path(f).parent.name for f in index.files()]
    metrics = runner.run(tower)
    assert metrics["set/zeroshot-classes"] == len(CHOSEN)
    assert 0 <= metrics["set/zeroshot-top1"] <= metrics["set/zeroshot-top5"] < 1


@pytest.mark.parametrize("by_number", [True, False])
def test_few_numbers_of_many_names_are_warned_of(photos, tmp_path, caplog, by_number) -> None:
    """Numbers fit any list, so the list may be another data set's; WordNet ids fit ImageNet."""
    folder, found = photos
    name = str if by_number else imagenet_wordnet_ids().__getitem__
    tree = write_tree(tmp_path / "set", {name(n): found[n] for n in CHOSEN[:3]}, copies=3)
    open_sets(f"set={tree};{folder}/in-classnames.txt;{folder}/in-templates.txt")
    assert ("labels are only 3 of 1000 class names" in caplog.text) == by_number


def test_a_foreign_folder_is_an_error_of_its_set(photos, tmp_path) -> None:
    folder, found = photos
    tree = write_tree(tmp_path / "v2", {"0": found[1], "__MACOSX": None})
    with pytest.raises(ValueError, match="^evaluation set v2: class folders.*'__MACOSX' is no"):
        open_sets(f"v2={tree};imagenet;{folder}/in-templates.txt")


def test_retrieval_refuses_class_folders(photos, tmp_path) -> None:
    tree = write_tree(tmp_path / "v2", {"0": photos[1][1]})
    _, spec = models.build_student("ViT-Pico-32", seed=0)
    with pytest.raises(ValueError, match="^evaluation set v2: .*labels and no captions"):
        Evaluator(spec, evaluate.parse_eval_sets([f"v2={tree}"], []))


def test_class_folders_of_all_classes_keep_their_order() -> None:
    class Index:
        classes = tuple(sorted(str(n) for n in range(12)))

        def labels(self) -> np.ndarray:
            return np.arange(12)

    names, labels = contest(Index(), [f"name {n}" for n in range(12)], "names.txt")
    assert names == [f"name {n}" for n in range(12)]
    assert labels.tolist() == [int(name) for name in Index.classes]
