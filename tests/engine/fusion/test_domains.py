"""Domain files: what is read, and that everything wrong is refused with its place and the way out."""

from __future__ import annotations

import json

import pytest

yaml = pytest.importorskip("yaml")

from engine.fusion.domains import SPLITS, DomainError, load_domains  # noqa: E402


def world(tmp_path, rows, **changes):
    """A YAML with one domain of these rows."""
    (tmp_path / "a").mkdir(exist_ok=True)
    (tmp_path / "a" / "rows.jsonl").write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    domain = {"name": "a", "task": "classify", "data": "a/rows.jsonl", "floor": {"relative": 0.9}} | changes
    domain = {key: value for key, value in domain.items() if value is not None}
    (tmp_path / "domains.yaml").write_text(yaml.safe_dump({"domains": [domain]}))
    return tmp_path / "domains.yaml"


def rows_of(**fields):
    return [{"image": f"{split}{i}.png", "split": split} | fields for split in SPLITS for i in range(2)]


def refused(tmp_path, match, rows=None, **changes):
    with pytest.raises(DomainError, match=match):
        load_domains(world(tmp_path, rows if rows is not None else rows_of(label="x"), **changes))


def test_a_domain_is_read(tmp_path):
    (domain,) = load_domains(world(tmp_path, rows_of(label="x", question="which")))
    assert (domain.metric, domain.floor, domain.relative, domain.head, domain.labels) == ("top1", 0.9, True, True, ("x",))
    example = domain.examples["heldout"][1]
    assert (example.question, example.answers) == ("which", ("x",))
    assert example.images == ((tmp_path / "a" / "heldout1.png").resolve(),)


def test_boxes_answers_frames_and_numbers(tmp_path):
    box = {"label": "car", "box": [1, 2, 3, 4.5]}
    (detect,) = load_domains(world(tmp_path, rows_of(boxes=[box]), task="detect", metric="map50", floor=0.4))
    assert detect.examples["train"][0].boxes[0][:5] == ("car", 1, 2, 3, 4.5)
    assert (detect.floor, detect.relative, detect.labels) == (0.4, False, ("car",))
    (vqa,) = load_domains(world(tmp_path, rows_of(question="how many", answer=["2", 3]), task="vqa"))
    assert (vqa.examples["train"][0].answers, vqa.head) == (("2", "3"), False)
    clips = [{"frames": [f"{s}{i}.png" for i in range(3)], "label": "up", "split": s} for s in SPLITS]
    (video,) = load_domains(world(tmp_path, clips, task="video", head=False))
    assert (len(video.examples["train"][0].images), video.head) == (3, False)


def test_without_splits_names_decide_and_an_image_lies_in_one(tmp_path):
    rows = [{"image": f"{i // 2}.png", "label": str(i % 3)} for i in range(400)]
    (domain,) = load_domains(world(tmp_path, rows))
    sizes = [len(domain.examples[split]) for split in SPLITS]
    assert sum(sizes) == 400
    assert 200 < sizes[0] < 280
    seen = [{image for e in domain.examples[split] for image in e.images} for split in SPLITS]
    assert not seen[0] & seen[1] | seen[1] & seen[2] | seen[0] & seen[2]


def test_pseudo_labels_take_the_training_splits_place(tmp_path):
    path = world(tmp_path, rows_of(label="x"), pseudo_labels="a/pseudo.jsonl", min_confidence=0.7)
    made = [{"image": f"new{i}.png", "label": "x", "confidence": i / 10} for i in range(11)]
    made.append({"image": "heldout0.png", "label": "x", "confidence": 1})
    (tmp_path / "a" / "pseudo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (domain,) = load_domains(path)
    assert [e.images[0].name for e in domain.examples["train"]] == ["new7.png", "new8.png", "new9.png", "new10.png"]
    assert len(domain.examples["heldout"]) == 2


def test_a_saved_dataset_folder_is_read(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (tmp_path / "hub").mkdir()
    for split in ("train", "validation", "test"):
        images = [{"bytes": f"{split}{i}".encode(), "path": None} for i in range(3)]
        pq.write_table(pa.table({"image": images, "label": ["x", "y", "x"]}), tmp_path / "hub" / f"{split}-00000.parquet")
    path = world(tmp_path, [], data="hub")
    (domain,) = load_domains(path)
    assert {split: len(domain.examples[split]) for split in SPLITS} == {"train": 3, "decide": 3, "heldout": 3}
    assert domain.examples["decide"][1].images[0].read_bytes() == b"validation1"
    assert load_domains(path)[0] == domain, "a second time nothing changes"


def test_rows_that_are_wrong(tmp_path):
    good = rows_of(label="x")
    for row, match in (
        ('{"image": "a.png"\n', "row 7: is not JSON"),
        ({"image": "a.png", "lable": "x"}, r"row 7: unknown key 'lable' \(did you mean 'label'\?\)"),
        ({"label": "x"}, "give either image, or frames"),
        ({"image": "a.png", "frames": ["b.png"], "label": "x"}, "give either image, or frames"),
        ({"frames": ["a.png"] * 17, "label": "x"}, r"1\.\.16 paths"),
        ({"image": "https://x/a.png", "label": "x"}, "is a URL; nothing is fetched"),
        ({"image": "../../a.png", "label": "x"}, "leads out of"),
        ({"image": "/etc/passwd", "label": "x"}, "leads out of"),
        ({"image": "a.png"}, "answer None"),
        ({"image": "a.png", "answer": []}, "1..20 accepted texts"),
        ({"image": "a.png", "label": "x", "split": "test"}, "split 'test'"),
        ({"image": "train0.png", "label": "x", "split": "heldout"}, "in the splits 'train' and 'heldout'; keep it in one"),
        ({"image": "a.png", "label": "x", "confidence": 1e309}, "confidence inf is not a number in 0..1"),
        ({"image": "a.png", "label": "x" * 3000}, "up to 2000 characters"),
        ('"text"\n', "expected the keys"),
        ('{"image": "a.png", "label": "' + "x" * (1 << 20) + '"}\n', "longer than 1048576 bytes"),
    ):
        refused(tmp_path, match, [*good, row])


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"x")
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "link.png").symlink_to(outside)
    refused(tmp_path / "in", "leads out of", [*rows_of(label="x"), {"image": "link.png", "label": "x"}])


def test_boxes_that_are_wrong(tmp_path):
    for boxes, match in (
        ([{"box": [1, 2, 1, 4]}], r"is empty; expected x1 < x2"), ([{"box": [1, 2, 3]}], r"is not \[x1, y1, x2, y2\]"),
        ([{"box": [1, 2, 3, float("nan")]}], "corner nan"), ([{"box": [-1, 2, 3, 4]}], "corner -1"), ("x", "must be a list"),
        ([{"box": [0, 0, 1, 1], "lbl": "x"}], "unknown key 'lbl'"), ([{"box": [0, 0, 1, 1]}] * 101, "up to 100"),
    ):  # fmt: skip
        refused(tmp_path, match, [*rows_of(boxes=[]), {"image": "a.png", "boxes": boxes}], task="detect")
    refused(tmp_path, "refer exactly one box", rows_of(boxes=[], question="the car"), task="refer")
    refused(tmp_path, "names what to find", rows_of(boxes=[{"box": [0, 0, 1, 1]}]), task="refer")


def test_domains_that_are_wrong(tmp_path):
    refused(tmp_path, "name '../x': letters", name="../x")
    refused(tmp_path, r"task 'detct' \(did you mean 'detect'\?\)", task="detct")
    refused(tmp_path, "metric 'cider' does not fit classify; there are top1", metric="cider")
    refused(tmp_path, "floor is missing", floor=None)
    refused(tmp_path, "floor 'high' is not a number", floor="high")
    refused(tmp_path, "floor True is not a number", floor=True)
    refused(tmp_path, r"relative 1.5 is not a number in 0..1", floor={"relative": 1.5})
    refused(tmp_path, r"unknown key 'realtive' \(did you mean 'relative'\?\)", floor={"realtive": 0.5})
    refused(tmp_path, "true only for bounded answers", task="vqa", head=True)
    refused(tmp_path, "unknown key 'min_confidenc'", min_confidenc=1)
    refused(tmp_path, "min_confidence without pseudo_labels", min_confidence=0.5)
    refused(tmp_path, "no row in the split 'decide'", [r for r in rows_of(label="x") if r["split"] != "decide"])
    refused(tmp_path, "cannot be read", data="a/none.jsonl")
    refused(tmp_path, "leads out of", data="../rows.jsonl")
    refused(tmp_path, "holds no .parquet or .arrow", data="a")


@pytest.mark.parametrize(("text", "match"), [
    ("domains: [", "is not YAML"), ("[1, 2]", "expected the keys domains"), ("domains: 3", "must be a list"),
    ("domans: []", "unknown key 'domans'"), ("domains: []", r"1\.\.256"), ("!!python/object:os.system x", "is not YAML"),
])  # fmt: skip
def test_yaml_that_is_wrong(tmp_path, text, match):
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(DomainError, match=match):
        load_domains(tmp_path / "d.yaml")


def test_names_must_differ(tmp_path):
    path = world(tmp_path, rows_of(label="x"))
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({"domains": content["domains"] * 2}))
    with pytest.raises(DomainError, match="the name 'a' stands twice"):
        load_domains(path)
    with pytest.raises(DomainError, match="cannot be read"):
        load_domains(tmp_path / "none.yaml")


@pytest.fixture
def digest(tmp_path):
    """digest() -> of a model with 64 numbers and of one domain about six images, as they lie below `tmp_path`."""
    workbench = pytest.importorskip("engine.fusion.workbench", exc_type=ImportError)
    rows = [row | {"label": "x"} for row in rows_of()]
    yaml = world(tmp_path, rows)
    for number, row in enumerate(rows):
        (tmp_path / "a" / row["image"]).write_bytes(bytes([number]) * 300)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    (tmp_path / "base" / "model.safetensors").write_bytes(bytes(1 << 20))
    return lambda: workbench.digest_of(tmp_path / "base", load_domains(yaml))


def changed(path, at):
    """Turn one bit of a file, whose name and size stay."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["base/model.safetensors", "base/config.json", "a/heldout1.png", "a/train0.png"])
def test_results_of_another_model_or_other_images_of_the_same_names_and_sizes_are_others(tmp_path, digest, file):
    before = digest()
    (tmp_path / "base" / "README.md").write_text("what it is")
    assert digest() == before
    changed(tmp_path / file, (tmp_path / file).stat().st_size // 3)
    assert digest() != before
    changed(tmp_path / file, (tmp_path / file).stat().st_size // 3)
    assert digest() == before


def test_images_that_change_places_are_other_data(tmp_path, digest):
    before = digest()
    first, second = (tmp_path / "a" / f"train{i}.png" for i in range(2))
    content = first.read_bytes(), second.read_bytes()
    first.write_bytes(content[1]), second.write_bytes(content[0])
    assert digest() != before


def test_an_image_that_cannot_be_read_is_named(tmp_path, digest):
    (tmp_path / "a" / "decide1.png").unlink()
    with pytest.raises(DomainError, match=r"decide1.png: cannot be read \(No such file"):
        digest()
