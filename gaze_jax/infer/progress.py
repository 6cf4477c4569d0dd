"""A progress bar on stderr, for a person who watches."""

import contextlib
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str, total: int | None, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Context with a bar on stderr; nothing is written if stderr is no terminal.

    Inside it, complete lines that are printed on stderr appear above the bar. So do those on stdout, if that
    is a terminal too.

    Args:
      what: what is counted, such as "questions".
      total: how many there are; None if that is not known.
      shown: False writes nothing.

    Yields:
      A function that takes the number of those that are newly done.
    """
    if not shown or not sys.stderr.isatty():
        yield lambda count: None
        return
    # Slow to import, and of no use without a terminal.
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # What goes to a file or a pipe must not be taken to the terminal.
    with Progress(
        *columns,
        *(() if total is None else (TextColumn("left"), Remaining())),
        console=Console(stderr=True),
        redirect_stdout=sys.stdout.isatty(),
    ) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)
