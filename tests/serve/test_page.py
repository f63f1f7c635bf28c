import base64
import hashlib
import re
from html.parser import HTMLParser

from dsv3.serve.page import chat_page, content_security_policy

VOID = {"meta", "link", "input"}


class Reader(HTMLParser):
    """Checks that tags close in the order they open, and gathers ids, addresses and inline handlers."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses, self.references, self.handlers = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "action"):
                self.addresses.append(value)
            if name in ("for", "aria-controls"):
                self.references.append(value)
            if name.startswith("on") or name == "style":
                self.handlers.append(name)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def read_page() -> Reader:
    reader = Reader()
    reader.feed(chat_page())
    assert reader.open == []
    return reader


def test_the_page_is_one_document_that_needs_nothing_from_outside():
    page = chat_page()
    assert all(address.startswith("data:") for address in read_page().addresses)
    assert not re.search(r"url\(|@import|\bimport\s|src=", page)
    assert "{{" not in page
    assert len(page) < 60_000


def test_ids_are_unique_and_labels_lead_to_their_fields():
    reader = read_page()
    assert len(reader.ids) == len(set(reader.ids))
    assert set(reader.references) <= set(reader.ids)
    used = set(re.findall(r'part\("([^"]+)"\)', chat_page()))
    assert used <= set(reader.ids)


def test_nothing_in_the_page_turns_text_into_markup():
    script = re.search(r"<script[^>]*>(.*)</script>", chat_page(), flags=re.DOTALL).group(1)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", script)
    assert read_page().handlers == []


def test_the_policy_names_script_and_style_by_the_hash_of_what_stands_between_their_tags():
    policy = dict(part.split(" ", 1) for part in content_security_policy().split("; "))
    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", chat_page(), flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in content_security_policy()
