"""Short forms of the command line, written out for the parser."""

import pytest

from dsdistill.cli.spelling import as_parsed, reread


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--network lenet --repeats 2", "--network.name lenet --repeats 2"),
        ("--network=timm:resnet18", "--network.name=timm:resnet18"),
        ("--method.network mlp", "--method.network.name mlp"),
        ("--method.base.network mlp", "--method.base.network.name mlp"),
        ("--method.extractor.network=mlp", "--method.extractor.network.name=mlp"),
        ("--networks mlp", "--networks mlp"),
        ("--method FYI+DM --method.base.ipc 1", "--method FYI --method.base DM --method.base.ipc 1"),
        ("--method=A+B+C", "--method=A --method.base=B --method.base.base=C"),
        ("--data a+b", "--data a+b"),
        ("--method.parameterization tiles", "--method.form Tiled"),
        ("--method.base.parameterization=Pixels", "--method.base.form=Plain"),
        ("--method.parameterization.factor 3", "--method.form.factor 3"),
        ("--method.parameterization.factor=3", "--method.form.factor=3"),
        ("--method.parameterization tile", "--method.form tile"),
        ("--method.form Tiled", "--method.form Tiled"),
        ("--parameterization tiles", "--parameterization tiles"),
        ("--network net.yaml", "--network net.yaml"),
        ("--network null", "--network null"),
        ("--network.width 8", "--network.width 8"),
        ("--load.image_size 24x40", "--load.image_size [24,40]"),
        ("--load.image_size=24,40", "--load.image_size=[24,40]"),
        ("--load.image_size 32", "--load.image_size 32"),
        ("--load.image_size [24,40]", "--load.image_size [24,40]"),
        ("--mean 0.5,0.4 --std [1,1]", "--mean [0.5,0.4] --std [1,1]"),
        ("--classes cat,dog", "--classes [cat,dog]"),
        ("--method.models.weights.class_ids 5,2", "--method.models.weights.class_ids [5,2]"),
        ("--baselines random whole --set a=1,2", "--baselines random whole --set a=1,2"),
        ("--per_class", "--per_class"),
        ("network lenet", "network lenet"),
    ],
)
def test_short_forms_are_written_out_and_nothing_else_is(written, read):
    assert [argument.replace(" ", "") for argument in as_parsed(written.split())] == read.split()
    assert as_parsed(as_parsed(written.split())) == as_parsed(written.split())


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--training=None", "--training=null"),
        ("--network={'norm': None, 'width': 3}", '--network={"norm": null, "width": 3}'),
        ("--ops=['color', 'flip']", '--ops=["color", "flip"]'),
        ("--name=Nonesuch", "--name=Nonesuch"),
        ("--classes=[cat, dog]", "--classes=[cat, dog]"),
        ("--ipc=3", "--ipc=3"),
        ("--flag", "--flag"),
    ],
)
def test_values_of_nested_settings_are_read_as_they_were_written(written, read):
    assert reread([written]) == [read]


def test_settings_of_a_wrapped_method_may_be_written_as_its_own():
    line = ["--method", "FYI+DM", "--method.ipc", "2", "--method.store", "pairs", "--method.network.width=8"]
    assert as_parsed(line) == [
        *("--method", "FYI", "--method.base", "DM"),
        *("--method.base.ipc", "2", "--method.store", "pairs", "--method.base.network.width=8"),
    ]
    assert as_parsed(["--method=DM", "--method.ipc=2"]) == ["--method=DM", "--method.ipc=2"]
