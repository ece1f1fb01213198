"""The concepts that scenes consist of: their wordings, and the features that decide which label a claim gets.

A claim is entailed if each of its features has the same value in the facts, contradicted if one has another value,
and neutral otherwise. So a boy (`being` person, `age` child, `sex` male) is a child (`being` person, `age` child), is
not a woman, and may or may not be happy. A feature with the value `None` is debatable (is a man who plays a guitar
"moving"?). Claims whose label depends on one are not generated.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Concept:
    """Something that a premise can state or a hypothesis can claim.

    `words` are its wordings, each as (singular, plural). `in_premises` is False for concepts that only hypotheses use
    ("awake"). `needs` are features without which the claim would be absurd rather than false.
    """

    name: str
    words: tuple[tuple[str, str], ...]
    features: dict
    in_premises: bool = True
    needs: dict = field(default_factory=dict)

    def __repr__(self):
        return self.name


def concept(words, features, in_premises=True, needs=None):
    """A concept named after its first wording; " / " separates wordings, "|" singular from plural."""
    wordings = tuple((forms.split("|")[0], forms.split("|")[-1]) for forms in words.split(" / "))
    return Concept(wordings[0][0], wordings, features, in_premises, needs or {})


PERSON = {"being": "person"}
ANIMAL = {"being": "animal"}
CHILD = PERSON | {"age": "child"}
ADULT = PERSON | {"age": "adult"}
DOG = ANIMAL | {"species": "dog", "flies": False}
CAT = ANIMAL | {"species": "cat", "flies": False}
BIRD = ANIMAL | {"species": "bird", "flies": True, "housebroken": False}
CATTLE = ANIMAL | {"heavy": True, "flies": False, "housebroken": False}

JOBS = ("farmer", "nurse", "teacher", "doctor", "soldier", "tourist")


def job(name):
    """Features of a job. Whether the person has another job as well is debatable."""
    return dict.fromkeys(JOBS) | {name: True}


PEOPLE = [
    concept("person|people", PERSON),
    concept("child|children / kid|kids", CHILD),
    concept("adult|adults / grown-up|grown-ups", ADULT, in_premises=False),
    concept("boy|boys", CHILD | {"sex": "male"}),
    concept("girl|girls", CHILD | {"sex": "female"}),
    concept("man|men", ADULT | {"sex": "male"}),
    concept("woman|women / lady|ladies", ADULT | {"sex": "female"}),
    concept("farmer|farmers", ADULT | job("farmer")),
    concept("nurse|nurses", ADULT | job("nurse")),
    concept("teacher|teachers", ADULT | job("teacher")),
    concept("doctor|doctors", ADULT | job("doctor")),
    concept("soldier|soldiers", ADULT | job("soldier")),
    concept("tourist|tourists", PERSON | job("tourist")),
]
ANIMALS = [
    concept("animal|animals", ANIMAL),
    concept("dog|dogs", DOG),
    concept("puppy|puppies", DOG | {"grown": False}),
    concept("poodle|poodles", DOG | {"breed": "poodle"}),
    concept("cat|cats", CAT),
    concept("kitten|kittens", CAT | {"grown": False}),
    concept("bird|birds", BIRD),
    concept("duck|ducks", BIRD | {"breed": "duck"}),
    concept("parrot|parrots", BIRD | {"breed": "parrot"}),
    concept("horse|horses", CATTLE | {"species": "horse"}),
    concept("cow|cows", CATTLE | {"species": "cow"}),
    concept("goat|goats", CATTLE | {"species": "goat"}),
]
KINDS = PEOPLE + ANIMALS


def number(words, least, most, in_premises=True):
    """A count from `least` to `most`: one feature for each threshold that it surely exceeds or surely does not."""
    passed = {f"over {n}": least > n for n in range(1, 6) if least > n or most <= n}
    return concept(words, passed, in_premises)


# Premises use the first wording, hypotheses the last, as "two" could be read as "at least two".
COUNTS = [
    number("one / only one", 1, 1),
    number("two / exactly two", 2, 2),
    number("three / exactly three", 3, 3),
    number("four / exactly four", 4, 4),
    number("five / exactly five", 5, 5),
    number("some", 2, 99),
    number("more than one", 2, 99, in_premises=False),
    number("at least two", 2, 99, in_premises=False),
    number("at least three", 3, 99, in_premises=False),
    number("at least four", 4, 99, in_premises=False),
    number("more than four", 5, 99, in_premises=False),
    number("fewer than three", 1, 2, in_premises=False),
    number("fewer than four", 1, 3, in_premises=False),
    number("at most four", 1, 4, in_premises=False),
]
ONE, SOME = COUNTS[0], COUNTS[5]

LOOKS = [
    concept("young", {"old": False}, needs=ADULT),
    concept("old / elderly", {"old": True}, needs=ADULT),
    concept("tall", {"tall": True}, needs=PERSON),
    concept("short", {"tall": False}, needs=PERSON),
    concept("big / large", {"big": True}, needs=ANIMAL),
    concept("small / little", {"big": False}, needs=ANIMAL),
]

AWAKE = {"being": "person", "asleep": False}
# Moods that differ in feeling (good, bad) or in energy (high, low) exclude each other.
MOODS = [
    concept("happy / cheerful", {"feeling": "good", "happy": True}, needs=AWAKE),
    concept("sad / unhappy", {"feeling": "bad", "happy": False}, needs=AWAKE),
    concept("angry / furious", {"feeling": "bad", "energy": "high", "angry": True}, needs=AWAKE),
    concept("scared / frightened", {"feeling": "bad", "energy": "high", "scared": True}, needs=AWAKE),
    concept("excited / thrilled", {"feeling": "good", "energy": "high", "excited": True}, needs=AWAKE),
    concept("calm / relaxed", {"energy": "low", "calm": True}, needs=AWAKE),
    concept("tired / weary", {"energy": "low", "tired": True}, needs=AWAKE),
    concept("bored", {"feeling": "bad", "energy": "low", "bored": True}, needs=AWAKE),
    concept("in a good mood", {"feeling": "good"}, in_premises=False, needs=AWAKE),
    concept("in a bad mood", {"feeling": "bad"}, in_premises=False, needs=AWAKE),
]

COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "gray", "pink", "purple", "orange"]
FURS = [concept(colour, {"fur": colour}, needs=ANIMAL) for colour in ("brown", "black", "white", "gray")]

FEMALE = PERSON | {"sex": "female"}
GARMENTS = [
    concept("hat|hats", {"head": "hat"}, needs=PERSON),
    concept("helmet|helmets", {"head": "helmet"}, needs=PERSON),
    concept("cap|caps", {"head": "cap"}, needs=PERSON),
    concept("coat|coats", {"coat": True, "warmly": True}, needs=PERSON),
    concept("sweater|sweaters", {"sweater": True, "warmly": True}, needs=PERSON),
    concept("scarf|scarves", {"scarf": True, "warmly": True}, needs=PERSON),
    concept("shirt|shirts", {"shirt": True}, needs=PERSON),
    concept("vest|vests", {"vest": True}, needs=PERSON),
    concept("dress|dresses", {"dress": True}, needs=FEMALE),
    concept("skirt|skirts", {"skirt": True}, needs=FEMALE),
    concept("boots|boots", {"feet": "boots"}, needs=PERSON),
    concept("sneakers|sneakers", {"feet": "sneakers"}, needs=PERSON),
    concept("sandals|sandals", {"feet": "sandals"}, needs=PERSON),
]


def outfit(garment, colour):
    """A garment in a colour."""
    features = garment.features | {f"{garment.name} colour": colour}
    one, several = garment.words[0]
    return concept(f"{colour} {one}|{colour} {several}", features, needs=garment.needs)


# Garments with and without a colour: OUTFITS["red hat"], OUTFITS["hat"].
OUTFITS = {garment.name: garment for garment in GARMENTS}
OUTFITS |= {f"{colour} {garment.name}": outfit(garment, colour) for garment in GARMENTS for colour in COLOURS}
WARM_CLOTHES = concept("warm clothes", {"warmly": True}, in_premises=False, needs=PERSON)

GROUP = PERSON | {"over 1": True}
RELATIONS = [
    concept("brothers", {"kin": True, "sex": "male", "strangers": False}, needs=GROUP | {"sex": "male"}),
    concept("sisters", {"kin": True, "sex": "female", "strangers": False}, needs=GROUP | {"sex": "female"}),
    concept("cousins", {"kin": True, "cousins": True, "strangers": False}, needs=GROUP),
    concept("friends", {"friends": True, "strangers": False}, needs=GROUP),
    concept("teammates", {"team": "same", "strangers": False}, needs=GROUP),
    concept("rivals", {"team": "other", "strangers": False}, needs=GROUP),
    concept("strangers", {"strangers": True, "kin": False, "friends": False, "team": None}, needs=GROUP),
    concept("relatives", {"kin": True, "strangers": False}, in_premises=False, needs=GROUP),
]


def outdoor(words, **features):
    """An outdoor place."""
    plain = {"inside": False, "room": False, "spacious": True, "wild": False}
    features = {"place": words.split(" / ")[0]} | plain | features
    return concept(words, features)


def indoor(words, needs=None, **features):
    """An indoor place. Whether there is water, or are trees, next to the building is debatable."""
    unsure = {"room": None, "water": None, "trees": None}
    plain = {"inside": True, "spacious": False, "shore": False, "wild": False, "grass": False}
    features = {"place": words} | plain | unsure | features
    return concept(words, features, needs=needs)


HOME = {"housebroken": True}
# Any two of the places that premises use exclude each other.
PLACES = [
    outdoor("in a park", water=None, trees=None),
    outdoor("on a beach", grass=False, wild=True, water=True, trees=None, shore=True),
    outdoor("in a forest / in the woods", wild=True, trees=True, shore=False, spacious=False),
    outdoor("on a street", grass=False, shore=False),
    outdoor("in a corn field", wild=True, shore=False),
    outdoor("in a back yard", shore=False),
    outdoor("on a mountain top", wild=True, shore=False, spacious=False),
    outdoor("in a parking lot", grass=False, shore=False),
    outdoor("on a bridge", grass=False, water=None, shore=True),
    outdoor("in the desert", grass=False, wild=True, water=None, trees=None, shore=False),
    outdoor("on a river bank", water=True, shore=True),
    indoor("in a kitchen", room=True, needs=HOME),
    indoor("in a bedroom", room=True, needs=HOME),
    indoor("in a classroom", room=True, needs=PERSON),
    indoor("in a library", needs=PERSON),
    indoor("in a museum", needs=PERSON),
    indoor("in a gym", needs=PERSON, spacious=True),
    indoor("in a restaurant", needs=PERSON),
    indoor("in a barn", spacious=True),
    concept("outdoors / outside / in the open air", {"inside": False}, in_premises=False),
    concept("indoors / inside a building / under a roof", {"inside": True}, in_premises=False),
    concept("in a room", {"inside": True, "room": True}, in_premises=False),
    concept("near water / close to water", {"water": True}, in_premises=False),
    concept("near trees / close to some trees", {"trees": True}, in_premises=False),
]

TIMES = [
    concept("at night", {"time": "night", "dark": True}),
    concept("in the morning", {"time": "morning", "dark": None}),
    concept("at noon", {"time": "noon", "dark": False}),
    concept("in the evening", {"time": "evening", "dark": None}),
]
WEATHERS = [
    concept("in the rain", {"sky": "rain", "inside": False}),
    concept("in the snow", {"sky": "snow", "inside": False}),
    concept("in bright sunshine", {"sky": "sun", "inside": False, "dark": False}),
    concept("in a strong wind", {"windy": True, "inside": False}),
]
# Claims about time and weather in sentences of the form "It is ...".
HOURS = [
    concept("night / nighttime", {"time": "night"}, in_premises=False),
    concept("morning", {"time": "morning"}, in_premises=False),
    concept("noon / midday", {"time": "noon"}, in_premises=False),
    concept("evening", {"time": "evening"}, in_premises=False),
    concept("dark", {"dark": True}, in_premises=False),
]
SKIES = [
    concept("raining", {"sky": "rain"}, in_premises=False),
    concept("snowing", {"sky": "snow"}, in_premises=False),
    concept("sunny", {"sky": "sun"}, in_premises=False),
    concept("windy", {"windy": True}, in_premises=False),
]

# Few purposes exclude each other. `DOING` prevents absurd ones, such as resting to win a prize.
DOING = AWAKE | {"resting": False}
PURPOSES = [
    concept("just for fun / purely for pleasure", {"paid": False, "contest": False, "duty": False}, needs=DOING),
    concept("for money / to earn money", {"paid": True}, needs=DOING),
    concept("to win a prize", {"contest": True}, needs=DOING),
    concept("to please a friend / to make a friend happy", {"favor": True}, needs=DOING),
    concept("out of duty", {"duty": True}, needs=DOING),
]
MANNERS = [
    concept("in a hurry / in a rush", {"hurry": True}, needs=DOING),
    concept("without hurry / in no hurry", {"hurry": False}, needs=DOING),
    concept("quietly", {"loud": False}, needs=DOING),
    concept("noisily", {"loud": True}, needs=DOING),
]


def action(words, needs=PERSON, **features):
    """An action of somebody awake. Whether it counts as moving is debatable unless given."""
    return concept(words, {"asleep": False, "moving": None} | features, needs=needs)


def going(words, gait, needs=PERSON, **features):
    """Locomotion on foot."""
    return action(words, needs=needs | {"resting": False}, gait=gait, moving=True, pose="up", **features)


def busy(words, hands, needs=PERSON, **features):
    """An action in one place that takes both hands."""
    return action(words, needs=needs, hands=hands, gait="none", **features)


def riding(vehicle):
    """Riding a vehicle, outdoors."""
    words = f"riding a {vehicle}|riding {vehicle}s"
    features = {"vehicle": vehicle, "hands": "steering", "inside": False, "spacious": True}
    return action(words, needs=PERSON | {"resting": False}, moving=True, pose="seat", gait="none", **features)


def sport(words, name, ball=True):
    """A sport: standing up, in a spacious place."""
    features = {"play": "sport", "ball": ball, "gait": None, "hands": "sport", "pose": "up", "spacious": True}
    return action(words, needs=PERSON | {"resting": False}, moving=True, sport=name, **features)


def resting(words, pose, needs=PERSON, **features):
    """Sitting, lying or leaning; other actions, and sleep, remain possible."""
    features = {"pose": pose, "moving": False, "gait": "none"} | features
    return concept(words, features, needs=needs | {"resting": True})


def playing(instrument, **features):
    """Playing an instrument."""
    words = f"playing a {instrument}|playing {instrument}s"
    return busy(words, hands=instrument, music=True, plays=True, **features)


def consuming(words, mouth, needs=PERSON, **features):
    """Eating or drinking."""
    return action(words, needs=needs | {"resting": True}, mouth=mouth, **features)


def general(words, in_premises=False, needs=None, **features):
    """A broader concept that covers several actions."""
    return concept(words, features, in_premises, needs)


LIVING = {}
PET = ANIMAL | {"housebroken": True}
TAME = PERSON | {"wild": False}  # for actions that need a place that is not wild
SLEEPING = {"asleep": True, "pose": "lie", "moving": False, "gait": "none"}
SLEEPING |= {"hands": "idle", "mouth": "shut", "eyes": "shut"}
ACTIONS = [
    going("running", "run", needs={"flies": False}),
    action("walking", needs={"resting": True}, gait="walk", moving=True, pose="up"),
    going("dancing", "dance"),
    going("jumping rope", "jump", hands="rope"),
    going("climbing a ladder|climbing ladders", "climb", hands="ladder", needs=TAME),
    going("skating", "skate", needs=TAME | {"spacious": True}),
    riding("bike"),
    riding("motorcycle"),
    riding("scooter"),
    concept("sleeping / asleep / taking a nap|taking naps", SLEEPING),
    resting("sitting on a bench|sitting on benches", "seat", seat="bench", needs=TAME),
    resting("sitting on a rug|sitting on rugs", "seat", seat="rug", needs=TAME),
    resting("lying on a blanket|lying on blankets", "lie", bed="blanket"),
    resting("lying in the grass", "lie", needs={"grass": True}, bed="grass", inside=False),
    resting("leaning against a wall", "up", needs=TAME),
    playing("guitar"),
    playing("violin"),
    playing("drum"),
    playing("flute", mouth="flute"),
    action("singing a song|singing songs", mouth="sing", music=True),
    consuming("eating an apple|eating apples", "eat", food="fruit", fruit="apple"),
    consuming("eating a banana|eating bananas", "eat", food="fruit", fruit="banana"),
    consuming("eating a sandwich|eating sandwiches", "eat", food="sandwich"),
    consuming("eating cake", "eat", food="cake", needs=TAME),
    consuming("eating grass", "eat", food="grass", needs=ANIMAL | {"grass": True}),
    consuming("drinking tea", "drink", drink="tea"),
    consuming("drinking milk", "drink", drink="milk"),
    consuming("drinking water", "drink", drink="water", needs=LIVING),
    busy("reading a book|reading books", "book", reads=True, eyes="text"),
    busy("reading a newspaper|reading newspapers", "newspaper", reads=True, eyes="text"),
    busy("reading a letter|reading letters", "letter", reads=True, eyes="text"),
    sport("playing soccer", "soccer"),
    sport("playing tennis", "tennis"),
    sport("playing basketball", "basketball"),
    sport("playing badminton", "badminton", ball=False),
    busy("playing chess", "chess", needs=TAME),
    busy("playing cards", "cards", needs=TAME),
    busy("painting a picture|painting pictures", "brush", art=True),
    busy("drawing a picture|drawing pictures", "pencil", art=True),
    busy("fixing a clock|fixing clocks / repairing a clock|repairing clocks", "tools", fixed="clock", needs=TAME),
    busy("fixing a radio|fixing radios / repairing a radio|repairing radios", "tools", fixed="radio", needs=TAME),
    busy("washing a window|washing windows", "cloth", cleans=True, washed="window", needs=TAME),
    busy("washing a table|washing tables", "cloth", cleans=True, washed="table", needs=TAME),
    busy("sweeping the floor", "broom", cleans=True, needs=PERSON | {"inside": True}),
    busy("cutting paper", "scissors", cuts=True, needs=TAME),
    busy("cutting bread", "knife", cuts=True, needs=TAME),
    busy("digging a hole|digging holes", "shovel", inside=False),
    busy("taking a photo|taking photos / taking a picture|taking pictures", "camera", art=None),
    action("carrying a box|carrying boxes", hands="load", load="box"),
    action("carrying a basket|carrying baskets", hands="load", load="basket"),
    action("pushing a cart|pushing carts", hands="cart", moving=True, pose="up", needs=TAME),
    action("throwing a ball|throwing balls", hands="throw", thrown="ball", needs=PERSON | {"spacious": True}),
    action("throwing a frisbee|throwing frisbees", hands="throw", thrown="frisbee", needs=PERSON | {"spacious": True}),
    busy("flying a kite|flying kites", "kite", inside=False, needs=PERSON | {"spacious": True}),
    busy("fishing", "rod", inside=False, needs=PERSON | {"shore": True}),
    action("talking on the phone", mouth="talk"),
    action("playing with a ball|playing with balls", needs=PET, toy="ball"),
    action("playing with a stick|playing with sticks", needs=PET, toy="stick"),
    action("flying", needs=ANIMAL | {"flies": True}, moving=True, pose="air", gait="fly"),
    action("swimming in a lake", ANIMAL, moving=True, pose="swim", gait="swim", inside=False, place="in a lake"),
    # Broader concepts. Premises use some of them, too, which makes claims about the details neutral.
    general("playing an instrument|playing instruments", True, PERSON, plays=True, music=True, asleep=False),
    general("making music", needs=PERSON, music=True, asleep=False),
    general("eating fruit", True, PERSON | {"resting": True}, mouth="eat", food="fruit", asleep=False),
    general("eating / having something to eat", True, {"resting": True}, mouth="eat", asleep=False),
    general("drinking / having something to drink", needs={"resting": True}, mouth="drink", asleep=False),
    general("reading", True, PERSON, reads=True, eyes="text", asleep=False, gait="none"),
    general("playing a sport|playing sports", needs=PERSON, play="sport", asleep=False, moving=True),
    general("playing a ball game|playing ball games", True, PERSON, play="sport", ball=True, asleep=False),
    general("making a picture|making pictures", needs=PERSON, art=True, asleep=False),
    general("fixing something / repairing something", True, PERSON, hands="tools", asleep=False),
    general("cleaning something", needs=PERSON, cleans=True, asleep=False),
    general("washing something", True, PERSON, cleans=True, hands="cloth", asleep=False),
    general("cutting something", needs=PERSON, cuts=True, asleep=False),
    general("carrying something", True, PERSON, hands="load", asleep=False),
    general("throwing something", needs=PERSON, hands="throw", asleep=False),
    general("awake", asleep=False),
    general("sitting / seated", pose="seat"),
    general("lying down", pose="lie"),
    general("moving / in motion", moving=True),
]


def doing_to(verb, participle, needs, patient, **features):
    """An action on another actor, in active and passive form, which exclude each other."""
    active = concept(verb, {"role": verb, "asleep": False, "moving": None, "gait": None} | features, needs=needs)
    return active, concept(f"being {participle} by", {"role": participle}, needs=patient)


ROLES = [
    doing_to("chasing", "chased", LIVING, LIVING, moving=True, pose="up"),
    doing_to("feeding", "fed", PERSON, {"age": "child"}, hands="feeding", gait="none"),
    doing_to("washing", "washed", PERSON, {"age": "child", "flies": False}, hands="cloth", cleans=True, gait="none"),
    doing_to("carrying", "carried", PERSON, {"age": "child", "heavy": False}, hands="load", pose="up"),
    doing_to("leading", "led", PERSON, {"flies": False}, moving=True, pose="up"),
    doing_to("brushing", "brushed", PERSON, {"being": "animal", "flies": False}, hands="brush", gait="none"),
]
