"""Science-T2I: the suite that reads its files, the judge sci-score, and the test of a judge on the benchmark's images."""

import io
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from stages.common import manifests
from stages.common.errors import UserError
from stages.judges import judge_kind
from stages.judges.base import Item
from stages.prompts import collect
from stages.suites.science_t2i import SciencePrompts, rows
from tests.helpers import done, refused, stage
from tests.test_judges import write_images
from tests.tiny_judges import write_tiny_clip

LAPTOP = {
    "implicit_prompt": "a laptop without electricity",
    "explicit_prompt": "a laptop with a dark  screen\n",
    "superficial_prompt": "a laptop with a bright screen",
    "category": "Physics",
    "law": "electricity",
    "scene_scoring": "1 point for a laptop",
    "real_scoring": "1 point for a dark screen",
}
APPLE = {
    "implicit_prompt": "an unripe apple",
    "explicit_prompt": "a green apple",
    "superficial_prompt": "a red apple",
    "category": "biology",
}


def png(seed: int, height: int = 64, width: int = 64) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_benchmark(path, *prompts: dict):
    """Write a Parquet file with the columns of the published ones, images included."""
    images = {
        name: [[{"bytes": png(2 * number + place), "path": None}] for number in range(len(prompts))]
        for place, name in enumerate(("explicit_image", "superficial_image"))
    }
    table = pa.Table.from_pylist([dict.fromkeys(LAPTOP) | prompt for prompt in prompts])
    pq.write_table(pa.table({**{name: table[name] for name in table.column_names}, **images}), path)
    return path


def suite(*files, **more) -> SciencePrompts:
    return SciencePrompts(source="science-t2i", files=[str(file) for file in files], **more)


# The suite


@pytest.mark.parametrize("name", ["test.parquet", "test.json", "test.jsonl"])
def test_prompts_of_a_file_come_with_all_three_prompts_and_their_strata(name, tmp_path):
    path = tmp_path / name
    if name == "test.parquet":
        write_benchmark(path, LAPTOP, APPLE)
    else:
        path.write_text(json.dumps([LAPTOP, APPLE]) if name == "test.json" else "\n".join(map(json.dumps, (LAPTOP, APPLE))))
    drawn = {way: rows(suite(path, drawn=way)) for way in ("implicit", "explicit", "superficial")}
    assert rows(suite(path)) == drawn["implicit"]
    assert [row["prompt"] for row in drawn["implicit"]] == ["a laptop without electricity", "an unripe apple"]
    assert [row["prompt"] for row in drawn["explicit"]] == ["a laptop with a dark screen", "a green apple"]
    assert [row["prompt"] for row in drawn["superficial"]] == ["a laptop with a bright screen", "a red apple"]
    for found in drawn.values():
        assert [row["category"] for row in found] == ["physics", "biology"]
        assert {row["difficulty"] for row in found} == {"hard"}
        laptop, apple = (json.loads(row["metadata"]) for row in found)
        assert laptop == {key: " ".join(value.split()) for key, value in LAPTOP.items() if key != "category"}
        assert apple == {key: value for key, value in APPLE.items() if key != "category"}


def test_columns_with_images_are_not_read(tmp_path):
    path = write_benchmark(tmp_path / "test.parquet", LAPTOP, APPLE)
    metadata, content = pq.read_metadata(path), bytearray(path.read_bytes())
    group = metadata.row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    for column in (column for column in columns if "image" in column.path_in_schema):
        start = column.dictionary_page_offset or column.data_page_offset
        content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    with pytest.raises((pa.ArrowException, OSError)):
        pq.read_table(path)
    assert [row["prompt"] for row in rows(suite(path))] == ["a laptop without electricity", "an unripe apple"]


def test_the_suite_makes_a_manifest_and_draws_equal_prompts_once(tmp_path):
    path = write_benchmark(tmp_path / "test.parquet", LAPTOP, APPLE, LAPTOP | {"explicit_prompt": "a laptop that is off"})
    kept, dropped = collect(suite(path), 0)
    assert (len(kept), dropped) == (2, {"duplicate": 1})
    assert len(collect(suite(path, drawn="explicit"), 0)[0]) == 3
    config = {"run": "x", "prompts": {"source": "science-t2i", "files": [str(path)], "drawn": "explicit"}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done("prompts", "--config", tmp_path / "config.yaml", "--set", "train", "--out", tmp_path / "out.parquet")
    found = manifests.read_rows(tmp_path / "out.parquet", "prompts")
    assert {(row["source"], row["split"], row["difficulty"]) for row in found} == {("science-t2i", "science-t2i", "hard")}
    assert Counter(row["category"] for row in found) == {"physics": 2, "biology": 1}


def without(name: str) -> dict:
    return {key: value for key, value in LAPTOP.items() if key != name}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.parquet", None, "absent.parquet: no such file; fetch the files of Science-T2I and set files"),
        ("absent.jsonl", None, "absent.jsonl: cannot be read"),
        ("test.parquet", b"no table", r"test.parquet: not a readable Parquet file \([^\n]*\); fetch it again"),
        ("test.parquet", [without("superficial_prompt")], "test.parquet: the column superficial_prompt is missing; its col"),
        ("test.parquet", [LAPTOP, LAPTOP | {"category": None}], "test.parquet: row 2 has no text in the column category"),
        ("test.parquet", [LAPTOP | {"explicit_prompt": 7}], "test.parquet: row 1 has no text in the column explicit_prompt"),
        ("test.parquet", [], "test.parquet: (holds no prompt|the column)"),
        ("test.jsonl", json.dumps(without("category")).encode(), "test.jsonl: line 1 has no text in the column category"),
        ("test.jsonl", json.dumps(LAPTOP).encode() + b"\n\n{", "test.jsonl: line 3 is not JSON"),
        ("test.jsonl", b"7", "test.jsonl: line 1 is not an object"),
        ("test.json", b"[{", "test.json: the file is not JSON"),
        ("test.json", b"[]", "test.json: holds no prompt"),
        ("test.json", json.dumps([LAPTOP, 3]).encode(), "test.json: object 2 is not an object"),
        ("test.json", json.dumps([LAPTOP | {"implicit_prompt": "x" * 5000}]).encode(), "object 1 has 5000 characters in"),
        ("test.json", "[]".encode("utf-16"), "test.json: not UTF-8"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_the_place(name, content, words, tmp_path):
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), tmp_path / name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        rows(suite(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path):
    path = write_benchmark(tmp_path / "test.parquet", LAPTOP, APPLE)
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"test.parquet: not a readable Parquet file \([^\n]*\); fetch it again"):
            rows(suite(path))


# The judge


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def items_of(count: int, height: int = 64, width: int = 64) -> list[Item]:
    texts = ["an unripe apple", "a laptop without electricity", "ice in the sun"]
    found = []
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        metadata = json.dumps({"implicit_prompt": texts[number % 3]})
        prompt = {"prompt": "what was drawn", "category": "physics", "metadata": metadata}
        found.append(Item(f"c{number}", prompt, pixels))
    return found


def opened(clip, **settings):
    kind = judge_kind("sci-score")
    return kind.open(kind.settings(kind="sci-score", checkpoint=str(clip), device="cpu", **settings))


def test_sci_score_is_clips_own_logit_for_the_implicit_prompt(clip):
    import torch
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    items = [*items_of(4), *items_of(2, 96, 96), *items_of(2, 64, 100), *items_of(2, 384, 96)]
    verdicts = opened(clip)(items)
    for item, verdict in zip(items, verdicts, strict=True):
        words = tokenizer([json.loads(item.prompt["metadata"])["implicit_prompt"]], return_tensors="pt")
        with torch.inference_mode():
            seen = processor(Image.fromarray(item.image), return_tensors="pt")
            logit = float(model(**words, **seen).logits_per_image)
        assert verdict.answer.startswith("SciScore ")
        assert float(verdict.answer.split()[-1]) == pytest.approx(logit, abs=2e-3)
        assert verdict.score == pytest.approx(max(0.0, logit) / 100, abs=2e-5)
        assert verdict.matches is None
    assert len({verdict.answer for verdict in verdicts}) == len(verdicts)
    assert max(verdict.score for verdict in verdicts) > 0


def test_the_threshold_and_the_batch_change_no_score(clip):
    items = items_of(7)
    together, alone = opened(clip, batch_size=7, threshold=0.01)(items), opened(clip, batch_size=1)(items)
    assert [verdict.score for verdict in together] == pytest.approx([verdict.score for verdict in alone], abs=1e-6)
    assert [verdict.matches for verdict in together] == [verdict.score >= 0.01 for verdict in together]


def test_a_prompt_of_another_suite_is_its_own_implicit_prompt(clip):
    (item, *_) = items_of(1)
    implicit = json.loads(item.prompt["metadata"])["implicit_prompt"]
    same = Item("c", {"prompt": implicit, "metadata": None}, item.image)
    other = Item("c", {"prompt": "what was drawn", "metadata": None}, item.image)
    first, second, third = opened(clip)([item, same, other])
    assert first == second
    assert first.answer != third.answer


def test_a_long_prompt_is_cut_after_77_tokens(clip):
    (item, *_) = items_of(1)
    long, longer = ("a" * 75 + rest for rest in ("", " and more"))  # 75 letters with both ends are 77 tokens
    verdicts = opened(clip)([Item("c", {"prompt": text, "metadata": None}, item.image) for text in (long, longer)])
    assert verdicts[1].answer != opened(clip)([item])[0].answer
    assert float(verdicts[0].answer.split()[-1]) != 0
    short = opened(clip)([Item("c", {"prompt": "b " * 200, "metadata": None}, item.image),
                          Item("c", {"prompt": "b " * 75, "metadata": None}, item.image)])  # fmt: skip
    assert short[0] == short[1]


def test_an_image_is_scored_through_the_stages_against_the_implicit_prompt(clip, tmp_path):
    path = write_benchmark(tmp_path / "test.parquet", LAPTOP, APPLE)
    scores = {}
    for drawn in ("implicit", "explicit"):
        folder = tmp_path / drawn
        folder.mkdir()
        judge = {"kind": "sci-score", "checkpoint": str(clip), "device": "cpu"}
        prompts = {"source": "science-t2i", "files": [str(path)], "drawn": drawn}
        config = {"run": "x", "prompts": prompts, "judges": {"science": judge}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        done("prompts", "--config", folder / "config.yaml", "--set", "train", "--out", folder / "prompts.parquet")
        images = np.stack([item.image for item in items_of(4)])
        write_images(folder, manifests.read_rows(folder / "prompts.parquet", "prompts"), images)
        files = ("--prompts", folder / "prompts.parquet", "--candidates", folder / "candidates.parquet")
        out = folder / "verdicts.parquet"
        done("judge", "--config", folder / "config.yaml", "--judge", "science", *files, "--out", out)
        scores[drawn] = [(row["score"], row["answer"]) for row in manifests.read_rows(out, "verdicts")]
    assert scores["implicit"] == scores["explicit"]
    assert len(set(scores["implicit"])) == 4


# Choosing between the benchmark's own images


def choice(folder, clip, *files):
    judge = {"kind": "sci-score", "checkpoint": str(clip), "device": "cpu"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"run": "x", "judges": {"science": judge}}))
    return stage("tools.science_choice", "--config", folder / "config.yaml", "--judge", "science", "--files", *files)


def test_a_judge_is_tested_on_the_benchmarks_images(clip, tmp_path):
    prompts = [(APPLE if number % 3 else LAPTOP) | {"law": "gravity" if number % 2 else "colour"} for number in range(20)]
    path = write_benchmark(tmp_path / "test.parquet", *prompts)
    judge, right = opened(clip), []
    for number, prompt in enumerate(prompts):
        pixels = [np.asarray(Image.open(io.BytesIO(png(2 * number + place)))) for place in range(2)]
        item = {"prompt": prompt["implicit_prompt"], "metadata": None}
        first, second = (float(one.answer.split()[-1]) for one in judge([Item("c", item, image) for image in pixels]))
        right.append(first > max(0.0, second))  # grades below 0 are 0
    result = choice(tmp_path, clip, path)
    assert result.returncode == 0, result.stderr
    assert f"overall: {100 * sum(right) / 20:.2f} % of 20 pairs right\n" in result.stdout
    physics = right[::3]
    assert f"category Physics: {100 * sum(physics) / 7:.2f} % of 7 pairs right\n" in result.stdout
    assert f"law gravity: {100 * sum(right[1::2]) / 10:.2f} % of 10 pairs right\n" in result.stdout
    assert 0 < sum(right) < 20


def test_the_test_of_a_judge_names_a_broken_file(clip, tmp_path):
    pq.write_table(pa.Table.from_pylist([LAPTOP]), tmp_path / "test.parquet")
    refused(choice(tmp_path, clip, tmp_path / "test.parquet"), "test.parquet", "the column explicit_image is missing")
    refused(choice(tmp_path, clip, tmp_path / "absent.parquet"), "absent.parquet", "not a readable Parquet file")
    table = pq.read_table(write_benchmark(tmp_path / "test.parquet", LAPTOP))
    broken = table.drop_columns(["explicit_image"]).append_column("explicit_image", [[[{"bytes": b"none", "path": None}]]])
    pq.write_table(broken, tmp_path / "test.parquet")
    refused(choice(tmp_path, clip, tmp_path / "test.parquet"), "test.parquet", "an image is missing or broken")
