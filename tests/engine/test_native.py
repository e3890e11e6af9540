"""Building the optional library, and what loads it."""

import shutil

import pytest

from engine import native
from engine.errors import UserError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where no library is yet."""
    monkeypatch.setattr(native, "FOLDER", tmp_path / "native")
    native.library.cache_clear()
    yield tmp_path / "native"
    native.library.cache_clear()


def test_nothing_is_compiled_unasked(folder):
    assert native.library() is None and native.version() is None and not folder.exists()


def test_without_a_compiler_a_line_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\): install g\+\+"):
        native.build()


def test_a_compiler_that_fails_is_named_and_leaves_nothing(folder, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(UserError, match="false does not make the library"):
        native.build()
    assert list(folder.iterdir()) == []


def test_a_library_that_does_not_load_is_named(folder):
    folder.mkdir()
    native.library_path().write_text("no library")
    with pytest.raises(UserError, match=r"pooled_norm-.*\.so cannot be loaded .*python -m models\.native"):
        native.library()


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_a_library_of_another_source_is_not_loaded(tmp_path, monkeypatch):
    source = tmp_path / "a.cpp"
    source.write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(native, "SOURCE", source)
    built = native.build()
    assert native.library().one() == 1 and native.version() == built.stem
    source.write_text('extern "C" int one() { return 2; }\n')
    native.library.cache_clear()
    assert native.library() is None


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_the_reason_of_a_failure_is_one_line(tmp_path, monkeypatch):
    source = tmp_path / "a.cpp"
    source.write_text('extern "C" int one() { return two; }\n')
    monkeypatch.setattr(native, "SOURCE", source)
    with pytest.raises(UserError, match="two") as error:
        native.build()
    assert "\n" not in str(error.value)
