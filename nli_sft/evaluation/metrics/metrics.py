"""The metrics as a module of the `evaluate` library, which finds it by the name of its folder."""

# One import a line: `evaluate` scans this file for packages to check, and reads a line as one name.
import datasets
import evaluate

from nli_sft.evaluation.metrics import compute_arrays
from nli_sft.labels import LABELS

DESCRIPTION = """
How well labels of natural language inference are predicted: accuracy with Wilson's 95 % interval, macro-F1,
precision, recall and F1 of each label, confusion matrix, negative log-likelihood, Brier score, expected calibration
error with its reliability bins, and the mean probability on the label words.
"""

KWARGS_DESCRIPTION = """
Args:
    predictions: three-way label ids, in the order entailment, neutral, contradiction.
    references: gold label ids, indices of label_names.
    probabilities: optional, three probabilities a pair.
    mass: optional, the probability of the label words together, one a pair.
    label_names: names of the gold ids; two for a set that does not tell neutral from contradiction.
Returns: a dict; see nli_sft.evaluation.metrics.compute.
Example:
    >>> evaluate.load(str(METRICS_PATH)).compute(predictions=[0, 2], references=[0, 1])["accuracy"]
    0.5
"""


class NLIMetrics(evaluate.Metric):
    """Accuracy, calibration and the rest, of predicted labels."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=KWARGS_DESCRIPTION,
            # What is optional, probabilities and mass, can only be a keyword argument.
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, probabilities=None, mass=None, label_names=LABELS):
        return compute_arrays(references, predictions, probabilities, mass, label_names)
