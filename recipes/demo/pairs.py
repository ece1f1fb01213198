"""Pairs: hypotheses about scenes, labelled by inference from the facts, with wording balanced across labels."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, zip_longest
from random import Random

from language import capitalise, garment_phrase, premise_text, to_be, with_article, wording
from scene import (
    CONTRADICTION,
    ENTAILMENT,
    LABELS,
    NEUTRAL,
    Actor,
    Scene,
    clash,
    draw_scene,
    has_held_out,
    infer_label,
)
from world import (
    ACTIONS,
    COUNTS,
    FURS,
    HOURS,
    KINDS,
    LOOKS,
    MANNERS,
    MOODS,
    OUTFITS,
    PLACES,
    PURPOSES,
    RELATIONS,
    ROLES,
    SKIES,
    TIMES,
    WARM_CLOTHES,
    WEATHERS,
    Concept,
)

NEGATED_LABEL = {ENTAILMENT: CONTRADICTION, NEUTRAL: NEUTRAL, CONTRADICTION: ENTAILMENT, None: None}

# The claims that a hypothesis can make, by topic.
CLAIMS = {
    "kind": KINDS,
    "count": COUNTS,
    "looks": LOOKS,
    "mood": MOODS,
    "clothes": [*OUTFITS.values(), WARM_CLOTHES],
    "colour": [concept for name, concept in OUTFITS.items() if " " in name],
    "fur": FURS,
    "relation": RELATIONS,
    "action": ACTIONS,
    "place": PLACES,
    "time": HOURS + TIMES,
    "weather": SKIES + WEATHERS,
    "purpose": PURPOSES,
    "manner": MANNERS,
    "role": [active for active, _ in ROLES],
}
# A rule is named after the topic of its claims. "binding" claims of one actor what may be true of the other only.
RULES = ("action", "action", "kind", "count", "looks", "mood", "clothes", "colour", "relation", "place", "time",
         "weather", "purpose", "purpose", "manner", "manner", "role", *["binding"] * 5)  # fmt: skip
PASSIVE = dict(ROLES)
BINDING_TOPICS = ("action", "mood", "clothes", "looks")


def related(topic: str) -> dict[str, dict[str, list[Concept]]]:
    """For each concept of a topic in premises, the claims about that topic by label."""
    others = {"colour": OUTFITS.values(), "role": [role for pair in ROLES for role in pair]}
    table = {}
    for concept in others.get(topic, CLAIMS[topic]):
        table[concept.name] = {label: [] for label in (*LABELS, None)}
        for claim in CLAIMS[topic]:
            table[concept.name][infer_label(claim.features, concept.features)].append(claim)
    return table


RELATED = {topic: related(topic) for topic in CLAIMS}


class Claim:
    """A claim about one actor of a scene: a concept, negated or not, and the resulting label."""

    def __init__(self, scene: Scene, rule: str, wanted: str, rng: Random):
        self.scene, self.rule, self.rng = scene, rule, rng
        number = rng.randrange(len(scene.actors))
        self.actor = scene.actors[number]
        self.other = scene.actors[1 - number] if len(scene.actors) == 2 else None
        self.negated = rule != "count" and rng.random() < 0.3
        self.topic = rng.choice(BINDING_TOPICS) if rule == "binding" else rule
        if rule == "colour" and self.actor.attributes["kind"].features["being"] == "animal":
            self.topic = "fur"
        self.concept = self._draw_concept(NEGATED_LABEL[wanted] if self.negated else wanted)
        self.label = self._infer_label() if self.concept else None
        if self.negated:
            self.label = NEGATED_LABEL[self.label]

    def _draw_concept(self, label: str) -> Concept | None:
        """A concept of the topic that has this label, if the premise states the topic; sometimes any concept."""
        attributes, rng = self.actor.attributes, self.rng
        if self.rule == "binding":
            if self.other is None:
                return None
            return rng.choice((self.actor, self.other)).attributes.get(self.topic)
        if self.topic == "colour":
            if "clothes" not in attributes:
                return None
            worn = attributes["clothes"].name
            colours = [c for c in RELATED["colour"][worn][label] if c.name.split()[-1] == worn.split()[-1]]
            return rng.choice(colours) if colours else None
        if self.topic in attributes and rng.random() < 0.85:
            choices = RELATED[self.topic][attributes[self.topic].name][label]
            return rng.choice(choices) if choices else None
        return rng.choice(CLAIMS[self.topic])

    def _infer_label(self) -> str | None:
        """The label of the claim without its negation; `None` if the claim is debatable or absurd."""
        concept, actor = self.concept, self.actor
        if clash(concept.needs, actor.facts):
            return None
        if self.topic == "role" and (self.other is None or clash(PASSIVE[concept].needs, self.other.facts)):
            return None
        label = infer_label(concept.features, actor.facts)
        if label != CONTRADICTION and clash(concept.features | concept.needs, actor.background):
            return None
        return label

    def sentence(self) -> str | None:
        """The hypothesis in English, or `None` if it has no natural wording."""
        rng, actor, concept, topic = self.rng, self.actor, self.concept, self.topic
        plural, attributes = actor.plural, actor.attributes
        verb = to_be(plural, self.negated)
        if topic in ("time", "weather") and concept in HOURS + SKIES:
            return capitalise(f"it {to_be(False, self.negated)} {wording(concept, rng)}")
        if topic == "kind":
            return self._kind_sentence(verb)
        noun = self._noun(actor, self.other)
        if noun is None:
            return None
        if topic == "count":
            count = concept.words[-1][0]
            several = count not in ("only one", "more than one")
            return capitalise(f"{count} {noun.words[0][several]} {to_be(several)} {self._action_or_place(several)}")
        if topic == "colour":
            return self._colour_sentence(noun)
        subject = f"the {self._with_details(noun)}"
        if topic == "role":
            return self._role_sentence(subject, verb)
        if topic == "clothes":
            worn = concept.name if concept is WARM_CLOTHES else garment_phrase(concept, plural)
            return capitalise(f"{subject} {verb} wearing {worn}")
        words = wording(concept, rng, plural)
        if topic in ("purpose", "manner", "time", "weather") or (topic == "place" and rng.random() < 0.5):
            if "action" not in attributes:
                return None
            words = f"{wording(attributes['action'], rng, plural)} {words}"
        elif topic == "action" and rng.random() < 0.3:
            words += self._place_phrase(concept)
        if topic in ("action", "place") and not self.negated and rng.random() < 0.3:
            subject = self._indefinite(noun)
        return capitalise(f"{subject} {verb} {words}")

    def _colour_sentence(self, noun: Concept) -> str:
        """The boy's hat is (not) red."""
        name = wording(noun, self.rng, self.actor.plural)
        owner = f"the {name}'" if name.endswith("s") else f"the {name}'s"
        one, several = self.concept.words[0]
        plural = self.actor.plural or one == several  # such as boots
        colour, worn = (several if plural else one).split()
        return capitalise(f"{owner} {worn} {to_be(plural, self.negated)} {colour}")

    def _role_sentence(self, subject: str, verb: str) -> str | None:
        """The boy is (not) chasing the dog; the dog is (not) being chased by the boy."""
        noun = self._noun(self.other, self.actor)
        if noun is None:
            return None
        whom = f"the {self._with_details(noun, self.other)}"
        if self.rng.random() < 0.5:
            return capitalise(f"{subject} {verb} {self.concept.name} {whom}")
        passive = PASSIVE[self.concept].name
        return capitalise(f"{whom} {to_be(self.other.plural, self.negated)} {passive} {subject}")

    def _kind_sentence(self, verb: str) -> str | None:
        """The person is (not) a girl; a girl is running."""
        actor, rng, concept = self.actor, self.rng, self.concept
        has_predicate = actor.attributes.keys() & {"action", "place"}
        if self.other is None and not self.negated and has_predicate and rng.random() < 0.5:
            return capitalise(f"{self._indefinite(concept)} {verb} {self._action_or_place(actor.plural)}")
        noun = self._noun(actor, self.other, neutral_to=concept)
        if noun is None:
            return None
        name = wording(concept, rng, actor.plural)
        return capitalise(f"the {self._with_details(noun)} {verb} {name if actor.plural else with_article(name)}")

    def _noun(self, actor: Actor, other: Actor | None, neutral_to: Concept | None = None) -> Concept | None:
        """A kind that describes this actor and excludes the other one.

        Args:
            neutral_to: a concept that the kind must neither entail nor contradict.
        """
        kind = actor.attributes["kind"]
        nouns = [
            noun
            for noun in RELATED["kind"][kind.name][ENTAILMENT]
            if (other is None or clash(noun.features, other.attributes["kind"].features))
            and (neutral_to is None or infer_label(neutral_to.features, noun.features) == NEUTRAL)
        ]
        if kind in nouns and self.rng.random() < 0.5:
            return kind
        return self.rng.choice(nouns) if nouns else None

    def _with_details(self, noun: Concept, actor: Actor | None = None) -> str:
        """The noun with some attributes of the actor, which do not change the label."""
        actor, rng = actor or self.actor, self.rng
        words = wording(noun, rng, actor.plural)
        for topic in ("looks", "fur", "mood"):
            if topic in actor.attributes and topic != self.topic and rng.random() < 0.15:
                words = f"{wording(actor.attributes[topic], rng)} {words}"
        if "clothes" in actor.attributes and self.topic not in ("clothes", "colour") and rng.random() < 0.2:
            words += f" in {garment_phrase(actor.attributes['clothes'], actor.plural)}"
        return words

    def _indefinite(self, noun: Concept) -> str:
        """The noun with an indefinite article or "some"."""
        words = wording(noun, self.rng, self.actor.plural)
        return f"some {words}" if self.actor.plural else with_article(words)

    def _action_or_place(self, plural: bool) -> str:
        """The action of the actor, the place, or both."""
        attributes, rng = self.actor.attributes, self.rng
        topics = [topic for topic in ("action", "place") if topic in attributes]
        words = [wording(attributes[topic], rng, plural) for topic in topics[: rng.randint(1, 2)]]
        return " ".join(words) or "in the picture"

    def _place_phrase(self, concept: Concept) -> str:
        """The place in the premise, if the claimed action is possible there."""
        place = self.actor.attributes.get("place")
        if place is None or clash(concept.features | concept.needs, place.features | place.needs):
            return ""
        return f" {wording(place, self.rng)}"

    @property
    def held_out(self) -> bool:
        """Whether claim and facts together have a combination that is held out of training."""
        topic = "clothes" if self.topic == "colour" else self.topic
        return has_held_out(self.actor.attributes | {topic: self.concept})


class LabelCounts:
    """How often each label has used each key, so that draws can balance the labels."""

    def __init__(self):
        self.uses = defaultdict(Counter)

    def share(self, key, label: str) -> float:
        """The share of a key's uses that had this label; 1/3 is balanced."""
        uses = self.uses[key]
        return (uses[label] + 1) / (uses.total() + len(LABELS))

    def add(self, keys, label: str) -> None:
        """Count one use of each key."""
        for key in keys:
            self.uses[key][label] += 1


TRIES = 60


def draw_hypothesis(
    scene: Scene, text: str, label: str, counts: LabelCounts, rng: Random, candidates: int = 5
) -> tuple[str, str] | None:
    """A hypothesis with this label, and its rule: the candidate that this label has used least.

    Uses are counted of the claim and of the sentence's form: its length, the number of its words that are not in the
    premise, and the length of the premise `text`.
    """
    known = set(text.lower().rstrip(".").split())
    drawn = []
    for _ in range(TRIES):
        claim = Claim(scene, rng.choice(RULES), label, rng)
        if claim.label != label or (claim.held_out and not scene.held_out):
            continue
        sentence = claim.sentence()
        if sentence is None:
            continue
        words = sentence.lower().rstrip(".").split()
        form = (len(words), sum(word not in known for word in words), len(known) // 5)
        keys = ((claim.topic, claim.concept.name, claim.negated), form)
        drawn.append((sum(counts.share(key, label) for key in keys), len(drawn), sentence, claim.rule, keys))
        if len(drawn) == candidates:
            break
    if not drawn:
        return None
    _, _, sentence, rule, keys = min(drawn)
    counts.add(keys, label)
    return sentence, rule


def draw_pairs(split: str, seed: int, hard: bool = False) -> Iterator[dict]:
    """An endless stream of pairs: for each premise one hypothesis of each label, in random order."""
    rng = Random(f"{split} {seed} {hard}")
    counts, signatures = LabelCounts(), set()
    while True:
        scene = draw_scene(rng)
        if scene.split != split or scene.held_out != hard or scene.signature in signatures:
            continue
        signatures.add(scene.signature)
        text = premise_text(scene, rng)
        hypotheses = {label: draw_hypothesis(scene, text, label, counts, rng) for label in rng.sample(LABELS, 3)}
        if None in hypotheses.values():
            continue
        for label, (hypothesis, rule) in hypotheses.items():
            yield {"premise": text, "hypothesis": hypothesis, "label": label, "rule": rule, "hard": hard}


SPLIT_SIZES = {"train": 24_000, "dev": 1_000, "test": 2_000}


def generate_pairs(split: str, n: int | None = None, seed: int = 0) -> list[dict]:
    """Labelled pairs of one split, three for each premise (the last one may have fewer).

    Args:
        split: `train`, `dev` or `test`; they share no scene. Every second premise of `test` is hard: it has a
            combination that train and dev do not have.
        n: number of pairs; that of `SPLIT_SIZES` by default.
        seed: another seed gives other scenes of the same split.

    Returns:
        Dicts with uid, premise, hypothesis, label (its name), rule (what the hypothesis is about) and hard.
    """
    n = SPLIT_SIZES[split] if n is None else n
    n_hard = n // 2 if split == "test" else 0
    pairs = list(islice(draw_pairs(split, seed), n - n_hard))
    if n_hard:
        hard = list(islice(draw_pairs(split, seed, hard=True), n_hard))
        # Easy and hard premises alternate, so that any part of the split has both.
        easy_and_hard = zip_longest(batched(pairs, 3), batched(hard, 3), fillvalue=())
        pairs = [pair for turn in easy_and_hard for group in turn for pair in group]
    return [{"uid": f"demo-{split}-{seed}-{number}", **pair} for number, pair in enumerate(pairs)]


def batched(pairs: list[dict], size: int) -> list[list[dict]]:
    """The pairs in lists of `size`. `itertools.batched` needs Python 3.12."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
