from transformers import TrainerControl, TrainerState, TrainingArguments

from nli_sft.training.progress import TrainingBar


def test_evaluations_are_printed_and_training_metrics_shown_in_the_bar(tmp_path, capsys):
    bar, arguments = TrainingBar(), TrainingArguments(output_dir=tmp_path, use_cpu=True)
    state, control = TrainerState(max_steps=20), TrainerControl()
    bar.on_log(arguments, state, control, logs={"eval_accuracy": 0.1, "eval_loss": 2.0})  # evaluated without training
    bar.on_train_begin(arguments, state, control)
    bar.on_log(arguments, state, control, logs={"eval_accuracy": 1 / 3, "eval_loss": 2.5, "eval_ece": 0.1})
    state.global_step = 10
    bar.on_log(arguments, state, control, logs={"loss": 0.25, "learning_rate": 1e-3})
    shown = str(bar.training_bar)
    bar.on_train_end(arguments, state, control)
    assert capsys.readouterr().out == "step  0: label accuracy on validation  33.3%, loss 2.500\n"
    assert "accuracy=33.3%, loss=0.250" in shown
