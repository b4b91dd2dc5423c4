//! Files of the Managed Agents API (docs/managed-agents-api.md).

use std::str::FromStr;

/// Where a file comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// Uploaded by its user.
    Upload,
    /// Written by an agent.
    Output,
    /// A session's copy of one that was uploaded.
    Copy,
}

impl FileKind {
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Upload => "upload",
            Self::Output => "output",
            Self::Copy => "copy",
        }
    }
}

impl FromStr for FileKind {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::Upload, Self::Output, Self::Copy]
            .into_iter()
            .find(|kind| kind.as_str() == text)
            .ok_or(())
    }
}

/// Where uploaded files are mounted.
pub const UPLOADS: &str = "/mnt/session/uploads";
/// Directory of an agent's outputs, which are stored after each turn.
pub const OUTPUTS: &str = "/mnt/session/outputs";

/// How many files a session may be given.
pub const FILES_OF_SESSION_MAX: usize = 500;
/// How many files of an agent are kept.
pub const OUTPUTS_OF_SESSION_MAX: usize = 500;

/// Linux has no longer names.
const NAME_BYTES_MAX: usize = 255;
const PATH_BYTES_MAX: usize = 1024;

/// Whether a text can be the name of a file.
#[must_use]
pub fn is_filename(text: &str) -> bool {
    let plain = |c: char| !c.is_control() && c != '/';
    (1..=NAME_BYTES_MAX).contains(&text.len())
        && text.chars().all(plain)
        && text != "."
        && text != ".."
}

/// A path below [`UPLOADS`], for what a client says: absolute or not, below the folder already or
/// not. None: it leads out, or nowhere.
#[must_use]
pub fn mount_path(text: &str) -> Option<String> {
    let below = text.strip_prefix(UPLOADS).filter(|rest| rest.starts_with('/')).unwrap_or(text);
    let parts: Vec<&str> =
        below.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let is_good =
        !parts.is_empty() && !below.ends_with('/') && parts.iter().all(|part| is_filename(part));
    let path = format!("{UPLOADS}/{}", parts.join("/"));
    (is_good && path.len() <= PATH_BYTES_MAX).then_some(path)
}

/// What a file's name says of its contents.
#[must_use]
pub fn mime_of(filename: &str) -> &'static str {
    let extension = filename
        .rsplit_once('.')
        .map(|(_, extension)| extension.to_ascii_lowercase())
        .unwrap_or_default();
    match extension.as_str() {
        "txt" | "log" => "text/plain",
        "md" => "text/markdown",
        "csv" => "text/csv",
        "html" | "htm" => "text/html",
        "json" => "application/json",
        "pdf" => "application/pdf",
        "png" => "image/png",
        "jpg" | "jpeg" => "image/jpeg",
        "gif" => "image/gif",
        "svg" => "image/svg+xml",
        "zip" => "application/zip",
        "xlsx" => "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet",
        "docx" => "application/vnd.openxmlformats-officedocument.wordprocessingml.document",
        "pptx" => "application/vnd.openxmlformats-officedocument.presentationml.presentation",
        _ => "application/octet-stream",
    }
}

/// Whether a text is a media type that a header can hold.
#[must_use]
pub fn is_mime(text: &str) -> bool {
    let token = |part: &str| {
        !part.is_empty()
            && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$&-^_.+".contains(&byte))
    };
    text.len() <= 127
        && text.split_once('/').is_some_and(|(kind, subtype)| token(kind) && token(subtype))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_mount_path_stays_below_its_folder() {
        for (text, expected) in [
            ("a.txt", "/mnt/session/uploads/a.txt"),
            ("/data//x/./a.txt", "/mnt/session/uploads/data/x/a.txt"),
            ("/mnt/session/uploads/a", "/mnt/session/uploads/a"),
            ("/mnt/session/uploadsx/a", "/mnt/session/uploads/mnt/session/uploadsx/a"),
        ] {
            assert_eq!(mount_path(text).as_deref(), Some(expected), "{text}");
        }
        for bad in [
            "",
            "/",
            ".",
            "..",
            "a/../b",
            "/mnt/session/uploads/",
            "/mnt/session/uploads/../x",
            "a\nb",
            "a/",
            &"x".repeat(256),
        ] {
            assert_eq!(mount_path(bad), None, "{bad}");
        }
    }

    #[test]
    fn names_and_types_are_plain() {
        assert!(
            is_filename("ü b.txt")
                && !is_filename("a/b")
                && !is_filename("")
                && !is_filename("a\0")
                && !is_filename("..")
        );
        assert!(
            is_mime("text/plain")
                && is_mime(mime_of("x.XLSX"))
                && !is_mime("text")
                && !is_mime("a/b\r\nx: y")
                && !is_mime("a/b; c")
        );
        assert_eq!(mime_of("x"), "application/octet-stream");
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_folder(text in "(/mnt/session/uploads)?[a./ ]{0,20}|\\PC*") {
            if let Some(path) = mount_path(&text) {
                prop_assert!(path.starts_with("/mnt/session/uploads/") && !path.split('/').any(|part| part == ".."));
                prop_assert_eq!(mount_path(&path), Some(path.clone()));
            }
        }
    }
}
