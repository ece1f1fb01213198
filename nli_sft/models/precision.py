"""The choice of precision: bf16 on devices that support it natively, fp16 on older GPUs, fp32 on most CPUs.

`torch.cuda.is_bf16_supported()` is not used because it counts emulation too, which is slow (on a T4, for instance).
"""

import os
from dataclasses import dataclass, replace

import torch
from trl import ModelConfig

from .. import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# Compute capabilities with bf16 (Ampere) and with fast fp16, by tensor cores (Volta).
AMPERE, VOLTA = (8, 0), (7, 0)


@dataclass(frozen=True)
class Precision:
    """The precision of computations.

    Attributes:
        name: `bf16`, `fp16` or `fp32`. The first two are mixed precision: matrix products are computed in them, while
            trained weights may be kept in fp32.
        reason: why it was chosen, for the log.
    """

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def __str__(self) -> str:
        return f"Precision: {self.name} ({self.reason})"

    def as_dict(self) -> dict[str, str]:
        return {"name": self.name, "reason": self.reason}

    def autocast(self, device: torch.device) -> torch.autocast:
        """A context in which models compute in this precision; without effect for fp32."""
        return torch.autocast(device.type, self.dtype, enabled=self.name != "fp32")

    def suit(self, model_args: ModelConfig) -> ModelConfig:
        """The model settings with a `dtype` for this precision, whatever GPU the recipe was written for.

        - A quantised base computes in its `dtype` (`bnb_4bit_compute_dtype`), which becomes this precision.
        - Frozen weights under an adapter take this precision if the recipe has them in 16 bits.
        - Weights trained in full may be bf16 with bf16. With fp16 they are fp32, because loss scaling cannot unscale
          fp16 gradients.
        """
        dtype = str(self.dtype).removeprefix("torch.")
        if model_args.load_in_4bit or model_args.load_in_8bit:
            return replace(model_args, dtype=dtype)
        if model_args.dtype in (None, "float32") or (model_args.dtype == "auto" and self.name == "bf16"):
            return model_args
        return replace(model_args, dtype=dtype if model_args.use_peft or self.name == "bf16" else "float32")


def choose_precision(wanted: str = "auto", device: torch.device | None = None) -> Precision:
    """The precision that a recipe requests, or for `auto` the device's native one.

    Args:
        wanted: `auto`, `bf16`, `fp16` or `fp32`.
        device: the one that computes; by default the one that this process would use.

    Raises:
        UserError: for fp16 on a CPU, which has no loss scaling.
    """
    device = device or default_device()
    native = native_precision(device)
    if wanted in ("auto", native.name):
        return native
    if wanted == "fp16" and device.type == "cpu":
        raise UserError("precision: fp16 needs a GPU; on a CPU use auto, bf16 or fp32")
    return Precision(wanted, f"set in the recipe; auto would be {native.name}: {native.reason}")


def native_precision(device: torch.device) -> Precision:
    """The best precision that a device supports natively, and why."""
    if device.type == "cuda":
        # All processes of a training must agree, so the oldest of their GPUs decides.
        used = min(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count())
        cards = range(used) if device.index is None else [device.index]
        capability, card = min((torch.cuda.get_device_capability(card), card) for card in cards)
        about = f"{torch.cuda.get_device_name(card)}, compute capability {capability[0]}.{capability[1]}"
        if capability >= AMPERE:
            return Precision("bf16", f"{about}, native bf16")
        if capability >= VOLTA:
            return Precision("fp16", f"{about}, no native bf16; with loss scaling")
        return Precision("fp32", f"{about}, no fast 16-bit arithmetic")
    if device.type == "xpu" and torch.xpu.is_bf16_supported():
        return Precision("bf16", "this GPU supports it natively")
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        for feature, name in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX512-bf16")):
            if capabilities.get(feature):
                return Precision("bf16", f"this CPU has {name}")
        return Precision("fp32", "this CPU has neither AMX nor AVX512-bf16")
    return Precision("fp32", f"16-bit support of {device.type} is unknown")


def default_device() -> torch.device:
    """The type of device that this process would use: an accelerator if there is one and accelerate allows it."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    accelerator = None if on_cpu else torch.accelerator.current_accelerator(check_available=True)
    return torch.device(accelerator.type if accelerator else "cpu")
