"""Products: what each operation contracts, by hand; and what is not to be taken for a product of a parameter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dist_agc
from dist_agc.model import products

aten = torch.ops.aten


class Using(nn.Module):
    """One parameter, used in one way."""

    def __init__(self, weight: Tensor, use: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.use = use

    def forward(self) -> Any:
        return self.use(self.weight)


def left(weight: Tensor, use: Callable[[Tensor], Any], dims: tuple[int, ...]) -> dist_agc.UnitRow:
    """The row of a parameter whose units are numbered by ``dims``, after it was used."""
    model = Using(weight, use)
    with torch.no_grad():
        (row,) = dist_agc.units(model, run=model, units={"weight": dims})
    return row


def other(dims: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Dims that are wrong, and by which units can be numbered."""
    return next(d for d in ((0,), (1,), (0, 1), ()) if d != dims and (not d or d[-1] < ndim))


def ones(*shape: int) -> Tensor:
    return torch.ones(shape)


# A parameter, its use in one operation, and the dims that are not summed over in it.
OPERATIONS: list[tuple[Any, Tensor, Callable[[Tensor], Any], tuple[int, ...]]] = [
    (aten.mm, ones(3, 5), lambda w: aten.mm(ones(2, 3), w), (1,)),
    (aten.mm, ones(3, 5), lambda w: aten.mm(w, ones(5, 2)), (0,)),
    (aten.bmm, ones(4, 3, 5), lambda w: aten.bmm(ones(4, 2, 3), w), (0, 2)),
    (aten.bmm, ones(4, 3, 5), lambda w: aten.bmm(w, ones(4, 5, 2)), (0, 1)),
    (aten.mv, ones(3, 5), lambda w: aten.mv(w, ones(5)), (0,)),
    (aten.dot, ones(5, 1), lambda w: aten.dot(w[:, 0], ones(5)), ()),
    (aten.vdot, ones(5, 1), lambda w: aten.vdot(w[:, 0], ones(5)), ()),
    (aten.addmm, ones(3, 5), lambda w: aten.addmm(ones(5), ones(2, 3), w), (1,)),
    (aten._addmm_activation, ones(3, 5), lambda w: aten._addmm_activation(ones(5), ones(2, 3), w), (1,)),
    (aten.addmv, ones(3, 5), lambda w: aten.addmv(ones(3), w, ones(5)), (0,)),
    (aten.addbmm, ones(4, 3, 5), lambda w: aten.addbmm(ones(2, 5), ones(4, 2, 3), w), (0, 2)),
    (aten.baddbmm, ones(4, 3, 5), lambda w: aten.baddbmm(ones(4, 2, 5), ones(4, 2, 3), w), (0, 2)),
    (aten.convolution, ones(6, 4, 3), lambda w: nn.functional.conv1d(ones(1, 4, 9), w), (0,)),
    (aten.convolution, ones(6, 2, 3, 3), lambda w: nn.functional.conv2d(ones(1, 4, 9, 9), w, groups=2), (0,)),
    (aten.convolution, ones(4, 6, 3), lambda w: nn.functional.conv_transpose1d(ones(1, 4, 9), w), (1,)),
    (aten._trilinear, ones(4, 3, 5), lambda w: nn.functional.bilinear(ones(2, 3), ones(2, 5), w), (0,)),
]


@pytest.mark.parametrize(
    ("operation", "weight", "use", "dims"),
    [pytest.param(*case, id=f"{case[0].__name__}-{i}") for i, case in enumerate(OPERATIONS)],
)
def test_what_an_operation_leaves(operation: Any, weight: Tensor, use: Any, dims: tuple[int, ...]) -> None:
    row = left(weight, use, dims)
    assert row.observed == dims and not row.disagrees
    wrong = other(dims, weight.ndim)
    row = left(weight, use, wrong)
    assert row.disagrees and {d for d in row.observed or () if weight.shape[d] > 1} == set(dims)


def rows(model: nn.Module, run: Callable[[], Any]) -> dict[str, tuple[int, ...] | None]:
    return {row.name: row.observed for row in dist_agc.units(model, run=run)}


def test_grouped_mm() -> None:
    if not hasattr(aten, "_grouped_mm"):
        pytest.skip("needs torch 2.8")
    ends = torch.tensor([8, 16], dtype=torch.int32)
    weight = torch.ones(2, 16, 8, dtype=torch.bfloat16)
    x = torch.ones(16, 16, dtype=torch.bfloat16)
    assert left(weight, lambda w: aten._grouped_mm(x, w, ends), (0, 2)).observed == (0, 2)
    turned = left(weight.mT.contiguous(), lambda w: aten._grouped_mm(x, w.mT, ends), (0, 1))
    assert turned.observed == (0, 1)


def test_whole_layers_in_one_operation() -> None:
    """The fast paths of attention and of an encoder layer, and an LSTM, have operations of their own."""
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    lstm = nn.LSTM(8, 6, num_layers=2).eval()
    x = torch.ones(2, 3, 8)
    with torch.no_grad():
        seen = rows(attention, lambda: attention(x, x, x, need_weights=False))
        assert seen["in_proj_weight"] == seen["out_proj.weight"] == (0,)
        seen = rows(layer, lambda: layer(x))
        assert {name for name, dims in seen.items() if dims == (0,)} == {
            *("self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight")
        }
        seen = rows(lstm, lambda: lstm(x))
        assert {name for name, dims in seen.items() if dims == (0,)} == {
            f"weight_{a}h_l{n}" for a in "ih" for n in (0, 1)
        }


def test_cudnn_takes_a_list_of_weights() -> None:
    operands = products._PRODUCTS[aten._cudnn_rnn.default]
    weights = [ones(4, 3), ones(4, 5), ones(4), ones(4)]
    assert [tensor for tensor, _ in operands(ones(2, 1, 3), weights, 4)] == weights[:2]


def test_every_operation_of_the_table_is_tested() -> None:
    here = {operation.default for operation, *_ in OPERATIONS}
    layers = (aten.linear, aten._native_multi_head_attention, aten._transformer_encoder_layer_fwd)
    layers += (aten.mkldnn_rnn_layer, aten._cudnn_rnn, *([aten._grouped_mm] if hasattr(aten, "_grouped_mm") else []))
    assert here | {operation.default for operation in layers} == set(products._PRODUCTS)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(mode: Any) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (4, 1)), nn.ConvTranspose1d(4, 6, 3, groups=2))
    with mode():
        seen = rows(model, lambda: model(torch.ones(2, 5)))
    assert seen == {"0.weight": (0,), "0.bias": None, "2.weight": (0, 2), "2.bias": None}


def test_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 3, bias=False))
        seen = rows(model, lambda: model(torch.empty(1, 4, 3, 3)))
    assert seen == {"0.weight": (0,), "0.bias": None, "2.weight": (0,)}


def test_memory_formats() -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ConvTranspose2d(6, 4, 3, groups=2))
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    assert not model[0].weight.is_contiguous()
    x = torch.ones(1, 4, 5, 5).to(memory_format=torch.channels_last)
    assert rows(model, lambda: model(x)) == {"0.weight": (0,), "0.bias": None, "1.weight": (0, 2), "1.bias": None}
    # A parameter whose own strides are turned: (out, in) all the same
    linear = nn.Linear(5, 4, bias=False)
    linear.weight = nn.Parameter(torch.ones(5, 4).T)
    assert rows(linear, lambda: linear(torch.ones(2, 5))) == {"weight": (0,)}


def test_views_and_slices() -> None:
    # One expert at a time
    assert left(ones(4, 6, 5), lambda w: [ones(2, 5) @ w[e].T for e in range(4)], (0, 1)).observed == (0, 1)
    assert left(ones(4, 5, 6), lambda w: ones(2, 5) @ w[3], (0, 2)).observed == (0, 2)
    # Halves of a projection, and heads of one
    assert left(ones(6, 5), lambda w: [ones(2, 5) @ half.T for half in w.chunk(2)], (0,)).observed == (0,)
    assert left(ones(6, 5), lambda w: torch.einsum("nd,hkd->nhk", ones(2, 5), w.view(2, 3, 5)), (0,)).observed == (0,)
    assert left(ones(5, 2, 3), lambda w: torch.einsum("nd,dhk->nhk", ones(2, 5), w), (1, 2)).observed == (1, 2)
    # All experts in one matrix, (experts, out, in) seen as (experts * out, in)
    assert left(ones(4, 6, 5), lambda w: ones(2, 5) @ w.flatten(0, 1).T, (0, 1)).observed == (0, 1)
    # One dim of the operand runs through several of the parameter
    assert left(ones(6, 4, 3), lambda w: ones(2, 12) @ w.flatten(1).T, (0,)).observed == (0,)
    assert left(ones(5, 2, 3), lambda w: torch.einsum("nhk,dhk->nd", ones(4, 2, 3), w), (0,)).observed == (0,)
    # Parts of one large tensor: each is a parameter
    flat = torch.ones(50)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.Linear(4, 5, bias=False))
    model[0].weight, model[1].weight = nn.Parameter(flat[:20].view(4, 5)), nn.Parameter(flat[20:40].view(5, 4))
    assert rows(model, lambda: model[1](ones(1, 4))) == {"0.weight": None, "1.weight": (0,)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_weights() -> None:
    model = Tied()
    tokens = torch.tensor([1, 2])
    assert rows(model, lambda: model.embedding(tokens)) == {"embedding.weight": None}
    assert rows(model, lambda: model.head(model.embedding(tokens))) == {"embedding.weight": (0,)}
    # Used there and back: the second use contracts what the first one leaves, and is the one that is told
    (row,) = dist_agc.units(model, run=lambda: model.head(model.embedding(tokens)) @ model.head.weight)
    assert row.disagrees and row.observed == (1,)


def test_what_is_no_product_of_a_parameter() -> None:
    linear = nn.Linear(5, 4, bias=False)
    assert rows(linear, lambda: ones(2, 5) @ (linear.weight * 2).T) == {"weight": None}
    assert rows(linear, lambda: ones(2, 5) @ linear.weight.bfloat16().float().T) == {"weight": None}
    assert rows(linear, lambda: linear.weight.sum()) == {"weight": None}


def test_a_backward_pass_inside_is_left_out() -> None:
    linear = nn.Linear(5, 4, bias=False)
    x = torch.ones(2, 5, requires_grad=True)

    def step() -> None:
        linear(x).sum().backward()

    assert rows(linear, step) == {"weight": (0,)}
    assert x.grad is not None  # by a product that contracts the rows


def test_two_forward_passes_add_up() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))

    def both() -> None:
        model[0](ones(1, 3))
        model[1](ones(1, 3))

    assert rows(model, both) == {"0.weight": (0,), "1.weight": (0,)}
