"""Recipes and runs of other people must not run code, and secrets must not be written."""

from launching import launch, read_wandb
from tiny_run import make_run


def test_trust_remote_code_is_not_taken_from_a_run(workspace):
    run = make_run(workspace / "outputs" / "trusting", workspace / "base", trust_remote_code=True, evaluated=False)
    result = launch("eval.py", "--run", run, "--dataset_name", workspace / "data", cwd=workspace)
    assert result.returncode != 0
    assert "--trust_remote_code true runs it here" in " ".join(result.output.split())


def test_trust_remote_code_is_recorded_and_tokens_are_not(recipe, tmp_path):
    output = tmp_path / "trusted"
    arguments = ["--config", recipe, "--output_dir", output, "--max_steps", "1", "--trust_remote_code", "true"]
    secret = ["--hub_token", "hf_0123456789"]
    result = launch("sft.py", *arguments, *secret, "--report_to", "wandb", cwd=tmp_path)
    assert result.returncode == 0, result.output
    assert "trust_remote_code: true" in (output / "recipe.yaml").read_text()
    config = {item.key: item.value_json for record in read_wandb(tmp_path) for item in record.run.config.update}
    assert config["trust_remote_code"] == "true"
    assert "hf_0123456789" not in result.output
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        assert b"hf_0123456789" not in path.read_bytes(), path


def test_an_estimate_needs_no_weights_and_writes_nothing(recipe, workspace, tmp_path):
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((workspace / "base" / "config.json").read_bytes())
    arguments = ["--config", recipe, "--model_name_or_path", tmp_path / "shape", "--output_dir", tmp_path / "out"]
    result = launch("sft.py", *arguments, "--dataset_name", "not/there", "--estimate", "true", cwd=tmp_path)
    assert result.returncode == 0, result.output
    output = " ".join(result.output.split())
    assert "Precision: fp32" in output
    assert "RAM for the training, estimated: " in output
    assert "; a GPU would need " in output
    assert "adapter" in output
    assert not (tmp_path / "out").exists()
