//! Claims of documents come with the command that shows them: a section with a measured figure or a
//! promise says "Shown by `COMMAND`", or that no command repeats it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::process::Command;

use xtask::root;

/// What measured figures are written with.
const FIGURES: [&str; 5] = ["p50", "p99", "MB/s", "00 a second", "measured"];
/// What a user would hold us to.
const PROMISES: [&str; 5] =
    ["exactly once", "unmodified", "no request fails", "output is lost", "nothing is lost"];
const MARKER: &str = "hown by ";
/// For figures that were measured by hand.
const NO_COMMAND: &str = "o command repeats it";
/// Decision records and the changelog describe the past; generated files repeat the sources.
const WITHOUT_CLAIMS: [&str; 7] = [
    "docs/adr/",
    "CHANGELOG.md",
    "docs/bus.md",
    "docs/configuration.md",
    "docs/metrics.md",
    "docs/runtimes.md",
    "docs/glossary.md",
];

fn documents() -> Vec<(String, String)> {
    let output = Command::new("git")
        .args(["ls-files", "-z", "*.md", "docs/*.md"])
        .current_dir(root())
        .output()
        .unwrap();
    let paths = String::from_utf8(output.stdout).unwrap();
    let wanted =
        |path: &&str| !path.is_empty() && (!path.contains('/') || path.starts_with("docs/"));
    let excluded = |path: &&str| WITHOUT_CLAIMS.iter().any(|start| path.starts_with(start));
    let read = |path: &str| (path.to_owned(), std::fs::read_to_string(root().join(path)).unwrap());
    paths.split('\0').filter(wanted).filter(|path| !excluded(path)).map(read).collect()
}

/// The sections of a text with their headings; code blocks are left out.
fn sections(text: &str) -> Vec<(&str, String)> {
    let (mut sections, mut is_code) = (vec![("", String::new())], false);
    for line in text.lines() {
        is_code ^= line.starts_with("```");
        if is_code {
        } else if line.starts_with('#') {
            sections.push((line, String::new()));
        } else if let Some((_, body)) = sections.last_mut() {
            body.push_str(line);
            body.push('\n');
        }
    }
    sections
}

fn claims_something(section: &str) -> bool {
    let lower = section.to_lowercase();
    FIGURES.iter().any(|figure| section.contains(figure))
        || PROMISES.iter().any(|promise| lower.contains(promise))
}

/// The commands behind the markers of a section: those in backticks up to the end of the sentence.
fn commands(section: &str) -> Vec<&str> {
    let sentences =
        section.split(MARKER).skip(1).map(|rest| rest.split(". ").next().unwrap_or(rest));
    let sentences = sentences.map(|sentence| sentence.lines().next().unwrap_or(sentence));
    let quoted = sentences.flat_map(|sentence| sentence.split('`').skip(1).step_by(2));
    quoted.filter(|text| text.starts_with("make ") || text.starts_with("cargo ")).collect()
}

/// Whether a command names a target of the Makefile, or tests that exist.
fn exists(command: &str) -> bool {
    let words: Vec<&str> = command.split(' ').take_while(|word| *word != "--").collect();
    match words.as_slice() {
        ["make", target, ..] => read("Makefile").contains(&format!("\n{target}: ")),
        ["cargo", "test", "-p", package, "--test", test, rest @ ..] => {
            let files = tracked(&format!("{package}/tests/*.rs"), &format!("/tests/{test}"));
            !files.is_empty() && rest.iter().all(|filter| names_tests(&files, filter))
        }
        ["cargo", "test", "-p", package, "--lib", rest @ ..] => {
            let files = tracked(&format!("{package}/src/*.rs"), "/src/");
            !files.is_empty() && rest.iter().all(|filter| names_tests(&files, filter))
        }
        _ => false,
    }
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_default()
}

/// The files of the repository that match a pattern, in any folder, and whose paths hold this.
fn tracked(pattern: &str, part: &str) -> Vec<String> {
    let mut list = Command::new("git");
    list.args(["ls-files", "-z", pattern, &format!("*/{pattern}")]).current_dir(root());
    let paths = String::from_utf8(list.output().unwrap().stdout).unwrap();
    paths.split('\0').filter(|path| path.contains(part)).map(str::to_owned).collect()
}

/// A filter names a module, or what a test's name contains.
fn names_tests(files: &[String], filter: &str) -> bool {
    files.iter().any(|path| {
        path.ends_with(&format!("/{filter}.rs"))
            || read(path).lines().any(|line| is_test(line, filter))
    })
}

fn is_test(line: &str, filter: &str) -> bool {
    line.split("fn ")
        .nth(1)
        .and_then(|rest| rest.split('(').next())
        .is_some_and(|name| name.contains(filter))
}

#[test]
fn every_claim_comes_with_a_command_that_exists() {
    let documents = documents();
    assert!(documents.len() > 15, "{}", documents.len());
    let mut shown = 0;
    for (path, text) in &documents {
        for (heading, section) in sections(text) {
            let commands = commands(&section);
            shown += commands.len();
            for command in &commands {
                assert!(
                    exists(command),
                    "{path}, {heading:?}: `{command}` names nothing that exists"
                );
            }
            let has_marker = !commands.is_empty() || section.contains(NO_COMMAND);
            assert!(
                has_marker || !claims_something(&section),
                "{path}, {heading:?} makes a claim: add \"Shown by `COMMAND`\""
            );
        }
    }
    assert!(shown > 10, "{shown}");
}

#[test]
fn a_claim_without_a_command_is_found() {
    assert!(
        claims_something("p50 5 ms")
            && claims_something("Resumes exactly once.")
            && !claims_something("Sends a request.")
    );
    assert_eq!(
        commands("Fast. Shown by `make bench` and `make faults`. See `make dev`."),
        ["make bench", "make faults"]
    );
    assert!(commands("`make bench` exists.").is_empty());
    assert!(exists("make bench ARGS=replay") && !exists("make nothing") && !exists("cargo bench"));
    assert!(exists("cargo test -p xtask --test claims a_claim_without_a_command_is_found"));
    assert!(
        !exists("cargo test -p xtask --test claims no_such_test")
            && !exists("cargo test -p xtask --test nothing")
    );
}
