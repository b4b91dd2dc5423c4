"""docker-compose.yml, read as Compose reads it, and by Compose itself where there is one."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = COMPOSE["services"]
OURS = ["gateway", "auth", "credential-vault", "scheduler", "sprite-runner", "model-gateway", "local-sprites", "scripted-model"]


def test_the_world_sees_nothing():
    for name, service in SERVICES.items():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), (name, port)


def test_images_are_pinned():
    for name, service in SERVICES.items():
        repository, _, tag = service["image"].rpartition(":")
        assert repository and (tag != "latest") and (service["image"].startswith("aod/") or re.search(r"\d", tag)), name


def test_the_sandbox_server_has_what_runc_needs():
    # Without SYS_PTRACE runc cannot open the mount namespace of a container whose users are unknown here.
    assert set(SERVICES["local-sprites"]["cap_add"]) == {"SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE"}
    # COPY keeps the owners of what is in a directory, and not the directory's own, which a Sprite's root has to be.
    copies = re.findall(r"^COPY --from=rootfs (\S+) (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert copies == [("/made", "/usr/lib/local-sprites")]


def test_all_but_the_sandboxes_run_with_few_rights():
    for name, service in SERVICES.items():
        if name in ("postgres", "local-sprites"):
            continue
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        # Root once, for the files that it gives to others.
        assert service.get("user") != "0:0" or service["network_mode"] == "none", name


def test_sandboxes_share_a_network_with_those_alone_who_need_them():
    networks = {name: set(service.get("networks", ["default"])) for name, service in SERVICES.items() if "network_mode" not in service}
    assert networks["local-sprites"] == {"sandboxes"}
    assert {name for name, joined in networks.items() if "sandboxes" in joined} == {"local-sprites", "scripted-model", "sprite-runner", "model-gateway", "prometheus"}
    assert set().union(*networks.values()) <= set(COMPOSE["networks"])


def known_settings(name):
    reference = (ROOT / "docs/configuration.md").read_text()
    everywhere, own = (reference.split(f"\n## {part}\n")[1].split("\n## ")[0] for part in ("Every service", name))
    known = re.findall(r"^\| `([A-Z0-9_]+)(\[_FILE\])?`", everywhere + own, re.M)
    return {setting for setting, _ in known} | {f"{setting}_FILE" for setting, file in known if file}


def test_each_service_has_an_image_a_check_of_its_health_and_settings_that_it_knows():
    targets = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.M)
    for name in OURS:
        service = SERVICES[name]
        assert service["build"]["target"] == name and name in targets
        assert service["healthcheck"]["test"] == ["CMD", name, "--check-ready"]
        known = known_settings(name)
        environment = {}
        for part in [service.get("environment", {})]:
            environment.update(part)
        assert set(environment) <= known, (name, set(environment) - known)


def test_streams_are_created_by_a_user_of_their_own_before_the_scheduler_needs_them():
    streams, scheduler = SERVICES["streams"], SERVICES["scheduler"]
    assert streams["command"] == "deploy streams --watch" and streams["restart"] == "unless-stopped"
    assert set(streams["environment"]) <= known_settings("streams")
    assert streams["environment"]["EVENT_PARTITIONS"] == scheduler["environment"]["EVENT_PARTITIONS"]
    assert scheduler["depends_on"]["streams"] == {"condition": "service_started"}
    assert [name for name, service in SERVICES.items() if "secrets-streams:/secrets:ro" in service.get("volumes", [])] == ["streams"]


def test_what_is_mounted_is_there():
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).is_file() if source.startswith("./") else source in COMPOSE["volumes"], (name, volume)


def test_every_secret_has_a_volume(tmp_path):
    """`aod deploy secrets` runs with a root that it cannot write to."""
    subprocess.run([os.environ.get("AOD", "aod"), "deploy", "secrets", tmp_path], check=True, timeout=60, stdout=subprocess.DEVNULL)
    mounted = [volume.split(":")[1] for volume in SERVICES["secrets"]["volumes"]]
    assert sorted(f"/secrets/{folder.name}" for folder in tmp_path.iterdir()) == sorted(mounted)


def test_prometheus_asks_every_service():
    config = yaml.safe_load((ROOT / "observability/prometheus.yaml").read_text())
    asked = {job["dns_sd_configs"][0]["names"][0] for job in config["scrape_configs"]}
    assert asked == set(OURS) - {"scripted-model"}


@pytest.mark.skipif(not shutil.which("docker"), reason="no Docker here")
@pytest.mark.parametrize("files", [["docker-compose.yml"], ["docker-compose.yml", "docker-compose.cloud.yml"]])
def test_compose_accepts_it(files):
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("no Compose here")
    arguments = [argument for file in files for argument in ("-f", file)]
    subprocess.run(["docker", "compose", *arguments, "--profile", "*", "config", "--quiet"], cwd=ROOT, check=True)
