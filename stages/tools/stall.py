"""Print the epoch at which an arm should replay: that after which Gen. has stopped rising on a benchmark.

    python -m stages.tools.stall --curves results/*/learning_curves.csv --arm sft

The runs need `evaluate.every_checkpoint`, and `train.fork_epochs` with every epoch that is a candidate
(configs/learning_curves.yaml). The benchmark must not be the one on which results are reported, because here it helps to choose
a setting.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import pandas as pd

from stages.common.errors import UserError, run_stage


def stalled(gen: dict[int, float], least: float) -> int:
    """Return the first epoch after which Gen. rises by less than `least` points, or the last but one if there is none.

    gen: Gen. in percent by epoch, with epoch 0 for the base model. Raises ValueError with fewer than three epochs.
    """
    epochs = sorted(gen)
    if len(epochs) < 3:
        raise ValueError("at least two trained checkpoints are needed")
    rises = itertools.pairwise(epochs[1:])
    return next((epoch for epoch, later in rises if gen[later] - gen[epoch] < least), epochs[-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, nargs="+", required=True, help="learning_curves.csv of one or several runs")
    parser.add_argument("--arm", required=True, help="an arm without replay")
    parser.add_argument("--benchmark", help="the benchmark on which Gen. is looked at (default: the first of the table)")
    parser.add_argument("--least", type=float, default=0.5, help="the least rise in points that counts (default: 0.5)")
    arguments = parser.parse_args()
    try:
        table = pd.concat([pd.read_csv(path) for path in arguments.curves])
        wanted = {
            "benchmark": arguments.benchmark or table["benchmark"].iloc[0],
            "arm": arguments.arm,
            "category": "overall",
            "metric": "gen",
        }
        for column, value in wanted.items():
            table = table[table[column] == value]
        print(stalled(table.groupby("epoch")["value"].mean().to_dict(), arguments.least))
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"--curves {' '.join(map(str, arguments.curves))}: no curve of Gen. of the arm {arguments.arm} ({error}); give the "
            "learning_curves.csv of runs with evaluate.every_checkpoint and an external judge"
        ) from None


if __name__ == "__main__":
    run_stage(main)
