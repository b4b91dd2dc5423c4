//! The metrics' reference, from what the sources say of each.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::root;

/// A metric as its crate describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metric {
    pub kind: &'static str,
    pub meaning: String,
}

const KINDS: [&str; 3] = ["counter", "gauge", "histogram"];

/// What is described, by crate and name.
///
/// # Errors
/// When a source cannot be read.
pub fn described() -> Result<BTreeMap<String, BTreeMap<String, Metric>>> {
    let mut crates = BTreeMap::<String, BTreeMap<String, Metric>>::new();
    for (crate_name, source) in sources()? {
        for kind in KINDS {
            for call in source.split(&format!("describe_{kind}!(")).skip(1) {
                let call = call.split(");").next().unwrap_or_default();
                let texts: Vec<&str> = call.split('"').skip(1).step_by(2).collect();
                let (Some(name), Some(meaning)) = (texts.first(), texts.get(1)) else { continue };
                let metric = Metric { kind, meaning: (*meaning).to_owned() };
                crates.entry(crate_name.clone()).or_default().insert((*name).to_owned(), metric);
            }
        }
    }
    Ok(crates)
}

/// The names that are counted anywhere.
///
/// # Errors
/// When a source cannot be read.
pub fn used() -> Result<Vec<String>> {
    let mut names = Vec::new();
    for (_, source) in sources()? {
        for kind in KINDS {
            // What is described is a use by the same spelling.
            for call in source
                .replace("describe_", "#")
                .split(&format!("{kind}!("))
                .collect::<Vec<_>>()
                .windows(2)
            {
                let [before, call] = call else { continue };
                let name =
                    call.trim_start().strip_prefix('"').and_then(|call| call.split('"').next());
                names.extend(name.filter(|_| !before.ends_with('#')).map(str::to_owned));
            }
        }
    }
    Ok(names)
}

/// `docs/metrics.md`.
///
/// # Errors
/// When a source cannot be read.
pub fn render() -> Result<String> {
    let mut text = String::from(
        "# Metrics\n\n<!-- Made by `cargo xtask gen` from the services' sources. -->\n\n\
         Every service serves its metrics in Prometheus' format at `/metrics` of its admin address (`AOD_ADMIN_ADDR`). No label holds an id. \
         Histograms have buckets from 1 ms to an hour. Dashboard and alerts that use them are in [`observability/`](../observability), what to do \
         about an alert is in the [runbook](runbook.md).\n",
    );
    for (crate_name, metrics) in described()? {
        let heading = match crate_name.as_str() {
            "bus" => "Every service that is on the bus".to_owned(),
            "service" => "Every service".to_owned(),
            "store" => "Every service with a database".to_owned(),
            other => other.to_owned(),
        };
        let _ = write!(
            text,
            "\n## {heading}\n\n| metric | kind | what it says |\n| --- | --- | --- |\n"
        );
        for (name, metric) in metrics {
            let _ = writeln!(text, "| `{name}` | {} | {} |", metric.kind, metric.meaning);
        }
    }
    Ok(text)
}

/// Every source of libraries and services, with its crate's name.
fn sources() -> Result<Vec<(String, String)>> {
    let mut sources = Vec::new();
    for group in ["libs", "services"] {
        for entry in fs::read_dir(root().join(group))? {
            let folder = entry?.path();
            let name = folder
                .file_name()
                .map(|name| name.to_string_lossy().into_owned())
                .unwrap_or_default();
            let mut files = Vec::new();
            rust_files(&folder.join("src"), &mut files)?;
            for file in files {
                let source =
                    fs::read_to_string(&file).with_context(|| file.display().to_string())?;
                sources.push((name.clone(), source));
            }
        }
    }
    sources.sort();
    Ok(sources)
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}
