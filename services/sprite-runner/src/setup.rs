//! What an environment, an agent and a session ask of a new Sprite, as scripts.

use std::{collections::BTreeMap, fmt::Write as _};

use contract::scheduler::TurnSpec;
use secrecy::ExposeSecret as _;
use types::{
    McpServer, Networking, PackageManager, Repository, Skill, agent::GithubSkill, environment::NetworkingKind, repository::Checkout,
};

use crate::{agent::quote, secrets::Secrets};

#[derive(Debug)]
pub struct Setup {
    packages: BTreeMap<String, Vec<String>>,
    script: String,
    networking: Networking,
    repositories: Vec<Repository>,
    pub skills: Vec<Skill>,
    pub mcp_servers: Vec<McpServer>,
}

/// A script, and what it does.
#[derive(Debug, PartialEq, Eq)]
pub struct Step {
    pub what: String,
    pub script: String,
}

impl Setup {
    /// # Errors
    /// When the scheduler sent what this runner does not understand.
    pub fn read(spec: &TurnSpec) -> Result<Self, serde_json::Error> {
        let environment = spec.environment.clone().unwrap_or_default();
        let json = |text: &str, empty: &str| if text.is_empty() { empty.to_owned() } else { text.to_owned() };
        let networking = json(&environment.networking, "{}");
        Ok(Self {
            packages: serde_json::from_str(&json(&environment.packages, "{}"))?,
            // A browser's text fields send such line ends; a shell takes them for parts of names.
            script: environment.setup_script.replace("\r\n", "\n"),
            networking: if networking == "{}" { Networking::default() } else { serde_json::from_str(&networking)? },
            repositories: serde_json::from_str(&json(&spec.resources, "[]"))?,
            skills: serde_json::from_str(&json(&spec.skills, "[]"))?,
            mcp_servers: serde_json::from_str(&json(&spec.mcp_servers, "[]"))?,
        })
    }

    /// The only repository is where the agent works.
    pub fn working_dir(&self) -> Option<&str> {
        match self.repositories.as_slice() {
            [only] => Some(&only.mount_path),
            _ => None,
        }
    }

    /// The hosts that alone may be reached, where not all may.
    pub fn allowed_hosts(&self) -> Option<Vec<String>> {
        let Networking { kind, allowed_hosts, allow_package_managers, allow_mcp_servers } = &self.networking;
        if *kind == NetworkingKind::Unrestricted {
            return None;
        }
        let mut hosts = allowed_hosts.clone().unwrap_or_default();
        if *allow_package_managers {
            hosts.extend(PackageManager::ALL.into_iter().flat_map(PackageManager::hosts).map(|host| (*host).to_owned()));
        }
        if *allow_mcp_servers {
            hosts.extend(self.mcp_servers.iter().filter_map(McpServer::host).map(str::to_owned));
        }
        Some(hosts)
    }

    /// The lines of a git credential store: a token for each repository that has one.
    pub fn git_credentials(&self, secrets: &Secrets) -> String {
        let tokens = secrets.repository_tokens();
        let mut lines = String::new();
        for repository in &self.repositories {
            if let (Some(token), Some(path)) = (tokens.get(&repository.mount_path), repository.url.strip_prefix("https://")) {
                // Writing to a String cannot fail.
                let _ = writeln!(lines, "https://x-access-token:{}@{path}", percent_encoded(token.expose_secret()));
            }
        }
        lines
    }

    /// Packages, then repositories, then the environment's own script.
    pub fn steps(&self) -> Vec<Step> {
        let packages = PackageManager::ALL.into_iter().filter_map(|manager| {
            let names = self.packages.get(manager.as_str()).filter(|names| !names.is_empty())?;
            Some(Step { what: format!("installing {manager} packages"), script: install(manager, names) })
        });
        // A repository inside of another comes after it, in whichever order they were given.
        let mut repositories: Vec<&Repository> = self.repositories.iter().collect();
        repositories.sort_by_key(|repository| repository.mount_path.split('/').count());
        let clones =
            repositories.into_iter().map(|repository| Step { what: format!("cloning {}", repository.url), script: clone(repository) });
        let script = (!self.script.trim().is_empty()).then(|| Step { what: "the setup script".to_owned(), script: self.script.clone() });
        packages.chain(clones).chain(script).collect()
    }
}

/// With the rights that a manager needs, from whichever user the Sprite has.
fn install(manager: PackageManager, names: &[String]) -> String {
    let words: Vec<String> = names.iter().map(|name| quote(name)).collect();
    let (all, each) = (words.join(" "), |command: &str| words.iter().map(|word| format!("{command} {word}\n")).collect::<String>());
    let as_root = "root=; [ \"$(id -u)\" = 0 ] || root='sudo -E'\n";
    match manager {
        PackageManager::Apt => format!(
            "set -e\nexport DEBIAN_FRONTEND=noninteractive\n{as_root}$root apt-get -q update\n$root apt-get -q install -y --no-install-recommends {all}\n"
        ),
        PackageManager::Cargo => format!("set -e\n{}", each("cargo install --quiet --")),
        PackageManager::Gem => format!("set -e\n{as_root}{}", names.iter().map(|name| gem(name)).collect::<String>()),
        PackageManager::Go => format!("set -e\n{}", each("go install")),
        PackageManager::Npm => format!("npm install --global --no-fund --no-audit -- {all}\n"),
        PackageManager::Pip => format!("PIP_BREAK_SYSTEM_PACKAGES=1 pip install --quiet -- {all}\n"),
    }
}

/// `name`, or `name@version` as the other managers write it.
fn gem(package: &str) -> String {
    let (name, version) = package.split_once('@').unwrap_or((package, ""));
    let version = if version.is_empty() { String::new() } else { format!(" --version {}", quote(version)) };
    format!("$root gem install --no-document {}{version}\n", quote(name))
}

/// The author of commits, where no other is configured.
const AUTHOR: [(&str, &str); 2] = [("user.name", "Agent on Demand"), ("user.email", "agent@agent-on-demand.invalid")];

/// Idempotent: removes what an interrupted clone left, and leaves a whole one as it is. The tips of all branches can be checked out; their
/// contents are fetched when they are needed. A submodule that cannot be fetched does not fail the session.
fn clone(repository: &Repository) -> String {
    let (url, path, draft) =
        (quote(&repository.url), quote(&repository.mount_path), quote(&format!("{}.aod-clone", repository.mount_path)));
    let identity: String = AUTHOR
        .iter()
        .map(|(key, value)| format!("git config --get {key} >/dev/null || git config --global {key} {}\n", quote(value)))
        .collect();
    let (branch, commit) = match &repository.checkout {
        None => (String::new(), String::new()),
        Some(Checkout::Branch { name }) => (format!("--branch {} ", quote(name)), String::new()),
        Some(Checkout::Commit { sha }) => (
            String::new(),
            format!(
                "git -C {draft} fetch --depth=1 --quiet origin {sha}\ngit -C {draft} -c advice.detachedHead=false checkout --quiet {sha}\n"
            ),
        ),
    };
    let submodules = format!("git -C {draft} submodule update --init --recursive --quiet");
    format!(
        "set -e\nexport GIT_TERMINAL_PROMPT=0\n{identity}[ -e {path}/.git ] && exit 0\nrm -rf {draft}\n\
         git clone --depth=1 --no-single-branch --filter=blob:none --quiet {branch}{url} {draft}\n{commit}\
         [ ! -e {draft}/.gitmodules ] || {submodules} --depth=1 || {submodules} || echo 'warning: not every submodule was fetched' >&2\n\
         mv -T {draft} {path}\n"
    )
}

/// A skill from GitHub, by the installer that knows every CLI. It wants Node.js 22.20 or later: where there is none, one for itself.
pub fn install_skill(skill: &GithubSkill, agent: &str) -> Step {
    let mut script = format!(
        "new='const [a, b] = process.versions.node.split(\".\"); process.exit(a > 22 || (a == 22 && b >= 20) ? 0 : 1)'\n\
         node -e \"$new\" && node= || node='-p node@24'\n\
         npx -y $node -p skills@1 -- skills add {} --global --agent {agent} --yes",
        quote(&skill.source)
    );
    if let Some(name) = &skill.name {
        // Writing to a String cannot fail.
        let _ = write!(script, " --skill {}", quote(name));
    }
    Step { what: format!("installing the skill {}", skill.source), script }
}

/// For the user part of a URL.
fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }
    };
    text.bytes().map(encode).collect()
}

#[cfg(test)]
mod tests {
    use contract::scheduler::EnvironmentSpec;

    use super::*;

    #[test]
    fn packages_come_before_repositories_and_those_before_the_script() {
        let spec = TurnSpec {
            environment: Some(EnvironmentSpec {
                packages: r#"{"pip":["requests>=2"],"apt":["jq"],"npm":[]}"#.to_owned(),
                setup_script: "make".to_owned(),
                networking: r#"{"type":"limited","allowed_hosts":["*.x.org"]}"#.to_owned(),
            }),
            resources: r#"[{"type":"github_repository","url":"https://github.com/o/r","mount_path":"/work/a b"}]"#.to_owned(),
            ..TurnSpec::default()
        };
        let setup = Setup::read(&spec).unwrap();
        let what: Vec<_> = setup.steps().into_iter().map(|step| step.what).collect();
        assert_eq!(what, ["installing apt packages", "installing pip packages", "cloning https://github.com/o/r", "the setup script"]);
        assert!(setup.steps()[1].script.contains("'requests>=2'") && setup.steps()[2].script.contains("'/work/a b'"));
        assert_eq!(setup.allowed_hosts(), Some(vec!["*.x.org".to_owned()]));
        assert_eq!(Setup::read(&TurnSpec::default()).unwrap().allowed_hosts(), None);
    }

    #[test]
    fn a_gem_may_have_a_version_or_a_range_of_them() {
        assert_eq!(gem("rake"), "$root gem install --no-document rake\n");
        assert_eq!(gem("rake@13.0.6"), "$root gem install --no-document rake --version 13.0.6\n");
        assert_eq!(gem("rake@~>13,<14"), "$root gem install --no-document rake --version '~>13,<14'\n");
    }

    #[test]
    fn a_token_cannot_break_out_of_its_line() {
        assert_eq!(percent_encoded("gh_p@/:\n"), "gh_p%40%2F%3A%0A");
    }
}
