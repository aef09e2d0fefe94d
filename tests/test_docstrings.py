"""Every public name has a docstring: the API reference is made of them."""

from __future__ import annotations

import inspect

import pytest

import dlkern

MODULES = (dlkern, dlkern.nn, dlkern.functional)


def _names() -> list[tuple[str, object]]:
    return [(f"{module.__name__}.{name}", getattr(module, name)) for module in MODULES for name in module.__all__]


@pytest.mark.parametrize("module", MODULES)
def test_the_public_names_are_listed(module: object) -> None:
    assert module.__all__  # type: ignore[attr-defined]
    assert inspect.getdoc(module)


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in _names() if callable(v)])
def test_a_public_name_has_a_docstring_of_its_own(name: str, value: object) -> None:
    text = (value.__doc__ or "").strip()
    assert len(text) >= 10, f"{name} has no docstring"
    for base in value.__mro__[1:] if inspect.isclass(value) else ():
        assert value.__doc__ is not base.__doc__, f"{name} has the docstring of {base.__name__}"


@pytest.mark.parametrize(("name", "value"), [pytest.param(n, v, id=n) for n, v in _names() if inspect.isclass(v)])
def test_a_public_method_has_a_docstring(name: str, value: type) -> None:
    for own, member in vars(value).items():
        if own.startswith("_") or not (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            continue
        if own == "extra_repr":
            continue  # torch.nn.Module's
        assert inspect.getdoc(getattr(value, own)), f"{name}.{own} has no docstring"
