"""A run: its folder, its prompts, its lineage, and which rounds are left to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline import gate, report
from pipeline.ahead import Ahead
from pipeline.artifacts import StageFolder
from pipeline.collect import Collector
from pipeline.evaluation import Evaluation
from pipeline.figures import Figures
from pipeline.files import place, read_json, write_json
from pipeline.fingerprints import refuse_other_fingerprint
from pipeline.gate import Rivals, Verdict
from pipeline.jobs import inputs
from pipeline.lineage import Lineage, RoundRecord, describe
from pipeline.mirror import obtain_records, remove
from pipeline.policies import Policies, PolicyLine
from pipeline.round import Round
from pipeline.round_context import RoundContext
from pipeline.run_folder import write_config
from pipeline.run_pools import RunPools
from pipeline.schedule import asked_rounds, reason_to_stop
from pipeline.versions import keep_versions
from pipeline.watched_files import WatchedFiles
from pipeline.workshop import Workshop
from stages.contracts import CANDIDATES, FATES, GROUPS, PAIRS, SCORED
from stages.errors import ConfigError, InputError
from stages.protocols import Weights


class Run:
    """One run of a config, in its folder.

    Args:
        shop: what its steps share.
        watched: a folder whose files make further rounds, once the config's are done.
    """

    def __init__(self, shop: Workshop, *, watched: Path | None = None) -> None:
        self.shop, self.config, self.folder = shop, shop.config, shop.folder
        self.lineage = Lineage.read(self.folder / "run.json")
        self.evaluation = Evaluation(shop, self.config.evaluate) if self.config.evaluate is not None else None
        self._watched = WatchedFiles(self.folder / "watched.json", watched)
        self._line = PolicyLine(shop, self.lineage)
        self._pools = RunPools(shop, self.evaluation)
        self._ahead: dict[int, Ahead] = {}

    # ---- prompts ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check the tokenizers, then read the prompts of evaluation and training.

        Raises:
            PrefloopError: for anything in them that cannot be used.
        """
        policy = (self.shop.sources.policy.path, self.config.policy.pad_token, "policy.path")
        rewards = [
            (r.folder, r.config.pad_token, r.key)
            for sources in self.shop.sources.rounds
            for r in sources.rewards
            if r.config.type == "model"
        ]
        references = {
            (weights.path, self.config.policy.pad_token, "reference")
            for sources in self.shop.sources.rounds
            for weights in sources.references.values()
        }
        self.shop.crew.tasks.run(
            inputs.CheckTokenizers(policy, list(dict.fromkeys(rewards)), sorted(references))  # type: ignore[arg-type]
        )
        if self.evaluation is not None:
            self.evaluation.prepare()
        told = [self._pools.prepare(number, self.num_rounds) for number in range(1, max(1, self.num_rounds) + 1)]
        if self.evaluation is not None:
            told.insert(1, f"{self.evaluation.num_prompts:,} held out for evaluation")
        if told := [text for text in told if text]:
            self.shop.console.line("", "prompts", ", ".join(told))

    # ---- rounds -----------------------------------------------------------------------------------------------------

    @property
    def num_rounds(self) -> int:
        """The config's rounds, and those added meanwhile; watched files come on top."""
        return asked_rounds(self.folder, self.config.num_rounds)

    @property
    def result(self) -> Weights:
        """The policy that the run stands behind; the first policy before any round is settled."""
        return self.lineage.standing(len(self.lineage.rounds), first=self.shop.sources.policy)

    def evaluate_first(self) -> None:
        """The first policy's figures, before the first round; the training group comes up meanwhile."""
        if (number := len(self.lineage.rounds) + 1) <= self.num_rounds:
            self.shop.crew.start_trainers(self.config.for_round(number))
        first = self.shop.sources.policy
        before = Round(self.shop, 0, Policies(first, first), evaluation=self.evaluation, label="before")
        before.evaluate(first)
        before.write_report("first", "the policy that the run starts from")

    def unfinished_rounds(self) -> Iterator[Round]:
        """The rounds that are not settled, one at a time, each from the result of the one before.

        Raises:
            ConfigError: if more rounds are settled than the config asks for.
            FingerprintError: if a settled round was made from something else than the config says now.
            ContractError: if what it published is damaged.
        """
        self._refuse_fewer_rounds()
        if self.lineage.rounds and not self._is_result_published():
            self._publish_result()  # a call was killed after it settled a round
        for number in self._numbers():
            settled = self.lineage.rounds[number - 1] if number <= len(self.lineage.rounds) else None
            rnd = self._round(number)
            if settled is not None:
                refuse_other_fingerprint(rnd.folder, settled.fingerprint, rnd.fingerprint)
                rnd.refuse_damaged(with_policy=settled.result is not None and not settled.is_dropped)
                self.shop.console.line(self._label(number), "finished", "nothing to do")
            elif reason := reason_to_stop(self.config.stop_when, self.config.gate, self._settled_reports()):
                self.shop.console.line("", "stopped", f"after {number - 1} rounds: {reason}")
                break
            else:
                rnd.meanwhile(self._collect_next(number))
                yield rnd
        self._publish()

    def _collect_next(self, number: int) -> Ahead | None:
        """The next round's data, to be collected while this round's policy is trained, where it may be so."""
        after = number + 1
        config = self.config.for_round(after)
        known = after <= self.num_rounds and self._watched.file_of(number) is None
        if not self.config.max_staleness or config.pairs is not None or not known:
            return None
        self._pools.prepare(after, self.num_rounds)
        policy = self._line.ahead(after)
        folder, line = self.folder / f"round-{after:04d}", self.lineage.line(number - 1)
        at = RoundContext(self.shop, after, Policies(policy, policy, line=line), folder, self._label(after))
        collector = Collector(at, pool=self._pools[after].table, drawn_before=self._pools.drawn_before(after))
        self._ahead[after] = Ahead(at, collector, policy)
        return self._ahead[after]

    def _numbers(self) -> Iterator[int]:
        """The numbers of all rounds; how many there are may grow meanwhile, and watched files come after them."""
        number, configured, told = 1, 0, False
        while True:
            if (file := self._watched.file_of(number)) is not None:
                if not self._read_watched(number, file):
                    continue
            elif configured < self.num_rounds:
                configured += 1
                self._pools.prepare(number, self.num_rounds)
            else:
                if self._watched.folder is not None and not told:
                    self.shop.console.line("", "watching", f"{self._watched.folder} for files of prompts")
                    told = True
                file = self._watched.next_file()
                if file is None:
                    return
                self._watched.take(file, round=number)
                continue
            yield number
            number += 1

    def _read_watched(self, number: int, file: Path) -> bool:
        """Read the prompts of the file that a round took; whether they can be used."""
        try:
            is_same = self._watched.is_as_taken(number)
            if told := self._pools.prepare_whole(number, file, self.num_rounds, is_same=is_same):
                self.shop.console.line("", "prompts", f"{file}: {told}")
        except (InputError, OSError) as error:
            self._watched.refuse(file, str(error))
            reason = f"{error.got}; {error.fix}" if isinstance(error, InputError) else str(error)
            self.shop.console.line("", "refused", f"{file}: {reason}")
            return False
        return True

    def _settled_reports(self) -> list[dict[str, Any]]:
        """The reports of the settled rounds, and of the evaluation before the first."""
        return [found for found in report.round_reports(self.folder) if found["round"] <= len(self.lineage.rounds)]

    def _refuse_fewer_rounds(self) -> None:
        num_settled = len(self.lineage.rounds)
        num_watched = self._watched.num_taken(among=num_settled)
        if num_settled - num_watched > self.num_rounds:
            raise ConfigError(
                "rounds",
                wanted=f"at least {num_settled - num_watched}, which this run has settled",
                got=str(self.num_rounds),
                fix=f"--set rounds={num_settled - num_watched}, or a run of its own: prefloop fork RUN --name NEW",
            )

    def _round(self, number: int) -> Round:
        pool, ahead = self._pools.get(number), self._ahead.pop(number, None)
        if number > len(self.lineage.rounds) and self._drop_abandoned(number):
            ahead = None
        return Round(
            self.shop,
            number,
            self._line.of(number),
            pool=pool.table if pool else None,
            drawn_before=self._pools.drawn_before(number),
            evaluation=self.evaluation,
            label=self._label(number),
            every_prompt=pool is not None and pool.whole,
            give_up=self._giving_up(number),
            ahead=ahead,
            rivals=self._rivals() if number > len(self.lineage.rounds) else None,
        )

    def _rivals(self) -> Rivals:
        """What the next result is judged against."""
        reports, first = self._settled_reports(), self.shop.sources.policy
        best = gate.best_round(reports)
        made = self.lineage.rounds[best - 1].result if best else first
        evaluated: Figures = next((found.get("evaluate", {}) for found in reports if not found["round"]), {})
        return Rivals(self.result, made or first, evaluated)

    def _drop_abandoned(self, number: int) -> bool:
        """Drop what was sampled ahead of a round by a policy that was rolled back since; whether that was so."""
        policy, folder = self._line.abandoned(number), self.folder / f"round-{number:04d}"
        if policy is None:
            return False
        candidates = StageFolder(folder / CANDIDATES.name, CANDIDATES)
        if candidates.claimed().get("policy") == policy.sha256:
            for contract in (FATES, GROUPS, PAIRS, SCORED):
                StageFolder(folder / contract.name, contract).drop()
            StageFolder(folder / "unscaled", SCORED).drop()
            candidates.drop()  # the last, since the others are known by it
            told = f"what the policy of round {policy.round} sampled ahead is dropped: it was rolled back"
            self.shop.console.line(self._label(number), "sample", told)
        return True

    def _giving_up(self, number: int) -> Callable[[], None] | None:
        """What gives a watched file's round up, so that the next start goes on with the next file."""
        file = self._watched.file_of(number)
        if file is None:
            return None

        def give_up() -> None:
            remove(self.folder / f"round-{number:04d}")
            self._pools[number].table.drop()
            self._watched.refuse(file, "no pair could be made of its prompts")  # last: until then they are its own

        return give_up

    def _label(self, number: int) -> str:
        return f"round {number}/{max(number, self.num_rounds)}"

    def settle(self, rnd: Round, verdict: Verdict) -> None:
        """Keep what became of a round's result: it fixes the next round's start, and what the run stands behind."""
        rnd.write_report(verdict.decision, verdict.reason)
        self.lineage.settle(
            RoundRecord(
                rnd.number,
                rnd.sampling,
                rnd.start,
                [weights for _, weights in rnd.references],
                verdict.result,
                verdict.standing,
                verdict.decision,
                verdict.reason,
                rnd.fingerprint,
            )
        )
        self._publish()

    def _publish(self) -> None:
        """Write the config and the releases that made the lineage, and what follows from that."""
        write_config(self.config, self.folder)
        keep_versions(self.folder)
        self._publish_result()

    def _is_result_published(self) -> bool:
        with suppress(FileNotFoundError, InputError):
            return bool(read_json(self.folder / "final.json") == describe(self.result, self.folder))
        return False

    def _publish_result(self) -> None:
        """Write what follows from the lineage: the result's link and name, the reports."""
        link, scratch = self.folder / "final", self.folder / ".final"
        scratch.unlink(missing_ok=True)
        if self.result.path.is_relative_to(self.folder):
            scratch.symlink_to(self.result.path.relative_to(self.folder))
        else:
            scratch.symlink_to(self.result.path)
        place(scratch, link)
        write_json(self.folder / "final.json", describe(self.result, self.folder))
        obtain_records(self.folder, tables=True)
        report.write_reports(self.folder)
