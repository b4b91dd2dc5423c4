//! What comments and documents cite exists: files below `docs/`, their sections, and anchors of
//! links.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeSet, process::Command};

use xtask::root;

/// Every tracked text file whose name ends in one of `suffixes`, with its path from the root.
fn tracked(suffixes: &[&str]) -> Vec<(String, String)> {
    let output = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().unwrap();
    let paths = String::from_utf8(output.stdout).unwrap();
    let wanted = |path: &&str| suffixes.iter().any(|suffix| path.ends_with(suffix));
    let read =
        |path: &str| Some((path.to_owned(), std::fs::read_to_string(root().join(path)).ok()?));
    paths.split('\0').filter(wanted).filter_map(read).collect()
}

/// The headings of a Markdown text, without those in code blocks.
fn headings(text: &str) -> impl Iterator<Item = &str> {
    let mut code = false;
    text.lines().filter_map(move |line| {
        code ^= line.starts_with("```");
        (!code && line.starts_with('#')).then(|| line.trim_start_matches('#').trim())
    })
}

/// `3.5` of a heading `3.5 Keepalive` or `3. Exec`.
fn section_numbers(text: &str) -> BTreeSet<String> {
    let number = |heading: &str| {
        heading.split(' ').next().unwrap_or_default().trim_end_matches('.').to_owned()
    };
    headings(text)
        .map(number)
        .filter(|number| number.starts_with(|c: char| c.is_ascii_digit()))
        .collect()
}

/// The anchor that GitHub gives a heading.
fn anchor(heading: &str) -> String {
    let kept = heading
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .collect::<String>();
    kept.replace(' ', "-")
}

/// The documents that a line names, each with the sections that follow it: `docs/api.md §3 to §6`.
fn citations(line: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    let ends = |c: char| !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | '/'));
    for (at, _) in
        line.char_indices().filter(|(at, c)| *c == '§' || line[*at..].starts_with("docs/"))
    {
        let rest = &line[at..];
        if let Some(number) = rest.strip_prefix('§') {
            let number: String =
                number.chars().take_while(|c| c.is_ascii_digit() || *c == '.').collect();
            let number = number.trim_end_matches('.').to_owned();
            match found.last_mut() {
                Some((_, sections)) => sections.push(number),
                None => found.push((String::new(), vec![number])),
            }
        } else if !line[..at]
            .ends_with(|c: char| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '-'))
        {
            found.push((
                rest[..rest.find(ends).unwrap_or(rest.len())].trim_end_matches('.').to_owned(),
                Vec::new(),
            ));
        }
    }
    found
}

#[test]
fn citations_are_read_with_their_sections() {
    let found = citations("see docs/api.md §3 to §6.1, and docs/sprites-api.md §11.3. More");
    let expected = [("docs/api.md", vec!["3", "6.1"]), ("docs/sprites-api.md", vec!["11.3"])];
    let expected = expected.map(|(path, sections)| {
        (path.to_owned(), sections.into_iter().map(str::to_owned).collect())
    });
    assert_eq!(found, expected);
    assert_eq!(anchor("3.5 Keepalive"), "35-keepalive");
    assert_eq!(
        section_numbers("## 3. Exec\n```\n# 4 no\n```\n### 3.5 Keepalive"),
        ["3".to_owned(), "3.5".to_owned()].into()
    );
}

#[test]
fn cited_documents_and_sections_exist() {
    let mut cited = 0;
    for (path, text) in
        tracked(&[".rs", ".proto", ".sql", ".toml", ".yml", ".yaml", ".sh", ".pl", ".py"])
    {
        if path == "xtask/tests/citations.rs" {
            continue;
        }
        for (number, line) in text.lines().enumerate() {
            for (document, sections) in citations(line) {
                let place = format!("{path}:{}", number + 1);
                assert!(
                    !document.is_empty(),
                    "{place} cites a section of no document; write `docs/NAME.md §n`"
                );
                let file = root().join(&document);
                assert!(file.exists(), "{place} cites {document}, which does not exist");
                if sections.is_empty() {
                    continue;
                }
                let known = section_numbers(&std::fs::read_to_string(file).unwrap());
                for section in sections {
                    cited += 1;
                    assert!(
                        known.contains(&section),
                        "{place} cites {document} §{section}, which does not exist"
                    );
                }
            }
        }
    }
    assert!(cited > 40, "{cited}");
}

#[test]
fn anchors_of_links_lead_to_headings() {
    for (path, text) in tracked(&[".md"]) {
        let folder = root().join(&path).parent().unwrap().to_owned();
        let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
        for target in targets.filter(|target| !target.contains("://")) {
            let Some((file, wanted)) = target.split_once('#') else { continue };
            let target_text = if file.is_empty() {
                text.clone()
            } else {
                std::fs::read_to_string(folder.join(file)).unwrap()
            };
            assert!(
                headings(&target_text).any(|heading| anchor(heading) == wanted),
                "{path} links to {target}: no such heading"
            );
        }
    }
}
