"""Jobs on policies' weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artifacts import MANIFEST
from pipeline.files import keep_tree
from pipeline.mirror import obtain_weights, remove
from pipeline.model_folders import close_model, found_mixture
from stages.protocols import Weights


@dataclass(frozen=True, slots=True)
class MixWeights:
    """A policy on the line through two others, published in ``folder/policy``; see `stages.update.mixing.mix`."""

    newer: Weights
    older: Weights
    by: float
    folder: Path
    dtype: str
    pad_token: str | None
    fingerprint: Mapping[str, Any]

    def __call__(self, _state: None) -> None:
        from stages.update.mixing import mix

        policy = self.folder / "policy"
        if found_mixture(self.folder, self.fingerprint) is not None:
            return
        remove(policy / MANIFEST)  # of one whose weights were removed
        for weights in (self.newer, self.older):
            obtain_weights(weights)
        master = mix(self.newer, self.older, by=self.by, out=self.folder, dtype=self.dtype, pad_token=self.pad_token)
        found = Weights.found(policy, round=self.newer.round, master=master)
        keep_tree(self.folder)
        close_model(policy, self.fingerprint, sha256=found.sha256, master_sha256=found.master_sha256)
