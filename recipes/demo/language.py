"""How scenes are told in English: noun phrases, premises, and the sentences that claim something of a scene."""

from random import Random

from scene import Actor, Scene
from world import Concept


def say(concept: Concept, rng: Random, plural: bool = False) -> str:
    """One of a concept's wordings, in the form for one or for several."""
    return rng.choice(concept.words)[plural]


def article(noun: str) -> str:
    """A noun phrase with "a" or "an", as it sounds."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def garment(concept: Concept, plural: bool) -> str:
    """A garment as it is worn: "a red hat", "red hats", "red boots"."""
    words = concept.words[0][plural]
    return words if plural or words.endswith("s") and not words.endswith("dress") else article(words)


def be(plural: bool, negated: bool = False) -> str:
    """The form of "to be", with "not" where it is denied."""
    return ("are" if plural else "is") + (" not" if negated else "")


def capitalise(sentence: str) -> str:
    """A sentence with a capital at its head and a full stop at its end."""
    return sentence[0].upper() + sentence[1:] + "."


def introduce(actor: Actor, rng: Random) -> str:
    """An actor as a premise brings it in: "two happy young girls in red coats"."""
    told, plural = actor.told, actor.plural
    adjectives = [say(told[topic], rng) for topic in ("mood", "looks", "fur") if topic in told]
    noun = " ".join([*adjectives, say(told["kind"], rng, plural)])
    phrase = f"{told['count'].words[0][0]} {noun}" if plural else article(noun)
    if "clothes" in told:
        phrase += f" {rng.choice(('in', 'wearing'))} {garment(told['clothes'], plural)}"
    if "relation" in told:
        phrase += f", who are {say(told['relation'], rng)},"
    return phrase


def activity(actor: Actor, rng: Random) -> str:
    """What an actor is told to be doing, and how."""
    return " ".join(say(actor.told[topic], rng, actor.plural) for topic in ("action", "manner") if topic in actor.told)


def purpose(actor: Actor, rng: Random) -> str:
    """Why an actor does it, where that is told."""
    return f" {say(actor.told['purpose'], rng)}" if "purpose" in actor.told else ""


def premise(scene: Scene, rng: Random) -> str:
    """All that a scene tells, as the caption of a picture."""
    first, second = scene.actors[0], scene.actors[-1]
    who, verb = introduce(first, rng), be(first.plural)
    place = say(first.told["place"], rng) if "place" in first.told else ""
    when = [say(first.told[topic], rng) for topic in ("weather", "time") if topic in first.told]
    deed, tail = activity(first, rng), ""
    if scene.bond == "role":
        deed = f"{say(first.told['role'], rng)} {introduce(second, rng)}"
    elif scene.bond == "near" and place and rng.random() < 0.5:
        who, verb = f"{who} and {introduce(second, rng)}", "are"
    elif scene.bond == "near":
        deed = f"{rng.choice(('next to', 'near', 'beside'))} {introduce(second, rng)}"
    elif scene.bond == "while":
        link = rng.choice((", while", " while", ", and", " and"))
        tail = f"{link} {introduce(second, rng)} {be(second.plural)} {activity(second, rng)}{purpose(second, rng)}"
    front = ""
    if place and deed and rng.random() < (0.6 if tail else 0.2):
        front, place = f"{place}, ", ""
    if not (front or place or deed):
        who, verb = f"here {verb} {who}", ""
    elif deed and scene.bond is None and "relation" not in first.told and rng.random() < 0.25:
        verb = ""  # a caption without a verb: "A boy running in a park."
    elif deed and scene.bond is None and not front and rng.random() < 0.15:
        who, verb = f"there {verb} {who}", ""
    clause = " ".join(filter(None, [who, verb, deed, place, *when]))
    # Inner clauses bring their own commas: keep one where two meet.
    return capitalise(f"{front}{clause}{purpose(first, rng)}{tail}".replace(",,", ",").rstrip(","))
