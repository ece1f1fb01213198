"""Evaluate a model that is no run: a base, an adapter or a merged model, with one prompt or several.

The results with each prompt are kept in a run folder without weights. Its run.json says that nothing was trained
(`trained: false`), and its recipe.yaml repeats the evaluation.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trl import ModelConfig

from .. import UserError
from ..configs import EvalConfig, TrackingConfig
from ..configs.keys import field_values
from ..data.prompts import PromptEncoder
from ..models.loading import ModelSource, ParameterCounts, find_model
from ..runs import git_state, is_run, is_trained, read_run, versions, weights_fingerprint, write_run

# The keys of a recipe that say which model was evaluated.
MODEL_KEYS = ("model", "model_revision", "adapter", "dtype", "attn_implementation", "load_in_8bit", "load_in_4bit")


@dataclass(frozen=True)
class EvalTarget:
    """A model with one prompt, and the run folder for its results.

    Attributes:
        recipe: of the run; of a model that is no run, the keys of its evaluation with this prompt alone.
    """

    source: ModelSource
    folder: Path
    recipe: Mapping[str, Any]

    @property
    def weights(self) -> str | None:
        """A hash of the weights: of the adapter, or of the model; `None` for a model on the Hub."""
        return weights_fingerprint(self.source.tuned or Path(self.recipe["model"]).expanduser())

    def check_folder(self) -> None:
        """See that the folder is new, or holds results of the same model and prompt.

        Raises:
            UserError: if it does not.
        """
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return
        where = f"output_dir {self.folder}"
        if not is_run(self.folder):
            raise UserError(f"{where} is not empty; give a new folder")
        recipe, prompt, record = read_run(self.folder)
        if is_trained(record):
            raise UserError(f"{where} holds a trained run; give another folder")
        kept = {key: recipe.get(key) for key in MODEL_KEYS} | {"prompt": prompt.fingerprint}
        own = {key: self.recipe.get(key) for key in MODEL_KEYS} | {"prompt": self.source.prompt.fingerprint}
        kept["weights"], own["weights"] = record.get("weights"), self.weights
        other = next((key for key in own if own[key] != kept[key]), None)
        if other is not None:
            raise UserError(f"{where} holds results with another {other} ({kept[other]}); give another folder")

    def write(self, encoder: PromptEncoder, parameters: ParameterCounts) -> None:
        """Make the folder a run folder, unless it is one already."""
        if is_run(self.folder):
            return
        record: dict[str, Any] = {
            "trained": False,
            "model": self.source.model_args.model_name_or_path,
            "adapter": self.recipe.get("adapter") or (self.recipe["model"] if self.source.tuned else None),
            "weights": self.weights,
            "parameters": parameters.as_dict(),
            "data": {},
            "prompt_fingerprint": encoder.prompt.fingerprint,
            "rendered": encoder.rendered,
            "versions": versions(),
            "git": git_state(),
        }
        write_run(self.folder, recipe=self.recipe, prompt=encoder.prompt, record=record)


def find_targets(args: EvalConfig, tracking: TrackingConfig) -> list[EvalTarget]:
    """The model with each of its prompts, in the order given.

    Raises:
        UserError: if the model is a run on this machine, two prompts have one name, or a folder holds other results.
    """
    assert args.model is not None, "checked by EvalConfig"
    if is_run(Path(args.model).expanduser()):
        raise UserError(f"model {args.model} is a run; give it as --run {args.model}, which keeps its results with it")
    settings = ModelConfig(
        dtype=args.dtype or "auto",
        attn_implementation=args.attn_implementation,
        load_in_8bit=args.load_in_8bit,
        load_in_4bit=args.load_in_4bit,
    )
    targets: dict[str, EvalTarget] = {}
    for prompt in args.prompt or [None]:
        source = find_model(
            args.model,
            revision=args.model_revision,
            adapter=args.adapter,
            prompt=prompt,
            label_words=args.label_words,
            labels=args.labels,
            settings=settings,
        )
        name = source.prompt.name
        if name in targets:
            raise UserError(f"prompt: two of them are called {name}; give each a name of its own")
        folder = _folder(args, name)
        own_args = replace(args, prompt=None if prompt is None else [prompt], output_dir=str(folder))
        values, defaults = field_values((own_args, tracking))
        recipe = {key: value for key, value in values.items() if value != defaults[key]}
        targets[name] = EvalTarget(source, folder, recipe)
        targets[name].check_folder()
    return list(targets.values())


def _folder(args: EvalConfig, prompt: str) -> Path:
    if args.output_dir is None:
        name = Path(args.adapter or args.model or "").expanduser().resolve().name
        return Path("outputs", f"{name}-{prompt}")
    folder = Path(args.output_dir).expanduser()
    return folder / prompt if len(args.prompt or ()) > 1 else folder
