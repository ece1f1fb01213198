import itertools
import threading
import time

import pytest
import torch
from peft import LoraConfig
from tiny import few_pairs, tiny_llama
from tiny_trainer import LORA, logged, trainer
from trl import SFTConfig

from nli_sft import UserError, graph
from nli_sft.data.prompts import PROMPTS, PromptEncoder
from nli_sft.evaluation.scoring import score_prompts, scoring_graphs
from nli_sft.graph import prefetch
from nli_sft.training.batches import TokenRows, TrieCollator
from nli_sft.training.trainer import NLITrainer


@pytest.fixture
def recorded(monkeypatch):
    """Run graph code on a CPU without recording. Returns the functions that would be recorded."""
    functions = []

    def record(function, pool):
        functions.append(function)
        return function

    monkeypatch.setattr(graph, "record", record)
    monkeypatch.setattr(NLITrainer, "_why_no_graphs", lambda self: None)
    return functions


def fields(**options):
    return {"optim": "adamw_torch_fused", "max_steps": 6, "logging_steps": 2, **options}


@pytest.mark.parametrize(
    ("peft_config", "batch_options", "options"),
    [
        (LORA, {}, {}),
        (None, {"max_batch_tokens": 128}, {}),
        (None, {}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (None, {}, {"max_grad_norm": 0.0}),
        (None, {}, {"optim": "adamw_torch"}),
        (None, {}, {"loss_type": "dft"}),
    ],
    ids=["lora", "micro-batches", "accumulated", "not clipped", "update not recorded", "dft"],
)
def test_training_is_the_same_with_and_without_graphs(
    chatml, tmp_path, monkeypatch, recorded, peft_config, batch_options, options
):
    """Same losses, gradient norms, metrics and token counts, and the same weights at the end."""
    graphs = trainer(chatml, tmp_path, peft_config=peft_config, batch_options=batch_options, **fields(**options))
    graphs.train()
    assert len(recorded) > 1
    plain = trainer(
        chatml,
        tmp_path,
        peft_config=peft_config,
        batch_options={**batch_options, "cuda_graph": "false"},
        **fields(**options),
    )
    plain.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate"):
        assert logged(graphs, key) == pytest.approx(logged(plain, key), rel=1e-3), key
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(graphs.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-4)
    assert torch.optim.AdamW.step is type(graphs.optimizer.optimizer).step
    assert graphs.optimizer.optimizer.step.__func__ is plain.optimizer.optimizer.step.__func__  # given back


def test_training_with_graphs_resumes_to_the_same_weights(chatml, tmp_path, recorded):
    options = fields(save_strategy="steps", save_steps=3)
    uninterrupted = trainer(chatml, tmp_path / "uninterrupted", **options)
    uninterrupted.train()
    again = trainer(chatml, tmp_path / "uninterrupted", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "uninterrupted" / "checkpoint-3"))
    for name, parameter in uninterrupted.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), parameter), name


def test_a_nan_loss_is_noticed_at_the_next_log_and_changes_no_weights(chatml, tmp_path, recorded):
    run = trainer(chatml, tmp_path, **fields(max_steps=8, logging_steps=4, learning_rate=1e-3))
    weights = []
    compute = run._trie_loss

    def sometimes_nan(model, part, labelled):
        weights.append({name: value.clone() for name, value in model.named_parameters()})
        loss, figures = compute(model, part, labelled)
        return (loss * float("nan") if run.state.global_step == 5 else loss), figures

    run._trie_loss = sometimes_nan
    with pytest.raises(UserError, match="not a number at step 6, .* there is no checkpoint yet"):
        run.train()
    assert run.state.global_step == 8
    for name, value in run.model.named_parameters():
        assert torch.equal(value, weights[5][name])  # as before step 6


def test_training_continues_without_graphs_if_recording_fails(chatml, tmp_path, monkeypatch, recorded, caplog):
    def refuse(function, pool):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph, "record", refuse)
    run = trainer(chatml, tmp_path, **fields())
    run.train()
    assert "without CUDA graphs: the step cannot be recorded (operation not permitted when stream" in caplog.text
    plain = trainer(chatml, tmp_path, batch_options={"cuda_graph": "false"}, **fields())
    plain.train()
    assert logged(run, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    insisting = trainer(chatml, tmp_path, batch_options={"cuda_graph": "true"}, **fields())
    with pytest.raises(UserError, match="cuda_graph: true is not possible: operation not permitted"):
        insisting.train()


def test_out_of_memory_drops_the_graphs_and_repeats_the_step_in_micro_batches(chatml, tmp_path, recorded, caplog):
    options = fields(per_device_train_batch_size=16, max_steps=4)
    run = trainer(chatml, tmp_path, **options)
    compute = run._trie_loss
    sizes = []

    def limited(model, part, labelled):
        if run.state.global_step >= 2 and part["input_ids"].numel() > 300:
            raise RuntimeError("CUDA out of memory.")
        sizes.append(part["input_ids"].numel())
        return compute(model, part, labelled)

    run._trie_loss = limited
    run.train()
    assert "Out of memory at step" in caplog.text
    assert max(sizes[:2]) > 300
    plain = trainer(chatml, tmp_path, batch_options={"cuda_graph": "false"}, **options)
    plain.train()
    assert logged(run, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)
    assert logged(run, "num_tokens") == logged(plain, "num_tokens")


def test_padding_a_pass_does_not_change_its_loss(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    rows = list(TokenRows(encoder.encode_rows(few_pairs(3), max_length=None), encoder.answers))
    (part,) = TrieCollator(encoder.answers, 160, 10**6, weights=[0.5, 1.5, 1.0])(rows)["micro_batches"]
    own = {name: part[name] for name in graph.PASS_TENSORS}
    shape = graph.pass_shape(own, (1, 256))
    padded = graph.pad_pass(own, shape)
    assert shape[1] == 256
    assert padded["input_ids"].shape == shape[:2]
    assert len(padded["predict"]) == shape[2] > len(part["predict"])
    assert graph.pass_shape(padded, (1, 256)) == shape
    assert graph.pad_pass(padded, shape)["exit"] is padded["exit"]  # padded only once
    model = tiny_llama(len(chatml))
    run = NLITrainer.__new__(NLITrainer)
    run.model, run.args = model, SFTConfig(output_dir="unused", use_cpu=True, bf16=False, report_to="none")
    results = []
    for tensors in (own, padded):
        model.zero_grad()
        loss, figures = run._trie_loss(model, tensors, 36.0)
        loss.backward()
        results.append((loss, figures, [parameter.grad.clone() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    torch.testing.assert_close(results[0][2], results[1][2], rtol=1e-4, atol=1e-6)


def test_lengths_are_rounded_up_to_few_shapes():
    rounded = [graph.round_up(count) for count in range(1, 65)]
    assert rounded[:8] == list(range(1, 9))
    assert all(count <= up <= count * 9 / 8 + 1 for count, up in zip(range(1, 65), rounded, strict=True))
    assert len(set(rounded)) == 8 + 8 * 3
    rows = {"input_ids": torch.zeros(3, 300), "predict": torch.zeros(70)}
    assert graph.pass_shape(rows, (1, 256)) == (3, 384, 96)  # a pair longer than a row
    assert graph.pass_shape(rows, (4, 512)) == (4, 512, 96)
    assert graph.pass_shape(rows, (5, 512)) == (3, 512, 96)  # too much padding


@pytest.mark.parametrize("wanted", ["auto", "true"])
def test_a_cpu_trains_without_graphs_unless_they_are_required(chatml, tmp_path, caplog, wanted):
    if wanted == "true":
        with pytest.raises(UserError, match="cuda_graph: true is not possible: the device is cpu"):
            trainer(chatml, tmp_path, batch_options={"cuda_graph": wanted})
    else:
        assert not trainer(chatml, tmp_path, batch_options={"cuda_graph": wanted})._use_graphs
        assert "graph" not in caplog.text


def test_prefetching_keeps_the_order_of_items_and_errors():
    made = []

    def items():
        for number in range(10):
            made.append(number)
            yield number
        raise ValueError("the end of it")

    ahead = prefetch(items(), ahead=3)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 4 <= len(made) <= 5
    assert list(zip(range(9), ahead, strict=False))[-1] == (8, 9)
    with pytest.raises(ValueError, match="the end of it"):
        next(ahead)


def test_the_prefetching_thread_ends_with_its_consumer():
    before = threading.active_count()
    ahead = prefetch(itertools.count(), ahead=1)
    next(ahead)
    ahead.close()
    assert threading.active_count() == before


GPU = {"use_cpu": False, "optim": "adamw_torch_fused", "max_steps": 12, "logging_steps": 1}


def losses_of_one_batch(chatml, tmp_path, dropout, **options):
    """Losses of steps on one batch with a learning rate of 0, which differ only by random numbers."""
    lora = LoraConfig(
        r=4, lora_dropout=dropout, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM"
    )  # a new adapter adds 0, which dropout cannot change
    fixed = {"learning_rate": 1e-12, "gradient_checkpointing": False, "logging_steps": 1}
    run = trainer(
        chatml,
        tmp_path,
        model=tiny_llama(len(chatml)).eval(),  # as after loading
        peft_config=lora,
        batch_options={"cuda_graph": "true"},
        **options | fixed | {"per_device_train_batch_size": 36},
    )
    run.train()
    return logged(run, "loss")


@pytest.mark.parametrize(
    ("dropout", "options", "different"),
    [(0.0, {}, 1), (0.5, {}, 6), (0.0, {"neftune_noise_alpha": 20.0}, 6)],
    ids=["nothing random", "dropout", "NEFTune"],
)
def test_the_base_is_in_training_mode(chatml, tmp_path, recorded, dropout, options, different):
    assert len(set(losses_of_one_batch(chatml, tmp_path, dropout, **fields(**options)))) == different


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("peft_config", "batch_options", "options"),
    [
        (None, {}, {}),
        (LORA, {}, {}),
        (None, {"max_batch_tokens": 128}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}),
        (None, {}, {"gradient_checkpointing": True}),
        (None, {}, {"torch_compile": True, "tf32": False}),  # which it would turn on
        (LORA, {}, {"torch_compile": True, "tf32": False}),
    ],
    ids=["full", "lora", "parts and accumulation", "checkpointing", "compiled", "lora, compiled"],
)
def test_recorded_steps_train_as_eager_ones_do(chatml, tmp_path, peft_config, batch_options, options):
    """On a GPU in float32: the same losses, gradient norms and weights."""
    runs = {}
    for wanted in ("true", "false"):
        given = {**batch_options, "cuda_graph": wanted}
        runs[wanted] = trainer(
            chatml, tmp_path, peft_config=peft_config, batch_options=given, **GPU, **options, learning_rate=1e-3
        )
        runs[wanted].train()
    for key in ("loss", "grad_norm"):
        assert logged(runs["true"], key) == pytest.approx(logged(runs["false"], key), rel=1e-3), key
    for name, parameter in runs["false"].model.named_parameters():
        torch.testing.assert_close(runs["true"].model.get_parameter(name), parameter, rtol=1e-2, atol=2e-4)
    assert runs["true"].evaluate()["eval_loss"] == pytest.approx(runs["false"].evaluate()["eval_loss"], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dropout", "options"), [(0.5, {}), (0.0, {"neftune_noise_alpha": 20.0})], ids=["dropout", "NEFTune"]
)
def test_every_replay_draws_new_random_numbers(chatml, tmp_path, dropout, options):
    assert len(set(losses_of_one_batch(chatml, tmp_path, dropout, **GPU, **options)[4:])) == 8


@pytest.mark.gpu
def test_a_step_that_synchronizes_is_trained_without_graphs(chatml, tmp_path, caplog):
    options = GPU | {"learning_rate": 1e-3}
    run = trainer(chatml, tmp_path, **options)
    compute = run._trie_loss
    run._trie_loss = lambda *args: (lambda loss, figures: (loss * (1 if loss.item() else 2), figures))(*compute(*args))
    run.train()
    assert "without CUDA graphs: the step cannot be recorded" in caplog.text
    assert run.state.global_step == 12
    plain = trainer(chatml, tmp_path, batch_options={"cuda_graph": "false"}, **options)
    plain.train()
    assert logged(run, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_scores_are_the_same_with_and_without_graphs(chatml, compiled):
    torch.backends.cuda.matmul.allow_tf32 = False  # which SFTConfig turns on for torch_compile
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    pairs = few_pairs(6)
    prompts = encoder.encode(pairs["premise"], pairs["hypothesis"])
    model = tiny_llama(len(chatml)).cuda()
    options = {"batch_size": 8, "max_row_tokens": 256}
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    plain, graphs = scoring_graphs(model, 8, 256), scoring_graphs(model, 8, 256, compiled)
    plain._gave_up = True  # the same shapes, never recorded

    def assert_same_scores():
        expected = score_prompts(model, prompts, encoder.answers, 0, **options, graphs=plain)
        scores = score_prompts(model, prompts, encoder.answers, 0, **options, graphs=graphs)
        torch.testing.assert_close(scores.log_probs, expected.log_probs, rtol=1e-4, atol=1e-5)

    assert_same_scores()
    assert_same_scores()
    assert graphs._passes
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert_same_scores()  # graphs read the current weights
