"""Phone numbers are found with and without a country code, and other numbers are not taken for them."""

import pytest

from tunery.datasets.cleaning import redaction
from tunery.datasets.report import phones

NATIONAL = [
    ("Please call me back at (415) 555-0132 after five.", "(415) 555-0132"),
    ("My cell is 212-555-0187 if the courier needs directions.", "212-555-0187"),
    ("You can text 303.555.0114 when the technician is outside.", "303.555.0114"),
    ("The number on the account is 617 555 0190, please update it.", "617 555 0190"),
    ("Our office can be reached on 020 7946 0018 until 6pm.", "020 7946 0018"),
    ("I no longer use 07700 900123, that phone was stolen.", "07700 900123"),
    ("Ring the branch on 0161 496 0753 and ask for Priya.", "0161 496 0753"),
    ("Customer's mobile: 07911 123456", "07911 123456"),
    ("Bitte rufen Sie mich unter 0171 2345678 zurück.", "0171 2345678"),
    ("Meine Handynummer ist 0151/23456789, bitte ändern.", "0151/23456789"),
    ("Sie erreichen unser Büro unter (030) 901820 von 9 bis 17 Uhr.", "(030) 901820"),
    ("Tel. 089 1234567, Frau Huber", "089 1234567"),
    ("Vous pouvez me joindre au 06 12 34 56 78 demain matin.", "06 12 34 56 78"),
    ("Mon numéro de téléphone a changé : 07.82.45.11.90", "07.82.45.11.90"),
    ("Appelez le service client au 01 42 68 53 00.", "01 42 68 53 00"),
    ("Rappelle-moi sur mon portable, 0633445566, après 18 h.", "0633445566"),
    ("Mi teléfono es 612 345 678, llámeme por la tarde.", "612 345 678"),
    ("Pueden llamarme al 934 56 78 90 cuando llegue el paquete.", "934 56 78 90"),
    ("Móvil: 655443322", "655443322"),
    ("El número de contacto es el 91 123 45 67 de la oficina.", "91 123 45 67"),
    ("Il mio cellulare è 347 123 4567, grazie.", "347 123 4567"),
    ("Può chiamare lo 06 6982 1234 per fissare un appuntamento.", "06 6982 1234"),
    ("Richiamatemi al 333 7654321 dopo pranzo.", "333 7654321"),
    ("Telefono: 02 87654321", "02 87654321"),
    ("Bel me even terug op 06 12345678 alsjeblieft.", "06 12345678"),
    ("Ons telefoonnummer is 020 123 4567.", "020 123 4567"),
    ("U kunt ons bereiken op 010-2345678 tot vijf uur.", "010-2345678"),
    ("Mijn mobiele nummer is 0612345678, het oude werkt niet meer.", "0612345678"),
    ("The driver can call 0412 345 678 on arrival.", "0412 345 678"),
    ("Our Sydney line is (02) 9374 4000, weekdays only.", "(02) 9374 4000"),
    ("Can you change my mobile to 0491 570 156?", "0491 570 156"),
    ("Phone the clinic on 03 9123 4567 to rebook.", "03 9123 4567"),
    ("Kindly call on my number 98765 43210 regarding the refund.", "98765 43210"),
    ("My registered mobile number is 9123456780 and I get no OTP.", "9123456780"),
    ("Reach the Delhi office at 011-23456789 for the claim.", "011-23456789"),
    ("Alternate contact: 080 2345 6789, ask for Rahul.", "080 2345 6789"),
    ("Meu celular é (11) 91234-5678, pode mandar mensagem.", "(11) 91234-5678"),
    ("Ligue para 21 98765-4321 depois das 14h.", "21 98765-4321"),
    ("O telefone da loja é (31) 3456-7890.", "(31) 3456-7890"),
    ("Telefone para contato: 11 3456 7890", "11 3456 7890"),
]
"""Four sentences of support in each of ten countries."""
MORE = [
    "Could someone ring me on 0113 496 0234 this afternoon?",
    "The buyer left 01632 960983 as her landline.",
    "Unser Kundendienst: 0800 3301000 (kostenlos).",
    "Sie können mich auch mobil unter 0176 / 98 76 54 32 erreichen.",
    "Meine neue Nummer lautet 0160 1234567.",
    "Faxen Sie das Formular an 040 3009-2525, bitte.",
    "Vous pouvez nous contacter par téléphone au 05 61 22 33 44.",
    "Mon fixe est le 04.91.12.34.56, le portable ne marche plus.",
    "Llamad al 622 11 22 33 si no contesto en casa.",
    "Mi celular es 55 1234 5678, vivo en la CDMX.",
    "Il numero di telefono del negozio è 011 5617 234.",
    "Mandami un SMS al 3481234567.",
    "Mijn mobiel: 06-23456789.",
    "Bereikbaar op 030 2345678 tijdens kantooruren.",
    "You can text my mobile, 0422 123 456, instead.",
    "Call the Brisbane store on 07 3003 1234.",
    "WhatsApp me at 99887 76655.",
    "Contact number: +91 98200 12345",
    "Meu telefone é (21) 2345-6789 e o celular (21) 99876-5432.",
    "電話番号は090-1234-5678です。",
    "我的手机号是138 0013 8000。",
    "Numer telefonu to 601 234 567.",
    "Zadzwoń do mnie: 22 123 45 67",
    "Mitt mobilnummer är 070-174 06 35.",
    "Telefonnummeret mitt er 412 34 567.",
    "My office line, 312-555-0164, goes to voicemail.",
    "Phone number on file: 2125550143",
    "Please call 1-800-555-0199 toll free.",
    "Ring 07700 900461 when outside, not the buzzer.",
    "Her cell phone is (646) 555 0128.",
]
OTHERS = [
    "Order 0812 345 6789 has not arrived, please call me.",
    "I called about invoice 2024 0012 3456 twice.",
    "Call me on 2024-05-06 at 10.",
    "Please call us between 09 00 and 17 30 on 12.05.2024.",
    "The server 192.168.100.200 does not reach 10.0.12.255.",
    "My phone runs version 10.15.7.1234 of the app.",
    "Call the function 10000000 times.",
    "Meet me at 48.8566 2.3522, then call.",
    "The phone costs 1 234 567 pesos.",
    "Account 1234 5678 90 is blocked, who can I call?",
    "phone models sold 2010-2012, 2013 2014 2015",
    "Meine Bestellnummer ist 0171 2345678.",
    "My customer number is 612 345 678.",
    "Ruf mich wegen Rechnung 0221 4567890 an.",
    "The phone's IMEI is 35 209900 176148 1.",
    "Transfer 1 500 000 000 to the reserve, then call me.",
    "0101 0110 1101 0011 in hexadecimal",
    "Tracking number 07700 900 12345",
    "The numbers are 12 34 56 78 90 12 34",
    "El pedido 612 345 678 no llega; llámeme.",
    "We reached 612 345 678 users.",
    "Call me at 12:30 on 05/06/2024 or 06/06/2024",
    "My account number is 0171 2345678 and my card ends in 4821.",
    "const unixTimestamp = 1633059092;",
    "Dating from 1994-2009, or 1180 1200",
    "0.363636 and 0.2916666667",
    "(12 + 3456) / 7890 = 1",
    "the event is called dentist, and is at 4812 1144 Sonoma Avenue",
    "cut down this number by 500-1000 calories",
    "call 1-800-273-TALK today",
    "The number of them is 1 234 567 890.",
    "Phone plans sold: 2009 2010 2011",
    "Number of months = (6055 / 1000)",
    "caps is 23 22 56 32 25 and 0 1 1 4 13 50",
    "Rua Augusta, meu CEP é 01310-100",
    "Sendungsnummer 0034 0434 1610 9404 2557",
    "Order 0049 171 2345678",
    "001 234 567 and 00 12 34 56 78",
    "Reach 98765 43210 people with one post",
    "3600000000000 + 62426244000 + 198472480000",
    "(3 - 1) + 442079460018 = ?",
    "Wir erreichen 98765 43210 Kunden.",
]


def found(text: str) -> list[str]:
    return [text[begin:end] for begin, end in phones.find(text)]


@pytest.mark.parametrize(("text", "number"), NATIONAL)
def test_a_national_number_is_found_where_it_is(text: str, number: str) -> None:
    assert found(text) == [number]
    assert redaction.redact_text(text) == text.replace(number, "<PHONE_NUMBER>")


@pytest.mark.parametrize("text", MORE)
def test_a_number_of_any_region_is_found_whole(text: str) -> None:
    digits = "".join(filter(str.isdigit, text))
    assert "".join(filter(str.isdigit, "".join(found(text)))) == digits
    assert not any(map(str.isdigit, redaction.redact_text(text)))


@pytest.mark.parametrize("text", OTHERS)
def test_other_numbers_are_no_phone_numbers(text: str) -> None:
    assert found(text) == []


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("Phone:\n(123) 456-7891", ["(123) 456-7891"]),
        ("Ana is there, 415-555-2671 is her mobile", ["415-555-2671"]),
        ('{"name": "Ana", "phone": "5205550467"}', ["5205550467"]),
        ("Their number is 1 40 62 05 00.", ["1 40 62 05 00"]),
        ("phone=0171 2345678", ["0171 2345678"]),
        ("Call 98765 43210 peopleware", ["98765 43210"]),
        ("Call 98765 43210, people wait there", ["98765 43210"]),
        ("Phone 98765 43210 people answer", ["98765 43210"]),
        ("mobile 0171 2345678 or 030 1234567", ["0171 2345678", "030 1234567"]),
        ("Customer service: 0800 123 4567", ["0800 123 4567"]),
        ("call 0073 84793, where 007 begins no country's code", []),
        ("0049 171 2345678", ["0049 171 2345678"]),
        ("00 44 (0)20 7946 0018 or 0034 612 34 56 78", ["00 44 (0)20 7946 0018", "0034 612 34 56 78"]),
        ("Tel. 0049 30/2345678", ["0049 30/2345678"]),
        ("+49 171/2345678, +49171/ 2345678", ["+49 171/2345678", "+49171/ 2345678"]),
        ("(+44) 20 7946 0018 (+49 171 2345678)", ["(+44) 20 7946 0018", "+49 171 2345678"]),
        ("phone +44 7700 900738, and 612 345 678", ["+44 7700 900738", "612 345 678"]),
        ("Phone: +1 (202) 555-0142, fax: +44 20 7946 0018.", ["+1 (202) 555-0142", "+44 20 7946 0018"]),
    ],
)
def test_words_before_and_after_numbers(text: str, numbers: list[str]) -> None:
    assert found(text) == numbers


def test_a_placeholder_is_no_word_beside_a_number() -> None:
    """What a redaction writes makes no phone number of the count after it, which the report does not name."""
    text = "Phone 0171 2345678. We sold 98765 43210 units."
    assert found(text) == ["0171 2345678"]
    assert redaction.redact_text(text) == "Phone <PHONE_NUMBER>. We sold 98765 43210 units."
    assert redaction.redact_text("<PHONE_NUMBER> has 98765 43210 points") == "<PHONE_NUMBER> has 98765 43210 points"
