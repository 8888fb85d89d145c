"""Recognises texts that a chat template has already rendered, by the markers at their ends."""

import re

CHATML_BEGIN, CHATML_END = "<|im_start|>", "<|im_end|>"
_BOS = ("<s>", "<bos>", "<|begin_of_text|>")
_EOS = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>")
_MARKS = (*_BOS, *_EOS)
"""BOS and EOS tokens, which stand around a conversation that a template has rendered."""
_TURN = r"\[INST\]|<<SYS>>|<\|start_header_id\|>|<start_of_turn>|<\|(?:user|system|assistant|start|turn)\|?>"
"""What conversations begin with that well-known templates have rendered, besides ChatML."""
_CONVERSATION = re.compile(_TURN)
_BEGIN = re.compile(
    rf"\s*(?:(?:{'|'.join(map(re.escape, _BOS))})\s*)?({_TURN}|{re.escape(CHATML_BEGIN)})"
    rf"|\s*({'|'.join(map(re.escape, _BOS[1:]))})"  # <s> alone may be HTML
)
_SPEAKER = re.compile(
    r"\s*(###\s?(?:Human|User|Instruction|Input|Assistant|Response):|Below is an instruction"
    r"|(?:Human|HUMAN|User|USER):(?=(?:[^\n]*\n)+?[ \t]*(?:Assistant|ASSISTANT|AI):))"
)
"""How conversations begin that are written as texts: `### Human:`, or `Human:` where a later line has `Assistant:`."""
_ENDS = (*_EOS, CHATML_END, "<|eot_id|>", "<end_of_turn>", "<|end|>", "[/INST]")


def bare(text: str) -> str:
    """Returns a text without white space, one BOS and one EOS token around it."""
    text = text.strip()
    text = text.removeprefix(next(filter(text.startswith, _MARKS), "")).lstrip()
    return text.removesuffix(next(filter(text.endswith, _MARKS), "")).rstrip()


def is_chatml(text: object) -> bool:
    """Whether a text begins with a turn of ChatML."""
    return isinstance(text, str) and CHATML_BEGIN in text and bare(text).startswith(CHATML_BEGIN)


def find_turn(text: str) -> str | None:
    """Returns the marker of a turn with which a text begins, if it is not ChatML's; None if there is none."""
    found = _CONVERSATION.match(bare(text))
    return found and found[0]


def find_speaker(text: str) -> str | None:
    """Returns the name of a speaker with which a text begins that is a conversation; None if there is none."""
    found = _SPEAKER.match(text)
    return found and found[1]


def find_marker(text: str) -> str | None:
    """Returns a template's marker with which a message begins or ends, which the template would write again."""
    if "<" not in text and "INST]" not in text:  # nearly every text, and much faster than the patterns
        return None
    if (found := _BEGIN.match(text)) is not None:
        return found[1] or found[2]
    if not (last := text.rstrip()).endswith((">", "]")):
        return None
    end = next(filter(last.endswith, _ENDS), None)
    return None if end == "</s>" and "<s>" in text else end  # a text of HTML that is struck through
