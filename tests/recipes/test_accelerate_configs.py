"""The configs of `accelerate launch`: what accelerate reads in them, and a launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file

FOLDER = Path(__file__).parents[2] / "recipes" / "accelerate"
TYPES = {
    "cpu": "NO",
    "one_gpu": "NO",
    "multi_gpu": "MULTI_GPU",
    "multi_node": "MULTI_GPU",
    "fsdp2": "FSDP",
    "deepspeed_zero2": "DEEPSPEED",
}


def test_there_is_one_for_each_way() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TYPES)


@pytest.mark.parametrize("name", TYPES)
def test_accelerate_reads_it(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))  # which refuses keys that it does not know
    assert config.distributed_type.value == TYPES[name]
    assert config.use_cpu is (name == "cpu")
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_a_launch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState\nprint(PartialState().device, PartialState().num_processes)\n"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FOLDER / "cpu.yaml")]
    done = subprocess.run(
        [*command, str(script)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.stdout.strip().endswith("cpu 1"), done.stderr
