import pytest
from tiny_run import make_base, make_run

from nli_sft import UserError
from nli_sft.configs import EvalConfig, TrackingConfig, parse_recipe
from nli_sft.data.prompts import PROMPTS
from nli_sft.evaluation.models import find_targets
from nli_sft.models.loading import count_parameters, run_source
from nli_sft.runs import read_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


def targets(base, *more):
    return find_targets(
        *parse_recipe((EvalConfig, TrackingConfig), ["--model", str(base), "--dataset_name", "demo", *map(str, more)])
    )


def write(one):
    one.write(one.source.load_encoder(), count_parameters(one.source.load_model(one.source.model_args)))


def test_every_prompt_has_a_folder(base, tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text('user: "{premise} So: {hypothesis}"\n')
    found = targets(base, "--prompt", "plain", "few_shot", own, "--label_words", "yes", "maybe", "no")
    assert [str(one.folder) for one in found] == ["outputs/base-plain", "outputs/base-few_shot", "outputs/base-own"]
    assert {one.source.prompt.label_words for one in found} == {("yes", "maybe", "no")}
    found = targets(base, "--prompt", "plain", own, "--output_dir", tmp_path / "x")
    assert [one.folder for one in found] == [tmp_path / "x" / "plain", tmp_path / "x" / "own"]
    (one,) = targets(base, "--output_dir", tmp_path / "x")
    assert one.folder == tmp_path / "x"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "own.yaml").write_text(own.read_text())
    with pytest.raises(UserError, match="two of them are called own; give each a name of its own"):
        targets(base, "--prompt", own, tmp_path / "a" / "own.yaml")


def test_the_folder_opens_the_model_again_and_repeats_its_evaluation(base, tmp_path):
    (one,) = targets(base, "--prompt", "few_shot", "--output_dir", tmp_path / "x", "--max_samples", 5)
    write(one)
    recipe, prompt, record = read_run(tmp_path / "x")
    assert prompt == PROMPTS["few_shot"]
    assert record["trained"] is False
    again = parse_recipe((EvalConfig, TrackingConfig), ["--config", str(tmp_path / "x" / "recipe.yaml")])[0]
    assert (again.model, again.prompt, again.max_samples) == (str(base), ["few_shot"], 5)
    source = run_source(tmp_path / "x")
    assert source.tuned is None
    assert source.load_encoder().prompt == PROMPTS["few_shot"]
    assert source.model_args.model_name_or_path == str(base)


def test_a_folder_holds_results_of_one_model_and_prompt(base, tmp_path):
    folder = tmp_path / "x"
    write(targets(base, "--output_dir", folder)[0])
    targets(base, "--output_dir", folder, "--max_samples", 5)  # more results of the same
    with pytest.raises(UserError, match=r"holds results with another prompt \("):
        targets(base, "--output_dir", folder, "--prompt", "few_shot")
    with pytest.raises(UserError, match=r"holds results with another load_in_4bit \(None\); give another folder"):
        targets(base, "--output_dir", folder, "--load_in_4bit")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        targets(base, "--output_dir", tmp_path / "notes")
    run = make_run(tmp_path / "run", base, evaluated=False)
    with pytest.raises(UserError, match="holds a trained run; give another folder"):
        targets(base, "--output_dir", run)
    with pytest.raises(UserError, match=f"model {run} is a run; give it as --run {run}"):
        targets(run)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "x", "--model", "y"], "run and model are both given"),
        (["--model", "y"], "dataset_name is missing; give the pairs to evaluate model on"),
        (["--run", "x", "--prompt", "plain"], "prompt is given, but a run has its own; leave it out"),
        (["--run", "x", "--adapter", "z"], "adapter is given, but a run has its own"),
        (["--run", "x", "--label_words", "a", "b", "c"], "label_words is given, but a run has its own"),
        (["--run", "x", "--load_in_4bit"], "load_in_4bit is given, but a run has its own"),
    ],
)
def test_keys_of_a_run_and_of_a_model(arguments, message):
    with pytest.raises(UserError, match=message):
        parse_recipe((EvalConfig, TrackingConfig), arguments)
