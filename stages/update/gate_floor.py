"""How far two log-probs of equal weights are apart by rounding alone, below which no gate may open."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from stages.update.config import FLOAT32_GATE_FLOOR
from stages.update.rows import AnswerRow
from stages.update.scoring import Scoring

NUM_ANSWERS = 32  # whose log-probs are measured in two layouts


def measured_gate_floor(scoring: Scoring, answers: Sequence[AnswerRow], *, forward_size: int) -> float:
    """Three times the mean absolute difference between two layouts of some answers, in nats a sequence.

    Never below float32's floor: a few short answers may agree by chance. Rank 0's measure counts on all.
    """
    rows = answers[:NUM_ANSWERS]
    with torch.no_grad():
        parts = [scoring(rows[i : i + forward_size]).logps_N for i in range(0, len(rows), forward_size)]
        together, alone = torch.cat(parts), torch.cat([scoring([row]).logps_N for row in rows])
    floor = [max(FLOAT32_GATE_FLOOR, 3 * (together - alone).abs().mean().item())]
    dist.broadcast_object_list(floor, src=0)
    return floor[0]
