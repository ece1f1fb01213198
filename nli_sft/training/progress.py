"""What a training shows while it runs: one bar, with loss and label accuracy in it."""

from transformers import ProgressCallback


class TrainingBar(ProgressCallback):
    """The Trainer's bar, with the last loss and label accuracy beside it and a line an evaluation.

    The Trainer's own writes every log above the bar, as a dict of a dozen figures. They are all in run.json, and in
    the trackers that `report_to` names.
    """

    def __init__(self):
        super().__init__()
        self.shown = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
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
