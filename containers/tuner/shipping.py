"""Checkpoints in a registry: what a training goes on from on another machine, when its own is gone.

    save ─► checkpoints/step-000020 ─► (link) .shipped-000020 ─► an image, under the tag `checkpoint-<identity>`
                                             one thread, while training goes on

The image holds a checkpoint's files as they are, so that the hashes in `state.json` hold for them too. A newer one
takes the tag of the one before; the tag goes when the adapter is published.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from pathlib import Path

from kaito_flows.containers.program import emit
from kaito_flows.containers.tuner import checkpoint
from kaito_flows.containers.tuner.image import IDENTITY
from kaito_flows.errors import AccessError, ImageError, KaitoFlowsError
from kaito_flows.oci.images import build_image, extract, open_image, open_repository
from kaito_flows.oci.reference import ImageName

__all__ = ["STEP", "Shipping", "forget"]

STEP = "io.kaito-flows.step"
LAST_TRIES = 3
"""How often the last checkpoint is pushed, when a registry does not answer: there is not much time after SIGTERM."""

_INSIDE = "checkpoint"
_logger = logging.getLogger(__name__)


class Shipping:
    """Sends checkpoints to `image`, at most one in `seconds`, and fetches what was sent.

    What fails here stops no training: it is told, as the event `checkpoint-not-pushed`.
    """

    def __init__(self, image: str, identity: str, seconds: float) -> None:
        self._image = image
        self._identity = identity
        self._seconds = seconds
        self._begun = float("-inf")
        self._pushed_step = 0
        self._changed = threading.Condition()
        self._next: tuple[int, Path] | None = None
        self._busy = False
        self._thread: threading.Thread | None = None

    def fetch(self, folder: Path, newer_than: int) -> bool:
        """Bring the checkpoint in the registry into `folder`, if it is of this training and newer than that step.

        Whether its files are whole, and fit, is seen when it is loaded.

        Raises:
            RegistryError: the registry does not answer: a training begun anew would write over what is there.
        """
        try:
            image = open_image(self._image)
            step = int(image.annotations.get(STEP, "0"))
            if image.annotations.get(IDENTITY) != self._identity or step < 1:
                raise ImageError("it is another training's", place=self._image)
            if step <= newer_than:
                return False
            partial = folder / f".fetched-{step:06d}"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                extract(image, partial, only=_INSIDE)
                final = folder / checkpoint.name_of(step)
                shutil.rmtree(final, ignore_errors=True)
                (partial / _INSIDE).rename(final)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        except (ImageError, AccessError, FileNotFoundError, ValueError) as exc:
            if not (isinstance(exc, ImageError) and exc.code == "image-not-found"):
                _logger.warning("the checkpoint in the registry is passed over: %s", exc)
            return False
        self._pushed_step = step
        return True

    def offer(self, saved: Path, step: int) -> None:
        """Push that checkpoint while training goes on, if it is time to; one that waits for its turn gives way."""
        if time.monotonic() < self._begun + self._seconds:
            return
        link = _linked(saved, step)
        with self._changed:
            if self._next is not None:
                shutil.rmtree(self._next[1], ignore_errors=True)
            self._next = (step, link)
            self._begun = time.monotonic()
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, daemon=True, name="checkpoints")
            self._thread.start()

    def finish(self, folder: Path) -> None:
        """Push the newest checkpoint in `folder` now, unless it was, and return when it is done or cannot be."""
        self.settle()
        saved = max(folder.glob("step-*"), default=None)
        if saved is None:
            return
        step = int(saved.name.removeprefix("step-"))
        for tries_left in reversed(range(LAST_TRIES)):
            if step <= self._pushed_step or not self._push(saved, step, again=tries_left > 0):
                return
            time.sleep(1)

    def settle(self) -> None:
        """Begin no other push, and wait for the end of that which goes on."""
        with self._changed:
            if self._next is not None:
                shutil.rmtree(self._next[1], ignore_errors=True)
                self._next = None
            self._changed.wait_for(lambda: not self._busy)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                assert self._next is not None
                (step, link), self._next, self._busy = self._next, None, True
            try:
                self._push(link, step)
            finally:
                shutil.rmtree(link, ignore_errors=True)
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()

    def _push(self, saved: Path, step: int, *, again: bool = False) -> bool:
        """Push a checkpoint; return whether trying once more can help, where that is to be done."""
        names = (checkpoint.ADAPTER, checkpoint.OPTIMIZER, checkpoint.BEST)
        tensors = {f"{_INSIDE}/{name}": saved / name for name in names if (saved / name).exists()}
        state = {f"{_INSIDE}/{checkpoint.STATE}": saved / checkpoint.STATE}
        try:
            name = ImageName.parse_image(self._image)
            annotations = {IDENTITY: self._identity, STEP: str(step)}
            image = build_image(
                open_repository(self._image), [tensors, state], annotations=annotations, tag=name.reference
            )
        except KaitoFlowsError as exc:
            if again and exc.retryable:
                _logger.warning("the checkpoint of step %d is pushed once more: %s", step, exc)
                return True
            _not_pushed(step, exc.code, str(exc))
        except OSError as exc:
            _not_pushed(step, "unexpected-error", str(exc))
        else:
            self._pushed_step = step
            emit("checkpoint-pushed", step=step, digest=image.digest)
        return False


def forget(image: str) -> None:
    """Drop the checkpoint's tag, as far as that can be done; blobs are the registry's to collect."""
    try:
        open_repository(image).untag(ImageName.parse_image(image).reference)
    except (KaitoFlowsError, OSError) as exc:
        _logger.warning("the checkpoint's tag stays: %s", exc)


def _not_pushed(step: int, code: str, reason: str) -> None:
    _logger.warning("the checkpoint of step %d was not pushed: %s", step, reason)
    emit("checkpoint-not-pushed", step=step, code=code, reason=reason)


def _linked(saved: Path, step: int) -> Path:
    """Return a folder with the checkpoint's files that stays when newer ones push the checkpoint out."""
    link = saved.with_name(f".shipped-{step:06d}")
    shutil.rmtree(link, ignore_errors=True)
    shutil.copytree(saved, link, copy_function=_link_or_copy)
    return link


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
