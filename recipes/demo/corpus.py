"""The base model's pretraining corpus: descriptions of scenes, with statements and questions about them.

Scenes are those of the train split, without held-out combinations. The text contains none of the label words.
"""

from collections.abc import Iterator
from random import Random

from language import premise_text
from pairs import LabelCounts, draw_hypothesis
from scene import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL, Scene, draw_scene

# Statements that express the label of a hypothesis ("{h}" starts in lower case and has no full stop).
STATEMENTS = {
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
# Answers in the order of LABELS, and questions that ask for them. Each document keeps to one style.
ANSWER_STYLES = (
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
    """A conversation in the format of the chat template."""
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)


def fill(template: str, hypothesis: str, text: str = "") -> str:
    """A template with the hypothesis, as a sentence (`H`) or within one (`h`), and the premise (`p`) filled in."""
    sentence = hypothesis.rstrip(".")
    return template.format(p=text, H=sentence, h=sentence[0].lower() + sentence[1:])


def conversation(text: str, hypotheses: list[tuple[str, str]], rng: Random) -> str:
    """A conversation: the user describes a scene and asks questions, the assistant answers."""
    answers, tasks = rng.choice(ANSWER_STYLES)
    messages = []
    for number, (label, hypothesis) in enumerate(hypotheses):
        template = rng.choice(QUESTIONS if number else tasks)
        messages.append({"role": "user", "content": fill(template, hypothesis, text)})
        messages.append({"role": "assistant", "content": answers[LABELS.index(label)]})
    return render_chat(messages)


def discourse(text: str, hypotheses: list[tuple[str, str]], rng: Random) -> str:
    """A description, followed by hypotheses and what is known of each, in one style."""
    style, (answers, _) = rng.randrange(3), rng.choice(ANSWER_STYLES)
    sentences = [text]
    for label, hypothesis in hypotheses:
        if style == 0:
            sentences.append(fill(rng.choice(STATEMENTS[label]), hypothesis))
        else:
            statement = fill(rng.choice(QUESTIONS), hypothesis) if style == 1 else hypothesis
            sentences.append(f"{statement} {answers[LABELS.index(label)]}")
    return " ".join(sentences)


def description(scene: Scene, text: str, truths: list[str], rng: Random) -> str:
    """Several true sentences about one scene."""
    return " ".join([text, *truths, premise_text(scene, rng)])


def draw_documents(seed: int | str) -> Iterator[str]:
    """An endless stream of documents: 50 % conversations, 35 % discourses, 15 % descriptions."""
    rng, counts = Random(f"corpus {seed}"), LabelCounts()
    while True:
        scene = draw_scene(rng)
        if scene.split != "train" or scene.held_out:
            continue
        text = premise_text(scene, rng)
        form = rng.random()
        labels = [rng.choice(LABELS) if form < 0.85 else ENTAILMENT for _ in range(rng.randint(3, 6))]
        drawn = [(label, draw_hypothesis(scene, text, label, counts, rng, candidates=2)) for label in labels]
        hypotheses = [(label, found[0]) for label, found in drawn if found]
        if not hypotheses:
            continue
        if form < 0.5:
            yield conversation(text, hypotheses, rng)
        elif form < 0.85:
            yield discourse(text, hypotheses, rng)
        else:
            yield description(scene, text, [hypothesis for _, hypothesis in hypotheses], rng)
