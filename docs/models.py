"""Write docs/models.md: every model of the zoo, how it is captured, and what is refused with the message that one sees.

python docs/models.py    # needs the zoo's libraries: make zoo
"""

import sys
import warnings
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

from shardwright.profiler.capture import captures_of

ROOT = Path(__file__).parents[1]
HEAD = """# Models that were tried

Written by `python docs/models.py` (torch {torch}, {date}). Each model of [tests/zoo](../tests/zoo) is a small random
configuration, called as its library's users call it, with no change. `tests/test_zoo.py` holds that each one's capture,
replayed on a second input with other values, is the model; that a plan over four devices places it with equal outputs on
simulated devices; and that, where it trains, loss and gradients placed over two devices are its own.

{count} models: {libraries}. {piped} can be piped as well as placed, {guarded} of them for masks or indices like the sample's
(a guard checks that in every call); {placed} can be placed and not piped, for the reason in the table.

Units are at the grain for four devices; *tied* counts the parameters that several steps use.

| model | from | units | glue | tied | capture |
|---|---|---|---|---|---|
"""
OUTSIDE = """
## Models outside the zoo

Tried once, on 2026-11-26 (torch 2.13.0+cpu, transformers 5.23.0, diffusers 0.42.1, MONAI 1.6.1, x-transformers 2.31.10), to see
what the zoo has not foreseen: small random configurations made by rule or by hand, none changed. *Placed*: planned over four
devices, placed on simulated ones, equal outputs. *Trained*: gradients over two devices equal the model's own.

| from | ran by themselves | placed | trained | placed, not trained |
|---|---|---|---|---|
| transformers (every type that a rule makes small, those of the zoo among them) | 355 | 353 | 340 | 10 fail plainly as well (masks longer than the input, no labels), 3 not finished in time |
| diffusers | 93 | 93 | 91 | 2 not finished in time |
| monai | 96 | 95 | 87 | 1 fails plainly as well, 5 not finished in time, 2 by a mistake of the trial |
| x-transformers (one option of its layers each) | 46 | 46 | 45 | 1 refused: Python's `random` leaves out its layers |
| torch, written by hand | 36 | 36 | 34 | 1 has one unit, 1 not finished in time |

What was not placed was not finished in time (20 seconds of a CPU, 60 to 90 by the clock). Two faults were found and corrected:
`verify` took the rounding of the CPU's attention kernel for a difference, which one video autoencoder of diffusers magnifies,
and that Python's `random` leaves out layers was found by luck alone. 273 types of transformers and 45 configurations of the
others could not be built or run by themselves (missing packages, sizes that do not fit each other), which says nothing. Some 100
cases of x-transformers, 60 written by hand and 40 of diffusers were not reached. Of the transformers models most were trained
on the mean square of their outputs; where these are normalised last, such gradients are close to zero.
"""
REFUSED = """
## What is refused, and what one sees

| the forward | what happens | the message |
|---|---|---|
| reads back a number that follows from the inputs' values (`.item()`, `if x.sum() > 0`) | placed, not piped | `this model cannot be piped: net.py:12:8 reads a number back (item) that depends on the inputs' values; …` |
| reads back a number that follows from a mask or from indices | piped, with a guard | at a call that differs: `net.py:12:8: __bool__ gives False for these inputs and gave True for the sample inputs, which the pipeline was made for; profile with inputs like these` |
| reads back a number that follows from shapes alone | piped | |
| branches on chance (layer drop) | placed, not piped; piped if no draw of 64 changes the branch | `… reads a number back (__bool__) that depends on chance` |
| makes a tensor whose shape follows from values (`nonzero`, a mask as index) between units | placed, not piped | `… makes a tensor (nonzero) whose shape depends on the inputs' values` |
| uses what a unit left elsewhere than in its result | placed, not piped | `… takes a tensor that a unit made and handed on otherwise than by returning it` |
| uses what it kept from an earlier call | placed, not piped | `… takes a tensor kept from an earlier call` |
| calls a unit with other parameters than its own (`functional_call`) | placed, not piped | `… calls layers.0 with other parameters than its own (a functional call)` |
| applies a custom autograd function through a name bound at import (`f = F.apply`) between units | placed, not piped | `… (mul) is part of a custom autograd function` |
| has a unit read another module's parameter or buffer by a reference of its own | placed, not piped | `… calls layers.1, which reads layers.0.weight of another module` |
| has a unit read a tensor that another step left in an object or an attribute | placed, not piped, with both on one device | `… calls layers.2, which reads a tensor of layers.0 that is not among its arguments` |
| hands values on in ways that no capture sees, so that the replay differs | placed, not piped | `this model cannot be piped: the capture of Net is not the model: on other values than the sample inputs, output 0 differs by …` |
| draws random numbers in [0, 1) of Python's or NumPy's global generator between units, and they decide something (other distributions: caught by chance) | placed, not piped | `… or decided by random numbers of Python or NumPy` |
| makes a nested tensor between units | refused | `net.py:12:8 has a nested tensor between units, which has no shape to plan with; keep it inside of one unit, or pad it, …` |
| fails | refused | `the forward of Net failed in unit layers.3 on the sample inputs: RuntimeError: …` |
| has parameters without a shape | refused | `layers.0.weight has no shape yet: run one forward of the model before it is profiled` |
| has no child modules | refused | `Net has no child modules, so there is nothing to split; …` |
| returns no tensor | refused | `the forward of Net returns no tensor` |
| gives another result when the batch is divided | profiled whole, piped with one micro-batch | `the result depends on how the batch is divided: output 0 of 8 micro-batches differs …` |

A cache that units fill (a key-value cache) is new for every call of a pipeline and does not come out of it; a placed model
returns it as ever. The entries of such a cache lie on the devices of their units.

Devices in a pipeline: one that a tensor told (`device=x.device`) is that of its stage, and so is any other on which the forward
makes new tensors. A move to the CPU that the forward names itself (`x.cpu()`, `x.to("cpu")`, `x.to(torch.device("cpu"))`) is one.
"""


def main() -> None:
    """Capture every model and write the page."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows, kinds, libraries = [], Counter(), Counter()
    sys.path.append(str(ROOT / "tests"))
    from zoo import ZOO

    for name, entry in ZOO.items():
        torch.manual_seed(0)
        model, args, kwargs = entry.make()
        captures, _ = captures_of(model, args, kwargs, [1], devices=4, train=entry.trains)
        capture = captures[1]
        steps = Counter(step.kind for step in capture.steps)
        note = (
            f"placed, not piped: {capture.obstacles[0]}" if capture.obstacles else "guarded" if capture.guards else ""
        )
        kinds["placed" if capture.obstacles else "guarded" if capture.guards else "piped"] += 1
        libraries[entry.library] += 1
        rows.append(
            f"| {name} ({type(model).__name__}) | {entry.library} | {steps['unit']} | {steps['glue']} "
            f"| {len(capture.ties) or ''} | {note} |"
        )
    head = HEAD.format(
        torch=torch.__version__,
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        count=len(rows),
        libraries=", ".join(f"{count} from {library}" for library, count in libraries.most_common()),
        piped=kinds["piped"] + kinds["guarded"],
        guarded=kinds["guarded"],
        placed=kinds["placed"],
    )
    (ROOT / "docs" / "models.md").write_text(head + "\n".join(rows) + "\n" + OUTSIDE + REFUSED, encoding="utf-8")


if __name__ == "__main__":
    main()
