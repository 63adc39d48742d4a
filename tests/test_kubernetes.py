"""The RayJob manifest against the fields of KubeRay's resource, as far as they can be had without its 1 MB of schema.

The fields, their types and which are required are those of RayJobSpec, RayClusterSpec, HeadGroupSpec and
WorkerGroupSpec in ray-project/kuberay, ray-operator/apis/ray/v1/rayjob_types.go (commit f6ef3f7b) and
raycluster_types.go (commit 3275ee09), and `authOptions` as KubeRay 1.5.1 added it. Not checked: the pod templates
beyond their containers' names, images, resources and mounts; what the API server and the operator ask beside fields.
"""

from __future__ import annotations

import copy
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rayfed.cli.commands import program as commands
from rayfed.config import load_config

ROOT = Path(__file__).parent.parent
TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
WORDS = {"type": "object", "additionalProperties": TEXT}
ANY = {"type": "object"}


def record(required: list[str], **fields: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": fields}


def listing(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


AMOUNTS = record([], requests=WORDS, limits=WORDS, claims={"type": "array"})
CONTAINER = {  # of a pod's many fields only these
    "type": "object",
    "required": ["name", "image", "resources"],
    "properties": {
        "name": TEXT,
        "image": TEXT,
        "resources": AMOUNTS,
        "volumeMounts": listing({"type": "object", "required": ["name", "mountPath"]}),
    },
}
POD = record(["spec"], metadata=ANY, spec={
    "type": "object", "required": ["containers"],
    "properties": {"containers": listing(CONTAINER), "volumes": listing({"type": "object", "required": ["name"]})},
})  # fmt: skip
HEAD = record(
    ["template", "rayStartParams"],
    template=POD, headService=ANY, enableIngress=FLAG, rayStartParams=WORDS,
    serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]},
)  # fmt: skip
WORKERS = record(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    suspend=FLAG, groupName=TEXT, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, idleTimeoutSeconds=COUNT,
    rayStartParams=WORDS, template=POD, scaleStrategy=ANY, numOfHosts=COUNT,
)  # fmt: skip
CLUSTER = record(
    ["headGroupSpec"],
    suspend=FLAG, managedBy=TEXT, autoscalerOptions=ANY, headServiceAnnotations=WORDS, enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=ANY, headGroupSpec=HEAD, rayVersion=TEXT, workerGroupSpecs=listing(WORKERS),
    authOptions=record(["mode"], mode={"enum": ["disabled", "token"]}),
)  # fmt: skip
SPEC = record(
    ["entrypoint", "rayClusterSpec"],
    activeDeadlineSeconds=COUNT, backoffLimit=COUNT, rayClusterSpec=CLUSTER, submitterPodTemplate=ANY, metadata=WORDS,
    clusterSelector=WORDS, submitterConfig=ANY, managedBy=TEXT, entrypoint=TEXT, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode"]}, entrypointResources=TEXT,
    entrypointNumCpus={"type": "number"}, entrypointNumGpus={"type": "number"}, ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=FLAG, suspend=FLAG,
    deletionPolicy={"enum": ["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]},
)  # fmt: skip
RAYJOB = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"}, kind={"const": "RayJob"}, metadata=ANY, spec=SPEC,
)  # fmt: skip


@pytest.fixture
def manifest() -> Any:
    return yaml.safe_load((ROOT / "configs" / "kubernetes" / "rayjob.yaml").read_text())


def test_every_field_is_one_that_the_resource_has(manifest: Any) -> None:
    checker = jsonschema.validators.validator_for(RAYJOB)(RAYJOB)
    assert [error.message for error in checker.iter_errors(manifest)] == []


@pytest.mark.parametrize(
    ("place", "field", "value"),
    [
        (["spec"], "shutdownAfterJobFinish", True),
        (["spec"], "submissionMode", "K8sJob"),
        (["spec", "rayClusterSpec"], "rayVersion", 2.6),
        (["spec", "rayClusterSpec", "headGroupSpec"], "rayStartParams", {"num-cpus": 0}),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0], "replicas", "2"),
        (["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec"], "containers", []),
    ],
    ids=lambda part: str(part) if isinstance(part, str) else None,
)
def test_a_wrong_field_is_found(manifest: Any, place: list[Any], field: str, value: Any) -> None:
    wrong = copy.deepcopy(manifest)
    target = wrong
    for step in place:
        target = target[step]
    target[field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, RAYJOB)


def test_the_command_is_one_that_rayfed_takes_and_fits_the_pods(manifest: Any) -> None:
    program, command, *words = shlex.split(manifest["spec"]["entrypoint"])
    assert program == "rayfed"
    options = commands.commands[command].make_context(command, words).params
    engine = load_config(options["config"], options["overrides"]).engine
    cluster = manifest["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    (worker,) = workers["template"]["spec"]["containers"]
    limits = worker["resources"]["limits"]
    on_gpu = int(1 / engine.gpus) * int(limits["nvidia.com/gpu"])
    on_cpu = int(int(limits["cpu"]) / engine.cpus_per_worker)
    assert engine.workers == workers["replicas"] * min(on_gpu, on_cpu)
    (head,) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]  # the driver needs none
    assert Path(options["out"]).is_relative_to(head["volumeMounts"][0]["mountPath"])
    assert head["image"] == worker["image"]


def test_it_names_the_pinned_ray_and_is_edited_in_two_places(manifest: Any) -> None:
    text = (ROOT / "configs" / "kubernetes" / "rayjob.yaml").read_text()
    (pin,) = re.findall(r"^ray==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert manifest["spec"]["rayClusterSpec"]["rayVersion"] == pin
    assert re.findall(r"^ *# (EDIT \d):", text, re.MULTILINE) == ["EDIT 1", "EDIT 2"]
