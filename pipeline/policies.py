"""The policies that a round names: the one that samples, the one it trains from, those its objective refers to.

Most often all are one: the policy that the run stands behind, which is the result of the round before unless the gate
held it. They part with ``start: initial`` (only the sampling policy goes on), with momentum (the round starts, and
samples, beyond the standing policy), and with other references. A round whose result was held leaves no trace in what
later ones name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.jobs.weights import MixWeights
from pipeline.lineage import Lineage
from pipeline.model_folders import found_mixture, found_model
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
        line: the rounds that led to the policy which the round goes on from, the newest first.
    """

    sampling: Weights
    start: Weights
    references: tuple[tuple[str, Weights], ...] = ()
    line: tuple[int, ...] = ()


class PolicyLine:
    """The policies of a run's rounds, as its lineage and config determine them; mixtures are made when asked for."""

    def __init__(self, shop: Workshop, lineage: Lineage) -> None:
        self._shop, self._lineage = shop, lineage

    def of(self, number: int) -> Policies:
        """The policies of a round, all rounds before which are settled."""
        config = self._shop.config.for_round(number)
        onward = self._onward(number, config)
        start = self._first if config.start == "initial" else onward
        references = tuple((name, self._reference(name, number, start, config)) for name in config.references)
        return Policies(self.sampling(number), start, references, self._lineage.line(number - 1))

    def sampling(self, number: int) -> Weights:
        """The policy that answers a round's prompts, all rounds before which are settled.

        It is the one that the round goes on from, or with `max_staleness: 1` the one before that, if that led to it:
        what a policy sampled that was rolled back since is not trained on.
        """
        if self._led_on(number):
            return self.ahead(number)
        return self._onward(number, self._shop.config.for_round(number))

    def ahead(self, number: int) -> Weights:
        """The policy that answers a round's prompts while the round before it is still trained."""
        before = max(1, number - self._shop.config.max_staleness)
        return self._onward(before, self._shop.config.for_round(before))

    def abandoned(self, number: int) -> Weights | None:
        """The policy that may have answered a round's prompts already, and was rolled back since."""
        return None if self._led_on(number) else self.ahead(number)

    def _led_on(self, number: int) -> bool:
        """Whether the policy that could sample ahead of a round led to the one that the round goes on from."""
        if number == 1:
            return True
        before = max(1, number - self._shop.config.max_staleness)
        older, line = self._standing(before - 1).round, self._lineage.line(number - 1)
        return not older or older in line

    @property
    def _first(self) -> Weights:
        return self._shop.sources.policy

    def _standing(self, number: int) -> Weights:
        """The policy that the run stands behind after a round; after 0 rounds the first."""
        return self._lineage.standing(number, first=self._first)

    def _onward(self, number: int, config: Config) -> Weights:
        """The policy that a round goes on from: the standing one, with momentum beyond that."""
        newer = self._standing(number - 1)
        if not newer.round or not config.momentum:
            return newer
        older, is_open = self._standing(newer.round - 1), number > len(self._lineage.rounds)
        return self._mixed(number, "start", newer, lambda _: older, by=config.momentum, is_used=is_open)

    def _reference(self, name: str, number: int, start: Weights, config: Config) -> Weights:
        match name:
            case "round_start":
                return start
            case "initial":
                return self._first
            case "previous":
                made_in = self._standing(number - 1).round
                return self._lineage.rounds[made_in - 1].start if made_in else start
            case "ema":
                return self._average(self._standing(number - 1), is_used=number > len(self._lineage.rounds))
        return self._shop.sources.of(number).references[name]

    def _average(self, policy: Weights, is_used: bool) -> Weights:
        """The exponential moving average of the first policy and all that led to one, itself included."""
        number = policy.round + 1
        if number == 1:
            return policy
        decay = self._shop.config.for_round(number).ema_decay
        older = partial(self._average, self._standing(number - 2))
        return self._mixed(number, "ema", policy, older, by=-decay, is_used=is_used)

    def _mixed(
        self, number: int, name: str, newer: Weights, older: Callable[[bool], Weights], *, by: float, is_used: bool
    ) -> Weights:
        """``newer + by * (newer - older)``, in the round's folder.

        Args:
            older: gives it, told whether its weights are used.
            is_used: whether its weights are; where only its name counts, as of settled rounds, they may be removed.
        """
        shop, config = self._shop, self._shop.config
        folder: Path = shop.folder / f"round-{number:04d}" / name
        fingerprint = {"newer": newer.identity, "older": older(False).identity, "by": by, "dtype": config.policy.dtype}
        manifest = found_mixture(folder, fingerprint) if is_used else found_model(folder / "policy", fingerprint)
        if manifest is None:
            job = MixWeights(newer, older(True), by, folder, config.policy.dtype, config.policy.pad_token, fingerprint)
            shop.crew.tasks.run(job)
            manifest = found_model(folder / "policy", fingerprint)
            assert manifest is not None, "a mixture was published without its manifest"
        master = folder / "master" if manifest["master_sha256"] else None
        return Weights(folder / "policy", manifest["sha256"], newer.round, master, manifest["master_sha256"])
