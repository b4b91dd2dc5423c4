//! The reference of all settings, from what the services themselves say.

use std::{fmt::Write as _, process::Command};

use anyhow::{Context as _, ensure};

/// Where it is committed.
pub const PATH: &str = "docs/configuration.md";
const SERVICES: [&str; 7] = ["gateway", "auth", "credential-vault", "scheduler", "sprite-runner", "local-sprites", "scripted-model"];

#[derive(Clone, PartialEq, Eq)]
struct Setting {
    name: String,
    meaning: String,
    /// `required`, `optional`, `secret`, or its default.
    kind: String,
}

/// `docs/configuration.md`.
///
/// # Errors
/// When a service cannot be asked, or says something that is no setting.
pub fn render() -> anyhow::Result<String> {
    let said: Vec<(&str, String, Vec<Setting>)> = SERVICES.iter().map(|service| settings(service)).collect::<anyhow::Result<_>>()?;
    let everywhere: Vec<Setting> =
        said[0].2.iter().filter(|setting| said.iter().all(|(_, _, others)| others.contains(setting))).cloned().collect();
    let mut text = String::from(
        "# Configuration\n\n<!-- Made by `make reference` from what the services say at `--help`. -->\n\n\
         Settings are environment variables, read once at the start. Whatever is wrong with them is said at once, and the process ends with \
         status 2. An empty variable counts as unset. `NAME[_FILE]`: a secret, from `NAME` or from the file that `NAME_FILE` names; a line's \
         end at the end of the file is left out.\n\n## Every service\n\n",
    );
    table(&mut text, &everywhere);
    for (service, about, settings) in &said {
        let _ = write!(text, "\n## {service}\n\n{about}\n\n");
        let own: Vec<Setting> = settings.iter().filter(|setting| !everywhere.contains(setting)).cloned().collect();
        table(&mut text, &own);
    }
    Ok(text)
}

fn table(text: &mut String, settings: &[Setting]) {
    text.push_str("| setting | what it does | default |\n| --- | --- | --- |\n");
    for setting in settings {
        let kind = setting.kind.strip_prefix("default ").map_or_else(|| setting.kind.clone(), |value| format!("`{value}`"));
        let _ = writeln!(text, "| `{}` | {} | {kind} |", setting.name, setting.meaning);
    }
}

fn settings(service: &'static str) -> anyhow::Result<(&'static str, String, Vec<Setting>)> {
    let output = Command::new(testkit::services::binary(service)?).arg("--help").env_clear().output()?;
    ensure!(output.status.success(), "{service} --help failed");
    let help = String::from_utf8(output.stdout)?;
    let (head, list) = help.split_once("Settings, from the environment:\n").context("no settings in the help")?;
    let about = head.lines().next().and_then(|line| line.split_once(": ")).map(|(_, about)| about.to_owned()).unwrap_or_default();
    let setting = |line: &str| -> anyhow::Result<Setting> {
        let (name, rest) = line.trim().split_once("  ").with_context(|| format!("{service}: {line}"))?;
        let (meaning, kind) = rest.trim().strip_suffix(')').and_then(|rest| rest.rsplit_once(" (")).with_context(|| line.to_owned())?;
        Ok(Setting { name: name.to_owned(), meaning: meaning.to_owned(), kind: kind.to_owned() })
    };
    let settings = list.lines().filter(|line| !line.trim().is_empty()).map(setting).collect::<anyhow::Result<_>>()?;
    Ok((service, about, settings))
}
