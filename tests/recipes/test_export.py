import json
import runpy
import sys

import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file
from tiny import SCENES
from tiny_run import make_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig

from nli_sft.classifier import NLIClassifier, Prediction
from nli_sft.configs import from_recipe
from nli_sft.hub.decision import write_decision_files
from nli_sft.hub.export import Parity
from nli_sft.labels import LABELS
from nli_sft.models.loading import load_encoder, load_tuned
from nli_sft.runs import keep_temperature, read_run


@pytest.fixture
def export(monkeypatch):
    """Run recipes/export.py in this process, as a script."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        runpy.run_path(str(ROOT / "recipes" / "export.py"), run_name="__main__")

    return run


def make(workspace, tmp_path, **fields):
    data = str(workspace / "data")
    return make_run(tmp_path / "run", workspace / "base", dataset_name=data, evaluated=False, **fields)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_merged_model_predicts_as_the_adapter(workspace, tmp_path, export, capsys, dora):
    run = make(workspace, tmp_path, dora=dora)
    keep_temperature(run, 1.5)
    write_decision_files(run, load_encoder(run), 1.5)
    export("--run", run, "--device=cpu", "--max_difference=1e-4", "--max_flips=0")
    output = tmp_path / "run-merged"
    parity = json.loads((output / "parity.json").read_text())
    assert parity["pairs"] == 24
    assert parity["flips"] == 0
    assert parity["largest_difference"] < 1e-4
    assert "0 of 24 labels changed" in " ".join(capsys.readouterr().out.split())

    # It is an ordinary model folder: transformers loads it and generates the same answer.
    model = AutoModelForCausalLM.from_pretrained(output)
    base = AutoModelForCausalLM.from_pretrained(workspace / "base")
    assert not any("lora" in name for name in load_file(output / "model.safetensors"))
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight) or any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    )
    assert AutoTokenizer.from_pretrained(output).chat_template is not None
    config = json.loads((output / "generation_config.json").read_text())
    assert config["max_new_tokens"] == 3
    assert not config.get("do_sample", False)
    premise, hypothesis, _ = SCENES[3]
    predictions = [
        NLIClassifier.from_pretrained(folder, device="cpu")(premise, hypothesis) for folder in (run, output)
    ]
    assert predictions[0].label == predictions[1].label
    assert (output / "decision.json").read_text() == (run / "decision.json").read_text()


def test_a_quantised_base_is_read_unquantised_or_dequantised(workspace, tmp_path, export, capsys):
    run = make(workspace, tmp_path, load_in_4bit=True)
    # bitsandbytes multiplies 4-bit weights in bfloat16 on a CPU, so the unmerged predictions are slightly off.
    anything = ["--device=cpu", "--max_difference=1", "--max_flips=1"]
    export("--run", run, "--dequantize", "--output_dir", tmp_path / "a", *anything)
    dequantised = json.loads((tmp_path / "a" / "parity.json").read_text())
    export("--run", run, "--output_dir", tmp_path / "b", *anything)
    reloaded = json.loads((tmp_path / "b" / "parity.json").read_text())
    assert dequantised["mean_difference"] < 0.3 * reloaded["mean_difference"]
    model_args = from_recipe(ModelConfig, read_run(run)[0])
    exact = NLIClassifier(load_tuned(run, model_args, device=torch.device("cpu"), dequantize=True), load_encoder(run))
    merged = NLIClassifier.from_pretrained(tmp_path / "a", device="cpu", dtype="float32")
    texts = [premise for premise, _, _ in SCENES], [hypothesis for _, hypothesis, _ in SCENES]
    assert Parity.between(exact(*texts), merged(*texts)).is_within(1e-4, 0)
    for folder in ("a", "b"):
        weights = load_file(tmp_path / folder / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert "quantization_config" not in json.loads((tmp_path / folder / "config.json").read_text())

    with pytest.raises(SystemExit) as exit:
        export("--run", run, "--device=cpu", "--output_dir", tmp_path / "c", "--max_difference=1e-3")
    assert "the merged model differs from the measured one" in str(exit.value)
    assert "; try --dequantize" in str(exit.value)
    assert not (tmp_path / "c").exists(), "a failed export is not left under the final name"
    assert (tmp_path / "c.unchecked" / "parity.json").is_file()


def test_runs_that_cannot_be_exported(workspace, tmp_path, export):
    run = make(workspace, tmp_path)
    (tmp_path / "there").mkdir()
    for arguments, message in (
        (["--output_dir", tmp_path / "there"], "already exists; remove it or give another folder"),
        (["--dequantize"], "was not quantised; leave the flag out"),
        (["--dtype", "float8"], "float8"),
    ):
        with pytest.raises(SystemExit) as exit:
            export("--run", run, "--device=cpu", *arguments)
        assert message in str(exit.value)
    full = make(workspace, tmp_path / "full", use_peft=False)
    with pytest.raises(SystemExit) as exit:
        export("--run", full, "--device=cpu")
    assert "has no adapter to merge" in str(exit.value)


def test_parity_counts_flips_and_the_largest_difference():
    def prediction(*p):
        return Prediction(LABELS[p.index(max(p))], dict(zip(LABELS, p, strict=True)))

    parity = Parity.between(
        [prediction(0.5, 0.3, 0.2), prediction(0.1, 0.8, 0.1)], [prediction(0.3, 0.5, 0.2), prediction(0.1, 0.8, 0.1)]
    )
    assert (parity.pairs, parity.flips) == (2, 1)
    assert parity.largest_difference == pytest.approx(0.2)
    assert parity.mean_difference == pytest.approx(0.4 / 6)
    assert parity.is_within(0.25, 0.5)
    assert not parity.is_within(0.1, 0.5)
    assert not parity.is_within(0.25, 0.4)
