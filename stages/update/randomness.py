"""The random numbers of a rank: seeded by the work, and put away as plain tensors so that they go on where they were.

Nothing of an update here draws any, but a model's own code or an objective from beside the config may.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch

from stages.seeds import hashed_seed


def seed_rank(*work: object) -> None:
    """Seed Python's, NumPy's and torch's global generators, on every device, by what the work is."""
    seed = hashed_seed("random numbers", *work)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, torch.Tensor]:
    """The states of all generators of this rank."""
    _, words, gauss = random.getstate()
    mersenne: Any = numpy.random.get_state(legacy=False)
    found = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(mersenne["state"]["key"].astype(numpy.int64)),
        "numpy.position": torch.tensor([mersenne["state"]["pos"], mersenne["has_gauss"]]),
        "numpy.gauss": torch.tensor(mersenne["gauss"], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Go on with states as `random_state` gives them; of a device that is not here, or was not there, none."""
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    position, has_gauss = state["numpy.position"].tolist()
    words = state["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", words, position, has_gauss, state["numpy.gauss"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
