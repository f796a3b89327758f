"""Templates of the text around the source and the target of an example."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lowrank_dp import _validate
from lowrank_dp.data.examples import Example

_FIELDS = {
    "source": "source",
    "prompt": "source",
    "text": "source",
    "target": "target",
    "response": "target",
}


@dataclass(frozen=True)
class Template:
    """Text around the source and the target of a generation example.

    The written text is ``before + source + between + target + after``. With ``plain`` there is no
    target, ``between`` is empty, and the written text is ``before + text + after``. Without a
    source, ``before`` is empty.
    """

    before: str
    between: str
    after: str
    has_source: bool = True
    plain: bool = False

    @classmethod
    def parse(cls, text: str) -> Template:
        r"""Parse the text of a template.

        ``{source}`` or ``{prompt}`` stands for the source, ``{target}`` or ``{response}`` for the
        target, and ``{text}`` alone for a plain text. ``\n``, ``\t`` and ``\\`` are read as in a
        Python string, because a shell passes them on as two characters.

        Raises ValueError for a field that is unknown, repeated or out of order.

        >>> Template.parse("Q: {prompt} A: {target}").between
        ' A: '
        """
        if not isinstance(text, str):
            _validate.fail("template", "a text with {source} and {target}, or with {text}", text)
        plain = re.sub(
            r"\\(.)", lambda found: {"n": "\n", "t": "\t", "\\": "\\"}.get(found[1], found[0]), text
        )
        pieces = re.split(r"\{(\w*)\}", plain)
        fields = pieces[1::2]
        roles = [_FIELDS.get(field) for field in fields]
        if fields == ["text"]:
            return cls(pieces[0], "", pieces[2], plain=True)
        if roles == ["source", "target"] and fields[0] != "text":
            return cls(pieces[0], pieces[2], pieces[4])
        if roles == ["target"]:
            return cls("", pieces[0], pieces[2], has_source=False)
        return _validate.fail(
            "template",
            "a text with {source} (or {prompt}) and then {target} "
            "(or {response}), once each, or with {text} alone",
            text,
        )

    def parts(self, example: Example) -> tuple[str, str, str, str]:
        """Split the written text of ``example``: before, source, between, scored text."""
        if self.plain:
            return "", "", "", self.before + example.text + self.after
        if example.target is None:
            raise ValueError(f"{example.id} must have a target for a template with {{target}}")
        source = example.text if self.has_source else ""
        return self.before, source, self.between, example.target + self.after
