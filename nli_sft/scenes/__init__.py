"""The built-in offline source: pairs about scenes of a small world, and the tiny base model that grew up in it."""

from itertools import islice, zip_longest
from pathlib import Path

from .pairs import draw_pairs

# What recipes call both: `dataset_name: scenes` and `model_name_or_path: scenes`.
SCENES = "scenes"
SPLIT_SIZES = {"train": 24_000, "dev": 1_000, "test": 2_000}
BASE_MODEL = Path(__file__).parent / "base"


def generate_pairs(split: str, n: int | None = None, seed: int = 0) -> list[dict]:
    """Labelled pairs of one split, about three a premise.

    Args:
        split: `train`, `dev` or `test`; no two of them share a scene. Every other premise of `test` is hard: it
            combines what train and dev never combine.
        n: how many pairs; `SPLIT_SIZES` says how many by default.
        seed: another seed gives other scenes of the same split.

    Returns:
        Dicts with uid, premise, hypothesis, label (its name), rule (what the hypothesis is about) and hard.
    """
    n = SPLIT_SIZES[split] if n is None else n
    n_hard = n // 2 if split == "test" else 0
    pairs = list(islice(draw_pairs(split, seed), n - n_hard))
    if n_hard:
        hard = list(islice(draw_pairs(split, seed, hard=True), n_hard))
        # Easy and hard premises take turns, so that any part of the split has both.
        easy_and_hard = zip_longest(batched(pairs, 3), batched(hard, 3), fillvalue=())
        pairs = [pair for turn in easy_and_hard for premise in turn for pair in premise]
    return [{"uid": f"scenes-{split}-{seed}-{number}", **pair} for number, pair in enumerate(pairs)]


def batched(pairs: list[dict], size: int) -> list[list[dict]]:
    """The pairs in runs of `size`: itertools.batched comes with Python 3.12 only."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
