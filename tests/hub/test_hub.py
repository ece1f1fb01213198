import json
import os
import re
import sys

import huggingface_hub
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard, constants, hf_api
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from loopback_hub import READ_TOKEN, TOKEN, LoopbackHub
from tiny import SCENES, TOKENIZERS
from tiny_run import make_base, make_run
from trl import SFTConfig

from nli_sft import UserError
from nli_sft.classifier import NLIClassifier
from nli_sft.data.prompts import PROMPTS, load_prompt
from nli_sft.hub.card import model_card
from nli_sft.hub.push import PushConfig, move_token_to_env, push
from nli_sft.labels import LABELS

BASE_CARD = b"---\nlicense: mit\n---\n# A base\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base and a run of it, named as on the Hub."""
    folder = tmp_path_factory.mktemp("made")
    base = make_base(folder / "base")
    return base, make_run(folder / "snli-lora", base, model_name_or_path="tiny/base")


@pytest.fixture
def hub(made, tmp_path, monkeypatch):
    """A local Hub with the base on it, which this process uses."""
    with LoopbackHub() as server:
        server.add_folder("tiny/base", made[0])
        server.files("tiny/base")["README.md"] = BASE_CARD
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # between its retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.utils.close_session()
        yield server
        huggingface_hub.utils.close_session()


@pytest.fixture
def run(made, tmp_path):
    """A copy of the run that a test may change."""
    return copied(made[1], tmp_path / "snli-lora")


def copied(source, target):
    for path in source.rglob("*"):
        if path.is_file():
            (target / path.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(source)).write_bytes(path.read_bytes())
    return target


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_pushed_run_loads_and_predicts_the_same(hub, run):
    (run / "training_args.bin").write_bytes(b"pickled")
    (run / "report.html").write_text("<p>report</p>")
    (run / "figures").mkdir()
    (run / "figures" / "change-by-label.svg").write_text("<svg/>")
    address = push(PushConfig(run=str(run), hub_model_id="me/snli", hub_private_repo=True))
    assert address.startswith(f"{hub.url}/me/snli/commit/")
    assert hub.repositories["model", "me/snli"].private
    there = hub.files("me/snli")
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "prompt.json", "recipe.yaml"):
        assert there[name] == (run / name).read_bytes(), name
    assert there["README.md"] == (run / "README.md").read_bytes()
    assert {"report.html", "figures/change-by-label.svg", "run.json", "eval/snli-test/metrics.json"} <= set(there)
    assert not [name for name in there if name.endswith((".bin", ".parquet", ".pt"))]
    assert "![change by label](figures/change-by-label.svg)" in there["README.md"].decode()
    assert any(request.startswith("PUT /lfs/") for request in hub.requests), "large files went through LFS"
    assert sum(request.startswith("POST /api/models/me/snli/commit/") for request in hub.requests) == 1

    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    predictions = NLIClassifier.from_pretrained("me/snli", device="cpu", dtype="float32")(
        table["premise"], table["hypothesis"]
    )
    assert [one.label for one in predictions] == list(table["tuned_prediction"])
    for label in LABELS:
        assert [one.probabilities[label] for one in predictions] == pytest.approx(table[f"tuned_p_{label}"], abs=1e-5)


def test_a_full_model_is_pushed_and_loaded(hub, made, tmp_path):
    run = make_run(tmp_path / "full", made[0], use_peft=False, model_name_or_path="tiny/base")
    push(PushConfig(run=str(run), hub_model_id="me/full"))
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    predictions = NLIClassifier.from_pretrained("me/full", device="cpu", dtype="float32")(
        table["premise"], table["hypothesis"]
    )
    assert [one.label for one in predictions] == list(table["tuned_prediction"])
    data = ModelCard(hub.files("me/full")["README.md"].decode()).data
    assert (data.library_name, data.base_model_relation) == ("transformers", "finetune")
    snippet = plain_snippet(hub.files("me/full")["README.md"].decode())
    assert "peft" not in snippet
    assert run_snippet(snippet) == word_of(run)


def test_a_base_and_an_adapter_of_the_hub(hub, run, tmp_path):
    table = pd.read_parquet(run / "eval" / "snli-test" / "predictions.parquet")
    adapter = {name: (run / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    hub.add("someone/adapter", adapter)
    for model, name, more in (
        ("base", "tiny/base", {}),
        ("tuned", "someone/adapter", {}),
        ("tuned", "tiny/base", {"adapter": "someone/adapter"}),
    ):
        classifier = NLIClassifier.from_pretrained(name, device="cpu", dtype="float32", **more)
        predictions = classifier(table["premise"], table["hypothesis"])
        assert [one.label for one in predictions] == list(table[f"{model}_prediction"])


def test_branches_and_pull_requests(hub, run):
    push(PushConfig(run=str(run), hub_model_id="me/snli", hub_revision="v1"))
    repository = hub.repositories["model", "me/snli"]
    assert "prompt.json" not in hub.files("me/snli")
    assert "prompt.json" in hub.files("me/snli", "v1")
    address = push(PushConfig(run=str(run), hub_model_id="me/snli", create_pr=True))
    assert address == f"{hub.url}/me/snli/discussions/1"
    assert set(repository.branches) == {"main", "v1", "refs/pr/1"}
    assert "prompt.json" not in hub.files("me/snli")
    assert NLIClassifier.from_pretrained("me/snli", revision="refs/pr/1", device="cpu")
    with pytest.raises(UserError, match=r"me/snli: it has no such revision \(404\)"):
        NLIClassifier.from_pretrained("me/snli", revision="v2")


def test_a_run_that_was_not_evaluated_is_refused(hub, made, tmp_path):
    run = make_run(tmp_path / "run", made[0], model_name_or_path="tiny/base", evaluated=False)
    with pytest.raises(UserError, match=r"has not been evaluated; run recipes/eval\.py --run \S+ first, or"):
        push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert not hub.requests
    push(PushConfig(run=str(run), hub_model_id="me/snli", without_results=True))
    card = ModelCard(hub.files("me/snli")["README.md"].decode())
    assert "Measured during training on the validation split" in card.text
    assert [(r.dataset_split, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("validation", "accuracy", 0.5)
    ]


@pytest.mark.parametrize(
    ("prompt", "recipe", "message"),
    [
        (
            PROMPTS["plain"],
            {"model_name_or_path": "tiny/other"},
            "exists with base model tiny/base, but this run has",
        ),
        (
            load_prompt("plain", ["yes", "maybe", "no"]),
            {},
            "exists with label words entailment, neutral,",
        ),
        (PROMPTS["definitions"], {}, "exists with prompt "),
    ],
)
def test_another_model_is_only_overwritten_on_request(hub, run, made, tmp_path, prompt, recipe, message):
    push(PushConfig(run=str(run), hub_model_id="me/snli"))
    before = dict(hub.files("me/snli"))
    other = make_run(tmp_path / "other", made[0], prompt=prompt, **({"model_name_or_path": "tiny/base"} | recipe))
    with pytest.raises(UserError, match=re.escape(message)):
        push(PushConfig(run=str(other), hub_model_id="me/snli"))
    assert hub.files("me/snli") == before
    push(PushConfig(run=str(other), hub_model_id="me/snli", overwrite=True))
    assert hub.files("me/snli")["prompt.json"] == (other / "prompt.json").read_bytes()


def test_other_repositories_are_not_overwritten(hub, run):
    hub.add("me/snli", {"README.md": b"# My holiday pictures"})
    with pytest.raises(UserError, match="does not hold a run of nli-sft"):
        push(PushConfig(run=str(run), hub_model_id="me/snli"))


def test_an_adapter_of_a_local_base_is_refused(hub, made, tmp_path):
    run = make_run(tmp_path / "local", made[0])
    with pytest.raises(UserError, match="is a local folder, so others could not load the adapter"):
        push(PushConfig(run=str(run), hub_model_id="me/snli"))
    push(PushConfig(run=str(run), hub_model_id="me/snli", base_model="tiny/base"))
    there = hub.files("me/snli")
    assert not [name for name, data in there.items() if str(made[0]).encode() in data]
    assert NLIClassifier.from_pretrained("me/snli", device="cpu")("A dog.", "A cat.").label in LABELS


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/api/repos/create", 401, "the Hub rejected the token (401); use `hf auth login`, or"),
        ("POST", "/api/repos/create", 403, "the token has no permission to write (403); use one that has"),
        ("POST", "/api/repos/create", 409, "the name is taken by a repository that the token cannot access (409)"),
        ("POST", "/preupload/", 500, "the Hub failed (500); nothing local is lost: push again"),
        ("POST", "/objects/batch", 503, "the Hub failed (503); nothing local is lost: push again"),
        ("PUT", "/lfs/", 500, "the Hub failed (500); nothing local is lost: push again"),
        ("PUT", "/lfs/", None, "the connection to the Hub broke"),
        ("POST", "/commit/", 504, "the Hub failed (504); nothing local is lost: push again"),
        ("POST", "/commit/", 412, "someone else changed the repository at the same time (412)"),
        ("POST", "/commit/", None, "the connection to the Hub broke"),
    ],
)
def test_failures_are_explained_and_a_second_push_succeeds(hub, run, method, path, status, message):
    before = contents(run)
    with hub.failing(method, path, status), pytest.raises(UserError) as error:
        push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert str(error.value).startswith("me/snli: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    after = contents(run)
    assert {path: after[path] for path in before if path.name != "README.md"} == {
        path: data for path, data in before.items() if path.name != "README.md"
    }
    if ("model", "me/snli") in hub.repositories:
        assert set(hub.files("me/snli")) == {".gitattributes"}, "all or nothing"
    push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert hub.files("me/snli")["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()


def test_a_connection_that_breaks_once_is_retried(hub, run):
    with hub.failing("PUT", "/lfs/", None, times=1):
        push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert "prompt.json" in hub.files("me/snli")


def test_a_second_push_sends_only_what_changed(hub, run):
    push(PushConfig(run=str(run), hub_model_id="me/snli"))
    uploads = sum(request.startswith("PUT /lfs/") for request in hub.requests)
    push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert sum(request.startswith("PUT /lfs/") for request in hub.requests) == uploads


@pytest.mark.parametrize(
    ("token", "message"),
    [("hf_wrong", "rejected the token (401)"), (READ_TOKEN, "has no permission to write (403)")],
)
def test_tokens_without_permission(hub, run, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as error:
        push(PushConfig(run=str(run), hub_model_id="me/snli"))
    assert message in str(error.value)
    assert token not in str(error.value)


def test_invalid_names(hub, run):
    with pytest.raises(UserError, match=r"me/nowhere: no such local folder, and no such repository on the Hub"):
        NLIClassifier.from_pretrained("me/nowhere")
    with pytest.raises(UserError, match="neither a local folder nor a Hub id of the form <owner>/<name>"):
        push(PushConfig(run=str(run), hub_model_id="me/a/b"))
    with pytest.raises(UserError, match="run is missing"):
        PushConfig(hub_model_id="me/snli")
    with pytest.raises(UserError, match="hub_model_id is missing"):
        PushConfig(run="outputs/x")


def test_offline_mode_is_named(hub, run, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set; unset it"):
        push(PushConfig(run=str(run), hub_model_id="me/snli"))


def test_the_token_is_moved_to_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another")
    monkeypatch.setattr(sys, "argv", ["sft.py", "--hub_token", TOKEN, f"--hub_token={TOKEN}"])
    args = SFTConfig(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True, bf16=False, report_to="none")
    move_token_to_env(args)
    assert os.environ["HF_TOKEN"] == TOKEN
    assert TOKEN not in repr(args)
    assert TOKEN not in json.dumps(args.to_dict(), default=str)
    assert TOKEN not in " ".join(sys.argv)


def test_the_card_shows_the_measurements(hub, run):
    card = model_card(run, "me/snli")
    metrics = json.loads((run / "eval" / "snli-test" / "metrics.json").read_text())
    data = card.data
    assert data.library_name == "peft"
    assert data.base_model == "tiny/base"
    assert data.base_model_relation == "adapter"
    assert data.datasets == ["stanfordnlp/snli"]
    assert data.license == "mit"
    assert data.language == "en"
    assert data.pipeline_tag == "text-generation"
    measured = {(r.dataset_type, r.dataset_split, r.metric_type): r for r in data.eval_results}
    accuracy = measured["stanfordnlp/snli", "test", "accuracy"]
    assert accuracy.metric_value == pytest.approx(metrics["tuned"]["accuracy"], abs=1e-6)
    low, high = metrics["tuned"]["accuracy_interval"]
    assert accuracy.metric_name == f"Accuracy (95% interval {low:.4f} to {high:.4f}, 24 pairs)"
    f1 = measured["stanfordnlp/snli", "test", "f1"]
    assert f1.metric_value == pytest.approx(metrics["tuned"]["macro_f1"], abs=1e-6)
    text = card.text
    assert f"| snli test | before tuning | 24 | {metrics['base']['accuracy']:.2%} (" in text
    assert "premises" in text.split("## Results")[0], "the headline, which with 4 premises claims nothing"
    assert PROMPTS["plain"].fingerprint in text
    assert "Does the premise entail the hypothesis? Answer entailment, neutral or contradiction." in text
    assert "Base model tiny/base: mit." in text
    assert "Data stanfordnlp/snli: cc-by-sa-4.0." in text
    assert "## Limits" in text
    assert "trainable" not in text
    # Tables survive the template: no blank line within.
    assert re.search(r"\|---:\|\n\| snli test \| before tuning .*\n\| snli test \| \*\*after tuning\*\*", text)


def test_the_metadata_is_valid_and_survives_a_round_trip(hub, run):
    card = model_card(run, "me/snli")
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()
    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    again.validate()  # asks the server too
    assert "POST /api/validate-yaml" in hub.requests


def test_eval_results_on_request(hub, run):
    push(PushConfig(run=str(run), hub_model_id="me/snli", eval_results=True))
    (entry,) = yaml.safe_load(hub.files("me/snli")[".eval_results/snli-test.yaml"])
    metrics = json.loads((run / "eval" / "snli-test" / "metrics.json").read_text())
    assert entry["dataset"]["id"] == "stanfordnlp/snli"
    assert entry["value"] == pytest.approx(100 * metrics["tuned"]["accuracy"], abs=0.01)
    assert "split test" in entry["notes"]


def plain_snippet(card):
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (snippet,) = [block for block in blocks if "prefix_allowed_tokens_fn" in block]
    return snippet


def run_snippet(snippet):
    """The last text that the card's code prints."""
    return run_in(snippet, {})


def run_in(snippet, namespace):
    printed = []
    namespace["print"] = printed.append
    exec(compile(snippet, "card", "exec"), namespace)
    return printed[-1]


def word_of(run):
    """The word for the label that the classifier gives to the card's example."""
    classifier = NLIClassifier.from_pretrained(run, device="cpu")
    label = classifier("A man sleeps.", "A person is awake.").label
    return classifier.encoder.prompt.label_words[LABELS.index(label)]


@pytest.mark.parametrize("family", ["chatml", "byte_level", "sentencepiece"])
def test_the_code_of_the_card_runs_as_pasted(hub, tmp_path, family):
    tokenizer = TOKENIZERS[family]()
    prompt = load_prompt("few_shot", ["yes", "perhaps", "no way"])
    base = make_base(tmp_path / "base", tokenizer)
    hub.add_folder("tiny/words", base)
    run = make_run(tmp_path / "run", base, tokenizer=tokenizer, prompt=prompt, model_name_or_path="tiny/words")
    push(PushConfig(run=str(run), hub_model_id="me/words"))
    card = hub.files("me/words")["README.md"].decode()
    snippet = plain_snippet(card)
    classifier = NLIClassifier.from_pretrained(run, device="cpu")
    for premise, hypothesis, _ in SCENES[:6]:
        namespace = {}
        changed = snippet.replace('"A man sleeps."', repr(premise)).replace('"A person is awake."', repr(hypothesis))
        word = run_in(changed, namespace)
        assert namespace["inputs"].input_ids.tolist() == classifier.encoder.encode([premise], [hypothesis])
        assert namespace["answers"] == classifier.encoder.answers
        assert LABELS[prompt.label_words.index(word)] == classifier(premise, hypothesis).label


def test_the_card_of_a_run_with_other_labels(hub, made, tmp_path):
    labels = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO", "DISPUTED")
    prompt = PROMPTS["plain"].with_labels(labels)
    card = str(model_card(make_run(tmp_path / "fever", made[0], prompt=prompt), "me/fever"))
    assert (
        "to label a **hypothesis**, given a **premise**, with `SUPPORTS`, `REFUTES`, `NOT ENOUGH INFO` or `DISPUTED`. "
        in card
    )
    assert "It answers with one of 4 label words" in card
    assert "over 4 labels: guessing is right on 1 in 4." in card
    assert re.search(r"\| NOT ENOUGH INFO \| `NOT ENOUGH INFO` \| `\[[\d, ]+\]` \|", card)
    assert "neutral" not in card.replace("general words for entailment", "").split("## Limits")[0]


def test_every_snippet_of_the_card_is_python(hub, run):
    card = str(model_card(run, "me/snli"))
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 4
    assert "nli_sft" not in blocks[0] + blocks[1]  # the first two need no package of ours
    assert not re.search(r"pip install \"?nli[-_]sft", card)  # the name could be registered by anyone
    for block in blocks:
        compile(block, "card", "exec")
    assert "StructuredOutputsParams(choice=['entailment', 'neutral', 'contradiction'])" in blocks[3]
    assert 'LLM("tiny/base", enable_lora=True, max_lora_rank=8)' in blocks[3]


@pytest.mark.parametrize("use_peft", [True, False])
def test_the_first_code_of_the_card_gives_our_probabilities(hub, made, tmp_path, use_peft):
    pytest.importorskip("transformers.decision", reason="this transformers has no decision pipeline")
    run = make_run(tmp_path / "run", made[0], use_peft=use_peft, model_name_or_path="tiny/base")
    push(PushConfig(run=str(run), hub_model_id="me/snli"))
    card = hub.files("me/snli")["README.md"].decode()
    answer = run_snippet(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0])
    classifier = NLIClassifier.from_pretrained(run, device="cpu", dtype="float32")
    prediction = classifier("A man sleeps.", "A person is awake.")
    assert answer["choice"] == prediction.label
    assert answer["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-5)


def test_a_card_says_how_to_get_a_decision_pipeline(hub, made, tmp_path):
    prompt = load_prompt("plain", ["entailment", "entailed not", "contradiction"])
    run = make_run(tmp_path / "run", made[0], prompt=prompt, evaluated=False)
    assert "train with other label words" in str(model_card(run, "me/snli"))
