"""Which implementation of an operation runs: its kernel or its reference.

Every public function of a room is registered here once, together with its twin in the room's
``reference.py``. On CPU tensors the twin runs: the reference *is* the CPU backend. On CUDA tensors
the kernel runs if the operation has one and the room was not named in ``use_reference``. There is
no other fallback: a kernel that cannot take its input raises.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

REGISTRY: dict[str, "Op"] = {}
_forced: frozenset[str] = frozenset()
_listener: Callable[["Op", Any], None] | None = None


@dataclass(frozen=True)
class Op:
    """One operation: ``room.name``, its reference twin, and whether a CUDA kernel stands behind it."""

    room: str
    name: str
    reference: Callable[..., Any]
    has_kernel: bool

    def served_by(self, device: str) -> str:
        """``"kernel"`` or ``"reference"`` for tensors on ``device`` ("cpu" or "cuda")."""
        forced = self.room in _forced
        return "kernel" if device == "cuda" and self.has_kernel and not forced else "reference"


def op(reference: Callable[..., Any], *, kernel: bool = False) -> Callable[[Callable], Callable]:
    """Register the decorated function as the door of ``reference``.

    The decorated body is the kernel path (checks, allocation, one launch). With ``kernel=False``
    no kernel exists yet: the body is the docstring alone and every device runs the reference.
    """

    def decorate(door: Callable[..., Any]) -> Callable[..., Any]:
        room = door.__module__.removeprefix("dsv4.ops.")
        entry = Op(room, door.__name__, reference, kernel)
        REGISTRY[f"{room}.{door.__name__}"] = entry

        @functools.wraps(door)
        def dispatch(*args: Any, **kwargs: Any) -> Any:
            values = (*args, *kwargs.values())
            run = door if kernel and room not in _forced and _on_cuda(values) else reference
            assert run is reference or not _needs_grad(values), (
                f"{room}.{door.__name__}: kernels have no gradients; train inside use_reference('all')"
            )
            outputs = run(*args, **kwargs)
            if _listener is not None:
                _listener(entry, outputs)
            return outputs

        return dispatch

    return decorate


def _needs_grad(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in _tensors(args))


def _on_cuda(args: tuple[Any, ...]) -> bool:
    return any(tensor.is_cuda for tensor in _tensors(args))


def _tensors(args: tuple[Any, ...]) -> Iterator[torch.Tensor]:
    """The tensors among the arguments and in those that are tuples, as weights are (ops/formats.py)."""
    for arg in args:
        for value in arg if isinstance(arg, tuple) else (arg,):
            if isinstance(value, torch.Tensor):
                yield value


def rooms() -> tuple[str, ...]:
    """The names ``use_reference`` accepts, besides ``"all"``."""
    return tuple(sorted({entry.room for entry in REGISTRY.values()}))


@contextmanager
def use_reference(*names: str) -> Iterator[None]:
    """Run the named rooms (or ``"all"``) on their references inside the ``with`` block.

    The references are plain torch and keep autograd. An unknown room raises ``ValueError``.
    """
    global _forced
    previous = _forced
    _forced = previous | expand_rooms(names)
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def listen(listener: Callable[[Op, Any], None]) -> Iterator[None]:
    """Call ``listener(op, outputs)`` after every operation in the ``with`` block, in order; for bisection."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def expand_rooms(names: Iterable[str]) -> frozenset[str]:
    """The set of rooms meant by ``names``; ``"all"`` stands for every room."""
    known = rooms()
    chosen: set[str] = set()
    for name in names:
        if name == "all":
            chosen.update(known)
        elif name in known:
            chosen.add(name)
        else:
            raise ValueError(f"--reference: no room {name!r}; the rooms are {', '.join(known)}, all")
    return frozenset(chosen)
