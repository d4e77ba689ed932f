"""What every external judge with a checkpoint must do, on small checkpoints of the real classes.

A batch is judged as its images one by one, a killed judge continues and writes equal files, files of any mode are read, and a
broken checkpoint or image ends with one message.
"""

import dataclasses
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages.common import manifests, shards
from stages.common.errors import UserError
from stages.common.registry import resolve
from stages.judges import JUDGES, judge_kind
from stages.judges.base import Item
from stages.suites.phrases import noun_phrases
from stages.suites.t2i_compbench import metadata
from tests.helpers import measured
from tests.test_judges import run
from tests.tiny_judges import write_tiny_blip, write_tiny_clip, write_tiny_detector, write_tiny_geneval
from tests.tiny_vlm import write_tiny_vlm

GENEVAL = {"tag": "counting", "include": [{"class": "car", "count": 2}], "exclude": [{"class": "car", "count": 3}]}
ATTRIBUTES = [("color", "a red cat and a green dog"), ("color", "a tall dog"), ("color", "a cat, a dog and a big car")]
RELATIONS = [("spatial", "a cat on the left of a dog"), ("numeracy", "two cats and a woman"), ("spatial", "a dog near a cat")]
DEEP = [("3d_spatial", "a cat behind a dog"), ("numeracy", "two dogs"), ("3d_spatial", "a dog in front of a woman")]
COMPLEX = [("complex", "The red cat is next to the dog."), ("complex", "The cat sat near a dog."),
           ("complex", "The dog ate the cat.")]  # fmt: skip
SCIENCE = [("physics", text) for text in ("an unripe apple", "a laptop without electricity", "ice in the sun")]
TAGS = [("counting", f"a photo of two cars {number}") for number in range(3)]


@dataclasses.dataclass(frozen=True)
class Case:
    """A judge to hold to this page.

    settings: from the folder of all checkpoints to the judge's settings. prompts: category and text. folders: its checkpoints.
    needed: files without which each checkpoint is refused, beside those that all of them need.
    """

    settings: Callable[[Path], dict]
    prompts: list[tuple[str, str]]
    folders: tuple[str, ...]
    needed: tuple[str, ...] = ()


def blip(at: Path) -> dict:
    return {"kind": "blip-vqa", "checkpoint": str(at / "blip"), "phrases": str(at / "phrases.parquet")}


def detector(at: Path) -> dict:
    return {"kind": "detector", "checkpoint": str(at / "rt-detr"), "detection_threshold": 0.01}


def clip(at: Path) -> dict:
    return {"kind": "clip-score", "checkpoint": str(at / "clip")}


CASES = {
    "blip-vqa": Case(blip, ATTRIBUTES, ("blip",), ("tokenizer.json",)),
    "detector": Case(detector, RELATIONS, ("rt-detr",)),
    "detector-depth": Case(lambda at: detector(at) | {"depth": str(at / "dpt")}, DEEP, ("rt-detr", "dpt")),
    "geneval-hf": Case(
        lambda at: {"kind": "geneval-hf", "detector": str(at / "geneval/detector"), "clip": str(at / "geneval/clip")},
        TAGS,
        ("geneval/detector", "geneval/clip"),
        ("preprocessor_config.json",),
    ),
    "clip-score": Case(clip, ATTRIBUTES, ("clip",), ("tokenizer.json",)),
    "sci-score": Case(lambda at: clip(at) | {"kind": "sci-score"}, SCIENCE, ("clip",), ("tokenizer.json",)),
    "vlm": Case(
        lambda at: {"kind": "vlm", "checkpoint": str(at / "vlm")},
        SCIENCE,
        ("vlm",),
        ("preprocessor_config.json", "tokenizer_config.json"),
    ),
    "three-in-one": Case(
        lambda at: {"kind": "three-in-one", "attributes": blip(at), "relation": detector(at), "action": clip(at)},
        COMPLEX,
        ("blip", "rt-detr", "clip"),
    ),
}
every_judge = pytest.mark.parametrize("name", CASES)


def test_every_judge_with_a_checkpoint_has_a_case():
    own = {"shapes", "table", "family", "openai"}  # they have no checkpoint of their own, and test files of their own
    assert {case.settings(Path())["kind"] for case in CASES.values()} == set(JUDGES) - own


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with the small checkpoints of all judges."""
    import torch

    torch.set_num_threads(1)
    at = tmp_path_factory.mktemp("checkpoints")
    write_tiny_blip(at / "blip")
    write_tiny_clip(at / "clip")
    write_tiny_detector(at)
    write_tiny_geneval(at / "geneval")
    write_tiny_vlm(at / "vlm")
    texts = {text for case in CASES.values() for _, text in case.prompts}
    rows = [{"prompt_id": text, "prompt": text, "phrases": noun_phrases(text), "made_by": "rules"} for text in sorted(texts)]
    manifests.write(at / "phrases.parquet", "phrases", rows, stage="stages.phrases")
    return at


def on_cpu(settings: dict) -> dict:
    """Return a judge's settings, and those of judges within it, with the CPU as device."""
    nested = {key: on_cpu(value) if isinstance(value, dict) else value for key, value in settings.items()}
    return nested if settings["kind"] == "three-in-one" else nested | {"device": "cpu"}


def prompts_of(name: str) -> list[dict]:
    """Return rows of the prompt manifest for a judge."""
    rows = []
    for category, text in CASES[name].prompts:
        known = GENEVAL if name == "geneval-hf" else metadata(category, text)
        row = {"prompt_id": text, "prompt": text, "category": category, "source": "text", "split": "text"}
        rows.append(row | {"metadata": json.dumps(known) if known else None})
    return rows


def pictures(count: int) -> list[np.ndarray]:
    """Return images of 56 x 64 pixels with large spots."""
    spots = np.random.default_rng(3).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return [np.asarray(Image.fromarray(one).resize((56, 64), Image.Resampling.BICUBIC)) for one in spots]


def write_files(folder: Path, prompts: list[dict], files: list[bytes]) -> None:
    """Write manifests and a tar file with these files as images. Image i belongs to prompt i % n_prompts."""
    rows = []
    with (folder / "candidates.tar").open("wb") as file:
        for i, data in enumerate(files):
            offset, length = shards.append(file, f"c{i:02d}", data)
            row = {"candidate_id": f"c{i:02d}", "prompt_id": prompts[i % len(prompts)]["prompt_id"], "round": 0, "index": i}
            row |= {"seed": i, "shard": "candidates.tar", "offset": offset, "nbytes": length, "checkpoint": "hash"}
            rows.append(row | {"width": 56, "height": 64, "sampling": "{}"})
        shards.finish(file)
    manifests.write(folder / "candidates.parquet", "candidates", rows, stage="stages.generate")
    manifests.write(folder / "prompts.parquet", "prompts", prompts, stage="stages.prompts")


def configure(folder: Path, settings: dict) -> None:
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": "x", "judges": {"mine": on_cpu(settings)}}))


def opened(settings: dict, **more):
    kind = judge_kind(settings["kind"])
    return kind.open(kind.settings.model_validate(on_cpu(settings) | more))


def with_batch_size(settings: dict, size: int) -> dict:
    if settings["kind"] != "three-in-one":
        return settings | {"batch_size": size}
    return {key: value | {"batch_size": size} if isinstance(value, dict) else value for key, value in settings.items()}


@every_judge
def test_a_batch_is_judged_as_one_by_one(name, checkpoints):
    prompts = prompts_of(name)
    items = [Item(f"c{i}", prompts[i % 3], image) for i, image in enumerate(pictures(7))]
    settings = CASES[name].settings(checkpoints)
    together = opened(with_batch_size(settings, 7))(items)
    single = opened(with_batch_size(settings, 1))
    alone = [single([item])[0] for item in items]
    assert [verdict.matches for verdict in together] == [verdict.matches for verdict in alone]
    assert [verdict.reason for verdict in together] == [verdict.reason for verdict in alone]
    for one, other in zip(together, alone, strict=True):
        assert (one.score is None) == (name == "geneval-hf")
        assert one.score is None or one.score == pytest.approx(other.score, abs=1e-4)
    assert len({verdict.answer for verdict in together}) == 7, "images and prompts make a difference"


@every_judge
def test_a_killed_judge_continues_and_writes_equal_files(name, checkpoints, tmp_path, monkeypatch):
    settings = CASES[name].settings(checkpoints)
    write_files(tmp_path, prompts_of(name), [shards.png(image) for image in pictures(6)])
    configure(tmp_path, settings)
    place, constant = JUDGES[settings["kind"]].split(":")
    kind, judged, killed_at = resolve(JUDGES[settings["kind"]]), [], ["c04"]

    def opening(chosen):
        judge = kind.open(chosen)

        def look(items):
            if any(item.candidate_id in killed_at for item in items):
                raise KeyboardInterrupt
            judged.extend(item.candidate_id for item in items)
            return judge(items)

        return look

    monkeypatch.setattr(sys.modules[place], constant, dataclasses.replace(kind, open=opening, batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, monkeypatch, "mine")
    assert judged == ["c00", "c01", "c02", "c03"]
    assert not (tmp_path / "verdicts.parquet").exists()
    killed_at.clear()
    run(tmp_path, monkeypatch, "mine")
    assert len(judged) <= 6 + 2, "at most the batch that was being written is judged again"
    run(tmp_path, monkeypatch, "mine", out="whole.parquet")
    assert (tmp_path / "verdicts.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def file_of(image: np.ndarray, mode: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.fromarray(image)
    (picture.quantize(64) if mode == "P" else picture.convert(mode)).save(buffer, "PNG")
    return buffer.getvalue()


@every_judge
def test_images_of_other_modes_are_judged_in_their_colors(name, checkpoints, tmp_path, monkeypatch):
    files = [file_of(image, mode) for image, mode in zip(pictures(5), ("L", "RGBA", "P", "LA", "1"), strict=True)]
    write_files(tmp_path, prompts_of(name), files)
    settings = CASES[name].settings(checkpoints)
    configure(tmp_path, settings)
    found = run(tmp_path, monkeypatch, "mine")
    prompts = prompts_of(name)
    colors = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files]
    expected = opened(settings)([Item(f"c{i}", prompts[i % 3], image) for i, image in enumerate(colors)])
    assert [row["verdict"] for row in found] == [verdict.matches for verdict in expected]
    assert [row["score"] or 0 for row in found] == pytest.approx([verdict.score or 0 for verdict in expected], abs=1e-4)


@pytest.mark.parametrize("kept", [0, 4, 20, 30, 45, 60, 0.5, 0.9])
def test_a_truncated_image_is_named_whatever_is_left_of_it(kept, checkpoints, tmp_path, monkeypatch):
    files = [shards.png(image) for image in pictures(3)]
    size = int(kept * len(files[1])) if isinstance(kept, float) else kept
    broken = files[1][:size]
    write_files(tmp_path, prompts_of("clip-score"), [files[0], broken, files[2]])
    configure(tmp_path, CASES["clip-score"].settings(checkpoints))
    with pytest.raises(UserError, match=r"candidates.tar: the picture of candidate c01 is cut short or broken; delete"):
        run(tmp_path, monkeypatch, "mine")
    assert not (tmp_path / "verdicts.parquet").exists()


# Broken checkpoints

BROKEN = [
    (name, folder, file)
    for name, case in CASES.items()
    for folder in case.folders
    for file in ("config.json", "model.safetensors", *case.needed)
]


def linked(checkpoints: Path, folder: Path) -> Path:
    """Return a folder with links to the files of all checkpoints. A link may be removed, and `rewrite` replaces it."""
    return shutil.copytree(checkpoints, folder / "checkpoints", copy_function=os.link)


def rewrite(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def refused(name: str, at: Path, folder: str, *words: str) -> None:
    """Assert that the judge is refused with one message of one line, before drawing and when it is opened."""
    settings = CASES[name].settings(at)
    kind = judge_kind(settings["kind"])
    for attempt in (lambda: kind.files(kind.settings.model_validate(settings)), lambda: opened(settings)):
        with pytest.raises(UserError) as caught:
            attempt()
        message = str(caught.value)
        assert "\n" not in message
        assert all(word in message for word in (str(at / folder), *words)), message


@pytest.mark.parametrize(("name", "folder", "file"), BROKEN)
def test_a_missing_file_is_named_before_anything_is_drawn(name, folder, file, checkpoints, tmp_path):
    at = linked(checkpoints, tmp_path)
    (at / folder / file).unlink()
    word = {"model.safetensors": "no weights", "tokenizer.json": "no tokenizer"}.get(file, f"{file}: not found")
    refused(name, at, folder, word)


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, case in CASES.items() for folder in case.folders])
def test_a_checkpoint_of_another_model_is_refused(name, folder, checkpoints, tmp_path):
    at = linked(checkpoints, tmp_path)
    config = json.loads((at / folder / "config.json").read_text())
    rewrite(at / folder / "config.json", json.dumps(config | {"model_type": "gpt2"}).encode())
    if name == "vlm":  # any model is accepted that transformers can load for images and text, which only loading tells
        with pytest.raises(UserError, match=r"vlm: cannot be loaded as an image-text-to-text model"):
            opened(CASES[name].settings(at))
        return
    refused(name, at, folder, "model_type is 'gpt2'")


@pytest.mark.parametrize(("name", "folder"), [(name, folder) for name, case in CASES.items() for folder in case.folders])
def test_a_truncated_weight_file_is_refused(name, folder, checkpoints, tmp_path):
    at = linked(checkpoints, tmp_path)
    rewrite(at / folder / "model.safetensors", (at / folder / "model.safetensors").read_bytes()[:-1000])
    with pytest.raises(UserError) as caught:
        opened(CASES[name].settings(at))
    assert str(at / folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "few", "many"), [("sci-score", 384, 192, 1536), ("detector", 1024, 96, 480), ("vlm", 448, 96, 768)]
)
def test_memory_does_not_grow_with_the_number_of_images(name, side, few, many, checkpoints, tmp_path):
    exact = ("env", "MALLOC_MMAP_THRESHOLD_=65536", "MALLOC_ARENA_MAX=1")  # return freed memory at once
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    data, peaks = shards.png(pixels), []
    for count in (few, many):
        folder = tmp_path / str(count)
        folder.mkdir()
        write_files(folder, prompts_of(name), [data] * count)
        configure(folder, CASES[name].settings(checkpoints) | {"batch_size": 2})
        files = ("--prompts", folder / "prompts.parquet", "--candidates", folder / "candidates.parquet")
        command = (*exact, sys.executable, "-m", "stages.judge", "--config", folder / "config.yaml", "--judge", "mine", *files)
        _, _, peak = measured(*command, "--out", folder / "verdicts.parquet")
        peaks.append(peak)
        assert len(manifests.read_rows(folder / "verdicts.parquet", "verdicts")) == count
    kept = (many - few) * pixels.nbytes / 1e6
    print(name, peaks, kept)
    assert peaks[1] - peaks[0] < 0.3 * kept, "megabytes; keeping just the images would add `kept`"
