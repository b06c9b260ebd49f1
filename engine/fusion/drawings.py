"""How the generated images are drawn, and the plain ones that a base model is pre-trained on.

Each function draws one example from a numpy Generator, 64 x 64 pixels, drawn at twice the size and reduced. Plain scenes
(flat shapes, letters, patterns, one thing that moves) are what a base model learns; the domains (`domain_drawings`) look and
are spoken of differently, so that the base model fails on them while its features still carry. It writes no files.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIZE, DRAWN = 64, 128
COLOURS = {
    "red": (214, 48, 48), "green": (56, 166, 72), "blue": (58, 92, 214), "yellow": (232, 206, 64),
    "purple": (148, 72, 180), "orange": (240, 140, 44), "white": (240, 240, 240), "cyan": (70, 200, 210),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
FONTS = {
    "sans": "DejaVuSans.ttf", "boldface": "DejaVuSans-Bold.ttf", "slanted": "DejaVuSans-Oblique.ttf",
    "roman": "DejaVuSerif.ttf", "typewriter": "DejaVuSansMono-Bold.ttf", "calligraphic": "cmsy10.ttf",
}  # fmt: skip
PLAIN_FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf", "DejaVuSansMono.ttf")
Corners = tuple[float, float, float, float]


class Thing(NamedTuple):
    """A shape in a scene; centre and half width in drawn pixels."""

    shape: str
    colour: str
    x: float
    y: float
    half: float

    @property
    def box(self) -> Corners:
        corners = (self.x - self.half, self.y - self.half, self.x + self.half, self.y + self.half)
        return tuple(v * SIZE / DRAWN for v in corners)


class Drawing(NamedTuple):
    """frames: one image, or a clip's in order. boxes: (label, corners in pixels of the finished image). things: all that
    stand in a plain scene, whatever is asked; none where that is not known."""

    frames: list[Image.Image]
    question: str = ""
    answer: str = ""
    boxes: tuple[tuple[str, Corners], ...] = ()
    things: tuple[Thing, ...] = ()


def finish(image: Image.Image, rng: np.random.Generator, noise: float = 4.0, blur: float = 0.0) -> Image.Image:
    """Reduce to 64 x 64 and add a little of what cameras add."""
    if blur:
        image = image.filter(ImageFilter.GaussianBlur(blur))
    pixels = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX), np.float32)
    pixels = pixels + rng.normal(0, noise, (SIZE, SIZE, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pick(rng: np.random.Generator, items):
    """One of `items`."""
    return items[int(rng.integers(len(items)))]


def canvas(rng: np.random.Generator, low: int = 10, high: int = 70) -> Image.Image:
    """A plain dark ground."""
    return Image.new("RGB", (DRAWN, DRAWN), tuple(int(v) for v in rng.integers(low, high, 3)))


def draw_shape(draw: ImageDraw.ImageDraw, thing: Thing, fill=None) -> None:
    """Draw `thing` in `fill`, or in its own colour."""
    x, y, h = thing.x, thing.y, thing.half
    fill = fill or COLOURS[thing.colour]
    box = (x - h, y - h, x + h, y + h)
    if thing.shape == "circle":
        draw.ellipse(box, fill)
    elif thing.shape == "square":
        draw.rectangle(box, fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - h), (x + h, y + h), (x - h, y + h)], fill)
    elif thing.shape == "cross":
        draw.rectangle((x - h, y - h / 3, x + h, y + h / 3), fill)
        draw.rectangle((x - h / 3, y - h, x + h / 3, y + h), fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(3, int(h / 2.5)))
    else:
        turns = [(math.pi * i / 5, h if i % 2 == 0 else h * 0.45) for i in range(10)]
        draw.polygon([(x + r * math.sin(a), y - r * math.cos(a)) for a, r in turns], fill)


def scatter(rng: np.random.Generator, count: int, shapes=SHAPES, low: float = 10, high: float = 24) -> list[Thing]:
    """Up to `count` things that do not overlap, no two of the same shape and colour."""
    things: list[Thing] = []
    for _ in range(12 * count):
        half = float(rng.uniform(low, high))
        x, y = (float(v) for v in rng.uniform(half + 2, DRAWN - half - 2, 2))
        thing = Thing(pick(rng, shapes), pick(rng, tuple(COLOURS)), x, y, half)
        apart = all(max(abs(x - o.x), abs(y - o.y)) > half + o.half + 3 for o in things)
        if apart and all((thing.shape, thing.colour) != (o.shape, o.colour) for o in things):
            things.append(thing)
        if len(things) == count:
            break
    return things


@lru_cache(maxsize=64)
def font(name: str, size: int):
    """A font that comes with matplotlib."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), size)


# -- plain: what the base model is pre-trained on --------------------------------------------------------------------------
def plain_scene(rng: np.random.Generator) -> Drawing:
    """One to three flat shapes: name, colour, number, place or relation."""
    image = canvas(rng)
    things = scatter(rng, int(rng.integers(1, 4)))
    for thing in things:
        draw_shape(ImageDraw.Draw(image), thing)
    return _asked(finish(image, rng), things, rng)._replace(things=tuple(things))


def _asked(image: Image.Image, things: list[Thing], rng: np.random.Generator) -> Drawing:
    one = pick(rng, things)
    kind = int(rng.integers(7))
    if kind > 4 and len(things) > 1:
        by_x, by_size = (sorted(things, key=lambda t, n=n: getattr(t, n)) for n in ("x", "half"))
        asked, meant = pick(rng, (
            ("on the left", by_x[0]), ("on the right", by_x[-1]), ("smallest", by_size[0]), ("largest", by_size[-1]),
        ))  # fmt: skip
        return Drawing([image], f"what is {asked}", f"{meant.colour} {meant.shape}")
    if kind == 0 and len(things) == 1:
        return Drawing([image], "what is this", f"{one.colour} {one.shape}")
    if kind == 1 and sum(t.shape == one.shape for t in things) == 1:
        return Drawing([image], f"what color is the {one.shape}", one.colour)
    if kind == 2:
        return Drawing([image], "how many shapes", str(len(things)))
    if kind == 3:
        found = (("object", one.box),)
        return Drawing([image], f"where is the {one.colour} {one.shape}", corners_text(one.box), found)
    seen = " and ".join(f"{t.colour} {t.shape}" for t in sorted(things, key=lambda t: t.x))
    return Drawing([image], "say what you see", seen)


def plain_places(rng: np.random.Generator) -> Drawing:
    """One to three flat shapes on plain or grainy ground, each to be named with its box, from left to right."""
    image = canvas(rng) if rng.random() < 0.5 else toned(rng.normal(0, 0.3, (DRAWN, DRAWN)), rng)
    things = sorted(scatter(rng, int(rng.integers(1, 4))), key=lambda t: t.x)
    for thing in things:
        draw_shape(ImageDraw.Draw(image), thing)
    told = " ; ".join(f"{thing.shape} {corners_text(thing.box)}" for thing in things)
    return Drawing([finish(image, rng)], "list the shapes and where they are", told, (), tuple(things))


def plain_where(rng: np.random.Generator) -> Drawing:
    """One to three flat shapes, one of them to be found by its side, its size or its looks."""
    image = canvas(rng) if rng.random() < 0.5 else toned(rng.normal(0, 0.3, (DRAWN, DRAWN)), rng)
    things = scatter(rng, int(rng.integers(1, 4)))
    for thing in things:
        draw_shape(ImageDraw.Draw(image), thing)
    by_x, by_size = (sorted(things, key=lambda t, n=n: getattr(t, n)) for n in ("x", "half"))
    looks = pick(rng, things)
    said, meant = pick(rng, (
        ("shape on the left", by_x[0]), ("shape on the right", by_x[-1]), ("largest shape", by_size[-1]),
        (f"{looks.colour} {looks.shape}", looks), (f"{looks.colour} {looks.shape}", looks),
    ))  # fmt: skip
    return Drawing([finish(image, rng)], f"where is the {said}", corners_text(meant.box), (("object", meant.box),),
                   tuple(things))  # fmt: skip


def plain_letter(rng: np.random.Generator) -> Drawing:
    """One letter or digit, at times leaning or out of focus."""
    ground, ink = canvas(rng), Image.new("L", (DRAWN, DRAWN))
    letter = pick(rng, "abcdefghijklmnopqrstuvwxyz0123456789")
    shown = letter.upper() if rng.random() < 0.5 else letter
    style = font(pick(rng, PLAIN_FONTS), int(rng.integers(50, 100)))
    place = tuple(int(v) for v in rng.integers(44, 84, 2))
    ImageDraw.Draw(ink).text(place, shown, font=style, anchor="mm", fill=255)
    ink = ink.rotate(float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR)
    ground.paste(COLOURS[pick(rng, tuple(COLOURS))], mask=ink)
    return Drawing([finish(ground, rng, blur=float(rng.uniform(0, 3)))], "what letter is this", letter)


def plain_pattern(rng: np.random.Generator) -> Drawing:
    """Lines, dots, checks or rings at any pitch and angle."""
    kind = pick(rng, ("lines", "dots", "checks", "rings", "noise"))
    y, x = np.mgrid[:DRAWN, :DRAWN].astype(np.float32)
    angle, pitch = rng.uniform(0, math.pi), rng.uniform(8, 26)
    u, v = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    wave_u, wave_v = np.sin(2 * math.pi * u / pitch), np.sin(2 * math.pi * v / pitch)
    radius = np.hypot(x - rng.uniform(30, 98), y - rng.uniform(30, 98))
    coarse = rng.normal(size=(int(DRAWN // pitch) + 1,) * 2).astype(np.float32)
    cloud = np.asarray(Image.fromarray(coarse).resize((DRAWN, DRAWN), Image.Resampling.BICUBIC))
    level = {"lines": wave_u, "dots": np.where((wave_u > 0.3) & (wave_v > 0.3), 1, -1), "checks": np.sign(wave_u * wave_v),
             "rings": np.sin(2 * math.pi * radius / pitch), "noise": cloud}[kind]  # fmt: skip
    image = toned(level, rng)
    if kind == "lines" and rng.random() < 0.6:
        lean = "vertical" if abs(math.cos(angle)) > 0.92 else "horizontal" if abs(math.cos(angle)) < 0.38 else "oblique"
        return Drawing([finish(image, rng)], "how do the lines run", lean)
    return Drawing([finish(image, rng)], "what pattern is this", kind)


def plain_move(rng: np.random.Generator) -> Drawing:
    """Three frames of one shape that moves, or stays."""
    way, (dx, dy) = pick(rng, (("left", (-1, 0)), ("right", (1, 0)), ("up", (0, -1)), ("down", (0, 1)), ("stays", (0, 0))))
    half, step = rng.uniform(9, 18), rng.uniform(12, 26)
    x, y = rng.uniform(46, 82, 2)
    shape, colour, ground = pick(rng, SHAPES), pick(rng, tuple(COLOURS)), canvas(rng)
    frames = []
    for i in (-1, 0, 1):
        frame = ground.copy()
        draw_shape(ImageDraw.Draw(frame), Thing(shape, colour, x + i * dx * step, y + i * dy * step, half))
        frames.append(finish(frame, rng))
    return Drawing(frames, "how does it move", way)


PLAIN = (plain_scene, plain_scene, plain_places, plain_where, plain_where, plain_letter, plain_letter, plain_pattern,
         plain_move)  # fmt: skip
"""Equal shares. To find a shape takes the most examples to learn: its corners are four tokens, all of which must be near."""


def plain_examples(numbers: range, seed: int) -> list[Drawing]:
    """The plain drawings of these numbers, each from a generator of its own."""
    return [PLAIN[i % len(PLAIN)](np.random.default_rng([seed, i])) for i in numbers]


def toned(level: np.ndarray, rng: np.random.Generator, dark=None, light=None) -> Image.Image:
    """A field of about -1..1 between two colours."""
    dark = np.asarray(dark if dark is not None else rng.integers(0, 110, 3), np.float32)
    light = np.asarray(light if light is not None else rng.integers(130, 255, 3), np.float32)
    share = ((level + 1) / 2).clip(0, 1)[..., None]
    return Image.fromarray((dark + share * (light - dark)).astype(np.uint8))


def corners_text(box: Corners) -> str:
    """Corners in hundredths of the image, as a base model and a decoding adapter say them."""
    return "[" + ", ".join(str(min(99, max(0, round(100 * v / SIZE)))) for v in box) + "]"
