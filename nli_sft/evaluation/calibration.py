"""Is a model right as often as it is sure? Temperature scaling, and what it costs to answer only when sure."""

from collections.abc import Mapping

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

# Beyond these a model is as good as always certain, or never.
COLDEST, HOTTEST = 0.02, 50.0


def fit_temperature(log_probs: np.ndarray, gold: np.ndarray) -> float:
    """The temperature that makes gold labels likeliest, from `COLDEST` to `HOTTEST` (Guo et al., 2017).

    To be fitted on other pairs than it is judged on. A model that is too sure has a temperature above 1.

    Args:
        log_probs: (n, labels) log-probability of each label.
        gold: (n,) label ids.
    """
    rows = np.arange(len(gold))

    def loss(temperature: float) -> float:
        return -log_softmax(log_probs / temperature, axis=1)[rows, gold].mean()

    # In the logarithm of the temperature, halving and doubling are steps of one size.
    search = minimize_scalar(lambda log: loss(np.exp(log)), bounds=np.log([COLDEST, HOTTEST]), method="bounded")
    # Where a bound is as good, as for a model that is always right, nothing was found between them.
    return min(COLDEST, HOTTEST, float(np.exp(search.x)), key=lambda temperature: round(loss(temperature), 9))


def reached_bound(temperature: float) -> float | None:
    """The bound of the search that a fitted temperature lies at, where it is none; `None` for one that was found."""
    return next((bound for bound in (COLDEST, HOTTEST) if abs(temperature / bound - 1) < 0.01), None)


def temperature_text(calibrated: Mapping[str, object]) -> str:
    """What a table says of the temperature that `evaluation.evaluate_run` fitted."""
    temperature, bound = calibrated["temperature"], calibrated.get("bound")
    if temperature is not None:
        bound = reached_bound(temperature)  # of evaluations that do not hold it
    return f"{temperature:.2f}" if bound is None else f"none (bound {bound:g})"


def apply_temperature(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """(n, labels) probabilities at a temperature; 1 leaves them as they are."""
    return np.exp(log_softmax(np.asarray(log_probs, dtype=np.float64) / temperature, axis=1))


def abstention_curve(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy on the pairs of which a model is surest, by how many of them are answered (El-Yaniv and Wiener, 2010).

    Args:
        confidence: (n,) probability of each answer.
        right: (n,) whether it was right.

    Returns:
        coverage and accuracy, both (points,), one point for each distinct confidence: pairs of the same confidence
        are answered together or not at all.
    """
    order = np.argsort(-confidence, kind="stable")
    last_of_its_kind = np.append(np.diff(confidence[order]) != 0, True)
    answered = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(right[order]) / answered
    return (answered / len(order))[last_of_its_kind], accuracy[last_of_its_kind]


def accuracy_at(coverage: float, curve: tuple[np.ndarray, np.ndarray]) -> float:
    """Accuracy when at least that share of pairs is answered, the surest first."""
    coverages, accuracies = curve
    return float(accuracies[np.searchsorted(coverages, coverage - 1e-12)])
