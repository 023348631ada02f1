"""What checks run on: real models and data from registry packages, synthetic tasks, a training loop, metrics.

Everything is loaded on first use, so `import formulary.lab` costs no torch.

>>> from formulary import lab
>>> "kjv" in lab.names()
True
>>> lab.kjv()[0]
'In the beginning God created the heaven and the earth.'
"""

from importlib import import_module

_HOMES = {
    "models": ("minilm", "smollm2", "vit", "rxn", "saliency", "path", "available", "embed"),
    "datasets": (
        "data", "names", "data_available", "kjv", "kjv_rows", "python_docs", "reactions", "photographs", "photo_images",
        "photo_crops", "digits", "mnist5k", "sea_temperature", "glucose", "ucr",
    ),  # fmt: skip
    "training": ("train", "tuned_lr", "TrainLog"),
    "small": ("tiny", "inputs_for"),
    "trained": ("cached", "trained_char_gpt", "trained_digit_vit", "digit_pixels"),
    "tasks": (),
    "metrics": (),
    "storage": (),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = [*_HOMES, *_HOME_OF]


def __getattr__(name):
    if name in _HOMES:
        return import_module(f"{__name__}.{name}")
    if name in _HOME_OF:
        return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
