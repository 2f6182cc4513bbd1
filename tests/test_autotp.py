"""What a tensor-parallel rank holds, from DeepSpeed's affine maps of every kind; and those that cannot be read."""

from typing import Any

import pytest

pytest.importorskip("deepspeed.checkpoint.affine")
import torch  # noqa: E402
from deepspeed.checkpoint import affine  # noqa: E402

from dist_agc.frameworks import autotp  # noqa: E402
from dist_agc.frameworks._flat import Span  # noqa: E402
from dist_agc.model.blocks import Axis  # noqa: E402
from dist_agc.model.units import UnitRule  # noqa: E402

FULL = (12, 4)


def sliced(described: Any, rank: int, original: tuple[int, ...] = FULL, **said: Any) -> autotp.Slice | str:
    shape = described.shard_shapes[rank]
    if original != described.logical_shape:
        shape = (torch.Size(shape[:-1]).numel(), shape[-1])
    parameter = torch.empty(shape)
    conversion = {"original_shape": original, "affine_map": described.to_dict(), **said}
    parameter.ds_autotp_universal_checkpoint_meta = {"conversion": conversion}  # type: ignore[attr-defined]
    return autotp.slice_of(parameter, tuple(parameter.shape), rank)


@pytest.mark.parametrize(
    ("described", "dim", "even"),
    [
        (affine.contiguous_split_map(FULL, [6, 6], 0), 0, True),
        (affine.contiguous_split_map(FULL, [7, 5], 0), 0, False),
        (affine.contiguous_split_map(FULL, [4, 0], 1), 1, False),
        (affine.sub_param_map(FULL, [6, 3, 3], [[3, 3], [2, 1], [2, 1]], 0), 0, False),
        (affine.block_gather_map(FULL, {0: [0, 3], 1: [1, 2]}, 3, 0), 0, True),
        (affine.replicated_map(FULL, 2), None, True),
    ],
)
def test_what_a_rank_holds(described: Any, dim: int | None, even: bool) -> None:
    described.validate_coverage()
    for rank in (0, 1):
        held = described.shard_shapes[rank]
        assert sliced(described, rank) == autotp.Slice(FULL, FULL, held, dim, even)


def test_a_dim_that_is_seen_as_two_keeps_its_units() -> None:
    described = affine.contiguous_split_map((3, 4, 4), [3, 1], 1)
    part = sliced(described, 0)
    assert isinstance(part, autotp.Slice) and part == autotp.Slice(FULL, (3, 4, 4), (3, 3, 4), 1, False)
    axis = Axis((0, 1), 0)
    p = autotp.Sliced(
        names=("w",), tensor=torch.empty(36), shape=FULL, default=UnitRule(FULL, (0,)), span=Span(0, 36),
        across=((axis, 1),), sliced=part.sliced, slice=part, aligned=False,
    )  # fmt: skip
    assert p.flattened(p.default).kept == (0, 1)
    pieces = p.pieces(p.default)  # rows: other ones on each rank
    assert [b.units for b in pieces.blocks] == [9] and not pieces.cuts and pieces.distinct == (axis,)
    pieces = p.pieces(UnitRule(FULL, (1,)))  # columns: pieces of the same on both
    assert [cut.numbers.tolist() for cut in pieces.cuts] == [[0, 1, 2, 3]] and not pieces.distinct


def test_what_cannot_be_told_is_refused() -> None:
    bigcode = affine.segmented_map(FULL, [(8, False), (4, True)], 0, 2, [[4, 4]])
    scaled, whole = affine.replicated_map((4,), 2, scale=0.5), affine.replicated_map(FULL, 2)
    assert "partly by one rank and partly by several" in str(sliced(bigcode, 0))
    assert "has a scale" in str(sliced(scaled, 0, (4,)))
    assert "cannot describe (as it is)" in str(sliced(whole, 0, unsupported_reason="as it is"))
    assert "has no affine map" in str(sliced(whole, 0, affine_map=None))
    # A Conv1D, whose map speaks of the transposed weight
    parameter = torch.empty(6, 8)
    conversion = {"original_shape": (8, 12), "affine_map": affine.contiguous_split_map((8, 12), [4, 4], 0).to_dict()}
    parameter.ds_autotp_universal_checkpoint_meta = {"conversion": conversion}  # type: ignore[attr-defined]
    assert "cannot read: a part of shape (6, 8)" in str(autotp.slice_of(parameter, (6, 8), 0))
    tagged = torch.empty(3)
    assert autotp.slice_of(tagged, (3,), 0) == autotp.Slice((3,), (3,), (3,))
    tagged.tensor_model_parallel = True  # type: ignore[attr-defined]
    assert "DeepSpeed does not say how" in str(autotp.slice_of(tagged, (3,), 0))
