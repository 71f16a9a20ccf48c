"""Whether a step scores rejected answers without a graph first, to leave out the backward of those without gradient.

With P, C and R the tokens of prompts, chosen and rejected answers, and a the share of the rejected ones that do get a
gradient, a step costs ``3 (P + C + R)`` forwards of a token with everything in one forward, and ``3 (P + C) + R +
3 a R`` with skipping: it pays below a = 2/3, less what further forwards cost.
"""

from __future__ import annotations

from dataclasses import dataclass

BORDER = 0.6
"""The active share up to which skipping saves time, measured with prompts of 64 and of 512 tokens."""


@dataclass(slots=True)
class Skipping:
    """Goes by the last step's active share, which is equal on all ranks.

    Attributes:
        allowed: whether an objective has a gate that lets no gradient through to a rejected answer.
        active_share: of the last step's rejected tokens; None before the first step.
    """

    allowed: bool
    active_share: float | None = None

    def now(self, *, at_reference: bool) -> bool:
        """Whether the next step skips.

        Args:
            at_reference: whether the policy is its reference, so that every gate is closed.
        """
        if not self.allowed:
            return False
        return at_reference or (self.active_share is not None and self.active_share <= BORDER)

    def expected_share(self, *, at_reference: bool) -> float:
        return 0.0 if at_reference or self.active_share is None else self.active_share
