"""After every kind of interruption, training resumes to the same weights."""

import errno
import json
import os
import shutil
import signal

import pytest
import torch
import transformers
from peft import LoraConfig
from tiny import few_pairs, tiny_llama
from trl import SFTConfig

from nli_sft import UserError
from nli_sft.configs import BatchConfig
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.runs import read_run, write_run
from nli_sft.training import checkpoints
from nli_sft.training.checkpoints import MANIFEST, UNFINISHED, find_checkpoint, find_damage, is_finished
from nli_sft.training.trainer import NLITrainer

# With dropout, so that the states of the random generators matter.
LORA = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def trainer(chatml):
    """Make trainers of one run: 12 steps in 2 epochs, logged every 4, evaluated and saved every 3."""

    def make(run, peft_config=LORA, batching="trie", tied=False, **options):
        encoder = PromptEncoder(PROMPTS["plain"], chatml)
        model = tiny_llama(len(chatml))
        if tied:
            model.config.tie_word_embeddings = True
            model = type(model)(model.config)
        options = {
            "output_dir": str(run),
            "use_cpu": True,
            "bf16": False,
            "per_device_train_batch_size": 3,
            "gradient_accumulation_steps": 2,
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 4,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_steps": 3,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_accuracy",
            "report_to": "none",
            "disable_tqdm": True,
            **options,
        }
        return NLITrainer(
            encoder=encoder,
            batch_args=BatchConfig(batching=batching, max_row_tokens=128, max_batch_tokens=512),
            model=model,
            args=SFTConfig(**options),
            train_dataset=encoder.encode_rows(few_pairs(3), max_length=None),
            eval_dataset=encoder.encode_rows(few_pairs(), max_length=None),
            peft_config=peft_config,
        )

    return make


@pytest.fixture(scope="module")
def uninterrupted(trainer, tmp_path_factory):
    """The uninterrupted run."""
    run = trainer(tmp_path_factory.mktemp("uninterrupted"))
    run.train()
    return run


@pytest.fixture(scope="module")
def uninterrupted_full(trainer, tmp_path_factory):
    """The uninterrupted run with full fine-tuning."""
    run = trainer(tmp_path_factory.mktemp("full"), peft_config=None)
    run.train()
    return run


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def history(trainer):
    """The logged values, without times."""
    timed = ("runtime", "per_second", "flos")
    return [{k: v for k, v in entry.items() if not k.endswith(timed)} for entry in trainer.state.log_history]


def assert_same_run(first, second):
    assert history(first) == history(second)
    for name in ("best_global_step", "best_metric", "global_step"):
        assert getattr(first.state, name) == getattr(second.state, name), name
    assert first.trained_tokens == second.trained_tokens > 0
    both = weights(first), weights(second)
    assert all(torch.equal(value, both[1][name]) for name, value in both[0].items())


class Killed(BaseException):
    """Simulates SIGKILL, which no handler catches."""


def kill_at(run, step, event="on_step_end"):
    callback = next(c for c in run.callback_handler.callbacks if type(c).__name__ == "_Watch")
    answer = getattr(callback, event)

    def dying(args, state, control, **kwargs):
        answer(args, state, control, **kwargs)
        if state.global_step == step:
            raise Killed

    setattr(callback, event, dying)
    with pytest.raises(Killed):
        run.train()


@pytest.mark.parametrize(
    ("peft_config", "fixture"), [(LORA, "uninterrupted"), (None, "uninterrupted_full")], ids=["lora", "full"]
)
@pytest.mark.parametrize(("killed_after", "resumed_from"), [(2, None), (4, 3), (8, 6), (11, 9)])
def test_a_killed_run_resumes_to_the_same_weights(
    trainer, request, tmp_path, peft_config, fixture, killed_after, resumed_from
):
    uninterrupted = request.getfixturevalue(fixture)
    run = tmp_path / "run"
    kill_at(trainer(run, peft_config), killed_after)
    found = find_checkpoint("auto", run)
    assert found == (resumed_from and str(run / f"checkpoint-{resumed_from}"))
    resumed = trainer(run, peft_config)
    resumed.train(resume_from_checkpoint=found)
    assert_same_run(uninterrupted, resumed)


def test_a_resumed_run_reports_the_time_of_the_complete_run(trainer, tmp_path):
    kill_at(trainer(tmp_path), 8)
    manifest = tmp_path / "checkpoint-6" / MANIFEST
    progress = json.loads(manifest.read_text())["progress"]
    assert progress["seconds"] > 0
    manifest.write_text(manifest.read_text().replace(str(progress["seconds"]), "1000.0"))
    resumed = trainer(tmp_path)
    assert resumed.earlier_seconds == 0
    result = resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.earlier_seconds == 1000
    assert 1000 < result.metrics["train_runtime"] < 1100
    assert result.metrics["train_samples_per_second"] == pytest.approx(72 / 1000, rel=0.1)
    assert result.metrics["train_steps_per_second"] == pytest.approx(12 / 1000, rel=0.1)
    progress = json.loads((tmp_path / "checkpoint-12" / MANIFEST).read_text())["progress"]
    assert progress["seconds"] > 1000


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 0."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_the_error_for_a_lost_process_names_how_to_resume(trainer, tmp_path, error, lost):
    run = trainer(tmp_path)
    compute_loss = run.compute_loss

    def broken(*args, **kwargs):
        if run.state.global_step == 7:
            raise error
        return compute_loss(*args, **kwargs)

    run.compute_loss = broken
    message = "another process of this training ended after step 7 .* resume from checkpoint-6 with resume_from"
    with pytest.raises(UserError, match=message) if lost else pytest.raises(RuntimeError, match="mat1 and mat2"):
        run.train()


def test_a_run_killed_while_it_saves_has_no_partial_checkpoint(trainer, uninterrupted, tmp_path, monkeypatch):
    run = tmp_path / "run"
    first = trainer(run)
    save_rng, saved = first._save_rng_state, []

    def dying(folder):
        saved.append(folder)
        if len(saved) == 2:
            raise Killed
        save_rng(folder)

    monkeypatch.setattr(first, "_save_rng_state", dying)
    with pytest.raises(Killed):
        first.train()
    assert (run / UNFINISHED / "checkpoint-6").is_dir()
    assert not (run / "checkpoint-6").exists()
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=find_checkpoint("auto", run))
    assert not (run / UNFINISHED).exists()
    assert_same_run(uninterrupted, resumed)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
        (
            lambda folder: os.truncate(folder / "adapter_model.safetensors", 100),
            "adapter_model.safetensors has 100 bytes",
        ),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no checkpoint.json, so it may be incomplete"),
        (
            lambda folder: scramble(folder / "adapter_model.safetensors"),
            "adapter_model.safetensors has changed since it was written",
        ),
        (lambda folder: scramble(folder / "optimizer.pt"), "optimizer.pt has changed since it was written"),
        (lambda folder: os.truncate(folder / MANIFEST, 50), "its checkpoint.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text("[]"), "its checkpoint.json is damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a": 5}}'), "its checkpoint.json is damaged"),
        (
            lambda folder: (folder / MANIFEST).write_text('{"files": {}, "progress": {"metrics": {}}}'),
            "its checkpoint.json lacks last_logged_step, ",
        ),
        (lambda folder: shutil.rmtree(folder) or folder.mkdir(), "it has no trainer_state.json"),
    ],
)
def test_a_damaged_checkpoint_is_skipped_and_replaced(trainer, tmp_path, caplog, harm, reason):
    trainer(tmp_path, max_steps=6).train()
    harm(tmp_path / "checkpoint-6")
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-3")
    assert reason in caplog.text
    with pytest.raises(UserError, match=reason):
        find_checkpoint(str(tmp_path / "checkpoint-6"), tmp_path)
    trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-6")


def scramble(file):
    file.write_bytes(os.urandom(file.stat().st_size))


def test_training_does_not_restart_silently_if_all_checkpoints_are_damaged(trainer, tmp_path):
    trainer(tmp_path, max_steps=6).train()
    scramble(tmp_path / "checkpoint-3" / "optimizer.pt")
    (tmp_path / "checkpoint-6" / MANIFEST).unlink()
    flaws = "checkpoint-6: it has no .*; checkpoint-3: optimizer.pt has changed since"
    with pytest.raises(UserError, match=f"has no checkpoint to resume from: {flaws}"):
        find_checkpoint("auto", tmp_path)


def test_a_full_model_resumes_without_false_warnings(trainer, tmp_path, caplog):
    """Tied weights are one tensor with two names, and a fraction of all steps equals a number of steps."""
    options = {"logging_steps": 0.1, "save_steps": 3, "eval_steps": 0.25, "peft_config": None, "max_steps": 6}
    transformers.logging.enable_propagation()
    trainer(tmp_path, tied=True, **options).train()
    trainer(tmp_path, tied=True, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "missing keys" not in caplog.text
    assert "do not match" not in caplog.text
    other = trainer(tmp_path, tied=True, **options | {"logging_steps": 2})
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "logging_steps: 2 (from args) != 1 (from trainer_state.json)" in caplog.text, "a justified warning"
    assert other.state.logging_steps == 2, "the new value is used"
    result = other.model.load_state_dict({}, strict=False)
    other._issue_warnings_after_load(result)
    assert "missing keys in the checkpoint model loaded" in caplog.text
    transformers.logging.disable_propagation()


def test_another_learning_rate_is_used_from_the_next_step_on(trainer, tmp_path):
    options = {"logging_steps": 1, "lr_scheduler_type": "constant"}
    kill_at(trainer(tmp_path, **options), 8)
    resumed = trainer(tmp_path, **options | {"learning_rate": 1e-3})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates == [1e-2] * 6 + [1e-3] * 6


def test_a_checkpoint_is_a_run_folder(trainer, tmp_path, chatml):
    run = trainer(tmp_path, max_steps=3)
    recipe = {"model_name_or_path": "base", "dataset_name": "snli"}
    run.made_from = recipe, PROMPTS["plain"], {"model": "base", "parameters": {}, "data": {}}
    run.train()
    saved, prompt, record = read_run(tmp_path / "checkpoint-3")
    assert (saved, prompt) == (recipe, PROMPTS["plain"])
    assert record["validation"]["eval_accuracy"] == record["history"][-1]["eval_accuracy"]
    assert find_damage(tmp_path / "checkpoint-3") is None


def test_no_checkpoint_to_resume_from(tmp_path):
    assert find_checkpoint("auto", tmp_path / "new") is None
    assert find_checkpoint(None, tmp_path) is None
    with pytest.raises(
        UserError, match="resume_from_checkpoint True: it has no trainer_state.json; give a checkpoint's"
    ):
        find_checkpoint("True", tmp_path)


def test_old_checkpoints_are_deleted_except_the_best_and_the_newest(trainer, tmp_path):
    run = trainer(tmp_path, save_total_limit=2)
    run.train()
    kept = {path.name for path in tmp_path.glob("checkpoint-*")}
    assert kept == {"checkpoint-12", f"checkpoint-{run.state.best_global_step}"} | ({"checkpoint-9"} & kept)
    assert len(kept) == 2


def test_a_moved_run_folder_keeps_its_best_checkpoint(trainer, uninterrupted, tmp_path):
    kill_at(trainer(tmp_path / "here"), 11)
    shutil.move(tmp_path / "here", tmp_path / "there")
    resumed = trainer(tmp_path / "there")
    resumed.train(resume_from_checkpoint=find_checkpoint("auto", tmp_path / "there"))
    assert str(tmp_path / "there") in resumed.state.best_model_checkpoint
    assert_same_run(uninterrupted, resumed)


@pytest.mark.parametrize(
    ("number", "status", "step"),
    [(signal.SIGTERM, 143, 5), (signal.SIGTERM, 143, 6), (signal.SIGTERM, 143, 12), (signal.SIGINT, 130, 5)],
)
def test_sigterm_and_ctrl_c_save_and_exit(trainer, uninterrupted, tmp_path, caplog, monkeypatch, number, status, step):
    """In the middle of an epoch, at its end and at the last step."""
    run = tmp_path / "run"
    first = trainer(run)
    begin = first.callback_handler.callbacks[-1]
    monkeypatch.setattr("sys.argv", ["recipes/sft.py", "--config", "my recipe.yaml", "--overwrite_output_dir", "true"])

    def terminated(args, state, control, **kwargs):
        if state.global_step == step - 1:
            os.kill(os.getpid(), number)

    begin.on_step_begin = terminated
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit:
        first.train()
    assert exit.value.code == status
    assert signal.getsignal(number) == before
    name = {143: "SIGTERM", 130: "Ctrl-C"}[status]
    assert f"Stopped by {name}; step {step} is saved. Resume with: python" in caplog.text
    assert "recipes/sft.py --config 'my recipe.yaml' --resume_from_checkpoint auto" in caplog.text
    assert find_checkpoint("auto", run) == str(run / f"checkpoint-{step}")
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=find_checkpoint("auto", run))
    assert_same_run(uninterrupted, resumed)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/2"),
    ],
)
def test_a_full_disk_keeps_the_previous_checkpoint(trainer, tmp_path, monkeypatch, error):
    run = trainer(tmp_path)
    save = run._save_optimizer_and_scheduler

    def full(folder):
        if "checkpoint-6" in folder:
            monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 0))
            raise error
        save(folder)

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", full)
    with pytest.raises(
        UserError, match=r"is full: checkpoint-6 could not be written. .* resume from checkpoint-3 with"
    ):
        run.train()
    assert not (tmp_path / UNFINISHED).exists()
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-3")
    monkeypatch.undo()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=find_checkpoint("auto", tmp_path))
    assert resumed.state.global_step == 12


def test_other_errors_while_saving_are_not_reported_as_a_full_disk(trainer, tmp_path, monkeypatch):
    run = trainer(tmp_path)

    def broken(folder):
        raise RuntimeError("something else")

    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", broken)
    with pytest.raises(RuntimeError, match="something else"):
        run.train()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_or_gradient_of_nan_stops_before_the_weights_change(trainer, tmp_path, what):
    run = trainer(tmp_path)
    parameter = next(p for p in run.model.parameters() if p.requires_grad)
    compute_loss = run.compute_loss

    def broken(*args, **kwargs):
        loss = compute_loss(*args, **kwargs)
        if run.state.global_step == 7:
            return (
                loss * float("nan") if what == "loss" else loss + (parameter - parameter.detach()).abs().sum().sqrt()
            )
        return loss

    run.compute_loss = broken
    with pytest.raises(
        UserError, match=r"not a number at step 8, so training was stopped; checkpoint-6 is the last good"
    ):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-6")
    assert find_damage(tmp_path / "checkpoint-6") is None


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_out_of_memory_halves_the_micro_batches_and_repeats_the_step(trainer, tmp_path, caplog, batching):
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"max_steps": 6, "per_device_train_batch_size": 9, "logging_steps": 1, "max_grad_norm": 0.5}
    uninterrupted = trainer(tmp_path / "uninterrupted", lora, batching, **options)
    uninterrupted.train()
    run = trainer(tmp_path / "run", lora, batching, **options)
    passes, forward = [], run.model.forward

    def small_memory(*args, **kwargs):
        rows, length = kwargs["input_ids"].shape
        if run.model.training:
            passes.append(rows * length)
            # In the second micro-batch of step 3, after gradients of the first, and again at half the size.
            if len(passes) > 5 and rows > 1 and rows * length > max(passes) // 4:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(*args, **kwargs)

    run.model.forward = small_memory
    run.train()
    warnings = [message for message in caplog.messages if "Out of memory" in message]
    assert warnings
    assert all(line.startswith("Out of memory at step 3: repeating it, with at most") for line in warnings)
    assert run.trained_tokens == uninterrupted.trained_tokens
    for name in ("loss", "grad_norm", "num_tokens"):
        logged = [[e[name] for e in one.state.log_history if name in e] for one in (uninterrupted, run)]
        assert logged[1] == pytest.approx(logged[0], rel=1e-3), name
    for name, value in weights(uninterrupted).items():
        torch.testing.assert_close(run.model.get_parameter(name), value, rtol=1e-3, atol=2e-4)


def test_out_of_memory_with_a_single_row_suggests_a_fix(trainer, tmp_path):
    run = trainer(tmp_path, per_device_train_batch_size=2, save_steps=1, eval_steps=1)
    forward = run.model.forward

    def no_memory(*args, **kwargs):
        if run.state.global_step == 2 and run.model.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(*args, **kwargs)

    run.model.forward = no_memory
    with pytest.raises(
        UserError, match=r"out of memory at step 3, with 1 x \d+ tokens in a pass: resume with resume_from"
    ):
        run.train()
    assert find_checkpoint("auto", tmp_path) == str(tmp_path / "checkpoint-2")


def test_a_dead_worker_is_reported_and_the_run_resumes(trainer, uninterrupted, tmp_path):
    run = tmp_path / "run"
    first = trainer(run, dataloader_num_workers=1)
    collate = first.data_collator

    class Dying:
        def __call__(self, rows):
            if (run / "checkpoint-3").exists() and os.getpid() != main:
                os.kill(os.getpid(), signal.SIGKILL)
            return collate(rows)

    main = os.getpid()
    first.data_collator = Dying()
    with pytest.raises(UserError, match=r"a data loader worker died after step \d+, .*out \(.+\): resume with"):
        first.train()
    resumed = trainer(run, dataloader_num_workers=1)
    resumed.train(resume_from_checkpoint=find_checkpoint("auto", run))
    assert_same_run(uninterrupted, resumed)


def test_an_error_in_a_worker_is_not_reported_as_a_dead_worker(trainer, tmp_path):
    run = trainer(tmp_path, dataloader_num_workers=1)

    def broken(rows):
        raise RuntimeError("the packing failed")

    run.data_collator = broken
    with pytest.raises(RuntimeError, match="the packing failed"):
        run.train()


def test_a_finished_run_resumes_for_more_epochs(trainer, tmp_path):
    trainer(tmp_path).train()
    more = trainer(tmp_path, num_train_epochs=3)
    more.train(resume_from_checkpoint=find_checkpoint("auto", tmp_path))
    assert (more.state.global_step, more.state.epoch) == (18, 3)


def test_is_finished_compares_the_recipe(tmp_path):
    recipe = {"model_name_or_path": "base", "dataset_name": "snli", "num_train_epochs": 2}
    assert not is_finished(tmp_path, recipe)
    write_run(tmp_path, recipe=recipe, prompt=PROMPTS["plain"], record={})
    assert is_finished(tmp_path, recipe | {"resume_from_checkpoint": "auto"})
    assert not is_finished(tmp_path, recipe | {"num_train_epochs": 3})


def test_a_checkpoint_lists_its_files(trainer, tmp_path):
    trainer(tmp_path, max_steps=3).train()
    manifest = json.loads((tmp_path / "checkpoint-3" / MANIFEST).read_text())
    names = set(manifest["files"])
    assert {
        "adapter_model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
    } <= names
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "checkpoint-3"), "not the temporary name"


def test_a_step_skipped_by_loss_scaling_is_no_error(trainer, tmp_path):
    """GradScaler's first scale may be too large. A CPU scaler stands in for that of a GPU."""
    run = trainer(tmp_path, logging_steps=1, max_grad_norm=1.0)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    # accelerate unscales gradients for fp16 only, which it refuses on a CPU.
    run.accelerator.unscale_gradients = lambda: run.accelerator.scaler.unscale_(run.optimizer.optimizer)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss_scale" in entry]
    assert len(logged) == 12
    skipped = [entry for entry in logged if "grad_norm" not in entry]
    assert 0 < len(skipped) < 12
    assert logged[-1]["loss_scale"] < 2.0**127
    json.dumps(run.state.log_history, allow_nan=False)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert (tmp_path / "checkpoint-12" / "scaler.pt").is_file()


def test_a_checkpoint_without_the_optimizer_is_refused(trainer, tmp_path):
    run = trainer(tmp_path, max_steps=3, save_only_model=True, load_best_model_at_end=True)
    run.train()
    assert find_damage(tmp_path / "checkpoint-3") == "it was written with save_only_model, without the optimizer"
    with pytest.raises(
        UserError, match="no checkpoint to resume from: checkpoint-3: it was written with save_only_model"
    ):
        find_checkpoint("auto", tmp_path)
