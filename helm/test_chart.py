"""The chart, rendered for several kinds of deployment. No cluster is needed."""

import base64
import ipaddress
import pathlib
import re

import helm_python
import kubernetes_validate
import pytest
import yaml
from helm_python import chart as charts

ROOT = pathlib.Path(__file__).parent
PATH = ROOT / "agent-on-demand"
SERVICES = ["gateway", "auth", "credential-vault", "scheduler", "sprite-runner"]
# Where sandboxes reach it.
TRIAL_SERVICES = [*SERVICES, "model-gateway"]
VERSIONS = ["1.28", "1.31", "1.34"]
# Kinds of others, whose schemas are not Kubernetes' own.
FOREIGN = {"ScaledObject", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}

REAL = {"nats": {"url": "nats://nats.bus:4222"}}
FULL = {
    "image": {"repository": "registry.example.com/aod", "tag": "1.2.3", "pullSecrets": [{"name": "pull"}]},
    "nats": {"url": "tls://a.example.com:4222,tls://b.example.com:4222", "caSecret": "nats-ca", "streamReplicas": 3, "monitoring": "nats.bus:8222"},
    "env": {"RUST_LOG": "debug"},
    "files": {"enabled": True, "storageClass": "shared"},
    "traces": {"endpoint": "http://collector.monitoring:4318"},
    "gateway": {
        "allowedHosts": ["api.example.com"],
        "autoscaling": {"enabled": True},
        "ingress": {"enabled": True, "className": "nginx", "host": "api.example.com", "tlsSecret": "api-tls", "annotations": {"a/b": "c"}},
        "httpRoute": {"enabled": True, "parentRefs": [{"name": "public"}], "hostnames": ["api.example.com"]},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "k", "operator": "Exists"}],
    },
    "credential-vault": {"existingSecret": "sealed", "sharedSpritesToken": True},
    "sprite-runner": {"autoscaling": {"kind": "keda", "prometheusAddress": "http://prometheus:9090"}, "env": {"AOD_MASK_SECRETS": True}},
    "networkPolicy": {"metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}], "gatewayFrom": [{"namespaceSelector": {}}]},
    "monitoring": {"serviceMonitor": {"enabled": True, "labels": {"release": "p"}}, "prometheusRule": {"enabled": True}, "dashboard": {"enabled": True}},
}
PLAIN_HPA = {**REAL, "sprite-runner": {"autoscaling": {"kind": "hpa"}}, "database": {"provision": False}, "networkPolicy": {"enabled": False}}
TRIAL = {"trial": {"enabled": True, "scriptedModel": True, "storageClass": "fast"}}
SETS = {"real": REAL, "full": FULL, "plain-hpa": PLAIN_HPA, "trial": TRIAL}


def render(values, **options):
    with charts.Chart.load(PATH) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name="aod", namespace="agents", revision=1, is_install=True, **options)
    return [document for path, text in rendered.items() if path.endswith(".yaml") for document in yaml.safe_load_all(text) if document]


def find(documents, kind, name):
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"] == f"aod-agent-on-demand-{name}")


def pods(documents):
    for document in documents:
        if document["kind"] == "Pod":
            yield document["metadata"]["name"], document
        elif document["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield document["metadata"]["name"], document["spec"]["template"]


def settings(pod):
    return {variable["name"]: variable.get("value") for variable in pod["spec"]["containers"][0].get("env", [])}


@pytest.mark.parametrize("name", SETS)
def test_lint_has_nothing_to_say(name):
    report = charts.lint(PATH, SETS[name], strict=True)
    assert [m for m in report["messages"] if m["severity"] > 1] == [] and report["errors"] in ([], None), report


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", SETS)
def test_every_manifest_is_valid(name, version):
    documents = render(SETS[name])
    names = [(d["apiVersion"], d["kind"], d["metadata"]["name"]) for d in documents]
    assert len(names) == len(set(names))
    validated = 0
    for document in documents:
        if document["kind"] not in FOREIGN:
            kubernetes_validate.validate(document, version, strict=True)
            validated += 1
    assert validated > 15


@pytest.mark.parametrize("name", SETS)
def test_services_run_with_as_few_rights_as_pods_can(name):
    documents = render(SETS[name])
    for pod_name, pod in pods(documents):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, pod_name
        if "local-sprites" in pod_name:
            continue
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault", pod_name
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False and security["capabilities"]["drop"] == ["ALL"], pod_name
            assert "postgres" in pod_name or security["readOnlyRootFilesystem"], pod_name
            assert container["resources"]["limits"]["memory"] and container["resources"]["requests"]["cpu"], pod_name


def mounted(pod):
    for volume in pod["spec"].get("volumes", []):
        if "secret" in volume:
            for item in volume["secret"].get("items", [{"key": None}]):
                yield volume["secret"]["secretName"], item["key"]


def test_each_service_sees_its_own_secrets_and_the_vault_alone_its_key():
    documents = render(FULL)
    for service in SERVICES:
        pod = find(documents, "Deployment", service)["spec"]["template"]
        own = "sealed" if service == "credential-vault" else f"aod-agent-on-demand-{service}"
        assert {name for name, _ in mounted(pod)} == {own, "nats-ca"}
        assert ("FIELD_ENCRYPTION_KEY" in [key for _, key in mounted(pod)]) == (service == "credential-vault")
        # No secret's value is in an environment.
        assert all("PASSWORD" not in name or name.endswith("_FILE") for name in settings(pod))
    assert not [d for d in documents if d["kind"] == "Secret"]


@pytest.mark.parametrize("name", SETS)
def test_every_setting_is_one_that_the_service_knows(name):
    reference = (ROOT / "../docs/configuration.md").read_text()
    for pod_name, pod in pods(render(SETS[name])):
        if re.search("postgres|nats$|-test$|-database", pod_name):
            continue
        component = pod["metadata"]["labels"]["app.kubernetes.io/component"]
        own = reference.split(f"\n## {component}\n")[1].split("\n## ")[0] + reference.split("\n## Every service\n")[1].split("\n## ")[0]
        known = re.findall(r"^\| `([A-Z0-9_]+)(\[_FILE\])?`", own, re.M)
        known = {n for n, _ in known} | {f"{n}_FILE" for n, file in known if file}
        assert set(settings(pod)) <= known, (component, set(settings(pod)) - known)


def test_the_gateway_alone_is_public_and_runners_alone_reach_out():
    documents = render(REAL)
    for service in SERVICES:
        policy = find(documents, "NetworkPolicy", service)["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        open_ports = [port["port"] for rule in policy["ingress"] for port in rule["ports"]]
        assert open_ports == (["admin", "api"] if service == "gateway" else ["admin"])
        reached = {port["port"] for rule in policy["egress"] for port in rule["ports"]}
        database = {5432} if service in ("auth", "credential-vault", "scheduler") else set()
        assert reached == {53, 4222} | database | ({443} if service == "sprite-runner" else set())
    assert [d["metadata"]["name"] for d in documents if d["kind"] == "Service" and not d["metadata"]["name"].endswith("-metrics")] == [
        "aod-agent-on-demand-gateway"
    ]


def test_sandboxes_reach_public_addresses_and_nothing_of_the_cluster():
    documents = render({**TRIAL, "networkPolicy": {"sandboxesExcept": ["203.0.113.10/32"]}})
    policy = find(documents, "NetworkPolicy", "local-sprites")["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    assert all("to" in rule for rule in policy["egress"]), "a rule without peers reaches everything"
    blocks = [peer["ipBlock"] for rule in policy["egress"] if "ports" not in rule for peer in rule["to"]]
    assert [block["cidr"] for block in blocks] == ["0.0.0.0/0"]
    closed = [ipaddress.ip_network(cidr) for cidr in blocks[0]["except"]]
    # The metadata service, pods and services of clusters, the API server that was named.
    for address in ("169.254.169.254", "100.100.100.200", "10.96.0.1", "172.20.0.1", "192.168.0.1", "203.0.113.10"):
        assert any(ipaddress.ip_address(address) in network for network in closed), address
    assert not any(ipaddress.ip_address("1.1.1.1") in network for network in closed)
    peers = [peer for rule in policy["ingress"] if rule["ports"] == [{"port": "api"}] for peer in rule["from"]]
    assert [peer["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for peer in peers] == ["sprite-runner"]


def test_a_pod_gets_more_time_than_its_service_takes_to_stop():
    documents = render(REAL)
    for service in SERVICES:
        pod = find(documents, "Deployment", service)["spec"]["template"]
        grace = int(settings(pod)["AOD_STOP_GRACE_SECONDS"])
        assert pod["spec"]["terminationGracePeriodSeconds"] >= grace + 10 and grace >= int(settings(pod).get("AOD_DRAIN_SECONDS", 0)) + 10


def test_what_selects_finds_something():
    documents = render(FULL)
    labels = [pod["metadata"]["labels"].items() for _, pod in pods(documents)]
    for document in documents:
        spec = document.get("spec", {})
        selector = {"Service": spec.get("selector"), "PodDisruptionBudget": spec.get("selector", {}).get("matchLabels"),
                    "NetworkPolicy": spec.get("podSelector", {}).get("matchLabels")}.get(document["kind"])
        if selector:
            assert [1 for found in labels if selector.items() <= found] == [1], document["metadata"]["name"]
        ports = {p["name"] for _, pod in pods(documents) for c in pod["spec"]["containers"] for p in c.get("ports", [])}
        if document["kind"] == "Service":
            assert {p.get("targetPort", p["name"]) for p in spec["ports"]} <= ports
    monitor = next(d for d in documents if d["kind"] == "ServiceMonitor")
    watched = [d for d in documents if d["kind"] == "Service" and monitor["spec"]["selector"]["matchLabels"].items() <= d["metadata"]["labels"].items()]
    assert len(watched) == len(SERVICES)
    # The alerts' `up{job=~"aod.*"}` finds them.
    assert monitor["spec"]["endpoints"][0]["relabelings"][0]["replacement"] == "aod-$1"


def test_runners_scale_by_what_waits():
    triggers = next(d for d in render(FULL) if d["kind"] == "ScaledObject")["spec"]["triggers"]
    assert triggers[0]["metadata"] == {"natsServerMonitoringEndpoint": "nats.bus:8222", "account": "AOD", "stream": "JOBS", "consumer": "runner", "lagThreshold": "48"}
    assert "aod_jobs_in_hand" in triggers[1]["metadata"]["query"]
    metrics = find(render(PLAIN_HPA), "HorizontalPodAutoscaler", "sprite-runner")["spec"]["metrics"]
    assert [m["external"]["metric"]["name"] for m in metrics] == ["aod_jobs_waiting", "aod_jobs_in_hand"]
    # Whoever is scaled has no number of its own, that an upgrade would go back to.
    for values, scaled in ((FULL, {"gateway", "sprite-runner"}), (REAL, set())):
        documents = render(values)
        assert {s for s in SERVICES if "replicas" not in find(documents, "Deployment", s)["spec"]} == scaled


def test_streams_pass_the_ingress():
    ingress = next(d for d in render(FULL) if d["kind"] == "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/proxy-buffering"] == "off" and annotations["a/b"] == "c"
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) > 600
    assert next(d for d in render(FULL) if d["kind"] == "HTTPRoute")["spec"]["rules"][0]["timeouts"] == {"request": "0s"}


def test_the_gateway_answers_to_its_names_and_starts_in_production():
    for values, hosts in ((REAL, []), (FULL, ["api.example.com"])):
        documents = render(values)
        environment = settings(find(documents, "Deployment", "gateway")["spec"]["template"])
        own = ["aod-agent-on-demand-gateway", "aod-agent-on-demand-gateway.agents.svc"]
        assert environment["AOD_ENV"] == "production" and environment["ALLOWED_HOSTS"].split(",") == own + hosts
        # `helm test` calls it by the first.
        test = next(d for d in documents if d["kind"] == "Pod")
        assert test["spec"]["containers"][0]["args"][2].startswith(f"http://{own[0]}:")


def test_files_are_on_one_volume_of_the_services_that_use_it():
    def mounted(values):
        claims = {}
        for name, pod in pods(render(values)):
            for volume in pod["spec"].get("volumes", []):
                if volume["name"] == "files":
                    [mount] = [m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "files"]
                    assert settings(pod)["AOD_FILES_URL"] == f"file://{mount}"
                    claims[name.removeprefix("aod-agent-on-demand-")] = volume["persistentVolumeClaim"]["claimName"]
        return claims

    users = ["gateway", "scheduler", "sprite-runner"]
    assert mounted(FULL) == dict.fromkeys(users, "aod-agent-on-demand-files")
    claim = find(render(FULL), "PersistentVolumeClaim", "files")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"] and claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    own = {**REAL, "files": {"enabled": True, "existingClaim": "mine"}}
    assert mounted(own) == dict.fromkeys(users, "mine")
    assert not [d for d in render(own) if d["kind"] == "PersistentVolumeClaim"]
    assert mounted(REAL) == {} and "AOD_FILES_URL" not in settings(find(render(REAL), "Deployment", "gateway")["spec"]["template"])


def test_files_are_in_a_bucket_that_the_services_reach_with_its_key():
    s3 = {"bucket": "aod-files", "prefix": "prod", "endpoint": "https://s3.example.com:9000", "pathStyle": False, "existingSecret": "bucket"}
    documents = render({**REAL, "files": {"enabled": True, "s3": s3}})
    users = set()
    for name, pod in pods(documents):
        env = settings(pod)
        if "AOD_FILES_URL" not in env:
            assert not [v for v in pod["spec"].get("volumes", []) if v["name"] == "secrets-files"]
            continue
        service = name.removeprefix("aod-agent-on-demand-")
        users.add(service)
        assert env["AOD_FILES_URL"] == "s3://aod-files/prod" and env["AOD_FILES_S3_PATH_STYLE"] == "false"
        assert (env["AOD_FILES_S3_ENDPOINT"], env["AOD_FILES_S3_REGION"]) == ("https://s3.example.com:9000", "us-east-1")
        [volume] = [v for v in pod["spec"]["volumes"] if v["name"] == "secrets-files"]
        [mount] = [m for m in pod["spec"]["containers"][0]["volumeMounts"] if m["name"] == "secrets-files"]
        assert volume["secret"]["secretName"] == "bucket"
        for key in ["AOD_FILES_S3_ACCESS_KEY_ID", "AOD_FILES_S3_SECRET_ACCESS_KEY"]:
            assert env[f"{key}_FILE"] == f"{mount['mountPath']}/{key}"
            assert {"key": key, "path": key} in volume["secret"]["items"]
        policy = find(documents, "NetworkPolicy", service)
        assert 9000 in [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]
    assert users == {"gateway", "scheduler", "sprite-runner"}
    assert not [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    for endpoint, port in [("", 443), ("http://minio", 80)]:
        documents = render({**REAL, "files": {"enabled": True, "s3": {**s3, "endpoint": endpoint}}})
        egress = find(documents, "NetworkPolicy", "scheduler")["spec"]["egress"]
        assert port in [port["port"] for rule in egress for port in rule["ports"]]
    with pytest.raises(helm_python.HelmError, match="files.s3.existingSecret"):
        render({**REAL, "files": {"enabled": True, "s3": {"bucket": "aod-files"}}})


def test_the_database_is_made_before_the_services_need_it():
    job = find(render(REAL), "Job", "database")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
    assert not [d for d in render(PLAIN_HPA) if d["kind"] == "Job"]
    # The trial's own Postgres is not there before the rest.
    assert "annotations" not in find(render(TRIAL), "Job", "database-1")["metadata"]


def test_streams_are_created_by_a_user_of_their_own():
    values = {**FULL, "env": {"AOD_EVENTS_MAX_BYTES": "1073741824"}, "scheduler": {"env": {"EVENT_PARTITIONS": 3}}}
    documents = render(values)
    pod = find(documents, "Deployment", "streams")["spec"]["template"]
    assert pod["spec"]["containers"][0]["args"] == ["deploy", "streams", "--watch"]
    assert {name for name, _ in mounted(pod)} == {"aod-agent-on-demand-streams", "nats-ca"}
    scheduler = settings(find(documents, "Deployment", "scheduler")["spec"]["template"])
    own = settings(pod)
    assert own["EVENT_PARTITIONS"] == scheduler["EVENT_PARTITIONS"] == "3"
    assert (own["AOD_STREAM_REPLICAS"], own["AOD_EVENTS_MAX_BYTES"]) == ("3", "1073741824") and "AOD_STREAM_REPLICAS" not in scheduler
    policy = find(documents, "NetworkPolicy", "streams")["spec"]
    assert "ingress" not in policy and {port["port"] for rule in policy["egress"] for port in rule["ports"]} == {53, 4222}


def test_a_trials_secrets_fit_each_other():
    documents = render(TRIAL)
    secrets = {d["metadata"]["name"].removeprefix("aod-agent-on-demand-"): {k: base64.b64decode(v).decode() for k, v in d["data"].items()}
               for d in documents if d["kind"] == "Secret"}
    permissions = (PATH / "files/permissions.conf").read_text()
    assert set(re.findall(r"\$(NATS_PASSWORD_\w+)", permissions)) == set(secrets["nats"])
    users = ["gateway", "auth", "vault", "scheduler", "runner", "model_gateway", "streams"]
    for service, user in zip([*TRIAL_SERVICES, "streams"], users, strict=True):
        assert secrets[service]["NATS_PASSWORD"] == secrets["nats"][f"NATS_PASSWORD_{user.upper()}"]
        if "DATABASE_URL" in secrets[service]:
            assert secrets[service]["DATABASE_URL"] == f"postgres://{user}:{secrets['database'][user]}@aod-agent-on-demand-postgres:5432/aod"
        pod = find(documents, "Deployment", service)["spec"]["template"]
        assert {(name.removeprefix("aod-agent-on-demand-"), key) for name, key in mounted(pod)} <= {(n, k) for n, keys in secrets.items() for k in keys}
    assert secrets["credential-vault"]["SPRITES_API_KEY"] == secrets["local-sprites"]["LOCAL_SPRITES_TOKEN"]
    values = [value for name, keys in secrets.items() if name == "trial" for value in keys.values()]
    assert len(values) == len(set(values)) and all(len(value) == 44 for value in values)


@pytest.mark.parametrize("wrong, named", [
    ({"gatway": {}}, "gatway"),
    ({"sprite-runner": {"autoscaling": {"kind": "cron"}}}, "kind"),
    ({"nats": {"url": "http://nats"}}, "url"),
    ({"gateway": {"replicas": "two"}}, "replicas"),
])
def test_wrong_values_are_refused(wrong, named):
    with pytest.raises(helm_python.HelmError, match=named):
        render({**REAL, **wrong})


def test_what_is_missing_is_named():
    with pytest.raises(helm_python.HelmError, match="nats.url"):
        render({})
    with pytest.raises(helm_python.HelmError, match="nats.monitoring"):
        render({**REAL, "sprite-runner": {"autoscaling": {"kind": "keda"}}})
