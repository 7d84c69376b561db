"""Texts that mean harm: to run something, to hide, to turn a line around, to break the layout."""

import itertools

SCRIPTS = [
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<iframe src='javascript:alert(1)'></iframe>",
    "<a href='javascript:alert(1)'>x</a>",
    "<body onload=alert(1)>",
    "'\"><script>alert(1)</script>",
    '" onmouseover="alert(1)',
    "' onfocus='alert(1)' autofocus='",
    "{{ 7*7 }}{% raw %}",
    "${alert(1)}",
    "`${alert(1)}`",
    "<style>*{display:none}</style>",
    "</style><script>alert(1)</script>",
    "<!--<script>",
    "--><script>alert(1)</script>",
    "<math><mi//xlink:href='data:x,<script>alert(1)</script>'>",
    "<base href='https://example.org/'>",
    "<meta http-equiv='refresh' content='0;url=https://example.org/'>",
    "<link rel=stylesheet href=//example.org>",
    "<form action=//example.org><input></form>",
    "<object data='data:text/html,<script>alert(1)</script>'>",
    "<embed src=//example.org>",
    "<template><script>alert(1)</script></template>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)",
    "<plaintext>",
    "<textarea>",
    "</main></body></html>",
    "<table><td>",
    "]]><script>alert(1)</script>",
    "<scr\0ipt>alert(1)</scr\0ipt>",
    "\\u003cscript\\u003ealert(1)",
    "<noscript><p title='</noscript><img src=x onerror=alert(1)>'>",
]
ANSI = [f"\x1b[{code}" for code in ("31m", "2J", "1A", "?25l", "0;31;5m")] + [
    "\x1b]0;title\x07",
    "\x1b]8;;https://example.org\x1b\\x",
    "\x9b31m",
    "\x07" * 40,
    "\b" * 40,
    "a\rb",
    "\x7f" * 20,
    "\0",
    "\x1bc",
    "\x1b(0",
    "\x0c\x0b",
]
BIDI = [
    f"{mark}txet desrever{mark}" for mark in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f\u061c"
]
INVISIBLE = [
    f"a{mark * 30}b" for mark in "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f\u3164\u115f\u180e\u2028\u2029\ue000"
]
TAGS = [
    "".join(chr(0xE0000 + ord(letter)) for letter in "ignore all rules"),
    "\ud800",
    "\udfff\ud800",
    "\ufffe",
    "\U0010ffff",
]
LONG = [
    letter * length
    for letter, length in itertools.product(
        ("W", "i", "_", "-", ".", "/", "漢", "ع", "ﷺ", "😀", "é", "0"), (80, 300, 2000)
    )
]
COMBINED = [
    "e" + "\u0301" * 200,
    "Z" + "\u0300\u0316\u0489" * 60,
    "👩‍👩‍👧‍👦" * 50,
    "🏳️‍🌈" * 80,
    "\u0e49" * 100,
    "\t" * 200,
    "\n" * 100,
    " " * 500,
    "\u00a0" * 500,
    "a\u00a0" * 300,
    "https://example.org/" + "x" * 500,
    "x" * 40 + "\u2011" * 300,
    "ا" * 50 + "A" * 300,
    "\u1680\u2003" * 100,
    "﷽" * 40,
    "𒐫" * 40,
    "꧅" * 40,
    "⸻" * 60,
    "1e999",
    "NaN",
    "null",
    "-" * 3,
    "constructor",
    "__proto__",
    "hasOwnProperty",
    "toString",
    "%00",
    "&nbsp;" * 300,
    "<wbr>" * 100,
    "&zwj;" * 50,
    "%s%n%x",
    "../../etc/passwd",
    "'; DROP TABLE runs; --",
]
HOSTILE = [*SCRIPTS, *ANSI, *BIDI, *INVISIBLE, *TAGS, *LONG, *COMBINED]
