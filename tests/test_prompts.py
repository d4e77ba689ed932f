"""Prompt files as they occur in practice, with line ends of all kinds, blank lines, duplicates and errors."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from stages.common import manifests
from stages.common.errors import UserError
from stages.prompts import collect, prompt_id
from stages.suites.geneval import GenevalPrompts
from stages.suites.shapes import ShapesPrompts
from stages.suites.text import TextPrompts
from tests.helpers import BENCHMARKS, done, refused, stage, write_config

needs_benchmarks = pytest.mark.skipif(
    not BENCHMARKS.is_dir(), reason="the benchmarks' prompt files are not beside the repository"
)


def text(*files: Path, **more) -> TextPrompts:
    return TextPrompts(source="text", files=[str(path) for path in files], **more)


def test_line_ends_final_newline_blank_lines_and_duplicates(tmp_path):
    path = tmp_path / "color_train.txt"
    path.write_bytes("a red  dog\r\n\r\nA red dog.\r\na blue cat\r\nein grüner Hund".encode("utf-8-sig"))
    rows, dropped = collect(text(path), 0)
    assert [row["prompt"] for row in rows] == ["a red dog", "a blue cat", "ein grüner Hund"]
    assert {row["category"] for row in rows} == {"color"}
    assert dropped == {"duplicate": 1}


def test_validation_prompts_are_dropped_from_train(tmp_path):
    (tmp_path / "train.txt").write_text("a red dog\na blue cat")
    (tmp_path / "val.txt").write_text("A blue cat.\n")
    rows, dropped = collect(text(tmp_path / "train.txt", exclude=[str(tmp_path / "val.txt")]), 0)
    assert [row["prompt"] for row in rows] == ["a red dog"]
    assert dropped == {"also in an excluded file": 1}


def test_the_command_reports_what_it_dropped(tmp_path):
    (tmp_path / "color_train.txt").write_text("a red dog\na red dog\n")
    train = {"source": "text", "files": [str(tmp_path / "color_train.txt")], "count": None}
    result = done("prompts", "--config", write_config(tmp_path, prompts=train), "--set", "train",
                  "--out", tmp_path / "out.parquet")  # fmt: skip
    assert "dropped 1: duplicate" in result.stdout
    assert "1 prompts: color 1" in result.stdout


def test_shapes_prompts_are_spread_over_categories_and_change_with_the_seed():
    chosen = ShapesPrompts(source="shapes", count=60)
    rows, _ = collect(chosen, 0)
    assert set(Counter(row["category"] for row in rows).values()) == {10}
    assert rows == collect(chosen, 0)[0]
    assert {row["prompt_id"] for row in rows} != {row["prompt_id"] for row in collect(chosen, 1)[0]}


def test_the_id_ignores_case_space_and_full_stop():
    assert prompt_id("A  red dog.") == prompt_id("a red dog")
    assert prompt_id("a red dog") != prompt_id("a red hog")
    assert len(prompt_id("a")) == 16


def test_geneval_metadata(tmp_path):
    line = {"tag": "counting", "include": [{"class": "bench", "count": 2}], "prompt": "a photo of two benches"}
    (tmp_path / "m.jsonl").write_text(json.dumps(line) + "\n")
    rows, _ = collect(GenevalPrompts(source="geneval", files=[str(tmp_path / "m.jsonl")]), 0)
    assert rows[0]["category"] == "counting"
    assert json.loads(rows[0]["metadata"])["include"][0]["count"] == 2
    separated = json.dumps(line | {"prompt": "a photo of\u2028two benches"}, ensure_ascii=False)  # one line of JSON
    (tmp_path / "m.jsonl").write_text(separated + "\n", encoding="utf-8")
    assert len(collect(GenevalPrompts(source="geneval", files=[str(tmp_path / "m.jsonl")]), 0)[0]) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": 5}, "m.jsonl:2: prompt is 5, not a text"),
        ({"tag": None}, "m.jsonl:2: tag is None, not a text"),
        ({"include": None}, "m.jsonl: prompt 'a photo of a bus': include: "),
        (
            {"include": [{"class": "buss", "count": 1}]},
            "m.jsonl: prompt 'a photo of a bus': include.0.class: 'buss' is not one of",
        ),
    ],
)
def test_a_broken_line_of_geneval_metadata_is_named(changes, words, tmp_path):
    line = {"tag": "single_object", "include": [{"class": "bus", "count": 1}], "prompt": "a photo of a bus"}
    (tmp_path / "m.jsonl").write_text("\n" + json.dumps(line | changes) + "\n")
    with pytest.raises(UserError, match=re.escape(words)):
        collect(GenevalPrompts(source="geneval", files=[str(tmp_path / "m.jsonl")]), 0)


@needs_benchmarks
def test_t2i_compbench_as_published():
    folder = BENCHMARKS / "t2i_compbench"
    expected = {"color": 679, "shape": 685, "texture": 695}
    for name, unique in expected.items():
        rows, _ = collect(text(folder / f"{name}_train.txt"), 0)
        assert len(rows) <= unique  # case and final full stops are normalised too
        assert len(rows) >= unique - 10
    for name, shared in {"spatial": 2, "shape": 4}.items():
        _, dropped = collect(text(folder / f"{name}_train.txt", exclude=[str(folder / f"{name}_val.txt")]), 0)
        assert dropped["also in an excluded file"] == shared
    rows, _ = collect(text(*sorted(folder.glob("*_val.txt"))), 0)
    assert len({row["category"] for row in rows}) == 8
    assert not any("\r" in row["prompt"] for row in rows)


@needs_benchmarks
def test_geneval_as_published():
    rows, _ = collect(GenevalPrompts(source="geneval", files=[str(BENCHMARKS / "geneval" / "evaluation_metadata.jsonl")]), 0)
    counts = Counter(row["category"] for row in rows)
    assert sum(counts.values()) == 553
    assert counts["color_attr"] == counts["position"] == 100


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["no prompt"]),
        (b" \r\n\n", ["no prompt"]),
        ("a red dog\n".encode("utf-16"), ["UTF-16"]),
        ("a red dog\n".encode("utf-16-le"), ["UTF-16"]),
        (b"a red dog\n" + b"x" * 100_000, ["list.txt:2", "100000 characters"]),
        (b"caf\xe9\n", ["not UTF-8"]),
        (None, ["is a folder"]),
    ],
)
def test_a_broken_prompt_file_is_named(tmp_path, content, words):
    path = tmp_path / "list.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    config = write_config(tmp_path, prompts={"source": "text", "files": [str(path)]})
    result = stage("prompts", "--config", config, "--set", "train", "--out", tmp_path / "out.parquet")
    refused(result, str(path), *words)
    assert not (tmp_path / "out.parquet").exists()


def test_the_manifest_holds_what_was_dropped_and_nothing_of_the_place(tmp_path):
    outs = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        config = write_config(folder)
        done("prompts", "--config", config, "--set", "train", "--out", folder / "out.parquet")
        outs.append(folder / "out.parquet")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert manifests.facts(outs[0])["kind"] == "prompts"
