from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from inspect import signature
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import tuckerize
from tests.tiny_families import make_family
from tests.tiny_models import add_tokenizer, make_tiny_model, write_text
from tuckerize.cli.app import app

COMMANDS = tuple(
    info.name or str(info.callback.__name__) for info in app.registered_commands if info.callback
)
ROOT = Path(__file__).parents[3]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_of_every_command_imports_no_heavy_library() -> None:
    script = f"""
import sys
from typer.testing import CliRunner
from tuckerize.cli import app
for arguments in ([], *([name] for name in {COMMANDS!r})):
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout, (arguments, result.output)
heavy = {{"torch", "transformers", "safetensors", "huggingface_hub", "tensorly", "yaml"}}
print(sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_version_is_printed() -> None:
    result = run("--version")
    first, where = result.stdout.splitlines()
    assert (result.exit_code, first) == (0, f"tuckerize {tuckerize.__version__}")
    assert (
        f", torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
        in where
    )


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ((), "no size was given", "give exactly one of:"),
        (("--keep", "0.5", "--rank", "1,1,1"), "--rank and --keep exclude each other", "give"),
        (("--recipe", "r.yaml", "--tolerance", "0.1"), "--tolerance and --recipe exclude", "give"),
        (
            ("--recipe", "r.yaml", "--group-size", "4"),
            "--group-size and --recipe exclude each other",
            "write group_size into r.yaml",
        ),
        (("--keep", "0.5"), "--output is missing", "name a new folder, or add --dry-run"),
        (
            ("--keep", "75"),
            "--keep 75 is not a number above 0 and at most 1",
            "did you mean 0.75 (75 %)?",
        ),
        (("--rank", "8,8"), "--rank: '8,8' has 2 sizes", ""),
        (
            ("--keep", "0.5", "--projections", "gate"),
            "--projections gate is not one of: gate_proj, up_proj, down_proj",
            "did you mean 'gate_proj'?",
        ),
        (("--recipe", "absent.yaml"), "there is no recipe file absent.yaml", "give a YAML file"),
    ],
)
def test_decompose_with_wrong_options_exits_2_with_message_and_hint(
    options: tuple[str, ...], message: str, hint: str
) -> None:
    result = run("decompose", "--model", "anything", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"error: {message}")
    assert f"\nhint: {hint}" in result.stderr if hint else "hint:" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("decompose",),
        ("decompose", "--model"),
        ("shard", "out"),
        ("shard", "out", "--tp", "x"),
        ("verify", "out", "--tokens", "0"),
        ("decompose", "--model", "m", "--keep", "0.5", "--dtype", "int8"),
    ],
)
def test_command_line_that_cannot_be_parsed_exits_2(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error" in result.stderr


@pytest.mark.parametrize("command", ["shard", "verify", "reconstruct"])
def test_command_on_a_folder_that_is_no_result_exits_2(tmp_path: Path, command: str) -> None:
    options = {"shard": ("--tp", "2"), "reconstruct": ("--output", f"{tmp_path}/new")}
    result = run(command, tmp_path, *options.get(command, ()))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"error: {tmp_path} has no tuckerize.json" in result.stderr
    assert not (tmp_path / "new").exists()


def test_decompose_into_a_finished_result_exits_2(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--model", tiny_model, "--keep", "0.5", "--output")
    assert run("decompose", *options, tmp_path / "out").exit_code == 0
    result = run("decompose", *options, tmp_path / "out" / "inner")
    assert result.exit_code == 2
    assert "which is a finished result" in result.stderr
    assert not (tmp_path / "out" / "inner").exists()


@pytest.mark.parametrize("where", [".", "inside"])
def test_decompose_into_its_source_exits_2_and_changes_nothing(
    tiny_model: Path, where: str
) -> None:
    before = sorted(tiny_model.rglob("*"))
    result = run(
        "decompose", "--model", tiny_model, "--keep", "0.5", "--output", tiny_model / where
    )
    assert result.exit_code == 2
    assert "lie in one another" in result.stderr
    assert sorted(tiny_model.rglob("*")) == before


def test_inspect_as_json_prints_nothing_else(tiny_model: Path) -> None:
    result = run("inspect", tiny_model, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    value = json.loads(result.stdout)
    assert (value["schema_version"], value["shape"]) == (1, [8, 24, 32])


def test_inspect_as_json_keeps_names_that_look_like_markup(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / f"[bold]:smile: {'long' * 40}"
    shutil.copytree(tiny_model, folder)
    result = run("inspect", folder, "--json")
    assert json.loads(result.stdout)["model"] == str(folder)


def test_decompose_dry_run_as_json_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    options = ("--keep", "0.5", "--dry-run", "--json", "--output", tmp_path / "out")
    result = run("decompose", "--model", tiny_model, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert len(json.loads(result.stdout)["stacks"]) == 6
    assert list(tmp_path.iterdir()) == []


def test_every_command_as_json_prints_one_report_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = add_tokenizer(make_tiny_model(tmp_path / "model"))
    text = write_text(tmp_path / "text.txt", 4500)
    nemotron = make_family(tmp_path / "nemotron", "nemotron_h")
    out, dense = tmp_path / "out", tmp_path / "dense"
    few = ("--calibration-tokens", "8192")
    short = ("--tokens", "512", "--window", "16")
    # A key of the report, and the arguments, in an order in which each finds what it needs.
    calls: dict[str, tuple[str, tuple[str | Path, ...]]] = {
        "doctor": ("versions", ()),
        "plan": ("points", ("--model", model, "--calibration", text, *few)),
        "decompose": ("sweeps", ("--model", model, "--rank", "full,12,16", "--output", out)),
        "shard": ("costs", (out, "--tp", "2")),
        "check": ("faults", (out,)),
        "verify": ("passed", (out, "--tokens", "4")),
        "push": ("card", (out, "me/small", "--dry-run")),
        "quantize": ("largest_residual_before", (out, "--output", tmp_path / "out4")),
        "heal": ("curve", (out, "--data", text, "--output", tmp_path / "healed", *short)),
        "reconstruct": ("layers", (out, "--output", dense)),
        "fold": ("latent_size", (nemotron, "--keep", "0.5", "--output", tmp_path / "folded")),
        "inspect": ("largest_residual", (out,)),
        "evaluate": ("perplexity", (out, "--text", text, "--tokens", "1024")),
    }
    assert calls.keys() == {
        str(info.callback.__name__)
        for info in app.registered_commands
        if info.callback and "as_json" in signature(info.callback).parameters
    }
    for command, (key, arguments) in calls.items():
        result = run(command, *arguments, "--json")
        # Doctor answers no where something is wrong with the machine.
        codes = (0, 1) if command == "doctor" else (0,)
        assert result.exit_code in codes, result.output
        assert result.stderr == ""
        assert f'"{key}"' in result.stdout
        assert json.loads(result.stdout)["schema_version"] == 1
    again = run("decompose", *calls["decompose"][1])
    assert again.exit_code == 2
    assert "already holds a finished result" in again.stderr


def test_inspect_as_tables_keeps_names_that_look_like_markup(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    folder = tmp_path / "[bold]:cat:"
    shutil.copytree(tiny_model, folder)
    result = run("inspect", folder)
    assert str(folder) in result.stdout


def test_completion_of_bash_offers_every_command() -> None:
    environment = {
        **os.environ,
        "_TUCKERIZE_COMPLETE": "complete_bash",
        "COMP_WORDS": "tuckerize ",
        "COMP_CWORD": "1",
        "PYTHONPATH": str(ROOT),
    }
    script = "from tuckerize.cli import app; app(prog_name='tuckerize')"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert set(done.stdout.split()) == {*COMMANDS, "recipes"}


def test_completion_script_of_bash_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise Typer takes the shell among the parents of this process, which may have none.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="tuckerize")
    assert result.exit_code == 0
    assert "_TUCKERIZE_COMPLETE=complete_bash" in result.stdout


def test_readme_lists_every_command_and_no_other() -> None:
    rows = re.findall(
        r"^\| `.*?tuckerize (\w+).*?` \|", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(rows) == sorted([*COMMANDS, "recipes"])


@pytest.mark.parametrize("removed", ["--shape", "--allocate", "--one-shot"])
def test_switches_to_compare_with_are_recipe_keys_only(removed: str) -> None:
    result = run("decompose", "--model", "m", removed)
    assert (result.exit_code, "No such option" in result.output) == (2, True)
