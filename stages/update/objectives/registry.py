"""Every objective by its ``loss_type``. A new one is one file here and one line below."""

from __future__ import annotations

from stages.update.objectives import dpo, minor_dpo
from stages.update.objectives.base import Objective

OBJECTIVES: dict[str, Objective] = {module.OBJECTIVE.name: module.OBJECTIVE for module in (minor_dpo, dpo)}
