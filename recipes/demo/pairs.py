"""Pairs: hypotheses about scenes, labelled by what follows from the facts, in words that give nothing away."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import islice, zip_longest
from random import Random

from language import article, be, capitalise, garment, premise, say
from scene import CONTRADICTION, ENTAILMENT, LABELS, NEUTRAL, Actor, Scene, clash, draw_scene, judge, unseen
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

DENIAL = {ENTAILMENT: CONTRADICTION, NEUTRAL: NEUTRAL, CONTRADICTION: ENTAILMENT, None: None}

# What a hypothesis may claim of each topic.
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
# A rule is named for the topic it makes claims of; "binding" claims of one actor what may have been told of the other.
RULES = ("action", "action", "kind", "count", "looks", "mood", "clothes", "colour", "relation", "place", "time",
         "weather", "purpose", "purpose", "manner", "manner", "role", *["binding"] * 5)  # fmt: skip
PASSIVE = dict(ROLES)
BINDABLE = ("action", "mood", "clothes", "looks")


def related(topic: str) -> dict[str, dict[str, list[Concept]]]:
    """For each concept that may be told of a topic, the claims it entails, leaves open and excludes."""
    told = {"colour": OUTFITS.values(), "role": [role for pair in ROLES for role in pair]}.get(topic, CLAIMS[topic])
    table = {}
    for concept in told:
        table[concept.name] = {label: [] for label in (*LABELS, None)}
        for claim in CLAIMS[topic]:
            table[concept.name][judge(claim.features, concept.features)].append(claim)
    return table


RELATED = {topic: related(topic) for topic in CLAIMS}


class Claim:
    """A hypothesis in the making: of which actor, which concept, said or denied, and the label that this gives it."""

    def __init__(self, scene: Scene, rule: str, wanted: str, rng: Random):
        self.scene, self.rule, self.rng = scene, rule, rng
        number = rng.randrange(len(scene.actors))
        self.actor = scene.actors[number]
        self.other = scene.actors[1 - number] if len(scene.actors) == 2 else None
        self.negated = rule != "count" and rng.random() < 0.3
        self.topic = rng.choice(BINDABLE) if rule == "binding" else rule
        if rule == "colour" and self.actor.told["kind"].features["being"] == "animal":
            self.topic = "fur"
        self.concept = self._draw(DENIAL[wanted] if self.negated else wanted)
        self.label = self._judge() if self.concept else None
        if self.negated:
            self.label = DENIAL[self.label]

    def _draw(self, verdict: str) -> Concept | None:
        """A claim that what is told of its topic makes true, open or false; now and then any claim at all."""
        told, rng = self.actor.told, self.rng
        if self.rule == "binding":
            if self.other is None:
                return None
            return rng.choice((self.actor, self.other)).told.get(self.topic)
        if self.topic == "colour":
            if "clothes" not in told:
                return None
            worn = told["clothes"].name
            colours = [c for c in RELATED["colour"][worn][verdict] if c.name.split()[-1] == worn.split()[-1]]
            return rng.choice(colours) if colours else None
        if self.topic in told and rng.random() < 0.85:
            choices = RELATED[self.topic][told[self.topic].name][verdict]
            return rng.choice(choices) if choices else None
        return rng.choice(CLAIMS[self.topic])

    def _judge(self) -> str | None:
        """The label of the claim, were it not denied; `None` where it is debatable or silly."""
        concept, actor = self.concept, self.actor
        if clash(concept.needs, actor.facts):
            return None
        if self.topic == "role" and (self.other is None or clash(PASSIVE[concept].needs, self.other.facts)):
            return None
        label = judge(concept.features, actor.facts)
        if label != CONTRADICTION and clash(concept.features | concept.needs, actor.background):
            return None
        return label

    def sentence(self) -> str | None:
        """The hypothesis in English, or `None` where it cannot be said well."""
        rng, actor, concept, topic = self.rng, self.actor, self.concept, self.topic
        plural, told = actor.plural, actor.told
        verb = be(plural, self.negated)
        if topic in ("time", "weather") and concept in HOURS + SKIES:
            return capitalise(f"it {be(False, self.negated)} {say(concept, rng)}")
        if topic == "kind":
            return self._kind_sentence(verb)
        noun = self._noun(actor, self.other)
        if noun is None:
            return None
        if topic == "count":
            count = concept.words[-1][0]
            several = count not in ("only one", "more than one")
            return capitalise(f"{count} {noun.words[0][several]} {be(several)} {self._setting(several)}")
        if topic == "colour":
            return self._colour_sentence(noun)
        subject = f"the {self._with_details(noun)}"
        if topic == "role":
            return self._role_sentence(subject, verb)
        if topic == "clothes":
            worn = concept.name if concept is WARM_CLOTHES else garment(concept, plural)
            return capitalise(f"{subject} {verb} wearing {worn}")
        words = say(concept, rng, plural)
        if topic in ("purpose", "manner", "time", "weather") or (topic == "place" and rng.random() < 0.5):
            if "action" not in told:
                return None
            words = f"{say(told['action'], rng, plural)} {words}"
        elif topic == "action" and rng.random() < 0.3:
            words += self._place_beside(concept)
        if topic in ("action", "place") and not self.negated and rng.random() < 0.3:
            subject = self._indefinite(noun)
        return capitalise(f"{subject} {verb} {words}")

    def _colour_sentence(self, noun: Concept) -> str:
        """The boy's hat is (not) red."""
        name = say(noun, self.rng, self.actor.plural)
        owner = f"the {name}'" if name.endswith("s") else f"the {name}'s"
        one, several = self.concept.words[0]
        plural = self.actor.plural or one == several  # boots are worn in pairs
        colour, worn = (several if plural else one).split()
        return capitalise(f"{owner} {worn} {be(plural, self.negated)} {colour}")

    def _role_sentence(self, subject: str, verb: str) -> str | None:
        """The boy is (not) chasing the dog; the dog is (not) being chased by the boy."""
        noun = self._noun(self.other, self.actor)
        if noun is None:
            return None
        whom = f"the {self._with_details(noun, self.other)}"
        if self.rng.random() < 0.5:
            return capitalise(f"{subject} {verb} {self.concept.name} {whom}")
        passive = PASSIVE[self.concept].name
        return capitalise(f"{whom} {be(self.other.plural, self.negated)} {passive} {subject}")

    def _kind_sentence(self, verb: str) -> str | None:
        """The person is (not) a girl; a girl is running."""
        actor, rng, concept = self.actor, self.rng, self.concept
        if self.other is None and not self.negated and actor.told.keys() & {"action", "place"} and rng.random() < 0.5:
            return capitalise(f"{self._indefinite(concept)} {verb} {self._setting(actor.plural)}")
        noun = self._noun(actor, self.other, beside=concept)
        if noun is None:
            return None
        name = say(concept, rng, actor.plural)
        return capitalise(f"the {self._with_details(noun)} {verb} {name if actor.plural else article(name)}")

    def _noun(self, actor: Actor, other: Actor | None, beside: Concept | None = None) -> Concept | None:
        """A kind that names the actor and surely not the other one; `beside`: one that says nothing of that kind."""
        kind = actor.told["kind"]
        nouns = [
            noun
            for noun in RELATED["kind"][kind.name][ENTAILMENT]
            if (other is None or clash(noun.features, other.told["kind"].features))
            and (beside is None or judge(beside.features, noun.features) == NEUTRAL)
        ]
        if kind in nouns and self.rng.random() < 0.5:
            return kind
        return self.rng.choice(nouns) if nouns else None

    def _with_details(self, noun: Concept, actor: Actor | None = None) -> str:
        """The noun with some of what the premise tells of the actor, which changes no label."""
        actor, rng = actor or self.actor, self.rng
        words = say(noun, rng, actor.plural)
        for topic in ("looks", "fur", "mood"):
            if topic in actor.told and topic != self.topic and rng.random() < 0.15:
                words = f"{say(actor.told[topic], rng)} {words}"
        if "clothes" in actor.told and self.topic not in ("clothes", "colour") and rng.random() < 0.2:
            words += f" in {garment(actor.told['clothes'], actor.plural)}"
        return words

    def _indefinite(self, noun: Concept) -> str:
        """The noun for somebody not spoken of before."""
        words = say(noun, self.rng, self.actor.plural)
        return f"some {words}" if self.actor.plural else article(words)

    def _setting(self, plural: bool) -> str:
        """What the actor is told to be doing, or where to be."""
        told, rng = self.actor.told, self.rng
        topics = [topic for topic in ("action", "place") if topic in told]
        words = [say(told[topic], rng, plural) for topic in topics[: rng.randint(1, 2)]]
        return " ".join(words) or "in the picture"

    def _place_beside(self, concept: Concept) -> str:
        """Where the premise says this is, unless nobody would do the claimed thing there."""
        place = self.actor.told.get("place")
        if place is None or clash(concept.features | concept.needs, place.features | place.needs):
            return ""
        return f" {say(place, self.rng)}"

    @property
    def unseen(self) -> bool:
        """Whether claim and facts together hold a combination that training never shows."""
        topic = "clothes" if self.topic == "colour" else self.topic
        return unseen(self.actor.told | {topic: self.concept})


class Ledger:
    """Which label has used what how often, so that the next draw can be fair."""

    def __init__(self):
        self.uses = defaultdict(Counter)

    def share(self, key, label: str) -> float:
        """The part of a key's uses that a label has had; a third where it is fair."""
        uses = self.uses[key]
        return (uses[label] + 1) / (uses.total() + len(LABELS))

    def enter(self, keys, label: str) -> None:
        """Note one use of each key."""
        for key in keys:
            self.uses[key][label] += 1


TRIES = 60


def draw_hypothesis(
    scene: Scene, text: str, label: str, ledger: Ledger, rng: Random, candidates: int = 5
) -> tuple[str, str] | None:
    """A hypothesis with this label, and its rule: of some candidates, the one that this label has used least.

    What is counted is the claim, and the sentence's form: its length, its new words, the length of the premise `text`.
    """
    known = set(text.lower().rstrip(".").split())
    drawn = []
    for _ in range(TRIES):
        claim = Claim(scene, rng.choice(RULES), label, rng)
        if claim.label != label or (claim.unseen and not scene.unseen):
            continue
        sentence = claim.sentence()
        if sentence is None:
            continue
        words = sentence.lower().rstrip(".").split()
        form = (len(words), sum(word not in known for word in words), len(known) // 5)
        keys = ((claim.topic, claim.concept.name, claim.negated), form)
        drawn.append((sum(ledger.share(key, label) for key in keys), len(drawn), sentence, claim.rule, keys))
        if len(drawn) == candidates:
            break
    if not drawn:
        return None
    _, _, sentence, rule, keys = min(drawn)
    ledger.enter(keys, label)
    return sentence, rule


def draw_pairs(split: str, seed: int, hard: bool = False) -> Iterator[dict]:
    """Pairs without end: premise by premise, one hypothesis of each label, in random order."""
    rng = Random(f"{split} {seed} {hard}")
    ledger, signatures = Ledger(), set()
    while True:
        scene = draw_scene(rng)
        if scene.split != split or scene.unseen != hard or scene.signature in signatures:
            continue
        signatures.add(scene.signature)
        text = premise(scene, rng)
        hypotheses = {label: draw_hypothesis(scene, text, label, ledger, rng) for label in rng.sample(LABELS, 3)}
        if None in hypotheses.values():
            continue
        for label, (hypothesis, rule) in hypotheses.items():
            yield {"premise": text, "hypothesis": hypothesis, "label": label, "rule": rule, "hard": hard}


SPLIT_SIZES = {"train": 24_000, "dev": 1_000, "test": 2_000}


def generate_pairs(split: str, n: int | None = None, seed: int = 0) -> list[dict]:
    """Labelled pairs of one split, about three a premise.

    Args:
        split: `train`, `dev` or `test`; no two of them share a scene. Every other premise of `test` is hard: it
            combines what train and dev never combine.
        n: how many pairs; `SPLIT_SIZES` says how many by default.
        seed: another seed gives other scenes of the same split.

    Returns:
        Dicts with uid, premise, hypothesis, label (its name), rule (what the hypothesis is about) and hard.
    """
    n = SPLIT_SIZES[split] if n is None else n
    n_hard = n // 2 if split == "test" else 0
    pairs = list(islice(draw_pairs(split, seed), n - n_hard))
    if n_hard:
        hard = list(islice(draw_pairs(split, seed, hard=True), n_hard))
        # Easy and hard premises take turns, so that any part of the split has both.
        easy_and_hard = zip_longest(batched(pairs, 3), batched(hard, 3), fillvalue=())
        pairs = [pair for turn in easy_and_hard for premise in turn for pair in premise]
    return [{"uid": f"demo-{split}-{seed}-{number}", **pair} for number, pair in enumerate(pairs)]


def batched(pairs: list[dict], size: int) -> list[list[dict]]:
    """The pairs in runs of `size`: itertools.batched comes with Python 3.12 only."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
