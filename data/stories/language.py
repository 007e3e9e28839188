"""The language of `stories`: a generator of short stories, and its exact oracle.

A story is one sentence per beat. A sentence is a pattern whose capitals are slots; a slot is drawn
when it is first mentioned and remembered from then on, so names, pronouns, things, colours and
places must agree from end to end, and what a friend does must fit what went wrong. Choices are
skewed, as in natural language: the i-th word of a list has weight 1/i.

    log_prob(words)          the log-probability of a story under the generator, in nats
    contradictions(words)    what is wrong with it, one reason each; [] exactly when log_prob > -inf
"""
import math

NAMES = "lily tom anna ben mia sam zoe max".split()      # girls and boys in turn
WORDS = {
    "NAME": NAMES, "FRIEND": NAMES,
    "COLOUR": "red blue green yellow white pink".split(),
    "THING": "ball kite boat hat book drum doll".split(),
    "PLACE": "park beach garden forest farm lake".split(),
    "ANIMAL": "dog bird cat fox".split(),
    "WEATHER": "sunny warm windy cold".split(),
}
FORMS = {                                # slots that follow from a name: whose, for a girl, a boy
    "SHE": ("NAME", "she", "he"), "HER": ("NAME", "her", "his"), "GIRL": ("NAME", "girl", "boy"),
    "FSHE": ("FRIEND", "she", "he"), "FHIM": ("FRIEND", "her", "him"),
}
BEATS = {                                # beat: (weight, plot or "" for any, sentence)
    "opening": [(5, "", "one WEATHER day NAME went to the PLACE ."),
                (3, "", "NAME was a GIRL who loved the PLACE ."),
                (2, "", "on a WEATHER day NAME saw the PLACE .")],
    "thing": [(5, "", "SHE took HER COLOUR THING along ."),
              (3, "", "SHE had a new COLOUR THING ."),
              (2, "", "SHE played with a COLOUR THING .")],
    "friend": [(5, "", "HER good friend FRIEND was there ."),
               (3, "", "SHE met FRIEND under a tree ."),
               (2, "", "then FRIEND came to play too .")],
    "trouble": [(4, "fell", "the THING fell into the water ."),
                (3, "gone", "but soon the THING was gone ."),
                (3, "took", "then a ANIMAL took the THING .")],
    "feeling": [(4, "", "NAME was very sad ."),
                (3, "", "SHE began to cry ."),
                (2, "", "NAME called for help .")],
    "help": [(5, "fell", "FRIEND got the THING with a stick ."),
             (3, "fell", "but FRIEND jumped in and got it ."),
             (5, "gone", "FRIEND found the THING behind a rock ."),
             (3, "gone", "but FRIEND looked up and saw it ."),
             (5, "took", "FRIEND ran and took the THING back ."),
             (3, "took", "but FRIEND gave the ANIMAL some bread .")],
    "ending": [(5, "", "NAME gave FHIM a big hug ."),
               (3, "", "they took the COLOUR THING home ."),
               (2, "", "FSHE and NAME left the PLACE .")],
}
CLASS = {word: slot for slot in WORDS if slot != "FRIEND" for word in WORDS[slot]}
CLASS |= {"she": "SHE", "he": "SHE", "her": "HER", "his": "HER", "him": "HER",
          "girl": "GIRL", "boy": "GIRL", "FRIEND": "NAME", "FSHE": "SHE", "FHIM": "HER"}
VOCABULARY = sorted({word for beat in BEATS.values() for _, _, pattern in beat
                     for word in pattern.split() if not word.isupper()}
                    | {word for word in CLASS if word.islower()})


def skeleton(words):
    """A sentence with every word of a class replaced by the class: what parsing goes by."""
    return " ".join(CLASS.get(word, word) for word in words)


SENTENCES = {skeleton(option[2].split()): (beat, option)
             for beat in BEATS for option in BEATS[beat]}


def options(beat, plot):
    """{option: probability} of the sentences that a beat may have, given the plot ("" = open)."""
    fitting = [option for option in BEATS[beat] if not plot or option[1] in ("", plot)]
    total = sum(weight for weight, _, _ in fitting)
    return {option: option[0] / total for option in fitting}


def fillers(slot, facts):
    """{word: probability} of what may stand in a slot, given the facts so far {slot: word}."""
    if slot in FORMS:
        who, girl, boy = FORMS[slot]
        return {girl if NAMES.index(facts[who]) % 2 == 0 else boy: 1.0} if who in facts else {}
    if slot in facts:
        return {facts[slot]: 1.0}
    weights = {word: 1 / (i + 1) for i, word in enumerate(WORDS[slot])}
    if slot == "FRIEND":
        weights.pop(facts.get("NAME"), None)             # a friend is somebody else
    return {word: weight / sum(weights.values()) for word, weight in weights.items()}


def generate(rng):
    """One story, a list of words; rng is a random.Random."""
    story, facts, plot = [], {}, ""
    for beat in BEATS:
        chances = options(beat, plot)
        (_, theme, pattern), = rng.choices([*chances], [*chances.values()])
        plot = plot or theme
        for word in pattern.split():
            if word.isupper():
                chances = fillers(word, facts)
                slot, (word,) = word, rng.choices([*chances], [*chances.values()])
                facts[slot] = word
            story.append(word)
    return story


def read(words):
    """Parse a story: (log-probability, contradictions)."""
    wrong, said = [], {}
    for sentence in " ".join(words).replace(" .", " .\n").split("\n"):  # first find each beat
        sentence = sentence.split()
        beat, option = SENTENCES.get(skeleton(sentence), ("", None))
        if option is None and sentence:
            wrong.append(f"not a sentence: {' '.join(sentence)}")
        elif sentence and list(BEATS).index(beat) <= max(map(list(BEATS).index, said), default=-1):
            wrong.append(f"out of order: {' '.join(sentence)}")
        elif sentence:
            said[beat] = sentence, option
    total, facts, plot = 0.0, {}, ""
    for beat in BEATS:                                               # then tell the story again
        sentence, option = said.get(beat, ([], BEATS[beat][0]))
        if not sentence and option[2]:
            wrong.append(f"no {beat}")
            continue
        chances = options(beat, plot)
        if option not in chances:
            wrong.append(f"does not fit the trouble: {' '.join(sentence)}")
        total += math.log(chances.get(option, 1))
        plot = plot or option[1]
        for slot, word in zip(option[2].split(), sentence):
            if slot.isupper():
                chances = fillers(slot, facts)
                if word not in chances and chances:
                    wrong.append(f"the {slot.lower()} is {' or '.join(chances)}, not {word}")
                total += math.log(chances.get(word, 1))
                facts.setdefault(slot, word)
    return (-math.inf if wrong else total), wrong


def log_prob(words):
    """Log-probability of a story (a list of words) in nats; -inf if impossible."""
    return read(words)[0]


def contradictions(words):
    """What is wrong with a story, one reason for each fault."""
    return read(words)[1]
