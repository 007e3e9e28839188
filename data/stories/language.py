"""The language of `stories`: a generator of short stories, and its exact oracle.

A story is one sentence per beat. A sentence is a pattern whose capitals are slots. A slot
is drawn when it is first mentioned and remembered from then on: so names, pronouns, things,
colours and places must agree from end to end, and what a friend does must fit what went
wrong. Choices are skewed, as in natural language: the i-th word of a list has weight 1/i.

    log_prob(words)          the log-probability of a story under the generator, in nats
    contradictions(words)    what is wrong with it, one reason for each fault;
                             [] exactly when log_prob > -inf
    faults(words)            the same, and which words each fault lies in
"""
import math

# what is drawn for a slot; names are girls and boys in turn
NAMES = "lily tom anna ben mia sam zoe max".split()
WORDS = {
    "NAME": NAMES, "FRIEND": NAMES,
    "COLOUR": "red blue green yellow white pink".split(),
    "THING": "ball kite boat hat book drum doll".split(),
    "PLACE": "park beach garden forest farm lake".split(),
    "ANIMAL": "dog bird cat fox".split(),
    "WEATHER": "sunny warm windy cold".split(),
}
# slots that follow from a name: (whose name, the word for a girl, for a boy)
FORMS = {
    "SHE": ("NAME", "she", "he"), "HER": ("NAME", "her", "his"),
    "GIRL": ("NAME", "girl", "boy"),
    "FSHE": ("FRIEND", "she", "he"), "FHIM": ("FRIEND", "her", "him"),
}
# the options of each beat: (weight, plot that it belongs to or "" for any, sentence)
BEATS = {
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


# ---- what parsing needs: the class of a word, the sentence of a row of classes

def word_classes():
    """{word: class}, for the words that are drawn and for the slots themselves. Words that
    only the story can tell apart, such as a friend and the one whose friend it is, are of
    one class."""
    classes = {}
    for slot in WORDS:
        if slot != "FRIEND":             # a name has the class NAME
            for word in WORDS[slot]:
                classes[word] = slot
    # "her" is both HER and FHIM, so these two, and all their forms, are one class
    classes |= {"she": "SHE", "he": "SHE", "her": "HER", "his": "HER", "him": "HER",
                "girl": "GIRL", "boy": "GIRL"}
    return classes | {"FRIEND": "NAME", "FSHE": "SHE", "FHIM": "HER"}


CLASS = word_classes()


def all_words():
    """Every word that a story may have, in alphabetical order."""
    # those that are drawn, or follow from a name
    words = {word for word in CLASS if word.islower()}
    # and those that the patterns have beside their slots
    for beat in BEATS:
        for _, _, pattern in BEATS[beat]:
            words |= {word for word in pattern.split() if not word.isupper()}
    return sorted(words)


VOCABULARY = all_words()


def skeleton(words):
    """A sentence (a list of words) as text in which the class stands for every word that
    has one."""
    return " ".join(CLASS.get(word, word) for word in words)


def all_sentences():
    """{skeleton: (beat, option)} of all patterns."""
    sentences = {}
    for beat in BEATS:
        for option in BEATS[beat]:
            sentences[skeleton(option[2].split())] = beat, option
    return sentences


SENTENCES = all_sentences()


# ---- the chances, which the generator and the oracle share

def options(beat, plot):
    """{option: probability} of the sentences that a beat may have, given the plot ("" where
    none is chosen yet)."""
    fitting = [option for option in BEATS[beat] if not plot or option[1] in ("", plot)]
    total = sum(weight for weight, _, _ in fitting)
    return {option: option[0] / total for option in fitting}


def fillers(slot, facts):
    """{word: probability} of what may stand in a slot, given the facts so far {slot: word}.
    {} for a form of a name that was not mentioned."""
    # a form follows from its name
    if slot in FORMS:
        who, girl, boy = FORMS[slot]
        if who not in facts:
            return {}
        if NAMES.index(facts[who]) % 2 == 0:
            return {girl: 1.0}
        return {boy: 1.0}
    # what was mentioned stays
    if slot in facts:
        return {facts[slot]: 1.0}
    # what is new is drawn
    weights = {word: 1 / (i + 1) for i, word in enumerate(WORDS[slot])}
    if slot == "FRIEND":
        weights.pop(facts.get("NAME"), None)             # a friend is somebody else
    total = sum(weights.values())
    return {word: weight / total for word, weight in weights.items()}


# ---- the generator

def draw(rng, chances):
    """A key of {key: probability}; rng is a random.Random."""
    return rng.choices(list(chances), list(chances.values()))[0]


def generate(rng):
    """One story, a list of words; rng is a random.Random."""
    story = []
    facts = {}                                           # slot: word
    plot = ""
    for beat in BEATS:
        # a sentence that fits the plot; the trouble chooses which plot it is
        _, theme, pattern = draw(rng, options(beat, plot))
        plot = plot or theme
        # its words
        for word in pattern.split():
            if word.isupper():
                slot = word
                word = draw(rng, fillers(slot, facts))
                facts[slot] = word
            story.append(word)
    return story


# ---- the oracle

def parse(words):
    """Find the beats of a story (a list of words): ({beat: (sentence, option, begin)},
    faults), sentences as lists of words, begin: the position of the first of them. A
    sentence that is none, or comes after one of its own or of a later beat, is left out,
    and wrong."""
    said = {}
    wrong = []
    order = list(BEATS)
    latest = -1                                          # number of the last beat found
    begin = 0                                            # of the sentence
    for sentence in " ".join(words).replace(" .", " .\n").split("\n"):
        sentence = sentence.split()
        if not sentence:                                 # after the last full stop
            continue
        where = list(range(begin, begin + len(sentence)))
        beat, option = SENTENCES.get(skeleton(sentence), ("", None))
        if option is None:
            wrong.append((f"not a sentence: {' '.join(sentence)}", where))
        elif order.index(beat) <= latest:
            wrong.append((f"out of order: {' '.join(sentence)}", where))
        else:
            said[beat] = sentence, option, begin
            latest = order.index(beat)
        begin += len(sentence)
    return said, wrong


def read(words):
    """Parse a story (a list of words), and tell it again as the generator would:
    (log-probability in nats, faults)."""
    said, wrong = parse(words)
    total = 0.0
    facts = {}                                           # slot: word
    plot = ""
    for beat in BEATS:
        # a beat that is not told; one with an empty pattern tells itself
        sentence, option, begin = said.get(beat, ([], BEATS[beat][0], 0))
        if not sentence and option[2]:
            wrong.append((f"no {beat}", []))
            continue
        # the choice of the sentence
        chances = options(beat, plot)
        if option not in chances:
            where = list(range(begin, begin + len(sentence)))
            wrong.append((f"does not fit the trouble: {' '.join(sentence)}", where))
        total += math.log(chances.get(option, 1))
        plot = plot or option[1]
        # the choice of the words in its slots; what was said first holds
        for i, (slot, word) in enumerate(zip(option[2].split(), sentence), begin):
            if slot.isupper():
                chances = fillers(slot, facts)
                if word not in chances and chances:
                    right = " or ".join(chances)
                    wrong.append((f"the {slot.lower()} is {right}, not {word}", [i]))
                total += math.log(chances.get(word, 1))
                facts.setdefault(slot, word)
    # the story is impossible if anything is wrong
    if wrong:
        total = -math.inf
    return total, wrong


def choices(words):
    """{beat or slot: what a story (a list of words) chose there}: the pattern of each
    sentence, and the first word of each slot that is drawn."""
    said, _ = parse(words)
    chosen = {}
    for beat, (sentence, option, _) in said.items():
        chosen[beat] = option[2]
        for slot, word in zip(option[2].split(), sentence):
            if slot in WORDS:
                chosen.setdefault(slot, word)
    return chosen


def all_choices():
    """{beat or slot: what may be chosen there}: patterns of sentences, then words, each in
    the order of their lists."""
    everything = {}
    for beat in BEATS:
        everything[beat] = [pattern for _, _, pattern in BEATS[beat]]
    return everything | WORDS


def title(choice):
    """The name of a beat or slot for the reader: a sentence, or a word."""
    if choice in WORDS:
        return f"the {choice.lower()}"
    return f"sentence: {choice}"


def log_prob(words):
    """Log-probability of a story (a list of words) in nats; -inf if impossible."""
    return read(words)[0]


def faults(words):
    """What is wrong with a story (a list of words): [(reason, positions of the words that
    it is about)]. A sentence that is missing has no position, one that does not belong
    where it stands those of all its words."""
    return read(words)[1]


def contradictions(words):
    """The reasons alone, one for each fault."""
    return [reason for reason, _ in faults(words)]
