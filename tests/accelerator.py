"""An accelerator that is not there: fake tensors, and what is dispatched for them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dist_agc import AGCConfig, Clipper
from dist_agc.frameworks import virtual
from dist_agc.frameworks._flat import FlatInterval
from dist_agc.lab.shapes import build
from dist_agc.model.parameter import Parameter

READS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero")
# Kernels that add numbers in whatever order threads come, on an accelerator; of integers the sum is the same.
IN_ANY_ORDER = {
    *("index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "index_reduce"),
    *("index_reduce_", "bincount", "histc", "cumsum", "cumsum_", "embedding_dense_backward"),
}
PUTS = ("index_put", "index_put_", "put", "put_")  # where they accumulate


class Kernels(TorchDispatchMode):
    """Kernels by name, views left out; a list operation counts once for every tensor of its list.

    ``waits``: what makes the host wait for the device: values read back, and copies that do not say otherwise.
    ``copies``: every copy between devices. ``dtypes``: of all results that lie on the accelerator. ``in_any_order``:
    sums of floating-point numbers whose last bit may be another the next time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []
        self.copies: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.in_any_order: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        result = func(*args, **kwargs)
        if name in READS or self._copies(name, args, kwargs, result):
            self.waits.append(name)
        accumulates = name in PUTS and (args[3:4] == (True,) or kwargs.get("accumulate", False))
        self._note(name, result, [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)], accumulates)
        if func.namespace == "aten" and not func.is_view:
            self.names += [name] * (len(args[0]) if "_foreach" in name else 1)
        return result

    def _note(self, name: str, result: Any, given: list[Tensor], accumulates: bool) -> None:
        results = [t for t in (result if isinstance(result, list | tuple) else [result]) if isinstance(t, Tensor)]
        if name in ("_to_copy", "copy_") and any(t.device != results[0].device for t in given):
            self.copies.append(name)
        self.dtypes |= {t.dtype for t in results if t.device.type != "cpu"}
        if (name in IN_ANY_ORDER or accumulates) and any(t.is_floating_point() for t in results):
            self.in_any_order.append(name)

    @staticmethod
    def _copies(name: str, args: Any, kwargs: Any, result: Any) -> bool:
        if name not in ("_to_copy", "copy_"):
            return False
        source = args[0] if name == "_to_copy" else args[1]
        return source.device != result.device and not kwargs.get("non_blocking", args[2:3] == (True,))


class Uploads(TorchFunctionMode):
    """Adds to the waits ``torch.tensor(values, device=...)``, of which a dispatcher of fake tensors sees nothing."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            self.waits.append(func.__name__)
        return func(*args, **kwargs)


class Layer(nn.Module):
    """Sizes that no number of ranks divides: a parameter cut anywhere has the ends of two rows and rows in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(23, 15)
        self.o_proj = nn.Linear(15, 23)


class Accelerator:
    """A model whose weights and gradients are fake tensors on no CPU: shapes and kernels, no values.

    Whatever reads a value back raises, because there is none. Not "cuda": a torch without CUDA cannot index fake ones.
    """

    def __init__(self, layers: int, layout: str = "ddp", **options: Any) -> None:
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            shapes = nn.Sequential(*(Layer() for _ in range(layers)))
        with self.mode:
            model = build({name: tuple(p.shape) for name, p in shapes.named_parameters()}, "meta")
        sizes = {"tp+fsdp2": {"tensor": 2}, "hsdp": {"shard": 2}}.get(layout, {})
        placed = [self._alone(p) for p in virtual.parameters(model, layout, virtual.World(4, 1, **sizes))]
        with self.mode:
            for parameter in placed:
                parameter.tensor.grad = torch.empty_like(parameter.tensor)
        self.clipper = Clipper.of(placed, AGCConfig(**options))
        self.clipper.execution()  # the plan is arithmetic on real integers
        self.parameters = len(placed)

    def _alone(self, parameter: Parameter) -> Parameter:
        """FSDP1's and ZeRO's partitions are one flat tensor; here each parameter has as much of it as reaches to its
        end."""
        if not isinstance(parameter, FlatInterval):
            return parameter
        span = parameter.span
        with self.mode:
            tensor = nn.Parameter(torch.empty(span.offset + span.numel, device="meta"))
        return replace(parameter, tensor=tensor)

    def blocks(self) -> int:
        return len(self.clipper.execution().plan.blocks)

    def clip(self, **options: Any) -> Kernels:
        """The second call; the first moves the plan to the device."""
        with self.mode:
            self.clipper.clip()
            with Kernels() as seen, Uploads(seen.waits):
                self.clipper.clip(**options)
        return seen
