//! Settings: environment variables, read once into a typed struct. Every problem is reported, not just the first.

use std::{collections::HashMap, fmt::Write as _, str::FromStr, time::Duration};

use secrecy::SecretString;

/// Reads settings and remembers what was wrong with them, and what they mean for `--help`.
#[derive(Debug)]
pub struct Env {
    name: &'static str,
    about: &'static str,
    variables: HashMap<String, String>,
    help_wanted: bool,
    described: Vec<(String, &'static str, String)>,
    problems: Vec<String>,
}

/// What became of the settings.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    Ready,
    Help(String),
    Refused(String),
}

/// Whether the process was started with this argument.
pub(crate) fn has_argument(wanted: &str) -> bool {
    std::env::args().skip(1).any(|arg| arg == wanted)
}

impl Env {
    /// The process's own environment and arguments.
    #[must_use]
    pub fn from_process(name: &'static str, about: &'static str) -> Self {
        let help_wanted = has_argument("--help") || has_argument("-h");
        let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect();
        Self { help_wanted, ..Self::from_variables(name, about, variables) }
    }

    /// Given variables, for tests.
    #[must_use]
    pub fn from_variables(name: &'static str, about: &'static str, variables: HashMap<String, String>) -> Self {
        Self { name, about, variables, help_wanted: false, described: Vec::new(), problems: Vec::new() }
    }

    /// A value with a default. An empty variable counts as unset.
    pub fn parsed<T: FromStr + ToString>(&mut self, name: &str, meaning: &'static str, default: T) -> T {
        self.described.push((name.to_owned(), meaning, format!("default {}", default.to_string())));
        match self.get(name).map(|text| text.parse()) {
            None => default,
            Some(Ok(value)) => value,
            Some(Err(_)) => {
                self.problems.push(format!("{name} is not valid ({meaning})"));
                default
            }
        }
    }

    /// A value that may be absent.
    pub fn optional(&mut self, name: &str, meaning: &'static str) -> Option<String> {
        self.described.push((name.to_owned(), meaning, "optional".to_owned()));
        self.get(name)
    }

    /// A value that must be there.
    pub fn required(&mut self, name: &str, meaning: &'static str) -> String {
        self.described.push((name.to_owned(), meaning, "required".to_owned()));
        self.get(name).unwrap_or_else(|| {
            self.problems.push(format!("{name} is missing ({meaning})"));
            String::new()
        })
    }

    /// A number of seconds, at least one.
    pub fn seconds(&mut self, name: &str, meaning: &'static str, default: u64) -> Duration {
        let seconds = self.parsed(name, meaning, default);
        if seconds == 0 {
            self.problems.push(format!("{name} must be at least 1"));
        }
        Duration::from_secs(seconds)
    }

    /// A secret, from the variable or from the file that `<name>_FILE` names.
    pub fn secret(&mut self, name: &str, meaning: &'static str) -> SecretString {
        match self.optional_secret(name, meaning) {
            Some(secret) => secret,
            None => {
                self.problems.push(format!("{name} (or {name}_FILE) is missing ({meaning})"));
                SecretString::default()
            }
        }
    }

    /// As [`Self::secret`], where there may be none.
    pub fn optional_secret(&mut self, name: &str, meaning: &'static str) -> Option<SecretString> {
        self.described.push((format!("{name}[_FILE]"), meaning, "secret".to_owned()));
        let path = self.get(&format!("{name}_FILE"));
        match (self.get(name), path) {
            (Some(_), Some(_)) => {
                self.problems.push(format!("{name} and {name}_FILE are both set"));
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

    /// Whether this is a deployment that people rely on (`AOD_ENV=production`): what is fine on a laptop is refused there.
    pub fn is_production(&mut self) -> bool {
        match self.parsed("AOD_ENV", "production refuses insecure settings", "development".to_owned()).as_str() {
            "production" => true,
            "development" => false,
            _ => {
                self.problems.push("AOD_ENV is production or development".to_owned());
                false
            }
        }
    }

    /// Adds a problem that only the service can see.
    pub fn refuse(&mut self, problem: impl Into<String>) {
        self.problems.push(problem.into());
    }

    /// Judges what was read.
    #[must_use]
    pub fn finish(self) -> Verdict {
        if self.help_wanted {
            let mut text = format!(
                "{}: {}\n\n  --check-ready  ask the process that runs with the same AOD_ADMIN_ADDR whether it is ready; 0 if it is\n\n\
                 Settings, from the environment:\n",
                self.name, self.about
            );
            for (name, meaning, kind) in &self.described {
                let _ = writeln!(text, "  {name:<32}  {meaning} ({kind})");
            }
            return Verdict::Help(text);
        }
        if self.problems.is_empty() {
            return Verdict::Ready;
        }
        Verdict::Refused(format!("{} wrong with the settings:\n  {}", count(self.problems.len()), self.problems.join("\n  ")))
    }

    fn get(&self, name: &str) -> Option<String> {
        self.variables.get(name).filter(|value| !value.is_empty()).cloned()
    }
}

fn count(problems: usize) -> String {
    if problems == 1 { "one thing is".to_owned() } else { format!("{problems} things are") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(variables: &[(&str, &str)]) -> Env {
        Env::from_variables("x", "a service", variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect())
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
