"""The metrics as a module for the `evaluate` library, which requires the file to be named after its folder."""

# One import per line: `evaluate` scans this file for required packages and takes a line for one name.
import datasets
import evaluate

from nli_sft.evaluation.metrics import compute_arrays
from nli_sft.labels import LABELS

DESCRIPTION = """
Metrics of predicted labels for natural language inference: accuracy with its 95 % Wilson interval, macro-F1,
precision, recall and F1 of each label, confusion matrix, negative log-likelihood, Brier score, expected calibration
error with its reliability bins, and the mean label mass.
"""

KWARGS_DESCRIPTION = """
Args:
    predictions: label ids, indices of labels.
    references: gold label ids, indices of label_names.
    probabilities: optional, one probability per pair and label.
    mass: optional, the total probability of the label words, one number per pair.
    label_names: names of the gold ids; by default entailment, neutral, contradiction.
    labels: names of the predicted ids, if they differ: three for a model and two for a set that does not distinguish
        neutral from contradiction.
Returns: a dict; see nli_sft.evaluation.metrics.compute.
Example:
    >>> evaluate.load(str(METRICS_PATH)).compute(predictions=[0, 2], references=[0, 1])["accuracy"]
    0.5
"""


class NLIMetrics(evaluate.Metric):
    """Accuracy, calibration and other metrics of predicted labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            # Optional inputs (probabilities, mass) can only be keyword arguments of `compute`.
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, probabilities=None, mass=None, label_names=LABELS, labels=None):
        return compute_arrays(references, predictions, probabilities, mass, label_names, labels)
