"""Renders a preview as one HTML page without external files: every token with its state."""

from jinja2 import Environment, StrictUndefined

from tunery.rows.preview_model import Preview

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
"""The page's content security policy: text from rows cannot run as script."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0;
  --trained: #0a5c22; --trained-back: #d3f5dc; --masked: #59636e; --cut: #a40e26; --cut-back: #ffe3e3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --soft: #9198a1; --line: #30363d;
  --trained: #b7f5c4; --trained-back: #14432a; --masked: #9198a1; --cut: #ffb3b3; --cut-back: #55191d; } }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0.5rem 0; } h2 { font-size: 1.05rem; margin: 1.5rem 0 0.25rem; }
p { margin: 0.25rem 0; } .soft { color: var(--soft); font-size: 0.9rem; }
ul { list-style: none; margin: 0.75rem 0; padding: 0; } li { padding: 0.15rem 0 0.15rem 1.6rem; text-indent: -1.6rem; }
li b { display: inline-block; width: 1.6rem; text-indent: 0; } .no { color: var(--cut); }
pre { margin: 0.5rem 0; padding: 0.75rem; border: 1px solid var(--line); border-radius: 6px; white-space: pre-wrap;
  font: 14px/1.8 ui-monospace, monospace; }
.t { color: var(--trained); background: var(--trained-back); border-bottom: 2px solid; font-weight: 600; }
.m { color: var(--masked); } .c { color: var(--cut); background: var(--cut-back); text-decoration: line-through; }
.t, .m, .c { box-shadow: inset 1px 0 var(--line); padding: 2px 0 2px 1px; }
.n { opacity: 0.6; }
"""

_PAGE = Environment(autoescape=True, undefined=StrictUndefined).from_string(
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>What {{ made.model }} learns from {{ name }}</title>
<style>{{ style }}</style>
</head>
<body>
<h1>What {{ made.model }} learns from {{ name }}</h1>
<p class="soft">{{ made.shape or "No row could be read" }}. Cut at {{ "{:,}".format(made.max_tokens) }} tokens.</p>
<p><span class="t">trained</span> is learned, <span class="m">masked</span> is only read, <span class="c">cut</span> is
left out.</p>
<ul>
{%- for check in made.checks %}
<li class="{{ 'yes' if check.passed else 'no' }}"><b>{{ "✓" if check.passed else "✗" }}</b>{{ check.what }}
{%- if not check.passed %}: not in {{ made.where(check) }}. {{ check.advice }}{% endif %}</li>
{%- endfor %}
</ul>
{%- for row in made.rows %}
<h2>{{ row.name | capitalize }}</h2>
{%- if row.error %}
<p class="no">✗ {{ row.error }}</p>
{%- endif %}
{%- for sequence in row.sequences %}
<p class="soft">{{ sequence.trained }} trained, {{ sequence.masked }} masked, {{ sequence.cut }} cut</p>
<pre>
{%- for token in sequence.tokens -%}
<span class="{{ token.state[0] }}" title="{{ token.id }} {{ token.state }}">{{ visible(token.text) }}</span>
{%- endfor -%}
{%- if sequence.omitted %}
… and {{ "{:,}".format(sequence.omitted) }} more tokens{% endif %}</pre>
{%- endfor %}
{%- endfor %}
</body>
</html>
"""
)


_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: "␡", 0x0A: "↵\n"}
"""Visible signs for control characters, which a terminal would interpret."""


def visible(text: str) -> str:
    """Returns a token's text with line breaks marked, and a sign for a token that is only part of a character."""
    return text.translate(_PICTURES) if text else "·"


def draw(made: Preview, name: str) -> str:
    """Returns the page for the file `name`."""
    return _PAGE.render(made=made, name=name, style=_STYLE, policy=POLICY, visible=visible)
