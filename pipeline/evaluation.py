"""What a policy is worth: its answers to held-out prompts judged, its distance from the first policy, and how likely it
finds real texts.

Every policy answers the same prompts with the same random numbers, one answer each, at temperature 1. What the run's
config says as a whole holds for all rounds, whatever a round's entry overrides, so that figures can be compared.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import figures
from pipeline.artifacts import StageFolder
from pipeline.config import Config
from pipeline.config_facts import one_answer
from pipeline.figures import Figures
from pipeline.jobs import answers, inputs, training
from pipeline.jobs.engine_logps import Divergence
from pipeline.pools import read_prompts
from pipeline.prompts import HeldOut
from pipeline.sections import EvaluateConfig
from pipeline.stage import by_group
from pipeline.workshop import Workshop
from stages.contracts import PROMPTS, REFERENCE_LOGPS, SCORED, TEXTS
from stages.errors import StageError
from stages.protocols import Weights
from stages.sample.stage import Draw
from stages.vocab import EVALUATION_STREAM


class Evaluation:
    """The evaluation that a run's config asks for."""

    def __init__(self, shop: Workshop, config: EvaluateConfig) -> None:
        self.shop, self.config = shop, config
        self.prompts = StageFolder(shop.folder / "evaluation" / "prompts", PROMPTS)
        self.texts = StageFolder(shop.folder / "evaluation" / "texts", TEXTS) if config.texts is not None else None
        self._drawn = StageFolder(shop.folder / "evaluation" / "drawn", PROMPTS)

    @property
    def num_prompts(self) -> int:
        return sum(entry.rows for entry in self.prompts.entries())

    def digest(self) -> list[str]:
        """What is evaluated on."""
        return [self.prompts.digest(), self.texts.digest() if self.texts is not None else ""]

    # ---- before the first round -------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read the held-out prompts and the texts.

        Raises:
            InputError: for what cannot be used.
        """
        base, config = self.shop.config, self.config
        source = self.shop.sources.evaluation
        assert source is not None
        of_prompts = base.prompts
        read_prompts(
            self.shop,
            self._drawn,
            source,
            of_prompts or base.pairs,
            columns=config.columns,
            held_out=HeldOut(config.holdout, wanted=True) if config.holdout is not None else None,
            limit=config.num_prompts,
        )
        size = of_prompts.shard_size if of_prompts else 64
        num_shards = -(-self._drawn.entry(0).rows // size)
        fingerprint = {"drawn": self._drawn.digest(), "shard_size": size}
        cut = inputs.AllPrompts(self._drawn, self.prompts, size)
        self.shop.run_stage("prompts", [self.prompts], fingerprint, num_shards, lambda _: [cut])
        if self.texts is not None:
            self._prepare_texts(self.texts)

    def _prepare_texts(self, out: StageFolder) -> None:
        shop, config, source = self.shop, self.config.texts, self.shop.sources.texts
        assert config is not None and source is not None
        job = inputs.PrepareTexts(
            source=source.path,
            key=source.key,
            tokenizer=shop.sources.policy.path,
            pad_token=shop.config.policy.pad_token,
            part=source.part,
            column=config.column,
            max_length=config.max_length,
            num_texts=config.num_texts,
            seed=shop.config.run.seed,
            out=out,
        )
        fingerprint = {
            "source": source.sha256,
            "tokenizer": shop.sources.policy_files,
            "seed": shop.config.run.seed,
            "texts": config.identity() | {"path": None},
        }
        shop.run_stage("texts", [out], fingerprint, 1, lambda _: [job])

    # ---- of a policy ------------------------------------------------------------------------------------------------

    def of(self, policy: Weights, *, round: int, config: Config, before: Weights | None = None) -> tuple[Figures, bool]:
        """A policy's figures, and whether they took any work now.

        Args:
            policy: what is evaluated.
            round: the round that made it.
            config: the round's, for who trains.
            before: the policy whose place it would take, evaluated earlier; compared with, as the first policy is.

        Raises:
            StageError: if not one answer has a reward.
        """
        shop, base = self.shop, self.shop.config
        folder = _folder(shop, round)
        draw = Draw(base.run.seed, round, 0, EVALUATION_STREAM)
        rewards = shop.sources.of(0).rewards
        candidates, sampled = shop.sample(folder, self.prompts, policy, base, draw, how=one_answer(base.sample))
        first = _folder(shop, 0)
        scored, judged = shop.score(
            folder, self.prompts, candidates, base, rewards, round=round, scaled_by=first if round else None
        )
        rivals = {"first": 0, "before": before.round} if before is not None and before.round else {"first": 0}
        others = {name: StageFolder(_folder(shop, made_in) / "scored", SCORED) for name, made_in in rivals.items()}
        names = {role: [r.name for r in rewards if r.config.role == role] for role in ("holdout", "auxiliary")}
        assert base.score is not None
        job = answers.Evaluate(
            scored, candidates, others["first"], others if round else {}, names, base.score.max_error_share
        )
        found: Figures = shop.crew.tasks.run(job)
        if not found["num_prompts"]:
            raise StageError(
                f"round {round}: evaluate",
                wanted="an answer with a reward to at least one held-out prompt",
                got=f"none to {self.num_prompts} prompts",
                fix="check that evaluation prompts leave room for sample.max_new_tokens in the context",
            )
        made = sampled.made + judged.made
        if self.texts is not None:
            found["texts_nll"], made_texts = self._texts_nll(folder, self.texts, policy, round, config)
            made += made_texts
        if self.config.kl:
            found["kl"], made_kl = self._divergence(folder, candidates, round, config)
            made += made_kl
        return found, bool(made)

    def _texts_nll(
        self, folder: Path, texts: StageFolder, policy: Weights, round: int, config: Config
    ) -> tuple[float, int]:
        """The texts' mean negative log-likelihood under a policy, in nats a token."""
        out = StageFolder(folder / "text_logps", REFERENCE_LOGPS)
        job = training.ScoreTexts(
            out=out, weights=policy, reference="policy", config=config.update, round=round, texts=texts
        )
        done = self._by_trainers("texts", out, {"texts": texts.digest(), "weights": policy.identity}, job, config)
        entries = out.entries()
        return -figures.total(entries, "logp") / max(1, figures.total(entries, "tokens")), done

    def _divergence(
        self, folder: Path, candidates: StageFolder, round: int, config: Config
    ) -> tuple[float | None, int]:
        """The policy's divergence from the first one, in nats an answer."""
        if round == 0:
            return 0.0, 0
        first = self.shop.sources.policy
        out = StageFolder(folder / "reference_logps", REFERENCE_LOGPS)
        job = training.ScoreCandidates(
            out=out,
            weights=first,
            reference="initial",
            config=config.update,
            round=round,
            prompts=self.prompts,
            candidates=candidates,
        )
        fingerprint = {"candidates": candidates.digest(), "weights": first.identity}
        done = self._by_trainers("divergence", out, fingerprint, job, config)
        return self.shop.crew.tasks.run(Divergence(candidates, out)), done

    def _by_trainers(
        self, name: str, out: StageFolder, fingerprint: dict[str, str], job: training.ScoreAnswers, config: Config
    ) -> int:
        """A stage by the training group; how many parts were missing."""
        parts = len(job.answered().entries())
        fingerprint |= {"dtype": config.policy.dtype}
        workers = by_group(lambda: self.shop.crew.trainers(config), total=None)
        return self.shop.run_stage(name, [out], fingerprint, parts, lambda _: [job], workers).made


def _folder(shop: Workshop, round: int) -> Path:
    return shop.folder / f"round-{round:04d}" / "evaluation"
