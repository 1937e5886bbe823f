"""Configs: JSON and back, Python files, command lines, and what is said of mistakes."""

import collections
import dataclasses
import importlib.util
import json
import math
import os
import sys

import pytest

from jaxlab.config import (
    differences,
    from_json,
    load,
    names,
    parse_cli,
    to_json,
    updated,
)
from jaxlab.evolution.integer import IntegerEGGROLL, integer_model
from jaxlab.mixers import attention, delta_product, lact, mom
from jaxlab.models import perceptron
from jaxlab.optimizers import AdamW

# In a module of jaxlab's name, so that they are saved as its own classes are.
SOURCE = """
import dataclasses, os

@dataclasses.dataclass(frozen=True)
class Delta:
    width: int
    n_householders: int = 1
    forget_gate: bool = True

@dataclasses.dataclass(frozen=True)
class Attention:
    width: int
    window: int | None = None

@dataclasses.dataclass(frozen=True)
class Model:
    width: int = 8
    pattern: tuple[Delta | Attention, ...] = ()
    tie: bool = False

@dataclasses.dataclass(frozen=True)
class Run:
    model: Model = Model()
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    warm_start: Delta | Attention | None = None
    name: str = "run"
    counted: int = dataclasses.field(default=0)

class Plain:
    def __init__(self, x=1): self.x = x
"""


@pytest.fixture
def example(monkeypatch, tmp_path_factory):
    file = tmp_path_factory.mktemp("jaxlab") / "example_configs.py"
    file.write_text(SOURCE)  # tyro reads the source for the texts of --help
    spec = importlib.util.spec_from_file_location("jaxlab.example_configs", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def full(example):
    pattern = (example.Delta(8, n_householders=2), example.Attention(8, window=4))
    return example.Run(
        model=example.Model(pattern=(*pattern, example.Delta(9, forget_gate=False))),
        learning_rate=0.1 + 0.2,
        betas=(math.inf, -0.0),
        warm_start=example.Attention(4),
        name='quotes " and ü',
        counted=2**60,
    )


# JSON


def test_round_trip_is_exact(example):
    for config in (full(example), example.Run()):
        data = json.loads(json.dumps(to_json(config)))
        back = from_json(data)
        assert back == config and repr(back) == repr(config)  # repr tells -0.0, types
        assert hash(back) == hash(config)


def test_the_json_of_a_config(example):
    data = to_json(full(example))
    assert data["type"] == "Run"
    assert data["model"]["pattern"][1] == {
        "type": "Attention",
        "width": 8,
        "window": 4,
    }


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), 1j, {1}])
def test_values_that_json_would_change_are_refused(example, value):
    config = example.Run(model=example.Model(pattern=(value,)))
    with pytest.raises(TypeError, match=r"config\.model\.pattern\.0 is "):
        to_json(config)


def test_classes_that_could_not_be_found_again_are_refused(example):
    @dataclasses.dataclass(frozen=True)
    class Local:
        x: int = 1

    with pytest.raises(TypeError, match="warm_start cannot be saved: .*Local is"):
        to_json(example.Run(warm_start=Local()))
    with pytest.raises(TypeError, match="A config is a dataclass"):
        to_json({"a": 1})


@pytest.mark.parametrize("name", ["this.Config", "os.system", "jaxlabs.Config", "Runn"])
def test_no_module_is_imported_for_a_saved_name(name):
    with pytest.raises(ValueError, match=f"names {name}|has no {name}"):
        from_json({"type": name})
    assert "this" not in sys.modules


@pytest.mark.parametrize("name", ["", None, 3])
def test_a_type_is_a_name(name):
    with pytest.raises(ValueError, match="names|object with a type"):
        from_json({"type": name})


@pytest.mark.parametrize("name", ["Plain", "os", "dataclasses", "__dict__", "Gone"])
def test_only_dataclasses_are_made(example, name):
    with pytest.raises(ValueError, match=f"This version of jaxlab has no .*{name}"):
        from_json({"type": f"jaxlab.example_configs.{name}"})


def test_a_near_name_is_said():
    with pytest.raises(ValueError, match="has no AdmW.*the nearest is 'AdamW'"):
        from_json({"type": "AdmW"})


# Names


def test_the_path_of_an_earlier_version_is_an_alias():
    for path, cls in {
        "jaxlab.mixers.delta_product.Config": delta_product.Config,
        "jaxlab.somewhere.else.delta_product.Config": delta_product.Config,
        "jaxlab.mixers.lact.Config": lact.Config,
        "jaxlab.mixers.mom.Config": mom.Config,
        "jaxlab.evolution.integer_model.Config": integer_model.Config,
        "jaxlab.evolution.integer.IntegerEGGROLL": IntegerEGGROLL,
        "jaxlab.evolution.policy.Config": perceptron.Config,
        "jaxlab.optimizers.adamw.AdamW": AdamW,
        "delta_product.Config": delta_product.Config,
        "AdamW": AdamW,
    }.items():
        assert names.find(path) is cls
    assert names.tag(delta_product.Config) == "delta_product.Config"


def test_a_renamed_class_keeps_its_former_name(monkeypatch):
    monkeypatch.setitem(names.RENAMED, "Adam", "AdamW")
    assert names.find("jaxlab.optimizers.adam.Adam") is AdamW


def test_every_class_has_a_name_of_its_own():
    tags = collections.Counter(map(names.tag, names.classes_of_jaxlab()))
    assert tags["AdamW"] == tags["gla.Config"] == tags["TrainConfig"] == 1
    assert [name for name, count in tags.items() if count > 1] == []


def test_a_class_of_somebody_else_is_found_where_it_is_loaded(tmp_path):
    file = tmp_path / "my_mixer.py"
    file.write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n    width: int = 3\n"
        "config = Config()\n"
    )
    data = to_json(load(file))
    assert data == {"type": "my_mixer.Config", "width": 3}
    assert from_json(data).width == 3
    del sys.modules["config_file_my_mixer"]
    with pytest.raises(ValueError, match="my_mixer.Config.*import its file first"):
        from_json(data)


def test_a_class_of_somebody_else_does_not_hide_ours(tmp_path):
    file = tmp_path / "gla.py"
    file.write_text(
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Config:\n    width: int = 3\n"
        "config = Config()\n"
    )
    with pytest.raises(TypeError, match="gla.Config is the name of a class of jaxlab"):
        to_json(load(file))


def test_an_updated_config_has_present_names_and_new_fields():
    old = {"type": "jaxlab.optimizers.adamw.AdamW", "learning_rate": 0.5}
    assert updated(old) == to_json(AdamW(learning_rate=0.5))
    assert updated({"type": "gone.Config"}) == {"type": "gone.Config"}


def test_a_missing_field_takes_its_default(example):
    """A config saved before the field was added."""
    data = to_json(full(example))
    mixer = data["model"]["pattern"][0]
    del mixer["n_householders"]
    restored = from_json(data).model.pattern[0]
    assert restored == example.Delta(8)
    del mixer["width"]
    with pytest.raises(ValueError, match="Delta needs the field 'width'"):
        from_json(data)


def test_field_names_must_be_right(example):
    data = to_json(full(example))
    data["learning_rat"] = data.pop("learning_rate")
    with pytest.raises(
        ValueError, match="'learning_rat'; the nearest is 'learning_rate"
    ):
        from_json(data)


# Differences


def test_differences_name_the_fields(example):
    a = to_json(full(example))
    b = json.loads(json.dumps(a))
    assert differences(a, b) == []
    b["model"]["width"] = 16
    b["model"]["pattern"][0]["n_householders"] = 3
    b["warm_start"] = None
    del b["name"]
    b["new"] = True
    assert differences(a, b, ("in the checkpoint", "now")) == [
        "model.width: 8 in the checkpoint, 16 now",
        "model.pattern.0.n_householders: 2 in the checkpoint, 3 now",
        "warm_start: Attention in the checkpoint, None now",
        "name: 'quotes \" and ü' in the checkpoint, absent now",
        "new: absent in the checkpoint, True now",
    ]


@pytest.mark.parametrize(
    "a, b, n",
    [
        (1, True, 1),
        (1, 1.0, 1),
        (0.0, 0.0, 0),
        (math.nan, math.nan, 0),
        ([1, 2], (1, 2), 0),
        ([1], [1, 2], 1),
        ([], {}, 1),
    ],
)
def test_differences_of_values(a, b, n):
    assert len(differences({"x": a}, {"x": b})) == n


# Files


def test_load(example, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from jaxlab.example_configs import Model, Run\n"
        "width = 32\n"
        "config = Run(model=Model(width=width))\n"
    )
    assert load(file) == example.Run(model=example.Model(width=32))
    assert load(str(file)).model.width == 32


def test_a_file_may_define_its_own_dataclass(tmp_path):
    (tmp_path / "own.py").write_text(
        "from __future__ import annotations\n"
        "import dataclasses\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Run:\n    width: int = 3\n"
        "config = Run()\n"
    )
    assert load(tmp_path / "own.py").width == 3


def test_a_missing_file_lists_those_beside_it(tmp_path):
    for name in ("tiny.py", "small.py", "notes.txt", "__init__.py"):
        (tmp_path / name).write_text("")
    with pytest.raises(FileNotFoundError) as error:
        load(tmp_path / "tyni.py")
    assert "holds small.py, tiny.py. Did you mean tiny.py?" in str(error.value)
    with pytest.raises(FileNotFoundError, match="no directory .*gone"):
        load(tmp_path / "gone" / "tiny.py")


def test_a_file_without_a_config(tmp_path):
    file = tmp_path / "bad.py"
    for text, message in [
        ("confg = 3", "defines no `config`"),
        ("config = 3", "must be a dataclass"),
        ("class config: pass", "must be a dataclass"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(file)
    (tmp_path / "tiny.json").write_text("{}")
    with pytest.raises(ValueError, match="ends in .py"):
        load(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    "call, field, nearest, line",
    [
        ("e.Run(\n    learning_rate=1.0,\n    modle=None,\n)", "modle", "model", 5),
        ("e.Run(model=e.Model(widht=3))", "widht", "width", 3),
        ("e.Run(model=e.Model(\n  pattern=(e.Delta(8, householders=2),)))",
         "householders", "n_householders", 4),
        ("replace(e.Run(), naem='x')", "naem", "name", 3),
        ("replace(base, naem='x')", "naem", "name", 3),
    ],
)  # fmt: skip
def test_a_misspelt_field_is_named(example, tmp_path, call, field, nearest, line):
    file = tmp_path / "tiny.py"
    file.write_text(
        "import jaxlab.example_configs as e; from dataclasses import replace\n"
        f"base = e.Run()\nconfig = {call}\n"
    )
    with pytest.raises(ValueError) as error:
        load(file)
    assert f"{file}, line {line}: jaxlab.example_configs." in str(error.value)
    assert f"has no field {field!r}; the nearest is {nearest!r}." in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    (
        (b"x = 1\nconfig = len(3)", "line 2: TypeError: .* has no len"),
        (b"config = sorted([], kee=3)", "line 1: TypeError: .*kee"),
        (b"config = (1 /\n0)", "line 1: ZeroDivisionError: division by zero"),
        (b"\n\nimport nowhere", "line 3: ModuleNotFoundError: .*nowhere"),
        (b"x = 1\ndef f(:\n", "line 2: invalid syntax"),
        (b"\x80\x00\xff", "line .*(utf-8|null bytes)"),
        (b"def f():\n  raise ValueError('Too wide.')\nf()", "line 2: Too wide."),
    ),
)
def test_an_error_of_a_file_has_its_line(text, message, tmp_path):
    file = tmp_path / "bad.py"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=f"bad.py, {message}") as error:
        load(file)
    assert error.value.__cause__ is not None


# Command lines


@pytest.fixture
def tiny(example, tmp_path):
    file = tmp_path / "tiny.py"
    file.write_text(
        "from jaxlab.example_configs import Attention, Delta, Model, Run\n"
        "config = Run(model=Model(pattern=(Delta(8), Attention(8, window=4))))\n"
    )
    return str(file)


def test_without_overrides_the_config_is_the_files(tiny):
    assert parse_cli([tiny]) == load(tiny)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ("--model.width 64", lambda c: c.model.width == 64),
        ("--model.pattern.0.n-householders 2",
         lambda c: c.model.pattern[0].n_householders == 2),
        ("--model.pattern.0.no-forget-gate",
         lambda c: c.model.pattern[0].forget_gate is False),
        ("--model.pattern.1.window None", lambda c: c.model.pattern[1].window is None),
        ("--model.tie --name x", lambda c: c.model.tie and c.name == "x"),
        ("--betas 0.8 0.95", lambda c: c.betas == (0.8, 0.95)),
        ("--learning-rate 3e-4", lambda c: c.learning_rate == 3e-4),
    ],
)  # fmt: skip
def test_overrides(tiny, arguments, expected):
    config = parse_cli([tiny, *arguments.split()])
    assert expected(config)
    # Nothing else changed.
    changed = differences(to_json(load(tiny)), to_json(config))
    assert 1 <= len(changed) <= 2 and type(config) is type(load(tiny))


def test_classes_of_one_name_from_several_modules(tmp_path):
    file = tmp_path / "hybrid.py"
    file.write_text(
        "from jaxlab.mixers import attention, delta_product\n"
        "from jaxlab.models import LMConfig\n"
        "config = LMConfig(width=64, n_layers=6, pattern=(\n"
        "  attention.Config(64), delta_product.Config(64), attention.Config(64)))\n"
    )
    arguments = "--pattern.0.window 16 --pattern.1.n-householders 3 --pattern.2.qk-norm"
    config = parse_cli([str(file), *arguments.split()])
    assert config.pattern == (
        attention.Config(64, window=16),
        delta_product.Config(64, n_householders=3),
        attention.Config(64, qk_norm=True),
    )
    assert from_json(to_json(config)) == config


@pytest.fixture
def hybrid(tmp_path):
    file = tmp_path / "hybrid.py"
    file.write_text(
        "from jaxlab.mixers import attention, delta_product\n"
        "from jaxlab.models import LMConfig\n"
        "config = LMConfig(width=192, n_layers=2, pattern=(\n"
        "  attention.Config(192), delta_product.Config(192)))\n"
    )
    return str(file)


def test_layers_are_checked_with_the_width_of_their_model(hybrid):
    """190 fits neither the heads of the file nor those of the options by itself."""
    heads = "--pattern.0.n-heads 5 --pattern.1.n-heads 10"
    config = parse_cli([hybrid, "--width", "190", *heads.split()])
    assert config.pattern == (
        attention.Config(190, n_heads=5),
        delta_product.Config(190, n_heads=10),
    )
    assert config.feedforward.width == 190
    assert parse_cli([hybrid]) == load(hybrid)


def test_heads_that_do_not_fit_the_width_are_named(hybrid, capsys):
    arguments = "--width 190 --pattern.0.n-heads 5"
    with pytest.raises(SystemExit) as ended:
        parse_cli([hybrid, *arguments.split()])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.replace("│", "").split())
    assert "pattern.1: width=190 is not divisible by n_heads=4;" in said


def test_a_field_that_its_model_sets_is_no_option(hybrid, tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli([hybrid, "--pattern.0.width", "7"])
    assert ended.value.code == 2
    with pytest.raises(SystemExit):
        parse_cli([hybrid, "--help"])
    said = capsys.readouterr().out
    assert "--width" in said and "--pattern.1.n-heads" in said
    assert "--pattern.1.width" not in said and "--feedforward.width" not in said
    # A model that leaves its layers their own width offers it.
    widths = "--model.width 9 --model.pattern.0.width 7"
    model = parse_cli([tiny, *widths.split()]).model
    assert (model.width, model.pattern[0].width) == (9, 7)


def test_what_is_set_from_further_out(tmp_path):
    file = tmp_path / "nested.py"
    file.write_text(
        "import dataclasses\n"
        "def sized(x, outer):\n"
        "    return dataclasses.replace(x, width=outer.width)\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Inner:\n"
        "    width: int = 4\n"
        "    heads: int = 2\n"
        "    def __post_init__(self):\n"
        "        if self.width % self.heads: raise ValueError('heads')\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Middle:\n"
        "    width: int = 4\n"
        "    inner: Inner = Inner()\n"
        "    def __post_init__(self):\n"
        "        object.__setattr__(self, 'inner', sized(self.inner, self))\n"
        "@dataclasses.dataclass(frozen=True)\n"
        "class Outer:\n"
        "    width: int = 4\n"
        "    middle: Middle = Middle()\n"
        "    def __post_init__(self):\n"
        "        object.__setattr__(self, 'middle', sized(self.middle, self))\n"
        "config = Outer()\n"
    )
    config = parse_cli([str(file), "--width", "9", "--middle.inner.heads", "3"])
    assert config.middle.inner.width == 9 and config.middle.inner.heads == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--model.widht 64", "--model.width"),
        ("--model.pattern.0.n-housholders 2", "--model.pattern.0.n-householders"),
        ("--model.width many", "many"),
    ],
)
def test_a_wrong_option_ends_with_code_2(tiny, capsys, arguments, said):
    with pytest.raises(SystemExit) as ended:
        parse_cli([tiny, *arguments.split()])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_wrong_file_ends_with_code_2(tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli([tiny.replace("tiny", "tyni"), "--model.width", "64"])
    assert ended.value.code == 2
    assert "Did you mean tiny.py?" in capsys.readouterr().err


@pytest.mark.parametrize("argv, code", [([], 2), (["--model.width"], 2), (["-h"], 0)])
def test_without_a_file_the_usage_is_printed(capsys, argv, code):
    with pytest.raises(SystemExit) as ended:
        parse_cli(argv)
    assert ended.value.code == code
    printed = capsys.readouterr()
    assert "CONFIG.py [--field value ...]" in (printed.err if code else printed.out)


def test_help_lists_the_fields(tiny, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_cli([tiny, "--help"])
    assert ended.value.code == 0
    assert "--model.pattern.1.window" in capsys.readouterr().out


@pytest.mark.parametrize("with_file", [True, False])
def test_help_begins_with_the_programs_own_options(tiny, capsys, with_file):
    with pytest.raises(SystemExit):
        parse_cli([*([tiny] if with_file else []), "--help"], "Or --resume it.")
    assert "Or --resume it." in capsys.readouterr().out


def test_help_into_a_closed_pipe(tiny, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit) as ended:
            parse_cli([tiny, "--help"])
    assert ended.value.code == 0
