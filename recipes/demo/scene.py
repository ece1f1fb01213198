"""Scenes: the facts that a premise states, what follows from them, and the split of each scene."""

from dataclasses import dataclass, field
from random import Random
from zlib import crc32

from world import (
    ACTIONS,
    COUNTS,
    FURS,
    KINDS,
    LOOKS,
    MANNERS,
    MOODS,
    ONE,
    OUTFITS,
    PLACES,
    PURPOSES,
    RELATIONS,
    ROLES,
    TIMES,
    WEATHERS,
    Concept,
)

ENTAILMENT, NEUTRAL, CONTRADICTION = LABELS = ("entailment", "neutral", "contradiction")


def infer_label(claim: dict, facts: dict) -> str | None:
    """The label of a claim, given as features, against the facts; `None` if it is debatable."""
    unknown, debatable = False, False
    for feature, value in claim.items():
        if value is None:
            continue
        if feature not in facts:
            unknown = True
            continue
        fact = facts[feature]
        if fact is None:
            debatable = True
        elif fact != value:
            return CONTRADICTION
    if unknown:
        return NEUTRAL
    return None if debatable else ENTAILMENT


def clash(one: dict, other: dict) -> bool:
    """Whether two sets of features contradict each other."""
    return infer_label(one, other) == CONTRADICTION


@dataclass
class Actor:
    """A person or an animal, or several of one kind: attributes by topic, and the facts that follow from them."""

    attributes: dict[str, Concept] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)  # the features of all attributes, place, time and weather included
    background: dict = field(default_factory=dict)  # the facts, and the needs of all attributes

    def add(self, topic: str, concept: Concept) -> bool:
        """Add an attribute, and return True, unless it would be false or absurd given the others."""
        if clash(concept.features, self.background) or clash(concept.needs, self.background):
            return False
        self.attributes[topic] = concept
        # A feature is debatable until another attribute gives it a value.
        self.facts |= {k: v for k, v in concept.features.items() if v is not None or k not in self.facts}
        self.background |= {k: v for k, v in (concept.features | concept.needs).items() if v is not None}
        return True

    @property
    def plural(self) -> bool:
        return self.attributes["count"] is not ONE


@dataclass
class Scene:
    """One actor, or two that are connected: "while" (both act), "role" (one acts on the other) or "near"."""

    actors: list[Actor]
    connection: str | None = None

    @property
    def signature(self) -> str:
        """All attributes as text: equal for two scenes if and only if the scenes are equal."""
        names = [sorted((topic, concept.name) for topic, concept in actor.attributes.items()) for actor in self.actors]
        return f"{self.connection} {names}"

    @property
    def held_out(self) -> bool:
        """Whether it has a combination that is held out of training."""
        return any(has_held_out(actor.attributes) for actor in self.actors)

    @property
    def split(self) -> str:
        """The split that it belongs to, whatever the seed."""
        bucket = crc32(self.signature.encode()) % 20
        return "dev" if bucket < 3 else "test" if bucket < 6 else "train"


# Kinds with no narrower kind: boy, not child. "A child is running" would give away little about running boys.
NARROW_KINDS = {a.name for a in KINDS if not any(a.features.items() < b.features.items() for b in KINDS)}


def is_held_out(thing: str, setting: str) -> bool:
    """Whether only hard test scenes combine these two: a narrow kind and an action, or a garment and a place."""
    return crc32(f"{thing} {setting}".encode()) % 6 == 0


def has_held_out(attributes: dict[str, Concept]) -> bool:
    """Whether the attributes of an actor, or attributes and a claim, contain a held-out combination."""
    kind = attributes["kind"].name
    garment = attributes["clothes"].name.split()[-1] if "clothes" in attributes else None
    if kind in NARROW_KINDS and "action" in attributes and is_held_out(kind, attributes["action"].name):
        return True
    return garment is not None and "place" in attributes and is_held_out(garment, attributes["place"].name)


def weighted(concepts: list[Concept], weights: dict[str, int]) -> list[Concept]:
    """The concepts that premises use, each as many times as its weight (1 by default)."""
    return [concept for concept in concepts if concept.in_premises for _ in range(weights.get(concept.name, 1))]


# Broad kinds are frequent, so that "a person" and "a boy" are as often claimed as true.
COMMON = {"boy": 5, "girl": 5, "man": 5, "woman": 5, "child": 4, "person": 4, "dog": 2, "animal": 2}
PREMISE_CONCEPTS = {
    "kind": weighted(KINDS, COMMON),
    "count": weighted(COUNTS, {"one": 12, "two": 5, "three": 3, "some": 4}),
    "action": weighted(ACTIONS, {"sleeping": 6, "running": 2, "walking": 2}),
    "clothes": list(OUTFITS.values()),
    "looks": LOOKS,
    "mood": weighted(MOODS, {}),
    "fur": FURS,
    "relation": weighted(RELATIONS, {}),
    "place": weighted(PLACES, {}),
    "time": TIMES,
    "weather": WEATHERS,
    "purpose": PURPOSES,
    "manner": MANNERS,
}
# The probability of each topic, about one half: hypotheses about the other half are neutral.
CHANCES = {"mood": 0.4, "looks": 0.35, "clothes": 0.6, "fur": 0.5, "relation": 0.4, "purpose": 0.4, "manner": 0.25}
SETTING = ("place", "time", "weather")
SHARED = ("inside", "spacious", "shore", "wild", "grass")


def draw_actor(rng: Random, other: Actor | None = None) -> Actor:
    """A person or an animal without an action yet, of a kind that excludes the kind of `other`."""
    actor = Actor()
    while True:
        kind = rng.choice(PREMISE_CONCEPTS["kind"])
        if other is None or clash(kind.features, other.attributes["kind"].features):
            break
    actor.add("kind", kind)
    actor.add("count", rng.choice(PREMISE_CONCEPTS["count"]))
    return actor


def describe(actor: Actor, rng: Random, share: float) -> None:
    """Add some attributes of the topics in `CHANCES`; `share` scales the probabilities."""
    for topic, chance in CHANCES.items():
        if rng.random() < chance * share and (topic not in ("purpose", "manner") or "action" in actor.attributes):
            actor.add(topic, rng.choice(PREMISE_CONCEPTS[topic]))


def draw_scene(rng: Random) -> Scene:
    """Any consistent scene."""
    first = draw_actor(rng)
    scene = Scene([first])
    draw = rng.random()
    if draw < 0.45:
        second = draw_actor(rng, other=first)
        scene = Scene([first, second], "while" if draw < 0.25 else "role" if draw < 0.37 else "near")
    for topic in SETTING:
        if rng.random() < (0.55 if topic == "place" else 0.2):
            setting = rng.choice(PREMISE_CONCEPTS[topic])
            # It applies to both actors or to neither.
            if all(not clash(setting.features | setting.needs, a.background) for a in scene.actors):
                for actor in scene.actors:
                    actor.add(topic, setting)
    if scene.connection == "role":
        active, passive = rng.choice(ROLES)
        if not (first.add("role", active) and scene.actors[1].add("role", passive)):
            return draw_scene(rng)
    elif scene.connection == "while" or (scene.connection is None and rng.random() < 0.85):
        for actor in scene.actors:
            while "action" not in actor.attributes:
                actor.add("action", rng.choice(PREMISE_CONCEPTS["action"]))
    for actor in scene.actors:
        describe(actor, rng, share=1 if scene.connection is None else 0.6)
    if len(scene.actors) == 2:
        # Both are in one place: if one flies a kite, the other is outdoors too.
        known = [{k: a.background[k] for k in SHARED if k in a.background} for a in scene.actors]
        if clash(*known):
            return draw_scene(rng)
        for actor, others in zip(scene.actors, reversed(known), strict=True):
            actor.background |= others
            actor.facts |= {k: v for k, v in others.items() if k == "inside"}
    return scene
