"""What `attach` asks a framework: a file under frameworks/ answers with one subclass of `Framework`.

Private to torch and read here only: ``torch.distributed.checkpoint.state_dict._init_optim_state``.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import AGCConfig
from ..model.blocks import Axis
from ..model.names import Entry
from ..model.parameter import Parameter


class Framework:
    """One way of training. The base class is one that knows nothing.

    ``wrapped``: by class name of a wrapper module, the attribute under which it keeps what it wraps.
    """

    wrapped: ClassVar[Mapping[str, str]] = {}

    def prepare(self, model: nn.Module) -> None:
        """Bring ``model`` into the state in which its parameters can be listed."""

    def claim(self, model: nn.Module | None, entries: Sequence[Entry]) -> tuple[list[Parameter], list[Entry]]:
        """The parameters that this framework holds, and the entries left over; no model: parameters were given."""
        return [], list(entries)

    def refuses(self, tensor: Tensor) -> str | None:
        """Why a tensor of this framework that nobody claims cannot be clipped, to go on after its name."""
        return None

    def not_in_backward(self, module: nn.Module) -> str | None:
        """Why gradients of this module are not final in backward."""
        return None

    def steps(self, model: object, optimizer: object = None) -> bool:
        """Whether ``model`` is an engine of this framework, which steps by itself, or ``optimizer`` one of its own."""
        return False

    def pipeline(self, engine: Any) -> Any:
        """The process group whose ranks hold the other stages of an engine; None where it has all of its model."""
        return None

    def attachment(
        self, engine: Any, optimizer: Any, config: AGCConfig | None, options: Mapping[str, Any]
    ) -> Attachment:
        """What `attach` needs to clip inside the engine's own step. Nothing is changed yet."""
        raise NotImplementedError


@dataclass
class Attachment:
    """What one `attach` clips, and where. The framework of an engine says in a subclass what it does beside."""

    parameters: Sequence[Parameter]
    optimizers: Sequence[Optimizer]
    config: AGCConfig

    # Whether an engine fills the optimizers, and knows by itself what they hold.
    by_engine: ClassVar[bool] = False

    @property
    def options(self) -> Mapping[str, Any]:
        """Settings beside ``config``, which have to be the same on every rank."""
        return {}

    def attached(self, hook: Any) -> None:
        """AGC is on; ``hook`` is its handle."""

    def groups(self, optimizer: Optimizer) -> Sequence[Mapping[str, Any]]:
        """Its parameter groups, with what other ranks alone hold something of."""
        return optimizer.param_groups

    def step_is_over(self, clipped: Collection[tuple[Optimizer, Collection[object]]]) -> bool:
        """Whether nothing is left to clip in this step, of which ``clipped`` was: optimizers, each with what it held,
        tensors by ``id``."""
        return {optimizer for optimizer, _ in clipped}.issuperset(self.optimizers)

    def before_clip(self, optimizer: Optimizer) -> None:
        """``optimizer`` is about to step, and its gradients to be clipped."""

    def removed(self) -> None:
        """AGC is off: everything is again what it was."""


def group_axis(group: Any) -> Axis:
    """The ranks of a process group that this rank is in; None is all of them."""
    ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
    return Axis(ranks, ranks.index(dist.get_rank()), group or dist.group.WORLD)


def read(owner: Any, attribute: str, library: str, version: str, supported: str) -> Any:
    """A private attribute of a framework; RuntimeError where its insides are not the known ones."""
    try:
        return getattr(owner, attribute)
    except AttributeError:
        raise RuntimeError(
            f"dist_agc reads {type(owner).__name__}.{attribute}, which {library} {version} does not have; supported is "
            f"{supported}."
        ) from None


def read_torch(owner: Any, attribute: str) -> Any:
    return read(owner, attribute, "torch", torch.__version__, "torch 2.6 to 2.15")


def makes_state() -> bool:
    """Whether torch.distributed.checkpoint makes the state of an optimizer now, by a step with zero gradients.

    There is nothing to clip, and it is done by whichever ranks ask for the state: perhaps one alone.
    """
    module = sys.modules.get("torch.distributed.checkpoint.state_dict")
    code = getattr(getattr(module, "_init_optim_state", None), "__code__", None)
    frame = None if code is None else sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def is_a(thing: object, *names: str) -> bool:
    """Whether its class, or one that this derives from, is called so. No library is imported to find out."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)
