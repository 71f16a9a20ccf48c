"""The loop, and nothing else."""

from __future__ import annotations

from pipeline.run import Run
from stages.protocols import Weights


def align(run: Run) -> Weights:
    """Align the run's policy, round by round; what is published already is not done again."""
    run.evaluate_first()
    for rnd in run.unfinished_rounds():
        data = rnd.collect(rnd.sampling)  # sample -> score -> pair, shard by shard; a handle, not tables
        references = rnd.reference_logps(data, rnd.references)
        result = rnd.update(rnd.start, data, references)
        run.settle(rnd, rnd.gate(result))  # promote, hold or roll back: fixes the next round's start and references
    return run.result
