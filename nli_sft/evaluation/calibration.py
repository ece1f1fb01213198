"""Calibration: temperature scaling, and accuracy when a model answers only its most confident pairs."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

# Bounds of the search. Beyond them, probabilities are practically 0 and 1, or uniform.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.02, 50.0


def fit_temperature(log_probs: np.ndarray, gold: np.ndarray) -> float:
    """The temperature that minimizes the negative log-likelihood of the gold labels (Guo et al., 2017).

    Fit it on other pairs than those it is evaluated on. An overconfident model gets a temperature above 1.

    Args:
        log_probs: (n, labels) log-probability of each label.
        gold: (n,) label ids.
    """
    rows = np.arange(len(gold))

    def loss(temperature: float) -> float:
        return -log_softmax(log_probs / temperature, axis=1)[rows, gold].mean()

    # On a logarithmic scale, halving and doubling are steps of the same size.
    bounds = MIN_TEMPERATURE, MAX_TEMPERATURE
    search = minimize_scalar(lambda log: loss(np.exp(log)), bounds=np.log(bounds), method="bounded")
    # The bounds come first and win ties: a model that is always right has no minimum between them.
    return min(*bounds, float(np.exp(search.x)), key=lambda temperature: round(loss(temperature), 9))


def reached_bound(temperature: float) -> float | None:
    """The bound of the search that a fitted temperature is at, or `None` if it is between them."""
    return next((bound for bound in (MIN_TEMPERATURE, MAX_TEMPERATURE) if abs(temperature / bound - 1) < 0.01), None)


def temperature_text(calibrated: Mapping[str, Any]) -> str:
    """The temperature of an evaluation's `calibrated` metrics, for a table."""
    temperature, bound = calibrated["temperature"], calibrated.get("bound")
    if temperature is not None:
        bound = reached_bound(temperature)  # older evaluations have no `bound`
    return f"{temperature:.2f}" if bound is None else f"none (bound {bound:g})"


def apply_temperature(log_probs: np.ndarray, temperature: float) -> np.ndarray:
    """(n, labels) probabilities at a temperature."""
    return np.exp(log_softmax(np.asarray(log_probs, dtype=np.float64) / temperature, axis=1))


def abstention_curve(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy on the most confident pairs, by the share of pairs answered (El-Yaniv and Wiener, 2010).

    Args:
        confidence: (n,) probability of each prediction.
        right: (n,) whether the prediction was right.

    Returns:
        coverage and accuracy, both (points,), with one point for each distinct confidence: pairs of equal confidence
        are answered together or not at all.
    """
    order = np.argsort(-confidence, kind="stable")
    last_of_ties = np.append(np.diff(confidence[order]) != 0, True)
    answered = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(right[order]) / answered
    return (answered / len(order))[last_of_ties], accuracy[last_of_ties]


def accuracy_at(coverage: float, curve: tuple[np.ndarray, np.ndarray]) -> float:
    """Accuracy when at least this share of pairs is answered, the most confident first."""
    coverages, accuracies = curve
    return float(accuracies[np.searchsorted(coverages, coverage - 1e-12)])
