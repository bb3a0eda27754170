"""The files in docker/ and the pre-commit hooks: what they name exists and agrees. Needs no engine."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import requires, version
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from api.app import PREFIX
from api.routes import health
from api.settings import Settings, load_settings, settings_table
from api.store.engine import parse_url

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
# What docker/.env must hold.
VARIABLES = {"POSTGRES_PASSWORD": "p", "RAY_AUTH_TOKEN": "t", "MODELS_DIR": "/m", "DATA_DIR": "/d"}
API_PORT, RAY_PORT, NODE_PORT = 8756, 6379, 6380
STARTS_WITHIN_S = 60


# --- reading the files ------------------------------------------------------------------------------------------------


def _interpolate(text: str, values: Mapping[str, str]) -> str:
    """Put in variables as Compose does: ``${NAME:-default}`` and ``${NAME:?message}``."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        if name in values:
            return values[name]
        assert kind == "-", f"{name} has no value"
        return str(rest)

    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", value, text)


def _compose(name: str = "compose.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(_interpolate((DOCKER / name).read_text(), VARIABLES))
    return found


def _services() -> dict[str, dict[str, Any]]:
    services: dict[str, dict[str, Any]] = _compose()["services"]
    return services


def _ours() -> dict[str, dict[str, Any]]:
    """The services that run our image."""
    return {name: service for name, service in _services().items() if service["image"].startswith("mergeopt:")}


def _kubernetes(kind: str | None = None) -> list[dict[str, Any]]:
    objects = list(yaml.safe_load_all((DOCKER / "kuberay.yaml").read_text()))
    return [found for found in objects if kind in (None, found["kind"])]


def _pods() -> dict[str, dict[str, Any]]:
    """The pod templates of the Kubernetes example."""
    templates = {
        found["metadata"]["name"]: found["spec"]["template"]
        for found in _kubernetes()
        if "template" in found.get("spec", {})
    }
    (cluster,) = _kubernetes("RayCluster")
    templates["head"] = cluster["spec"]["headGroupSpec"]["template"]
    for group in cluster["spec"]["workerGroupSpecs"]:
        templates[group["groupName"]] = group["template"]
    return templates


def _containers() -> dict[str, dict[str, Any]]:
    return {name: container for name, pod in _pods().items() for container in pod["spec"]["containers"]}


def _instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines()]


def _image_environment() -> dict[str, str]:
    return dict(part.split("=", 1) for word, rest in _instructions() if word == "ENV" for part in shlex.split(rest))


def _stages() -> dict[str, str]:
    """The Dockerfile's stages, and what each is made from."""
    froms = [rest.split(" AS ") for word, rest in _instructions() if word == "FROM"]
    return {name: base for base, name in froms}


def _copied() -> list[tuple[str, str]]:
    """(stage, source) of every file that comes from the checkout."""
    stage, found = "", []
    for word, rest in _instructions():
        if word == "FROM":
            stage = rest.split(" AS ")[1]
        elif word == "COPY" and "--from=" not in rest:
            found += [(stage, part) for part in rest.split()[:-1] if not part.startswith("--")]
    return found


def _environment(container: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a Kubernetes container; those from a Secret as its (name, key)."""
    return {
        item["name"]: item["value"] if "value" in item else tuple(item["valueFrom"]["secretKeyRef"].values())
        for item in container.get("env", [])
    }


def _health_check() -> list[str]:
    """The command of the image's health check, with this Python."""
    (rest,) = [rest for word, rest in _instructions() if word == "HEALTHCHECK"]
    command: list[str] = json.loads(rest.partition("CMD ")[2])
    assert command[0] == "python"
    return [sys.executable, *command[1:]]


def _values(node: Any, key: str) -> Iterator[Any]:
    """Every value of ``key``, however deep."""
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == key)
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    for child in children:
        yield from _values(child, key)


# --- commands ---------------------------------------------------------------------------------------------------------


def _parse(program: Any, words: list[str]) -> None:
    """Check a command line against a program made with click or Typer, without running it; raises a usage error."""
    while hasattr(program, "commands"):
        assert words and words[0] in program.commands, f"there is no command {words}"
        program, words = program.commands[words[0]], words[1:]
    program.make_context(program.name, list(words))


def _mergeopt(words: list[str]) -> None:
    from api.cli import app

    _parse(typer.main.get_command(app), words)


def _ray(words: list[str]) -> None:
    from ray.scripts.scripts import cli

    _parse(cli, words)


def _check(words: list[str]) -> None:
    """Check a command line of a container, whichever program it runs."""
    program, rest = words[0], [str(word) for word in words[1:]]
    if program == "mergeopt":
        _mergeopt(rest)
    elif program == "ray":
        _ray(rest)
    elif program == "mergeopt-controller":
        assert ("cpu", "docker/controller") in _copied()
        assert not rest
    elif program == "python":
        assert rest[0] == "-c"
        compile(rest[1], "<command>", "exec")
    else:
        raise AssertionError(f"{program} is not in the image")


def test_the_image_starts_the_service() -> None:
    words = {word: json.loads(rest) for word, rest in _instructions() if word in ("ENTRYPOINT", "CMD")}
    _check(words["ENTRYPOINT"] + words["CMD"])


@pytest.mark.parametrize("name", sorted(_ours()))
def test_compose_runs_commands_that_exist(name: str) -> None:
    service = _ours()[name]
    _check(service.get("entrypoint", ["mergeopt"]) + service.get("command", []))
    test = service.get("healthcheck", {}).get("test")
    if test:
        assert test[0] == "CMD"
        _check(test[1:])


@pytest.mark.parametrize("name", sorted(_containers()))
def test_kubernetes_runs_commands_that_exist(name: str) -> None:
    container = _containers()[name]
    if "ray" not in container["name"]:
        _check(container.get("command", ["mergeopt"]) + container.get("args", []))
    for probe in _values(container, "exec"):
        _check(probe["command"])


def test_kuberay_starts_ray_with_options_that_exist() -> None:
    (cluster,) = _kubernetes("RayCluster")
    head, groups = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    for start, group in [("--head", head), *(("--address=head:6379", group) for group in groups)]:
        _ray(["start", start, "--block", *(f"--{name}={value}" for name, value in group["rayStartParams"].items())])


def test_the_controller_script_runs_commands_that_exist() -> None:
    script = (DOCKER / "controller").read_text().replace("\\\n", " ").replace("$MERGEOPT_RAY_ADDRESS", "ray-head:6379")
    commands = [shlex.split(line.rstrip("& ")) for line in script.splitlines() if line.endswith(" &")]
    assert [words[0] for words in commands] == ["ray", "mergeopt"]
    for words in commands:
        _check([word for word in words if word != "$@"])
    assert os.access(DOCKER / "controller", os.X_OK)


def test_commands_in_the_texts_exist() -> None:
    text = "\n".join((DOCKER / name).read_text() for name in ("README.md", "compose.yaml", "kuberay.yaml"))
    found = re.findall(
        r"(?:run --rm api|mergeopt:cpu|exec deploy/mergeopt-controller -- mergeopt) ([a-z][a-z ]+)", text
    )
    found = [words for words in found if not words.startswith("and ")]
    assert len(found) >= 4
    for words in found:
        _mergeopt(words.split())


def test_make_targets_of_the_pre_commit_hooks_exist() -> None:
    path = ROOT / ".pre-commit-config.yaml"
    subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", path], check=True, cwd=ROOT)
    repos = yaml.safe_load(path.read_text())["repos"]
    assert [repo["repo"] for repo in repos] == ["local"], "other repositories are downloaded"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for hook in repos[0]["hooks"]:
        program, target = hook["entry"].split()
        assert (program, hook["language"], hook["pass_filenames"]) == ("make", "system", False)
        assert target in targets


# --- settings and secrets ---------------------------------------------------------------------------------------------


def test_settings_exist() -> None:
    known = {name for name, _, _ in settings_table()}
    for path in sorted(DOCKER.iterdir()):
        used = set(re.findall(r"MERGEOPT_[A-Z_]*[A-Z]", path.read_text()))
        assert used <= known, path.name


@pytest.mark.parametrize("name", ["api", "controller", "migrate"])
def test_settings_are_valid(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = _image_environment() | _services()[name]["environment"]
    settings = _settings(environment, monkeypatch)
    database = parse_url(settings.database_url)
    assert (database.host, database.port) == ("postgres", 5432)
    assert database.password is None, "the password is not a part of the URL"


def test_settings_agree_between_compose_and_kubernetes() -> None:
    services, containers = _services(), _containers()
    for name in ("api", "controller"):
        ours = {key for key in services[name]["environment"] if key != "MERGEOPT_MAX_JOBS"}
        assert ours == set(_environment(containers[f"mergeopt-{name}"]))


def _settings(environment: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name in [name for name in os.environ if name.startswith("MERGEOPT_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    return load_settings()


def test_no_file_holds_a_secret() -> None:
    secret = re.compile("PASSWORD|TOKEN|SECRET|KEY")
    raw = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in raw["services"].values():
        for name, value in service.get("environment", {}).items():
            assert not secret.search(name) or re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), name
    for container in _containers().values():
        for name, value in _environment(container).items():
            assert not secret.search(name) or isinstance(value, tuple), name
    assert not [name for name in _image_environment() if secret.search(name)]
    assert not [rest for word, rest in _instructions() if word == "ARG" and secret.search(rest)]


def test_the_password_file_is_kept_out_of_git_and_images() -> None:
    assert ".env" in (DOCKER / ".gitignore").read_text().split()
    assert "docker" not in _allowed()


def test_required_variables_are_those_the_readme_writes() -> None:
    compose = (DOCKER / "compose.yaml").read_text()
    assert set(re.findall(r"\$\{(\w+):\?", compose)) == set(VARIABLES)
    readme = (DOCKER / "README.md").read_text()
    assert set(re.findall(r"^([A-Z_]+)=", readme, re.MULTILINE)) == set(VARIABLES)
    table = readme.partition("## Variables")[2].partition("\n## ")[0]
    for name, kind, default in re.findall(r"\$\{(\w+):([-?])([^}]*)\}", compose):
        (row,) = [line for line in table.splitlines() if f"`{name}`" in line]
        assert kind == "?" or default in row


# --- what refers to what ----------------------------------------------------------------------------------------------


def test_images_and_targets_exist() -> None:
    stages = _stages()
    known = {"${PYTHON_IMAGE}", *stages}
    assert set(stages.values()) <= known
    sources = re.findall(r"(?:--from=|from=)([\w-]+)", (DOCKER / "Dockerfile").read_text())
    assert set(sources) <= set(stages)
    services = {**_ours(), **{f"cuda {name}": each for name, each in _compose("compose.cuda.yaml")["services"].items()}}
    for service in services.values():
        assert service["image"] == f"mergeopt:{service['build']['target']}"
        assert service["build"]["target"] in stages
    assert {container["image"] for container in _containers().values()} == {"mergeopt:cpu", "mergeopt:cuda"}


def test_build_arguments_exist() -> None:
    declared = {rest.partition("=")[0] for word, rest in _instructions() if word == "ARG"}
    for service in _ours().values():
        assert set(service["build"]["args"]) == declared
        assert (DOCKER / service["build"]["context"]).resolve() == ROOT
        assert (ROOT / service["build"]["dockerfile"]).is_file()


def test_the_base_image_is_pinned_to_a_python_we_support() -> None:
    (image,) = [rest.partition("=")[2] for word, rest in _instructions() if rest.startswith("PYTHON_IMAGE=")]
    match = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-\w+", image)
    assert match is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(match[1])


def test_volumes_networks_and_dependencies_are_defined() -> None:
    compose = _compose()
    services = compose["services"]
    volumes = {
        volume["source"]
        for service in services.values()
        for volume in service.get("volumes", [])
        if volume["type"] == "volume"
    }
    assert volumes == set(compose["volumes"])
    assert {name for service in services.values() for name in service["networks"]} == set(compose["networks"])
    for service in services.values():
        for name, dependency in service.get("depends_on", {}).items():
            _check_condition(services[name], dependency["condition"])


def _check_condition(service: Mapping[str, Any], condition: str) -> None:
    if condition == "service_completed_successfully":
        assert service["restart"] == "no"
    else:
        assert condition == "service_healthy"
        assert "test" in service["healthcheck"]


def test_the_gpu_file_changes_services_that_exist() -> None:
    assert set(_compose("compose.cuda.yaml")["services"]) <= set(_services())


def test_roots_and_exports_are_mounted() -> None:
    for name in ("api", "controller", "ray-worker"):
        service = _services()[name]
        roots = (_image_environment() | service["environment"])["MERGEOPT_ROOTS"].split(",")
        mounts = {mount["target"]: mount for mount in service["volumes"]}
        assert all(mounts[root]["read_only"] for root in roots)
    exports = _services()["controller"]["environment"]["MERGEOPT_EXPORTS_DIR"]
    assert exports in {mount["target"] for mount in _services()["controller"]["volumes"]}
    for name in ("mergeopt-api", "mergeopt-controller", "gpu"):
        mounts = {mount["mountPath"]: mount for mount in _containers()[name]["volumeMounts"]}
        assert mounts["/models"]["readOnly"]
        assert mounts["/data"]["readOnly"]


def test_kubernetes_names_refer_to_what_is_defined() -> None:
    claims = {claim["metadata"]["name"] for claim in _kubernetes("PersistentVolumeClaim")}
    pods = _pods()
    for pod in pods.values():
        assert set(_values(pod, "claimName")) <= claims
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        assert {mount["name"] for mounts in _values(pod, "volumeMounts") for mount in mounts} <= volumes
    labels = [pod["metadata"]["labels"] for pod in pods.values()]
    selectors = [service["spec"]["selector"] for service in _kubernetes("Service")]
    selectors += [labels for found in _kubernetes() for labels in _values(found.get("spec"), "matchLabels")]
    for selector in selectors:
        in_pods = any(selector.items() <= each.items() for each in labels)
        assert in_pods or set(selector) == {"kubernetes.io/metadata.name"}, selector


def test_kubernetes_secrets_are_those_the_file_explains() -> None:
    (cluster,) = _kubernetes("RayCluster")
    explained = {
        ("mergeopt-database", "url"),
        ("mergeopt-database", "password"),
        (cluster["metadata"]["name"], "auth_token"),
    }
    used = {
        value for each in _containers().values() for value in _environment(each).values() if isinstance(value, tuple)
    }
    assert used == explained
    assert cluster["spec"]["authOptions"]["mode"] == "token"


def test_the_kubernetes_ray_version_is_one_we_support() -> None:
    (cluster,) = _kubernetes("RayCluster")
    (supported,) = [
        each for each in map(Requirement, requires("mergeopt") or []) if each.name == "ray" and not each.marker
    ]
    assert cluster["spec"]["rayVersion"] in supported.specifier
    assert Version(cluster["spec"]["rayVersion"]).release[:2] == Version(version("ray")).release[:2]


# --- ports, routes and who reaches them -------------------------------------------------------------------------------


def test_the_api_port_is_the_same_everywhere() -> None:
    assert Settings.model_fields["port"].default == API_PORT
    assert [rest for word, rest in _instructions() if word == "EXPOSE"] == [str(API_PORT)]
    assert _image_environment()["MERGEOPT_PORT"] == str(API_PORT)
    assert _services()["api"]["environment"]["MERGEOPT_PORT"] == str(API_PORT)
    assert _services()["api"]["ports"] == [f"127.0.0.1:{API_PORT}:{API_PORT}"]
    api = _containers()["mergeopt-api"]
    assert _environment(api)["MERGEOPT_PORT"] == str(API_PORT)
    assert api["ports"] == [{"name": "http", "containerPort": API_PORT}]
    (service,) = _kubernetes("Service")
    assert [(port["port"], port["targetPort"]) for port in service["spec"]["ports"]] == [(API_PORT, "http")]
    (policy,) = [each for each in _kubernetes("NetworkPolicy") if each["metadata"]["name"] == "api-from-ingress"]
    assert [port["port"] for port in policy["spec"]["ingress"][0]["ports"]] == [API_PORT]


def test_the_ray_ports_are_the_same_everywhere() -> None:
    services = _services()
    commands = {name: " ".join(service.get("command", [])) for name, service in services.items()}
    assert f"--port={RAY_PORT}" in commands["ray-head"]
    assert f"--address=ray-head:{RAY_PORT}" in commands["ray-worker"]
    assert services["ray-head"]["healthcheck"]["test"][-1] == f"ray-head:{RAY_PORT}"
    assert services["controller"]["environment"]["MERGEOPT_RAY_ADDRESS"] == f"ray-head:{RAY_PORT}"
    node = f"--node-manager-port={NODE_PORT}"
    assert all(
        node in text for text in (commands["ray-head"], commands["ray-worker"], (DOCKER / "controller").read_text())
    )
    assert f", {NODE_PORT})" in services["ray-worker"]["healthcheck"]["test"][-1]


def test_the_ray_ports_are_the_same_on_kubernetes() -> None:
    (cluster,) = _kubernetes("RayCluster")
    head, groups = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    assert head["rayStartParams"]["port"] == str(RAY_PORT)
    assert {group["rayStartParams"]["node-manager-port"] for group in [head, *groups]} == {str(NODE_PORT)}
    containers = _containers()
    probes = [
        socket["port"] for name in ("gpu", "mergeopt-controller") for socket in _values(containers[name], "tcpSocket")
    ]
    assert set(probes) == {NODE_PORT}
    assert {socket["port"] for socket in _values(containers["head"], "tcpSocket")} == {RAY_PORT, NODE_PORT}
    address = _environment(containers["mergeopt-controller"])["MERGEOPT_RAY_ADDRESS"]
    assert address == f"{cluster['metadata']['name']}-head-svc:{RAY_PORT}"


def test_ray_containers_have_probes_of_their_own() -> None:
    """Those that KubeRay puts in ask an agent that the images do not have, and would kill the pods."""
    for name in ("head", "gpu"):
        assert {"livenessProbe", "readinessProbe"} <= set(_containers()[name])


def test_only_the_api_can_be_reached() -> None:
    compose = _compose()
    assert [name for name, service in compose["services"].items() if "ports" in service] == ["api"]
    assert compose["networks"]["backend"] == {"internal": True}
    for name, service in compose["services"].items():
        assert service["networks"] == (["backend", "frontend"] if name == "api" else ["backend"])
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in _kubernetes("NetworkPolicy")}
    assert policies["default-deny"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    ray = policies["ray-among-its-nodes"]
    assert ray["ingress"] == [{"from": [{"podSelector": ray["podSelector"]}]}]
    assert {service["spec"].get("type", "ClusterIP") for service in _kubernetes("Service")} == {"ClusterIP"}


def test_every_ray_node_needs_the_token() -> None:
    nodes = {name for name, service in _ours().items() if "ray" in name or name == "controller"}
    assert nodes == {"controller", "ray-head", "ray-worker"}
    for name in nodes:
        environment = _services()[name]["environment"]
        assert (environment["RAY_AUTH_MODE"], environment["RAY_AUTH_TOKEN"]) == ("token", VARIABLES["RAY_AUTH_TOKEN"])


def test_health_checks_ask_routes_that_exist() -> None:
    routes = {f"{PREFIX}{getattr(route, 'path', '')}" for route in health.router.routes}
    asked = {probe["path"] for each in _containers().values() for probe in _values(each, "httpGet")}
    asked |= set(re.findall(r"/api/v1/[a-z]+", " ".join(_health_check())))
    assert asked == {f"{PREFIX}/health", f"{PREFIX}/ready"}
    assert asked <= routes


def test_containers_run_without_privileges() -> None:
    stages = [
        (rest.split(" AS ")[1] if word == "FROM" else rest)
        for word, rest in _instructions()
        if word in ("FROM", "USER")
    ]
    assert stages[stages.index("cpu") + 1] == stages[stages.index("cuda") + 1] == "10001:10001"
    for service in _ours().values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    for pod in _pods().values():
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


# --- the build --------------------------------------------------------------------------------------------------------


def _allowed() -> set[str]:
    """What .dockerignore lets into the build context."""
    first, *rest = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert first == "*"
    return {line[1:] for line in rest if line.startswith("!")}


def test_the_build_context_holds_what_is_copied_and_no_more() -> None:
    copied = {source for _, source in _copied()}
    assert copied == _allowed()
    assert all((ROOT / source).exists() for source in copied)


def test_the_wheel_in_the_image_is_complete(tmp_path: Path) -> None:
    """Build it from what the Dockerfile copies, with the build backend that pip would call."""
    for source in {source for stage, source in _copied() if stage in ("build", "wheel")}:
        copy: Callable[..., Any] = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        copy(ROOT / source, tmp_path / source)
    build = "from setuptools.build_meta import build_wheel; build_wheel('wheels')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in ("api", "migrations", "optimizer", "workers"):
        files = {str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= inside


def test_compose_accepts_its_files(tmp_path: Path) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True, check=False).returncode:
        pytest.skip("docker compose is not installed")
    environment = tmp_path / "env"
    environment.write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
    files = [DOCKER / "compose.yaml", DOCKER / "compose.cuda.yaml"]
    for chosen in (files[:1], files):
        options = [word for path in chosen for word in ("-f", str(path))]
        subprocess.run([docker, "compose", "--env-file", environment, *options, "config", "--quiet"], check=True)


# --- for real ---------------------------------------------------------------------------------------------------------


Start = Callable[[str, str], "subprocess.Popen[bytes]"]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _run(words: list[str], environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api", *words]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_the_api_service_and_its_health_check_run(tmp_path: Path) -> None:
    """The commands of compose.yaml, in its order, on SQLite. A loopback address that needs a token stands for 0.0.0.0."""
    services = _services()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MERGEOPT_")} | {
        "MERGEOPT_HOME": str(tmp_path),
        "MERGEOPT_PORT": str(_free_port()),
        "MERGEOPT_REQUIRE_TOKEN": "always",
    }

    def healthy() -> bool:
        check = subprocess.run(_health_check(), env=environment, capture_output=True, check=False, timeout=60)
        return check.returncode == 0

    migrated = _run(services["migrate"]["command"], environment)
    assert migrated.returncode == 0, migrated.stderr
    refused = _run(services["api"]["command"], environment)
    assert refused.returncode != 0
    assert "mergeopt token create" in refused.stderr
    assert not healthy()
    created = _run(["token", "create", "admin"], environment)
    assert created.returncode == 0, created.stderr

    command = [sys.executable, "-m", "api", *services["api"]["command"]]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL) as api:
        try:
            deadline = time.monotonic() + STARTS_WITHIN_S
            while not healthy():
                assert api.poll() is None, "the API ended"
                assert time.monotonic() < deadline, "the API does not become healthy"
        finally:
            api.terminate()
            api.wait(60)
    assert not healthy()


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Start]:
    """Starts docker/controller with two given shell scripts in the place of ``ray`` and ``mergeopt``."""
    started: list[subprocess.Popen[bytes]] = []

    def start(ray: str, mergeopt: str) -> subprocess.Popen[bytes]:
        for name, body in {"ray": ray, "mergeopt": mergeopt}.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MERGEOPT_RAY_ADDRESS": "ray-head:6379"}
        process = subprocess.Popen(["bash", DOCKER / "controller"], env=environment, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        with process, contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


# Ends with 0 when it is told to, as a controller does.
_GRACEFUL = "trap 'exit 0' TERM; touch {ready}; while true; do sleep 0.05; done"


def test_the_controller_container_ends_with_its_ray_node(controller: Start, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    node = f"while [ ! -e {ready} ]; do sleep 0.05; done; exit 1"
    assert controller(node, _GRACEFUL.format(ready=ready)).wait(30) == 0


def test_the_controller_container_ends_with_its_controller(controller: Start) -> None:
    assert controller("exec sleep 60", "exit 3").wait(30) == 3


def test_the_controller_container_passes_signals_on(controller: Start, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    process = controller("exec sleep 60", _GRACEFUL.format(ready=ready))
    deadline = time.monotonic() + STARTS_WITHIN_S
    while not ready.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    assert process.wait(30) == 0
