import numpy as np
import pytest
from scipy.special import log_softmax

from nli_sft.evaluation.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    abstention_curve,
    accuracy_at,
    apply_temperature,
    fit_temperature,
    reached_bound,
    temperature_text,
)
from nli_sft.evaluation.metrics import compute


def overconfident(n, sharpness, seed=0):
    """True log-probabilities, from which gold labels are drawn, multiplied by `sharpness`."""
    rng = np.random.default_rng(seed)
    true = log_softmax(rng.normal(size=(n, 3)), axis=1)
    gold = np.array([rng.choice(3, p=np.exp(row)) for row in true])
    return log_softmax(sharpness * true, axis=1), gold


@pytest.mark.parametrize("sharpness", [0.5, 1, 3])
def test_the_temperature_undoes_overconfidence(sharpness):
    log_probs, gold = overconfident(20_000, sharpness)
    assert fit_temperature(log_probs, gold) == pytest.approx(sharpness, rel=0.05)


def test_a_fitted_temperature_calibrates_other_pairs():
    fitted, other = overconfident(5_000, 3, seed=1), overconfident(5_000, 3, seed=2)
    temperature = fit_temperature(*fitted)
    log_probs, gold = other
    before = compute(gold, log_probs.argmax(axis=1), np.exp(log_probs))
    after = compute(gold, log_probs.argmax(axis=1), apply_temperature(log_probs, temperature))
    assert after["accuracy"] == before["accuracy"]
    assert after["ece"] < 0.03 < 0.15 < before["ece"]
    assert after["nll"] < before["nll"]


def test_an_uninformed_model_gets_the_highest_temperature():
    log_probs = np.log(np.array([[0.98, 0.01, 0.01]] * 300))
    gold = np.arange(300) % 3
    assert fit_temperature(log_probs, gold) == pytest.approx(MAX_TEMPERATURE, rel=0.01)
    assert apply_temperature(log_probs, 1.0) == pytest.approx(np.exp(log_probs))


def test_a_temperature_at_a_bound_is_reported_as_none():
    confident = np.log(np.array([[0.98, 0.01, 0.01]] * 300))
    for gold, bound in ((np.arange(300) % 3, MAX_TEMPERATURE), (np.zeros(300, dtype=int), MIN_TEMPERATURE)):
        fitted = fit_temperature(confident, gold)
        assert reached_bound(fitted) == bound
        assert temperature_text({"temperature": fitted}) == f"none (bound {bound:g})", "of an older evaluation"
    assert temperature_text({"temperature": None, "bound": 50.0}) == "none (bound 50)"
    assert reached_bound(fit_temperature(*overconfident(5_000, 3))) is None
    assert temperature_text({"temperature": 1.25}) == "1.25"


def test_abstention_answers_the_most_confident_first_and_ties_together():
    confidence = np.array([0.9, 0.5, 0.9, 0.7])
    right = np.array([True, False, False, True])
    coverage, accuracy = abstention_curve(confidence, right)
    assert coverage.tolist() == [0.5, 0.75, 1.0]
    assert accuracy.tolist() == [0.5, pytest.approx(2 / 3), 0.5]
    assert accuracy_at(0.5, (coverage, accuracy)) == 0.5
    assert accuracy_at(0.6, (coverage, accuracy)) == pytest.approx(2 / 3), "at least that share is answered"
    assert accuracy_at(1, (coverage, accuracy)) == right.mean()
