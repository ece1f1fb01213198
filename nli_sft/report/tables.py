"""Tables of text for a terminal, Markdown and HTML."""

import re
import textwrap
from dataclasses import dataclass

from markupsafe import Markup
from rich import box
from rich.table import Table as RichTable
from rich.text import Text

NONE = "–"

# Headings wrap at this width in a terminal.
HEADING = 12


@dataclass(frozen=True)
class Table:
    """A table of text; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_figure(self, index: int) -> bool:
        """Whether a column holds figures, which are short, not text or row names."""
        return index > 0 and all(_width(row[index]) <= 16 for row in self.rows)

    def split(self, width: int) -> list["Table"]:
        """Split the columns over as many tables as needed for each to fit into lines of `width`."""
        names = max(_width(cell) for cell in [self.columns[0], *(row[0] for row in self.rows)]) + 4
        groups: list[list[int]] = [[]]
        left = width - names
        for index, column in enumerate(self.columns[1:], start=1):
            cells = max(_width(row[index]) for row in self.rows) if self.is_figure(index) else 24
            needed = max(cells, _width(textwrap.fill(column, HEADING))) + 3  # rich's padding
            if needed > left and groups[-1]:
                groups.append([])
                left = width - names
            groups[-1].append(index)
            left -= needed
        return [
            Table(
                f"{self.title}, continued" if number else self.title,
                [self.columns[index] for index in (0, *group)],
                [[row[index] for index in (0, *group)] for row in self.rows],
                self.note if group is groups[-1] else "",
            )
            for number, group in enumerate(groups)
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
            # In a narrow terminal, names and long texts wrap, figures do not.
            is_figure = self.is_figure(index)
            heading = Text(textwrap.fill(column, HEADING) if index else column)
            table.add_column(heading, justify="right" if is_figure else "left", overflow="fold", no_wrap=is_figure)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """The table in Markdown, below its title."""
        heading, *rows = (" | ".join(map(escape_markdown, row)) for row in (self.columns, *self.rows))
        lines = [f"| {heading} |", "|" + " --- |" + " ---: |" * (len(self.columns) - 1), *(f"| {r} |" for r in rows)]
        return "\n".join([f"### {escape_markdown(self.title)}", "", *lines, "", escape_markdown(self.note)])


def _width(text: str) -> int:
    return max(map(len, text.split("\n")))


def escape_markdown(value: object) -> str:
    """Escape Markdown, and the HTML that Markdown allows, and put the text on one line. `Markup` is left as it is."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|#~&$!])", r"\\\1", " ".join(str(value).split()))
