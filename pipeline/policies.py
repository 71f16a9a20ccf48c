"""The policies that a round names: the one that samples, the one it trains from, those its objective refers to.

Most often all are one: the result of the round before. They part with ``start: initial`` (only the sampling policy goes
on), with momentum (the round starts, and samples, beyond the result before it), and with other references.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.jobs.weights import MixWeights
from pipeline.lineage import Lineage
from pipeline.model_folders import found_model
from stages.protocols import Weights

if TYPE_CHECKING:
    from pipeline.workshop import Workshop


@dataclass(frozen=True, slots=True)
class Policies:
    """A round's policies.

    Attributes:
        sampling: answers the prompts.
        start: what the update begins from.
        references: by their names in the config.
    """

    sampling: Weights
    start: Weights
    references: tuple[tuple[str, Weights], ...] = ()


class PolicyLine:
    """The policies of a run's rounds, as its lineage and config determine them; mixtures are made when asked for."""

    def __init__(self, shop: Workshop, lineage: Lineage) -> None:
        self._shop, self._lineage = shop, lineage

    def of(self, number: int) -> Policies:
        """The policies of a round, all rounds before which are settled."""
        config = self._shop.config.for_round(number)
        onward = self._onward(number, config)
        start = self._result(0) if config.start == "initial" else onward
        references = tuple((name, self._reference(name, number, start, config)) for name in config.references)
        return Policies(self.sampling(number), start, references)

    def sampling(self, number: int) -> Weights:
        """The policy that answers a round's prompts: the one that the round goes on from, or with `max_staleness: 1`
        the one before that, which is there while the round before is still trained."""
        older = max(1, number - self._shop.config.max_staleness)
        return self._onward(older, self._shop.config.for_round(older))

    def _result(self, number: int) -> Weights:
        """What a round made; 0: the first policy."""
        return self._lineage.rounds[number - 1].result if number else self._shop.sources.policy

    def _onward(self, number: int, config: Config) -> Weights:
        """The policy that a round goes on from: the result before it, with momentum beyond that."""
        newer = self._result(number - 1)
        if number == 1 or not config.momentum:
            return newer
        return self._mixed(number, "start", newer, self._result(number - 2), by=config.momentum)

    def _reference(self, name: str, number: int, start: Weights, config: Config) -> Weights:
        match name:
            case "round_start":
                return start
            case "initial":
                return self._result(0)
            case "previous":
                return self._lineage.rounds[number - 2].start if number > 1 else start
            case "ema":
                return self._average(number)
        return self._shop.sources.of(number).references[name]

    def _average(self, number: int) -> Weights:
        """The exponential moving average of the first policy and all results before a round."""
        if number == 1:
            return self._result(0)
        decay = self._shop.config.for_round(number).ema_decay
        return self._mixed(number, "ema", self._result(number - 1), self._average(number - 1), by=-decay)

    def _mixed(self, number: int, name: str, newer: Weights, older: Weights, *, by: float) -> Weights:
        """``newer + by * (newer - older)``, in the round's folder."""
        shop, config = self._shop, self._shop.config
        folder: Path = shop.folder / f"round-{number:04d}" / name
        fingerprint = {"newer": newer.identity, "older": older.identity, "by": by, "dtype": config.policy.dtype}
        manifest = found_model(folder / "policy", fingerprint)
        if manifest is None:
            job = MixWeights(newer, older, by, folder, config.policy.dtype, config.policy.pad_token, fingerprint)
            shop.crew.tasks.run(job)
            manifest = found_model(folder / "policy", fingerprint)
            assert manifest is not None, "a mixture was published without its manifest"
        master = folder / "master" if manifest["master_sha256"] else None
        return Weights(folder / "policy", manifest["sha256"], newer.round, master, manifest["master_sha256"])
