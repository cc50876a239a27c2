"""Draws the idea of the book, book/_static/idea.svg: python book/idea.py"""

from collections.abc import Sequence
from pathlib import Path

#: Colours of sts.book.figures: the forecast, what shifts, the outcome.
COLOURS, GREY = ("#0072B2", "#D55E00", "#009E73"), "#666666"


def diagram() -> str:
    """The idea of the book as an SVG: residual stream, SAE, shifted latents, score, and the outcome beside it."""
    blue, orange, green, ink = COLOURS[0], COLOURS[1], COLOURS[2], "#222222"

    def text(
        x: float, y: float, words: str, size: int = 15, *, anchor: str = "middle", colour: str = ink, bold: bool = False
    ):
        weight = 600 if bold else 400
        return (
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}" '
            f'font-weight="{weight}">{words}</text>'
        )

    def box(x: float, y: float, width: float, height: float, colour: str, *, fill: str = "white", line: float = 1.5):
        return (
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}" stroke="{colour}" '
            f'stroke-width="{line:g}"/>'
        )

    def arrow(x: float, y: float, to_x: float, to_y: float):
        return (
            f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" stroke="{ink}" stroke-width="2" fill="none" '
            'marker-end="url(#tip)"/>'
        )

    def model(x: float, y: float, colour: str, name: str):
        return "".join(
            box(x, y + 17 * layer, 84, 13, colour, fill=colour if layer == 1 else "white") for layer in range(5)
        ) + text(x + 42, y + 106, name)

    def latents(x: float, y: float, active: set[int], shifted: Sequence[int] = ()):
        return "".join(
            f'<circle cx="{x + 17 * (place % 7):g}" cy="{y + 17 * (place // 7):g}" r="6" '
            f'fill="{blue if place in active else "white"}" stroke="{orange if place in shifted else "#999999"}" '
            f'stroke-width="{3 if place in shifted else 1}"/>'
            for place in range(35)
        )

    def bars_(x: float, y: float, lengths: Sequence[float], colour: str):
        names = ("physics", "law", "history")
        return "".join(
            text(x, y + 13 + 26 * row, name, 14, anchor="end")
            + box(x + 6, y + 26 * row, length, 17, colour, fill=colour)
            for row, (name, length) in enumerate(zip(names, lengths, strict=True))
        )

    alone, behind, shifted = {2, 9, 18, 30}, {2, 11, 18, 24, 27}, (9, 11, 24, 27, 30)
    points = ((520, 392), (553, 362), (598, 322))
    parts = [
        box(8, 8, 744, 208, blue, fill="#f3f8fc"),
        text(20, 30, "The forecast: the untuned model alone", 16, anchor="start", colour=blue, bold=True),
        box(8, 232, 744, 208, green, fill="#f2faf7"),
        text(150, 254, "The outcome: fine-tune, and look", 16, anchor="start", colour="#00694c", bold=True),
        model(32, 62, blue, "untuned model"),
        text(74, 187, "one layer&#8217;s", 14),
        text(74, 204, "residual stream", 14),
        arrow(122, 86, 160, 86),
        text(222, 58, "a question alone", 14),
        latents(171, 74, alone),
        text(222, 187, "SAE: few of many", 14),
        text(222, 204, "latents are active", 14),
        text(298, 113, "&#8722;", 30),
        text(388, 58, "behind worked examples", 14),
        latents(337, 74, behind, shifted),
        text(388, 187, "most changed:", 14),
        text(388, 204, "shifted latents", 14, colour=orange, bold=True),
        arrow(460, 108, 500, 108),
        text(640, 58, "their use in each domain", 14),
        bars_(580, 76, (140, 70, 35), blue),
        text(640, 187, "the score", 15, bold=True),
        text(640, 204, "larger: will move more", 14),
        arrow(74, 216, 74, 268),
        model(32, 278, green, "tuned on maths"),
        arrow(122, 320, 196, 320),
        text(305, 282, "change in each domain", 14),
        bars_(252, 300, (120, 75, 42), green),
        text(305, 411, "the outcome", 15, bold=True),
        arrow(398, 338, 460, 338),
        arrow(640, 216, 600, 268),
        f'<path d="M490 300 V404 H650" stroke="{ink}" stroke-width="1.5" fill="none"/>',
        "".join(f'<circle cx="{x}" cy="{y}" r="6" fill="{orange}"/>' for x, y in points),
        f'<path d="M500 408 L630 296" stroke="{GREY}" stroke-width="1.5" stroke-dasharray="5 4"/>',
        text(570, 426, "score", 14),
        text(0, 0, "change", 14).replace("<text", '<text transform="translate(482 352) rotate(-90)"'),
        text(690, 340, "do they", 15),
        text(690, 360, "agree?", 15, bold=True),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 448" width="760" '
        'font-family="Helvetica, Arial, sans-serif" role="img">'
        "<title>How the score is made and what it is compared with</title>"
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{ink}"/></marker></defs>'
        '<rect width="760" height="448" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_name("_static").joinpath("idea.svg").write_text(diagram(), encoding="utf-8")
