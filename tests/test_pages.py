"""The pages of a run: what they say, what they escape, what they do with runs that are not complete, and their size."""

import base64
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas
import pytest
import yaml
from PIL import Image

from stages.browse import write_pages
from stages.common import shards
from stages.common.config import validate
from stages.judges.table import read_table
from stages.pages import gallery, plots
from stages.pages.render import ASSETS
from stages.pages.report import code_of_stages, cost, facts_of, page_of
from stages.pages.review import Plan, drawn, needed
from stages.pages.run import open_run
from stages.tools.agreement import compared, majority
from stages.tools.kappa import agree, agree_all
from tests.helpers import SMALL, TINY, done, measured, merged, refused, stage
from tests.made_run import AWKWARD, Made, make_run

PAGES = ("index", "gallery", "report", "review")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that no model has made, with its pages."""
    folder = make_run(tmp_path_factory.mktemp("results") / "made")
    done("browse", folder)
    return folder


def data(path: Path) -> dict:
    """Return what a data file calls its function with."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text[text.index("(") + 1 : text.rindex(")")])


def table(folder: Path, *parts: str) -> pandas.DataFrame:
    paths = sorted(folder.glob("/".join(parts)))
    return pandas.concat([pandas.read_parquet(path) for path in paths], ignore_index=True)


def shown(folder: Path, name: str) -> dict[str, dict]:
    """Return the files of all prompts of a set, by prompt_id."""
    found = [data(path) for path in folder.glob(f"pages/gallery/{name}/*/*.js")]
    return {prompt["prompt_id"]: prompt for prompt in found}


# What is shown


def test_the_index_has_every_image_with_p_yes_and_verdicts(made):
    index = data(made / "pages/gallery/validation/index.js")
    assert (index["groups"], index["judges"]) == (["base", "sft", "dpo", "c-sft"], ["shapes"])
    prompts = shown(made, "validation")
    scores = {model: table(made, model, "scores/validation/*.parquet").set_index("candidate_id") for model in index["groups"]}
    verdicts = {m: table(made, m, "verdicts/shapes/validation/*.parquet").set_index("candidate_id") for m in index["groups"]}
    arms = [name for name in index["groups"] if name != "base"]
    looked = {name: table(made, name, "scores-of-base/validation/*.parquet").set_index("candidate_id") for name in arms}
    seen = 0
    for prompt_id, category, bits, codes in index["prompts"]:
        prompt = prompts[prompt_id]
        assert (index["categories"][category], bits) == (prompt["category"], 0)
        for image, code in zip(prompt["images"], re.findall(".{6}", codes), strict=True):
            model = index["groups"][int(code[:2], 36)]
            own, external = scores[model].loc[image["id"]], verdicts[model].loc[image["id"]]
            assert image["group"] == index["groups"].index(model)
            if pandas.isna(own.p_yes):
                assert (code[2:4], code[4], "p" in image) == ("--", "u", False)
            else:
                assert abs(int(code[2:4], 36) / 1000 - own.p_yes) <= 0.0005
                assert (image["p"], code[4]) == (own.p_yes, "y" if own.verdict else "n")
            assert code[5] == image["said"][0]["verdict"] == ("y" if external.verdict else "n")
            seen += 1
            again = {other["model"]: other["p"] for other in image.get("others", [])}
            assert again == ({name: looked[name].p_yes[image["id"]] for name in looked} if model == "base" else {})
    assert seen == sum(map(len, scores.values())) == 4 * 13 * 2


def test_images_are_marked_as_selections_took_them(made):
    marked: dict[str, set[tuple[str, str]]] = {}
    for prompt in shown(made, "train").values():
        for image in prompt["images"]:
            for side in ("chosen", "rejected"):
                for label in image.get(side, []):
                    marked.setdefault(label, set()).add((side, image["id"]))
    places = {"sft, c-sft": "sft", "dpo": "dpo", "c-sft: replay after epoch 1": "sft-epoch1/replay"}
    assert marked.keys() == places.keys()
    for label, place in places.items():
        pairs = pandas.read_parquet(made / place / "pairs.parquet")
        taken = {(side, name) for side in ("chosen", "rejected") for name in pairs[side].dropna()}
        assert marked[label] == taken and taken


def test_the_pool_and_what_replay_recovered_are_known(made):
    index = data(made / "pages/gallery/train/index.js")
    bits = {prompt_id: bits for prompt_id, _, bits, _ in index["prompts"]}
    discard = pandas.read_parquet(made / "sft/discard.parquet")
    pool = set(discard[discard.reason == "no_accepted"].prompt_id)
    recovered = set(pandas.read_parquet(made / "sft-epoch1/replay/pairs.parquet").prompt_id)
    assert pool and recovered and recovered < pool
    assert {name for name, bit in bits.items() if bit & gallery.POOL} == pool
    assert {name for name, bit in bits.items() if bit & gallery.RECOVERED} == recovered
    chosen = set(pandas.read_parquet(made / "sft/pairs.parquet").prompt_id)
    assert chosen <= {name for name, bit in bits.items() if bit & gallery.SELECTED}
    unpaired = pandas.read_parquet(made / "dpo/discard.parquet")
    assert {name for name, bit in bits.items() if bit & gallery.UNPAIRED} == set(
        unpaired[unpaired.reason == "no_rejected"].prompt_id
    )
    prompts = shown(made, "train")
    for name in recovered:
        assert {image["group"] for image in prompts[name]["images"]} == {0, 1}  # base's candidates and those of the replay
        assert any(entry["replay"] and entry["rows"] for entry in prompts[name]["history"])


def test_thumbnails_of_small_images_are_exact(made):
    prompt = next(iter(shown(made, "train").values()))
    layout = prompt["thumbnails"]
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(layout["data"].split(",")[1]))).convert("RGB"))
    rows = table(made, "base/candidates/train/*.parquet").set_index("candidate_id")
    assert layout["pixels"] and layout["side"] == 24
    for place, image in enumerate(prompt["images"][:4]):
        row = rows.loc[image["id"]].to_dict() | {"candidate_id": image["id"]}
        whole = shards.read_images(made / "base/candidates/train/x.parquet", [row])[0]
        top, left = 24 * (place // layout["columns"]), 24 * (place % layout["columns"])
        assert np.array_equal(sheet[top : top + 24, left : left + 24], whole)


def test_thumbnails_of_large_images_fit_their_places():
    layout = gallery.thumbnails([np.zeros((384, 256, 3), np.uint8), None, np.full((384, 256, 3), 255, np.uint8)], 112)
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(layout["data"].split(",")[1]))).convert("RGBA"))
    assert sheet.shape == (112, 336, 4) and not layout["pixels"]
    assert sheet[56, 56, 3] == 255 and sheet[56, 168, 3] == 0 and sheet[56, 280].min() > 250


# Text is text


def test_prompts_stay_text(made):
    prompts = {prompt["prompt"] for prompt in shown(made, "train").values()}
    assert set(AWKWARD) <= prompts
    for name in PAGES:
        text = (made / f"pages/{name}.html").read_text(encoding="utf-8")
        assert "hacked" not in text and "onerror" not in text
    texts = data(made / "pages/gallery/train/texts.js")["texts"]
    assert max(map(len, texts)) == gallery.SEARCHED


def test_names_and_findings_are_escaped_in_pages(tmp_path):
    folder = make_run(tmp_path / "made", training=0, held_out=1, candidates=1)
    (folder / "tables").mkdir()
    columns = "model,source,a<b> gen,a<b> gen_ci_low,a<b> gen_ci_high,a<b> gen_n,recipe\n"
    (folder / "tables/generation.csv").write_text(columns + "<script>1</script>,made,1.0,0.5,1.5,7,<i>by whom</i>\n")
    text = page_of(facts_of(open_run(folder)), alone=True)
    assert "<script>1" not in text and "&lt;script&gt;1&lt;/script&gt;" in text
    assert "a&lt;b&gt; Gen." in text and "&lt;i&gt;by whom&lt;/i&gt;" in text
    assert "0.5 to 1.5, n 7" in text


def test_no_page_names_an_address_outside(made):
    for path in [*made.glob("pages/*.html"), *made.glob("pages/assets/*"), made / "report.html"]:
        text = path.read_text(encoding="utf-8")
        addresses = [found for found in re.findall(r"https?://[^\s\"'<)]+", text) if "www.w3.org" not in found]  # XML names
        assert not addresses, (path, addresses)
    for address in re.findall(r'(?:src|href)="([^"]*)"', (made / "report.html").read_text(encoding="utf-8")):
        assert address.startswith(("#", "data:")), address


# Plots and colours


def test_plots_take_their_colours_from_the_page():
    points = [plots.Point(row, series, 50.0, 40.0, 60.0) for row in ("<a>", "b") for series in ("base", "sft")]
    drawn = [plots.intervals("t & <t>", {"Gen.": points, "none": []}, ["base", "dpo", "sft"], "percent") for _ in range(2)]
    svg = str(drawn[0])
    assert drawn[0] == drawn[1]
    assert "var(--c0)" in svg and "var(--c2)" in svg and "currentColor" in svg
    assert "var(--c1)" not in svg and "#01010" not in svg  # each series has its own colour in every plot, and dpo has no point
    assert "&lt;a&gt;" in svg and "<a>" not in svg and "none" not in re.findall(r">([^<]*)</text>", svg)
    assert plots.intervals("empty", {"Gen.": []}, ["base"], "percent") is None


def contrast(first: str, second: str) -> float:
    """Return the contrast ratio of two colours, as WCAG 2 defines it."""
    light = []
    for colour in (first, second):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        light.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_text_has_the_contrast_of_wcag_in_light_and_dark():
    schemes = re.findall(r":root \{(.*?)\}", (ASSETS / "pages.css").read_text(), re.DOTALL)
    assert len(schemes) == 2
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", scheme))
        for name in ("ink", "quiet", "good", "bad", "link"):
            for ground in ("paper", "card"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for number in range(8):
            assert contrast(colours[f"c{number}"], colours["paper"]) >= 4.5
        assert contrast(colours["line"], colours["paper"]) >= 3  # frames of controls


# Runs that are not complete


def test_time_and_memory_are_those_of_all_jobs_of_a_stage(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")
    for name in ("reference/dpo.jsonl", "reference/c-dpo-epoch3/replay.jsonl"):  # a replay's job has a folder of its own
        path = folder / "benchmarks" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('{"s": 3600, "cpu_time": 1800, "max_rss": 2000}\n')
    (texts,) = [[cell.text for cell in cells] for (stage,), cells in cost(open_run(folder)).rows if stage == "reference"]
    assert texts == ["2", "2.00", "1.00", "2.00"]


def test_a_broken_file_of_another_part_does_not_prevent_the_pages(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "made")
    (folder / "dynamics").mkdir()
    (folder / "dynamics/claims.parquet").write_bytes(b"PAR1 broken")
    assert code_of_stages(open_run(folder)) == code_of_stages(open_run(made)) != []


def test_a_run_that_has_only_begun_has_pages(made, tmp_path):
    folder = tmp_path / "made"
    folder.mkdir()
    shutil.copy(made / "run_config.yaml", folder)
    done("browse", folder)
    assert "No image has been drawn yet" in (folder / "pages/gallery.html").read_text()
    assert "nothing to review yet" in (folder / "pages/review.html").read_text()
    shutil.copytree(made / "prompts", folder / "prompts")
    (folder / "base/candidates").mkdir(parents=True)
    shutil.copytree(made / "base/candidates/train", folder / "base/candidates/train")
    (folder / "base/candidates/train/0001.parquet").unlink()
    done("browse", folder)
    index = data(folder / "pages/gallery/train/index.js")
    assert len(index["prompts"]) == 19 and all(codes[2:5] == "---" for *_, codes in index["prompts"])
    assert not (folder / "pages/gallery/validation").exists()


def test_pieces_that_an_earlier_configuration_has_left_are_not_shown(made, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    for ending in ("parquet", "tar"):
        shutil.copy(folder / f"base/candidates/train/0001.{ending}", folder / f"base/candidates/train/0002.{ending}")
    shutil.copy(folder / "base/scores/train/0001.parquet", folder / "base/scores/train/0002.parquet")
    done("browse", folder)
    assert shown(folder, "train") == shown(made, "train")


def test_rows_that_join_without_a_replay_are_not_called_recovered(made, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    config = yaml.safe_load((folder / "run_config.yaml").read_text())
    config["arms"]["c-sft-more"] = config["arms"]["c-sft"] | {"replay_by": "nobody"}
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "sft-epoch1-by-nobody/replay").mkdir(parents=True)
    shutil.copy(folder / "sft/pairs.parquet", folder / "sft-epoch1-by-nobody/replay/pairs.parquet")
    done("browse", folder)

    def recovered(run: Path) -> set[str]:
        index = data(run / "pages/gallery/train/index.js")
        return {name for name, _, bits, _ in index["prompts"] if bits & gallery.RECOVERED}

    assert recovered(folder) == recovered(made)
    assert "c-sft-more: further rows after epoch 1" in (folder / "report.html").read_text()


def test_missing_shards_and_missing_jobs_are_told(made, tmp_path):
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    (folder / "sft/candidates/validation/0000.tar").unlink()
    jobs = [{"rule": "summary", "out": "results/made/summary.csv", "log": "results/made/logs/summary.log"}]
    jobs.append({"rule": "pages", "out": "results/made/report.html", "log": "results/made/logs/pages.log"})
    (folder / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    (folder / "logs").mkdir()
    (folder / "logs/summary.log").write_text("begun\nno space left <b>on device</b>\n")
    done("browse", folder)
    facts = re.search(r'id="facts">(.*?)</script>', (folder / "pages/gallery.html").read_text())
    assert facts and json.loads(facts.group(1))["sets"][1]["lost"] == 14
    assert "1 of its files do not exist yet" in (folder / "pages/index.html").read_text()
    assert "summary.csv: no space left &lt;b&gt;on device&lt;/b&gt;" in (folder / "report.html").read_text()


def test_what_is_no_run_and_what_is_no_folder_of_pages_is_refused(made, tmp_path):
    refused(stage("browse", tmp_path), "run_config.yaml", "results/<run>")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    refused(stage("browse", made, "--out", tmp_path / "mine"), "has no pages")
    assert (tmp_path / "mine/letter.txt").exists()
    refused(stage("browse", made, "--review-models", "base", "nobody"), "--review-models nobody", "c-sft")


# An audit


def make_audit(folder: Path) -> Path:
    """Write an audit of two models, one with two images of each prompt, and return its folder."""
    models = {name: {"checkpoint": f"checkpoints/{name}"} for name in ("calm", "hot")}
    config = validate(merged(SMALL, {"run": folder.name, "audit": {"models": models}}) | {"arms": {}}, "test")
    folder.mkdir()
    (folder / "run_config.yaml").write_text(yaml.safe_dump(config.model_dump()))
    known = Made(folder)
    prompts = known.prompts("validation", [f"prompt of number {number}" for number in range(12)])
    for model, count in (("calm", 1), ("hot", 2)):
        known.draw(model, "validation", prompts, count)
        known.judge(model, "validation", "shapes")
    (folder / "audit").mkdir()
    (folder / "audit/non.csv").write_text(
        "model,source,easy mean,easy mean_ci_low,easy mean_ci_high,easy mean_n\nhot,x,25,5,45,12\n"
    )
    return folder


def test_an_audit_has_pages_on_which_people_judge_the_audited_models(tmp_path):
    folder = make_audit(tmp_path / "audited")
    done("browse", folder, "--half-width", 20)
    index = data(folder / "pages/gallery/validation/index.js")
    assert (index["groups"], index["judges"]) == (["calm", "hot"], ["shapes"])
    places = [image["group"] for prompt in shown(folder, "validation").values() for image in prompt["images"]]
    assert (places.count(0), places.count(1)) == (12, 24)
    assert "nothing to review yet" not in (folder / "pages/review.html").read_text()
    key = pandas.read_csv(folder / "pages/review/sample.csv")
    assert {name: len(rows) for name, rows in key.groupby("model")} == {"calm": 9, "hot": 15}
    assert len(data(folder / "pages/review/sample.js")) == len(key)
    text = (folder / "pages/index.html").read_text()
    assert "calm: janus, checkpoints/calm; hot: janus, checkpoints/hot" in text
    assert str(TINY) not in text  # no model is trained
    report = (folder / "report.html").read_text()
    assert "Audit: non-unification" in report and "5.0 to 45.0, n 12" in report
    said = key[["candidate_id"]].assign(verdict="yes")
    said.to_csv(tmp_path / "anna.csv", index=False)
    result = done("tools.agreement", tmp_path / "anna.csv", "--run", folder, "--set", "validation")
    assert "anna and shapes" in result.stdout


# Review


def test_the_review_page_is_blind(made):
    text = (made / "pages/review.html").read_text() + (made / "pages/review/sample.js").read_text()
    assert not re.search(r"\b(sft|dpo|c-sft|base)\b", text)
    items = data(made / "pages/review/sample.js")
    key = pandas.read_csv(made / "pages/review/sample.csv", dtype=str)
    assert [name for name, *_ in items] == list(key.candidate_id) == sorted(key.candidate_id)
    assert set(key.model) == {"base", "sft", "dpo", "c-sft"}
    for name, *_ in items:
        assert (made / f"pages/review/images/{name}.png").exists()


def test_as_many_images_are_sampled_as_the_interval_needs():
    assert needed([1_000_000], 0.1) == 97  # 1.96**2 / 4 / 0.1**2 = 96.04
    assert needed([1_000_000] * 8, 0.1) == 13  # a mean over eight strata: 8 x 13 = 104
    assert needed([200], 0.1) == 66  # 96.04 * 200 / (199 + 96.04) = 65.1, because 200 are few
    assert needed([20], 0.01) == 20
    generator = np.random.default_rng(0)
    means = generator.binomial(97, 0.5, 20_000) / 97
    assert np.mean(np.abs(means - 0.5) <= 0.1) >= 0.95


def test_a_sample_has_every_prompt_before_it_repeats_one():
    rows = [{"prompt_id": f"p{place % 5}", "candidate_id": f"c{place}"} for place in range(20)]
    first = drawn(rows, 5, 1)
    assert {row["prompt_id"] for row in first} == {f"p{place}" for place in range(5)}
    assert drawn(rows, 5, 1) == first != drawn(rows, 5, 2)
    assert len({row["candidate_id"] for row in drawn(rows, 20, 1)}) == 20


def test_the_sample_follows_the_plan(made, tmp_path):
    write_pages(open_run(made), tmp_path, 48, Plan("validation", ["sft", "base"], 0.3, "subtask"))
    key = pandas.read_csv(tmp_path / "review/sample.csv")
    assert set(key.model) == {"sft", "base"}
    sizes = key.groupby(["model", "subtask"]).agg(taken=("candidate_id", "size"), size=("images_of_stratum", "first"))
    assert all(row.taken == needed([row["size"]], 0.3) for _, row in sizes.iterrows())


# Agreement


def test_kappa_is_that_of_the_textbooks():
    counts = {(True, True): 20, (True, False): 5, (False, True): 10, (False, False): 15}
    votes = np.array([pair for pair, count in counts.items() for _ in range(count)])
    prompts = np.arange(50)
    equal, kappa = agree(votes[:, 0], votes[:, 1], prompts, 0)
    assert (equal.value, kappa.value) == (0.7, pytest.approx(0.4))  # by chance 0.5
    equal, kappa = agree_all(np.array([[1, 1], [1, 0], [0, 0], [0, 0]], bool), prompts[:4], 0)
    assert (equal.value, kappa.value) == (0.75, pytest.approx((0.75 - 34 / 64) / (1 - 34 / 64)))
    assert kappa.low is None, "four images say nothing"
    assert agree_all(np.array([[1, 1, 1], [0, 0, 0]], bool), prompts[:2], 0)[1].value == pytest.approx(1)
    assert agree_all(np.ones((4, 3), bool), prompts[:4], 0)[1].value is None
    by_image, by_prompt = (
        agree_all(np.repeat(votes, 4, 0)[:, [0, 1, 1]], names, 0)[1] for names in (np.arange(200), prompts.repeat(4))
    )
    assert by_prompt.high - by_prompt.low > 1.5 * (by_image.high - by_image.low), "images of a prompt are not independent"


def test_only_images_of_which_all_say_yes_or_no_are_compared():
    anna = {"a": True, "b": False, "c": None, "d": True}
    ben = {"a": True, "b": True, "c": True, "e": False}
    row = compared(["anna", "ben"], [anna, ben], {})
    assert (row["n"], row["agreement"]) == (2, 0.5)
    assert majority([anna, ben]) == {"a": True, "b": None, "c": True, "d": True, "e": False}


def test_the_agreement_command_joins_files_for_the_table_judge(made, tmp_path):
    verdicts = table(made, "base/verdicts/shapes/validation/*.parquet")
    said = verdicts[["candidate_id", "verdict"]].replace({True: "yes", False: "no"})
    said.to_csv(tmp_path / "anna.csv", index=False)
    other = said.copy()
    other.loc[other.index[:3], "verdict"] = ["yes", "no", ""]
    other.to_csv(tmp_path / "ben.csv", index=False)
    files = (tmp_path / "anna.csv", tmp_path / "ben.csv")
    result = done("tools.agreement", *files, "--run", made, "--set", "validation", "--out", tmp_path / "all.csv",
                  "--table", tmp_path / "table.csv")  # fmt: skip
    rows = pandas.read_csv(tmp_path / "table.csv").set_index("between")
    assert list(rows.index) == ["anna and ben", "people and the model's own verdict", "people and shapes"]
    assert rows.loc["people and shapes"].kappa == 1 and rows.loc["people and shapes"].agreement == 1
    assert rows.loc["people and the model's own verdict"].agreement < 1
    assert "people and shapes: kappa 1.00" in result.stdout
    joined = read_table(tmp_path / "all.csv", 0.5)
    assert len(joined) == len(said)
    assert sum(verdict.matches is None for verdict in joined.values()) == sum(said.verdict.iloc[:2] != ["yes", "no"])
    refused(stage("tools.agreement", *files, "--run", made, "--set", "test"), "--set test", "validation")


# Size


@pytest.mark.slow
def test_pages_of_60000_candidates_take_little_memory_and_each_is_light(tmp_path):
    peaks = {}
    for count in (600, 6000):
        folder = make_run(tmp_path / str(count), training=count - len(AWKWARD), held_out=10, candidates=10, shard_count=20)
        _, seconds, peaks[count] = measured(sys.executable, "-m", "stages.browse", folder)
        print(count, seconds, peaks[count])
    assert peaks[6000] < 1.25 * peaks[600]
    pages = folder / "pages"
    assets = sum(path.stat().st_size for path in pages.glob("assets/*"))
    index = data(pages / "gallery/train/index.js")
    assert len(index["prompts"]) == 6000 and sum(len(codes) // 5 for *_, codes in index["prompts"]) >= 60_000
    fixed = assets + sum((pages / name).stat().st_size for name in ("gallery.html", "gallery/train/index.js"))
    prompts = sorted((path.stat().st_size for path in pages.glob("gallery/train/*/*.js")), reverse=True)
    assert fixed + sum(prompts[: index["perPage"]]) < 2_000_000
    for name in ("index.html", "report.html", "review.html", "review/sample.js"):
        assert (pages / name).stat().st_size < 2_000_000 - assets


@pytest.mark.slow
def test_pages_of_large_noisy_images_are_light(tmp_path):
    folder = make_run(tmp_path / "noisy", training=92, held_out=20, candidates=10, side=384)
    _, seconds, _ = measured(sys.executable, "-m", "stages.browse", folder)
    heaviest = []
    for name in ("train", "validation"):
        sizes = sorted((path.stat().st_size for path in folder.glob(f"pages/gallery/{name}/*/*.js")), reverse=True)
        heaviest.append(sum(sizes[: data(folder / f"pages/gallery/{name}/index.js")["perPage"]]))
    images = len(table(folder, "*/candidates/*/*.parquet"))
    size = sum(path.stat().st_size for path in folder.glob("pages/gallery/*/*/*.js"))
    print(f"{images} images: {seconds:.1f} s, {size / images:.0f} bytes for an image, heaviest pages {heaviest}")
    assert max(heaviest) < 1_900_000
