"""Say how far people agree about images, with one another and with the judges of a run, and join their answers.

    python -m stages.tools.agreement anna.csv ben.csv --run results/tiny-janus --set validation --out people.csv

The files are those that the review page saves: CSV or Parquet with the columns that the judge of kind `table` reads. Each two
are compared, and what most people say is compared with the model's own verdict and with every external judge of --run. For each
comparison, it prints on how many images both say yes or no, on what share of these they agree, and Cohen's kappa: the agreement
beyond that of two judges who say yes as often as these do, but independently. It is 1 if they always agree and 0 if they agree
no more than by chance. For more than two people there is also Fleiss' kappa, over the images that all of them have judged.
Intervals are 95 %, resampled by image.

--out gets what most people say, and no verdict where as many say yes as no: one file for `judges: {people: {kind: table, files:
[people.csv]}}`, which refuses two verdicts on an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.common.seeds import hash_seed
from stages.judges.table import read_table
from stages.pages.run import Run, images, open_run
from stages.tools.kappa import cohens_kappa, fleiss_kappa

Row = dict[str, Any]
Verdicts = dict[str, bool | None]  # by candidate_id
ROUNDS = 2000
PEOPLE, OWN = "people", "the model's own verdict"


def interval(count: int, measure: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float] | None:
    """Return the 95 % interval of a measure of images, None if fewer than half of the resamples have a value.

    measure: from places of images, int `[rounds, images]`, to values `[rounds]`.
    """
    places = np.random.default_rng(hash_seed("agreement", count)).integers(0, count, (ROUNDS, count))
    values = measure(places)
    values = values[~np.isnan(values)]
    if 2 * len(values) < ROUNDS:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def compared(names: Sequence[str], verdicts: Sequence[Verdicts]) -> Row:
    """Return how far judges agree about the images of which all of them say yes or no.

    With two judges, kappa is Cohen's and agreement is the share on which they agree; with more, kappa is Fleiss' and agreement
    the share on which all agree.
    """
    shared = [name for name in verdicts[0] if all(of.get(name) is not None for of in verdicts)]
    row: Row = {"between": " and ".join(names) if len(names) == 2 else f"all {len(names)} people", "n": len(shared)}
    if not shared:
        return row
    votes = np.array([[bool(of[name]) for of in verdicts] for name in shared])
    if len(names) == 2:
        kappa = float(cohens_kappa(votes[:, 0], votes[:, 1]))
        ends = interval(len(shared), lambda places: cohens_kappa(votes[places, 0], votes[places, 1]))
    else:
        kappa = float(fleiss_kappa(votes))
        ends = interval(len(shared), lambda places: fleiss_kappa(votes[places]))
    row |= {"agreement": float((votes.all(1) | ~votes.any(1)).mean()), "kappa": None if np.isnan(kappa) else kappa}
    return row | ({"kappa_ci_low": ends[0], "kappa_ci_high": ends[1]} if ends and row["kappa"] is not None else {})


def majority(verdicts: Sequence[Verdicts]) -> Verdicts:
    """Return what most people say of each image that somebody has seen; None for a tie, and where nobody says yes or no."""
    found: Verdicts = {}
    for name in dict.fromkeys(name for of in verdicts for name in of):
        said = [of[name] for of in verdicts if of.get(name) is not None]
        yes, no = said.count(True), said.count(False)
        found[name] = None if yes == no else yes > no
    return found


def judges_of(run: Run, name: str) -> dict[str, Verdicts]:
    """Return the verdicts of a run on a set, by judge: the models' own, then every external judge's."""
    if name not in run.sets():
        raise UserError(f"--set {name}: nothing has been drawn for a set of this name; there is {', '.join(run.sets())}")
    found: dict[str, Verdicts] = {OWN: {}}
    known = run.judges(name)
    for group in run.groups(name):
        for row in images(run, group, known).to_pylist():
            found[OWN][row["candidate_id"]] = row["own"]
            for judge in known:
                if row[f"judged {judge}"]:
                    found.setdefault(judge, {})[row["candidate_id"]] = row[f"verdict {judge}"]
    return found


def rows_of(people: dict[str, Verdicts], others: dict[str, Verdicts]) -> list[Row]:
    """Return a row for each two people, for all together, and for most people against each other judge."""
    rows = [compared(pair, [people[name] for name in pair]) for pair in combinations(people, 2)]
    if len(people) > 2:
        rows.append(compared(list(people), list(people.values())))
    most = majority(list(people.values()))
    name = PEOPLE if len(people) > 1 else next(iter(people))
    return rows + [compared([name, judge], [most, verdicts]) for judge, verdicts in others.items()]


def line(row: Row) -> str:
    """Return a row in words."""
    if row.get("agreement") is None:
        return f"{row['between']}: no image of which both say yes or no"
    if row["kappa"] is None:
        kappa = "no kappa, because they say the same of every image"
    else:
        ends = f" ({row['kappa_ci_low']:.2f} to {row['kappa_ci_high']:.2f})" if "kappa_ci_low" in row else ""
        kappa = f"kappa {row['kappa']:.2f}{ends}"
    return f"{row['between']}: {kappa}, agreement {100 * row['agreement']:.1f} %, n {row['n']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="a file for each person, as the review page saves it")
    parser.add_argument("--run", type=Path, help="a run's folder, whose judges are compared with the people")
    parser.add_argument("--set", help="the set of prompts that was judged, such as a benchmark; needed with --run")
    parser.add_argument("--out", type=Path, help="what most people say, as a file for a judge of kind table (CSV)")
    parser.add_argument("--table", type=Path, help="the printed numbers (CSV)")
    arguments = parser.parse_args()
    if bool(arguments.run) != bool(arguments.set):
        raise UserError("--run and --set belong together; give both or neither")
    people = {path.stem: {name: v.matches for name, v in read_table(path, 0.5).items()} for path in arguments.files}
    if len(people) < len(arguments.files):
        raise UserError("two of the files have the same name, so people could not be told apart; rename one of them")
    others = judges_of(open_run(arguments.run), arguments.set) if arguments.run else {}
    rows = rows_of(people, others)
    for row in rows:
        print(line(row))
    if arguments.table:
        write_csv(arguments.table, ("between", "n", "agreement", "kappa", "kappa_ci_low", "kappa_ci_high"), rows)
    if arguments.out:
        said = majority(list(people.values()))
        words = {True: "yes", False: "no", None: ""}
        write_csv(
            arguments.out, ("candidate_id", "verdict"), [{"candidate_id": n, "verdict": words[v]} for n, v in said.items()]
        )
        print(f"{arguments.out}: {len(said)} images, {sum(v is None for v in said.values())} without a verdict")


if __name__ == "__main__":
    run_stage(main)
