"""Tables of texts, for a terminal, for Markdown and for a page."""

import re
import textwrap
from dataclasses import dataclass

from markupsafe import Markup
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

NONE = "–"

# Characters of a line of a heading on a terminal.
HEADING = 12


@dataclass(frozen=True)
class Table:
    """A table of texts; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_figure(self, index: int) -> bool:
        """Whether a column holds figures, rather than the names of rows or texts."""
        return index > 0 and all(_width(row[index]) <= 16 for row in self.rows)

    def parts(self, width: int) -> list["Table"]:
        """The same rows in as many tables, one below the other, as it takes for each to fit into a line of `width`."""
        names = max(_width(cell) for cell in [self.columns[0], *(row[0] for row in self.rows)]) + 4
        parts, left = [[]], width - names
        for index, column in enumerate(self.columns[1:], start=1):
            figures = max(_width(row[index]) for row in self.rows) if self.is_figure(index) else 24
            needed = max(figures, _width(textwrap.fill(column, HEADING))) + 3  # what rich puts around it
            if needed > left and parts[-1]:
                parts.append([])
                left = width - names
            parts[-1].append(index)
            left -= needed
        return [
            Table(
                self.title if not number else f"{self.title}, continued",
                [self.columns[index] for index in (0, *part)],
                [[row[index] for index in (0, *part)] for row in self.rows],
                self.note if part is parts[-1] else "",
            )
            for number, part in enumerate(parts)
        ]

    def rich(self) -> RichTable:
        """The table for a terminal."""
        table = RichTable(
            title=Text(self.title),
            caption=Text(self.note) if self.note else None,
            box=box.SIMPLE_HEAD,
            title_justify="left",
            caption_justify="left",
        )
        for index, column in enumerate(self.columns):
            # On a narrow terminal names and long texts are folded, and figures are not.
            is_figure = self.is_figure(index)
            heading = Text(textwrap.fill(column, HEADING) if index else column)
            table.add_column(heading, justify="right" if is_figure else "left", overflow="fold", no_wrap=is_figure)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """The sheet as a Markdown table."""
        heading, *rows = (" | ".join(escape_markdown(cell) for cell in row) for row in (self.columns, *self.rows))
        lines = [f"| {heading} |", "|" + " --- |" + " ---: |" * (len(self.columns) - 1), *(f"| {r} |" for r in rows)]
        return "\n".join([f"### {escape_markdown(self.title)}", "", *lines, "", escape_markdown(self.note)])


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def escape_markdown(value: object) -> object:
    """Text that comes through Markdown, and the HTML that Markdown lets through, as it is; on one line."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|#~&$!])", r"\\\1", " ".join(str(value).split()))
