"""The zoo: many architectures in small random configurations, each called as its library's users call it.

Every maker builds a model and the inputs of one forward, offline and within a second or so. Makers seed nothing: call
``torch.manual_seed`` first. Libraries are imported inside the makers, so that this package needs only torch. Models are
the libraries' own, neither wrapped nor eased: they keep their caches, output classes, dropout and losses.

A file holds a family; :func:`~zoo.sizes.resize` changes the sizes that they share.
"""

from importlib import import_module

from zoo.registry import ZOO, Entry
from zoo.sizes import resize

__all__ = ["ZOO", "Entry", "resize"]

FAMILIES = (
    "text_encoders",
    "text_decoders",
    "encoder_decoders",
    "vision",
    "audio",
    "modalities",
    "experts",
    "states",
    "of_diffusers",
    "of_monai",
    "of_x_transformers",
    "chains",
    "convolutions",
    "recurrence",
    "parts",
)
for family in FAMILIES:  # which enter their models in this order
    import_module(f"zoo.{family}")
