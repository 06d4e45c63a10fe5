"""Captions to words, as COCO's evaluation cuts them.

COCO's evaluation (pycocoevalcap) runs the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1
(`edu.stanford.nlp.process.PTBTokenizer -preserveLines -lowerCase`) and drops punctuation. This is
that tokenizer in plain Python, for every script, so that training and the metrics count the same
words. Like the original it takes the longest match of many rules, writes brackets as `-lrb-`, keeps
what is not on its list of punctuation: `!!`, `&`, `%`, `-lrb-`, and composes no accents.

Three things differ. A caption is cut by itself, while the original may look into the one on the
next line. What ends a line (U+2028, a form feed) only parts words; there, it shifts all that follow
to the wrong captions. And what a slip in the original takes for an emoticon is none: `^.[^x=` and
all up to `<>]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from caption_ray.data.letters import SHAPES

_PUNCTUATION = frozenset(["", "'", "''", "`", "``", *".?!,:;-"])
"""What is dropped, of what `_written` gives. The original's list has -LRB- and the like too, but by
then it reads -lrb-, so brackets stay; and so do five dashes or two exclamation marks."""

_WHOLE = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "¢": "cents",
    "£": "#",
    **dict.fromkeys("\x80¤₠€", "$"),
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
    "⅓": "1/3",
    "⅔": "2/3",
    "&lt;": "<",
    "&gt;": ">",
}
"""Tokens that are written differently, ..."""
_PARTS = {"(": "-lrb-", ")": "-rrb-", "&amp;": "&", " ": "\xa0", "\xad": ""}
"""... and parts of tokens."""
_PART = re.compile("|".join(map(re.escape, _PARTS)))
_QUOTES = {
    "&apos;": "'",
    "&quot;": "''",
    '"': "''",
    **dict.fromkeys("\x91‘‛‹", "`"),
    **dict.fromkeys("\x92’›", "'"),
    **dict.fromkeys("\x93“«", "``"),
    **dict.fromkeys("\x94”»", "''"),
}
"""How a quotation mark is written, and the apostrophe of `'s` and `n't`."""
_QUOTE = re.compile("|".join(_QUOTES))

# Rules are about shapes, in which one character stands for all of its kind (see `letters`).
_ENTITY = "&[aeiouAEIOU](?i:acute|grave|uml);"
_LETTER = rf"(?:[A-Za-zéıİſ\u212a´\xad]|{_ENTITY})"
_WORDY = rf"(?:[A-Za-zéıİſ\u212a´\xad0-9٣]|{_ENTITY})"
_PURE = r"[A-Za-zéıİſ\u212a]"  # a letter, and no mark
_PURE_WORDY = r"[A-Za-zéıİſ\u212a0-9٣]"
_DIGIT = "[0-9٣]"
_SPACE = r"[ \t\xa0\u3000\n\r\v\f\x85]"
_APOSTROPHE = "(?:['’]|&(?i:apos);)"
_APOSTROPHIC = "(?:['’`‘]|&(?i:apos);)"
_ENDING = "(?:[dmsDMS]|[rvRV][eE]|[lL][lL])"
_QUOTED = re.compile(rf"{_APOSTROPHE}{_ENDING}?|[nN]{_APOSTROPHIC}[tT]|''|[\"`‘’“]+|&(?i:quot);")
_NOTHING = re.compile(r"[. \t\xa0\u3000…\x85]+|-{1,4}|–|&(?i:nbsp|[mn]dash|md);")
"""Dots, dashes and spaces."""

# Abbreviations whose full stop is part of them: anywhere, ...
_TITLES = """
    adj adm adv alex assoc asst atty attys ave brig capt cf cie cmdr col comdr cont'd cpl dept det
    dr drs elec ens ft gen gov govs hon insp invt jos lieut lt maj messrs mfg mlle mme mr mrs ms
    msgr mt mtg natl pfc ph pres prof profs pvt rep reps rev sen sens sfc sgt spc st ste supt treas
    vs wm
"""
# ... if no letter follows it, ...
_ABBREVIATIONS = """
    al ala apr ariz assn aug bhd bldg blvd bros calif co colo conn corp cos ct dak dec esq est etc
    ext feb fla fri ga inc ind intl jan jr jul jun kan kans ky ltd mar md mich minn mo mon mont neb
    nev nov oct okla penn ph.d plc ppte ppty pte ptes pty ptys rd rt sep sept seq sq sr sys tel tenn
    thu thurs tue tues univ va vt wed wis wisc wyo
"""
# ... the same, with a capital only, ...
_CAPITALISED = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"
# ... and before a number only.
_NUMBERED = "art ca fig figs no nos op pp prop"

# Words that begin a new sentence after a single letter and a full stop.
_STARTERS = """
    A About According After An As At But Earlier He Her Here However If In It Last Many More Mr. Ms.
    Now Once One Other Our She Since So Some Such That The Their Then There These They This We What
    When While Yet You
"""

# Ends of names of files.
_FILES = """
    bat bmp c cgi cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov mp3 pdf php pl png
    ppt ps py sql tar txt wav x xml zip
"""


def _any(words: str) -> str:
    """A pattern for the longest of these words that is there."""
    longest_first = sorted(words.split(), key=len, reverse=True)
    return f"(?:{'|'.join(map(re.escape, longest_first))})"


_ABBREVIATION = (
    rf"(?:(?i:{_any(_ABBREVIATIONS)})|{_any(_CAPITALISED)}|{_any(_CAPITALISED.upper())})"
)
_STARTER = "|".join(f"{word[0]}(?i:{re.escape(word[1:])})" for word in _STARTERS.split())
_LETTERS = r"[A-Za-z](?:\.[A-Za-z])*"
_ACRONYM = rf"(?:(?i:(?:canada|sino|korean|eu|japan|non)-u\.s|u\.s\.-u\.(?:k|s\.s\.r))|{_LETTERS})"
_WORD = rf"{_LETTER}{_WORDY}*(?:[.!?]{_LETTER}{_WORDY}*)*"
_PARTICLE = rf"(?:[dDoOlL]{_APOSTROPHIC}{_PURE_WORDY})"
_HYPHENED = rf"{_PARTICLE}?{_PURE_WORDY}+(?:[-_‐]{_PARTICLE}?{_PURE_WORDY}+)*"
_LATIN = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:[A-Za-z0-9\xad]+|{_ACRONYM}\.))+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_NUMBER = rf"(?:{_DIGIT}*(?:[.:,\xad٫]{_DIGIT}+)+|{_DIGIT}+)"
_EYE = "[-'<=>^x~]"
_TAG = "[A-Za-z][A-Za-z0-9.:_-]*"
_ATTRIBUTE = rf"{_TAG}(?: *= *(?:'[^']*'|\"[^\"]*\"))?"
_MARKUP = rf"(?:<{_TAG}(?: +{_ATTRIBUTE})* *(?:/ *)?>|</{_TAG} *>|<[!?][A-Za-z-][^>\r\n]*>)"

_PATH = r"/[^ \t\n\f\r\"<>|()]+[^ \t\n\f\r\"<>|()!,.{}-]"
_HOST = r"[^ \t\n\f\r\"<>|.!?(),{}]+"
_BARE_HOST = r"[^A-Z0-9 \t\n\f\r\"<>|.!?(),{}_`'$/:;=@\[\\\]^-]"
_MAILBOX = r"[^ \t\n\f\r\"()<>{|}\xa0]"
_MAIL_HOST = r"[^ \t\n\f\r\"()<>{|}\xa0.]+"
_AREA = r"[0-9]{2,4}[- \xa0]"
_CALL = r"[- \xa0]?[0-9]{3,5}"

# Before a rule: "a" if it may begin with a letter and "." if with something else, for speed; "=" if
# its tokens are written as they are, which are addresses, names of files and tags. The longest
# match wins, the first if there are several. Where a rule has a group, the token is the group, and
# the rest of the match only has to follow it.
_RULES = (
    # contractions
    ("a.", rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)[nN]{_APOSTROPHIC}[tT]"),
    ("a.", rf"({_WORD}){_APOSTROPHE}{_ENDING}"),
    ("a", rf"([nN]{_APOSTROPHIC}[tT])[^A-Za-zéıİſ\u212a]?"),
    (".", rf"({_APOSTROPHE}{_ENDING})[^A-Za-z]|’{_ENDING}|{_APOSTROPHE}[dmsDMS]"),
    ("a", "(?i:(can)not|(gon)na|(got)ta|(lem)me|(gim)me|(wan)na)"),
    (".", "('[tT])(?i:is|was)"),
    # words and names
    ("a.", _WORD),
    ("a.", _HYPHENED),
    ("a.", _LATIN),
    ("a.", rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}"),
    ("a", r"[A-Z]+(?:(?:&(?i:amp;)?|\+)[A-Z]+)+"),
    ("a", rf"(?i:anti-|pro-|cap{_APOSTROPHE}n|c{_APOSTROPHE}est|s&(?:amp;)?(?:ls|p-500))"),
    ("a", r"[cC]\+\+|[cfCF]#"),
    # apostrophes inside words
    (".", rf"{_APOSTROPHE}[nN]{_APOSTROPHE}?|{_APOSTROPHE}(?i:em|cause|till?)"),
    (".", rf"{_APOSTROPHE}[2-9]0(?i:s)|({_APOSTROPHE}[0-9][0-9]){_SPACE}"),
    ("a", rf"(?i:dunkin|somethin|ol){_APOSTROPHE}"),
    ("a", rf"([yY]{_APOSTROPHE}){_PURE}"),
    ("a", rf"[dDlLjJ]{_APOSTROPHE}|[oO]{_APOSTROPHIC}[oO]"),
    ("a", rf"[A-HJ-XZn]{_APOSTROPHIC}{_PURE}{{2,}}"),
    ("a", rf"{_PURE}+[aeiouyAEIOUY]{_APOSTROPHIC}[aeiouA-Z]{_PURE}*"),
    # addresses, tags
    ("a=", r"(?i:https?)://[^ \t\n\f\r\"<>|(){}]+[^ \t\n\f\r\"<>|(){}.!,-]"),
    ("a=", rf"(?i:www)\.(?:{_HOST}\.)+[A-Za-z]{{2,4}}(?:{_PATH})?"),
    ("a.=", rf"(?:{_BARE_HOST}+\.)+(?i:com|net|org|edu)(?:{_PATH})?"),
    ("a.=", rf"<?[A-Za-z0-9]{_MAILBOX}*@(?:{_MAIL_HOST}\.)*{_MAIL_HOST}>?"),
    (".=", rf"#{_LETTER}+|@[A-Za-z_][A-Za-z0-9_]*"),
    (".=", _MARKUP),
    # abbreviations, and what another mark tells from the end of a sentence
    ("a.", rf"((?:{_LATIN}|{_HYPHENED}|{_WORD})\.)[,;:、]"),
    ("a", rf"(?i:{_any(_TITLES)})\."),
    ("a", rf"({_ABBREVIATION}\.)(?:[\s\S][\s\S])?"),
    ("a", rf"((?i:{_any(_NUMBERED)})\.){_SPACE}?{_DIGIT}"),
    ("a", rf"({_LETTERS}){_SPACE}"),
    ("a", rf"{_ACRONYM}\."),
    ("a", rf"([A-Za-z])\.{_SPACE}+(?:(?:{_STARTER}){_SPACE}|{_MARKUP})"),
    # files
    ("a.=", rf"({_WORDY}+(?:\.{_WORDY}+)*\.(?i:{_any(_FILES)}))(?:{_SPACE}|[!,.])"),
    # numbers
    (".", rf"[-+]?{_NUMBER}"),
    (".", rf"(?:{_DIGIT}{{1,4}}[- \xa0])?{_DIGIT}{{1,4}}(?:\\?/|⁄){_DIGIT}{{1,4}}"),
    (".", rf"{_DIGIT}{{1,2}}[-/]{_DIGIT}{{1,2}}[-/]{_DIGIT}{{2,4}}"),
    (".", rf"(?:\([0-9]{{2,3}}\)[ \xa0]?|\+{{0,2}}(?:{_AREA})?{_AREA})[0-9]{{3,4}}{_CALL}"),
    (".", r"\+{0,2}(?:[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5}"),
    (".", r"⁻?²+|⁻?₂+"),
    ("a.", r"[A-Z]*\$"),
    # marks
    (".", r"(?i:-[lr][crs]b-)|-+|_+|@+|#+|[?!]+|\*+|(?:\\\*){1,3}|<<|>>"),
    (".", r"\.{3,5}|(?:\.[ \xa0]){2,4}\.|[ \t\xa0\u3000]+"),
    (".", r"''|[`‘’“]{2}|(')[A-Za-z][^ \t\n\r\xa0]"),
    (".", r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]"),
    (".", rf"\((?:{_EYE}[._]?{_EYE}|['<=>^x~]-['<=>^`x~])\)"),
    ("a.", rf"{_EYE}_{_EYE}"),
    (".", r"&(?i:amp|[lg]t|quot|apos|nbsp|[mn]dash|md|ht|tl|[lu]r|q[clr]|[co]dq|#[0-9]+);"),
    (".", r"[^ \t\n\r\v\f\xa0\u3000\x00-\x1f\x7f٫‐\U00010000-\U0010ffff]"),
)
_RULES_FROM = {
    start: [(re.compile(rule), "=" in kind) for kind, rule in _RULES if start in kind]
    for start in "a."
}

_PLAIN = re.compile(r"(?:[A-Za-zé´]+(?:,? +|$))+")
_LAST_WORD = re.compile(r"([A-Za-zé´]{2,})\. *$")
_CUT = frozenset(["cannot", "gonna", "gotta", "lemme", "gimme", "wanna"])
_ODD = _CUT.union(f"{_TITLES} {_ABBREVIATIONS} {_CAPITALISED} {_NUMBERED}".lower().split())
"""Words of which this or their full stop makes something else."""


def tokenize(caption: str) -> list[str]:
    """The words of a caption, in lower case and without punctuation."""
    shape = caption + "\n"
    lower: Callable[[str], str] = str.lower
    if not caption.isascii():
        shape, lower = shape.translate(SHAPES), _lower
    words = []
    at, end = 0, len(caption)
    while at < end:
        plain = _PLAIN.match(shape, at)
        if plain:  # most captions but for their last word and full stop, and quick
            run = lower(caption[at : plain.end()]).replace(",", " ").split()
            if _CUT.isdisjoint(run):
                words += run
                at = plain.end()
                continue
        last = _LAST_WORD.match(shape, at)
        if last and (word := lower(caption[at : last.end(1)])) not in _ODD:
            words.append(word)
            return words
        stop, verbatim = _longest(shape, at)
        if stop:
            word = _written(caption[at:stop], shape[at:stop], verbatim)
            if word not in _PUNCTUATION:
                words.append(word)
        at = stop or at + 1
    if words and caption[-1].isspace():  # which pycocoevalcap takes off a line
        words[-1] = words[-1].rstrip()
    return words


def _longest(shape: str, at: int) -> tuple[int, bool]:
    """Where the token at this place ends, 0 for a space or a character that no rule knows, and
    whether it is written as it is."""
    longest = end = 0
    verbatim = False
    for rule, as_it_is in _RULES_FROM["a" if shape[at].isalpha() else "."]:
        match = rule.match(shape, at)
        if match and match.end() > longest:
            longest, end, verbatim = match.end(), match.end(match.lastindex or 0), as_it_is
    return end, verbatim


def _written(token: str, shape: str, verbatim: bool) -> str:
    """A token as the original writes it."""
    if verbatim or shape.isalpha():
        return _lower(token).replace(" ", "\xa0")
    if _NOTHING.fullmatch(shape):
        return ""
    if _QUOTED.fullmatch(shape):
        return _QUOTE.sub(lambda match: _QUOTES[match.group()], token).lower()
    token = _lower(token)
    return _WHOLE.get(token) or _PART.sub(lambda match: _PARTS[match.group()], token)


_SIGMA = re.compile("Σ")
_WORD_BREAK = re.compile(
    # spaces, marks, accents that stand alone, kana and Chinese characters
    r"[\s,!?\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff\u3005-\u30ff\u3400-\u9fff\uf900-\ufaff]"
)


def _lower(text: str) -> str:
    """Java's lower case. It differs from Python's in which capital sigmas end a word: those that
    have a cased letter before them in it and none after, whatever else is between, as a hyphen."""
    return _SIGMA.sub(_sigma, text).lower() if "Σ" in text else text.lower()


def _sigma(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()], match.string[match.end() :]
    ends = _cased(_WORD_BREAK.split(before)[-1]) and not _cased(_WORD_BREAK.split(after)[0])
    return "ς" if ends else "σ"


def _cased(text: str) -> bool:
    return any(letter.islower() or letter.isupper() or letter.istitle() for letter in text)
