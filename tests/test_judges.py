"""External judges: the kinds that are built in, and the stage that runs them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml

from stages import judge as stage
from stages import score
from stages.common import manifests, shards
from stages.common.config import load, validate
from stages.common.errors import UserError
from stages.judges import checkpoint, family, judge_kind, shapes
from stages.judges.base import Item, Verdict
from stages.judges.table import read_table
from stages.shapes.grammar import split_meanings
from stages.shapes.sampling import sample_questions
from stages.shapes.scenes import render

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "does this image show {prompt} ?"  # the question on which the tiny model was trained
TINY = {
    "kind": "family",
    "model": {"family": "janus", "checkpoint": str(ROOT / "models" / "tiny-janus"), "device": "cpu"},
    "score": {"question": QUESTION, "batch_size": 3},
}


def write_images(folder: Path, prompts: list[dict], images: np.ndarray) -> None:
    """Write a prompt manifest and a candidate manifest with its tar file. Image i belongs to prompt i % n_prompts."""
    rows = []
    with (folder / "candidates.tar").open("wb") as file:
        for i, image in enumerate(images):
            offset, length = shards.append(file, f"c{i:02d}", shards.png(image))
            row = {"candidate_id": f"c{i:02d}", "prompt_id": prompts[i % len(prompts)]["prompt_id"], "round": 0, "index": i}
            row |= {"seed": i, "shard": "candidates.tar", "offset": offset, "nbytes": length, "checkpoint": "hash"}
            rows.append(row | {"width": image.shape[1], "height": image.shape[0], "sampling": "{}"})
        shards.finish(file)
    manifests.write(folder / "candidates.parquet", "candidates", rows, stage="stages.generate")
    manifests.write(folder / "prompts.parquet", "prompts", prompts, stage="stages.prompts")


@pytest.fixture
def world(tmp_path):
    """A folder with twelve images of the shapes world, each for its own prompt, and whether each image matches."""
    generator = np.random.default_rng(0)
    scenes = [sample_questions(generator, "validation", 1)[0] for _ in range(12)]
    prompts = [
        {"prompt_id": f"p{i:02d}", "prompt": scene.meaning.prompt(), "category": scene.meaning.category, "source": "shapes",
         "split": "validation", "metadata": scene.meaning.to_json()}
        for i, scene in enumerate(scenes)
    ]  # fmt: skip
    write_images(tmp_path, prompts, render(np.stack([scene.grid for scene in scenes])))
    return tmp_path, [scene.label for scene in scenes]


def configure(folder: Path, **judges: dict) -> None:
    config = {"run": "judges", "model": TINY["model"], "score": TINY["score"], "judges": judges}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def run(folder: Path, monkeypatch, name: str, *more: str, out: str = "verdicts.parquet", of=stage) -> list[dict]:
    """Run stages.judge or stages.score on the folder's images in this process, and return the rows."""
    named = ["--judge", name] if of is stage else []
    options = {"config": "config.yaml", "prompts": "prompts.parquet", "candidates": "candidates.parquet", "out": out}
    files = [part for option, file in options.items() for part in (f"--{option}", str(folder / file))]
    monkeypatch.setattr("sys.argv", ["stage", *named, *files, *more])
    of.main()
    return manifests.read_rows(folder / out, "verdicts" if of is stage else "scores")


# The table


def table(folder: Path, rows: list[dict], suffix: str = ".csv", name: str = "people") -> Path:
    path = folder / f"{name}{suffix}"
    frame = pandas.DataFrame(rows)
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([{"verdict": True}, {"verdict": False}, {"verdict": None}], [Verdict(True), Verdict(False), Verdict(None)]),
        ([{"verdict": 1}, {"verdict": 0}], [Verdict(True), Verdict(False)]),
        ([{"verdict": 1.0}, {"verdict": None}], [Verdict(True), Verdict(None)]),
        ([{"verdict": " Yes"}, {"verdict": "NO"}, {"verdict": "NA"}], [Verdict(True), Verdict(False), Verdict(None)]),
        ([{"score": 0.6}, {"score": 0.5999}, {"score": None}], [Verdict(True, 0.6), Verdict(False, 0.5999), Verdict(None)]),
        (
            [{"verdict": 0, "reason": "color"}, {"verdict": 1, "reason": None}, {"verdict": 0, "reason": " "}],
            [Verdict(False, reason="color"), Verdict(True), Verdict(False)],
        ),
        ([{"verdict": "no", "score": 0.9}, {"verdict": None, "score": 0.9}], [Verdict(False, 0.9), Verdict(True, 0.9)]),
    ],
)
def test_a_table_is_read_word_by_word(cells, expected, suffix, tmp_path):
    path = table(tmp_path, [{"candidate_id": f"{i:016d}"} | row for i, row in enumerate(cells)], suffix)
    assert read_table(path, 0.6) == {f"{i:016d}": verdict for i, verdict in enumerate(expected)}


def test_a_nullable_parquet_column_is_read(tmp_path):
    rows = pandas.DataFrame({"candidate_id": ["a", "b"], "verdict": pandas.array([1, None], dtype="Int64")})
    rows.to_parquet(tmp_path / "people.parquet")
    assert read_table(tmp_path / "people.parquet", 0.5) == {"a": Verdict(True), "b": Verdict(None)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "people.csv: not a readable"),
        ("candidate_id,verdict\na,1\nb,1,2,3\nc,0\n", "people.csv: (not a readable|row)"),
        ("image,verdict\na,1\n", "people.csv: needs the columns candidate_id and verdict or score, but has image, verdict"),
        ("candidate_id,label\na,1\n", "people.csv: needs the columns"),
        ("candidate_id,verdict\na,maybe\n", "people.csv: candidate a: verdict 'maybe'"),
        ("candidate_id,score\na,1.5\n", "people.csv: candidate a: score '1.5'"),
        ("candidate_id,score\na,high\n", "people.csv: candidate a: score 'high'"),
        ("candidate_id,verdict\na,1\n,1\n", "people.csv: row 2 has no candidate_id"),
        ("candidate_id,verdict\na,1\na,0\n", "people.csv: candidate a has two different verdicts"),
    ],
)
def test_a_broken_table_is_named_with_its_row(text, words, tmp_path):
    (tmp_path / "people.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_table(tmp_path / "people.csv", 0.5)


def test_files_that_are_no_tables_are_named(tmp_path):
    (tmp_path / "people.parquet").write_text("candidate_id,verdict\na,1\n")
    with pytest.raises(UserError, match=r"people.parquet: not a readable CSV or Parquet table \([^\n]*\); write it again"):
        read_table(tmp_path / "people.parquet", 0.5)
    with pytest.raises(UserError, match=r"absent.csv: no such file"):
        read_table(tmp_path / "absent.csv", 0.5)


def test_a_trailing_comma_does_not_shift_the_columns(tmp_path):
    (tmp_path / "people.csv").write_text("candidate_id,verdict\na,1,\nb,0,\n")
    assert read_table(tmp_path / "people.csv", 0.5) == {"a": Verdict(True), "b": Verdict(False)}


def test_equal_rows_are_one_and_files_that_contradict_each_other_are_refused(tmp_path):
    kind = judge_kind("table")
    names = [str(table(tmp_path, [{"candidate_id": "a", "verdict": v}] * 2, name=n)) for n, v in [("one", 1), ("two", "yes")]]
    judge = kind.open(kind.settings(kind="table", files=names))
    assert judge([Item(name, {}, np.zeros(())) for name in "ab"]) == [Verdict(True), Verdict(None)]
    names.append(str(table(tmp_path, [{"candidate_id": "a", "verdict": 0}], name="three")))
    with pytest.raises(UserError, match=r"three.csv: candidate a has another verdict in an earlier file"):
        kind.open(kind.settings(kind="table", files=names))


def test_the_stage_takes_verdicts_from_a_table_and_counts_missing_rows_as_unreadable(world, monkeypatch, capsys):
    folder, _ = world
    path = table(folder, [{"candidate_id": f"c{i:02d}", "score": i / 10} for i in range(10)])
    configure(folder, people={"kind": "table", "files": [str(path)], "threshold": 0.8})
    rows = run(folder, monkeypatch, "people")
    assert [row["verdict"] for row in rows] == [False] * 8 + [True] * 2 + [None] * 2
    assert [row["score"] for row in rows] == [i / 10 for i in range(10)] + [None] * 2
    assert {row["judge"] for row in rows} == {"people"}
    assert "people: 12 of 12 images judged: 2 match, 8 do not, 2 without a verdict" in capsys.readouterr().out


# The oracle


def test_the_oracle_knows_what_matches(world, monkeypatch):
    folder, labels = world
    configure(folder)
    assert [row["verdict"] for row in run(folder, monkeypatch, "shapes")] == labels


@pytest.mark.parametrize("metadata", [None, "{}", json.dumps({"tag": "colors", "include": []}), "[", "[1]"])
def test_the_oracle_refuses_prompts_of_another_world(metadata):
    judge = shapes.open_oracle(shapes.ShapesJudge(kind="shapes"))
    prompt = {"prompt": "a red bench", "metadata": metadata}
    with pytest.raises(UserError, match=r"prompt 'a red bench': .* needs prompts of source shapes"):
        judge([Item("c0", prompt, np.zeros((64, 64, 3), np.uint8))])


def test_the_oracle_refuses_images_of_another_world(world, monkeypatch):
    folder, _ = world
    configure(folder)
    write_images(folder, manifests.read_rows(folder / "prompts.parquet", "prompts"), np.zeros((3, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match=r"candidate c00 on: .* needs images of that world"):
        run(folder, monkeypatch, "shapes")
    assert not (folder / "verdicts.parquet").exists()


def test_an_empty_picture_is_wrong_and_not_unreadable():
    judge = shapes.open_oracle(shapes.ShapesJudge(kind="shapes"))
    meaning = split_meanings("color", "validation")[0]
    empty = render(np.zeros((1, 4, 4), dtype=int))[0]
    assert judge([Item("c0", {"prompt": meaning.prompt(), "metadata": meaning.to_json()}, empty)]) == [
        Verdict(False, reason="number")
    ]


# A model family


def test_a_family_as_judge_says_of_stored_images_what_it_says_as_the_model(world, monkeypatch):
    folder, labels = world
    configure(folder, tiny=TINY)
    rows = run(folder, monkeypatch, "tiny")
    scores = run(folder, monkeypatch, "", out="scores.parquet", of=score)
    assert [row["verdict"] for row in rows] == [row["verdict"] for row in scores]
    assert [row["score"] for row in rows] == pytest.approx([row["p_yes"] for row in scores])
    assert sum(row["verdict"] == label for row, label in zip(rows, labels, strict=True)) >= 9
    assert {row["judge"] for row in rows} == {"tiny"}


def test_the_verdict_of_a_family_has_its_threshold_from_its_settings_only(world, monkeypatch):
    folder, _ = world
    score_settings = TINY["score"] | {"verdict_threshold": 1.0}
    configure(folder, tiny=TINY, strict=TINY | {"score": score_settings})
    loose, strict = (run(folder, monkeypatch, name) for name in ("tiny", "strict"))
    assert [row["score"] for row in loose] == pytest.approx([row["score"] for row in strict])
    assert True in {row["verdict"] for row in loose}
    assert {row["verdict"] for row in strict} == {False}


def test_what_a_familys_verdicts_depend_on_is_not_where_it_runs(world):
    folder, _ = world
    elsewhere = TINY | {"model": TINY["model"] | {"device": "auto", "workers": 2}, "score": {"question": QUESTION}}
    greedy = TINY | {"score": {"question": QUESTION, "mode": "answer"}}
    configure(folder, tiny=TINY, elsewhere=elsewhere, greedy=greedy)
    config = load(folder / "config.yaml")
    assert config.judge("tiny").outcome() == config.judge("elsewhere").outcome()
    assert config.judge("tiny").outcome() != config.judge("greedy").outcome()
    kind = judge_kind("family")
    assert kind.uses(config.judge("tiny")) == ["FAMILIES[janus]"]
    files = {Path(file).name for file in kind.files(config.judge("tiny"))}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "processor_config.json"}
    assert [kind.runs_on(config.judge(name)).workers for name in ("tiny", "elsewhere")] == [None, 2]


@pytest.mark.parametrize("kind", ["clip-score", "vlm", "geneval-hf"])
def test_a_device_of_a_judge_that_is_none_is_refused(kind):
    fields = {"kind": kind, "checkpoint": "clip", "device": "gpu"}
    fields |= {"detector": fields.pop("checkpoint"), "clip": "clip"} if kind == "geneval-hf" else {}
    with pytest.raises(UserError, match=r"judges\.mine\.device.*cuda"):
        validate({"run": "judges", "model": TINY["model"], "judges": {"mine": fields}})


def test_a_judge_that_asks_for_a_gpu_where_there_is_none_is_named(world, monkeypatch):
    import torch

    folder, _ = world
    configure(folder, tiny=TINY | {"model": TINY["model"] | {"device": "cuda:1"}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"judges\.tiny: device: cuda:1, but torch sees no GPU .* or set it to cpu"):
        run(folder, monkeypatch, "tiny")
    with pytest.raises(UserError, match="device: cuda, but torch sees no GPU"):
        checkpoint.device_of("cuda")


@pytest.mark.parametrize(
    ("when", "words"),
    [("loading", "do not fit into the free memory of the GPU"), ("judging", "while judging .* lower its batch_size")],
)
def test_a_gpu_without_enough_memory_ends_with_one_message(when, words, world, monkeypatch):
    import torch

    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    folder, _ = world
    configure(folder, tiny=TINY)
    opens = full if when == "loading" else lambda settings: full
    monkeypatch.setattr(family, "FAMILY", dataclasses.replace(family.FAMILY, open=opens))
    with pytest.raises(UserError, match=rf"judges\.tiny: .*{words}"):
        run(folder, monkeypatch, "tiny")


def test_kept_batches_of_a_judge_in_another_precision_are_not_used(world, monkeypatch):
    folder, _ = world
    configure(folder, tiny=TINY)
    keys = []

    def ended(out, key, *_, **__):
        keys.append(key)
        raise KeyboardInterrupt

    monkeypatch.setattr(stage, "kept_batches", ended)
    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(stage, "resolved", lambda place, _, dtype=dtype: place.model_copy(update={"dtype": dtype}))
        with pytest.raises(KeyboardInterrupt):
            run(folder, monkeypatch, "tiny")
    assert keys[0] != keys[1]


# The stage


def test_only_images_of_the_categories_are_judged(world, monkeypatch, capsys):
    folder, labels = world
    configure(folder)
    categories = [row["category"] for row in manifests.read_rows(folder / "prompts.parquet", "prompts")]
    wanted = sorted(set(categories))[:2]
    rows = run(folder, monkeypatch, "shapes", "--categories", *wanted, "3d_spatial")
    expected = [(f"p{i:02d}", label) for i, label in enumerate(labels) if categories[i] in wanted]
    assert 0 < len(expected) < 12
    assert [(row["prompt_id"], row["verdict"]) for row in rows] == expected
    assert "no prompt is of category 3d_spatial" in capsys.readouterr().out
    assert run(folder, monkeypatch, "shapes", "--categories", "3d_spatial") == []


def test_a_killed_judge_continues_and_writes_equal_files(world, monkeypatch):
    folder, _ = world
    configure(folder)
    judged: list[str] = []
    killed_at: list[str] = ["c08"]

    def open_counting(settings):
        judge = shapes.open_oracle(settings)

        def look(items):
            if any(item.candidate_id in killed_at for item in items):
                raise KeyboardInterrupt
            judged.extend(item.candidate_id for item in items)
            return judge(items)

        return look

    monkeypatch.setattr(shapes, "SHAPES", dataclasses.replace(shapes.SHAPES, open=open_counting, batch_size=2))
    with pytest.raises(KeyboardInterrupt):
        run(folder, monkeypatch, "shapes")
    assert judged == [f"c{i:02d}" for i in range(8)]
    assert not (folder / "verdicts.parquet").exists()
    killed_at.clear()
    run(folder, monkeypatch, "shapes")
    assert len(set(judged)) == 12
    assert len(judged) <= 12 + 2, "at most the batch that was being written is judged again"
    run(folder, monkeypatch, "shapes", out="whole.parquet")
    assert (folder / "verdicts.parquet").read_bytes() == (folder / "whole.parquet").read_bytes()
    assert not list(folder.glob(".*.partial"))


def test_kept_batches_of_other_verdicts_are_not_used(world, monkeypatch):
    folder, _ = world
    path = table(folder, [{"candidate_id": f"c{i:02d}", "verdict": 1} for i in range(12)])
    configure(folder, people={"kind": "table", "files": [str(path)]})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(manifests, "write", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(folder, monkeypatch, "people")
    table(folder, [{"candidate_id": f"c{i:02d}", "verdict": 0} for i in range(12)])
    assert {row["verdict"] for row in run(folder, monkeypatch, "people")} == {False}


def test_a_manifest_says_what_the_verdicts_depend_on_and_not_where_it_was(world, monkeypatch, tmp_path_factory):
    folder, _ = world
    other = tmp_path_factory.mktemp("other")
    rows = [{"candidate_id": f"c{i:02d}", "verdict": 1} for i in range(12)]
    for place in (folder, other):
        configure(place, people={"kind": "table", "files": [str(table(place, rows))]})
    for name in ("prompts.parquet", "candidates.parquet", "candidates.tar"):
        (other / name).write_bytes((folder / name).read_bytes())
    for place in (folder, other):
        run(place, monkeypatch, "people")
    assert (folder / "verdicts.parquet").read_bytes() == (other / "verdicts.parquet").read_bytes()
    facts = manifests.facts(folder / "verdicts.parquet")
    assert facts["settings"]["settings"] == {"kind": "table", "threshold": 0.5}
    assert str(folder) not in json.dumps(facts)


@pytest.mark.parametrize(("name", "words"), [("nobody", "no judge 'nobody'"), ("table", "needs settings")])
def test_a_judge_that_is_not_there_is_named(name, words, world, monkeypatch):
    folder, _ = world
    configure(folder)
    with pytest.raises(UserError, match=f"--judge {name}: .*{words}"):
        run(folder, monkeypatch, name)


@pytest.mark.parametrize("name", ["judge", "evaluate", "report", "contact_sheet", "judge_report", "tools.metrics"])
def test_torch_is_not_imported_before_it_is_needed(name):
    heavy = ("torch", "transformers", "pandas", "snakemake")
    script = f"import sys, stages.{name}; print([name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
