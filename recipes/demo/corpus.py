"""Text from the same world, for a base model to grow up on: it shows what follows from what, and never names it.

Scenes are those of the train split, without held-out combinations. Of the label words not one is in this text.
"""

from collections.abc import Iterator
from random import Random

from language import premise
from pairs import Ledger, draw_hypothesis
from scene import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL, Scene, draw_scene

# A hypothesis led in by its relation to what was said before ("{h}" has a small first letter and no full stop) ...
LEADS = {
    ENTAILMENT: (
        "So {h}.", "Therefore {h}.", "This means that {h}.", "Clearly, {h}.", "In other words, {h}.",
    ),
    NEUTRAL: (
        "Perhaps {h}.", "Maybe {h}, maybe not.", "It may be that {h}.", "Nobody knows whether {h}.", "Possibly {h}.",
    ),
    CONTRADICTION: (
        "It is not the case that {h}.", "So it is false that {h}.", "Nobody could say that {h}.",
        "It would be wrong to say that {h}.", "But one cannot say that {h}.",
    ),
}  # fmt: skip
# ... and one that is answered afterwards, in one voice throughout a document: answers in the order of LABELS, tasks.
VOICES = (
    (
        ("Yes.", "Maybe.", "No."),
        (
            "Premise: {p}\nHypothesis: {H}.\nIs the hypothesis true? Answer with yes, no or maybe.",
            "{p} Is it true that {h}?",
        ),
    ),
    (
        ("True.", "Unknown.", "False."),
        (
            "Premise: {p}\nHypothesis: {H}.\nDoes the premise show it? Answer with true, false or unknown.",
            "Text: {p}\nClaim: {H}.\nTrue, false or unknown?",
        ),
    ),
    (
        ("Indeed.", "Perhaps.", "Not so."),
        (
            "Premise: {p}\nHypothesis: {H}.\nDoes the hypothesis follow from the premise?",
            "{p}\n{H}. Is that so?",
        ),
    ),
)
QUESTIONS = ("Is it true that {h}?", "Is it so that {h}?", "Do we know that {h}?", "{H}. Is that so?")


def render_chat(messages: list[dict]) -> str:
    """A conversation in the form of the chat template."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def fill(template: str, hypothesis: str, text: str = "") -> str:
    """A template with a hypothesis in it, as a sentence (`H`) or within one (`h`), and a premise (`p`)."""
    sentence = hypothesis.rstrip(".")
    return template.format(p=text, H=sentence, h=sentence[0].lower() + sentence[1:])


def conversation(text: str, hypotheses: list[tuple[str, str]], rng: Random) -> str:
    """A user tells of a scene and asks; the assistant answers."""
    answers, tasks = rng.choice(VOICES)
    messages = []
    for number, (label, hypothesis) in enumerate(hypotheses):
        template = rng.choice(QUESTIONS if number else tasks)
        messages.append({"role": "user", "content": fill(template, hypothesis, text)})
        messages.append({"role": "assistant", "content": answers[LABELS.index(label)]})
    return render_chat(messages)


def discourse(text: str, hypotheses: list[tuple[str, str]], rng: Random) -> str:
    """A description and what may be said about it, in one style throughout."""
    style, (answers, _) = rng.randrange(3), rng.choice(VOICES)
    sentences = [text]
    for label, hypothesis in hypotheses:
        if style == 0:
            sentences.append(fill(rng.choice(LEADS[label]), hypothesis))
        else:
            statement = fill(rng.choice(QUESTIONS), hypothesis) if style == 1 else hypothesis
            sentences.append(f"{statement} {answers[LABELS.index(label)]}")
    return " ".join(sentences)


def description(scene: Scene, text: str, truths: list[str], rng: Random) -> str:
    """Several sentences that all hold of one scene."""
    return " ".join([text, *truths, premise(scene, rng)])


def draw_documents(seed: int | str) -> Iterator[str]:
    """Documents without end: half conversations, a third discourse, the rest descriptions."""
    rng, ledger = Random(f"corpus {seed}"), Ledger()
    while True:
        scene = draw_scene(rng)
        if scene.split != "train" or scene.unseen:
            continue
        text = premise(scene, rng)
        form = rng.random()
        labels = [rng.choice(LABELS) if form < 0.85 else ENTAILMENT for _ in range(rng.randint(3, 6))]
        drawn = [(label, draw_hypothesis(scene, text, label, ledger, rng, candidates=2)) for label in labels]
        hypotheses = [(label, found[0]) for label, found in drawn if found]
        if not hypotheses:
            continue
        if form < 0.5:
            yield conversation(text, hypotheses, rng)
        elif form < 0.85:
            yield discourse(text, hypotheses, rng)
        else:
            yield description(scene, text, [hypothesis for _, hypothesis in hypotheses], rng)
