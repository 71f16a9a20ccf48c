"""What a run writes to disk, at most: policies, moments, the checkpoints of the update that goes on, and tables."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoints import MOST_AT_ONCE
from pipeline.config import Config
from pipeline.plan.fit import Shortage, lengths_of
from pipeline.plan.memory import size
from pipeline.plan.model_facts import bytes_of
from pipeline.plan.rounds import ID_BYTES, LOGP_BYTES, ROW_BYTES, TEXT_BYTES, RoundOutlook
from pipeline.plan.survey import Survey
from pipeline.plan.training import trained_parameters

_BESIDES_KEPT = 2  # rounds whose weights `prefloop clean` leaves beside the last ones: the best one's, and its start's


@dataclass(frozen=True, slots=True)
class Disk:
    """What is yet to be written.

    Attributes:
        policy_bytes: of one policy with its master and, where they are kept, AdamW's moments and the adapters; None, as
            all that follows from it, where the model is not known.
        num_policies: policies with their mixtures.
        num_checkpoints: of one update that are there at once, while the last is being written.
        checkpoint_bytes: of each.
        tables_bytes: of all tables.
        free_bytes: free where the run's folder lies; None where that is another machine.
        num_cleaned: policies that `prefloop clean` leaves at most.
    """

    policy_bytes: int | None
    num_policies: int
    num_checkpoints: int
    checkpoint_bytes: int | None
    tables_bytes: int
    free_bytes: int | None
    num_cleaned: int

    @property
    def policies_bytes(self) -> int | None:
        """Of all policies."""
        return None if self.policy_bytes is None else self.num_policies * self.policy_bytes

    @property
    def checkpoints_bytes(self) -> int | None:
        """Of the checkpoints that are there at once; they go once the update's policy is published."""
        return None if self.checkpoint_bytes is None else self.num_checkpoints * self.checkpoint_bytes

    @property
    def total_bytes(self) -> int | None:
        """At the most, before the last update's checkpoints go."""
        return self._with(self.num_policies)

    @property
    def cleaned_bytes(self) -> int | None:
        """The same, if `prefloop clean` runs after every round: one more policy than it leaves."""
        return self._with(min(self.num_policies, self.num_cleaned + 1))

    def _with(self, num_policies: int) -> int | None:
        if self.policy_bytes is None or self.checkpoints_bytes is None:
            return None
        return num_policies * self.policy_bytes + self.checkpoints_bytes + self.tables_bytes

    @property
    def told(self) -> str:
        """In words."""
        free = "" if self.free_bytes is None else f"; {size(self.free_bytes)} are free"
        tables = f"some {size(self.tables_bytes)} of tables at most"
        policies = "1 policy" if self.num_policies == 1 else f"{self.num_policies} policies"
        total, cleaned = self.total_bytes, self.cleaned_bytes
        if self.policy_bytes is None or total is None or cleaned is None:
            return f"{tables}, and {policies}{free}"
        checkpoints = ""
        if self.num_checkpoints:
            checkpoints = f", {self.num_checkpoints} x {size(self.checkpoint_bytes or 0)} of checkpoints in an update"
        less = f"; {size(cleaned)} with prefloop clean after every round" if cleaned < total else ""
        return f"{size(total)}: {policies} of {size(self.policy_bytes)}{checkpoints}, and {tables}{less}{free}"


def disk_of(config: Config, survey: Survey, ahead: Sequence[RoundOutlook], *, elsewhere: bool) -> Disk:
    """What the rounds ahead write.

    Args:
        elsewhere: the run's folder is on another machine.
    """
    configs = [config.for_round(found.number) for found in ahead]
    facts = survey.policy.facts
    a_policy = a_checkpoint = None
    if facts is not None:
        dtype, trained = config.policy.dtype, [trained_parameters(facts, found.update) for found in configs]
        a_policy = facts.num_parameters * (bytes_of(dtype) + (0 if dtype == "float32" else 4))
        a_policy += max((_beside(found, num) for found, num in zip(configs, trained, strict=True)), default=0)
        a_checkpoint = 12 * max(trained, default=0)  # weights and two moments, in float32
    per_round = max((found.num_policies for found in ahead), default=1)
    evaluations = (len(ahead) + 1) * _evaluation_bytes(config, survey)
    return Disk(
        policy_bytes=a_policy,
        num_policies=sum(found.num_policies for found in ahead),
        num_checkpoints=max((_num_checkpoints(*each) for each in zip(configs, ahead, strict=True)), default=0),
        checkpoint_bytes=a_checkpoint,
        tables_bytes=sum(found.tables_bytes for found in ahead) + evaluations,
        free_bytes=None if elsewhere else _free_bytes(config.folder()),
        num_cleaned=(config.run.keep + _BESIDES_KEPT) * per_round,
    )


def _beside(config: Config, num_trained: int) -> int:
    """Bytes beside a round's policy: its adapters, and AdamW's moments where the next round goes on with them."""
    update = config.update
    return 4 * num_trained * (update.lora is not None) + 8 * num_trained * update.keep_optimizer


def _num_checkpoints(config: Config, found: RoundOutlook) -> int:
    """How many are there at once; after the last step none is written."""
    update = config.update
    if update.checkpoint_minutes is None and update.checkpoint_steps is None:
        return 0
    by_steps = found.most_steps - 1
    if update.checkpoint_minutes is None and update.checkpoint_steps is not None:
        by_steps //= update.checkpoint_steps
    return max(0, min(MOST_AT_ONCE, by_steps))


def _evaluation_bytes(config: Config, survey: Survey) -> int:
    if config.evaluate is None:
        return 0
    each = lengths_of(config, survey).answer * (ID_BYTES + TEXT_BYTES + LOGP_BYTES) + 2 * ROW_BYTES
    return config.evaluate.num_prompts * each


def _free_bytes(folder: Path) -> int:
    """Free where a folder is, or will be."""
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return shutil.disk_usage(there).free


def disk_shortage(config: Config, disk: Disk) -> Shortage | None:
    """What is too little, if it is; certain where the policies alone are."""
    total, free = disk.total_bytes, disk.free_bytes
    if total is None or free is None or total <= free:
        return None
    cleaned = disk.cleaned_bytes or total
    clean = "prefloop clean after every round has room, " if cleaned <= free else ""
    return Shortage(
        f"disk under run.dir {config.run.dir}",
        f"{size(total)}, of which {size(disk.policies_bytes or 0)} are policies",
        f"{size(free)} free",
        f"{clean}make room, or name another place: --set run.dir=…",
        (disk.policies_bytes or 0) > free,
        missing_bytes=total - free,
    )
