"""What a run of another config could take over from a run: for every round and stage, whether it stays, and why not.

In go both configs, what the new one names (found and hashed), and the folder of the run; nothing is changed or started.
A stage stays if what it was made from, as its folder says, is what the new config says too, and every stage before it
stays; a round's stages after its update, and all later rounds, stand and fall with its policy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.config import Config
from pipeline.config_facts import made_by, one_answer
from pipeline.files import read_json
from pipeline.fingerprints import differing_fields
from pipeline.lineage import Lineage
from pipeline.reading import round_folders
from pipeline.sources import Sources
from pipeline.unlike import changed, claim, differ, differences, unlike
from pipeline.watched_files import WatchedFiles
from stages.score.config import costs

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

_POLICIES = ("reference", "ema_decay", "start", "momentum", "max_staleness")
"""Fields of a config that say which policies a round names; no fingerprint holds them by name."""


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
        folder: of the run.
        old, new: its config, and the other one.
        sources: what `new` names.
    """

    folder: Path
    old: Config
    new: Config
    sources: Sources

    def reuse(self) -> Reuse:
        """What the other config can take over."""
        lineage, lost = Lineage.read(self.folder / "run.json"), frozenset[int]()
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
        for number, round_folder in round_folders(self.folder).items():
            if number > self.new.num_rounds:
                stages += [Reused(number, stage, False, "not asked for") for stage in STAGES]
                continue
            found = list(self._round(number, round_folder, broken, lineage, lost))
            stages += found
            changed = next((f for f in found if not f.stays), None)
            if changed is not None and number:
                broken = broken or f"round {changed.round} {_LATER.get(changed.stage, 'makes another policy')}"
            if number and changed is None:
                settled = number
        inputs = [name for name in self._inputs() if name != "probe" or settled]
        return Reuse(stages, settled, inputs)

    def _weights_gone(self, lineage: Lineage, settled: int) -> list[int]:
        """Rounds whose weights the round after the settled ones needs, and that `prefloop clean` dropped."""
        config = self.new.for_round(settled + 1)
        before = bool(config.momentum) or bool({"ema", "previous"} & set(config.references))
        needed = lineage.line(settled)[: 2 if before else 1]
        folders = {number: self.folder / f"round-{number:04d}" / "policy" for number in needed}
        return [number for number, policy in folders.items() if not any(policy.glob("*.safetensors"))]

    # ---- one round --------------------------------------------------------------------------------------------------

    def _round(
        self, number: int, folder: Path, broken: str, lineage: Lineage, lost: Collection[int]
    ) -> Iterator[Reused]:
        """Its stages; those of round 0, the evaluation before the first round, are two."""
        checks: dict[str, Callable[[], str]] = {
            "prompts": lambda: self._prompts(number, folder),
            "sample": lambda: self._sample(number, folder),
            "score": lambda: self._score(number, folder),
            "pair": lambda: self._pair(number, folder),
            "reference": lambda: self._reference(number, folder),
            "update": lambda: _LOST if number in lost else self._update(number, folder),
            "evaluate": lambda: self._evaluate(number, folder),
            "settle": lambda: self._settle(number, lineage),
        }
        if number == 0:
            checks = {"evaluate": checks["evaluate"]}
        elif self.new.for_round(number).pairs is not None:
            checks = {name: check for name, check in checks.items() if name not in ("prompts", "sample", "score")}
        earlier = broken
        for stage, check in checks.items():
            why = earlier or check()
            if why and not earlier:
                earlier = f"{stage} is made again"
            yield Reused(number, stage, not why, why or "unchanged")

    def _prompts(self, number: int, folder: Path) -> str:
        if why := self._pool(number):
            return why
        watched = WatchedFiles(self.folder / "watched.json").file_of(number) is not None
        config = self.new.for_round(number).prompts
        assert config is not None
        wanted = {"shard_size": config.shard_size, "seed": self.new.run.seed}
        return unlike(folder / "prompts", wanted if watched else wanted | {"per_round": config.per_round})

    def _sample(self, number: int, folder: Path) -> str:
        config = self.new.for_round(number)
        wanted: dict[str, Any] = {
            "dtype": config.policy.dtype,
            "seed": config.run.seed,
            "sample": config.sample.identity(),
        }
        if number == 1:
            wanted["policy"] = self.sources.policy.sha256
        named = self._other_policies(number, ("momentum", "max_staleness")) if number > 1 else ""
        return named or unlike(folder / "candidates", wanted)

    def _score(self, number: int, folder: Path) -> str:
        unscaled, rewards = folder / "unscaled", self.sources.of(number).rewards
        claimed = unscaled if unscaled.is_dir() else folder / "scored"
        found = unlike(claimed, {"rewards": [source.identity() for source in rewards]})
        return found or ("not finished" if not (folder / "scored" / MANIFEST).exists() else "")

    def _pair(self, number: int, folder: Path) -> str:
        config = self.new.for_round(number)
        if config.pairs is not None:
            source = self.sources.of(number).pairs
            assert source is not None
            how = {"tokenizer": self.sources.policy_files, "pairs": config.pairs.identity() | {"path": None}}
            return unlike(folder / "pairs", {"source": source.sha256} | how)
        wanted = {
            "pair": config.pair.identity(),
            "seed": config.run.seed,
            "needs_auxiliary": "auxiliary" in config.update.needs,
            "lower_is_better": sorted(costs(config.score) if config.pair.agreement else frozenset[str]()),
        }
        return unlike(folder / made_by(config).name, wanted)

    def _reference(self, number: int, folder: Path) -> str:
        config, old = self.new.for_round(number), self.old.for_round(number)
        count, before = (found.update.num_references[1] for found in (config, old))
        if why := self._other_policies(number, _POLICIES):
            return why
        if (config.update.reference_logps, count, "stream" in config.update.needs) != (
            old.update.reference_logps,
            before,
            "stream" in old.update.needs,
        ):
            return "update: another way to the reference's log-probs"
        named = {name: weights.identity for name, weights in self.sources.of(number).references.items()}
        for place, name in enumerate(config.references if count else ()):
            table = folder / (f"reference_logps-{place}" if len(config.references) > 1 else "reference_logps")
            wanted = {"dtype": config.policy.dtype} | ({"weights": named[name]} if name in named else {})
            if why := unlike(table, wanted):
                return why
        return ""

    def _update(self, number: int, folder: Path) -> str:
        config = self.new.for_round(number)
        wanted: dict[str, Any] = {
            "update": config.update.identity(),
            "dtype": config.policy.dtype,
            "pad_token": config.policy.pad_token,
            "seed": config.run.seed,
        }
        if number == 1:
            wanted["start"] = self.sources.policy.identity
        if own := dict(self.sources.of(number).objectives):
            wanted["objectives"] = own
        if (ended := folder / "update_ended.json").exists():
            return differences(read_json(ended)["fingerprint"], wanted)
        manifest = folder / "policy" / MANIFEST
        if not manifest.exists():
            return "not finished"
        return differences(read_json(manifest)["fingerprint"], wanted)

    def _evaluate(self, number: int, folder: Path) -> str:
        if self.new.evaluate is None or self.old.evaluate is None:
            return "" if self.new.evaluate is self.old.evaluate else "evaluate"
        if why := self._other_evaluation():
            return why
        how = one_answer(self.new.sample).identity()
        wanted: dict[str, Any] = {"dtype": self.new.policy.dtype, "seed": self.new.run.seed, "sample": how}
        if number == 0:
            wanted["policy"] = self.sources.policy.sha256
        found = unlike(folder / "evaluation" / "candidates", wanted)
        rewards = [source.identity() for source in self.sources.of(0).rewards]
        unscaled = folder / "evaluation" / "unscaled"
        claimed = unscaled if unscaled.is_dir() else unscaled.with_name("scored")
        return found or unlike(claimed, {"rewards": rewards})

    def _settle(self, number: int, lineage: Lineage) -> str:
        if number > len(lineage.rounds):
            return "not settled"
        return "" if self.old.gate == self.new.gate else "gate"

    # ---- what rounds share ------------------------------------------------------------------------------------------

    def _other_policies(self, number: int, names: Sequence[str]) -> str:
        old, new = (config.for_round(number) for config in (self.old, self.new))
        return next(
            (changed(name, getattr(old, name), getattr(new, name)) for name in names if differ(old, new, name)), ""
        )

    def _pool(self, number: int) -> str:
        """Why the prompts that a round draws from are others; nothing where they are the same."""
        config, before = (found.for_round(number).prompts for found in (self.new, self.old))
        source, plain = self.sources.of(number).prompts, {"per_round": 1, "shard_size": 1, "path": ""}
        if config is None or before is None or source is None:
            return "prompts"
        if config.model_copy(update=plain) != before.model_copy(update=plain):
            return "prompts: read in another way"
        if self._pools_differ_before(number):
            return "prompts: earlier rounds draw others"
        if why := self._other_evaluation():
            return f"{why}: what is evaluated on is not trained on"
        if WatchedFiles(self.folder / "watched.json").file_of(number) is not None:
            return ""
        pools = [self.folder / "prompts", *sorted(self.folder.glob("prompts-[0-9]*"))]
        claims = [claim(pool) for pool in pools]
        wanted = {"source": source.sha256, "tokenizer": self.sources.policy_files}
        if any(not differing_fields({key: claim.get(key) for key in wanted}, wanted) for claim in claims):
            return ""
        return differences(claims[0], wanted).replace("source", "prompts.path")

    def _pools_differ_before(self, number: int) -> bool:
        """Whether earlier rounds draw other numbers of prompts, which shifts what is left."""
        earlier = [(c.for_round(n).prompts for n in range(1, number)) for c in (self.old, self.new)]
        return [p.per_round if p else 0 for p in earlier[0]] != [p.per_round if p else 0 for p in earlier[1]]

    def _other_evaluation(self) -> str:
        """Why other prompts or texts are evaluated on."""
        if self.old.evaluate is None or self.new.evaluate is None:
            return "" if self.old.evaluate is self.new.evaluate else "evaluate"
        old, new = ((c.evaluate.identity() if c.evaluate else {}) | {"path": None} for c in (self.old, self.new))
        if fields := differing_fields(old, json.loads(json.dumps(new))):
            return f"evaluate.{fields[0]}"
        drawn, source = claim(self.folder / "evaluation" / "drawn"), self.sources.evaluation
        if source is None:
            return "evaluate"
        wanted = {"source": source.sha256, "tokenizer": self.sources.policy_files}
        if differing_fields({key: drawn.get(key) for key in wanted}, wanted):
            return "evaluate.path"
        texts = self.sources.texts
        changed = texts is not None and claim(self.folder / "evaluation" / "texts").get("source") != texts.sha256
        return "evaluate.texts.path" if changed else ""

    def _inputs(self) -> Iterator[str]:
        """Folders of the run itself that stay."""
        if not self._other_evaluation() and (self.folder / "evaluation").is_dir():
            yield "evaluation"
        if self.new.prompts is not None and not self._pool(1):
            yield "prompts"
        if (self.folder / "probe").is_dir():
            yield "probe"


_LOST = "prefloop clean dropped its weights"
_LATER = {"evaluate": "is evaluated again", "settle": "is decided again"}
