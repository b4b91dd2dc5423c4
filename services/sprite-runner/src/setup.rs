//! Scripts that set up a new Sprite as its environment, agent and session say.

use std::{collections::BTreeMap, fmt::Write as _};

use contract::scheduler::TurnSpec;
use secrecy::ExposeSecret as _;
use sha2::{Digest as _, Sha256};
use types::{
    McpServer, Networking, PackageManager, Repository, Skill, agent::GithubSkill,
    repository::Checkout,
};

use crate::{secrets::Secrets, shell::quote};

#[derive(Debug)]
pub struct Setup {
    /// The user, the environment and its version.
    environment: (String, String, u32),
    packages: BTreeMap<String, Vec<String>>,
    script: String,
    networking: Networking,
    repositories: Vec<Repository>,
    working_directory: Option<String>,
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
        let json = |text: &str, empty: &str| {
            if text.is_empty() { empty.to_owned() } else { text.to_owned() }
        };
        let networking = json(&environment.networking, "{}");
        Ok(Self {
            environment: (environment.user_id, environment.environment_id, environment.version),
            packages: serde_json::from_str(&json(&environment.packages, "{}"))?,
            // Browsers send CRLF; a shell would take the CR as part of a word.
            script: environment.setup_script.replace("\r\n", "\n"),
            networking: if networking == "{}" {
                Networking::default()
            } else {
                serde_json::from_str(&networking)?
            },
            repositories: serde_json::from_str(&json(&spec.resources, "[]"))?,
            working_directory: spec.working_directory.clone(),
            skills: serde_json::from_str(&json(&spec.skills, "[]"))?,
            mcp_servers: serde_json::from_str(&json(&spec.mcp_servers, "[]"))?,
        })
    }

    /// The agent's working directory: the session's setting, otherwise the only repository.
    pub fn working_dir(&self) -> Option<&str> {
        match (&self.working_directory, self.repositories.as_slice()) {
            (Some(named), _) => Some(named),
            (None, [only]) => Some(&only.mount_path),
            (None, _) => None,
        }
    }

    /// The hosts that may be reached; none if there is no restriction.
    pub fn allowed_hosts(&self) -> Option<Vec<String>> {
        self.networking.hosts(&self.mcp_servers)
    }

    /// The lines of a git credential store: a token for each repository that has one.
    pub fn git_credentials(&self, secrets: &Secrets) -> String {
        let tokens = secrets.repository_tokens();
        let mut lines = String::new();
        for repository in &self.repositories {
            if let (Some(token), Some(path)) =
                (tokens.get(&repository.mount_path), repository.url.strip_prefix("https://"))
            {
                // Writing to a String cannot fail.
                let _ = writeln!(
                    lines,
                    "https://x-access-token:{}@{path}",
                    percent_encoded(token.expose_secret())
                );
            }
        }
        lines
    }

    /// What depends on the environment alone.
    pub fn package_steps(&self) -> Vec<Step> {
        let steps = PackageManager::ALL.into_iter().filter_map(|manager| {
            let names = self.packages.get(manager.as_str()).filter(|names| !names.is_empty())?;
            Some(Step {
                what: format!("installing {manager} packages"),
                script: install(manager, names),
            })
        });
        steps.collect()
    }

    /// The key of an image with the environment's packages: the same for what installs the same,
    /// for the same user. None: there are no packages.
    pub fn image(&self) -> Option<String> {
        let (steps, (user, environment, version)) = (self.package_steps(), &self.environment);
        if steps.is_empty() || user.is_empty() || environment.is_empty() {
            return None;
        }
        let mut digest = Sha256::new();
        let mut add = |text: &str| {
            digest.update([&(text.len() as u64).to_be_bytes(), text.as_bytes()].concat())
        };
        add(user);
        add(environment);
        add(&version.to_string());
        add(&format!("{:?}", self.allowed_hosts()));
        steps.iter().for_each(|step| add(&step.script));
        Some(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// Repositories, then the environment's own script; last, that the working directory is there.
    pub fn steps(&self) -> Vec<Step> {
        // A repository inside of another comes after it, in whichever order they were given.
        let mut repositories: Vec<&Repository> = self.repositories.iter().collect();
        repositories.sort_by_key(|repository| repository.mount_path.split('/').count());
        let clones = repositories.into_iter().map(|repository| Step {
            what: format!("cloning {}", repository.url),
            script: clone(repository),
        });
        let script = (!self.script.trim().is_empty())
            .then(|| Step { what: "the setup script".to_owned(), script: self.script.clone() });
        let directory = self.working_directory.as_ref().map(|path| Step {
            what: "entering the working directory".to_owned(),
            script: format!("cd -- {}", quote(path)),
        });
        clones.chain(script).chain(directory).collect()
    }
}

/// Installs packages, as root where the package manager needs it, whatever user the Sprite has.
fn install(manager: PackageManager, names: &[String]) -> String {
    let words: Vec<String> = names.iter().map(|name| quote(name)).collect();
    let (all, each) = (words.join(" "), |command: &str| {
        words.iter().map(|word| format!("{command} {word}\n")).collect::<String>()
    });
    let as_root = "root=; [ \"$(id -u)\" = 0 ] || root='sudo -E'\n";
    match manager {
        PackageManager::Apt => format!(
            "set -e\nexport DEBIAN_FRONTEND=noninteractive\n{as_root}$root apt-get -q update\n$root apt-get -q install -y --no-install-recommends {all}\n"
        ),
        PackageManager::Cargo => format!("set -e\n{}", each("cargo install --quiet --")),
        PackageManager::Gem => {
            format!("set -e\n{as_root}{}", names.iter().map(|name| gem(name)).collect::<String>())
        }
        PackageManager::Go => format!("set -e\n{}", each("go install")),
        PackageManager::Npm => format!("npm install --global --no-fund --no-audit -- {all}\n"),
        PackageManager::Pip => {
            format!("PIP_BREAK_SYSTEM_PACKAGES=1 pip install --quiet -- {all}\n")
        }
    }
}

/// `name`, or `name@version` as the other managers write it.
fn gem(package: &str) -> String {
    let (name, version) = package.split_once('@').unwrap_or((package, ""));
    let version =
        if version.is_empty() { String::new() } else { format!(" --version {}", quote(version)) };
    format!("$root gem install --no-document {}{version}\n", quote(name))
}

/// The author of commits, where no other is configured.
const AUTHOR: [(&str, &str); 2] =
    [("user.name", "Agent on Demand"), ("user.email", "agent@agent-on-demand.invalid")];

/// Precedes a clone: git asks for no input, and leaves the pointers of files in Git LFS as they
/// are.
const CLONING: &str = "set -e\nexport GIT_TERMINAL_PROMPT=0 GIT_LFS_SKIP_SMUDGE=1\n";
const LFS_MISSING: &str = "git-lfs is not installed in the sandbox, and the repository has lfs: true; \
                           an environment installs it with packages: {\"apt\": [\"git-lfs\"]}";

/// Idempotent: removes what an interrupted clone left, and leaves a whole one as it is. The tips of
/// all branches can be checked out; their contents are fetched when they are needed. A submodule
/// that cannot be fetched does not fail the session; files in Git LFS that were asked for and
/// cannot be do.
fn clone(repository: &Repository) -> String {
    let (url, path, draft) = (
        quote(&repository.url),
        quote(&repository.mount_path),
        quote(&format!("{}.aod-clone", repository.mount_path)),
    );
    let identity: String = AUTHOR
        .iter()
        .map(|(key, value)| {
            format!(
                "git config --get {key} >/dev/null || git config --global {key} {}\n",
                quote(value)
            )
        })
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
    let author = repository
        .author
        .iter()
        .flat_map(|author| [("name", &author.name), ("email", &author.email)]);
    let author: String = author
        .map(|(key, value)| format!("git -C {draft} config user.{key} {}\n", quote(value)))
        .collect();
    let (find_lfs, fetch_lfs) = if repository.lfs {
        let find = format!(
            "command -v git-lfs >/dev/null || {{ echo {} >&2; exit 1; }}\n",
            quote(LFS_MISSING)
        );
        let fetch = format!(
            "git -C {draft} lfs install --local >/dev/null\ngit -C {draft} lfs pull >/dev/null\n"
        );
        (find, fetch)
    } else {
        (String::new(), String::new())
    };
    format!(
        "{CLONING}{identity}[ -e {path}/.git ] && exit 0\n{find_lfs}rm -rf {draft}\n\
         git clone --depth=1 --no-single-branch --filter=blob:none --quiet {branch}{url} {draft}\n{commit}\
         [ ! -e {draft}/.gitmodules ] || {submodules} --depth=1 || {submodules} || echo 'warning: not every submodule was fetched' >&2\n\
         {fetch_lfs}{author}mv -T {draft} {path}\n"
    )
}

/// Installs a skill from GitHub with the installer that supports every CLI. It needs Node.js 22.20
/// or later and brings its own if necessary.
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

/// Configures git to reach repositories through the model gateway, with the credentials in the file
/// `session`. Git neither changes that file nor asks other helpers. The URLs of remotes stay as
/// they are.
pub fn lead_git<'a>(
    gateway: &str,
    session: &str,
    repositories: impl Iterator<Item = (&'a str, &'a str)>,
) -> String {
    let helper = format!("!f() {{ if [ \"$1\" = get ]; then cat {}; fi; }}; f", quote(session));
    let helpers = quote(&format!("credential.{gateway}.helper"));
    let mut script = format!(
        "git config --global --replace-all {helpers} ''\ngit config --global --add {helpers} {}\n",
        quote(&helper)
    );
    for (url, path) in repositories {
        // Writing to a String cannot fail.
        let _ = writeln!(
            script,
            "git config --global {} {}",
            quote(&format!("url.{gateway}/{path}.insteadOf")),
            quote(url)
        );
    }
    script
}

/// For the user part of a URL.
fn percent_encoded(text: &str) -> String {
    let encode = |byte: u8| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
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
                ..EnvironmentSpec::default()
            }),
            resources: r#"[{"type":"github_repository","url":"https://github.com/o/r","mount_path":"/work/a b"}]"#.to_owned(),
            ..TurnSpec::default()
        };
        let setup = Setup::read(&spec).unwrap();
        let steps: Vec<_> = setup.package_steps().into_iter().chain(setup.steps()).collect();
        let what: Vec<_> = steps.iter().map(|step| step.what.as_str()).collect();
        assert_eq!(
            what,
            [
                "installing apt packages",
                "installing pip packages",
                "cloning https://github.com/o/r",
                "the setup script"
            ]
        );
        assert!(
            steps[1].script.contains("'requests>=2'") && steps[2].script.contains("'/work/a b'")
        );
        assert_eq!(setup.allowed_hosts(), Some(vec!["*.x.org".to_owned()]));
        assert_eq!(Setup::read(&TurnSpec::default()).unwrap().allowed_hosts(), None);
    }

    #[test]
    fn an_image_is_for_one_users_version_of_an_environment() {
        let image = |user: &str, environment: &str, version: u32, packages: &str| {
            let environment = EnvironmentSpec {
                packages: packages.to_owned(),
                user_id: user.to_owned(),
                environment_id: environment.to_owned(),
                version,
                ..EnvironmentSpec::default()
            };
            let spec = TurnSpec { environment: Some(environment), ..TurnSpec::default() };
            Setup::read(&spec).unwrap().image()
        };
        let packages = r#"{"pip":["six"]}"#;
        let first = image("u", "e", 1, packages);
        assert_eq!(first.as_ref().map(String::len), Some(64));
        assert_eq!(first, image("u", "e", 1, packages));
        for other in [
            image("v", "e", 1, packages),
            image("u", "f", 1, packages),
            image("u", "e", 2, packages),
            image("u", "e", 1, r#"{"pip":["seven"]}"#),
        ] {
            assert!(other.is_some() && other != first);
        }
        assert_eq!(image("u", "e", 1, "{}"), None);
    }

    /// A repository on this disk, and a home for git: what the clone script is run with.
    struct Cloning {
        folder: tempfile::TempDir,
        repository: Repository,
    }

    impl Cloning {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
            let json = serde_json::json!({ "type": "github_repository", "url": format!("file://{}", at("origin")), "mount_path": at("here") });
            let cloning = Self { repository: serde_json::from_value(json).unwrap(), folder };
            let made = cloning.run(
                "git init -q -b main origin; cd origin; git config uploadpack.allowFilter true; echo one >file; git add .
                 git -c user.name=t -c user.email=t@example.org commit -qm first; git branch other",
            );
            assert_eq!(made, (0, String::new()));
            cloning
        }

        fn run(&self, script: &str) -> (i32, String) {
            let mut command = std::process::Command::new("bash");
            command
                .args(["-c", script])
                .current_dir(self.folder.path())
                .env("HOME", self.folder.path())
                .env_remove("XDG_CONFIG_HOME");
            let output = command.output().unwrap();
            (
                output.status.code().unwrap(),
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).trim().to_owned(),
            )
        }

        fn clone(&self) -> (i32, String) {
            self.run(&clone(&self.repository))
        }
    }

    #[test]
    fn a_clone_is_made_once_and_begun_again_where_it_was_interrupted() {
        let cloning = Cloning::new();
        assert_eq!(
            cloning.run("mkdir -p here.aod-clone/.git; echo half >here.aod-clone/file").0,
            0
        );
        assert_eq!(cloning.clone(), (0, String::new()));
        assert_eq!(
            cloning.run("cat here/file; ls -d here.aod-clone 2>/dev/null || echo gone"),
            (0, "one\ngone".to_owned())
        );
        // Later changes in it are kept.
        assert_eq!(cloning.run("echo two >here/file; rm -rf origin").0, 0);
        assert_eq!(cloning.clone(), (0, String::new()));
        assert_eq!(cloning.run("cat here/file"), (0, "two".to_owned()));
        // One that fails leaves nothing that a later one takes for a clone.
        assert_eq!(cloning.run("rm -rf here").0, 0);
        assert_ne!(cloning.clone().0, 0);
        assert_ne!(cloning.run("ls -d here").0, 0);
    }

    #[test]
    fn commits_have_the_repositorys_author_else_the_users_else_the_deployments() {
        let mut cloning = Cloning::new();
        let author = "cd here; git commit -q --allow-empty -m x; git log -1 --format='%an <%ae>'";
        cloning.clone();
        assert_eq!(cloning.run(author).1, "Agent on Demand <agent@agent-on-demand.invalid>");
        cloning.run("rm -rf here .gitconfig; git config --global user.name Me; git config --global user.email me@example.org");
        cloning.clone();
        assert_eq!(cloning.run(author).1, "Me <me@example.org>");
        cloning.run("rm -rf here");
        let named = types::repository::Author {
            name: "Ann O'Neil".to_owned(),
            email: "ann@example.org".to_owned(),
        };
        cloning.repository.author = Some(named);
        cloning.clone();
        assert_eq!(cloning.run(author).1, "Ann O'Neil <ann@example.org>");
    }

    #[test]
    fn missing_git_lfs_fails_a_clone_only_if_lfs_was_requested() {
        let mut cloning = Cloning::new();
        // Where git-lfs is installed, it is not found here.
        let path = "mkdir bin; for tool in bash git rm mv cat; do ln -s \"$(command -v $tool)\" bin/; done";
        assert_eq!(cloning.run(path).0, 0);
        cloning.repository.lfs = true;
        let script = format!("PATH=$PWD/bin\n{}", clone(&cloning.repository));
        let (code, said) = cloning.run(&script);
        assert!(code == 1 && said.contains("git-lfs is not installed"), "{code} {said}");
        cloning.repository.lfs = false;
        let script = format!("PATH=$PWD/bin\n{}", clone(&cloning.repository));
        assert_eq!(cloning.run(&script), (0, String::new()));
    }

    #[test]
    fn an_agent_works_where_its_session_says_else_in_the_only_repository() {
        let one = r#"[{"type":"github_repository","url":"https://github.com/o/r","mount_path":"/workspace/r"}]"#;
        let two = r#"[{"type":"github_repository","url":"https://github.com/o/r","mount_path":"/workspace/r"},
                      {"type":"github_repository","url":"https://github.com/o/s","mount_path":"/workspace/s"}]"#;
        let setup = |resources: &str, named: Option<&str>| {
            let spec = TurnSpec {
                resources: resources.to_owned(),
                working_directory: named.map(str::to_owned),
                ..TurnSpec::default()
            };
            let setup = Setup::read(&spec).unwrap();
            (
                setup.working_dir().map(str::to_owned),
                setup.steps().last().map(|step| step.script.clone()),
            )
        };
        assert_eq!(setup("[]", None), (None, None));
        assert_eq!(setup(one, None).0.as_deref(), Some("/workspace/r"));
        assert_eq!(setup(two, None).0, None);
        for resources in ["[]", one, two] {
            let (directory, check) = setup(resources, Some("/workspace/r/a b"));
            assert_eq!(
                (directory.as_deref(), check.as_deref()),
                (Some("/workspace/r/a b"), Some("cd -- '/workspace/r/a b'"))
            );
        }
    }

    #[test]
    fn git_finds_a_repository_and_its_credential_at_the_model_gateway() {
        let cloning = Cloning::new();
        let session = cloning.folder.path().join("session");
        std::fs::write(&session, "username=session\npassword=token\n").unwrap();
        let routes = [
            ("https://github.com/o/r", "git/github.com/o/r"),
            ("https://github.com/o/s", "git/github.com/o/s"),
        ];
        let script = lead_git("http://gateway:8780", session.to_str().unwrap(), routes.into_iter());
        assert_eq!(
            cloning.run(&format!(
                "git config --global credential.helper 'store --file other'\n{script}{script}"
            )),
            (0, String::new())
        );
        let asked = "protocol=http\nhost=gateway:8780\npath=git/github.com/o/r\n";
        let (_, said) = cloning.run(&format!("printf '{asked}\n' | git credential fill"));
        assert!(said.contains("username=session") && said.contains("password=token"), "{said}");
        // A rejected credential is kept, and no other helper stores it.
        cloning.run(&format!(
            "for verb in reject approve; do printf '{asked}username=session\npassword=token\n\n' | git credential $verb; done"
        ));
        assert!(session.exists() && cloning.run("ls other").0 != 0);
        let (_, urls) = cloning
            .run("cd origin; git remote add origin https://github.com/o/r.git; git config remote.origin.url; git remote get-url origin");
        assert_eq!(urls, "https://github.com/o/r.git\nhttp://gateway:8780/git/github.com/o/r.git");
    }

    #[test]
    fn a_gem_may_have_a_version_or_a_range_of_them() {
        assert_eq!(gem("rake"), "$root gem install --no-document rake\n");
        assert_eq!(gem("rake@13.0.6"), "$root gem install --no-document rake --version 13.0.6\n");
        assert_eq!(
            gem("rake@~>13,<14"),
            "$root gem install --no-document rake --version '~>13,<14'\n"
        );
    }

    #[test]
    fn a_token_cannot_break_out_of_its_line() {
        assert_eq!(percent_encoded("gh_p@/:\n"), "gh_p%40%2F%3A%0A");
    }
}
