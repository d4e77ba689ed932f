"""Say how far people agree about images, with one another and with the judges of a run, and join their answers.

    python -m stages.tools.agreement anna.csv ben.csv --run results/tiny-janus --set validation --out people.csv

The files are those that the review page saves: CSV or Parquet with the columns that the judge of kind `table` reads. Each two
are compared, and what most people say is compared with the model's own verdict and with every external judge of --run. For each
comparison, it prints on how many images both say yes or no, on what share of these they agree, and Cohen's kappa: the agreement
beyond that of two judges who say yes as often as these do, but independently. It is 1 if they always agree and 0 if they agree
no more than by chance. For more than two people there is also Fleiss' kappa, over the images that all of them have judged.
Intervals are 95 %, resampled by prompt. Without --run, prompts are not known; then they are resampled by image, and too narrow
if there are several images of a prompt. There is none for images of fewer than 30 prompts, or if all resamples are equal.

--out gets what most people say, and no verdict where as many say yes as no: one file for `judges: {people: {kind: table, files:
[people.csv]}}`, which refuses two verdicts on an image.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from stages.common.errors import UserError, run_stage
from stages.common.files import write_csv
from stages.common.seeds import hash_seed
from stages.judges.table import read_table
from stages.pages.run import Run, images, open_run
from stages.tools.kappa import agree, agree_all

Row = dict[str, Any]
Verdicts = dict[str, bool | None]  # by candidate_id
PEOPLE, OWN = "people", "the model's own verdict"


def compared(names: Sequence[str], verdicts: Sequence[Verdicts], prompts: dict[str, str]) -> Row:
    """Return how far judges agree about the images of which all of them say yes or no.

    With two judges, kappa is Cohen's and agreement is the share on which they agree; with more, kappa is Fleiss' and agreement
    the share on which all agree. prompts: the prompt of each image, by candidate_id; others count as prompts of their own.
    """
    shared = [name for name in verdicts[0] if all(of.get(name) is not None for of in verdicts)]
    row: Row = {"between": " and ".join(names) if len(names) == 2 else f"all {len(names)} people", "n": len(shared)}
    if not shared:
        return row
    votes = np.array([[bool(of[name]) for of in verdicts] for name in shared])
    of_image, seed = np.array([prompts.get(name, name) for name in shared]), hash_seed("agreement", *names)
    if len(names) == 2:
        equal, kappa = agree(votes[:, 0], votes[:, 1], of_image, seed)
    else:
        equal, kappa = agree_all(votes, of_image, seed)
    return row | {"agreement": equal.value, "kappa": kappa.value, "kappa_ci_low": kappa.low, "kappa_ci_high": kappa.high}


def majority(verdicts: Sequence[Verdicts]) -> Verdicts:
    """Return what most people say of each image that somebody has seen; None for a tie, and where nobody says yes or no."""
    found: Verdicts = {}
    for name in dict.fromkeys(name for of in verdicts for name in of):
        said = [of[name] for of in verdicts if of.get(name) is not None]
        yes, no = said.count(True), said.count(False)
        found[name] = None if yes == no else yes > no
    return found


def judges_of(run: Run, name: str) -> tuple[dict[str, Verdicts], dict[str, str]]:
    """Return the verdicts of a run on a set, by judge, and each image's prompt. The models' own verdicts come first."""
    if name not in run.sets():
        raise UserError(f"--set {name}: nothing has been drawn for a set of this name; there is {', '.join(run.sets())}")
    found: dict[str, Verdicts] = {OWN: {}}
    prompts: dict[str, str] = {}
    known = run.judges(name)
    for group in run.groups(name):
        for row in images(run, group, known).to_pylist():
            prompts[row["candidate_id"]] = row["prompt_id"]
            found[OWN][row["candidate_id"]] = row["own"]
            for judge in known:
                if row[f"judged {judge}"]:
                    found.setdefault(judge, {})[row["candidate_id"]] = row[f"verdict {judge}"]
    return found, prompts


def rows_of(people: dict[str, Verdicts], others: dict[str, Verdicts], prompts: dict[str, str]) -> list[Row]:
    """Return a row for each two people, for all together, and for most people against each other judge."""
    rows = [compared(pair, [people[name] for name in pair], prompts) for pair in combinations(people, 2)]
    if len(people) > 2:
        rows.append(compared(list(people), list(people.values()), prompts))
    most = majority(list(people.values()))
    name = PEOPLE if len(people) > 1 else next(iter(people))
    return rows + [compared([name, judge], [most, verdicts], prompts) for judge, verdicts in others.items()]


def line(row: Row) -> str:
    """Return a row in words."""
    if row.get("agreement") is None:
        return f"{row['between']}: no image of which both say yes or no"
    if row["kappa"] is None:
        kappa = "no kappa, because they say the same of every image"
    else:
        ends = f" ({row['kappa_ci_low']:.2f} to {row['kappa_ci_high']:.2f})" if row["kappa_ci_low"] is not None else ""
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
    others, prompts = judges_of(open_run(arguments.run), arguments.set) if arguments.run else ({}, {})
    rows = rows_of(people, others, prompts)
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
