"""The cells of the kill matrix: whom a fault kills, when, and how it is spelt."""

from __future__ import annotations

from dataclasses import dataclass

WHO = ("driver", "sampler", "scorer", "rank 0", "rank 1", "raylet")
WHEN = ("start", "middle", "while publishing", "just after")


@dataclass(frozen=True)
class Cell:
    """One kill.

    Attributes:
        who: dies.
        when: at which time of its work.
        fault: how it is armed.
        told: where exactly.
    """

    who: str
    when: str
    fault: str
    told: str


CELLS = (
    Cell("driver", "start", "driver.start:kill", "Ray is up, nothing was done"),
    Cell("driver", "middle", "driver.shard[sample]:kill@4", "a shard of answers was told of"),
    Cell("driver", "while publishing", "file.written[round-0001/pairs/manifest.json]:kill", "a manifest, not renamed"),
    Cell("driver", "while publishing", "file.written[run.json]:kill", "a settled round's lineage, not renamed"),
    Cell("driver", "just after", "file.placed[run.json]:kill@2", "a settled round's lineage is there"),
    Cell("sampler", "start", "sample.start[round-0001/candidates]:kill@2", "before a shard"),
    Cell("sampler", "middle", "sample.middle[round-0001/candidates]:kill@3", "its answers are in memory"),
    Cell("sampler", "while publishing", "file.written[round-0002/candidates/part-]:kill", "its part, not renamed"),
    Cell("sampler", "while publishing", "file.written[round-0002/candidates/_shards/part-]:kill@2", "part, no entry"),
    Cell("sampler", "just after", "file.placed[round-0002/candidates/_shards/part-]:kill@3", "the entry is there"),
    Cell("scorer", "start", "score.start[round-0001/scored]:kill@2", "before a shard"),
    Cell("scorer", "middle", "score.middle[round-0001/scored]:kill@3", "its rewards are in memory"),
    Cell("scorer", "while publishing", "file.written[round-0002/scored/part-]:kill", "its part, not renamed"),
    Cell("scorer", "while publishing", "file.written[round-0002/scored/_shards/part-]:kill@2", "part, no entry"),
    Cell("scorer", "just after", "file.placed[round-0002/scored/_shards/part-]:kill@3", "the entry is there"),
    Cell("rank 0", "start", "update.start[round-1/rank-0]:kill", "before the first step"),
    Cell("rank 0", "middle", "update.middle[rank-0]:kill@3", "after an optimizer step"),
    Cell("rank 0", "while publishing", "update.publishing[round-2/rank-0]:kill", "weights written, no manifest"),
    Cell("rank 0", "just after", "update.end[round-2/rank-0]:kill", "the policy is there, nobody was told"),
    Cell("rank 1", "start", "update.start[round-2/rank-1]:kill", "before the first step"),
    Cell("rank 1", "middle", "update.middle[rank-1]:kill@3", "after an optimizer step"),
    Cell("rank 1", "while publishing", "update.publishing[round-2/rank-1]:kill", "while rank 0 publishes"),
    Cell("rank 1", "just after", "update.end[round-1/rank-1]:kill", "rank 0 has published"),
    Cell("raylet", "start", "sample.start[round-0001/candidates]:parent", "as a sampler begins a shard"),
    Cell("raylet", "middle", "update.middle[rank-0]:parent@3", "after an optimizer step"),
    Cell("raylet", "while publishing", "file.written[round-0002/candidates/_shards/part-]:parent", "part, no entry"),
    Cell("raylet", "just after", "file.placed[evaluation/prompts/part-]:parent", "prompts were drawn"),
    Cell("raylet", "just after", "file.placed[round-0002/policy/manifest.json]:parent", "a policy was published"),
)
"""A cell that may be met at two places has two lines. Every cell has a meaning: a rank that publishes nothing, and the
raylet, die while another process publishes."""


def cells_of(who: str) -> list[Cell]:
    return [cell for cell in CELLS if cell.who == who]
