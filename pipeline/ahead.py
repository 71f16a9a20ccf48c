"""The next round's data, collected while the update of the round before it still runs (`max_staleness: 1`)."""

from __future__ import annotations

from pipeline.collect import Collector
from pipeline.figures import Figures
from pipeline.round_context import RoundContext
from pipeline.stage import StageFlow
from stages.errors import PrefloopError
from stages.protocols import Weights

_NEWS_S = 0.05  # how long to wait for news before the update is looked at again


class Ahead:
    """A collection that goes on whenever it is pumped, since the driver has one thread.

    What it refuses is kept until its own round asks for the data: the update that runs meanwhile is not lost to it.

    Args:
        at: the next round.
        collector: of the next round.
        policy: samples.
    """

    def __init__(self, at: RoundContext, collector: Collector, policy: Weights) -> None:
        self._at, self._collector, self._policy = at, collector, policy
        self._flow: StageFlow | None = None
        self._refusal: PrefloopError | None = None

    @property
    def figures(self) -> Figures:
        """Of its steps so far."""
        return self._at.figures

    @property
    def is_done(self) -> bool:
        return self._refusal is not None or (self._flow is not None and self._flow.is_done)

    def pump(self) -> None:
        """Go on for a moment."""
        try:
            if self._flow is None:
                self._flow = self._collector.begin(self._policy)
            if not self.is_done:
                self._flow.pump(timeout_s=_NEWS_S)
        except PrefloopError as error:
            self._refusal = error

    def finish(self) -> None:
        """Go on to the end: engines are free for other weights then."""
        while not self.is_done:
            self.pump()

    def join(self) -> None:
        """Go on to the end.

        Raises:
            PrefloopError: what it refused.
        """
        self.finish()
        if self._refusal is not None:
            raise self._refusal
