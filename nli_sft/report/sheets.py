"""Tables of texts, for a terminal, for Markdown and for a page."""

import re
import textwrap
from dataclasses import dataclass

from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

NONE = "–"


@dataclass(frozen=True)
class Sheet:
    """A table of texts; the first column names the row."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_figure(self, index: int) -> bool:
        """Whether a column holds figures, rather than the names of rows or texts."""
        return index > 0 and all(len(row[index]) <= 16 for row in self.rows)

    def rich(self) -> Table:
        """The sheet for a terminal."""
        table = Table(title=Text(self.title), caption=Text(self.note) if self.note else None, box=box.SIMPLE_HEAD)
        for index, column in enumerate(self.columns):
            # On a narrow terminal names and long texts are folded, and figures are not.
            is_figure = self.is_figure(index)
            heading = Text(textwrap.fill(column, 12))
            table.add_column(heading, justify="right" if is_figure else "left", overflow="fold", no_wrap=is_figure)
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        """The sheet as a Markdown table."""
        heading, *rows = (" | ".join(escape_markdown(cell) for cell in row) for row in (self.columns, *self.rows))
        lines = [f"| {heading} |", "|" + " --- |" + " ---: |" * (len(self.columns) - 1), *(f"| {r} |" for r in rows)]
        return "\n".join([f"### {escape_markdown(self.title)}", "", *lines, "", escape_markdown(self.note)])


def escape_markdown(value: object) -> object:
    """Text that comes through Markdown, and the HTML that Markdown lets through, as it is; on one line."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"([\\`*_\[\]<>|#~&$!])", r"\\\1", " ".join(str(value).split()))
