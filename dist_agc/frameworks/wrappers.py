"""torchao's training weights: tensors around a weight that say how to multiply by it, and weights kept in 8 bits.

Optimizers step on them as on any weight, and gradients are plain. What a norm is taken of is what is stepped: the
tensor inside, or the numbers that are meant by what is stored. Known by the names of their classes, and by the
attributes below, which are private to torchao; read here only.
"""

from __future__ import annotations

from torch import Tensor

from ..model import values

SUPPORTED = "torchao 0.18"

_AROUND = {
    "WeightWithDynamicFloat8CastTensor": "_tensor",  # float8, where FSDP2 gathers in 8 bits
    "Float8TrainingWeightWrapperTensor": "_data",  # float8 of layers and experts
    "MXFP8TrainingWeightWrapperTensor": "_data",
    "Int8MixedPrecisionTrainingLinearWeight": "_data",
    "BitNetTrainingLinearWeight": "_data",
}
_PACKED = {
    "Int8QuantizedTrainingLinearWeight": "int_data",
}

values.AROUND.update(_AROUND)
values.PACKED.update(_PACKED)


def unknown(tensor: Tensor) -> str | None:
    """Why a tensor that is made of others cannot be clipped, to go on after its name; None for known and plain ones."""
    kind = type(tensor)
    # The second is a plain tensor that a collective has yet to fill.
    if not hasattr(kind, "__tensor_flatten__") or kind.__name__ == "AsyncCollectiveTensor":
        return None
    attribute = {**_AROUND, **_PACKED}.get(kind.__name__)
    if attribute is None:
        return (
            f"is a {kind.__name__}, a layout that dist_agc does not know; known are plain tensors (DDP), "
            "DTensor (FSDP2, tensor parallel), FSDP1, DeepSpeed ZeRO and torchao's training weights. Exclude it"
        )
    inner = getattr(tensor, attribute, None)
    if hasattr(type(inner), "__tensor_flatten__"):
        return (
            f"is a {kind.__name__} around a {type(inner).__name__}, which dist_agc does not know: convert the model "
            "first, and shard it then. Or exclude it"
        )
    if inner is None:
        return (
            f"is a {kind.__name__} without the {attribute!r} that dist_agc reads; supported is {SUPPORTED}. Exclude it"
        )
    return None
