"""The files for clusters: against the schemas of those who read them, and against each other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob
from kubeflow_trainer_api.models.trainer_v1alpha1_training_runtime import TrainerV1alpha1TrainingRuntime

from dtrain.config import Config
from tests.jobs import ROOT

MODELS: dict[str, Any] = {
    "JobSet": JobsetV1alpha2JobSet,
    "TrainingRuntime": TrainerV1alpha1TrainingRuntime,
    "TrainJob": TrainerV1alpha1TrainJob,
}


def manifests() -> list[dict[str, Any]]:
    return [m for path in sorted((ROOT / "launch/k8s").glob("*.yaml")) for m in yaml.safe_load_all(path.read_text())]


def unknown(given: Any, known: Any, place: str) -> list[str]:
    """Fields that a model has passed over: it takes what it doesn't know for a mistake of nobody's."""
    if isinstance(given, dict) and isinstance(known, dict):
        return [
            found
            for name, value in given.items()
            for found in (unknown(value, known[name], f"{place}.{name}") if name in known else [f"{place}.{name}"])
        ]
    if isinstance(given, list) and isinstance(known, list):
        return [found for a, b in zip(given, known, strict=True) for found in unknown(a, b, f"{place}[]")]
    return []


def env_of(container: dict[str, Any]) -> set[str]:
    return {variable["name"] for variable in container.get("env", [])}


@pytest.mark.parametrize("manifest", manifests(), ids=lambda manifest: manifest["kind"])
def test_a_manifest_is_what_kubernetes_takes(manifest: dict[str, Any]) -> None:
    model = MODELS[manifest["kind"]].from_dict(manifest)
    assert unknown(manifest, model.to_dict(), manifest["kind"]) == []


def test_the_compose_file_is_what_docker_takes() -> None:
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(ROOT / "docker/compose.yaml")]
    found = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_all_of_them_start_nodes_by_the_same_script_with_its_settings() -> None:
    script = (ROOT / "launch/node.sh").read_text()
    needed = set(re.findall(r"\$\{(\w+):\?", script))
    assert needed == {"STORE", "NODES"}
    jobset, runtime, train_job = (
        next(m for m in manifests() if m["kind"] == kind) for kind in ("JobSet", "TrainingRuntime", "TrainJob")
    )
    jobs = {job["name"]: job["template"]["spec"]["template"]["spec"] for job in jobset["spec"]["replicatedJobs"]}
    (node,) = jobs["node"]["containers"]
    trainer = train_job["spec"]["trainer"]
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    services = {name: service for name, service in compose.items() if name.startswith("node")}
    assert len(services) == 3
    assert needed | {"ADDRESS", "NPROC"} == env_of(node) == env_of(trainer)
    assert all(needed <= set(service["environment"]) for service in services.values())
    entries = [node["command"][0], trainer["command"][0], *(s["entrypoint"][0] for s in services.values())]
    assert {Path(entry).relative_to("/opt/dtrain") for entry in entries} == {Path("launch/node.sh")}
    (store,) = jobs["store"]["containers"]
    assert store["command"] == compose["store"]["entrypoint"] == ["dtrain", "store"]
    same = runtime["spec"]["template"]["spec"]
    assert same["network"] == jobset["spec"]["network"]
    ours, theirs = (spec["replicatedJobs"][1]["template"]["spec"] for spec in (jobset["spec"], same))
    for policy in ("podFailurePolicy", "successPolicy", "backoffLimit"):
        assert ours[policy] == theirs[policy]
    grace = ours["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace == theirs["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > Config(dir="x", global_batch=1, micro_batch=1).grace_s + 10, "the end itself takes some seconds"


def test_the_store_is_found_by_the_name_that_a_job_set_gives_it() -> None:
    for manifest in manifests():
        text = yaml.safe_dump(manifest)
        for store in re.findall(r"value: (\S+):29400", text):
            name = manifest["metadata"]["name"]
            assert store == f"{name}-store-0-0.{name}", manifest["kind"]
