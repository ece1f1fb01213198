"""Scenes in English: noun phrases, verb phrases and premises."""

from random import Random

from scene import Actor, Scene
from world import Concept


def wording(concept: Concept, rng: Random, plural: bool = False) -> str:
    """A random wording of a concept, singular or plural."""
    return rng.choice(concept.words)[plural]


def with_article(noun: str) -> str:
    """A noun phrase with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def garment_phrase(concept: Concept, plural: bool) -> str:
    """A garment with its article: "a red hat", "red hats", "red boots"."""
    words = concept.words[0][plural]
    return words if plural or words.endswith("s") and not words.endswith("dress") else with_article(words)


def to_be(plural: bool, negated: bool = False) -> str:
    """The form of "to be", with "not" if negated."""
    return ("are" if plural else "is") + (" not" if negated else "")


def capitalise(sentence: str) -> str:
    """A sentence with a capital letter and a full stop."""
    return sentence[0].upper() + sentence[1:] + "."


def actor_phrase(actor: Actor, rng: Random) -> str:
    """An actor as in a premise: "two happy young girls in red coats"."""
    attributes, plural = actor.attributes, actor.plural
    adjectives = [wording(attributes[topic], rng) for topic in ("mood", "looks", "fur") if topic in attributes]
    noun = " ".join([*adjectives, wording(attributes["kind"], rng, plural)])
    phrase = f"{attributes['count'].words[0][0]} {noun}" if plural else with_article(noun)
    if "clothes" in attributes:
        phrase += f" {rng.choice(('in', 'wearing'))} {garment_phrase(attributes['clothes'], plural)}"
    if "relation" in attributes:
        phrase += f", who are {wording(attributes['relation'], rng)},"
    return phrase


def activity(actor: Actor, rng: Random) -> str:
    """The action and manner of an actor, if any."""
    topics = [topic for topic in ("action", "manner") if topic in actor.attributes]
    return " ".join(wording(actor.attributes[topic], rng, actor.plural) for topic in topics)


def purpose(actor: Actor, rng: Random) -> str:
    """The purpose of an actor's action, if any."""
    return f" {wording(actor.attributes['purpose'], rng)}" if "purpose" in actor.attributes else ""


def premise_text(scene: Scene, rng: Random) -> str:
    """A scene in one sentence, like the caption of a picture."""
    first, second = scene.actors[0], scene.actors[-1]
    who, verb = actor_phrase(first, rng), to_be(first.plural)
    place = wording(first.attributes["place"], rng) if "place" in first.attributes else ""
    when = [wording(first.attributes[topic], rng) for topic in ("weather", "time") if topic in first.attributes]
    deed, tail = activity(first, rng), ""
    if scene.connection == "role":
        deed = f"{wording(first.attributes['role'], rng)} {actor_phrase(second, rng)}"
    elif scene.connection == "near" and place and rng.random() < 0.5:
        who, verb = f"{who} and {actor_phrase(second, rng)}", "are"
    elif scene.connection == "near":
        deed = f"{rng.choice(('next to', 'near', 'beside'))} {actor_phrase(second, rng)}"
    elif scene.connection == "while":
        link = rng.choice((", while", " while", ", and", " and"))
        tail = f"{link} {actor_phrase(second, rng)} {to_be(second.plural)} "
        tail += f"{activity(second, rng)}{purpose(second, rng)}"
    front = ""
    if place and deed and rng.random() < (0.6 if tail else 0.2):
        front, place = f"{place}, ", ""
    if not (front or place or deed):
        who, verb = f"here {verb} {who}", ""
    elif deed and scene.connection is None and "relation" not in first.attributes and rng.random() < 0.25:
        verb = ""  # a caption without a verb: "A boy running in a park."
    elif deed and scene.connection is None and not front and rng.random() < 0.15:
        who, verb = f"there {verb} {who}", ""
    clause = " ".join(filter(None, [who, verb, deed, place, *when]))
    # Two clauses can both contribute a comma: keep one.
    return capitalise(f"{front}{clause}{purpose(first, rng)}{tail}".replace(",,", ",").rstrip(","))
