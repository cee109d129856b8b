import dataclasses

import pytest
import yaml

from dmsa import config as configuration
from dmsa.config import Config, differences, load_preset, parse, presets, to_dict, validate


def test_without_arguments_it_is_the_embedded_default():
    config = parse([])
    assert config == load_preset("shapes")
    assert config.data.name == "shapes"
    assert config.model.encoder == "shapes_vit_tiny"


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "repeat", "start", "interval"),
    [
        ("voc", 100, 512, 20, 5, (5, 5, 5, 5, 4, 4, 4, 4, 4, 3)),
        ("voc_aug", 100, 512, 3, 5, (5, 5, 5, 5, 4, 4, 4, 4, 4, 3)),
        ("coco80", 200, 256, 1, 3, (3, 3, 3, 2)),
        ("coco_stuff27", 200, 256, 1, 2, (2,)),
    ],
)
def test_presets_are_the_rows_of_the_paper(name, epochs, batch, repeat, start, interval):
    config = load_preset(name)
    assert config.data.name == name
    assert config.data.repeat == repeat
    assert config.data.size == 320
    assert config.data.crop == 160
    train = config.train
    assert (train.epochs, train.batch, train.lr, train.weight_decay) == (epochs, batch, 1e-4, 5e-4)
    assert (train.teacher_start, train.teacher_interval) == (start, interval)
    assert config.labels.bank_scales == ((0.6, 0.5, 0.4, 0.3) if name.startswith("voc") else (0.5, 0.4, 0.3, 0.2))
    assert configuration.deviations(config) == []
    validate(config)


def test_every_preset_is_listed_in_the_help_of_its_option():
    text = configuration.PRESET_FOLDER.parent.joinpath("config.py").read_text()
    line = next(line for line in text.splitlines() if '"""Preset by name' in line)
    assert all(name in line for name in presets())


def test_command_line_wins_over_preset_and_preset_over_defaults():
    config = parse(["--preset", "voc", "--train.lr", "3e-3", "--data.root=/data"])
    assert config.train.lr == 3e-3
    assert config.data.root == "/data"
    assert config.data.repeat == 20
    assert config.train.clip_value == Config().train.clip_value


def test_dots_may_be_hyphens():
    spelt = parse(["--data-root", "/data", "--train-weight-decay=0.1", "--labels.par-iterations", "3"])
    assert (spelt.data.root, spelt.train.weight_decay, spelt.labels.par_iterations) == ("/data", 0.1, 3)


def test_yaml_round_trip(tmp_path):
    config = parse(["--preset", "coco80", "--train.micro-batch", "8", "--labels.par-dilations", "1", "2"])
    path = tmp_path / "config.yaml"
    text = config.to_yaml(path)
    assert path.read_text() == text
    assert Config.from_yaml(path) == config
    assert parse(["--preset", str(path)]) == config


def test_yaml_number_without_a_point(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {lr: 1e-3, weight_decay: 0}\nlabels: {par: off}\n")
    config = load_preset(str(path))
    assert config.train.lr == 1e-3
    assert config.train.weight_decay == 0.0
    assert config.labels.par == "off"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("trian: {lr: 1}", ValueError, ["trian", "did you mean train?"]),
        ("train: {epoch: 3}", ValueError, ["train.epoch", "did you mean train.epochs?"]),
        ("train: {epochs: three}", TypeError, ["train.epochs='three'", "int"]),
        ("train: {epochs: 3.0}", TypeError, ["train.epochs=3.0", "int"]),
        ("train: {epochs: true}", TypeError, ["train.epochs=True", "int"]),
        ("train: {lr: fast}", TypeError, ["train.lr='fast'", "float"]),
        ("train: {compile: 1}", TypeError, ["train.compile=1", "bool"]),
        ("train: 3", TypeError, ["train", "mapping"]),
        ("model: {aspp: mshа}", ValueError, ["model.aspp", "mhsa, neck, off"]),
        ("model: {aspp: mshs}", ValueError, ["did you mean mhsa?"]),
        ("data: {crop_scale: [0.1]}", TypeError, ["data.crop_scale", "a list of 2"]),
        ("train: {teacher_interval: [1, x]}", TypeError, ["train.teacher_interval[1]='x'"]),
        ("[1, 2]", TypeError, ["mapping"]),
        ("a: [", ValueError, ["not a YAML file"]),
    ],
)
def test_yaml_errors_name_the_option(tmp_path, text, error, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught:
        load_preset(str(path))
    assert all(word in str(caught.value) for word in [str(path), *words])


def test_unknown_preset_suggests():
    with pytest.raises(FileNotFoundError, match="did you mean 'voc_aug'"):
        load_preset("voc_agu")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--trian.lr", "3"], ["--trian.lr", "--train.lr"]),
        (["--data-rot", "x"], ["--data.root"]),
        (["--train.lr", "abc"], ["--train.lr", "abc"]),
        (["--model.aspp", "foo"], ["--model.aspp", "mhsa", "neck", "off"]),
    ],
)
def test_command_line_errors_suggest(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert all(word in printed.out + printed.err for word in words)


def test_help_lists_every_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], description="Train it.")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "Train it." in printed
    for key in configuration.flatten(to_dict(Config())):
        assert f"--{key.replace('_', '-')}" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--train.batch", "0"], "train.batch=0 must be at least 1"),
        (["--data.crop", "500"], "data.crop=500 must be at most data.size"),
        (["--data.crop-scale", "0.9", "0.1"], "data.crop_scale=0.9,0.1"),
        (["--train.lr", "nan"], "train.lr=nan must be a positive number"),
        (["--losses.seg", "-1"], "losses.seg=-1.0"),
        (["--labels.par-dilations", "1", "0"], "labels.par_dilations=1,0"),
        (["--labels.bank-scales", "2"], "labels.bank_scales=2.0"),
        (["--data.workers", "-1"], "data.workers=-1"),
        (["--data.classes", "500"], "data.classes=500"),
    ],
)
def test_values_out_of_range(arguments, words):
    with pytest.raises(ValueError, match="must be") as caught:
        parse(arguments)
    assert words in str(caught.value)


def test_methods_are_switches():
    transfgu = parse(["--method", "transfgu"])
    assert (transfgu.model.aspp, transfgu.labels.par, transfgu.losses.seg) == ("off", "off", 0.0)
    assert (parse([]).labels.label_grid, transfgu.labels.label_grid) == ("pixels", "tokens")
    plus = parse(["--method", "dmsa_plus"])
    assert (plus.rates.grid_aware, plus.labels.cam, plus.labels.label_grid) == (True, "single_patch", "pixels")
    assert not parse([]).rates.grid_aware
    assert configuration.resolve_method(transfgu) == transfgu


def test_deviations_are_listed():
    config = dataclasses.replace(load_preset("voc"), method="dmsa_plus")
    config = configuration.resolve_method(config)
    assert configuration.deviations(config) == [
        "rates.grid_aware: True (paper: False)",
        "labels.cam: single_patch (paper: attention_grad)",
        "losses.seg: 1.0 (paper: 0.1)",
    ]
    elsewhere = configuration.resolve_method(dataclasses.replace(load_preset("coco80"), method="dmsa_plus"))
    assert configuration.deviations(elsewhere) == ["rates.grid_aware: True (paper: False)"]


def test_every_option_that_is_not_the_papers_is_a_deviation():
    """Whatever a user may have changed to get a run through: batch, epochs, repeats, bank, schedule, images."""
    small = (
        "--data.root x --train.batch 32 --train.epochs 4 --data.repeat 1 --labels.bank-images 64 --data.val-images 9"
    )
    small += " --train.teacher-start 1 --train.precision bf16 --model.encoder shapes_vit_tiny --model.decoder-heads 4"
    found = configuration.deviations(parse(["--preset", "voc", *small.split()]))
    assert set(found) == {
        "data.repeat: 1 (paper: 20)",
        "data.val_images: 9 (paper: all)",
        "labels.bank_images: 64 (paper: all)",
        "model.decoder_heads: 4 (paper: 6)",
        "model.encoder: shapes_vit_tiny (paper: vit_small_patch8_224.dino)",
        "train.batch: 32 (paper: 512)",
        "train.epochs: 4 (paper: 100)",
        "train.precision: bf16 (paper: fp32)",
        "train.teacher_start: 1 (paper: 5)",
    }
    for name in ("voc", "voc_aug", "coco80", "coco_stuff27"):
        for method in ("dmsa", "transfgu"):
            assert configuration.deviations(parse(["--preset", name, "--data.root", "x", "--method", method])) == []
    kept = set(configuration.flatten(to_dict(Config()))) - set(configuration.NOT_THE_METHOD)
    assert {"losses.seg", "rates.epoch_base", "data.crop", "train.lr"} < kept
    assert set(configuration.NOT_THE_METHOD) <= set(configuration.flatten(to_dict(Config())))


def test_differences_list_both_values():
    before, now = to_dict(Config()), to_dict(parse(["--train.lr", "0.5"]))
    now["extra"] = 1
    found = differences(before, now, ignore=("out",), labels=("then", "now"))
    assert "train.lr: 0.0001 then, 0.5 now" in found
    assert "extra: not set then, 1 now" in found
    assert not any(line.startswith("out") for line in found)


def test_presets_hold_only_known_options():
    for path in presets().values():
        assert isinstance(yaml.safe_load(path.read_text()), dict)
        assert Config.from_yaml(path).to_yaml()
