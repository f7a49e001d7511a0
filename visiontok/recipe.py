"""Recipes: which method acts where, with which budget; declarative, saved as JSON or YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from .budget import Budget
from .errors import ConfigError
from .method import Mass, Method, Stage, StageKind, labelled

Fidelity = Literal["fixed", "official"]
Positions = Literal["original", "compact"]
_FIELDS = {"name", "stages", "average", "seed", "fidelity", "positions", "calibrated"}
_STAGE_FIELDS = {"kind", "layer", "until", "method", "options", "keep", "mass", "reserve", "shrink"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages and what they share.

    Attributes:
        stages: what happens on the way through the model; at least one.
        average: visual tokens (or fraction of them) per image, averaged over all decoder layers. Given, the stages'
            own budgets only say how the tokens are shared out between them.
        name: what reports call it; the labels of its methods joined by ``+`` if empty.
        seed: of stochastic methods.
        fidelity: ``fixed``, or ``official`` for the published code's behaviour, bugs included.
        positions: ``original``, or ``compact``: in every layer, what is left is counted through, as some papers' code
            does; for 1-D rotary positions.
        calibrated: model type and number of decoder layers that its layers were found on; other models are refused.
    """

    stages: tuple[Stage, ...]
    average: Budget | None = None
    name: str = ""
    seed: int = 0
    fidelity: Fidelity = "fixed"
    positions: Positions = "original"
    calibrated: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError("stages=(): a recipe needs at least one stage")
        if self.fidelity not in ("fixed", "official"):
            raise ConfigError(f"fidelity={self.fidelity!r}: use 'fixed' or 'official'")
        if self.positions not in ("original", "compact"):
            raise ConfigError(f"positions={self.positions!r}: use 'original' or 'compact'")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={self.seed!r}: must be an int")
        if self.average is not None:
            if self.average.kind not in ("tokens", "ratio", "layer_average"):
                raise ConfigError(f"keep={self.average}: an average over layers is given in tokens or as a ratio")
            if routing := next((s.kind for s in self.stages if s.kind in ("skip", "route", "cache")), None):
                raise ConfigError(
                    f"keep={self.average}: with a {routing} stage, give each selection its own budget instead"
                )

    @property
    def label(self) -> str:
        """The name results are reported under."""
        return labelled(self._stages_label, "" if self.positions == "original" else self.positions)

    @property
    def _stages_label(self) -> str:
        return self.name or "+".join(stage.label for stage in self.stages)

    def __add__(self, other: Recipe) -> Recipe:
        """Both recipes' stages in one; seed, fidelity and positions of the first.

        Raises:
            ConfigError: if either has an ``average``, which would go over to the other's stages.
        """
        for one in (self, other):
            if one.average is not None:
                raise ConfigError(
                    f"{self.label} + {other.label}: {one.label} has keep={one.average}, shared out between its own "
                    "stages; give each stage its own keep, or add without it and compress(model, sum, keep=...)"
                )
        name = f"{self._stages_label}+{other._stages_label}" if self.name or other.name else ""
        calibrated = self.calibrated or other.calibrated
        return replace(self, stages=self.stages + other.stages, name=name, calibrated=calibrated)

    def with_keep(self, keep: Budget) -> Recipe:
        """The recipe with a total budget.

        One selection takes the budget as what survives it. Where tokens are also injected late or leave early, or
        where there are several selections, it is the average over all decoder layers.

        Raises:
            ConfigError: if no stage of the recipe takes a budget.
        """
        selecting = [s for s in self.stages if s.method is not None]
        if not any(s.method.card.budget for s in selecting if s.method is not None):
            raise ConfigError(f"keep={keep}: {self.label} has no budget; its layers fix what is computed")
        if len(selecting) == len(self.stages) == 1 and keep.kind != "layer_average":
            return replace(self, stages=(replace(self.stages[0], keep=keep),))
        return replace(self, average=keep)

    def with_mass(self, mass: Mass | None) -> Recipe:
        """The recipe with mass attention at every selection, or without (None).

        Raises:
            ConfigError: if the recipe selects nothing.
        """
        speaking = [s.method is not None and s.kind not in ("route", "cache") for s in self.stages]
        if mass is not None and not any(speaking):
            raise ConfigError(f"mass={mass}: {self.label} keeps no token that could speak for others")
        stages = zip(self.stages, speaking, strict=True)
        return replace(self, stages=tuple(replace(s, mass=mass) if speaks else s for s, speaks in stages))

    def with_reserve(self, reserve: float) -> Recipe:
        """The recipe with this share of every budget reserved for coordinate tokens, twice; see :class:`Stage`.

        Raises:
            ConfigError: if the recipe selects nothing, or for a share outside [0, 1/2).
        """
        picking = [stage.kind in ("prompt", "cut") for stage in self.stages]
        if reserve and not any(picking):
            raise ConfigError(f"reserve={reserve}: {self.label} picks no tokens to put others before")
        stages = zip(self.stages, picking, strict=True)
        return replace(self, stages=tuple(replace(s, reserve=reserve) if picks else s for s, picks in stages))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; methods by registered name.

        Raises:
            ConfigError: for a stage whose method is not registered (a plain callable, say).
        """
        from .recipes import find

        stages = []
        for stage in self.stages:
            entry: dict[str, Any] = {"kind": stage.kind}
            if stage.layer is not None:
                entry["layer"] = stage.layer
            if stage.until is not None:
                entry["until"] = stage.until
            if stage.method is not None:
                name = stage.method.card.name
                if find(name) is not type(stage.method):
                    raise ConfigError(f"method={name!r}: only registered methods can be saved; save its parts by hand")
                entry["method"] = name
                if options := stage.method.options():
                    entry["options"] = options
            if stage.keep is not None:
                entry["keep"] = stage.keep.to_json()
            if stage.mass is not None:
                entry["mass"] = asdict(stage.mass)
            if stage.reserve:
                entry["reserve"] = stage.reserve
            if stage.shrink is not None:
                entry["shrink"] = stage.shrink
            stages.append(entry)
        out: dict[str, Any] = {"stages": stages}
        if self.average is not None:
            out["average"] = self.average.to_json()
        if self.name:
            out["name"] = self.name
        if self.seed:
            out["seed"] = self.seed
        if self.fidelity != "fixed":
            out["fidelity"] = self.fidelity
        if self.positions != "original":
            out["positions"] = self.positions
        if self.calibrated is not None:
            out["calibrated"] = list(self.calibrated)
        return out

    @classmethod
    def from_dict(cls, data: Any) -> Recipe:
        """The recipe that :meth:`to_dict` describes, or that of the method which a calibration was made for.

        Raises:
            ConfigError: for unknown fields, methods, options or values, and for a calibration that recommends nothing.
        """
        from .recipes import find

        if isinstance(data, Mapping) and "calibration" in data:
            if not isinstance(data.get("recommended"), Mapping):
                raise ConfigError(
                    f"recommended={data.get('recommended')!r}: this calibration of {data['calibration']} found nothing "
                    "to recommend; calibrate with other options"
                )
            made = recipe(data["calibration"], **data["recommended"])
            return replace(made, calibrated=_calibrated([data["model"]["type"], data["model"]["layers"]]))
        _check_fields("recipe", data, _FIELDS)
        if not isinstance(data.get("stages"), list):
            raise ConfigError(f"stages={data.get('stages')!r}: a recipe needs a list of stages")
        stages = []
        for entry in data["stages"]:
            _check_fields("stage", entry, _STAGE_FIELDS)
            method: Method | None = None
            if "method" in entry:
                method = find(entry["method"]).build(entry.get("options") or {})
            keep = Budget.from_json(entry["keep"]) if "keep" in entry else None
            if "kind" not in entry:
                kinds = ", ".join(get_args(StageKind))
                raise ConfigError(f"stage={entry!r}: it needs a kind ({kinds})")
            stages.append(
                Stage(
                    kind=entry["kind"],
                    layer=entry.get("layer"),
                    until=entry.get("until"),
                    method=method,
                    keep=keep,
                    mass=Mass.parse(entry.get("mass")),
                    reserve=entry.get("reserve", 0.0),
                    shrink=entry.get("shrink"),
                )
            )
        return cls(
            stages=tuple(stages),
            average=Budget.from_json(data["average"]) if "average" in data else None,
            name=data.get("name", ""),
            seed=data.get("seed", 0),
            fidelity=data.get("fidelity", "fixed"),
            positions=data.get("positions", "original"),
            calibrated=_calibrated(data["calibrated"]) if "calibrated" in data else None,
        )

    def save(self, path: str | Path) -> None:
        """Write JSON, or YAML if the name ends in .yaml or .yml."""
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            import yaml

            path.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        else:
            path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: if the file is missing, is not JSON or YAML, or describes no recipe.
        """
        path = Path(path)
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe={str(path)!r}: cannot be read ({error}); give a JSON or YAML file") from error
        try:
            if path.suffix in (".yaml", ".yml"):
                import yaml

                return cls.from_dict(yaml.safe_load(text))
            return cls.from_dict(json.loads(text))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except Exception as error:  # json and yaml each have their own
            raise ConfigError(f"recipe={str(path)!r}: not valid JSON or YAML ({error})") from error

    def hash(self) -> str:
        """16 hex digits of the canonical form; equal for recipes that do the same, whatever their name."""
        canonical = {k: v for k, v in self.to_dict().items() if k != "name"}
        return hashlib.sha256(json.dumps(canonical, sort_keys=True).encode()).hexdigest()[:16]


def recipe(
    name: str,
    *,
    keep: Budget | int | float | str | None = None,
    seed: int = 0,
    fidelity: Fidelity = "fixed",
    **options: Any,
) -> Recipe:
    """The recipe of a registered method.

    Args:
        name: as listed by :func:`visiontok.methods`.
        keep: budget; int = tokens per image, float in (0, 1] = ratio.
        seed: of stochastic methods.
        fidelity: ``fixed`` or ``official``.
        **options: the method's own.

    Raises:
        ConfigError: for an unknown method or option, or a budget for a method that has none.
    """
    from .recipes import find

    method = find(name).build(options)
    made = replace(of_method(method), seed=seed, fidelity=fidelity)
    return made if keep is None else made.with_keep(Budget.parse(keep))


def of_method(method: Method) -> Recipe:
    """The stages of a method, under its name unless a single one of them carries it."""
    stages = method.stages()
    return Recipe(stages=stages, name="" if sum(s.method is not None for s in stages) == 1 else method.label)


def _calibrated(data: Any) -> tuple[str, int]:
    if not isinstance(data, list) or [type(part) for part in data] != [str, int]:
        raise ConfigError(f"calibrated={data!r}: give the model's type and its number of decoder layers, ['llava', 32]")
    return data[0], data[1]


def _check_fields(what: str, data: Any, known: set[str]) -> None:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{what}={data!r}: expected a mapping with {', '.join(sorted(known))}")
    for key in data:
        if key not in known:
            raise ConfigError(f"{key}={data[key]!r}: a {what} has no such field; it has {', '.join(sorted(known))}")
