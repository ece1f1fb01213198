import numpy as np
import pytest
import torch
from peft import LoraConfig
from sklearn.utils.class_weight import compute_class_weight
from tiny import CHATML, CLAIMS, DOCUMENT, chatml_tokenizer, few_pairs, tiny_llama
from tiny_bases import make_base
from tiny_trainer import LORA, logged, trainer
from torch.utils.data import BatchSampler
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from trl import ModelConfig, SFTConfig

from nli_sft import UserError
from nli_sft.configs import BatchConfig
from nli_sft.configs.keys import METRICS, field_values, refuse_keys
from nli_sft.data.prompts import PROMPTS, PromptEncoder, load_prompt
from nli_sft.data.sources import pairs_dataset
from nli_sft.evaluation.scoring import generate_labels
from nli_sft.labels import LABELS
from nli_sft.models.loading import apply_template, load_model, load_tokenizer
from nli_sft.training.batches import GroupShuffleSampler, ShardedBatchSampler, TokenRows, TrieCollator, class_weights
from nli_sft.training.trainer import NLITrainer


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}, {"gradient_checkpointing": False}],
    ids=["plain", "accumulated", "no checkpointing"],
)
def test_tries_train_as_padded_batches_do(chatml, tmp_path, peft_config, options):
    """Same losses, gradient norms and token counts at every step, and the same weights at the end."""
    both = {}
    for batching in ("trie", "padded"):
        both[batching] = trainer(chatml, tmp_path, batching=batching, peft_config=peft_config, **options)
        both[batching].train()
    for key in ("loss", "grad_norm", "mean_token_accuracy"):
        assert logged(both["trie"], key) == pytest.approx(logged(both["padded"], key), rel=2e-3), key
    # The last token of an answer is not fed to a trie.
    fewer = [
        padded - trie
        for trie, padded in zip(*(logged(both[b], "num_tokens") for b in ("trie", "padded")), strict=True)
    ]
    assert fewer == [8, 16, 24]
    for name, parameter in both["trie"].model.named_parameters():
        torch.testing.assert_close(parameter, both["padded"].model.get_parameter(name), rtol=1e-3, atol=2e-4)


WEIGHTS = [0.25, 2.0, 0.75]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"batching": "padded"},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2, "batching": "padded"},
        {"batch_options": {"max_batch_tokens": 128}},
    ],
    ids=["trie", "padded", "accumulated", "accumulated and padded", "in parts"],
)
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_class_weights_multiply_the_loss_of_each_pair(chatml, tmp_path, options, loss_type):
    """The gradient of a step of 8 pairs is that of the weighted losses of the pairs, computed one by one."""
    model = tiny_llama(len(chatml))
    options = {"loss_type": loss_type, "max_steps": 1, "max_grad_norm": 0.0, **options}
    options |= {"prompt": load_prompt("plain", ["yes", "unclear", "certainly not"]), "class_weights": WEIGHTS}
    run = trainer(chatml, tmp_path, model=model, optim="sgd", learning_rate=1.0, **options)
    rows = [run.train_dataset[index] for index in list(run._get_train_sampler())[:8]]
    answers = run.encoder.answers
    assert len({len(answer) for answer in answers}) > 1, "labels of different length"
    expected, tokens = tiny_llama(len(chatml)), 0
    for row in rows:
        answer = [token for token in row["labels"] if token != -100]
        logits = expected(torch.tensor([row["input_ids"]])).logits[0, -len(answer) - 1 : -1]
        chosen = logits.log_softmax(-1)[range(len(answer)), answer]
        chosen = chosen * chosen.detach().exp() if loss_type == "dft" else chosen
        (-WEIGHTS[answers.index(answer)] * chosen.sum()).backward()
        tokens += len(answer)
    run.train()
    for name, parameter in model.named_parameters():
        start = expected.get_parameter(name)
        torch.testing.assert_close(parameter, start - start.grad / tokens, rtol=1e-4, atol=1e-5)


def test_class_weights():
    gold = np.array([0] * 6 + [1] * 3 + [2])
    labels = ("a", "b", "c")
    assert class_weights(None, gold, labels) is None
    balanced = class_weights(["balanced"], gold, labels)
    assert balanced == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=gold))
    given = class_weights(["1", "2", "4"], gold, labels)
    assert given == pytest.approx(np.array([1, 2, 4]) * 10 / (6 + 6 + 4))
    for weights in (balanced, given):
        assert np.mean([weights[label] for label in gold]) == pytest.approx(1)
    assert class_weights(["balanced"], gold[:9], labels)[:2] == pytest.approx([9 / (2 * 6), 9 / (2 * 3)])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["1", "2"], "class_weights has 2 entries; give balanced, or one each for a, b, c"),
        (["1", "2", "0"], "class_weights: '0' is not a number above 0"),
        (["1", "2", "inf"], "class_weights: 'inf' is not a number above 0"),
        (["1", "2", "nan"], "class_weights: 'nan' is not a number above 0"),
        (["even"], "class_weights: 'even' is not a number above 0; give balanced, or a number for each label"),
    ],
)
def test_invalid_class_weights(wanted, message):
    with pytest.raises(UserError, match=message):
        class_weights(wanted, np.array([0, 1, 2]), ("a", "b", "c"))


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("batch_options", "options"),
    [
        ({"max_batch_tokens": 128}, {}),  # one row per pass
        ({}, {"torch_compile": True, "torch_compile_backend": "eager"}),
    ],
    ids=["micro-batches", "compiled"],
)
def test_micro_batches_and_compiled_layers_train_as_the_full_batch_does(
    chatml, tmp_path, peft_config, batch_options, options
):
    full = trainer(chatml, tmp_path, peft_config=peft_config)
    other = trainer(chatml, tmp_path, peft_config=peft_config, batch_options=batch_options, **options)
    layers = [module for module in other.model.modules() if isinstance(module, LlamaDecoderLayer)]
    assert all((layer._compiled_call_impl is not None) == ("torch_compile" in options) for layer in layers)
    for run in (full, other):
        run.train()
    for key in ("loss", "grad_norm", "num_tokens"):
        assert logged(other, key) == pytest.approx(logged(full, key), rel=1e-3), key
    for name, parameter in full.model.named_parameters():
        torch.testing.assert_close(other.model.get_parameter(name), parameter, rtol=1e-3, atol=2e-4)


def test_neftunes_noise_is_scaled_by_the_length_of_a_pair(chatml, tmp_path):
    run = trainer(chatml, tmp_path, neftune_noise_alpha=5.0, batch_options={"max_batch_tokens": 128})
    scales = []

    def record(module, args):
        scales.append(module.neftune_noise_alpha / args[0].shape[1] ** 0.5)

    run.model.get_input_embeddings().register_forward_pre_hook(record)
    run.train()
    mean_length = sum(map(len, run.train_dataset["input_ids"])) / len(run.train_dataset)
    assert len(scales) > 3
    assert scales == pytest.approx([5.0 / mean_length**0.5] * len(scales))


def test_auto_must_be_resolved_first(chatml, tmp_path):
    with pytest.raises(UserError, match=r"max_batch_tokens: auto must be resolved first; .* memory.plan_memory"):
        trainer(chatml, tmp_path, batch_options={"max_batch_tokens": "auto"})


def test_a_large_batch_is_split_into_micro_batches(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    rows = list(TokenRows(encoder.encode_rows(few_pairs(3), max_length=None), encoder.answers))
    full = TrieCollator(encoder.answers, 128, 10**6)(rows)
    split = TrieCollator(encoder.answers, 128, 256)(rows)
    assert len(full["micro_batches"]) == 1
    assert len(split["micro_batches"]) > 1
    assert all(part["input_ids"].numel() <= 256 for part in split["micro_batches"])
    assert torch.equal(split["shift_labels"], full["shift_labels"])
    for name in ("input_ids", "position_ids", "exit"):
        assert torch.equal(torch.cat([part[name] for part in split["micro_batches"]]), full["micro_batches"][0][name])
    assert sum(part["tokens"] for part in split["micro_batches"]) == full["micro_batches"][0]["tokens"]


def test_a_document_is_in_a_batch_once(chatml):
    encoder = PromptEncoder(PROMPTS["plain"], chatml)
    claims, labels = zip(*CLAIMS, strict=True)
    pairs = {"uid": list(claims), "premise": [DOCUMENT] * len(claims), "hypothesis": claims, "label": labels}
    rows = TokenRows(encoder.encode_rows(pairs_dataset(pairs), max_length=None), encoder.answers)
    longest = max(len(rows.prompt(index)) for index in range(len(rows)))
    assert longest > 200
    (part,) = TrieCollator(encoder.answers, 128, 8192)(list(rows))["micro_batches"]
    assert len(part["input_ids"]) == 1
    assert part["input_ids"].numel() < 2 * longest < len(rows) * longest / 5


def test_flex_attention_is_not_trained_on_a_cpu(chatml, tmp_path):
    model = tiny_llama(len(chatml))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UserError, match="attn_implementation: flex_attention cannot be trained on a CPU; use sdpa"):
        trainer(chatml, tmp_path, model=model)


def test_pairs_with_the_same_premise_are_consecutive(chatml):
    premises = [f"premise {number % 10}" for number in range(30)]
    sampler = GroupShuffleSampler(premises, seed=1)
    first, again = list(sampler), list(sampler)
    assert sorted(first) == list(range(30))
    assert first == again
    assert [len({premises[index] for index in first[start : start + 3]}) for start in range(0, 30, 3)] == [1] * 10
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(GroupShuffleSampler(premises, seed=2)) != first
    scattered = list(GroupShuffleSampler(range(30), seed=1))
    assert sorted(scattered) == list(range(30))
    assert scattered != list(range(30))


@pytest.mark.gpu
def test_flex_attention_trains_as_sdpa_does(chatml, tmp_path):
    losses = {}
    for implementation in ("sdpa", "flex_attention"):
        model = tiny_llama(len(chatml))
        model.set_attn_implementation(implementation)
        run = trainer(chatml, tmp_path, model=model, use_cpu=False)
        run.train()
        losses[implementation] = logged(run, "loss")
    assert losses["flex_attention"] == pytest.approx(losses["sdpa"], rel=1e-2)


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_changes(chatml, tmp_path, dora):
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora, use_rslora=dora, task_type="CAUSAL_LM")
    run = trainer(chatml, tmp_path, peft_config=config)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train()
    changed = {name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_full_fine_tuning_changes_all_weights(chatml, tmp_path):
    run = trainer(chatml, tmp_path)
    before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
    run.train()
    assert not [name for name, parameter in run.model.named_parameters() if torch.equal(parameter, before[name])]


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_evaluation_is_label_accuracy_and_the_loss_of_training(chatml, tmp_path, batching):
    run = trainer(chatml, tmp_path, batching=batching)
    metrics = run.evaluate()
    reported = {key for key in metrics if key != "epoch" and not key.endswith(("runtime", "per_second"))}
    assert reported == {f"eval_{key}" for key in (*METRICS, *(f"f1_{label}" for label in LABELS))}
    rows = TokenRows(run.eval_dataset, run.encoder.answers)
    prompts, gold = [rows.prompt(index).tolist() for index in range(len(rows))], rows.gold.tolist()
    predicted = generate_labels(run.model, chatml, prompts, run.encoder.answers)
    assert metrics["eval_accuracy"] == pytest.approx(sum(map(int.__eq__, predicted, gold)) / len(gold))
    rows = [prompt + run.encoder.answers[label] for prompt, label in zip(prompts, gold, strict=True)]
    losses = []
    for row, prompt in zip(rows, prompts, strict=True):
        with torch.no_grad():
            log_probs = run.model(torch.tensor([row])).logits[0].log_softmax(-1)
        losses += [-log_probs[step, row[step + 1]].item() for step in range(len(prompt) - 1, len(row) - 1)]
    assert metrics["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_best_checkpoint_is_chosen_by_label_accuracy(chatml, tmp_path):
    run = trainer(
        chatml,
        tmp_path,
        max_steps=6,
        eval_on_start=True,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_accuracy",
    )
    run.train()
    history = {entry["step"]: entry["eval_accuracy"] for entry in run.state.log_history if "eval_accuracy" in entry}
    assert list(history) == [0, 2, 4, 6], "the base at step 0, then every evaluation"
    best = max((2, 4, 6), key=lambda step: history[step])
    assert run.state.best_global_step == best
    assert run.evaluate()["eval_accuracy"] == pytest.approx(history[best])


def test_models_that_cannot_use_tries_get_padded_batches(chatml, tmp_path, caplog):
    config = MambaConfig(vocab_size=len(chatml), hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0)
    run = trainer(chatml, tmp_path, model=MambaForCausalLM(config), max_steps=1, gradient_checkpointing=False)
    assert "Padded batches instead of tries: mamba has linear_attention layers" in caplog.text
    run.train()
    assert 0 <= run.evaluate()["eval_accuracy"] <= 1


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_adapter_on_a_quantised_base_has_the_precision_of_the_run(chatml, tmp_path, bf16, dtype):
    """TRL always casts it to bf16, but then fp16 cannot train: 16-bit gradients are not unscaled."""
    tiny_llama(len(chatml)).save_pretrained(tmp_path / "base")
    args = ModelConfig(str(tmp_path / "base"), dtype="bfloat16" if bf16 else "float32", load_in_4bit=True)
    run = trainer(chatml, tmp_path, model=load_model(args), peft_config=LORA, bf16=bf16)
    assert {p.dtype for p in run.model.parameters() if p.requires_grad} == {dtype}
    run.train()
    assert all(loss > 0 for loss in logged(run, "loss"))


def test_trls_card_is_not_written(chatml, tmp_path):
    run = trainer(chatml, tmp_path, save_strategy="steps", save_steps=3, peft_config=None)
    run.train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").is_file()
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("pairs", [1, 20, 21, 25, 39])
def test_batches_are_the_same_for_any_number_of_processes(processes, pairs):
    sampler = GroupShuffleSampler(range(pairs), seed=1)
    batches = list(BatchSampler(sampler, 12, drop_last=False))
    shares = [ShardedBatchSampler(sampler, 12, index, processes, drop_last=False) for index in range(processes)]
    assert {len(share) for share in shares} == {len(batches)}
    for batch, *own in zip(batches, *shares, strict=True):
        assert all(own), "every process has pairs in every step"
        distributed = [pair for share in own for pair in share]
        assert sorted(set(distributed)) == sorted(batch)
        assert len(distributed) == max(len(batch), processes), "repeats only if pairs are fewer"
    shares[0].set_epoch(1)
    assert pairs < 20 or list(BatchSampler(sampler, 12, drop_last=False)) != batches


def test_keys_are_refused_however_the_config_was_made(chatml, tmp_path):
    with pytest.raises(UserError, match="remove packing: "):
        trainer(chatml, tmp_path, packing=True)
    with pytest.raises(UserError, match="remove accelerator_config: "):
        trainer(chatml, tmp_path, accelerator_config={"split_batches": True})
    with pytest.raises(UserError, match="max_grad_norm is -1.0; it must be 0 or more"):
        trainer(chatml, tmp_path, max_grad_norm=-1.0)
    args = trainer(chatml, tmp_path).args
    # The hypothesis-only baseline is trained with the same arguments.
    refuse_keys(*field_values((args, BatchConfig())))


def test_the_dft_loss_equals_that_of_padded_batches(chatml, tmp_path):
    both = [trainer(chatml, tmp_path, batching=batching, loss_type="dft") for batching in ("trie", "padded")]
    plain = trainer(chatml, tmp_path)
    for run in (*both, plain):
        run.train()
    assert logged(both[0], "loss") == pytest.approx(logged(both[1], "loss"), rel=2e-3)
    assert logged(both[0], "loss") != pytest.approx(logged(plain, "loss"), rel=2e-3)


def test_a_head_in_modules_to_save_is_trained(chatml, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    for batching in ("trie", "padded"):
        run = trainer(chatml, tmp_path, batching=batching, peft_config=config)
        before = {name: parameter.clone() for name, parameter in run.model.named_parameters()}
        run.train()
        changed = {
            name for name, parameter in run.model.named_parameters() if not torch.equal(parameter, before[name])
        }
        assert any("lm_head" in name for name in changed), batching


def test_label_smoothing_needs_padded_batches(chatml, tmp_path):
    with pytest.raises(UserError, match="label_smoothing_factor: .* set batching: padded, or remove"):
        trainer(chatml, tmp_path, label_smoothing_factor=0.1)
    with pytest.warns(FutureWarning, match="label_smoothing_factor"):
        smoothed = trainer(chatml, tmp_path, batching="padded", label_smoothing_factor=0.3, max_steps=20)
    plain = trainer(chatml, tmp_path, batching="padded", max_steps=20)
    for one in (smoothed, plain):
        one.train()
    assert logged(smoothed, "entropy")[-1] > 2 * logged(plain, "entropy")[-1], "smoothing raises the entropy"


@pytest.mark.parametrize(("step", "fix"), [(0, "take another base"), (2, "resume from an earlier checkpoint")])
def test_an_evaluation_with_nan_scores_is_an_error(chatml, tmp_path, step, fix):
    run = trainer(chatml, tmp_path)
    run.state.global_step = step
    run.model.lm_head.weight.data[:] = torch.nan
    message = f"evaluation after step {step}: the scores of 12 of 12 pairs are NaN or infinite, .* lm_head.*: {fix}"
    with pytest.raises(UserError, match=message):
        run.evaluate()


@pytest.mark.parametrize("source", ["file", "model"])
def test_the_saved_chat_template_is_the_one_in_use(tmp_path, source):
    """TRL would apply `chat_template_path` again, without the fixed date, and resize the model."""
    template = "Today: {{ strftime_now('%Y') }}\n" + CHATML
    other = chatml_tokenizer()
    other.chat_template, other.eos_token = template, "<|endoftext|>"
    other.save_pretrained(tmp_path / "model")
    path = tmp_path / ("model" if source == "model" else "model/chat_template.jinja")
    args = SFTConfig(
        output_dir=str(tmp_path / "run"), chat_template_path=str(path), bf16=False, use_cpu=True, report_to="none"
    )
    tokenizer = chatml_tokenizer()
    apply_template(tokenizer, args)
    encoder = PromptEncoder(PROMPTS["plain"], tokenizer)
    model = tiny_llama(len(tokenizer))
    rows = encoder.encode_rows(few_pairs(), max_length=None)
    trainer = NLITrainer(model=model, args=args, encoder=encoder, batch_args=BatchConfig(), train_dataset=rows)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_tokenizer(str(tmp_path / "saved"))
    assert PromptEncoder(PROMPTS["plain"], saved).rendered == encoder.rendered
    assert saved.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False).startswith("Today: 2024")
    assert saved.eos_token == ("<|endoftext|>" if source == "model" else "<|im_end|>")
    assert trainer.model.config.eos_token_id == saved.eos_token_id
    assert trainer.model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert args.chat_template_path == str(path), "the hypothesis-only baseline needs it too"


@pytest.mark.parametrize(
    ("kind", "dropouts"),
    [
        ("gpt2", ["resid_pdrop", "embd_pdrop", "attn_pdrop"]),
        ("opt", ["dropout"]),
        ("gpt_neo", ["resid_dropout", "embed_dropout", "attention_dropout"]),
    ],
)
def test_bases_with_learned_positions_train_on_tries_as_on_padded_batches(chatml, tmp_path, kind, dropouts):
    make_base(tmp_path / "base", kind, positions=256, **dict.fromkeys(dropouts, 0.0))
    losses = {}
    for batching in ("trie", "padded"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        run = trainer(chatml, tmp_path / batching, model=model, batching=batching)
        run.train()
        assert (run.max_row_tokens is None) == (batching == "padded")
        losses[batching] = logged(run, "loss")
    assert losses["trie"] == pytest.approx(losses["padded"], rel=1e-4)


@pytest.mark.parametrize("batching", ["trie", "padded"])
def test_evaluation_uses_the_batching_of_training(chatml, tmp_path, batching):
    run = trainer(chatml, tmp_path, batching=batching)
    run.evaluate()
    assert run._scorer.batch_args.batching == batching
    assert run._scorer.batch_args.cuda_graph == "false"
