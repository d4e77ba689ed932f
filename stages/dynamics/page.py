"""Tables and pictures of learning dynamics, for one run or for runs with several seeds.

    python -m stages.dynamics.page --dynamics results/tiny-janus/dynamics --out results/tiny-janus/dynamics/page.md
    python -m stages.dynamics.page --dynamics results/dynamics-100/dynamics results/dynamics-101/dynamics \\
        --facts "make dynamics, seeds 100 and 101" --out docs/dynamics.md --csv docs/dynamics.csv

Beside the page there are <name>-steps.png, <name>-path.png and <name>-terms.png, drawn from the first run. If the page exists
and has the lines BEGIN and END, only what is between them is replaced, so that text around the tables stays.

A value is the mean over runs. With one run its interval is that of the run; with two it reaches from the lowest end of both to
the highest; with three or more it is Student's t over the runs, which are then the sample.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stages.common import manifests
from stages.common.errors import UserError, run_stage
from stages.common.files import whole_file, write_csv
from stages.tools.intervals import t_quantile

Row = dict[str, Any]
BEGIN, END = "<!-- begin of generated tables -->", "<!-- end of generated tables -->"
COLUMNS = ("claim", "group", "measure", "value", "ci_low", "ci_high", "n", "runs")
QUANTITIES = {"g": "ΔG, log p(image | prompt)", "u": "ΔU, log p(prompt | image)", "j": "ΔJ, log odds of yes"}


@dataclass(frozen=True)
class Table:
    """A table of the page. keep: whether a group is shown. digits: of its numbers."""

    claim: str
    title: str
    keep: Callable[[str], bool] = lambda group: True
    digits: int = 3


def last_epochs(groups: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a group of the claim `path` is of its arm's last epoch."""
    ends: dict[str, int] = {}
    for arm, _, epoch, _ in (group.split(", ") for group in groups):
        ends[arm] = max(ends.get(arm, 0), int(epoch.split()[1]))
    return lambda group: int(group.split(", ")[2].split()[1]) == ends[group.split(", ")[0]]


def tables(rows: Sequence[Row]) -> list[Table]:
    followed = [row["group"] for row in rows if row["claim"] == "path"]
    return [
        Table("step", "One step: predicted against measured (size 1 is AdamW's first step at the learning rate)"),
        Table("path", "A whole training: summed first-order terms against the measured change", last_epochs(followed)),
        Table("gain", "Gain of Gen. in points", digits=2),
        Table("judging", "The answering branch on the base model's images, in percent and points", digits=2),
        Table("signs", "Pairs in which two terms have the same sign", lambda group: group.startswith("base, sft")),
        Table("category", "Mean terms for training rows of the probe's own category and of others", digits=4),
        Table("judges", "The posterior over alternative prompts against the branch that answers"),
        Table("rows", "Effect of training rows", digits=5),
        Table("corrections", "Similarity to the nearest training pair"),
        Table("proxies", "Rank correlation of similarities with the cosine of gradients"),
        Table("kernel", "The kernel between logits", digits=4),
        Table("density", "Distribution of Delta G over pairs, learning rate 1", digits=3),
        Table("sketch", "Compressed gradients against exact terms"),
    ]


def together(runs: Sequence[list[Row]]) -> list[Row]:
    """Return every measure over all runs that have it, in the order of the first run."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for rows in runs:
        for row in rows:
            if row["value"] is not None:
                found.setdefault((row["claim"], row["group"], row["measure"]), []).append(row)
    return [
        {"claim": claim, "group": group, "measure": measure, **of_runs(rows)} for (claim, group, measure), rows in found.items()
    ]


def of_runs(rows: Sequence[Row]) -> Row:
    """Return value, interval, count and number of runs of one measure."""
    values = np.array([row["value"] for row in rows])
    low, high = ([row[end] for row in rows if row[end] is not None] for end in ("ci_low", "ci_high"))
    bounds: tuple[float | None, float | None] = (None, None)
    if len(values) >= 3:
        half = t_quantile(0.975, len(values) - 1) * float(values.std(ddof=1)) / len(values) ** 0.5
        bounds = (float(values.mean()) - half, float(values.mean()) + half)
    elif len(low) == len(high) == len(rows):
        bounds = (min(low), max(high))
    return {"value": float(values.mean()), "ci_low": bounds[0], "ci_high": bounds[1], "n": sum(row["n"] for row in rows),
            "runs": len(rows)}  # fmt: skip


def written(row: Row | None, digits: int) -> str:
    """Return a value with its interval, such as 0.98 (0.95 to 1.01)."""
    if row is None:
        return ""
    number = f"{{:.{digits}g}}".format
    text = number(row["value"])
    return text if row["ci_low"] is None else f"{text} ({number(row['ci_low'])} to {number(row['ci_high'])})"


def markdown(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table: a line for each group, a column for each measure."""
    mine = [row for row in rows if row["claim"] == table.claim and table.keep(row["group"])]
    if not mine:
        return []
    measures = list(dict.fromkeys(row["measure"] for row in mine))
    cells = {(row["group"], row["measure"]): row for row in mine}
    lines = [f"### {table.title}", "", f"| {table.claim} | {' | '.join(measures)} | n |", "|---" * (len(measures) + 2) + "|"]
    for group in dict.fromkeys(row["group"] for row in mine):
        count = max(row["n"] for row in mine if row["group"] == group)
        texts = [written(cells.get((group, measure)), table.digits) for measure in measures]
        lines.append(f"| {group} | {' | '.join(texts)} | {count} |")
    return [*lines, ""]


# --- pictures --------------------------------------------------------------------------------------------------------


def figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def steps_picture(folder: Path) -> Any:
    """Return the error by size, and predicted against measured at size 1, for every quantity."""
    table = manifests.read(folder / "steps.parquet", "dynamics_steps").to_pandas()
    shown = [name for name in QUANTITIES if name in set(table.quantity)]
    made, axes = figure(2, len(shown))
    for column, quantity in enumerate(shown):
        part = table[table.quantity == quantity]
        for (objective, optimizer), lines in part.groupby(["objective", "optimizer"]):
            errors = lines.groupby("size").apply(lambda at: np.linalg.norm(at.measured - at.predicted), include_groups=False)
            axes[0, column].loglog(errors.index, errors.to_numpy(), marker="o", markersize=3, label=f"{objective}, {optimizer}")
            at = lines[lines["size"] == 1]
            axes[1, column].scatter(at.predicted, at.measured, s=6, label=f"{objective}, {optimizer}")
        sizes = np.array(sorted(part["size"].unique()))
        errors = (
            part[part["size"] == sizes[0]]
            .groupby(["objective", "optimizer"])
            .apply(lambda at: np.linalg.norm(at.measured - at.predicted), include_groups=False)
        )
        axes[0, column].loglog(sizes, errors.min() * (sizes / sizes[0]) ** 2, "k:", linewidth=1, label="square of the size")
        axes[0, column].set(title=QUANTITIES[quantity], xlabel="size of the step", ylabel="length of measured - predicted")
        diagonal(axes[1, column])
        axes[1, column].set(xlabel="predicted, size 1", ylabel="measured")
    axes[0, 0].legend(fontsize=7)
    return made


def diagonal(axis: Any) -> None:
    low, high = min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([low, high], [low, high], "k:", linewidth=1)


def path_picture(folder: Path, rows: Sequence[Row]) -> Any:
    """Return measured against summed changes at the end of training, and the gain of Gen. by category, for every arm."""
    files = sorted((folder / "path").glob("*.parquet"))
    made, axes = figure(max(1, len(files)), len(QUANTITIES) + 1)
    for line, path in enumerate(files):
        table = manifests.read(path, "dynamics_path").to_pandas()
        end = table[table.epoch == table.epoch.max()]
        for column, quantity in enumerate(QUANTITIES):
            part, axis = end[end.quantity == quantity], axes[line, column]
            axis.scatter(part.from_base, part.measured, s=5, color="0.75", label="kernel of the base model")
            axis.scatter(part.summed, part.measured, s=5, label="summed along the training")
            diagonal(axis)
            axis.set(title=f"{path.stem}: {QUANTITIES[quantity]}", xlabel="first order", ylabel="measured")
        gains = [row for row in rows if row["claim"] == "gain" and row["group"].startswith(f"{path.stem}, ")]
        groups, axis = list(dict.fromkeys(row["group"].split(", ")[1] for row in gains)), axes[line, -1]
        for place, measure in enumerate(("first_order", "measured_on_probes", "measured")):
            mine = {row["group"].split(", ")[1]: row["value"] for row in gains if row["measure"] == measure}
            axis.bar(np.arange(len(groups)) + 0.27 * (place - 1), [mine.get(g, np.nan) for g in groups], 0.27, label=measure)
        axis.set_xticks(range(len(groups)), groups, rotation=60, fontsize=7)
        axis.set(title=f"{path.stem}: gain of Gen., points")
    if files:
        axes[0, 0].legend(fontsize=7)
        axes[0, -1].legend(fontsize=7)
    return made


def terms_picture(folder: Path, rows: Sequence[Row]) -> Any:
    """Return mean Delta G by category, the density of Delta G, and Delta G against Delta U and Delta J."""
    import pandas

    files = sorted((folder / "base" / "terms").glob("*.parquet"))
    table = pandas.concat([manifests.read(path, "dynamics_terms").to_pandas() for path in files])
    table = table[table.subset == "all"]
    made, axes = figure(2, 2)
    pairs = {row["group"]: row["value"] for row in rows if row["claim"] == "pair" and row["group"].startswith("base, ")}
    names = sorted({group.split(", ")[1] for group in pairs} | {group.split(", ")[2] for group in pairs})
    grid = np.array([[pairs.get(f"base, {one}, {two}", np.nan) for two in names] for one in names], dtype=float)
    if names:
        shown = axes[0, 0].imshow(grid, cmap="RdBu_r", vmin=-np.nanmax(abs(grid)), vmax=np.nanmax(abs(grid)))
        made.colorbar(shown, ax=axes[0, 0])
    axes[0, 0].set_xticks(range(len(names)), names, rotation=60, fontsize=7)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0, 0].set(title="mean ΔG, SFT", xlabel="training row", ylabel="probe")
    for objective, part in table[table.objective != "kernel"].groupby("objective"):
        scaled = part.delta_g / part.delta_g.abs().median()
        axes[0, 1].hist(scaled.clip(-10, 10), bins=80, density=True, histtype="step", label=objective)
    axes[0, 1].axvline(0, color="k", linewidth=0.5)
    axes[0, 1].set(title="density of ΔG over pairs", xlabel="ΔG by its median size, cut at 10")
    axes[0, 1].legend(fontsize=7)
    sft = table[table.objective == "sft"] if (table.objective == "sft").any() else table[table.objective != "kernel"]
    for column, term in enumerate(("delta_u", "delta_j")):
        axes[1, column].scatter(sft.delta_g, sft[term].astype(float), s=1, alpha=0.3)
        axes[1, column].axhline(0, color="k", linewidth=0.5)
        axes[1, column].axvline(0, color="k", linewidth=0.5)
        axes[1, column].set(xlabel="ΔG", ylabel={"delta_u": "ΔU", "delta_j": "ΔJ"}[term], title="pairs of probe and row")
    return made


def save(made: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        made.savefig(temporary, format="png", dpi=90)


# --- the page --------------------------------------------------------------------------------------------------------


def facts_of(folder: Path) -> list[str]:
    """Return what a run's terms were computed from."""
    terms = manifests.facts(next((folder / "base" / "terms").glob("*.parquet")))["settings"]
    lines = [f"- likelihood: {terms['likelihood']}; checkpoint {terms['checkpoint']}; trained parameters: {terms['trainable']}"]
    if terms["likelihood"] != "exact":
        lines.append(
            "- The family's likelihood is no exact one: all terms are those of its bound or estimate under fixed random draws."
        )
    for path in sorted((folder / "path").glob("*.parquet")):
        apart = manifests.facts(path)["settings"]["distance"]
        if apart is not None:
            lines.append(f"- {path.stem}: the repeated training ends {apart:.2%} of the way apart from the trainer's weights")
    return lines


def page(rows: Sequence[Row], folders: Sequence[Path], names: dict[str, str], facts: str | None) -> str:
    """Return the generated part of the page."""
    lines = [BEGIN, ""]
    if facts:
        lines += [f"**Where the numbers come from:** {facts}.", ""]
    for folder in folders:
        lines += [f"Run `{folder.parent.name}`:", "", *facts_of(folder), ""]
    captions = {
        "steps": "Error by size of the step, and predicted against measured change at size 1",
        "path": "First-order against measured changes over whole trainings, and the gain of Gen.",
        "terms": "Mean Delta G by category, its density, and its relation to Delta U and Delta J",
    }
    for key, name in names.items():
        lines += [f"![{captions[key]}]({name})", ""]
    for table in tables(rows):
        lines += markdown(table, rows)
    return "\n".join([*lines, END])


def inserted(path: Path, text: str) -> str:
    """Return the page with the generated part replaced, or the generated part below a title if there is no page yet."""
    if not path.exists():
        return f"# Learning dynamics\n\n{text}\n"
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{path}: has no lines {BEGIN!r} and {END!r}; add them where the tables belong, or name another file")
    return before + text + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dynamics", type=Path, nargs="+", required=True, help="the folders of the runs' dynamics")
    parser.add_argument("--facts", help="command, seeds, machine and checkpoint, to stand above the tables")
    parser.add_argument("--csv", type=Path, help="where all measures are written as a table")
    parser.add_argument("--out", type=Path, required=True, help="the page (Markdown)")
    arguments = parser.parse_args()
    folders, out = arguments.dynamics, arguments.out
    runs = [manifests.read_rows(folder / "claims.parquet", "dynamics_claims") for folder in folders]
    rows = together(runs)
    first = folders[0]
    drawn = {"steps": steps_picture(first), "path": path_picture(first, rows), "terms": terms_picture(first, rows)}
    names = {key: f"{out.stem}-{key}.png" for key in drawn}
    text = inserted(out, page(rows, folders, names, arguments.facts))
    for key, made in drawn.items():
        save(made, out.with_name(names[key]))
    if arguments.csv:
        write_csv(arguments.csv, COLUMNS, rows)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{len(rows)} measures of {len(runs)} runs in {out}")


if __name__ == "__main__":
    run_stage(main)
