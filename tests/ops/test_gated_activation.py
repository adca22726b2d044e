from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clue_fast.errors import UnknownNameError
from clue_fast.ops import FIELDS, GRADIENT_FIELDS, GRADIENT_SUMS, SUMS, Scoring, gated_activation
from clue_fast.ops import backend as backends

OPERATOR = "gated_activation"
ACTIVATIONS = ["silu", "gelu_tanh", "gelu", "relu", "relu2"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# 0 and 1 token; 37 is odd; 300 is more than one run of 256. 1, 7 and 431 channels end inside a vector or tile.
SHAPES = [(0, 64), (1, 1), (1, 431), (37, 7), (37, 64), (300, 64), (300, 431)]
FEW_SHAPES = [(0, 64), (1, 1), (300, 71)]  # the interpreter takes milliseconds a tile
CASES = [(a, torch.float32) for a in ACTIVATIONS] + [("silu", torch.bfloat16), ("silu", torch.float16)]
CASES += [("gelu_tanh", torch.bfloat16), ("relu2", torch.float16)]
ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-53}


def act(x: Tensor, activation: str) -> Tensor:
    """The activations from their definitions, in float64."""
    x = x.double()
    if activation == "silu":
        return x / (1 + torch.exp(-x))
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x / math.sqrt(2))
    if activation == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    positive = torch.where(x > 0, x, torch.zeros_like(x))
    return positive if activation == "relu" else positive**2


def torch_act(x: Tensor, activation: str) -> Tensor:
    """What a model runs today: one PyTorch call a step, rounded to the dtype after each."""
    functional = torch.nn.functional
    return {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
    }[activation](x)


class Accuracy:
    """At most twice the error that PyTorch itself makes in this dtype, over all shapes of a case together."""

    def __init__(self) -> None:
        self.ours = self.torchs = 0.0

    def add(self, ours: Tensor, torchs: Tensor, exact: Tensor) -> None:
        assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
        if exact.numel():
            ours, torchs = ((x.detach().double() - exact.detach()).abs().max().item() for x in (ours, torchs))
            assert not math.isnan(ours)
            self.ours, self.torchs = max(self.ours, ours), max(self.torchs, torchs)

    def check(self) -> None:
        assert self.ours <= 2 * self.torchs, f"error {self.ours:.3g}, PyTorch's own {self.torchs:.3g}"


def inputs(tokens: int, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    gate = (torch.randn(tokens, channels) * 3).to(dtype)
    up = torch.randn(tokens, channels).to(dtype)
    return gate.to(device), up.to(device)


def groups(tokens: int, device: torch.device, low: int = 0, high: int = 3) -> Tensor:
    return torch.randint(low, high, (tokens,), dtype=torch.int8).to(device)


def record(h: Tensor, group: Tensor, count: int = 2) -> Tensor:
    """The statistics from their definition."""
    h, group = h.double().cpu(), group.cpu()
    expected = torch.zeros(count, 5, h.shape[1], dtype=torch.float64)
    for token in range(h.shape[0]):
        g = int(group[token]) - 1
        if 0 <= g < count:
            expected[g, 0] += h[token]
            expected[g, 1] += h[token] ** 2
            expected[g, 2] += h[token].abs()
            expected[g, 3] = torch.maximum(expected[g, 3], h[token].abs())
            expected[g, 4] += h[token] > 0
    return expected


def products(h: Tensor, grad: Tensor, group: Tensor) -> list[Tensor]:
    """h * dL/dh of each group."""
    product = h.detach().double().cpu() * grad.double().cpu()
    return [product[group.cpu() == g] for g in (1, 2)]


def assert_sums(actual: Tensor, expected: Tensor, scale: Tensor, slack: Tensor | float = 0.0) -> None:
    """Float32 sums over runs of at most 256 terms: a random walk of 16 roundings, of the sum of magnitudes.

    A term below float32's normal range may be lost.
    """
    excess = (actual.cpu() - expected).abs() - (16 * 2.0**-24 * scale + 300 * 2.0**-126 + slack)
    assert not (excess > 0).any(), f"{int((excess > 0).sum())} sums are off, the worst by {excess.max():.3g}"


def assert_statistics(actual: Tensor, expected: Tensor) -> None:
    actual = actual.cpu()
    magnitude, square = expected[:, FIELDS.index("magnitude_sum")], expected[:, FIELDS.index("square_sum")]
    assert_sums(actual[:, FIELDS.index("sum")], expected[:, FIELDS.index("sum")], magnitude)
    assert_sums(actual[:, FIELDS.index("magnitude_sum")], magnitude, magnitude)
    assert_sums(actual[:, FIELDS.index("square_sum")], square, square)
    for field in ("magnitude_max", "active_count"):
        assert torch.equal(actual[:, FIELDS.index(field)], expected[:, FIELDS.index(field)])


def assert_attribution(actual: Tensor, h: Tensor, grad: Tensor, group: Tensor) -> None:
    """Backward recomputes h and may round a few of its values to the other neighbor: two a channel pass."""
    for row, p in zip(actual.cpu(), products(h, grad, group), strict=True):
        largest = p.abs().amax(0) if len(p) else torch.zeros(p.shape[1])
        step = 4 * ROUNDOFF[h.dtype]
        magnitude, square = p.abs().sum(0), p.square().sum(0)
        assert_sums(row[0], p.sum(0), magnitude, step * largest)
        assert_sums(row[1], magnitude, magnitude, step * largest)
        assert_sums(row[2], square, square, 2 * step * largest**2)


def zeros(channels: int, fields: tuple[str, ...], device: torch.device, count: int = 2) -> Tensor:
    return torch.zeros(count, len(fields), channels, dtype=torch.float64, device=device)


@pytest.mark.parametrize(("activation", "dtype"), CASES)
def test_forward_and_statistics(backend: str, device: torch.device, activation: str, dtype: torch.dtype) -> None:
    accuracy = Accuracy()
    for tokens, channels in FEW_SHAPES if backend == "triton" else SHAPES:
        gate, up = inputs(tokens, channels, dtype, device)
        group = groups(tokens, device)
        statistics = zeros(channels, FIELDS, device)
        plain = gated_activation(gate, up, activation, backend=backend)
        h = gated_activation(gate, up, activation, group=group, statistics=statistics, backend=backend)
        accuracy.add(h, torch_act(gate, activation) * up, act(gate, activation) * up.double())
        assert torch.equal(h, plain), "recording changes the result"
        assert_statistics(statistics, record(h, group))
    accuracy.check()


@pytest.mark.parametrize(("activation", "dtype"), CASES)
def test_backward_and_attribution(backend: str, device: torch.device, activation: str, dtype: torch.dtype) -> None:
    accuracies = Accuracy(), Accuracy()
    for tokens, channels in FEW_SHAPES if backend == "triton" else SHAPES:
        gate, up = inputs(tokens, channels, dtype, device)
        grad = torch.randn(tokens, channels).to(dtype).to(device)
        group = groups(tokens, device)
        attribution = zeros(channels, GRADIENT_FIELDS, device)

        def run(function, dtype=dtype, gate=gate, up=up, grad=grad):
            leaves = [x.to(dtype).detach().requires_grad_() for x in (gate, up)]
            function(*leaves).backward(grad.to(dtype))
            return [leaf.grad for leaf in leaves]

        exact = run(lambda gate, up: act(gate, activation) * up, torch.float64)
        torchs = run(lambda gate, up: torch_act(gate, activation) * up)
        plain = run(lambda gate, up: gated_activation(gate, up, activation, backend=backend))
        recording = {"group": group, "gradient_statistics": attribution}
        ours = run(partial(gated_activation, activation=activation, backend=backend, **recording))
        for accuracy, mine, theirs, truth in zip(accuracies, ours, torchs, exact, strict=True):
            accuracy.add(mine, theirs, truth)
        assert all(map(torch.equal, ours, plain)), "recording changes the gradient"
        h = gated_activation(gate, up, activation, backend=backend)
        assert_attribution(attribution, h, grad, group)
    for accuracy in accuracies:
        accuracy.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("sums", "gradient_sums"), [("moments", "magnitude"), ("magnitude", "all")])
def test_only_the_sums_that_are_asked_for(
    backend: str, device: torch.device, dtype: torch.dtype, sums: str, gradient_sums: str
) -> None:
    """They have the bits that they have among all; the others keep theirs."""
    tokens, channels = 300, 71
    gate, up = inputs(tokens, channels, dtype, device)
    group = groups(tokens, device)
    before = [torch.rand(2, n, channels, dtype=torch.float64, device=device) for n in (5, 3)]

    def run(**asked: str) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        kept = [x.clone() for x in before]
        recording = {"group": group, "statistics": kept[0], "gradient_statistics": kept[1], **asked}
        h = gated_activation(*leaves, backend=backend, **recording)
        h.backward(torch.ones_like(h))
        return [*kept, h.detach(), *(leaf.grad for leaf in leaves)]

    every, some = run(), run(sums=sums, gradient_sums=gradient_sums)
    assert all(map(torch.equal, every[2:], some[2:])), "what is recorded changes the result"
    named = (FIELDS, SUMS[sums]), (GRADIENT_FIELDS, GRADIENT_SUMS[gradient_sums])
    for (fields, asked), all_of_them, these, start in zip(named, every, some, before, strict=False):
        for place, field in enumerate(fields):
            assert not torch.equal(all_of_them[:, place], start[:, place])
            assert torch.equal(these[:, place], (all_of_them if field in asked else start)[:, place]), field


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_extreme_values(backend: str, device: torch.device, activation: str) -> None:
    gate = torch.tensor([[-1e4, -104.0, -88.8, -20.0, -1e-38, -0.0, 0.0, 1e-38, 20.0, 88.8, 104.0, 1e4]])
    up = torch.linspace(-2, 2, gate.shape[1])[None]
    leaves = [x.to(device).detach().requires_grad_() for x in (gate, up)]
    h = gated_activation(*leaves, activation, backend=backend)
    h.backward(torch.ones_like(h))
    exact = [x.double().requires_grad_() for x in (gate, up)]
    truth = act(exact[0], activation) * exact[1]
    truth.backward(torch.ones_like(truth))
    results = [(h.detach(), truth.detach()), *((a.grad, b.grad) for a, b in zip(leaves, exact, strict=True))]
    for ours, expected in results:
        expected = expected.nan_to_num(0.0)  # exp overflows in the float64 definition of the slope
        assert torch.allclose(ours.cpu().double(), expected, rtol=2.0**-18, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_launch_functions_write_everything_and_nothing_else(
    backend: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Outputs full of NaN, rows padded on both sides, and statistics that are a column range of a larger tensor."""
    tokens, channels, before, after = 37, 71, 3, 5
    nan = float("nan")

    def padded(fill: float = nan) -> tuple[Tensor, Tensor]:
        whole = torch.full((tokens, before + channels + after), fill, dtype=dtype, device=device)
        return whole, whole[:, before : before + channels]

    def accumulator(fields: int) -> tuple[Tensor, Tensor]:
        whole = torch.full((2, fields, before + channels + after), nan, dtype=torch.float64, device=device)
        part = whole[:, :, before : before + channels]
        part.zero_()
        return whole, part

    (_, gate), (_, up), (_, grad) = padded(), padded(), padded()
    for x in (gate, up, grad):
        x.copy_(torch.randn(tokens, channels))
    group = groups(tokens, device)
    for recording in (False, True):
        wholes, (out, grad_gate, grad_up) = zip(*(padded() for _ in range(3)), strict=True)
        (all_statistics, statistics), (all_attribution, attribution) = accumulator(5), accumulator(3)
        suffix, extra = ("_record", (group, statistics)) if recording else ("", ())
        backends.launch(OPERATOR, f"gated_activation{suffix}", device, backend)(gate, up, out, "silu", *extra)
        extra = (group, attribution) if recording else ()
        backends.launch(OPERATOR, f"gated_activation_backward{suffix}", device, backend)(
            grad, gate, up, grad_gate, grad_up, "silu", *extra
        )
        for whole, part in zip(wholes, (out, grad_gate, grad_up), strict=True):
            assert part.isfinite().all()
            assert whole[:, :before].isnan().all() and whole[:, before + channels :].isnan().all()
        if recording:
            assert_statistics(statistics, record(out, group))
            assert_attribution(attribution, out, grad, group)
            for whole in (all_statistics, all_attribution):
                assert whole[..., :before].isnan().all() and whole[..., before + channels :].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_halves_and_leading_dimensions(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    packed = torch.randn(2, 19, 2 * 23).to(dtype).to(device)
    group = groups(38, device).view(2, 19)
    statistics = zeros(23, FIELDS, device)

    def run(gate: Tensor, up: Tensor, **recording: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = gated_activation(gate, up, backend=backend, **recording)
        h.backward(torch.ones_like(h))
        return h, gate.grad, up.grad

    gate, up = packed.chunk(2, dim=-1)
    ours = run(gate, up, group=group, statistics=statistics)
    assert_statistics(statistics, record(ours[0].detach().flatten(0, 1), group.flatten()))
    expected = run(gate.reshape(38, 23).contiguous(), up.reshape(38, 23).contiguous())
    strided = run(packed[..., 0::2], packed[..., 1::2])
    apart = run(packed[..., 0::2].contiguous(), packed[..., 1::2].contiguous())
    one_token = gated_activation(gate[0, 0], up[0, 0], backend=backend)
    # PyTorch's own functions differ in the last bit between the vector part of a row and its tail.
    close = {"rtol": 8 * ROUNDOFF[dtype], "atol": ROUNDOFF[dtype]} if backend == "reference" else {}
    same = partial(torch.allclose, **close) if close else torch.equal
    for a, b, c, d in zip(ours, expected, strided, apart, strict=True):
        assert a.shape == gate.shape and same(a, b.view(2, 19, 23))
        assert same(c, d)
    assert same(one_token, ours[0][0, 0])


def test_accumulates_over_calls_and_counts_only_its_groups(backend: str, device: torch.device) -> None:
    gate, up = inputs(64, 33, torch.float32, device)
    group = groups(64, device, low=-1, high=5)  # neither -1 nor 3 and 4 have a row
    statistics = zeros(33, FIELDS, device)
    for part in (slice(0, 20), slice(20, 64)):
        h = gated_activation(gate[part], up[part], group=group[part], statistics=statistics, backend=backend)
    h = gated_activation(gate, up, backend=backend)
    assert_statistics(statistics, record(h, group))
    assert statistics[:, 2].min() > 0, "nothing was recorded"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_values_reach_the_sums(backend: str, device: torch.device, bad: float) -> None:
    gate, up = inputs(40, 9, torch.float32, device)
    up[17, 4] = bad
    group = torch.ones(40, dtype=torch.int8, device=device)
    statistics, attribution = zeros(9, FIELDS, device), zeros(9, GRADIENT_FIELDS, device)
    gate.requires_grad_()
    h = gated_activation(
        gate,
        up,
        "silu",
        group=group,
        statistics=statistics,
        gradient_statistics=attribution,
        backend=backend,
    )
    h.backward(torch.ones_like(h))
    finite = torch.ones(9, dtype=torch.bool)
    finite[4] = False
    for row in (statistics[0, 0], statistics[0, 1], statistics[0, 2], attribution[0, 0], attribution[0, 2]):
        assert torch.equal(row.isfinite().cpu(), finite)
    assert statistics[1].isfinite().all()


def test_same_bits_on_every_run_and_number_of_threads(backend: str, device: torch.device, two_threads: None) -> None:
    tokens, channels = (300, 20) if backend == "triton" else (1500, 431)
    gate, up = inputs(tokens, channels, torch.bfloat16, device)
    grad = torch.randn(tokens, channels).bfloat16().to(device)
    group = groups(tokens, device)

    def run() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in (gate, up)]
        kept = [zeros(channels, FIELDS, device), zeros(channels, GRADIENT_FIELDS, device)]
        h = gated_activation(*leaves, group=group, statistics=kept[0], gradient_statistics=kept[1], backend=backend)
        h.backward(grad)
        return [h.detach(), *(leaf.grad for leaf in leaves), *kept]

    first = run()
    runs = [run()]
    torch.set_num_threads(1)
    if backend == "cpp":  # PyTorch's own sums may split by thread
        runs.append(run())
    for other in runs:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(backend: str, device: torch.device, reentrant: bool) -> None:
    gate, up = (x.requires_grad_() for x in inputs(30, 17, torch.float32, device))
    group = groups(30, device)
    statistics, attribution = zeros(17, FIELDS, device), zeros(17, GRADIENT_FIELDS, device)
    runs = []

    def layer(gate: Tensor, up: Tensor) -> Tensor:
        runs.append(None)
        return gated_activation(
            gate,
            up,
            group=group,
            statistics=statistics if len(runs) == 1 else None,
            gradient_statistics=attribution,
            backend=backend,
        )

    h = checkpoint(layer, gate, up, use_reentrant=reentrant)
    h.backward(torch.ones_like(h))
    assert len(runs) == 2
    assert_statistics(statistics, record(h.detach(), group))
    assert_attribution(attribution, h, torch.ones_like(h), group)


# A test that is given examples keeps its function-scoped fixtures, which hold nothing that changes.
PROPERTY = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@PROPERTY
@given(tokens=st.integers(0, 80), channels=st.integers(1, 40), seed=st.integers(0, 99), data=st.data())
def test_statistics_add_up_and_ignore_order(
    backend: str, device: torch.device, tokens: int, channels: int, seed: int, data: st.DataObject
) -> None:
    if backend == "triton":
        tokens, channels = min(tokens, 20), min(channels, 20)
    torch.manual_seed(seed)
    gate, up = inputs(tokens, channels, torch.float32, device)
    group = groups(tokens, device)
    cut = data.draw(st.integers(0, tokens))
    order = torch.randperm(tokens, device=device)

    def run(*parts: Tensor) -> Tensor:
        statistics = zeros(channels, FIELDS, device)
        for part in parts:
            gated_activation(
                # ReLU, whose value does not depend on where in a vector it is computed
                gate[part],
                up[part],
                "relu",
                group=group[part],
                statistics=statistics,
                backend=backend,
            )
        return statistics.cpu()

    everything = torch.arange(tokens, device=device)
    whole = run(everything)
    assert_statistics(run(everything[:cut], everything[cut:]), whole)
    assert_statistics(run(order), whole)


def test_opcheck(backend: str, device: torch.device) -> None:
    gate, up = (x.requires_grad_() for x in inputs(12, 10, torch.float32, device))
    group = groups(12, device)
    statistics, attribution = zeros(10, FIELDS, device), zeros(10, GRADIENT_FIELDS, device)
    namespace, plain = torch.ops.clue_fast, (gate, up, "silu")
    check = torch.library.opcheck
    check(namespace.gated_activation.default, (*plain, None, None, backend))
    check(namespace.gated_activation_record.default, (*plain, group, statistics, None, backend))
    backward = (torch.randn_like(gate), gate.detach(), up.detach(), "silu")
    check(namespace.gated_activation_backward.default, (*backward, backend))
    check(namespace.gated_activation_backward_record.default, (*backward, group, attribution, backend))


@pytest.mark.slow
@pytest.mark.parametrize("recording", [False, True])
def test_compile(backend: str, device: torch.device, recording: bool) -> None:
    packed = torch.randn(24, 2 * 18, device=device)
    group = groups(24, device)

    def run(compiled: bool) -> list[Tensor]:
        leaf = packed.clone().requires_grad_()
        statistics, attribution = zeros(18, FIELDS, device), zeros(18, GRADIENT_FIELDS, device)

        def layer(x: Tensor, statistics: Tensor, attribution: Tensor) -> Tensor:
            gate, up = x.chunk(2, dim=-1)
            kept = {"group": group, "statistics": statistics, "gradient_statistics": attribution} if recording else {}
            return gated_activation(gate, up, "silu", backend=backend, **kept)

        function = torch.compile(layer, fullgraph=True) if compiled else layer
        h = function(leaf, statistics, attribution)
        h.backward(torch.ones_like(h))
        return [h.detach(), leaf.grad, statistics, attribution]

    eager, compiled = run(False), run(True)
    assert (eager[2].abs().sum() > 0) == recording
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu", "relu", "relu2"])
def test_gradcheck_of_the_definition(activation: str) -> None:
    gate = torch.randn(5, 3, dtype=torch.float64).add(0.05).requires_grad_()
    up = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: gated_activation(a, b, activation), (gate, up))


def test_second_order_gradients_are_refused() -> None:
    gate, up = (x.requires_grad_() for x in inputs(4, 4, torch.float32, torch.device("cpu")))
    (grad,) = torch.autograd.grad(gated_activation(gate, up).square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input() -> None:
    gate, up = inputs(6, 4, torch.float32, torch.device("cpu"))
    group, statistics = groups(6, torch.device("cpu")), zeros(4, FIELDS, torch.device("cpu"))
    with pytest.raises(ValueError, match="gate and up differ"):
        gated_activation(gate, up[:, :3])
    with pytest.raises(ValueError, match="gate and up differ"):
        gated_activation(gate, up.bfloat16())
    with pytest.raises(UnknownNameError, match="unknown activation 'swish'"):
        gated_activation(gate, up, "swish")
    with pytest.raises(UnknownNameError, match="unknown backend 'fast'"):
        gated_activation(gate, up, backend="fast")
    with pytest.raises(UnknownNameError, match="unknown set of sums 'mean'"):
        gated_activation(gate, up, group=group, statistics=statistics, sums="mean")
    with pytest.raises(UnknownNameError, match="unknown set of gradient sums 'moments'"):
        gated_activation(gate, up, group=group, statistics=statistics, gradient_sums="moments")
    scoring = Scoring("difference", torch.ones(2, 1, dtype=torch.int64), None, torch.zeros(4))
    with pytest.raises(ValueError, match="'difference' reads more than the sums 'magnitude'"):
        gated_activation(gate, up, group=group, statistics=statistics, sums="magnitude", scoring=scoring)
    with pytest.raises(ValueError, match="need a group"):
        gated_activation(gate, up, statistics=statistics)
    with pytest.raises(ValueError, match="int8"):
        gated_activation(gate, up, group=group.long(), statistics=statistics)
    with pytest.raises(ValueError, match="5 tokens"):
        gated_activation(gate, up, group=group[:5], statistics=statistics)
    with pytest.raises(ValueError, match="float64"):
        gated_activation(gate, up, group=group, statistics=statistics.float())
    with pytest.raises(ValueError, match=r"must be \[groups, 5, 4\]"):
        gated_activation(gate, up, group=group, statistics=statistics[:, :3])
    with pytest.raises(ValueError, match="contiguous"):
        gated_activation(gate, up, group=group, statistics=zeros(8, FIELDS, gate.device)[..., ::2])
