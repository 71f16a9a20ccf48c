"""What the steps of one round share: its config, sources, folder and policies, its figures, its lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.figures import Figures
from pipeline.policies import Policies
from pipeline.sources import RoundSources
from pipeline.stage import Done
from pipeline.workshop import Workshop
from stages.contracts import CANDIDATES, REFERENCE_LOGPS, Contract


@dataclass(frozen=True)
class RoundContext:
    """One round, as its steps know it.

    Attributes:
        number: counted from 1; 0 for the evaluation before the first.
        policies: the one that samples, the one that is trained, those that the objective refers to.
        folder: where its results go.
        label: what its lines begin with.
        figures: by step, filled as the steps are done.
    """

    shop: Workshop
    number: int
    policies: Policies
    folder: Path
    label: str
    figures: Figures = field(default_factory=dict)

    @cached_property
    def config(self) -> Config:
        """What holds in this round."""
        return self.shop.config.for_round(self.number)

    @property
    def sources(self) -> RoundSources:
        return self.shop.sources.of(self.number)

    def table(self, contract: Contract) -> StageFolder:
        """The round's table of a contract."""
        return StageFolder(self.folder / contract.name, contract)

    @property
    def stream(self) -> StageFolder:
        """Answers that the reference gave, where the objective takes some."""
        return StageFolder(self.folder / "reference_answers" / CANDIDATES.name, CANDIDATES)

    @property
    def reference_tables(self) -> list[StageFolder]:
        """The log-probs under each reference that the objective takes them of."""
        if self.config.update.num_references[1] == 0:
            return []
        count = len(self.policies.references)
        names = [f"-{index}" for index in range(count)] if count > 1 else [""] * count
        return [StageFolder(self.folder / f"reference_logps{name}", REFERENCE_LOGPS) for name in names]

    def tell(self, stage: str, text: str, done: Done | None = None) -> None:
        """A line for a stage that did something now."""
        if done is not None and done.made < len(done.entries):
            self.note_earlier_work()
        if done is None or done.made:
            self.shop.console.line(self.label, stage, text)

    def note_earlier_work(self) -> None:
        """Note that the round's times leave out what was made before this process, or by another run."""
        self.figures["is_carried_on"] = True
