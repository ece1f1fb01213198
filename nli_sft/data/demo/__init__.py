"""The built-in demo: pairs about a small world, as Parquet, and a tiny base model that knows this world.

Both are data. The scripts in `recipes/demo/` made them, and make them again.
"""

from pathlib import Path

# What recipes call both: `dataset_name: demo` and `model_name_or_path: demo`. A folder of that name is `./demo`.
DEMO = "demo"
BASE_MODEL = Path(__file__).parent / "base"
PAIRS = Path(__file__).parent / "pairs"


def is_demo(name: str) -> bool:
    """Whether a model or data set is the built-in one. Recipes and runs of version 0.1 call it `scenes`."""
    return name in (DEMO, "scenes")
