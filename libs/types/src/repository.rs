//! Repositories that a session begins with (docs/api.md §6).

use std::fmt;

use serde::{Deserialize, Serialize};

/// The host of all repositories.
pub const HOST: &str = "github.com";

/// A GitHub repository and its path in the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Repository {
    #[serde(rename = "type")]
    pub kind: RepositoryTag,
    /// `https://github.com/<owner>/<repo>`
    pub url: String,
    pub mount_path: String,
    /// What is checked out; by default the default branch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkout: Option<Checkout>,
    /// Whether the contents of files in Git LFS are fetched; without it such files hold their
    /// pointers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub lfs: bool,
    /// The author of commits in this repository; by default the deployment's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub author: Option<Author>,
}

/// The author of commits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Author {
    pub name: String,
    pub email: String,
}

/// A name or an address that git writes into a commit as it is: it drops `<`, `>` and what is at
/// the ends.
#[must_use]
pub fn is_author_part(text: &str) -> bool {
    (1..=200).contains(&text.len())
        && !text.chars().any(|c| c.is_control() || c == '<' || c == '>')
        && text.trim_matches(|c: char| c.is_whitespace() || ".,:;\"\\'".contains(c)) == text
}

/// What of a repository is checked out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Checkout {
    Branch { name: String },
    Commit { sha: String },
}

/// A branch as `git check-ref-format` takes it, and no option.
#[must_use]
pub fn is_branch(text: &str) -> bool {
    let allowed = |c: char| !c.is_control() && !" ~^:?*[\\".contains(c);
    (1..=250).contains(&text.len())
        && text.chars().all(allowed)
        && !text.starts_with('-')
        && text != "@"
        && !["..", "@{"].iter().any(|bad| text.contains(bad))
        && !text.ends_with('.')
        && text
            .split('/')
            .all(|part| !part.is_empty() && !part.starts_with('.') && !part.ends_with(".lock"))
}

/// A whole commit id, SHA-1 or SHA-256.
#[must_use]
pub fn is_commit(text: &str) -> bool {
    matches!(text.len(), 40 | 64)
        && text.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c))
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RepositoryTag {
    #[default]
    GithubRepository,
}

/// `https://github.com/<owner>/<repo>`, without the `.git` that may follow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepositoryUrl<'a> {
    owner: &'a str,
    name: &'a str,
}

impl<'a> RepositoryUrl<'a> {
    #[must_use]
    pub fn parse(text: &'a str) -> Option<Self> {
        let (owner, name) = text.strip_prefix("https://github.com/")?.split_once('/')?;
        let name = name.strip_suffix(".git").unwrap_or(name);
        (is_owner(owner) && is_name(name)).then_some(Self { owner, name })
    }

    /// Where the repository is cloned to by default.
    #[must_use]
    pub fn default_mount_path(&self) -> String {
        format!("/workspace/{}", self.name)
    }
}

impl fmt::Display for RepositoryUrl<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "https://github.com/{}/{}", self.owner, self.name)
    }
}

/// A GitHub user or organisation.
pub(crate) fn is_owner(text: &str) -> bool {
    (1..=100).contains(&text.len())
        && !text.starts_with('-')
        && text.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'-' || c == b'_')
}

/// A GitHub repository's name.
pub(crate) fn is_name(text: &str) -> bool {
    let allowed = |c: u8| c.is_ascii_alphanumeric() || b"-_.".contains(&c);
    (1..=100).contains(&text.len())
        && text != "."
        && text != ".."
        && !text.starts_with('-')
        && text.bytes().all(allowed)
}

/// Why a path cannot be mounted on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MountPathError {
    #[error("mount_path must be absolute")]
    Relative,
    #[error("mount_path must be normal: without '.', '..', '//' or a slash at its end")]
    NotNormal,
    #[error("mount_path must not hold control characters")]
    Control,
    #[error("mount_path must not be '{0}'")]
    Reserved(&'static str),
}

/// # Errors
/// What is wrong with the path as a place for a repository.
pub fn check_mount_path(path: &str) -> Result<(), MountPathError> {
    const RESERVED: [&str; 2] = ["/", "/home/sprite"];
    let Some(rest) = path.strip_prefix('/') else { return Err(MountPathError::Relative) };
    if path.chars().any(char::is_control) {
        return Err(MountPathError::Control);
    }
    if let Some(reserved) = RESERVED
        .into_iter()
        .find(|reserved| path.trim_end_matches('/') == reserved.trim_end_matches('/'))
    {
        return Err(MountPathError::Reserved(reserved));
    }
    if rest.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(MountPathError::NotNormal);
    }
    Ok(())
}

/// Absolute, without control characters, and as the kernel resolves it.
#[must_use]
pub fn is_normal_path(path: &str) -> bool {
    let parts = path
        .strip_prefix('/')
        .map(|rest| rest.split('/').all(|part| !matches!(part, "" | "." | "..")));
    path.chars().all(|c| !c.is_control()) && (path == "/" || parts == Some(true))
}

#[cfg(test)]
mod tests {
    use std::path::{Component, Path};

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_github_over_https() {
        let url = RepositoryUrl::parse("https://github.com/org/repo.git").unwrap();
        assert_eq!(
            (url.to_string().as_str(), url.default_mount_path().as_str()),
            ("https://github.com/org/repo", "/workspace/repo")
        );
        for bad in [
            "http://github.com/o/r",
            "https://gitlab.com/o/r",
            "https://github.com/o",
            "https://github.com/o/r/x",
            "https://github.com/o/..",
            "https://github.com/o/.git",
            "https://user:pw@github.com/o/r",
            "https://github.com/o/r?x=1",
            "https://github.com/o/r\n",
            "https://github.com/--o/r",
            "git@github.com:o/r",
        ] {
            assert_eq!(RepositoryUrl::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn branches_and_commits_are_validated_as_by_git() {
        for good in ["main", "feature/a-b", "é", "a.b", "@x"] {
            assert!(is_branch(good), "{good}");
        }
        for bad in [
            "",
            "-x",
            "a..b",
            "a b",
            "/a",
            "a/",
            "a//b",
            ".a",
            "a/.b",
            "a.lock",
            "a/b.lock/c",
            "@",
            "a@{b",
            "a\n",
            "a\\b",
            "a.",
        ] {
            assert!(!is_branch(bad), "{bad:?}");
        }
        assert!(is_commit(&"0a".repeat(20)) && is_commit(&"0a".repeat(32)));
        assert!(!is_commit("HEAD") && !is_commit(&"0A".repeat(20)) && !is_commit(&"0a".repeat(19)));
    }

    #[test]
    fn authors_are_what_git_writes() {
        for good in ["Ann Lee", "ann@example.org", "O'Neil", "J. R. R. T", "\u{6d77}"] {
            assert!(is_author_part(good), "{good}");
        }
        for bad in ["", " a", "a ", "a<b", "a>b", "a\nb", ".", "a.", "'a", "\"", &"x".repeat(201)] {
            assert!(!is_author_part(bad), "{bad:?}");
        }
    }

    #[test]
    fn mount_paths_are_absolute_and_normal() {
        assert_eq!(check_mount_path("/workspace/a b"), Ok(()));
        assert_eq!(check_mount_path("/home/sprite/x"), Ok(()));
        assert_eq!(check_mount_path("x"), Err(MountPathError::Relative));
        assert_eq!(check_mount_path(""), Err(MountPathError::Relative));
        for reserved in ["/", "//", "/home/sprite", "/home/sprite/"] {
            assert!(
                matches!(check_mount_path(reserved), Err(MountPathError::Reserved(_))),
                "{reserved}"
            );
        }
        for odd in ["/a/../b", "/a/", "/a//b", "/./a", "/.."] {
            assert_eq!(check_mount_path(odd), Err(MountPathError::NotNormal), "{odd}");
        }
        assert_eq!(check_mount_path("/a\n"), Err(MountPathError::Control));
        for good in ["/", "/a", "/home/sprite", "/a b/c"] {
            assert!(is_normal_path(good), "{good}");
        }
        for bad in ["", "a", "/a/", "//", "/a//b", "/..", "/a/./b", "/a\n"] {
            assert!(!is_normal_path(bad), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_path_is_what_the_kernel_resolves(path in "[/a.]{0,12}|/.{0,10}") {
            if check_mount_path(&path).is_ok() {
                let parts: Vec<_> = Path::new(&path).components().collect();
                prop_assert_eq!(parts[0], Component::RootDir);
                prop_assert!(parts.len() > 1 && parts[1..].iter().all(|part| matches!(part, Component::Normal(_))));
                let again: std::path::PathBuf = parts.iter().collect();
                prop_assert_eq!(again.to_str(), Some(path.as_str()));
            }
        }
    }
}
