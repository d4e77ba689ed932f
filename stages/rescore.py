"""Score the stored answers of a judge again, under the rules and the threshold of another one.

    python -m stages.rescore --config config.yaml --judge objects-upstream --prompts prompts.parquet \\
        --verdicts verdicts/objects/spatial.parquet --out verdicts/objects-upstream/spatial.parquet

The two judges must be of one kind and differ only in their rules and their threshold (`stages.tools.rescoring`). No image is
read, no model is loaded, and the verdicts are those that the judge would give if it looked at the images itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from stages.common import manifests
from stages.common.config import load
from stages.common.errors import UserError, run_stage
from stages.common.registry import entry
from stages.judges import judge_kind


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--judge", required=True, help="a name from the section judges, whose rules are applied")
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--verdicts", type=Path, required=True, help="verdict manifest of the judge that saw the images")
    parser.add_argument("--categories", nargs="+", help="only images whose prompts belong to these categories; default: all")
    parser.add_argument("--out", type=Path, required=True, help="verdict manifest (Parquet)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    name, categories = arguments.judge, arguments.categories
    try:
        settings = load(arguments.config).judge(name)
    except ValueError as error:
        raise UserError(f"--judge {name}: {error}") from None
    kind = judge_kind(settings.kind)
    if kind.from_answer is None:
        raise UserError(
            f"--judge {name}: answers of the kind {settings.kind} cannot be scored again; use python -m stages.judge"
        )
    known = manifests.read_rows(arguments.verdicts, "verdicts")
    prompts = manifests.prompts_of(arguments.prompts, known)
    rows = []
    for row in known:
        prompt = prompts[row["prompt_id"]]
        if categories is None or prompt["category"] in categories:
            try:
                verdict = kind.from_answer(settings, prompt, row["answer"] or "")
            except ValueError as error:
                raise UserError(
                    f"{arguments.verdicts}: image {row['candidate_id']}: {error}; remove the file, so that its images are "
                    "judged again"
                ) from None
            told = {"verdict": verdict.matches, "score": verdict.score, "answer": verdict.answer, "reason": verdict.reason}
            rows.append(row | told | {"judge": name})
    facts = {
        "judge": name,
        "settings": settings.outcome(),
        "answers": sorted({row["judge"] for row in known}),
        "categories": sorted(set(categories)) if categories else None,
    }
    parents = [arguments.prompts, arguments.verdicts]
    uses = [entry("JUDGES", settings.kind), *kind.uses(settings)]
    manifests.write(arguments.out, "verdicts", rows, stage="stages.rescore", settings=facts, parents=parents, uses=uses)
    print(f"{name}: {len(rows)} of {len(known)} answers scored again")


if __name__ == "__main__":
    run_stage(main)
