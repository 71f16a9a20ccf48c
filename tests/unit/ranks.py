"""Run a function on the ranks of a real gloo group, each a process of its own.

The processes of a group stay for later calls, since loading the libraries takes longer than most of these. A group with
a rank that failed is ended.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returned on each rank."""
    group = _GROUPS.pop(world_size, None) or _Group(world_size)
    try:
        found = group.call(function, args)
    except BaseException:
        group.end()
        raise
    _GROUPS[world_size] = group
    return found


class _Group:
    """Processes that wait for functions, until their pipes are closed."""

    def __init__(self, world_size: int) -> None:
        context = mp.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world_size):
            here, there = context.Pipe()
            place = (rank, world_size, self._folder.name)
            process = context.Process(target=_serve, args=(*place, there), daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for pipe in self._pipes:
            pipe.send((list(sys.path), dict(os.environ)))
            pipe.send((function, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(self._pipes):
            for pipe in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]):
                rank = self._pipes.index(pipe)
                went_well, told = pipe.recv()
                assert went_well, f"rank {rank}:\n{told}"
                answers[rank] = torch.load(io.BytesIO(told), weights_only=False)
        return [answers[rank] for rank in range(len(self._pipes))]

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


_GROUPS: dict[int, _Group] = {}


def _serve(rank: int, world_size: int, folder: str, pipe: Connection) -> None:
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "DS_ACCELERATOR": "cpu"}
    os.environ.update(place)
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
    while True:
        try:
            sys.path[:], environment = pipe.recv()
            function, args = pipe.recv()
        except EOFError:  # the tests are over
            return
        os.environ.update(environment | place)
        torch.set_num_threads(1)
        torch.manual_seed(0)
        try:
            told = io.BytesIO()
            torch.save(function(*args), told)
            pipe.send((True, told.getvalue()))
        except Exception:
            pipe.send((False, traceback.format_exc()))
        gc.collect()
