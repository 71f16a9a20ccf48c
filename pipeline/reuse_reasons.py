"""Why a stage of a run would be made again under another config, stage by stage; nothing where it stays.

A stage stays if what it was made from, as its folder says, is what the new config says too. What came before it is not
looked at here: see `pipeline.reuse`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.config import Config
from pipeline.config_facts import made_by, one_answer
from pipeline.files import read_json
from pipeline.fingerprints import differing_fields
from pipeline.sources import Sources
from pipeline.unlike import changed, claim, differ, differences, unlike
from pipeline.watched_files import WatchedFiles
from stages.score.config import costs

_POLICIES = ("reference", "ema_decay", "start", "momentum", "max_staleness")
"""Fields of a config that say which policies a round names; no fingerprint holds them by name."""


@dataclass(frozen=True, slots=True)
class Reasons:
    """Of a run and a config that would go on from it; a method for each stage, of a round by its number and folder.

    Attributes:
        folder: of the run.
        old, new: its config, and the other one.
        sources: what `new` names.
    """

    folder: Path
    old: Config
    new: Config
    sources: Sources

    def prompts(self, number: int, folder: Path) -> str:
        if why := self._pool(number):
            return why
        watched = WatchedFiles(self.folder / "watched.json").file_of(number) is not None
        config = self.new.for_round(number).prompts
        assert config is not None
        wanted = {"shard_size": config.shard_size, "seed": self.new.run.seed}
        return unlike(folder / "prompts", wanted if watched else wanted | {"per_round": config.per_round})

    def sample(self, number: int, folder: Path) -> str:
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

    def score(self, number: int, folder: Path) -> str:
        unscaled, rewards = folder / "unscaled", self.sources.of(number).rewards
        claimed = unscaled if unscaled.is_dir() else folder / "scored"
        found = unlike(claimed, {"rewards": [source.identity() for source in rewards]})
        return found or ("not finished" if not (folder / "scored" / MANIFEST).exists() else "")

    def pair(self, number: int, folder: Path) -> str:
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

    def reference(self, number: int, folder: Path) -> str:
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

    def update(self, number: int, folder: Path) -> str:
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

    def evaluate(self, number: int, folder: Path) -> str:
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

    def settle(self, number: int, num_settled: int) -> str:
        if number > num_settled:
            return "not settled"
        return "" if self.old.gate == self.new.gate else "gate"

    def inputs(self) -> Iterator[str]:
        """Folders of the run itself that stay."""
        if not self._other_evaluation() and (self.folder / "evaluation").is_dir():
            yield "evaluation"
        if self.new.prompts is not None and not self._pool(1):
            yield "prompts"
        if (self.folder / "probe").is_dir():
            yield "probe"

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
        if texts is not None and claim(self.folder / "evaluation" / "texts").get("source") != texts.sha256:
            return "evaluate.texts.path"
        return ""
