"""What optimizers hold, and whether a clipper covers it: looked at again whenever a step holds other tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from .clipper import Clipper
from .config import check_threshold
from .frameworks import refused
from .model.names import Entry, first_of


def held(*optimizers: Optimizer) -> list[Tensor]:
    """What optimizers step on."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def group_thresholds(*of_optimizers: Iterable[Mapping[str, Any]]) -> dict[int, float | None]:
    """The thresholds that parameter groups of optimizers ask for, by ``id`` of the parameter."""
    found: dict[int, float | None] = {}
    for i, group in (numbered for groups in of_optimizers for numbered in enumerate(groups)):
        if "clipping_threshold" in group:
            value = group["clipping_threshold"]
            if value is not None:
                value = check_threshold(value, f"param_groups[{i}]['clipping_threshold']")
            found.update((id(p), value) for p in group["params"])
    return found


@contextmanager
def thresholds_watched(optimizer: Optimizer, default: float) -> Iterator[None]:
    """Warn when ``optimizer.load_state_dict`` changes a group's threshold, which goes before the one asked for."""
    before: list[float | None] = []

    def remember(optimizer: Optimizer, _: Any) -> None:
        before[:] = [group.get("clipping_threshold", default) for group in optimizer.param_groups]

    def compare(optimizer: Optimizer) -> None:
        for i, (was, group) in enumerate(zip(before, optimizer.param_groups, strict=False)):
            value = group.get("clipping_threshold", default)
            if value == was:
                continue
            if "clipping_threshold" in group:
                new = "None (not clipped)" if value is None else value
                said = f"has a clipping_threshold of {new} from the checkpoint, which takes the place of {was}"
                how = f"Set the one that you want in the group, or delete it there to get the {default} of attach()."
            else:
                said = f"has no clipping_threshold of its own any more: {value} takes the place of {was}"
                how = "The checkpoint's group has none: set it again to keep it."
            warnings.warn(f"param_groups[{i}] {said}. {how}", UserWarning, stacklevel=2)

    handles = []
    # Some classes around an optimizer have the hooks of steps alone (pytorch_optimizer's Lookahead).
    if hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):
        handles.append(optimizer.register_load_state_dict_pre_hook(remember))
        handles.append(optimizer.register_load_state_dict_post_hook(compare))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Holdings:
    """What the optimizers of one clipper have held so far.

    A model may get a new head, an adapter, or a parameter of another size, in the place of an old one or in a group of
    its own, and wrappers may put tensors of their own into an optimizer. What is new is clipped where its layout is
    known: the model has it, or it is plain and has come after `attach`. All else is said.
    """

    def __init__(self, clipper: Clipper) -> None:
        self._clipper = clipper
        self._known: WeakKeyDictionary[Optimizer, list[list[Tensor]]] = WeakKeyDictionary()

    def begin(self, optimizer: Optimizer) -> None:
        """At `attach`. ValueError: the optimizer holds nothing of the model."""
        tensors = held(optimizer)
        if not any(map(self._clipper.holds, tensors)):
            raise ValueError(
                f"the optimizer {type(optimizer).__name__} holds none of the model's parameters: attach after "
                "sharding, and make the optimizer from the parameters of the sharded model."
            )
        self._known[optimizer] = _groups(optimizer)
        self._tell(optimizer, [p for p in tensors if not self._clipper.holds(p)])

    def look(self, optimizer: Optimizer) -> list[Tensor]:
        """In every step: what the optimizer holds now. ValueError: nothing of it is known."""
        now, before = _groups(optimizer), self._known.get(optimizer)
        tensors = [p for group in now for p in group]
        if before is not None and _same(now, before):
            return tensors
        holds = self._clipper.holds
        if not all(map(holds, tensors)):
            self._clipper.renew()
        if before is None:
            self.begin(optimizer)
            return tensors
        if replaced := self._replaced(now, before):
            self._clipper.renew(replaced)
        seen = _seen(optimizer, tensors, before, holds)
        places = [(f"param_groups.{g}.{i}", p) for g, group in enumerate(now) for i, p in enumerate(group)]
        new = [Entry((name,), p) for name, p in places if not holds(p) and id(p) not in seen and not refused(p)]
        if new:
            self._clipper.renew(added=new)
            warnings.warn(
                f"the optimizer {type(optimizer).__name__} has {_shapes([entry.tensor for entry in new])} since AGC "
                "was attached, and the model does not have them. They are clipped by their shapes alone, as rows, "
                f"under names such as {new[0].name!r}. If they belong to another module, attach to both: "
                "dist_agc.attach([model, module], optimizer).",
                UserWarning,
                stacklevel=2,
            )
        self._known[optimizer] = now
        self._tell(optimizer, [p for p in tensors if not holds(p) and id(p) not in seen])
        return tensors

    def look_in_backward(self, optimizer: Optimizer, covers: Callable[[Tensor], bool]) -> None:
        """The same where the hooks of backward are set for good: what is new has none, and is said."""
        now, before = _groups(optimizer), self._known[optimizer]
        if _same(now, before):
            return
        tensors = [p for group in now for p in group]
        seen = _seen(optimizer, tensors, before, covers)
        self._known[optimizer] = now
        if new := [p for p in tensors if not covers(p) and id(p) not in seen]:
            warnings.warn(
                f"AGC does not clip {_shapes(new)} in the optimizer {type(optimizer).__name__}: they have come since "
                "it was attached with during_backward=True. Call .remove() on the handle and attach again.",
                UserWarning,
                stacklevel=2,
            )

    def _replaced(self, now: list[list[Tensor]], before: list[list[Tensor]]) -> dict[int, Tensor]:
        """By ``id`` of the old one, the new tensors that stand where a plain one of the same kind stood."""
        still = {id(p) for group in now for p in group}
        clipper = self._clipper
        return {
            id(old): new
            for was, group in zip(before, now, strict=False)
            for old, new in zip(was, group, strict=False)
            if id(old) not in still and clipper.whole(old) and not clipper.holds(new) and _alike(old, new)
        }

    def _tell(self, optimizer: Optimizer, unknown: list[Tensor]) -> None:
        if unknown:
            warnings.warn(
                f"AGC does not clip {_shapes(unknown)} in the optimizer {type(optimizer).__name__}: the model that it "
                "is attached to does not have them. To clip them too, attach to all that the optimizer trains: "
                "dist_agc.attach([model, other], optimizer).",
                UserWarning,
                stacklevel=2,
            )


def _seen(
    optimizer: Optimizer, tensors: list[Tensor], before: list[list[Tensor]], covers: Callable[[Tensor], bool]
) -> set[int]:
    """What it held before, by ``id``. ValueError: nothing of what it holds now is covered."""
    if tensors and not any(map(covers, tensors)):
        raise ValueError(
            f"the optimizer {type(optimizer).__name__} holds none of the parameters that AGC was attached to, so "
            f"nothing would be clipped: it steps on {_shapes(tensors)}. Something has put other tensors into it "
            "since. Attach after that, to what it made of the model: dist_agc.attach(model, optimizer), for "
            "DeepSpeed dist_agc.attach(engine)."
        )
    return {id(p) for group in before for p in group}


def _groups(optimizer: Optimizer) -> list[list[Tensor]]:
    return [list(group["params"]) for group in optimizer.param_groups]


def _same(now: list[list[Tensor]], before: list[list[Tensor]]) -> bool:
    """Whether they are the same tensors. Not ``==``, which compares what is in them."""
    return list(map(len, now)) == list(map(len, before)) and all(
        a is b for one, other in zip(now, before, strict=True) for a, b in zip(one, other, strict=True)
    )


def _alike(old: Tensor, new: Tensor) -> bool:
    """Whether one may have taken the place of the other: more rows, or fewer, of the same length. A vector of another
    length may as well be many parameters laid end to end."""
    return old.shape == new.shape or (old.ndim == new.ndim > 1 and old.shape[1:] == new.shape[1:])


def _shapes(tensors: Iterable[Tensor]) -> str:
    shapes = [str(tuple(p.shape)) for p in tensors]
    return f"{len(shapes)} tensor{'s' if len(shapes) > 1 else ''} of shape {first_of(shapes, 5)}"
