"""Loading specs: errors, extends, overrides, group names, and writing them back."""

import tomllib
import typing
from pathlib import Path

import msgspec
import pytest

from glovita_lib import spec, spec_errors
from glovita_lib.errors import UserError
from glovita_lib.spec import Merge, changed_keys, dump, load_spec, override
from glovita_lib.spec_data import CustomData, DigitsData, GenericImageData
from glovita_lib.spec_encoders import TimmEncoder, TorchvisionEncoder
from glovita_lib.spec_model import RegressionHead
from glovita_lib.spec_root import Root
from glovita_lib.spec_samples import BaseData

SPECS = sorted((Path(__file__).parent.parent / "specs").glob("*.toml"))


@pytest.fixture
def write(tmp_path):
    """Write a spec file and return its path."""

    def write_spec(text, name="spec.toml"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_spec


@pytest.fixture
def root(write):
    """The root Struct of a spec text with overrides."""
    return lambda text="", *overrides: load_spec(write(text), overrides, Root).root


@pytest.fixture
def errors(write):
    """The lines of the error of a spec text with overrides, without the file name."""

    def error_lines(text="", *overrides):
        path = write(text)
        with pytest.raises(UserError) as raised:
            load_spec(path, overrides, Root)
        lines = str(raised.value).splitlines()
        assert all(line.startswith(f"{path}: ") for line in lines)
        return [line.removeprefix(f"{path}: ") for line in lines]

    return error_lines


def every_struct(kind=None, seen=None):
    """All Structs that a spec may hold."""
    seen = {} if seen is None else seen
    for member in spec_errors.structs(kind or msgspec.inspect.type_info(Root)):
        if member.cls not in seen:
            seen[member.cls] = member
            for field in member.fields:
                every_struct(field.type, seen)
    return seen


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[optimizer]\nlearning_rat = 1", ["optimizer.learning_rat: unknown key", "valid here:"]),
        ("[optimizer]\nmomentun = 1", ['did you mean "momentum"?']),
        ("[training]\nlr = 1", ["training.lr: unknown key", "did you mean optimizer.lr?"]),
        ("[optimiser]\nlr = 1", ["optimiser: unknown key", 'did you mean "optimizer"?']),
        ("[training]\nepochs = 'ten'", ['"ten" is not valid', "a whole number >= 1"]),
        ("[training]\nepochs = '10'", ["write 10 without quotes"]),
        ("[training]\nepochs = 10.0", ["10.0 is not valid", "write 10"]),
        ("[training]\nepochs = 0", ["0 is not valid", "a whole number >= 1"]),
        ("[training]\nepochs = true", ["true is not valid"]),
        ("[training]\ncompile = 1", ["1 is not valid: it must be true or false"]),
        (
            '[peft]\nmethod = "lora"\nrank_pattern = { "blocks.0" = 0 }',
            ["rank_pattern.blocks.0: 0 is not valid: it must be a whole number >= 1"],
        ),
        ("[training]\nprecision = 'bf_16'", ['"auto", "bf16"', 'did you mean "bf16"?']),
        ("training = 3", ["training: 3 is not valid: it must be a table"]),
        ("seed = [1]", ["seed: [1] is not valid"]),
        ("[optimizer]\nlr = nan", ["nan is not valid"]),
        ("[optimizer]\nlr = inf", ["inf is not valid"]),
        ("[optimizer]\nbetas = [0.9]", ["an array of 2, each a number >= 0 and < 1"]),
        ("[optimizer]\nbetas = [0.9, 1.5]", ["optimizer.betas[1]: 1.5 is not valid"]),
        ("[task]\nmetrics = ['acc', 'auroc_']", ["task.metrics[1]", 'did you mean "auroc"?']),
        ("[task]\nmetrics = 'acc'", ['write ["acc"]']),
        ("[task]\nclass_weights = 'balance'", ['did you mean "balanced"?']),
        ("[data]\ndataset = 'digit'", ["data.dataset", 'did you mean "digits"?', '"cifar10"']),
        ("[data]\ndataset = 3", ["data.dataset: 3 is unknown"]),
        ("[data]\ndataset = 'custom'", ["data.target: missing: it must be a string"]),
        (
            "[data]\ndataset = 'generic_image_dataset'\nchannels = 2",
            ["data.channels: 2 is not valid: it must be 1, 3 or 4"],
        ),
        (
            "[data.augmentation]\ntrain_kwargs = { jitter = [0.1, 0.1, 0.1, 0.6] }",
            ["data.augmentation.train_kwargs.jitter[3]: 0.6 is not valid", "<= 0.5"],
        ),
        (
            "[data.augmentation]\ntrain_kwargs = { scale = [0.9, 1.1] }",
            ["data.augmentation.train_kwargs.scale[1]: 1.1 is not valid", "<= 1"],
        ),
        (
            "[data.augmentation]\ntrain_kwargs = { resize = 'size' }",
            ["data.augmentation.train_kwargs.resize", '"resize_size"'],
        ),
        (
            "[model.encoder]\nencoder_type = 'torchvision'\nsmall_images = true",
            ['small_images belongs to encoder_type = "timm"'],
        ),
        ("extends = 3", ["extends: 3 is not valid: it must be a string"]),
    ],
)
def test_a_mistake_is_one_line_with_key_and_remedy(errors, text, parts):
    lines = errors(text)
    assert len(lines) == 1, lines
    for part in parts:
        assert part in lines[0]


def test_all_mistakes_are_shown_at_once(errors):
    lines = errors(
        "sed = 1\n[training]\nepochs = 0\n[data]\ndataset = 'x'\n[optimizer]\nlr = 'a'",
        "training.log_every=0",
        "nonsense",
    )
    keys = [line.partition(": ")[0] for line in lines]
    assert keys == [
        "--override nonsense",
        "sed",
        "training.epochs",
        "--override training.log_every",
        "data.dataset",
        "optimizer.lr",
    ]


def test_syntax_error_names_file_and_line(errors):
    assert errors("seed = 1\nname = = 2")[0].startswith("line 2: not TOML: ")


def test_missing_file_names_its_neighbour(write, tmp_path):
    write("", "digits.toml")
    with pytest.raises(UserError, match=r"no such spec file; did you mean .*digits\.toml\?"):
        load_spec(tmp_path / "digit.toml", [], Root)
    with pytest.raises(UserError, match="there is no folder"):
        load_spec(tmp_path / "nowhere" / "digits.toml", [], Root)
    with pytest.raises(UserError, match="cannot be read"):
        load_spec(tmp_path, [], Root)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "a.toml"
    path.write_bytes(b"name = '\xff\xfe'")
    with pytest.raises(UserError, match="not UTF-8 text"):
        load_spec(path, [], Root)
    path.write_bytes(b"\xef\xbb\xbfseed = 4")  # a byte order mark is no mistake
    assert load_spec(path, [], Root).root.seed == 4


def test_bounds_that_only_msgspec_knows_are_user_errors(write):
    class Named(spec.Spec):
        """A Struct with a kind of bound that the walk does not read."""

        name: typing.Annotated[str, msgspec.Meta(min_length=2)] = "ab"

    with pytest.raises(UserError, match="length"):
        load_spec(write("name = 'a'"), [], Named)


# ---------------------------------------------------------------- values


def test_empty_spec_is_the_defaults(root):
    assert root() == Root()


def test_values_are_strict_but_int_is_a_float(root):
    loaded = root("[optimizer]\nlr = 1\nbetas = [0, 0.5]")
    assert type(loaded.optimizer.lr) is float
    assert loaded.optimizer.betas == (0.0, 0.5)


def test_union_without_tag_is_its_default_member(root):
    loaded = root("[data]\nval_fraction = 0.3\n[model.encoder]\ntype = 'resnet18'")
    assert loaded.data == DigitsData(val_fraction=0.3)
    assert loaded.model.encoder == TimmEncoder(type="resnet18")


# ---------------------------------------------------------------- extends


def test_extends_merges_tables_and_replaces_arrays(write):
    base = "seed = 3\n[optimizer]\nlr = 0.1\nbetas = [0.1, 0.2]\n[training]\nepochs = 5"
    write(base, "base/base.toml")
    path = write("extends = '../base/base.toml'\n[optimizer]\nbetas = [0.3, 0.4]", "a/child.toml")
    loaded = load_spec(path, [], Root).root
    assert (loaded.seed, loaded.training.epochs, loaded.optimizer.lr) == (3, 5, 0.1)
    assert loaded.optimizer.betas == (0.3, 0.4)
    assert loaded.extends is None  # resolved: the spec stands alone


def test_extends_with_another_tag_replaces_the_table(write):
    write("[model.encoder]\nsmall_images = true\ntype = 'resnet18'", "base.toml")
    path = write("extends = 'base.toml'\n[model.encoder]\nencoder_type = 'torchvision'")
    assert load_spec(path, [], Root).root.model.encoder == TorchvisionEncoder()
    path = write("extends = 'base.toml'\n[model.encoder]\nencoder_type = 'timm'")
    assert load_spec(path, [], Root).root.model.encoder.small_images


def test_extends_in_a_circle_shows_the_chain(write):
    first = write("extends = 'b.toml'", "a.toml")
    second = write("extends = 'a.toml'", "b.toml")
    with pytest.raises(UserError, match=rf"{first} -> {second} -> {first}"):
        load_spec(first, [], Root)


def test_a_mistake_names_the_file_it_is_in(write):
    base = write("[training]\nepochs = 0\n[optimizer]\nlr = 'x'", "base.toml")
    child = write("extends = 'base.toml'\n[optimizer]\nlr = 'y'", "child.toml")
    with pytest.raises(UserError) as raised:
        load_spec(child, [], Root)
    epochs, rate = str(raised.value).splitlines()
    assert epochs.startswith(f"{base}: training.epochs")
    assert rate.startswith(f'{child}: optimizer.lr: "y"')


def test_missing_base(write):
    write("", "base.toml")
    with pytest.raises(UserError, match=r'"bas\.toml".*did you mean .*base\.toml\?'):
        load_spec(write("extends = 'bas.toml'"), [], Root)


# ---------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("training.epochs = 3", "training.epochs", 3),
        ("training.compile=true", "training.compile", True),
        ("name=my run", "name", "my run"),
        ('name="quoted"', "name", "quoted"),
        ("name=42", "name", "42"),  # looks like a number, the key takes text
        ("name=2024-01-01", "name", "2024-01-01"),
        ("data.data_root_dir=/data/a b", "data.data_root_dir", "/data/a b"),
        ("task.metrics=['acc']", "task.metrics", ("acc",)),
        ("logger.backend=none", "logger.backend", None),  # none is one of the tags
        ("data.augmentation.train_kwargs.crop=none", "data.augmentation.train_kwargs.crop", "none"),
        ("model.encoder={type='resnet18'}", "model.encoder.type", "resnet18"),
        ("model.encoder.model_kwargs.a.b=1", "model.encoder.model_kwargs", {"a": {"b": 1}}),
        ("add_log.note=hello", "add_log", {"note": "hello"}),
    ],
)
def test_override_values(root, override, key, value):
    found = root("", override)
    for part in key.split("."):
        if part == "backend":
            assert type(found).__name__ == "NoLogger"
            return
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_none_unsets(root):
    text = "[training]\nema_decay = 0.9\n[model.encoder.model_kwargs]\na = 1\nb = 2"
    loaded = root(text, "training.ema_decay=none", "model.encoder.model_kwargs.a=none")
    assert loaded.training.ema_decay is None
    assert loaded.model.encoder.model_kwargs == {"b": 2}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("name=", "no value is given; name=none unsets"),
        ("=3", "write it as section.key=value"),
        ("training..epochs=3", "write it as section.key=value"),
        ("specs/other.toml", "write it as section.key=value"),
        ("training.epochs=none", "cannot be unset: it must be a whole number >= 1"),
        ("optimizer.scheduler=none", 'did you mean "None"?'),
        ("task.metrics=[acc, f1]", """the shell: 'task.metrics=["acc", "f1"]'"""),
        ("task.metrics=['AUC']", 'write "auroc"'),
        ("task.metrics=['accuracy']", 'write "acc"'),
        ("training.precision=fp32", 'write "no"'),
        ("training.precision=16", 'write "fp16"'),
        ("extract.compression=gzip:4", "the level is extract.compression_level"),
        ("extract.layers=last", "write [-1]"),
        ("model.encoder.encoder_type=resnet18", "of a model stands in model.encoder.type"),
        ("model.encoder.encoder_type=tim", 'did you mean "timm"?'),
        ("add_log.comment=[wip]", """'add_log.comment=["wip"]'; as one text: """),
        ("add_log.comment=[wip]", """as one text: 'add_log.comment="[wip]"'"""),
        ("logger.tags=[a, b]", """for the shell: 'logger.tags=["a", "b"]'"""),
        (
            "model.encoder.model_kwargs={a",
            """the shell: 'model.encoder.model_kwargs={ a = "b" }'""",
        ),
        ("training.epochs=[3", "not valid TOML; quote the strings"),
        ('name="a', """the shell: 'name="a"'"""),
        ("extends=other.toml", "extends can only be set in the file"),
        ("training.epochs=3.5", "3.5 is not valid"),
        ("training.epoch=3", 'did you mean "epochs"?'),
        ("infer.folds=1", "write [1]"),
        ("extract.layers=3", "write [-3, -2, -1] for the last 3, which timm means, or [3]"),
        ("extract.layers=-1", "write [-1]"),
        ("extract.layers=last", "must be an array, each entry a whole number"),
    ],
)
def test_override_mistakes(errors, given, part):
    lines = errors("", given)
    assert len(lines) == 1, lines
    assert lines[0].startswith("--override ")
    assert part in lines[0]


@pytest.mark.parametrize(
    "given",
    ["data.augmentation.patch_size=0", "data.augmentation.patch_size=8.5", "infer.folds=1.5",
     "task.metrics=nothing_like_it"],
)  # fmt: skip
def test_no_entry_is_proposed_that_is_refused_in_its_turn(errors, given):
    lines = errors("", given)
    assert not any("write [" in line for line in lines), lines


@pytest.mark.parametrize(
    "text", ["{checkpoint}_{split}.h5", "[x]/y", "[1]", "{a=1}", "[", "{}", "a=[b]", "{"]
)
def test_a_field_of_text_takes_brackets_as_they_are(root, text):
    """The type of the field decides how a value is read."""
    loaded = root("", f"name={text}", f"extract.output_filename={text}", f"exp_dir={text}")
    assert (loaded.name, loaded.extract.output_filename, loaded.exp_dir) == (text, text, text)


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("infer.checkpoint", "{run}/best.pt"),
        ("infer.checkpoint", "[x]/y.pt"),
        ("data.label_column", "{age}"),
        ("data.label_column", "[age] in years"),
        ("data.fold", "{a}"),
        ("add_log.comment", "[wip] baseline"),
        ("add_log.comment", "{a} or b"),
    ],
)
def test_what_no_array_or_table_can_be_is_text(key, text):
    """Of fields that take text and something else, and of free tables."""
    merge = Merge(spec_errors.struct_type(Root))
    given = [f"{key}={text}"] + ["data.dataset=generic_image_dataset"] * key.startswith("data.")
    tables, _, problems = override({}, given, merge)
    section, _, name = key.partition(".")
    assert tables[section][name] == text and not problems


@pytest.mark.parametrize(
    "given", ["infer.checkpoint=[a, b]", "data.label_column=[age]", "add_log.tags=[a, b]"]
)
def test_an_array_without_quotes_is_told(errors, given):
    (line,) = errors('[data]\ndataset = "generic_image_dataset"\n', given)
    key, _, words = given.partition("=")
    array = words.replace("[", '["').replace("]", '"]').replace(", ", '", "')
    assert f"not valid TOML; quote the strings in it, and the whole for the shell: '{key}=" in line
    assert f"{key}={array}'" in line


def test_override_below_a_value(errors):
    assert "a part of seed.x is already set" in errors("", "seed=1", "seed.x=2")[0]


def test_last_override_counts(root):
    assert root("", "seed=1", "seed=2").seed == 2


def test_override_of_a_tag_replaces_its_table_and_keeps_what_is_beside_it(root):
    text = "[data]\ndataset = 'digits'\nval_fraction = 0.4\n[data.augmentation]\nimage_size = 32"
    tag = "data.dataset=generic_image_dataset"
    beside = "data.label_source=folder"
    for overrides in ([tag, beside], [beside, tag]):
        assert root(text, *overrides).data == GenericImageData(label_source="folder")
    same = root(text, "data.dataset=digits", "data.test_fraction=0.3").data
    assert (same.val_fraction, same.test_fraction) == (0.4, 0.3)


# ---------------------------------------------------------------- group names


@pytest.mark.parametrize(
    ("overrides", "group"),
    [
        ([], "digits"),
        (["optimizer.lr=3e-4"], "digits,optimizer.lr=0.0003"),
        (["seed=1", "optimizer.lr=1"], "digits,optimizer.lr=1.0,seed=1"),
        (["optimizer.lr=1", "seed=1"], "digits,optimizer.lr=1.0,seed=1"),
        (["mode=infer", "data.fold=2", "infer.split=val", "logger.backend=none"], "digits"),
        (["dataloading.num_workers=0", "training.on_existing=new"], "digits"),
        (["dataloading.batch_size=8"], "digits,dataloading.batch_size=8"),
        (["task.metrics=['acc','f1']"], "digits,task.metrics=acc+f1"),
        (["training.ema_decay=none"], "digits,training.ema_decay=none"),
        (["model.head={head_type='regression'}"], "digits,model.head.head_type=regression"),
        (["name=mine", "seed=3"], "mine"),
    ],
)
def test_group_is_the_file_and_what_changes_the_experiment(write, overrides, group):
    path = write("[training]\nema_decay = 0.5", "digits.toml")
    assert load_spec(path, overrides, Root).group == group


def test_group_is_a_file_name_and_unique(write):
    path = write("", "digits.toml")
    groups = {
        load_spec(path, [f"data.data_root_dir={folder}"], Root).group
        for folder in ("/a/b", "/a_b", "_a_b", "a" * 300, "a" * 301, "\u00e9")
    }
    assert len(groups) == 6
    assert all("/" not in group and len(group.encode()) <= 200 for group in groups)


# ---------------------------------------------------------------- paths


def test_paths_are_expanded_and_kept_as_written(root, write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("PLACE", "/there")
    monkeypatch.setenv("PART_2", "b")
    text = (
        "exp_dir = '~/runs'\nname = '$PLACE'\n[data]\ndata_root_dir = '${PLACE}/a$PART_2'\n"
        "[infer]\ncheckpoint = ['$PLACE/1.pt', '~', 'x~/$$y']\n[add_log]\nnote = '$PLACE'\n"
        "[model.encoder]\nweights = '$PLACE/w.pt'\nmodel_kwargs = {file = '$PLACE'}"
    )
    loaded = load_spec(write(text), ["umap.input=$PLACE/f.h5"], Root)
    spec = loaded.root
    assert (spec.exp_dir, spec.data.data_root_dir) == ("/home/me/runs", "/there/ab")
    assert spec.infer.checkpoint == ("/there/1.pt", "/home/me", "x~/$y")
    assert (spec.umap.input, spec.model.encoder.weights) == ("/there/f.h5", "/there/w.pt")
    assert spec.name == spec.add_log["note"] == spec.model.encoder.model_kwargs["file"] == "$PLACE"
    assert loaded.plain["exp_dir"] == "~/runs"
    assert loaded.plain["infer"]["checkpoint"] == ["$PLACE/1.pt", "~", "x~/$$y"]
    assert load_spec(write(dump(loaded.as_written)), [], Root).root == spec


def test_the_run_does_not_depend_on_what_a_variable_holds(write, monkeypatch):
    found = []
    for place in ("/a", "/b"):
        monkeypatch.setenv("PLACE", place)
        found.append(load_spec(write(""), ["data.data_root_dir=$PLACE/x"], Root))
    assert found[0].root != found[1].root
    assert (found[0].plain, found[0].group) == (found[1].plain, found[1].group)


def test_files_inside_packages(write, monkeypatch):
    """Found without an import; what is not installed stays as it was written."""
    text = "[model.encoder]\nweights = 'package:sklearn/datasets/data/iris.csv'"
    loaded = load_spec(write(text), ["umap.input=package:not_there/$a/f.h5"], Root)
    assert Path(loaded.root.model.encoder.weights).is_file()
    assert loaded.root.umap.input == "package:not_there/$a/f.h5"
    assert loaded.plain["model"]["encoder"]["weights"].startswith("package:sklearn/")
    assert load_spec(write(dump(loaded.as_written)), [], Root).root == loaded.root


@pytest.mark.parametrize("path", ["package:", "package:sklearn", "package:a.b/c", "package:/x"])
def test_a_file_inside_no_package(errors, path):
    assert "write package:NAME/path, NAME as Python imports it" in errors("", f"exp_dir={path}")[0]


@pytest.mark.parametrize("path", ["${}", "$1", "a${HOME", "ends in $", "${1x}"])
def test_a_dollar_sign_that_starts_no_variable_is_an_error(errors, path):
    (line,) = errors("", f"exp_dir={path}")
    assert "is no environment variable; write $NAME or ${NAME}, and $$ for a dollar sign" in line


def test_an_empty_variable_is_no_path(errors, monkeypatch):
    monkeypatch.setenv("NOTHING", "")
    assert "NOTHING, which is not set or empty" in errors("", "exp_dir=$NOTHING")[0]


def test_what_cannot_be_expanded_is_named_with_its_key(errors, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    lines = errors(
        "exp_dir = '~no_such_user_here/x'\n[infer]\ncheckpoint = ['a', '${NOWHERE}/b']",
        "data.data_root_dir=$NOWHERE/a",
    )
    exp_dir, root_dir, checkpoint = lines
    assert exp_dir.startswith('exp_dir: "~no_such_user_here/x": there is no such home folder')
    assert root_dir.startswith('--override data.data_root_dir: "$NOWHERE/a" needs the environment')
    assert checkpoint.startswith('infer.checkpoint[1]: "${NOWHERE}/b" needs the environment')
    assert "variable NOWHERE, which is not set or empty: export NOWHERE=" in checkpoint
    assert errors("extends = '$NOWHERE/a.toml'")[0].startswith('extends: "$NOWHERE/a.toml" needs')


def test_extends_may_name_a_variable(write, monkeypatch, tmp_path):
    write("seed = 7", "base.toml")
    monkeypatch.setenv("PLACE", str(tmp_path))
    path = write("extends = '$PLACE/base.toml'", "below/own.toml")
    assert load_spec(path, [], Root).root.seed == 7


def test_every_field_that_names_a_file_or_folder_is_a_path():
    """What its name or docstring calls a file or folder; `input` and `export` are too."""
    for cls, member in every_struct().items():
        for field in member.fields:
            named = field.name.endswith(("_file", "_dir", "_path")) or field.name in (
                "checkpoint", "weights", "input", "export", "extends",
            )  # fmt: skip
            assert spec_errors.is_path(field.type) == named, (cls, field.name)


# ---------------------------------------------------------------- writing back


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_dump_loads_back_equal(path, write):
    loaded = load_spec(path, [], Root)
    again = load_spec(write(dump(loaded.as_written)), [], Root)  # as runs keep it
    assert again.root == loaded.root
    assert again.plain == loaded.plain
    assert changed_keys(loaded.plain, again.plain) == []


def test_dump_of_unusual_values(root, write):
    data = CustomData(target="a.b:c", options={"x": [1, {"y": "z"}], "": 1.5})
    loaded = root('add_log = {when = 2024-05-06, "a.b" = "tab\\t\\"quote\\""}')
    loaded = msgspec.structs.replace(loaded, data=data)
    text = dump(loaded)
    assert load_spec(write(text), [], Root).root == loaded
    assert "name" not in tomllib.loads(text)  # unset keys are left out


def test_leaving_an_unset_key_out_says_the_same():
    for cls, member in every_struct().items():
        for field in member.fields:
            if spec_errors.is_optional(field.type):
                assert spec_errors.default_of(field) is None, f"{cls.__name__}.{field.name}"


def test_changed_keys(write):
    path = write("")
    old = load_spec(path, [], Root).plain
    new = load_spec(
        path,
        [
            "optimizer.lr=1",
            "data.fold=3",
            "mode=infer",
            "task.metrics=['acc']",
            "training.log_every=1",
        ],
        Root,
    ).plain
    assert changed_keys(old, new) == [
        'task.metrics: none -> ["acc"]',
        "optimizer.lr: 2e-05 -> 1.0",
    ]
    assert changed_keys(new, new) == []


def test_where_a_cache_lies_and_who_makes_it_is_no_part_of_the_experiment(write):
    """A cluster's scratch folder differs with every job."""
    volumes, videos = ["data.dataset=generic_3d_dataset"], ["data.dataset=generic_video_dataset"]
    root = "data.data_root_dir=."
    for given, changes in (
        (volumes, ["data.preparation.cache_dir=x", "data.preparation.workers=1"]),
        (videos, ["data.reading.index_file=x.json"]),
        (["data.dataset=cifar10"], ["data.download=false"]),
    ):
        path = write("")
        old = load_spec(path, [*given, root], Root)
        new = load_spec(path, [*given, root, *changes], Root)
        assert changed_keys(old.plain, new.plain) == []
        assert new.group == old.group


def test_keys_outside_the_experiment_exist():
    planned = {"extract", "umap", "probe"}
    every = set(spec_errors.all_keys(msgspec.inspect.type_info(Root)))
    assert set(spec.NOT_THE_EXPERIMENT) - every <= planned


# ---------------------------------------------------------------- the Structs themselves


def test_no_union_of_a_bounded_number_and_a_fixed_array():
    """msgspec 0.22 crashes in the garbage collector on such a type (a double read as a pointer)."""
    for cls in every_struct():
        for name, hint in typing.get_type_hints(cls, include_extras=True).items():
            parts = typing.get_args(hint)
            bounded = any(hasattr(part, "__metadata__") for part in parts)
            fixed = any(
                typing.get_origin(part) is tuple and Ellipsis not in typing.get_args(part)
                for part in parts
            )
            assert not (bounded and fixed), f"{cls.__name__}.{name}"


def test_unions_have_distinct_tags_and_a_default():
    for cls, member in every_struct().items():
        for field in member.fields:
            members = spec_errors.structs(field.type)
            if len(members) > 1:
                assert len({m.tag_field for m in members}) == 1
                assert len({m.tag for m in members}) == len(members)
                assert spec_errors.default_member(field.type, field.default), cls


def test_regression_head_by_override(root):
    assert root("", "model.head.head_type=regression").model.head == RegressionHead()


def test_a_key_of_the_data_sets_is_declared_once():
    """One meaning, one field: what stands twice differs by modality, choices or default."""
    members = [cls for cls in every_struct() if issubclass(cls, BaseData)]
    declared = [
        name
        for cls in {base for member in members for base in member.__mro__}
        for name in vars(cls).get("__annotations__", ())
        if name in getattr(cls, "__struct_fields__", ())
    ]
    twice = {name for name in declared if declared.count(name) > 1}
    of_modality = {"allowed_exts", "augmentation", "channels", "images_dir", "path_column"}
    of_modality |= {"preparation", "reading", "sampling"}
    assert twice == of_modality | {"data_root_dir", "split_source", "strict", "val_fraction"}


def test_texts_hold_no_control_characters_but_a_separator(errors, root):
    text = '[data]\ndataset = "generic_image_dataset"\nlabel_separator = "\\t"\n'
    assert root(text).data.label_separator == "\t"
    lines = errors(text, 'data.data_root_dir="a\\u0000b"', 'data.class_names=["x", "y\\n"]')
    assert lines == [
        '--override data.data_root_dir: "a\\u0000b" holds a control character: leave it out',
        '--override data.class_names[1]: "y\\u000a" holds a control character: leave it out',
    ]
