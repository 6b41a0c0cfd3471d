"""Hooks that act only for the context that set them.

A hook is called in every pass of its model, also in one of another thread or task. Each hook here asks first whether
the pass is of the context (`contextvars`) that entered its block, and else changes nothing. So several threads and
tasks can use one model, and each finds what it would find alone. A task that is created inside a block is of its
context; a thread is not, unless it is given a copy (``asyncio.to_thread`` gives one).
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import update_wrapper
from types import MappingProxyType
from typing import Any

from torch import Tensor

#: Held while a pass leaves out components, and while hooks are put on a model: such a pass would not call them.
LOCK = threading.RLock()
#: The blocks that the context is in, each with what it has remembered there. Never changed in place.
_BLOCKS: ContextVar[Mapping[object, Mapping[Hashable, Any]]] = ContextVar(
    "xmodel_steer_blocks",
    default=MappingProxyType({}),
)


class Block:
    """A block of code whose hooks act in its own context alone."""

    @property
    def here(self) -> bool:
        """True in the context that entered the block, and in those that were copied from it since."""
        return self in _BLOCKS.get()

    def recall(self, key: Hashable, default: Any = None) -> Any:
        """Return what this context has remembered in the block."""
        return _BLOCKS.get().get(self, {}).get(key, default)

    def remember(self, key: Hashable, value: Any) -> None:
        """Remember a value in this context, until the block ends."""
        blocks = _BLOCKS.get()
        if self in blocks:
            _BLOCKS.set({**blocks, self: {**blocks[self], key: value}})


@contextmanager
def block() -> Iterator[Block]:
    """Enter a block; blocks may be left in any order."""
    entered = Block()
    _BLOCKS.set({**_BLOCKS.get(), entered: {}})
    try:
        yield entered
    finally:
        _BLOCKS.set({other: kept for other, kept in _BLOCKS.get().items() if other is not entered})


@contextmanager
def attached(model: Any, functions: Sequence[tuple[str, Callable[[Tensor], Tensor | None]]]) -> Iterator[None]:
    """Call functions at hook points while the block lasts.

    TransformerLens' ``model.hooks`` removes hooks by depth, and with them another thread's.

    Args:
        model: A TransformerLens model.
        functions: Names of hook points, each with a function that returns a new value, or None.
    """
    added = []
    points = model.hook_dict
    try:
        with LOCK:
            for name, function in functions:
                point = points[name]
                point.add_hook(lambda value, hook, call=function: _joined(call, value))
                added.append((point, point.fwd_hooks[-1]))
        yield
    finally:
        for point, handle in added:
            handle.hook.remove()
            with suppress(ValueError):  # the user has reset the hooks
                point.fwd_hooks.remove(handle)


def _joined(call: Callable[[Any], Any], value: Any) -> Any:
    """Call a function with the heads' outputs joined: ``(batch, new, heads * d)``."""
    result = call(value.flatten(2) if value.ndim == 4 else value)
    return result if result is None else result.reshape(value.shape)


class _Replaced:
    """A method of an object that several blocks have replaced."""

    def __init__(self, before: Any, original: Callable[..., Any]) -> None:
        update_wrapper(self, original)
        self.before, self.original = before, original
        self.wrappers: dict[Block, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.original
        for entered, wrapper in tuple(self.wrappers.items()):
            if entered.here:
                call = wrapper(call)
        return call(*args, **kwargs)


@contextmanager
def replaced(
    entered: Block, module: Any, method: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Wrap an object's method while the block lasts, for its context alone.

    Args:
        entered: The block.
        module: The object.
        method: Name of the method.
        wrapper: A function from the method to the one that is called instead.
    """
    with LOCK:
        current = vars(module).get(method)
        if not isinstance(current, _Replaced):
            current = _Replaced(current, getattr(module, method))
            setattr(module, method, current)
        current.wrappers[entered] = wrapper
    try:
        yield
    finally:
        with LOCK:
            del current.wrappers[entered]
            if not current.wrappers and vars(module).get(method) is current:
                if current.before is None:
                    delattr(module, method)
                else:
                    setattr(module, method, current.before)
