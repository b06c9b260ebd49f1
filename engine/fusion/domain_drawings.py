"""The drawings of the generated domains: textures, typefaces, tissue, aerial views, radiographs, charts, solids, clips.

Each is a domain's look and vocabulary, drawn from a numpy Generator (see `engine.fusion.drawings`); scikit-learn's digits
are real handwriting. Medical-like and aerial-like means like: nothing here is a patient or a place.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from engine.fusion.drawings import (
    COLOURS,
    DRAWN,
    FONTS,
    SIZE,
    Drawing,
    Thing,
    corners_text,
    draw_shape,
    finish,
    font,
    pick,
    scatter,
    toned,
)  # fmt: skip

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SOLIDS = {"circle": "ball", "square": "box", "triangle": "cone"}
BARS = ("red", "green", "blue", "yellow", "purple", "orange")


@lru_cache(maxsize=1)
def real_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits: float [n, 8, 8] in 0..16, and their values."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target


def digit(rng: np.random.Generator, number: int) -> Drawing:
    """Handwriting number `number` of the real ones, somewhere on a grey ground."""
    images, values = real_digits()
    shown = Image.fromarray((images[number] * 15.9).astype(np.uint8)).resize((int(rng.integers(70, 110)),) * 2)
    image = Image.new("L", (DRAWN, DRAWN), int(rng.integers(0, 40)))
    image.paste(shown, tuple(int(v) for v in rng.integers(0, DRAWN - shown.width, 2)))
    return Drawing([finish(image.convert("RGB"), rng)], "read the handwriting", DIGITS[int(values[number])])


def texture(rng: np.random.Generator) -> Drawing:
    """A material, by its weave."""
    name = pick(rng, ("brick", "weave", "polka", "herringbone", "marble", "wood", "tile", "corduroy"))
    y, x = np.mgrid[:DRAWN, :DRAWN].astype(np.float32)
    pitch, (sx, sy) = rng.uniform(16, 28), rng.uniform(0, 64, 2)
    x, y = x + sx, y + sy
    coarse = Image.fromarray(rng.normal(size=(7, 7)).astype(np.float32))
    cloud = np.asarray(coarse.resize((DRAWN, DRAWN), Image.Resampling.BICUBIC))
    row = np.floor(y / pitch)
    level = {
        "brick": np.where((y % pitch < 3) | ((x + row % 2 * pitch) % (2 * pitch) < 3), -1, 0.6),
        "weave": np.where((np.floor(x / pitch) + row) % 2 == 0, np.sin(x * 0.9), np.sin(y * 0.9)),
        "polka": np.where(np.hypot((x % pitch) - pitch / 2, (y % pitch) - pitch / 2) < pitch / 3.2, 1, -0.8),
        "herringbone": np.sin(2 * math.pi * (y + np.abs((x % (2 * pitch)) - pitch)) / (pitch / 1.6)),
        "marble": np.sin(x / pitch * 1.5 + 4 * cloud),
        "wood": np.sin(2 * math.pi * (x + 9 * cloud + 0.12 * y) / (pitch / 1.5)) * 0.6,
        "tile": np.where((x % pitch < 3) | (y % pitch < 3), -1, 0.5),
        "corduroy": np.sin(2 * math.pi * x / (pitch / 2)),
    }[name]
    image = toned(level + 0.15 * cloud, rng)
    return Drawing([finish(image, rng, noise=8)], "name the material", name)


def typeface(rng: np.random.Generator) -> Drawing:
    """Two capital letters set in one of six typefaces, dark on paper."""
    name = pick(rng, tuple(FONTS))
    paper = int(rng.integers(180, 250))
    image = Image.new("RGB", (DRAWN, DRAWN), (paper, paper, paper - 20))
    text = "".join(pick(rng, "ABDEGHKMNPRSTW") for _ in range(2))
    place = tuple(int(v) for v in rng.integers(54, 74, 2))
    ink = tuple(int(v) for v in rng.integers(0, 90, 3))
    ImageDraw.Draw(image).text(place, text, font=font(FONTS[name], int(rng.integers(52, 72))), anchor="mm", fill=ink)
    return Drawing([finish(image, rng)], "which typeface", name)


def tissue(rng: np.random.Generator) -> Drawing:
    """A stained section: few round nuclei, many small ones, one smooth mass, or large ragged ones."""
    name = pick(rng, ("healthy", "inflamed", "cyst", "carcinoma"))
    image = toned(rng.normal(0, 0.35, (DRAWN, DRAWN)), rng, (196, 130, 170), (246, 206, 226))
    draw = ImageDraw.Draw(image)
    count, low, high, ragged = {"healthy": (7, 6, 9, 0.08), "inflamed": (24, 4, 6, 0.1), "cyst": (6, 5, 8, 0.08),
                                "carcinoma": (10, 11, 18, 0.45)}[name]  # fmt: skip
    for _ in range(count):
        cx, cy = rng.uniform(8, DRAWN - 8, 2)
        radius = rng.uniform(low, high)
        ink = (int(rng.integers(70, 110)), int(rng.integers(30, 70)), int(rng.integers(110, 160)))
        angles = np.linspace(0, 2 * math.pi, 12, endpoint=False)
        reach = radius * (1 + ragged * rng.uniform(-1, 1, 12))
        draw.polygon([(cx + r * math.cos(a), cy + r * math.sin(a)) for a, r in zip(angles, reach, strict=True)], ink)
    if name == "cyst":
        cx, cy = rng.uniform(44, 84, 2)
        r = rng.uniform(26, 38)
        draw.ellipse((cx - r, cy - r, cx + r, cy + r), (238, 226, 240), outline=(150, 90, 150), width=4)
    return Drawing([finish(image, rng, noise=6, blur=1)], "grade the section", name)


def aerial(rng: np.random.Generator) -> Drawing:
    """Land from above with a road and one to three vehicles."""
    image = toned(rng.normal(0, 0.3, (DRAWN, DRAWN)), rng, (60, 80, 48), (128, 148, 96))
    draw = ImageDraw.Draw(image)
    at = rng.uniform(24, 104)
    road = (0, at - 18, DRAWN, at + 18) if rng.random() < 0.5 else (at - 18, 0, at + 18, DRAWN)
    draw.rectangle(road, (104, 104, 108))
    boxes, taken = [], []
    for _ in range(int(rng.integers(1, 4))):
        name = pick(rng, ("car", "truck"))
        long, wide = (19, 13) if name == "car" else (32, 15)
        hx, hy = (long, wide) if rng.random() < 0.5 else (wide, long)
        x, y = rng.uniform(hx + 2, DRAWN - hx - 2), rng.uniform(hy + 2, DRAWN - hy - 2)
        if any(abs(x - ox) < hx + ohx + 3 and abs(y - oy) < hy + ohy + 3 for ox, oy, ohx, ohy in taken):
            continue
        taken.append((x, y, hx, hy))
        paint = COLOURS[pick(rng, ("red", "white", "yellow", "cyan"))] if name == "car" else (236, 236, 226)
        draw.rectangle((x - hx, y - hy, x + hx, y + hy), paint, outline=(24, 24, 24), width=2)
        if name == "truck":
            front = (x - hx, y - hy, x - hx / 2, y + hy) if hx > hy else (x - hx, y - hy, x + hx, y - hy / 2)
            draw.rectangle(front, (200, 80, 40))
        boxes.append((name, tuple(v * SIZE / DRAWN for v in (x - hx, y - hy, x + hx, y + hy))))
    return Drawing([finish(image, rng, noise=6)], "survey the vehicles", "", tuple(boxes))


def radiograph(rng: np.random.Generator) -> Drawing:
    """Two dark lungs with none to two bright nodules."""
    image = Image.new("L", (DRAWN, DRAWN), int(rng.integers(120, 150)))
    draw = ImageDraw.Draw(image)
    for x0 in (10, 68):
        draw.ellipse((x0, 12, x0 + 50, 116), int(rng.integers(40, 60)))
    for y in range(20, 116, 16):
        draw.arc((6, y - 14, 122, y + 14), 200, 340, fill=96, width=3)
    boxes = []
    for x0 in (35, 93):
        if rng.random() < 0.55:
            r = rng.uniform(12, 17)
            x, y = x0 + rng.uniform(-6, 6), rng.uniform(36, 92)
            draw.ellipse((x - r, y - r, x + r, y + r), int(rng.integers(190, 240)))
            boxes.append(("nodule", tuple(v * SIZE / DRAWN for v in (x - r, y - r, x + r, y + r))))
    return Drawing([finish(image.convert("RGB"), rng, noise=7, blur=1.5)], "mark the nodules", "", tuple(boxes))


def chart(rng: np.random.Generator) -> Drawing:
    """A bar chart and a question that its bars answer."""
    image = Image.new("RGB", (DRAWN, DRAWN), (248, 248, 244))
    draw = ImageDraw.Draw(image)
    count = int(rng.integers(3, 6))
    names = [BARS[i] for i in rng.permutation(len(BARS))[:count]]
    heights = rng.permutation(np.linspace(22, 100, 6))[:count] + rng.uniform(-4, 4, count)
    wide = 104 / count
    for i, (name, height) in enumerate(zip(names, heights, strict=True)):
        draw.rectangle((14 + i * wide + 3, 116 - height, 14 + (i + 1) * wide - 3, 116), COLOURS[name])
    draw.line((12, 8, 12, 117, 124, 117), (20, 20, 20), 3)
    question, answer = pick(rng, (
        ("which bar leads", names[int(np.argmax(heights))]), ("which bar trails", names[int(np.argmin(heights))]),
        ("count the bars", str(count)), ("first bar", names[0]), ("last bar", names[-1]),
    ))  # fmt: skip
    return Drawing([finish(image, rng, noise=2)], question, answer)


def _solids(rng: np.random.Generator, count: int) -> tuple[Image.Image, list[Thing]]:
    """Shaded solids before a lit wall."""
    y = np.mgrid[:DRAWN, :DRAWN][0] / DRAWN
    image = toned(1 - 1.6 * y, rng, (96, 90, 84), (206, 202, 190))
    things = scatter(rng, count, tuple(SOLIDS), 13, 22)
    draw = ImageDraw.Draw(image)
    for thing in things:
        for part in range(4):
            tone = tuple(int(c * (0.55 + 0.15 * part)) for c in COLOURS[thing.colour])
            half = thing.half * (1 - 0.2 * part)
            draw_shape(draw, thing._replace(half=half, x=thing.x - 1.5 * part, y=thing.y - 1.5 * part), tone)
    return finish(image, rng, noise=5), things


def tally(rng: np.random.Generator) -> Drawing:
    """Solids on display, and a count or a yes or no."""
    image, things = _solids(rng, int(rng.integers(1, 5)))
    solid = pick(rng, tuple(SOLIDS))
    if rng.random() < 0.4:
        return Drawing([image], "items in stock", str(len(things)))
    if rng.random() < 0.5:
        return Drawing([image], f"any {SOLIDS[solid]} in stock", "yes" if any(t.shape == solid for t in things) else "no")
    return Drawing([image], f"units of {SOLIDS[solid]}", str(sum(t.shape == solid for t in things)))


def shelf(rng: np.random.Generator) -> Drawing:
    """Two solids, described from left to right."""
    image, things = _solids(rng, 2)
    names = [f"{t.colour} {SOLIDS[t.shape]}" for t in sorted(things, key=lambda t: t.x)]
    if len(things) < 2:
        return Drawing([image], "write the label", f"item on display {names[0]} alone")
    left, right = sorted(things, key=lambda t: t.x)
    height = "above" if left.y < right.y else "below"
    return Drawing([image], "write the label", f"items on display {names[0]} placed {height} {names[1]}")


def refer(rng: np.random.Generator) -> Drawing:
    """Solids, one of them meant by its side or its looks."""
    image, things = _solids(rng, int(rng.integers(2, 4)))
    left, right = min(things, key=lambda t: t.x), max(things, key=lambda t: t.x)
    largest = max(things, key=lambda t: t.half)
    looks = pick(rng, things)
    said, meant = pick(rng, (("leftmost item", left), ("rightmost item", right), ("largest item", largest),
                             (f"{looks.colour} {SOLIDS[looks.shape]}", looks)))  # fmt: skip
    return Drawing([image], f"point at {said}", corners_text(meant.box), (("object", meant.box),))


def drift(rng: np.random.Generator) -> Drawing:
    """Three frames of a bright cell that drifts, swells or shrinks in a noisy field."""
    name, (dx, dy, grow) = pick(rng, (
        ("westward", (-1, 0, 0)), ("eastward", (1, 0, 0)), ("northward", (0, -1, 0)), ("southward", (0, 1, 0)),
        ("swelling", (0, 0, 1)), ("shrinking", (0, 0, -1)),
    ))  # fmt: skip
    x, y = rng.uniform(50, 78, 2)
    half, step = rng.uniform(13, 18), rng.uniform(14, 24)
    frames = []
    for i in (-1, 0, 1):
        frame = toned(rng.normal(0, 0.5, (DRAWN, DRAWN)), rng, (4, 22, 12), (38, 84, 52))
        h = half * 1.6 ** (i * grow)
        cx, cy = x + i * dx * step, y + i * dy * step
        ImageDraw.Draw(frame).ellipse((cx - h, cy - h, cx + h, cy + h), (150, 240, 150))
        frames.append(finish(frame, rng, noise=9, blur=2))
    return Drawing(frames, "track the cell", name)


def gesture(rng: np.random.Generator) -> Drawing:
    """Three frames of a stick figure."""
    name = pick(rng, ("jumping", "waving", "kneeling", "walking", "turning"))
    x, y = rng.uniform(48, 80), rng.uniform(52, 60)
    scale, ground = rng.uniform(0.85, 1.15), tuple(int(v) for v in rng.integers(150, 220, 3))
    frames = []
    for i in range(3):
        frame = Image.new("RGB", (DRAWN, DRAWN), ground)
        up = 16 * (i == 1) if name == "jumping" else -13 * i if name == "kneeling" else 0
        move = 17 * (i - 1) if name == "walking" else 0
        arm = (-34 + 30 * (i % 2)) if name == "waving" else 18
        wide = (1.0, 0.35, -1.0)[i] if name == "turning" else 1.0
        cx, cy = x + move, y - up

        def at(dx, dy, cx=cx, cy=cy, wide=wide):
            return cx + dx * scale * wide, cy + dy * scale

        draw = ImageDraw.Draw(frame)
        leg = 14 if name != "walking" else (14, 3, -14)[i]
        knees = 1 - 0.45 * i if name == "kneeling" else 1
        for start, end in (((0, -20), (0, 14)), ((0, -10), (24, arm - 10)), ((0, -10), (-18, 8)),
                           ((0, 14), (leg, 14 + 34 * knees)), ((0, 14), (-leg, 14 + 34 * knees))):  # fmt: skip
            draw.line((*at(*start), *at(*end)), (30, 30, 40), 5)
        head = at(3, -29)
        draw.ellipse((head[0] - 9, head[1] - 9, head[0] + 9, head[1] + 9), (30, 30, 40))
        frames.append(finish(frame, rng))
    return Drawing(frames, "name the gesture", name)
