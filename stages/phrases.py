"""Write the noun phrases of a prompt manifest, about which the judge blip-vqa asks, for a person to read and correct.

    python -m stages.phrases --prompts prompts.parquet --out phrases.parquet

spaCy's en_core_web_sm makes them, as upstream's do, where both are installed, and else the rules of stages/suites/phrases.py.
The column made_by says which. A corrected manifest is written again with the same columns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from stages.common import manifests
from stages.common.errors import UserError, run_stage
from stages.suites.phrases import counted, noun_phrases

MODEL = "en_core_web_sm"


def open_spacy() -> Callable[[str], list[str]] | None:
    """Return spaCy's noun chunks as a function, or None where spaCy or its English model is not installed."""
    try:
        import spacy

        parser = spacy.load(MODEL)
    except (ImportError, OSError):
        return None
    return lambda prompt: counted([chunk.text for chunk in parser(prompt).noun_chunks])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="prompt manifest")
    parser.add_argument("--by", choices=("auto", "spacy", "rules"), default="auto", help="auto: spacy where it is installed")
    parser.add_argument("--out", type=Path, required=True, help="phrase manifest (Parquet)")
    arguments = parser.parse_args()
    prompts = manifests.read_rows(arguments.prompts, "prompts")
    chunks = None if arguments.by == "rules" else open_spacy()
    if arguments.by == "spacy" and chunks is None:
        raise UserError(f"--by spacy: spaCy or its model {MODEL} is not installed here; install both, or use --by rules")
    made_by = "spacy" if chunks else "rules"
    rows = [
        {"prompt_id": row["prompt_id"], "prompt": row["prompt"], "phrases": (chunks or noun_phrases)(row["prompt"])}
        for row in prompts
    ]
    manifests.write(
        arguments.out,
        "phrases",
        [row | {"made_by": made_by} for row in rows],
        stage="stages.phrases",
        settings={"made_by": made_by},
        parents=[arguments.prompts],
    )
    print(f"{len(rows)} prompts, {sum(len(row['phrases']) for row in rows)} noun phrases, made by {made_by}")
    if empty := [row["prompt"] for row in rows if not row["phrases"]]:
        print(f"{len(empty)} prompts without a noun phrase, for example {empty[0]!r}; they cannot be judged by blip-vqa")


if __name__ == "__main__":
    run_stage(main)
