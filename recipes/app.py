"""A web page to try a model: enter premise and hypothesis, and see the probabilities before and after tuning.

pip install -e ".[app]"
python recipes/app.py --model outputs/qwen3-0.6b-lora
python recipes/app.py --model me/qwen3-0.6b-snli

To make it a Space: copy this file as app.py and the folder nli_sft, list the dependencies of pyproject.toml in
requirements.txt, and set the variable NLI_SFT_MODEL to the Hub id.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr

from nli_sft import UserError
from nli_sft.classifier import NLIClassifier
from nli_sft.configs import run_script
from nli_sft.data.prompts import listed
from nli_sft.evaluation.comparison import buckets
from nli_sft.runs import evaluation_folders, read_predictions

EXAMPLES = [
    ["Two women carry paper bags out of a shop.", "Some people have bags."],
    ["Two women carry paper bags out of a shop.", "The women have bought shoes."],
    ["Two women carry paper bags out of a shop.", "The women are asleep at home."],
]
TITLES = {"fixed": "Corrected by tuning", "both_wrong": "Not corrected", "regressed": "Regressed"}


@dataclass
class AppConfig:
    model: str = field(
        default=os.environ.get("NLI_SFT_MODEL", ""), metadata={"help": "Run folder, exported model, or Hub id."}
    )
    device: str | None = field(default=None, metadata={"help": "Such as cpu or cuda:1. By default an accelerator."})
    port: int | None = field(default=None, metadata={"help": "Port. By default the first free one from 7860."})

    def __post_init__(self):
        if not self.model:
            raise UserError("model is missing; give it as --model, or in the environment variable NLI_SFT_MODEL")


def main(args):
    tuned = NLIClassifier.from_pretrained(args.model, device=args.device)
    base = tuned.before_tuning()

    def predict(premise, hypothesis):
        if not premise.strip() or not hypothesis.strip():
            raise gr.Error("Write a premise and a hypothesis.")
        try:
            return [model(premise.strip(), hypothesis.strip()).probabilities for model in (base, tuned)]
        except UserError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="Does it follow?", analytics_enabled=False) as page:
        gr.Markdown(f"# Does it follow?\n{Path(args.model).name}: {listed(tuned.encoder.prompt.labels)}.")
        premise = gr.Textbox(label="Premise", lines=2, elem_id="premise")
        hypothesis = gr.Textbox(label="Hypothesis", lines=2, elem_id="hypothesis")
        button = gr.Button("Predict", variant="primary", elem_id="predict")
        with gr.Row():
            bars = [gr.Label(label=f"{when} tuning", elem_id=when.lower()) for when in ("Before", "After")]
        gr.on([button.click, hypothesis.submit], predict, [premise, hypothesis], bars, api_name="predict")
        for title, pairs in examples(Path(args.model)).items():
            gr.Examples(pairs, [premise, hypothesis], label=title)
    page.launch(server_port=args.port)


def examples(run):
    """A few fixed, wrong and regressed pairs of the first evaluation, or `EXAMPLES` if there are no predictions."""
    folder = next((path for path in evaluation_folders(run) if (path / "predictions.parquet").exists()), None)
    if folder is None:
        return {"Examples": EXAMPLES}
    table = read_predictions(folder)
    table["kind"] = buckets(*(table[name].to_numpy() for name in ("label", "base_prediction", "tuned_prediction")))
    rows = {title: table[table["kind"] == kind].head(3) for kind, title in TITLES.items()}
    return {title: some[["premise", "hypothesis"]].to_numpy().tolist() for title, some in rows.items() if len(some)}


if __name__ == "__main__":
    run_script(main, (AppConfig,))
