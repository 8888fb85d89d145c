"""Finds answers that refuse, in the words of an assistant's safety training."""

import re
from collections.abc import Iterator

from tunery.datasets.report.case import Case, Finding

_HEAD = 200
"""Characters of an answer within which it refuses: what it says later is about something else."""
_APOSTROPHES = str.maketrans("\u2019\u02bc\u2032", "'''")
_CANNOT = (
    r"i(?: can(?:'t| ?not)| (?:won't|will not)|(?: am|'m) (?:unable|not able) to)"
    r"(?: and (?:will not|won't|can(?:'t| ?not)))?"
)
_THAT = (
    r"(?: (?:to |with |in |about |on )?(?:that|this|it|such|these|your|the) ?(?:request|question|topic|subject|task"
    r"|prompt|conversation|information|kind of \w+|type of \w+|)s?)?(?: for you)?(?=\s*(?:[.!?,;:]|$|\n))"
)
"""What a refusal is about, which is nothing of its own, and then the end of the clause: `that question.`"""
_SEARCHES = (
    r"(?:find|see|locate|identify|open|read|access|reach|track|hear|recall|remember|confirm|verify|cancel|refund|exchange"
    r"|return|change|reset|process|accept|reproduce|be|wait)\b"
)
"""What an assistant of a shop may be sorry not to be able to do."""
_ENGLISH = (
    r"\bas an ai\b|\bas a (?:large )?language model\b|\bi(?:'m| am) (?:just|only) an ai\b",
    r"\b(?:i(?:'m| am) (?:very |so )?)?sorry,? but i (?:can(?:'t| ?not)|am (?:not able|unable) to|won't) (?!"
    + _SEARCHES
    + ")",
    rf"\b{_CANNOT} (?:help(?! (?:but|\w+ing)\b)|assist|provide|comply|fulfill?|create|generate|support|engage)\b",
    rf"(?:^|[.!?\n]\s*|, ?(?:but )?|i'm afraid |i am afraid ){_CANNOT} (?:do|answer|discuss|write|share|say){_THAT}",
    r"\bi (?:must|have to|will have to|'ll have to) (?:\w+ly )?decline\b",
    r"\bi(?:'m| am) not comfortable \w+ing\b|\bi (?:don't|do not) feel comfortable (?:with (?:that|this)|\w+ing)\b",
    r"\bit(?:'s| is| would be) (?:not appropriate|inappropriate|unethical|not ethical) for me to\b",
    r"\bagainst my (?:\w+ )?(?:guidelines|programming|principles|policies)\b",
)
_GERMAN = (
    r"\bals (?:eine? )?(?:ki|künstliche intelligenz|(?:ki-|großes )?sprachmodell)\b",
    r"\b(?:ich (?:kann|darf|werde)|(?:kann|darf|werde) ich)(?: \w+){0,4} nicht (?:(?:weiter)?helfen|unterstützen"
    r"|beantworten|erfüllen|nachkommen|diskutieren|besprechen|bereitstellen)\b",
    r"\bda(?:s|bei) (?:kann|darf|werde) ich(?: leider| dir| ihnen)* nicht (?:tun|machen|schreiben)\b",
    r"\bich bin (?:leider )?nicht in der lage,(?: \w+){0,4} zu (?:helfen|beantworten|erfüllen|besprechen)\b",
    r"\b(?:ich muss|muss ich)(?: \w+){0,3} ablehnen\b",
)
_FRENCH = (
    r"\ben tant (?:qu'(?:une )?(?:ia|intelligence artificielle|assistant ia)|que modèle de langage)\b",
    r"\bje ne (?:peux|puis|pourrai|suis)(?: malheureusement)? pas (?:en mesure d(?:e |'))?(?:vous |t'|y )?(?:aider"
    r"|assister|fournir|satisfaire|discuter"
    r"|faire (?:cela|ça)|répondre(?: à (?:cette|votre|ta) \w+)?(?=\s*(?:[.!,;]|$)))",
    r"\bje dois (?:refuser|décliner)\b",
)
_SPANISH = (
    r"\bcomo (?:una? )?(?:ia|inteligencia artificial|modelo de lenguaje|asistente de ia)\b",
    r"\bno (?:puedo|podré|me es posible|soy capaz de) (?:ayudar|asistir|proporcionar|cumplir|hacer eso|hablar de ese"
    r"|hablar de este|responder(?: a (?:esa|esta|tu|su) \w+)?(?=\s*(?:[.!,;]|$)))",
    r"\bdebo (?:rechazar|declinar)\b",
)
_REFUSAL = re.compile("|".join((*_ENGLISH, *_GERMAN, *_FRENCH, *_SPANISH)), re.IGNORECASE)
_PARTS = (
    *("as an ai", "as a l", "i'm", "i am", "i can", "i won't", "i will", "i must", "i have to", "i'll", "i don't"),
    *("i do not", "for me to", "against my"),
    *("als ki", "als ein", "als kün", "als gro", "als spr", "ich kann", "ich darf", "ich werde", "ich bin", "ich muss"),
    *("kann ich", "darf ich", "werde ich", "muss ich", "en tant qu", "je ne", "je dois"),
    *("como ", "no puedo", "no podré", "no me es", "no soy", "debo "),
)
"""A refusal has one of them. Most answers have none, which is seen in a fraction of the time that the pattern takes."""
_ACTION = "Keep it if such a question should be refused; otherwise write the answer, or drop the row."


def find(case: Case) -> Iterator[Finding]:
    """Finds rows whose answer begins with a refusal."""
    for row in case.answered:
        if found := _refusal_in(row.answer[:_HEAD].translate(_APOSTROPHES)):
            score = 1 - found.start() / _HEAD
            said = found[0].strip(" \n.,!?")
            yield Finding("refusal", [row.line], score, f"The answer refuses: '{said}'.", _ACTION)


def _refusal_in(text: str) -> re.Match[str] | None:
    small = text.lower()
    return _REFUSAL.search(text) if any(part in small for part in _PARTS) else None
