"""README.md and its pages are correct: paths and anchors exist, commands parse, and README.md's commands that need
neither a GPU nor an account run."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from csv import writer
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from nli_sft import UserError, __main__, configs
from nli_sft.classifier import NLIClassifier
from nli_sft.configs import parse_recipe
from nli_sft.data.sources import load_pairs
from nli_sft.labels import LABELS

ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES = [*DOCS, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "recipes/README.md"))]
PAGES += [ROOT / "recipes" / "lm_eval_task" / "README.md"]

# Commands that cannot run here are marked with what they need.
NEEDS = re.compile(r"#.*\b(GPUs?|Hub|W&B)\b")
# Shell commands, other tools, and commands that run until they are stopped.
OTHERS = ("git clone", "source", "hf auth login", "wandb sweep recipes/sweep.yaml")
NOT_RUN = ("make", "source", "python recipes/app.py")

# Values for the variables of shell scripts.
VARIABLES = {
    "$((8 * SLURM_NNODES))": "16",
    "$SLURM_NNODES": "2",
    "$SLURM_NODEID": "0",
    "$HEAD": "first-node",
    "$lr": "1e-4",
    "$seed": "1",
    "$name": "name",
    "$r": "16",
}

# Flags that shorten commands from minutes to seconds.
SMALLER = {
    "recipes/sft.py": "--max_train_samples=24 --max_eval_samples=6 --num_train_epochs=1 --eval_steps=0.5 "
    "--save_steps=0.5 --hypothesis_only_control=false --report_to=none",
    "recipes/eval.py": "--max_samples=12 --unconstrained_samples=2 --calibration_pairs=0",
}


def fenced(page, language):
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page):
    """The commands on a page: (command, whether it is marked as needing a GPU, the Hub or W&B)."""
    for block in fenced(page, "console"):
        for name, value in re.findall(r'^\$ (\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f'$ {name}="{value}"\n', "").replace(f"${name}", value)
        block = block.replace("e18.yaml", "recipes/demo/full.yaml")  # docs/results.md describes the former
        for line in block.splitlines():
            assert line.startswith("$ "), f"{page.name}: a command begins with $, not {line!r}"
            yield line[2:], bool(NEEDS.search(line))
    for block in fenced(page, "bash"):
        for variable, value in VARIABLES.items():
            block = block.replace(variable, value)
        for command in re.findall(r"(?:accelerate launch|torchrun|python) [^;&\n']*", block):
            yield command, bool(NEEDS.search(block))


ALL = [(page.name, *command) for page in DOCS for command in commands(page)]


def known_by(script, arguments=None):
    """The config dataclasses of a script, after it has parsed `arguments` as on the command line."""
    found = []

    def parse(_, types, positional=None):
        if arguments is not None:
            parse_recipe(types, positional=positional)
        found.extend(types)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "run_script", parse)
        patch.setattr(sys, "argv", [script, *(arguments or [])])
        patch.chdir(ROOT)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name.startswith("nli_sft"):
                raise
            pytest.skip(f"{script} needs {error.name}")
    return found


def parse_command(command):
    """Parse a command as its program would, without running it."""
    words = shlex.split(command, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    if command.startswith(OTHERS):
        return
    if words[0] == "make":
        subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        return
    if words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file(), args.config_file
        words = ["python", args.training_script, *args.training_script_args]
    if words[0] == "torchrun":
        args = get_args_parser().parse_args(words[1:])
        words = ["python", args.training_script, *args.training_script_args]
    if words[0] == "nli-sft":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(__main__, "predict", lambda args, stdout: None)
            __main__.main(words[1:])
        return
    assert words[0] == "python", f"what is {words[0]}?"
    known_by(words[1], words[2:])


@pytest.mark.parametrize(("page", "command", "marked"), ALL, ids=[f"{p}-{n}" for n, (p, *_) in enumerate(ALL)])
def test_commands_parse(page, command, marked):
    parse_command(command)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python recipes/sft.py --config recipes/demo/lora.yaml --max_train_sample 3", UserError),
        ("python recipes/sft.py --config recipes/demo/lorra.yaml", UserError),
        ("python recipes/sft.py --config recipes/demo/lora.yaml --precision bf17", UserError),
        ("accelerate launch --config_fil accelerate_configs/cpu.yaml recipes/eval.py --run outputs/demo", SystemExit),
        ("accelerate launch --config_file accelerate_configs/none.yaml recipes/eval.py --run outputs", AssertionError),
        ("accelerate launch recipes/eval.py --runs outputs/demo-lora", UserError),
        ("torchrun --nproc_per_nodes 4 -- recipes/eval.py --run outputs/demo-lora", SystemExit),
        ("python recipes/compare.py outputs/* --htm compare.html", UserError),
        ("python recipes/evaluate.py --run outputs/demo-lora", FileNotFoundError),
        ("nli-sft predict --modle outputs/demo-lora pairs.csv", SystemExit),
        ("make demos", subprocess.CalledProcessError),
        ("nli-sft train", SystemExit),
        ("nli_sft predict", AssertionError),
    ],
)
def test_misspelt_commands_do_not_parse(command, error, capsys):
    with pytest.raises(error):
        parse_command(command)


def test_keys_and_flags_named_in_the_text_exist():
    scripts = ("sft", "eval", "compare", "export", "push", "benchmark")
    known = {name for script in scripts for t in known_by(f"recipes/{script}.py") for name in t.__dataclass_fields__}
    launcher = {option for action in launch_command_parser()._actions for option in action.option_strings}
    known |= {"config", *(option.lstrip("-") for option in launcher)}
    known |= set(re.findall(r'"--(\w+)"', Path(__main__.__file__).read_text()))  # of predict
    for page in DOCS:
        code = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL))
        named = {flag for text in code for flag in re.findall(r"(?<!\S)--(\w+)", text)}
        named |= {key for text in code for key in re.findall(r"^(\w+): ", text)}
        assert named <= known, f"{page.name}: {named - known}"


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_and_anchors_exist(page):
    text = page.read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", text):
        if target.startswith(("http:", "https:")):
            continue
        there = page.parent / target if target else page
        assert there.exists(), target
        if anchor:
            text_there = re.sub(r"^```.*?^```", "", there.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", text_there, re.MULTILINE)}
    for path in re.findall(r"(?<![\w/.-])((?:recipes|accelerate_configs|nli_sft|docs|tests)/[\w./-]*\w)", text):
        assert (ROOT / path).exists(), path


def test_docs_code_lists_all_modules():
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "code.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"`(\w+)(?:\.py|/)`", " ".join(table)))
    package = (ROOT / "nli_sft").iterdir()
    there = {path.stem for path in package if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert named == there - {"__init__"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone after a small `make demo`, with the reader's own files of pairs."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("recipes", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    words = {"entailment": "yes", "neutral": "unknown", "contradiction": "no"}
    for name, split, columns in (
        ("pairs.csv", "train", ["premise", "hypothesis", "label"]),
        ("new_pairs.csv", "test", ["premise", "hypothesis", "label"]),
        ("mine.csv", "train", ["text", "claim", "verdict"]),
    ):
        with (folder / name).open("w", newline="") as file:
            rows = writer(file)
            rows.writerow(columns)
            for pair in load_pairs("demo", split).select(range(50)):
                name = LABELS[pair["label"]]
                label = name if columns[2] == "label" else words[name]
                rows.writerow([pair["premise"], pair["hypothesis"], label])
    run(folder, "python recipes/sft.py --config recipes/demo/lora.yaml")
    return folder


def run(folder, command):
    """Run a command in a shell, with flags that shorten it."""
    smaller = next((flags for script, flags in SMALLER.items() if script in command), "")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        ["bash", "-c", f"{command} {smaller}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "data.md"], ids=lambda page: page.stem)
def test_commands_that_need_neither_a_gpu_nor_an_account_run(page, place):
    for command, marked in commands(page):
        if not marked and not command.startswith((*OTHERS, *NOT_RUN)):
            run(place, command)


def readme_example():
    """README's Python example and the output shown below it."""
    (code,), (output,) = fenced(DOCS[0], "python"), fenced(DOCS[0], "text")
    assert parse_output(output)
    return code, output


def parse_output(text):
    """[(hypothesis, label, probability)] of the example's output."""
    return re.findall(r"^(.*\.) +(\w+) +([\d.]+)$", text, re.MULTILINE)


def run_example(code, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return parse_output(result.stdout)


def test_the_classifier_of_the_readme_runs_as_pasted(place):
    code, output = readme_example()
    premise = re.search(r'premise = "(.*)"', code)[1]
    hypotheses = [hypothesis for hypothesis, *_ in parse_output(output)]
    classifier = NLIClassifier.from_pretrained(place / "outputs" / "demo-lora")
    expected = classifier([premise] * len(hypotheses), hypotheses)
    for hypothesis, prediction, printed in zip(hypotheses, expected, run_example(code, place), strict=True):
        assert printed[:2] == (hypothesis, prediction.label)
        assert float(printed[2]) == pytest.approx(max(prediction.probabilities.values()), abs=0.01)


@pytest.mark.slow
def test_the_demo_predicts_what_the_readme_shows(tmp_path):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    train = [sys.executable, "recipes/sft.py", "--config", "recipes/demo/lora.yaml", "--report_to=none"]
    train.append("--hypothesis_only_control=false")
    subprocess.run(train, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    code, output = readme_example()
    for shown, printed in zip(parse_output(output), run_example(code, tmp_path), strict=True):
        assert printed[:2] == shown[:2]
        assert float(printed[2]) == pytest.approx(float(shown[2]), abs=0.15)  # rounding differs between machines


def test_examples_for_the_demo_are_in_its_words():
    """The demo's model does not know other words."""
    pairs = load_pairs("demo", "train")
    known = {word for role in ("premise", "hypothesis") for text in pairs[role] for word in re.findall(r"\w+", text)}
    code, output = readme_example()
    texts = [re.search(r'premise = "(.*)"', code)[1], *(hypothesis for hypothesis, *_ in parse_output(output))]
    commands_with_texts = [command for _, command, _ in ALL if "--premise " in command and "demo" in command]
    assert commands_with_texts
    for command in commands_with_texts:
        words = shlex.split(command, comments=True)
        texts += [words[words.index(flag) + 1] for flag in ("--premise", "--hypothesis")]
    for text in texts:
        unknown = set(re.findall(r"\w+", text)) - known
        assert not unknown, f"{text}: {unknown}"
