import evaluate
import numpy as np
import pytest

from nli_sft.evaluation.metrics import METRICS_PATH, compute
from nli_sft.labels import LABELS, TWO_WAY_LABELS

# Four pairs, three right; worked out by hand below.
GOLD = [0, 1, 2, 1]
PREDICTED = [0, 1, 2, 2]
PROBABILITIES = [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.0, 0.0, 1.0], [0.1, 0.3, 0.6]]


def test_accuracy_and_wilson_interval():
    result = compute(GOLD, PREDICTED)
    assert result["accuracy"] == 0.75
    # Wilson, n=4, p=3/4, z=1.96: centre (p + z²/2n) / (1 + z²/n) = 0.6275, half-width 0.3269
    assert result["accuracy_interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)


def test_wilson_interval_of_a_perfect_score_is_not_empty():
    low, high = compute([0] * 10, [0] * 10)["accuracy_interval"]
    assert low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)
    assert high == 1


def test_per_label_and_confusion():
    result = compute(GOLD, PREDICTED)
    assert result["confusion"] == [[1, 0, 0], [0, 1, 1], [0, 0, 1]]  # rows are gold
    assert result["per_label"]["neutral"] == {"precision": 1, "recall": 0.5, "f1": pytest.approx(2 / 3), "n": 2}
    assert result["per_label"]["contradiction"] == {"precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "n": 1}
    assert result["macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert result["label_mapping"] is None


def test_a_label_that_never_occurs_counts_as_zero():
    result = compute([0, 0], [0, 0])
    assert result["per_label"]["neutral"] == {"precision": 0, "recall": 0, "f1": 0, "n": 0}
    assert result["macro_f1"] == pytest.approx(1 / 3)


def test_log_loss_and_brier():
    result = compute(GOLD, PREDICTED, PROBABILITIES)
    assert result["nll"] == pytest.approx(-(np.log(0.8) + np.log(0.6) + np.log(1) + np.log(0.3)) / 4)
    # Summed over labels: 0.06, 0.24, 0, 0.01 + 0.49 + 0.36
    assert result["brier"] == pytest.approx((0.06 + 0.24 + 0 + 0.86) / 4)


def test_calibration_error_and_bins():
    result = compute(GOLD, PREDICTED, PROBABILITIES)
    # Confidences 0.8, 0.6, 1.0, 0.6; bins are fifteenths with their upper edge: 0.6 twice in (8/15, 9/15], one right.
    bins = [(b["n"], b["confidence"], b["accuracy"]) for b in result["reliability"]]
    assert bins == [(2, pytest.approx(0.6), 0.5), (1, pytest.approx(0.8), 1), (1, 1, 1)]
    assert result["ece"] == pytest.approx((2 * 0.1 + 0.2 + 0) / 4)
    assert result["mean_confidence"] == pytest.approx(0.75)


def test_a_bin_includes_its_upper_edge():
    (only,) = compute([0], [0], [[1 / 3, 1 / 3, 1 / 3]])["reliability"]
    assert (only["low"], only["high"]) == (pytest.approx(4 / 15), pytest.approx(5 / 15))


def test_calibration_error_of_a_calibrated_model_is_small():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 20_000)
    probabilities = np.stack([confidence, 1 - confidence, np.zeros_like(confidence)], axis=1)
    gold = (rng.uniform(size=20_000) > confidence).astype(int)
    assert compute(gold, np.zeros(20_000, int), probabilities)["ece"] < 0.015
    assert compute(1 - gold, np.zeros(20_000, int), probabilities)["ece"] > 0.3


def test_two_way_sets_map_predictions_and_add_probabilities():
    result = compute(
        [0, 1, 1], [0, 1, 2], [[0.6, 0.2, 0.2], [0.3, 0.4, 0.3], [0.1, 0.1, 0.8]], None, TWO_WAY_LABELS, LABELS
    )
    assert result["accuracy"] == 1
    assert result["confusion"] == [[1, 0], [0, 2]]
    assert result["nll"] == pytest.approx(-(np.log(0.6) + np.log(0.7) + np.log(0.9)) / 3)
    assert result["label_mapping"]["neutral"] == result["label_mapping"]["contradiction"] == "non-entailment"


def test_two_labels_of_a_model_of_two_are_not_mapped():
    result = compute([0, 1, 1], [0, 1, 0], [[0.6, 0.4], [0.3, 0.7], [0.8, 0.2]], None, ("supported", "refuted"))
    assert (result["labels"], result["label_mapping"]) == (["supported", "refuted"], None)
    assert result["confusion"] == [[1, 0], [1, 1]]
    assert result["nll"] == pytest.approx(-(np.log(0.6) + np.log(0.7) + np.log(0.2)) / 3)
    assert result["brier"] == pytest.approx((2 * 0.4**2 + 2 * 0.3**2 + 2 * 0.8**2) / 3)


def test_five_labels():
    names, probabilities = "12345", np.full((2, 5), 0.2)
    result = compute([4, 0], [4, 1], probabilities, None, names)
    assert (np.array(result["confusion"]).shape, result["per_label"]["5"]["f1"]) == ((5, 5), 1.0)
    assert result["nll"] == pytest.approx(np.log(5))
    assert result["macro_f1"] == pytest.approx(1 / 5)


def test_a_wrong_label_that_was_certain_has_a_finite_loss():
    assert np.isfinite(compute([0], [2], [[0.0, 0.0, 1.0]])["nll"])


def test_label_mass_is_averaged():
    assert compute(GOLD, PREDICTED, mass=[0.1, 0.2, 0.3, 0.4])["label_mass"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], []), "no pairs"),
        (([0, 1], [0]), "2 gold labels but 1 predictions"),
        (([0], [0], [[0.5, 0.5]]), r"expected probabilities of shape \(1, 3\)"),
        (([0, 1], [0, 2], None, None, TWO_WAY_LABELS), "expected label ids from 0 to 1, found 0 to 2"),
        (([0], [0], None, None, ("a", "b"), LABELS), "labels of the model are entailment, .* those of the set a, b"),
    ],
)
def test_inputs_that_do_not_match_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compute(*arguments)


def test_every_metric_goes_through_the_module(monkeypatch):
    monkeypatch.setattr("nli_sft.evaluation.metrics.metrics.NLIMetrics._compute", lambda self, **given: given)
    assert compute([0], [1])["references"] == [0]


def test_evaluate_loads_the_module_from_its_folder_offline(tmp_path):
    metric = evaluate.load(str(METRICS_PATH), cache_dir=str(tmp_path))
    by_library = metric.compute(
        predictions=PREDICTED, references=GOLD, probabilities=PROBABILITIES, mass=[0.1, 0.2, 0.3, 0.4]
    )
    assert by_library == compute(GOLD, PREDICTED, PROBABILITIES, [0.1, 0.2, 0.3, 0.4])
    assert metric.compute(predictions=[0], references=[1])["accuracy"] == 0
