"""The progress bar of training, with loss and label accuracy."""

from transformers import ProgressCallback


class TrainingBar(ProgressCallback):
    """The Trainer's bar with the latest loss and label accuracy, and a line for each evaluation.

    The Trainer's own prints every log as a dict of a dozen figures. They are all in run.json, and in the trackers that
    `report_to` names.
    """

    def __init__(self):
        super().__init__()
        self.shown = {}

    def on_log(self, args, state, control, logs: dict[str, float], **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        if self.training_bar is None:
            return
        if "loss" in logs:
            self.shown["loss"] = f"{logs['loss']:.3f}"
        if "eval_accuracy" in logs:
            self.shown["accuracy"] = f"{logs['eval_accuracy']:.1%}"
            step = f"step {state.global_step:{len(str(state.max_steps))}}"
            self.training_bar.write(
                f"{step}: label accuracy on validation {logs['eval_accuracy']:6.1%}, loss {logs['eval_loss']:.3f}"
            )
        self.training_bar.set_postfix(self.shown)
