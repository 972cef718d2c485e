"""The script runs end to end, and what it shipped is small, complete and as promised."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from demo.documents import chat_prompt
from demo.grammar import ADAPTERS, AdapterName
from demo.make import PLANS, SHIPPED, make
from demo.train import NAME

WEIGHTS = [SHIPPED / "base", *(SHIPPED / "adapters" / name for name in ADAPTERS)]


def test_the_script_runs_end_to_end(tmp_path: Path) -> None:
    make(tmp_path, seed=1, steps=20)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = {path.relative_to(SHIPPED).as_posix() for folder in WEIGHTS for path in folder.rglob("*")}
    assert written == shipped | {"story.json", "README.md"}


def test_the_demo_is_small() -> None:
    size = sum(path.stat().st_size for path in SHIPPED.rglob("*") if "__pycache__" not in path.parts)
    assert size < 25e6


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_as_planned(adapter: AdapterName) -> None:
    config = json.loads((SHIPPED / "adapters" / adapter / "adapter_config.json").read_text())
    assert config["r"] == PLANS[adapter].rank
    assert set(config["target_modules"]) == set(PLANS[adapter].targets)
    assert config["base_model_name_or_path"] == NAME


def test_no_shipped_file_names_a_machine_or_a_card() -> None:
    for folder in WEIGHTS:
        assert not (folder / "README.md").exists()
        for path in folder.glob("*.json"):
            assert "/tmp" not in path.read_text()
            assert "/work" not in path.read_text()


def test_every_line_of_the_story_holds_its_words() -> None:
    scenes = json.loads((SHIPPED / "story.json").read_text())
    assert {line["adapter"] for scene in scenes for line in scene["lines"]} == set(ADAPTERS)
    assert all(line["must_contain"] in line["answer"] for scene in scenes for line in scene["lines"])


def test_the_chat_template_is_the_form_it_was_trained_in() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "base")
    messages = [{"role": "user", "content": "What is a bond?"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat_prompt("What is a bond?")
