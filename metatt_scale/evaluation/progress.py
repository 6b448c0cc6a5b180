"""One progress bar for a whole evaluation, and silence around the harness."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
"""Called with the number of requests answered since the last call."""
StartTask = Callable[[str, int], Advance]
"""Called with a task's name and its number of requests."""


@contextlib.contextmanager
def task_progress(n_tasks: int, *, shown: bool) -> Iterator[StartTask]:
    """Show "[i/n] task, requests done, time left" on stderr where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as progress:
        bar = progress.add_task("", total=None)
        started = 0

        def start(name: str, total: int) -> Advance:
            nonlocal started
            started += 1
            progress.reset(bar, description=f"{started}/{n_tasks} {name}", total=total)
            return lambda count: progress.advance(bar, count)

        yield start


@contextlib.contextmanager
def quiet_harness() -> Iterator[None]:
    """Keep the harness's and datasets' own bars and informative log lines off the screen."""
    import datasets
    import lm_eval.api.task as task_module

    logger, tqdm = logging.getLogger("lm_eval"), task_module.tqdm
    level, bars_off = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # The harness offers no switch for the bar over prompts.
    task_module.tqdm = functools.partial(tqdm, disable=True)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        task_module.tqdm = tqdm
        logger.setLevel(level)
        if not bars_off:
            datasets.enable_progress_bars()
