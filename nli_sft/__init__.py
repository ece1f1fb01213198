"""Fine-tuning recipes for natural language inference on Hugging Face TRL.

Importing this package is cheap: it does not import torch. Take what you need from its modules.
"""

__version__ = "0.1.0.dev0"


class UserError(ValueError):
    """Something that a user gave cannot be used. The message names it, and the mend; no traceback is needed."""
