from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from clue_fast.errors import BackendError, UnknownNameError
from clue_fast.ops import backend as backends
from clue_fast.ops import sparse_linear

OPERATOR = "sparse_linear"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIMS = pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
# 0 and 1 token; 1500 is more than one run of 1024 in the reference. Odd features end inside a vector.
TOKENS = [0, 1, 37, 1500]
OUT, IN = 71, 43


def some(size: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randperm(size)[:count].sort().values.to(device)


def operands(tokens: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the gradient of the output."""
    shapes = (tokens, IN), (OUT, IN), (OUT,), (tokens, OUT)
    x, weight, bias, grad = (torch.randn(shape).to(dtype).to(device) for shape in shapes)
    return x, weight, bias, grad


def leaf(weight: Tensor, index: Tensor, dim: int) -> Tensor:
    """Never read by the operator, so it holds NaN."""
    shape = list(weight.shape)
    shape[dim] = len(index)
    return torch.full(shape, float("nan"), dtype=torch.float32, device=weight.device).requires_grad_()


def dense_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """What autograd gives the weight of F.linear."""
    weight = torch.zeros(grad.shape[-1], x.shape[-1], dtype=x.dtype, device=x.device, requires_grad=True)
    F.linear(x, weight).backward(grad)
    return weight.grad


def assert_gradient(actual: Tensor, x: Tensor, grad: Tensor, index: Tensor, dim: int) -> None:
    """At most twice the error of PyTorch's product of the same size in float32, whatever the dtype of the inputs.

    Single products are exact in float32, so what is left is the order of the sum.
    """
    exact = dense_gradient(x.double(), grad.double()).index_select(dim, index)
    thin = (grad[:, index].t(), x) if dim == 0 else (grad.t(), x[:, index])
    single = thin[0].float() @ thin[1].float()
    assert actual.dtype == torch.float32 and actual.shape == exact.shape
    if actual.numel():
        ours, torchs = ((g.double() - exact).abs().max().item() for g in (actual, single))
        # The floor, since the order of a library's sum depends on shapes and threads: a random walk of one rounding a
        # token, of a sum that is half of the largest on average. A single token has one rounding at most.
        walk = max(1.0, grad.flatten(0, -2).shape[0] ** 0.5 / 2)
        assert ours <= 2 * torchs + 2.0**-24 * walk * exact.abs().max().item()


@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_forward_and_gradients(backend: str, device: torch.device, tokens: int, dtype: torch.dtype, dim: int) -> None:
    x, weight, bias, grad = operands(tokens, dtype, device)
    for count in (1, 7, weight.shape[dim]):
        index = some(weight.shape[dim], count, device)
        ours = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        torchs = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        values = leaf(weight, index, dim)
        y = sparse_linear(ours[0], weight, ours[1], values, index, dim, backend=backend)
        expected = F.linear(torchs[0], weight, torchs[1])
        assert torch.equal(y, expected)
        y.backward(grad)
        expected.backward(grad)
        for a, b in zip(ours, torchs, strict=True):
            assert torch.equal(a.grad, b.grad)
        assert_gradient(values.grad, x, grad, index, dim)


@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_launch_functions_write_everything_and_nothing_else(
    backend: str, device: torch.device, dtype: torch.dtype, dim: int
) -> None:
    """Outputs full of NaN between guards, inputs that are column ranges of something larger."""
    x, _, _, grad = operands(90, dtype, device)
    wide_x, wide_grad = (torch.full((90, v.shape[1] + 9), float("nan"), dtype=dtype, device=device) for v in (x, grad))
    wide_x[:, 5:-4], wide_grad[:, 5:-4] = x, grad
    x, grad = wide_x[:, 5:-4], wide_grad[:, 5:-4]
    source = grad if dim == 0 else x
    index = some(source.shape[1], 11, device)

    def guarded(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        whole = torch.full((rows + 2, columns), float("nan"), dtype=dtype, device=device)
        return whole, whole[1:-1]

    whole, kept = guarded(90, 11, dtype)
    backends.launch(OPERATOR, "sparse_linear_gather", device, backend)(source, index, kept)
    assert torch.equal(kept, source[:, index])
    assert whole[0].isnan().all() and whole[-1].isnan().all()

    whole, out = guarded(11 if dim == 0 else OUT, IN if dim == 0 else 11, torch.float32)
    arguments = (grad, x, index) if dim == 0 else (grad, kept, None)
    backends.launch(OPERATOR, "sparse_linear_backward", device, backend)(*arguments, out)
    assert_gradient(out, x, grad, index, dim)
    assert whole[0].isnan().all() and whole[-1].isnan().all()


@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_of_neighbors(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Attention heads: 8 neighboring rows each; two of them adjacent, or a single one."""
    x, weight, _, grad = operands(33, dtype, device)
    for heads in ([0, 3, 4], [2]):
        index = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in heads]).to(device)
        values = leaf(weight, index, dim)
        sparse_linear(x, weight, None, values, index, dim, backend=backend).backward(grad)
        assert_gradient(values.grad, x, grad, index, dim)


@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed_weight_of_a_conv1d(backend: str, device: torch.device, dtype: torch.dtype, dim: int) -> None:
    """Stored as [in_features, out_features], so that the rows are input features."""
    x, weight, bias, grad = operands(2 * 18, dtype, device)
    layer = Conv1D(OUT, IN).to(device, dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.t())
        layer.bias.copy_(bias)
    inputs = [x.view(2, 18, IN).clone().requires_grad_() for _ in range(2)]
    index = some(layer.weight.shape[dim], 9, device)
    values = leaf(layer.weight, index, dim)
    ours = sparse_linear(
        inputs[0], layer.weight.detach(), layer.bias, values, index, dim, transposed=True, backend=backend
    )
    theirs = layer(inputs[1])
    assert torch.equal(ours, theirs)
    for y in (ours, theirs):
        y.backward(grad.view_as(y))
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert_gradient(values.grad.t(), x, grad, index, 1 - dim)
    assert values.grad.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_selected_part_of_the_bias(backend: str, device: torch.device, dtype: torch.dtype, transposed: bool) -> None:
    x, weight, bias, grad = operands(300, dtype, device)
    index = some(OUT, 9, device)
    features, dim = (weight.t().contiguous(), 1) if transposed else (weight, 0)
    bias_values = torch.full((9,), float("nan"), device=device).requires_grad_()
    y = sparse_linear(
        x,
        features,
        bias,
        leaf(features, index, dim),
        index,
        dim,
        bias_values=bias_values,
        transposed=transposed,
        backend=backend,
    )
    y.backward(grad)
    exact = grad.double()[:, index].sum(0)
    assert bias_values.grad.dtype == torch.float32
    assert torch.allclose(bias_values.grad.double(), exact, rtol=0, atol=300 * 2.0**-24 * grad.abs().max().item())
    assert bias.grad is None


@DIMS
def test_the_leaf_may_be_a_single_number_expanded(backend: str, device: torch.device, dim: int) -> None:
    """Where the weight itself holds the values there is nothing to keep in it."""
    x, weight, _, grad = operands(20, torch.bfloat16, device)
    index = some(weight.shape[dim], 6, device)
    shape = leaf(weight, index, dim).shape
    values = torch.nn.Parameter(torch.zeros(1, device=device).expand(shape))
    for part in (slice(0, 13), slice(13, 20)):
        sparse_linear(x[part], weight, None, values, index, dim, backend=backend).backward(grad[part])
    assert values.grad.is_contiguous()
    assert_gradient(values.grad, x, grad, index, dim)


@DIMS
def test_leading_dimensions_and_strides(backend: str, device: torch.device, dim: int) -> None:
    x, weight, _, grad = operands(24, torch.bfloat16, device)
    index = some(weight.shape[dim], 5, device)
    cases = [
        (x.view(2, 12, IN), grad.view(2, 12, OUT)),
        (x.view(2, 12, IN).transpose(0, 1), grad.view(2, 12, OUT).transpose(0, 1)),
        (x.t().contiguous().t(), grad.t().contiguous().t()),
        (x, grad[:1].expand(24, OUT)),
        (x[3], grad[3]),
    ]
    for x_case, grad_case in cases:
        values = leaf(weight, index, dim)
        y = sparse_linear(x_case, weight, None, values, index, dim, backend=backend)
        assert torch.equal(y, F.linear(x_case, weight))
        y.backward(grad_case)
        assert_gradient(values.grad, x_case.reshape(-1, IN), grad_case.reshape(-1, OUT), index, dim)


@DIMS
def test_more_tokens_than_are_widened_at_once(backend: str, device: torch.device, dim: int) -> None:
    """16-bit operands are copied in float32 for 32 MiB of tokens at a time, 932 of them here."""
    x, grad = torch.randn(1000, 9000).bfloat16().to(device), torch.randn(1000, 8).bfloat16().to(device)
    weight = torch.zeros(8, 9000, dtype=torch.bfloat16, device=device)
    index = some(weight.shape[dim], 8 if dim == 0 else 8999, device)
    values = leaf(weight, index, dim)
    sparse_linear(x, weight, None, values, index, dim, backend=backend).backward(grad)
    assert_gradient(values.grad, x, grad, index, dim)


@DIMS
def test_gradient_accumulates(backend: str, device: torch.device, dim: int) -> None:
    x, weight, _, grad = operands(40, torch.float32, device)
    index = some(weight.shape[dim], 6, device)
    values = leaf(weight, index, dim)
    for part in (slice(0, 13), slice(13, 40)):
        sparse_linear(x[part], weight, None, values, index, dim, backend=backend).backward(grad[part])
    assert_gradient(values.grad, x, grad, index, dim)


@DIMS
def test_backward_keeps_only_what_it_needs(backend: str, device: torch.device, dim: int) -> None:
    """For columns the selected ones of x; neither x nor the weight where x needs no gradient."""
    x, weight, _, _ = operands(50, torch.float32, device)
    index = some(weight.shape[dim], 4, device)
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        sparse_linear(x, weight, None, leaf(weight, index, dim), index, dim, backend=backend)
    assert sorted(t.numel() for t in kept) == sorted([4, 50 * IN if dim == 0 else 50 * 4])


def test_a_weight_changed_between_forward_and_backward_is_noticed(backend: str, device: torch.device) -> None:
    x, weight, _, grad = operands(5, torch.float32, device)
    index = some(OUT, 3, device)
    y = sparse_linear(x.requires_grad_(), weight, None, leaf(weight, index, 0), index, 0, backend=backend)
    weight[0, 0] = 1.0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(grad)


@DIMS
def test_autocast(backend: str, device: torch.device, dim: int) -> None:
    x, weight, bias, grad = operands(20, torch.float32, device)
    index = some(weight.shape[dim], 6, device)
    values = leaf(weight, index, dim)
    with torch.autocast(device.type, torch.bfloat16):
        y = sparse_linear(x, weight, bias, values, index, dim, backend=backend)
        assert torch.equal(y, F.linear(x, weight, bias))
    y.backward(grad.bfloat16())
    assert_gradient(values.grad, x.bfloat16(), grad.bfloat16(), index, dim)


@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
def test_close_for_every_number_of_threads(
    backend: str, device: torch.device, two_threads: None, dtype: torch.dtype, dim: int
) -> None:
    """The gather is exact; the product is that of the BLAS, whose order of sums may depend on the threads."""
    x, weight, _, grad = operands(3000, dtype, device)
    index = some(weight.shape[dim], 20, device)
    gradients = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        values = leaf(weight, index, dim)
        sparse_linear(x, weight, None, values, index, dim, backend=backend).backward(grad)
        assert_gradient(values.grad, x, grad, index, dim)
        gradients.append(values.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-3)


PROPERTY = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(
    tokens=st.integers(0, 40),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    dim=st.integers(0, 1),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_any_shape_and_selection(
    backend: str,
    device: torch.device,
    tokens: int,
    sizes: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    x, grad = (torch.randn(tokens, size).to(dtype).to(device) for size in reversed(sizes))
    weight = torch.randn(sizes).to(dtype).to(device)
    chosen = data.draw(st.sets(st.integers(0, sizes[dim] - 1)))
    index = torch.tensor(sorted(chosen), dtype=torch.int64, device=device)
    values = leaf(weight, index, dim)
    sparse_linear(x, weight, None, values, index, dim, backend=backend).backward(grad)
    assert_gradient(values.grad, x, grad, index, dim)


def test_opcheck(backend: str, device: torch.device) -> None:
    x, weight, bias, grad = operands(12, torch.float32, device)
    namespace, check = torch.ops.clue_fast, torch.library.opcheck
    x.requires_grad_()
    for dim in (0, 1):
        index = some(weight.shape[dim], 5, device)
        values = torch.randn_like(leaf(weight, index, dim)).requires_grad_()
        for transposed in (False, True):
            features = weight.t().contiguous() if transposed else weight
            part = (1 - dim) if transposed else dim
            leaves = (values.detach().t().contiguous() if transposed else values).requires_grad_()
            more = torch.zeros(5, device=device, requires_grad=True) if dim == 0 else None
            arguments = (x, features, bias, leaves, more, index, part, transposed, backend)
            check(namespace.sparse_linear.default, arguments)
        kept = x.detach() if dim == 0 else x.detach()[:, index]
        check(namespace.sparse_linear_backward.default, (grad, kept, index, dim, False, backend))
    check(namespace.sparse_linear_gather.default, (x.detach(), index, backend))


@pytest.mark.slow
@DIMS
def test_compile(backend: str, device: torch.device, dim: int) -> None:
    x, weight, bias, grad = operands(24, torch.float32, device)
    index = some(weight.shape[dim], 5, device)

    def run(compiled: bool) -> list[Tensor]:
        def layer(x: Tensor, values: Tensor) -> Tensor:
            return sparse_linear(x, weight, bias, values, index, dim, backend=backend)

        leaves = [x.clone().requires_grad_(), torch.zeros_like(leaf(weight, index, dim)).requires_grad_()]
        y = (torch.compile(layer, fullgraph=True) if compiled else layer)(*leaves)
        y.backward(grad)
        return [y.detach(), *(v.grad for v in leaves)]

    for eager, compiled in zip(run(False), run(True), strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-6, atol=1e-5)


@DIMS
def test_gradcheck_of_the_definition(dim: int) -> None:
    """The gradient of `values` is that of the weight it stands for, so the weight is put in from it here."""
    weight = torch.randn(5, 4, dtype=torch.float64)
    index = some(weight.shape[dim], 2)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64, requires_grad=True)
    values = weight.index_select(dim, index).requires_grad_()

    def layer(x: Tensor, bias: Tensor, values: Tensor) -> Tensor:
        full = weight.index_copy(dim, index, values.detach())
        return sparse_linear(x, full, bias, values, index, dim)

    assert torch.autograd.gradcheck(layer, (x, bias, values))


def test_second_order_gradients_are_refused() -> None:
    x, weight, _, _ = operands(4, torch.float32, torch.device("cpu"))
    index = some(OUT, 3)
    values = leaf(weight, index, 0)
    y = sparse_linear(x, weight, None, values, index, 0)
    (grad,) = torch.autograd.grad(y.square().sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input() -> None:
    x, weight, _, _ = operands(6, torch.float32, torch.device("cpu"))
    index = some(OUT, 3)
    values = leaf(weight, index, 0)
    with pytest.raises(ValueError, match="dim must be 0 for rows or 1 for columns, not 2"):
        sparse_linear(x, weight, None, values, index, 2)
    with pytest.raises(ValueError, match="int64"):
        sparse_linear(x, weight, None, values, index.int(), 0)
    with pytest.raises(ValueError, match=r"values must be \[3, 43\]"):
        sparse_linear(x, weight, None, values[:2], index, 0)
    with pytest.raises(ValueError, match="values must be float32"):
        sparse_linear(x, weight, None, values.bfloat16(), index, 0)
    with pytest.raises(ValueError, match="the index counts input features"):
        sparse_linear(x, weight.t(), None, values.t(), index, 1, bias_values=index.float())
    with pytest.raises(ValueError, match=r"bias_values must be \[3\]"):
        sparse_linear(x, weight, None, values, index, 0, bias_values=torch.zeros(2))
    with pytest.raises(UnknownNameError, match="unknown backend 'fast'"):
        sparse_linear(x, weight, None, values, index, 0, backend="fast").sum().backward()
    with pytest.raises(BackendError, match=r"has no cuda backend|cannot run sparse_linear"):
        sparse_linear(x, weight, None, values, index, 0, backend="cuda").sum().backward()


@pytest.mark.parametrize("wrong", [-1, OUT])
def test_cpp_refuses_an_index_outside_the_weight(wrong: int) -> None:
    if backends.available()["cpp"] is not None:
        pytest.skip(backends.available()["cpp"])
    x, weight, _, grad = operands(6, torch.float32, torch.device("cpu"))
    index = torch.tensor([0, wrong])
    with pytest.raises(ValueError, match=f"index holds {wrong}, outside"):
        sparse_linear(x, weight, None, leaf(weight, index, 0), index, 0, backend="cpp").backward(grad)


@pytest.mark.gpu
@DIMS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_on_a_gpu(tokens: int, dtype: torch.dtype, dim: int) -> None:
    """As it is chosen: the product in float32 of 16-bit operands that the vendor has, or Triton's."""
    x, weight, _, grad = operands(tokens, dtype, torch.device("cuda"))
    index = some(weight.shape[dim], 7, "cuda")
    for transposed in (False, True):
        features, part = (weight.t().contiguous(), 1 - dim) if transposed else (weight, dim)
        values = leaf(features, index, part)
        sparse_linear(x, features, None, values, index, part, transposed=transposed).backward(grad)
        assert_gradient(values.grad.t() if transposed else values.grad, x, grad, index, dim)
