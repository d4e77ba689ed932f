"""The result tables: their numbers are those of the metrics, the paper's stand beside them, and no name breaks a format."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from stages.common import manifests
from stages.common.config import validate
from stages.tables import understanding
from stages.tools import recipe
from stages.tools.paper import read_paper
from stages.tools.result_table import LATEX, MARKDOWN, escaped, side_by_side, tabular
from stages.tools.result_table import Group as Columns
from tests.helpers import ROOT, done, refused, stage

PAPER = ROOT / "stages/paper/results.csv"
COMPBENCH = {"prompts": {"source": "text", "files": ["color_val.txt"]}, "images_per_prompt": 10}
FIELDS = {
    "run": "mine",
    "seed": 7,
    "model": {"checkpoint": "checkpoints/Janus-Pro-7B"},
    "benchmarks": {
        "t2i-compbench": COMPBENCH
        | {"judge": "attributes", "scorers": {"complex": "qwen"}}
        | {"second_scorers": {"complex": "attributes"}},
        "unjudged": {"prompts": {"source": "shapes", "count": 12}},
    },
    "judges": {
        "attributes": {"kind": "blip-vqa", "checkpoint": "models/blip_vqa", "phrases": "phrases.parquet"},
        "qwen": {"kind": "vlm", "checkpoint": "models/Qwen2.5-VL-7B", "batch_size": 3},
    },
    "understanding": {"scenes": {"kind": "shapes", "count": 40}},
    "generate": {"sampling": {"guidance_scale": 5.0, "temperature": 0.9}},
    "arms": {"sft": {"objective": "sft"}, "sft-slow": {"objective": "sft"}},
    "report": {"paper_model": "Janus-Pro-7B"},
}
CATEGORIES = ("color", "complex")


def metric(arm: str, benchmark: str, category: str, name: str, value: float | None, n: int = 20) -> dict:
    low, high = (None, None) if value is None else (value - 2, value + 2)
    given = {"arm": arm, "benchmark": benchmark, "category": category, "metric": name, "value": value, "ci_low": low}
    return given | {"ci_high": high, "run": "mine", "prompts": 5, "numerator": 0.0, "denominator": n, "seed": 7}


def written(folder: Path, fields: dict | None = None, benchmarks=("t2i-compbench", "unjudged", "scenes")) -> Path:
    """Write the tables of metrics that are made up, and return their folder."""
    fields = fields or FIELDS
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(fields))
    files = []
    for place, arm in enumerate(["base", *fields["arms"]]):
        rows = {
            "t2i-compbench": [
                metric(arm, "t2i-compbench", category, name, value + place, 0 if name == "und_paper" else 20)
                for category, value in (("overall", 40), ("color", 30), ("complex", 50))
                for name in ("gen", "und_paper", "non", "weak_generation")
            ]
            + [metric(arm, "t2i-compbench", "complex", "gen_second", 44.0 + place)],
            "unjudged": [metric(arm, "unjudged", category, "non", 60.0 + place) for category in ("overall", "color")],
            "scenes": [metric(arm, "scenes", "overall", f"metric_{i}", 70.0 + i + place) for i in range(8)],
        }
        for name in benchmarks:
            files.append(folder / f"{arm}-{name}.parquet")
            manifests.write(files[-1], "metrics", rows[name], stage="stages.evaluate")
    prompts = folder / "t2i-compbench.parquet"
    rows = [
        {"prompt_id": category, "prompt": "x", "category": category, "source": "text", "split": "text", "difficulty": stratum}
        for category, stratum in (("color", None), ("complex", "medium"))
    ]
    manifests.write(prompts, "prompts", rows, stage="stages.prompts")
    done("tables", "--config", config, "--metrics", *files, "--prompts", prompts, "--paper", PAPER, "--out", folder / "tables")
    return folder / "tables"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tables"))


def test_the_papers_numbers_stand_below_those_of_the_same_row(tables):
    rows = rows_of(tables / "generation.csv")
    sources = [(row["model"], row["source"].split(" v2")[0]) for row in rows]
    assert sources == [
        ("base", "mine"),
        ("base", "arXiv 2507.16663"),
        ("sft", "mine"),
        ("sft", "arXiv 2507.16663"),
        ("sft-slow", "mine"),
    ]
    ours, paper = rows[2], rows[3]
    assert [ours[f"t2i-compbench gen{end}"] for end in ("", "_ci_low", "_ci_high", "_n")] == ["41.0", "39.0", "43.0", "20"]
    assert [paper[f"t2i-compbench {name}"] for name in ("gen", "und_paper", "non")] == ["43.29", "58.39", "16.98"]
    assert paper["t2i-compbench gen_n"] == paper["unjudged non"] == ""
    assert "| sft, paper | 43.29 | 58.39 | 16.98 | - |" in (tables / "generation.md").read_text()
    assert "sft, paper & 43.29 & 58.39 & 16.98 & -- &" in (tables / "generation.tex").read_text()


def test_a_second_scorer_has_a_column_where_it_measures(tables):
    rows = rows_of(tables / "by_subtask.csv")
    found = {row["category"]: row.get("gen_second") for row in rows if row["model"] == "sft" and row["source"] == "mine"}
    assert found["complex"] == "45.0"
    assert found["color"] == ""
    text = (tables / "by_subtask.md").read_text()
    assert "complex (medium) second Gen." in text
    assert "color second Gen." not in text
    assert "second Gen. of complex by attributes (" in text
    assert "second Gen." not in (tables / "generation.md").read_text().split("\n")[2]


def test_without_the_setting_or_for_another_benchmark_the_paper_says_nothing(tmp_path):
    other = FIELDS | {"benchmarks": {"unjudged": FIELDS["benchmarks"]["unjudged"]}}
    for number, (fields, benchmarks) in enumerate([(FIELDS | {"report": {}}, ("t2i-compbench",)), (other, ("unjudged",))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = written(folder, fields, benchmarks)
        assert {row["source"] for row in rows_of(found / "generation.csv")} == {"mine"}
        assert "paper" not in (found / "generation.md").read_text().lower().replace("papers", "")
        assert not (found / "understanding.csv").exists()


def test_a_benchmark_without_an_external_judge_has_non_only(tables):
    base = rows_of(tables / "generation.csv")[0]
    assert (base["unjudged gen"], base["unjudged und_paper"], base["unjudged non"]) == ("", "", "60.0")
    text = (tables / "generation.md").read_text()
    assert re.search(r"\| base \|.*\| - \| - \| 60.0 \(58.0 to 62.0\), n 20 \|", text)
    assert "unjudged: 4 images for each prompt of shapes (count 12); no external judge" in text


def test_subtasks_have_their_difficulty_and_every_model(tables):
    rows = rows_of(tables / "by_subtask.csv")
    ours = [row for row in rows if row["benchmark"] == "t2i-compbench"]
    assert {(row["category"], row["difficulty"]) for row in ours} == {("color", ""), ("complex", "medium")}
    assert [row["gen"] for row in ours if row["category"] == "complex"] == ["50.0", "51.0", "52.0"]
    assert r"\multicolumn{4}{c}{complex (medium)}" in (tables / "by_subtask.tex").read_text()


def test_understanding_has_a_column_for_each_metric(tables):
    rows = rows_of(tables / "understanding.csv")
    assert [row["model"] for row in rows] == ["base", "sft", "sft-slow"]
    assert [rows[1][f"scenes metric_{i}"] for i in range(8)] == [f"{71.0 + i}" for i in range(8)]


def test_the_papers_understanding_benchmarks_are_known_by_name(tmp_path):
    fields = FIELDS | {"understanding": {"POPE": {"kind": "shapes"}}}
    config = validate(fields)
    rows = [metric(arm, "POPE", "overall", name, 80.0) for arm in ("base", "sft") for name in ("accuracy", "f1")]
    (table,) = understanding(config, rows, read_paper(PAPER, "Janus-Pro-7B"))
    shown = {line.label(): line.cells for line in table.lines}
    assert shown["base, paper"]["POPE", "accuracy"].value == 89.04
    assert shown["sft, paper"]["POPE", "accuracy"].value == 88.45
    assert ("POPE", "f1") not in shown["sft, paper"]
    assert any("without its metric" in note for note in table.notes)


def test_below_each_table_stands_how_images_were_drawn_and_judged(tables):
    for name in ("generation", "by_subtask"):
        texts = [(tables / f"{name}.md").read_text().replace("\\", ""), rows_of(tables / f"{name}.csv")[0]["recipe"]]
        for text in texts:
            for fact in (
                "checkpoints/Janus-Pro-7B", "guidance_scale 5.0, temperature 0.9", "seed 7", "10 images for each prompt",
                "judge attributes (kind blip-vqa", "checkpoint models/blip_vqa", "Gen. of complex by qwen (kind vlm",
                "checkpoint models/Qwen2.5-VL-7B", "yes from p(yes) 0.5",
            ):  # fmt: skip
                assert fact in text, (name, fact)
            assert "batch_size" not in text


def test_the_recipe_names_a_judge_within_a_judge():
    parts = {
        "attributes": {"kind": "blip-vqa", "checkpoint": "blip", "phrases": "p"},
        "relation": {"kind": "detector", "checkpoint": "dfine"},
        "action": {"kind": "clip-score", "checkpoint": "clip"},
    }
    judges = {"all": {"kind": "three-in-one"} | parts, "other": {"kind": "family", "model": {"checkpoint": "models/other"}}}
    config = validate(FIELDS | {"judges": FIELDS["judges"] | judges})
    text = recipe.judging(config, "all")
    assert "relation.checkpoint dfine" in text and "attributes.checkpoint blip" in text and "action.checkpoint clip" in text
    assert "model.family janus, model.checkpoint models/other" in recipe.judging(config, "other")


def test_the_recipe_says_which_scorers_are_not_the_benchmarks_own():
    relation = {"kind": "detector", "checkpoint": "dfine"}
    judges = {"boxes": relation, "boxes-upstream": relation | {"rules": "upstream"}}
    benchmarks = {"plain": {"prompts": {"source": "shapes"}, "judge": "shapes"}}
    benchmarks["boxed"] = benchmarks["plain"] | {
        "scorers": {"spatial": "boxes"},
        "second_scorers": {"spatial": "boxes-upstream"},
    }
    config = validate({"run": "x", "judges": judges, "benchmarks": benchmarks})
    assert "Not the benchmark's own scorer: boxes, boxes-upstream: a detector of transformers" in recipe.benchmark(
        config, "boxed"
    )
    assert "own scorer" not in recipe.benchmark(config, "plain")
    assert recipe.benchmark(config, "boxed") in recipe.whole(config)


AWKWARD = '50% of A_B & C: #1 ~x^2 {a|b} <c> $d \\e "f" *g* `h` [i]'


def test_awkward_names_stay_whole_in_markdown():
    text = escaped(AWKWARD, MARKDOWN)
    assert re.sub(r"\\(.)", r"\1", text) == AWKWARD
    assert not re.search(r"(?<!\\)[|*_`<>\[\]]", text)


def test_awkward_names_stay_whole_in_latex():
    text = escaped(AWKWARD, LATEX)
    assert not re.search(r"(?<!\\)[&%$#_]", text)
    plain = text.replace(r"\textbackslash{}", "\\").replace(r"\textasciitilde{}", "~").replace(r"\textasciicircum{}", "^")
    for name, sign in (("less", "<"), ("greater", ">"), ("bar", "|")):
        plain = plain.replace(rf"\text{name}{{}}", sign)
    assert re.sub(r"\\([&%$#_{}])", r"\1", plain).replace("''", '"') == AWKWARD


def test_latex_is_balanced_and_each_row_has_all_columns(tables):
    for name in ("generation", "by_subtask", "understanding"):
        text = (tables / f"{name}.tex").read_text()
        bare = re.sub(r"\\[{}\\]", "", text)
        assert bare.count("{") == bare.count("}")
        for kind in ("table", "tabular"):
            assert text.count(rf"\begin{{{kind}}}") == text.count(rf"\end{{{kind}}}") > 0
        for body in re.findall(r"\\begin\{tabular\}(.*?)\\end\{tabular\}", text, re.DOTALL):
            width = body.split("}")[0].count("r") + 1
            for row in re.findall(r"^(.*) \\\\$", body, re.MULTILINE):
                spans = [int(span) for span in re.findall(r"\\multicolumn\{(\d+)\}", row)]
                assert len(re.findall(r"(?<!\\)&", row)) + 1 + sum(spans) - len(spans) == width, row


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="there is no LaTeX")
def test_latex_compiles_with_booktabs(tables, tmp_path):
    inputs = "".join(f"\\input{{{tables}/{name}}}" for name in ("generation", "by_subtask", "understanding"))
    document = (
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{inputs}{escaped(AWKWARD, LATEX)}\end{{document}}"
    )
    (tmp_path / "all.tex").write_text(document)
    result = subprocess.run(["pdflatex", "-halt-on-error", "all"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]


def test_wide_tables_are_cut_into_blocks_without_losing_a_column():
    groups = [
        Columns("a", {str(i): "" for i in range(3)}),
        Columns("b", {str(i): "" for i in range(14)}),
        Columns("c", {"0": ""}),
    ]
    blocks = side_by_side(groups)
    assert [(group.name, metric) for block in blocks for group in block for metric in group.metrics] == [
        (group.name, metric) for group in groups for metric in group.metrics
    ]
    assert all(sum(len(group.metrics) for group in block) <= 6 for block in blocks)
    assert tabular(blocks[0], []).startswith(r"\begin{tabular}{lrrr}")


def test_metrics_of_another_run_are_refused(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(FIELDS))
    manifests.write(
        tmp_path / "m.parquet", "metrics", [metric("base", "other", "overall", "non", 1.0)], stage="stages.evaluate"
    )
    result = stage("tables", "--config", config, "--metrics", tmp_path / "m.parquet", "--out", tmp_path / "tables")
    refused(result, "other", "no benchmark")
    assert not (tmp_path / "tables").exists()


def test_every_number_of_the_paper_names_its_source_and_a_metric_of_ours():
    rows = rows_of(PAPER)
    assert len(rows) == 2 * 6 * 3 * 3 + 8
    assert {row["metric"] for row in rows} == {"gen", "und_paper", "non", "score"}
    assert all(row["source"].startswith("arXiv 2507.16663") and 0 <= float(row["value"]) <= 100 for row in rows)
    assert len({(row["model"], row["row"], row["benchmark"], row["metric"]) for row in rows}) == len(rows)
