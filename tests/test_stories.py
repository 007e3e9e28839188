"""The oracle of `stories` knows the law of its generator, and names what is wrong with a text.

All seeds are fixed and nothing depends on threads, so that a test fails or passes for good; where
a number is a sample's, the docstring says how often another seed would fail it. Lists of words and
sentences are read from the module, except in `small`, a language of a few hundred stories.
"""
import collections
import itertools
import math
import random

import pytest

from data.stories import language

PRONOUNS = [["she", "he"], ["her", "his"], ["girl", "boy"], ["her", "him"]]


@pytest.fixture(scope="module")
def stories():
    """10,000 stories, each a list of words."""
    rng = random.Random(1)
    return [language.generate(rng) for _ in range(10_000)]


def sentences(story):
    """[(place, words, (beat, option))] of a faultless story; place: where the sentence begins."""
    found, place = [], 0
    for i, word in enumerate(story):
        if word == ".":
            words = story[place:i + 1]
            found.append((place, words, language.SENTENCES[language.skeleton(words)]))
            place = i + 1
    return found


def mentions(story):
    """[(place, slot)] of every slot of a faultless story."""
    return [(place + i, slot) for place, words, (beat, option) in sentences(story)
            for i, slot in enumerate(option[2].split()) if slot.isupper()]


def join(parts):
    """The words of some sentences() in a row."""
    return [word for _, words, _ in parts for word in words]


def others(slot, word):
    """The words that could be mistaken for this one in a slot: all that parse the same."""
    if slot in language.FORMS:
        forms = set(language.FORMS[slot][1:])
        return sorted(forms - {word})
    return [other for other in language.WORDS[slot] if other != word]


def bound(story):
    """[(place, slot)] of the mentions whose word follows from what was said before."""
    seen, found = set(), []
    for place, slot in mentions(story):
        if slot in seen or slot in language.FORMS:
            found.append((place, slot))
        seen.add(slot)
    return found


def replaced(story, place, word):
    return story[:place] + [word] + story[place + 1:]


def probability(words, beats=None, facts={}, plot=""):
    """The slow reference: the generator's choices that give these words, each with its chance."""
    beats = list(language.BEATS) if beats is None else beats
    if not beats:
        return 0.0 if words else 1.0
    total = 0.0
    for option, chance in language.options(beats[0], plot).items():
        pattern, known = option[2].split(), dict(facts)
        if len(pattern) > len(words):
            continue
        for slot, word in zip(pattern, words):
            if slot.isupper():
                chance *= language.fillers(slot, known).get(word, 0)
                known[slot] = word
            else:
                chance *= slot == word
            if not chance:
                break
        else:
            total += chance * probability(words[len(pattern):], beats[1:], known, plot or option[1])
    return total


def check(words):
    """A text is possible, has a finite log_prob and is free of contradictions, or none of it."""
    log_p, wrong, p = language.log_prob(words), language.contradictions(words), probability(words)
    assert (p > 0) == (log_p > -math.inf) == (wrong == []), (words, log_p, wrong, p)
    assert not p or abs(log_p - math.log(p)) < 1e-9          # sums of some 25 logarithms, float64
    return bool(p)


def reasons(words):
    """The contradictions of a text that must be impossible."""
    assert not check(words), words
    return language.contradictions(words)


# ---- stories

def test_oracle_accepts_every_story_and_gives_it_a_finite_log_prob(stories):
    """10,000 of them. Exact, no false alarm."""
    for story in stories:
        assert language.contradictions(story) == [], story
        assert -math.inf < language.log_prob(story) < 0, story


def test_log_prob_is_the_product_of_the_chances_of_the_choices(stories):
    """By a slow recursion over all choices, for 1,000 stories, to 1e-9: no false alarm."""
    assert all(check(story) for story in stories[:1000])


def test_stories_have_one_length_of_25_to_50_words(stories):
    """For any words that are drawn: within a beat, all patterns are equally long. Exact."""
    lengths = [{len(pattern.split()) for _, _, pattern in beat} for beat in language.BEATS.values()]
    assert all(len(n) == 1 for n in lengths)
    assert {len(story) for story in stories} == {sum(map(max, lengths))}
    assert 25 <= len(stories[0]) <= 50


def test_vocabulary_is_what_the_stories_use_and_about_100_words(stories):
    """Each word once, sorted. That each one occurs in 10,000 stories is certain in practice: the
    rarest word is in about 1 of 30."""
    assert language.VOCABULARY == sorted({word for story in stories for word in story})
    assert 80 <= len(language.VOCABULARY) <= 120


def test_no_two_patterns_parse_the_same():
    """The oracle goes by skeletons, which must tell all patterns of all beats apart, and classes,
    in which each word has one place. Exact, no false alarm."""
    assert len(language.SENTENCES) == sum(map(len, language.BEATS.values()))
    drawn = [word for slot in language.WORDS if slot != "FRIEND" for word in language.WORDS[slot]]
    drawn += ["she", "he", "her", "his", "him", "girl", "boy"]
    fixed = {word for beat in language.BEATS.values() for _, _, pattern in beat
             for word in pattern.split() if not word.isupper()}
    assert len(set(drawn)) == len(drawn) and not fixed & set(drawn)


def test_the_same_seed_gives_the_same_stories(stories):
    """The generator draws from rng alone. Exact, no false alarm."""
    random.seed(7)
    rng = random.Random(1)
    assert [language.generate(rng) for _ in range(50)] == stories[:50]


def test_few_fresh_stories_are_copies_of_training_stories(stories):
    """Of 30,000, as prepare.py draws them. The share is about 1 % (2 % would be far off by chance:
    its standard error is 0.1 %), so that a model which is right 99 % of the time has learned."""
    rng = random.Random(0)
    training = {tuple(language.generate(rng)) for _ in range(30_000)}
    share = sum(tuple(story) in training for story in stories) / len(stories)
    assert share < 0.05, share
    assert len(training) > 0.95 * 30_000


# ---- the law

@pytest.fixture(scope="module")
def small():
    """A small language with every kind of slot and all forms -> (law, drawn).

    law: {text: probability} by the oracle for all texts that have its sentences in order, whoever
    and whatever stands in the slots, possible or not; drawn: counts of 20,000 generated stories.
    """
    beats = {
        "opening": [(3, "", "WEATHER NAME came ."), (1, "", "NAME was a GIRL .")],
        "friend": [(2, "", "HER dear FRIEND came ."), (1, "", "FRIEND came .")],
        "trouble": [(2, "fell", "then THING fell ."), (1, "gone", "SHE lost THING .")],
        "help": [(1, "fell", "FRIEND got it ."), (2, "fell", "FSHE jumped ."),
                 (3, "gone", "FRIEND found THING .")],
        "ending": [(5, "", "SHE thanked FHIM ."), (2, "", "no more .")]}
    words = {slot: language.WORDS[slot][:2] for slot in language.WORDS}
    words["NAME"] = words["FRIEND"] = language.NAMES[:3]

    def filled(pattern):
        return [" ".join(choice) for choice in itertools.product(
            *[words.get(slot) or language.FORMS.get(slot, ("", slot))[1:]
              for slot in pattern.split()])]
    told = [[sentence for option in beats[beat] for sentence in filled(option[2])]
            for beat in beats]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "BEATS", beats)
        patch.setattr(language, "WORDS", words)
        patch.setattr(language, "SENTENCES", {
            language.skeleton(option[2].split()): (beat, option)
            for beat in beats for option in beats[beat]})
        law = {text: math.exp(language.log_prob(text.split()))
               for text in map(" ".join, itertools.product(*told))}
        rng = random.Random(3)
        drawn = collections.Counter(" ".join(language.generate(rng)) for _ in range(20_000))
    assert len(law) == math.prod(map(len, told)) > 10_000
    return law, drawn


def test_probabilities_of_all_stories_sum_to_1(small):
    """Every text of the small language is asked, most of them impossible; the few hundred stories
    have probability 1 together, to 1e-9 (float64). No false alarm."""
    law, drawn = small
    possible = {text for text, p in law.items() if p}
    assert 200 < len(possible) < 1000
    assert abs(sum(law.values()) - 1) < 1e-9
    assert drawn.keys() <= possible


def test_generated_frequencies_follow_the_probabilities(small):
    """Chi-square of 20,000 stories, those of fewer than 5 expected counts in one cell. With k cells
    it is k - 1 on average, sd sqrt(2 (k - 1)); 5 sd: another seed fails once in 100,000."""
    law, drawn = small
    n = drawn.total()
    cells = collections.defaultdict(lambda: [0, 0.0])        # drawn, expected
    for text, p in law.items():
        if p:
            cell = cells[text if n * p >= 5 else "rare"]
            cell[0] += drawn[text]
            cell[1] += n * p
    assert sum(cell[0] for cell in cells.values()) == n and len(cells) > 100
    chi2 = sum((seen - expected) ** 2 / expected for seen, expected in cells.values())
    k = len(cells) - 1
    assert abs(chi2 - k) < 5 * math.sqrt(2 * k), (chi2, k)


def test_chances_are_the_weights_that_the_module_promises():
    """Of sentences by their weights, of words 1/rank, of a friend without the name. To 1e-12, no
    false alarm."""
    for beat, patterns in language.BEATS.items():
        total = sum(weight for weight, _, _ in patterns)
        for option, chance in language.options(beat, "").items():
            assert abs(chance - option[0] / total) < 1e-12
    for slot, words in language.WORDS.items():
        name = language.NAMES[1]
        chances = language.fillers(slot, {"NAME": name} if slot == "FRIEND" else {})
        left = {word: 1 / rank for rank, word in enumerate(words, 1)
                if (slot, word) != ("FRIEND", name)}
        assert chances.keys() == left.keys()
        for word in left:
            assert abs(chances[word] - left[word] / sum(left.values())) < 1e-12


def entropy(chances):
    return -sum(p * math.log(p) for p in chances.values())


def test_mean_of_minus_log_prob_is_the_entropy(stories):
    """The entropy of the real language by the chain rule: over all rows of sentences, that of the
    row, and of each slot that it draws. 10,000 stories come within 5 of their standard errors
    (0.02 nats); another seed fails about once in a million."""
    rows = [(1.0, "", "")]                                   # probability, plot, text so far
    for beat in language.BEATS:
        rows = [(p * chance, plot or option[1], text + " " + option[2]) for p, plot, text in rows
                for option, chance in language.options(beat, plot).items()]
    assert abs(sum(p for p, _, _ in rows) - 1) < 1e-9
    of_slot = {slot: entropy(language.fillers(slot, {})) for slot in language.WORDS}
    of_slot["FRIEND"] = sum(p * entropy(language.fillers("FRIEND", {"NAME": name}))
                            for name, p in language.fillers("NAME", {}).items())
    exact = sum(p * (-math.log(p) + sum(h for slot, h in of_slot.items() if slot in text.split()))
                for p, _, text in rows)
    costs = [-language.log_prob(story) for story in stories]
    mean = sum(costs) / len(costs)
    error = math.sqrt(sum((cost - mean) ** 2 for cost in costs) / len(costs) ** 2)
    assert error < 0.05
    assert abs(mean - exact) < 5 * error, (mean, exact, error)


def test_pronouns_follow_the_right_person(stories):
    """Names are girls and boys in turn; she, her and girl are about the name, the friend's pronouns
    about the friend. 1,000 stories, each of the forms for each sex. Exact, no false alarm."""
    seen = collections.Counter()
    for story in stories[:1000]:
        known = {slot: story[place] for place, slot in mentions(story)}
        girl = {who: language.NAMES.index(known[who]) % 2 == 0 for who in ("NAME", "FRIEND")}
        right = {"SHE": ("he", "she")[girl["NAME"]], "HER": ("his", "her")[girl["NAME"]],
                 "GIRL": ("boy", "girl")[girl["NAME"]], "FSHE": ("he", "she")[girl["FRIEND"]],
                 "FHIM": ("him", "her")[girl["FRIEND"]]}
        for place, slot in mentions(story):
            if slot in right:
                assert story[place] == right[slot], story
                seen[slot, story[place]] += girl["NAME"] != girl["FRIEND"]
    assert len(seen) == 10 and all(seen.values())


# ---- what is no story

def test_possible_means_no_contradiction_whatever_the_words(stories):
    """One word of a story replaced by a random one, of its kind or not, 4,000 times: some remain
    stories (another weather), most do not. The slow recursion decides. Exact, no false alarm."""
    rng, count = random.Random(4), collections.Counter()
    for story in stories[:4000]:
        place = rng.randrange(len(story))
        kind = language.skeleton([story[place]])
        like = [word for word in language.VOCABULARY if language.skeleton([word]) == kind]
        text = replaced(story, place, rng.choice(rng.choice([like, language.VOCABULARY])))
        count[check(text), text == story] += 1
    assert count[True, False] > 20 and count[False, False] > 1000


def test_sentences_of_different_stories_rarely_make_one_and_the_oracle_knows(stories):
    """Each beat from another story: much agrees by chance. The slow recursion decides. Exact, no
    false alarm."""
    rng, count = random.Random(5), collections.Counter()
    for _ in range(2000):
        told = [sentences(story) for story in rng.sample(stories[:500], 2)]
        text = [word for i in range(len(told[0])) for word in rng.choice(told)[i][1]]
        count[check(text)] += 1
    assert count[True] > 20 and count[False] > 500


def test_random_words_and_odd_texts_are_refused():
    """Also empty ones, words that nobody knows, and full stops alone. Exact, no false alarm."""
    rng = random.Random(6)
    for _ in range(500):
        text = [rng.choice(language.VOCABULARY) for _ in range(rng.randrange(80))]
        assert reasons(text)
    for text in ([], ["."], [".", "."], ["xyzzy"], ["NAME"], [""], ["<end>", "."]):
        assert reasons(text), text


# the slots of the list: who, pronoun, whose, girl or boy, what, colour, where, animal, and
# the two pronouns of the friend
@pytest.mark.parametrize("slot", ["NAME", "FRIEND", "SHE", "HER", "GIRL", "THING", "COLOUR",
                                  "PLACE", "ANIMAL", "FSHE", "FHIM"])
def test_wrong_word_is_named_with_the_right_one(stories, slot):
    """30 mentions that what came before binds, replaced by each other word of the kind: one reason,
    which has slot, right and wrong word. Exact, no false alarm."""
    cases = ((story, place) for story in stories for place, s in bound(story)[::-1] if s == slot)
    cases = list(itertools.islice(cases, 30))
    assert len(cases) == 30
    for story, place in cases:
        for word in others(slot, story[place]):
            reason, = reasons(replaced(story, place, word))
            assert {slot.lower(), story[place], word} <= set(reason.replace(",", "").split())


@pytest.mark.parametrize("forms", PRONOUNS)
def test_both_pronouns_are_refused_for_the_other(stories, forms):
    """A story with each form exists, and the other form in its place is named. Exact, no false
    alarm."""
    for right, wrong in (forms, forms[::-1]):
        slots = {slot for slot, (_, *both) in language.FORMS.items() if both == forms}
        story, place = next((story, place) for story in stories for place, slot in mentions(story)
                            if slot in slots and story[place] == right)
        reason, = reasons(replaced(story, place, wrong))
        assert {right, wrong} <= set(reason.replace(",", "").split())


def test_friend_who_is_the_main_character_is_refused(stories):
    """Each mention of the friend made the name, pronouns as before: one of the reasons is about
    the friend. Exact, no false alarm."""
    for story in stories[:100]:
        known = {slot: story[place] for place, slot in mentions(story)}
        text = [known["NAME"] if word == known["FRIEND"] else word for word in story]
        assert any("friend" in reason and reason.endswith(f"not {known['NAME']}")
                   for reason in reasons(text))


def test_help_that_does_not_fit_the_trouble_is_refused(stories):
    """The right people and things, but help for another trouble: one reason, with the sentence.
    Exact, no false alarm."""
    plots = [beat for beat in language.BEATS if any(o[1] for o in language.BEATS[beat])]
    assert len(plots) == 2                                   # the trouble and the help
    tried = 0
    for story in stories[:100]:
        told = sentences(story)
        facts = {slot: story[place] for place, slot in mentions(story)}
        number = list(language.BEATS).index(plots[1])
        for option in language.BEATS[plots[1]]:
            if option[1] == told[number][2][1][1]:
                continue
            help = [facts.get(slot) or language.WORDS[slot][0] if slot.isupper() else slot
                    for slot in option[2].split()]
            text = told[:number] + [(0, help, None)] + told[number + 1:]
            reason, = reasons(join(text))
            assert "trouble" in reason and " ".join(help) in reason
            tried += 1
    assert tried > 200


def test_missing_sentence_is_named_by_its_beat(stories):
    """Each beat in turn, in 50 stories. Exact, no false alarm."""
    for story in stories[:50]:
        told = sentences(story)
        for i, beat in enumerate(language.BEATS):
            assert f"no {beat}" in reasons(join(told[:i] + told[i + 1:]))


def test_sentence_out_of_order_is_named(stories):
    """Two neighbours exchanged, in 50 stories: a reason says the order is wrong, and where. Exact,
    no false alarm."""
    for story in stories[:50]:
        told = sentences(story)
        for i in range(len(told) - 1):
            text = told[:i] + [told[i + 1], told[i]] + told[i + 2:]
            assert f"out of order: {' '.join(told[i][1])}" in reasons(join(text))


def test_sentence_that_comes_twice_is_named(stories):
    """At once, or at the end of the story. Exact, no false alarm."""
    for story in stories[:50]:
        told = sentences(story)
        for i, twice in enumerate(told):
            for text in (told[:i] + [twice] + told[i:], told + [twice]):
                reason, = reasons(join(text))
                assert reason == f"out of order: {' '.join(twice[1])}"


def test_second_sentence_of_one_beat_is_refused(stories):
    """A beat told twice in different words, with what agrees. Exact, no false alarm."""
    tried = 0
    for one, two in zip(stories[:300], stories[300:600]):
        a, b = sentences(one), sentences(two)
        for i in range(len(a)):
            if a[i][2] != b[i][2]:
                assert any("out of order" in r for r in reasons(join(a[:i + 1] + b[i:i + 1]
                                                                     + a[i + 1:])))
                tried += 1
    assert tried > 500


def test_unknown_word_is_named(stories):
    """In each place of 20 stories. Where the full stop is gone, two sentences are one. Exact, no
    false alarm."""
    for story in stories[:20]:
        for place in range(len(story)):
            assert any(reason.startswith("not a sentence") and "xyzzy" in reason
                       for reason in reasons(replaced(story, place, "xyzzy")))


def test_broken_word_order_is_named(stories):
    """Two neighbours in a sentence exchanged: in a story of this kind no such change keeps the
    sense. Exact, no false alarm."""
    for story in stories[:50]:
        for place in range(len(story) - 1):
            a, b = story[place:place + 2]
            text = story[:place] + [b, a] + story[place + 2:]
            if a != b:
                assert any(reason.startswith("not a sentence") for reason in reasons(text))


def test_truncated_and_overlong_stories_are_refused(stories):
    """Each beginning and each end of 10 stories, and a story with a word more. Exact, no false
    alarm."""
    for story in stories[:10]:
        for n in range(len(story)):
            assert reasons(story[:n]) and reasons(story[len(story) - n:])
        for word in language.VOCABULARY:
            assert reasons(story + [word]) and reasons([word] + story)
        assert reasons(story + story)


def test_each_fault_gives_one_reason(stories):
    """So that contradictions grade: n bound words changed, n reasons; and a missing sentence one
    more. 500 stories. Exact, no false alarm."""
    rng, seen = random.Random(8), collections.Counter()
    for story in stories[:500]:
        text, free = story, bound(story)
        n = rng.randint(0, 5)
        for place, slot in rng.sample(free, n):
            text = replaced(text, place, rng.choice(others(slot, story[place])))
        assert len(language.contradictions(text)) == n, text
        assert check(text) == (n == 0)
        seen[n] += 1
        ending = sentences(story)[-1][0]                     # where the last sentence begins
        faults = sum(text[i] != story[i] for i in range(ending))
        assert len(reasons(text[:ending])) == faults + 1
    assert min(seen[n] for n in range(6)) > 40


def test_faults_say_which_words_they_are_about(stories):
    """100 stories. Bound words changed: these words; a word that nobody knows, or a sentence told
    twice: all words of that sentence; a sentence left out: none. The reasons are those of
    contradictions. Exact, no false alarm."""
    rng = random.Random(9)
    for story in stories[:100]:
        assert language.faults(story) == []
        text, changed = story, sorted(rng.sample(bound(story), 3))
        for place, slot in changed:
            text = replaced(text, place, rng.choice(others(slot, story[place])))
        assert sorted(where for _, where in language.faults(text)) == [[i] for i, _ in changed]
        assert [reason for reason, _ in language.faults(text)] == language.contradictions(text)

        told = sentences(story)
        number = rng.randrange(len(told))
        place, words, _ = told[number]
        whole = list(range(place, place + len(words)))
        text = replaced(story, rng.randrange(place, place + len(words) - 1), "xyzzy")
        assert whole in [where for _, where in language.faults(text)]
        twice = told[:number + 1] + told[number:]
        (_, where), = language.faults(join(twice))
        assert where == [i + len(words) for i in whole]
        left_out = language.faults(join(told[:number] + told[number + 1:]))
        assert (f"no {list(language.BEATS)[number]}", []) in left_out


def test_help_for_another_trouble_is_at_fault_as_a_whole():
    """One story, by hand. Exact, no false alarm."""
    story = ("one sunny day tom went to the park . he took his red ball along . his good friend "
             "anna was there . but soon the ball was gone . tom was very sad . anna got the ball "
             "with a stick . tom gave her a big hug .").split()
    (reason, where), = language.faults(story)
    assert reason.startswith("does not fit the trouble")
    assert " ".join(story[i] for i in where) == "anna got the ball with a stick ."
