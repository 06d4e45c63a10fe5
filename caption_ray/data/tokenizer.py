"""Captions to words, as COCO's evaluation cuts them.

COCO's evaluation (pycocoevalcap) runs the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1
(`edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase`) and drops punctuation. This is
that tokenizer in plain Python, for the text that captions are made of, so that training and the
metrics count the same words. Like the original it takes the longest match of many rules, writes
brackets as `-lrb-`, and keeps what is not on its list of punctuation: `!!`, `&`, `%`, `-lrb-`.
Unlike it, it first composes accented letters (NFC).
"""

from __future__ import annotations

import re
import unicodedata

_DROPPED = re.compile(
    r"""['"`‘’‛“”«»‹›]+|&(?:quot|apos|nbsp);|[.… ]+|[,:;?!]|-{1,4}|[–—―]|[\xad]+"""
)
"""Punctuation. The original's list has -LRB- and the like too, but by then it reads -lrb-, so
brackets stay; and so do five dashes or two exclamation marks."""

_REPLACED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&apos;": "'",
    "¢": "cents",
    "£": "#",
    "€": "$",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "\xad": "",  # a soft hyphen
    " ": "\xa0",  # inside a token
}
_REPLACEABLE = re.compile("|".join(map(re.escape, _REPLACED)))
_CONTRACTIONS = {
    f"{n}’{rest}": f"{n}'{rest}"
    for n, rest in (("n", "t"), ("", "s"), ("", "m"), ("", "d"), ("", "re"), ("", "ve"), ("", "ll"))
}

_LETTER = r"(?:[^\W\d_²³¹¼-¾⁰-₎⅐-↏①-⓿]|[\u0300-\u036f\xad])"
_WORDY = rf"(?:{_LETTER}|\d)"
_APOSTROPHE = "(?:['’]|&apos;)"
_APOSTROPHIC = "(?:['’`‘‛]|&apos;)"
_LAST = r"(?![A-Za-z])"

# Abbreviations whose full stop is part of them: anywhere, ...
_ABBREVIATIONS = """
    adj adm adv al ala alex apr ariz assn assoc asst atty attys aug ave bhd bldg blvd brig bros
    calif capt cf cie cmdr co col colo comdr conn cont'd corp cos cpl ct dak dec dept det dr drs
    elec ens esq est etc ext feb fla fri ft ga gen gov govs hon inc ind insp intl invt jan jos jr
    jul jun kan kans ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mr mrs
    ms msgr mt mtg natl neb nev nov oct okla penn pfc ph ph.d plc ppte ppty pres prof profs pte ptes
    pty ptys pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt sys tel
    tenn thu thurs treas tue tues univ va vs vt wed wis wisc wm wyo
"""
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # ... with a capital only, ...
_NUMBERED = "art ca fig figs no nos op pp prop"  # ... and before a number only.

# Words that begin a new sentence after a single letter and a full stop.
_STARTERS = """
    A According After An As At But He Her Here However If In It Many Mr. Once One Other Our She
    Since So Some Such That The Their Then There These They This We What When While You
"""


def _any(words: str) -> str:
    """A pattern for the longest of these words that is there."""
    longest_first = sorted(words.split(), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first))})"


_WORD = rf"{_LETTER}{_WORDY}*(?:[.!?]{_LETTER}{_WORDY}*)*"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NUMBER = r"(?:\d*(?:[.:,]\d+)+|\d+)"

# The longest match wins, the first if there are several. Where a rule has a group, the token is
# the group and the rest follows it.
_RULES = [
    re.compile(rule)
    for rule in (
        # contractions
        rf"({_LETTER}*(?![nN]){_LETTER})(?i:n{_APOSTROPHIC}t)",
        rf"({_WORD}){_APOSTROPHE}(?i:[msd]|re|ve|ll){_LAST}",
        rf"(?i:n{_APOSTROPHIC}t){_LAST}",
        rf"{_APOSTROPHE}(?i:[msd]|re|ve|ll){_LAST}|’(?i:[msd]|re|ve|ll)",
        rf"(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na|('t)(?:is|was)){_LAST}",
        # words and names
        _WORD,
        rf"{_WORDY}+(?:[-_]{_WORDY}+)*",
        rf"{_LETTER}+[.,]-{_LETTER}+",
        rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}",
        r"[A-Z]+(?:(?:&amp;|&)[A-Z]+)+",
        rf"[@#]{_LETTER}(?:{_LETTER}|_)*",
        # apostrophes inside words
        rf"{_APOSTROPHE}[nN]{_APOSTROPHE}|{_APOSTROPHE}[nN]{_LAST}",
        rf"(?i:(?:dunkin|somethin|ol){_APOSTROPHE}|{_APOSTROPHE}(?:em|cause|till?)){_LAST}",
        rf"[yY]{_APOSTROPHE}(?=[A-Za-z])",
        rf"{_APOSTROPHE}[2-9]0s{_LAST}|{_APOSTROPHE}\d\d",
        rf"[dDoOlL]{_APOSTROPHE}{_LETTER}{_WORDY}*|[dDlLjJ]{_APOSTROPHE}",
        rf"[A-HJ-XZn]{_APOSTROPHIC}{_LETTER}{{2,}}",
        rf"{_LETTER}+[aeiouyAEIOUY]{_APOSTROPHIC}[aeiouA-Z]{_LETTER}*",
        # abbreviations, and what another mark tells from the end of a sentence
        rf"((?:{_WORD}|{_WORDY}+(?:-{_WORDY}+)*)\.)[,;:]",
        rf"(?i:{_any(_ABBREVIATIONS)})\.",
        rf"(?:{_any(_CAPITALISED)}|{_any(_CAPITALISED.upper())})\.",
        rf"(?i:{_any(_NUMBERED)})\.(?=\s?\d)",
        rf"[A-Za-z](?:\.[A-Za-z])+\.|[A-Z]\.|[a-z]\.(?!\s{_any(_STARTERS)}\s)",
        # numbers
        rf"[-+]?{_NUMBER}",
        r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}|\d{1,2}[-/]\d{1,2}[-/]\d{2,4}",
        r"(?:\(\d{2,3}\) ?|(?:\+?\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5}",
        r"[A-Z]*\$",
        # marks
        r"-+|_+|\*+|@+|#+|[?!]+|''|``|<<|>>|\.{3,5}|(?:\. ){2,4}\.",
        r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z\d])",
        r"</?[A-Za-z][^<>]*>|&(?:amp|lt|gt|quot|apos|nbsp|#\d+);",
        r"(?:https?://|www\.)[^\s\"<>]*[^\s\"<>.,!?)]|\w[\w.+-]*@\w+(?:[.-]\w+)*",
        r"[^\s\x00-\x1f\x7f-\x9f\u200b-\u200f\u2010-\u2012\u202a-\u202e\u2060-\u206f\ufeff"
        r"\U00010000-\U0010ffff]",
    )
]
_PLAIN = re.compile(r"(?:[A-Za-z]+(?:,? +|$))+")
_LAST_WORD = re.compile(r"([A-Za-z]{2,})\. *\Z")
_CUT = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_ODD = _CUT.union(f"{_ABBREVIATIONS} {_CAPITALISED} {_NUMBERED}".lower().split())
"""Words of which this or their full stop makes something else."""


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    caption = unicodedata.normalize("NFC", caption)
    words = []
    at, end = 0, len(caption)
    while at < end:
        plain = _PLAIN.match(caption, at)
        if plain:  # most captions but for their last word and full stop, and quick
            run = plain.group().lower().replace(",", " ").split()
            if _CUT.isdisjoint(run):
                words += run
                at = plain.end()
                continue
        last = _LAST_WORD.match(caption, at)
        if last and (word := last.group(1).lower()) not in _ODD:
            words.append(word)
            break
        word = _longest(caption, at)
        at += len(word) or 1
        if word and not _DROPPED.fullmatch(word):
            word = word.lower()
            replaced = _REPLACEABLE.sub(lambda match: _REPLACED[match.group()], word)
            words.append(_CONTRACTIONS.get(word, replaced))
    return words


def _longest(text: str, at: int) -> str:
    """The token at this place; empty for a space or a character that no rule knows."""
    longest, token = at, ""
    for rule in _RULES:
        match = rule.match(text, at)
        if match and match.end() > longest:
            longest, token = match.end(), match.group(match.lastindex or 0)
    return token
