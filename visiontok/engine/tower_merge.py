"""Merge stages: tokens merge in the layers of a model's vision tower, and stand in the prompt where one of them stood.

The projector maps the merged tokens, and behind it every patch gets those of its group, so that the model packs, tiles
and places its features as ever. In the prompt, one token of each group stays, at its own position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedError
from ..method import Merging, Stage
from .merging import Merged, MergeHooks
from .readings import Host
from .vision import current_record

if TYPE_CHECKING:
    from visiontok.adapters.base import Record

Allowed = Callable[[list[int], list[int]], list[int]]
"""The budget: tokens that may be left of images of so many tokens and tiles each."""


class TowerMerge:
    """A merge stage on one model.

    Args:
        host: the model, and what the hooks' life is tied to.
        stage: whose method says what to merge.
        allowed: its budget; None if the method is to do as it does without.
        official: whether the method is to do as its published code does.

    Raises:
        UnsupportedError: if tokens cannot be merged in this vision tower.
    """

    def __init__(self, host: Host, stage: Stage, allowed: Allowed | None, *, official: bool) -> None:
        self.adapter, self.serves, self.stage = host.adapter, host.serves, stage
        self.allowed, self.official = allowed, official
        self.encoder = self.adapter.encoder()
        layers, layer = len(self.encoder.blocks), self.adapter.feature_layer
        self.depth = (layer + layers if layer < 0 else layer) + 1
        host.add(MergeHooks(self.encoder, self._plan, depth=self.depth, done=_done, whole=False))
        projector = self.adapter.base.get_submodule(self.adapter.projector or "")
        host.add(projector.register_forward_hook(self._place))

    @property
    def _model(self) -> str:
        return str(self.adapter.base.config.model_type)

    def _plan(self, pictures: int, patches: int) -> Sequence[Merging] | None:
        record = current_record()
        if record is None or not self.serves():
            return None
        counts = self._counts(record, pictures, patches)
        method: Any = self.stage.method
        layers, made = len(self.encoder.blocks), {}
        for count in set(counts):
            made[count] = method.merging(patches, count, depth=self.depth, layers=layers, official=self.official)
        return [made[count] for count in counts]

    def _counts(self, record: Record, pictures: int, patches: int) -> list[int | None]:
        """Patches that are to be left of each picture of the tower's run; None where there is no budget."""
        tiles = self.adapter.tiles(record)
        sizes, parts = ([item[k] for item in tiles] for k in (0, 1))
        if sum(parts) != pictures:
            raise UnsupportedError(
                f"{self._model}: {sum(parts)} pictures were given and the vision tower runs on {pictures}, so it is "
                "not known which of them make an image; use a method that merges or drops tokens behind the tower"
            )
        if record.modality == "video":
            raise UnsupportedError(
                f"{self._model}: {self.stage.label} merges the patches of pictures, not of videos; use a method that "
                "merges or drops tokens behind the vision tower, such as 'aim_merge'"
            )
        if self.allowed is None:
            return [None] * pictures
        counts: list[int | None] = []
        for size, number, k in zip(sizes, parts, self.allowed(sizes, parts), strict=True):
            if k >= size:
                counts += [patches] * number
            elif k < number:
                raise UnsupportedError(
                    f"{self._model}: {self.stage.label} leaves at least one token of each of the {number} tiles of an "
                    f"image, of which the budget is {k}; raise keep, or use a method that drops tokens"
                )
            else:
                counts += [min(k // number + (i < k % number), patches) for i in range(number)]
        return counts

    def _place(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        record = current_record()
        run = None if record is None or not self.serves() else record.merged
        if run is None or not run.anything:
            return None
        slots = output.shape[1]
        if slots not in (run.widths[-1], run.widths[-1] - run.prefix) or len(output) != len(run.source):
            raise UnsupportedError(
                f"{self._model}: its projector made {tuple(output.shape)[:2]} tokens of {len(run.source)} pictures of "
                f"{run.widths[-1]} merged ones; set vision_feature_select_strategy to 'default' for a tower with a CLS "
                "token, to 'full' for one without"
            )
        return run.spread_features(output)


def _done(run: Merged) -> None:
    record = current_record()
    if record is not None:
        record.merged = run
