"""What patching does to a model, piece by piece, each of which can be undone."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from clue_fast.patching.fused import STATE

_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def mixed_class(mixin: type[nn.Module], original: type[nn.Module]) -> type[nn.Module]:
    """Returns the subclass of a module's class whose forward is that of a mixin."""
    key = mixin, original
    if key not in _classes:
        name = mixin.__name__.replace("MLP", "").replace("Experts", "").replace("Gated", "") + original.__name__
        _classes[key] = type(name, (mixin, original), {"__module__": __name__})
    return _classes[key]


@dataclass(eq=False)
class ForwardSwap:
    """A module with another forward.

    Its class becomes a subclass. A forward that others have set on the instance would hide that one: it is put aside
    (Liger, hub kernels), or, where it does something around the original (accelerate), told to call the new one.
    """

    path: str
    module: nn.Module
    mixin: type[nn.Module]
    state: Any

    def apply(self) -> None:
        """Swaps the forward."""
        module = self.module
        self.original = type(module)
        self.swapped = mixed_class(self.mixin, self.original)
        self.aside: dict[str, Any] = {}
        module.__dict__[STATE] = self.state
        module.__class__ = self.swapped
        if "_old_forward" in module.__dict__:
            self.aside["_old_forward"] = module.__dict__["_old_forward"]
            module.__dict__["_old_forward"] = types.MethodType(self.swapped.forward, module)
        elif "forward" in module.__dict__:
            self.aside["forward"] = module.__dict__.pop("forward")
        self.left = self._instance_forwards()

    def _instance_forwards(self) -> dict[str, Any]:
        return {name: self.module.__dict__.get(name) for name in ("forward", "_old_forward")}

    def hidden(self) -> str | None:
        """Returns why the forward that was put in place does not run, or None if it does."""
        if type(self.module).forward is self.swapped.forward:
            return None
        return (
            f"{self.path} is a {type(self.module).__name__} since it was patched, whose forward records nothing; "
            "unpatch, and patch again after what changed it"
        )

    def obstacle(self) -> str | None:
        """Returns why this cannot be undone now, or None."""
        if self.mixin not in type(self.module).__mro__:  # given another class since, without this forward
            return None
        if type(self.module) is not self.swapped:
            return (
                f"{self.path} is a {type(self.module).__name__} now and was a {self.swapped.__name__} when it was "
                "patched; undo what changed its class first"
            )
        if any(now is not self.left[name] for name, now in self._instance_forwards().items()):
            return f"the forward of {self.path} was replaced or wrapped since it was patched; undo that first"
        return None

    def undo(self) -> None:
        """Gives the module its class and forward back."""
        if type(self.module) is self.swapped:
            self.module.__class__ = self.original
        self.module.__dict__.pop(STATE, None)
        self.module.__dict__.update(self.aside)


@dataclass(eq=False)
class Hook:
    """A forward hook, until it is removed."""

    handle: RemovableHandle

    def obstacle(self) -> str | None:
        """A hook can always be removed."""
        return None

    def undo(self) -> None:
        """Removes it."""
        self.handle.remove()


@dataclass(eq=False)
class Override:
    """A method of one instance that hides that of its class, or another of the instance."""

    module: nn.Module
    name: str
    method: Callable[..., Any]

    def apply(self) -> None:
        """Sets it."""
        self.before = self.module.__dict__.get(self.name)
        self.module.__dict__[self.name] = self.method

    def obstacle(self) -> str | None:
        """Returns why this cannot be undone now, or None."""
        if self.module.__dict__.get(self.name) is self.method:
            return None
        return f"{type(self.module).__name__}.{self.name} was replaced since the model was patched; undo that first"

    def undo(self) -> None:
        """Lets what it hid be seen again."""
        del self.module.__dict__[self.name]
        if self.before is not None:
            self.module.__dict__[self.name] = self.before
