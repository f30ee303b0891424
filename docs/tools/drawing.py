"""Pictures as SVG: boxes, arrows, texts and bars, in the colors of all pictures of the documentation."""

from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

PICTURES = Path(__file__).parents[1] / "pictures"
INK, FAINT, ACCENT, SECOND, PAPER = "#1f2933", "#9aa5b1", "#2563eb", "#94a3b8", "#ffffff"
_FONT = "font-family='system-ui, Helvetica, Arial, \"Noto Sans CJK SC\", sans-serif'"
_ARROW_HEAD = (
    "<defs><marker id='head' viewBox='0 0 8 8' refX='7' refY='4' markerWidth='7' markerHeight='7' orient='auto'>"
    f"<path d='M0 0 L8 4 L0 8 z' fill='{INK}'/></marker></defs>"
)


@dataclass
class Drawing:
    """A picture that is drawn part by part.

    Attributes:
        width: width in pixels.
        height: height in pixels.
        title: the text for those who do not see it.
    """

    width: int
    height: int
    title: str
    parts: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, *, fill: str = PAPER, dashed: bool = False) -> None:
        """Draw a rectangle with round corners."""
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        self.parts.append(
            f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='7' fill='{fill}' "
            f"stroke='{INK}' stroke-width='1.3'{dashes}/>"
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: int = 14,
        color: str = INK,
        anchor: str = "middle",
        bold: bool = False,
    ) -> None:
        """Write a line of text."""
        weight = " font-weight='600'" if bold else ""
        self.parts.append(
            f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' text-anchor='{anchor}'{weight}>"
            f"{escape(text)}</text>"
        )

    def labeled_box(self, x: float, y: float, width: float, height: float, *lines: str, fill: str = PAPER) -> None:
        """Draw a box with a bold first line and smaller other ones."""
        self.box(x, y, width, height, fill=fill)
        top = y + height / 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            self.text(x + width / 2, top + 18 * number, line, size=12 if number else 14, bold=number == 0)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        """Draw a line through points, with a head at the last one."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dashes = " stroke-dasharray='5 4'" if dashed else ""
        self.parts.append(
            f"<polyline points='{path}' fill='none' stroke='{INK}' stroke-width='1.3' marker-end='url(#head)'{dashes}/>"
        )

    def bar(self, x: float, y: float, width: float, height: float, color: str) -> None:
        """Draw a bar of a plot."""
        self.parts.append(
            f"<rect x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' rx='2' fill='{color}'/>"
        )

    def svg(self) -> str:
        """Return the picture."""
        return "\n".join(
            [
                f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {self.width} {self.height}' "
                f"width='{self.width}' height='{self.height}' role='img' {_FONT}>",
                f"<title>{escape(self.title)}</title>",
                _ARROW_HEAD,
                f"<rect width='{self.width}' height='{self.height}' fill='{PAPER}'/>",
                *self.parts,
                "</svg>\n",
            ]
        )
