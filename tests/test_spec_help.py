"""specs/schema.json and --explain: fresh, complete, and as strict as loading a spec."""

import json
import tomllib
from pathlib import Path

import jsonschema
import msgspec
import pytest

from glovita_lib import spec_errors
from glovita_lib.errors import UserError
from glovita_lib.spec import load_spec
from glovita_lib.spec_help import (
    WIDTH,
    explain,
    field_docs,
    schema,
    schema_text,
    spec_text,
    struct_doc,
)
from glovita_lib.spec_root import Root

FOLDER = Path(__file__).parent.parent / "specs"
SPECS = sorted(FOLDER.glob("*.toml"))
ROOT = msgspec.inspect.type_info(Root)


@pytest.fixture(scope="module")
def validator():
    """An independent validator of the schema."""
    document = schema()
    jsonschema.Draft7Validator.check_schema(document)
    return jsonschema.Draft7Validator(document)


def every_struct(kind=ROOT, seen=None):
    """All Structs that a spec may hold."""
    seen = {} if seen is None else seen
    for member in spec_errors.structs(kind):
        if member.cls not in seen:
            seen[member.cls] = member
            for field in member.fields:
                every_struct(field.type, seen)
    return seen


def test_committed_schema_is_fresh():
    committed = (FOLDER / "schema.json").read_text()
    assert committed == schema_text() + "\n", "run: python glovita.py --schema > specs/schema.json"


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_committed_specs_are_valid_and_name_the_schema(validator, path):
    assert path.read_text().startswith("#:schema ./schema.json\n# What: ")
    assert list(validator.iter_errors(tomllib.loads(path.read_text()))) == []


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("sed = 1", "", "'sed' was unexpected"),
        ("[optimizer]\nlrr = 1", "optimizer", "'lrr' was unexpected"),
        ("[optimizer]\nlr = 0", "optimizer.lr", "0 is less than or equal to the minimum of 0"),
        ("[optimizer]\nbetas = [0.5]", "optimizer.betas", "too short"),
        ("[training]\nepochs = 'x'", "training.epochs", "'x' is not of type 'integer'"),
        ("[training]\nprecision = 'bf'", "training.precision", "'bf' is not one of"),
        ("[data]\ndataset = 'digit'", "data.dataset", "'digit' is not one of"),
        ("[data]\ndataset = 'digits'\nchannels = 1", "data", "'channels' was unexpected"),
        ("[data]\nval_fractio = 1", "data", "'val_fractio' was unexpected"),
        (
            "[model.encoder]\nencoder_type = 'torchvision'\nsmall_images = true",
            "model.encoder",
            "'small_images' was unexpected",
        ),
        ("[model.head]\nhead_type = 'custom'", "model.head", "'target' is a required property"),
        (
            "[data.augmentation.train_kwargs]\nhflip = 1",
            "data.augmentation.train_kwargs",
            "'hflip' was unexpected",
        ),
    ],
)
def test_a_mistake_is_one_error_at_its_key(validator, text, place, message):
    """Not an error of the union as a whole: the editor underlines what is wrong."""
    (error,) = validator.iter_errors(tomllib.loads(text))
    assert ".".join(map(str, error.absolute_path)) == place
    assert message in error.message


def test_file_that_extends_may_leave_the_tag_to_its_base(validator):
    text = "extends = 'a.toml'\n[data]\nsplit_source = 'kfold'\n[model.encoder]\ntype = 'vgg11'"
    assert list(validator.iter_errors(tomllib.loads(text))) == []
    text = "extends = 'a.toml'\n[model.head]\nhead_type = 'custom'"  # its target is in the base
    assert list(validator.iter_errors(tomllib.loads(text))) == []
    (error,) = validator.iter_errors(tomllib.loads("extends = 'a.toml'\n[data]\nsplit_surce = 1"))
    assert "'split_surce' was unexpected" in error.message


def test_every_field_has_description_default_and_docs():
    definitions = schema()["definitions"]
    for cls, member in every_struct().items():
        definition = definitions[cls.__name__]
        assert definition["description"] == struct_doc(cls)
        assert definition["additionalProperties"] is False
        for field in member.fields:
            stated = definition["properties"][field.name]
            assert stated["description"].startswith(field_docs(cls)[field.name])
            assert ("$VAR" in stated["description"]) == spec_errors.is_path(field.type)
            default = spec_errors.default_of(field)
            if not isinstance(default, msgspec.Struct) and default not in (None, msgspec.NODEFAULT):
                assert stated["default"] == json.loads(msgspec.json.encode(default))


# ---------------------------------------------------------------- --explain


def test_explain_every_key():
    for key in dict.fromkeys(spec_errors.all_keys(ROOT)):
        text = explain(key)
        assert key in text
        assert max(map(len, text.splitlines())) <= WIDTH


def test_explain_union_shows_choices_fields_defaults_and_docs():
    text = explain("model.encoder")
    assert '[model.encoder] encoder_type = "timm" (the default)' in text
    assert '[model.encoder] encoder_type = "torchvision"\n' in text
    assert "  pretrained: true or false; default true\n" in text
    assert "Whether the published weights are downloaded" in text


def test_explain_field_shows_bounds_default_and_unit():
    text = explain("training.early_stopping_patience")
    assert "a whole number >= 1; default none" in text
    assert "Epochs without a better metric" in text
    assert "must be given" in explain("data.target")


def test_help_says_which_metrics_are_computed_where_none_are_named():
    usual = "acc, f1 (multiclass); acc, f1 (multilabel); acc, f1, edit, f1_at_10, f1_at_25,"
    usual += " f1_at_50 (framewise); mse, mae, r2 (regression)"
    assert f"default none, which is {usual}" in " ".join(explain("task.metrics").split())
    stated = schema()["definitions"]["Supervised"]["properties"]["metrics"]["description"]
    assert stated == f"Metrics of every evaluation. None is {usual}."


def test_explain_says_with_which_switch_a_parameter_is_read():
    text = explain("data.augmentation.train_kwargs")
    assert (
        "rotate_degrees: a number >= 0 and <= 180; default none; read with rotate_p above 0\n"
        in text
    )
    assert "rotate_p: a number >= 0 and <= 1; default none\n" in text
    assert 'read with crop = "resized"' in explain("data.augmentation.test_kwargs.scale")


def test_explain_says_which_members_have_the_key():
    assert explain("model.encoder.small_images").startswith("with encoder_type=timm:\n")
    text = explain("data.download")
    assert text.startswith("with dataset=cifar10 or dataset=cifar100:\n")
    assert text.count("Whether a missing data set is downloaded.") == 1


def test_explain_root_lists_the_sections():
    text = explain("spec")
    assert all(f"\n  {field.name}: " in f"\n{text}" for field in ROOT.fields)


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("encoder", "did you mean model.encoder?"),
        ("optimizer.lrr", "did you mean optimizer.lr?"),
        ("", "the root"),
    ],
)
def test_explain_unknown_key(key, hint):
    with pytest.raises(UserError, match="no such key") as raised:
        explain(key)
    assert hint in str(raised.value)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- --print


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_print_loads_to_the_same_spec(path, tmp_path):
    loaded = load_spec(path, [], Root)
    (tmp_path / path.name).write_text(spec_text(loaded))
    again = load_spec(tmp_path / path.name, [], Root)
    assert (again.root, again.plain) == (loaded.root, loaded.plain)


def test_print_says_where_each_value_comes_from(tmp_path):
    (tmp_path / "base.toml").write_text(
        "seed = 5\n[model.encoder]\nmodel_kwargs = {a = 1, b = 2}\n[optimizer]\nlr = 0.5"
    )
    path = tmp_path / "own.toml"
    path.write_text(
        "extends = 'base.toml'\n[data]\nstratified = true\n[model.encoder.model_kwargs]\nb = 3\n"
        "[add_log]\nday = 2024-05-06\nlist = [{x = [1, 'a\"b']}]\n'a.b' = 'tab\\t'"
    )
    loaded = load_spec(path, ["optimizer.lr=0.25", "training.ema_decay=0.5"], Root)
    text = spec_text(loaded)
    lines = text.splitlines()
    base = f"  # from {tmp_path / 'base.toml'}"
    for line in (
        f"seed = 5{base}", 'mode = "train"  # default', 'dataset = "digits"  # default',
        "stratified = true", f"a = 1{base}", "b = 3", "lr = 0.25  # override",
        "ema_decay = 0.5  # override", "epochs = 20  # default", "day = 2024-05-06",
        "[data.augmentation.train_kwargs]", "# unset: entity, project, group, name",
    ):  # fmt: skip
        assert line in lines
    assert "# unset: name" in lines  # and not extends: what it names is in the text
    (tmp_path / "again.toml").write_text(text)
    assert load_spec(tmp_path / "again.toml", [], Root).root == loaded.root


def test_print_keeps_paths_as_they_are_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PLACE", "/there")
    (tmp_path / "a.toml").write_text("exp_dir = '$PLACE/runs'")
    loaded = load_spec(tmp_path / "a.toml", [], Root)
    assert loaded.root.exp_dir == "/there/runs"
    assert 'exp_dir = "$PLACE/runs"\n' in spec_text(loaded)
