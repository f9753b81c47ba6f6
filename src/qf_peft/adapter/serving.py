"""Teaching a model that is answering: a generation sees the weights before a lesson or those after it, never both."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_ENTRANCES = ("generate", "generate_batch", "forward")  # of a transformers model; what runs its weights


class ServingLock:
    """
    A readers-writer lock: many generations at once, or one lesson.

    - A lesson waits for the generations in flight; those that come while it waits or runs wait for its end.
    - After a lesson all that waited for it go before the next one, so that neither side starves.
    - Within a generation or a lesson its own thread goes in and out freely. A plain forward pass waits for a lesson
      that waits only while nobody generates: a generation may rest on passes in other threads.
    - Compiled code takes no lock. `generate` is not compiled, and holds it for the compiled passes within it.

    Copies and pickles of it are new locks, which nobody holds.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._own = threading.local()  # .inside: whether this thread holds the lock for a generation or a pass
        self._generations = self._passes = 0
        self._owner: int | None = None  # the thread that teaches
        self._waiting = 0  # lessons
        self._lessons = 0  # done
        self._blocked = 0  # generations and passes that wait for the lesson now waiting or running
        self._due = 0  # those that waited for the last one and have not gone on yet

    def __reduce__(self) -> tuple:
        return type(self), ()

    @property
    def mine(self) -> bool:
        """Whether this thread is in a generation or a lesson."""
        return getattr(self._own, "inside", False) or self._owner == threading.get_ident()

    @contextmanager
    def generating(self, whole: bool = True) -> Iterator[None]:
        """While open, no other thread changes the weights. `whole`: a generation, not just one forward pass."""
        if torch.compiler.is_compiling() or self.mine:
            yield
            return
        with self._changed:
            self._wait_for_lesson(whole)
            self._generations += whole
            self._passes += not whole
            self._own.inside = True
        try:
            yield
        finally:
            with self._changed:
                self._own.inside = False
                self._generations -= whole
                self._passes -= not whole
                self._changed.notify_all()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """While open, no other thread runs the model.

        Raises:
            RuntimeError: this thread is in the midst of a generation, which would wait for itself.
        """
        if getattr(self._own, "inside", False):
            raise RuntimeError(
                "this thread is in the midst of a generation or forward pass (in a streamer, a logits processor or a "
                "hook of it, say), and the weights cannot be changed before it ends; teach after it, or from another "
                "thread that the generation does not wait for"
            )
        if self._owner == threading.get_ident():
            yield
            return
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(
                    lambda: self._owner is None and not (self._generations or self._passes or self._due)
                )
                self._owner = threading.get_ident()
            finally:
                self._waiting -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._owner = None
                self._lessons += 1
                self._due, self._blocked = self._due + self._blocked, 0
                self._changed.notify_all()

    def _wait_for_lesson(self, whole: bool) -> None:
        arrived = self._lessons
        self._blocked += 1
        try:
            self._changed.wait_for(
                lambda: (
                    self._owner is None
                    and (self._lessons > arrived or not self._waiting or not (whole or not self._generations))
                )
            )
        finally:
            if self._lessons > arrived:
                self._due -= 1
            else:
                self._blocked -= 1


class Held:
    """In a model's place of a method: the method, run under the lock. The model's own, so it does not keep it alive."""

    def __init__(self, lock: ServingLock, model: nn.Module, name: str, own: Callable | None) -> None:
        """`own`: what the model had in place of its class's method, if anything."""
        self.lock, self.name, self.own = lock, name, own
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.lock.generating(whole=self.name != "forward"):
            return self.__wrapped__(*args, **kwargs)

    @property
    def __wrapped__(self) -> Callable:  # where inspect.signature looks
        model = self._model()
        if model is None:
            raise ReferenceError(f"the model of this {self.name!r} is gone; keep the model, not only its method")
        return self.own if self.own is not None else getattr(type(model), self.name).__get__(model)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> tuple:  # a copy is the copied model's
        return type(self), (self.lock, self._model(), self.name, self.own)


def lock_of(model: nn.Module) -> ServingLock:
    """The lock that a model's methods run under, or a new one."""
    wrapped = [m for name, m in vars(model).items() if name in _ENTRANCES and isinstance(m, Held)]
    return wrapped[0].lock if wrapped else ServingLock()


def hold(model: nn.Module, lock: ServingLock) -> None:
    """Let a transformers model, and the decoder in it, generate and run under the lock from now on."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for module in {model, decoder} - {None}:
        for name in _ENTRANCES:
            own = vars(module).get(name)
            if hasattr(module, name) and not isinstance(own, Held):
                setattr(module, name, Held(lock, module, name, own))


def release(model: nn.Module) -> None:
    """Make the methods what they were."""
    for module in model.modules():
        for name in _ENTRANCES:
            method = vars(module).get(name)
            if isinstance(method, Held):
                delattr(module, name)
                if method.own is not None:
                    setattr(module, name, method.own)


def changing(method: Callable) -> Callable:
    """A tuner's method that changes weights, to run while nobody generates."""

    @functools.wraps(method)
    def alone(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.serving.changing():
            return method(self, *args, **kwargs)

    return alone


def between_lessons(method: Callable) -> Callable:
    """A tuner's method that no lesson may overlap with; generations may."""

    @functools.wraps(method)
    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self.serving.generating():
            return method(self, *args, **kwargs)

    return held
