"""Noun phrases of prompts, by rules with closed lists of words, where no parser is installed.

T2I-CompBench++ asks BLIP about each noun phrase of a prompt (BLIPvqa_eval/BLIP_vqa.py). Upstream takes the noun chunks of
spaCy's en_core_web_sm. These rules cut a prompt at everything that cannot stand inside a noun phrase: relations and other
prepositions, conjunctions, pronouns, adverbs and verbs. The lists of verbs are those of the benchmark's templates, so prompts
of another style need a person's look at the manifest that `python -m stages.phrases` writes.
"""

from __future__ import annotations

import re

from stages.judges.compbench_rules import Claim, relation_in

LONGEST = 8  # phrases of a prompt that count
DROPPED = ("top", "the side", "the left", "the right")  # upstream's list; "the top" stays

RELATIONS = re.compile(
    r"\b(?:on (?:the )?(?:top|bottom|side|left|right) of|in front of|next to|side by side|on the edge of|out of|hidden by)\b"
)


def words(text: str) -> set[str]:
    return set(text.split())


ARTICLES = words(
    "a an the this these those his her its their our my your one two three four five six seven eight many some several each no"
)
PREPOSITIONS = words(
    "about above across after against along alongside among around as at away before behind below beneath beside between by "
    "down during for from in inside into like near of off on onto out outside over past through to toward towards under up "
    "upon with within without"
)
OTHERS = words(
    "and or but both that while when where who which whose it they he she him them there then together even nearby too very "
    "ready am is are was were be been being has have had could will would may might do does did"
)
CLOSED = PREPOSITIONS | OTHERS
# Verbs that are nothing else in the benchmark, whatever follows them.
VERBS = words(
    "held hold holds sat sits lay lies stood sank shone sped fell flew swam grew hung wrote drove slept spun lit sold shows "
    "kept keeps told became began made makes led woke strode shines burst blew spoke sang sung hid ran came went gave gives "
    "took takes cast provide provides provided displayed attract attracted flash reaching telling reads roasted swapped "
    "hydrated illuminate boil decorate stir jot nibble"
)
# Verbs that are also nouns or adjectives: verbs only after a noun and before an article, a color or a preposition.
EITHER = words(
    "rest rests hang hangs release mix serve slice nap measure write sit shape bake perch cook pound keep beat cut rose stand "
    "stands display displays features spread left"
)
# Nouns and adjectives that look like adverbs or participles.
NO_ADVERBS = words("butterfly dragonfly lily jelly belly family prickly bubbly curly lively lovely friendly chilly woolly fly")
NO_PARTICIPLES = words(
    "bed red seed sled shed weed reed building painting ceiling clothing railing awning ring earring string king wing spring "
    "morning evening wedding seating lightning bowling pudding icing dressing stocking frosting steering rigging bedding thing "
    "stitching flooring engineering eating sapling duckling topping speed"
)
COLORS = words("black white red green blue yellow pink brown grey gray orange purple gold silver tan beige checkered striped")
# Words that are no phrase without a noun or an article.
ADJECTIVES = COLORS | words(
    "empty tall low ripe perfect whitish long short big small clean warm soft sharp smooth rough bright dark useful necessary"
)


def tokens(prompt: str) -> list[str]:
    """Return the words and punctuation marks of a prompt in lower case, with "|" for each relation of several words."""
    return re.findall(r"[\w'\u2019-]+(?::\d+)?|[^\w\s]", RELATIONS.sub("|", prompt.lower()))


def is_verb(sentence: list[str], place: int, phrase: list[str]) -> bool:
    """Return whether the word at a place is a verb or an adverb, given the phrase that it would continue."""
    word = sentence[place]
    following = sentence[place + 1] if place + 1 < len(sentence) else "."
    if phrase and phrase[-1] in ARTICLES:  # "the rippled surface", "the freshly brewed coffee", "a slice"
        return False
    if word in VERBS or (word.endswith("ly") and word not in NO_ADVERBS):
        return True
    if word.endswith("ing") and not phrase and sentence[max(0, place - 1)] in (",", "for"):  # ", adding a touch", "for serving"
        return following in ARTICLES or word not in NO_PARTICIPLES
    ends = following in ARTICLES | CLOSED or not following[0].isalpha() or following.endswith("ly")
    if word in EITHER:
        return bool(phrase) and following in ARTICLES | COLORS | CLOSED - {"of", "and", "or"}
    return ends and word.endswith(("ed", "ing")) and word not in NO_PARTICIPLES and following != "of"


def joins(sentence: list[str], place: int, phrase: list[str]) -> bool:
    """Return whether a comma or "and" at a place joins adjectives inside a phrase, as in "a soft, warm glow"."""
    following = sentence[place + 1] if place + 1 < len(sentence) else "."
    if sentence[place] == "and":
        return bool(phrase) and phrase[-1] in COLORS and following in COLORS
    inner = all(word[0].isalpha() and word not in ARTICLES | CLOSED for word in [following, *sentence[place + 2 : place + 3]])
    return sentence[place] == "," and len(phrase) == 2 and phrase[0] in ARTICLES and inner


def noun_phrases(prompt: str) -> list[str]:
    """Return the noun phrases of a prompt, in order, lower-cased and with their articles: the first eight that count.

    Pronouns are no phrases here, while spaCy makes chunks of them.
    """
    sentence = tokens(prompt)
    phrases: list[list[str]] = [[]]
    for place, word in enumerate(sentence):
        if word in (",", "and") and joins(sentence, place, phrases[-1]):
            phrases[-1].append(word)
        elif word in CLOSED or not word[0].isalpha() or is_verb(sentence, place, phrases[-1]):
            phrases.append([])
        elif word in ARTICLES and phrases[-1]:
            phrases.append([word])
        else:
            phrases[-1].append(word)
    named = [phrase for phrase in phrases if not set(phrase) <= ARTICLES and not set(phrase) <= ADJECTIVES]
    return counted([" ".join(phrase).replace(" ,", ",") for phrase in named])


def complex_claim(prompt: str) -> Claim | None:
    """Return the relation of a prompt of complex between its subject and the next phrase; None where it has none.

    The last word of a phrase is its noun. Upstream takes the noun before the relation and the first noun after it, so that "on
    top of the brown coat rack" is about a coat there, and about a rack here.
    """
    relation = relation_in(prompt)
    if relation is None:
        return None
    before, after = (noun_phrases(part) for part in prompt.lower().split(relation, 1))
    return Claim(before[0].split()[-1], relation, after[0].split()[-1]) if before and after else None


def counted(phrases: list[str]) -> list[str]:
    """Return the phrases about which BLIP is asked: lower-cased, without upstream's dropped ones, the first eight."""
    return [phrase for phrase in map(str.lower, phrases) if phrase not in DROPPED][:LONGEST]
