"""The study from the command line; what is done already is not done again.

python -m benchmarks.robustness --data DATA                        everything, at most 90 minutes on two cores
python -m benchmarks.robustness --only grid --seeds 1              less
python -m benchmarks.robustness --budget-minutes 0                 the page alone, from what is there
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.robustness.grid import STAGES
from benchmarks.robustness.page import write_page
from benchmarks.robustness.recipes import recipes
from benchmarks.robustness.store import Store
from benchmarks.robustness.study import Study

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seeds", type=int, default=3, help="how many, counted from 0")
    parser.add_argument("--budget-minutes", type=float, default=90.0, help="no cell begins later")
    parser.add_argument("--data", type=Path, help="a folder with stories260k and tinystories; without: no stories")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "robustness", help="where finished cells lie")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page goes")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    asked = parser.parse_args()
    until = time.monotonic() + 60 * asked.budget_minutes
    study = Study(Store(asked.out / "cells.jsonl", recipes()), range(asked.seeds), asked.data)
    if asked.budget_minutes > 0:
        import transformers  # heavy

        from benchmarks.group import process_group

        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        with process_group():
            study.do(asked.only, until=until, num_threads=asked.threads)
    print(write_page(study, asked.docs))


if __name__ == "__main__":
    main()
