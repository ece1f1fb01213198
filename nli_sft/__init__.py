"""Fine-tuning recipes for natural language inference on Hugging Face TRL.

Importing this package is cheap: it imports torch only when you ask for `nli_sft.NLIClassifier`.
"""

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .classifier import NLIClassifier

__all__ = ["NLIClassifier", "UserError"]

__version__ = "0.1.0"

# On processors with bf16, importing bitsandbytes warns that it has no kernel from the Hub. It does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class UserError(ValueError):
    """Something that a user gave cannot be used. The message names it and the fix, so no traceback is needed."""


def __getattr__(name: str):
    if name == "NLIClassifier":
        from .classifier import NLIClassifier

        return NLIClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
