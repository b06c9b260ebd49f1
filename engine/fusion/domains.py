"""Domains to pack: a YAML file that names them, their data on this disk, their metric and their accuracy floor.

    domains:
      - name: digits
        task: classify            # classify, detect, vqa, caption, refer, video
        data: digits/rows.jsonl   # or the folder of a saved Hugging Face dataset; relative to this file
        floor: {relative: 0.9}    # of the domain's own adapter; or an absolute number
        metric: top1              # optional, as are head (true: a vision task head answers) and question

A row of the JSONL holds image (a path beside the data), or frames (several, in order); question; answer (text, or a list of
accepted texts); label; boxes ([{"label": ..., "box": [x1, y1, x2, y2] in pixels}]); split (train, decide, heldout; without
it the images' names decide, so that one image never lies in two splits). `pseudo_labels` names a second JSONL of the same
shape with a `confidence` a row, whose rows take the training split's place.

Everything is checked before anything is used. Nothing is fetched, no code of a dataset runs, and no path leads out of the
YAML's folder. It does not open images (`engine.images` does) and knows no model.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.fusion.metrics import BY_TASK, Box
from traces.suggest import near

TASKS = tuple(BY_TASK)
SPLITS = ("train", "decide", "heldout")
SHARES = (0.6, 0.8, 1.0)
"""Upper ends of the three splits where rows name none."""
HEAD_TASKS = ("classify", "detect", "video")
"""Tasks whose answers are a bounded set: a vision task head answers them unless the domain says `head: false`."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MAX_YAML_BYTES, MAX_LINE_BYTES = 1 << 20, 1 << 20
MAX_DOMAINS, MAX_ROWS, MAX_FRAMES, MAX_BOXES, MAX_ANSWERS, MAX_CHARACTERS = 256, 1_000_000, 16, 100, 20, 2_000
DOMAIN_KEYS = ("name", "task", "data", "metric", "floor", "head", "question", "pseudo_labels", "min_confidence")
ROW_KEYS = ("id", "image", "frames", "question", "answer", "label", "boxes", "split", "confidence")
QUESTIONS = {
    "classify": "what is shown", "detect": "find all objects", "caption": "describe the image", "video": "what happens",
}  # fmt: skip


class DomainError(ValueError):
    """Bad input. The message names the file, the row, the key and the value, and the way out."""


@dataclass(frozen=True, slots=True)
class Example:
    """images: paths, one, or a video's frames in order. answers: accepted texts, the first is trained on (a label is one).

    boxes: corners in pixels of the first image; `engine.fusion.workbench` scales them.
    """

    images: tuple[Path, ...]
    question: str
    answers: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()


@dataclass(frozen=True)
class Domain:
    """A domain: what it asks, how it is judged, and its examples by split.

    floor: in the metric's unit where absolute; a share of the own adapter's accuracy where `relative`.
    labels: the answers, or the boxes' labels, of all its splits, sorted; what a head tells apart.
    """

    name: str
    task: str
    metric: str
    floor: float
    relative: bool
    head: bool
    examples: Mapping[str, tuple[Example, ...]]
    labels: tuple[str, ...]

    @property
    def boxed(self) -> bool:
        """True where the answer is boxes."""
        return self.task in ("detect", "refer")


def load_domains(path: str | Path) -> tuple[Domain, ...]:
    """The domains of a YAML file with all their rows. DomainError says what is wrong where."""
    import yaml

    path = Path(path)
    try:
        raw = path.read_bytes()
        if len(raw) > MAX_YAML_BYTES:
            raise DomainError(f"{path}: {len(raw)} bytes; at most {MAX_YAML_BYTES}")
        content = yaml.safe_load(raw.decode("utf-8"))
    except OSError as error:
        raise DomainError(f"{path}: cannot be read ({error.strerror}); `python -m engine fuse demo` makes one") from None
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise DomainError(f"{path}: is not YAML ({' '.join(str(error).split())[:200]})") from None
    _keys(f"{path}", content, ("domains",))
    listed = content.get("domains")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_DOMAINS:
        raise DomainError(f"{path}: `domains` must be a list of 1..{MAX_DOMAINS} domains")
    domains = tuple(_domain(f"{path}: domain {number}", item, path.parent) for number, item in enumerate(listed, 1))
    names = [domain.name for domain in domains]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DomainError(f"{path}: the name {twice!r} stands twice; give each domain its own")
    return domains


def _keys(where: str, value: object, known: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise DomainError(f"{where}: expected the keys {', '.join(known)}, found {type(value).__name__}")
    for key in value:
        if key not in known:
            raise DomainError(f"{where}: unknown key {key!r}{near(str(key), known)}; known are {', '.join(known)}")


def _domain(where: str, item: object, root: Path) -> Domain:
    _keys(where, item, DOMAIN_KEYS)
    name, task = item.get("name"), item.get("task")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise DomainError(f"{where}: name {name!r}: letters, digits and ._-, up to 64 (an id, never a path)")
    where = f"{where} ({name})"
    if task not in TASKS:
        raise DomainError(f"{where}: task {task!r}{near(str(task), TASKS)}; one of {', '.join(TASKS)}")
    metric = item.get("metric", BY_TASK[task][0])
    if metric not in BY_TASK[task]:
        raise DomainError(f"{where}: metric {metric!r} does not fit {task}; there are {', '.join(BY_TASK[task])}")
    head = item.get("head", task in HEAD_TASKS)
    if not isinstance(head, bool) or (head and task not in (*HEAD_TASKS, "refer")):
        raise DomainError(f"{where}: head {head!r}: true or false, and true only for bounded answers (not {task})")
    floor, relative = _floor(where, item.get("floor"))
    question = _text(where, "question", item.get("question", QUESTIONS.get(task, "")))
    examples = _split(where, _rows(where, item.get("data"), root, task, question))
    if "pseudo_labels" in item:
        least = _number(where, "min_confidence", item.get("min_confidence", 0.5), 0.0, 1.0)
        rows = _rows(f"{where}: pseudo_labels", item["pseudo_labels"], root, task, question)
        kept = tuple(example for example, _, confidence in rows if confidence >= least)
        tested = {image for split in SPLITS[1:] for example in examples[split] for image in example.images}
        examples["train"] = tuple(example for example in kept if not tested & set(example.images))
    elif "min_confidence" in item:
        raise DomainError(f"{where}: min_confidence without pseudo_labels means nothing; remove it")
    for split in SPLITS:
        if not examples[split]:
            raise DomainError(f"{where}: no row in the split {split!r}; add rows, or leave `split` out of all of them")
    every = [example for split in SPLITS for example in examples[split]]
    labels = {b.label for e in every for b in e.boxes} if task in ("detect", "refer") else {e.answers[0] for e in every}
    return Domain(name, task, metric, floor, relative, head, examples, tuple(sorted(labels)))


def _floor(where: str, value: object) -> tuple[float, bool]:
    if isinstance(value, dict):
        _keys(f"{where}: floor", value, ("relative",))
        return _number(where, "floor: relative", value.get("relative"), 0.0, 1.0), True
    if value is None:
        raise DomainError(f"{where}: floor is missing; a number, or {{relative: 0.9}} of the domain's own adapter")
    return _number(where, "floor", value, 0.0, 10.0), False


def _number(where: str, key: str, value: object, low: float, high: float) -> float:
    if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
        raise DomainError(f"{where}: {key} {value!r} is not a number in {low:g}..{high:g}")
    return float(value)


def _text(where: str, key: str, value: object) -> str:
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        raise DomainError(f"{where}: {key} {str(value)[:60]!r} is not a text of up to {MAX_CHARACTERS} characters")
    return value


# -- rows ------------------------------------------------------------------------------------------------------------------
def inside(where: str, root: Path, given: object) -> Path:
    """`given` below `root`, resolved. DomainError for URLs, other types, and paths or links that lead out of `root`."""
    if not isinstance(given, str) or not given or "\0" in given:
        raise DomainError(f"{where}: {given!r} is not a path")
    if "://" in given:
        raise DomainError(f"{where}: {given!r} is a URL; nothing is fetched, name a file beside the YAML")
    return _below(where, root.resolve(), root / given, given)


def _below(where: str, root: Path, path: Path, given: str) -> Path:
    """`path`, which was given as `given`, resolved. root: resolved, which for tens of thousands of images is done once."""
    full = path.resolve()
    if not full.is_relative_to(root):
        raise DomainError(f"{where}: {given!r} leads out of {root}; put the data below the YAML's folder")
    return full


def _rows(where: str, given: object, root: Path, task: str, question: str) -> list[tuple[Example, str | None, float]]:
    path = inside(f"{where}: data", root, given)
    if path.is_dir():
        from engine.fusion.saved_datasets import rows_of_folder

        base, rows = path, rows_of_folder(path, root)
    else:
        base, rows = path.parent, _jsonl(path)
    result, root = [], root.resolve()
    for number, row in rows:
        if len(result) >= MAX_ROWS:
            raise DomainError(f"{path}: more than {MAX_ROWS} rows; split the domain")
        result.append(_row(f"{path}: row {number}", row, root, base, task, question))
    return result


def _jsonl(path: Path) -> Iterator[tuple[int, object]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DomainError(f"{path}: row {number}: longer than {MAX_LINE_BYTES} bytes")
                if line.strip():
                    yield number, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except OSError as error:
        raise DomainError(f"{path}: cannot be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DomainError(f"{path}: row {number}: is not JSON ({error})") from None


def _row(where: str, row: object, root: Path, base: Path, task: str, question: str) -> tuple[Example, str | None, float]:
    _keys(where, row, ROW_KEYS)
    frames = row.get("frames", [row["image"]] if "image" in row else None)
    if not isinstance(frames, list) or not 1 <= len(frames) <= MAX_FRAMES or ("image" in row and "frames" in row):
        raise DomainError(f"{where}: give either image, or frames with 1..{MAX_FRAMES} paths")
    images = tuple(_image(f"{where}: image", root, base, frame) for frame in frames)
    split = row.get("split")
    if split not in (None, *SPLITS):
        raise DomainError(f"{where}: split {split!r}{near(str(split), SPLITS)}; one of {', '.join(SPLITS)}")
    confidence = _number(where, "confidence", row.get("confidence", 1.0), 0.0, 1.0)
    asked = _text(where, "question", row.get("question", question))
    if task == "refer" and not asked:
        raise DomainError(f"{where}: question is missing; a referring expression names what to find")
    boxes = _boxes(where, row.get("boxes", []))
    if task in ("detect", "refer"):
        if "boxes" not in row or (task == "refer" and len(boxes) != 1):
            raise DomainError(f"{where}: boxes: {len(boxes)} given; detect needs the key, refer exactly one box")
        return Example(images, asked, (), boxes), split, confidence
    return Example(images, asked, _answers(where, row)), split, confidence


def _image(where: str, root: Path, base: Path, frame: object) -> Path:
    """A path of a row, which counts from the folder of its file. root, base: resolved, the one above the other."""
    if not isinstance(frame, str) or not frame or "\0" in frame or "://" in frame:
        return inside(where, root, frame)  # which says what is wrong with it
    return _below(where, root, base / frame, frame)


def _answers(where: str, row: Mapping) -> tuple[str, ...]:
    given = row.get("answer", row.get("label"))
    listed = given if isinstance(given, list) else [given]
    if not 1 <= len(listed) <= MAX_ANSWERS or not all(isinstance(a, str | int) and str(a).strip() for a in listed):
        raise DomainError(f"{where}: answer {given!r}: a text, or 1..{MAX_ANSWERS} accepted texts (or a label)")
    return tuple(_text(where, "answer", str(answer)) for answer in listed)


def _boxes(where: str, given: object) -> tuple[Box, ...]:
    if not isinstance(given, list) or len(given) > MAX_BOXES:
        raise DomainError(f"{where}: boxes must be a list of up to {MAX_BOXES}")
    boxes = []
    for number, item in enumerate(given):
        _keys(f"{where}: box {number}", item, ("label", "box"))
        corners = item.get("box")
        if not isinstance(corners, list) or len(corners) != 4:
            raise DomainError(f"{where}: box {number}: {corners!r} is not [x1, y1, x2, y2] in pixels")
        x1, y1, x2, y2 = (_number(f"{where}: box {number}", "corner", c, 0.0, 1e6) for c in corners)
        if x2 <= x1 or y2 <= y1:
            raise DomainError(f"{where}: box {number}: {corners!r} is empty; expected x1 < x2 and y1 < y2")
        boxes.append(Box(_text(where, "label", item.get("label", "object")), x1, y1, x2, y2))
    return tuple(boxes)


def _split(where: str, rows: list[tuple[Example, str | None, float]]) -> dict[str, tuple[Example, ...]]:
    """Rows by split. An image in two splits is an error: what is held out must not have been seen."""
    parts: dict[str, list[Example]] = {split: [] for split in SPLITS}
    place: dict[Path, str] = {}
    for example, given, _ in rows:
        split = given
        if split is None:
            drawn = int.from_bytes(hashlib.sha256(example.images[0].name.encode()).digest()[:4], "big") / 2**32
            split = next(name for name, share in zip(SPLITS, SHARES, strict=True) if drawn < share)
        for image in example.images:
            if place.setdefault(image, split) != split:
                raise DomainError(f"{where}: {image.name} is in the splits {place[image]!r} and {split!r}; keep it in one")
        parts[split].append(example)
    return {split: tuple(examples) for split, examples in parts.items()}
