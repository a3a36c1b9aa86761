"""Base class of dataclasses that are stored as plain values in JSON and YAML."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields
from typing import Any, Self

from magihuman.errors import UserError


class PlainConfig:
    """`from_dict` and `to_dict` of a dataclass whose fields are plain values or tuples of them."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the config from plain values; lists become tuples.

        Raises:
            UserError: for an unknown or a missing key, naming it.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"{cls.__name__} has no field {', '.join(unknown)}; its fields are {', '.join(sorted(known))}"
            )
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except TypeError as error:
            raise UserError(f"{cls.__name__}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, tuples as lists, ready for JSON or YAML."""
        values = asdict(self)  # type: ignore[call-overload]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def differences(self, other: "PlainConfig", but: Collection[str] = ()) -> list[str]:
        """Texts `field: mine against theirs` for every field, `but` for some, in which another config of the kind differs."""
        a, b = self.to_dict(), other.to_dict()
        return [f"{k}: {a[k]!r} against {b[k]!r}" for k in a if a[k] != b[k] and k not in but]
