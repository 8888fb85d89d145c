"""Passwords and PINs are found after their name, and sentences about them are left alone."""

import json
from pathlib import Path

import pytest

from tunery.datasets.cleaning import redaction
from tunery.datasets.report import passwords, privacy

ROOT = Path(__file__).parents[2]
GIVEN = [
    ("password: hunter2", "hunter2"),
    ("passwort ist Geheim123!", "Geheim123!"),
    ("my pin is 4821", "4821"),
    ("pwd=Sommer2024", "Sommer2024"),
    ("My password is Tr0ub4dor&3, can you reset it?", "Tr0ub4dor&3"),
    ("The PIN for my card is 7319.", "7319"),
    ("login: ana, password: qwerty12", "qwerty12"),
    ("user=root password='s3cr3t!x'", "s3cr3t!x"),
    ('{"user": "ana", "password": "hunter2"}', "hunter2"),
    ("Das Passwort lautet Blume#77.", "Blume#77"),
    ("mon mot de passe est Soleil2023", "Soleil2023"),
    ("mi contraseña es gato1985", "gato1985"),
    ("a minha senha é praia2020!", "praia2020!"),
    ("mijn wachtwoord is fiets123", "fiets123"),
    ("la mia password è Roma1927", "Roma1927"),
    ("Kennwort: Winter!2019", "Winter!2019"),
    ("passphrase is correct7horse", "correct7horse"),
    ("PIN: 0042", "0042"),
    ("my pin number is 1234 and it does not work", "1234"),
    ("PW: abc12345", "abc12345"),
    ("MYSQL_PASSWORD=p4ssw0rd", "p4ssw0rd"),
    ("Your temporary password is: Xk9-22tq", "Xk9-22tq"),
    ("mój hasło to kotek123", "kotek123"),
    ("mitt lösenord är hund1234", "hund1234"),
    ("My PIN code is 5512", "5512"),
    ('the wifi password is "sunflower88"', "sunflower88"),
    ("PASSWORD = 'Adm1n!'", "Adm1n!"),
    ("密码是 abc12345", "abc12345"),
    ("パスワードは abc12345 です", "abc12345"),
    ("My password is hunter2.", "hunter2"),
    ("I changed my passcode: 482913", "482913"),
    ("My pin is 4821!", "4821"),
    ("PIN:4821#", "4821"),
    ("'password' => 'x1y2'", "x1y2"),
    (':password => "Winter19"', "Winter19"),
    ("mysqldump --user root --password x1y2 shop", "x1y2"),
    ("login --db-password=x1y2", "x1y2"),
    ("unlock --pin 4821", "4821"),
]
NOT_GIVEN = [
    "The password is 1024 bits long",
    "I forgot my password",
    "password: required",
    "reset your password here",
    "password reset",
    "PIN is blocked",
    "My PIN is blocked after 3 tries.",
    "password: at least 8 characters",
    "Your password is incorrect",
    "password is case-sensitive",
    "The password is hashed with SHA256",
    "password=os.environ['PW']",
    "password = input('Password: ')",
    "password: str",
    "password: ********",
    "password=<your password>",
    "password: ${DB_PASSWORD}",
    "pin 13 is an output",
    "PIN is 4 digits",
    "PIN is 4 digits long",
    "my pin is not working since 2023",
    "connect pin 4 to 3V3",
    "password = generate(12)",
    "password == password2",
    "My password expired on 12.05.2024",
    "the password must have 8 to 12 characters",
    "I changed my PIN 2 days ago",
    "Where can I change my PIN? I have card 2 of 3",
    "password: string (8-20 chars)",
    "hash_password(password1)",
    "password: {{password1}}",
    "set password=%s",
    "Change PIN at ATM 24/7",
    "The password is 12 characters long.",
    "password is 128 bits",
    "your pin is 4-digit",
    "password: (min 6)",
    "I entered the wrong PIN 3 times",
    "Passwort vergessen?",
    "Ihr Passwort ist abgelaufen",
    "mot de passe oublié",
    "password TEXT NOT NULL",
    "password VARCHAR(255)",
    "assert password is None",
    "password1 = request.form['password1']",
    "password=self.pass1",
    "pin: 18, mode: 1",
    "My new PIN is on its way, order 12345",
    "password is stored in /etc/passwd2",
    "New password: new_password1",
    "PIN code: 560001 Bengaluru",
    "password -> password2",
    "I set my password in 2019",
    "Password1 and Password2 must match",
    r"pwd: C:\Users\ana2",
    "password => hash2",
    "passwords.map(password => sha1hex(password))",
    "run it with --password required",
    "ssh asks for the --password 3 times",
    "curl --pass phrase1",
    "the well--pin 4821 is loose",
]


def found(text: str) -> list[str]:
    return [text[begin:end] for begin, end in passwords.find(text)]


@pytest.mark.parametrize(("text", "value"), GIVEN)
def test_a_password_is_found_and_its_name_stays(text: str, value: str) -> None:
    assert found(text) == [value]
    assert list(privacy.kinds_in(text)) == [privacy.KEY]
    assert redaction.redact_text(text) == text.replace(value, "<SECRET>")


@pytest.mark.parametrize("text", NOT_GIVEN)
def test_sentences_about_passwords_give_none(text: str) -> None:
    assert found(text) == []
    assert redaction.redact_text(text) == text


def test_customers_of_a_bank_name_no_pin() -> None:
    """A third of these rows are about PINs and passcodes that are forgotten, blocked or to be changed."""
    lines = (ROOT / "examples/banking_train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [message["content"] for line in lines for message in json.loads(line)["messages"]]
    assert sum("pin" in text.lower() for text in texts) > 100
    assert [text for text in texts if found(text)] == []
