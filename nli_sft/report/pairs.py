"""The searchable table of all pairs: DataTables, embedded in the page (itables, offline)."""

import itables
import numpy as np
import pandas as pd
from itables.javascript import generate_init_offline_itables_html

from .content import BUCKET_NAMES, Evaluation

# With more rows the page is slow to open.
MAX_ROWS = 20_000
SEED = 0

# The buttons of DataTables' ColumnControl get a row below the heading; beside it, columns would be too wide.
CHOOSE = [{"target": 1, "content": ["order", ["searchList"]]}]
TYPE = [{"target": 1, "content": ["order", ["search"]]}]
CHOICES = ("gold", "before", "after", "answer", "change", "outcome", "split")


def pairs_table(evaluations: list[Evaluation]) -> tuple[str, str]:
    """(HTML, a note on its content). itables escapes every text.

    At most `MAX_ROWS` pairs are shown, those of the first split before others. Larger sets are sampled, stratified by
    split, gold label and bucket.
    """
    own, *others = (_rows(evaluation) for evaluation in evaluations)
    total = len(own) + sum(map(len, others))
    own = _stratified(own, MAX_ROWS)
    if others:
        rows = pd.concat([own, _stratified(pd.concat(others, ignore_index=True), MAX_ROWS - len(own))])
    else:
        rows = own.drop(columns="split")
    if len(rows) == total:
        note = f"All {total:,} pairs."
    else:
        note = (
            f"{len(rows):,} of {total:,} pairs, of which {len(own):,} are from {evaluations[0].name}; the sample is "
            f"stratified by gold label and change. The predictions.parquet files hold all pairs."
        )
    columns = list(rows.columns)
    choices = [columns.index(name) for name in CHOICES if name in columns]
    html = itables.to_html_datatable(
        rows,
        "Predictions before and after tuning" if len(evaluations[0].compared) == 2 else "Predictions",
        connected=False,
        allow_html=False,
        display_logo_when_loading=False,
        showIndex=False,
        maxBytes=0,
        maxRows=0,
        pageLength=10,
        table_id="pairs-table",
        classes="display compact",
        style="width:100%",
        columnDefs=[
            {"targets": choices, "columnControl": CHOOSE},
            {"targets": [columns.index(name) for name in ("premise", "hypothesis", "uid")], "className": "text"},
        ],
        columnControl=TYPE,
        ordering={"indicators": False, "handler": False},
        autoWidth=False,
    )
    # Without JavaScript, the loader shows a text that is meant for notebooks: hide it.
    return f"<div hidden>{generate_init_offline_itables_html(itables.options.dt_bundle)}</div>{html}", note


def _rows(evaluation: Evaluation) -> pd.DataFrame:
    table = evaluation.table
    if len(evaluation.compared) == 1:
        return pd.DataFrame(
            {
                "premise": table["premise"],
                "hypothesis": table["hypothesis"],
                "gold": table["label"],
                "answer": table[f"{evaluation.main}_prediction"],
                "outcome": np.where(evaluation.right(evaluation.main), "right", "wrong"),
                "p(gold)": evaluation.p_gold(evaluation.main).round(2),
                "split": evaluation.name,
                "uid": table["uid"],
            }
        )
    p_before, p_after = evaluation.p_gold("base"), evaluation.p_gold("tuned")
    return pd.DataFrame(
        {
            "premise": table["premise"],
            "hypothesis": table["hypothesis"],
            "gold": table["label"],
            "before": table["base_prediction"],
            "after": table["tuned_prediction"],
            "change": [BUCKET_NAMES[bucket] for bucket in evaluation.bucket],
            "p(gold) before": p_before.round(2),
            "p(gold) after": p_after.round(2),
            "split": evaluation.name,
            "uid": table["uid"],
        }
    )


def _stratified(rows: pd.DataFrame, most: int) -> pd.DataFrame:
    if len(rows) <= most:
        return rows
    shuffled = rows.sample(frac=1, random_state=SEED)
    # Each stratum's rows are spread evenly over (0, 1): the first `most` hold every stratum in proportion.
    strata = shuffled.groupby(["split", "gold", "change" if "change" in shuffled else "outcome"])
    place = (strata.cumcount() + 0.5) / strata["uid"].transform("size")
    return shuffled.loc[place.sort_values(kind="stable").index[:most]].sort_index()
