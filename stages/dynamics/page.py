"""Tables and pictures of learning dynamics, for one run or for runs with several seeds.

    python -m stages.dynamics.page --dynamics results/tiny-janus/dynamics --out results/tiny-janus/dynamics/page.md
    python -m stages.dynamics.page --dynamics results/dynamics-100/dynamics results/dynamics-101/dynamics \\
        --facts "make dynamics, seeds 100 and 101" --out docs/dynamics.md --csv docs/dynamics.csv

Beside the page there are <name>-steps.png, <name>-path.png, <name>-terms.png and <name>-proxies.png, drawn from the first run,
as far as there are claims of their kind. With --proxies, the claims are those of `stages.dynamics.claims --proxies`. If the
page exists and has the lines BEGIN and END, only what is between them is replaced, so that text around the tables stays.

A value is the mean over runs. With one run its interval is that of the run; with two it reaches from the lowest end of both to
the highest; with three or more it is Student's t over the runs, which are then the sample.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
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
LEGEND = """ΔG, ΔU and ΔJ are changes of log p(image | prompt), of log p(prompt | image) over the alternative prompts, and of
the log odds of yes of the branch that answers: in nats, and for learning rate 1 unless a step or a training is named. In
brackets are 95 % intervals, resampled by prompts and training rows, or Student's t over the runs where there are three or more.
There is none where resampling says nothing. n is the number of probes, pairs or rows, of all runs together."""
QUANTITIES = {"g": "ΔG, log p(image | prompt)", "u": "ΔU, log p(prompt | image)", "j": "ΔJ, log odds of yes"}


Split = Callable[[str, str], tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table of the page.

    note: sentences below the title that say what rows and columns are. keep: whether a group is shown. split: from group and
    measure to the names of row and column. digits: significant digits of its numbers, or decimals: their decimal places.
    """

    claim: str
    title: str
    note: str
    keep: Callable[[str], bool] = lambda group: True
    split: Split = lambda group, measure: (group, measure)
    digits: int = 3
    decimals: int | None = None


def last_epochs(groups: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a group of the claim `path` is of its arm's last epoch."""
    ends: dict[str, int] = {}
    for arm, _, epoch, _ in (group.split(", ") for group in groups):
        ends[arm] = max(ends.get(arm, 0), int(epoch.split()[1]))
    return lambda group: int(group.split(", ")[2].split()[1]) == ends[group.split(", ")[0]]


def shown_sizes(groups: Iterable[str]) -> Callable[[str], bool]:
    """Return whether a group of the claim `step` is of the size nearest to 1, of the smallest, or of no single size."""
    groups = list(groups)
    sizes = {float(group.rsplit("size ", 1)[1]) for group in groups if "size " in group}
    shown = {min(sizes), min(sizes, key=lambda size: abs(np.log(size)))} if sizes else set()
    return lambda group: "size " not in group or float(group.rsplit("size ", 1)[1]) in shown


def size_beside(group: str, measure: str) -> tuple[str, str]:
    """Return row and column of the claim `step`: the size of the step belongs to the column."""
    if measure == "adamw_by_sgd":
        group = ", adamw, ".join(group.split(", "))
    row, _, size = group.partition(", size ")
    return row, f"{measure}, size {size}" if size else measure


def judge_beside(group: str, measure: str) -> tuple[str, str]:
    """Return row and column of the claim `judges`: which of the two judges belongs to the column."""
    row, _, judge = group.rpartition(", ")
    return (row, f"{measure}, {judge}") if row else (judge, measure)


def at_base(group: str) -> bool:
    """Return whether a group is of the base model, exactly or by compressed gradients."""
    return group.split(", ")[0] in ("base", "compressed")


def tables(rows: Sequence[Row]) -> list[Table]:
    followed, stepped = ([row["group"] for row in rows if row["claim"] == claim] for claim in ("path", "step"))
    moved = ("rows", "pairs", "training")
    return [
        Table(
            "step",
            "One step: predicted against measured",
            "A step of size 1 is as long as AdamW's first step at the arm's learning rate. *slope*: of the measured change on "
            "the predicted one, over probes; 1 if the first order is right. *error*: length of their difference as a share of "
            "the prediction's. *order*: by which power of the size this difference falls; 2 if only the second order is "
            "missing. *adamw by sgd*: correlation over probes of what gradient descent is predicted to change with what "
            "AdamW's step of that length changed.",
            keep=shown_sizes(stepped),
            split=size_beside,
        ),
        Table(
            "path",
            "A whole training: first-order terms against the measured change",
            "At the end of training, over probes. *summed* adds up first-order terms along the training; *from base* is the "
            "term at the base model, as if the kernel never changed. The errors of a sum add up: it is the worse one where a "
            "piece of an epoch (dynamics.segments) is longer than the first order reaches. *slope*: of the measured change on "
            "it; 1 if it is right. *explained*: squared correlation, also where the slope is negative.",
            keep=last_epochs(followed),
        ),
        Table(
            "gain",
            "Gain of Gen.",
            "In points. *measured*: trained minus base on newly drawn images of the benchmark, by the external judge. "
            "*measured on probes*: the base model's images, weighed by exp(change of their log-likelihood), which is the gain "
            "in expectation; it rests on as many images as *effective images* says, and means little where these are few. "
            "*first order*: the same with the summed first-order ΔG in place of the exponential.",
            decimals=1,
        ),
        Table(
            "judging",
            "The answering branch on the base model's images",
            "*before*: percent of verdicts of the base model that the external judge confirms. *measured*: that share after "
            "training minus before, in points. *first order*: the same with the change of the log odds that the summed "
            "first-order terms predict. *verdicts foretold*: percent of the trained model's verdicts that this prediction "
            "gives.",
            decimals=1,
        ),
        Table(
            "signs",
            "Pairs in which two terms have the same sign",
            "Over pairs of a probe and a row of SFT, at the base model. *same*: share of pairs. *more than chance*: that "
            "share minus the one of independent signs with the same frequencies. *large* and *small*: pairs whose |ΔG| is "
            "above the median, or not.",
            keep=lambda group: group.startswith("base, sft"),
        ),
        Table(
            "category",
            "Training rows of the probe's own category and of others",
            "Means over pairs at the base model; other checkpoints are among the measures. *kernel*: the row is another probe, "
            "and its log-likelihood itself is raised.",
            keep=at_base,
        ),
        Table(
            "judges",
            "The posterior over alternative prompts against the branch that answers",
            "*rank correlation* of the two over probes; *equal verdicts*: how often the prompt is the likeliest one where the "
            "branch says yes, and not where it says no. *auc* and *accuracy*: of each for the external judge's verdict.",
            keep=lambda group: group.split(", ")[-1] not in moved,
            split=judge_beside,
        ),
        Table(
            "judges",
            "Whether both are moved together",
            "Correlation of ΔU with ΔJ: over training rows (of their means over probes), over pairs, and over probes of what "
            "the whole training changed.",
            keep=lambda group: group.split(", ")[-1] in moved,
        ),
        Table(
            "rows",
            "Effect of training rows",
            "Means over probes and rows at the base model. *gen*: of (right - mean right) ΔG; above zero, Gen. rises. "
            "*judge*: of ΔJ, counted negative for wrong images; above zero, the answering branch judges better. *size*: of "
            "|ΔG|. *wrong*: rows that the external judge rejects; *right*: others of the first round; *replayed*: rows that "
            "replay has recovered.",
            keep=at_base,
        ),
        Table(
            "corrections",
            "Similarity to the nearest training pair",
            "Cosine of the prompt's embedding with that of the nearest training prompt of the first selection, and of the "
            "image's with that of this pair's image. *corrected*: wrong images that the base model accepts and the trained one "
            "refuses. *kept*: that both accept. *random*: all images that are not corrected.",
        ),
        Table(
            "proxies",
            "Similarities and the kernel",
            "Rank correlation, over pairs of probes, of a similarity with the cosine of the gradients of their "
            "log-likelihoods. *within*: pairs of one category only.",
        ),
        Table(
            "kernel",
            "The kernel between logits",
            "*trace*: of the kernel of an image with itself, mean over probes. *effective rank*: its squared trace by its "
            "squared norm. *alignment*: trace between two images by the root of both traces, for pairs of one category and of "
            "two.",
        ),
        Table(
            "density",
            "Distribution of ΔG over pairs",
            "*above zero*: share of pairs. *kernel*: pairs of two probes, with the summed loss of the paper. *compressed*: "
            "estimates from compressed gradients, whose errors widen the distribution; *beyond noise* is the share of pairs "
            "whose estimate exceeds twice the standard deviation of its error (five percent would be chance).",
        ),
        Table(
            "sketch",
            "Compressed gradients against exact terms",
            "Over pairs: correlation of the estimated with the exact ΔG, and share with the same sign.",
        ),
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


def decimals_of(value: float, table: Table) -> int | None:
    """Return the decimal places with which a table shows a value and its interval; None where it needs an exponent."""
    if table.decimals is not None:
        return table.decimals
    if abs(value) < 1e-12:  # what rounding leaves of zero
        return 0
    places = table.digits - 1 - int(np.floor(np.log10(abs(value))))
    return max(places, 0) if -4 < places < 7 else None


def written(row: Row | None, table: Table) -> str:
    """Return a value with its interval, such as 0.98 (0.95 to 1.01)."""
    if row is None:
        return ""
    places = decimals_of(row["value"], table)

    def number(value: float) -> str:
        if places is None:
            return f"{value:.{table.digits}g}"
        return f"{round(value, places) + 0.0:.{places}f}".replace("-", "\N{MINUS SIGN}")  # adding zero turns -0.0 into 0.0

    text = number(row["value"])
    return text if row["ci_low"] is None else f"{text} ({number(row['ci_low'])} to {number(row['ci_high'])})"


def named(text: str) -> str:
    """Return the name of a group or measure as the page shows it."""
    symbols = {"g": "ΔG", "u": "ΔU", "j": "ΔJ"}
    parts = [" and ".join(symbols.get(word, word) for word in part.split(" and ")) for part in text.split(", ")]
    return ", ".join(parts).replace("_", " ")


def markdown(table: Table, rows: Sequence[Row]) -> list[str]:
    """Return the lines of a table: a line for each group, a column for each measure."""
    cells: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row["claim"] == table.claim and table.keep(row["group"]):
            cells[table.split(row["group"], row["measure"])] = row
    if not cells:
        return []
    columns = list(dict.fromkeys(column for _, column in cells))
    lines = [f"### {table.title}", "", table.note, ""]
    lines += [f"| {table.claim} | {' | '.join(map(named, columns))} | n |", "|---" * (len(columns) + 2) + "|"]
    for name in dict.fromkeys(name for name, _ in cells):
        count = max(row["n"] for (of, _), row in cells.items() if of == name)
        texts = [written(cells.get((name, column)), table) for column in columns]
        lines.append(f"| {named(name)} | {' | '.join(texts)} | {count} |")
    return [*lines, ""]


# --- pictures --------------------------------------------------------------------------------------------------------


def figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(4.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, squeeze=False)


def steps_picture(folder: Path) -> Any:
    """Return the error by size, and predicted against measured at the size nearest to 1, for every quantity."""
    table = manifests.read(folder / "steps.parquet", "dynamics_steps").to_pandas()
    shown = [name for name in QUANTITIES if name in set(table.quantity)]
    usual = min(table["size"].unique(), key=lambda size: abs(np.log(size)))
    made, axes = figure(2, len(shown))
    for column, quantity in enumerate(shown):
        part = table[table.quantity == quantity]
        for (objective, optimizer), lines in part.groupby(["objective", "optimizer"]):
            errors = lines.groupby("size").apply(lambda at: np.linalg.norm(at.measured - at.predicted), include_groups=False)
            axes[0, column].loglog(errors.index, errors.to_numpy(), marker="o", markersize=3, label=f"{objective}, {optimizer}")
            at = lines[lines["size"] == usual]
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
        axes[1, column].locator_params(axis="x", nbins=5)
        axes[1, column].set(xlabel=f"predicted, size {usual:g}", ylabel="measured")
    axes[0, 0].legend(fontsize=7)
    return made


def diagonal(axis: Any) -> None:
    low, high = min(axis.get_xlim()[0], axis.get_ylim()[0]), max(axis.get_xlim()[1], axis.get_ylim()[1])
    axis.plot([low, high], [low, high], "k:", linewidth=1)


def path_picture(files: Sequence[Path], rows: Sequence[Row]) -> Any:
    """Return measured against summed changes at the end of training, and the gain of Gen. by category, for every arm."""
    made, axes = figure(max(1, len(files)), len(QUANTITIES) + 1)
    for line, path in enumerate(files):
        table = manifests.read(path, "dynamics_path").to_pandas()
        end = table[table.epoch == table.epoch.max()]
        for column, quantity in enumerate(QUANTITIES):
            part, axis = end[end.quantity == quantity], axes[line, column]
            axis.scatter(part.from_base, part.measured, s=5, color="0.75", label="kernel of the base model")
            axis.scatter(part.summed, part.measured, s=5, label="summed along the training")
            diagonal(axis)
            axis.locator_params(axis="x", nbins=5)
            axis.set(title=f"{path.stem}: {QUANTITIES[quantity]}", xlabel="first order", ylabel="measured")
        gains = [row for row in rows if row["claim"] == "gain" and row["group"].startswith(f"{path.stem}, ")]
        groups, axis = list(dict.fromkeys(row["group"].split(", ")[1] for row in gains)), axes[line, -1]
        for place, measure in enumerate(("first_order", "measured_on_probes", "measured")):
            mine = {row["group"].split(", ")[1]: row for row in gains if row["measure"] == measure}
            at = [k + 0.27 * (place - 1) for k, group in enumerate(groups) if group in mine]
            known = [mine[group] for group in groups if group in mine]
            axis.bar(at, [row["value"] for row in known], 0.27, label=named(measure))
            for where, row in zip(at, known, strict=True):
                if row["ci_low"] is not None:
                    axis.plot([where, where], [row["ci_low"], row["ci_high"]], color="0.3", linewidth=0.8)
        axis.set_xticks(range(len(groups)), groups, rotation=60, fontsize=7)
        axis.set(title=f"{path.stem}: gain of Gen., points")
    if files:
        axes[0, 0].legend(fontsize=7)
        axes[0, -1].legend(fontsize=7)
    return made


def terms_picture(files: Sequence[Path], rows: Sequence[Row]) -> Any:
    """Return mean Delta G by category, the density of Delta G, and Delta G against Delta U and Delta J."""
    import pandas

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
    axes[0, 0].set(title="mean ΔG, SFT, learning rate 1", xlabel="training row", ylabel="probe")
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


def proxies_picture(files: Sequence[Path], rows: Sequence[Row]) -> Any:
    """Return the density of Delta G by compressed gradients, and similarities of images to their nearest training pair."""
    sketches: dict[str, list[Any]] = {}
    for row in manifests.read_rows(files, "dynamics_sketches"):
        sketches.setdefault(row["kind"], []).append(row["sketch"])
    made, axes = figure(1, 3)
    for objective in (name for name in ("sft", "dpo") if name in sketches):
        values = (np.array(sketches["probe"]) @ np.array(sketches[objective]).T).ravel()
        scaled = np.clip(values / np.median(np.abs(values)), -10, 10)
        axes[0, 0].hist(scaled, bins=80, density=True, histtype="step", label=objective)
    axes[0, 0].axvline(0, color="k", linewidth=0.5)
    axes[0, 0].set(title="density of ΔG, compressed gradients", xlabel="ΔG by its median size, cut at 10")
    axes[0, 0].legend(fontsize=7)
    near = {(row["group"], row["measure"]): row for row in rows if row["claim"] == "corrections"}
    places = list(dict.fromkeys(group.rsplit(", ", 1)[0] for group, _ in near))
    for axis, measure in zip(axes[0, 1:], ("prompt", "image"), strict=True):
        for shift, kind in enumerate(("corrected", "kept", "random")):
            found = [(k, near.get((f"{place}, {kind}", measure))) for k, place in enumerate(places)]
            for place, row in ((k, row) for k, row in found if row is not None):
                label = kind if place == min(k for k, row in found if row is not None) else None
                height = place + 0.22 * (shift - 1)
                axis.plot(row["value"], height, "o", markersize=4, color=f"C{shift}", label=label)
                if row["ci_low"] is not None:
                    axis.plot([row["ci_low"], row["ci_high"]], [height, height], color=f"C{shift}", linewidth=1)
        axis.set_yticks(range(len(places)), places, fontsize=7)
        axis.set(title=f"{measure} similarity to training", xlabel="cosine to the nearest training pair, 95 % interval")
        axis.set_ylim(max(len(places), 1) - 0.5, -0.5)
    if near:
        axes[0, 1].legend(fontsize=7)
    return made


def save(made: Any, path: Path) -> None:
    with whole_file(path) as temporary:
        made.savefig(temporary, format="png", dpi=90)


# --- the page --------------------------------------------------------------------------------------------------------


def has(rows: Sequence[Row], claim: str, group: str = "") -> bool:
    """Return whether there is a claim whose group begins like that."""
    return any(row["claim"] == claim and row["group"].startswith(group) for row in rows)


def sources(claims: Path) -> dict[str, list[Path]]:
    """Return the files that a manifest of claims was made from, by the folder that they are in, such as base/terms."""
    names = manifests.facts(claims).get("settings", {}).get("files")
    if names is None:
        raise UserError(f"{claims}: does not say which files it was made from; run stages.dynamics.claims again")
    found: dict[str, list[Path]] = defaultdict(list)
    for name in names:
        found[str(Path(name).parent)].append(claims.parent / name)
    return found


def facts_of(files: dict[str, list[Path]]) -> list[str]:
    """Return what a run's terms, or else its compressed gradients, were computed from."""
    found = next((path for name in ("base/terms", "sketches") for path in files[name]), None)
    if found is None:
        return []
    terms = manifests.facts(found)["settings"]
    lines = [f"- likelihood: {terms['likelihood']}; checkpoint {terms['checkpoint']}; trained parameters: {terms['trainable']}"]
    if terms["likelihood"] != "exact":
        lines.append(
            "- The family's likelihood is no exact one: all terms are those of its bound or estimate under fixed random draws."
        )
    for path in files["path"]:
        apart = manifests.facts(path)["settings"]["distance"]
        if apart is not None:
            lines.append(
                f"- {path.stem}: the weights of the repeated training differ from the trainer's by {apart:.2%} of the distance "
                "that training moved them"
            )
    return lines


def left_out(rows: Sequence[Row]) -> list[str]:
    """Return a sentence that names the claims for which nothing was computed, if there are any."""
    parts = {
        "step": "predicted against measured steps",
        "path": "followed trainings",
        "signs": "exact terms",
        "kernel": "the kernel between logits, which needs a family with logits of image tokens",
        "corrections": "similarities to training pairs, which need an embedding of prompts and a trained arm",
        "density": "the density of ΔG",
    }
    missing = [text for claim, text in parts.items() if not has(rows, claim)]
    return [f"Left out, because it was not computed: {'; '.join(missing)}.", ""] if missing else []


def page(
    rows: Sequence[Row],
    folders: Sequence[Path],
    files: Sequence[dict[str, list[Path]]],
    names: dict[str, str],
    facts: str | None,
) -> str:
    """Return the generated part of the page. files: those of each run, as `sources` returns them."""
    lines = [BEGIN, ""]
    if facts:
        lines += [f"**Where the numbers come from:** {facts}.", ""]
    for folder, of_run in zip(folders, files, strict=True):
        lines += [f"Run `{folder.parent.name}`:", "", *facts_of(of_run), ""]
    lines += left_out(rows)
    captions = {
        "steps": "Error by size of the step, and predicted against measured change at size 1",
        "path": "First-order against measured changes over whole trainings, and the gain of Gen.",
        "terms": "Mean Delta G by category, its density, and its relation to Delta U and Delta J",
        "proxies": "Density of Delta G by compressed gradients, and similarity of images to their nearest training pair",
    }
    for key, name in names.items():
        lines += [f"![{captions[key]}]({name})", ""]
    lines += [LEGEND, ""]
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
    parser.add_argument("--proxies", action="store_true", help="show the claims that need no exact terms, proxies.parquet")
    parser.add_argument("--csv", type=Path, help="where all measures are written as a table")
    parser.add_argument("--out", type=Path, required=True, help="the page (Markdown)")
    arguments = parser.parse_args()
    folders, out = arguments.dynamics, arguments.out
    claims = [folder / ("proxies.parquet" if arguments.proxies else "claims.parquet") for folder in folders]
    runs = [manifests.read_rows(path, "dynamics_claims") for path in claims]
    rows, files = together(runs), [sources(path) for path in claims]
    first = files[0]
    pictures: dict[str, tuple[bool, Callable[[], Any]]] = {
        "steps": (has(runs[0], "step"), lambda: steps_picture(folders[0])),
        "path": (has(runs[0], "path"), lambda: path_picture(first["path"], rows)),
        "terms": (has(runs[0], "signs"), lambda: terms_picture(first["base/terms"], rows)),
        "proxies": (has(runs[0], "density", "compressed"), lambda: proxies_picture(first["sketches"], rows)),
    }
    drawn = {key: draw() for key, (known, draw) in pictures.items() if known}
    names = {key: f"{out.stem}-{key}.png" for key in drawn}
    text = inserted(out, page(rows, folders, files, names, arguments.facts))
    for key, made in drawn.items():
        save(made, out.with_name(names[key]))
    if arguments.csv:
        write_csv(arguments.csv, COLUMNS, rows)
    with whole_file(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"{len(rows)} measures of {len(runs)} runs in {out}")


if __name__ == "__main__":
    run_stage(main)
