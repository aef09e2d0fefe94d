"""From what a user types (``torchvision:resnet50``) to a model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from types import ModuleType
from typing import Any

from torch import nn

#: The forms of a MODEL argument, for help texts and errors.
FORMS = "torchvision:NAME, timm:NAME, package.module:FUNCTION or path/to/file.py:FUNCTION"


class ModelError(ValueError):
    """A MODEL argument that leads to no model; the message says what was wrong and what is expected."""


def build(spec: str) -> nn.Module:
    """The model that ``spec`` names, with fresh weights (nothing is downloaded).

    ``torchvision:resnet50`` and ``timm:repvgg_a0`` ask those libraries; ``package.module:function``
    and ``path/to/file.py:function`` call a function without arguments that returns an nn.Module (a
    Module class or a Module itself will do).

    Raises:
        ModelError: another form, a library or name that is not there, or not a module at the end.
    """
    source, sep, name = spec.rpartition(":")
    if not sep or not source or not name:
        raise ModelError(f"MODEL {spec!r}: expected {FORMS}")
    if source == "torchvision":
        return _from_torchvision(spec, name)
    if source == "timm":
        return _from_timm(spec, name)
    return _from_module(spec, _load(spec, source), name)


def _library(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ModelError(f"MODEL {spec!r}: {package} does not import ({error}); pip install {package}") from error


def _unknown(spec: str, library: str, known: list[str], name: str) -> ModelError:
    import difflib

    close = difflib.get_close_matches(name, known, n=4)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; it has {len(known)} others"
    return ModelError(f"MODEL {spec!r}: {library} has no model {name!r}{hint}")


def _from_torchvision(spec: str, name: str) -> nn.Module:
    models = _library(spec, "torchvision.models")
    known = models.list_models()
    if name not in known:
        raise _unknown(spec, "torchvision", known, name)
    arguments: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        arguments["weights_backbone"] = None  # else the backbone's weights would be downloaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # inception and googlenet, on how weights are initialised
        return models.get_model(name, **arguments)


def _from_timm(spec: str, name: str) -> nn.Module:
    timm = _library(spec, "timm")
    if not timm.is_model(name):
        raise _unknown(spec, "timm", timm.list_models(), name)
    return timm.create_model(name, pretrained=False)


def _load(spec: str, source: str) -> ModuleType:
    """The module of a path that ends in .py, or of a dotted name (the current folder counts)."""
    if source.endswith(".py"):
        path = os.path.abspath(os.path.expanduser(source))
        if not os.path.isfile(path):
            raise ModelError(f"MODEL {spec!r}: there is no file {path}")
        found = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        folder = os.path.dirname(path)
        sys.path.insert(0, folder)  # as when Python runs the file
        try:
            found.loader.exec_module(module)
        except Exception as error:
            raise ModelError(f"MODEL {spec!r}: {path} does not import: {type(error).__name__}: {error}") from error
        finally:
            sys.path.remove(folder)
        sys.modules.setdefault(found.name, module)  # pickle and inspect look there
        return module
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise ModelError(f"MODEL {spec!r}: {source} does not import: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)


def _from_module(spec: str, module: ModuleType, name: str) -> nn.Module:
    target = getattr(module, name, None)
    if target is None:
        raise ModelError(f"MODEL {spec!r}: {module.__name__} has no {name!r}")
    if isinstance(target, nn.Module):
        return target
    if not callable(target):
        raise ModelError(f"MODEL {spec!r}: expected a function or an nn.Module, got {type(target).__name__}")
    try:
        model = target()
    except Exception as error:
        raise ModelError(f"MODEL {spec!r}: {name}() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"MODEL {spec!r}: {name}() returned {type(model).__name__}, expected an nn.Module")
    return model
