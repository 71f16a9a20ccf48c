"""Where a run runs: the settings under ``cluster`` in a config."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ClusterConfig(BaseModel):
    """Nothing here changes what a result is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: str = Field("local", description="local, or a Ray address; local starts Ray on this machine")
    allow_unauthenticated: bool = Field(
        False,
        description="use a cluster at an address that asks for no token, and so takes work from whoever reaches it; "
        "the report says so",
    )
    placement: Literal["split", "colocate"] = Field(
        "split",
        description="split: samplers, scorers and trainers hold their own devices; colocate: they take turns on the "
        "same ones, and let go of their memory in between (new: not run on a GPU yet)",
    )
    streaming: Literal["auto", "on", "off"] = Field(
        "auto",
        description="score and pair the first answers while others are sampled; auto: where there are GPUs, since "
        "stages on cores alone take them from each other",
    )
    devices: int | None = Field(None, ge=0, description="GPUs to use on a local cluster; null: those that are there")
    max_worker_restarts: int = Field(
        2,
        ge=0,
        description="how often a worker is started again in a row, and how many deaths a shard may cause before the "
        "prompt is looked for that kills them; 0: the first death ends the run",
    )
    job_timeout_s: float = Field(
        3600.0,
        gt=0,
        description="seconds a worker may take for one shard, its own start included, and the training group for one "
        "step, before it counts as hung: it is ended, and started again like a dead one",
    )
    notice_s: float = Field(
        25.0,
        ge=0,
        description="seconds that a checkpoint may take after notice that this process will be taken away (SIGTERM), "
        "before it ends",
    )
    start_timeout_s: float = Field(
        600.0, gt=0, description="seconds to wait for cores and GPUs that others hold, before the run ends"
    )

    @field_validator("streaming", mode="before")
    @classmethod
    def _a_word(cls, value: object) -> object:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value  # as YAML reads them
