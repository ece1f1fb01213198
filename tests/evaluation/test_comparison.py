import numpy as np
import pytest

from nli_sft.evaluation.comparison import (
    MIN_PAIRS_TO_CHOOSE,
    accuracy_interval,
    bootstrap_interval,
    buckets,
    change_p_value,
    choice_warning,
    compare,
    design_effect,
    headline,
    mcnemar,
    points,
    smallest_difference,
)

GOLD = np.array([0, 1, 2, 0, 1, 2])
BEFORE = np.array([0, 0, 0, 0, 0, 0])  # right on the first and the fourth
AFTER = np.array([0, 1, 2, 1, 0, 1])  # right on the first three


def test_buckets_are_counted():
    c = compare(GOLD, BEFORE, AFTER, list("aabbcc"))
    assert (c.both_right, c.fixed, c.regressed, c.both_wrong) == (1, 2, 1, 2)
    assert (c.pairs, c.premises) == (6, 3)
    assert (c.before, c.after, c.difference) == (2 / 6, 3 / 6, pytest.approx(1 / 6))
    assert c.agreement == 2 / 6  # the first and the fifth answer are the same
    assert list(buckets(GOLD, BEFORE, AFTER)) == [
        "both_right",
        "fixed",
        "fixed",
        "regressed",
        "both_wrong",
        "both_wrong",
    ]


def test_names_and_ids_give_the_same_comparison():
    names = np.array(["entailment", "neutral", "contradiction"])
    assert compare(names[GOLD], names[BEFORE], names[AFTER], list("aabbcc")) == compare(
        GOLD, BEFORE, AFTER, list("aabbcc")
    )


def test_mcnemar_is_exact():
    # Of 5 changed pairs, 5 fixed: 2 · (1/2)^5. Of 6, 5 fixed: 2 · (1 + 6) / 64.
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    assert mcnemar(5, 1) == mcnemar(1, 5) == pytest.approx(14 / 64)
    assert mcnemar(0, 0) == 1
    assert mcnemar(3, 3) == 1


def test_the_bootstrap_draws_whole_premises():
    # One premise of three fixed pairs, one of three pairs that stay: a draw of two premises is 0, 1/2 or 1 (1/4, 1/2,
    # 1/4). Pairs drawn one by one would nearly never give 0 or 1.
    low, high = bootstrap_interval(np.array([1, 1, 1, 0, 0, 0]), np.array([0, 0, 0, 1, 1, 1]))
    assert (low, high) == (0, 1)


def test_the_bootstrap_allows_groups_of_different_size():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(60), rng.integers(1, 5, 60))
    values = rng.choice([0, 1, 1, 1], len(groups))  # a mean far from zero, so that the divisor matters
    drawn = []
    for _ in range(4_000):  # computed directly
        chosen = rng.integers(0, 60, 60)
        rows = np.concatenate([np.flatnonzero(groups == group) for group in chosen])
        drawn.append(values[rows].mean())
    expected = np.quantile(drawn, [0.025, 0.975])
    assert bootstrap_interval(values, groups, resamples=20_000) == pytest.approx(expected, abs=0.015)


def test_the_interval_has_its_nominal_coverage():
    # Pairs of a premise are correlated; intervals that treat pairs as independent would cover about 80 %.
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(150), 3)
    truth, covered, covered_by_pair = 0.2, 0, 0
    for seed in range(400):
        chance = rng.choice([0.2, 1.0], 150)  # that a pair is fixed and not regressed, by premise
        values = np.where(rng.uniform(size=450) < np.repeat(chance, 3), 1, -1)
        low, high = bootstrap_interval(values, groups, resamples=500, seed=seed)
        covered += low <= truth <= high
        low, high = bootstrap_interval(values, np.arange(450), resamples=500, seed=seed)
        covered_by_pair += low <= truth <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert covered_by_pair / 400 < 0.90


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(2)
    gold, before, after = rng.integers(0, 3, (3, 300))
    premises = np.repeat(np.arange(100), 3)
    first = compare(gold, before, after, premises)
    assert first == compare(gold, before, after, premises)
    assert first.interval != compare(gold, before, after, premises, seed=1).interval


def test_pairs_that_are_not_the_same_are_refused():
    with pytest.raises(ValueError, match="not the same pairs"):
        compare(GOLD, BEFORE, AFTER[:-1], list("aabbcc"))
    with pytest.raises(ValueError, match="no pairs"):
        compare([], [], [], [])


def outcome(fixed, regressed, same, premises=None):
    """A comparison with these numbers of pairs fixed, regressed, and right both times."""
    n = fixed + regressed + same
    gold = np.zeros(n, int)
    before, after = np.zeros(n, int), np.zeros(n, int)
    before[:fixed] = 1
    after[fixed : fixed + regressed] = 1
    return compare(gold, before, after, np.arange(n) if premises is None else np.arange(n) % premises)


def test_the_headline_claims_what_the_interval_allows():
    assert headline(outcome(60, 10, 30)).startswith("Tuning raised accuracy from 40.0% to 90.0% on 100 pairs: +50.0")
    assert headline(outcome(10, 60, 30)).startswith("Tuning lowered accuracy from 90.0% to 40.0% on 100 pairs: −50.0")
    unsure = headline(outcome(11, 10, 79))
    assert unsure.startswith("No difference can be claimed")
    assert "+1.0 points" in unsure
    assert "includes zero" in unsure
    assert "changed nothing" in headline(outcome(0, 0, 50))


def test_the_headline_claims_nothing_on_few_premises():
    sentence = headline(outcome(60, 0, 40, premises=19))
    assert sentence.startswith("Too few to claim a difference")
    assert "19 different premises" in sentence
    assert headline(outcome(60, 0, 40, premises=20)).startswith("Tuning raised")


def test_points_are_signed():
    assert [points(x) for x in (0.1234, -0.1234, 0, -0.00001)] == ["+12.3", "−12.3", "0.0", "0.0"]


@pytest.mark.parametrize(("pairs", "share"), [(1_000, 0.2), (400, 0.5)])
def test_the_smallest_difference_is_detected_four_times_in_five(pairs, share):
    """Against a simulation: changed pairs are drawn with that true difference, and tested."""
    difference = smallest_difference(pairs, round(pairs * share))
    rng = np.random.default_rng(0)
    fixed = (share + difference) / 2
    drawn = rng.multinomial(pairs, [fixed, share - fixed, 1 - share], size=2_000)
    found = np.mean([mcnemar(int(f), int(b)) < 0.05 for f, b, _ in drawn])
    assert found == pytest.approx(0.8, abs=0.04)  # the exact test is slightly more conservative than the formula
    assert smallest_difference(4 * pairs, round(4 * pairs * share)) == pytest.approx(difference / 2, rel=0.1)
    assert smallest_difference(pairs, round(pairs * share), design_effect=4) > 1.8 * difference


@pytest.mark.parametrize("together", [0, 0.5, 1])
def test_the_smallest_difference_matches_the_power_of_the_clustered_test(together):
    """In a share `together` of premises, all three pairs change alike; power is measured with the test itself."""
    rng = np.random.default_rng(0)
    groups, share = np.repeat(np.arange(300), 3), 0.2

    def draw(difference):
        p = [(share - difference) / 2, 1 - share, (share + difference) / 2]
        alike, own = (rng.choice([-1, 0, 1], p=p, size=(300, size)) for size in (1, 3))
        return np.where(rng.random((300, 1)) < together, alike, own).ravel()

    effect = np.mean([max(1, design_effect(draw(0), groups)) for _ in range(30)])
    difference = smallest_difference(900, 180, design_effect=effect)
    found = np.mean([change_p_value(draw(difference), groups) < 0.05 for _ in range(400)])
    assert found == pytest.approx(0.8, abs=0.05)


def test_with_few_changed_pairs_no_difference_is_detectable():
    assert smallest_difference(10_000, 3) is None
    assert smallest_difference(100, 0) is None


def test_the_design_effect_of_identical_values_is_the_group_size():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(2_000), 3)
    assert design_effect(rng.integers(-1, 2, 6_000), groups) == pytest.approx(1, abs=0.1)
    assert design_effect(np.repeat(rng.integers(-1, 2, 2_000), 3), groups) == pytest.approx(3)
    assert design_effect(np.zeros(6_000), groups) == 1


def test_a_validation_set_too_small_to_choose_a_checkpoint_gets_a_warning():
    assert choice_warning(MIN_PAIRS_TO_CHOOSE) is None
    warning = choice_warning(60)
    assert warning.startswith("Warning: 60 validation pairs are too few to choose a checkpoint reliably")
    low, high = accuracy_interval(0.8, 60)
    assert (low, high) == pytest.approx((0.682, 0.882), abs=0.001)
    assert f"{low:.0%} to {high:.0%}" in warning
    assert accuracy_interval(1.0, 60)[1] == pytest.approx(1)
