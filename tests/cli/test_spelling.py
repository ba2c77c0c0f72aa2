"""Short forms of the command line, written out for the parser."""

import pytest

from dsdistill.cli.spelling import as_parsed


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--network lenet --repeats 2", "--network.name lenet --repeats 2"),
        ("--network=timm:resnet18", "--network.name=timm:resnet18"),
        ("--method.network mlp", "--method.network.name mlp"),
        ("--network net.yaml", "--network net.yaml"),
        ("--network null", "--network null"),
        ("--network.width 8", "--network.width 8"),
        ("--load.image_size 24x40", "--load.image_size [24,40]"),
        ("--load.image_size=24,40", "--load.image_size=[24,40]"),
        ("--load.image_size 32", "--load.image_size 32"),
        ("--load.image_size [24,40]", "--load.image_size [24,40]"),
        ("--mean 0.5,0.4 --std [1,1]", "--mean [0.5,0.4] --std [1,1]"),
        ("--classes cat,dog", "--classes [cat,dog]"),
        ("--baselines random whole --set a=1,2", "--baselines random whole --set a=1,2"),
        ("--per_class", "--per_class"),
        ("network lenet", "network lenet"),
    ],
)
def test_short_forms_are_written_out_and_nothing_else_is(written, read):
    assert [argument.replace(" ", "") for argument in as_parsed(written.split())] == read.split()
    assert as_parsed(as_parsed(written.split())) == as_parsed(written.split())
