"""What is tried: every method once, on every backbone, then other recipes and rates."""

from dataclasses import astuple

import pytest
from support.models import resolved

from unipelt_cli import methods
from unipelt_cli.config.experiment import resolve
from unipelt_cli.config.presets import read_preset, recipe_settings
from unipelt_cli.errors import ConfigError
from unipelt_cli.methods import recipes
from unipelt_cli.methods.few_labels import FEW_LABELS
from unipelt_cli.sweeps.candidates import choices

SUGGESTED = ("head", "unipelt-apl", "bitfit", "unipelt-ap", "adapter", "lora", "full")


def test_every_suggested_method_is_tried_once_before_anything_is_tried_again() -> None:
    tried = [(choice.method, choice.recipe, choice.rate) for choice in choices()]
    assert len(tried) == len(set(tried)) == 33
    defaults = [(name, "default", methods.get(name).learning_rate) for name in SUGGESTED]
    assert tried[:8] == [("probe", "default", 0.001), *defaults]
    rates = {rate for name, recipe, rate in tried if (name, recipe) == ("lora", "default")}
    assert rates == {0.00017, 0.0005, 0.0015}
    assert [(recipe, rate) for name, recipe, rate in tried if name == "lora"][1:3] == [
        ("few-labels", 0.0005),
        ("published", 0.0004),
    ]


def test_rates_are_for_all_recipes_but_the_papers() -> None:
    tried = choices(["lora", "head"], [0.1, 0.2, 0.1])
    assert [(choice.method, choice.recipe, choice.rate) for choice in tried] == [
        ("probe", "default", 0.001),
        ("lora", "default", 0.1),
        ("head", "default", 0.1),
        ("lora", "few-labels", 0.1),
        ("head", "published", 0.001),
        ("lora", "published", 0.0004),
        ("head", "default", 0.2),
        ("lora", "default", 0.2),
        ("lora", "few-labels", 0.2),
    ]


def test_recipes_can_be_chosen_and_the_floor_stays() -> None:
    tried = choices(["lora", "unipelt-apl"], None, ["published"])
    assert [astuple(choice)[:3] for choice in tried] == [
        ("probe", 0.001, "default"),
        ("lora", 0.0004, "published"),
        ("unipelt-apl", 0.0005, "published"),
    ]
    few = choices(None, [1e-3], ["few-labels"])
    trained = {"full", "bitfit", "adapter", "lora", "unipelt-ap", "unipelt-apl"}  # no frozen head
    assert {choice.method for choice in few} == {"probe", *trained}
    assert [choice.method for choice in choices(["probe"], None, ["published"])] == ["probe"]


def test_backbones_take_turns_the_first_one_first() -> None:
    tried = choices(["lora"], [1e-3], ["default", "few-labels"], ["minilm", "org/bge-small"])
    assert [(choice.method, choice.recipe, choice.backbone) for choice in tried] == [
        ("probe", "default", "minilm"),
        ("lora", "default", "minilm"),
        ("probe", "default", "org/bge-small"),
        ("lora", "default", "org/bge-small"),
        ("lora", "few-labels", "minilm"),
        ("lora", "few-labels", "org/bge-small"),
    ]
    assert [choice.backbone_name for choice in tried][1:3] == ["minilm", "bge-small"]
    alike = choices(["lora"], [1e-3], ["default"], ["a/bert", "b/bert"])
    assert {choice.backbone_name for choice in alike} == {"a/bert", "b/bert"}


@pytest.mark.parametrize(
    ("names", "recipe_names", "message", "hint"),
    [
        (["lorra"], None, "method 'lorra': no such method", "did you mean lora? otherwise choose"),
        (
            None,
            ["few"],
            "recipe 'few': no such recipe",
            "choose one of default, few-labels, published",
        ),
        (
            ["lora", "head"],
            ["few-labels"],
            "--recipes few-labels: head has none of them",
            "it has default, published; give one, or other --methods",
        ),
    ],
)
def test_what_is_not_there_is_refused(
    names: list[str] | None, recipe_names: list[str] | None, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        choices(names, None, recipe_names)
    assert refused.value.message == message
    assert (refused.value.hint or "").startswith(hint)


@pytest.mark.parametrize("name", methods.table())
def test_every_recipe_of_a_method_can_be_resolved(name: str) -> None:
    entry = methods.get(name)
    known = recipes.recipes_of(entry)
    assert known[0] == "default"
    for recipe in recipes.NAMES:
        if recipe not in known:
            with pytest.raises(ConfigError, match=f"recipe '{recipe}': {name} has no such recipe"):
                recipe_settings(name, recipe)
            continue
        rate = {"train": {"learning_rate": recipes.rate_of(entry, recipe)}}
        layers = [("", recipe_settings(name, recipe)), ("", {"data": {"task": "mrpc"}}), ("", rate)]
        resolved_by = resolve(layers)
        if recipe == "default":
            assert resolved_by == resolved(method={"name": name})
        elif recipe == "published":
            paper = [("", read_preset(f"published/{name}")), ("", {"data": {"task": "mrpc"}})]
            assert resolved_by == resolve(paper)
        else:
            assert (
                resolved_by.train.model_dump() | FEW_LABELS["train"]
                == resolved_by.train.model_dump()
            )
            assert resolved_by.model.normalise
            assert resolved_by.train.learning_rate == entry.learning_rate


def test_the_recipe_for_few_labels_is_that_of_the_methods_that_it_was_made_for() -> None:
    layers = [("", recipe_settings("adapter", "few-labels")), ("", {"data": {"task": "mrpc"}})]
    few, apl = resolve(layers), resolved(method={"name": "unipelt-apl"})
    assert few.model == apl.model
    assert few.train == apl.train.model_copy(update={"learning_rate": 1e-3})
