//! Cycles between the files of a service stay small, so that a reader of one file needs few others.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use xtask::root;

const SERVICES: [&str; 4] = ["scheduler", "gateway", "sprite-runner", "local-sprites"];
/// The most files that may need each other.
const CYCLE_FILES_MAX: usize = 2;

type Modules = BTreeMap<Vec<String>, String>;

/// The modules of a crate, by path, with the code outside of their tests.
fn modules(folder: &Path, path: &[String], found: &mut Modules) {
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let file = entry.path();
        let name = file.file_stem().unwrap().to_string_lossy().into_owned();
        if file.is_dir() {
            modules(&file, &[path, &[name]].concat(), found);
        } else if file.extension().is_some_and(|extension| extension == "rs")
            && !name.ends_with("tests")
            && name != "main"
        {
            let module = if name == "lib" || name == "mod" {
                path.to_vec()
            } else {
                [path, &[name]].concat()
            };
            let text = std::fs::read_to_string(&file).unwrap();
            found.insert(
                module,
                text.split("#[cfg(test)]\nmod ").next().unwrap_or_default().to_owned(),
            );
        }
    }
}

/// The paths that a text names after `crate::`, with each branch of `{ … }`.
fn paths(text: &str) -> Vec<Vec<String>> {
    let code: String = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join(" ");
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        branch(&mut code[at + "crate::".len()..].chars().peekable(), &[], &mut found);
    }
    found
}

/// Reads `a::{b, c::d}` after `prefix`.
fn branch(
    text: &mut std::iter::Peekable<std::str::Chars<'_>>,
    prefix: &[String],
    found: &mut Vec<Vec<String>>,
) {
    let mut path = prefix.to_vec();
    loop {
        while text.next_if(|c| c.is_whitespace()).is_some() {}
        if text.next_if_eq(&'{').is_some() {
            loop {
                branch(text, &path, found);
                while text.next_if(|c| c.is_whitespace()).is_some() {}
                if text.next_if_eq(&',').is_none() {
                    text.next_if_eq(&'}');
                    return;
                }
            }
        }
        let mut word = String::new();
        while let Some(c) = text.next_if(|c| c.is_alphanumeric() || *c == '_') {
            word.push(c);
        }
        if word.is_empty() {
            break;
        }
        path.push(word);
        if text.next_if_eq(&':').is_none() || text.next_if_eq(&':').is_none() {
            break;
        }
    }
    // Nothing stands behind a trailing comma.
    if path.len() > prefix.len() {
        found.push(path);
    }
}

/// Which modules each module uses: the longest module that begins a path. The crate's root has no
/// code of a feature.
fn arrows(modules: &Modules) -> BTreeMap<&Vec<String>, BTreeSet<&Vec<String>>> {
    let target = |path: &Vec<String>| {
        (1..=path.len())
            .rev()
            .find_map(|end| modules.get_key_value(&path[..end]).map(|(module, _)| module))
    };
    let uses = |module, text: &String| {
        paths(text).iter().filter_map(target).filter(|used| *used != module).collect()
    };
    modules
        .iter()
        .filter(|(module, _)| !module.is_empty())
        .map(|(module, text)| (module, uses(module, text)))
        .collect()
}

/// The modules that `from` reaches.
fn reached<'a>(
    from: &'a Vec<String>,
    arrows: &BTreeMap<&'a Vec<String>, BTreeSet<&'a Vec<String>>>,
) -> BTreeSet<&'a Vec<String>> {
    let (mut seen, mut waiting) = (BTreeSet::new(), vec![from]);
    while let Some(module) = waiting.pop() {
        for next in arrows.get(module).into_iter().flatten() {
            if seen.insert(*next) {
                waiting.push(next);
            }
        }
    }
    seen
}

#[test]
fn nested_imports_are_read() {
    let found = paths("use crate::{a::{b, c::D,}, e,}; let x = crate::f::g(1); // crate::h");
    let found: Vec<String> = found.iter().map(|path| path.join("::")).collect();
    assert_eq!(found, ["a::b", "a::c::D", "e", "f::g"]);
}

#[test]
fn files_form_no_large_cycles() {
    for service in SERVICES {
        let mut modules = Modules::new();
        self::modules(&root().join("services").join(service).join("src"), &[], &mut modules);
        let arrows = arrows(&modules);
        let reach: BTreeMap<_, _> =
            arrows.keys().map(|module| (*module, reached(module, &arrows))).collect();
        assert!(
            arrows.values().map(BTreeSet::len).sum::<usize>() > 10,
            "{service}: no arrows were found"
        );
        for module in arrows.keys() {
            let together: Vec<String> = reach
                .keys()
                .filter(|other| reach[module].contains(*other) && reach[*other].contains(module))
                .map(|m| m.join("::"))
                .collect();
            assert!(
                together.len() <= CYCLE_FILES_MAX,
                "{service}: {} files need each other: {}",
                together.len(),
                together.join(", ")
            );
        }
    }
}
