"""How training was launched, and what that launcher does not support: checked before anything is loaded."""

import logging
import os

from transformers.training_args import ParallelMode
from trl import ModelConfig, SFTConfig

from .. import UserError

logger = logging.getLogger(__name__)


def launched_with(training_args: SFTConfig) -> str:
    """`one process`, `ddp`, `fsdp`, `zero2` or `zero3`: what the files in accelerate_configs/ ask for."""
    if training_args.deepspeed_plugin is not None:
        return f"zero{training_args.deepspeed_plugin.zero_stage}"
    # Before the Trainer makes its Accelerator, only the environment says that FSDP is used.
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true"):
        return "fsdp"
    return "ddp" if training_args.parallel_mode == ParallelMode.DISTRIBUTED else "one process"


def check_launch(model_args: ModelConfig, training_args: SFTConfig, precision: str) -> None:
    """Refuse a recipe that its launcher does not support, and limit one process to one GPU.

    Args:
        precision: `bf16`, `fp16` or `fp32`.

    Raises:
        UserError: naming the key, the launcher, and launchers that work.
    """
    launcher = launched_with(training_args)
    if training_args.n_gpu > 1:
        logger.warning(
            "Using 1 of %d GPUs. To use all: accelerate launch --config_file accelerate_configs/ddp.yaml "
            "--num_processes %d recipes/sft.py ...", training_args.n_gpu, training_args.n_gpu,
        )  # fmt: skip
        training_args._n_gpu = 1  # or the Trainer would split each batch by nn.DataParallel
    sharded = launcher in ("fsdp", "zero3")
    if model_args.load_in_4bit and launcher == "zero3":
        raise UserError(
            "load_in_4bit does not work with ZeRO-3, which cannot shard 4-bit weights: use fsdp2, ddp or "
            "deepspeed_zero2"
        )
    if model_args.load_in_8bit and sharded:
        raise UserError(f"load_in_8bit does not work with {launcher}, which cannot shard 8-bit weights: use ddp")
    if model_args.load_in_4bit and launcher == "fsdp":
        if precision != "bf16":
            raise UserError(
                f"load_in_4bit with FSDP needs precision bf16, so that all weights have one type, not {precision}: "
                "use ddp"
            )
        if model_args.bnb_4bit_quant_storage != "bfloat16":
            raise UserError("load_in_4bit with FSDP needs bnb_4bit_quant_storage: bfloat16, which it can shard")
    if (model_args.load_in_4bit or model_args.load_in_8bit) and not model_args.use_peft:
        raise UserError("load_in_4bit and load_in_8bit need use_peft: true: quantised weights cannot be trained")
