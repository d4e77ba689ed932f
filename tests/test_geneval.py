"""GenEval: its rules against another formulation of them, and the judge with small models of the real classes."""

import json
import math
import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError
from stages.common.fingerprints import code
from stages.judges import geneval, judge_kind
from stages.judges.base import Item
from stages.judges.geneval_rules import (
    CLASSES,
    COLORS,
    MINIMUM_SCORE,
    TAGS,
    Detection,
    Metadata,
    evaluate,
    read_metadata,
    relations,
    strongest,
    with_colors,
)
from tests.helpers import done, refused, stage
from tests.test_judges import configure, write_images
from tests.tiny_judges import write_tiny_geneval

RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
WAYS = (0.1, 0.1, 0.6, 0.2)  # of random scores: near a threshold, equal, above both thresholds, anywhere


def detection(name: str, score: float = 0.95, box=(0, 0, 10, 10), color: str | None = None) -> Detection:
    return Detection(name, score, box, color)


def kinds(asked: dict, *found: Detection) -> list[str]:
    """Return the kinds of errors in an image with these detections."""
    return [failure.kind for failure in evaluate(read_metadata(json.dumps(asked)), found)]


# Cases by hand, for every tag


def test_single_object():
    asked = {"tag": "single_object", "include": [{"class": "bench", "count": 1}]}
    assert kinds(asked, detection("bench", 0.31)) == []
    assert kinds(asked, detection("bench", 0.3)) == ["missing"], "the score must be above the threshold"
    assert kinds(asked, detection("chair")) == ["missing"]
    assert kinds(asked, *[detection("bench")] * 5) == [], "more than one is right, too"


def test_two_object():
    asked = {"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "dog", "count": 1}]}
    assert kinds(asked, detection("dog"), detection("bench")) == []
    assert kinds(asked, detection("dog")) == ["missing"]
    assert kinds(asked) == ["missing", "missing"]


def test_counting():
    asked = {"tag": "counting", "include": [{"class": "car", "count": 2}], "exclude": [{"class": "car", "count": 3}]}
    sure, unsure = detection("car", 0.91), detection("car", 0.9)
    assert kinds(asked, sure, sure, unsure) == [], "in counting only scores above .9 count"
    assert kinds(asked) == kinds(asked, unsure) == ["missing"]
    assert kinds(asked, sure, unsure) == ["count"]
    assert kinds(asked, *[sure] * 3) == kinds(asked, *[sure] * 40) == ["extra"]


def test_no_more_than_sixteen_of_a_class_are_looked_at():
    asked = {"tag": "counting", "include": [{"class": "car", "count": 1}], "exclude": [{"class": "car", "count": 17}]}
    assert kinds(asked, *[detection("car")] * 30) == []
    assert strongest([detection("car", 0.4 + index / 100) for index in range(20)], "car", 0.3) == list(range(19, 3, -1))


def test_colors():
    asked = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}]}
    assert kinds(asked, detection("car", color="red")) == []
    assert kinds(asked, detection("car", color="blue")) == ["color"]
    assert kinds(asked, detection("bus", color="red")) == ["missing"]
    best, other = detection("car", 0.9, color="blue"), detection("car", 0.8, color="red")
    assert kinds(asked, other, best) == ["color"], "only the best object is looked at"
    asked["include"][0]["count"] = 2
    assert kinds(asked, other, best) == ["color"], "all of them must have the color"
    with pytest.raises(ValueError, match="the color of a car is not known"):
        kinds(asked, detection("car"), detection("car"))


def test_position():
    clauses = [{"class": "skis", "count": 1}, {"class": "bed", "count": 1, "position": ["above", 0]}]
    asked = {"tag": "position", "include": clauses}
    skis = detection("skis", box=(0, 50, 10, 60))
    assert kinds(asked, skis, detection("bed")) == []
    assert kinds(asked, skis, detection("bed", box=(0, 90, 10, 100))) == ["position"]
    assert kinds(asked, skis) == ["missing"]
    assert kinds(asked, detection("bed")) == ["missing", "position"], "without the target no position is right"
    clauses[1]["count"] = 2
    assert kinds(asked, skis, detection("bed"), detection("bed", box=(0, 90, 10, 100))) == ["position"], "every pair"


def test_color_attr():
    asked = {
        "tag": "color_attr",
        "include": [{"class": "car", "count": 1, "color": "red"}, {"class": "cup", "count": 1, "color": "pink"}],
    }
    assert kinds(asked, detection("car", color="red"), detection("cup", color="pink")) == []
    assert kinds(asked, detection("car", color="pink"), detection("cup", color="red")) == ["color", "color"]
    assert kinds(asked, detection("cup", color="pink")) == ["missing"]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0, 0, 10, 10), set()),  # the same place
        ((1, 0, 11, 10), set()),  # one pixel aside; the sizes allow for two
        ((2, 0, 12, 10), set()),  # 2 - .1 * 20 = 0
        ((3, 0, 13, 10), set()),  # 1 / 3 of the distance is left
        ((4.1, 0, 14.1, 10), {"right of"}),  # 2.1 / 4.1
        ((4, 0, 14, 10), set()),  # 2 / 4 is not more than a half
        ((-40, 0, -30, 10), {"left of"}),
        ((0, -40, 10, -30), {"above"}),
        ((40, 40, 50, 50), {"right of", "below"}),  # (38, 38) / 56.6
        ((40, 20, 50, 30), {"right of"}),  # (38, 18) / 44.7
        ((-40, -200, 50, 10), {"above"}),
    ],
)
def test_relations_to_a_box_of_ten_pixels(box, expected):
    assert relations(box, (0, 0, 10, 10)) == expected


# Another formulation of the rules


def reference(asked: dict, found: list[Detection]) -> tuple[bool, str | None]:
    """Return whether an image is right and the kind of the first error, from the definition of each clause on its own."""
    least = 0.9 if asked["tag"] == "counting" else 0.3
    ranked = sorted(found, key=lambda one: one.score, reverse=True)
    seen = {name: [one for one in ranked if one.name == name and one.score > least][:16] for name in CLASSES}

    def beside(a, b, relation: str) -> bool:
        a, b = np.array(a, float).reshape(2, 2), np.array(b, float).reshape(2, 2)
        way = np.array(RELATIONS[relation])
        away = a.mean(0) - b.mean(0)
        gap = way @ away - 0.1 * np.abs(way) @ (np.ptp(a, 0) + np.ptp(b, 0))
        return gap >= 1e-3 and gap > 0.5 * math.dist(away, (0, 0))

    def error(index: int) -> str | None:
        clause = asked["include"][index]
        mine = seen[clause["class"]][: clause["count"]]
        if len(mine) < clause["count"]:
            return "count" if mine else "missing"
        if "color" in clause and {one.color for one in mine} != {clause["color"]}:
            return "color"
        if "position" in clause:
            relation, other = clause["position"]
            theirs = seen[asked["include"][other]["class"]][: asked["include"][other]["count"]]
            if error(other) or not all(beside(a.box, b.box, relation) for a in mine for b in theirs):
                return "position"
        return None

    errors = [error(index) for index in range(len(asked["include"]))]
    errors += ["extra" for limit in asked.get("exclude", []) if len(seen[limit["class"]]) >= limit["count"]]
    return not any(errors), next(filter(None, errors), None)


def random_case(generator: np.random.Generator, tag: str) -> tuple[dict, list[Detection]]:
    """Return metadata of a tag and detections, of which about a third agree with it."""
    one, two = (str(name) for name in generator.choice(CLASSES, 2, replace=False))
    color, another = (str(name) for name in generator.choice(COLORS, 2))
    number = int(generator.integers(2, 5)) if tag == "counting" else int(generator.choice([1, 1, 1, 2]))
    first, second = {"class": one, "count": number}, {"class": two, "count": 1}
    if tag in ("colors", "color_attr"):
        first["color"] = color
    if tag == "color_attr":
        second["color"] = another
    if tag == "position":
        second["position"] = [str(generator.choice(list(RELATIONS))), 0]
        if generator.random() < 0.2:
            first["color"] = color
    asked = {"tag": tag, "include": [first] if tag in ("single_object", "counting", "colors") else [first, second]}
    if tag == "counting":
        asked["exclude"] = [{"class": one, "count": number + 1}]
    found = []
    for name, wanted in ((one, color), (two, another), (CLASSES[int(generator.integers(80))], color)):
        few = number + int(generator.integers(-1, 2)) if name == one else int(generator.integers(0, 3))
        for _ in range(25 if generator.random() < 0.03 else few):
            near = generator.choice([0.3, 0.9]) + generator.choice([-1e-4, -4e-5, -1e-6, 0, 1e-6, 3e-5, 1e-4])
            score = float(generator.choice([near, 0.95, 0.91 + 0.09 * generator.random(), generator.random()], p=WAYS))
            low, size = generator.integers(0, 12, 2) * 5, generator.integers(1, 8, 2) * 5
            if name == two and tag == "position" and generator.random() < 0.6:
                low = low + 50 * np.array(RELATIONS[second["position"][0]])
            box = tuple(int(edge) for edge in (*low, *(low + size)))
            painted = wanted if generator.random() < 0.8 else str(generator.choice(COLORS))
            found.append(Detection(name, round(score, 6), box, painted))
    return asked, [found[index] for index in generator.permutation(len(found))]


@pytest.mark.parametrize("tag", TAGS)
def test_the_rules_agree_with_another_formulation(tag):
    generator = np.random.default_rng(TAGS.index(tag))
    seen: Counter = Counter()
    for _ in range(1000):
        asked, found = random_case(generator, tag)
        expected = reference(asked, found)
        metadata = read_metadata(json.dumps(asked | {"prompt": "a photo"}))
        verdict = geneval.verdict(metadata, found)
        assert (verdict.matches, verdict.reason) == expected, (asked, found)
        seen[verdict.reason] += 1
    errors = {"missing", "count", *{"counting": ["extra"], "position": ["position", "color"]}.get(tag, [])}
    errors |= {"color"} if tag in ("colors", "color_attr") else set()
    assert {reason for reason, number in seen.items() if number >= 20} == errors | {None}, seen


def test_colors_are_asked_only_of_the_objects_that_a_clause_is_about():
    clauses = [{"class": "car", "count": 2, "color": "red"}, {"class": "cup", "count": 1}, {"class": "bed", "count": 1}]
    clauses.append({"class": "dog", "count": 3, "color": "pink"})
    metadata = Metadata.model_validate({"tag": "color_attr", "include": clauses})
    found = [detection("cup"), detection("car", 0.5), detection("car", 0.4), detection("car", 0.6), detection("dog")]
    asked = []

    def classify(indices):
        asked.append(indices)
        return ["red", "blue"]

    colored = with_colors(metadata, found, classify)
    assert asked == [[3, 1]], "the two best cars; of dogs there are too few"
    assert [one.color for one in colored] == [None, "blue", None, "red", None]
    single = Metadata.model_validate({"tag": "single_object", "include": [{"class": "car", "count": 1}]})
    assert with_colors(single, found, classify) == found
    assert len(asked) == 1


def test_an_answer_is_compact_and_its_scores_keep_their_side_of_a_threshold():
    found = [detection("car", 0.900001, (1, 2, 3, 4)), detection("tv remote", 0.9, color="red"), detection("dog", 0.300049)]
    assert geneval.to_answer(found) == (
        '[{"class":"car","score":0.9001,"box":[1,2,3,4]},{"class":"tv remote","score":0.9,"box":[0,0,10,10],"color":"red"},'
        '{"class":"dog","score":0.3001,"box":[0,0,10,10]}]'
    )
    for score in range(0, 1_000_001, 7):
        rounded = json.loads(geneval.to_answer([detection("car", score / 1e6)]))[0]["score"]
        assert 0 <= rounded - score / 1e6 < 1e-4


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (None, "it has no metadata"),
        ("[", "Invalid JSON"),
        ('{"tag": "colors"}', "include: Field required"),
        ('{"tag": "colors", "include": []}', "include: List should have at least 1 item"),
        ('{"tag": "colors", "include": [{"class": "carr", "count": 1}]}', "include.0.class: .*'carr' is not one of"),
        ('{"tag": "colors", "include": [{"class": "car", "count": 0}]}', "include.0.count: "),
        ('{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "gray"}]}', "include.0.color: "),
        (
            '{"tag": "x", "include": [{"class": "car", "count": 1, "position": ["above", 0]}]}',
            "include.0.position: 0 is not the index of an earlier",
        ),
        ('{"tag": "x", "include": [{"class": "car", "count": 1, "size": "big"}]}', "include.0.size: Extra"),
    ],
)
def test_prompts_without_metadata_of_geneval_are_named(metadata, words):
    item = Item("c0", {"prompt": "a gray car", "metadata": metadata}, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=rf"prompt 'a gray car': {words}[^\n]*needs prompts with GenEval's metadata"):
        geneval.metadata_of(item)


# The models


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return write_tiny_geneval(tmp_path_factory.mktemp("checkpoints"))


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return images of a few large spots in strong colors, uint8 `[count, height, width, 3]`."""
    spots = np.random.default_rng(seed).integers(0, 2, (count, 3, 4, 3), dtype=np.uint8) * 255
    return np.stack([np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in spots])


def settings(folder, **more):
    kind = judge_kind("geneval-hf")
    return kind.settings(kind="geneval-hf", detector=str(folder / "detector"), clip=str(folder / "clip"), device="cpu", **more)


def asking(number: int, seen: list[Detection]) -> dict:
    """Return metadata of one tag after the other about the best objects of the first two classes in an image."""
    best: dict[str, Detection] = {}
    for one in seen:
        best.setdefault(one.name, one)
    (first, one), (second, two) = ((name, {"class": name, "count": 1}) for name in list(best)[:2])
    include = {
        "single_object": [one],
        "two_object": [one, {"class": "zebra", "count": 1}],
        "counting": [one],
        "colors": [one | {"color": best[first].color}],
        "position": [one, two | {"position": ["above", 0]}],
        "color_attr": [one | {"color": best[first].color}, two | {"color": "red" if best[second].color != "red" else "blue"}],
    }
    tag = TAGS[number % len(TAGS)]
    return {"tag": tag, "include": include[tag], "exclude": [{"class": first, "count": 2}] if tag == "counting" else []}


def test_a_batch_gives_what_each_image_gives(checkpoints):
    detect = geneval.open_detector(str(checkpoints / "detector"), "cpu", "float32")
    for height, width in ((48, 80), (64, 64)):
        images = pictures(6, height, width)
        for image, (found, masks) in zip(images, detect(images), strict=True):
            ((alone, alone_masks),) = detect(image[None])
            assert [(one.name, one.box) for one in found] == [(one.name, one.box) for one in alone]
            assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-4)
            assert (masks == alone_masks).all()
            assert masks.shape == (len(found), height, width)


def test_objects_are_those_of_the_post_processing_at_the_size_of_the_image(checkpoints):
    import torch
    from transformers import Mask2FormerForUniversalSegmentation as Mask2Former
    from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

    detect = geneval.open_detector(str(checkpoints / "detector"), "cpu", "float32")
    model = Mask2Former.from_pretrained(checkpoints / "detector").eval()
    processor = Mask2FormerImageProcessorPil.from_pretrained(checkpoints / "detector")
    sizes = {(48, 80), (90, 40), (500, 300)}
    for height, width in sizes:
        (image,) = pictures(1, height, width)
        ((found, masks),) = detect(image[None])
        with torch.no_grad():
            output = model(**processor(Image.fromarray(image), return_tensors="pt"))
        (whole,) = processor.post_process_instance_segmentation(
            output, threshold=0.3, target_sizes=[(height, width)], return_binary_maps=True
        )
        expected = Counter()
        for segment, mask in zip(whole["segments_info"], whole["segmentation"].numpy() > 0, strict=True):
            rows, columns = mask.nonzero()
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            expected[CLASSES[segment["label_id"]], segment["score"], tuple(map(int, box)), mask.tobytes()] += 1
        got = Counter((one.name, one.score, one.box, mask.tobytes()) for one, mask in zip(found, masks, strict=True))
        assert got == expected
        assert len(found) > 5
        assert [one.score for one in found if one.name == found[0].name] == sorted(
            (one.score for one in found if one.name == found[0].name), reverse=True
        )


def test_colors_are_those_of_the_whole_clip_asked_prompt_by_prompt(checkpoints):
    import torch
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = checkpoints / "clip"
    classify = geneval.open_colors(str(folder), "cpu", "float32")
    model = CLIPModel.from_pretrained(folder).eval()
    processor, tokenizer = CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    crops = [image[: 20 + index, 3 : 6 + 5 * index] for index, image in enumerate(pictures(12, 40, 70, seed=1))]
    names = ["car", "computer mouse"] * 6
    for crop, name, color in zip(crops, names, classify(crops, names), strict=True):
        cosines = []
        for wanted in COLORS:
            vectors = []
            for text in (
                f"a photo of a {wanted} {name}",
                f"a photo of a {wanted}-colored {name}",
                f"a photo of a {wanted} object",
            ):
                with torch.no_grad():
                    inputs = tokenizer(text, return_tensors="pt") | processor(Image.fromarray(crop), return_tensors="pt")
                    output = model(**inputs)
                vectors.append(output.text_embeds[0])
            mean = sum(vectors)
            cosines.append(float(mean @ output.image_embeds[0] / mean.norm()))
        assert color == COLORS[int(np.argmax(cosines))]
    assert len(set(classify(crops, names))) > 1


def test_boxes_and_cut_out_objects():
    mask = np.zeros((6, 9), bool)
    mask[2, 3] = mask[4, 7] = True
    assert geneval.box_of(mask) == (3, 2, 8, 5)
    image = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
    cut = geneval.cut_out(image, mask, (3, 2, 8, 5))
    assert cut.shape == (3, 5, 3)
    assert (cut[0, 0] == image[2, 3]).all()
    assert (cut[2, 4] == image[4, 7]).all()
    assert (np.delete(cut.reshape(-1, 3), [0, 14], axis=0) == 0x99).all()


@pytest.mark.parametrize(("height", "width"), [(48, 80), (96, 40)])
def test_verdicts_through_the_stage_are_those_of_the_rules(height, width, checkpoints, tmp_path):
    """Images that are not square, with questions about what the small detector happens to find in them."""
    images = pictures(9, height, width)
    detect = geneval.open_detector(str(checkpoints / "detector"), "cpu", "float32")
    colors = geneval.open_colors(str(checkpoints / "clip"), "cpu", "float32")
    prompts, expected, seen = [], [], []
    for number, image in enumerate(images):
        ((found, masks),) = detect(image[None])
        objects = [
            Detection(one.name, one.score, one.box, *colors([geneval.cut_out(image, mask, one.box)], [one.name]))
            for one, mask in zip(found, masks, strict=True)
        ]
        asked = asking(number, objects)
        expected.append(reference(asked, objects))
        seen.append(sorted(objects, key=lambda one: -one.score))
        row = {"prompt_id": f"p{number:02d}", "prompt": f"prompt {number}", "category": asked["tag"], "source": "geneval"}
        prompts.append(row | {"split": "geneval", "metadata": json.dumps(asked)})
    write_images(tmp_path, prompts, images)
    folders = {"detector": str(checkpoints / "detector"), "clip": str(checkpoints / "clip")}
    for name, batch in (("four", 4), ("one", 1)):
        configure(tmp_path, **{name: {"kind": "geneval-hf", **folders, "device": "cpu", "batch_size": batch}})
        files = {part: tmp_path / f"{part}.parquet" for part in ("prompts", "candidates")}
        arguments = [argument for part, path in files.items() for argument in (f"--{part}", path)]
        done("judge", "--config", tmp_path / "config.yaml", "--judge", name, *arguments, "--out", tmp_path / f"{name}.parquet")
        rows = manifests.read_rows(tmp_path / f"{name}.parquet", "verdicts")
        assert [(row["verdict"], row["reason"]) for row in rows] == expected
        for row, objects in zip(rows, seen, strict=True):
            answer = json.loads(row["answer"])
            assert [(one["class"], one["box"]) for one in answer] == [(one.name, list(one.box)) for one in objects]
            assert all(one["score"] > MINIMUM_SCORE for one in answer)
        assert any("color" in one for row in rows for one in json.loads(row["answer"]))
    assert {None, "missing", "color"} <= {reason for _, reason in expected}


def test_an_image_without_objects_is_wrong_and_not_unreadable(checkpoints, monkeypatch):
    monkeypatch.setattr(geneval, "MINIMUM_SCORE", 1.0)
    judge = geneval.open_geneval(settings(checkpoints))
    asked = {"tag": "single_object", "include": [{"class": "train", "count": 1}]}
    (verdict,) = judge([Item("c0", {"prompt": "a train", "metadata": json.dumps(asked)}, pictures(1, 20, 30)[0])])
    assert (verdict.matches, verdict.reason, verdict.answer) == (False, "missing", "[]")


def test_a_type_of_half_the_size_gives_nearly_equal_scores(checkpoints):
    (image,) = pictures(1, 48, 80)
    scores = []
    for dtype in ("float32", "bfloat16"):
        ((found, _),) = geneval.open_detector(str(checkpoints / "detector"), "cpu", dtype)(image[None])
        scores.append(np.mean([one.score for one in found]))
    assert scores[0] == pytest.approx(scores[1], abs=0.05)


def test_what_the_verdicts_depend_on(checkpoints):
    kind = judge_kind("geneval-hf")
    one, other = settings(checkpoints), settings(checkpoints, batch_size=2, workers=3)
    assert one.outcome() == other.outcome() == {"kind": "geneval-hf", "dtype": "float32"}
    assert (kind.runs_on(one).workers, kind.runs_on(other).workers) == (None, 3)
    files = {path.split("checkpoints", 1)[1].split("/", 1)[1] for path in kind.files(one)}
    weights = {f"{part}/{name}" for part in ("detector", "clip") for name in ("config.json", "model.safetensors")}
    assert files >= weights | {"detector/preprocessor_config.json", "clip/preprocessor_config.json", "clip/tokenizer.json"}
    used = {name.split("@")[0] for name in code("stages.judge", mentioned=["JUDGES[geneval-hf]"])}
    assert {"stages/judges/geneval.py", "stages/judges/geneval_rules.py"} <= used


@pytest.fixture
def broken(checkpoints, tmp_path):
    """A copy of the checkpoints, to break."""
    return shutil.copytree(checkpoints, tmp_path / "checkpoints")


def rewritten(path, change) -> None:
    """Write a file of weights again, with a changed table."""
    from safetensors.torch import load_file, save_file

    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def edit(path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda at: shutil.rmtree(at / "detector"), r"detector/config.json: not found; set detector of .* folder of facebook/"),
        (
            lambda at: (at / "clip/preprocessor_config.json").unlink(),
            r"clip/preprocessor_config.json: not found; set clip of the judge geneval-hf",
        ),
        (lambda at: (at / "clip/config.json").write_text("{"), r"clip/config.json: not a model configuration"),
        (
            lambda at: edit(at / "detector/config.json", model_type="maskformer"),
            r"model_type is 'maskformer', not 'mask2former'",
        ),
        (lambda at: (at / "clip/tokenizer.json").unlink(), r"clip: no tokenizer .* set clip of"),
        (lambda at: (at / "clip/model.safetensors").rename(at / "clip/model.bin"), r"clip: only pickled weights"),
    ],
)
def test_a_folder_of_another_model_is_refused_before_anything_is_loaded(change, words, broken):
    change(broken)
    with pytest.raises(UserError, match=words):
        judge_kind("geneval-hf").files(settings(broken))
    with pytest.raises(UserError, match=words):
        geneval.open_geneval(settings(broken))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda at: edit(at / "detector/config.json", id2label={str(index): f"LABEL_{index}" for index in range(80)}),
            r"detector/config.json: 80 classes from label_0 to label_79, not the 80 of COCO's instances",
        ),
        (
            lambda at: rewritten(at / "detector/model.safetensors", lambda weights: weights.pop("class_predictor.bias")),
            r"detector: 1 weights are missing, such as class_predictor.bias; set detector",
        ),
        (
            lambda at: rewritten(
                at / "clip/model.safetensors",
                lambda weights: weights.update({"visual_projection.weight": weights["visual_projection.weight"][:1].clone()}),
            ),
            r"clip: its model does not load \([^\n]*\); set clip of .* openai/",
        ),
        (
            lambda at: (at / "clip/model.safetensors").write_bytes(b"no weights"),
            r"clip: its model does not load \([^\n]*\); set clip of .* openai/",
        ),
        (lambda at: (at / "clip/tokenizer.json").write_text("{}"), r"clip: its tokenizer does not load"),
        (lambda at: (at / "detector/preprocessor_config.json").write_text("{"), r"detector: its image processor does not load"),
    ],
)
def test_a_checkpoint_that_would_judge_at_random_is_refused(change, words, broken):
    change(broken)
    with pytest.raises(UserError, match=words):
        geneval.open_geneval(settings(broken))


def test_the_stage_ends_with_one_message_on_a_wrong_folder(checkpoints, tmp_path):
    asked = {"tag": "single_object", "include": [{"class": "train", "count": 1}]}
    prompt = {"prompt_id": "p00", "prompt": "a train", "category": "single_object", "source": "geneval", "split": "geneval"}
    write_images(tmp_path, [prompt | {"metadata": json.dumps(asked)}], pictures(1, 20, 30))
    swapped = {"detector": str(checkpoints / "clip"), "clip": str(checkpoints / "detector")}
    configure(tmp_path, swapped={"kind": "geneval-hf", **swapped})
    arguments = ["--prompts", tmp_path / "prompts.parquet", "--candidates", tmp_path / "candidates.parquet"]
    result = stage("judge", "--config", tmp_path / "config.yaml", "--judge", "swapped", *arguments, "--out", tmp_path / "out")
    refused(result, "clip/config.json: model_type is 'clip', not 'mask2former'", "set detector")


def test_the_configuration_is_checked_without_the_models(tmp_path):
    configure(tmp_path, objects={"kind": "geneval-hf", "detector": "nowhere", "clip": "nowhere"})
    assert load(tmp_path / "config.yaml").judge("objects").batch_size == 16
    configure(tmp_path, objects={"kind": "geneval-hf", "detector": "nowhere"})
    with pytest.raises(UserError, match="clip"):
        load(tmp_path / "config.yaml")
