"""Fine-tuning recipes for natural language inference on Hugging Face TRL.

Importing this package is cheap: it does not import torch. Take what you need from its modules.
"""

import logging

__version__ = "0.1.0"

# On processors with bf16, importing bitsandbytes warns that it has no kernel from the Hub. It does without.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class UserError(ValueError):
    """Something that a user gave cannot be used. The message names it, and the mend; no traceback is needed."""
