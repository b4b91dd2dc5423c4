//! Settings that are passed on to the services: the variables that a service lists in its `--help`,
//! and no others.

use std::{collections::BTreeSet, path::Path, process::Command};

use crate::dev::DevError;

/// Heading of the settings in a service's `--help`; see `service::Env`.
const HEADING: &str = "Settings, from the environment:";
/// Variables of programs rather than settings of a service.
const INHERITED: &[&str] = &["PATH", "HOME", "RUST_LOG", "RUST_BACKTRACE"];
/// Settings of `aod` itself, of its tools and of the tests that start it.
const OWN: &[&str] = &[
    "AOD_API_TOKEN",
    "AOD_API_URL",
    "AOD_EVENTS_MAX_BYTES",
    "AOD_PORT",
    "AOD_TEST_POSTGRES",
    "AOD_TOOLS_DIR",
];
/// Prefix of variables that the OpenTelemetry SDK reads by itself.
const OTEL: &str = "OTEL_";

/// The environment of `aod dev`, and what each service knows of it.
pub struct Settings {
    given: Vec<(String, String)>,
    known: Vec<(&'static str, BTreeSet<String>)>,
}

impl Settings {
    /// Asks each service for its settings.
    ///
    /// # Errors
    /// When a service does not answer, or when an `AOD_*` variable is set that no service knows.
    pub fn load(programs: &Path, services: &[&'static str]) -> Result<Self, DevError> {
        let given = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        let known = services.iter().map(|service| {
            let output = Command::new(programs.join(service)).arg("--help").env_clear().output();
            let output = output.map_err(|error| {
                DevError::Unfit(format!("cannot run {service} --help: {error}"))
            })?;
            Ok((*service, names(&String::from_utf8_lossy(&output.stdout))))
        });
        let settings =
            Self { given: given.collect(), known: known.collect::<Result<_, DevError>>()? };
        match settings.unknown().as_slice() {
            [] => Ok(settings),
            names => Err(DevError::Unfit(format!(
                "no service knows the setting {}; docs/configuration.md lists them all",
                names.join(", ")
            ))),
        }
    }

    /// Returns what a service gets from the environment. What `aod dev` sets itself is not among
    /// it.
    pub fn of(&self, service: &str, set_here: &[&str]) -> Vec<(String, String)> {
        let known = self.known.iter().find(|(name, _)| *name == service).map(|(_, known)| known);
        let is_set_here = |name: &str| {
            set_here.contains(&name)
                || name.strip_suffix("_FILE").is_some_and(|name| set_here.contains(&name))
        };
        let reaches = |name: &str| {
            INHERITED.contains(&name)
                || name.starts_with(OTEL)
                || known.is_some_and(|known| known.contains(name)) && !is_set_here(name)
        };
        self.given.iter().filter(|(name, _)| reaches(name)).cloned().collect()
    }

    /// Whether a variable is set and not empty.
    pub fn has(&self, name: &str) -> bool {
        self.given.iter().any(|(given, value)| given == name && !value.is_empty())
    }

    fn unknown(&self) -> Vec<&str> {
        let is_known = |name: &str| {
            OWN.contains(&name) || self.known.iter().any(|(_, known)| known.contains(name))
        };
        self.given
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|name| name.starts_with("AOD_") && !is_known(name))
            .collect()
    }
}

/// Returns the names of the settings in a help text; a secret has two, itself and the one of its
/// file.
fn names(help: &str) -> BTreeSet<String> {
    let lines = help.split_once(HEADING).map_or("", |(_, lines)| lines).lines();
    let listed = lines.filter_map(|line| line.split_whitespace().next());
    listed
        .flat_map(|name| match name.strip_suffix("[_FILE]") {
            Some(name) => vec![name.to_owned(), format!("{name}_FILE")],
            None => vec![name.to_owned()],
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(given: &[&str]) -> Settings {
        let help = format!(
            "x: a service\n\n{HEADING}\n  AOD_A     first (default 1)\n  SECRET[_FILE]   second (secret)\n  PLAIN   third (optional)\n"
        );
        let given = given.iter().map(|name| ((*name).to_owned(), "value".to_owned())).collect();
        Settings { given, known: vec![("x", names(&help)), ("y", BTreeSet::new())] }
    }

    #[test]
    fn a_service_receives_only_the_settings_in_its_table() {
        let settings = settings(&["AOD_A", "SECRET_FILE", "PLAIN", "HOME", "OTHER"]);
        let of = |service, set_here: &[&str]| {
            settings.of(service, set_here).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(of("x", &[]), ["AOD_A", "SECRET_FILE", "PLAIN", "HOME"]);
        assert_eq!(of("x", &["SECRET", "PLAIN"]), ["AOD_A", "HOME"]);
        assert_eq!(of("y", &[]), ["HOME"]);
    }

    #[test]
    fn a_setting_of_ours_that_no_service_knows_is_named() {
        assert!(settings(&["AOD_A", "AOD_API_URL", "OTHER"]).unknown().is_empty());
        assert_eq!(settings(&["AOD_a", "AOD_AA"]).unknown(), ["AOD_a", "AOD_AA"]);
    }
}
