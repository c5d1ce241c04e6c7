"""Text and tables on the terminal: with rich where it is installed, plain where it is not."""

import contextlib
import re
from typing import Any, Callable, Iterator, List

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ImportError:
    Console = None  # type: ignore


class _PlainConsole:
    """The part of rich's Console that the quickstart uses."""

    def print(self, text: Any = "", *, markup: bool = True, **_: Any) -> None:
        print(re.sub(r"\[/?[a-z]+\]", "", str(text)) if markup else text, flush=True)


console: Any = _PlainConsole() if Console is None else Console()


@contextlib.contextmanager
def progress(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows progress; yields the function to be called with the number of steps done so far."""
    if Console is None:
        yield lambda done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=total)
        yield lambda done: bar.update(task, completed=done)


def show_table(title: str, head: List[str], rows: List[List[str]]) -> None:
    """Prints a table; all columns but the first are flush right. Headings may have several lines."""
    if Console is not None:
        table = Table(title=title)
        for index, name in enumerate(head):
            table.add_column(name, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    lines = [[name.replace("\n", " ") for name in head], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    print(title)
    for line in lines:
        first, *others = [cell.rjust(width) for cell, width in zip(line, widths)]
        print("  ".join(["", line[0].ljust(len(first)), *others]), flush=True)
