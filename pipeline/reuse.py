"""What a run of another config could take over from a run: for every round and stage, whether it stays, and why not.

In go both configs, what the new one names (found and hashed), and the folder of the run; nothing is changed or started.
A stage stays if what it was made from, as its folder says, is what the new config says too, and every stage before it
stays; a round's stages after its update, and all later rounds, stand and fall with its policy.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.lineage import Lineage
from pipeline.reading import round_folders
from pipeline.reuse_reasons import Reasons

STAGES: Mapping[str, tuple[str, ...]] = {
    "prompts": ("prompts",),
    "sample": ("candidates",),
    "score": ("scored", "unscaled"),
    "pair": ("pairs", "groups", "fates"),
    "reference": ("reference_logps*", "reference_answers"),
    "update": (
        "policy",
        "master",
        "optimizer",
        "value_head",
        "adapter",
        "start",
        "ema",
        "metrics.jsonl",
        "skipped.jsonl",
        "update_ended.json",
    ),
    "evaluate": ("evaluation",),
    "settle": ("report.json",),
}
"""A round's stages in their order, and what each leaves in the round's folder."""


@dataclass(frozen=True, slots=True)
class Reused:
    """What becomes of one stage: taken over, or made again for a reason."""

    round: int
    stage: str
    stays: bool
    why: str


@dataclass(frozen=True, slots=True)
class Reuse:
    """What is taken over.

    Attributes:
        stages: every stage of every round of the run, in order.
        num_settled: rounds that are settled as they were.
        inputs: folders of the run itself (pools of prompts, what is evaluated on, the probe) that stay.
    """

    stages: Sequence[Reused]
    num_settled: int
    inputs: Sequence[str] = field(default=())

    def staying(self, round: int) -> list[str]:
        """The stages of a round that stay."""
        return [found.stage for found in self.stages if found.round == round and found.stays]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run and a config that would go on from it.

    Attributes:
        reasons: why single stages cannot stay.
    """

    reasons: Reasons

    def reuse(self) -> Reuse:
        """What the other config can take over."""
        lineage, lost = Lineage.read(self.reasons.folder / "run.json"), frozenset[int]()
        while True:
            found = self._reuse(lineage, lost)
            gone = frozenset(self._weights_gone(lineage, found.num_settled))
            if gone <= lost:
                return found
            lost |= gone

    def _reuse(self, lineage: Lineage, lost: Collection[int]) -> Reuse:
        """What stays where the weights of some rounds have to be made again."""
        stages: list[Reused] = []
        broken, settled = "", 0
        for number, round_folder in round_folders(self.reasons.folder).items():
            if number > self.reasons.new.num_rounds:
                stages += [Reused(number, stage, False, "not asked for") for stage in STAGES]
                continue
            found = list(self._round(number, round_folder, broken, lineage, lost))
            stages += found
            again = next((stage for stage in found if not stage.stays), None)
            if again is not None and number:
                broken = broken or f"round {again.round} {_LATER.get(again.stage, 'makes another policy')}"
            if number and again is None:
                settled = number
        inputs = [name for name in self.reasons.inputs() if name != "probe" or settled]
        return Reuse(stages, settled, inputs)

    def _weights_gone(self, lineage: Lineage, settled: int) -> list[int]:
        """Rounds whose weights the round after the settled ones needs, and that `prefloop clean` dropped."""
        config = self.reasons.new.for_round(settled + 1)
        before = bool(config.momentum) or bool({"ema", "previous"} & set(config.references))
        needed = lineage.line(settled)[: 2 if before else 1]
        folders = {number: self.reasons.folder / f"round-{number:04d}" / "policy" for number in needed}
        return [number for number, policy in folders.items() if not any(policy.glob("*.safetensors"))]

    def _round(
        self, number: int, folder: Path, broken: str, lineage: Lineage, lost: Collection[int]
    ) -> Iterator[Reused]:
        """Its stages; round 0, before the first, has an evaluation alone."""
        reasons = self.reasons
        checks: dict[str, Callable[[], str]] = {
            "prompts": lambda: reasons.prompts(number, folder),
            "sample": lambda: reasons.sample(number, folder),
            "score": lambda: reasons.score(number, folder),
            "pair": lambda: reasons.pair(number, folder),
            "reference": lambda: reasons.reference(number, folder),
            "update": lambda: _LOST if number in lost else reasons.update(number, folder),
            "evaluate": lambda: reasons.evaluate(number, folder),
            "settle": lambda: reasons.settle(number, len(lineage.rounds)),
        }
        if number == 0:
            checks = {"evaluate": checks["evaluate"]}
        elif self.reasons.new.for_round(number).pairs is not None:
            checks = {name: check for name, check in checks.items() if name not in ("prompts", "sample", "score")}
        earlier = broken
        for stage, check in checks.items():
            why = earlier or check()
            if why and not earlier:
                earlier = f"{stage} is made again"
            yield Reused(number, stage, not why, why or "unchanged")


_LOST = "prefloop clean dropped its weights"
_LATER = {"evaluate": "is evaluated again", "settle": "is decided again"}
