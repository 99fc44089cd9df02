"""The recipes of examples/cluster as far as they can be tested without a cluster: what they hold is
what their systems ask for, the shell runs their scripts, torchrun takes the command that comes out,
and so does our own command line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from veneer.cli.commands import app

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = ROOT / "examples" / "cluster"
JOBSET = yaml.safe_load((CLUSTER / "jobset.yaml").read_text())
SKYPILOT = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text())
DOCKERFILE = re.sub(r"^#.*\n", "", (CLUSTER / "Dockerfile").read_text(), flags=re.MULTILINE)

#: the fields of a task of SkyPilot, and of its resources (docs.skypilot.co, "SkyPilot YAML", 2026)
TASK = {
    "name",
    "workdir",
    "num_nodes",
    "resources",
    "envs",
    "secrets",
    "volumes",
    "file_mounts",
    "setup",
    "run",
    "config",
}
RESOURCES = {
    "infra",
    "accelerators",
    "cpus",
    "memory",
    "use_spot",
    "disk_size",
    "image_id",
    "any_of",
    "job_recovery",
}
#: what a job finds in its environment, there and under Slurm
ENVIRONMENT = {
    "slurm.sh": {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    },
    "skypilot.yaml": {
        "SKYPILOT_NODE_IPS": "node7\nnode8",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    },
}
ENVIRONMENT["slurm.sh"]["SLURM_JOB_ID"] = ENVIRONMENT["skypilot.yaml"]["SKYPILOT_TASK_ID"] = "4711"


def instruction(name: str) -> Any:
    """The one of the Dockerfile with this name, as its list of words."""
    (found,) = re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)
    return json.loads(found)


def shown(script: str, name: str, folder: Path, *arguments: str) -> list[str]:
    """The command with which a script ends, by a shell in which torchrun shows what it is given."""
    commands = {
        "torchrun": 'printf "%s\\n" "share=$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"',
        "srun": '"$@"',
        "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "node%s\\n" {7..20000}',
    }
    for command, does in commands.items():
        (folder / command).write_text(f"#!/bin/bash\n{does}\n")
        (folder / command).chmod(0o755)
    environment = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **ENVIRONMENT[name]}
    line = ["bash", "-u", "-c", script, "script", *arguments]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    share, *words = done.stdout.splitlines()
    assert share == "share=1"
    return words


def of_slurm(folder: Path) -> list[str]:
    return shown(
        (CLUSTER / "slurm.sh").read_text(),
        "slurm.sh",
        folder,
        "run.yaml",
        "--output",
        "/shared/run",
    )


def of_jobset(folder: Path) -> list[str]:
    return container()["args"]


#: what torchrun is given
COMMANDS = {
    "slurm.sh": of_slurm,
    "skypilot.yaml": lambda folder: shown(SKYPILOT["run"], "skypilot.yaml", folder),
    "jobset.yaml": of_jobset,
    "Dockerfile": lambda folder: instruction("CMD"),
}


def pod() -> dict[str, Any]:
    return JOBSET["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def container() -> dict[str, Any]:
    (only,) = pod()["containers"]
    return only


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_one_of_torchrun_and_of_ours(name: str, tmp_path: Path) -> None:
    told = get_args_parser().parse_args(COMMANDS[name](tmp_path))
    group: Any = typer.main.get_command(app)
    assert told.module
    assert told.training_script == "veneer.cli"
    arguments = told.training_script_args
    name_of_command, command, arguments = group.resolve_command(typer.Context(group), arguments)
    found = command.make_context(name_of_command, arguments).params
    assert (name_of_command, found["config"].name) == ("train", "run.yaml")
    assert told.max_restarts == 5
    if name == "Dockerfile":
        assert told.standalone
        return
    assert str(found["output"]) == "/shared/run"
    assert (told.nnodes, told.rdzv_backend) == ("2", "c10d")
    assert told.nproc_per_node == ("gpu" if name == "jobset.yaml" else "8")
    assert told.rdzv_endpoint == (
        "veneer-machine-0-0.veneer:29500" if name == "jobset.yaml" else "node7:29500"
    )
    assert told.rdzv_id == ("veneer" if name == "jobset.yaml" else "4711")


def test_slurm_gives_the_signal_in_time() -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", text, re.MULTILINE))
    assert asked.keys() <= {
        "nodes", "ntasks-per-node", "gpus-per-node", "exclusive", "time", "signal", "requeue", "open-mode"
    }  # fmt: skip
    assert asked["ntasks-per-node"] == "1"
    signal, seconds = asked["signal"].split("@")
    assert signal == "TERM"  # to the job's steps: with "B:" it would go to the shell alone
    told = get_args_parser().parse_args(
        shlex.split(re.sub(r"\\\n", "", text).split("srun torchrun ")[1])
    )
    assert told.shutdown_timeout < int(seconds)


def test_a_jobset_is_whole() -> None:
    """By the resource's definition of JobSet 0.12, whose fields its API server checks."""
    assert (JOBSET["apiVersion"], JOBSET["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert JOBSET.keys() == {"apiVersion", "kind", "metadata", "spec"}
    (job,) = JOBSET["spec"]["replicatedJobs"]
    spec, told = job["template"]["spec"], get_args_parser().parse_args(container()["args"])
    assert (
        told.rdzv_endpoint.split(":")[0]
        == f"{JOBSET['metadata']['name']}-{job['name']}-0-0.{JOBSET['metadata']['name']}"
    )
    assert spec["completions"] == spec["parallelism"] == int(told.nnodes)
    assert pod()["restartPolicy"] == "Never"
    assert pod()["terminationGracePeriodSeconds"] > told.shutdown_timeout
    assert {mount["name"] for mount in container()["volumeMounts"]} == {
        volume["name"] for volume in pod()["volumes"]
    }
    assert container()["env"] == [{"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}]
    assert "command" not in container()  # the image's
    assert instruction("ENTRYPOINT") == ["torchrun"]


def test_a_task_of_skypilot_has_its_fields() -> None:
    assert SKYPILOT.keys() <= TASK
    assert SKYPILOT["resources"].keys() <= RESOURCES
    assert SKYPILOT["resources"]["job_recovery"].keys() <= {
        "strategy",
        "max_restarts_on_errors",
        "recover_on_exit_codes",
    }


@pytest.mark.parametrize(
    "command", [SKYPILOT["setup"], *re.findall(r"^RUN (.+)$", DOCKERFILE, re.MULTILINE)]
)
def test_what_is_installed_is_an_extra_of_ours(command: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    *words, what = shlex.split(command)
    assert words in (["pip", "install"], ["pip", "install", "--no-cache-dir"])
    (extra,) = re.findall(r"^\.\[(\w+)\]$", what)
    assert extra in project["optional-dependencies"]


def test_an_image_holds_what_is_built() -> None:
    copied = [line.split()[:-1] for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE)]
    names = {name for line in copied for name in line}
    assert all((ROOT / name).exists() for name in names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {project["readme"], *project["license-files"], "pyproject.toml", "src"} <= names
    words = {line.split()[0] for line in DOCKERFILE.splitlines() if line}
    assert words == {"FROM", "WORKDIR", "COPY", "RUN", "ENTRYPOINT", "CMD"}


def test_recipes_name_no_machine() -> None:
    for file in CLUSTER.iterdir():
        text = file.read_text()
        assert not re.search(r"\d+\.\d+\.\d+\.\d+|://|@\w+\.\w+", text), file.name
