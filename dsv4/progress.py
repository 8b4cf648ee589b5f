"""Progress bars for long work: on stderr, and only on a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Progress = Callable[[int, int], None]
"""Called with (done, total), in bytes or tokens."""


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Progress]:
    """A bar that disappears when the work is done; ``unit`` is "B" or "tok"."""
    with tqdm(desc=title, unit=unit, unit_scale=True, leave=False, disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)
            if done == total:
                bar.close()

        yield show
