"""The pages in a real Chromium, opened from disk: nothing is requested from a host, and nothing is written to the console."""

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pandas
import pytest
import yaml

from stages.browse import write_pages
from stages.common import manifests
from stages.pages.review import Plan
from stages.pages.run import open_run
from tests.helpers import done
from tests.made_run import AWKWARD, make_run

pytestmark = [
    pytest.mark.skipif(not Path("/usr/bin/chromium").exists(), reason="there is no Chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="there is no Playwright"),
]
SIZES = [(1280, "light"), (390, "dark")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that no model has made, with its pages. Twenty images fit on a page of its gallery."""
    folder = make_run(tmp_path_factory.mktemp("results") / "made", training=60)
    write_pages(open_run(folder), folder / "pages", 112, Plan(half_width=0.02))
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from tests.browser import chromium

    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser, made):
    """Open a page of the run. At the end, nothing has been requested from outside, and nothing has been wrong."""
    from tests.browser import Watched

    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    watched = []

    def opened(address: str, width: int = 1280, scheme: str = "light") -> Any:
        page = context.new_page()
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        watched.append(Watched(page))
        page.goto((made / "pages").as_uri() + "/" + address)
        return page

    yield opened
    for seen in watched:
        seen.check()
    context.close()


def gallery(visit, address: str = "", **more) -> Any:
    from tests.browser import ready

    page = visit(f"gallery.html{address}", **more)
    ready(page)
    return page


def choose(page: Any, name: str, value: str) -> None:
    """Choose an option and wait until the list is drawn again."""
    before = page.get_attribute("#prompts", "data-ready")
    page.select_option(f"select[name='{name}']", value)
    page.wait_for_function("before => document.getElementById('prompts').dataset.ready !== before", arg=before)


def count(page: Any) -> int:
    return int(page.inner_text("#status").split()[0])


def texts(page: Any) -> list[str]:
    return [heading.text_content() for heading in page.query_selector_all(".prompt h2")]


def rows(folder: Path, *parts: str) -> pandas.DataFrame:
    paths = sorted(folder.glob("/".join(parts)))
    return pandas.concat([pandas.read_parquet(path) for path in paths], ignore_index=True)


# Gallery


def test_prompts_of_every_kind_are_shown_as_text(visit):
    page = gallery(visit)
    shown = texts(page)
    assert shown[: len(AWKWARD)] == AWKWARD
    assert page.title() == "Gallery · made"
    assert page.query_selector("#prompts script, #prompts b:not(.history b), #prompts h2 *") is None


def test_filters_find_exactly_what_the_manifests_have(visit, made):
    page = gallery(visit, "#set=validation")
    prompts = pandas.read_parquet(made / "prompts/validation.parquet").set_index("prompt_id")
    assert count(page) == len(prompts)
    choose(page, "subtask", "shape")
    assert count(page) == (prompts.category == "shape").sum()
    choose(page, "subtask", "")
    choose(page, "model", "sft")
    choose(page, "own", "y")
    choose(page, "judge.shapes", "n")
    scores = rows(made, "sft/scores/validation/*.parquet")
    verdicts = rows(made, "sft/verdicts/shapes/validation/*.parquet")
    both = scores.merge(verdicts, on=["candidate_id", "prompt_id"], suffixes=("", "_external"))
    wrong = both[(both.verdict == True) & (both.verdict_external == False)]  # noqa: E712
    assert count(page) == wrong.prompt_id.nunique() > 0
    bright = {found.get_attribute("data-image") for found in page.query_selector_all(".thumbnail:not(.dim)")}
    assert bright == set(wrong.candidate_id)
    page.click("#clear")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('13 ')")
    choose(page, "judges", "disagree")
    groups = [rows(made, f"{model}/scores/validation/*.parquet") for model in ("base", "sft", "dpo", "c-sft")]
    judged = [rows(made, f"{model}/verdicts/shapes/validation/*.parquet") for model in ("base", "sft", "dpo", "c-sft")]
    every = pandas.concat(groups).merge(pandas.concat(judged), on=["candidate_id", "prompt_id"], suffixes=("", "_external"))
    disputed = every[every.verdict.notna() & (every.verdict != every.verdict_external)]
    assert count(page) == disputed.prompt_id.nunique()


def test_the_pool_filter_finds_what_replay_recovered(visit, made):
    page = gallery(visit, "#set=train&pool=recovered")
    recovered = pandas.read_parquet(made / "sft-epoch1/replay/pairs.parquet")
    assert count(page) == recovered.prompt_id.nunique() > 0
    assert page.query_selector_all(".prompt")[0].query_selector_all(".group")[1].inner_text().startswith("sft-epoch1, replay")
    choose(page, "pool", "waiting")
    discard = pandas.read_parquet(made / "sft/discard.parquet")
    assert count(page) == (discard.reason == "no_accepted").sum() - recovered.prompt_id.nunique()


def test_prompts_are_sorted_by_p_yes_margin_and_disagreement(visit, made):
    page = gallery(visit, "#set=validation")
    prompts = pandas.read_parquet(made / "prompts/validation.parquet").set_index("prompt_id").prompt
    groups = {model: rows(made, f"{model}/scores/validation/*.parquet") for model in ("base", "sft", "dpo", "c-sft")}
    scores = pandas.concat(groups.values())
    choose(page, "sort", "p-high")
    assert texts(page)[0] == prompts[scores.loc[scores.p_yes.round(3) == scores.p_yes.max().round(3)].prompt_id.iloc[0]]
    choose(page, "sort", "p-low")
    assert texts(page)[0] == prompts[scores.groupby("prompt_id").p_yes.min().idxmin()]
    choose(page, "sort", "margin-high")
    margins = [frame.groupby("prompt_id").p_yes.agg(lambda part: part.max() - part.min()) for frame in groups.values()]
    assert texts(page)[0] == prompts[pandas.concat(margins).groupby(level=0).max().idxmax()]
    choose(page, "sort", "disagreement")
    signs = [card.inner_text() for card in page.query_selector_all(".prompt")]
    disputed = [len(re.findall(r"✓ \| ✗|✗ \| ✓", text)) for text in signs]
    assert disputed == sorted(disputed, reverse=True) and disputed[0] > disputed[-1]


def test_a_shared_link_shows_the_same_prompt_and_image(visit, made):
    page = gallery(visit)
    link = page.query_selector_all(".permalink")[5]
    text = texts(page)[5]
    address = link.get_attribute("href")
    other = gallery(visit, address)
    assert texts(other) == [text]
    other.query_selector_all(".thumbnail")[1].click()
    name = other.query_selector_all(".thumbnail")[1].get_attribute("data-image")
    assert name in other.inner_text("#detail") and name in other.url
    third = gallery(visit, "#" + other.url.split("#")[1])
    assert third.locator("#detail").is_visible() and name in third.inner_text("#detail")
    third.keyboard.press("ArrowRight")
    assert name not in third.inner_text("#detail dl")
    third.keyboard.press("Escape")
    assert not third.locator("#detail").is_visible()
    third.wait_for_url(other.url.split("&image")[0])  # the dialog's close event comes after the key
    row = rows(made, "base/candidates/train/*.parquet").set_index("candidate_id").loc[name]
    assert str(row.seed) in other.inner_text("#detail") and f"base/candidates/train/{row['shard']}" in other.inner_text(
        "#detail"
    )


def test_the_gallery_is_used_by_keyboard_and_search(visit):
    page = gallery(visit)
    first = texts(page)
    page.keyboard.press("ArrowRight")
    page.wait_for_function("document.getElementById('place').textContent.startsWith('Page 2')")
    assert not set(first) & set(texts(page))
    page.go_back()
    page.wait_for_function("document.getElementById('place').textContent.startsWith('Page 1')")
    page.fill("input[name=search]", "猫坐")
    page.keyboard.press("Enter")
    page.wait_for_function("document.getElementById('status').textContent.startsWith('1 of')")
    assert texts(page) == [AWKWARD[3]]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.tagName") in ("SUMMARY", "SELECT")
    page.focus(".thumbnail")
    page.keyboard.press("Enter")
    assert page.locator("#detail").is_visible()


def test_base_stands_beside_each_arm_on_held_out_prompts(visit):
    page = gallery(visit, "#set=validation")
    card = page.query_selector(".prompt")
    names = [group.query_selector("h3").inner_text() for group in card.query_selector_all(".group")]
    assert names == ["base", "sft", "dpo", "c-sft"]
    tops = {round(group.bounding_box()["y"]) for group in card.query_selector_all(".group")}
    assert len(tops) <= 2


def test_pages_are_the_same_from_a_server(made, browser):
    from tests.browser import ready

    handler = partial(SimpleHTTPRequestHandler, directory=str(made / "pages"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/gallery.html#set=validation&own=y&sort=p-high")
        ready(page)
        local = browser.new_page()
        local.goto((made / "pages/gallery.html").as_uri() + "#set=validation&own=y&sort=p-high")
        ready(local)
        assert page.inner_text("main") == local.inner_text("main")
        page.close()
        local.close()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Report, index and all widths


@pytest.mark.parametrize(("width", "scheme"), SIZES)
@pytest.mark.parametrize("name", ["index", "gallery", "report", "review"])
def test_pages_fit_their_width_and_nothing_is_wrong(name, width, scheme, visit):
    page = visit(f"{name}.html", width=width, scheme=scheme)
    page.wait_for_load_state("load")
    if name == "gallery":
        page.wait_for_selector(".thumbnail")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    small = page.evaluate(
        "[...document.querySelectorAll('button, select, input')].filter((e) => e.offsetParent && !e.closest('dialog'))"
        ".filter((e) => e.getBoundingClientRect().height < 24).length"
    )
    assert small == 0
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
    assert dark is (scheme == "dark")


def test_the_report_prints_in_black_on_white_without_navigation(visit):
    page = visit("report.html", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.querySelector('.top')).display") == "none"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(27, 29, 33)"
    assert len(page.pdf()) > 10_000


# Review


def begin(page: Any, name: str) -> None:
    page.fill("input[name=reviewer]", name)
    page.press("input[name=reviewer]", "Enter")
    page.wait_for_selector("#judging:not([hidden])")


def judge(page: Any, answers: str) -> None:
    for key in answers:
        page.keyboard.press(key)


def saved(page: Any, out: Path) -> Path:
    with page.expect_download() as download:
        page.keyboard.press("s")
    path = out / download.value.suggested_filename
    download.value.save_as(path)
    return path


def test_fifty_images_are_judged_by_keyboard_and_survive_a_reload(visit, tmp_path):
    page = visit("review.html")
    begin(page, 'Ada, "L"')
    first = page.get_attribute("#image", "src")
    judge(page, "yn" * 20 + "uy" * 5)
    assert page.inner_text("#progress").startswith("Image 51 of 104, 50 judged")
    page.reload()
    page.wait_for_selector("#judging:not([hidden])")
    assert page.inner_text("#progress").startswith("Image 51 of 104, 50 judged")
    for _ in range(50):
        page.keyboard.press("ArrowLeft")
    assert page.get_attribute("#image", "src") == first
    assert page.get_attribute("[data-verdict=yes]", "aria-pressed") == "true"
    page.keyboard.press("n")  # changes the first answer
    path = saved(page, tmp_path)
    assert path.name == "made-validation-Ada_L_.csv"
    frame = pandas.read_csv(path, keep_default_na=False)
    assert list(frame.columns) == ["candidate_id", "verdict", "reviewer"]
    assert frame.verdict.value_counts().to_dict() == {"yes": 24, "no": 21, "": 5}
    assert set(frame.reviewer) == {'Ada, "L"'}
    page.click("#leave")
    begin(page, "Ben")
    assert page.inner_text("#progress").startswith("Image 1 of 104, 0 judged, reviewer Ben")
    page.click("#leave")
    begin(page, 'Ada, "L"')
    assert "50 judged" in page.inner_text("#progress")


def test_two_people_have_different_orders_and_a_finished_review_says_so(visit):
    page = visit("review.html")
    orders = []
    for name in ("Ann", "Bob"):
        begin(page, name)
        order = []
        for _ in range(104):
            order.append(page.get_attribute("#image", "src"))
            page.keyboard.press("y")
        orders.append(order)
        assert page.locator("#done").is_visible() and not page.locator("#judging").is_visible()
        page.click("#look-back")
        page.click("#leave")
    assert orders[0] != orders[1] and set(orders[0]) == set(orders[1]) and len(set(orders[0])) == 104


def measured_with(made: Path, judge: str, config: Path, out: Path) -> dict[str, float]:
    """Return base's metrics on the benchmark with verdicts of a judge, as the stages compute them."""
    verdicts = []
    for shard in ("0000", "0001"):
        verdicts.append(out / f"{shard}.parquet")
        done("judge", "--config", config, "--judge", judge, "--prompts", made / "prompts/validation.parquet",
             "--candidates", made / f"base/candidates/validation/{shard}.parquet", "--out", verdicts[-1])  # fmt: skip
    scores = sorted((made / "base/scores/validation").glob("*.parquet"))
    done("evaluate", "--config", config, "--benchmark", "validation", "--arm", "base", "--prompts",
         made / "prompts/validation.parquet", "--scores", *scores, "--verdicts", *verdicts, "--base-scores", *scores,
         "--base-verdicts", *verdicts, "--arm-scores-of-base", *scores, "--out", out / "metrics.parquet")  # fmt: skip
    found = manifests.read_rows(out / "metrics.parquet", "metrics")
    return {row["metric"]: row["value"] for row in found if row["category"] == "overall"}


def test_an_export_is_what_the_table_judge_reads_and_it_changes_weak_generation_and_kappa(visit, made, tmp_path):
    page = visit("review.html")
    own = rows(made, "*/scores/validation/*.parquet").set_index("candidate_id").verdict.to_dict()
    found = {}
    for name, agrees in (("agreeing", True), ("contrary", False)):
        begin(page, name)
        for _ in range(104):  # one person answers as the model itself does, the other one the opposite
            said = own[Path(page.get_attribute("#image", "src")).stem]
            page.keyboard.press("u" if said is None else "y" if bool(said) is agrees else "n")
        folder = tmp_path / name
        folder.mkdir()
        path = saved(page, folder)
        page.click("#look-back")
        page.click("#leave")
        fields = yaml.safe_load((made / "run_config.yaml").read_text())
        fields["judges"] = {"people": {"kind": "table", "files": [str(path)]}}
        fields["benchmarks"]["validation"]["judge"] = "people"
        (folder / "config.yaml").write_text(yaml.safe_dump(fields))
        found[name] = measured_with(made, "people", folder / "config.yaml", folder)
        done("tools.agreement", path, "--run", made, "--set", "validation", "--table", folder / "table.csv")
        kappa = pandas.read_csv(folder / "table.csv").set_index("between").kappa
        found[name]["kappa"] = kappa[f"{path.stem} and the model's own verdict"]
    agreeing, contrary = found["agreeing"], found["contrary"]
    assert (agreeing["weak_generation"], contrary["weak_generation"]) == (100, 0)
    assert agreeing["kappa"] == 1 and contrary["kappa"] < -0.9
    assert agreeing["gen"] == pytest.approx(100 - contrary["gen"])
    assert agreeing["gen"] == pytest.approx(100 - agreeing["non"])  # who answers as the model does refuses what it refuses
    assert agreeing["non"] == contrary["non"]  # the model's own refusals are the same, whoever else judges


# Size


@pytest.mark.slow
def test_pages_of_many_images_open_without_an_error(browser, tmp_path):
    from tests.browser import Watched, ready

    folder = make_run(tmp_path / "large", training=5992, held_out=60, candidates=10, shard_count=8)
    write_pages(open_run(folder), folder / "pages", 112, Plan())
    seconds: dict[str, float] = {}
    for name in ("index", "gallery", "report", "review", "gallery#set=train&sort=disagreement&own=y") * 3:
        page = browser.new_page()
        watched = Watched(page)
        file, _, choice = name.partition("#")
        started = time.monotonic()
        page.goto(f"{(folder / 'pages').as_uri()}/{file}.html#{choice}")
        if file == "gallery":
            ready(page)
        seconds[name] = min(time.monotonic() - started, seconds.get(name, 60))
        watched.check()
        page.close()
    print(json.dumps(seconds))  # docs/pages.md quotes them; a busy machine takes longer, so they are not asserted
