"""The report on a run: what tuning changed, and how certain that is.

`content` computes it from the files of the run folder, `figures` makes the plots, `suite`, `pairs` and `outcome` the
tables, and two templates the HTML page and the Markdown file.
"""

import base64
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..evaluation.comparison import points
from .content import MODEL_NAMES, Report, prompt_text
from .figures import Plot, evaluation_plots, label_colours, training_plots
from .pairs import pairs_table
from .suite import suite_tables
from .tables import escape_markdown


def write_report(report: Report) -> Path:
    """Write report.html (one self-contained file), report.md and figures/ into a run folder.

    Returns:
        The path of report.html.
    """
    plots = {evaluation.key: evaluation_plots(evaluation) for evaluation in report.evaluations}
    plots["training"] = training_plots(report.training)
    name = "report" if len(report.own.compared) == 2 else "single"  # one model has no before and after
    table, table_note = pairs_table(report.evaluations)

    in_suites = {key for suite in report.suites for key in suite["evaluated"].values()}
    figures = report.folder / "figures"
    figures.mkdir(exist_ok=True)
    for key, group in plots.items():
        for plot in group.values():
            (figures / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
            if key not in in_suites:  # W&B and model cards show none of a suite's many plots
                (figures / f"{plot.name}.png").write_bytes(plot.png)

    content = {
        "report": report,
        "other_sets": [evaluation for evaluation in report.evaluations if evaluation.key not in in_suites],
        "plots": plots,
        "pairs_table": Markup(table),  # escaped by itables
        "table_note": table_note,
        "prompt_text": prompt_text(report.prompt),
        "model_names": MODEL_NAMES,
        "label_colours": label_colours(len(report.prompt.labels)),
        "suite_tables": [table for suite in report.suites for table in suite_tables(suite, report.evaluations)],
    }
    (report.folder / "report.md").write_text(
        jinja_environment(finalize=escape_markdown).get_template(f"{name}.md.jinja").render(content), encoding="utf-8"
    )
    path = report.folder / "report.html"
    page = jinja_environment(autoescape=True).get_template(f"{name}.html.jinja").render(content)
    path.write_text(page, encoding="utf-8")
    return path


def jinja_environment(**options: Any) -> Environment:
    """The environment of the templates, with the filters that they use."""
    environment = Environment(
        loader=PackageLoader("nli_sft.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **options,
    )
    environment.filters |= {
        "percent": lambda share: f"{share:.1%}",
        "points": points,
        "count": lambda n: f"{n:,}",
        "p_value": lambda p: "< 0.001" if p < 0.001 else f"{p:.3f}",
        "data_uri": _data_uri,
        "as_code": lambda text: Markup(text.rstrip().replace("\n", "\n    ")),  # an indented block needs no escaping
    }
    return environment


def _data_uri(plot: Plot) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(plot.svg.encode()).decode()}"
