"""Scenes: which facts a premise tells, what follows from them, and which scenes belong to which split."""

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


def judge(claim: dict, facts: dict) -> str | None:
    """Whether a claim's features follow from the facts, are excluded by them or left open; `None` if debatable."""
    open_, debatable = False, False
    for feature, value in claim.items():
        if value is None:
            continue
        fact = facts.get(feature, "untold")
        if fact == "untold":
            open_ = True
        elif fact is None:
            debatable = True
        elif fact != value:
            return CONTRADICTION
    if open_:
        return NEUTRAL
    return None if debatable else ENTAILMENT


def clash(one: dict, other: dict) -> bool:
    """Whether two sets of features cannot hold of the same thing."""
    return judge(one, other) == CONTRADICTION


@dataclass
class Actor:
    """A person or an animal, or several of one kind: what is told of them, by topic, and the facts that makes."""

    told: dict[str, Concept] = field(default_factory=dict)
    facts: dict = field(default_factory=dict)  # the features of all that is told, those of the setting among them
    background: dict = field(default_factory=dict)  # the facts, and what they only make plausible

    def tell(self, topic: str, concept: Concept) -> bool:
        """Add to what is told, unless it would be false or silly beside the rest."""
        if clash(concept.features, self.background) or clash(concept.needs, self.background):
            return False
        self.told[topic] = concept
        # A debatable feature stays so only until something settles it.
        self.facts |= {k: v for k, v in concept.features.items() if v is not None or k not in self.facts}
        self.background |= {k: v for k, v in (concept.features | concept.needs).items() if v is not None}
        return True

    @property
    def plural(self) -> bool:
        return self.told["count"] is not ONE


@dataclass
class Scene:
    """One actor, or two and what binds them: "while" both do something, "role" (one acts on the other), or "near"."""

    actors: list[Actor]
    bond: str | None = None

    @property
    def signature(self) -> str:
        """All that is told, as text: equal for two scenes exactly when they are the same."""
        told = [sorted((topic, concept.name) for topic, concept in actor.told.items()) for actor in self.actors]
        return f"{self.bond} {told}"

    @property
    def unseen(self) -> bool:
        """Whether it holds a combination that training never shows."""
        return any(unseen(actor.told) for actor in self.actors)

    @property
    def split(self) -> str:
        """The split it belongs to, whoever draws it."""
        bucket = crc32(self.signature.encode()) % 20
        return "dev" if bucket < 3 else "test" if bucket < 6 else "train"


# Kinds that no other kind is narrower than: "a child is running" says little about boys who run.
NARROW_KINDS = {a.name for a in KINDS if not any(a.features.items() < b.features.items() for b in KINDS)}


def held_out(thing: str, setting: str) -> bool:
    """The one rule for combinations that only hard test scenes use: a narrow kind's action, a garment's place."""
    return crc32(f"{thing} {setting}".encode()) % 6 == 0


def unseen(told: dict[str, Concept]) -> bool:
    """Whether what is told of an actor, or told and claimed, holds a combination that is held out."""
    kind, garment = told["kind"].name, told["clothes"].name.split()[-1] if "clothes" in told else None
    if kind in NARROW_KINDS and "action" in told and held_out(kind, told["action"].name):
        return True
    return garment is not None and "place" in told and held_out(garment, told["place"].name)


def often(concepts: list[Concept], weights: dict[str, int]) -> list[Concept]:
    """What a premise may tell of these, some of it more often than the rest."""
    return [concept for concept in concepts if concept.told for _ in range(weights.get(concept.name, 1))]


# Kinds that leave something open are told often, so that "a person" and "a boy" are claimed as often as they are true.
COMMON = {"boy": 5, "girl": 5, "man": 5, "woman": 5, "child": 4, "person": 4, "dog": 2, "animal": 2}
TELLABLE = {
    "kind": often(KINDS, COMMON),
    "count": often(COUNTS, {"one": 12, "two": 5, "three": 3, "some": 4}),
    "action": often(ACTIONS, {"sleeping": 6, "running": 2, "walking": 2}),
    "clothes": list(OUTFITS.values()),
    "looks": LOOKS,
    "mood": often(MOODS, {}),
    "fur": FURS,
    "relation": often(RELATIONS, {}),
    "place": often(PLACES, {}),
    "time": TIMES,
    "weather": WEATHERS,
    "purpose": PURPOSES,
    "manner": MANNERS,
}
# How often each topic is told where it can be: about half the time, for what is not told is what is open.
CHANCES = {"mood": 0.4, "looks": 0.35, "clothes": 0.6, "fur": 0.5, "relation": 0.4, "purpose": 0.4, "manner": 0.25}
SETTING = ("place", "time", "weather")
SHARED = ("inside", "spacious", "shore", "wild", "grass")


def draw_actor(rng: Random, other: Actor | None = None) -> Actor:
    """Somebody or some animal, surely of another kind than `other`, without anything to do yet."""
    actor = Actor()
    while True:
        kind = rng.choice(TELLABLE["kind"])
        if other is None or clash(kind.features, other.told["kind"].features):
            break
    actor.tell("kind", kind)
    actor.tell("count", rng.choice(TELLABLE["count"]))
    return actor


def describe(actor: Actor, rng: Random, share: float) -> None:
    """Tell some of what can be told of an actor beside kind, count and action."""
    for topic, chance in CHANCES.items():
        if rng.random() < chance * share and (topic not in ("purpose", "manner") or "action" in actor.told):
            actor.tell(topic, rng.choice(TELLABLE[topic]))


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
            setting = rng.choice(TELLABLE[topic])
            # Both are there, or it is not told at all.
            if all(not clash(setting.features | setting.needs, a.background) for a in scene.actors):
                for actor in scene.actors:
                    actor.tell(topic, setting)
    if scene.bond == "role":
        active, passive = rng.choice(ROLES)
        if not (first.tell("role", active) and scene.actors[1].tell("role", passive)):
            return draw_scene(rng)
    elif scene.bond == "while" or (scene.bond is None and rng.random() < 0.85):
        for actor in scene.actors:
            while "action" not in actor.told:
                actor.tell("action", rng.choice(TELLABLE["action"]))
    for actor in scene.actors:
        describe(actor, rng, share=1 if scene.bond is None else 0.6)
    if len(scene.actors) == 2:
        # Both are in one place: who flies a kite while another reads is outdoors with the reader.
        known = [{k: a.background[k] for k in SHARED if k in a.background} for a in scene.actors]
        if clash(*known):
            return draw_scene(rng)
        for actor, others in zip(scene.actors, reversed(known), strict=True):
            actor.background |= others
            actor.facts |= {k: v for k, v in others.items() if k == "inside"}
    return scene
