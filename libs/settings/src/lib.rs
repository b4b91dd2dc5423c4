//! Settings: environment variables, read once into a typed struct. Every problem is reported, not
//! just the first.

use std::{collections::HashMap, fmt::Write as _, str::FromStr, time::Duration};

use secrecy::SecretString;

/// Reads settings, and collects their problems and their descriptions for `--help`.
#[derive(Debug)]
pub struct Env {
    name: &'static str,
    about: &'static str,
    variables: HashMap<String, String>,
    help_wanted: bool,
    described: Vec<(String, &'static str, String)>,
    problems: Vec<String>,
}

/// The result of reading the settings.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Ready,
    Help(String),
    Refused(String),
}

/// Whether the process was started with this argument.
#[must_use]
pub fn has_argument(wanted: &str) -> bool {
    std::env::args().skip(1).any(|arg| arg == wanted)
}

impl Env {
    /// Reads the environment and the arguments of this process.
    #[must_use]
    pub fn from_process(name: &'static str, about: &'static str) -> Self {
        let help_wanted = has_argument("--help") || has_argument("-h");
        let variables = std::env::vars_os()
            .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
            .collect();
        Self { help_wanted, ..Self::from_variables(name, about, variables) }
    }

    /// Reads the given variables, for tests.
    #[must_use]
    pub fn from_variables(
        name: &'static str,
        about: &'static str,
        variables: HashMap<String, String>,
    ) -> Self {
        Self {
            name,
            about,
            variables,
            help_wanted: false,
            described: Vec::new(),
            problems: Vec::new(),
        }
    }

    /// Reads a value with a default. An empty variable counts as unset.
    pub fn parsed<T: FromStr + ToString>(
        &mut self,
        name: &str,
        meaning: &'static str,
        default: T,
    ) -> T {
        self.described.push((name.to_owned(), meaning, format!("default {}", default.to_string())));
        match self.get(name).map(|text| text.parse()) {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(_)) => {
                self.problems.push(format!("{name} has an invalid value ({meaning})"));
                default
            }
        }
    }

    /// Reads a value that may be absent.
    pub fn optional(&mut self, name: &str, meaning: &'static str) -> Option<String> {
        self.described.push((name.to_owned(), meaning, "optional".to_owned()));
        self.get(name)
    }

    /// Reads a value that must be present.
    pub fn required(&mut self, name: &str, meaning: &'static str) -> String {
        self.described.push((name.to_owned(), meaning, "required".to_owned()));
        self.get(name).unwrap_or_else(|| {
            self.problems.push(format!("{name} must be set ({meaning})"));
            String::new()
        })
    }

    /// Reads a number of seconds, at least one.
    pub fn seconds(&mut self, name: &str, meaning: &'static str, default: u64) -> Duration {
        let seconds = self.parsed(name, meaning, default);
        if seconds == 0 {
            self.problems.push(format!("{name} must be at least 1"));
        }
        Duration::from_secs(seconds)
    }

    /// Reads a secret, from the variable or from the file that `<name>_FILE` names.
    pub fn secret(&mut self, name: &str, meaning: &'static str) -> SecretString {
        match self.optional_secret(name, meaning) {
            Some(secret) => secret,
            None => {
                self.problems.push(format!("{name} or {name}_FILE must be set ({meaning})"));
                SecretString::default()
            }
        }
    }

    /// Like [`Self::secret`], for a secret that may be absent.
    pub fn optional_secret(&mut self, name: &str, meaning: &'static str) -> Option<SecretString> {
        self.described.push((format!("{name}[_FILE]"), meaning, "secret".to_owned()));
        let path = self.get(&format!("{name}_FILE"));
        match (self.get(name), path) {
            (Some(_), Some(_)) => {
                self.problems.push(format!("only one of {name} and {name}_FILE may be set"));
                None
            }
            (Some(value), None) => Some(value.into()),
            (None, Some(path)) => match std::fs::read_to_string(&path) {
                Ok(text) => Some(text.trim_end_matches(['\r', '\n']).to_owned().into()),
                Err(error) => {
                    self.problems.push(format!("{name}_FILE: {path} cannot be read: {error}"));
                    None
                }
            },
            (None, None) => None,
        }
    }

    /// Whether this is a production deployment (`AOD_ENV=production`), which refuses insecure
    /// settings.
    pub fn is_production(&mut self) -> bool {
        match self
            .parsed("AOD_ENV", "production refuses insecure settings", "development".to_owned())
            .as_str()
        {
            "production" => true,
            "development" => false,
            _ => {
                self.problems.push("AOD_ENV must be production or development".to_owned());
                false
            }
        }
    }

    /// Adds a problem that only the service can detect.
    pub fn refuse(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// Returns the settings that were read, as `--help` lists them.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::from("Settings, from the environment:\n");
        for (name, meaning, kind) in &self.described {
            let _ = writeln!(text, "  {name:<32}  {meaning} ({kind})");
        }
        text
    }

    /// Returns whether the settings are valid, or the help text if it was requested.
    #[must_use]
    pub fn finish(self) -> Verdict {
        if self.help_wanted {
            return Verdict::Help(format!(
                "{}: {}\n\n  --check-ready  exit with 0 if the process with the same AOD_ADMIN_ADDR is ready\n\n{}",
                self.name,
                self.about,
                self.table()
            ));
        }
        if self.problems.is_empty() {
            return Verdict::Ready;
        }
        Verdict::Refused(format!(
            "invalid configuration ({}):\n  {}",
            count(self.problems.len()),
            self.problems.join("\n  ")
        ))
    }

    fn get(&self, name: &str) -> Option<String> {
        self.variables.get(name).filter(|value| !value.is_empty()).cloned()
    }
}

fn count(problems: usize) -> String {
    if problems == 1 { "1 error".to_owned() } else { format!("{problems} errors") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(variables: &[(&str, &str)]) -> Env {
        Env::from_variables(
            "x",
            "a service",
            variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        )
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut env = env(&[("PORT", "x"), ("GRACE", "0")]);
        let _ = (
            env.parsed("PORT", "a port", 1_u16),
            env.required("URL", "where"),
            env.seconds("GRACE", "grace", 3),
            env.secret("KEY", "a key"),
        );
        let Verdict::Refused(text) = env.finish() else { panic!("accepted") };
        for name in ["PORT", "URL", "GRACE", "KEY"] {
            assert!(text.contains(name), "{text}");
        }
    }

    #[test]
    fn a_secret_comes_from_a_file_without_its_line_end() {
        use secrecy::ExposeSecret as _;
        let path = std::env::temp_dir().join(format!("aod-env-{}", std::process::id()));
        std::fs::write(&path, "s3cret\n").unwrap();
        let mut env = env(&[("KEY_FILE", path.to_str().unwrap())]);
        assert_eq!(env.secret("KEY", "a key").expose_secret(), "s3cret");
        assert_eq!(env.finish(), Verdict::Ready);
        std::fs::remove_file(path).unwrap();
    }
}
