"""Push a run to the Hub: adapter or model, tokenizer, prompt, report, and a card with the results.

python recipes/push.py --run outputs/qwen3-0.6b-lora --hub_model_id me/qwen3-0.6b-snli
python recipes/push.py --run outputs/qwen3-0.6b-lora --hub_model_id me/qwen3-0.6b-snli --create_pr

The token is that of `hf auth login`, or of the environment variable HF_TOKEN.
"""

import nli_sft.script  # isort: skip  # noqa: F401 (first: Ctrl-C ends quietly)

from nli_sft.configs import run_script
from nli_sft.hub.push import PushConfig, push


def main(args):
    address = push(args)
    print(f"Pushed {args.run}: {address}")
    print(f'Try it: NLIClassifier.from_pretrained("{args.hub_model_id}")("A man sleeps.", "A person is awake.")')


if __name__ == "__main__":
    run_script(main, (PushConfig,))
