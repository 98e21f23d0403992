"""Chats in every usual form become the text that the tokenizer's own template makes, and nothing is left out unsaid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from mc_cli.artifacts.files import DigestCache
from mc_cli.data.chat import ChatSettings, Renderer
from mc_cli.data.documents import Document, Reading, read_documents
from mc_cli.data.rendering import Limits
from mc_cli.data.text import TextSource, calibration_windows, load_tokenizer, report_warnings
from mc_cli.data.tokenizing import encode
from mc_cli.errors import InputError
from tests.tiny_models import tiny_tokenizer

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('system only first') }}{% endif %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call {{ c.function.name }} {{ c.function.arguments['q'] }}>{% endfor %}"
    "{% endfor %}{{ eos_token }}"
)
TURNS = [{"role": "user", "content": "hello cat"}, {"role": "assistant", "content": "the rain fell"}]
TEXT = "<s>[user]hello cat[assistant]the rain fell</s>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (made / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(folder)


def source_of(path: Path, **settings: Any) -> TextSource:
    return TextSource(str(path), "train", "text", ChatSettings(**settings))


def texts_of(source: TextSource, tokenizer: Any) -> list[str | None]:
    documents = source.documents(tokenizer)
    assert source.renderer is not None
    return [d.text if d.chat is None else source.renderer.text(d.chat) for d in documents]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "messages": ({"messages": TURNS}, TEXT),
    "conversations": (
        {"conversations": [{"from": "human", "value": "hello cat"}, {"from": "gpt", "value": "the rain fell"}]},
        TEXT,
    ),
    "conversations with roles": ({"conversations": TURNS}, TEXT),
    "texts of prompt and completion": ({"prompt": "hello cat", "completion": "the rain fell"}, TEXT),
    "turns of prompt and completion": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, TEXT),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hello "}, "cat"]}, TURNS[1]]}, TEXT),
    "the field named text": ({"text": TURNS}, TEXT),
    "system beside it": (
        {"system": "be kind", "conversations": TURNS},
        TEXT.replace("<s>", "<s>[system]be kind"),
    ),
    "many turns": ({"messages": TURNS * 2}, "<s>" + TEXT[3:-4] * 2 + "</s>"),
    "a call with arguments as text": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "find", "arguments": '{"q": "rain"}'}}],
                },
                {"role": "tool", "content": "wet"},
            ]
        },
        "<s>[assistant]<call find rain>[tool]wet</s>",
    ),
    "text before all": ({"messages": TURNS, "text": "as it is"}, "as it is"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row(form: str, folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    row, text = FORMS[form]
    assert texts_of(source_of(write(tmp_path / "rows.jsonl", [row])), tokenizer) == [text]


def test_tokens_are_those_of_the_tokenizer_itself_with_one_bos(tokenizer: Any, tmp_path: Path) -> None:
    source = source_of(write(tmp_path / "rows.jsonl", [{"messages": TURNS}]))
    documents = source.documents(tokenizer)
    (ids,) = encode(documents, tokenizer, source.renderer)
    assert ids == list(tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids.count(tokenizer.eos_token_id) == 1


def test_texts_begin_as_the_tokenizer_begins_them(folder: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = load_tokenizer(folder)
    assert encode([Document("cat")], tokenizer)[0][0] != tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    (ids,) = encode([Document("cat")], tokenizer)
    assert ids == [*tokenizer("cat")["input_ids"], tokenizer.eos_token_id] and ids[0] == tokenizer.bos_token_id
    assert encode([Document("cat " * 200_000)], tokenizer)[0].count(tokenizer.bos_token_id) == 1


def test_lists_in_json_files(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for content, texts in (
        ([{"messages": TURNS}, {"text": "two"}], [TEXT, "two"]),
        (["one", "two", " "], ["one", "two"]),
        ({"data": [{"conversations": TURNS}]}, [TEXT]),
        ({"version": 1, "data": ["one"]}, ["one"]),
    ):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert texts_of(source_of(path), tokenizer) == texts
        assert texts_of(source_of(tmp_path), tokenizer) == texts, "alone in a folder"
    for content, message in (({"rows": []}, "not a list of rows"), ([[1]], "row 1: not a JSON object"), (3, "a int")):
        path.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            read_documents(str(path), split="train", text_field="text")


def test_json_beside_other_files_of_a_folder_is_not_text(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [{"text": "one"}])
    (tmp_path / "settings.json").write_text('["not text"]', encoding="utf-8")
    assert read_documents(str(tmp_path), split="train", text_field="text") == [Document("one")]


def test_tables_give_every_row_all_names(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"messages": TURNS}, {"messages": [{**TURNS[0], "name": "ann"}, {"role": "assistant", "content": None}]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "rows.parquet", tmp_path / "saved"):
        source = source_of(path)
        documents = source.documents(tokenizer)
        assert texts_of(source, tokenizer) == [TEXT, "<s>[user]hello cat[assistant]</s>"]
        assert documents[0].chat is not None and "name" not in documents[0].chat.messages[0]


def test_without_a_template_the_way_out_is_named(tmp_path: Path) -> None:
    plain = load_tokenizer(tiny_tokenizer(tmp_path / "plain"))
    path = write(tmp_path / "rows.jsonl", [{"messages": TURNS}])
    with pytest.raises(InputError, match=r"rows\.jsonl, line 1: .*has none.*--chat-template FILE.*--no-chat-template"):
        texts_of(source_of(path), plain)
    assert texts_of(source_of(path, plain=True), plain) == ["hello cat\nthe rain fell\n"]
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}|{% endfor %}", encoding="utf-8")
    assert texts_of(source_of(path, template=str(template)), plain) == ["hello cat|the rain fell|"]
    with pytest.raises(InputError, match="--chat-template other: no such file, and no template of this name"):
        texts_of(source_of(path, template="other"), plain)


def test_templates_by_name(tmp_path: Path) -> None:
    made = tiny_tokenizer(tmp_path / "named")
    (made / "chat_template.jinja").write_text("{% for m in messages %}d{% endfor %}", encoding="utf-8")
    (made / "additional_chat_templates").mkdir()
    named = made / "additional_chat_templates" / "tool_use.jinja"
    named.write_text("{% for m in messages %}t{% endfor %}", encoding="utf-8")
    tokenizer = load_tokenizer(made)
    path = write(tmp_path / "rows.jsonl", [{"messages": TURNS}, {"messages": TURNS, "tools": [{"type": "function"}]}])
    assert texts_of(source_of(path), tokenizer) == ["dd", "tt"]
    assert texts_of(source_of(path, template="tool_use"), tokenizer) == ["tt", "tt"]
    with pytest.raises(InputError, match="the tokenizer has 'default', 'tool_use'"):
        texts_of(source_of(path, template="rag"), tokenizer)


def test_rows_that_the_template_refuses_are_counted_and_told(tokenizer: Any, tmp_path: Path) -> None:
    bad = {"messages": [*TURNS, {"role": "system", "content": "late"}]}
    source = source_of(write(tmp_path / "rows.jsonl", [{"messages": TURNS * 9}, bad, {"text": "plain"}]))
    windows = calibration_windows(
        source.documents(tokenizer), tokenizer, sequences=2, length=8, seed=0, renderer=source.renderer
    )
    assert (windows.rows, windows.length) == (2, 8)
    report = source.report()
    assert report is not None and report["rows"] == {"chat: messages": 2, "field text": 1}
    assert (report["chats_rendered"], report["chats_refused"]) == (1, 1)
    (warning,) = report_warnings(report)
    assert "refuses 1 of 2 rows" in warning and "line 2: TemplateError: system only first" in warning
    source = source_of(write(tmp_path / "rows.jsonl", [bad]))
    with pytest.raises(InputError, match="refuses all 1 rows"):
        calibration_windows(
            source.documents(tokenizer), tokenizer, sequences=2, length=8, seed=0, renderer=source.renderer
        )


def test_first_field_with_a_text_is_taken_and_told(tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"id": "x1", "n": 3, "body": "one", "note": "no"}, {"id": "x2", "body": "two"}]
    source = source_of(write(tmp_path / "rows.jsonl", rows))
    assert texts_of(source, tokenizer) == ["one", "two"]
    report = source.report()
    assert report is not None and report["rows"] == {"first text field: body": 2}
    assert "'body'" in report_warnings(report)[0]
    write(tmp_path / "rows.jsonl", [*rows, {"note": "three"}])
    with pytest.raises(InputError, match=r"line 3: no field 'text'.*it has 'note'.*--text-field"):
        source_of(tmp_path / "rows.jsonl").documents(tokenizer)
    reading = Reading()
    read_documents(str(write(tmp_path / "rows.jsonl", [{"text": "a"}])), split="", text_field="text", reading=reading)
    assert reading.plain, "nothing is reported of rows that have their text where it was asked for"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hello"}, "messages is 'hello', not a list of turns"),
        ({"messages": []}, "messages holds no turn"),
        ({"messages": ["hello"]}, r"messages\[0\] is 'hello', not a turn"),
        ({"messages": [{"content": "x"}]}, r"messages\[0\] has the role None"),
        ({"messages": [{"role": 3, "content": "x"}]}, "has the role 3"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "has the content {'a': 1}"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only parts of text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a character"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "tool_calls 3"),
        ({"messages": TURNS, "tools": "{"}, "tools are a text that is not JSON"),
        ({"conversations": [{"from": "martian", "value": "x"}]}, "from 'martian'"),
        ({"prompt": 3, "completion": "x"}, "prompt is 3, not a list of turns"),
    ],
)
def test_rows_that_are_no_chats_are_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"messages": TURNS}, row])
    with pytest.raises(InputError, match=message) as raised:
        read_documents(str(path), split="train", text_field="text")
    assert f"{path}, line 2" in str(raised.value)


def test_digest_counts_the_template_only_where_it_is_not_the_default(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"text": "one"}])
    template = tmp_path / "t.jinja"
    cache = DigestCache(tmp_path / "digests.json")
    found = [source_of(path).digest(cache)]
    for content in ("a", "b"):
        template.write_text(content, encoding="utf-8")
        found.append(source_of(path, template=str(template)).digest(cache))
    found += [source_of(path, plain=True).digest(cache), source_of(path, template="tool_use").digest(cache)]
    assert len(set(found)) == 5


def test_renderer_says_which_template_it_took(tokenizer: Any) -> None:
    assert Renderer(tokenizer).name() == "the tokenizer's own"
    assert Renderer(tokenizer, ChatSettings(template="x")).name() == "x"
    assert Renderer(tokenizer, ChatSettings(plain=True)).name() == "none: the turns' texts"


HOSTILE = {
    "a long text": ("{{ 'x' * 10 ** 10 }}", "of memory"),
    "a text that grows": (
        "{% set n = namespace(x='x' * 1000) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "of memory",
    ),
    "a width": ("{{ '%999999999d' | format(1) }}", "of memory"),
    "loops in loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}",
        "than 1 seconds",
    ),
    "a power of powers": ("{{ (messages | length + 8) ** (10 ** 8) > 0 }}", "than 1 seconds"),
    "a text longer than chats": ("{{ 'x' * (2 * 10 ** 6) }}", "a text of 2,000,000 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_takes_all_time_or_memory_is_refused(
    name: str, folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    template, said = HOSTILE[name]
    (tmp_path / "hostile.jinja").write_text(template, encoding="utf-8")
    source = source_of(write(tmp_path / "rows.jsonl", [{"messages": TURNS}]), template=str(tmp_path / "hostile.jinja"))
    chat = source.documents(tokenizer)[0].chat
    assert chat is not None
    limits = Limits(seconds=1.0, memory_bytes=100 << 20)
    with pytest.raises(InputError, match=f"line 1: --chat-template .*hostile.jinja .*{said}.*--no-chat-template"):
        Renderer(tokenizer, source.chat, limits=limits).text(chat)


def test_a_template_that_adds_much_to_every_row_is_refused(folder: Path, tmp_path: Path) -> None:
    own = load_tokenizer(folder)
    own.chat_template = "{{ 'x' * (9 * 10 ** 5) }}"
    source = source_of(write(tmp_path / "rows.jsonl", [{"messages": TURNS}] * 80))
    with pytest.raises(InputError, match=r"line 7\d: the chat template of .*tokenizer_config.json\) makes texts of"):
        texts_of(source, own)


def test_a_long_row_is_rendered(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hello cat " * 10**5}, TURNS[1]]
    (found,) = texts_of(source_of(write(tmp_path / "rows.jsonl", [{"messages": turns}])), tokenizer)
    assert found is not None and len(found) > 10**6
