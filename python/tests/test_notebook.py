"""What notebooks show: tables that are HTML and say what the books say, and the page's views."""

from __future__ import annotations

import ast
import json
import os
import re
import time
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import torch

import dmi
from dmi.notebook import MOST_LINES, VIEWS, table
from observed import fresh_seed, model_of


class Reader(HTMLParser):
    """Cells and text of what is well formed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.lines: list[list[str]] = []
        self.text: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        self.tags.add(tag)
        if tag == "tr":
            self.lines.append([])
        if tag == "td":
            self.lines[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open:
            self.lines[-1][-1] += data


def test_tables_say_what_the_books_say(tmp_path: Path) -> None:
    fresh_seed()
    model = model_of("llama")
    with dmi.attach(model, ["blocks.*.hook_resid_post", "logits"], store=tmp_path / "s") as session, torch.no_grad():
        with session.record(labels={"topic": "<b>&'\"</b>"}) as run:
            model(torch.randint(3, 128, (2, 7)))
        session.flush()
        shown = Reader(session._repr_html_())
        assert {tuple(line) for line in shown.lines if line} == {
            (outcome, why, f"{rows:,}") for outcome, reasons in session.coverage()["outcomes"].items() for why, rows in reasons.items()
        }
        cache = session.cache()
        shown = Reader(cache._repr_html_())
        assert [line[0] for line in shown.lines if line] == cache.keys()
        assert [int(line[3].replace(",", "")) for line in shown.lines if line] == [site["rows"] for site in cache.sites]
        captured = cache.coverage()["outcomes"]["captured"]["full"]
        assert captured == 2 * 7 * 3 and f"rows: {captured} captured(full)" in shown.text
        shown = Reader(run._repr_html_())
        assert "<b>&" in "".join(shown.text)  # said, not obeyed
        assert [line[0] for line in shown.lines if line] == run.requests
    assert "detached" in "".join(Reader(session._repr_html_()).text)


def test_long_tables_are_cut() -> None:
    shown = Reader(table("<i>", {}, ("n",), [(n,) for n in range(MOST_LINES + 5)]))
    assert len([line for line in shown.lines if line]) == MOST_LINES and "and 5 more" in shown.text and "i" not in shown.tags


def test_the_pages_views(tmp_path: Path) -> None:
    model = model_of("llama")
    with dmi.attach(model, "blocks.0.hook_resid_post", store=tmp_path / "s") as session, torch.no_grad():
        model(torch.randint(3, 128, (1, 5)))
        session.flush()
        shown = dmi.view(session, "request", id=session.requests[0], height=300)
        html = shown._repr_html_()
        Reader(html)
        assert "height:300px" in html and shown.address.replace("&", "&amp;") in html
        parts = urlsplit(shown.address)
        view, _, asked = parts.fragment.partition("?")
        arguments = parse_qs(asked)
        assert view == "/request" and arguments["id"] == [session.requests[0]]
        ask = urllib.request.Request(f"http://{parts.netloc}/v1/requests", headers={"Authorization": f"Bearer {arguments['token'][0]}"})
        with urllib.request.urlopen(ask, timeout=120) as answer:
            assert [item["id"] for item in json.load(answer)["items"]] == list(session.requests)
        again = dmi.view(tmp_path / "s")
        assert urlsplit(again.address).netloc == parts.netloc  # one process a store
        with pytest.raises(ValueError, match="the page has now, requests"):
            dmi.view(session, "nothing")
        pid = shown._page.pid
        shown.close()
        for _ in range(1200):
            try:
                if os.waitpid(pid, os.WNOHANG) != (0, 0):
                    break
            except ChildProcessError:
                break
            time.sleep(0.1)
        else:
            pytest.fail("the page is served on")
        again.close()  # twice is no harm
    with pytest.raises(dmi.EngineError, match="serve the page of"):
        dmi.view(tmp_path / "nothing")


def test_views_are_the_pages() -> None:
    source = (Path(__file__).parents[2] / "web" / "src" / "Shell.tsx").read_text()
    assert tuple(re.findall(r"\{ name: '(\w+)', title:", source)) == VIEWS


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/tutorial.ipynb, a cell after the other as a kernel would: what a cell ends with is shown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fresh_seed()
    words = ["<unk>", "<s>", "</s>", "The", "capital", "of", "France", "is", *(f"w{n}" for n in range(120))]
    known = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=known, unk_token="<unk>", bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path / "model")
    model = model_of("llama")
    model.generation_config.eos_token_id = None  # it is random: it shall not stop early
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("DMI_TUTORIAL_MODEL", str(tmp_path / "model"))
    monkeypatch.chdir(tmp_path)
    book = json.loads((Path(__file__).parents[2] / "docs" / "tutorial.ipynb").read_text())
    space: dict[str, Any] = {}
    shown: list[object] = []
    for number, cell in enumerate(book["cells"]):
        if cell["cell_type"] != "code":
            continue
        body = ast.parse("".join(cell["source"]), f"cell {number}").body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        exec(compile(ast.Module(body, []), f"cell {number}", "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), space)
            shown.append(value)
            if hasattr(value, "_repr_html_"):
                Reader(value._repr_html_())
    layers = model.config.num_hidden_layers
    assert len(space["growth"]) == layers == len(space["lens"])
    assert len(space["heads"]) >= layers * model.config.num_attention_heads
    assert len(shown) == 8
