"""Words that say what a number is: the number of a phone, a card, an account, a person or something else.

They are parts of patterns for `re.VERBOSE`, and stand as whole words in `_`- and blank-separated names too.
"""

import re

_NUMBER = r"(?:[ _-]?(?:numbers?|numéro|nummer|n[or]|\#|n°))?"
_NO_SERVICE = r"(?![ _-](?:services?|support|care|manager|line|desk|department|team|centre|center|holder))"
PHONES = (
    r"(?:(?:tele|cell)?phones?|tel|cell|mobile|landline|fax|hotline|helpline|(?:direct|phone)\ line|whatsapp|sms"
    r"|contact\ (?:number|no)|toll[ -]free|telefon\w*|handy(?:s|nummer)?|mobil(?:nummer|funk\w*|telefon\w*|nr)?"
    r"|rufnummer|festnetz\w*|durchwahl|faxnummer|téléphone|tél|portable|télécopie|teléfono\w*|móvil|celular|fijo"
    r"|cellulare|telefone|telemóvel|telefoon\w*|mobiele?|gsm|komórk\w*|puhelin\w*|cep\ (?:no|numara\w*)|телефон\w*|тел)"
    + _NUMBER
)
_CARDS = (
    r"(?:(?:credit|debit|bank)?cards?|credit|debit|visa|mastercard|amex|american\ express"
    r"|(?:kredit|debit|giro|bank)?karten?(?:nnummer|nummer)?|cartes?|tarjetas?|carta|cartão|karty)"
)
_ACCOUNTS = (
    r"(?:accounts?|acct|iban|bic|swift|(?:bank|giro|spar)?konto(?:nummer|nr)?|bankverbindung|comptes?|cuentas?|conto|conta"
    r"|(?:bank)?rekening(?:nummer)?|kont[ao]|rachun(?:ku|ek)|счет\w*|счёт\w*)"
)
_PERSONS = r"(?:social\ security|ssn|itin|tax(?:payer)?(?:\ id)?)"
_OTHERS = (
    r"(?:order|invoice|ticket|case|reference|ref|tracking|serial|model|policy|member(?:ship)?|booking"
    r"|confirmation|reservation|transaction|parcel|shipment|product|article|item|part|batch|version|build|port"
    r"|passport|licen[cs]e|vat|isbn|issn|doi|sku|imei|ip|pin|otp"
    r"|code|zip|postcode|pages?|pp|years?|date|population|amount|total|price|costs?|balance|sum|vol|volume|grid"
    r"|coordinates?|latitude|longitude|lat|lon|customer\ (?:number|no|id)|bestell(?:ung|nummer|nr)|kunden(?:nummer|nr)"
    r"|rechnung(?:snummer|snr)?|vorgang(?:snummer)?|sendung(?:snummer)?|artikel(?:nummer|nr)?"
    r"|auftrag(?:snummer)?|vertrag(?:snummer)?|betrag|preis|commande|facture|dossier|colis"
    r"|contrat|montant|pedido|factura|contrato|importe|ordine|fattura|contratto"
    r"|importo|encomenda|fatura|bestelling|factuur|klantnummer|zamówieni\w*|faktur\w*)"
)
NO_PHONES = rf"(?:{_CARDS}|{_ACCOUNTS}|{_PERSONS}|{_OTHERS}){_NUMBER}{_NO_SERVICE}"
"""Names of numbers that are none of a phone."""
CARD, ACCOUNT, PERSON, OTHER = "card", "account", "person", "other"
_KINDS = re.compile(
    rf"(?<![^\W_])(?:(?:(?P<{CARD}>{_CARDS})|(?P<{ACCOUNT}>{_ACCOUNTS})|(?P<{PERSON}>{_PERSONS})"
    rf"|(?P<{OTHER}>{_OTHERS}|{PHONES})){_NUMBER}{_NO_SERVICE})(?![^\W_])",
    re.IGNORECASE | re.VERBOSE,
)
_BEFORE = 60
"""Characters before a number in which a word counts."""
_END = re.compile(r"[.!?]\s+(?=[^\W\d_a-zà-ÿ])|;\s|(?<!:)\n|<[A-Z_]+>")
"""Ends of sentences and lines, after which a word counts no more; a placeholder of a redaction is no word either."""
_LINK = re.compile(r"[\s:#=(\"'\u201c]*(?:(?:is|was|ist|lautet|est|es|è|é)[\s:]+)?[\"'\u201c]?", re.IGNORECASE)
"""What may stand between a number and its name."""


def before(text: str, begin: int) -> str:
    """Returns what is said before a number, in its sentence."""
    return _END.split(text[max(0, begin - _BEFORE) : begin])[-1]


def nearest(text: str, begin: int) -> str | None:
    """Returns the kind of number that the nearest name before it says: CARD, ACCOUNT, PERSON or OTHER."""
    *_, last = [None, *(match.lastgroup for match in _KINDS.finditer(before(text, begin)))]
    return last


def is_another(text: str, begin: int) -> bool:
    """Whether the name directly before a number says that it is none of a card, an account or a person."""
    said = before(text, begin)
    *_, last = [None, *_KINDS.finditer(said)]
    return last is not None and last.lastgroup == OTHER and _LINK.fullmatch(said, last.end()) is not None
