"""The Helm chart: lint, rendered manifests against the schemas of Kubernetes, and the server's options that it uses."""

from __future__ import annotations

import re
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml

from yuan_grpc.cli.commands import SUMMARIES
from yuan_grpc.preflight.flags import unknown_flags
from yuan_grpc.server.settings import add_options

helm = pytest.importorskip("helm_python", reason="needs helm: pip install helm-python-sdk")
kubernetes = pytest.importorskip("kubernetes_validate", reason="needs schemas: pip install kubernetes-validate")

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "deploy/helm"
EXAMPLES = sorted(path for path in (CHART / "examples").glob("*.yaml") if "policy" not in path.stem)
VERSIONS = ("1.29", "1.34")
CUSTOM = {
    "GRPCRoute": "gateway.networking.k8s.io/v1",
    "InferencePool": "inference.networking.k8s.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "ScaledObject": "keda.sh/v1alpha1",
}
"""Kinds that Kubernetes itself has no schema of."""

FULL: dict[str, Any] = {
    "replicaCount": 2,
    "model": {
        "name": "/models/yuan",
        "existingClaim": "checkpoints",
        "hubTokenSecret": {"name": "hub"},
        "offline": True,
    },
    "lora": {"existingClaim": "adapters"},
    "cache": {"create": True, "accessModes": ["ReadWriteMany"], "storageClassName": "fast"},
    "server": {"frontends": 4, "vllmEngine": True, "extraArgs": ["--max-num-seqs=64"]},
    "http": {"enabled": True},
    "tls": {"secretName": "certificate", "requireClientCertificate": True},
    "tokens": {"secretName": "callers"},
    "autoscaling": {"enabled": True, "kind": "hpa"},
    "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "grpcRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["yuan.example"]},
    "inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}},
    "nodeSelector": {"accelerator": "h100"},
    "resources": {"limits": {"nvidia.com/gpu": 2}},
}
"""Values that enable everything."""

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "full": FULL,
    "keda": {"autoscaling": {"enabled": True}},
    **{path.stem: yaml.safe_load(path.read_text()) for path in EXAMPLES},
}


def render(values: dict[str, Any]) -> dict[str, Any]:
    """Return the manifests of a release in the namespace `prod`, by kind."""
    with helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="yuan-grpc", namespace="prod")
    texts = [text for name, text in rendered.items() if name.endswith(".yaml")]
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]
    by_kind = {manifest["kind"]: manifest for manifest in manifests}
    assert len(by_kind) == len(manifests)
    return by_kind


def pod(values: dict[str, Any]) -> dict[str, Any]:
    """Return the specification of the pods."""
    specification: dict[str, Any] = render(values)["Deployment"]["spec"]["template"]["spec"]
    return specification


def container(values: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(values)["containers"]
    assert isinstance(only, dict)
    return only


def test_lint_finds_nothing() -> None:
    for values in CASES.values():
        report = helm.lint(CHART, values, strict=True)
        assert report["errors"] == []
        assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_manifest_is_valid(case: str, version: str) -> None:
    for kind, manifest in render(CASES[case]).items():
        assert manifest["metadata"]["namespace"] == "prod"
        if kind in CUSTOM:
            assert manifest["apiVersion"] == CUSTOM[kind]
        else:
            kubernetes.validate(manifest, version, strict=True)


def test_each_kind_is_rendered() -> None:
    kinds = set(render(FULL)) | set(render(CASES["keda"]))
    assert kinds == {
        *CUSTOM,
        "Deployment",
        "HorizontalPodAutoscaler",
        "NetworkPolicy",
        "PersistentVolumeClaim",
        "PodDisruptionBudget",
        "Service",
        "ServiceAccount",
    }


def test_the_schema_covers_exactly_the_values() -> None:
    def keys(schema: dict[str, Any], values: Any, path: str = "") -> None:
        properties = schema.get("properties")
        if not properties:
            return
        assert schema["additionalProperties"] is False, path
        assert set(properties) - {"global", "claims"} == set(values), path
        for name, value in values.items():
            if isinstance(value, dict):
                keys(properties[name], value, f"{path}.{name}")

    with helm.Chart.load(CHART) as chart:
        keys(chart.schema, chart.values)


@pytest.mark.parametrize(
    ("values", "path"),
    [
        ({"replicas": 2}, "replicas"),
        ({"server": {"port": 80}}, "/server/port"),
        ({"server": {"graceSeconds": "30"}}, "/server/graceSeconds"),
        ({"image": {"digest": "sha256:abc"}}, "/image/digest"),
        ({"tls": {"requireClientCertificate": True}}, "/tls/secretName"),
        ({"grpcRoute": {"enabled": True}}, "/grpcRoute/parentRefs"),
        ({"inferencePool": {"enabled": True}}, "/inferencePool/endpointPicker/name"),
        ({"autoscaling": {"kind": "vpa"}}, "/autoscaling/kind"),
        ({"networkPolicy": {"from": []}}, "/networkPolicy/from"),
    ],
)
def test_wrong_values_are_refused_with_their_name(values: dict[str, Any], path: str) -> None:
    with pytest.raises(helm.HelmValuesError) as refused, helm.Chart.load(CHART) as chart:
        chart.validate_schema(values)
    assert path in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"podMonitor": {"enabled": True}, "metrics": {"enabled": False}}, "podMonitor.enabled needs metrics.enabled"),
        (
            {"inferencePool": {"enabled": True, "endpointPicker": {"name": "picker"}}},
            "inferencePool.port grpc needs server.vllmEngine",
        ),
    ],
)
def test_values_that_exclude_each_other_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(helm.HelmRenderError, match=re.escape(message)):
        render(values)


@pytest.fixture(scope="module")
def options() -> set[str]:
    """The options of `yuan-grpc serve`."""
    parser = ArgumentParser()
    add_options(parser, {})
    return {option for action in parser._actions for option in action.option_strings}


@pytest.mark.parametrize("case", CASES)
def test_the_server_has_every_option(case: str, options: set[str]) -> None:
    flags = [argument.partition("=")[0] for argument in container(CASES[case])["args"]]
    others = [flag for flag in flags if flag not in options]
    assert unknown_flags(others) == []


def test_the_arguments_follow_the_values() -> None:
    arguments = container(FULL)["args"]
    assert set(arguments) >= {
        "--port=50051",
        "--http-port=8000",
        "--metrics-port=9464",
        "--frontends=4",
        "--vllm-engine",
        "--tls-client-ca-file=/etc/yuan-grpc/tls/ca.crt",
        "--token-file=/etc/yuan-grpc/tokens/tokens",
        "--model=/models/yuan",
        "--enable-lora",
        "--lora-folder=/adapters",
        "--max-num-seqs=64",
    }
    assert "--allow-plaintext" not in arguments
    assert "--allow-plaintext" in container({})["args"]


def test_pods_are_confined() -> None:
    for values in ({}, FULL):
        specification, server = pod(values), container(values)
        assert specification["securityContext"]["runAsNonRoot"] is True
        assert specification["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert specification["automountServiceAccountToken"] is False
        assert server["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_pods_run_as_the_user_of_the_image() -> None:
    uid = pod({})["securityContext"]["runAsUser"]
    dockerfile = (REPOSITORY / "Dockerfile").read_text()
    assert f"useradd --uid {uid} " in dockerfile
    assert re.search(rf"^USER {uid}:{uid}$", dockerfile, re.MULTILINE)


def test_every_folder_that_the_server_writes_to_is_a_volume() -> None:
    mounts = {mount["mountPath"]: mount for mount in container(FULL)["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod(FULL)["volumes"]}
    assert {path for path, mount in mounts.items() if not mount.get("readOnly")} == {
        "/home/yuan/.cache",
        "/tmp",
        "/dev/shm",
    }
    assert volumes.keys() == {mount["name"] for mount in mounts.values()}
    assert volumes["shm"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "2Gi"}
    assert volumes["cache"]["persistentVolumeClaim"] == {"claimName": "yuan-grpc-cache"}
    assert volumes["model"]["persistentVolumeClaim"] == {"claimName": "checkpoints", "readOnly": True}


@pytest.mark.parametrize("service", ["startup", "readiness", "liveness"])
def test_probes_ask_for_a_service_of_the_health_protocol(service: str) -> None:
    probe = f"{service}Probe"
    assert container({})[probe]["grpc"] == {"port": 50051, "service": service}
    secured = container({"tls": {"secretName": "certificate"}})
    command = secured[probe]["exec"]["command"]
    assert command == ["yuan-grpc", "probe", service, "--address", "unix:/tmp/yuan-grpc.sock"]
    assert "--unix-socket=/tmp/yuan-grpc.sock" in secured["args"]
    assert command[1] in SUMMARIES


def test_a_pod_has_time_to_load_its_model_and_to_finish_its_calls() -> None:
    values = {"probes": {"startupSeconds": 3600}, "server": {"graceSeconds": 300, "withdrawSeconds": 10}}
    probe = container(values)["startupProbe"]
    assert probe["failureThreshold"] * probe["periodSeconds"] >= 3600
    assert pod(values)["terminationGracePeriodSeconds"] >= 310 + 10


def test_pods_with_gpus_are_replaced_one_after_the_other() -> None:
    assert render({})["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert render(FULL)["Deployment"]["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_the_service_names_its_protocol() -> None:
    def protocols(values: dict[str, Any]) -> dict[str, str]:
        return {port["name"]: port["appProtocol"] for port in render(values)["Service"]["spec"]["ports"]}

    assert protocols({}) == {"grpc": "kubernetes.io/h2c"}
    assert protocols(FULL) == {"grpc": "https", "http": "http"}
    assert protocols({"service": {"appProtocol": "grpc"}}) == {"grpc": "grpc"}


def test_selectors_match_the_pods_and_ports_have_names_of_the_container() -> None:
    manifests = render(FULL)
    labels = manifests["Deployment"]["spec"]["template"]["metadata"]["labels"]
    ports = {port["name"] for port in container(FULL)["ports"]}
    selectors = [
        manifests["Service"]["spec"]["selector"],
        manifests["Deployment"]["spec"]["selector"]["matchLabels"],
        manifests["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        manifests["PodMonitor"]["spec"]["selector"]["matchLabels"],
        manifests["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        manifests["InferencePool"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    allowed = {port["port"] for rule in manifests["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]}
    scraped = {endpoint["port"] for endpoint in manifests["PodMonitor"]["spec"]["podMetricsEndpoints"]}
    assert allowed == ports == {"grpc", "http", "metrics"}
    assert scraped == {"metrics"}


def test_autoscalers_follow_the_waiting_requests() -> None:
    by_hpa, by_keda = render(FULL), render(CASES["keda"])
    (metric,) = by_hpa["HorizontalPodAutoscaler"]["spec"]["metrics"]
    assert metric["pods"]["metric"] == {"name": "vllm_num_requests_waiting"}
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "5"}
    (trigger,) = by_keda["ScaledObject"]["spec"]["triggers"]
    query = 'sum(vllm:num_requests_waiting{namespace="prod",pod=~"yuan-grpc-[^-]+-[^-]+"})'
    assert (trigger["metadata"]["query"], trigger["metadata"]["threshold"]) == (query, "5")
    for manifests in by_hpa, by_keda:
        assert "replicas" not in manifests["Deployment"]["spec"]


def test_routes_and_pools_lead_to_the_grpc_port() -> None:
    manifests = render(FULL)
    (rule,) = manifests["GRPCRoute"]["spec"]["rules"]
    assert rule["backendRefs"] == [{"name": manifests["Service"]["metadata"]["name"], "port": 50051}]
    pool = manifests["InferencePool"]["spec"]
    assert (pool["targetPorts"], pool["appProtocol"]) == ([{"number": 50051}], "kubernetes.io/h2c")


def test_the_network_policy_allows_only_named_peers() -> None:
    policy = render(CASES["secured"])["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all(rule["from"] for rule in policy["ingress"])
    assert {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53}


def test_the_digest_of_an_image_takes_precedence() -> None:
    digest = f"sha256:{'0' * 64}"
    assert container({"image": {"tag": "new"}})["image"] == "yuan-grpc:new"
    assert container({"image": {"tag": "new", "digest": digest}})["image"] == f"yuan-grpc@{digest}"


def test_the_chart_has_the_version_of_the_package() -> None:
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["version"] == chart["appVersion"] == version
    assert container({})["image"] == f"yuan-grpc:{version}"
