"""Operations: what each operator takes, on every kind of tensor, and that nothing notices the recorder."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shardwright.profiler.recording.operations import (
    OperationRecorder,
    _call_form,
    _known,
    _operator,
    _text_of,
    tensor_bytes,
)


def record(function):
    """The operations of a call, and what it returned."""
    operations = []
    with OperationRecorder(operations.append):
        result = function()
    return operations, result


def operations_of(function):
    return record(function)[0]


def counted(function):
    """(name, bytes) of what moves anything."""
    return [(operation.name, operation.bytes) for operation in operations_of(function) if operation.bytes]


def flops_of(function):
    return sum(operation.flops for operation in operations_of(function))


# Bytes

A = torch.randn(4, 6)


@pytest.mark.parametrize(
    ("function", "elements"),
    [
        (lambda: A + 1, 48),
        (lambda: A + A, 48),
        (lambda: A + A[0], 54),
        (lambda: A.clone().add_(1), 48 + 48),
        (lambda: torch.empty(4, 6).copy_(A), 48),
        (lambda: torch.empty(4, 6).zero_(), 24),
        (lambda: torch.add(A, A[0], out=torch.empty(4, 6)), 54),
        (lambda: A.expand(100, 4, 6).sum(), 25),
        (lambda: torch._foreach_add_([torch.empty(6), torch.empty(3)], 1.0), 18),
        (lambda: functional.linear(A, torch.empty(5, 6), torch.empty(5)), 24 + 30 + 5 + 20),
        (lambda: A.view(-1).view(6, 4).T.detach()[0], 0),
        (lambda: torch.empty(100), 0),
        (lambda: A.unsafe_split(2), 0),
        (lambda: A.to(torch.float32), 0),
    ],
)
def test_bytes_are_what_is_read_and_written(function, elements):
    """Each tensor counts once as read and once as written; views, new empty tensors and what is overwritten do not."""
    assert sum(size for _, size in counted(function)) == 4 * elements


@pytest.mark.parametrize("rows", [3, 50])
def test_a_table_is_touched_where_it_is_looked_up(rows):
    """An embedding reads the rows that it returns, and a cache is written where it changes, however large they are."""
    table = torch.randn(1000, 8)
    index = torch.arange(rows)
    assert counted(lambda: functional.embedding(index, table)) == [("aten.embedding.default", rows * (8 + 2 * 8 * 4))]
    source = torch.ones(rows, 8)
    ((_, moved),) = counted(lambda: table.index_copy_(0, index, source))
    assert moved == rows * 8 + 3 * rows * 8 * 4


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_tensors_count_what_they_hold():
    """A sparse tensor has the bytes of its indices and values, not of its shape."""
    sparse = torch.eye(64).to_sparse()
    assert tensor_bytes(sparse) == 64 * (2 * 8 + 4)
    assert tensor_bytes(torch.eye(64).to_sparse_csr()) == 65 * 8 + 64 * 8 + 64 * 4
    operations = operations_of(lambda: sparse @ torch.ones(64, 2))
    assert max(o.bytes for o in operations) < 64 * 64 * 4


# Arithmetic

X = torch.randn(2, 6, 8, 8)
Q = torch.randn(2, 4, 10, 8)


@pytest.mark.parametrize(
    "function",
    [
        lambda: functional.linear(A, torch.randn(5, 6)),
        lambda: Q @ Q.transpose(-1, -2),
        lambda: functional.conv2d(X, torch.randn(4, 6, 3, 3), padding=1),
        lambda: functional.conv_transpose2d(X, torch.randn(6, 4, 3, 3), stride=2),
        lambda: (
            functional.conv2d(X.clone().requires_grad_(), torch.randn(4, 6, 3, 3, requires_grad=True)).sum().backward()
        ),
        lambda: (
            functional.conv_transpose1d(X[0].requires_grad_(), torch.randn(8, 4, 3, requires_grad=True))
            .sum()
            .backward()
        ),
        lambda: torch.einsum("abc,adc->abd", Q[0], Q[1]),
    ],
)
def test_arithmetic_is_that_of_torch(function):
    """Where torch's own counter knows the operators, the arithmetic is the same."""
    with FlopCounterMode(display=False) as counter:
        function()
    assert flops_of(function) == counter.get_total_flops() > 0


def test_each_gradient_of_a_grouped_convolution_takes_as_much_as_the_forward():
    """A depthwise convolution does little in the backward too, where torch's formula forgets the groups."""
    weight = torch.randn(6, 1, 3, 3, requires_grad=True)
    x = X.clone().requires_grad_()
    forward = flops_of(lambda: functional.conv2d(x, weight, groups=6))
    assert forward == 2 * 2 * 6 * 6 * 6 * 9
    assert flops_of(lambda: functional.conv2d(x, weight, groups=6).sum().backward()) == 3 * forward


def by_hand(batch, heads, length, head):
    """Attention's two products."""
    return 2 * 2 * batch * heads * length * length * head


def test_attention_counts_whatever_kernel_it_takes():
    """The fused kernel of a CPU counts as the two products do, and its backward as five."""
    q = Q.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert flops_of(lambda: functional.scaled_dot_product_attention(Q, Q, Q)) == by_hand(2, 4, 10, 8)
    names = [o.name for o in operations_of(lambda: functional.scaled_dot_product_attention(q, q, q)) if o.flops]
    assert names == ["aten._scaled_dot_product_flash_attention_for_cpu.default"]
    both = flops_of(lambda: functional.scaled_dot_product_attention(q, q, q).sum().backward())
    assert both == by_hand(2, 4, 10, 8) * (2 + 5) // 2


def test_attention_counts_the_heads_of_its_queries():
    """Fewer heads of keys and values are read several times, and their arithmetic is done for every head of queries."""
    q, kv = Q.clone().requires_grad_(), Q[:, :2].clone().requires_grad_()
    whole = operations_of(lambda: functional.scaled_dot_product_attention(q, kv, kv, enable_gqa=True).sum().backward())
    assert sum(o.flops for o in whole) == by_hand(2, 4, 10, 8) * (2 + 5) // 2


@pytest.mark.parametrize("module", [nn.MultiheadAttention, nn.TransformerEncoderLayer])
def test_fused_layers_count_what_their_parts_do(module):
    """The kernel that takes a whole layer in evaluation does the arithmetic of the layer in training."""
    layer = module(16, 2, batch_first=True, dropout=0.0)
    x = torch.randn(3, 5, 16)
    arguments = (x, x, x) if module is nn.MultiheadAttention else (x,)
    apart = flops_of(lambda: layer.train()(*arguments))
    with torch.no_grad():
        names = [o.name for o in operations_of(lambda: layer.eval()(*arguments)) if o.flops]
        whole = flops_of(lambda: layer.eval()(*arguments))
    assert len(names) == 1
    assert whole == apart


@pytest.mark.parametrize("layers", [1, 2])
def test_recurrent_layers_count_a_product_a_step(layers):
    """Whether the kernel takes all steps at once or one by one, forward and backward."""
    lstm = nn.LSTM(6, 4, num_layers=layers)
    x = torch.randn(7, 3, 6, requires_grad=True)
    matrices = sum(p.numel() for p in lstm.parameters() if p.dim() == 2)
    with torch.no_grad():
        assert flops_of(lambda: lstm(x)) == 2 * 7 * 3 * matrices
    assert flops_of(lambda: lstm(x)[0].sum().backward()) == 3 * 2 * 7 * 3 * matrices


def test_small_products_count():
    """A matrix times a vector, two vectors, and a bilinear layer."""
    assert flops_of(lambda: A @ A[0]) == 2 * 24
    assert flops_of(lambda: A[0] @ A[1]) == 2 * 6
    assert flops_of(lambda: nn.Bilinear(6, 6, 3)(A, A)) == 3 * 4 * 6 * 6 * 3


def test_products_by_group_count_once():
    """Experts that share the rows do as much as one of them would with all rows; whole batches do it each."""
    with torch.device("meta"):
        rows, experts = torch.empty(32, 16, dtype=torch.bfloat16), torch.empty(4, 16, 8, dtype=torch.bfloat16)
        ends = torch.empty(4, dtype=torch.int32)
        assert flops_of(lambda: torch._grouped_mm(rows, experts, offs=ends)) == 2 * 32 * 16 * 8
        assert (
            flops_of(lambda: torch._grouped_mm(torch.empty_like(experts).transpose(1, 2), experts))
            == 2 * 4 * 8 * 16 * 8
        )


def test_the_dtype_is_that_of_the_arithmetic():
    """Of the first floating tensor: not of a mask or of indices, and under autocast of what it casts to."""
    where = operations_of(lambda: torch.where(A > 0, A.double(), 0.0))
    assert where[-1].dtype is torch.float64
    assert operations_of(lambda: functional.embedding(torch.arange(3), A.half()))[-1].dtype is torch.float16
    assert operations_of(lambda: torch.arange(3) + 1)[-1].dtype is torch.int64
    with torch.autocast("cpu", torch.bfloat16):
        product = next(o for o in operations_of(lambda: functional.linear(A, torch.randn(5, 6))) if o.flops)
    assert product.dtype is torch.bfloat16


# Text


def test_the_text_tells_forms_and_not_values():
    """Shapes, strides, dtypes and plain arguments make the text; other values of the same form do not change it."""

    def text(*arguments, **others):
        return [o.text for o in operations_of(lambda: torch.sum(*arguments, **others))]

    assert text(A, dim=1) == ["aten.sum.dim_IntList(float32[4, 6][6, 1], [1])"]
    assert text(A, dim=1) == text(torch.zeros(4, 6), dim=1)
    different = [
        text(A, dim=1),
        text(A, dim=0),
        text(A.T, dim=1),
        text(A.double(), dim=1),
        text(A.reshape(6, 4), dim=1),
    ]
    assert len({str(t) for t in different}) == 5
    (drawn,) = operations_of(lambda: torch.rand(2, generator=torch.Generator()))
    assert drawn.text.startswith("aten.rand.generator([2], generator=Generator")
    assert "0x" not in drawn.text


# It changes nothing


class Block(nn.Module):
    """In-place changes, a view, branches."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 16), nn.Linear(16, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = functional.relu_(self.up(x))
        y[:, :4] *= 2
        return self.norm(x + functional.dropout(self.down(y), 0.5))


def step(model, x, context):
    """Outputs, gradients, buffers, and what was saved for the backward."""
    torch.manual_seed(3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t), context:
        output = model(x)
        output.square().sum().backward()
    values = [output.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()]
    return [v.clone() for v in values], saved


def test_a_training_step_is_the_same_under_the_recorder():
    """Outputs, gradients, batch statistics and saved tensors are equal bit by bit, random numbers included."""

    def made():
        torch.manual_seed(0)
        return Block(), torch.randn(4, 8, requires_grad=True)

    operations = []
    plain, saved = step(*made(), torch.enable_grad())
    seen, saved_too = step(*made(), OperationRecorder(operations.append))
    assert all(map(torch.equal, plain, seen))
    assert saved == saved_too
    assert len(operations) > 20


ACTIVATIONS = [
    *(functional.silu, functional.mish, functional.gelu, functional.elu, functional.selu, functional.celu),
    *(functional.hardswish, functional.hardsigmoid, functional.softplus, functional.logsigmoid, functional.rrelu),
    *(functional.leaky_relu, functional.hardtanh, functional.softshrink, functional.tanh, functional.glu),
]


@pytest.mark.parametrize("function", ACTIVATIONS, ids=lambda f: f.__name__)
def test_outside_inference_mode_nothing_is_taken_apart(function):
    """Forward and backward of an activation are the operators that PyTorch calls, whatever these could be made of."""
    names = []

    class Plain(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    def run():
        x = torch.randn(4, 6, requires_grad=True)
        function(x).sum().backward()

    with Plain():
        run()
    assert [operation.name for operation in operations_of(run)] == names


def test_identity_and_versions_are_kept():
    """An in-place operator returns its argument, and autograd still refuses what was changed behind its back."""
    x = torch.ones(3)
    _, same = record(lambda: x.add_(1))
    assert same is x
    weight = torch.ones(3, requires_grad=True)

    def spoiled():
        y = weight.exp()
        z = y.sum()
        y.add_(1)
        z = (y * z).sum() + weight.exp().mul_(2).sum()
        y.zero_()
        z.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        record(spoiled)


def test_results_that_are_no_tensors_pass():
    """Numbers, booleans, lists and nothing come through as they are."""
    assert record(lambda: torch.tensor([2.0, 5.0]).sum().item())[1] == 7
    assert record(lambda: torch.equal(A, A))[1] is True
    assert [len(part) for part in record(lambda: A.split(3))[1]] == [3, 1]


def test_inference_mode_is_taken_apart():
    """There, a linear layer and attention are seen as the operators that they consist of, with the same results."""
    layer = nn.Linear(6, 5)
    with torch.inference_mode():
        expected = layer(A)
        operations, found = record(lambda: layer(A))
        attention = operations_of(lambda: functional.scaled_dot_product_attention(Q, Q, Q))
    assert torch.equal(expected, found)
    assert found.is_inference()
    assert [o.name for o in operations if o.bytes] == ["aten.addmm.default"]
    assert sum(o.flops for o in attention) == by_hand(2, 4, 10, 8)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["linear", "norm", "relu", "attention", "view"]), min_size=1, max_size=5))
def test_fake_tensors_give_what_real_ones_give(kinds):
    """The same operations, byte for byte and line for line, forward and backward."""
    layers = {
        "linear": lambda: nn.Linear(8, 8),
        "norm": lambda: nn.LayerNorm(8),
        "relu": nn.ReLU,
        "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        "view": lambda: nn.Unflatten(1, (2, 2)) if kinds[-1] == "view" else nn.Identity(),
    }
    chain = [kind for kind in kinds if kind != "view"] + ["view"] * ("view" in kinds)

    def run():
        model = nn.Sequential(nn.Linear(8, 8), *(layers[kind]() for kind in chain))
        x = torch.randn(3, 4, 8)
        return operations_of(lambda: model(x).sum().backward())

    real = run()
    with FakeTensorMode():
        fake = run()
    assert [o for o in fake if o.bytes] == [o for o in real if o.bytes]


def test_meta_tensors_count_too():
    """A model without values has the same arithmetic and the same bytes."""
    real = operations_of(lambda: Block()(torch.randn(4, 8)))
    with torch.device("meta"):
        meta = operations_of(lambda: Block()(torch.randn(4, 8)))
    products = [[(o.flops, o.bytes) for o in operations if o.flops] for operations in (real, meta)]
    assert products[0] == products[1]
    assert len(products[0]) == 2


def test_a_nested_tensor_passes():
    """What a formula does not know counts as no arithmetic instead of an error."""
    ragged = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(5, 6)], layout=torch.jagged)
    layer = nn.Linear(6, 3)
    operations, result = record(lambda: layer(ragged).relu())
    assert torch.equal(result.values(), layer(ragged).relu().values())
    assert operations


@pytest.mark.filterwarnings("ignore:flex_attention called")
def test_higher_order_operators_pass():
    """Flexible attention runs and counts."""
    from torch.nn.attention.flex_attention import flex_attention

    expected = flex_attention(Q, Q, Q)
    operations, found = record(lambda: flex_attention(Q, Q, Q))
    assert torch.equal(expected, found)
    assert sum(o.flops for o in operations) >= by_hand(2, 4, 10, 8)


def test_arithmetic_is_reckoned_once_for_equal_calls():
    """Calls of one form share what the formula gave; another shape is another form, and gets its own."""

    def flops(*shapes):
        found = []
        with OperationRecorder(found.append):
            for rows, inner, columns in shapes:
                torch.mm(torch.ones(rows, inner), torch.ones(inner, columns))
        return [operation.flops for operation in found if operation.name == "aten.mm.default"]

    _known.clear()
    shapes = [(2, 3, 4), (2, 3, 5), (2, 3, 4), (7, 3, 4)]
    assert flops(*shapes) == flops(*shapes) == [2 * a * b * c for a, b, c in shapes]
    assert sum(form[0][0] == "aten.mm.default" for form in _known) == 3


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 0.0, -0.0, 1.0, 1j, "1", "none", torch.float32, torch.float64, torch.strided]),
    st.sampled_from([torch.device("cpu"), torch.device("meta"), torch.contiguous_format, torch.preserve_format]),
)
TENSORS = st.builds(
    lambda shape, dtype, turned: torch.empty(shape, dtype=dtype, device="meta").T if turned else torch.empty(shape),
    st.lists(st.integers(0, 2), min_size=2, max_size=2),
    st.sampled_from([torch.float32, torch.int64]),
    st.booleans(),
)
ARGUMENTS = st.lists(st.one_of(SCALARS, TENSORS, st.lists(st.one_of(SCALARS, TENSORS), max_size=2)), max_size=2)


@given(ARGUMENTS, ARGUMENTS, st.booleans())
@settings(max_examples=200)
def test_calls_of_one_form_have_one_text(one, other, named):
    """Forms are compared in place of texts, and agree where these do."""
    operator = _operator(torch.ops.aten.add.Tensor)

    def told(arguments, as_form):
        given_ = ((), {"a": arguments}) if named else (arguments, {})
        return (_call_form if as_form else _text_of)(operator, *given_)

    for first, second in [(one, other), (one, list(one))]:
        assert (told(first, True) == told(second, True)) == (told(first, False) == told(second, False))


# Echoes


def echoed(function):
    """The operations of a call in which arithmetic of one form is done once, and what it returned."""
    operations = []
    with OperationRecorder(operations.append, echoes=True):
        result = function()
    return operations, result


def test_arithmetic_of_one_form_is_done_once():
    """The second product has the first one's numbers in a storage of its own; what is recorded stays the same.

    So it is with weights that are trained; others are computed with.
    """
    a, b, c = torch.randn(3, 4, 5).unbind()
    weight = torch.randn(5, 6)
    assert torch.equal(echoed(lambda: (a @ weight, b @ weight))[1][1], b @ weight)
    weight.requires_grad_()
    operations, (first, second, sum_) = echoed(lambda: (a @ weight, b @ weight, b + c))
    assert torch.equal(first, a @ weight)
    assert torch.equal(second, first)
    assert second.untyped_storage()._cdata != first.untyped_storage()._cdata
    assert torch.equal(sum_, b + c)
    assert operations == operations_of(lambda: (a @ weight, b @ weight, b + c))


_COMPLEX = torch.randn(4, 4, dtype=torch.cfloat)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((torch.randn(4, 5), torch.randn(5, 6)), (torch.randn(5, 4).T, torch.randn(5, 6))),
        ((torch.randn(4, 5), torch.randn(5, 6)), (torch.randn(3, 5), torch.randn(5, 6))),
        ((torch.randn(4, 5), torch.randn(5, 6)), (torch.randn(4, 5).double(), torch.randn(5, 6).double())),
        ((_COMPLEX, _COMPLEX), (_COMPLEX.conj(), _COMPLEX)),
    ],
)
def test_arithmetic_of_another_form_is_done(one, other):
    """Strides, shapes, dtypes and lazy conjugation tell forms apart."""
    for x, _ in (one, other):
        x.requires_grad_()
    _, (first, second) = echoed(lambda: [x @ y for x, y in (one, other)])
    for found, (x, y) in zip((first, second), (one, other), strict=True):
        torch.testing.assert_close(found, x @ y)


def test_a_result_that_was_changed_in_place_is_no_echo():
    """Its numbers are no product's any more."""
    a, b, weight = torch.randn(4, 5), torch.randn(4, 5), torch.randn(5, 6, requires_grad=True)
    _, (_, second) = echoed(lambda: ((a @ weight).fill_(torch.inf), b @ weight))
    assert torch.equal(second, b @ weight)
