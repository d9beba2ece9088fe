"""What can be checked of the deployment without Docker: its structure, its users and secrets, and its metrics."""

import fnmatch
import inspect
import json
import re

import pytest
import yaml
from packaging.requirements import Requirement
from prometheus_client.parser import text_string_to_metric_families
from test_structure import ROOT

from csm.__main__ import parse_arguments
from csm.serve.metrics import Metrics

tomllib = pytest.importorskip("tomllib")

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
DOCKERFILE = (ROOT / "Dockerfile").read_text()
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/csm.json").read_text())
ALERTS = yaml.safe_load((ROOT / "deploy/alerts.yml").read_text())
NAME = re.compile(r"\bcsm_\w+")
IMAGES = re.compile(r"^FROM (\S+)", re.MULTILINE)


def exported():
    """The names of all series of a server, and the labels of each family."""
    metrics = Metrics(*[lambda: 0] * len(inspect.signature(Metrics).parameters))
    metrics.requests.labels("end").inc()
    metrics.guards.labels("runaway").inc()
    names = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            names.setdefault(sample.name, set()).update(sample.labels)
    return names


def expressions():
    targets = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    return [*targets, *(rule["expr"] for group in ALERTS["groups"] for rule in group["rules"])]


def test_every_metric_of_dashboard_and_alerts_is_exported():
    names = exported()
    used = {name for expression in expressions() for name in NAME.findall(expression)}
    used |= set(NAME.findall(DASHBOARD["templating"]["list"][0]["definition"]))
    assert used <= set(names) and len(used) >= 10, used - set(names)
    for expression in expressions():
        for name, labels in re.findall(r"\b(csm_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", labels)) <= names[name] | {"instance", "job"}, expression
        for labels in re.findall(r"\bby \(([^)]*)\)", expression):
            known = set().union(*(names[name] for name in NAME.findall(expression))) | {"instance"}
            assert {label.strip() for label in labels.split(",")} <= known, expression


def test_the_dashboard_has_a_source_and_no_panel_overlaps():
    source = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text())
    (source,) = source["datasources"]
    used = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    assert used == {source["uid"]} and source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/csm.yml").read_text())["providers"]
    mounts = [volume.split(":") for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert [provider["options"]["path"], "ro"] in [mount[1:] for mount in mounts]
    cells = [
        (x, y)
        for panel in DASHBOARD["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_prometheus_asks_the_server_with_its_key():
    config = yaml.safe_load((ROOT / "deploy/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["csm:8000"]}]
    secret = job["authorization"]["credentials_file"].removeprefix("/run/secrets/")
    for service in ("csm", "prometheus"):
        assert secret in COMPOSE["services"][service]["secrets"]
    assert f"/run/secrets/{secret}" in COMPOSE["services"]["csm"]["command"]


def test_services_are_confined():
    volumes = COMPOSE["volumes"]
    for name, service in COMPOSE["services"].items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), f"{name} is not pinned"
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in volumes or (ROOT / source).exists(), volume
        assert not re.search("(KEY|PASSWORD|SECRET|TOKEN)\\b", " ".join(service.get("environment", {}))), name
        for value in service.get("environment", {}).values():
            assert not value.startswith("/run/secrets/") or value.rsplit("/", 1)[1] in service["secrets"], value
    readme = (ROOT / "docs/deploy.md").read_text()
    assert all(f"> {secret['file'].removeprefix('./')}\n" in readme for secret in COMPOSE["secrets"].values())
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert all(secret["file"].startswith("./deploy/secrets/") for secret in COMPOSE["secrets"].values())
    assert "deploy/secrets/" in ignored


def test_the_image():
    """Pinned, without root and secrets, with a volume and a health check, and with options that the server has."""
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in IMAGES.findall(DOCKERFILE))
    final = DOCKERFILE[DOCKERFILE.rindex("\nFROM") :]
    user, volume = final.index("\nUSER 10001"), final.index("\nVOLUME /data")
    assert user < final.index("\nENTRYPOINT") and volume < user and "HEALTHCHECK" in final and "/health" in final
    assert not re.search(r"(?i)^(ARG|ENV).*(token|key|secret|password)", DOCKERFILE, re.MULTILINE)
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)", final, re.MULTILINE)[1])
    given = [*entry[1:], *re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", " ".join(COMPOSE["services"]["csm"]["command"])).split()]
    args = parse_arguments(given)
    assert args.host == "0.0.0.0" and args.max_streams == 32 and str(args.api_key_file) == "/run/secrets/api_key"


def test_the_context_is_the_package_alone():
    """What .dockerignore lets through has every file that the wheel is built from, and nothing else at the top."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    copied = set(" ".join(re.findall(r"^COPY (?!--)(.*) \S+$", DOCKERFILE, re.MULTILINE)).split())
    assert copied == kept
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert folders <= kept and {project["project"]["readme"], *project["project"]["license-files"]} <= kept
    assert not any(fnmatch.fnmatch("deploy/secrets/api_key", pattern) for pattern in kept)


@pytest.mark.parametrize("extra", [None, "serve"])
def test_constraints_satisfy_the_project(extra):
    """Every dependency of the image is pinned to one version, which the project allows."""
    pinned = dict(
        line.split("==") for line in (ROOT / "deploy/constraints.txt").read_text().splitlines() if line[0] != "#"
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    requirements = [Requirement(text) for text in (extras[extra] if extra else project["dependencies"])]
    inner = [
        Requirement(text) for own in requirements if own.name == "csm" for name in own.extras for text in extras[name]
    ]
    for requirement in [own for own in requirements if own.name != "csm"] + inner:
        text = str(requirement)
        assert requirement.specifier.contains(pinned[requirement.name.lower().replace("_", "-")]), text
