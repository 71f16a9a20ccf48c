"""The errors a user can act on: where it happened, what was wanted, what was got, and the fix.

They are raised anywhere (driver, Ray worker, training rank), survive pickling, and are printed by the command line
without a traceback. A mistake of our own is an ``assert``, never one of these.
"""

from __future__ import annotations


class PrefloopError(ValueError):
    """A refusal that a person can act on.

    Args:
        where: the file, config key or stage that refused.
        wanted: what would have been accepted.
        got: what was there instead.
        fix: the next thing to do about it.
    """

    def __init__(self, where: str, *, wanted: str, got: str, fix: str) -> None:
        super().__init__(where)
        self.where, self.wanted, self.got, self.fix = where, wanted, got, fix

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.where, self.wanted, self.got, self.fix)

    def __str__(self) -> str:
        return (
            f"{type(self).__name__}: {self.where}\n"
            f"  wanted: {_indent(self.wanted)}\n"
            f"  got:    {_indent(self.got)}\n"
            f"  fix:    {_indent(self.fix)}"
        )


class ConfigError(PrefloopError):
    """The config, or an override of it, says something that cannot be run."""


class InputError(PrefloopError):
    """A model, tokenizer or dataset that the config names cannot be used."""


class ContractError(PrefloopError):
    """A table does not have the schema that its boundary promises."""


class StageError(PrefloopError):
    """A stage ran and its result cannot be built upon."""


class FingerprintError(PrefloopError):
    """A found result was made from something else than what is asked for now."""


def _rebuild(kind: type[PrefloopError], where: str, wanted: str, got: str, fix: str) -> PrefloopError:
    return kind(where, wanted=wanted, got=got, fix=fix)


def _indent(text: str) -> str:
    return text.replace("\n", "\n          ")
