"""Run a function on the ranks of a real gloo group, each a process of its own."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(world_size, folder, function, args), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), DS_ACCELERATOR="cpu")
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    torch.set_num_threads(1)
    torch.save(function(*args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
