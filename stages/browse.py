"""Make the pages of a run, which open from disk without a server: gallery, report and review.

    python -m stages.browse results/tiny-janus

It works at any moment, also for an audit and for a run that is half done or has failed, and shows what there is. The pages are
in results/tiny-janus/pages; open index.html there, or serve the folder with `python -m http.server`. The report is also a
single file, results/tiny-janus/report.html. docs/pages.md describes the pages.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from stages.common.errors import UserError, run_stage
from stages.common.files import aside, whole_file
from stages.pages import gallery, report, review
from stages.pages.render import ASSETS, page, write_text
from stages.pages.review import Plan
from stages.pages.run import Run, open_run

THUMBNAIL = 112  # pixels


def write_pages(run: Run, out: Path, side: int, plan: Plan) -> dict[str, Any]:
    """Write all pages to an empty folder, and return what the report says."""
    shutil.copytree(ASSETS, out / "assets")
    sets = gallery.write(run, out / "gallery", side)
    sample = review.write(run, out / "review", plan)
    config = run.config
    facts = {"run": config.run, "seed": config.seed, "model": run.subject()}
    facts |= {"sets": sets, "missing": len(run.missing())}
    for name, title in (("index", "Pages"), ("gallery", "Gallery"), ("review", "Review")):
        write_text(out / f"{name}.html", page(f"{name}.html", name=name, title=title, review=sample, **facts))
    reported = report.facts_of(run)
    write_text(out / "report.html", report.page_of(reported, alone=False))
    return reported


def replace(temporary: Path, out: Path) -> None:
    """Put a whole folder in the place of older pages, which are removed only when the new ones are there."""
    old = aside(out.with_name(f"{out.name}.old"))
    if out.exists():
        out.replace(old)
    temporary.replace(out)
    shutil.rmtree(old, ignore_errors=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, results/<run>")
    parser.add_argument("--out", type=Path, help="folder of the pages, which is replaced; default: <run>/pages")
    parser.add_argument("--report", type=Path, help="the report as a single file; default: <run>/report.html")
    parser.add_argument("--thumbnail", type=int, default=THUMBNAIL, help="side of the gallery's thumbnails in pixels")
    parser.add_argument("--review-set", help="the set whose images people judge; default: the first benchmark")
    parser.add_argument(
        "--review-models", nargs="+", help="whose images people judge; default: base, baselines, arms and audited models"
    )
    parser.add_argument(
        "--half-width",
        type=float,
        default=10,
        help="half the width, in percentage points, of the 95 %% interval that people's judgements shall give; default: 10",
    )
    parser.add_argument(
        "--by", choices=["model", "subtask"], default="model", help="what the interval is wanted for; default: each model"
    )
    arguments = parser.parse_args()
    if not 16 <= arguments.thumbnail <= 512:
        raise UserError(f"--thumbnail {arguments.thumbnail}: must lie between 16 and 512 pixels")
    if not 0 < arguments.half_width < 50:
        raise UserError(f"--half-width {arguments.half_width:g}: must lie between 0 and 50 percentage points")
    return arguments


def check(out: Path) -> None:
    """Raise UserError where the pages would replace a folder that is something else."""
    if out.exists() and not (out / "assets" / "pages.css").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists and has no pages; give another folder, or remove this one")


def main() -> None:
    arguments = parse()
    run = open_run(arguments.run)
    plan = Plan(arguments.review_set, arguments.review_models, arguments.half_width / 100, arguments.by)
    out = arguments.out or arguments.run / "pages"
    check(out)
    temporary = aside(out)
    try:
        reported = write_pages(run, temporary, arguments.thumbnail, plan)
        replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with whole_file(arguments.report or arguments.run / "report.html") as file:
        file.write_text(report.page_of(reported, alone=True), encoding="utf-8")
    print(f"{out / 'index.html'}")


if __name__ == "__main__":
    run_stage(main)
