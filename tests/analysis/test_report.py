"""The report: one file that says what the results say, opened in a real browser where there is one."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from analysis.__main__ import main
from analysis.compare import summaries
from traces.record import summarize
from traces.result_files import write_results
from traces.result_tables import verdict

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Outline(HTMLParser):
    """Tags that stay open, images, headings, and every address in the page."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.images, self.addresses, self.headings, self.text = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        pairs = dict(attributes)
        self.addresses += [pairs[name] for name in ("src", "href") if name in pairs]
        if tag == "img":
            self.images.append(pairs)
        elif tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """Function: (inputs, options, whole) -> text of the page; with one figure, which is quicker, unless whole."""

    def write(*inputs, options=(), whole=False):
        if not whole:
            monkeypatch.setattr("analysis.report.possible", lambda inputs: ["policies"])
        path = tmp_path / "report.html"
        assert main(["report", *map(str, inputs), "--output", str(path), *options]) == 0
        return path.read_text()

    return write


def test_it_reads_top_to_bottom(report, results, sweep, capacity):
    page = Outline(report(results, sweep({"rate": [2.0, 4.0]}), capacity, whole=True))
    assert page.open == []
    question, *parts = page.headings
    assert question == "How should many LoRA adapters be served on llava-1.5-7b, and what does it cost?"
    assert parts == ["What was run", "The policies side by side", "Beside the paper's figure 14", "What holds p99_ttft<1s",
                     "Figures", "Caveats", "Where it comes from"]  # fmt: skip
    text = " ".join(" ".join(page.text).split())
    assert verdict(summaries([str(results)])) in text
    assert "valora has the lowest average token latency at 2 of 2 points of the sweep" in text
    assert "(figure 14) holds at 2 of 2 points." in text
    assert "valora on 4 GPUs with router affinity sustains 39.5 requests/s, 3.95 times 1 GPU." in text
    for caveat in ("no running engine measured", "time rescaled from 1 to 4 requests/s"):
        assert caveat in text
    assert "ab" * 32 in text
    assert len(page.images) == 7
    assert all(image["alt"] for image in page.images)


def test_it_needs_nothing_from_elsewhere(report, results):
    text = report(results)
    assert all(address.startswith("data:") for address in Outline(text).addresses)
    assert "<script" not in text
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_same_results_give_the_same_page(report, results):
    assert report(results) == report(results)


def test_a_load_is_answered_in_gpus(report, capacity, tmp_path):
    document = json.loads(capacity.read_text())
    document |= {"load": 36.0, "answers": document["answers"][1:2]}
    path = tmp_path / "load.json"
    path.write_text(json.dumps(document))
    text = " ".join(" ".join(Outline(report(path, whole=True)).text).split())
    assert "36 requests/s under p99_ttft<1s take 4 GPUs with valora." in text
    assert "GPUs for 36 requests/s" in text


def test_the_best_of_a_row_is_marked(report, results):
    text = report(results)
    row = re.search(r"<tr><td>Mean TTFT \(ms\)</td>(.*?)</tr>", text).group(1)
    assert row == '<td class="best">22.9</td><td>34.4</td>'


def test_what_files_say_cannot_become_markup(report, result, tmp_path):
    run = result("valora")
    run.config["notes"] = ["<script>alert(1)</script> & <b>"]
    place = write_results(tmp_path / "odd", [run], {"valora": summarize(run)}, ["<i>", "b", "c"])
    text = report(place, options=("--title", "What <about> this?"))
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;" in text
    assert "<h1>What &lt;about&gt; this?</h1>" in text


def test_unfinished_requests_are_a_caveat(report, result, tmp_path):
    run = result("valora")
    run.requests["status"] = np.where(np.arange(60) < 10, 1, 0)
    place = write_results(tmp_path / "aborted", [run], {"valora": summarize(run)}, ["a", "b", "c"])
    assert "valora completed 50 of 60 requests; its latencies count only those." in report(place)


@pytest.mark.parametrize(
    ("inputs", "output", "message"), [(["absent"], "r.html", "absent"), ([], "r.pdf", "name a .html file")]
)
def test_wrong_arguments(inputs, output, message, results, tmp_path, capsys):
    with pytest.raises(SystemExit) as code:
        main(["report", *(inputs or [str(results)]), "--output", str(tmp_path / output)])
    assert code.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / output).exists()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it_whole(report, results, sweep, capacity, tmp_path):
    """The verdict is on the page, every image has a size, and the console stays silent."""
    text = report(results, sweep({"rate": [2.0, 4.0]}), capacity, whole=True)
    # The page's own policy forbids scripts, so the images are counted by a copy that allows one.
    probe = (
        "<script>addEventListener('load', () => { const all = [...document.images]; document.body.dataset.seen = "
        "JSON.stringify({images: all.length, broken: all.filter(i => !i.complete || !i.naturalWidth).length, "
        "verdict: document.querySelector('.verdict').getBoundingClientRect().top, "
        "wide: document.documentElement.scrollWidth - innerWidth}); })</script></body>"
    )
    counted = tmp_path / "counted.html"
    counted.write_text(text.replace("style-src", "script-src 'unsafe-inline'; style-src").replace("</body>", probe))
    seen = browse(counted, tmp_path)
    found = json.loads(re.search(r'data-seen="([^"]*)"', seen.stdout).group(1).replace("&quot;", '"'))
    assert (found["images"], found["broken"]) == (7, 0)
    assert 0 < found["verdict"] < 600, "the verdict is on the first screen"
    assert found["wide"] <= 0, "nothing sticks out sideways"
    shown = browse(tmp_path / "report.html", tmp_path)
    assert verdict(summaries([str(results)])) in shown.stdout
    for run in (seen, shown):
        assert "CONSOLE" not in run.stderr, run.stderr


def browse(path, folder) -> subprocess.CompletedProcess:
    """The page's document after loading, and what Chromium logs (its console included) on stderr."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
               f"--user-data-dir={folder / 'profile'}", "--window-size=1100,900", "--virtual-time-budget=5000",
               "--dump-dom", path.as_uri()]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
