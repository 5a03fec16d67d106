"""Targets and sample inputs, and everything that can be wrong with them."""

import sys

import pytest
import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.profiler.target import load_target, parse_input

SOURCE = """
import torch
from torch import nn

class Model(nn.Sequential):
    def __init__(self, width=4):
        super().__init__(nn.Linear(4, width), nn.Linear(width, 2))

    @staticmethod
    def sample_inputs():
        return (torch.randn(8, 4),)

class Unbound(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)

    def sample_inputs(self):
        return torch.randn(8, 4)

def factory(width: int = 3):
    return Model(width)

instance = Model()
number = 3

def broken():
    raise ValueError("no weights")

def no_model():
    return "text"

def returns_nothing():
    Model()

def pairs():
    return (torch.ones(2, 4),), {"scale": 2}

def text_inputs():
    return "text"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_nets.py"
    path.write_text(SOURCE)
    yield path
    sys.modules.pop("my_nets", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


@pytest.mark.parametrize("name", ["Model", "factory", "instance"])
def test_class_factory_and_instance_are_models(file, name):
    """A target may name a class, a factory or an instance."""
    model, sample = load_target(f"{file}:{name}", input_specs=["8x4"])
    assert isinstance(model, nn.Module)
    assert sample.args[0].shape == (8, 4)


def test_settings_reach_the_class(file):
    """Keyword arguments are passed on to the class."""
    model, _ = load_target(f"{file}:Model", settings={"width": 7})
    assert model[0].out_features == 7


def test_the_same_weights_and_inputs_every_time(file):
    """A plan's run sees the model that was profiled."""
    (one, a), (other, b) = load_target(f"{file}:Model"), load_target(f"{file}:Model")
    assert torch.equal(one[0].weight, other[0].weight)
    assert torch.equal(a.args[0], b.args[0])


def test_inputs_from_a_function(file):
    """A function may return args and kwargs."""
    _, sample = load_target(f"{file}:Model", inputs=f"{file}:pairs")
    assert sample.kwargs == {"scale": 2}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Missing", {}, r"has no Missing; its models are Model, Unbound"),
        ("number", {}, "is an int, not a model"),
        ("returns_nothing", {}, "returned None, not an nn.Module"),
        ("no_model", {}, "returned a str, not an nn.Module: let it return the model alone"),
        ("broken", {}, r"broken\(\) failed: ValueError: no weights \(my_nets.py:\d+\)"),
        ("Model", {"settings": {"depth": 2}}, r"Model\(depth=2\) failed: TypeError"),
        ("instance", {"settings": {"width": 2}}, "is an instance; keyword arguments"),
        ("factory", {"inputs": "FILE:text_inputs"}, "must return a tensor, a tuple of args"),
        ("Model", {"inputs": "FILE:pairs", "input_specs": ["8x4"]}, "not both"),
        ("Model", {"inputs": "FILE:absent"}, "has no absent; its functions are .*pairs"),
        ("Model", {"inputs": "my_nets.py"}, "is not a target: write file.py:function"),
        ("Unbound", {}, r"argument: 'self'; make it a @staticmethod$"),
    ],
)
def test_a_wrong_target_is_one_clear_line(file, name, options, message):
    """Each mistake is named, with what to do, on one line."""
    if "inputs" in options:
        options = options | {"inputs": options["inputs"].replace("FILE", str(file))}
    with pytest.raises(ShardwrightError, match=message) as caught:
        load_target(f"{file}:{name}", **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "is not a target: write file.py:Name"),
        ("absent.py:Net", "there is no file absent.py"),
        ("no_such_package.nets:Net", "cannot be imported: ModuleNotFoundError"),
        ("torch.nn:Linear", r"Linear\(\) failed: TypeError"),
    ],
)
def test_a_target_that_is_not_there(spec, message):
    """A target that cannot be found says where it was looked for."""
    with pytest.raises(ShardwrightError, match=message):
        load_target(spec)


def test_a_file_that_fails_to_import_names_the_line(tmp_path):
    """The user's own line is named, not ours."""
    (tmp_path / "bad_nets.py").write_text("x = 1\nraise RuntimeError('first\\nsecond')\n")
    with pytest.raises(
        ShardwrightError, match=r"bad_nets.py cannot be imported: RuntimeError: first second \(bad_nets.py:2\)"
    ):
        load_target(f"{tmp_path}/bad_nets.py:Net")


def test_a_users_module_may_have_the_name_of_one_of_ours(tmp_path):
    """A folder with its own `profiler`, `reports` and `errors` modules loads those."""
    for name in ("profiler", "reports", "errors"):
        (tmp_path / f"{name}.py").write_text(f"NAME = 'the user\\'s {name}'\n")
    (tmp_path / "own_names.py").write_text(
        "import errors, profiler, reports\nfrom torch import nn\nnames = [errors.NAME, profiler.NAME, reports.NAME]\n"
        "class Net(nn.Sequential):\n    def __init__(self): super().__init__(nn.Linear(2, 2))\n"
    )
    try:
        load_target(f"{tmp_path}/own_names.py:Net", input_specs=["1x2"])
        assert sys.modules["own_names"].names == [f"the user's {name}" for name in ("errors", "profiler", "reports")]
    finally:
        for name in ("own_names", "profiler", "reports", "errors"):
            sys.modules.pop(name, None)
        sys.path.remove(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "name", "dtype", "shape"),
    [
        ("8x3x224x224", None, torch.float32, (8, 3, 224, 224)),
        ("bfloat16:4x2", None, torch.bfloat16, (4, 2)),
        ("ids=int64[0,32000]:4x512", "ids", torch.int64, (4, 512)),
        ("mask=bool:8x16", "mask", torch.bool, (8, 16)),
    ],
)
def test_inputs_spelled_out(text, name, dtype, shape):
    """An input is spelled as a shape, with dtype, bounds and keyword where needed."""
    found, tensor = parse_input(text)
    assert (found, tensor.dtype, tuple(tensor.shape)) == (name, dtype, shape)


def test_integer_bounds_hold():
    """Integers are drawn from the half-open range."""
    _, tensor = parse_input("int64[5,8]:1000")
    assert set(tensor.tolist()) == {5, 6, 7}


@pytest.mark.parametrize("text", ["8x", "x8", "int64[3,3]:4", "float99:2x2", "ids=:3", ""])
def test_an_input_that_cannot_be_read(text):
    """A misspelled input is quoted back."""
    with pytest.raises(ShardwrightError, match="cannot read input"):
        parse_input(text)


def test_a_model_without_sample_inputs_says_how_to_give_them(tmp_path):
    """The three ways to give inputs are named."""
    (tmp_path / "bare_nets.py").write_text("from torch import nn\ndef make(): return nn.Sequential(nn.Linear(2, 2))\n")
    with pytest.raises(ShardwrightError, match="--input 8x3x224x224"):
        load_target(f"{tmp_path}/bare_nets.py:make")
