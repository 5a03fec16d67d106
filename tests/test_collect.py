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
    with pytest.raises(sw.ShardwrightError, match=r"the model is a int; give an nn\.Module"):
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
    """Both parts of each unit at each number of micro-batches, and what is held between them; else neither."""
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(32, 64)
    options = {"devices": ["cpu:0"], "microbatches": [2], "rounds": 6}
    plain = sw.profile(model, (x,), **options)
    assert all(m.backward_input_s is None and m.backward_weight_s is None for m in plain.measurements)
    split = sw.profile(model, (x,), split_backward=True, **options)
    found = {m.node: m for m in split.measurements if m.microbatches == 2}
    assert all(m.backward_input_s is not None for m in found.values())
    assert found["0"].backward_input_s < found["0"].backward_weight_s  # its input has no gradient
    assert found["1"].backward_weight_s < found["1"].backward_input_s  # it has no weights
    assert {node.name: node.deferred_bytes.get(2) for node in split.nodes if node.kind == "unit"} == {
        "0": 4 * 16 * 64,
        "1": 0,
        "2": 4 * 16 * 4,
    }
    split.save(tmp_path / "split.json")
    assert sw.Profile.load(tmp_path / "split.json") == split
    assert split.graph(2).nodes["2"]["backward_weight_s"] == {"cpu:0": found["2"].backward_weight_s}
