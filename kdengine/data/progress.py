# SPDX-License-Identifier: Apache-2.0
"""Progress bars for the long passes over a data set, and counts in words."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: `1 shard`, `2,000 shards`, `1 row of`; the plural adds an s."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


class Progress:
    """A bar a pass, on stderr; silent when not shown.

    A bar is filled by bytes (or whatever `begin` was told the total in) and counts items beside it,
    because how many samples a shard holds is known only at its end.
    """

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        self._bars = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[num_items]:,} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]:,.0f}/s"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not shown,
        )

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            # bytes between the samples were not counted
            for bar in self._bars.tasks:
                self._bars.update(bar.id, completed=bar.total)
        self._bars.stop()

    def say(self, message: str) -> None:
        """Print a line above the bars."""
        self._console.print(message, markup=False, highlight=False)

    def begin(self, description: str, unit: str, total: int) -> Callable[[int, int], None]:
        """Show another bar; returns the function that takes items and bytes done since."""
        bar = self._bars.add_task(description, total=total, unit=unit, num_items=0, rate=0.0)
        num_items = 0

        def advance(more_items: int, more_total: int) -> None:
            nonlocal num_items
            num_items += more_items
            elapsed = self._bars.tasks[bar].elapsed or 0.0
            rate = num_items / elapsed if elapsed > 0 else 0.0
            self._bars.update(bar, advance=more_total, num_items=num_items, rate=rate)

        return advance
