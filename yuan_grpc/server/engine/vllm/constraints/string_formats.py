"""Formats of strings, as regular expressions."""

_UP_TO_28 = "(?:0[1-9]|1[0-9]|2[0-8])"
_DAYS = f"(?:(?:0[1-9]|1[0-2])-{_UP_TO_28}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_DATE = f"[1-9][0-9]{{3}}-{_DAYS}"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_SECONDS = "[0-9]{1,2}S"
_MINUTES = f"[0-9]{{1,2}}M(?:{_SECONDS})?"
_CLOCK = f"T(?:[0-9]{{1,2}}H(?:{_MINUTES})?|{_MINUTES}|{_SECONDS})"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_LABEL = "[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?"
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": f"P(?:[0-9]{{1,4}}D(?:{_CLOCK})?|{_CLOCK})",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "(?:[0-9a-f]{1,4}:){7}[0-9a-f]{1,4}",
    "hostname": rf"{_LABEL}(?:\.{_LABEL}){{0,5}}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@{_LABEL}(?:\.{_LABEL}){{1,5}}",
    "uri": rf"https?://{_LABEL}(?:\.{_LABEL}){{0,5}}(?::[1-9][0-9]{{0,3}})?(?:/[A-Za-z0-9._~-]*)*",
}
"""Formats, as expressions that match only valid texts, though not all of them."""
