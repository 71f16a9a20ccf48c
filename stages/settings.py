"""The base of every config record: frozen, strict, and able to say which of its fields decide a result."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what a result *is*, as plain JSON values; where and how fast it ran is left out."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            if (field.json_schema_extra or {}).get("where"):  # type: ignore[union-attr]
                continue
            value = getattr(self, name)
            out[name] = value.identity() if isinstance(value, Settings) else _plain(value)
        return out


def where(default: Any, **more: Any) -> Any:
    """A field that says where or how fast a stage runs and leaves its result alone (engines, memory, batch sizes)."""
    return Field(default, json_schema_extra={"where": True}, **more)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [item.identity() if isinstance(item, Settings) else _plain(item) for item in value]
    return value
