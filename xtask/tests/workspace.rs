//! The workspace's own rules: who may depend on whom, and that what is generated is what is
//! committed.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, fs, process::Command};

use serde_json::Value;
use xtask::{bus::covers, root};

/// What each of our libraries may use of ours. Services may use any library; nothing may use a
/// service.
const ALLOWED: [(&str, &[&str]); 12] = [
    ("types", &[]),
    ("sealing", &[]),
    ("contract", &["types"]),
    ("rules", &["types", "contract"]),
    ("journal", &["contract"]),
    ("settings", &[]),
    ("service", &["types", "settings"]),
    ("bus", &["types", "contract", "settings", "sealing"]),
    ("store", &["types", "settings"]),
    ("files", &["settings"]),
    ("sprites", &["types"]),
    ("testkit", &["types", "contract", "bus", "store"]),
];

/// Libraries that only some may use directly, so that their subject stays in one place.
const WRAPPED: [(&str, &[&str]); 4] = [
    ("async-nats", &["bus", "session-events", "system-tests"]),
    ("aes-gcm", &["sealing", "credential-vault"]),
    ("x25519-dalek", &["sealing"]),
    ("tokio-tungstenite", &["sprites"]),
];

struct Package {
    folder: String,
    /// Name and kind of each direct dependency.
    dependencies: Vec<(String, Option<String>)>,
}

fn packages() -> BTreeMap<String, Package> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let package = |package: &Value| {
        let manifest = text(&package["manifest_path"]);
        let folder = manifest
            .strip_prefix(root().to_str().unwrap())
            .unwrap()
            .trim_matches('/')
            .trim_end_matches("/Cargo.toml")
            .to_owned();
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let dependencies = dependencies
            .map(|dependency| {
                (text(&dependency["name"]), dependency["kind"].as_str().map(str::to_owned))
            })
            .collect();
        (text(&package["name"]), Package { folder, dependencies })
    };
    metadata["packages"].as_array().unwrap().iter().map(package).collect()
}

#[test]
fn dependencies_point_one_way() {
    let packages = packages();
    let services: Vec<&String> = packages
        .iter()
        .filter(|(_, package)| package.folder.starts_with("services/"))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(services.len(), 9, "{services:?}");
    for (name, package) in &packages {
        let allowed =
            ALLOWED.iter().find(|(library, _)| library == name).map(|(_, allowed)| *allowed);
        assert_eq!(
            allowed.is_some(),
            package.folder.starts_with("libs/"),
            "{name} has no rule, or is no library"
        );
        for (dependency, kind) in
            package.dependencies.iter().filter(|(dependency, _)| packages.contains_key(dependency))
        {
            assert!(!services.contains(&dependency), "{name} depends on the service {dependency}");
            let for_tests = kind.as_deref() == Some("dev") || *name == "system-tests";
            assert!(dependency != "testkit" || for_tests, "{name} needs testkit outside its tests");
            if let (Some(allowed), None) = (allowed, kind) {
                assert!(
                    allowed.contains(&dependency.as_str()),
                    "{name} may not depend on {dependency}"
                );
            }
        }
    }
}

#[test]
fn every_migration_is_one_of_its_service() {
    let services = [("auth", "auth"), ("scheduler", "scheduler"), ("vault", "credential-vault")];
    for (schema, service) in services {
        let code =
            fs::read_to_string(root().join(format!("services/{service}/src/lib.rs"))).unwrap();
        let folder = format!("migrations/{schema}");
        let files: Vec<_> =
            fs::read_dir(root().join(&folder)).unwrap().map(Result::unwrap).collect();
        assert!(!files.is_empty(), "{folder}");
        for file in files {
            let path = format!("{folder}/{}", file.file_name().display());
            assert!(code.contains(&path), "{path} is never run");
        }
    }
}

#[test]
fn wrapped_dependencies_are_used_only_by_their_owners() {
    for (name, package) in packages() {
        for (library, users) in WRAPPED {
            let in_service = |kind: &Option<String>| kind.as_deref() != Some("dev");
            let used = package
                .dependencies
                .iter()
                .any(|(dependency, kind)| dependency == library && in_service(kind));
            assert!(!used || users.contains(&name.as_str()), "{name} uses {library}; {users:?} do");
        }
    }
}

#[test]
fn folders_are_named_like_their_crates_and_share_the_workspaces_rules() {
    for (name, package) in packages() {
        assert_eq!(package.folder.rsplit('/').next(), Some(name.as_str()));
        let manifest =
            std::fs::read_to_string(root().join(&package.folder).join("Cargo.toml")).unwrap();
        assert!(manifest.contains("[lints]\nworkspace = true"), "{name} has lints of its own");
        let tables = manifest.split("\n[").filter(|table| {
            table.split(']').next().is_some_and(|name| name.ends_with("dependencies"))
        });
        for line in tables.flat_map(str::lines).filter(|line| line.contains('=')) {
            assert!(
                line.contains("workspace = true"),
                "{name}: {line} is not inherited from the workspace"
            );
        }
    }
}

/// The document of the bus describes every subject that a user may use, and no others.
#[test]
fn the_document_of_the_bus_is_complete() {
    let document: Value = serde_json::from_str(&xtask::asyncapi::render().unwrap()).unwrap();
    let addresses: Vec<String> = document["channels"]
        .as_object()
        .unwrap()
        .values()
        .filter_map(|channel| channel["address"].as_str())
        .map(str::to_owned)
        .collect();
    let described = |pattern: &str| addresses.iter().any(|address| covers(pattern, address));
    for access in contract::access::ALL {
        for pattern in access
            .publish
            .iter()
            .chain(access.subscribe)
            .filter(|pattern| pattern.starts_with("aod."))
        {
            assert!(
                described(pattern),
                "{} may use {pattern}, which is not described",
                access.user
            );
        }
    }
    for stream in contract::topology::streams(types::Partition::all()) {
        assert!(stream.subjects.iter().all(|pattern| described(pattern)), "{}", stream.name);
    }
    for address in &addresses {
        let used = contract::access::ALL
            .iter()
            .any(|access| access.publish.iter().any(|pattern| covers(pattern, address)));
        // The server itself publishes what a stream republishes.
        let republished = contract::topology::streams(types::Partition::all())
            .any(|stream| stream.republish.is_some_and(|republish| covers(republish.to, address)));
        assert!(used || republished, "no user may publish {address}");
    }
    let text = document.to_string();
    let references = text.split("\"$ref\":\"#").skip(1).map(|rest| rest.split('"').next().unwrap());
    for reference in references {
        assert!(document.pointer(reference).is_some(), "{reference} is not there");
    }
    for message in document["components"]["messages"].as_object().unwrap().values() {
        let (package, name) = message["name"].as_str().unwrap().rsplit_once('.').unwrap();
        let proto = document["components"]["schemas"][package]["schema"].as_str().unwrap();
        assert!(proto.contains(&format!("message {name} {{")), "{package} has no {name}");
    }
}

#[test]
fn generated_files_are_up_to_date() {
    let fresh = tempfile::tempdir().unwrap();
    xtask::write_messages(fresh.path()).unwrap();
    let mut compared = 0;
    for entry in std::fs::read_dir(fresh.path()).unwrap().flatten() {
        let committed =
            std::fs::read_to_string(root().join(xtask::MESSAGES).join(entry.file_name()))
                .unwrap_or_default();
        assert!(
            std::fs::read_to_string(entry.path()).unwrap() == committed,
            "{:?} differs: run `cargo xtask gen`",
            entry.file_name()
        );
        compared += 1;
    }
    assert_eq!(compared, std::fs::read_dir(root().join(xtask::MESSAGES)).unwrap().count());
    for (path, text) in xtask::rendered_files().unwrap() {
        assert!(
            std::fs::read_to_string(root().join(path)).unwrap() == text,
            "{path} differs: run `cargo xtask gen`"
        );
    }
}

#[test]
fn every_metric_is_described_and_every_description_is_of_one() {
    let described: BTreeMap<String, xtask::metrics::Metric> =
        xtask::metrics::described().unwrap().into_values().flatten().collect();
    let used = xtask::metrics::used().unwrap();
    assert!(used.len() > 40, "{used:?}");
    for name in &used {
        assert!(described.contains_key(name), "{name} is not described");
    }
    for name in described.keys() {
        assert!(used.contains(name), "{name} is described, and nothing counts it");
    }
}

/// The names in an expression of Prometheus that are ours.
fn metrics_in(expression: &str) -> Vec<&str> {
    expression
        .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("aod_"))
        .collect()
}

/// Dashboard and alerts use metrics that exist, and each alert has its section in the runbook.
#[test]
fn dashboards_and_alerts_use_metrics_that_exist() {
    let described: BTreeMap<String, xtask::metrics::Metric> =
        xtask::metrics::described().unwrap().into_values().flatten().collect();
    let exists = |name: &str| {
        let base =
            ["_bucket", "_sum", "_count"].iter().find_map(|suffix| name.strip_suffix(suffix));
        described.contains_key(name)
            || base
                .and_then(|base| described.get(base))
                .is_some_and(|metric| metric.kind == "histogram")
    };
    let runbook = std::fs::read_to_string(root().join("docs/runbook.md")).unwrap();
    let alerts = std::fs::read_to_string(root().join("observability/alerts.yaml")).unwrap();
    let dashboard = std::fs::read_to_string(root().join("observability/dashboard.json")).unwrap();
    let used: Vec<&str> = metrics_in(&alerts).into_iter().chain(metrics_in(&dashboard)).collect();
    assert!(used.len() > 30, "{used:?}");
    for name in used {
        assert!(exists(name), "{name} is watched, and nothing counts it");
    }
    let names: Vec<&str> =
        alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 10, "{names:?}");
    for name in names {
        assert!(runbook.contains(&format!("\n## {name}\n")), "the runbook has no section {name}");
        assert!(
            alerts.contains(&format!("docs/runbook.md#{}", name.to_lowercase())),
            "{name} does not lead to its section"
        );
    }
}

/// Every tracked Markdown file, by its path from the root.
fn prose() -> Vec<(String, String)> {
    let output =
        Command::new("git").args(["ls-files", "-z", "*.md"]).current_dir(root()).output().unwrap();
    let paths = String::from_utf8(output.stdout).unwrap();
    let read = |path: &str| (path.to_owned(), std::fs::read_to_string(root().join(path)).unwrap());
    paths.split('\0').filter(|path| !path.is_empty()).map(read).collect()
}

#[test]
fn links_in_documents_lead_to_files_of_the_repository() {
    let prose = prose();
    assert!(prose.len() > 10, "{}", prose.len());
    for (path, text) in prose {
        let folder = root().join(&path).parent().unwrap().to_owned();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://") && !target.starts_with('#')) {
            let file = target.split('#').next().unwrap();
            assert!(folder.join(file).exists(), "{path} links to {target}, which does not exist");
        }
    }
}

/// Phrases of the old, private dialect. Add to the list what has been rewritten everywhere.
const BANNED_PHRASES: &[&str] = &[
    "had which secrets unsealed",
    "harmless twice",
    "leave dead what dies",
    "may be broken off and begun again",
    "made anew",
    "makes the streams anew",
    "nobody",
    "somebody",
    "whoever",
    "what lies in",
    "takes what waits",
    "shown this once",
    "of one's own",
    "hands its turns",
    "handed back",
    "put on record",
    "is on record",
    "work in hand",
    "stands still meanwhile",
    "map to hold in the head",
];

#[test]
fn documents_avoid_banned_phrases() {
    for (path, text) in prose() {
        // Code in backticks may name a test.
        let text: String =
            text.lines().flat_map(|line| line.split('`').step_by(2).chain(["\n"])).collect();
        let text = text.to_lowercase();
        for phrase in BANNED_PHRASES {
            assert!(!text.contains(phrase), "{path} says {phrase:?}");
        }
    }
}

/// Of those, the phrases that comments must not contain either.
const BANNED_IN_COMMENTS: &[&str] =
    &["harmless twice", "anew", "somebody", "whoever", "handed back", "on record", "in hand"];

#[test]
fn comments_avoid_banned_phrases() {
    let output =
        Command::new("git").args(["ls-files", "-z", "*.rs"]).current_dir(root()).output().unwrap();
    let paths = String::from_utf8(output.stdout).unwrap();
    let is_word = |text: &str, phrase: &str| {
        text.match_indices(phrase).any(|(at, _)| {
            let outside = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric());
            outside(text[..at].chars().next_back())
                && outside(text[at + phrase.len()..].chars().next())
        })
    };
    let mut read = 0;
    for path in paths.split('\0').filter(|path| !path.is_empty() && !path.contains("/gen/")) {
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        for (number, line) in
            text.lines().enumerate().filter(|(_, line)| line.trim_start().starts_with("//"))
        {
            read += 1;
            for phrase in BANNED_IN_COMMENTS {
                assert!(
                    !is_word(&line.to_lowercase(), phrase),
                    "{path}:{} says {phrase:?}",
                    number + 1
                );
            }
        }
    }
    assert!(read > 1000, "{read}");
}

#[test]
fn every_file_names_the_same_version() {
    let version = env!("CARGO_PKG_VERSION");
    let read = |path: &str| std::fs::read_to_string(root().join(path)).unwrap();
    let chart = read("helm/agent-on-demand/Chart.yaml");
    for line in [format!("version: {version}"), format!("appVersion: {version}")] {
        assert!(chart.lines().any(|found| found == line), "the chart lacks {line}");
    }
    assert!(
        read("CHANGELOG.md").contains(&format!("\n## [{version}]")),
        "CHANGELOG.md has no section {version}"
    );
}
