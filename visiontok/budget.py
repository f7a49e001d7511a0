"""How many visual tokens stay: the one definition, with one meaning per constructor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, get_args

from .errors import ConfigError

if TYPE_CHECKING:
    import torch

Kind = Literal["tokens", "ratio", "per_tile", "layer_average", "flops"]
_KINDS: tuple[str, ...] = get_args(Kind)
_WHOLE = ("tokens", "per_tile")
_FRACTION = ("ratio", "flops")


@dataclass(frozen=True)
class Budget:
    """How many visual tokens stay.

    Build one with :meth:`tokens`, :meth:`ratio`, :meth:`per_tile`, :meth:`layer_average`, :meth:`flops` or
    :meth:`parse`.

    Attributes:
        kind: which of the five meanings ``value`` has.
        value: the number.
    """

    kind: Kind
    value: int | float

    def __post_init__(self) -> None:
        kind, value = self.kind, self.value
        if kind not in _KINDS:
            raise ConfigError(f"keep: {kind!r} is no kind of budget; use one of {', '.join(_KINDS)}")
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if kind in _WHOLE:
            if not number or isinstance(value, float) or value < 1:
                raise ConfigError(f"keep={value!r}: {kind} is a whole number of at least 1")
        elif kind in _FRACTION:
            if not number or not 0 < value <= 1:
                raise ConfigError(f"keep={value!r}: {kind} is a fraction in (0, 1]; for a number of tokens give an int")
            object.__setattr__(self, "value", float(value))
        elif not number or value <= 0:
            raise ConfigError(f"keep={value!r}: {kind} is a positive number of tokens, averaged over all layers")

    @classmethod
    def tokens(cls, k: int) -> Budget:
        """``k`` tokens of every image."""
        return cls("tokens", k)

    @classmethod
    def ratio(cls, r: float) -> Budget:
        """The fraction ``r`` in (0, 1] of the tokens of every image, rounded half up, at least one token."""
        return cls("ratio", r)

    @classmethod
    def per_tile(cls, k: int) -> Budget:
        """``k`` tokens of every tile (thumbnail, crop or frame) of an image."""
        return cls("per_tile", k)

    @classmethod
    def layer_average(cls, k: float) -> Budget:
        """``k`` tokens per image on average over *all* decoder layers, whatever the schedule."""
        return cls("layer_average", k)

    @classmethod
    def flops(cls, f: float) -> Budget:
        """The fraction ``f`` in (0, 1] of the floating-point operations of the uncompressed prefill."""
        return cls("flops", f)

    @classmethod
    def parse(cls, value: Budget | int | float | str) -> Budget:
        """The budget a user means by ``value``.

        Args:
            value: an int is a number of tokens per image, a float in (0, 1] a ratio. A string is read as on the command
                line: ``"64"`` tokens, ``"0.25"`` or ``"25%"`` a ratio, ``"per_tile:32"`` any kind by name.

        Raises:
            ConfigError: for anything else, and for the string ``"1"``, which could mean one token or all of them.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ConfigError(
                f"keep={value!r}: give tokens per image as an int (64) or a ratio as a float (0.25), not a "
                f"{type(value).__name__}"
            )
        if isinstance(value, str):
            return cls._parse_text(value)
        return cls.tokens(value) if isinstance(value, int) else cls.ratio(value)

    @classmethod
    def _parse_text(cls, text: str) -> Budget:
        kind, _, rest = text.strip().rpartition(":")
        if kind and kind not in _KINDS:
            raise ConfigError(f"keep={text!r}: {kind!r} is no kind of budget; use one of {', '.join(_KINDS)}")
        if text.strip() == "1":
            raise ConfigError(
                "keep='1' is ambiguous: write 'tokens:1' for one token per image, '100%' or '1.0' for all of them"
            )
        digits, percent = rest.removesuffix("%"), rest.endswith("%")
        number: int | float
        try:
            if percent:
                number = float(Decimal(digits) / 100)  # in decimal: float("33.4") / 100 is not 0.334
            else:
                number = int(digits) if digits.strip().isdecimal() else float(digits)
        except (ValueError, ArithmeticError):
            raise ConfigError(
                f"keep={text!r}: write tokens per image as '64', a ratio as '0.25' or '25%', or KIND:VALUE"
            ) from None
        if kind:
            return cls(kind, number)  # type: ignore[arg-type]  # checked above
        return cls.tokens(number) if isinstance(number, int) else cls.ratio(number)

    def __str__(self) -> str:
        """The form :meth:`parse` reads back."""
        return f"{self.kind}:{self.value}"

    def to_json(self) -> int | float | dict[str, int | float]:
        """A plain value: an int for tokens, a float for a ratio, ``{kind: value}`` for the rest."""
        return self.value if self.kind in ("tokens", "ratio") else {self.kind: self.value}

    @classmethod
    def from_json(cls, data: Any) -> Budget:
        """The budget :meth:`to_json` wrote.

        Raises:
            ConfigError: if ``data`` is not such a value.
        """
        if isinstance(data, dict):
            if len(data) != 1:
                raise ConfigError(f"keep={data!r}: give one kind of budget, as in {{'per_tile': 32}}")
            [(kind, value)] = data.items()
            return cls(kind, value)
        return cls.parse(data)

    def counts(
        self, n: torch.Tensor | Sequence[int], *, depth: int | None = None, cut: int = 0, exit: int | None = None
    ) -> torch.Tensor:
        """How many tokens of each unit stay.

        Args:
            n: (U,) candidates of each unit: images, or tiles for :meth:`per_tile`.
            depth: decoder layers L; needed by :meth:`layer_average` only.
            cut: first decoder layer that sees the reduced set, 0 for a selection before the model.
            exit: first decoder layer that sees no visual token any more; None if all do.

        Returns:
            (U,) long, at least 1 and at most ``n`` (0 where ``n`` is 0), on the device of ``n``.

        Raises:
            ConfigError: if the budget cannot be turned into counts from these arguments.
        """
        import torch

        from .allocators import layer_average

        sizes = [int(size) for size in (n.tolist() if isinstance(n, torch.Tensor) else n)]
        if self.kind == "flops":
            raise ConfigError(f"keep={self}: FLOPs fix no count without a model; compress() solves it for one prefill")
        if self.kind == "layer_average":
            if depth is None:
                raise ConfigError(f"keep={self}: an average over layers needs depth, the number of decoder layers")
            wanted = [
                layer_average(size, self.value, depth=depth, cuts=(cut,), stop=exit)[0] if size else 0 for size in sizes
            ]
        elif self.kind == "ratio":
            # The shortest decimal is what the user wrote: 0.145 of 100 is 14.5 and rounds up, in binary it is below.
            share = Fraction(repr(self.value))
            wanted = [math.floor(share * size + Fraction(1, 2)) for size in sizes]
        else:
            wanted = [int(self.value)] * len(sizes)
        kept = [min(max(count, 1), size) for count, size in zip(wanted, sizes, strict=True)]
        return torch.tensor(kept, dtype=torch.long, device=n.device if isinstance(n, torch.Tensor) else None)
