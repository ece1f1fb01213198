"""Which output folders are accepted, what is cleared, and which changes a resumed recipe may have."""

import pytest
from past_runs import write_past_run

from nli_sft import UserError
from nli_sft.data.prompts import load_prompt
from nli_sft.runs import write_json, write_run
from nli_sft.training.folders import check_folder, check_resumption, clear


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fill(folder, *files):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


@pytest.fixture
def used(tmp_path):
    folder = write_past_run(tmp_path / "run", 0.8)
    write_past_run(folder / "hypothesis_only", 0.6, evaluations=())
    for part in (folder, folder / "hypothesis_only"):
        fill(part, "adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "trained_pairs.npy")
        fill(part, "checkpoint-3/trainer_state.json", "checkpoint-3/optimizer.pt", "_unfinished/checkpoint-6/a")
    fill(folder, "report.html", "report.md", "figures/change.svg", "figures/change.png", "tracking.json")
    write_json(folder / "eval" / "stress.json", {"suite": "stress", "evaluated": {}})
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model Card\n[More Information Needed]")
    return folder


MINE = {
    "notes.txt",
    "eval/notes.txt",
    "figures/mine.png",
    "eval/mine.json",
    "tokenizer_notes.txt",
    "hypothesis_only/notes.txt",
    "checkpoint-notes/x.txt",
    "model_comparison.safetensors.txt",
}


def test_a_used_folder_is_refused(used):
    with pytest.raises(UserError, match=r"already holds a run \(run.json\); .* --overwrite_output_dir true"):
        check_folder(used, base="hub/tiny")
    check_folder(used, base="hub/tiny", overwrite=True)
    check_folder(used, base="hub/tiny", checkpoint=str(used / "checkpoint-3"))
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(used, base="hub/tiny", checkpoint=str(used.parent / "other" / "checkpoint-3"))
    with pytest.raises(UserError, match="set only one of the two"):
        check_folder(used, base="hub/tiny", checkpoint=str(used / "checkpoint-3"), overwrite=True)


@pytest.mark.parametrize("left", ["eval/snli-test/metrics.json", "checkpoint-3/trainer_state.json"])
def test_a_folder_with_leftovers_of_a_run_is_refused(tmp_path, left):
    fill(tmp_path, left)
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(tmp_path, base="hub/tiny")
    fill(tmp_path / "outer", f"hypothesis_only/{left}")
    with pytest.raises(UserError, match="already holds a run"):
        check_folder(tmp_path / "outer", base="hub/tiny")


def test_a_new_folder_and_one_with_other_files_are_accepted(tmp_path):
    check_folder(tmp_path / "new", base="hub/tiny")
    fill(tmp_path, *MINE, "tracking.json", "_unfinished/checkpoint-3/a")  # killed before the first checkpoint
    check_folder(tmp_path, base="hub/tiny")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "adapter_config.json", "pytorch_model.bin"])
def test_a_model_that_is_no_run_is_never_overwritten(tmp_path, file, overwrite):
    fill(tmp_path, file)
    with pytest.raises(UserError, match="holds a model that this package did not train"):
        check_folder(tmp_path, base="hub/tiny", overwrite=overwrite)
    clear(tmp_path)
    assert names(tmp_path) == {file}


@pytest.mark.parametrize("inside", ["", "checkpoint-3"])
def test_the_base_of_a_training_is_never_cleared(used, inside):
    with pytest.raises(UserError, match="is in output_dir .* choose another output_dir"):
        check_folder(used, base=str(used / inside), overwrite=True)


def test_clear_deletes_only_what_a_run_wrote(used):
    fill(used, *MINE)
    clear(used)
    assert names(used) == MINE
    clear(used)
    assert names(used) == MINE


def test_clear_keeps_the_users_readme(used):
    (used / "README.md").write_text("# My study")
    clear(used)
    assert names(used) == {"README.md"}
    assert [path.name for path in used.iterdir()] == ["README.md"], "no empty folder is left"


RECIPE = {
    "model_name_or_path": "hub/tiny",
    "dataset_name": "snli",
    "use_peft": True,
    "lora_r": 8,
    "learning_rate": 1e-3,
    "seed": 1,
}
DATA = {split: {"pairs": 9, "fingerprint": split} for split in ("train", "validation")}


@pytest.fixture
def checkpoint(tmp_path):
    write_run(tmp_path / "checkpoint-3", recipe=RECIPE, prompt=load_prompt("plain"), record={"data": DATA})
    return tmp_path / "checkpoint-3"


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"lora_r": 16}, "lora_r 8, now 16"),
        ({"lora_target_modules": "all-linear"}, "lora_target_modules default, now all-linear"),
        ({"use_peft": False}, "use_peft True, now False"),
        ({"load_in_4bit": True}, "load_in_4bit default, now True"),
        ({"optim": "adafactor"}, "optim default, now adafactor"),
        ({"model_name_or_path": "hub/other"}, "model_name_or_path hub/tiny, now hub/other"),
    ],
)
def test_other_shapes_are_refused(checkpoint, changed, difference):
    with pytest.raises(UserError, match=rf"checkpoint-3 was made with {difference}. Training cannot resume from it"):
        check_resumption(checkpoint, RECIPE | changed, load_prompt("plain"), DATA)


def test_another_task_is_refused_and_all_differences_listed(checkpoint):
    words = load_prompt("plain", ["yes", "maybe", "no"])
    with pytest.raises(UserError, match="label_words entailment, neutral, contradiction, now yes, maybe, no"):
        check_resumption(checkpoint, RECIPE, words, DATA)
    other = DATA | {"validation": {"pairs": 9, "fingerprint": "other"}}
    with pytest.raises(
        UserError,
        match=r"lora_r 8, now 4; prompt plain \(.*\), now few_shot \(.*\); validation pairs with fingerprint",
    ):
        check_resumption(checkpoint, RECIPE | {"lora_r": 4}, load_prompt("few_shot"), other)


def test_allowed_differences_are_logged_in_one_line(checkpoint, caplog):
    now = RECIPE | {
        "learning_rate": 1e-4,
        "seed": 2,
        "num_train_epochs": 3,
        "output_dir": "elsewhere",
        "save_steps": 9,
    }
    check_resumption(checkpoint, now, load_prompt("plain"), DATA)
    (line,) = caplog.messages
    assert line == (
        "checkpoint-3 was made with learning_rate 0.001, now 0.0001; num_train_epochs default, now 3; seed 1, now 2. "
        "Training uses the new values."
    )
    caplog.clear()
    check_resumption(checkpoint, RECIPE | {"weight_decay": 0.1}, load_prompt("plain"), DATA)
    assert caplog.messages == [
        "checkpoint-3 was made with weight_decay default, now 0.1. The optimizer keeps the old values."
    ]


def test_nothing_is_logged_for_the_same_recipe_or_without_a_record(checkpoint, caplog, tmp_path):
    check_resumption(checkpoint, RECIPE, load_prompt("plain"), DATA)
    check_resumption(tmp_path / "checkpoint-of-an-earlier-version", RECIPE, load_prompt("few_shot"), DATA)
    assert not caplog.messages
