"""Event files as TensorBoard reads them."""

from __future__ import annotations

from pathlib import Path


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every point, by curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {name: [(event.step, event.value) for event in reader.Scalars(name)] for name in reader.Tags()["scalars"]}
