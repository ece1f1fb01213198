"""The built-in demo: generated pairs as Parquet, and a tiny base model for them.

The scripts in `recipes/demo/` generate both.
"""

from pathlib import Path

# The name of both in recipes: `dataset_name: demo`, `model_name_or_path: demo`. A folder of that name is `./demo`.
DEMO = "demo"
BASE_MODEL = Path(__file__).parent / "base"
PAIRS = Path(__file__).parent / "pairs"


def is_demo(name: str) -> bool:
    """Whether a model or data set is the built-in one. Recipes and runs of version 0.1 call it `scenes`."""
    return name in (DEMO, "scenes")
