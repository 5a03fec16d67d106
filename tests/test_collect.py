"""Profiling as a whole: what is refused before anything is measured."""

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.capture import captures_of, check_divisible


def encoder(*, batch_first):
    return nn.Sequential(*[nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first) for _ in range(2)])


def test_a_result_that_depends_on_the_division_is_refused():
    """Cutting the sequence instead of the batch is noticed; cutting the batch passes."""
    x = torch.randn(8, 4, 16)
    check_divisible(encoder(batch_first=True), (x,), {}, 4)
    with pytest.raises(sw.ShardwrightError, match="is dimension 0 of the inputs the batch"):
        check_divisible(encoder(batch_first=False), (x,), {}, 4)


BATCH, WIDTH = 8, 4


class Mixing(nn.Module):
    """Takes other samples into account, or the place in the batch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        made = {
            "earlier": lambda: x + x.cumsum(0),
            "later": lambda: x + x.flip(0).cumsum(0).flip(0),
            "all": lambda: x + x.mean(0, keepdim=True),
            "greatest": lambda: x / x.max(),
            "place": lambda: x * (torch.arange(len(x)) % 3 == 0)[:, None],
        }
        return self.linear(made[self.kind]())


@pytest.mark.parametrize("kind", ["earlier", "later", "all", "greatest", "place"])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_samples_that_mix_are_refused(kind, count):
    """Also where the first and the last micro-batch have the greatest value of the batch, or the same places as it."""
    x = torch.rand(BATCH, WIDTH)
    x[[0, 3, -1], 0] = 1.0
    x[BATCH // 2 - 1] *= 0.5
    if kind == "greatest" and count == 2:
        x[0, 0] = 0.9  # both have it else
    with pytest.raises(sw.ShardwrightError, match="the result depends on how the batch is divided"):
        check_divisible(Mixing(kind), (x,), {}, count)


class Trims(nn.Module):
    """Looks no further than the longest sample, as libraries do inside of an encoder."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        longest = int(x.ne(0).any(0).sum())
        return self.linear(torch.cat([x[:, :longest].softmax(1), x[:, longest:]], 1))


def test_all_micro_batches_are_compared():
    """The fifth sample alone is short: the first and the last are as long as the longest."""
    x = torch.rand(BATCH, WIDTH) + 0.5
    x[4, 2:] = 0
    model = nn.Sequential(Trims(), nn.Linear(WIDTH, WIDTH))
    with pytest.raises(sw.ShardwrightError, match="output 0 of 8 micro-batches differs from the whole batch's"):
        captures_of(model, (x,), {}, [1, 2, 8], devices=2, depth=1, train=True)
    with pytest.raises(sw.ShardwrightError, match="output 0 of 8 micro-batches differs from the whole batch's"):
        captures_of(model, (x,), {}, [1, 2, 8], devices=2, train=True)


def evaluated(model, **options):
    """Samples of each forward in evaluation while a batch of eight is captured."""
    sizes = []

    def note(module, args):
        if not module.training:
            sizes.append(len(args[0]))

    model.register_forward_pre_hook(note)
    captures, _ = captures_of(model, (torch.rand(BATCH, WIDTH),), {}, [1, 2, 4, 8], devices=2, train=True, **options)
    assert list(captures) == [1, 2, 4, 8]
    return sizes


def test_no_forward_is_run_twice_on_one_micro_batch():
    """That which chose the units is the first of those that are compared; where none did, it is run for that."""
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(4)]
    assert evaluated(nn.Sequential(*layers)) == [1, 8, *[1] * 7]
    assert evaluated(nn.Sequential(*layers), depth=1) == [8, *[1] * 8]
    assert evaluated(nn.Sequential(Trims(), *layers)) == [1, 8, *[1] * 7]


def test_a_difference_is_confirmed_before_it_is_told():
    """What is known of a micro-batch may have been computed by other kernels: it is run again, and all is well."""
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.randn(BATCH, WIDTH)
    check_divisible(model, (x,), {}, 4, known=[[torch.full((2, WIDTH), 9.0)]])
    with pytest.raises(sw.ShardwrightError, match="the result depends on how the batch is divided"):
        check_divisible(Mixing("all"), (x,), {}, 4, known=[[torch.full((2, WIDTH), 9.0)]])


def test_outputs_of_another_shape_are_refused():
    """A piece whose result does not fit into the whole batch's is told as a difference, not as an error of PyTorch."""

    class Wide(nn.Linear):
        def forward(self, x):
            return super().forward(x).repeat(1, len(x))

    class Squeezed(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, 0].squeeze()

    class Fewer(nn.Linear):
        def forward(self, x):
            return [super().forward(x)] * (1 + len(x) // BATCH)

    for kind, count in ((Wide, 4), (Squeezed, 8), (Fewer, 4)):
        with pytest.raises(sw.ShardwrightError, match="differs from the whole batch's by inf"):
            check_divisible(nn.Sequential(kind(WIDTH, WIDTH)), (torch.randn(BATCH, WIDTH),), {}, count)


def test_batch_statistics_and_dropout_do_not_count_as_division():
    """Batch norm and dropout are compared in evaluation, and the model is left as it was."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_divisible(model, (torch.randn(8, 4),), {}, 2)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_input_that_is_no_batch_is_named():
    """A mask as long as the batch is divided with it, and the error says so."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x, mask):
            return self.layers[1](self.layers[0](x) + mask)

    with pytest.raises(sw.ShardwrightError, match=r"at 2 micro-batches, inputs \[0\], \[1\] divided along dimension 0"):
        sw.profile(Masked(), (torch.randn(8, 8, 8), torch.eye(8)), microbatches=[2])


def test_a_batch_that_does_not_divide_stays_whole():
    """Left to itself, the profiler keeps such a batch in one piece and says why."""

    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(8, 4))

    captures, reason = captures_of(
        Fixed(nn.Linear(4, 4), nn.ReLU()), (torch.randn(8, 4),), {}, [1, 2], devices=2, train=True, strict=False
    )
    assert list(captures) == [1]
    assert "at 2 micro-batches" in reason


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "lion"}, "optimizer 'lion' is not known"),
        ({"rounds": 0}, "0 rounds measure nothing"),
        ({"microbatches": [0]}, "0 micro-batches hold nothing"),
        ({"devices": []}, "no device is named"),
        ({"microbatches": []}, "no number of micro-batches is named"),
        ({"depth": 0}, "a depth of 0 holds no unit"),
        ({"train": False, "split_backward": True}, "inference has no backward to be timed in two parts"),
    ],
)
def test_a_wrong_option_is_refused(options, message):
    """Each mistake is named before a worker starts."""
    with pytest.raises(sw.ShardwrightError, match=message):
        sw.profile(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.randn(4, 2),), **options)


def test_what_is_no_model_or_plan_is_refused():
    """A wrong argument is named with what it should be."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with pytest.raises(sw.ShardwrightError, match=r"the model is an int; give an nn\.Module"):
        sw.profile(3)
    with pytest.raises(sw.ShardwrightError, match=r"the plan is a str; give a Plan, such as shardwright\.Plan\.load"):
        sw.place(model, "net.plan.json")


def test_a_table_that_the_first_call_makes():
    """A forward whose later calls read what the first has made is divided: all calls that count are later ones."""

    class Model(nn.Sequential):
        table = None

        def forward(self, x):
            if self.table is None:
                self.table = torch.arange(4.0).exp()
            return super().forward(x + self.table)

    model = Model(nn.Linear(4, 4), nn.ReLU())
    captures, reason = captures_of(model, (torch.randn(8, 4),), {}, [1, 2], devices=2, train=True, strict=False)
    assert list(captures) == [1, 2]
    assert reason == ""
    assert model.table is None


def test_a_frozen_model_cannot_be_trained():
    """Without a trainable parameter only inference can be profiled."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).requires_grad_(False)
    with pytest.raises(sw.ShardwrightError, match="profile with --inference"):
        sw.profile(model, (torch.randn(4, 2),))


def test_a_backward_in_two_parts_is_measured_when_asked_for(tmp_path):
    """Both parts of each unit at each number of micro-batches, and what is held between them."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(32, 64)
    split = sw.profile(model, (x,), split_backward=True, devices=["cpu:0"], microbatches=[2], rounds=6)
    found = {m.node: m for m in split.measurements if m.microbatches == 2}
    assert all(m.backward_input_s is not None and m.backward_weight_s is not None for m in found.values())
    assert {node.name: node.deferred_bytes.get(2) for node in split.nodes if node.kind == "unit"} == {
        "0": 4 * 16 * 64,
        "1": 0,
        "2": 4 * 16 * 4,
    }
    split.save(tmp_path / "split.json")
    assert sw.Profile.load(tmp_path / "split.json") == split
    assert split.graph(2).nodes["2"]["backward_weight_s"] == {"cpu:0": found["2"].backward_weight_s}


class Penalised(nn.Module):
    """Takes the gradient of its units' result by its input, in evaluation without gradients as well."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        x = x.requires_grad_()
        h = self.layers(x)
        (slope,) = torch.autograd.grad(h.sum(), x, create_graph=True)
        return h, slope.square().sum(1)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), "0.weight has no shape yet: run one forward of the model"),
        (nn.Sequential(nn.Linear(4, 4), nn.LazyBatchNorm1d()), "1.weight has no shape yet: run one forward"),
        (Penalised(), "takes gradients of what units have computed"),
    ],
    ids=["lazy", "lazy norm", "penalised"],
)
def test_a_model_that_cannot_be_profiled_is_one_line(model, says):
    """Whatever a profile looks at first."""
    with pytest.raises(sw.ShardwrightError, match=says):
        sw.profile(model, (torch.randn(8, 4),), devices=["cpu:0", "cpu:1"])
