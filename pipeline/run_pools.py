"""The prompts that a run's rounds draw from: read once each, told of, shared by the rounds that read the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import StageFolder
from pipeline.evaluation import Evaluation
from pipeline.pools import read_pool
from pipeline.sections import PromptsConfig
from pipeline.sources import DataSource
from pipeline.workshop import Workshop
from stages.contracts import PROMPTS
from stages.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Pool:
    """Prompts that rounds draw from; `whole`: a round asks them all."""

    table: StageFolder
    whole: bool = False


class RunPools:
    """The pools of a run by the numbers of its rounds; a round with ready pairs has none.

    Args:
        evaluation: what is evaluated on, and left out of training.
    """

    def __init__(self, shop: Workshop, evaluation: Evaluation | None) -> None:
        self._shop, self._evaluation = shop, evaluation
        self._pools: dict[int, Pool] = {}

    def __getitem__(self, number: int) -> Pool:
        return self._pools[number]

    def get(self, number: int) -> Pool | None:
        return self._pools.get(number)

    def prepare(self, number: int, num_rounds: int) -> str:
        """Read what a round draws from, unless that was done, for it or another round; what to tell of it.

        Args:
            num_rounds: of the run, to tell whether the prompts will do for them.

        Raises:
            InputError: for anything in it that cannot be used.
            ConfigError: if there are fewer prompts than a round asks for.
        """
        config = self._shop.config.for_round(number).prompts
        source = self._shop.sources.of(number).prompts
        if config is None or source is None or number in self._pools:
            return ""
        same = next((k for k in self._pools if self._reads_same(k, number)), None)
        told = ""
        if same is not None:
            self._pools[number] = self._pools[same]
        else:
            folder = self._shop.folder / ("prompts" if not self._pools else f"prompts-{number}")
            self._pools[number] = Pool(StageFolder(folder, PROMPTS))
            told = self._read(self._pools[number].table, source, config, num_rounds)
        self._refuse_small(number, config)
        return told

    def prepare_whole(self, number: int, file: Path, num_rounds: int, *, is_same: bool) -> str:
        """Read a file of which a round asks every prompt; what to tell of it, once.

        Args:
            is_same: whether the file is as the round took it; what was read of one that changed since stands.

        Raises:
            InputError: for anything in it that cannot be used.
            FingerprintError: if what was read already is another file's, or was read in another way.
        """
        config = self._shop.config.for_round(number).prompts
        assert config is not None
        table, told = StageFolder(self._shop.folder / f"prompts-{number}", PROMPTS), ""
        is_read = table.is_closed()
        if is_same or not is_read:
            told = self._read(table, DataSource.found(file, key="--watch"), config, num_rounds)
        self._pools[number] = Pool(table, whole=True)
        return "" if is_read else told

    def drawn_before(self, number: int) -> list[int]:
        """How many prompts each earlier round drew from a round's pool."""
        mine = self._pools.get(number)
        earlier = (k for k in range(1, number) if mine is not None and self._pools.get(k) == mine)
        configs = (self._shop.config.for_round(k).prompts for k in earlier)
        return [config.per_round for config in configs if config is not None]

    def _reads_same(self, one: int, other: int) -> bool:
        a, b = (self._shop.config.for_round(number).prompts for number in (one, other))
        plain = {"per_round": 1, "shard_size": 1}
        return a is not None and b is not None and a.model_copy(update=plain) == b.model_copy(update=plain)

    def _read(self, out: StageFolder, source: DataSource, config: PromptsConfig, num_rounds: int) -> str:
        evaluated = self._evaluation.prompts if self._evaluation is not None else None
        stats = read_pool(self._shop, out, source, config, evaluated=evaluated).entries[0].stats
        num_prompts = out.entry(0).rows
        told = f"{num_prompts:,} to train on"
        if stats["merged"]:
            told += f"; {stats['merged']:,.0f} repeated rows merged"
        if stats["evaluated"]:
            told += f"; {stats['evaluated']:,.0f} left out of training, since they are evaluated on"
        if stats["changed"]:
            told += f"; the policy's tokenizer does not keep the text of {stats['changed']:,.0f} of them as it is"
        if not out.path.name.startswith("prompts-") and num_rounds * config.per_round > num_prompts:
            told += f"; asked again, reshuffled, after {num_prompts // config.per_round} rounds"
        return told

    def _refuse_small(self, number: int, config: PromptsConfig) -> None:
        num_prompts = self._pools[number].table.entry(0).rows
        if num_prompts < config.per_round:
            raise ConfigError(
                "prompts.per_round",
                wanted=f"at most the {num_prompts} different prompts there are to train on",
                got=str(config.per_round),
                fix=f"--set prompts.per_round={num_prompts}",
            )
